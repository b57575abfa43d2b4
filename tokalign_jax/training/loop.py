"""Runs a training stage: everything around the pure step that touches files, devices or the
clock.
"""

import dataclasses
import functools
import hashlib
import json
import time
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tokalign_jax.config import (
    ComputeConfig,
    Config,
    StageConfig,
    products_of,
    remat_of,
    settings_of,
)
from tokalign_jax.errors import UserError
from tokalign_jax.models import float8, quantized
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.lora import LoraSpec, add_lora
from tokalign_jax.models.transformer import MAX_UNROLLED, abstract_params, num_iterations
from tokalign_jax.parallel import distributed, sharding
from tokalign_jax.training import metrics, validation
from tokalign_jax.training.batches import (
    Sequences,
    Shards,
    TokenSource,
    make_stream,
    resolve_offset,
)
from tokalign_jax.training.checkpoints import (
    Checkpoints,
    Damaged,
    Position,
    check_resumable,
    check_state_format,
    naming_a_full_disk,
    position_of,
)
from tokalign_jax.training.optimizer import (
    FROZEN,
    make_optimizer,
    moment_shapes,
    rules_for,
    schedule_of,
    state_format,
)
from tokalign_jax.training.profiling import Profiler
from tokalign_jax.training.step import (
    NEXT_TOKEN,
    Batch,
    Objective,
    Step,
    TrainState,
    init_state,
    make_train_step,
)
from tokalign_jax.training.validation import Validations, Validator
from tokalign_jax.utils import paths, stopping
from tokalign_jax.utils.progress import Log, duration, quantity

_AHEAD = 2
"""Steps dispatched before the metrics of the first are read, and batches prefetched to the
device."""

_COMPARED_APART = ("batch_size", "start_offset", "teacher")
"""Settings of a stage (`config.settings_of`) that are in no checkpoint's fingerprint: of these the
global batch, the resolved offset and the teacher's files are compared by themselves."""


@dataclass(frozen=True)
class StageResult:
    """A finished stage."""

    params: paths.Tree
    """All parameters after the step that `StageConfig.result` selects: trained ones in float32
    (adapters beside their kernels), the others as given."""
    stream_end: int
    """Position in the shuffled stream (tokens) at which it stopped: `previous_end` of the next
    stage."""
    tokens: int
    """Tokens trained on."""
    history: list[metrics.Record]
    """One record a step, as in `metrics.jsonl`."""


def micro_batch(name: str, stage: StageConfig, mesh: Mesh) -> int:
    """Sequences of a micro-batch over all devices: the largest divisor of a step's sequences that
    `batch.per_device` allows.

    Raises:
      UserError: a step's sequences do not divide among the devices.
    """
    if isinstance(stage.batch.per_device, str):
        raise ValueError(
            f"batch.per_device={stage.batch.per_device} is not resolved: see `planning.resolve`"
        )
    lets = [n for n in held_at_once(name, stage, mesh) if n <= stage.batch.per_device]
    return sharding.sequences_at_once(mesh) * max(lets)


def held_at_once(name: str, stage: StageConfig, mesh: Mesh) -> list[int]:
    """Possible micro-batch sizes of one device, in increasing order: those that divide its share of
    a step.

    Raises:
      UserError: a step's sequences do not divide among the devices.
    """
    devices = sharding.sequences_at_once(mesh)
    if stage.batch.size % devices:
        raise UserError(
            f"{name}.batch.size={stage.batch.size} is not divisible by the {devices} data-parallel"
            f" devices (mesh.data * mesh.fsdp): set --config.{name}.batch.size to a multiple of"
            f" {devices}, or use fewer devices"
        )
    each = stage.batch.size // devices
    return [n for n in range(1, each + 1) if each % n == 0]


def lora_spec(stage: StageConfig) -> LoraSpec | None:
    """The adapters that the stage trains; None unless its method is `lora`."""
    return (
        LoraSpec(stage.lora.rank, stage.lora.alpha, stage.lora.dropout)
        if stage.method == "lora"
        else None
    )


def frozen_kind(stage: StageConfig) -> quantized.Kind | None:
    """The format of a stage's frozen projections; None: they are not quantized."""
    if stage.method != "lora" or stage.lora.frozen == "dtype":
        return None
    return stage.lora.frozen


