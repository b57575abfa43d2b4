"""Memory of a device in each training stage, from configs and shapes alone.

Numbers of parameters, and bytes of what a device holds between steps, are exact. What is alive in
the middle of a step is an upper estimate, as if every kind were at its largest at the same time.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from tokalign_jax.config import (
    ComputeConfig,
    Config,
    StageConfig,
    learns_from_source,
    loss_chunk_of,
    teacher_of,
    training_stages,
)
from tokalign_jax.models import quantized, remat
from tokalign_jax.models.attention import MAX_UNBLOCKED_QUERIES, QUERY_BLOCK
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.recurrent import CHUNK
from tokalign_jax.models.transformer import abstract_params
from tokalign_jax.parallel import sharding
from tokalign_jax.planning.machine import Machine, MeshSizes
from tokalign_jax.training import loop, source_teacher
from tokalign_jax.training.optimizer import moment_shapes, state_format
from tokalign_jax.utils import paths

FLOAT = 4
"""Bytes of a float32."""


@dataclass(frozen=True)
class Setup:
    """A training stage, its model and the devices that it runs on."""

    name: str
    stage: StageConfig
    compute: ComputeConfig
    model: ModelConfig
    """With the target vocabulary's rows."""
    mesh: MeshSizes
    machine: Machine
    teacher: ModelConfig | None = None
    """None: the stage has none."""

    @property
    def teacher_length(self) -> int:
        """Tokens that the teacher reads for a sequence."""
        length = self.stage.batch.sequence_length
        if self.teacher and learns_from_source(self.stage):
            return source_teacher.source_length(length, self.teacher)
        return length

    def with_stage(self, **fields: Any) -> "Setup":
        """Return a copy with fields of the stage replaced."""
        return dataclasses.replace(self, stage=dataclasses.replace(self.stage, **fields))

    def with_batch(self, **fields: Any) -> "Setup":
        """Return a copy with fields of the stage's batch replaced."""
        return dataclasses.replace(self, stage=self.stage.with_batch(**fields))

    def with_compute(self, **fields: Any) -> "Setup":
        """Return a copy with fields of `compute` replaced."""
        return dataclasses.replace(self, compute=dataclasses.replace(self.compute, **fields))


# --- Parameters ---------------------------------------------------------------------------------


def shapes(model: ModelConfig, stage: StageConfig) -> tuple[paths.Tree, paths.Tree]:
    """Shapes of a stage's trainable and frozen parameters, without padding rows."""
    return loop.split(stage, abstract_params(model, loop.lora_spec(stage)))


def teachers(
    config: Config, source: ModelConfig, stage3: ModelConfig | None
) -> dict[str, ModelConfig]:
    """The model that teaches in each training stage that has a teacher.

    Args:
      source: the source model.
      stage3: the teacher of Stage 3.
    """
    teachers = {}
    for name, stage in training_stages(config).items():
        if learns_from_source(stage):
            teachers[name] = source
        elif stage3 and teacher_of(stage):
            teachers[name] = stage3
    return teachers


def state_bytes(config: Config, model: ModelConfig, teachers: Mapping[str, ModelConfig]) -> int:
    """The most that parameters, gradients and optimizer state of a training stage need in all, its
    teacher included.
    """
    stages = training_stages(config) or {"stage1": config.stage1}
    frozen = {name: 2 * parameters(abstract_params(teacher)) for name, teacher in teachers.items()}
    return max(
        loop.state_bytes(stage, model) + frozen.get(name, 0) for name, stage in stages.items()
    )


def parameters(tree: paths.Tree) -> int:
    """Number of parameters in a tree of shapes."""
    return sum(math.prod(leaf.shape) for leaf in paths.flatten(tree).values())


def elements(tree: paths.Tree, mesh: MeshSizes) -> int:
    """Elements of these parameters that one device of the mesh holds, padding rows included."""
    abstract, total = abstract_mesh(mesh), 0
    for path, leaf in paths.flatten(tree).items():
        shape = sharding.padded_shape(path, leaf.shape, abstract)
        total += math.prod(sharding.sharding_of(path, shape, abstract).shard_shape(shape))
    return total


def held_bytes(tree: paths.Tree, mesh: MeshSizes) -> int:
    """Bytes of these arrays on one device of the mesh, padding rows included."""
    leaves = paths.flatten(tree)
    return sum(
        jnp.dtype(leaf.dtype).itemsize * elements({path: leaf}, mesh)
        for path, leaf in leaves.items()
    )


