"""Calibration of composed tokens that do not occur in a start's training text.

Training leaves these tokens out of the softmax, so that it does not lower all of their logits; the
shared network gives them rows from what it learned of other tokens. Together they then get the
probability of the Good-Turing estimate: the share of the text's tokens that occur only once.

Letters: V tokens, N states, D model.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.transformer import adjust_logits
from tokalign_jax.utils import compiling

BLOCK = 16_384
"""Rows whose logits exist at once."""
MOST = 20.0
"""Largest decrease of logits, nats."""
HALVINGS = 40
"""Steps of the bisection: `MOST` / 2^40 is below float32's resolution."""


def good_turing(counts: Int[np.ndarray, "V"], among: Bool[np.ndarray, "V"]) -> float:
    """Estimate the total probability of tokens that do not occur in a text.

    Args:
      counts: occurrences of each token in the text.
      among: tokens that count if they occur once; if none of them does, one is assumed to.
    """
    return float(max(1, (counts[among] == 1).sum()) / max(1, counts.sum()))


def shift(
    config: ModelConfig,
    states: Float[np.ndarray, "N D"],
    rows: Float[np.ndarray, "V D"],
    unseen: Int[np.ndarray, "u"],
    probability: float,
) -> tuple[float, Float[np.ndarray, "D"]]:
    """Return how far the logits of `unseen` tokens must fall to get `probability` together.

    Args:
      config: the model's architecture.
      states: final states of the model, which the head reads.
      rows: the head's rows.
      unseen: token ids.
      probability: upper bound of the mean total probability; logits are never raised.

    Returns:
      The decrease in nats, and the change of the tokens' rows that lowers the mean of their logits
      over the states by it.
    """
    others = np.setdiff1d(np.arange(len(rows)), unseen)
    log_odds = _log_sum(config, states, rows, unseen) - _log_sum(config, states, rows, others)
    low, high = 0.0, MOST
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        mean = (1 / (1 + np.exp(np.minimum(middle - log_odds, 700.0)))).mean()
        low, high = (middle, high) if mean > probability else (low, middle)
    mean_state = states.mean(axis=0, dtype=np.float64)
    change = -high * mean_state / max(float(mean_state @ mean_state), 1e-9)
    return high, change.astype(np.float32)


def _log_sum(
    config: ModelConfig,
    states: Float[np.ndarray, "N D"],
    rows: Float[np.ndarray, "V D"],
    ids: Int[np.ndarray, "u"],
) -> Float[np.ndarray, "N"]:
    """Return the log of the sum over the rows of `ids` of exp(logit), for each state, float64."""
    total = np.full(len(states), -np.inf)
    for begin in range(0, len(ids), BLOCK):
        part = rows[ids[begin : begin + BLOCK]]
        block = np.zeros((min(BLOCK, len(ids)), rows.shape[1]), np.float32)
        block[: len(part)] = part
        block_sum = _block_log_sum(config, states, block, len(part))
        total = np.logaddexp(total, np.asarray(block_sum, np.float64))
    return total


@functools.partial(jax.jit, static_argnames="config")
def _block_log_sum(
    config: ModelConfig,
    states: Float[Array, "N D"],
    rows: Float[Array, "B D"],
    count: Int[Array, ""],
) -> Float[Array, "N"]:
    with compiling.products(jnp.float32):
        logits = adjust_logits(config, states.astype(jnp.float32) @ rows.T)
    return jax.nn.logsumexp(jnp.where(jnp.arange(len(rows)) < count, logits, -jnp.inf), axis=-1)