def trains(stage: StageConfig, path: str) -> bool:
    """Return True if the stage changes the parameter of this path."""
    return paths.label(rules_for(stage.method), path) != FROZEN


def state_bytes(stage: StageConfig, config: ModelConfig) -> int:
    """Bytes of parameters, gradients and optimizer state: 8 for each trained parameter (float32:
    itself and its gradient) and Adam's two moments, 2 for each frozen one or those of its format.
    """
    trained, frozen = split(stage, abstract_params(config, lora_spec(stage)))
    if kind := frozen_kind(stage):
        frozen = quantized.abstract_tree(frozen, kind)
    moments = jax.tree.leaves(moment_shapes(stage, trained))
    return (
        8 * sum(leaf.size for leaf in jax.tree.leaves(trained))
        + sum(leaf.size * leaf.dtype.itemsize for leaf in moments)
        + sum(
            leaf.nbytes if isinstance(leaf, quantized.QuantizedKernel) else 2 * leaf.size
            for leaf in paths.flatten(frozen).values()
        )
    )


def plan_stage(
    name: str,
    stage: StageConfig,
    config: Config,
    model_config: ModelConfig,
    shards: Shards,
    previous_end: int,
) -> tuple[int, int]:
    """(first sequence, end in tokens) of what a stage reads in the shuffled stream.

    Args:
      previous_end: the end of the stage before; 0 for the first stage. Each sequence length has its
        own order, so from a stage with another length only the amount read carries over, rounded up
        to a whole sequence.

    Raises:
      UserError: a sequence longer than the model's positions, a corpus shorter than a sequence, an
        offset past the end of the stream, or a stream that ends too early.
    """
    length = stage.batch.sequence_length
    if not stage.steps:
        return 0, previous_end
    if length > model_config.max_positions:
        raise UserError(
            f"{name}.batch.sequence_length is {length:,} tokens, but the model has"
            f" {model_config.max_positions:,} positions: set"
            f" --config.{name}.batch.sequence_length={model_config.max_positions} or less"
        )
    sequences = len(TokenSource(shards, length))
    if not sequences:
        raise UserError(
            f"the corpus has {len(shards.tokens):,} tokens, fewer than the {length + 1:,} of one"
            f" training sequence: use a larger corpus or a shorter {name}.batch.sequence_length"
        )
    start = resolve_offset(
        stage.start_offset, sequences, config.data.epochs, -(-previous_end // length)
    )
    available, end = sequences * config.data.epochs, start + stage.steps * stage.batch.size
    if available and end > available:
        raise UserError(
            f"{name} reads sequences {start:,} to {end:,} ({stage.steps:,} steps of"
            f" {stage.batch.size:,}), but the stream ends at {available:,} ({config.data.epochs}"
            f" passes over {sequences:,}): set data.epochs to {-(-end // sequences)} or more (0: as"
            " many as needed), or take fewer steps"
        )
    return start, end * length


def run_stage(
    name: str,
    stage: StageConfig,
    config: Config,
    model_config: ModelConfig,
    params: paths.Tree,
    shards: Shards,
    folder: Path,
    previous_end: int,
    log: Log,
    mesh: Mesh | None = None,
    objective: Objective = NEXT_TOKEN,
    held_out: Shards | None = None,
) -> StageResult:
    """Trains a stage, resuming from the newest checkpoint in its folder; a finished stage is only
    loaded.

    A run that was killed and resumed ends with the same bits as an uninterrupted one.

    Args:
      name: of the stage; also seeds its random numbers.
      params: all parameters, without adapters; never changed. Leaves may be on the host. Frozen
        leaves should be in the compute type already, or they are copied. Trainable leaves are
        copied; drop your reference to free their float32 buffers.
      shards: the training text in tokens of the target tokenizer.
      folder: of this stage alone; receives `metrics.jsonl`, `tensorboard/` and `checkpoints/`.
      previous_end: position in the shuffled stream (tokens) at which the stage before stopped.
      log: receives progress lines.
      mesh: of the devices to train on; None: all (`sharding.make_mesh`).
      objective: what the stage minimises.
      held_out: text for the validations of a stage that has any, in tokens of the target tokenizer.

    Raises:
      UserError: invalid input (`plan_stage`, `micro_batch`), a checkpoint of another run, several
        consecutive steps without a finite loss and gradient, or a best checkpoint that cannot be
        told because earlier steps were not validated.
    """
    start, end = plan_stage(name, stage, config, model_config, shards, previous_end)
    if not stage.steps:
        return StageResult(params, end, 0, [])
    mesh = mesh or sharding.make_mesh(config.mesh)
    sequences = _held_out_sequences(name, stage, held_out)
    adapter_key, dropout_key = jax.random.split(_stage_key(name, config.seed))
    params = sharding.place(_with_adapters(stage, params, adapter_key), mesh)
    trainable, frozen = split(stage, params)
    kind = frozen_kind(stage)
    held = quantized.quantize_tree(frozen, kind, mesh) if kind else frozen
    fingerprint = _fingerprint(
        stage, config, model_config, paths.merge(trainable, held), shards, start, objective
    )

    program = _program(
        objective.make_loss,
        model_config,
        config.compute,
        _as_compiled(stage),
        tuple(paths.flatten(trainable)),
        mesh,
    )
    make_state, like = program.state_maker(trainable)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(like))
    with (
        naming_a_full_disk(folder, size),
        Checkpoints(Path(folder) / "checkpoints", stage.checkpoints.keep) as checkpoints,
    ):
        done, position, state = _restore(name, stage, fingerprint, checkpoints, like, log)
        validations = _resumed_validations(name, stage, done, position, Path(folder))
        state = make_state(trainable) if state is None else state
        # The state holds copies of what trains; the originals are freed unless the caller holds
        # them.
        del params, trainable
        first = distributed.is_first()
        with (
            metrics.Recorder(
                name, Path(folder), stage.steps, done, stage.log_every, log, writes=first
            ) as recorder,
            Profiler(Path(folder) / "profile", stage.profile_steps) as profiler,
        ):
            if done < stage.steps:
                source = objective.sequences(shards, stage.batch.sequence_length)
                feed = _Feed(
                    _stream(stage, config, source, start, micro_batch(name, stage, mesh), mesh),
                    position,
                    mesh,
                )
                cast = _cast(held, jnp.dtype(config.compute.dtype))
                validator = None
                if sequences is not None and validations is not None:
                    batches = validation.batched(sequences, micro_batch(name, stage, mesh), mesh)
                    validator = Validator(
                        functools.partial(program.measure, frozen=cast, batches=batches),
                        len(sequences),
                        validations,
                    )
                run = _Run(
                    name, stage, start, fingerprint, checkpoints, recorder, log, validator, profiler
                )
                run.announce(state, held)
                if looped := _looped_layers(config.compute, model_config.num_layers):
                    log(f"{name}: {looped}")
                if config.compute.matmul == "float8":
                    leaves = paths.flatten(abstract_params(model_config))
                    for line in float8.messages(leaves, mesh.devices.flat[0]):
                        log(f"{name}: {line}")
                inputs = cast if objective.beside is None else (cast, objective.beside)
                state = run(program.step, state, inputs, feed, dropout_key)
                validations = validator.record if validator else None
        trained = _selected(name, stage, state.params, validations, checkpoints, like, Path(folder))
    tokens = stage.steps * stage.batch.size * stage.batch.sequence_length
    return StageResult(paths.merge(trained, frozen), end, tokens, recorder.history)


