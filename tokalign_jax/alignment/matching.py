"""Matching of target tokens to source tokens by relative representations and CSLS.

Two sets of token vectors share no axes, but they share tokens. The relative representation of a
vector x is its cosines to P shared tokens, the pivots A: x A' (Moschella et al. 2023; TokAlign,
section 3.2). As published it is dominated by a few directions that all pivots have in common, and
tokens along them are near to everything. Vectors are therefore centred and the representation is
whitened: r(x) = x (A'A)^(-1/2) A', which keeps the norm of x. Only products of r are needed, and
they have a closed form of the size of the vectors: r_t(x) . r_s(y) = x G_t^(-1/2) (A_t' A_s)
G_s^(-1/2) y with G = A'A. Measured on 5 MB of text (accuracy@1 of 1,500 validation pairs; 300,
1000, 4000 pivots): plain 0.22, 0.37, 0.44; orthogonal map 0.26, 0.52, 0.64; whitened 0.26, 0.57,
0.69.

Retrieval is by CSLS (Conneau et al. 2018, eq. 3), which corrects for hubs. The best cosine of many
is high by chance, so scores are calibrated by Platt scaling on validation pairs, shared tokens that
are not pivots: a similarity is the probability that a validation pair of this score is matched
correctly. It is an overestimate for tokens without an exact counterpart.

Letters: Q queries, K keys, P pivots, d (source) and e (target) dimensions, k neighbours.
"""

import functools
import math
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

QUERY_BLOCK = 1024
SCORES = 2**25
"""Queries, and scores (128 MiB), that exist at once, at most."""
AROUND = 2**16
"""Most frequent tokens of the other side over which hubness is measured: all tokens would take
another pass over all products and gain less than a point of accuracy.
"""
GROUP = 16
"""Keys per group: the k best keys are in the k groups with the largest maxima, which are cheap to
sort.
"""
MAX_VALIDATION = 2000
VALIDATION_SHARE = Fraction(1, 10)
"""Share of shared tokens that are validation pairs instead of pivots; at most `MAX_VALIDATION`."""
PIVOT_POOL = 10
"""Size of the pool of most frequent shared tokens that pivots are drawn from, relative to their
number.
"""
TEMPERATURES = tuple(float(t) for t in np.geomspace(1e-3, 1.0, 61))
"""Candidates for the softmax temperature, chosen on the validation pairs."""
RIDGE = 1e-3
"""Added to the diagonal of G, relative to its mean: with fewer pivots than dimensions G is
singular.
"""


class Matches(NamedTuple):
    """The k best source tokens of each target token, best first."""

    source: Int[np.ndarray, "m k"]
    """int32: rows in the source vectors."""
    scores: Float[np.ndarray, "m k"]
    """float32: CSLS."""
    similarity: Float[np.ndarray, "m"]
    """float32: calibrated similarity of the best match, from 0 (chance) to 1 (the same token)."""
    accuracy: float
    """accuracy@1 of the validation pairs."""


def choose_pivots(
    source_rank: Int[np.ndarray, "S"], target_rank: Int[np.ndarray, "S"], pivots: int, seed: int
) -> tuple[Int[np.ndarray, "P"], Int[np.ndarray, "J"]]:
    """Split S shared tokens into pivots, frequent on both sides, and validation pairs.

    Validation pairs are drawn from all shared tokens.

    Args:
      source_rank: each shared token's rank by frequency among source tokens.
      target_rank: the same among target tokens.
      pivots: number of pivots, at most.
      seed: of both draws.

    Returns:
      Indices of pivots and of validation pairs.
    """
    rng = np.random.default_rng(seed)
    shared = len(source_rank)
    validation = np.sort(
        rng.permutation(shared)[: min(MAX_VALIDATION, math.ceil(shared * VALIDATION_SHARE))]
    )
    by_frequency = np.argsort(np.maximum(source_rank, target_rank), kind="stable")
    pool = by_frequency[~np.isin(by_frequency, validation)][: pivots * PIVOT_POOL]
    return np.sort(rng.permutation(pool)[:pivots]), validation


def relative(vectors: Float[Array, "n d"], pivots: Int[Array, "P"]) -> Float[Array, "n P"]:
    """Return the whitened relative representation of each vector, normalized; for tests."""
    vectors = centred(vectors)
    anchors = vectors[pivots]
    return unit(vectors @ _inverse_root(anchors.T @ anchors) @ anchors.T)


