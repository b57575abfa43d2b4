"""Pages of sections: rendered as terminal lines, Markdown, or a self-contained HTML page."""

import re
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal, NamedTuple


class Code(NamedTuple):
    """Text that is shown verbatim, such as a token."""

    text: str


class Soft(NamedTuple):
    """Text of less emphasis, such as the interval of a figure."""

    text: str


class Bar(NamedTuple):
    """A share between 0 and 1, drawn as a bar."""

    share: float


Part = str | Code | Soft
Cell = Part | Bar | tuple[Part, ...]
"""Content of a table cell; the parts of a tuple are joined."""


@dataclass(frozen=True)
class Section:
    """A heading, a paragraph and a table, each of which may be empty.

    Attributes:
      markup: trusted HTML (see `charts`) between text and table; shown on HTML pages alone.
      fold: whether an HTML page shows only the title until the reader opens it.
    """

    title: str
    text: str = ""
    header: Sequence[str] = ()
    rows: Sequence[Sequence[Cell]] = ()
    markup: str = ""
    fold: bool = False

    @property
    def has_content(self) -> bool:
        """True if there is anything under the heading."""
        return bool(self.text or self.rows or self.markup)


WIDEST = 96
"""Maximum width of a cell on the terminal, in columns."""
BAR = 24
"""Width of a full bar on the terminal, in columns."""
_NUMBER = re.compile(r"|[-+±]?\.?\d[\d.,]*(e[-+]?\d+|[kMG%]|[smh][\dms]*)?( [±\[].*)?|±[\d.]+")
"""A figure, with its unit, followed by its spread or interval."""


def terminal(sections: Sequence[Section]) -> list[str]:
    """Render sections as lines of plain text."""
    lines: list[str] = []
    for section in sections:
        lines += ["", section.title, *textwrap.wrap(section.text, WIDEST)]
        if section.rows:
            lines += _table(section)
    return lines[1:]


def markdown(sections: Sequence[Section], level: int = 2) -> str:
    """Render sections as Markdown; sections with neither text nor rows are left out.

    Args:
      level: of the headings.
    """
    blocks = []
    for section in sections:
        parts = [section.text, "\n".join(markdown_table(section.header, section.rows))]
        if any(parts):
            heading = f"{'#' * level} {literal(section.title)}" if section.title else ""
            blocks.append("\n\n".join(part for part in (heading, *parts) if part))
    return "\n\n".join(blocks)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> list[str]:
    """Render a table as lines of Markdown with aligned columns, without columns of bars."""
    if not rows:
        return []
    shown = [
        i
        for i, column in enumerate(zip(*rows))
        if not any(isinstance(cell, Bar) for cell in column)
    ]
    rows = [[row[i] for i in shown] for row in rows]
    right = _right_columns(rows)
    names = [_one_line(literal(header[i])) if header else "" for i in shown]
    lines = [names, *([_one_line(_written(cell)) for cell in row] for row in rows)]
    widths = [max(3, *map(_width, column)) for column in zip(*lines)]
    rule = (
        "|"
        + "|".join("-" * (w + 1) + ":" if r else ":" + "-" * (w + 1) for w, r in zip(widths, right))
        + "|"
    )
    first, *others = ["| " + " | ".join(map(_pad, line, widths, right)) + " |" for line in lines]
    return [first, rule, *others]


def html(
    title: str, sections: Sequence[Section], layout: Literal["columns", "one", "broad"] = "columns"
) -> str:
    """Render sections as an HTML page with its style, without scripts or external resources.

    The page follows the reader's light or dark mode and can be printed. Empty sections are left
    out.

    Args:
      layout: `columns`: as many columns as fit; `one` or `broad`: a single column of text width or
        wider.
    """
    body = "\n".join(_section(section) for section in sections if section.has_content)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body "
        f'class="{layout}">\n'
        f"<h1>{escape(title)}</h1>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


# --- as JSON ------------------------------------------------------------------------------------


