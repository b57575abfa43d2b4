"""Rows of composed tokens by a ridge regression on the source model's own tokens.

Most source tokens are the concatenation of two others (BPE merges are), and the model has a row for
each. So a ridge regression from features of a token to its row is fitted on source tokens and
applied to target tokens that the source lacks:

    row ~ [state before, state after, mean, first and last of the pieces' rows, log frequency, 1] B

Mean states (`contexts.py`) of a token seen n times have noise of covariance S / n, where S is the
covariance of a single state. The solution under that noise is
(X'WX + diag(S, S, 0) / n + r diag)^-1 X'WY: the rarer a token, the more its pieces count and the
less its contexts. One solution is computed for each range of n.

Letters: D model, V vocabulary, n tokens, P pieces, F = 5 D + 2 features.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jaxtyping import Array, Float, Int
from transformers import PreTrainedTokenizerBase

from tokalign_jax.alignment.runs import in_order
from tokalign_jax.initialization.contexts import Contexts, Reading
from tokalign_jax.text import canonical

RIDGE = 1e-2
"""Added to the diagonal, relative to it."""
FEWEST_SEEN = 20
"""Occurrences that a token needs to take part in the fit."""
MOST_WEIGHT = 1000
"""Occurrences at which the weight of a token, their square root, stops to grow."""
RANGES = (1, 4, 16, 64, 256, 1024)
"""Lower bounds of the ranges of n."""
BLOCK = 4096
"""Tokens whose features exist at once on the device."""
THREADS = 4
"""Threads that prefetch blocks of features."""


class Pieces(NamedTuple):
    """The source tokens that spell each of n tokens, one or more, in compressed rows."""

    indptr: Int[np.ndarray, "n+1"]
    ids: Int[np.ndarray, "P"]

    @classmethod
    def of(cls, parts: Sequence[Sequence[int]]) -> "Pieces":
        """Compress lists of pieces."""
        indptr = np.cumsum([0, *map(len, parts)])
        return cls(
            indptr, np.fromiter(itertools.chain.from_iterable(parts), np.int64, int(indptr[-1]))
        )


class Tokens(NamedTuple):
    """n tokens of one vocabulary."""

    ids: Int[np.ndarray, "n"]
    pieces: Pieces
    log_frequency: Float[np.ndarray, "V"]
    contexts: Contexts


class Columns(NamedTuple):
    """Features of n tokens, float32."""

    before: Float[np.ndarray, "n D"]
    after: Float[np.ndarray, "n D"]
    mean: Float[np.ndarray, "n D"]
    first: Float[np.ndarray, "n D"]
    last: Float[np.ndarray, "n D"]
    log_frequency: Float[np.ndarray, "n"]


def binary_splits(
    tokenizer: PreTrainedTokenizerBase, counts: Int[np.ndarray, "V"], avoid: Set[int] = frozenset()
) -> tuple[np.ndarray, list[list[int]]]:
    """Split tokens into two others of the same bytes.

    Of several splits the one is taken whose rarer part is most frequent.

    Args:
      tokenizer: the source tokenizer.
      counts: occurrences of its tokens.
      avoid: tokens that are neither split nor part of a split.

    Returns:
      Ids of the tokens that can be split, and the two parts of each.
    """
    index = {
        content: i for content, i in canonical.index_by_bytes(tokenizer).items() if i not in avoid
    }
    ids, parts = [], []
    for content, token in index.items():
        cuts = [(index.get(content[:k]), index.get(content[k:])) for k in range(1, len(content))]
        pairs = [(left, right) for left, right in cuts if left is not None and right is not None]
        if pairs:
            ids.append(token)
            parts.append(list(max(pairs, key=lambda pair: min(counts[pair[0]], counts[pair[1]]))))
    return np.array(ids, np.int64), parts


def learned_rows(
    rows: Float[np.ndarray, "V_s D"], fitted: Tokens, tokens: Tokens, reading: Reading
) -> Iterator[tuple[Int[np.ndarray, "b"], Float[np.ndarray, "b D"]]]:
    """Fit the regression on the tokens `fitted`, apply it to `tokens`, and yield blocks of rows.

    Products and solutions are float32 on the default device, which holds a few matrices [F, F] and
    a block of features. The ridge, a hundredth of each diagonal, makes that accurate enough: with
    the diagonal scaled to 1 no eigenvalue is smaller, and float32 sums are off by about 1e-6.

    Args:
      rows: float32, of the source model's matrix.
      fitted: source tokens.
      tokens: target tokens, with pieces of the source, that were seen in context.
      reading: the statistics of states.

    Yields:
      Indices into `tokens`, and their rows.
    """
    mean, covariance = (np.asarray(x, np.float32) for x in (reading.mean, reading.covariance))
    gram, cross = _normal_equations(rows, fitted, mean)
    counts = tokens.contexts.counts[tokens.ids]
    for low, high in itertools.pairwise([*RANGES, np.iinfo(np.int64).max]):
        inside = np.flatnonzero((counts >= low) & (counts < high))
        if len(inside):
            seen = np.float32(np.exp(np.log(counts[inside]).mean()))
            rule = _rule(gram, cross, covariance, seen, np.float32(RIDGE))
            for block, columns in column_blocks(rows, tokens, inside):
                yield block, np.asarray(_apply(columns, mean, rule))[: len(block)]


def _normal_equations(
    rows: Float[np.ndarray, "V_s D"], fitted: Tokens, mean: Float[np.ndarray, "D"]
) -> tuple[Float[Array, "F F"], Float[Array, "F D"]]:
    """Return X'WX and X'WY over the fitted tokens, float32, with weights that sum to 1."""
    counts = fitted.contexts.counts[fitted.ids]
    weights = np.where(counts >= FEWEST_SEEN, np.sqrt(np.minimum(counts, MOST_WEIGHT)), 0.0)
    if not weights.any():  # The text is so short that no token was seen often.
        weights = np.ones(len(counts))
    weights = (weights / weights.sum()).astype(np.float32)
    width = rows.shape[1]
    gram, cross = jnp.zeros((5 * width + 2,) * 2), jnp.zeros((5 * width + 2, width))
    for block, columns in column_blocks(rows, fitted, np.flatnonzero(weights)):
        targets = rows[_filled(fitted.ids[block])]
        block_weights = np.pad(weights[block], (0, BLOCK - len(block)))
        gram, cross = _add(gram, cross, columns, mean, targets, block_weights)
    return gram, cross


def column_blocks(
    rows: Float[np.ndarray, "V_s D"], tokens: Tokens, chosen: Int[np.ndarray, "m"]
) -> Iterator[tuple[Int[np.ndarray, "b"], Columns]]:
    """Yield blocks of the indices `chosen` of `tokens`, and their features padded to `BLOCK`."""
    (indptr, ids), sizes = tokens.pieces, np.diff(tokens.pieces.indptr)
    shares = np.repeat((1 / sizes).astype(np.float32), sizes)
    means = scipy.sparse.csr_array((shares, ids, indptr), shape=(len(sizes), len(rows)))

    def columns(start: int) -> Columns:
        block = _filled(chosen[start : start + BLOCK])
        token = tokens.ids[block]
        return Columns(
            tokens.contexts.before[token],
            tokens.contexts.after[token],
            means[block] @ rows,
            rows[ids[indptr[block]]],
            rows[ids[indptr[block + 1] - 1]],
            tokens.log_frequency[token].astype(np.float32),
        )

    with ThreadPoolExecutor(THREADS) as pool:
        for (start,), features in in_order(
            pool, THREADS, columns, [(start,) for start in range(0, len(chosen), BLOCK)]
        ):
            yield chosen[start : start + BLOCK], features


def _filled(values: Int[np.ndarray, "b"]) -> Int[np.ndarray, "n"]:
    """Pad to `BLOCK` by repeating the last value."""
    return np.pad(values, (0, BLOCK - len(values)), mode="edge")


def _features(columns: Columns, mean: Float[Array, "D"]) -> Float[Array, "n F"]:
    before, after, *pieces, log_frequency = columns
    one = jnp.ones_like(log_frequency)
    return jnp.concatenate(
        [before - mean, after - mean, *pieces, log_frequency[:, None], one[:, None]], axis=1
    )


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _add(
    gram: Float[Array, "F F"],
    cross: Float[Array, "F D"],
    columns: Columns,
    mean: Float[Array, "D"],
    rows: Float[Array, "n D"],
    weights: Float[Array, "n"],
) -> tuple[Float[Array, "F F"], Float[Array, "F D"]]:
    """Add a block to X'WX and X'WY."""
    features = _features(columns, mean)
    weighted = features * weights[:, None]
    gram += jnp.matmul(weighted.T, features, precision="highest")
    return gram, cross + jnp.matmul(weighted.T, rows, precision="highest")


@jax.jit
def _rule(
    gram: Float[Array, "F F"],
    cross: Float[Array, "F D"],
    covariance: Float[Array, "D D"],
    seen,
    ridge,
) -> Float[Array, "F D"]:
    """Solve for the coefficients of tokens whose contexts were seen `seen` times."""
    width = len(covariance)
    for start in (0, width):
        gram = gram.at[start : start + width, start : start + width].add(covariance / seen)
    diagonal = jnp.diagonal(gram) * (1 + ridge) + 1e-12
    scale = jax.lax.rsqrt(diagonal)
    scaled = (gram * scale[:, None] * scale).at[jnp.diag_indices(len(gram))].set(1.0)
    lower = jax.lax.linalg.cholesky(scaled, symmetrize_input=False)
    return jax.scipy.linalg.cho_solve((lower, True), cross * scale[:, None]) * scale[:, None]


@jax.jit
def _apply(
    columns: Columns, mean: Float[Array, "D"], rule: Float[Array, "F D"]
) -> Float[Array, "n D"]:
    return jnp.matmul(_features(columns, mean), rule, precision="highest")
