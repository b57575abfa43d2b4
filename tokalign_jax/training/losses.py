"""Cross-entropy over a large vocabulary in little memory, on one device or many.

B batch, T length, D model, V vocabulary, R rows of the head (V and its padding), C tokens of a chunk. Logits [B, T, V] never exist:
tokens are taken C at a time, and because the gradient of a chunk's loss needs nothing but its own logits, both are computed in the
same pass (three matrix products a chunk, where recomputing the logits in the backward pass takes four).

Where a mesh splits the head's rows, each device has the logits of its own rows for the tokens of all devices that hold other rows
(vocabulary-parallel, as in arXiv 1909.08053, section 3): only hidden states, their gradients and three numbers a token travel, and
the gradient of the head stays where the rows are.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from tokalign_jax import sharding
from tokalign_jax.config import ComputeConfig
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.transformer import adjust_logits
from tokalign_jax.sharding import BATCH, DATA, VOCABULARY, by_device, gathered, over, own, row_part, summed

IGNORED = -1
"""Label of a token that counts for nothing (any negative one does)."""
LEAST = jnp.finfo(jnp.float32).min
"""Logit of a row that is none; finite, so that differences of such are numbers."""


_PARTS = (P(BATCH), P(VOCABULARY), P(BATCH))
"""How hidden states, head and labels are split."""


class Head(NamedTuple):
    """How hidden states become a loss; all that is known when the program is compiled."""

    vocabulary: int
    """V: rows past it are padding and get no probability."""
    chunk: int
    """C: tokens of a device whose logits exist at once; it need not divide B x T."""
    dtype: DTypeLike
    """Type in which hidden and head are multiplied; logits and log-sum-exp are float32."""
    adjust: Callable[[Array], Array] | None = None
    """What the model does to its logits one by one, such as a soft-cap."""


def head_of(config: ModelConfig, compute: ComputeConfig) -> Head:
    """The head of a model, as `compute` has it."""
    adjust = functools.partial(adjust_logits, config) if config.logit_softcap else None
    return Head(config.vocab_size, compute.loss_chunk, jnp.dtype(compute.dtype), adjust)


def cross_entropy(
    hidden: Float[Array, "B T D"], head: Float[Array, "R D"], labels: Int[Array, "B T"], how: Head
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The negative log-likelihoods of the labels, summed (nats, float32), and how many labels count.

    Args:
      hidden: what the model gives after its final norm.
      head: the output matrix, with its float32 masters; the gradient for it is summed over the chunks in float32.
      labels: token ids; a negative one counts for nothing.
    """
    return _total(hidden, head, labels, how), jnp.sum(labels >= 0, dtype=jnp.float32)


