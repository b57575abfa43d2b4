"""What a run will take, before anything runs: parameters, memory of a device by kind, disk and time, from configs and shapes.

B batch, T length, D model, V vocabulary, N heads, H head size, L layers, F intermediate.

`plan` is arithmetic: no weights, no text, no devices. Numbers of parameters, and bytes of what a device holds between steps, are exact.
What is alive in the middle of a step is estimated from above, kind by kind, as if all kinds were at their largest at the same time.
"""

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from tokalign_jax import compiling, demo, paths, sharding
from tokalign_jax.config import (
    AUTO,
    EXTEND,
    ComputeConfig,
    Config,
    StageConfig,
    reads_source,
    teacher_of,
    training_stages,
)
from tokalign_jax.errors import UserError
from tokalign_jax.initialization import tuning
from tokalign_jax.models import hub, remat
from tokalign_jax.models.attention import LONGEST_WHOLE, QUERY_BLOCK, has_kernel
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.transformer import abstract_params
from tokalign_jax.progress import duration, quantity
from tokalign_jax.text import corpus, mining
from tokalign_jax.text.canonical import vocabulary_size
from tokalign_jax.text.editing import within_rows
from tokalign_jax.training import loop

MeshSizes = tuple[int, int, int]
"""Of data, fsdp and tensor."""
FLOAT = 4
"""Bytes of a float32."""
USABLE = compiling.MEMORY
"""Share of a device's memory that arrays can have; the rest is the runtime's."""
CERTAIN = 0.9
"""Share of that memory which a number of sequences chosen here may fill: estimates of what a step works with may be too low."""
FILLED = 8_192
"""Tokens held at once from which on an accelerator is busy enough that recomputation costs more than their number."""
LARGEST_MICRO_BATCH = 65_536
"""Tokens held at once beyond which more of them are not faster (docs/results/throughput.md)."""
LARGEST_ON_CPU = 4_096
"""The same on a CPU, which nothing fills."""
BYTES_PER_TOKEN = 4
"""UTF-8 bytes of a token of ordinary text, to guess how many tokens there will be."""
PEAKS = {
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L4": 121e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}
"""Dense bfloat16 FLOP/s of a device, by the start or a word of the name that JAX gives it (the makers' data sheets)."""


# --- What is asked ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """The devices that a plan is for."""

    devices: int
    memory: float
    """Bytes of a device that arrays can have; infinite where that is not known."""
    kind: str = ""
    """What JAX calls them; empty for devices that are not here."""
    fused_attention: bool = True
    """Whether they may have a kernel for attention that keeps no logits, as GPUs and TPUs do."""

    @classmethod
    def of(cls, devices: int = 0, memory: str = "") -> "Machine":
        """The machine that flags describe (memory as in `80GB`), or the one that is here.

        Raises:
          UserError: memory that is no number of bytes.
        """
        usable = USABLE * _number(memory, "--plan_device_memory", "80GB", _BYTES) if memory else math.inf
        if devices:
            return cls(devices, usable)
        here = jax.devices()
        return cls(
            len(here),
            min(usable, sharding.device_memory(jax.local_devices()[0])),
            here[0].device_kind,
            here[0].platform != "cpu",
        )

    def fuses(self, model: ModelConfig, compute: ComputeConfig) -> bool:
        """Whether they have one for this model: not for each size of heads, type or soft-cap (`models/attention.py`)."""
        device = jax.devices()[0] if self.kind else None
        return self.fused_attention and has_kernel(model.head_dim, compute.dtype, model.attention_softcap, device)


@dataclass(frozen=True)
class Speed:
    """How fast training is taken to be: the first of these that is known."""

    tokens_per_second: float = 0.0
    """All devices together, whatever the stage."""
    measured: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Tokens a second of one device, by the stage's method."""
    mfu: float = 0.4
    """Share of the peak that is reached."""
    peak: float = 0.0
    """FLOP/s of a device; 0: by its name, if that is known."""

    @classmethod
    def of(cls, tokens_per_second: float, measured: str, mfu: float, peak: str) -> "Speed":
        """From flags; `measured` is a JSON file of benchmarks/train_throughput.py.

        Raises:
          UserError: a file that is not one, or a peak that is no number.
        """
        return cls(
            tokens_per_second,
            _measured(Path(measured)) if measured else {},
            mfu,
            _number(peak, "--plan_peak", "989TFLOPS", _FLOPS) if peak else 0.0,
        )

    def seconds(self, tokens: int, flops: float, method: str, machine: Machine) -> tuple[float, str] | None:
        """How long so many tokens take, and where that is from; None where nothing is known."""
        if self.tokens_per_second:
            return tokens / self.tokens_per_second, f"at the {quantity(self.tokens_per_second)} tokens/s given"
        if rate := self.measured.get(method):
            return (
                tokens / rate / machine.devices,
                f"at the {quantity(rate)} tokens/s measured on one device, times {machine.devices}",
            )
        peak = self.peak or next((peak for name, peak in PEAKS.items() if name in machine.kind), 0.0)
        if not peak:
            return None
        rate = self.mfu * peak * machine.devices / (flops / tokens)
        return tokens / rate, (
            f"assuming {self.mfu:.0%} of {peak / 1e12:.0f} TFLOP/s on each device, {quantity(rate)} tokens/s; not measured"
        )


# --- What is answered ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StagePlan:
    """One training stage."""

    name: str
    method: str
    trained: int
    """Parameters."""
    frozen: int
    steps: int
    sequences: int
    """Of a step, over all devices."""
    length: int
    accumulation: int
    """Micro-batches of a step."""
    memory: Mapping[str, int]
    """Bytes on each device by kind."""
    seconds: float | None
    speed: str
    """What `seconds` come from."""

    @property
    def tokens(self) -> int:
        return self.steps * self.sequences * self.length

    @property
    def total(self) -> int:
        return sum(self.memory.values())


class InitPlan(NamedTuple):
    """What the source model does for the rows of the start, at most."""

    read: int
    """Tokens that it reads."""
    tuned: int
    """Tokens on which rows are tuned."""
    seconds: float | None
    speed: str
    """What `seconds` come from."""

    def table(self) -> list[str]:
        tuned = f"; rows are tuned on {quantity(self.tuned)}" if self.tuned else ""
        return [
            "",
            f"init: the source model reads {quantity(self.read)} tokens at most{tuned}",
            *_time(self.seconds, self.speed),
        ]


@dataclass(frozen=True)
class Plan:
    machine: Machine
    mesh: MeshSizes
    init: InitPlan | None
    """None where rows are the alignment's mixtures."""
    stages: tuple[StagePlan, ...]
    disk: Mapping[str, int]
    """Bytes by the folder of the workdir."""
    disk_free: float
    warnings: tuple[str, ...]

    def table(self) -> str:
        """All of it, for the terminal."""
        lines = [self._devices(), *(self.init.table() if self.init else [])]
        for stage in self.stages:
            lines += [
                "",
                f"{stage.name} ({stage.method}): {quantity(stage.trained)} parameters train, {quantity(stage.frozen)} are frozen",
                f"  {stage.steps:,} steps of {stage.sequences:,} x {stage.length:,} tokens, each in {stage.accumulation} "
                f"micro-batch{'es' * (stage.accumulation > 1)}: {quantity(stage.tokens)} tokens",
                *_time(stage.seconds, stage.speed),
                *_listed("memory of a device", stage.memory),
            ]
        free = "" if self.disk_free == math.inf else f" ({_size(self.disk_free)} free)"
        lines += ["", *_listed(f"disk{free}", self.disk)]
        lines += [f"\nwarning: {warning}" for warning in self.warnings]
        return "\n".join(lines)

    def _devices(self) -> str:
        machine, (data, fsdp, tensor) = self.machine, self.mesh
        kind = f" ({machine.kind})" if machine.kind else ""
        room = "memory unknown" if machine.memory == math.inf else f"{_size(machine.memory)} each for arrays"
        many = "s" * (machine.devices > 1)
        return f"{machine.devices} device{many}{kind}, mesh data={data} fsdp={fsdp} tensor={tensor}; {room}"


def _time(seconds: float | None, speed: str) -> list[str]:
    known = "unknown: give --plan_tokens_per_second" if seconds is None else duration(seconds)
    return [f"  time {known}", *([f"    {speed}"] if speed else [])]


def _listed(what: str, sizes: Mapping[str, int]) -> list[str]:
    """A sum and what it is made of, as lines."""
    return [
        f"  {what:<56} {_size(sum(sizes.values())):>10}",
        *(f"    {kind:<54} {_size(size):>10}" for kind, size in sizes.items() if size),
    ]


def plan(
    config: Config,
    model: ModelConfig,
    machine: Machine,
    speed: Speed,
    text_bytes: int,
    exported: int,
    disk_free: float = math.inf,
    teacher: ModelConfig | None = None,
) -> Plan:
    """What a run takes.

    Args:
      model: with the target vocabulary's rows.
      text_bytes: UTF-8 bytes of text that are kept.
      exported: bytes of a parameter in the exported folder.
      disk_free: bytes.
      teacher: of Stage 3, if there is one.

    Raises:
      UserError: a mesh or batch that does not fit the devices.
    """
    run = training_stages(config)
    state = state_bytes(config, model, teacher)
    devices = sharding.usable(config.mesh, machine.devices, [stage.batch_size for stage in run.values()])
    machine = dataclasses.replace(machine, devices=devices)
    mesh = sharding.axis_sizes(config.mesh, devices, state, machine.memory)
    stages = []
    for name, stage in run.items():
        stage, compute = resolved(name, stage, config.compute, model, mesh, machine, teacher)
        stages.append(_stage(name, stage, compute, model, mesh, machine, speed, teacher))
    warnings = [*too_large(config, model, mesh, machine, teacher).values()]
    disk = disk_bytes(config, model, text_bytes, exported)
    if sum(disk.values()) > disk_free:
        warnings.append(
            f"the disk has {_size(disk_free)} free but the run needs about {_size(sum(disk.values()))}: use another one for "
            f"--workdir, or lower {' or '.join(['text.budget_bytes', *(f'{name}.keep_checkpoints' for name in run)])}"
        )
    init = _init(config, model, machine, speed, text_bytes)
    return Plan(machine, mesh, init, tuple(stages), disk, disk_free, tuple(warnings))


def too_large(
    config: Config, model: ModelConfig, mesh: MeshSizes, machine: Machine, teacher: ModelConfig | None = None
) -> dict[str, str]:
    """Of the training stages that do not fit a device of the machine, by name: what they need, and with which settings they would fit."""
    found = {}
    for name, stage in training_stages(config).items():
        stage, compute = resolved(name, stage, config.compute, model, mesh, machine, teacher)
        total = needed(name, stage, compute, model, mesh, machine, teacher)
        if total > machine.memory:
            found[name] = _too_large(name, total, stage, compute, model, mesh, machine, teacher)
    return found


def check_lengths(config: Config, model: ModelConfig) -> None:
    """
    Raises:
      UserError: a sequence is longer than the source model's positions.
    """
    lengths = {f"{name}.sequence_length": stage.sequence_length for name, stage in training_stages(config).items()}
    for name, length in {**lengths, "evaluation.sequence_length": config.evaluation.sequence_length}.items():
        if length > model.max_positions:
            raise UserError(
                f"config.{name} is {length} but source_model '{config.source_model}' has {model.max_positions} positions; "
                f"set --config.{name}={model.max_positions} or less"
            )


def of_run(config: Config, workdir: Path | None, machine: Machine, speed: Speed) -> Plan:
    """The plan of a run as configured: reads the model's config, a tokenizer, and sizes of files.

    Raises:
      UserError: as `plan`, and of a model, tokenizer or sequence length that the run would refuse.
    """
    source = hub.resolve(demo.source_model(config.source_model), what="source_model", weights=False)
    model, raw = hub.load_config(source)
    check_lengths(config, model)
    if config.target_tokenizer == EXTEND:
        old = within_rows(hub.load_tokenizer(source), model.vocab_size, f"source_model '{config.source_model}'")
        size = mining.largest_size(config, old)
    else:
        target = hub.resolve(demo.target_tokenizer(config.target_tokenizer), what="target_tokenizer", weights=False)
        size = vocabulary_size(hub.load_tokenizer(target, config.end_of_text))
    multiple = config.initialization.rows_multiple_of
    rows = -(-size // multiple) * multiple
    model = dataclasses.replace(model, vocab_size=rows)
    free = free_bytes(workdir or Path())
    teacher = None
    if "stage3" in training_stages(config):
        teacher, _ = hub.load_config(hub.resolve(config.stage3.teacher, what="stage3.teacher", weights=False))
    return plan(config, model, machine, speed, text_bytes(config), exported_bytes(config, raw), free, teacher)


def free_bytes(folder: Path) -> int:
    """Free bytes of the disk that a folder is on, or will be on once it is made."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


# --- Parameters ---------------------------------------------------------------------------------------------------------


def shapes(model: ModelConfig, stage: StageConfig) -> tuple[paths.Tree, paths.Tree]:
    """Shapes of what trains in a stage and of what is frozen, without the rows that only fill matrices up."""
    return loop.split(stage, abstract_params(model, loop.lora_spec(stage)))


def state_bytes(config: Config, model: ModelConfig, teacher: ModelConfig | None) -> int:
    """The most that parameters, gradients and optimizer of a training stage need in all, its teacher included."""
    stages = training_stages(config).values() or [config.stage1]
    frozen = 2 * parameters(abstract_params(teacher)) if teacher else 0
    return max(loop.state_bytes(stage, model) + (frozen if teacher_of(stage) else 0) for stage in stages)


def parameters(tree: paths.Tree) -> int:
    """How many there are in a tree of shapes."""
    return sum(math.prod(leaf.shape) for leaf in paths.flatten(tree).values())


def elements(tree: paths.Tree, mesh: MeshSizes) -> int:
    """Of these parameters, elements that one device of the mesh holds, filled up as they are in memory."""
    abstract, total = _abstract(mesh), 0
    for path, leaf in paths.flatten(tree).items():
        shape = sharding.padded_shape(path, leaf.shape)
        total += math.prod(sharding.sharding_of(path, shape, abstract).shard_shape(shape))
    return total


def _only(pattern: str, tree: paths.Tree) -> paths.Tree:
    """The part of a tree whose paths the expression is found in."""
    return paths.split(tree, lambda path: bool(re.search(pattern, path)))[0]


def _abstract(mesh: MeshSizes) -> Mesh:
    """A mesh without devices, which is enough for shapes."""
    return cast(Mesh, AbstractMesh(mesh, (sharding.DATA, sharding.FSDP, sharding.TENSOR)))


# --- Memory -------------------------------------------------------------------------------------------------------------


def micro_batches(name: str, stage: StageConfig, mesh: MeshSizes) -> tuple[int, int]:
    """How often a step runs the model, and how many sequences a device then holds.

    Raises:
      UserError: the step's sequences cannot be dealt to the devices.
    """
    together = loop.micro_batch(name, stage, _abstract(mesh))
    return stage.batch_size // together, together // (mesh[0] * mesh[1])


def memory(
    name: str,
    stage: StageConfig,
    compute: ComputeConfig,
    model: ModelConfig,
    mesh: MeshSizes,
    fused_attention: bool,
    teacher: ModelConfig | None = None,
) -> dict[str, int]:
    """Bytes on each device by kind.

    The first three kinds are exact, and there all the time. The rest is there for a part of a step: in float32 on a CPU, 1.0 to 1.3
    times what XLA then asks for; in bfloat16 on one, two and four GPUs, all kinds are 0.99 to 1.22 times what was in use
    (tests/test_plan.py).
    """
    trained, frozen = shapes(model, stage)
    size = jnp.dtype(compute.dtype).itemsize
    accumulation, held = micro_batches(name, stage, mesh)
    tokens = held * stage.sequence_length
    train = FLOAT * elements(trained, mesh)
    logits = _logits(model, compute, tokens, mesh)
    work = {  # one after the other
        "one layer": _layer(model, compute, tokens, mesh, stage, fused_attention)
        + _gathered(model, trained, size, mesh),
    }
    taught: dict[str, int] = {}
    if teacher and teacher_of(stage):
        teacher = dataclasses.replace(teacher, vocab_size=model.vocab_size)
        taught = {
            f"teacher ({compute.dtype})": size * elements(abstract_params(teacher), mesh),
            f"what the teacher says ({compute.dtype})": size * tokens * teacher.hidden_size,
        }
        reads = dataclasses.replace(stage, method="full")
        fused = fused_attention and has_kernel(teacher.head_dim, compute.dtype, teacher.attention_softcap)
        work["one layer of the teacher"] = _layer(teacher, compute, tokens, mesh, reads, fused)
        work["one layer of the teacher"] += _gathered(teacher, {}, size, mesh)
        logits += _logits(teacher, compute, tokens, mesh)
    work[f"logits of {min(compute.loss_chunk, tokens):,} tokens"] = logits
    most = max(work, key=work.__getitem__)
    return {
        "parameters that train (float32)": train,
        f"frozen parameters ({compute.dtype})": size * elements(frozen, mesh),
        **taught,
        "Adam's two moments (float32)": 2 * train,
        f"projections that train, in {compute.dtype}": 0
        if size == FLOAT
        else size * elements(_only("_proj/", trained), mesh),
        "gradients (float32)": train,
        "gradients summed over micro-batches (float32)": train if accumulation > 1 else 0,
        f"activations kept (remat={compute.remat})": _kept(model, compute, tokens, mesh),
        f"largest work at once ({most})": work[most],
    }


def needed(
    name: str,
    stage: StageConfig,
    compute: ComputeConfig,
    model: ModelConfig,
    mesh: MeshSizes,
    machine: Machine,
    teacher: ModelConfig | None = None,
) -> int:
    """Bytes on each device of the machine, all kinds of `memory` together."""
    return sum(memory(name, stage, compute, model, mesh, machine.fuses(model, compute), teacher).values())


def resolved(
    name: str,
    stage: StageConfig,
    compute: ComputeConfig,
    model: ModelConfig,
    mesh: MeshSizes,
    machine: Machine,
    teacher: ModelConfig | None = None,
) -> tuple[StageConfig, ComputeConfig]:
    """Both with a choice in the place of `auto`: of those with which the stage fits a device, the one expected to be fastest.

    While the sequences held at once fill the device it keeps as much as it can for the backward pass, since fewer sequences cost less
    than to compute again; with so much kept, it holds as many as fit, up to where more are no faster. Where nothing fits: the least.

    Raises:
      UserError: the step's sequences cannot be dealt to the devices.
    """
    policies = remat.POLICIES if compute.remat == "auto" else (compute.remat,)
    batches, room = [stage.per_device_batch], machine.memory
    if stage.per_device_batch == AUTO:
        most = (LARGEST_MICRO_BATCH if machine.fused_attention else LARGEST_ON_CPU) // stage.sequence_length
        batches = [n for n in loop.held_at_once(name, stage, _abstract(mesh)) if n <= max(1, most)][::-1]
        room *= CERTAIN
    filling = [n for n in batches if int(n) * stage.sequence_length >= FILLED]
    order = [(n, policy) for policy in policies for n in filling]
    order += [(n, policy) for n in batches if n not in filling for policy in policies]
    for n, policy in order:
        choice = dataclasses.replace(stage, per_device_batch=n), dataclasses.replace(compute, remat=policy)
        if needed(name, *choice, model, mesh, machine, teacher) <= room:
            return choice
    return dataclasses.replace(stage, per_device_batch=batches[-1]), dataclasses.replace(compute, remat=policies[-1])


def _policy(compute: ComputeConfig) -> remat.Policy:
    if compute.remat == "auto":
        raise ValueError("remat=auto is not resolved: see `resolved`")
    return compute.remat


def _kept(model: ModelConfig, compute: ComputeConfig, tokens: int, mesh: MeshSizes) -> int:
    """What layers keep; of a layer's inputs every device of `tensor` has a copy, of the rest its share."""
    inputs = remat.activation_bytes(model, "layer", compute.dtype)
    rest = remat.activation_bytes(model, _policy(compute), compute.dtype) - inputs
    return tokens * (inputs + rest // mesh[2])


def _layer(
    model: ModelConfig,
    compute: ComputeConfig,
    tokens: int,
    mesh: MeshSizes,
    stage: StageConfig,
    fused_attention: bool,
) -> int:
    """What the backward pass of a layer works with: everything computed in it, and gradients of the same sizes."""
    size = jnp.dtype(compute.dtype).itemsize
    active = model.experts.per_token if model.experts else 1
    wide = model.num_heads * model.head_dim * 3 + 2 * model.num_kv_heads * model.head_dim
    wide += (3 if model.gated_mlp else 2) * model.intermediate_size * active
    narrow = 4 * model.hidden_size
    per_token = 2 * size * (wide // mesh[2] + narrow) + 3 * FLOAT * model.hidden_size
    if stage.method == "lora" and stage.lora.dropout:
        # What projections read, with some of it dropped; those that read the same share it.
        read = 2 * model.hidden_size + model.num_heads * model.head_dim + model.intermediate_size * active
        per_token += 2 * size * read
    if fused_attention:
        return tokens * per_token
    # The fallback's logits and their gradients, of one block of queries.
    queries = stage.sequence_length if stage.sequence_length <= LONGEST_WHOLE else QUERY_BLOCK
    return tokens * per_token + 3 * FLOAT * tokens * queries * model.num_heads // mesh[2]


def _gathered(model: ModelConfig, trained: paths.Tree, size: int, mesh: MeshSizes) -> int:
    """One layer's matrices put together from the devices of `fsdp`, the next ones' on their way, and one layer's gradients."""
    if mesh[1] == 1:
        return 0
    weights = elements(_only("^layers/", abstract_params(model)), (1, 1, mesh[2])) // model.num_layers
    gradients = elements(_only("^layers/", trained), (1, 1, mesh[2])) // model.num_layers
    return 2 * size * weights + FLOAT * gradients


def _logits(model: ModelConfig, compute: ComputeConfig, tokens: int, mesh: MeshSizes) -> int:
    """The head in the compute type; a chunk's logits and softmax in float32, and their gradient; hidden states and theirs; and
    what a chunk has in float32 beside its states, their labels' rows and both gradients."""
    size = jnp.dtype(compute.dtype).itemsize
    rows = -(-model.vocab_size // sharding.ROWS) * sharding.ROWS // (mesh[1] * mesh[2])
    head = rows * model.hidden_size * size if size != FLOAT else 0
    chunk = min(compute.loss_chunk, tokens) * mesh[1]  # of the devices that have other rows
    beside = chunk * model.hidden_size * (4 * FLOAT + 2 * size)
    return head + chunk * rows * (2 * FLOAT + size) + 2 * tokens * model.hidden_size * size + beside


# --- Work ---------------------------------------------------------------------------------------------------------------


def flops_per_token(model: ModelConfig, stage: StageConfig, teacher: ModelConfig | None = None) -> float:
    """Operations that a training step needs for a token, recomputation not counted, attention over all T (PaLM, appendix B).

    2 for each parameter of a matrix product and token forward, 2 backward to its input, 2 to its weights where these train; in attention
    4 N H T forward and twice that backward. Of a teacher forward alone.
    """

    trained, frozen = shapes(model, stage)
    total = 6 * _products(model, trained) + 4 * _products(model, frozen) + 3 * _attention(model, stage.sequence_length)
    if teacher and teacher_of(stage):
        total += 2 * _products(teacher, abstract_params(teacher)) + _attention(teacher, stage.sequence_length)
    return total


def _products(model: ModelConfig, tree: paths.Tree) -> float:
    """Parameters of matrix products that a token meets."""
    active = model.experts.per_token / model.experts.count if model.experts else 1.0
    sizes = {
        path: math.prod(leaf.shape) * (active if "experts/" in path else 1)
        for path, leaf in paths.flatten(tree).items()
        if re.search(r"(kernel|lora_[ab])$", path) or (model.tie_word_embeddings and path == "embed_tokens/embedding")
    }
    return sum(sizes.values())


def _attention(model: ModelConfig, length: int) -> float:
    """Operations forward, a token."""
    return 4 * model.num_layers * model.num_heads * model.head_dim * length


def _init(config: Config, model: ModelConfig, machine: Machine, speed: Speed, text_bytes: int) -> InitPlan | None:
    settings = config.initialization
    if not reads_source(config):
        return None
    # Tuning is a step of Stage 1 at its own length; to read is to go forward through the layers, without the head.
    stage = dataclasses.replace(
        config.stage1, method="embedding", sequence_length=min(tuning.LENGTH, model.max_positions)
    )
    _, layers = shapes(model, stage)
    each = flops_per_token(model, stage)
    forward = 2 * _products(model, layers) + _attention(model, stage.sequence_length)
    # A source that was not made for the text may take a token a byte.
    read, tuned = min(settings.tokens, text_bytes), min(settings.tuning, text_bytes // BYTES_PER_TOKEN)
    tokens = tuned + round(read * forward / each)
    known = speed.seconds(tokens, tokens * each, stage.method, machine) if tokens else (0.0, "")
    return InitPlan(read, tuned, *(known or (None, "")))


def _stage(
    name: str,
    stage: StageConfig,
    compute: ComputeConfig,
    model: ModelConfig,
    mesh: MeshSizes,
    machine: Machine,
    speed: Speed,
    teacher: ModelConfig | None,
) -> StagePlan:
    trained, frozen = shapes(model, stage)
    tokens = stage.steps * stage.batch_size * stage.sequence_length
    # What was measured of a method was measured without a teacher.
    kind = "distillation" if teacher_of(stage) else stage.method
    found = speed.seconds(tokens, tokens * flops_per_token(model, stage, teacher), kind, machine)
    return StagePlan(
        name,
        stage.method,
        parameters(trained),
        parameters(frozen),
        stage.steps,
        stage.batch_size,
        stage.sequence_length,
        micro_batches(name, stage, mesh)[0],
        memory(name, stage, compute, model, mesh, machine.fuses(model, compute), teacher),
        *(found or (None, "")),
    )


# --- Disk ---------------------------------------------------------------------------------------------------------------


def text_bytes(config: Config) -> int:
    """UTF-8 bytes of text that a run keeps, as far as sizes of files tell."""
    files = [Path(name) for name in corpus.names(config)]
    # Compressed text unfolds to about five times its size; of a hub data set only the budget is known.
    sizes = [5 * file.stat().st_size if file.exists() else config.text.budget_bytes for file in files]
    return min(config.text.budget_bytes, sum(sizes))


def exported_bytes(config: Config, raw: Mapping[str, Any]) -> int:
    """Bytes of a parameter in the exported folder, from the source's config.json."""
    dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    return jnp.dtype(dtype if config.export.dtype == "source" else config.export.dtype).itemsize


def disk_bytes(config: Config, model: ModelConfig, text: int, exported: int) -> dict[str, int]:
    """Bytes by folder of the workdir.

    Args: as for `plan`; `text` are its `text_bytes`.
    """
    everything = parameters(abstract_params(model))
    disk = {
        "corpus": text // 3,  # compressed
        # Token ids of the source in two bytes or four, of the target by its rows.
        "tokens": text // BYTES_PER_TOKEN * (FLOAT + (2 if model.vocab_size <= 1 << 16 else FLOAT)),
        "init": FLOAT * everything,
    }
    for name, stage in training_stages(config).items():
        # What trains and Adam's two moments; a new one is written before the oldest goes.
        disk[name] = 3 * FLOAT * parameters(shapes(model, stage)[0]) * (stage.keep_checkpoints + 1)
    return {**disk, "export": exported * everything}


# --- What to do ---------------------------------------------------------------------------------------------------------


def _too_large(
    name: str,
    total: int,
    stage: StageConfig,
    compute: ComputeConfig,
    model: ModelConfig,
    mesh: MeshSizes,
    machine: Machine,
    teacher: ModelConfig | None,
) -> str:
    """That a stage will not fit, and with which settings it would: each by itself, or else several together."""

    def needs(choice: _Choice) -> int:
        return needed(name, *choice, machine, teacher)

    alone: dict[str, str] = {}
    together, choice = [], (stage, compute, model, mesh)
    for key, changes in _CHANGES.items():
        key = key.replace("stage.", f"{name}.")
        for value, changed in changes(stage, compute, model, mesh):
            if key not in alone and needs(changed) <= machine.memory:
                alone[key] = f"{key}={value} ({_size(needs(changed))})"
        if needs(choice) > machine.memory:
            for value, changed in list(changes(*choice))[-1:]:
                together, choice = [*together, f"{key}={value}"], changed
    if alone:
        remedy = f"it would with {', or '.join(alone.values())}"
    elif needs(choice) <= machine.memory:
        remedy = f"it would with {', '.join(together)} together ({_size(needs(choice))})"
    else:
        remedy = "no settings change that: use more or larger devices"
    return (
        f"{name} will not fit: it needs about {_size(total)} on each device, which has {_size(machine.memory)} for "
        f"arrays; {remedy}"
    )


_Choice = tuple[StageConfig, ComputeConfig, ModelConfig, MeshSizes]
_Changes = Iterator[tuple[Any, _Choice]]


def _halves(value: int, least: int) -> list[int]:
    """Powers of two below a value, the largest first."""
    return [2**n for n in reversed(range(value.bit_length())) if least <= 2**n < value]


def _fewer_sequences(stage: StageConfig, compute: ComputeConfig, model: ModelConfig, mesh: MeshSizes) -> _Changes:
    for batch in _halves(int(stage.per_device_batch), 1):
        yield batch, (dataclasses.replace(stage, per_device_batch=batch), compute, model, mesh)


def _less_kept(stage: StageConfig, compute: ComputeConfig, model: ModelConfig, mesh: MeshSizes) -> _Changes:
    for policy in remat.POLICIES[remat.POLICIES.index(_policy(compute)) + 1 :]:
        yield policy, (stage, dataclasses.replace(compute, remat=policy), model, mesh)


def _smaller_chunks(stage: StageConfig, compute: ComputeConfig, model: ModelConfig, mesh: MeshSizes) -> _Changes:
    for chunk in _halves(compute.loss_chunk, 128):
        yield chunk, (stage, dataclasses.replace(compute, loss_chunk=chunk), model, mesh)


def _more_parts(stage: StageConfig, compute: ComputeConfig, model: ModelConfig, mesh: MeshSizes) -> _Changes:
    data, fsdp, tensor = mesh
    for more in (n for n in range(2, data + 1) if data % n == 0 and sharding.ROWS % (fsdp * n * tensor) == 0):
        yield fsdp * more, (stage, compute, model, (data // more, fsdp * more, tensor))


def _adapters(stage: StageConfig, compute: ComputeConfig, model: ModelConfig, mesh: MeshSizes) -> _Changes:
    if stage.method == "full":
        yield "lora", (dataclasses.replace(stage, method="lora"), compute, model, mesh)


_CHANGES: dict[str, Callable[..., _Changes]] = {
    "mesh.fsdp": _more_parts,
    "compute.loss_chunk": _smaller_chunks,
    "stage.per_device_batch": _fewer_sequences,
    "compute.remat": _less_kept,
    "stage.method": _adapters,
}
"""What saves memory, with the least change of each first; in order of what it costs, the last also in what is learned."""


# --- Small things -------------------------------------------------------------------------------------------------------

_BYTES = {"": 1, "B": 1, **{f"{letter}B": 1000**n for n, letter in enumerate("KMGT", 1)}} | {
    f"{letter}iB": 1024**n for n, letter in enumerate("KMGT", 1)
}
_FLOPS = {"": 1, **{f"{letter}FLOPS": 1000**n for n, letter in enumerate(("K", "M", "G", "T", "P"), 1)}}


def _number(text: str, flag: str, example: str, units: Mapping[str, float]) -> float:
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    units = {unit.lower(): size for unit, size in units.items()}
    try:
        number, unit = match.groups() if match else ("", "")
        return float(number) * units[unit.lower()]
    except (ValueError, KeyError):
        raise UserError(f"{flag}={text}: expected a number and a unit, such as {example}") from None


def _size(size: float) -> str:
    return f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.2f} GB"


def _measured(file: Path) -> dict[str, float]:
    """Tokens a second of one device by method, from what benchmarks/train_throughput.py writes.

    Raises:
      UserError: it does not hold that.
    """
    try:
        rows = json.loads(file.read_text())
        return {row["method"]: row["tokens_per_second"] / row["devices"] for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--plan_throughput={file}: expected a JSON list of rows with method, tokens_per_second and devices ({error})"
        ) from error
