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
from collections.abc import Callable, Iterator, Sequence

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
ROWS = 4096
"""Tokens whose features are computed at once."""


def features(
    rows: Float[np.ndarray, "V D"],
    parts: Sequence[Sequence[int]],
    sizes: Int[np.ndarray, "n"],
    states: Sequence[Float[np.ndarray, "n D"]],
    seed: int,
    dtype: DTypeLike = np.float32,
) -> Float[np.ndarray, "n F"]:
    """Return features of n tokens for one matrix of the vocabulary.

    They are computed in float32, for `ROWS` tokens at once: all blocks of all tokens together are
    several times as large as the result, and one block is the most that exists at once.

    Args:
      rows: the source's rows in that matrix, float32.
      parts: each token's pieces, at least one.
      sizes: each token's bytes.
      states: the result of `last_piece_states`.
      seed: of the random projection.
      dtype: of the result.
    """
    # The first, the second (of a single piece the first) and the last piece.
    places = np.array([(part[0], part[min(1, len(part) - 1)], part[-1]) for part in parts])
    counts = np.stack([[len(pieces) for pieces in parts], sizes], axis=1)

    def blocks(tokens: slice) -> list[Callable[[], Float[np.ndarray, "m k"]]]:
        """Return functions that make each block of the features of these tokens."""
        return [
            functools.partial(_mean_rows, rows, parts[tokens]),
            *(functools.partial(rows.__getitem__, places[tokens, i]) for i in range(3)),
            *(functools.partial(block[tokens].astype, np.float32) for block in (counts, *states)),
        ]

    scales = [_scale(block()) for block in blocks(slice(None))]
    width = sum(len(offset) for offset, _ in scales)
    projection = None
    if width > MOST:
        random = np.random.default_rng(seed)
        projection = random.normal(0, width**-0.5, (width, MOST)).astype(np.float32)
    result = np.ones((len(parts), min(width, MOST) + 1), dtype)
    for tokens in _even_slices(len(parts)):
        scaled = ((x() - offset) / size for x, (offset, size) in zip(blocks(tokens), scales))
        values = np.concatenate(list(scaled), axis=1)
        result[tokens, :-1] = values if projection is None else values @ projection
    return result


def _mean_rows(
    rows: Float[np.ndarray, "V D"], parts: Sequence[Sequence[int]]
) -> Float[np.ndarray, "n D"]:
    """Return the mean row of each token's pieces."""
    means = np.empty((len(parts), rows.shape[1]), rows.dtype)
    for mean, pieces in zip(means, parts):
        mean[:] = rows[list(pieces)].mean(axis=0)
    return means


def _scale(values: Float[np.ndarray, "n k"]) -> tuple[Float[np.ndarray, "k"], np.float32]:
    """Return the offset and the divisor that standardise a block, which is overwritten."""
    offset = values.mean(axis=0)
    values -= offset
    return offset, values.std() + 1e-6


def _even_slices(count: int) -> list[slice]:
    """Divide `count` into slices of about the same length, `ROWS` at most."""
    parts = -(-count // ROWS)
    return [slice(i * count // parts, (i + 1) * count // parts) for i in range(parts)]


def last_piece_states(
    config: ModelConfig,
    params: Params,
    parts: Sequence[Sequence[int]],
    start: int,
    dtype: DTypeLike,
    mesh: Mesh,
) -> list[Float[np.ndarray, "n D"]]:
    """Return the model's states at each token's last piece, in `dtype`, one array per depth.

    Args:
      config: the source model's architecture.
      params: the source model's parameters, on `mesh`.
      parts: each token's pieces.
      start: the token before a document.
      dtype: of activations and of the result.
      mesh: devices that read.
    """
    length = min(MOST_PIECES, config.max_positions - 1) + 1
    at_once = BATCH.get(jax.default_backend(), OTHER_BATCH) * sharding.sequences_at_once(mesh)
    split = NamedSharding(mesh, P(sharding.BATCH))
    collected = [np.empty((len(parts), config.hidden_size), dtype) for _ in DEPTHS]
    for number, (tokens, last) in enumerate(_batches(parts, start, length, at_once)):
        inputs = sharding.put(tokens, split), sharding.put(last, split)
        states = _states(config, params, *inputs, dtype=jnp.dtype(dtype), mesh=mesh)
        for all_states, batch in zip(collected, states):
            part = all_states[number * at_once : (number + 1) * at_once]
            part[:] = sharding.to_host(batch, slice(len(part)))
    return collected


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
            states.append(jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0])
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
