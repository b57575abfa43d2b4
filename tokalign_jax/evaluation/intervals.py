"""Bootstrap intervals of ratios of sums over documents, such as bits per byte.

Documents are resampled with replacement within each group (language), since the size of each group
is a choice (Efron and Tibshirani 1993, chapter 13). The interval contains the central 95% of the
resampled ratios. Two models are compared by the interval of their difference on the *same*
documents, so that the difficulty of a document does not add to the uncertainty.

Dimensions: N documents, S draws. With few documents (under about ten) the intervals are too narrow.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

DRAWS = 2000
COVERAGE = 0.95
_MAX_COUNTS = 1 << 22
"""Maximum number of counts in memory at once."""

Interval = tuple[float, float]


def bootstrap_ratio(
    numerators: Float[np.ndarray, "N"],
    denominators: Float[np.ndarray, "N"],
    sizes: Sequence[int],
    seed: int,
) -> Interval | None:
    """Returns the interval of sum(numerators) / sum(denominators).

    Args:
      numerators: one per document.
      denominators: one per document.
      sizes: number of documents of each consecutive group, N in all. Groups of one document are not
        resampled.
      seed: seed of the draws, which determines the result.

    Returns:
      The interval, or None if no group has two documents.
    """
    if max(sizes, default=0) < 2:
        return None
    return _central_interval(_ratios(numerators, denominators, sizes, seed))


def _ratios(
    numerators: Float[np.ndarray, "N"],
    denominators: Float[np.ndarray, "N"],
    sizes: Sequence[int],
    seed: int,
) -> Float[np.ndarray, "S"]:
    """Returns the ratio in each draw."""
    sums_by_document = np.stack([numerators, denominators], axis=1).astype(np.float64)
    if len(sums_by_document) != sum(sizes):
        raise ValueError(f"got {len(sums_by_document)} documents for groups of sizes {list(sizes)}")
    sums, start = np.zeros((DRAWS, 2)), 0
    for size, generator in zip(sizes, np.random.default_rng(seed).spawn(len(sizes))):
        for first in range(0, DRAWS, rows := max(1, _MAX_COUNTS // size)):
            block = slice(first, min(first + rows, DRAWS))
            sums[block] += (
                _draw_counts(size, block.stop - first, generator)
                @ sums_by_document[start : start + size]
            )
        start += size
    return sums[:, 0] / sums[:, 1]


def _draw_counts(size: int, draws: int, generator: np.random.Generator) -> Int[np.ndarray, "S N"]:
    return generator.multinomial(size, np.full(size, 1 / size), size=draws)


def _central_interval(values: Float[np.ndarray, "S"]) -> Interval:
    low, high = np.quantile(values, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return float(low), float(high)
