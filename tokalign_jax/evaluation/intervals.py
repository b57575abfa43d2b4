"""Bootstrap intervals of ratios of sums over documents, such as bits per byte (Efron and Tibshirani
1993, chapter 13).

Documents are drawn again with replacement, as often as there are, within each group (language) by
itself, since how much of each there is was a choice. Every draw gives the ratio anew; the interval
holds the middle 95% of these. Two models are told apart by the interval of their difference on the
*same* documents: what is hard for both then does not count as doubt about which is better.

The letters: N documents, S draws. With few documents (under about ten) such intervals are too
  narrow.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

DRAWS = 2000
COVERED = 0.95
_AT_ONCE = 1 << 22
"""Counts that are in memory at once."""

Interval = tuple[float, float]


def of_ratio(
    numerators: Float[np.ndarray, "N"],
    denominators: Float[np.ndarray, "N"],
    sizes: Sequence[int],
    seed: int,
) -> Interval | None:
    """The interval of sum(numerators) / sum(denominators); None where there is but one document to
    draw from.

    Args: sizes: documents of each group, in order; they sum to N. Groups of one document always
      count as they are. seed: of the draws; the result is the same for the same seed.
    """
    if max(sizes, default=0) < 2:
        return None
    return _middle(_ratios(numerators, denominators, sizes, seed))


def _ratios(
    numerators: Float[np.ndarray, "N"],
    denominators: Float[np.ndarray, "N"],
    sizes: Sequence[int],
    seed: int,
) -> Float[np.ndarray, "S"]:
    """The ratio in each draw: how often each document was drawn, times what it has."""
    both = np.stack([numerators, denominators], axis=1).astype(np.float64)
    if len(both) != sum(sizes):
        raise ValueError(f"{len(both)} documents in groups of {list(sizes)}")
    sums, start = np.zeros((DRAWS, 2)), 0
    for size, generator in zip(sizes, np.random.default_rng(seed).spawn(len(sizes))):
        for first in range(0, DRAWS, rows := max(1, _AT_ONCE // size)):
            block = slice(first, min(first + rows, DRAWS))
            sums[block] += (
                _times_drawn(size, block.stop - first, generator) @ both[start : start + size]
            )
        start += size
    return sums[:, 0] / sums[:, 1]


def _times_drawn(size: int, draws: int, generator: np.random.Generator) -> Int[np.ndarray, "S N"]:
    return generator.multinomial(size, np.full(size, 1 / size), size=draws)


def _middle(values: Float[np.ndarray, "S"]) -> Interval:
    low, high = np.quantile(values, [(1 - COVERED) / 2, (1 + COVERED) / 2])
    return float(low), float(high)
