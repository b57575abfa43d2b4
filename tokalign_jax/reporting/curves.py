"""Loss curves of a report (`report.gather`), smoothed and concatenated; titles of states."""

import bisect
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

EVERYTHING = "all"
"""Name of the row over the bytes of all languages."""

WINDOW = 20
"""Steps over which a loss is averaged."""

_TITLES = {"source": "source", "random": "random rows", "init": "initialised"}


def titled(state: str) -> str:
    """Return the title of a state: `stage2` is stage 2."""
    return _TITLES.get(state) or re.sub(r"(\D)(\d+)$", r"\1 \2", state)


def smooth(losses: Sequence[float | None], window: int = WINDOW) -> list[float]:
    """Return the moving average over the last `window` losses.

    Skipped steps have no loss; the average is NaN if all steps of the window were skipped.
    """
    means, total, count = [], 0.0, 0
    for end, loss in enumerate(losses):
        dropped = losses[end - window] if end >= window else None
        for value, sign in ((loss, 1), (dropped, -1)):
            if value is not None and math.isfinite(value):
                total, count = total + sign * value, count + sign
        means.append(total / count if count else math.nan)
    return means


class Curve(NamedTuple):
    """Loss over the number of tokens, those of earlier stages included; NaN if not known."""

    tokens: list[float]
    loss: list[float]


def joined(
    training: Mapping[str, Any], smoothed: bool = True, points: int = 600
) -> dict[str, Curve]:
    """Return the loss curve of each stage, over the tokens since the start of the first stage.

    Args:
      points: maximum number of points per stage.
    """
    start, result = 0, {}
    for stage, entry in training.items():
        losses = (
            smooth(entry["loss"])
            if smoothed
            else [math.nan if loss is None else loss for loss in entry["loss"]]
        )
        chosen = thinned(len(losses), points)
        tokens = [start + entry["tokens"][i] for i in chosen]
        result[stage] = Curve(tokens, [losses[i] for i in chosen])
        start += entry["tokens"][-1] if entry["tokens"] else 0
    return result


def validations(training: Mapping[str, Any]) -> dict[str, Curve]:
    """Return the validation losses of stages that have any, over tokens as in `joined`."""
    start, result = 0, {}
    for stage, entry in training.items():
        measured = entry.get("validation", {})
        if tokens := measured.get("tokens"):
            losses = [math.nan if loss is None else loss for loss in measured["validation_loss"]]
            result[stage] = Curve([start + n for n in tokens], losses)
        start += entry["tokens"][-1] if entry["tokens"] else 0
    return result


def starts(joined: Mapping[str, Curve]) -> list[tuple[float, str]]:
    """Return the number of tokens at which each stage begins, and its title."""
    ends = [0.0, *(curve.tokens[-1] for curve in joined.values() if curve.tokens)]
    return list(zip(ends, map(titled, joined)))


def thinned(length: int, points: int) -> list[int]:
    """Return at most `points` evenly spaced indices of a list, first and last included."""
    if length <= points:
        return list(range(length))
    return sorted({round(i * (length - 1) / (points - 1)) for i in range(points)})


def at(curve: Curve, tokens: float) -> float:
    """Interpolate the loss linearly at a number of tokens; NaN outside of the curve."""
    i = bisect.bisect_left(curve.tokens, tokens)
    if i == len(curve.tokens) or tokens < curve.tokens[0]:
        return math.nan
    if curve.tokens[i] == tokens:
        return curve.loss[i]
    (x0, x1), (y0, y1) = curve.tokens[i - 1 : i + 1], curve.loss[i - 1 : i + 1]
    return y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)
