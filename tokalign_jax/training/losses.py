"""Cross-entropy over a large vocabulary in little memory.

B batch, T length, D model, V vocabulary, C tokens of a chunk. Logits [B, T, V] never exist: tokens are taken C at a
time, and because the gradient of a chunk's loss needs nothing but its own logits, both are computed in the same pass
(three matrix products a chunk, where recomputing the logits in the backward pass takes four).
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

IGNORED = -1
"""Label of a token that counts for nothing (any negative one does)."""


def cross_entropy(
    hidden: Float[Array, "B T D"], head: Float[Array, "V D"], labels: Int[Array, "B T"], chunk: int, dtype: DTypeLike
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The negative log-likelihoods of the labels, summed (nats, float32), and how many labels count.

    Args:
      hidden: what the model gives after its final norm.
      head: the output matrix, with its float32 masters; the gradient for it is summed over the chunks in float32.
      labels: token ids; a negative one counts for nothing.
      chunk: tokens whose logits exist at once; it need not divide B x T.
      dtype: type in which hidden and head are multiplied; logits and log-sum-exp are float32.
    """
    return _total(hidden, head, labels, chunk, dtype), jnp.sum(labels >= 0, dtype=jnp.float32)


def token_nll(
    hidden: Float[Array, "B T D"], head: Float[Array, "V D"], labels: Int[Array, "B T"], chunk: int, dtype: DTypeLike
) -> Float[Array, "B T"]:
    """The negative log-likelihood of each label (nats, float32; 0 where the label is negative), for evaluation."""
    weight = head.astype(dtype)

    def one_chunk(pieces: tuple[Array, Array]) -> Array:
        states, targets = pieces
        return _nll(_logits(states, weight), targets)

    nll = jax.lax.map(one_chunk, _chunks(hidden.astype(dtype), labels, chunk))
    return nll.reshape(-1)[: labels.size].reshape(labels.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _total(hidden: Array, head: Array, labels: Array, chunk: int, dtype: DTypeLike) -> Array:
    return token_nll(hidden, head, labels, chunk, dtype).sum()


def _total_forward(hidden: Array, head: Array, labels: Array, chunk: int, dtype: DTypeLike):
    """The total, and its gradients for `hidden` and `head` as what the backward pass keeps."""
    weight = head.astype(dtype)

    def one_chunk(head_gradient: Array, pieces: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        states, targets = pieces
        logits = _logits(states, weight)
        nll, pull = jax.vjp(lambda z: _nll(z, targets).sum(), logits)
        # The products run in `dtype` too: left to autodiff they would be float32 ones, several times slower.
        logit_gradient = pull(jnp.ones_like(nll))[0].astype(dtype)
        head_gradient += jnp.dot(logit_gradient.T, states, preferred_element_type=jnp.float32)
        return head_gradient, (nll, jnp.dot(logit_gradient, weight))

    start = jnp.zeros(head.shape, jnp.float32)
    head_gradient, (nll, gradient) = jax.lax.scan(one_chunk, start, _chunks(hidden.astype(dtype), labels, chunk))
    gradient = gradient.reshape(-1, hidden.shape[-1])[: labels.size].reshape(hidden.shape)
    return nll.sum(), (gradient.astype(hidden.dtype), head_gradient.astype(head.dtype))


def _total_backward(chunk: int, dtype: DTypeLike, gradients: tuple[Array, Array], upstream: Array):
    del chunk, dtype
    return *((upstream * gradient).astype(gradient.dtype) for gradient in gradients), None


_total.defvjp(_total_forward, _total_backward)


def _logits(states: Float[Array, "C D"], weight: Float[Array, "V D"]) -> Float[Array, "C V"]:
    return jnp.dot(states, weight.T, preferred_element_type=jnp.float32)


def _nll(logits: Float[Array, "C V"], labels: Int[Array, "C"]) -> Float[Array, "C"]:
    # The label's logit by a mask, not a gather: its gradient is then a mask as well and fuses, where a gather's would
    # scatter.
    is_label = labels[:, None] == jnp.arange(logits.shape[-1])
    label_logits = jnp.sum(jnp.where(is_label, logits, 0.0), axis=-1)
    return jnp.where(labels >= 0, jax.nn.logsumexp(logits, axis=-1) - label_logits, 0.0)


def _chunks(
    hidden: Float[Array, "B T D"], labels: Int[Array, "B T"], chunk: int
) -> tuple[Float[Array, "N C D"], Int[Array, "N C"]]:
    """Tokens in N chunks of C; the last one is filled up with tokens that count for nothing."""
    tokens = labels.size
    chunk = min(chunk, tokens)
    filling = -tokens % chunk
    states = jnp.pad(hidden.reshape(tokens, -1), ((0, filling), (0, 0)))
    targets = jnp.pad(labels.reshape(tokens), (0, filling), constant_values=IGNORED)
    return states.reshape(-1, chunk, hidden.shape[-1]), targets.reshape(-1, chunk)
