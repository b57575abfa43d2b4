"""Distillation across tokenizers: a teacher that reads the same text in other tokens.

Where tokens of both sides end at the same place (`text/pairs.py`) both models have read the same
text. There the loss compares

- states: the squared distance between the final states of student and teacher, in units of the
  variance of the teacher's. Student and teacher are the same model but for the vocabulary, so their
  states live in one space. Only where the next token is the same on both sides: before a word that
  is split differently the two have to point at different tokens.
- inner states: the same for the residual stream after a quarter, a half and three quarters of the
  layers, each dimension in units of its own variance, at every shared boundary but the start of the
  row. Later tokens attend to the inner states at a word, which may hold more about it than the
  prediction of the next token needs.
- likelihoods: how likely each finds the text up to the next shared boundary (a chunk), as in
  approximate likelihood matching (ALM, Minixhofer et al. 2025, arXiv 2503.20083). With p and q the
  chunk's likelihoods by teacher and student to the power of 1 / t, the temperature t times the
  binary divergence  p log(p / q) + (1 - p) log((1 - p) / (1 - q)).

Beside them stands the loss of the next token, but for tokens that start a document: most documents
are cut off before their end. There the teacher's likelihood says whether it would have ended. What
is split differently counts `emphasis` times.

B batch, T target tokens, S source tokens, D model.
"""

import functools
from collections.abc import Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokalign_jax.config import ComputeConfig
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.lora import LoraSpec
from tokalign_jax.models.transformer import Params, forward_with_inner_states, head_matrix
from tokalign_jax.text.boundaries import NONE
from tokalign_jax.training.losses import head_of, token_nll, weighted_cross_entropy

TEMPERATURE = 100.0
"""t; the paper's."""
LEAST_VARIANCE = 1e-9
"""Sums of squared deviations up to this are treated as 0."""
INNER_DEPTHS = (0.25, 0.5, 0.75)
"""Depths at which inner states are compared, as shares of the layers."""
LEAST_NATS = 1e-3
"""A chunk's negative log-likelihood is taken to be at least this: the divergence has no bound at
0."""


class Batch(NamedTuple):
    """Rows of `text/pairs.py`, and how much the loss of their next tokens counts.

    Rows begin with the token that starts documents.
    """

    target: Int[Array, "B T+1"]
    source: Int[Array, "B S"]
    positions: Int[Array, "B T"]
    next_token: Float[Array, "B"]
    likelihood: Float[Array, "B"]


class Weights(NamedTuple):
    """Weights of the other terms of the loss."""

    states: float = 2.0
    inner: float = 4.0
    emphasis: float = 2.0
    """Factor of next-token loss and divergence for tokens and chunks that are split differently."""


class Terms(NamedTuple):
    """Parts of the loss, each a mean, before weights: scalars."""

    loss: Float[Array, ""]
    next_token: Float[Array, ""]
    """Nats a target token."""
    states: Float[Array, ""]
    inner: Float[Array, ""]
    """Mean over the layers that are compared; 0 for a model of one layer."""
    distance: Float[Array, ""]
    """Mean absolute difference between both models' negative log-likelihoods of a chunk, nats."""


class Models(NamedTuple):
    """Both models, and how they are computed."""

    student: ModelConfig
    teacher: ModelConfig
    compute: ComputeConfig
    lora: LoraSpec | None = None
    """Adapters in the student's parameters; None: it has none."""