def share(model: ModelConfig, mesh: MeshSizes) -> float:
    """The share of a model's parameters that one device of the mesh holds."""
    tree = abstract_params(model)
    return elements(tree, mesh) / elements(tree, (1, 1, 1))


def _only(pattern: str, tree: paths.Tree) -> paths.Tree:
    """The part of a tree whose paths match the expression."""
    return paths.split(tree, lambda path: bool(re.search(pattern, path)))[0]


def abstract_mesh(mesh: MeshSizes) -> Mesh:
    """A mesh without devices, which is enough for shapes."""
    return cast(Mesh, AbstractMesh(mesh, (sharding.DATA, sharding.FSDP, sharding.TENSOR)))


# --- Training stages ----------------------------------------------------------------------------


def micro_batches(setup: Setup) -> tuple[int, int]:
    """Micro-batches of a step, and sequences that a device holds in each.

    Raises:
      UserError: the step's sequences cannot be divided among the devices.
    """
    together = loop.micro_batch(setup.name, setup.stage, abstract_mesh(setup.mesh))
    return setup.stage.batch.size // together, together // (setup.mesh[0] * setup.mesh[1])


def needed(setup: Setup) -> int:
    """Bytes on each device, all kinds of `stage_memory` together."""
    return sum(stage_memory(setup).values())


def stage_memory(setup: Setup) -> dict[str, int]:
    """Bytes on each device by kind, of a training stage without `auto`.

    The first three kinds are exact and held all the time. The rest is held during a part of a step:
    in float32 on a CPU, 1.0 to 1.3 times what XLA then allocates; in bfloat16 on one, two and four
    GPUs, the sum of all kinds is 0.99 to 1.22 times what was in use (tests/planning/test_plan.py).
    """
    stage, compute, model, mesh = setup.stage, setup.compute, setup.model, setup.mesh
    trained, frozen = shapes(model, stage)
    size = jnp.dtype(compute.dtype).itemsize
    accumulation, held = micro_batches(setup)
    tokens = held * stage.batch.sequence_length
    train = FLOAT * elements(trained, mesh)
    logits = logits_bytes(model, compute, tokens, mesh)
    work = {  # one after the other
        "one layer": layer_bytes(setup, tokens)
        + float8_bytes(setup, tokens)
        + dequantized_bytes(setup)
        + gathered_bytes(model, trained, size, mesh),
    }
    teaching, teacher_work, teacher_logits = _teacher_memory(setup, held)
    work |= teacher_work
    logits += teacher_logits
    work[f"logits of {min(loss_chunk_of(compute), tokens):,} tokens"] = logits
    most = max(work, key=work.__getitem__)
    readers = mesh[0] * mesh[1]
    validated = stage.validation_sequences * (stage.batch.sequence_length + 1) // readers
    cast_projections = 0 if size == FLOAT else size * elements(_only("_proj/", trained), mesh)
    return {
        "parameters that train (float32)": train,
        f"frozen parameters ({frozen_types(setup)})": frozen_bytes(setup, frozen),
        **teaching,
        f"Adam's two moments ({'compact' if state_format(stage.optimizer) else 'float32'})": sum(
            held_bytes(moments, mesh) for moments in moment_shapes(stage, trained)
        ),
        f"projections that train, in {compute.dtype}": cast_projections,
        "gradients (float32)": train - _in_place_bytes(stage, trained, accumulation, mesh),
        "gradients summed over micro-batches (float32)": train if accumulation > 1 else 0,
        "held-out sequences (int32)": FLOAT * validated if stage.validation_every else 0,
        f"activations kept (remat={compute.remat})": kept_bytes(model, compute, tokens, mesh),
        f"largest work at once ({most})": work[most],
    }


def _in_place_bytes(
    stage: StageConfig, trained: paths.Tree, accumulation: int, mesh: MeshSizes
) -> int:
    """Bytes of gradients that are added to their sums in place: of the head, and of the embedding
    where the mesh does not split its rows.
    """
    if accumulation == 1 or learns_from_source(stage) or teacher_of(stage):
        return 0
    if not stage.optimizer.accumulate_in_place:
        return 0
    tables = _only(sharding.VOCABULARY_LEAVES, trained)
    if mesh[1] * mesh[2] > 1:
        # A tied matrix has a gradient of its own, that of the look-up.
        tables = _only("^lm_head/", tables)
    return FLOAT * elements(tables, mesh)


