"""Curves of a report's content (`report.gather`): smoothed, thinned, and laid one behind the other;
and the words for states.
"""

import bisect
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

EVERYTHING = "all"
"""The row that pools the bytes of every language."""

WINDOW = 20
"""Steps over which a loss is averaged."""

_TITLES = {"source": "source", "random": "random rows", "init": "initialised"}


def titled(state: str) -> str:
    """A state of the model in words: `stage2` is stage 2."""
    return _TITLES.get(state) or re.sub(r"(\D)(\d+)$", r"\1 \2", state)


def smooth(losses: Sequence[float | None], window: int = WINDOW) -> list[float]:
    """Mean of the last `window` losses up to each; skipped steps have none, and NaN where all of
    them were.
    """
    means, total, count = [], 0.0, 0
    for end, loss in enumerate(losses):
        gone = losses[end - window] if end >= window else None
        for value, sign in ((loss, 1), (gone, -1)):
            if value is not None and math.isfinite(value):
                total, count = total + sign * value, count + sign
        means.append(total / count if count else math.nan)
    return means


class Curve(NamedTuple):
    """A loss over the tokens of all stages so far."""

    tokens: list[float]
    loss: list[float]
    """NaN where it is not known."""


def joined(
    training: Mapping[str, Any], smoothed: bool = True, points: int = 600
) -> dict[str, Curve]:
    """The stages' losses, each stage's tokens counted on from the one before; at most so many
    points each.
    """
    start, found = 0, {}
    for stage, entry in training.items():
        losses = (
            smooth(entry["loss"])
            if smoothed
            else [math.nan if loss is None else loss for loss in entry["loss"]]
        )
        kept = thinned(len(losses), points)
        found[stage] = Curve([start + entry["tokens"][i] for i in kept], [losses[i] for i in kept])
        start += entry["tokens"][-1] if entry["tokens"] else 0
    return found


def validations(training: Mapping[str, Any]) -> dict[str, Curve]:
    """The validation losses of stages that have any, tokens counted on as in `joined`."""
    start, found = 0, {}
    for stage, entry in training.items():
        measured = entry.get("validation", {})
        if tokens := measured.get("tokens"):
            losses = [math.nan if loss is None else loss for loss in measured["validation_loss"]]
            found[stage] = Curve([start + n for n in tokens], losses)
        start += entry["tokens"][-1] if entry["tokens"] else 0
    return found


def starts(joined: Mapping[str, Curve]) -> list[tuple[float, str]]:
    """Where each stage begins, and what it is called."""
    ends = [0.0, *(curve.tokens[-1] for curve in joined.values() if curve.tokens)]
    return list(zip(ends, map(titled, joined)))


def thinned(length: int, points: int) -> list[int]:
    """At most `points` places of a list, evenly, the first and the last among them."""
    if length <= points:
        return list(range(length))
    return sorted({round(i * (length - 1) / (points - 1)) for i in range(points)})


def at(curve: Curve, tokens: float) -> float:
    """The loss at so many tokens, on the straight line between the points around it; NaN outside of
    the curve.
    """
    place = bisect.bisect_left(curve.tokens, tokens)
    if place == len(curve.tokens) or tokens < curve.tokens[0]:
        return math.nan
    if curve.tokens[place] == tokens:
        return curve.loss[place]
    (x0, x1), (y0, y1) = curve.tokens[place - 1 : place + 1], curve.loss[place - 1 : place + 1]
    return y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)
