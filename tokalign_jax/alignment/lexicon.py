"""A lexicon between two vocabularies, induced as between two languages (in the spirit of TokAlign++, arXiv 2605.13429).

One orthogonal map W = argmin sum ||x W - y||^2 takes target vectors x to the source vectors y of a dictionary (Procrustes:
W = U V' where U S V' = X'Y), at first of the shared tokens. Then pairs that are each other's nearest by CSLS join it, where
their score is as good as that of seeds which find themselves, and the map is fitted again, until the dictionary stays as it
is (Artetxe et al. 2018 for words). Nothing is drawn at random.

Measured on llama-en16k and Qwen3's vocabulary, aligned on 5 MB, 300 dimensions: of 975 shared tokens that are no seeds 66.6%
find themselves by the seeds alone, 67.2% at the end; of those of them that had joined the dictionary, 98% with themselves.
Weighting pairs by 1 / sqrt(rank) gave 66.8% in the first round: not worth its idea.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tokalign_jax.alignment import matching

FREQUENT = 20_000
"""Pairs are sought among so many of the most frequent tokens of each side: they are what a map is learned from best."""
ROUNDS = 4
"""At most; measured, the dictionary changes by a pair or two after the second."""
JOIN_QUANTILE = 0.25
"""Pairs join whose score is above this quantile of the scores of seeds that find themselves."""


def common_space(
    source: Float[np.ndarray, "n d"],
    target: Float[np.ndarray, "m e"],
    seeds: Int[np.ndarray, "S 2"],
    neighbours: int,
) -> tuple[Float[Array, "n d"], Float[Array, "m d"], Int[np.ndarray, "N 2"]]:
    """Source and target vectors of norm 1 in the source's space, and the pairs that joined the seeds.

    Args:
      source, target: token vectors by falling frequency, each of its own dimensions.
      seeds: rows (source, target) of shared tokens.
      neighbours: over which hubness is averaged (CSLS).
    """
    keys = matching.centred(jnp.asarray(source, jnp.float32))
    queries = matching.centred(jnp.asarray(target, jnp.float32))
    joined = np.zeros((0, 2), np.int32)
    mapped = _mapped(keys, queries, jnp.asarray(seeds))
    for _ in range(ROUNDS):
        before, joined = joined, _mutual(keys[:FREQUENT], mapped[:FREQUENT], seeds, neighbours)
        if np.array_equal(before, joined):
            break
        mapped = _mapped(keys, queries, jnp.asarray(np.concatenate([seeds, joined])))
    return keys, mapped, joined


def _mutual(
    keys: Float[Array, "n d"],
    queries: Float[Array, "m d"],
    seeds: Int[np.ndarray, "S 2"],
    neighbours: int,
) -> Int[np.ndarray, "N 2"]:
    """Pairs (key, query), no seeds, that are each other's best by CSLS and score as seeds do that find themselves."""
    forth, scores = (np.asarray(a)[:, 0] for a in matching.csls(queries, keys, neighbours))
    back = np.asarray(matching.csls(keys, queries, neighbours)[0])[:, 0]
    mutual = back[forth] == np.arange(len(forth))
    seeds = seeds[(seeds[:, 0] < len(keys)) & (seeds[:, 1] < len(queries))]
    itself = seeds[mutual[seeds[:, 1]] & (forth[seeds[:, 1]] == seeds[:, 0]), 1]
    if not len(itself):
        return np.zeros((0, 2), np.int32)
    joins = mutual & (scores >= np.quantile(scores[itself], JOIN_QUANTILE))
    joins &= ~np.isin(forth, seeds[:, 0])
    joins[seeds[:, 1]] = False
    return np.stack([forth[joins], np.flatnonzero(joins)], axis=1).astype(np.int32)


@jax.jit
def _mapped(
    keys: Float[Array, "n d"], queries: Float[Array, "m e"], pairs: Int[Array, "N 2"]
) -> Float[Array, "m d"]:
    """The queries under the orthogonal map that takes those of the pairs nearest to their keys, of norm 1."""
    with jax.default_matmul_precision("highest"):
        left, _, right = jnp.linalg.svd(
            queries[pairs[:, 1]].T @ keys[pairs[:, 0]], full_matrices=False
        )
        return matching.unit(queries @ (left @ right))