def _held_out_sequences(
    name: str, stage: StageConfig, held_out: Shards | None
) -> np.ndarray | None:
    """The sequences of a stage's validations; None if it has none."""
    if not stage.validation_every:
        return None
    if held_out is None:
        raise ValueError(f"{name} validates but has no held-out text: see `run_stage`")
    return validation.held_out_sequences(
        held_out, stage.batch.sequence_length, stage.validation_sequences
    )


def _resumed_validations(
    name: str, stage: StageConfig, done: int, position: Position | None, folder: Path
) -> Validations | None:
    """The record with which a stage goes on; None if it does not validate.

    A record that was made with other settings, or begun late, is not complete: the best of it need
    not be the best of the stage.

    Raises:
      UserError: the result of the stage is its best checkpoint, and the record is not complete.
    """
    if not stage.validation_every:
        return None
    empty = Validations.of_stage(stage)
    record = position.validations if position else empty
    if record is not None and record.covers(stage, done):
        return record
    if stage.result == "best":
        raise UserError(_no_best_message(name, stage, folder))
    same = record is not None and dataclasses.replace(record, losses=()) == empty
    return record if same else empty


def _no_best_message(name: str, stage: StageConfig, folder: Path) -> str:
    return (
        f"{name}.result is 'best', but the steps of {name} so far were not all validated every"
        f" {stage.validation_every} steps on {stage.validation_sequences} sequences, or the best"
        f" checkpoint is gone: set --config.{name}.result=last, or the settings that they were"
        f" validated with, or remove '{folder}' to train the stage anew"
    )