def loss(
    models: Models, params: Params, teacher: Params, batch: Batch, weights: Weights
) -> tuple[Float[Array, ""], Terms]:
    """The loss of the student `params`, to be differentiated, and its terms.

    The likelihood terms are functions of the labels' likelihoods alone, so their gradient is that
    of a weighted cross-entropy (`losses.weighted_cross_entropy`), which holds no [B, T, V] logits.
    """
    dtype, compute = jnp.dtype(models.compute.dtype), models.compute
    read, labels = jnp.maximum(batch.target[:, :-1], 0), batch.target[:, 1:]
    layers = inner_layers(models.student.num_layers) if weights.inner else []
    hidden, inner = forward_with_inner_states(
        models.student, params, read, layers, lora=models.lora, dtype=dtype
    )
    head, how = head_matrix(params), head_of(models.student, compute)
    taught, taught_inner, teacher_nll = _teacher(models, teacher, batch.source, layers)

    student_nll = token_nll(*jax.lax.stop_gradient((hidden, head)), labels, how)
    objective = functools.partial(
        _likelihood_terms, teacher_nll=teacher_nll, batch=batch, weights=weights
    )
    (value, (next_token, distance)), factors = jax.value_and_grad(objective, has_aux=True)(
        student_nll
    )
    surrogate = weighted_cross_entropy(hidden, head, labels, factors, how)

    alike = same_next_token(batch.positions) & (labels >= 0)
    states = state_distance(hidden, _at(taught, batch.positions), alike)
    # The first position has read the same token on both sides, and an outlier in many models.
    shared = jnp.asarray(batch.positions != NONE).at[:, 0].set(False)
    distances = [
        inner_distance(own, _at(theirs, batch.positions), shared)
        for own, theirs in zip(inner, taught_inner)
    ]
    inner_term = jnp.stack(distances).mean() if distances else jnp.zeros(())
    total = surrogate + jax.lax.stop_gradient(value - surrogate)
    total += weights.states * states + weights.inner * inner_term
    terms = Terms(total, next_token, states, inner_term, distance)
    return total, jax.lax.stop_gradient(terms)


def inner_layers(num_layers: int) -> list[int]:
    """Numbers of layers after which inner states are compared, ascending; empty for one layer."""
    numbers = {max(1, round(depth * num_layers)) for depth in INNER_DEPTHS}
    return sorted(number for number in numbers if number < num_layers)


def _teacher(
    models: Models, params: Params, source: Int[Array, "B S"], layers: Collection[int]
) -> tuple[Array, list[Array], Float[Array, "B S"]]:
    """Final states of the teacher, its inner states after these layers, and its negative
    log-likelihoods of the token behind each position.
    """
    dtype = jnp.dtype(models.compute.dtype)
    hidden, inner = forward_with_inner_states(models.teacher, params, source, layers, dtype=dtype)
    following = jnp.pad(source[:, 1:], ((0, 0), (0, 1)), constant_values=NONE)
    nll = token_nll(hidden, head_matrix(params), following, head_of(models.teacher, models.compute))
    return jax.lax.stop_gradient((hidden, inner, nll))


def _likelihood_terms(
    nll: Float[Array, "B T"], teacher_nll: Float[Array, "B S"], batch: Batch, weights: Weights
) -> tuple[Float[Array, ""], tuple[Float[Array, ""], Float[Array, ""]]]:
    """The weighted sum of next-token loss and divergence; (next-token loss, distance)."""
    labels, alike = batch.target[:, 1:], same_next_token(batch.positions)
    learned = (labels >= 0) & (labels != batch.target[:, :1])
    count = jnp.maximum(learned.sum(), 1)
    factors = jnp.where(learned, jnp.where(alike, 1.0, weights.emphasis), 0.0)
    next_token = jnp.sum(nll * factors * batch.next_token[:, None]) / count
    chunks = chunk_nats(nll, teacher_nll, batch.positions)
    each = divergence(chunks.student, chunks.teacher)
    each *= jnp.where(chunks.one_token, 1.0, weights.emphasis) * batch.likelihood[:, None]
    num_chunks = jnp.maximum(chunks.whole.sum(), 1)
    value = next_token + jnp.sum(jnp.where(chunks.whole, each, 0.0)) / num_chunks
    gaps = jnp.where(chunks.whole, jnp.abs(chunks.student - chunks.teacher), 0.0)
    distance = jnp.sum(gaps) / num_chunks
    return value, (jnp.sum(nll * learned) / count, distance)


class Chunks(NamedTuple):
    """The text between consecutive shared boundaries of each row, [B, T] with what is behind the
    last.
    """

    student: Float[Array, "B T"]
    """Negative log-likelihood, nats."""
    teacher: Float[Array, "B T"]
    one_token: Bool[Array, "B T"]
    """True if the chunk is one token on both sides."""
    whole: Bool[Array, "B T"]
    """True if there is such a chunk."""


