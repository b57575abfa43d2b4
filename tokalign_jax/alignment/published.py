"""TokAlign's matching as published (arXiv 2506.03523, section 3.2), a baseline.

Tokens of the same string are shared. A vector x becomes its cosines to P pivots, drawn at random
from the shared tokens: r(x) = (cos(x, a_1), ..., cos(x, a_P)), with each side's own vectors. A
target token t is matched to argmax_s r(t) . r(s). Its faults are reproduced: representations are
not normalized, so that source tokens near to all pivots attract many target tokens (hubs), and
`Ġthe` and `▁the` are not shared.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from transformers import PreTrainedTokenizerBase

from tokalign_jax.alignment import matching


def same_string(
    source_tokenizer: PreTrainedTokenizerBase, target_tokenizer: PreTrainedTokenizerBase
) -> dict[int, int]:
    """Return the source id by target id of tokens of the same string, special ones included."""
    source = source_tokenizer.get_vocab()
    return {
        index: source[token]
        for token, index in target_tokenizer.get_vocab().items()
        if token in source
    }


def match(
    source: Float[np.ndarray, "n d"],
    target: Float[np.ndarray, "m e"],
    pivots: Int[np.ndarray, "P 2"],
) -> tuple[Int[np.ndarray, "m"], Float[np.ndarray, "m"]]:
    """Match each target row to the source row with the largest product of relative vectors.

    Args:
      source: source vectors.
      target: target vectors.
      pivots: rows (source, target) of the pivots.

    Returns:
      Source rows, int32, and the cosine of the two relative vectors clipped to [0, 1], float32,
        which
      is not part of the published method.
    """
    best, cosines = _best(np.asarray(source, np.float32), np.asarray(target, np.float32), pivots)
    return np.asarray(best), np.asarray(cosines)


@jax.jit
def _best(
    source: Float[Array, "n d"], target: Float[Array, "m e"], pivots: Int[Array, "P 2"]
) -> tuple[Int[Array, "m"], Float[Array, "m"]]:
    relative_source, relative_target = (
        _relative(vectors, pivots[:, side]) for side, vectors in enumerate((source, target))
    )
    products, best = matching.nearest(relative_target, relative_source, jnp.zeros(len(source)), 1)
    source_lengths = jnp.linalg.norm(relative_source, axis=1)
    lengths = jnp.linalg.norm(relative_target, axis=1) * source_lengths[best[:, 0]]
    return best[:, 0], jnp.clip(products[:, 0] / jnp.maximum(lengths, 1e-9), 0.0, 1.0)


def _relative(vectors: Float[Array, "n d"], pivots: Int[Array, "P"]) -> Float[Array, "n P"]:
    """Return the cosines of each vector to the pivots."""
    vectors = matching.unit(vectors)
    return jnp.matmul(vectors, vectors[pivots].T, precision="highest")