def _selected(
    name: str,
    stage: StageConfig,
    last: paths.Tree,
    validations: Validations | None,
    checkpoints: Checkpoints,
    like: TrainState,
    folder: Path,
) -> paths.Tree:
    """The trained parameters that are the result of a stage, given those after its last step."""
    best = validations.best if validations and stage.result == "best" else stage.steps
    if best == stage.steps:
        return last
    if best is None or not checkpoints.path(best).is_dir():
        raise UserError(_no_best_message(name, stage, folder))
    checkpoints.wait()
    return _intact_params(checkpoints, best, like.params)


def _intact_params(checkpoints: Checkpoints, step: int, like: paths.Tree) -> paths.Tree:
    """The parameters of a checkpoint.

    Raises:
      Stopped: the checkpoint is damaged; it is set aside.
    """
    try:
        return checkpoints.restore_params(step, like)
    except Damaged as damage:
        aside = checkpoints.set_aside(step)
        raise stopping.Stopped(
            f"{damage}; it was renamed to '{aside.name}'; run the command again to repeat the"
            " stage's last steps from the checkpoint before"
        ) from damage


def load_trained(
    folder: Path, stage: StageConfig, model: ModelConfig, mesh: Mesh
) -> dict[str, jax.Array]:
    """The parameters that a finished stage trained, adapters included: float32, by path.

    They are those of the checkpoint that `StageConfig.result` selects.

    Args:
      folder: of the stage.
      model: the model that it trained.
      mesh: of the devices that receive the arrays, sharded as `sharding.place` does.

    Raises:
      UserError: the folder has no checkpoint of the stage's last step, or none that is known to be
        its best.
      Stopped: that checkpoint is damaged. It is set aside, so that the stage no longer counts as
        finished (`is_finished`).
    """
    if not stage.steps:
        return {}
    like, _ = split(stage, abstract_params(model, lora_spec(stage)))
    like = paths.unflatten(
        {path: _abstract(path, leaf.shape, mesh) for path, leaf in paths.flatten(like).items()}
    )
    with Checkpoints(Path(folder) / "checkpoints", stage.checkpoints.keep) as checkpoints:
        if checkpoints.newest() != stage.steps:
            raise UserError(
                f"'{folder}' has no checkpoint of step {stage.steps}, the stage's last (the newest"
                f" is {checkpoints.newest() or 'none'}): run the stage to its end first"
            )
        step = _result_step(folder, stage)
        if step is None:
            raise UserError(_no_best_message("the stage", stage, Path(folder)))
        return paths.flatten(_intact_params(checkpoints, step, like))


