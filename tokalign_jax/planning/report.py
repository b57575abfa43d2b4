"""The whole plan of a run, and its table for `tokalign plan`. Reads no weights and no text."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tokalign_jax import demo
from tokalign_jax.config import (
    DERIVED,
    EXTEND,
    Config,
    StageConfig,
    distillation_budget,
    distills,
    distills_tokens,
    learns_from_source,
    reads_source,
    training_stages,
)
from tokalign_jax.initialization import self_distillation, tuning
from tokalign_jax.models import hub
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.parallel import sharding
from tokalign_jax.planning import advice, disk, flops, memory, worth
from tokalign_jax.planning.inference import Needs, Run, Source, mesh_sizes, needs, start_trains
from tokalign_jax.planning.machine import Machine, MeshSizes, Speed, format_bytes, kind_of
from tokalign_jax.planning.memory import Setup
from tokalign_jax.planning.resolve import check_lengths, resolved_stages
from tokalign_jax.text import corpus, mining
from tokalign_jax.text.canonical import vocabulary_size
from tokalign_jax.text.chats import with_template
from tokalign_jax.text.editing import within_rows
from tokalign_jax.training import validation
from tokalign_jax.utils.progress import duration, quantity


@dataclass(frozen=True)
class StagePlan:
    """One training stage."""

    name: str
    method: str
    trained: int
    """Parameters that train."""
    frozen: int
    """Parameters that do not."""
    steps: int
    sequences: int
    """Sequences of a step, over all devices."""
    length: int
    accumulation: int
    """Micro-batches of a step."""
    memory: Mapping[str, int]
    """Bytes on each device by kind."""
    seconds: float | None
    speed: str
    """Source of `seconds`."""
    objective: str = ""
    """Named where it is not the loss of the next token."""
    validations: int = 0
    """Validations on held-out text; `seconds` includes them."""
    validation_sequences: int = 0
    """Sequences of each, at most."""
    vocabulary_state: Mapping[str, float] = field(default_factory=dict)
    """Bytes per parameter of embedding and head, by kind (`memory.vocabulary_state`)."""

    @property
    def tokens(self) -> int:
        """Tokens that the stage trains on."""
        return self.steps * self.sequences * self.length

    @property
    def total(self) -> int:
        """Bytes on each device, all kinds together."""
        return sum(self.memory.values())


class InitPlan(NamedTuple):
    """Upper bounds on what the source model does for the start."""

    read: int
    """Tokens that it reads, or writes where the start is distilled from its own text."""
    tuned: int
    """Tokens on which the start is trained."""
    seconds: float | None
    speed: str
    """Source of `seconds`."""
    distilled: bool = False
    """True if the start is trained on text that the source model writes."""

    def table(self) -> list[str]:
        """Return the lines of the plan's table on the start."""
        if self.distilled:
            work = (
                f"init: the source model writes {quantity(self.read)} tokens at most; the start is"
                " trained on "
            )
            return [
                "",
                f"{work}{quantity(self.tuned)}, with it as teacher",
                *_time(self.seconds, self.speed),
            ]
        tuned = f"; rows are tuned on {quantity(self.tuned)}" if self.tuned else ""
        return [
            "",
            f"init: the source model reads {quantity(self.read)} tokens at most{tuned}",
            *_time(self.seconds, self.speed),
        ]