def to_json(section: Section) -> dict[str, Any]:
    """Convert a section to dicts and lists."""

    def cell(content: Cell) -> Any:
        if isinstance(content, Code | Soft | Bar):
            return {type(content).__name__.lower(): content[0]}
        return content if isinstance(content, str) else [cell(part) for part in content]

    rows = [[cell(c) for c in row] for row in section.rows]
    return {
        "title": section.title,
        "text": section.text,
        "header": list(section.header),
        "rows": rows,
    }


def from_json(content: Mapping[str, Any]) -> Section:
    """Convert the output of `to_json` back to a section."""
    kinds = {"code": Code, "soft": Soft, "bar": Bar}

    def cell(content: Any) -> Any:
        if isinstance(content, Mapping):
            ((kind, value),) = content.items()
            return kinds[kind](value)
        return content if isinstance(content, str) else tuple(map(cell, content))

    rows = [[cell(c) for c in row] for row in content["rows"]]
    return Section(content["title"], content["text"], content["header"], rows)


# --- terminal and Markdown ----------------------------------------------------------------------


def _table(section: Section) -> list[str]:
    rows = [[_cut(_plain(cell)) for cell in row] for row in section.rows]
    right = _right_columns(section.rows)
    table = [list(section.header), *rows] if section.header else rows
    widths = [max(map(_width, column)) for column in zip(*table)]
    return [
        (
            "  " + "  ".join(_pad(cell, width, r) for cell, width, r in zip(row, widths, right))
        ).rstrip()
        for row in table
    ]


def _plain(cell: Cell) -> str:
    if isinstance(cell, Bar):
        return "█" * round(BAR * cell.share) or ("▏" if cell.share > 0 else "")
    if isinstance(cell, Code):
        return f'"{cell.text}"'
    if isinstance(cell, Soft):
        return cell.text
    return cell if isinstance(cell, str) else "".join(map(_plain, cell))


def _written(cell: Cell) -> str:
    """Render a cell of a Markdown table."""
    if isinstance(cell, Code):
        return code(cell.text).replace("|", r"\|") if cell.text else ""
    if isinstance(cell, str | Soft | Bar):
        return literal(_plain(cell))
    return "".join(map(_written, cell))


_MARKUP = re.compile(r"[\\|<*`]|~(?=~)|\](?=[(\[])|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)")
"""Characters that are markup in Markdown; an underscore within a word is not."""


def literal(text: str) -> str:
    """Escape text so that Markdown shows it verbatim, also in a table cell."""
    return _MARKUP.sub(r"\\\g<0>", text)


def code(text: str) -> str:
    """Render text as a Markdown code span, fenced by more backticks than it holds in a row."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence, space = "`" * (longest + 1), " " * bool(longest)
    return f"{fence}{space}{text}{space}{fence}"


def _one_line(text: str) -> str:
    return " ".join(text.splitlines())


def _right_columns(rows: Sequence[Sequence[Cell]]) -> list[bool]:
    """Return which columns hold figures alone."""

    def is_figure(cell: Cell) -> bool:
        return not isinstance(cell, Bar | Code) and bool(_NUMBER.fullmatch(_plain(cell)))

    return [all(map(is_figure, column)) and any(column) for column in zip(*rows)]


def _width(text: str) -> int:
    """Return the width of text on a terminal, in columns."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def _cut(text: str) -> str:
    if _width(text) <= WIDEST:
        return text
    while _width(text) >= WIDEST:
        text = text[:-1]
    return text + "…"


def _pad(text: str, width: int, right: bool) -> str:
    padding = " " * (width - _width(text))
    return padding + text if right else text + padding


# --- HTML ---------------------------------------------------------------------------------------


def _section(section: Section) -> str:
    parts = [f"<p>{escape(section.text)}</p>"] if section.text else []
    if section.markup:
        parts.append(section.markup)
    if section.rows:
        parts.append(_html_table(section))
    title = escape(section.title)
    if section.fold:
        parts = ["<details>", f"<summary>{title}</summary>", *parts, "</details>"]
    elif title:
        parts = [f"<h2>{title}</h2>", *parts]
    return "\n".join(["<section>", *parts, "</section>"])


