"""Matching target tokens to source tokens by what both are near to.

Two GloVe runs share no axes, but they share tokens. A vector x becomes its cosines to P of these, the pivots A: the relative
representation x A' (Moschella et al. 2023; TokAlign, section 3.2). As published, a few directions that all pivots have much
of drown the rest, and tokens along them are near to everything. So vectors are centred, and the representation is whitened:
r(x) = x (A'A)^(-1/2) A', which keeps the length of x. Measured on 5 MB of text (share of 1,500 shared tokens that are no
pivots and find themselves; 300, 1000, 4000 pivots): plain 0.22, 0.37, 0.44; orthogonal map 0.26, 0.52, 0.64; whitened 0.26,
0.57, 0.69. Of r only products are needed, and those have a closed form that is as small as the vectors:
r_t(x) . r_s(y) = x G_t^(-1/2) (A_t' A_s) G_s^(-1/2) y with G = A'A.

Retrieval is by CSLS (Conneau et al. 2018, eq. 3), which corrects what is left of hubs. A cosine says little by itself (the
best of many is high by chance), so scores are calibrated on shared tokens that are not pivots, the judges: a similarity is
the probability, fitted by Platt's method, that a judge with this score has found itself. (Of tokens that have no exact
counterpart it says how near the match is to being one; it is no probability of theirs.)

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
"""At most so many queries, and so many scores (128 MiB), exist at once."""
AROUND = 2**16
"""Hubness is measured against this many of the most frequent tokens of the other side; all of them would cost a pass over all products.