@dataclass(frozen=True)
class Plan:
    """Memory, disk and time of a run, with warnings where they do not suffice."""

    machine: Machine
    mesh: MeshSizes
    init: InitPlan | None
    """None if rows are the alignment's mixtures alone."""
    stages: tuple[StagePlan, ...]
    untrained: Mapping[str, Needs]
    """Memory of `init`, `evaluate` and `export`."""
    disk: Mapping[str, int]
    """Bytes by the folder of the workdir."""
    disk_free: float
    warnings: tuple[str, ...]
    worth: tuple[str, ...] = ()
    """Lines on whether the new vocabulary pays."""
    written: int = 0
    """Tokens that the source model writes for the corpus."""

    def table(self) -> str:
        """The plan as text for the terminal."""
        lines = [
            self._devices(),
            *self._written(),
            *(self.init.table() if self.init else ["", "init"]),
            *self._untrained("init"),
        ]
        for stage in self.stages:
            lines += [
                "",
                (
                    f"{stage.name} ({stage.method}{stage.objective}): {quantity(stage.trained)}"
                    f" parameters train, {quantity(stage.frozen)} are frozen"
                ),
                (
                    f"  {stage.steps:,} steps of {stage.sequences:,} x {stage.length:,} tokens,"
                    f" each in {stage.accumulation} micro-batch{'es' * (stage.accumulation > 1)}:"
                    f" {quantity(stage.tokens)} tokens"
                ),
                *_validations(stage),
                *_vocabulary_state(stage),
                *_time(stage.seconds, stage.speed),
                *_listed("memory of a device", stage.memory),
            ]
        for name in ("evaluate", "export"):
            lines += ["", name, *self._untrained(name)]
        free = "" if self.disk_free == math.inf else f" ({format_bytes(self.disk_free)} free)"
        lines += ["", *_listed(f"disk{free}", self.disk)]
        lines += self.worth
        lines += [f"\nwarning: {warning}" for warning in self.warnings]
        return "\n".join(lines)

    def _written(self) -> list[str]:
        if not self.written:
            return []
        return ["", f"self: the source model writes {quantity(self.written)} tokens for the corpus"]

    def _untrained(self, name: str) -> list[str]:
        return [
            *_listed("memory of a device", self.untrained[name].device),
            *_listed("host memory", self.untrained[name].host),
        ]

    def _devices(self) -> str:
        machine, (data, fsdp, tensor) = self.machine, self.mesh
        kind = f" ({machine.kind})" if machine.kind else ""
        room = (
            "memory unknown"
            if machine.memory == math.inf
            else f"{format_bytes(machine.memory)} each for arrays"
        )
        many = "s" * (machine.devices > 1)
        return (
            f"{machine.devices} device{many}{kind}, mesh data={data} fsdp={fsdp} tensor={tensor};"
            f" {room}"
        )


def _validations(stage: StagePlan) -> list[str]:
    if not stage.validations:
        return []
    count, most = stage.validations, stage.validation_sequences
    return [f"  {count:,} validation{'s' * (count > 1)} on at most {most:,} held-out sequences"]


def _vocabulary_state(stage: StagePlan) -> list[str]:
    kinds = {kind: size for kind, size in stage.vocabulary_state.items() if size}
    terms = ", ".join(f"{kind} {size:.3g}" for kind, size in kinds.items())
    return [f"  {sum(kinds.values()):.3g} bytes per parameter of embedding and head ({terms})"]


def _time(seconds: float | None, speed: str) -> list[str]:
    estimate = "unknown: give --tokens-per-second" if seconds is None else duration(seconds)
    return [f"  time {estimate}", *([f"    {speed}"] if speed else [])]


def _listed(what: str, sizes: Mapping[str, int]) -> list[str]:
    """Lines with a sum and its terms."""
    return [
        f"  {what:<56} {format_bytes(sum(sizes.values())):>10}",
        *(f"    {kind:<54} {format_bytes(size):>10}" for kind, size in sizes.items() if size),
    ]


