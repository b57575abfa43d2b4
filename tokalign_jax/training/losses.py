"""Cross-entropy over a large vocabulary in little memory, on one device or many.

B batch, T length, D model, V vocabulary, R rows of the head (V and its padding), C tokens of a
chunk. Logits [B, T, V] are never materialised: tokens are processed in chunks of C, and since the
gradient of a chunk's loss only needs its own logits, both are computed in the same pass (three
matrix products a chunk, where recomputing the logits in the backward pass takes four).

Where a mesh shards the head's rows, each device computes the logits of its own rows for the tokens
of all devices that hold other rows (vocabulary-parallel, as in arXiv 1909.08053, section 3): only
hidden states, their gradients and a few numbers a token are communicated, and the gradient of the
head stays with its rows.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from tokalign_jax.config import ComputeConfig, loss_chunk_of
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.transformer import adjust_logits
from tokalign_jax.parallel.sharding import (
    BATCH,
    DATA,
    VOCABULARY,
    all_gather,
    local_rows,
    local_tokens,
    psum,
    psum_scatter,
    rows_are_split,
    shard_map,
    vocabulary_part,
)
from tokalign_jax.utils import compiling

IGNORED = -1
"""Label of a token that has no loss (any negative label has none)."""
LEAST = jnp.finfo(jnp.float32).min
"""Logit of padding rows; finite, so that differences of two are not NaN."""
MOST = 70.0
"""Bound on how far a logit exceeds the label's in the training loss: the sum of a million
exponentials of it is still finite in float32."""


_PARTS = (P(BATCH), P(VOCABULARY), P(BATCH))
"""Sharding of hidden states, head and labels."""


class Head(NamedTuple):
    """Static settings of the loss of an output head."""

    vocabulary: int
    """V: rows past it are padding and get no probability."""
    chunk: int
    """C: tokens per device whose logits are materialised at once; it need not divide B x T."""
    dtype: DTypeLike
    """Type of the matrix products; logits and log-sum-exp are float32."""
    adjust: Callable[[Array], Array] | None = None
    """Elementwise function of the logits, such as a soft-cap."""


def head_of(config: ModelConfig, compute: ComputeConfig) -> Head:
    """The head settings of a model."""
    adjust = functools.partial(adjust_logits, config) if config.logit_softcap else None
    return Head(config.vocab_size, loss_chunk_of(compute), jnp.dtype(compute.dtype), adjust)


def cross_entropy(
    hidden: Float[Array, "B T D"], head: Float[Array, "R D"], labels: Int[Array, "B T"], how: Head
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(sum of the labels' negative log-likelihoods in nats, number of labels that are not ignored).

    Args:
      hidden: states after the final norm.
      head: the output matrix (float32 masters); its gradient is accumulated over chunks in float32.
      labels: token ids; negative ones are ignored.
    """
    return _total(hidden, head, labels, None, how), jnp.sum(labels >= 0, dtype=jnp.float32)


def cross_entropy_in_place(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "R D"],
    labels: Int[Array, "B T"],
    sums: Float[Array, "R D"],
    how: Head,
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, "R D"]]:
    """`cross_entropy`, and its gradient with respect to `head` added to `sums` in their memory.

    Only `hidden` has a gradient by autodiff. Not for data-parallel replicas under one program
    (`sharding.sum_over_replicas` separates them), each of which would add `sums`.

    Args:
      sums: float32.
    """
    result: Any = _total_in_place(hidden, head, labels, sums, how)
    total, sums = result
    return total, jnp.sum(labels >= 0, dtype=jnp.float32), sums


def weighted_cross_entropy(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "R D"],
    labels: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    how: Head,
) -> Float[Array, ""]:
    """The sum over tokens of weight times negative log-likelihood of the label (nats, float32).

    The weights are constants without a gradient. Any loss that is a function of the labels'
    likelihoods has the gradient of this one, with its derivatives with respect to them as the
    weights.

    Args: as for `cross_entropy`.
    """
    return _total(hidden, head, labels, weights, how)


def token_nll(
    hidden: Float[Array, "B T D"], head: Float[Array, "R D"], labels: Int[Array, "B T"], how: Head
) -> Float[Array, "B T"]:
    """The negative log-likelihood of each label (nats, float32; 0 where the label is negative); for
    evaluation, without a gradient.
    """

    def of_chunk(rows: Rows, states: Array, targets: Array) -> Array:
        return local_tokens(rows.nll(rows.logits(states)[0], targets))

    return _by_chunk(of_chunk, hidden, head, labels, how)


