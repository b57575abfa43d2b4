"""Token-level distillation from a teacher with the target tokenizer: at each position the student
learns the teacher's distribution over the tokens that both have.

B batch, T length, D model (of the student; the teacher's may differ), V tokens that both have, R
rows of a head (V and its padding), r of them on a device, C tokens of a chunk.

    loss = weight T^2 ((1 - reverse) KL(p || q) + reverse KL(q || p))
           + (1 - weight) (next-token cross-entropy)

with p = softmax(teacher / T) and q = softmax(student / T) over V, T the temperature (Hinton et al.
2015, arXiv 1503.02531, section 2: gradients shrink as 1 / T^2, hence the factor). The forward
divergence is mean-seeking, the reverse one mode-seeking (arXiv 2306.08543, section 2).

As in `losses`, logits of both are materialised for C tokens at once, and the gradients with respect
to the student's states and head are computed in the same pass, the head's accumulated in float32;
where a mesh shards the heads' rows, each device has the logits of its own rows, and only states and
a few numbers a token are communicated. The next-token term uses the same logits.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Int32

from tokalign_jax.config import ComputeConfig, DistillationConfig, remat_of
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.lora import LoraSpec
from tokalign_jax.models.transformer import forward, head_matrix
from tokalign_jax.parallel import sharding
from tokalign_jax.parallel.sharding import (
    BATCH,
    DATA,
    VOCABULARY,
    all_gather,
    psum,
    psum_scatter,
    shard_map,
)
from tokalign_jax.training.batches import read_and_predicted
from tokalign_jax.training.losses import (
    LEAST,
    Head,
    Rows,
    chunks,
    head_of,
    largest_and_sum,
    over_chunks,
    plus,
)
from tokalign_jax.training.step import Loss, Objective
from tokalign_jax.utils import compiling, paths


class Teaching(NamedTuple):
    """Static settings of the loss."""

    student: Head
    teacher: Head
    vocabulary: int
    """V: ids that both have. Others are not part of the divergence; the student's are part of the
    next-token term."""
    reverse: float = 0.0
    """Share of the reverse divergence, KL(student || teacher); the rest is the forward one,
    KL(teacher || student)."""
    temperature: float = 1.0
    weight: float = 1.0
    """Share of the divergence in the loss; the rest is next-token cross-entropy."""


class Teacher(NamedTuple):
    """A frozen model in the compute type, sharded like the student."""

    config: ModelConfig
    params: paths.Tree
    """With as many rows of the vocabulary as the student has (`with_rows`)."""
    vocabulary: int
    """Ids that teacher and student both have, with the same tokens."""
    identity: str
    """Digest of its files."""


def objective(stage: DistillationConfig, teacher: Teacher) -> Objective:
    """The objective of Stage 3."""
    reverse = {"forward": 0.0, "reverse": 1.0, "mixed": stage.mixture}[stage.divergence]
    loss = TokenDistillation(
        teacher.config, teacher.vocabulary, reverse, stage.temperature, stage.weight
    )
    return Objective(
        loss, teacher.params, {"teacher": teacher.identity, "vocabulary": teacher.vocabulary}
    )


@dataclass(frozen=True)
class TokenDistillation:
    """Makes the loss. It holds no arrays, and equal ones make the same program."""

    teacher: ModelConfig
    vocabulary: int
    reverse: float
    temperature: float
    weight: float

    def __call__(self, model: ModelConfig, compute: ComputeConfig, lora: LoraSpec | None) -> Loss:
        """Make the loss of a student."""
        heads = head_of(model, compute), head_of(self.teacher, compute)
        how = Teaching(*heads, self.vocabulary, self.reverse, self.temperature, self.weight)
        return make_distillation_loss(model, self.teacher, how, compute, lora)


def make_distillation_loss(
    model: ModelConfig,
    teacher: ModelConfig,
    how: Teaching,
    compute: ComputeConfig,
    lora: LoraSpec | None,
) -> Loss:
    """The loss of a micro-batch, whose frozen tree is the pair (frozen parameters of the student,
    parameters of the teacher).
    """
    dtype = jnp.dtype(compute.dtype)
    remat = remat_of(compute)

    def loss(
        trainable: Any, frozen: Any, tokens: Int32[Array, "B T+1"], keys: Array
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        frozen, taught = frozen
        params = paths.merge(trainable, frozen)
        inputs, labels = read_and_predicted(tokens)
        teacher_hidden = jax.lax.stop_gradient(forward(teacher, taught, inputs, dtype=dtype))
        hidden = forward(
            model,
            params,
            inputs,
            lora=lora,
            dropout_key=keys,
            dtype=dtype,
            remat=remat,
            unroll=compute.unroll,
            matmul=compute.matmul,
        )
        return distillation(
            hidden, head_matrix(params), teacher_hidden, head_matrix(taught), labels, how
        )

    return loss


def with_rows(params: paths.Tree, vocabulary: int, mesh: Mesh) -> paths.Tree:
    """Parameters with vocabulary matrices resized to `vocabulary` rows and their padding
    (`sharding.padded_shape`): further rows are dropped, missing ones are zeros.
    """

    def fitted(path: str, leaf: jax.Array) -> jax.Array:
        shape = sharding.padded_shape(path, (vocabulary, *leaf.shape[1:]), mesh)
        if not sharding.is_vocabulary(path) or leaf.shape == shape:
            return leaf
        more = max(0, shape[0] - len(leaf))
        resized = jax.jit(
            lambda x: jnp.pad(x[: shape[0]], ((0, more), (0, 0))),
            out_shardings=sharding.sharding_of(path, shape, mesh),
        )
        return resized(leaf)

    return paths.unflatten(
        {path: fitted(path, leaf) for path, leaf in paths.flatten(params).items()}
    )


def distillation(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "R D"],
    teacher_hidden: Float[Array, "B T D'"],
    teacher_head: Float[Array, "R D'"],
    labels: Int[Array, "B T"],
    how: Teaching,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(sum of the loss over tokens in nats, number of tokens that are not ignored). Differentiable
    with respect to `hidden` and `head`; the teacher gets no gradient.

    Args:
      hidden: the student's states after its final norm.
      head: its output matrix (float32 masters); its gradient is accumulated over chunks in float32.
      teacher_hidden: the teacher's states for the same tokens.
      teacher_head: with as many rows as `head`, so that devices hold the same ids of both.
      labels: token ids; negative ones are ignored, in the divergence too.
    """
    if len(head) != len(teacher_head):
        raise ValueError(
            f"the student's head has {len(head)} rows and the teacher's {len(teacher_head)}:"
            " `with_rows` makes them equal"
        )
    return _total(hidden, head, teacher_hidden, teacher_head, labels, how), jnp.sum(
        labels >= 0, dtype=jnp.float32
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _total(
    hidden: Array,
    head: Array,
    teacher_hidden: Array,
    teacher_head: Array,
    labels: Array,
    how: Teaching,
):
    return _total_forward(hidden, head, teacher_hidden, teacher_head, labels, how)[0]


def _total_forward(
    hidden: Array,
    head: Array,
    teacher_hidden: Array,
    teacher_head: Array,
    labels: Array,
    how: Teaching,
):
    """(total, its gradients with respect to `hidden` and `head`, as residuals)."""

    def local(
        hidden: Array, head: Array, teacher_hidden: Array, teacher_head: Array, labels: Array
    ):
        student = Rows(head.astype(how.student.dtype), how.student)
        teacher = Rows(teacher_head.astype(how.teacher.dtype), how.teacher)

        def one_chunk(sums: Any, pieces: tuple[Array, Array, Array]) -> tuple[Any, Array]:
            states, teacher_states, targets = map(all_gather, pieces)
            logits, pull = student.logits(states)
            loss, gradient = _loss(
                logits, teacher.logits(teacher_states)[0], targets, student.ids, how
            )
            gradient = pull(gradient).astype(how.student.dtype)
            head_gradient = jnp.dot(gradient.T, states, preferred_element_type=jnp.float32)
            return plus(sums, (loss.sum(), head_gradient)), psum_scatter(
                jnp.dot(gradient, student.weight)
            )

        states, targets = chunks(hidden.astype(how.student.dtype), labels, how.student.chunk)
        teacher_states, _ = chunks(
            teacher_hidden.astype(how.teacher.dtype), labels, how.student.chunk
        )
        (total, head_gradient), gradient = over_chunks(one_chunk, (states, teacher_states, targets))
        gradient = gradient.reshape(-1, hidden.shape[-1])[: labels.size].reshape(hidden.shape)
        # Devices that hold other rows have the loss of the same tokens: it is split over `data`
        # alone.
        return total[None], gradient.astype(hidden.dtype), head_gradient[None]

    parts = (P(BATCH), P(VOCABULARY), P(BATCH), P(VOCABULARY), P(BATCH))
    with compiling.products(how.student.dtype):
        outputs = P(DATA), P(BATCH), P(DATA, VOCABULARY)
        total, gradient, head_gradient = shard_map(local, parts, outputs)(
            hidden, head, teacher_hidden, teacher_head, labels
        )
    # Summed here, so that within `sharding.sum_over_replicas` the sum is one replica's.
    return total.sum(), (gradient, head_gradient.sum(0).astype(head.dtype))


def _total_backward(how: Teaching, gradients: tuple[Array, Array], upstream: Array):
    del how
    return (
        *((upstream * gradient).astype(gradient.dtype) for gradient in gradients),
        None,
        None,
        None,
    )


_total.defvjp(_total_forward, _total_backward)


def _loss(
    logits: Float[Array, "C r"],
    teacher_logits: Float[Array, "C r"],
    labels: Int[Array, "C"],
    ids: Int[Array, "r"],
    how: Teaching,
) -> tuple[Float[Array, "C"], Float[Array, "C r"]]:
    """(loss of each token over the rows of all devices, its gradient with respect to the student's
    local logits).
    """
    loss, gradient = _divergence(logits, teacher_logits, ids < how.vocabulary, how)
    if how.weight < 1:
        log_q = _log_softmax(logits, ids < how.student.vocabulary)
        is_label = labels[:, None] == ids
        nll = -psum(jnp.sum(jnp.where(is_label, log_q, 0.0), axis=-1))
        loss = how.weight * loss + (1 - how.weight) * nll
        gradient = how.weight * gradient + (1 - how.weight) * (jnp.exp(log_q) - is_label)
    counts = labels >= 0
    return jnp.where(counts, loss, 0.0), jnp.where(counts[:, None], gradient, 0.0)


def _divergence(
    logits: Float[Array, "C r"],
    teacher_logits: Float[Array, "C r"],
    valid: Bool[Array, "r"],
    how: Teaching,
) -> tuple[Float[Array, "C"], Float[Array, "C r"]]:
    """(T^2 times the divergence of each token over all `valid` ids, its gradient with respect to
    the student's local logits).

    With q = softmax(s / T) and d = log q - log p: T dKL(p || q) / ds = q - p, and
    T dKL(q || p) / ds = q (d - KL(q || p)).
    """
    log_q, log_p = (_log_softmax(x / how.temperature, valid) for x in (logits, teacher_logits))
    q, p = jnp.exp(log_q), jnp.exp(log_p)
    d = jnp.where(valid, log_q - log_p, 0.0)
    loss, gradient = jnp.zeros(len(logits)), jnp.zeros(logits.shape)
    if how.reverse < 1:
        loss += (1 - how.reverse) * psum(-jnp.sum(p * d, axis=-1))
        gradient += (1 - how.reverse) * (q - p)
    if how.reverse > 0:
        reverse = psum(jnp.sum(q * d, axis=-1))
        loss += how.reverse * reverse
        gradient += how.reverse * q * (d - reverse[:, None])
    return how.temperature**2 * loss, how.temperature * gradient


def _log_softmax(logits: Float[Array, "C r"], valid: Bool[Array, "r"]) -> Float[Array, "C r"]:
    """Log-probabilities over the `valid` ids of all devices; all others get probability 0."""
    logits = jnp.where(valid, logits, LEAST)
    largest, total = largest_and_sum(logits)
    return logits - (largest + jnp.log(total))[:, None]