def plan_run(config: Config, workdir: Path | None, machine: Machine, speed: Speed) -> Plan:
    """The plan of a run as configured: reads the model's config, a tokenizer, and sizes of files.

    Raises:
      UserError: as `make_plan`, and for a model, tokenizer or length that the run would refuse.
    """
    source = hub.resolve(demo.source_model(config.source_model), what="source_model", weights=False)
    model, raw = hub.load_config(source)
    check_lengths(config, model)
    if config.target_tokenizer in DERIVED:
        old = within_rows(
            hub.load_tokenizer(source), model.vocab_size, f"source_model '{config.source_model}'"
        )
        extends = config.target_tokenizer == EXTEND
        size = mining.largest_size(config, old) if extends else vocabulary_size(old)
    else:
        target = hub.resolve(
            demo.target_tokenizer(config.target_tokenizer), what="target_tokenizer", weights=False
        )
        own = hub.load_tokenizer(target, config.end_of_text)
        size = vocabulary_size(with_template(own, hub.load_tokenizer(source), config.chat))
    multiple = config.initialization.rows_multiple_of
    stored = Source.of(model, raw)
    model = dataclasses.replace(model, vocab_size=-(-size // multiple) * multiple)
    free = disk.free_bytes(workdir or Path())
    teacher = None
    if "stage3" in training_stages(config):
        teacher, _ = hub.load_config(
            hub.resolve(config.stage3.teacher, what="stage3.teacher", weights=False)
        )
    exported = disk.exported_bytes(config, raw)
    return make_plan(
        config, model, machine, speed, disk.text_bytes(config), exported, free, teacher, stored
    )


def make_plan(
    config: Config,
    model: ModelConfig,
    machine: Machine,
    speed: Speed,
    text_bytes: int,
    exported: int,
    disk_free: float = math.inf,
    teacher: ModelConfig | None = None,
    source: Source | None = None,
) -> Plan:
    """The plan of a run from shapes and sizes alone.

    Args:
      model: with the target vocabulary's rows.
      text_bytes: UTF-8 bytes of text that are kept.
      exported: bytes of a parameter in the exported folder.
      disk_free: bytes.
      teacher: of Stage 3, if there is one.
      source: None: of as many rows, in the exported type.

    Raises:
      UserError: a mesh or batch that does not fit the devices.
    """
    training = training_stages(config)
    source = source or Source(model.vocab_size, exported)
    source_model = dataclasses.replace(model, vocab_size=source.rows)
    teachers = memory.teachers(config, source_model, teacher)
    devices = sharding.usable(
        config.mesh, machine.devices, [stage.batch.size for stage in training.values()]
    )
    machine = dataclasses.replace(machine, devices=devices)
    mesh = mesh_sizes(config, source, model, machine, teachers)
    setups = resolved_stages(config, model, mesh, machine, teachers)
    stages = tuple(_stage(setup, speed) for setup in setups.values())
    run = Run(config, source, model, mesh, machine)
    warnings = [*advice.too_large(setups).values(), *advice.too_large_untrained(run).values()]
    warnings += advice.not_split(model, mesh)
    sizes = disk.disk_bytes(config, model, text_bytes, exported)
    if sum(sizes.values()) > disk_free:
        fields = ["text.budget_bytes", *(f"{name}.checkpoints.keep" for name in training)]
        warnings.append(
            f"the disk has {format_bytes(disk_free)} free but the run needs about"
            f" {format_bytes(sum(sizes.values()))}: use another one for --workdir, or lower"
            f" {' or '.join(fields)}"
        )
    if distills(config):
        init = _distillation(run, speed)
    elif distills_tokens(config):
        init = _token_distillation(run, speed)
    else:
        init = _init(config, model, machine, speed, text_bytes)
    written = config.text.self_tokens if corpus.has_self(config) else 0
    rows = {"source": run.source.rows, "target": model.vocab_size}
    length = min(config.stage2.batch.sequence_length, model.max_positions)
    pays = tuple(worth.plan_lines(model, rows, run.source.itemsize, length))
    return Plan(
        machine, mesh, init, stages, needs(run), sizes, disk_free, tuple(warnings), pays, written
    )


def _stage_of_length(stage: StageConfig, method: str, length: int) -> StageConfig:
    return dataclasses.replace(stage, method=method).with_batch(sequence_length=length)


def _distillation(run: Run, speed: Speed) -> InitPlan:
    """Writing is a forward pass a token; training a step of the stage that trains the same, with a
    forward pass of the teacher.
    """
    written, trained = distillation_budget(run.config, run.source.rows, run.model.vocab_size)
    methods = {"all": "full", "lora": "lora", "rows": "embedding"}
    method = methods[start_trains(run)]
    length = min(self_distillation.LENGTH, run.model.max_positions)
    stage = _stage_of_length(run.config.stage1, method, length)
    lora = dataclasses.replace(stage.lora, rank=self_distillation.ADAPTERS.rank)
    stage = dataclasses.replace(stage, lora=lora)
    each = flops.flops_per_token(run.model, stage)
    forward = flops.flops_per_token(run.source_model, dataclasses.replace(stage, method="full")) / 3
    operations = trained * (each + forward) + written * forward
    time = speed.seconds(round(operations / each), operations, method, run.machine)
    return InitPlan(written, trained, *time, distilled=True)


def _token_distillation(run: Run, speed: Speed) -> InitPlan:
    """A step of Stage 1 and a forward pass of the teacher, both without the head, for each
    token.
    """
    settings = run.config.initialization.token_distillation
    length = settings.snippet_length + 1
    stage = _stage_of_length(run.config.stage1, "embedding", length)
    each = flops.flops_per_token(run.model, stage)
    _, layers = memory.shapes(run.model, stage)
    forward = 2 * flops.products(run.model, layers) + flops.attention(run.model, length)
    tokens = length * min(settings.most_snippets, settings.snippets * run.model.vocab_size)
    operations = 3 * tokens * forward
    time = speed.seconds(round(operations / each), operations, stage.method, run.machine)
    return InitPlan(tokens, tokens, *time)


def _init(
    config: Config, model: ModelConfig, machine: Machine, speed: Speed, text_bytes: int
) -> InitPlan | None:
    settings = config.initialization
    if not reads_source(config):
        return None
    # Tuning is a step of Stage 1 at its own length; reading is a forward pass without the head.
    length = min(tuning.LENGTH, model.max_positions)
    stage = _stage_of_length(config.stage1, "embedding", length)
    _, layers = memory.shapes(model, stage)
    each = flops.flops_per_token(model, stage)
    forward = 2 * flops.products(model, layers) + flops.attention(model, length)
    # A source that was not made for the text may need a token for each byte.
    read, tuned = (
        min(settings.tokens, text_bytes),
        min(settings.tuning, text_bytes // disk.BYTES_PER_TOKEN),
    )
    tokens = tuned + round(read * forward / each)
    return InitPlan(read, tuned, *speed.seconds(tokens, tokens * each, stage.method, machine))


def _stage(setup: Setup, speed: Speed) -> StagePlan:
    stage, model = setup.stage, setup.model
    trained, frozen = memory.shapes(model, stage)
    tokens = stage.steps * stage.batch.size * stage.batch.sequence_length
    # Measured speeds of a method are without a teacher.
    kind = kind_of(stage.method, setup.compute.matmul, stage.lora.frozen)
    kind = "distillation" if setup.teacher else kind
    each = flops.flops_per_token(model, stage, setup.teacher)
    validations = validation.count(stage)
    # A validation takes as long as training on as many tokens as have its FLOPs.
    read = validations * stage.validation_sequences * stage.batch.sequence_length
    operations = tokens * each + read * flops.forward_flops_per_token(model, stage)
    return StagePlan(
        setup.name,
        stage.method,
        memory.parameters(trained),
        memory.parameters(frozen),
        stage.steps,
        stage.batch.size,
        stage.batch.sequence_length,
        memory.micro_batches(setup)[0],
        memory.stage_memory(setup),
        *speed.seconds(round(operations / each), operations, kind, setup.machine),
        f", {stage.objective} with the source model" if learns_from_source(stage) else "",
        validations,
        stage.validation_sequences,
        memory.vocabulary_state(setup),
    )
