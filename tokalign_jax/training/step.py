"""One optimizer step, pure: (state, frozen parameters, batch, key, schedule) -> (state, metrics).

A accumulation (micro-batches), B sequences of a micro-batch over all devices, T tokens of a
sequence.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32

from tokalign_jax.config import ComputeConfig, remat_of
from tokalign_jax.models import quantized
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.lora import LoraSpec
from tokalign_jax.models.transformer import forward, head_matrix, head_path
from tokalign_jax.parallel import sharding
from tokalign_jax.training.batches import Sequences, Shards, TokenSource, read_and_predicted
from tokalign_jax.training.losses import (
    Head,
    cross_entropy,
    cross_entropy_in_place,
    head_of,
)
from tokalign_jax.training.optimizer import Schedule
from tokalign_jax.utils import paths

Batch = Int32[Array, "A B T+1"] | Mapping[str, Array]
"""Input of a step: token ids of the target tokenizer (`batches.read_and_predicted`), or several
arrays [A, B, ...], of which `tokens` are these."""
Loss = Callable[[Any, Any, Any, Array], tuple[Float[Array, ""], Float[Array, ""]]]
"""(trainable, frozen, micro-batch, keys [B]) -> (sum of the loss over tokens in nats, number of
tokens that it is a sum over). The loss of a step is the sum over its micro-batches by their tokens,
so that it does not depend on how the step is divided.

