"""Self-distillation across tokenizers: the source model, reading with its own tokenizer, teaches the one with the new vocabulary.

Where tokens of both meet (`meetings`) both models have read the same text, and there the source model's state is what the
adapted model's should be: same body, same bytes read. What is taught there, beside the next token of the text:

- states: the teacher's final state itself.
- readout: what the teacher expects next, in the tokens of its own vocabulary: the student's state through the teacher's head.
- common: the same through the rows that both heads have, each its own.
- likelihood: how likely the teacher finds the bytes up to the next meeting (approximate likelihood matching, arXiv 2503.20083).

B batch, T length, S length of the source window, D model, C tokens of a chunk, V vocabulary.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from meetings import NONE

from tokalign_jax.config import ComputeConfig
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.lora import LoraSpec
from tokalign_jax.models.transformer import forward, head_matrix
from tokalign_jax.training.batches import Shards, TokenSource
from tokalign_jax.training.losses import Head, cross_entropy, head_of
from tokalign_jax.training.step import Loss
from tokalign_jax.utils import paths

TEMPERATURE = 100.0
"""Of likelihoods of bytes between meetings; that of the paper."""
WINDOW_ROOM = 1.25
"""Source tokens of a window, over what the streams' lengths would have it hold: text of some languages takes more than the mean."""


class Met(NamedTuple):
    """Sequences of the target's tokens, and what the teacher reads with them."""

    tokens: Int[Array, "B T+1"]
    source: Int[Array, "B S"]
    places: Int[Array, "B T"]
    """The position in `source` that has read what this position of `tokens` has; `NONE` where there is none."""


class MetSource(TokenSource):
    """The sequences of the target's shards (`TokenSource`), each with its window of source tokens, which begins at the first meeting.

    Item i is int32 [T + 1 + S + T]: tokens, source window and places, one behind the other (`unpack`).
    """

    def __init__(
        self,
        target: Shards,
        source: Shards,
        meetings: Int[np.ndarray, "tokens"],
        sequence_length: int,
        window: int,
    ):
        """`meetings`: as `meetings.find` has them; `window`: S."""
        super().__init__(target, sequence_length)
        self._source, self._meetings, self._window = source.tokens, meetings, window

    def __getitem__(self, index: int) -> Int[np.ndarray, "T+1+S+T"]:
        begin = int(index) * self._length
        met = np.asarray(self._meetings[begin : begin + self._length])
        start = met[
            np.argmax(met != NONE)
        ]  # NONE where there is no meeting at all: then any window will do
        places = np.where((met != NONE) & (met - start < self._window), met - start, NONE)
        window = np.zeros(self._window, np.int64)
        found = self._source[max(start, 0) : max(start, 0) + self._window]
        window[: len(found)] = found
        return np.concatenate([super().__getitem__(index), window, places]).astype(np.int32)


def unpack(packed: Int[Array, "B N"], length: int) -> Met:
    """What `MetSource` packed, from batches of it; `length` is T."""
    return Met(packed[:, : length + 1], packed[:, length + 1 : -length], packed[:, -length:])


