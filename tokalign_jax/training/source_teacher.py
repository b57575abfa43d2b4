"""Distillation from the source model in Stages 1 and 2, alone or beside the loss of the next token.

The teacher is the source model, frozen, which reads the same text with its own tokenizer. Where
tokens of both end at the same place of the text (`text/shared_boundaries.py`) both models have read
the same bytes. The loss, summed over the text and divided by its target tokens:

- likelihood: the binary divergence between both models' likelihoods of the text from one shared
  boundary to the next, a chunk, as in approximate likelihood matching (ALM, Minixhofer et al. 2025,
  arXiv 2503.20083; `cross_tokenizer.divergence`).
- states: the squared distance between both models' final states at shared boundaries, over the
  variance of the teacher's states in the sequence, where the next token is the same on both sides.
  Elsewhere the two have to point at different tokens.
- next token, in a mixture: the cross-entropy.

All terms are sums over sequences, so that the loss of a step does not depend on micro-batches or
devices.

B batch, T target tokens, S source tokens, D model.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tokalign_jax.config import ComputeConfig, ObjectiveWeights, StageConfig, remat_of
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.lora import LoraSpec
from tokalign_jax.models.transformer import forward, head_matrix
from tokalign_jax.text import pairs
from tokalign_jax.text.boundaries import NONE
from tokalign_jax.training.batches import PairedSource, SourceText, read_and_predicted
from tokalign_jax.training.cross_tokenizer import chunk_nats, divergence, same_next_token
from tokalign_jax.training.losses import (
    cross_entropy,
    head_of,
    token_nll,
    weighted_cross_entropy,
)
from tokalign_jax.training.step import Loss, Objective
from tokalign_jax.utils import paths


class Teacher(NamedTuple):
    """The source model, on the mesh in the compute type."""

    config: ModelConfig
    params: paths.Tree
    identity: str
    """Digest of its files."""


def objective(stage: StageConfig, teacher: Teacher, text: SourceText) -> Objective:
    """The objective of a stage whose teacher is the source model."""
    width = source_length(stage.batch.sequence_length, teacher.config)
    return Objective(
        SourceDistillation(teacher.config, weights_of(stage)),
        teacher.params,
        {"teacher": teacher.identity, "source_length": width},
        functools.partial(PairedSource, text=text, source_length=width),
    )


def source_length(length: int, teacher: ModelConfig) -> int:
    """S: source tokens that the teacher reads for a sequence of `length` target tokens."""
    return min(pairs.source_length(length), teacher.max_positions)


def weights_of(stage: StageConfig) -> ObjectiveWeights:
    """The weights of the terms that a stage's loss has; 0 for the others."""
    if stage.objective == "mixture":
        return stage.weights
    return ObjectiveWeights(0.0, stage.weights.likelihood, stage.weights.states)


@dataclass(frozen=True)
class SourceDistillation:
    """Makes the loss. It holds no arrays, and equal ones make the same program."""

    teacher: ModelConfig
    weights: ObjectiveWeights

    def __call__(self, model: ModelConfig, compute: ComputeConfig, lora: LoraSpec | None) -> Loss:
        """Make the loss of a student."""
        dtype = jnp.dtype(compute.dtype)
        remat = remat_of(compute)
        head, teacher_head = head_of(model, compute), head_of(self.teacher, compute)
        weights = self.weights

        def loss(
            trainable: Any, frozen: Any, batch: Mapping[str, Array], keys: Array
        ) -> tuple[Float[Array, ""], Float[Array, ""]]:
            frozen, taught = frozen
            params = paths.merge(trainable, frozen)
            read, labels = read_and_predicted(batch["tokens"])
            positions = batch["positions"]
            count = jnp.sum(labels >= 0, dtype=jnp.float32)
            how = {"dtype": dtype, "unroll": compute.unroll}
            teacher_states = jax.lax.stop_gradient(
                forward(self.teacher, taught, batch["source"], **how)
            )
            hidden = forward(
                model,
                params,
                read,
                lora=lora,
                dropout_key=keys,
                remat=remat,
                matmul=compute.matmul,
                **how,
            )
            matrix = head_matrix(params)
            total = jnp.zeros(())
            if weights.states:
                counts = same_next_token(positions) & (labels >= 0)
                total += weights.states * state_distances(hidden, teacher_states, positions, counts)
            if not weights.likelihood:
                if weights.next_token:
                    total += weights.next_token * cross_entropy(hidden, matrix, labels, head)[0]
                return total, count
            nll = token_nll(*jax.lax.stop_gradient((hidden, matrix)), labels, head)
            following = jnp.pad(batch["source"][:, 1:], ((0, 0), (0, 1)), constant_values=NONE)
            teacher_nll = token_nll(teacher_states, head_matrix(taught), following, teacher_head)
            terms = functools.partial(
                likelihood_terms,
                teacher_nll=jax.lax.stop_gradient(teacher_nll),
                positions=positions,
                predicted=labels >= 0,
                weights=weights,
            )
            # Of the labels' likelihoods alone: its gradient is that of a weighted cross-entropy,
            # which holds no [B, T, V] logits.
            value, factors = jax.value_and_grad(terms)(nll)
            surrogate = weighted_cross_entropy(hidden, matrix, labels, factors, head)
            return total + surrogate + jax.lax.stop_gradient(value - surrogate), count

        return loss


def likelihood_terms(
    nll: Float[Array, "B T"],
    teacher_nll: Float[Array, "B S"],
    positions: Int[Array, "B T"],
    predicted: Bool[Array, "B T"],
    weights: ObjectiveWeights,
) -> Float[Array, ""]:
    """Weighted sums of next-token loss and divergence.

    Args:
      nll, teacher_nll: negative log-likelihoods of the token behind each position.
      predicted: labels that count. Chunks with others do not.
    """
    chunks = chunk_nats(nll, teacher_nll, positions)
    ignored = chunk_nats((~predicted).astype(jnp.float32), teacher_nll, positions).student
    each = divergence(chunks.student, chunks.teacher)
    likelihood = jnp.sum(jnp.where(chunks.whole & (ignored == 0), each, 0.0))
    return weights.likelihood * likelihood + weights.next_token * jnp.sum(nll * predicted)


def state_distances(
    student: Float[Array, "B T D"],
    teacher: Float[Array, "B S D"],
    positions: Int[Array, "B T"],
    counts: Bool[Array, "B T"],
) -> Float[Array, ""]:
    """Sum of squared distances where `counts`, each over the variance of the teacher's states in
    its sequence: 1 a position for the best constant.
    """
    teacher = teacher.astype(jnp.float32)
    deviation = teacher - teacher.mean(axis=1, keepdims=True)
    variance = jnp.square(deviation).sum(axis=(1, 2)) / teacher.shape[1]
    there = jnp.take_along_axis(teacher, jnp.maximum(positions, 0)[..., None], axis=1)
    squares = jnp.square(student.astype(jnp.float32) - there).sum(axis=-1)
    sums = jnp.where(counts, squares, 0.0).sum(axis=1)
    return jnp.sum(sums / jnp.maximum(variance, 1e-9))