def _abstract(path: str, shape: tuple[int, ...], mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Shape and sharding of a float32 parameter on the mesh."""
    shape = sharding.padded_shape(path, shape, mesh)
    return jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=sharding.sharding_of(path, shape, mesh)
    )


def is_finished(folder: Path, stage: StageConfig) -> bool:
    """Check that the stage has taken its last step and that the checkpoint of its result exists.

    `load_trained` detects a damaged one.
    """
    return _result_step(folder, stage) is not None


def _result_step(folder: Path, stage: StageConfig) -> int | None:
    """The step of the checkpoint that is the result of a finished stage; None: there is none."""
    checkpoints = Path(folder) / "checkpoints"
    step: int | None = stage.steps
    if stage.result == "best":
        position = position_of(checkpoints / str(stage.steps))
        record = position.validations if position else None
        step = record.best if record and record.covers(stage, stage.steps) else None
    exists = (checkpoints / str(stage.steps)).is_dir() and (checkpoints / str(step)).is_dir()
    return step if exists else None


def _restore(
    name: str,
    stage: StageConfig,
    fingerprint: str,
    checkpoints: Checkpoints,
    like: TrainState,
    log: Log,
) -> tuple[int, Position | None, TrainState | None]:
    """(step, data position, state) of the newest intact checkpoint; (0, None, None) if there is
    none.

    Damaged checkpoints are set aside with a warning.
    """
    while done := checkpoints.newest():
        try:
            position = checkpoints.position(done)
            check_state_format(
                position, name, state_format(stage.optimizer), checkpoints.path(done)
            )
            check_resumable(position, stage.batch.size, fingerprint, checkpoints.path(done))
            state = checkpoints.restore(done, like)
        except Damaged as damage:
            log(
                f"{name}: warning: {damage}; it was renamed to '{checkpoints.set_aside(done).name}'"
            )
            if not checkpoints.newest():
                log(f"{name}: warning: no intact checkpoint is left; the stage starts over")
        else:
            log(
                f"{name}: {'finished' if done == stage.steps else 'resumed'} at step {done} of"
                f" {stage.steps}"
            )
            return done, position, state
    return 0, None, None


def _described(frozen: paths.Tree) -> str:
    """The number of frozen parameters, and the bytes of those that are quantized."""
    leaves = paths.flatten(frozen).values()
    count = quantity(sum(leaf.size for leaf in leaves))
    kernels = [leaf for leaf in leaves if isinstance(leaf, quantized.QuantizedKernel)]
    if not kernels:
        return count
    held, size = sum(leaf.nbytes for leaf in kernels), sum(leaf.size for leaf in kernels)
    return f"{count} ({quantity(size)} of them in {kernels[0].kind}, {held / 1e9:.2f} GB)"


def _looped_layers(compute: ComputeConfig, layers: int) -> str:
    """A message where a model is too deep to be unrolled by default; empty where it is not."""
    remat = remat_of(compute)
    iterations = num_iterations(compute.unroll, layers, remat)
    if compute.unroll or not 1 < iterations < layers:
        return ""
    return (
        f"{layers} layers are a loop of {iterations} iterations, since up to {MAX_UNROLLED} are"
        f" unrolled by default; --config.compute.unroll={layers} takes longer to compile and may be"
        " faster"
    )


class _Run:
    """The steps of a stage.

    The host runs ahead of the device: it dispatches steps asynchronously and reads metrics a few
    steps late. It catches up before each checkpoint, so that no unchecked state is saved. On a
    request to stop it finishes the current step and checkpoints.
    """

    def __init__(
        self,
        name: str,
        stage: StageConfig,
        start: int,
        fingerprint: str,
        checkpoints: Checkpoints,
        recorder: metrics.Recorder,
        log: Log,
        validator: Validator | None,
        profiler: Profiler,
    ):
        self.name, self.stage, self.start, self.fingerprint = name, stage, start, fingerprint
        self.schedule = schedule_of(stage)
        self.checkpoints, self.recorder, self.log = checkpoints, recorder, log
        self.pending: deque[Any] = deque()
        self.validator, self.profiler = validator, profiler

    def __call__(
        self, train_step: Step, state: TrainState, frozen: Any, feed: "_Feed", key: jax.Array
    ) -> TrainState:
        done = self.recorder.step
        for step in range(done + 1, self.stage.steps + 1):
            if self.profiler.starts(step):
                self._catch_up(0)
                self.profiler.start()
            compiling = time.monotonic()
            state, values = train_step(state, frozen, feed.take(), key, self.schedule)
            if step == done + 1:
                # The first call returns after compilation, before the step is done.
                self.log(f"{self.name}: compiled in {duration(time.monotonic() - compiling)}")
                self.recorder.start_clock()
            jax.tree.map(lambda value: value.copy_to_host_async(), values)
            self.pending.append(values)
            if self.profiler.ends(step):
                jax.block_until_ready((state, values))
                self.profiler.stop()
                self.log(f"{self.name}: trace written to '{self.profiler.folder}'")
            stop = step < self.stage.steps and stopping.requested()
            due = stop or step % self.stage.checkpoints.every == 0 or step == self.stage.steps
            if self.validator and validation.is_due(self.stage, step):
                due |= self._validate(self.validator, step, state)
            self._catch_up(0 if due else _AHEAD)
            if due:
                self._save(step, state, feed)
            if stop:
                self._stop(step)
        return state

    def announce(self, state: TrainState, frozen: Any) -> None:
        def count(tree: Any) -> str:
            return quantity(sum(leaf.size for leaf in jax.tree.leaves(tree)))

        batch, length, devices = (
            self.stage.batch.size,
            self.stage.batch.sequence_length,
            state.step.sharding.device_set,
        )
        self.log(
            f"{self.name}: {self.stage.method}: {count(state.params)} parameters train,"
            f" {_described(frozen)} are frozen; {self.stage.steps:,} steps of {batch:,} x"
            f" {length:,} = {quantity(batch * length)} tokens on {len(devices)}"
            f" {jax.devices()[0].platform} device{'s' if len(devices) > 1 else ''}"
        )

    def _catch_up(self, ahead: int) -> None:
        """Records all but the newest `ahead` steps."""
        while len(self.pending) > ahead:
            self._record(jax.device_get(self.pending.popleft()))

    def _record(self, values: dict[str, Any], validated: metrics.Validation | None = None) -> None:
        self.recorder.add(values, validated)
        if values["skipped_in_a_row"] < self.stage.max_skipped_in_a_row:
            return
        self.recorder.flush()
        newest = self.checkpoints.newest()
        good = (
            f"the last good checkpoint is '{self.checkpoints.path(newest)}'"
            if newest
            else "no checkpoint yet"
        )
        raise UserError(
            f"{self.name} stopped: {values['skipped_in_a_row']} steps in a row, the last one step"
            f" {self.recorder.step}, had a loss or gradient that is not finite ({good}): lower"
            f" {self.name}.learning_rate, or set compute.dtype=float32, and look at the loss in"
            " metrics.jsonl"
        )

    def _validate(self, validator: Validator, step: int, state: TrainState) -> bool:
        """Validate after the newest step and record both; whether it is the best so far."""
        self._catch_up(1)
        values = jax.device_get(self.pending.popleft())
        validated = validator(step, state.params)
        self._record(values, validated)
        return validated.best == step

    def _save(self, step: int, state: TrainState, feed: "_Feed") -> None:
        # Flush metrics before the checkpoint, so that a resumed run misses no line.
        self.recorder.flush()
        batch = self.stage.batch.size
        read = self.start + step * batch
        validations = self.validator.record if self.validator else None
        position = Position(
            feed.position,
            read,
            batch,
            self.fingerprint,
            validations,
            state_format(self.stage.optimizer),
        )
        self.checkpoints.save(step, state, position)

    def _stop(self, step: int) -> NoReturn:
        self.checkpoints.wait()
        where = f"at step {step} of {self.stage.steps}"
        self.log(f"{self.name}: stopped {where}, saved as '{self.checkpoints.path(step)}'")
        raise stopping.Stopped(f"stop requested: {self.name} is saved {where}")


class _Feed:
    """Prefetches batches to the device; `position` is the stream's after the last batch taken."""

    def __init__(self, stream: grain.DatasetIterator, position: Position | None, mesh: Mesh):
        self._stream, self._mesh = stream, mesh
        if position:
            stream.set_state(position.stream)
        self.position = stream.get_state()
        self._ready: deque[tuple[Batch, dict[str, Any]]] = deque()

    def take(self) -> Batch:
        while len(self._ready) <= _AHEAD and (batch := next(self._stream, None)) is not None:
            placed = jax.tree.map(lambda x: sharding.global_batch(x, self._mesh), batch)
            self._ready.append((placed, self._stream.get_state()))
        batch, self.position = self._ready.popleft()
        return batch


def _stream(
    stage: StageConfig, config: Config, source: Sequences, start: int, micro_batch: int, mesh: Mesh
) -> grain.DatasetIterator:
    host, hosts = sharding.reader(mesh)
    return make_stream(
        source,
        seed=config.seed,
        epochs=config.data.epochs,
        offset=start,
        accumulation=stage.batch.size // micro_batch,
        micro_batch=micro_batch,
        host=host,
        hosts=hosts,
    )


@dataclass(frozen=True)
class _Program:
    """The compiled program of a stage."""

    step: Step
    optimizer: Any
    measure: validation.Measure
    mesh: Mesh

    def state_maker(
        self, trainable: paths.Tree
    ) -> tuple[Callable[[paths.Tree], TrainState], TrainState]:
        """(function that makes the initial state of trainable leaves, its shapes and shardings).

        The state holds copies of the caller's arrays, since the step donates its input buffers.
        """

        def make(trainable: paths.Tree) -> TrainState:
            copies = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), trainable)
            return init_state(copies, self.optimizer)

        shapes = jax.eval_shape(make, trainable)
        places = sharding.shardings(shapes, self.mesh)
        like = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
        )
        return jax.jit(make, out_shardings=places), like


