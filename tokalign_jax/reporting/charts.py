"""Charts for a page (`pages.Section.markup`): SVG in the page's colours that stretches with the
reader's width while its text keeps its size. Positions across are therefore percentages, those down
are pixels.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

Number = float | int


class Curve(NamedTuple):
    """A line through points; `style` is what it looks like: CSS of `stroke` and the like."""

    name: str
    x: Sequence[Number]
    y: Sequence[float]
    style: str = "stroke: var(--accent); stroke-width: 2"
    label: str = ""
    """Written at its end, where there is room."""
    counts: bool = True
    """Whether the axes make room for it; else it is cut off at their ends."""


class Dot(NamedTuple):
    """A value in a row, with its interval where that is known."""

    name: str
    value: float
    interval: tuple[float, float] | None = None


LABEL = 12
"""Pixels that labels keep from each other, down."""


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, about so many."""
    if not (math.isfinite(low) and math.isfinite(high) and high > low):
        return [low] if math.isfinite(low) else []
    rough = (high - low) / about
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= rough * 0.999)
    return [
        round(i * step, 12)
        for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def short(value: float) -> str:
    """A tick's label: 0, 0.5, 20k, 1.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def lines(
    curves: Sequence[Curve],
    *,
    says: str,
    x_label: str,
    y_label: str,
    marks: Sequence[tuple[float, str]] = (),
    height: int = 280,
) -> str:
    """A chart of curves, the first on top, over a common x that begins at 0; "" where there is
    nothing to draw.

    Args:
      says: what it shows, for those who cannot see it.
      marks: places along x where something begins, and its name.
    """
    drawn = [(c, [(x, y) for x, y in zip(c.x, c.y) if math.isfinite(y)]) for c in curves]
    points = [point for curve, row in drawn if curve.counts for point in row]
    if not points:
        return ""
    right = max(x for x, _ in points) or 1
    low, high = min(y for _, y in points), max(y for _, y in points)
    low, high = low - 0.04 * (high - low or 1), high + 0.04 * (high - low or 1)
    top, bottom = 34, height - 40
    width = 94.0 if any(curve.label for curve in curves) else 100.0  # the rest is for the labels
    across = lambda x: f"{width * x / right:.2f}%"  # noqa: E731
    down = lambda y: top + (bottom - top) * (high - y) / (high - low)  # noqa: E731

    parts, labels, levels = [], [], ticks(low, high)
    for y in levels:
        parts.append(
            f'<line class="grid" x1="0" x2="{width}%" y1="{down(y):.1f}" y2="{down(y):.1f}"/>'
        )
        label = f"{short(y)} {escape(y_label)}" if y == levels[-1] else short(y)
        labels.append(f'<text x="0" y="{down(y) - 3:.1f}">{label}</text>')
    for x in ticks(0, right)[1:]:
        anchor = "end" if x > 0.93 * right else "middle"
        parts.append(
            f'<text x="{across(x)}" y="{bottom + 16}" text-anchor="{anchor}">{short(x)}</text>'
        )
    parts.append(f'<text x="{width}%" y="{height - 6}" text-anchor="end">{escape(x_label)}</text>')
    for x, name in marks:
        at = across(x)
        if x:
            parts.append(f'<line class="mark" x1="{at}" x2="{at}" y1="0" y2="{bottom}"/>')
        parts.append(
            f'<text class="name" x="{at}" y="12" dx="{6 if x else 0}">{escape(name)}</text>'
        )
    plot = bottom - top
    parts.append(
        f'<svg viewBox="0 0 1000 {plot}" width="{width}%" height="{plot}" y="{top}" '
        f'preserveAspectRatio="none">'
    )
    for curve, row in reversed(drawn):
        path = "".join(
            f"{'L' if i else 'M'}{1000 * x / right:.1f} {down(y) - top:.1f}"
            for i, (x, y) in enumerate(row)
        )
        parts.append(
            f'<path d="{path}" style="{curve.style}"><title>{escape(curve.name)}</title></path>'
        )
    parts.append("</svg>")
    ends = [(down(row[-1][1]), curve) for curve, row in drawn if curve.label and row]
    for y, curve in _apart(ends):
        parts.append(
            f'<text class="name" x="{width + 0.8}%" y="{y + 4:.1f}">{escape(curve.label)}</text>'
        )
    inner = "\n".join([*parts, *labels])
    label = f'role="img" aria-label="{escape(says)}"'
    return f'<svg class="chart" {label} width="100%" height="{height}">\n{inner}\n</svg>'


def _apart(ends: Sequence[tuple[float, Curve]]) -> list[tuple[float, Curve]]:
    """Those ends whose labels do not lie on that of an earlier curve."""
    kept: list[tuple[float, Curve]] = []
    for end in ends:
        if all(abs(end[0] - other) >= LABEL for other, _ in kept):
            kept.append(end)
    return kept


def dots(rows: Mapping[str, Sequence[Dot]], *, says: str) -> str:
    """A row for each name on a common axis: the first dot is a reference, drawn as a stroke; the
    others are circles, the later the stronger, joined from the first to the last; "" where there is
    nothing to draw.
    """
    values = [
        v
        for row in rows.values()
        for dot in row
        for v in (dot.value, *(dot.interval or ()))
        if math.isfinite(v)
    ]
    if not values:
        return ""
    low, high = min(values), max(values)
    room = 0.03 * (high - low or 1)
    low, high = low - room, high + room
    across = lambda x: f"{100 * (x - low) / (high - low):.2f}%"  # noqa: E731
    at = ticks(low, high)
    grid = "".join(
        f'<line class="grid" x1="{across(x)}" x2="{across(x)}" y1="0" y2="26"/>' for x in at
    )
    parts = []
    for name, row in rows.items():
        told = ", ".join(f"{dot.name} {dot.value:.3f}" for dot in row)
        drawn = _row(row, across)
        parts.append(
            f'<span>{escape(name)}</span><svg role="img" aria-label="{escape(name)}: '
            f'{escape(told)}" width="100%" '
            f'height="26">{grid}{drawn}</svg>'
        )
    labels = "".join(
        f'<text x="{across(x)}" y="13" text-anchor="middle">{short(x)}</text>' for x in at
    )
    parts.append(
        f'<span></span><svg aria-hidden="true" width="100%" height="18" '
        f'overflow="visible">{labels}</svg>'
    )
    names = list(dict.fromkeys(dot.name for row in rows.values() for dot in row))
    keys = "".join(
        f'<span><svg width="12" height="12" '
        f'aria-hidden="true">{_mark(i, len(names), "50%", 6, 5)}</svg> '
        f"{escape(name)}</span>"
        for i, name in enumerate(names)
    )
    return (
        f'<figure class="chart"><figcaption class="keys">{keys}</figcaption>\n'
        f'<div class="dots" role="group" aria-label="{escape(says)}">\n'
        + "\n".join(parts)
        + "\n</div></figure>"
    )


def _row(row: Sequence[Dot], across) -> str:
    circles, parts = [dot for dot in row[1:] if math.isfinite(dot.value)], []
    if len(circles) > 1:
        x1, x2 = across(circles[0].value), across(circles[-1].value)
        parts.append(f'<line class="path" x1="{x1}" x2="{x2}" y1="13" y2="13"/>')
    for i, dot in enumerate(row):
        if dot.interval and all(map(math.isfinite, dot.interval)):
            x1, x2 = map(across, dot.interval)
            parts.append(f'<line class="interval" x1="{x1}" x2="{x2}" y1="13" y2="13"/>')
        if math.isfinite(dot.value):
            parts.append(_mark(i, len(row), across(dot.value), 13, 9))
    return "".join(parts)


def _mark(index: int, count: int, x: str, y: int, reach: int) -> str:
    """The mark of a row's dot: a stroke for the first, circles that fill towards the last."""
    if not index:
        return f'<line class="reference" x1="{x}" x2="{x}" y1="{y - reach}" y2="{y + reach}"/>'
    strength = 100 * (index / max(count - 1, 1)) ** 1.5
    fill = f"color-mix(in srgb, var(--accent) {strength:.0f}%, var(--paper))"
    return f'<circle class="dot" cx="{x}" cy="{y}" r="4.5" style="fill: {fill}"/>'
