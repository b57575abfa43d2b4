"""Tiny models and corpora for the training tests, and processes that train one stage."""

import multiprocessing
import os
import resource
import signal
import sys
import threading
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tests.processes import become_host, free_port
from tokalign_jax.config import (
    BatchConfig,
    CheckpointConfig,
    ComputeConfig,
    Config,
    LoraConfig,
    MeshConfig,
    StageConfig,
)
from tokalign_jax.errors import UserError
from tokalign_jax.models.config import LayerKind, ModelConfig
from tokalign_jax.models.rotary import Rope
from tokalign_jax.models.transformer import init_params
from tokalign_jax.parallel import distributed, sharding
from tokalign_jax.text.boundaries import NONE
from tokalign_jax.training.batches import SourceText
from tokalign_jax.training.loop import load_trained, run_stage
from tokalign_jax.utils import paths, stopping

VOCABULARY, LENGTH = 61, 12

LLAMA = ModelConfig(
    model_type="llama",
    vocab_size=VOCABULARY,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=24,
    activation="silu",
    gated_mlp=True,
    norm="rms",
    norm_epsilon=1e-5,
    parallel_residual=False,
    attention_bias=False,
    attention_out_bias=False,
    mlp_bias=False,
    tie_word_embeddings=False,
    max_positions=32,
    layer_kinds=(LayerKind(Rope(4, 10000.0, None)),) * 2,
)
NEOX = replace(
    LLAMA,
    model_type="gpt_neox",
    num_kv_heads=4,
    activation="gelu",
    gated_mlp=False,
    norm="layer",
    parallel_residual=True,
    attention_bias=True,
    attention_out_bias=True,
    mlp_bias=True,
    layer_kinds=(LayerKind(Rope(2, 10000.0, None)),) * 2,
)
STAGE = StageConfig(
    method="full",
    steps=8,
    learning_rate=3e-3,
    warmup_fraction=0.25,
    checkpoints=CheckpointConfig(every=3),
    log_every=4,
    start_offset=0,
    lora=LoraConfig(rank=3, alpha=6.0, dropout=0.1),
    batch=BatchConfig(size=4, per_device=2, sequence_length=LENGTH),
)
CONFIG = Config(compute=ComputeConfig(dtype="float32", remat="dots", loss_chunk=10))


@dataclass
class ToyShards:
    tokens: np.ndarray
    opening: int | None = None
    unlearned: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))


def toy_shards(tokens: int = 4000, seed: int = 0) -> ToyShards:
    """A random walk over tokens, in which each token allows three successors, so that it can be
    learned.
    """
    rng = np.random.default_rng(seed)
    steps = rng.integers(1, 4, tokens)
    return ToyShards((np.cumsum(steps) % VOCABULARY).astype(np.uint16))


def source_text(vocabulary: int, tokens: int = 4000, seed: int = 1) -> SourceText:
    """Source tokens of the toy shards' text: one or two for each target token, and a shared
    boundary after three of four target tokens.
    """
    random = np.random.default_rng(seed)
    ends = np.cumsum(random.integers(1, 3, tokens)) - 1
    positions = np.where(random.random(tokens) < 0.75, ends, NONE)
    shards = toy_shards(int(ends[-1]) + 1, seed)
    return SourceText(replace(shards, tokens=shards.tokens % vocabulary), positions)


def toy_params(model: ModelConfig = LLAMA, seed: int = 0) -> paths.Tree:
    return jax.jit(lambda key: init_params(model, key, std=0.2))(jax.random.key(seed))


def train(
    folder: Path,
    stage: StageConfig = STAGE,
    model: ModelConfig = LLAMA,
    config: Config = CONFIG,
    **given,
):
    """Train a stage of a tiny model; `given` replaces params, shards, previous_end, name or log."""
    arguments = {
        "name": "stage",
        "params": None,
        "shards": None,
        "previous_end": 0,
        "log": lambda line: None,
    } | given
    if arguments["params"] is None:
        arguments["params"] = toy_params(model)
    if arguments["shards"] is None:
        arguments["shards"] = toy_shards()
    result = run_stage(stage=stage, config=config, model_config=model, folder=folder, **arguments)
    return replace(result, params=unpadded(result.params, model.vocab_size))


def assert_same(first: paths.Tree, second: paths.Tree) -> None:
    """Assert that two trees are equal bit for bit."""
    first, second = paths.flatten(first), paths.flatten(second)
    assert first.keys() == second.keys()
    for path, leaf in first.items():
        assert leaf.dtype == second[path].dtype, path
        assert np.asarray(leaf).tobytes() == np.asarray(second[path]).tobytes(), path


# --- Programs -----------------------------------------------------------------------------------

_FORKS = multiprocessing.get_context("forkserver")
# Importing JAX and all else takes longer than to train a toy.
_FORKS.set_forkserver_preload([__name__, "tensorboardX.event_file_writer"])

