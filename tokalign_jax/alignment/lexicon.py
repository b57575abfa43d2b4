"""Bilingual lexicon induction between two vocabularies (compare TokAlign++, arXiv 2605.13429).

An orthogonal map W = argmin sum ||x W - y||^2 takes target vectors x to the source vectors y of a
dictionary (Procrustes: W = U V' where U S V' = X'Y), at first that of the shared tokens. Pairs that
are mutual nearest neighbours by CSLS join it if they score as high as correctly matched seeds, and
the map is fitted again, until the dictionary does not change (Artetxe et al. 2018 for words). It is
deterministic.

Measured on llama-en16k and Qwen3's vocabulary, aligned on 5 MB, 300 dimensions: accuracy@1 of 975
validation pairs is 66.6% with the seeds alone and 67.2% at the end.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tokalign_jax.alignment import matching

FREQUENT = 20_000
"""Most frequent tokens of each side among which pairs may join the dictionary."""
ROUNDS = 4
"""Rounds, at most; the dictionary hardly changes after the second."""
JOIN_QUANTILE = 0.25
"""Quantile of the scores of correctly matched seeds above which pairs join."""


def common_space(
    source: Float[np.ndarray, "n d"],
    target: Float[np.ndarray, "m e"],
    seeds: Int[np.ndarray, "S 2"],
    neighbours: int,
) -> tuple[Float[Array, "n d"], Float[Array, "m d"], Int[np.ndarray, "N 2"]]:
    """Return normalized source and target vectors in the source's space, and the pairs that joined.

    Args:
      source: token vectors by falling frequency.
      target: the same, of its own dimensions.
      seeds: rows (source, target) of shared tokens.
      neighbours: number of neighbours over which hubness is averaged (CSLS).
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
    """Return pairs (key, query) of mutual best matches with high scores, without the seeds."""
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
    """Apply the orthogonal map fitted on the pairs to the queries, and normalize them."""
    with jax.default_matmul_precision("highest"):
        u, _, vt = jnp.linalg.svd(queries[pairs[:, 1]].T @ keys[pairs[:, 0]], full_matrices=False)
        return matching.unit(queries @ (u @ vt))
