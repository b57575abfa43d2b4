"""Matching target tokens to source tokens by what both are near to.

Two GloVe runs share no axes, but they share tokens. Each vector becomes its cosines to P of these, the pivots (a relative
representation, Moschella et al. 2023; TokAlign, section 3.2), centred over the tokens of its side and normalised: without
that a few source tokens are near to everything. Retrieval is by CSLS (Conneau et al. 2018, eq. 3), which corrects what is
left of such hubs. A cosine of relative representations says little by itself (noise reaches 0.4), so it is calibrated
against what the same search finds when the pivots of one side are permuted.

Letters: Q queries, K keys, P pivots, d GloVe dimensions, k neighbours.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

QUERY_BLOCK = 1024
KEY_BLOCK = 4096
"""Cosines exist for this many queries and keys at once."""
NULL_SAMPLE = 2048
"""Target tokens from which the cosine that chance gives is estimated."""
PIVOT_POOL = 10
"""Pivots are drawn from this many times as many of the most frequent shared tokens."""


class Matches(NamedTuple):
    """For each query token its best source token."""

    source: Int[np.ndarray, "Q"]
    """int32: row in the source vectors."""
    similarity: Float[np.ndarray, "Q"]
    """float32, calibrated: about 0 for what chance gives, 1 for the same relative representation."""
    null: float
    """The cosine that chance gives."""


def choose_pivots(source_rank: Int[np.ndarray, "S"], target_rank: Int[np.ndarray, "S"], pivots: int, seed: int):
    """Indices, sorted, of `pivots` of the S shared tokens, drawn from those that are frequent on both sides.

    Args:
      source_rank: each shared token's place in the order of falling frequency, among source tokens.
      target_rank: the same among target tokens.
    """
    pool = np.argsort(np.maximum(source_rank, target_rank), kind="stable")[: pivots * PIVOT_POOL]
    return np.sort(np.random.default_rng(seed).permutation(pool)[:pivots])


@jax.jit
def relative(vectors: Float[Array, "n d"], pivots: Int[Array, "P"]) -> Float[Array, "n P"]:
    """Cosines to the vectors at `pivots`, centred over tokens, each row of norm 1."""
    unit = _unit(vectors)
    cosines = jnp.matmul(unit, unit[pivots].T, precision="highest")
    return _unit(cosines - cosines.mean(axis=0))


def nearest(
    queries: Float[Array, "Q P"], keys: Float[Array, "K P"], penalty: Float[Array, "K"], k: int
) -> tuple[Float[Array, "Q k"], Int[Array, "Q k"]]:
    """The k largest of queries . keys - penalty for each query, falling, and their keys; [Q, K] never exists."""
    query_block, key_block = min(QUERY_BLOCK, _power_of_two(len(queries))), min(KEY_BLOCK, _power_of_two(len(keys)))
    blocks = _padded(queries, query_block).reshape(-1, query_block, queries.shape[1])
    keys = _padded(keys, key_block).reshape(-1, key_block, keys.shape[1])
    penalty = _padded(penalty, key_block, jnp.inf).reshape(-1, key_block)
    values, indices = _nearest(blocks, keys, penalty, k)
    return values.reshape(-1, k)[: len(queries)], indices.reshape(-1, k)[: len(queries)]


def csls(
    queries: Float[Array, "Q P"], keys: Float[Array, "K P"], all_queries: Float[Array, "A P"], neighbours: int
) -> tuple[Int[Array, "Q"], Float[Array, "Q"]]:
    """For each query the key with the largest 2 cos(q, k) - r_q - r_k, and its cosine.

    r_k is the mean cosine of a key with its nearest of `all_queries`: what hubs have much of. r_q, the same with the sides
    swapped, does not change which key wins.
    """
    hubness = nearest(keys, all_queries, jnp.zeros(len(all_queries)), min(neighbours, len(all_queries)))[0].mean(axis=1)
    values, indices = nearest(queries, keys, hubness / 2, 1)
    return indices[:, 0], values[:, 0] + hubness[indices[:, 0]] / 2


def match(
    source: Float[np.ndarray, "n d"],
    target: Float[np.ndarray, "m e"],
    pivots: Int[np.ndarray, "P 2"],
    queries: Int[np.ndarray, "Q"],
    *,
    neighbours: int,
    seed: int,
) -> Matches:
    """The source row that fits each of the target rows `queries`.

    Args:
      source, target: token vectors, of whatever dimensions.
      pivots: rows (source, target) of the pivots.
      queries: rows of `target` to be matched; hubness is still measured over all of them.
      neighbours: nearest neighbours over which hubness is averaged.
    """
    rng = np.random.default_rng(seed)
    source_side = relative(jnp.asarray(source, jnp.float32), jnp.asarray(pivots[:, 0]))
    target_side = relative(jnp.asarray(target, jnp.float32), jnp.asarray(pivots[:, 1]))
    indices, cosines = csls(target_side[jnp.asarray(queries)], source_side, target_side, neighbours)
    sample = rng.permutation(len(target))[:NULL_SAMPLE]
    null = chance_cosine(target_side[jnp.asarray(sample)], source_side, rng.permutation(len(pivots)))
    similarity = (np.asarray(cosines) - null) / max(1.0 - null, 1e-6)
    return Matches(np.asarray(indices, np.int32), np.minimum(similarity, 1.0).astype(np.float32), null)


def chance_cosine(queries: Float[Array, "Q P"], keys: Float[Array, "K P"], permutation: Int[np.ndarray, "P"]) -> float:
    """The median over queries of the largest cosine, when pivot i of one side is pivot permutation[i] of the other."""
    best = nearest(queries[:, jnp.asarray(permutation)], keys, jnp.zeros(len(keys)), 1)[0]
    return float(jnp.median(best))


@functools.partial(jax.jit, static_argnames="k")
def _nearest(queries: Float[Array, "q b P"], keys: Float[Array, "c B P"], penalty: Float[Array, "c B"], k: int):
    starts = jnp.arange(len(keys), dtype=jnp.int32) * keys.shape[1]
    places = jnp.arange(keys.shape[1], dtype=jnp.int32)

    def of_block(queries: Float[Array, "b P"]):
        def merge(best, block):
            keys, penalty, start = block
            scores = jnp.matmul(queries, keys.T, precision="highest") - penalty
            values = jnp.concatenate([best[0], scores], axis=1)
            indices = jnp.concatenate([best[1], jnp.broadcast_to(start + places, scores.shape)], axis=1)
            values, chosen = jax.lax.top_k(values, k)
            return (values, jnp.take_along_axis(indices, chosen, axis=1)), None

        nothing = (jnp.full((len(queries), k), -jnp.inf), jnp.full((len(queries), k), -1, jnp.int32))
        return jax.lax.scan(merge, nothing, (keys, penalty, starts))[0]

    return jax.lax.map(of_block, queries)


def _unit(rows: Float[Array, "n d"]) -> Float[Array, "n d"]:
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


def _padded(rows: Array, block: int, value: float = 0.0) -> Array:
    """`rows` and as many more as make its length a multiple of `block`."""
    missing = -len(rows) % block
    return jnp.pad(rows, [(0, missing), *[(0, 0)] * (rows.ndim - 1)], constant_values=value)


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