DELAY = 0.1
"""Seconds within which a program is killed after it logs the step of its fault."""


@dataclass(frozen=True)
class Program:
    """A process that trains STAGE with `changes` and writes `final.npz` into the folder."""

    folder: Path
    changes: dict[str, Any] = field(default_factory=dict)
    devices: int = 1
    mesh: tuple[int, int, int] = (0, 0, 0)
    process: tuple[int, int, int] = (0, 1, 0)
    """Port of the coordinator, number of processes, and index of this one."""
    own_host: bool = False
    """Give the process a boot id of its own, as on another host (`processes.become_host`)."""
    fault: str = ""
    """Fault once step `fault_step` is logged: `kill` (within `DELAY` seconds), `terminate` (SIGTERM),
    or `full` (no file may grow past 10 kB).
    """
    fault_step: int = 0

    @property
    def output(self) -> Path:
        return self.folder / f"output{self.process[2]}"

    def run(self) -> None:
        """Train in this process, and exit with the status of the command."""
        with self.output.open("w") as output:
            for stream in (sys.stdout, sys.stderr):
                os.dup2(output.fileno(), stream.fileno())
        jax.config.update("jax_num_cpu_devices", self.devices)
        distributed.PATIENCE, distributed.HEARTBEAT_TIMEOUT = 5.0, 3.0
        port, processes, index = self.process
        if self.own_host:
            become_host(index, self.folder)
        code = 0
        try:
            with distributed.running(f"localhost:{port}", processes, index), stopping.listening():
                self._train()
        except stopping.Stopped as stopped:
            code = stopping.EXIT_CODE
            print(stopped)
        except Exception as error:
            codes = {UserError: 2, distributed.ProcessLost: distributed.LOST}
            code = codes.get(type(error), 1)
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            )
            traceback.print_exc()
            if processes > 1:
                distributed.fail(str(error), code)
        if processes > 1:
            jax.distributed.shutdown()  # what JAX does when an ordinary program ends; a forked one ends without
        sys.exit(code)

    def _train(self) -> None:
        config = replace(CONFIG, mesh=MeshConfig(*self.mesh))
        stage = replace(STAGE, log_every=1, **self.changes)
        held_out = toy_shards(300, seed=7)
        params = train(self.folder, stage, config=config, log=self._log, held_out=held_out).params
        if distributed.is_first():
            with (self.folder / "final.npz").open("wb") as file:
                np.savez(file, **paths.flatten(params))

    def _log(self, line: str) -> None:
        print(line, flush=True)
        if not (self.fault and f"step {self.fault_step} of" in line):
            return
        if self.fault == "kill":
            delay = np.random.default_rng().random() * DELAY
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        elif self.fault == "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))


class Running:
    """A started program."""

    def __init__(self, program: Program):
        program.folder.mkdir(exist_ok=True)
        self._program, self._process = program, _FORKS.Process(target=program.run)
        self._process.start()

    def end(self, seconds: float = 240.0) -> tuple[int, str]:
        """Wait for the process; return its exit code (negative: a signal) and its output."""
        self._process.join(seconds)
        code = self._process.exitcode
        self._process.kill()
        output = self._program.output.read_text()
        assert code is not None, f"still running after {seconds} seconds: {output}"
        return code, output


def run_programs(*programs: Program) -> list[tuple[int, str]]:
    """Run programs at the same time; return the exit code and output of each."""
    return [running.end() for running in [Running(program) for program in programs]]


def finish(*programs: Program) -> str:
    """Run programs to success; return the output of the first."""
    ended = run_programs(*programs)
    for code, output in ended:
        assert code == 0, output
    return ended[0][1]


def together(program: Program, count: int = 2) -> list[Program]:
    """Copies of the program, one per process of a group."""
    port = free_port()
    return [replace(program, process=(port, count, index)) for index in range(count)]


def unpadded(params: paths.Tree, vocabulary: int = VOCABULARY) -> paths.Tree:
    """Parameters in host memory, without the rows that `sharding.place` added."""
    return paths.unflatten(
        {
            path: sharding.to_host(leaf)[: vocabulary if sharding.is_vocabulary(path) else None]
            for path, leaf in paths.flatten(params).items()
        }
    )


def final_params(
    folder: Path, stage: StageConfig, params: paths.Tree, model: ModelConfig = LLAMA
) -> paths.Tree:
    """Final parameters of a finished stage: its last checkpoint, and the frozen ones of the initial
    `params`.
    """
    trained = unpadded(load_trained(folder, stage, model, sharding.make_mesh()), model.vocab_size)
    return paths.unflatten(paths.flatten(params) | paths.flatten(trained))


def final_of(program: Program) -> dict[str, np.ndarray]:
    """The parameters that the program wrote, by path."""
    return dict(np.load(program.folder / "final.npz"))