def chunk_nats(
    student: Float[Array, "B T"], teacher: Float[Array, "B S"], positions: Int[Array, "B T"]
) -> Chunks:
    """Both models' negative log-likelihoods of each chunk.

    Args:
      student, teacher: the negative log-likelihood of the token behind each position.
    """
    shared, length, width = positions != NONE, positions.shape[1], teacher.shape[1]
    places = jnp.where(shared, positions, width)
    marks = jax.vmap(lambda at: jnp.zeros(width, bool).at[at].set(True, mode="drop"))(places)

    def sums(values: Array, starts: Bool[Array, "B N"]) -> Array:
        """Of the values from each start up to the next one; what is before the first falls away."""
        number = jnp.cumsum(starts, axis=1) - 1
        number = jnp.where(number < 0, length, number)
        return jax.vmap(functools.partial(jax.ops.segment_sum, num_segments=length))(values, number)

    sizes = [sums(jnp.ones(starts.shape), starts) for starts in (shared, marks)]
    # What is behind the last shared boundary is no whole chunk.
    whole = jnp.arange(length) < (shared.sum(axis=1) - 1)[:, None]
    one_token = (sizes[0] == 1) & (sizes[1] == 1)
    return Chunks(sums(student, shared), sums(teacher, marks), one_token, whole)


def divergence(student: Float[Array, "..."], teacher: Float[Array, "..."]) -> Float[Array, "..."]:
    """The binary divergence of chunks' likelihoods, from their negative logarithms (module
    docstring).
    """
    log_p, log_q = (-jnp.maximum(nats, LEAST_NATS) / TEMPERATURE for nats in (teacher, student))
    log_not_p, log_not_q = (jnp.log(-jnp.expm1(x)) for x in (log_p, log_q))
    return TEMPERATURE * (
        jnp.exp(log_p) * (log_p - log_q) + jnp.exp(log_not_p) * (log_not_p - log_not_q)
    )


def state_distance(
    student: Float[Array, "B T D"], teacher: Float[Array, "B T D"], counts: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """Squared distance between states over the variance of the teacher's: 1 for the best
    constant; 0 if the teacher's do not vary, as a single one does not.
    """
    error, variance, _ = _squares(student, teacher, counts)
    return _ratio(error.sum(), variance.sum(), LEAST_VARIANCE)


def inner_distance(
    student: Float[Array, "B T D"], teacher: Float[Array, "B T D"], counts: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """Squared distance of each dimension over its variance in the teacher, averaged over D.

    The residual stream has a few dimensions of far larger variance than all others, which would
    dominate the distance. Dimensions that do not vary in the teacher count as 0, since they have no
    scale: all of them if there is a single state.
    """
    error, variance, mean = _squares(student, teacher, counts)
    # The mean of equal values is only equal to them up to rounding.
    rounding = counts.sum() * jnp.square(1e-6 * mean)
    return jnp.mean(_ratio(error, variance, jnp.maximum(rounding, LEAST_VARIANCE)))


def _squares(
    student: Float[Array, "B T D"], teacher: Float[Array, "B T D"], counts: Bool[Array, "B T"]
) -> tuple[Float[Array, "D"], Float[Array, "D"], Float[Array, "D"]]:
    """By dimension, in float32, over the positions that count: the sum of squared differences, that
    of the teacher's squared deviations from its mean, and this mean.
    """
    student, teacher = student.astype(jnp.float32), teacher.astype(jnp.float32)
    at = counts[..., None]
    mean = jnp.sum(jnp.where(at, teacher, 0.0), axis=(0, 1)) / jnp.maximum(counts.sum(), 1)
    error = jnp.sum(jnp.where(at, jnp.square(student - teacher), 0.0), axis=(0, 1))
    variance = jnp.sum(jnp.where(at, jnp.square(teacher - mean), 0.0), axis=(0, 1))
    return error, variance, mean


def _ratio(
    error: Float[Array, "..."], variance: Float[Array, "..."], least: Float[Array, "..."] | float
) -> Float[Array, "..."]:
    """Ratio of error to variance; 0 where the variance is at most `least`."""
    return jnp.where(variance > least, error / jnp.maximum(variance, LEAST_VARIANCE), 0.0)


def same_next_token(positions: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Find positions after which the next token is the same stretch of text on both sides.

    This is unknown, hence False, for the last position.
    """
    now, following = positions[:, :-1], positions[:, 1:]
    return jnp.pad((now != NONE) & (following == now + 1), ((0, 0), (0, 1)), constant_values=False)


def _at(states: Float[Array, "B S D"], positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """The states at these positions; any where there is none."""
    return jnp.take_along_axis(states, jnp.maximum(positions, 0)[..., None], axis=1)