def token_nll(
    hidden: Float[Array, "B T D"], head: Float[Array, "R D"], labels: Int[Array, "B T"], how: Head
) -> Float[Array, "B T"]:
    """The negative log-likelihood of each label (nats, float32; 0 where the label is negative), for evaluation."""

    def local(hidden: Array, head: Array, labels: Array) -> Array:
        rows = Rows(head.astype(how.dtype), how)

        def one_chunk(pieces: tuple[Array, Array]) -> Array:
            states, targets = map(gathered, pieces)
            nll, _ = rows.nll(rows.logits(states)[0], targets)
            return own(nll)

        nll = jax.lax.map(one_chunk, chunks(hidden.astype(how.dtype), labels, how.chunk))
        return nll.reshape(-1)[: labels.size].reshape(labels.shape)

    return by_device(local, _PARTS, P(BATCH))(hidden, head, labels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _total(hidden: Array, head: Array, labels: Array, how: Head) -> Array:
    return token_nll(hidden, head, labels, how).sum()


def _total_forward(hidden: Array, head: Array, labels: Array, how: Head):
    """The total, and its gradients for `hidden` and `head` as what the backward pass keeps."""

    def local(hidden: Array, head: Array, labels: Array) -> tuple[Array, Array, Array]:
        rows = Rows(head.astype(how.dtype), how)

        def one_chunk(pieces: tuple[Array, Array]) -> tuple[tuple[Array, Array], Array]:
            states, targets = map(gathered, pieces)
            logits, pull = rows.logits(states)
            nll, gradient = rows.nll(logits, targets)
            # The products run in `dtype` too: left to autodiff they would be float32 ones, several times slower.
            gradient = pull(gradient).astype(how.dtype)
            head_gradient = jnp.dot(gradient.T, states, preferred_element_type=jnp.float32)
            return (own(nll).sum(), head_gradient), summed(jnp.dot(gradient, rows.weight))

        pieces = chunks(hidden.astype(how.dtype), labels, how.chunk)
        (total, head_gradient), gradient = over_chunks(one_chunk, pieces)
        gradient = gradient.reshape(-1, hidden.shape[-1])[: labels.size].reshape(hidden.shape)
        return over(BATCH, total), gradient.astype(hidden.dtype), over(DATA, head_gradient).astype(head.dtype)

    total, *gradients = by_device(local, _PARTS, (P(), P(BATCH), P(VOCABULARY)))(hidden, head, labels)
    return total, gradients


def _total_backward(how: Head, gradients: tuple[Array, Array], upstream: Array):
    del how
    return *((upstream * gradient).astype(gradient.dtype) for gradient in gradients), None


_total.defvjp(_total_forward, _total_backward)


class Rows(NamedTuple):
    """The rows of the head that a device has, r of them; all where it is alone."""

    weight: Float[Array, "r D"]
    how: Head

    def logits(self, states: Float[Array, "C D"]) -> tuple[Float[Array, "C r"], Callable[[Array], Array]]:
        """Logits, and what takes a gradient back through the model's adjustment of them."""
        raw = jnp.dot(states, self.weight.T, preferred_element_type=jnp.float32)
        if self.how.adjust is None:
            return raw, lambda gradient: gradient
        logits, pull = jax.vjp(self.how.adjust, raw)
        return logits, lambda gradient: pull(gradient)[0]

    def nll(
        self, logits: Float[Array, "C r"], labels: Int[Array, "C"]
    ) -> tuple[Float[Array, "C"], Float[Array, "C r"]]:
        """The loss of each token, over the rows of all devices, and its gradient for the logits here."""
        ids = row_part() * len(self.weight) + jnp.arange(len(self.weight))
        logits = jnp.where(ids < self.how.vocabulary, logits, LEAST)
        # The label's logit by a mask, not a gather: there is one device that has it, and a mask fuses.
        is_label = labels[:, None] == ids
        largest, total = largest_and_sum(logits)
        label_logits = over(VOCABULARY, jnp.sum(jnp.where(is_label, logits, 0.0), axis=-1))
        counts = labels >= 0
        nll = jnp.where(counts, jnp.log(total) + largest - label_logits, 0.0)
        weights = jnp.exp(logits - largest[:, None]) / total[:, None]
        return nll, jnp.where(counts[:, None], weights - is_label, 0.0)


def largest_and_sum(logits: Float[Array, "C r"]) -> tuple[Float[Array, "C"], Float[Array, "C"]]:
    """m = max_v x_v, and sum_v exp(x_v - m), over the rows of all devices."""
    # On a GPU time goes by bytes; on a CPU by arithmetic, and a running sum would lose digits there.
    largest, total = jax.lax.platform_dependent(logits, cuda=_in_one_pass, default=_in_two_passes)
    if sharding.current() is None:
        return largest, total
    largest_of_all = jax.lax.pmax(largest, VOCABULARY)
    return largest_of_all, over(VOCABULARY, total * jnp.exp(largest - largest_of_all))


def _in_one_pass(logits: Float[Array, "C r"]) -> tuple[Float[Array, "C"], Float[Array, "C"]]:
    """arXiv 1805.02867, algorithm 3."""

    def join(one: tuple[Array, Array], other: tuple[Array, Array]) -> tuple[Array, Array]:
        (m, total), (n, rest) = one, other
        shrink = jnp.exp(-jnp.abs(m - n))
        return jnp.maximum(m, n), jnp.where(m >= n, total + rest * shrink, rest + total * shrink)

    return jax.lax.reduce((logits, jnp.ones_like(logits)), (LEAST, jnp.float32(0)), join, (1,))


def _in_two_passes(logits: Float[Array, "C r"]) -> tuple[Float[Array, "C"], Float[Array, "C"]]:
    largest = jnp.max(logits, axis=-1)
    return largest, jnp.exp(logits - largest[:, None]).sum(axis=-1)


def chunks(
    hidden: Float[Array, "B T D"], labels: Int[Array, "B T"], chunk: int
) -> tuple[Float[Array, "N C D"], Int[Array, "N C"]]:
    """Tokens in N chunks of C; the last one is filled up with tokens that count for nothing."""
    tokens = labels.size
    chunk = min(chunk, tokens)
    filling = -tokens % chunk
    states = jnp.pad(hidden.reshape(tokens, -1), ((0, filling), (0, 0)))
    targets = jnp.pad(labels.reshape(tokens), (0, filling), constant_values=IGNORED)
    return states.reshape(-1, chunk, hidden.shape[-1]), targets.reshape(-1, chunk)


def over_chunks(one: Callable[[Any], tuple[Any, Any]], pieces: Any) -> tuple[Any, Any]:
    """`one` of each chunk: its first result added up, its second in a row. `pieces` are arrays [N, ...] as `chunks` makes them."""
    if jax.default_backend() == "gpu":
        return _from_the_first(one, pieces)
    like, _ = jax.eval_shape(one, jax.tree.map(lambda x: x[0], pieces))
    return _added_to(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like), one, pieces)


def _from_the_first(one: Callable[[Any], tuple[Any, Any]], pieces: Any) -> tuple[Any, Any]:
    """Writes and reads no zeros of the sums: the head's gradient is large. A CPU would keep this chunk's logits beside the others'."""
    sums, first = one(jax.tree.map(lambda x: x[0], pieces))
    sums, others = _added_to(sums, one, jax.tree.map(lambda x: x[1:], pieces))
    return sums, jax.tree.map(lambda x, rest: jnp.concatenate([x[None], rest]), first, others)


def _added_to(sums: Any, one: Callable[[Any], tuple[Any, Any]], pieces: Any) -> tuple[Any, Any]:
    def add(sums: Any, piece: Any) -> tuple[Any, Any]:
        more, result = one(piece)
        return jax.tree.map(jnp.add, sums, more), result

    return jax.lax.scan(add, sums, pieces)
