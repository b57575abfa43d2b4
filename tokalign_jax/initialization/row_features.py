"""Features of composed tokens, from which a shared network predicts the change of their rows.

A composed token is a target token that the source vocabulary does not have; its pieces are the
source tokens that spell it. Features of a token are

- its pieces' rows: their mean, the first, the second (of a single piece the first) and the last;
- the number of its pieces and of its bytes;
- the source model's state at the last piece, when it reads the pieces as a document: after a
  quarter of its layers, where pieces have been joined to words (Kaplan et al. 2024,
  arXiv 2410.05864), and after the last layer.

Each of these blocks is standardised to mean 0 and standard deviation 1; a last feature is 1.
"""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.transformer import Params, first_layers, forward
from tokalign_jax.parallel import sharding

DEPTHS = (0.25, 1.0)
"""Depths, as shares of the layers, at which the model's states are features."""
MOST_PIECES = 9
"""Last pieces of a token that the model reads."""
BATCH = {"cpu": 256}
OTHER_BATCH = 4096
"""Tokens whose pieces a device reads at once, by backend."""
MOST = 4096
"""Largest number of features; more are projected at random to this number."""


def features(
    rows: Float[np.ndarray, "V D"],
    parts: Sequence[Sequence[int]],
    sizes: Int[np.ndarray, "n"],
    states: Sequence[Float[np.ndarray, "n D"]],
    seed: int,
) -> Float[np.ndarray, "n F"]:
    """Return float32 features of n tokens for one matrix of the vocabulary.

    Args:
      rows: the source's rows in that matrix.
      parts: each token's pieces, at least one.
      sizes: each token's bytes.
      states: the result of `last_piece_states`.
      seed: of the random projection.
    """
    first, last = (rows[[pieces[i] for pieces in parts]] for i in (0, -1))
    second = rows[[pieces[min(1, len(pieces) - 1)] for pieces in parts]]
    counts = np.array([len(pieces) for pieces in parts])
    mean = np.stack([rows[list(pieces)].mean(axis=0) for pieces in parts])
    blocks = [mean, first, second, last, np.stack([counts, sizes], axis=1), *states]
    values = np.concatenate([_standardised(block) for block in blocks], axis=1)
    if values.shape[1] > MOST:
        width = values.shape[1]
        random = np.random.default_rng(seed)
        values = values @ random.normal(0, width**-0.5, (width, MOST)).astype(np.float32)
    return np.concatenate([values, np.ones((len(values), 1), np.float32)], axis=1)


def last_piece_states(
    config: ModelConfig,
    params: Params,
    parts: Sequence[Sequence[int]],
    start: int,
    dtype: DTypeLike,
    mesh: Mesh,
) -> list[Float[np.ndarray, "n D"]]:
    """Return the model's states at each token's last piece, float32, one array per depth.

    Args:
      config: the source model's architecture.
      params: the source model's parameters, on `mesh`.
      parts: each token's pieces.
      start: the token before a document.
      dtype: of activations.
      mesh: devices that read.
    """
    length = min(MOST_PIECES, config.max_positions - 1) + 1
    at_once = BATCH.get(jax.default_backend(), OTHER_BATCH) * sharding.sequences_at_once(mesh)
    split = NamedSharding(mesh, P(sharding.BATCH))
    collected: list[list[np.ndarray]] = [[] for _ in DEPTHS]
    for tokens, last in _batches(parts, start, length, at_once):
        inputs = sharding.put(tokens, split), sharding.put(last, split)
        states = _states(config, params, *inputs, dtype=jnp.dtype(dtype), mesh=mesh)
        for batches, batch in zip(collected, states):
            batches.append(sharding.to_host(batch))
    return [np.concatenate(batches)[: len(parts)] for batches in collected]


@functools.partial(jax.jit, static_argnames=("config", "dtype", "mesh"))
def _states(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    last: Int[Array, "B"],
    *,
    dtype: DTypeLike,
    mesh: Mesh,
) -> list[Float[Array, "B D"]]:
    with sharding.within(mesh):
        states = []
        for depth in DEPTHS:
            count = max(1, round(depth * config.num_layers))
            part, cut = first_layers(config, params, count)
            hidden = forward(part, cut, tokens, dtype=dtype, remat="layer", unroll=1)
            states.append(
                jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0].astype(jnp.float32)
            )
        return states


def _batches(
    parts: Sequence[Sequence[int]], start: int, length: int, at_once: int
) -> Iterator[tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B"]]]:
    """Yield tokens and the position of each row's last piece; the last batch is padded."""
    for begin in range(0, len(parts), at_once):
        tokens, last = np.full((at_once, length), start, np.int32), np.zeros(at_once, np.int32)
        for row, pieces in enumerate(parts[begin : begin + at_once]):
            read = list(pieces)[-(length - 1) :]
            tokens[row, 1 : 1 + len(read)], last[row] = read, len(read)
        yield tokens, last


def _standardised(values: np.ndarray) -> Float[np.ndarray, "n k"]:
    values = values.astype(np.float32)
    values -= values.mean(axis=0)
    return values / (values.std() + 1e-6)