def window_length(source: Shards, target: Shards, sequence_length: int, largest: int) -> int:
    """S: `WINDOW_ROOM` times the source tokens that a sequence has in the mean, in whole 64s, at most the model's positions."""
    mean = sequence_length * len(source.tokens) / len(target.tokens)
    return min(-(-int(mean * WINDOW_ROOM) // 64) * 64, largest)


def make_loss(
    student: ModelConfig,
    teacher: ModelConfig,
    compute: ComputeConfig,
    lora: LoraSpec | None,
    length: int,
    kinds: Sequence[str],
) -> Loss:
    """The next-token loss, and each of `kinds` of what is taught, times its weight.

    Its frozen tree has `student` (what does not train), `teacher` (the source model's parameters), `weights` (a scalar a kind) and,
    for `common`, the int32 [C] `source_rows` and `target_rows` of tokens that both vocabularies have.
    """
    dtype = jnp.dtype(compute.dtype)
    head, teacher_head = head_of(student, compute), head_of(teacher, compute)
    remat = "dots" if compute.remat == "auto" else compute.remat

    def loss(
        trainable: Any, frozen: Any, packed: Int[Array, "B N"], keys: Array
    ) -> Float[Array, ""]:
        met = unpack(packed, length)
        params = paths.merge(trainable, frozen["student"])
        hidden = forward(
            student,
            params,
            met.tokens[:, :-1],
            lora=lora,
            dropout_key=keys,
            dtype=dtype,
            remat=remat,
        )
        total, count = cross_entropy(hidden, head_matrix(params), met.tokens[:, 1:], head)
        value = total / count
        if not kinds:
            return value
        source = frozen["teacher"]
        states = jax.lax.stop_gradient(forward(teacher, source, met.source, dtype=dtype))
        there = at_places(states, met.places)
        is_met = met.places != NONE
        for kind in kinds:
            match kind:
                case "states":
                    taught = state_error(hidden, there, is_met)
                case "cosine":
                    taught = angle_error(hidden, there, is_met)
                case "readout":
                    own = head_matrix(source)
                    taught = divergence((hidden, own), (there, own), is_met, teacher_head)
                case "common":
                    rows = (
                        head_matrix(params)[frozen["target_rows"]],
                        head_matrix(source)[frozen["source_rows"]],
                    )
                    how = teacher_head._replace(vocabulary=len(rows[0]))
                    taught = divergence((hidden, rows[0]), (there, rows[1]), is_met, how)
                case "likelihood":
                    read = jnp.pad(met.source[:, 1:], ((0, 0), (0, 1)), constant_values=NONE)
                    of_teacher = jax.lax.stop_gradient(
                        nll(states, head_matrix(source), read, teacher_head)
                    )
                    of_student = nll(hidden, head_matrix(params), met.tokens[:, 1:], head)
                    taught = likelihood_error(of_student, of_teacher, met.places)
                case _:
                    raise ValueError(kind)
            value += frozen["weights"][kind] * taught
        return value

    return loss


def at_places(states: Float[Array, "B S D"], places: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """The states at these positions; where there is none, some other."""
    return jnp.take_along_axis(states, jnp.maximum(places, 0)[..., None], axis=1)


def state_error(
    states: Float[Array, "B T D"], taught: Float[Array, "B T D"], is_met: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """Squared distance to the states taught, over their variance: 1 for the best state that does not depend on the text."""
    states, taught = states.astype(jnp.float32), taught.astype(jnp.float32)
    count = jnp.maximum(is_met.sum(), 1)
    at = is_met[..., None]
    mean = jnp.sum(jnp.where(at, taught, 0.0), axis=(0, 1)) / count
    variance = jnp.sum(jnp.where(at, jnp.square(taught - mean), 0.0))
    return jnp.sum(jnp.where(at, jnp.square(states - taught), 0.0)) / jnp.maximum(variance, 1e-9)


def angle_error(
    states: Float[Array, "B T D"], taught: Float[Array, "B T D"], is_met: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """One less the cosine between states and those taught, in the mean."""
    states, taught = states.astype(jnp.float32), taught.astype(jnp.float32)
    norms = jnp.linalg.norm(states, axis=-1) * jnp.linalg.norm(taught, axis=-1)
    cosine = jnp.sum(states * taught, axis=-1) / jnp.maximum(norms, 1e-9)
    return jnp.sum(jnp.where(is_met, 1 - cosine, 0.0)) / jnp.maximum(is_met.sum(), 1)


def divergence(
    student: tuple[Float[Array, "B T D"], Float[Array, "R D"]],
    teacher: tuple[Float[Array, "B T D"], Float[Array, "R D"]],
    is_met: Bool[Array, "B T"],
    how: Head,
) -> Float[Array, ""]:
    """Mean KL divergence (nats) of what the student's states and head expect from what the teacher's do, over `how.vocabulary` tokens."""

    @jax.checkpoint
    def one_chunk(item: tuple[Array, Array, Array]) -> Array:
        of_student, of_teacher, counts = item
        expected = _log_probabilities(of_teacher, jax.lax.stop_gradient(teacher[1]), how)
        found = _log_probabilities(of_student, student[1], how)
        terms = jnp.exp(expected) * jnp.where(jnp.isfinite(expected), expected - found, 0.0)
        return jnp.sum(jnp.where(counts, terms.sum(axis=-1), 0.0))

    items = _chunks(how.chunk, student[0], teacher[0], is_met)
    return jax.lax.map(one_chunk, items).sum() / jnp.maximum(is_met.sum(), 1)


def nll(
    hidden: Float[Array, "B T D"], head: Float[Array, "R D"], labels: Int[Array, "B T"], how: Head
) -> Float[Array, "B T"]:
    """The negative log-likelihood of each label (nats; 0 where it is negative), for which each has a gradient of its own.

    It takes a fourth product with the head, which the gradient of the sum alone (`losses.cross_entropy`) does not need.
    """

    @jax.checkpoint
    def one_chunk(item: tuple[Array, Array]) -> Array:
        states, targets = item
        found = _log_probabilities(states, head, how)
        chosen = jnp.take_along_axis(found, jnp.maximum(targets, 0)[:, None], axis=-1)[:, 0]
        return jnp.where(targets >= 0, -chosen, 0.0)

    return (
        jax.lax.map(one_chunk, _chunks(how.chunk, hidden, labels))
        .reshape(-1)[: labels.size]
        .reshape(labels.shape)
    )


def likelihood_error(
    student: Float[Array, "B T"], teacher: Float[Array, "B S"], places: Int[Array, "B T"]
) -> Float[Array, ""]:
    """Binary divergence of the likelihoods of the bytes between meetings, to the power of 1 / `TEMPERATURE`, times that.

    Args:
      student, teacher: the negative log-likelihood of the token behind each position.
    """
    is_met = places != NONE
    length, window = places.shape[1], teacher.shape[1]
    spans = (
        is_met.sum(axis=1) - 1
    )  # whole ones: what is before the first meeting and behind the last is left
    marks = jax.vmap(lambda at: jnp.zeros(window, jnp.int32).at[at].set(1, mode="drop"))(
        jnp.where(is_met, places, window)
    )

    def sums(values: Array, marks: Array) -> Array:
        numbers = jnp.cumsum(marks, axis=1) - 1
        numbers = jnp.where(numbers < 0, length, numbers)
        return jax.vmap(functools.partial(jax.ops.segment_sum, num_segments=length))(
            values, numbers
        )

    nats_student, nats_teacher = sums(student, is_met.astype(jnp.int32)), sums(teacher, marks)
    whole = jnp.arange(length) < spans[:, None]
    # Both branches of a `where` are differentiated: what is not counted is kept from infinities.
    least = 1e-3
    nats_student = jnp.maximum(jnp.where(whole, nats_student, 1.0), least)
    nats_teacher = jnp.maximum(jnp.where(whole, nats_teacher, 1.0), least)
    log_p, log_q = -nats_teacher / TEMPERATURE, -nats_student / TEMPERATURE
    log_not_p, log_not_q = (jnp.log(-jnp.expm1(of)) for of in (log_p, log_q))
    terms = jnp.exp(log_p) * (log_p - log_q) + jnp.exp(log_not_p) * (log_not_p - log_not_q)
    return TEMPERATURE * jnp.sum(jnp.where(whole, terms, 0.0)) / jnp.maximum(whole.sum(), 1)


def _log_probabilities(
    states: Float[Array, "C D"], head: Float[Array, "R D"], how: Head
) -> Float[Array, "C R"]:
    logits = jnp.dot(
        states.astype(how.dtype), head.astype(how.dtype).T, preferred_element_type=jnp.float32
    )
    logits = logits if how.adjust is None else how.adjust(logits)
    return jax.nn.log_softmax(
        jnp.where(jnp.arange(len(head)) < how.vocabulary, logits, -jnp.inf), axis=-1
    )


def _chunks(chunk: int, *of_tokens: Array) -> tuple[Array, ...]:
    """Arrays [B, T, ...] as [N, C, ...]; the last chunk is filled up with what counts for nothing (label `NONE`, False)."""

    def cut(x: Array) -> Array:
        flat = x.reshape(-1, *x.shape[2:])
        size = min(chunk, len(flat))
        filling = NONE if jnp.issubdtype(x.dtype, jnp.integer) else 0
        widths = ((0, -len(flat) % size), *((0, 0),) * (flat.ndim - 1))
        return jnp.pad(flat, widths, constant_values=filling).reshape(-1, size, *flat.shape[1:])

    return tuple(cut(x) for x in of_tokens)
