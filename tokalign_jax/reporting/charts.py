"""Charts for a page (`pages.Section.markup`): SVG in the page's colours.

A chart stretches with the width of the page while its text keeps its size: horizontal positions are
percentages, vertical ones pixels.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from typing import NamedTuple

Number = float | int


class Curve(NamedTuple):
    """A line through points.

    Attributes:
      style: CSS of the stroke.
      label: text at its end, if there is space.
      sets_axes: whether the axes extend to all of its points; else it is clipped.
    """

    name: str
    x: Sequence[Number]
    y: Sequence[float]
    style: str = "stroke: var(--accent); stroke-width: 2"
    label: str = ""
    sets_axes: bool = True


class Dot(NamedTuple):
    """A value in a row, with its interval if known."""

    name: str
    value: float
    interval: tuple[float, float] | None = None


LABEL = 12
"""Minimum vertical distance of labels in pixels."""


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers from `low` to `high`."""
    if not (math.isfinite(low) and math.isfinite(high) and high > low):
        return [low] if math.isfinite(low) else []
    rough = (high - low) / count
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def short(value: float) -> str:
    """Format the label of a tick: 0, 0.5, 20k, 1.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def lines(
    curves: Sequence[Curve],
    *,
    description: str,
    x_label: str,
    y_label: str,
    marks: Sequence[tuple[float, str]] = (),
    height: int = 280,
) -> str:
    """Draw curves over a common x axis that begins at 0; "" if there are no points.

    Args:
      curves: the first is drawn on top.
      description: text for screen readers.
      marks: x positions where something begins, and its name.
    """
    drawn = [(c, [(x, y) for x, y in zip(c.x, c.y) if math.isfinite(y)]) for c in curves]
    points = [point for curve, line in drawn if curve.sets_axes for point in line]
    if not points:
        return ""
    has_labels = any(curve.label for curve in curves)
    plot = _Plot.around(points, height, width=94.0 if has_labels else 100.0)
    parts, y_labels = _y_axis(plot, y_label)
    parts += [*_x_axis(plot, x_label), *_marks(plot, marks)]
    parts.append(
        f'<svg viewBox="0 0 1000 {plot.height}" width="{plot.width}%" height="{plot.height}" '
        f'y="{plot.top}" preserveAspectRatio="none">'
    )
    parts += [_path(plot, curve, line) for curve, line in reversed(drawn)]
    parts.append("</svg>")
    ends = [(plot.y(line[-1][1]), curve) for curve, line in drawn if curve.label and line]
    for y, curve in _without_overlaps(ends):
        x = f"{plot.width + 0.8}%"
        parts.append(f'<text class="name" x="{x}" y="{y + 4:.1f}">{escape(curve.label)}</text>')
    content = "\n".join([*parts, *y_labels])
    label = f'role="img" aria-label="{escape(description)}"'
    return f'<svg class="chart" {label} width="100%" height="{height}">\n{content}\n</svg>'


class _Plot(NamedTuple):
    """Area of a chart's curves.

    Attributes:
      width: in percent of the chart; the rest is for labels.
      top, bottom: in pixels.
      x_max, low, high: ends of the axes.
    """

    width: float
    top: int
    bottom: int
    x_max: float
    low: float
    high: float

    @classmethod
    def around(cls, points: Sequence[tuple[float, float]], height: int, width: float) -> "_Plot":
        low, high = min(y for _, y in points), max(y for _, y in points)
        margin = 0.04 * (high - low or 1)
        x_max = max(x for x, _ in points) or 1
        return cls(width, 34, height - 40, x_max, low - margin, high + margin)

    @property
    def height(self) -> int:
        return self.bottom - self.top

    def x(self, value: float) -> str:
        return f"{self.width * value / self.x_max:.2f}%"

    def y(self, value: float) -> float:
        return self.top + self.height * (self.high - value) / (self.high - self.low)


def _y_axis(plot: _Plot, name: str) -> tuple[list[str], list[str]]:
    """Return the grid lines, and the labels, which are drawn over the curves."""
    grid, labels, levels = [], [], ticks(plot.low, plot.high)
    for value in levels:
        y = plot.y(value)
        grid.append(f'<line class="grid" x1="0" x2="{plot.width}%" y1="{y:.1f}" y2="{y:.1f}"/>')
        text = f"{short(value)} {escape(name)}" if value == levels[-1] else short(value)
        labels.append(f'<text x="0" y="{y - 3:.1f}">{text}</text>')
    return grid, labels


def _x_axis(plot: _Plot, name: str) -> Iterator[str]:
    for value in ticks(0, plot.x_max)[1:]:
        anchor = "end" if value > 0.93 * plot.x_max else "middle"
        place = f'x="{plot.x(value)}" y="{plot.bottom + 16}" text-anchor="{anchor}"'
        yield f"<text {place}>{short(value)}</text>"
    y = plot.bottom + 34
    yield f'<text x="{plot.width}%" y="{y}" text-anchor="end">{escape(name)}</text>'


def _marks(plot: _Plot, marks: Sequence[tuple[float, str]]) -> Iterator[str]:
    for value, name in marks:
        x = plot.x(value)
        if value:
            yield f'<line class="mark" x1="{x}" x2="{x}" y1="0" y2="{plot.bottom}"/>'
        yield f'<text class="name" x="{x}" y="12" dx="{6 if value else 0}">{escape(name)}</text>'


def _path(plot: _Plot, curve: Curve, points: Sequence[tuple[float, float]]) -> str:
    path = "".join(
        f"{'L' if i else 'M'}{1000 * x / plot.x_max:.1f} {plot.y(y) - plot.top:.1f}"
        for i, (x, y) in enumerate(points)
    )
    return f'<path d="{path}" style="{curve.style}"><title>{escape(curve.name)}</title></path>'


def _without_overlaps(ends: Sequence[tuple[float, Curve]]) -> list[tuple[float, Curve]]:
    """Return the ends whose labels do not overlap that of an earlier curve."""
    shown: list[tuple[float, Curve]] = []
    for end in ends:
        if all(abs(end[0] - other) >= LABEL for other, _ in shown):
            shown.append(end)
    return shown


def dots(rows: Mapping[str, Sequence[Dot]], *, description: str) -> str:
    """Draw a row of dots for each name on a common axis; "" if there are no values.

    The first dot of a row is the reference, drawn as a stroke. The others are circles, the later
    the darker, joined by a line.

    Args:
      description: text for screen readers.
    """
    values = [
        value
        for row in rows.values()
        for dot in row
        for value in (dot.value, *(dot.interval or ()))
        if math.isfinite(value)
    ]
    if not values:
        return ""
    low, high = min(values), max(values)
    margin = 0.03 * (high - low or 1)
    low, high = low - margin, high + margin

    def position(value: float) -> str:
        return f"{100 * (value - low) / (high - low):.2f}%"

    levels = {value: position(value) for value in ticks(low, high)}
    grid = "".join(
        f'<line class="grid" x1="{x}" x2="{x}" y1="0" y2="26"/>' for x in levels.values()
    )
    parts = []
    for name, row in rows.items():
        figures = ", ".join(f"{dot.name} {dot.value:.3f}" for dot in row)
        label = f"{escape(name)}: {escape(figures)}"
        parts.append(
            f'<span>{escape(name)}</span><svg role="img" aria-label="{label}" width="100%" '
            f'height="26">{grid}{_row(row, position)}</svg>'
        )
    labels = "".join(
        f'<text x="{x}" y="13" text-anchor="middle">{short(value)}</text>'
        for value, x in levels.items()
    )
    parts.append(
        '<span></span><svg aria-hidden="true" width="100%" height="18" '
        f'overflow="visible">{labels}</svg>'
    )
    return (
        f'<figure class="chart"><figcaption class="keys">{_legend(rows)}</figcaption>\n'
        f'<div class="dots" role="group" aria-label="{escape(description)}">\n'
        + "\n".join(parts)
        + "\n</div></figure>"
    )


def _legend(rows: Mapping[str, Sequence[Dot]]) -> str:
    names = list(dict.fromkeys(dot.name for row in rows.values() for dot in row))
    return "".join(
        '<span><svg width="12" height="12" '
        f'aria-hidden="true">{_mark(i, len(names), "50%", 6, 5)}</svg> '
        f"{escape(name)}</span>"
        for i, name in enumerate(names)
    )


def _row(row: Sequence[Dot], position: Callable[[float], str]) -> str:
    circles, parts = [dot for dot in row[1:] if math.isfinite(dot.value)], []
    if len(circles) > 1:
        x1, x2 = position(circles[0].value), position(circles[-1].value)
        parts.append(f'<line class="path" x1="{x1}" x2="{x2}" y1="13" y2="13"/>')
    for i, dot in enumerate(row):
        if dot.interval and all(map(math.isfinite, dot.interval)):
            x1, x2 = map(position, dot.interval)
            parts.append(f'<line class="interval" x1="{x1}" x2="{x2}" y1="13" y2="13"/>')
        if math.isfinite(dot.value):
            parts.append(_mark(i, len(row), position(dot.value), 13, 9))
    return "".join(parts)


def _mark(index: int, count: int, x: str, y: int, radius: int) -> str:
    """Draw a dot: a stroke for the first of a row, circles that darken towards the last."""
    if not index:
        return f'<line class="reference" x1="{x}" x2="{x}" y1="{y - radius}" y2="{y + radius}"/>'
    strength = 100 * (index / max(count - 1, 1)) ** 1.5
    fill = f"color-mix(in srgb, var(--accent) {strength:.0f}%, var(--paper))"
    return f'<circle class="dot" cx="{x}" cy="{y}" r="4.5" style="fill: {fill}"/>'