@jax.jit
def common_space(
    source: Float[Array, "n d"], target: Float[Array, "m e"], pivots: Int[Array, "P 2"]
) -> tuple[Float[Array, "n d"], Float[Array, "m d"]]:
    """Return vectors whose products are the cosines of the whitened relative representations.

    Args:
      source: source vectors.
      target: target vectors.
      pivots: rows (source, target) of the pivots.
    """
    with jax.default_matmul_precision("highest"):
        source, target = centred(source), centred(target)
        source_anchors, target_anchors = source[pivots[:, 0]], target[pivots[:, 1]]
        source_gram, target_gram = (
            source_anchors.T @ source_anchors,
            target_anchors.T @ target_anchors,
        )
        source_root, target_root = _inverse_root(source_gram), _inverse_root(target_gram)
        mapping = target_root @ (target_anchors.T @ source_anchors) @ source_root
        source_norm = jnp.linalg.norm(
            source @ source_root @ _root(source_gram), axis=1, keepdims=True
        )
        target_norm = jnp.linalg.norm(
            target @ target_root @ _root(target_gram), axis=1, keepdims=True
        )
        return source / jnp.maximum(source_norm, 1e-9), (target @ mapping) / jnp.maximum(
            target_norm, 1e-9
        )


@functools.partial(jax.jit, static_argnames="k")
def nearest(
    queries: Float[Array, "Q d"], keys: Float[Array, "K d"], penalty: Float[Array, "K"], k: int
) -> tuple[Float[Array, "Q k"], Int[Array, "Q k"]]:
    """Return the k <= K largest values of queries . keys - penalty, and their keys.

    Computed in blocks of queries.
    """
    group = GROUP if len(keys) >= GROUP * k else 1
    keys, penalty = _padded(keys, group), _padded(penalty, group, jnp.inf)
    fitting = max(SCORES // len(keys), 1).bit_length() - 1
    block = min(QUERY_BLOCK, 1 << fitting, _power_of_two(len(queries)))
    blocks = _padded(queries, block).reshape(-1, block, queries.shape[1])

    def search(queries: Float[Array, "b d"]):
        scores = jnp.matmul(queries, keys.T, precision="highest") - penalty
        # Group j is keys j, j + groups, j + 2 groups, ...: maxima over the first axis of a matrix
        # are fast on all devices.
        grouped = scores.reshape(len(queries), group, -1)
        _, groups = jax.lax.top_k(grouped.max(axis=1), k)
        candidates = jnp.take_along_axis(grouped, groups[:, None, :], axis=2).reshape(
            len(queries), -1
        )
        values, chosen = jax.lax.top_k(candidates, k)
        member, place = chosen // k, chosen % k
        return values, member * grouped.shape[2] + jnp.take_along_axis(groups, place, axis=1)

    values, indices = jax.lax.map(search, blocks)
    return values.reshape(-1, k)[: len(queries)], indices.reshape(-1, k)[: len(queries)]


def hubness(
    keys: Float[Array, "K d"], queries: Float[Array, "Q d"], neighbours: int
) -> Float[Array, "K"]:
    """Return the mean cosine of each key to its nearest queries among the first `AROUND`.

    Args:
      keys: of norm 1.
      queries: of norm 1, by falling frequency of their tokens.
      neighbours: number of nearest queries.
    """
    frequent = queries[:AROUND]
    neighbours = min(neighbours, len(frequent))
    cosines, _ = nearest(keys, frequent, jnp.zeros(len(frequent)), neighbours)
    return cosines.mean(axis=1)


@functools.partial(jax.jit, static_argnames=("neighbours", "k"))
def csls(
    queries: Float[Array, "Q d"], keys: Float[Array, "K d"], neighbours: int, k: int = 1
) -> tuple[Int[Array, "Q k"], Float[Array, "Q k"]]:
    """Return the k best keys of each query by cos(q, key) - (r_q + r_key) / 2, and scores.

    r_key is the key's hubness. r_q does not change the ranking of a query's keys; it is the mean
    cosine to the query's keys of the best scores (published: to its nearest keys, which takes
    another pass over all products and calibrates no better).

    Args:
      queries: of norm 1, by falling frequency of their tokens.
      keys: of norm 1, by falling frequency of their tokens.
      neighbours: number of neighbours over which hubness is averaged.
      k: number of keys.
    """
    around_keys = hubness(keys, queries, neighbours)
    scores, indices = nearest(queries, keys, around_keys / 2, min(max(k, neighbours), len(keys)))
    cosines = scores + around_keys[indices] / 2
    around_queries = cosines[:, :neighbours].mean(axis=1, keepdims=True)
    return indices[:, :k], scores[:, :k] - around_queries / 2


def match(
    source: Float[np.ndarray, "n d"],
    target: Float[np.ndarray, "m e"],
    pivots: Int[np.ndarray, "P 2"],
    validation: Int[np.ndarray, "J 2"],
    neighbours: int,
    k: int = 1,
) -> Matches:
    """Match each target row to its k best source rows by whitened relative representations.

    Args:
      source: source vectors.
      target: target vectors, of their own dimensions.
      pivots: rows (source, target) of shared tokens.
      validation: rows (source, target) of other shared tokens.
      neighbours: number of neighbours over which hubness is averaged.
      k: number of matches.
    """
    keys, queries = common_space(
        np.asarray(source, np.float32), np.asarray(target, np.float32), pivots
    )
    return retrieve(keys, queries, validation, neighbours, k)


def retrieve(
    keys: Float[Array, "n d"],
    queries: Float[Array, "m d"],
    validation: Int[np.ndarray, "J 2"],
    neighbours: int,
    k: int = 1,
) -> Matches:
    """Match each target row to its k best source rows in a common space.

    Args:
      keys: source vectors of norm 1.
      queries: target vectors of norm 1.
      validation: rows (source, target) of shared tokens that the space was not fitted on.
      neighbours: number of neighbours over which hubness is averaged.
      k: number of matches.
    """
    best, scores = (np.asarray(x) for x in csls(queries, keys, neighbours, k))
    correct = best[validation[:, 1], 0] == validation[:, 0]
    validation_scores = scores[validation[:, 1], 0]
    slope, offset = platt(validation_scores[correct], validation_scores[~correct])
    similarity = 1 / (1 + np.exp(-(slope * scores[:, 0].astype(np.float64) + offset)))
    return Matches(
        best.astype(np.int32), scores, similarity.astype(np.float32), float(correct.mean())
    )


def platt(right: Float[np.ndarray, "R"], wrong: Float[np.ndarray, "W"]) -> tuple[float, float]:
    """Fit the probability 1 / (1 + exp(-slope score - offset)) that a match is correct.

    Newton's method on the cross-entropy with the smoothed targets of Platt 1999, eq. 10.

    Args:
      right: scores of correct matches.
      wrong: scores of wrong matches.

    Returns:
      The slope, which is not negative, and the offset.
    """
    scores = np.concatenate([right, wrong]).astype(np.float64)
    positives, negatives = len(right), len(wrong)
    target = np.repeat(
        [(positives + 1) / (positives + 2), 1 / (negatives + 2)], [positives, negatives]
    )
    centre, spread = float(scores.mean()), float(scores.std()) + 1e-6
    inputs = np.stack([(scores - centre) / spread, np.ones_like(scores)], axis=1).astype(np.float64)
    weights = np.array([0.0, np.log((positives + 1) / (negatives + 1))])
    for _ in range(50):
        probability = 1 / (1 + np.exp(-inputs @ weights))
        # A Gaussian prior on the slope, in standard deviations of the score, since separable data
        # have no finite slope.
        gradient = inputs.T @ (probability - target) + [weights[0] / 100, 0.0]
        curvature = (inputs.T * (probability * (1 - probability))) @ inputs + np.diag([1e-2, 1e-6])
        step = np.linalg.solve(curvature, gradient)
        weights -= np.clip(step, -2, 2)
    slope = max(weights[0], 0.0) / spread
    return float(slope), float(weights[1] - slope * centre)


def softmax_weights(
    scores: Float[np.ndarray, "m k"], temperature: float
) -> Float[np.ndarray, "m k"]:
    """Return the softmax of scores over the temperature, float64."""
    powers = (scores.astype(np.float64) - scores.max(axis=1, keepdims=True)) / temperature
    return np.exp(powers) / np.exp(powers).sum(axis=1, keepdims=True)


def temperature(matches: Matches, validation: Int[np.ndarray, "J 2"]) -> float:
    """Return the temperature with the largest mean log weight of the validation pairs' own tokens.

    Pairs whose token is not among the k are ignored. If all are, the largest temperature is
    returned.
    """
    itself = matches.source[validation[:, 1]] == validation[:, :1]
    among = itself.any(axis=1)
    scores, itself = matches.scores[validation[among, 1]], itself[among]
    if not len(scores):
        return TEMPERATURES[-1]
    gains = [np.log(softmax_weights(scores, t)[itself] + 1e-30).mean() for t in TEMPERATURES]
    return TEMPERATURES[int(np.argmax(gains))]


@jax.jit
def centred(vectors: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Normalize rows, subtract their mean, normalize again."""
    vectors = unit(vectors)
    return unit(vectors - vectors.mean(axis=0))


def _inverse_root(gram: Float[Array, "d d"]) -> Float[Array, "d d"]:
    return _power(gram + RIDGE * jnp.trace(gram) / len(gram) * jnp.eye(len(gram)), -0.5)


def _root(gram: Float[Array, "d d"]) -> Float[Array, "d d"]:
    return _power(gram, 0.5)


def _power(gram: Float[Array, "d d"], exponent: float) -> Float[Array, "d d"]:
    values, vectors = jnp.linalg.eigh(gram)
    return (vectors * jnp.maximum(values, 0.0) ** exponent) @ vectors.T


def unit(rows: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Normalize rows to norm 1; rows of zeros stay zeros."""
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


def _padded(rows: Array, block: int, value: float = 0.0) -> Array:
    """Pad rows to a multiple of `block`."""
    missing = -len(rows) % block
    return jnp.pad(rows, [(0, missing), *[(0, 0)] * (rows.ndim - 1)], constant_values=value)


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
