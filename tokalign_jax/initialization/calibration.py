"""Calibration of head rows to the unigram frequencies of the text.

The composed rows of a large vocabulary compete: some tokens get too much probability, and most rare
tokens a little too much. A softmax with biases at its optimum gives every token, on average over
the text, its frequency. Rows without biases can emulate one: final states h have a direction u with
u . h near 1 (least squares: u = (E h h')^-1 E h), so moving a row by b u raises its logit by b. The
b are found by iterative scaling, b <- b + log(frequency / mean probability).

Letters: D model, V vocabulary, N places.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.transformer import Params, adjust_logits, forward, head_matrix
from tokalign_jax.parallel import sharding
from tokalign_jax.text.tokenizing import TokenShards
from tokalign_jax.utils import compiling

PLACES = 32_768
"""Positions over which probabilities are averaged."""
ROUNDS = 3
LARGEST_STEP = 3.0
"""Largest change of a logit in a round, nats."""
RIDGE = 1e-4
"""Added to the diagonal of E h h', in units of its mean."""
CHUNK = 2048
"""Positions whose probabilities exist at once."""


def head_moves(
    config: ModelConfig,
    params: Params,
    shards: TokenShards,
    dtype: DTypeLike,
    mesh: Mesh,
    seed: int,
    fixed: Bool[np.ndarray, "V"] | None = None,
) -> tuple[Float[np.ndarray, "V"], Float[np.ndarray, "D"]]:
    """Return (b in nats, u) such that head rows + b u give tokens their frequency in the text.

    Args:
      config: the new model's architecture.
      params: the new model's parameters.
      shards: text in the new model's tokens.
      dtype: of activations.
      mesh: devices that measure probabilities.
      seed: of the choice of text.
      fixed: tokens with b = 0; None for no token.
    """
    frequency = estimated_frequencies(shards.counts)
    params = sharding.place(params, mesh)
    windows = _windows(shards, config, seed)
    # Pad, so that every device reads as many windows; states of padding are dropped.
    padded = np.pad(windows, ((0, -len(windows) % sharding.sequences_at_once(mesh)), (0, 0)))
    states = _states(config, params, padded, dtype=jnp.dtype(dtype), mesh=mesh)[: windows.size]
    states = states[: len(states) // CHUNK * CHUNK or len(states)]
    flat = sharding.to_host(states).astype(np.float64)
    second = flat.T @ flat / len(flat)
    direction = np.linalg.solve(
        second + RIDGE * np.trace(second) / len(second) * np.eye(len(second)), flat.mean(axis=0)
    )
    chunks = states.reshape(-1, min(CHUNK, len(states)), config.hidden_size).astype(dtype)
    head = head_matrix(params)
    # Padding rows have no probability, whatever their move.
    padding = np.arange(len(head)) >= len(frequency)
    moves = np.where(padding, -np.inf, 0.0).astype(np.float32)
    goal = np.log(np.pad(frequency, (0, padding.sum()), constant_values=1.0)).astype(np.float32)
    free = np.arange(len(frequency)) if fixed is None else np.flatnonzero(~fixed)
    for _ in range(ROUNDS):
        probability = sharding.to_host(
            mean_probability(chunks, head, moves, config=config, mesh=mesh)
        )
        step = np.clip(goal - np.log(probability + 1e-12), -LARGEST_STEP, LARGEST_STEP)
        moves[free] += step[free]
    return moves[: len(frequency)], direction.astype(np.float32)


def estimated_frequencies(counts: Int[np.ndarray, "V"]) -> Float[np.ndarray, "V"]:
    """Return smoothed token frequencies, float64, summing to 1.

    Unseen tokens share the frequency of tokens seen once (Good-Turing); each of them gets less than
    a token that was seen.
    """
    unseen = counts == 0
    share = (np.sum(counts == 1) + 0.5) / max(int(unseen.sum()), 1)
    counted = np.where(unseen, min(share, 0.5), counts)
    return counted / counted.sum()


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def mean_probability(
    states: Float[Array, "C c D"],
    head: Float[Array, "V D"],
    moves: Float[Array, "V"],
    *,
    config: ModelConfig,
    mesh: Mesh,
) -> Float[Array, "V"]:
    """Return the mean probability of each token over all states, float32.

    Args:
      states: final states, in C chunks of c.
      head: the head's rows.
      moves: added to the logits.
      config: the model's architecture.
      mesh: devices of the arrays.
    """

    def add(total, chunk):
        with compiling.products(chunk.dtype):
            logits = jnp.einsum(
                "cd,vd->cv", chunk, head.astype(chunk.dtype), preferred_element_type=jnp.float32
            )
        logits = (
            adjust_logits(config, sharding.constrain(logits, None, sharding.VOCABULARY)) + moves
        )
        return total + jax.nn.softmax(logits, axis=-1).sum(axis=0), None

    with sharding.within(mesh):
        total, _ = jax.lax.scan(add, jnp.zeros(len(head)), states)
        return total / (states.shape[0] * states.shape[1])


def _windows(shards: TokenShards, config: ModelConfig, seed: int) -> Int[np.ndarray, "B T"]:
    """Draw disjoint windows of `PLACES` tokens in total, or of all the text if it is shorter."""
    length = min(1024, config.max_positions, len(shards))
    windows = len(shards) // length
    chosen = np.sort(np.random.default_rng(seed).permutation(windows)[: max(1, PLACES // length)])
    tokens = np.stack([shards.tokens[i * length : (i + 1) * length] for i in chosen]).astype(
        np.int32
    )
    if shards.opening is not None:
        tokens[:, 0] = shards.opening
    return tokens


@functools.partial(jax.jit, static_argnames=("config", "dtype", "mesh"))
def _states(
    config: ModelConfig, params: Params, tokens: Int[Array, "B T"], *, dtype: DTypeLike, mesh: Mesh
) -> Float[Array, "N D"]:
    """Return final states, replicated; each device computes one window at a time."""
    groups = tokens.reshape(-1, sharding.sequences_at_once(mesh), tokens.shape[1])
    with sharding.within(mesh):
        states = jax.lax.map(lambda windows: forward(config, params, windows, dtype=dtype), groups)
        return sharding.constrain(states.astype(jnp.float32).reshape(-1, config.hidden_size))
