"""Tables for people: one list of sections, as lines on a terminal or as a single HTML page that needs nothing from outside."""

import re
import textwrap
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple


class Code(NamedTuple):
    """Text that is shown letter by letter, such as a token."""

    text: str


class Bar(NamedTuple):
    """A share between 0 and 1, drawn."""

    share: float


Cell = str | Code | Bar | tuple[str | Code, ...]
"""What a table's field holds; a tuple's parts are joined."""


@dataclass(frozen=True)
class Section:
    """A heading, a sentence or two, and a table; all but the heading may be missing."""

    title: str
    text: str = ""
    header: Sequence[str] = ()
    rows: Sequence[Sequence[Cell]] = ()


WIDEST = 96
"""Columns of the terminal that one field may take."""
BAR = 24
"""Columns of a full bar."""
_NUMBER = re.compile(r"[-+]?[\d.,]+%?|")


def terminal(sections: Sequence[Section]) -> list[str]:
    """Lines of plain text."""
    lines: list[str] = []
    for section in sections:
        lines += ["", section.title, *textwrap.wrap(section.text, WIDEST)]
        if section.rows:
            lines += _table(section)
    return lines[1:]


def html(title: str, sections: Sequence[Section]) -> str:
    """A whole page: markup and style in one file, no script, nothing fetched; light or dark as the reader has it, and fit
    for paper."""
    body = "\n".join(map(_section, sections))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n<main>\n"
        f"{body}\n</main>\n</body>\n</html>\n"
    )


# --- terminal ---------------------------------------------------------------------------------------------------------


def _table(section: Section) -> list[str]:
    rows = [[_cut(_plain(cell)) for cell in row] for row in section.rows]
    right = _right_columns(section)
    table = [list(section.header), *rows] if section.header else rows
    widths = [max(map(_width, column)) for column in zip(*table)]
    return [
        ("  " + "  ".join(_pad(cell, width, r) for cell, width, r in zip(row, widths, right))).rstrip() for row in table
    ]


def _plain(cell: Cell) -> str:
    if isinstance(cell, Bar):
        return "█" * round(BAR * cell.share) or ("▏" if cell.share > 0 else "")
    if isinstance(cell, Code):
        return f'"{cell.text}"'
    return cell if isinstance(cell, str) else "".join(map(_plain, cell))


def _right_columns(section: Section) -> list[bool]:
    """Columns of nothing but numbers."""
    return [all(isinstance(c, str) and _NUMBER.fullmatch(c) for c in column) for column in zip(*section.rows)]


def _width(text: str) -> int:
    """Columns that a terminal gives to `text`."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _cut(text: str) -> str:
    if _width(text) <= WIDEST:
        return text
    while _width(text) >= WIDEST:
        text = text[:-1]
    return text + "…"


def _pad(text: str, width: int, right: bool) -> str:
    room = " " * (width - _width(text))
    return room + text if right else text + room


# --- HTML -------------------------------------------------------------------------------------------------------------


def _section(section: Section) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>"]
    if section.text:
        parts.append(f"<p>{escape(section.text)}</p>")
    if section.rows:
        right = _right_columns(section)
        lines = [f"<tr>{''.join(_field(cell, r) for cell, r in zip(row, right))}</tr>" for row in section.rows]
        if section.header:
            names = "".join(
                f'<th scope="col"{_RIGHT if r else ""}>{escape(name)}</th>' for name, r in zip(section.header, right)
            )
            lines = ["<thead>", f"<tr>{names}</tr>", "</thead>", "<tbody>", *lines, "</tbody>"]
        parts += ["<table>", *lines, "</table>"]
    return "\n".join(["<section>", *parts, "</section>"])


_RIGHT = ' class="number"'


def _field(cell: Cell, right: bool) -> str:
    if isinstance(cell, Bar):
        return f'<td class="bar"><div style="width:{100 * min(max(cell.share, 0.0), 1.0):.2f}%"></div></td>'
    return f"<td{_RIGHT if right else ''}>{_markup(cell)}</td>"


def _markup(cell: str | Code | tuple[str | Code, ...]) -> str:
    if isinstance(cell, Code):  # bdi: text that runs from right to left must not turn its neighbours round
        return f"<bdi><code>{escape(cell.text)}</code></bdi>"
    return escape(cell) if isinstance(cell, str) else "".join(map(_markup, cell))


_STYLE = """
:root { color-scheme: light dark; --ink: #1c1d21; --soft: #62656e; --line: #d9dbe0; --paper: #fff; --field: #f0f1f4; --bar: #3d6fb4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e7ea; --soft: #9a9da6; --line: #35373d; --paper: #17181b; --field: #25272c; --bar: #6c9be0; }
}
* { box-sizing: border-box; }
body { margin: 1.5rem auto; padding: 0 1.25rem; max-width: 92rem; background: var(--paper); color: var(--ink);
  font: .875rem/1.4 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0 0 .5rem; }
h2 { font-size: 1rem; margin: 0 0 .25rem; }
h2, p, thead { break-after: avoid; }
p { margin: 0 0 .4rem; color: var(--soft); max-width: 46rem; }
main { columns: 2 34rem; column-gap: 2.5rem; }
section { margin: 0 0 1.4rem; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); vertical-align: bottom; }
th, td { padding: .12rem .6rem .12rem 0; border-bottom: 1px solid var(--line); }
td { vertical-align: top; }
tr { break-inside: avoid; }
.number { text-align: right; white-space: nowrap; }
code { background: var(--field); border-radius: 3px; padding: 0 .2em; font: .93em/1.3 ui-monospace, monospace;
  white-space: pre; display: inline-block; max-width: 16em; overflow: hidden; text-overflow: ellipsis; vertical-align: bottom; }
.bar { width: 7rem; min-width: 4rem; }
.bar div { height: .75em; margin-top: .3em; background: var(--bar); min-width: 1px; print-color-adjust: exact; }
@page { margin: 12mm; }
@media print {
  :root { --ink: #000; --soft: #444; --line: #ccc; --paper: #fff; --field: #f0f0f0; --bar: #3d6fb4; }
  html { font-size: 7.2pt; }
  body { margin: 0; padding: 0; max-width: none; }
  .bar { width: 4rem; }
  main { columns: 2; column-gap: 7mm; }
  section { overflow: visible; margin-bottom: .8rem; }
}
"""