The micro-batch is the batch without its first axis. `frozen` is any tree of arrays that never
change; the loss alone looks into it.
"""
Metrics = dict[str, Array]
Step = Callable[["TrainState", Any, Batch, Array, Schedule], tuple["TrainState", Metrics]]


@dataclass(frozen=True)
class Objective:
    """Objective of a stage (`loop.run_stage`): `NEXT_TOKEN`, or a loss with a teacher.

    Teachers are a model with the target tokenizer (`distillation.objective`) or the source model
    (`source_teacher.objective`). Step and loop are the same for all. An objective brings the arrays
    that only its loss reads (`beside`: the teacher's parameters) and, where a sequence is more than
    token ids of the target, the access to its sequences (`sequences`, whose items may be dicts:
    `Batch`).
    """

    make_loss: Callable[[ModelConfig, ComputeConfig, LoraSpec | None], Loss]
    """Makes the loss, whose frozen tree is the pair (the model's frozen parameters, `beside`), or
    the first of these alone without `beside`."""
    beside: Any = None
    """Arrays on the mesh, in the compute type."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """JSON-serialisable facts that change what a step computes: a checkpoint with other facts
    belongs to another run."""
    sequences: Callable[[Shards, int], Sequences] = TokenSource
    """(target shards, T) -> training sequences; item i has the same text as that of
    `TokenSource`."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """The state that a step updates."""

    step: Int32[Array, ""]
    """Steps done, skipped ones included: batches read."""
    params: Any
    """Trainable parameters, in float32."""
    opt_state: Any
    skipped: Int32[Array, ""]
    """Steps whose loss or gradient was not finite; they only advanced the counters."""
    skipped_in_a_row: Int32[Array, ""]


def init_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step. Three zeros, not one thrice: each buffer is donated."""
    counters = {name: jnp.zeros((), jnp.int32) for name in ("step", "skipped", "skipped_in_a_row")}
    return TrainState(params=params, opt_state=optimizer.init(params), **counters)


@dataclass(frozen=True)
class NextTokenLoss:
    """The language-model loss over parameters that are split in a trainable and a frozen tree."""

    model_config: ModelConfig
    compute: ComputeConfig
    lora: LoraSpec | None

    def __call__(
        self, trainable: Any, frozen: Any, tokens: Int32[Array, "B T+1"], keys: Array
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Compute the loss, as `Loss` says."""
        params = paths.merge(trainable, frozen)
        read, labels = read_and_predicted(tokens)
        return cross_entropy(
            self._hidden(params, read, keys), head_matrix(params), labels, self._head
        )

    def add_gradients(
        self,
        trainable: Any,
        frozen: Any,
        tokens: Int32[Array, "B T+1"],
        keys: Array,
        sums: paths.Tree,
    ) -> tuple[tuple[Array, Array], paths.Tree]:
        """(loss and number of tokens, `sums` with the gradients of a micro-batch added).

        Gradients of the head are added chunk by chunk, and those of the embedding row by row, in
        the memory of the sums, so that no other array of their size is needed. Where a mesh splits
        the rows, the embedding's gradient is an array of its own.

        Args:
          sums: float32, as the trainable tree; it has the embedding, and the head if there is one.
        """
        read, labels = read_and_predicted(tokens)
        vocabulary, rest = paths.split(trainable, sharding.is_vocabulary)
        tables, sums = paths.flatten(vocabulary), paths.flatten(sums)
        head = head_path(tables)
        rows_are_whole = sharding.current() is None
        # One row for each token, in the order of the tokens, in place of the table.
        looked_up = tables[_EMBEDDING][read.reshape(-1)] if rows_are_whole else tables[_EMBEDDING]
        ids = jnp.arange(read.size).reshape(read.shape) if rows_are_whole else read

        def loss(rest: Any, embedding: Array) -> tuple[Array, tuple[Array, Array]]:
            leaves = {**tables, _EMBEDDING: embedding}
            params = paths.merge(paths.merge(rest, paths.unflatten(leaves)), frozen)
            hidden = self._hidden(params, ids, keys)
            total, count, added = cross_entropy_in_place(
                hidden, tables[head], labels, sums[head], self._head
            )
            return total, (count, added)

        (total, (count, added)), (gradients, embedding_gradient) = jax.value_and_grad(
            loss, (0, 1), has_aux=True
        )(rest, looked_up)
        sums |= {head: added}
        for path, gradient in paths.flatten(gradients).items():
            sums[path] = sums[path] + gradient.astype(jnp.float32)
        if rows_are_whole:
            rows = embedding_gradient.astype(jnp.float32)
            sums[_EMBEDDING] = sums[_EMBEDDING].at[read.reshape(-1)].add(rows)
        else:
            sums[_EMBEDDING] = sums[_EMBEDDING] + embedding_gradient.astype(jnp.float32)
        return (total, count), paths.unflatten(sums)

    @property
    def _head(self) -> Head:
        return head_of(self.model_config, self.compute)

    def _hidden(self, params: Any, read: Int32[Array, "B T"], keys: Array) -> Float[Array, "B T D"]:
        return forward(
            self.model_config,
            params,
            read,
            lora=self.lora,
            dropout_key=keys,
            dtype=jnp.dtype(self.compute.dtype),
            remat=remat_of(self.compute),
            unroll=self.compute.unroll,
            matmul=self.compute.matmul,
        )


def make_loss(model_config: ModelConfig, compute: ComputeConfig, lora: LoraSpec | None) -> Loss:
    """Makes the loss of the next token."""
    return NextTokenLoss(model_config, compute, lora)


_EMBEDDING = "embed_tokens/embedding"
NEXT_TOKEN = Objective(make_loss)
"""The loss of the next token."""


def make_train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    dtype: DTypeLike,
    mesh: Mesh,
    in_place: bool = False,
) -> Step:
    """Makes the jitted step, which donates its state.

    Gradients are accumulated over the A micro-batches in float32. Each replica of the parameters
    (mesh axis `data`) accumulates those of its own sequences, and they are reduced over replicas
    once a step. Over `fsdp`, where each device has a shard of the gradients, every micro-batch is
    reduced to the shards: whole gradients would take `fsdp` times the memory. A single micro-batch
    needs no accumulation; XLA reduces its gradients layer by layer, in their own dtype.

    A step whose loss or gradient norm is not finite changes nothing but the counters (not even the
    optimizer's own count), and the learning rate follows the steps that were not skipped.

    Metrics (scalars): loss (mean over tokens), gradient_norm (before clipping), learning_rate
    (`StageConfig.learning_rate` under the schedule), finite, tokens (of the step), skipped,
    skipped_in_a_row.

    Args:
      dtype: of activations. Projections are cast to it once a step, before they travel between
        devices.
      in_place: add gradients of embedding and head to the accumulated ones in place, if the loss
        can (`NextTokenLoss.add_gradients`).
    """
    optimizer = optax.with_extra_args_support(optimizer)
    add_gradients = loss.add_gradients if in_place and isinstance(loss, NextTokenLoss) else None

    def sums_of(
        params: Any, frozen: Any, batch: Batch, numbers: Int32[Array, "A B"], key: Array
    ) -> tuple[tuple[Array, Array], Any]:
        """(loss, tokens) and gradients, summed over the sequences of all micro-batches."""

        def keys_of(numbers: Array) -> Array:
            return jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)

        def of_micro_batch(part: Any, numbers: Array) -> tuple[tuple[Array, Array], Any]:
            keys = keys_of(numbers)
            held = quantized.pinned(frozen, numbers)
            sums, gradients = jax.value_and_grad(loss, has_aux=True)(params, held, part, keys)
            return sums, _split_as_parameters(gradients, mesh)

        def add(sums: Any, inputs: tuple[Any, Array]) -> tuple[Any, None]:
            more = of_micro_batch(*inputs)
            return jax.tree.map(lambda total, x: total + x.astype(total.dtype), sums, more), None

        def add_in_place(
            add_gradients: Callable[..., Any], sums: Any, inputs: tuple[Any, Array]
        ) -> tuple[Any, None]:
            (part, numbers), (totals, gradients) = inputs, sums
            held = quantized.pinned(frozen, numbers)
            more, gradients = add_gradients(params, held, part, keys_of(numbers), gradients)
            return (
                jax.tree.map(jnp.add, totals, more),
                _split_as_parameters(gradients, mesh),
            ), None

        if len(numbers) == 1:  # no sum, and no memory for one
            return of_micro_batch(jax.tree.map(lambda x: x[0], batch), numbers[0])
        # XLA for CPUs could not compile sums of bfloat16 over replicas either.
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
        adds = functools.partial(add_in_place, add_gradients) if add_gradients else add
        sums, _ = jax.lax.scan(adds, ((jnp.zeros(()), jnp.zeros(())), zeros), (batch, numbers))
        return sums

    sums_over_replicas = sharding.sum_over_replicas(
        sums_of, (P(), P(), P(None, sharding.DATA), P(None, sharding.DATA), P()), mesh
    )

    def gradients_of(params: Any, frozen: Any, batch: Batch, key: Array) -> tuple[Array, Any]:
        """Mean loss over the tokens of all micro-batches, and its gradients, in float32."""
        # A number for each sequence of the step, from which it has its dropout: the same however
        # the step is divided into micro-batches.
        shape = target_tokens(batch).shape[:2]
        numbers = jnp.arange(math.prod(shape)).reshape(shape)
        sums = sums_of if len(numbers) == 1 else sums_over_replicas
        (total, count), gradients = sums(
            cast_projections(params, dtype), frozen, batch, numbers, key
        )
        return jax.tree.map(
            lambda x: x.astype(jnp.float32) / jnp.maximum(count, 1), (total, gradients)
        )

    def train_step(
        state: TrainState, frozen: Any, batch: Batch, key: Array, schedule: Schedule
    ) -> tuple[TrainState, Metrics]:
        with sharding.within(mesh):
            value, gradients = gradients_of(
                state.params, frozen, batch, jax.random.fold_in(key, state.step)
            )
            gradients = _split_as_parameters(gradients, mesh)
        norm = optax.global_norm(gradients)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        rates = schedule.rates(state.step - state.skipped)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params, rates=rates)
        changed = optax.apply_updates(state.params, updates), opt_state
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), changed, (state.params, state.opt_state)
        )
        after = TrainState(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            skipped=state.skipped + ~finite,
            skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
        )
        accumulation, sequences, length = target_tokens(batch).shape
        metrics = {
            "loss": value,
            "gradient_norm": norm,
            "learning_rate": rates["body"],
            "finite": finite,
            "tokens": jnp.asarray(accumulation * sequences * (length - 1), jnp.int32),
            "skipped": after.skipped,
            "skipped_in_a_row": after.skipped_in_a_row,
        }
        # Constrain outputs to the input sharding, so that donated buffers are reused.
        with sharding.within(mesh):
            return _split_as_parameters(after, mesh), metrics

    gpu = mesh.devices.flat[0].platform == "gpu"
    return jax.jit(train_step, donate_argnums=0, compiler_options=GPU_OPTIONS if gpu else None)


GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False}
"""Compiler options on a GPU. Commands set them for all programs (`compiling.py`); here they serve
steps used without a command."""


def target_tokens(batch: Any) -> Array:
    """The token ids of the target tokenizer in a batch or a micro-batch."""
    return batch["tokens"] if isinstance(batch, Mapping) else batch


def cast_projections(params: Any, dtype: DTypeLike) -> Any:
    """Casts projections to the compute type. Other leaves keep float32: gradients of embedding and
    head are accumulated, and norms computed, in it.
    """
    leaves = paths.flatten(params)
    return paths.unflatten(
        {path: x.astype(dtype) if "_proj/" in path else x for path, x in leaves.items()}
    )


def _split_as_parameters(tree: Any, mesh: Mesh) -> Any:
    """Arrays on the mesh in context, each sharded by its path as the parameters are."""
    return jax.tree.map(
        lambda x, place: sharding.constrain(x, *place.spec), tree, sharding.shardings(tree, mesh)
    )
