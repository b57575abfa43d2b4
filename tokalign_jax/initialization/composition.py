"""Rows composed by a rule that is learned from the source model's own tokens, in closed form.

Most source tokens are two others joined (the merges of a BPE are), and what row the model has for the whole is known. So a ridge
regression from what is known of a token to its row is fitted on them and applied to the target tokens that the source has not:

    row ~ [state before, state after, mean, first and last of the pieces' rows, log frequency, 1] B

Mean states (`contexts.py`) of a token that was seen n times have noise of covariance S / n, S that of a single state. The rule for
such tokens is the ridge solution under that noise, (X'WX + diag(S, S, 0) / n + r diag)^-1 X'WY: the rarer a token, the more its
pieces say and the less its contexts. One rule is made for each range of n.

Letters: D model, V vocabulary, n tokens, P pieces, F = 5 D + 2 features.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Array, Float, Int
from transformers import PreTrainedTokenizerBase

from tokalign_jax.initialization.contexts import Contexts, Reading
from tokalign_jax.text import canonical

RIDGE = 1e-2
"""Added to the diagonal, in units of itself."""
FEWEST_SEEN = 20
"""A rule is fitted on tokens seen this often."""
MOST_WEIGHT = 1000
"""Tokens weigh by the square root of how often they were seen; from here on all the same."""
RANGES = (1, 4, 16, 64, 256, 1024)
"""Where the ranges of n begin."""
BLOCK = 8192
"""Tokens whose features exist at once."""


class Pieces(NamedTuple):
    """The source tokens that each of n tokens is spelled with, in compressed rows; one or more each."""

    indptr: Int[np.ndarray, "n+1"]
    ids: Int[np.ndarray, "P"]

    @classmethod
    def of(cls, parts: Sequence[Sequence[int]]) -> "Pieces":
        return cls(np.cumsum([0, *map(len, parts)]), np.concatenate([np.asarray(p, np.int64) for p in parts]))


class Tokens(NamedTuple):
    """n tokens of one vocabulary."""

    ids: Int[np.ndarray, "n"]
    pieces: Pieces
    log_frequency: Float[np.ndarray, "V"]
    contexts: Contexts


def halves(tokenizer: PreTrainedTokenizerBase, counts: Int[np.ndarray, "V"]) -> tuple[np.ndarray, list[list[int]]]:
    """Tokens that are two others joined, and these two; of several such pairs the one whose rarer token is most frequent.

    It goes by bytes, so that it works for any kind of tokenizer.
    """
    index = canonical.index_by_bytes(tokenizer)
    ids, parts = [], []
    for content, token in index.items():
        cuts = [(index.get(content[:k]), index.get(content[k:])) for k in range(1, len(content))]
        pairs = [(left, right) for left, right in cuts if left is not None and right is not None]
        if pairs:
            ids.append(token)
            parts.append(list(max(pairs, key=lambda pair: min(counts[pair[0]], counts[pair[1]]))))
    return np.array(ids, np.int64), parts


def learned_rows(rows: Float[np.ndarray, "V_s D"], known: Tokens, wanted: Tokens, reading: Reading) -> np.ndarray:
    """float32 [n, D]: rows for the `wanted` tokens, by the rule that fits the `known` ones best.

    Args:
      rows: of the source model's matrix.
      known: source tokens.
      wanted: target tokens, with pieces of the source, that were seen in context.
    """
    gram, cross = _normal_equations(rows, known, reading)
    result = np.zeros((len(wanted.ids), rows.shape[1]), np.float32)
    counts = wanted.contexts.counts[wanted.ids]
    edges = [*RANGES, np.iinfo(np.int64).max]
    for low, high in itertools.pairwise(edges):
        inside = np.flatnonzero((counts >= low) & (counts < high))
        if not len(inside):
            continue
        rule = _solve(gram, cross, reading.covariance, seen=float(np.exp(np.log(counts[inside]).mean())))
        for start in range(0, len(inside), BLOCK):
            block = inside[start : start + BLOCK]
            result[block] = _apply(_features(rows, wanted, block, reading.mean), rule)[: len(block)]
    return result


def _normal_equations(
    rows, known: Tokens, reading: Reading
) -> tuple[Float[np.ndarray, "F F"], Float[np.ndarray, "F D"]]:
    """X'WX and X'WY over the known tokens, float64, weights summing to 1."""
    counts = known.contexts.counts[known.ids]
    weights = np.where(counts >= FEWEST_SEEN, np.sqrt(np.minimum(counts, MOST_WEIGHT)), 0.0)
    if not weights.any():  # so little text that nothing was seen often
        weights = np.ones(len(counts))
    weights /= weights.sum()
    features, width = 5 * rows.shape[1] + 2, rows.shape[1]
    gram, cross = np.zeros((features, features)), np.zeros((features, width))
    for start in range(0, len(known.ids), BLOCK):
        block = np.arange(start, min(start + BLOCK, len(known.ids)))
        of_gram, of_cross = _products(
            _features(rows, known, block, reading.mean), _padded(rows[known.ids[block]]), _padded(weights[block])
        )
        gram, cross = gram + np.asarray(of_gram, np.float64), cross + np.asarray(of_cross, np.float64)
    return gram, cross


@jax.jit
def _apply(features: Float[Array, "n F"], rule: Float[Array, "F D"]) -> Float[Array, "n D"]:
    return jnp.matmul(features, rule, precision="highest")


@jax.jit
def _products(features: Float[Array, "n F"], rows: Float[Array, "n D"], weights: Float[Array, "n"]):
    weighted = features * weights[:, None]
    return (
        jnp.matmul(weighted.T, features, precision="highest"),
        jnp.matmul(weighted.T, rows, precision="highest"),
    )


def _solve(gram, cross, covariance: Float[np.ndarray, "D D"], seen: float) -> Float[np.ndarray, "F D"]:
    """float32: the rule for tokens whose contexts were seen `seen` times."""
    noisy, width = gram.copy(), len(covariance)
    for at in (0, width):
        noisy[at : at + width, at : at + width] += covariance / seen
    noisy += np.diag(RIDGE * np.diag(noisy) + 1e-12)
    return scipy.linalg.solve(noisy, cross, assume_a="pos").astype(np.float32)


def _padded(values: np.ndarray) -> np.ndarray:
    """float32: as many as `BLOCK`, so that one program does for all; the others are 0."""
    padded = np.zeros((BLOCK, *values.shape[1:]), np.float32)
    padded[: len(values)] = values
    return padded


def _features(rows, tokens: Tokens, block: Int[np.ndarray, "b"], mean: Float[np.ndarray, "D"]) -> np.ndarray:
    """float32 [BLOCK, F]: what is known of some of the tokens, padded."""
    ids, (indptr, pieces) = tokens.ids[block], tokens.pieces
    starts, ends = indptr[block], indptr[block + 1]
    sizes = ends - starts
    flat = np.repeat(starts - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())
    sums = np.add.reduceat(rows[pieces[flat]].astype(np.float32), np.cumsum(sizes) - sizes, axis=0)
    columns = [
        tokens.contexts.before[ids] - mean,
        tokens.contexts.after[ids] - mean,
        sums / sizes[:, None],
        rows[pieces[starts]],
        rows[pieces[ends - 1]],
        tokens.log_frequency[ids, None],
        np.ones((len(ids), 1)),
    ]
    return _padded(np.concatenate(columns, axis=1))