def token_nll_and_likeliest(
    hidden: Float[Array, "B T D"], head: Float[Array, "R D"], labels: Int[Array, "B T"], how: Head
) -> tuple[Float[Array, "B T"], Int[Array, "B T"]]:
    """`token_nll`, and the argmax of the logits at each position (the lowest id of equal ones)."""

    def of_chunk(rows: Rows, states: Array, targets: Array) -> tuple[Array, Array]:
        logits, _ = rows.logits(states)
        return local_tokens(rows.nll(logits, targets)), local_tokens(rows.likeliest(logits))

    return _by_chunk(of_chunk, hidden, head, labels, how)


def _by_chunk(
    of_chunk: Callable[..., Any], hidden: Array, head: Array, labels: Array, how: Head
) -> Any:
    """Arrays [B, T] of the results of `of_chunk(rows, states [C, D], labels [C])`, one for each
    token.
    """

    def local(hidden: Array, head: Array, labels: Array) -> Any:
        rows = Rows(head.astype(how.dtype), how)
        pieces = chunks(hidden.astype(how.dtype), labels, how.chunk)
        results = jax.lax.map(lambda piece: of_chunk(rows, *map(all_gather, piece)), pieces)
        return jax.tree.map(lambda x: x.reshape(-1)[: labels.size].reshape(labels.shape), results)

    with compiling.products(how.dtype):
        return shard_map(local, _PARTS, P(BATCH))(hidden, head, labels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _total(hidden: Array, head: Array, labels: Array, weights: Array | None, how: Head) -> Array:
    nll = token_nll(hidden, head, labels, how)
    return (nll if weights is None else nll * weights).sum()


def _total_forward(hidden: Array, head: Array, labels: Array, weights: Array | None, how: Head):
    """(total, its gradients with respect to `hidden` and `head`, as residuals)."""
    total, *gradients = _with_gradients(hidden, head, labels, weights, None, how)
    return total, tuple(gradients)


def _with_gradients(
    hidden: Array,
    head: Array,
    labels: Array,
    weights: Array | None,
    sums: Array | None,
    how: Head,
) -> tuple[Array, Array, Array]:
    """(total, gradient with respect to `hidden`, that with respect to `head` plus `sums`)."""

    def local(
        hidden: Array, head: Array, labels: Array, weights: Array | None, sums: Array | None
    ) -> tuple[Array, Array, Array]:
        rows = Rows(head.astype(how.dtype), how)

        def one_chunk(sums: Any, pieces: tuple[Array, Array, Array | None]) -> tuple[Any, Array]:
            total, head_gradient = sums or (None, None)
            states, targets, weights = jax.tree.map(all_gather, pieces)
            nll, gradient, head_gradient = rows.gradients(states, targets, head_gradient, weights)
            return (plus(total, local_tokens(nll).sum()), head_gradient), psum_scatter(gradient)

        pieces = *chunks(hidden.astype(how.dtype), labels, how.chunk), _chunked(weights, how.chunk)
        if sums is None:
            (total, head_gradient), gradient = over_chunks(one_chunk, pieces)
        else:
            initial = jnp.zeros(()), sums
            (total, head_gradient), gradient = jax.lax.scan(one_chunk, initial, pieces)
        gradient = gradient.reshape(-1, hidden.shape[-1])[: labels.size].reshape(hidden.shape)
        return total[None], gradient.astype(hidden.dtype), head_gradient[None]

    weighted = None if weights is None else P(BATCH)
    inputs = *_PARTS, weighted, None if sums is None else P(VOCABULARY)
    with compiling.products(how.dtype):
        outputs = P(BATCH), P(BATCH), P(DATA, VOCABULARY)
        total, gradient, head_gradient = shard_map(local, inputs, outputs)(
            hidden, head, labels, weights, sums
        )
    # Summed here, so that within `sharding.sum_over_replicas` the sum is one replica's.
    return total.sum(), gradient, head_gradient.sum(0).astype(head.dtype)


def _chunked(weights: Float[Array, "B T"] | None, chunk: int) -> Float[Array, "N C"] | None:
    """Weights in chunks, as `chunks` divides their tokens."""
    if weights is None:
        return None
    chunk = min(chunk, weights.size)
    return jnp.pad(weights.reshape(-1), (0, -weights.size % chunk)).reshape(-1, chunk)


def _total_backward(how: Head, gradients: tuple[Array, Array], upstream: Array):
    del how
    return *((upstream * gradient).astype(gradient.dtype) for gradient in gradients), None, None


_total.defvjp(_total_forward, _total_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _total_in_place(
    hidden: Array, head: Array, labels: Array, sums: Array, how: Head
) -> tuple[Array, Array]:
    total, _, sums = _with_gradients(hidden, head, labels, None, sums, how)
    return total, sums


def _in_place_forward(hidden: Array, head: Array, labels: Array, sums: Array, how: Head):
    total, gradient, sums = _with_gradients(hidden, head, labels, None, sums, how)
    return (total, sums), gradient


def _in_place_backward(how: Head, gradient: Array, upstream: tuple[Array, Array]):
    del how
    return (upstream[0] * gradient).astype(gradient.dtype), None, None, None


_total_in_place.defvjp(_in_place_forward, _in_place_backward)


class Rows(NamedTuple):
    """The shard of the head's rows on a device, r of them."""

    weight: Float[Array, "r D"]
    how: Head

    def logits(
        self, states: Float[Array, "C D"]
    ) -> tuple[Float[Array, "C r"], Callable[[Array], Array]]:
        """(logits, pull-back of a gradient through the model's adjustment of them)."""
        return self._adjusted(jnp.dot(states, self.weight.T, preferred_element_type=jnp.float32))

    def nll(self, logits: Float[Array, "C r"], labels: Int[Array, "C"]) -> Float[Array, "C"]:
        """The loss of each token, over the rows of all devices."""
        ids = self.ids
        logits = jnp.where(ids < self.how.vocabulary, logits, LEAST)
        # The label's logit by a mask, not a gather: one device has it, and a mask can be fused.
        label_logits = psum(jnp.sum(jnp.where(labels[:, None] == ids, logits, 0.0), axis=-1))
        largest, total = largest_and_sum(logits)
        return jnp.where(labels >= 0, jnp.log(total) + largest - label_logits, 0.0)

    def likeliest(self, logits: Float[Array, "C r"]) -> Int[Array, "C"]:
        """The argmax of the logits over the rows of all devices; the lowest of equal ones."""
        logits = jnp.where(self.ids < self.how.vocabulary, logits, LEAST)
        best, largest = (
            jnp.argmax(logits, axis=-1) + vocabulary_part() * len(self.weight),
            jnp.max(logits, axis=-1),
        )
        if not rows_are_split():
            return best
        is_largest = largest == jax.lax.pmax(largest, VOCABULARY)
        return jax.lax.pmin(jnp.where(is_largest, best, jnp.iinfo(best.dtype).max), VOCABULARY)

    def gradients(
        self,
        states: Float[Array, "C D"],
        labels: Int[Array, "C"],
        head_gradient: Float[Array, "r D"] | None,
        weights: Float[Array, "C"] | None = None,
    ) -> tuple[Float[Array, "C"], Float[Array, "C D"], Float[Array, "r D"]]:
        """(loss of each token over the rows of all devices, this shard's part of its gradient with
        respect to the states, gradient with respect to these rows, added to `head_gradient`).

        Logits are read once. With z_v = exp(x_v - x_label), sum_v z_v is exp(loss) and z_v divided
        by it the probability of v. The products take z unnormalised, and the sum divides arrays
        without a V axis, the states' gradient and the states, so that no pass for the largest logit
        is needed. The label's own term needs no product: its row is subtracted from the states'
        gradient, its state from the row's. The sum is at least 1, and finite because logits are
        clipped at `MOST` above the label's; beyond that the loss is no longer exact.

        Args:
          weights: factors of the losses, without a gradient; None: 1.
        """
        dtype, counts = self.how.dtype, labels >= 0
        factors = jnp.where(counts, 1.0 if weights is None else weights, 0.0).astype(jnp.float32)
        logits, pull = self.logits(states)
        label_rows, places = local_rows(self.weight, labels)
        wide, label_rows = states.astype(jnp.float32), label_rows.astype(jnp.float32)
        label_logits, pull_label = self._adjusted(psum(jnp.sum(wide * label_rows, axis=-1)))
        known = self.ids < self.how.vocabulary
        z = jnp.exp(jnp.minimum(jnp.where(known, logits, LEAST) - label_logits[:, None], MOST))
        total = psum(z.sum(-1))
        share = (factors / total)[:, None]
        slope = pull_label(counts.astype(jnp.float32))[:, None]
        of_label = factors[:, None] * slope

        # The products run in `dtype` too: by autodiff they would be float32, several times slower.
        z = pull(z).astype(dtype)
        gradient = (
            share * jnp.dot(z, self.weight, preferred_element_type=jnp.float32)
            - of_label * label_rows
        )
        shared = (share * wide).astype(dtype)
        own_gradient = plus(head_gradient, jnp.dot(z.T, shared, preferred_element_type=jnp.float32))
        # For the label z is 1. If it is almost certain the two terms nearly cancel, so the
        # product's rounding error is subtracted.
        rounding = share * wide * slope - shared.astype(jnp.float32) * slope.astype(dtype).astype(
            jnp.float32
        )
        own_gradient = own_gradient.at[places].add(rounding - of_label * wide, mode="drop")
        return factors * jnp.log(total), gradient.astype(dtype), own_gradient

    @property
    def ids(self) -> Int[Array, "r"]:
        """The token ids of these rows."""
        return vocabulary_part() * len(self.weight) + jnp.arange(len(self.weight))

    def _adjusted(
        self, raw: Float[Array, "..."]
    ) -> tuple[Float[Array, "..."], Callable[[Array], Array]]:
        if self.how.adjust is None:
            return raw, lambda gradient: gradient
        logits, pull = jax.vjp(self.how.adjust, raw)
        return logits, lambda gradient: pull(gradient)[0]


def largest_and_sum(logits: Float[Array, "C r"]) -> tuple[Float[Array, "C"], Float[Array, "C"]]:
    """Return m = max_v x_v, and sum_v exp(x_v - m), over the rows of all devices."""
    # A GPU is bound by memory bandwidth, a CPU by arithmetic; there a running sum would lose
    # digits.
    largest, total = jax.lax.platform_dependent(logits, cuda=_in_one_pass, default=_in_two_passes)
    if not rows_are_split():
        return largest, total
    largest_of_all = jax.lax.pmax(largest, VOCABULARY)
    return largest_of_all, psum(total * jnp.exp(largest - largest_of_all))


def _in_one_pass(logits: Float[Array, "C r"]) -> tuple[Float[Array, "C"], Float[Array, "C"]]:
    """Online softmax (arXiv 1805.02867, algorithm 3)."""

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
    """Tokens in N chunks of C; the last one is padded with ignored tokens."""
    tokens = labels.size
    chunk = min(chunk, tokens)
    filling = -tokens % chunk
    states = jnp.pad(hidden.reshape(tokens, -1), ((0, filling), (0, 0)))
    targets = jnp.pad(labels.reshape(tokens), (0, filling), constant_values=IGNORED)
    return states.reshape(-1, chunk, hidden.shape[-1]), targets.reshape(-1, chunk)


def over_chunks(one: Callable[[Any, Any], tuple[Any, Any]], pieces: Any) -> tuple[Any, Any]:
    """(final sums, stacked results) of `one(sums, chunk) -> (sums, result)` over all chunks.

    `pieces` are arrays [N, ...], as `chunks` returns them. Sums begin as None; `plus` adds to them.
    """
    if jax.default_backend() == "gpu":
        return _from_the_first(one, pieces)
    like, _ = jax.eval_shape(functools.partial(one, None), jax.tree.map(lambda x: x[0], pieces))
    return jax.lax.scan(one, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like), pieces)


def _from_the_first(one: Callable[[Any, Any], tuple[Any, Any]], pieces: Any) -> tuple[Any, Any]:
    """Starts from the first chunk's sums instead of zeros, which saves writing and reading the
    large gradient of the head. A CPU would keep this chunk's logits beside the others'.
    """
    sums, first = one(None, jax.tree.map(lambda x: x[0], pieces))
    sums, others = jax.lax.scan(one, sums, jax.tree.map(lambda x: x[1:], pieces))
    return sums, jax.tree.map(lambda x, rest: jnp.concatenate([x[None], rest]), first, others)


def plus(sums: Any, more: Any) -> Any:
    """`more` added to `sums`, which may be None."""
    return more if sums is None else jax.tree.map(jnp.add, sums, more)