def _html_table(section: Section) -> str:
    right = _right_columns(section.rows)
    lines = [
        f"<tr>{''.join(_field(cell, r) for cell, r in zip(row, right))}</tr>"
        for row in section.rows
    ]
    if section.header:
        names = "".join(
            f'<th scope="col"{_RIGHT if r else ""}>{escape(name)}</th>'
            for name, r in zip(section.header, right)
        )
        lines = ["<thead>", f"<tr>{names}</tr>", "</thead>", "<tbody>", *lines, "</tbody>"]
    return "\n".join(['<div class="wide">', "<table>", *lines, "</table>", "</div>"])


_RIGHT = ' class="number"'


def _field(cell: Cell, right: bool) -> str:
    if isinstance(cell, Bar):
        return (
            '<td class="bar"><div'
            f' style="width:{100 * min(max(cell.share, 0.0), 1.0):.2f}%"></div></td>'
        )
    return f"<td{_RIGHT if right else ''}>{_markup(cell)}</td>"


def _markup(cell: Part | tuple[Part, ...]) -> str:
    if isinstance(cell, Code):  # bdi: right-to-left text must not reorder the cells around it
        return f"<bdi><code>{escape(cell.text)}</code></bdi>" if cell.text else ""
    if isinstance(cell, Soft):
        return f"<small>{escape(cell.text)}</small>"
    return escape(cell) if isinstance(cell, str) else "".join(map(_markup, cell))