Measured (llama-en16k to Qwen3's vocabulary, 15 MB of text, 42,242 target tokens with vectors, three splits of the judges): with all of them
92.4 to 93.0% find themselves, with half 92.0 to 92.7, with a quarter 92.1 to 92.4.
"""
GROUP = 16
"""Keys whose largest score is found first: the k best keys are in the k best groups, and sorting these is cheap."""
MAX_JUDGES = 2000
JUDGE_SHARE = Fraction(1, 10)
"""Shared tokens that are kept from being pivots, to judge matches by: this share of them, at most that many."""
PIVOT_POOL = 10
"""Pivots are drawn from this many times as many of the most frequent shared tokens."""
TEMPERATURES = tuple(float(t) for t in np.geomspace(1e-3, 1.0, 61))
"""Of a softmax over scores, tried on the judges."""
RIDGE = 1e-3
"""Added to the diagonal of G, in units of its mean: fewer pivots than dimensions leave G singular."""


class Matches(NamedTuple):
    """For each target token its k best source tokens, the best first."""

    source: Int[np.ndarray, "m k"]
    """int32: rows in the source vectors."""
    scores: Float[np.ndarray, "m k"]
    """float32: CSLS."""
    similarity: Float[np.ndarray, "m"]
    """float32, of the best one, calibrated: 0 for what chance gives, 1 for the same token."""
    accuracy: float
    """Share of the judges that find themselves (accuracy@1)."""


def choose_pivots(
    source_rank: Int[np.ndarray, "S"], target_rank: Int[np.ndarray, "S"], pivots: int, seed: int
) -> tuple[Int[np.ndarray, "P"], Int[np.ndarray, "J"]]:
    """Splits the S shared tokens: indices of pivots (drawn from those frequent on both sides) and of judges (from all).

    Args:
      source_rank: each shared token's place in the order of falling frequency, among source tokens.
      target_rank: the same among target tokens.
      pivots: how many to draw; fewer where there are not so many.
    """
    rng = np.random.default_rng(seed)
    shared = len(source_rank)
    judges = np.sort(rng.permutation(shared)[: min(MAX_JUDGES, math.ceil(shared * JUDGE_SHARE))])
    by_frequency = np.argsort(np.maximum(source_rank, target_rank), kind="stable")
    pool = by_frequency[~np.isin(by_frequency, judges)][: pivots * PIVOT_POOL]
    return np.sort(rng.permutation(pool)[:pivots]), judges


def relative(vectors: Float[Array, "n d"], pivots: Int[Array, "P"]) -> Float[Array, "n P"]:
    """The whitened relative representation r of each vector, with norm 1, written out (for tests and small spaces)."""
    vectors = centred(vectors)
    anchors = vectors[pivots]
    return unit(vectors @ _inverse_root(anchors.T @ anchors) @ anchors.T)


@jax.jit
def common_space(
    source: Float[Array, "n d"], target: Float[Array, "m e"], pivots: Int[Array, "P 2"]
) -> tuple[Float[Array, "n d"], Float[Array, "m d"]]:
    """Vectors whose products are the cosines of the relative representations of source and target.

    Args:
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
    """The k <= K largest of queries . keys - penalty for each query, falling, and their keys; [Q, K] never exists."""
    group = GROUP if len(keys) >= GROUP * k else 1
    keys, penalty = _padded(keys, group), _padded(penalty, group, jnp.inf)
    fitting = max(SCORES // len(keys), 1).bit_length() - 1
    block = min(QUERY_BLOCK, 1 << fitting, _power_of_two(len(queries)))
    blocks = _padded(queries, block).reshape(-1, block, queries.shape[1])

    def of_block(queries: Float[Array, "b d"]):
        scores = jnp.matmul(queries, keys.T, precision="highest") - penalty
        # Group j is keys j, j + groups, j + 2 groups ..: maxima over the first axis of a matrix are fast everywhere.
        grouped = scores.reshape(len(queries), group, -1)
        _, groups = jax.lax.top_k(grouped.max(axis=1), k)
        candidates = jnp.take_along_axis(grouped, groups[:, None, :], axis=2).reshape(
            len(queries), -1
        )
        values, chosen = jax.lax.top_k(candidates, k)
        member, place = chosen // k, chosen % k
        return values, member * grouped.shape[2] + jnp.take_along_axis(groups, place, axis=1)

    values, indices = jax.lax.map(of_block, blocks)
    return values.reshape(-1, k)[: len(queries)], indices.reshape(-1, k)[: len(queries)]


def hubness(
    keys: Float[Array, "K d"], queries: Float[Array, "Q d"], neighbours: int
) -> Float[Array, "K"]:
    """The mean cosine of each key with its `neighbours` nearest of the first `AROUND` queries: what is near to everything has much.

    Args:
      keys, queries: of norm 1; queries by falling frequency of their tokens.
    """
    frequent = queries[:AROUND]
    return nearest(keys, frequent, jnp.zeros(len(frequent)), min(neighbours, len(frequent)))[
        0
    ].mean(axis=1)


@functools.partial(jax.jit, static_argnames=("neighbours", "k"))
def csls(
    queries: Float[Array, "Q d"], keys: Float[Array, "K d"], neighbours: int, k: int = 1
) -> tuple[Int[Array, "Q k"], Float[Array, "Q k"]]:
    """For each query the k keys with the largest cos(q, key) - (r_q + r_key) / 2, falling, and these scores.

    r_key is the key's hubness. r_q, which ranks nothing but tells good matches from bad ones, is the mean cosine with the query's
    best keys (published: with its nearest, which would take another pass over all products, and calibrates no better. Measured
    on 488 judges of llama-en16k and Qwen3's vocabulary: log-loss of the calibrated similarity 0.364 with the best, 0.375 with
    the nearest).

    Args:
      queries, keys: of norm 1; queries by falling frequency of their tokens.
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
    judges: Int[np.ndarray, "J 2"],
    neighbours: int,
    k: int = 1,
) -> Matches:
    """The k source rows that fit each target row best, by whitened relative representations.

    Args:
      source, target: token vectors, each of its own dimensions.
      pivots, judges: rows (source, target) of shared tokens; no judge may be a pivot.
      neighbours: nearest neighbours over which hubness is averaged.
    """
    keys, queries = common_space(
        np.asarray(source, np.float32), np.asarray(target, np.float32), pivots
    )
    return retrieve(keys, queries, judges, neighbours, k)


def retrieve(
    keys: Float[Array, "n d"],
    queries: Float[Array, "m d"],
    judges: Int[np.ndarray, "J 2"],
    neighbours: int,
    k: int = 1,
) -> Matches:
    """The k source rows that fit each target row best, where both are in one space.

    Args:
      keys, queries: source and target vectors of norm 1.
      judges: rows (source, target) of shared tokens that had no part in making the space.
    """
    found, scores = (np.asarray(a) for a in csls(queries, keys, neighbours, k))
    right = found[judges[:, 1], 0] == judges[:, 0]
    judged = scores[judges[:, 1], 0]
    slope, offset = platt(judged[right], judged[~right])
    similarity = 1 / (1 + np.exp(-(slope * scores[:, 0].astype(np.float64) + offset)))
    return Matches(
        found.astype(np.int32), scores, similarity.astype(np.float32), float(right.mean())
    )


def platt(right: Float[np.ndarray, "R"], wrong: Float[np.ndarray, "W"]) -> tuple[float, float]:
    """(slope >= 0, offset) of the probability 1 / (1 + exp(-slope score - offset)) that a match with this score is right.

    Args:
      right, wrong: scores of matches known to be so.

    Newton's method on the cross-entropy, with the smoothed targets of Platt 1999, eq. 10: few judges make no certainties.
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
        # A unit Gaussian prior on the slope, in standard deviations of the score, keeps separable judges finite.
        gradient = inputs.T @ (probability - target) + [weights[0] / 100, 0.0]
        curvature = (inputs.T * (probability * (1 - probability))) @ inputs + np.diag([1e-2, 1e-6])
        step = np.linalg.solve(curvature, gradient)
        weights -= np.clip(step, -2, 2)
    slope = max(weights[0], 0.0) / spread
    return float(slope), float(weights[1] - slope * centre)


def softmax_weights(
    scores: Float[np.ndarray, "m k"], temperature: float
) -> Float[np.ndarray, "m k"]:
    """float64: weights exp(score / temperature), each row's sum is 1."""
    powers = (scores.astype(np.float64) - scores.max(axis=1, keepdims=True)) / temperature
    return np.exp(powers) / np.exp(powers).sum(axis=1, keepdims=True)


def temperature(found: Matches, judges: Int[np.ndarray, "J 2"]) -> float:
    """The temperature at which `softmax_weights` gives the judges' own source tokens most (the largest mean log weight).

    Judges whose own token is not among the k say nothing of it; where none's is, weights are as equal as can be.
    """
    itself = found.source[judges[:, 1]] == judges[:, :1]
    among = itself.any(axis=1)
    scores, itself = found.scores[judges[among, 1]], itself[among]
    if not len(scores):
        return TEMPERATURES[-1]
    gains = [np.log(softmax_weights(scores, t)[itself] + 1e-30).mean() for t in TEMPERATURES]
    return TEMPERATURES[int(np.argmax(gains))]


@jax.jit
def centred(vectors: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Rows of norm 1, less their mean, of norm 1 again."""
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
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), 1e-9)


def _padded(rows: Array, block: int, value: float = 0.0) -> Array:
    """`rows` and as many more as make its length a multiple of `block`."""
    missing = -len(rows) % block
    return jnp.pad(rows, [(0, missing), *[(0, 0)] * (rows.ndim - 1)], constant_values=value)


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