@functools.lru_cache(maxsize=8)
def _program(
    make_loss: Any,
    model: ModelConfig,
    compute: ComputeConfig,
    stage: StageConfig,
    trained: tuple[str, ...],
    mesh: Mesh,
) -> _Program:
    """Cached, so that stages which differ only in inputs of the step, as in a sweep over rates,
    share one compiled program.
    """
    labels = paths.label_tree(rules_for(stage.method), paths.unflatten(dict.fromkeys(trained, 0)))
    optimizer = make_optimizer(stage, labels, model.vocab_size)
    lora = lora_spec(stage)
    step = make_train_step(
        make_loss(model, compute, lora),
        optimizer,
        jnp.dtype(compute.dtype),
        mesh,
        stage.optimizer.accumulate_in_place,
    )
    return _Program(step, optimizer, validation.make_measure(model, compute, lora, mesh), mesh)


_INPUTS_OF_A_STEP = (
    "steps",
    "learning_rate",
    "embedding_learning_rate",
    "warmup_fraction",
)
"""Stage fields that are inputs of the compiled step, beside the shapes of its batch."""


def _as_compiled(stage: StageConfig) -> StageConfig:
    """Return the stage with what is not compiled into its step as it is by default."""
    without = {*_COMPARED_APART, *_INPUTS_OF_A_STEP, "batch", "checkpoints"}
    without |= {f.name for f in dataclasses.fields(stage) if not f.metadata.get("effect", True)}
    plain = type(stage)()
    names = [f.name for f in dataclasses.fields(stage) if f.name in without]
    return dataclasses.replace(stage, **{name: getattr(plain, name) for name in names})