_STYLE = """
:root { color-scheme: light dark; --ink: #1c1d21; --soft: #5d6069; --line: #dcdee3; --paper: #fff;
  --field: #f1f2f5;
  --accent: #2f63ad; --tint: #dbe6f5; --tint2: #b9d0ee;
  --colour1: #2f63ad; --colour2: #c2570c; --colour3: #15803d; --colour4: #a21caf;
    --colour5: #854d0e; --colour6: #0e7490;
  --colour7: #be123c; --colour8: #6b7280; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e7ea; --soft: #a2a5ae; --line: #35373d; --paper: #17181b; --field: #25272c;
    --accent: #7eabec; --tint: #24364f; --tint2: #33507a;
    --colour1: #7eabec; --colour2: #fb923c; --colour3: #4ade80; --colour4: #e879f9;
      --colour5: #eab308; --colour6: #22d3ee;
    --colour7: #fb7185; --colour8: #9ca3af; }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 2rem auto; padding: 0 1.25rem; max-width: 56rem; background: var(--paper);
  color: var(--ink);
  font: .9375rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.55rem; line-height: 1.25; margin: 0 0 .6rem; text-wrap: balance;
  overflow-wrap: anywhere; }
h2, summary { font-size: 1.08rem; font-weight: 650; line-height: 1.3; margin: 0 0 .35rem; }
h3 { font-size: .9375rem; margin: 1rem 0 .25rem; }
h2, h3, p, thead, summary { break-after: avoid; }
p { margin: 0 0 .6rem; color: var(--soft); max-width: 46rem; overflow-wrap: anywhere; }
small { color: var(--soft); font-size: .86em; }
section { margin: 0 0 2.4rem; }
section:has(> details) { margin-bottom: 1rem; }
section:has(> details) + section:not(:has(> details)) { margin-top: 2.4rem; }
summary { cursor: pointer; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); vertical-align: bottom; }
th, td { padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line); }
th:last-child, td:last-child { padding-right: 0; }
td { vertical-align: top; }
tr, figure { break-inside: avoid; }
.number { text-align: right; white-space: nowrap; }
th.number { white-space: normal; }
code { background: var(--field); border-radius: 3px; padding: 0 .2em;
  font: .93em/1.3 ui-monospace, monospace;
  white-space: pre; display: inline-block; max-width: 16em; overflow: hidden;
    text-overflow: ellipsis; vertical-align: bottom; }
.bar { width: 7rem; min-width: 4rem; }
.bar div { height: .75em; margin-top: .4em; background: var(--accent); min-width: 1px;
  print-color-adjust: exact; }
.chart { display: block; margin: .4rem 0 1rem; }
.chart text { paint-order: stroke; stroke: var(--paper); stroke-width: 3px;
  stroke-linejoin: round; }
.chart text, .dots text { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
.chart .name { fill: var(--ink); }
.chart path { fill: none; vector-effect: non-scaling-stroke; stroke-linejoin: round; }
.chart path:hover { stroke-width: 4 !important; stroke-opacity: 1 !important; }
.grid { stroke: var(--line); }
.mark { stroke: var(--soft); stroke-dasharray: 2 3; }
.dots { display: grid; grid-template-columns: fit-content(45%) 1fr; column-gap: 1rem;
  align-items: center; padding-right: .5rem; }
.dots span { overflow-wrap: anywhere; }
.dots svg { display: block; }
.dots .path { stroke: var(--accent); stroke-width: 1.5; }
.interval { stroke: var(--accent); stroke-width: 7; stroke-opacity: .3; }
.reference { stroke: var(--ink); stroke-width: 2.5; }
.dot { fill: var(--accent); stroke: var(--accent); stroke-width: 1.5; paint-order: stroke; }
.keys { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin-bottom: .4rem;
  color: var(--soft); }
.keys svg { vertical-align: -1px; }
.keys line { stroke-width: 3; }
figure { margin: 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr));
  gap: 1rem 1.5rem; margin: 1.2rem 0 0; }
.figures div { display: flex; flex-direction: column-reverse; justify-content: flex-end; }
.figures dt { color: var(--soft); max-width: 13rem; line-height: 1.3; }
.figures dd { margin: 0; font-size: 1.5rem; font-weight: 600; line-height: 1.25;
  font-variant-numeric: tabular-nums; }
.warning { border-left: 4px solid var(--accent); padding: .1rem 0 .1rem .9rem; }
.warning p { color: var(--ink); font-weight: 600; margin: .3rem 0; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr));
  gap: 0 2rem; margin-bottom: .9rem;
  break-inside: avoid; }
.sides h3 { margin: .4rem 0 .2rem; }
.pieces, .text { color: var(--ink); white-space: pre-wrap; overflow-wrap: anywhere;
  max-width: none; }
.pieces { line-height: 1.75; }
.pieces span { background: var(--tint); border-radius: 2px; padding-block: .1em;
  print-color-adjust: exact; }
.pieces span:nth-child(even) { background: var(--tint2); }
.pieces sup { font-size: .65em; line-height: 0; }
q { quotes: none; background: var(--field); border-radius: 2px; padding-block: .1em;
  print-color-adjust: exact; }
pre { background: var(--field); padding: .7rem .9rem; border-radius: 4px; overflow-x: auto;
  margin: 0 0 .8rem;
  font: .84rem/1.45 ui-monospace, monospace; }
table:not(:has(thead)) { width: auto; }
table:not(:has(thead)) td { padding-right: 2rem; }
.one .number small { display: block; line-height: 1.2; }
.one td:first-child { white-space: nowrap; }
.broad { max-width: 84rem; }
@media (max-width: 44rem) {
  .wide :is(th, td):first-child { position: sticky; left: 0; background: var(--paper); }
}
.columns { margin-top: 1.5rem; max-width: 92rem; font-size: .875rem; line-height: 1.4; }
.columns main { columns: 2 34rem; column-gap: 2.5rem; }
.columns section { margin-bottom: 1.4rem; }
.columns :is(th, td) { padding: .12rem .6rem .12rem 0; }
@page { margin: 12mm; }
@media print {
  :root { color-scheme: light; --ink: #000; --soft: #444; --line: #ccc; --paper: #fff;
    --field: #f0f0f0;
    --accent: #2f63ad; --tint: #dbe6f5; --tint2: #b9d0ee; }
  html { font-size: 9pt; }
  body { margin: 0; padding: 0; max-width: none; }
  section { margin-bottom: 1.2rem; }
  .wide, pre { overflow: visible; }
  pre { white-space: pre-wrap; }
  .bar { width: 4rem; }
  ::details-content { content-visibility: visible; block-size: auto; }
  html:has(.columns) { font-size: 7.6pt; }
  .columns main { columns: 2; column-gap: 7mm; }
  .columns section { margin-bottom: .8rem; }
}
"""
