"""Tiny models and corpora for the training tests. Run as a program, it trains one stage."""

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import pytest

from tokalign_jax import paths, sharding
from tokalign_jax.config import ComputeConfig, Config, LoraConfig, StageConfig
from tokalign_jax.models.config import LayerKind, ModelConfig
from tokalign_jax.models.rotary import Rope
from tokalign_jax.models.transformer import init_params
from tokalign_jax.training.loop import run_stage

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
    batch_size=4,
    per_device_batch=2,
    sequence_length=LENGTH,
    checkpoint_every=3,
    log_every=4,
    start_offset=0,
    lora=LoraConfig(rank=3, alpha=6.0, dropout=0.1),
)
CONFIG = Config(compute=ComputeConfig(dtype="float32", remat="dots", loss_chunk=10))


@dataclass
class ToyShards:
    tokens: np.ndarray


CACHE = tempfile.mkdtemp(prefix="tokalign_jax-test-")
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
QUICK = {
    "jax_compilation_cache_dir": CACHE,
    "jax_persistent_cache_min_compile_time_secs": 0.3,
    "jax_disable_most_optimizations": True,
}
DEFAULTS = {
    "jax_compilation_cache_dir": jax.config.jax_compilation_cache_dir,
    "jax_persistent_cache_min_compile_time_secs": jax.config.jax_persistent_cache_min_compile_time_secs,
    "jax_disable_most_optimizations": False,
}


@pytest.fixture(autouse=True)
def quick_compilation():
    """The training tests run few programs, each many times and in several processes, on next to no data."""
    for name, value in QUICK.items():
        jax.config.update(name, value)
    yield
    for name, value in DEFAULTS.items():
        jax.config.update(name, value)


def toy_shards(tokens: int = 4000, seed: int = 0) -> ToyShards:
    """A walk in which each token limits the next to a few: there is something to learn."""
    rng = np.random.default_rng(seed)
    steps = rng.integers(1, 4, tokens)
    return ToyShards((np.cumsum(steps) % VOCABULARY).astype(np.uint16))


def toy_params(model: ModelConfig = LLAMA, seed: int = 0) -> paths.Tree:
    return init_params(model, jax.random.key(seed), std=0.2)


def train(folder: Path, stage: StageConfig = STAGE, model: ModelConfig = LLAMA, config: Config = CONFIG, **given):
    """A stage of a tiny model, from `given` params, shards, previous_end, name or log, or the toy ones."""
    arguments = {"name": "stage", "params": None, "shards": None, "previous_end": 0, "log": lambda line: None} | given
    if arguments["params"] is None:
        arguments["params"] = toy_params(model)
    if arguments["shards"] is None:
        arguments["shards"] = toy_shards()
    result = run_stage(stage=stage, config=config, model_config=model, folder=folder, **arguments)
    return replace(result, params=sharding.unpadded(result.params, model.vocab_size))


def assert_same(first: paths.Tree, second: paths.Tree) -> None:
    """Bit for bit the same leaves."""
    first, second = paths.flatten(first), paths.flatten(second)
    assert first.keys() == second.keys()
    for path, leaf in first.items():
        assert leaf.dtype == second[path].dtype, path
        assert np.asarray(leaf).tobytes() == np.asarray(second[path]).tobytes(), path


def start_program(folder: Path, devices: int = 1, process: tuple[int, int, int] | None = None, **changes):
    """A process of its own that trains STAGE with `changes` and leaves `final.npz` in the folder.

    `process`, of several that train together: the port of the first, how many they are, which of them this is.
    """
    flags = f"--xla_force_host_platform_device_count={devices}"
    quick = {name.upper(): str(value) for name, value in QUICK.items()}
    environment = os.environ | quick | {"PYTHONPATH": str(Path(__file__).parents[1]), "XLA_FLAGS": flags}
    command = [sys.executable, __file__, str(folder), json.dumps(changes), *map(str, process or ())]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish_program(process: subprocess.Popen) -> str:
    """Waits for it to succeed; what it said."""
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


def load_program(folder: Path) -> dict[str, np.ndarray]:
    """The parameters that `run_program` left, by path."""
    return dict(np.load(folder / "final.npz"))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    if sys.argv[3:]:
        port, processes, index = map(int, sys.argv[3:])
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", processes, index)
    result = train(folder, replace(STAGE, **json.loads(sys.argv[2])), log=lambda line: print(line, flush=True))
    if jax.process_index() == 0:
        with (folder / "final.npz").open("wb") as file:
            np.savez(file, **paths.flatten(result.params))