def vocabulary_state(setup: Setup) -> dict[str, float]:
    """Bytes per parameter of embedding and head by kind, in a stage of `setup`."""
    stage, mesh = setup.stage, setup.mesh
    trained, _ = shapes(setup.model, stage)
    tables = _only(sharding.VOCABULARY_LEAVES, trained)
    first, second = (held_bytes(tree, mesh) for tree in moment_shapes(stage, tables))
    held, (accumulation, _) = elements(tables, mesh), micro_batches(setup)
    return {
        "parameters": FLOAT,
        "first moments": first / held,
        "second moments": second / held,
        "gradients": FLOAT - _in_place_bytes(stage, trained, accumulation, mesh) / held,
        "sums of gradients": FLOAT if accumulation > 1 else 0,
    }


def _teacher_memory(setup: Setup, held: int) -> tuple[dict[str, int], dict[str, int], int]:
    """Bytes on each device of a stage's teacher for `held` sequences: what it holds by kind, its
    working memory, and its logits.
    """
    if not setup.teacher:
        return {}, {}, 0
    teacher, mesh, compute = setup.teacher, setup.mesh, setup.compute
    size, tokens = jnp.dtype(compute.dtype).itemsize, held * setup.teacher_length
    if learns_from_source(setup.stage):
        # Its states at shared boundaries, and their differences to the student's, are float32.
        states = 3 * FLOAT * held * setup.stage.batch.sequence_length * teacher.hidden_size
    else:
        # Heads have as many rows as the student's (`distillation.with_rows`).
        teacher, states = dataclasses.replace(teacher, vocab_size=setup.model.vocab_size), 0
    holds = {
        f"teacher ({compute.dtype})": size * elements(abstract_params(teacher), mesh),
        "states of the teacher": size * tokens * teacher.hidden_size + states,
    }
    forward = dataclasses.replace(setup, model=teacher).with_stage(method="full")
    forward = forward.with_batch(sequence_length=setup.teacher_length)
    layer = layer_bytes(forward, tokens) + gathered_bytes(teacher, {}, size, mesh)
    return (
        holds,
        {"one layer of the teacher": layer},
        logits_bytes(teacher, compute, tokens, mesh),
    )


def policy(compute: ComputeConfig) -> remat.Policy:
    """Return the rematerialisation policy; `auto` must have been resolved."""
    if compute.remat == "auto":
        raise ValueError("remat=auto is not resolved: see `planning.resolve`")
    return compute.remat