def _stage_key(name: str, seed: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def _with_adapters(stage: StageConfig, params: paths.Tree, key: jax.Array) -> paths.Tree:
    spec = lora_spec(stage)
    return add_lora(params, spec, key) if spec else params


def split(stage: StageConfig, params: paths.Tree) -> tuple[paths.Tree, paths.Tree]:
    """(trainable, frozen) parameters of a stage."""
    return paths.split(params, lambda path: trains(stage, path))


def _cast(tree: paths.Tree, dtype: Any) -> paths.Tree:
    """Casts all leaves but quantized ones."""
    return paths.unflatten(
        {
            path: leaf if isinstance(leaf, quantized.QuantizedKernel) else leaf.astype(dtype)
            for path, leaf in paths.flatten(tree).items()
        }
    )


def _fingerprint(
    stage: StageConfig,
    config: Config,
    model_config: ModelConfig,
    params: paths.Tree,
    shards: Shards,
    start: int,
    objective: Objective,
) -> str:
    """A hash of everything that changes what a step computes, by which checkpoints of another run
    are recognised.
    """

    def shape(path: str, leaf: Any) -> list[int]:
        """The shape on one device, since padding rows depend on the mesh."""
        rows = model_config.vocab_size if sharding.is_vocabulary(path) else leaf.shape[0]
        return list(sharding.padded_shape(path, (rows, *leaf.shape[1:])))

    facts = {
        "stage": {k: v for k, v in settings_of(stage).items() if k not in _COMPARED_APART},
        "seed": config.seed,
        **products_of(config.compute),
        "model": dataclasses.asdict(model_config),
        "params": {
            path: [shape(path, leaf), str(leaf.dtype)]
            for path, leaf in paths.flatten(params).items()
        },
        "tokens": len(shards.tokens),
        "start": start,
        "objective": dict(objective.facts),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
