"""Head rows moved so that the model gives each token about as much probability as the text does.

A large vocabulary's composed rows compete with one another: some tokens come too often, most of what is rare comes too often a
little. A softmax with biases that fits its data at best gives every token, on average over the text, its frequency. Rows without
biases have one all the same: final states h have a direction u with u . h near 1 everywhere (least squares: u = (E h h')^-1 E h),
so a row moved by b u raises its logit by b. The b follow from iterative scaling, b <- b + log(frequency / mean probability).

Letters: D model, V vocabulary, N places.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.transformer import Params, forward, head_matrix
from tokalign_jax.text.tokenizing import TokenShards

PLACES = 32_768
"""Places of the text over which probabilities are averaged."""
ROUNDS = 3
LARGEST_STEP = 3.0
"""Nats by which one round moves a token at most."""
RIDGE = 1e-4
"""Added to the diagonal of E h h', in units of its mean."""
CHUNK = 2048
"""Places whose probabilities exist at once."""


def head_moves(
    config: ModelConfig, params: Params, shards: TokenShards, dtype: DTypeLike, seed: int
) -> tuple[Float[np.ndarray, "V"], Float[np.ndarray, "D"]]:
    """(b in nats, u): head rows + b u give tokens their frequency in the text.

    Args:
      params: of the model with the new vocabulary.
      shards: text in its tokens; the frequency of a token that it never has counts a half.
    """
    frequency = (shards.counts + 0.5) / (shards.counts + 0.5).sum()
    params = jax.tree.map(jnp.asarray, params)
    states = _states(config, params, _windows(shards, config, seed), dtype=jnp.dtype(dtype))
    states = states[: len(states) // CHUNK * CHUNK or len(states)]
    flat = np.asarray(states, np.float64)
    second = flat.T @ flat / len(flat)
    direction = np.linalg.solve(
        second + RIDGE * np.trace(second) / len(second) * np.eye(len(second)), flat.mean(axis=0)
    )
    chunks = states.reshape(-1, min(CHUNK, len(states)), config.hidden_size).astype(dtype)
    moves, wanted = jnp.zeros(len(frequency)), jnp.log(jnp.asarray(frequency, jnp.float32))
    for _ in range(ROUNDS):
        probability = mean_probability(chunks, head_matrix(params)[: len(frequency)].astype(dtype), moves)
        moves += jnp.clip(wanted - jnp.log(probability + 1e-12), -LARGEST_STEP, LARGEST_STEP)
    return np.asarray(moves), direction.astype(np.float32)


@jax.jit
def mean_probability(
    states: Float[Array, "C c D"], head: Float[Array, "V D"], moves: Float[Array, "V"]
) -> Float[Array, "V"]:
    """float32: the probability of each token, on average over all states, with `moves` added to its logit."""

    def add(total, chunk):
        logits = jnp.einsum("cd,vd->cv", chunk, head, preferred_element_type=jnp.float32) + moves
        return total + jax.nn.softmax(logits, axis=-1).sum(axis=0), None

    total, _ = jax.lax.scan(add, jnp.zeros(len(head)), states)
    return total / (states.shape[0] * states.shape[1])


def _windows(shards: TokenShards, config: ModelConfig, seed: int) -> Int[np.ndarray, "B T"]:
    """Windows drawn at random, without overlap, of `PLACES` tokens in all, or of all the text where it is shorter."""
    length = min(1024, config.max_positions, len(shards))
    windows = len(shards) // length
    chosen = np.sort(np.random.default_rng(seed).permutation(windows)[: max(1, PLACES // length)])
    return np.stack([shards.tokens[i * length : (i + 1) * length] for i in chosen]).astype(np.int32)


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _states(config: ModelConfig, params: Params, tokens: Int[Array, "B T"], *, dtype: DTypeLike) -> Float[Array, "N D"]:
    """Final states, window by window, so that one window's activations exist at once."""
    states = jax.lax.map(lambda window: forward(config, params, window[None], dtype=dtype)[0], tokens)
    return states.astype(jnp.float32).reshape(-1, config.hidden_size)
