"""A model that is too deep to be unrolled says so."""

from dataclasses import replace

import jax
import pytest

from tests.training.toys import CONFIG, LLAMA, STAGE, train
from tokalign_jax.config import ComputeConfig
from tokalign_jax.models import transformer
from tokalign_jax.training import loop


@pytest.mark.parametrize(
    "layers, iterations", [(16, 1), (32, 1), (36, 1), (40, 1), (48, 1), (61, 2), (80, 2), (126, 3)]
)
def test_what_is_said_of_a_depth_on_gpus(layers, iterations, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    message = loop._looped_layers(ComputeConfig(remat="dots"), layers)
    assert (f"{layers} layers are a loop of {iterations} iterations" in message) == (iterations > 1)
    assert (f"compute.unroll={layers}" in message) == (iterations > 1)
    for compute in (ComputeConfig(unroll=4, remat="dots"), ComputeConfig(remat="layer")):
        assert not loop._looped_layers(compute, layers)


def test_a_stage_says_it_once(tmp_path, monkeypatch):
    monkeypatch.setattr(transformer, "_layers_per_iteration", lambda unroll, layers, remat: 2)
    model = replace(LLAMA, num_layers=4, layer_kinds=LLAMA.layer_kinds[:1] * 4)
    config = replace(CONFIG, compute=replace(CONFIG.compute, unroll=0))
    lines: list[str] = []
    train(tmp_path, replace(STAGE, steps=1), model, config, log=lines.append)
    assert sum("4 layers are a loop of 2 iterations" in line for line in lines) == 1