def kept_bytes(model: ModelConfig, compute: ComputeConfig, tokens: int, mesh: MeshSizes) -> int:
    """Activations kept by the layers; each device of `tensor` has a copy of the layers' inputs and
    its share of the rest.
    """
    inputs = remat.activation_bytes(model, "layer", compute.dtype)
    rest = remat.activation_bytes(model, policy(compute), compute.dtype) - inputs
    return tokens * (inputs + rest // mesh[2])


def layer_bytes(setup: Setup, tokens: int) -> int:
    """Working memory of a layer's backward pass: all of its activations, and gradients of the same
    sizes.
    """
    model, compute, stage, mesh = setup.model, setup.compute, setup.stage, setup.mesh
    size = jnp.dtype(compute.dtype).itemsize
    width = model.intermediate_size * (model.experts.per_token if model.experts else 1)
    width = max(width, model.dense_size or 0)
    wide = max(_mixer_elements(model, kind.mixer, size) for kind in model.layer_kinds)
    wide += (3 if model.gated_mlp else 2) * width
    narrow = 4 * model.hidden_size
    per_token = 2 * size * (wide // mesh[2] + narrow) + 3 * FLOAT * model.hidden_size
    if stage.method == "lora" and stage.lora.dropout:
        # Dropped-out inputs of the projections; those that read the same input share it.
        read = 2 * model.hidden_size + model.num_heads * model.head_dim + width
        per_token += 2 * size * read
    if setup.machine.fuses(model, compute):
        return tokens * per_token
    # Attention logits without a fused kernel, and their gradients, for one block of queries.
    length = stage.batch.sequence_length
    queries = length if length <= MAX_UNBLOCKED_QUERIES else QUERY_BLOCK
    return tokens * per_token + 3 * FLOAT * tokens * queries * model.num_heads // mesh[2]


def frozen_types(setup: Setup) -> str:
    """The types of a stage's frozen parameters."""
    kind = loop.frozen_kind(setup.stage)
    return f"{kind}, others {setup.compute.dtype}" if kind else setup.compute.dtype


def frozen_bytes(setup: Setup, frozen: paths.Tree) -> int:
    """Bytes of a stage's frozen parameters on each device, scales of quantized ones included."""
    size, kind = jnp.dtype(setup.compute.dtype).itemsize, loop.frozen_kind(setup.stage)
    if kind is None:
        return size * elements(frozen, setup.mesh)
    total = 0
    for path, leaf in paths.flatten(quantized.abstract_tree(frozen, kind)).items():
        if isinstance(leaf, quantized.QuantizedKernel):
            arrays = {f"{path}/codes": leaf.codes, f"{path}/scales": leaf.scales}
            total += held_bytes(arrays, setup.mesh)
        else:
            total += size * elements({path: leaf}, setup.mesh)
    return total


def dequantized_bytes(setup: Setup) -> int:
    """The largest kernel and the one after it in the compute type, where they are quantized."""
    if loop.frozen_kind(setup.stage) is None:
        return 0
    kernels = {
        path: math.prod(leaf.shape[1:])
        for path, leaf in paths.flatten(abstract_params(setup.model)).items()
        if quantized.is_quantized(path, leaf.shape)
    }
    size = jnp.dtype(setup.compute.dtype).itemsize
    return 2 * size * max(kernels.values(), default=0) // setup.mesh[2]


def float8_bytes(setup: Setup, tokens: int) -> int:
    """Float8 operands of the largest projection's products, each also transposed."""
    if setup.compute.matmul != "float8":
        return 0
    kernels = {
        path: leaf.shape[-2:]
        for path, leaf in paths.flatten(abstract_params(setup.model)).items()
        if path.endswith("_proj/kernel") and len(leaf.shape) == 3
    }
    copies = [2 * (tokens * sum(shape) + math.prod(shape)) for shape in kernels.values()]
    return max(copies, default=0) // setup.mesh[2]


def _mixer_elements(model: ModelConfig, mixer: str, size: int) -> int:
    """Activations of a mixer per token, in elements of `size` bytes, without attention logits."""
    if mixer == "delta" and model.delta:
        delta = model.delta
        keys, values = delta.num_key_heads * delta.key_dim, delta.num_value_heads * delta.value_dim
        # In float32, keys for each value head: projections, the chunk's system and its solution.
        floats = delta.num_value_heads * (3 * delta.key_dim + 3 * delta.value_dim + 4 * CHUNK)
        return 2 * (keys + values) + floats * FLOAT // size
    if mixer == "convolution":
        return 5 * model.hidden_size
    return model.num_heads * model.head_dim * 3 + 2 * model.num_kv_heads * model.head_dim


def gathered_bytes(model: ModelConfig, trained: paths.Tree, size: int, mesh: MeshSizes) -> int:
    """One layer's matrices gathered over `fsdp`, the next layer's on their way, and one layer's
    gradients.
    """
    if mesh[1] == 1:
        return 0
    weights = (
        elements(_only("^layers/", abstract_params(model)), (1, 1, mesh[2])) // model.num_layers
    )
    gradients = elements(_only("^layers/", trained), (1, 1, mesh[2])) // model.num_layers
    return 2 * size * weights + FLOAT * gradients


def logits_bytes(model: ModelConfig, compute: ComputeConfig, tokens: int, mesh: MeshSizes) -> int:
    """Working memory of the loss.

    The head in the compute type; a chunk's logits and softmax in float32, and their gradient;
    hidden states and their gradient; and a chunk's float32 hidden states, label rows and gradients
    of both.
    """
    size = jnp.dtype(compute.dtype).itemsize
    head_shape = (model.vocab_size, model.hidden_size)
    rows = sharding.padded_shape("lm_head/kernel", head_shape, abstract_mesh(mesh))[0] // (
        mesh[1] * mesh[2]
    )
    head = rows * model.hidden_size * size if size != FLOAT else 0
    chunk = (
        min(loss_chunk_of(compute), tokens) * mesh[1]
    )  # gathered from the devices that hold other rows
    beside = chunk * model.hidden_size * (4 * FLOAT + 2 * size)
    return head + chunk * rows * (2 * FLOAT + size) + 2 * tokens * model.hidden_size * size + beside
