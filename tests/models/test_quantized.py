"""Frozen kernels in 8 and 4 bits against NumPy, and adapters that are trained on them."""

import itertools
from dataclasses import replace
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tests.models.test_float8 import HYBRID, MODELS, SPEC, loss_of, params_of
from tests.training.toys import STAGE, assert_same, train
from tokalign_jax.config import LoraConfig, config_from_dict, settings_of
from tokalign_jax.errors import UserError
from tokalign_jax.models import quantized
from tokalign_jax.parallel import sharding
from tokalign_jax.training import loop
from tokalign_jax.utils import paths

KIND = pytest.mark.parametrize("kind", quantized.KINDS)
MESH = sharding.make_mesh(devices=jax.devices()[:1])
MODEL = MODELS["llama"]


def reference(kernel, kind):
    """A quantized kernel [in, out] in float64, one block of one output after the other."""
    kernel = np.asarray(kernel, np.float64)
    block, result = np.gcd(64, len(kernel)), np.zeros_like(kernel)
    for start in range(0, len(kernel), block):
        for output in range(kernel.shape[1]):
            part = kernel[start : start + block, output]
            scale = np.abs(part).max() / (127 if kind == "int8" else 1)
            scale = float(np.float32(scale).astype(ml_dtypes.bfloat16))
            if not scale:
                continue
            levels = np.arange(-127, 128) if kind == "int8" else quantized.NF4_LEVELS.astype(float)
            nearest = np.abs(part[:, None] / scale - levels).argmin(1)
            result[start : start + block, output] = levels[nearest] * scale
    return result


@KIND
@pytest.mark.parametrize("inputs", [128, 64, 48, 16])
def test_values_are_the_nearest_codes_of_each_block(kind, inputs):
    kernel = np.random.default_rng(0).normal(size=(2, inputs, 24)).astype(np.float32)
    kernel[0, :16, 3] = 0
    kernel[1, 0, 5] = 40.0
    stored = quantized.quantize(jnp.asarray(kernel), kind)
    assert stored.shape == kernel.shape and stored.size == kernel.size and stored.dtype == kind
    expected = np.stack([reference(layer, kind) for layer in kernel])
    np.testing.assert_allclose(stored.astype(jnp.float32), expected, rtol=1e-6, atol=1e-7)
    error = np.abs(expected - kernel).max() / np.abs(kernel).max()
    assert 0 < error < (0.01 if kind == "int8" else 0.2)
    bits = 8 * stored.nbytes / kernel.size
    assert bits == (8 if kind == "int8" else 4) + 16 / np.gcd(64, inputs)
    np.testing.assert_array_equal(np.asarray(stored), stored.astype(jnp.float32))
    np.testing.assert_array_equal(stored[1].astype(jnp.float32), stored.astype(jnp.float32)[1])
    np.testing.assert_array_equal(
        stored.astype(jnp.bfloat16), stored.astype(jnp.float32).astype(jnp.bfloat16)
    )


def test_nf4_levels_are_quantiles_of_a_normal_distribution():
    """Seven equal steps of probability below zero, eight above, as published."""
    ppf = NormalDist().inv_cdf
    above = [ppf(p) for p in np.linspace(0.5, 0.9677083, 9)]
    below = [-ppf(p) for p in np.linspace(0.9677083, 0.5, 8)]
    levels = np.array(below[:-1] + above) / above[-1]
    np.testing.assert_allclose(quantized.NF4_LEVELS, levels, atol=1e-6)


def dequantized(params, kind):
    """The parameters with the values that their quantized kernels have."""
    leaves = paths.flatten(quantized.quantize_tree(params, kind, MESH))
    return paths.unflatten(
        {
            path: leaf.astype(jnp.float32) if isinstance(leaf, quantized.QuantizedKernel) else leaf
            for path, leaf in leaves.items()
        }
    )


@pytest.mark.parametrize(
    "name, unroll, policy, kind",
    [
        *itertools.product(["llama", "gpt_neox"], [1, 2], ["dots", "layer"], quantized.KINDS),
        ("hybrid", 1, "dots", "nf4"),
        ("hybrid", 3, "dots", "nf4"),
    ],
)
def test_adapters_have_the_gradients_of_dequantized_weights(name, unroll, policy, kind):
    model = {**MODELS, "hybrid": HYBRID}[name]
    trainable, frozen = paths.split(params_of(model, SPEC), lambda path: "lora" in path)
    loss = jax.jit(jax.value_and_grad(loss_of(model, SPEC, unroll=unroll, remat=policy)))
    stored = quantized.quantize_tree(frozen, kind, MESH)
    kinds = [type(leaf) for leaf in paths.flatten(stored).values()]
    assert kinds.count(quantized.QuantizedKernel) >= 6
    value, gradients = loss(trainable, stored)
    expected_value, expected = loss(trainable, dequantized(frozen, kind))
    assert float(value) == pytest.approx(float(expected_value), rel=1e-5)
    assert abs(float(value) - float(loss(trainable, frozen)[0])) > 1e-3 * abs(float(value))
    gradients, expected = paths.flatten(gradients), paths.flatten(expected)
    for path, leaf in expected.items():
        scale = float(jnp.abs(leaf).max())
        np.testing.assert_allclose(gradients[path], leaf, atol=1e-5 * scale, err_msg=path)


def test_pinned_kernels_have_the_same_values():
    params = params_of(MODEL)
    assert quantized.pinned(params, jnp.arange(3)) is params
    stored = quantized.quantize_tree(params, "nf4", MESH)
    program = jax.jit(quantized.pinned).lower(stored, jnp.arange(3))
    assert_same(quantized.pinned(stored, jnp.arange(3)), stored)
    assert "optimization_barrier" in program.as_text()


# --- A stage ------------------------------------------------------------------------------------


def stage_of(kind, **changes):
    return replace(STAGE, method="lora", lora=LoraConfig(3, 6.0, 0.1, kind), **changes)


@KIND
def test_a_stage_trains_resumes_exactly_and_returns_the_weights_it_was_given(kind, tmp_path):
    stage, lines = stage_of(kind, steps=6), []
    params = params_of(MODEL)
    whole = train(tmp_path / "whole", stage, MODEL, params=params, log=lines.append)
    assert any(f"of them in {kind}" in line for line in lines)
    given = paths.flatten(params)
    for path, leaf in paths.flatten(whole.params).items():
        if path.startswith("layers/") and "lora" not in path:
            np.testing.assert_array_equal(leaf, given[path], path)
    # The first half, then all of it; and from weights that are quantized already, as in a run.
    stored = quantized.quantize_tree(params, kind, MESH)
    for name, weights in (("raw", params), ("stored", stored)):
        first = replace(stage, checkpoints=replace(stage.checkpoints, every=3))
        with pytest.raises(RuntimeError, match="stopped"):
            train(tmp_path / name, first, MODEL, params=weights, log=stop_at(4))
        lines = []
        resumed = train(tmp_path / name, first, MODEL, params=weights, log=lines.append)
        assert any("resumed at step 3" in line for line in lines)
        trained = [loop.split(stage, tree)[0] for tree in (resumed.params, whole.params)]
        assert_same(*trained)
    plain = train(tmp_path / "plain", stage_of("dtype", steps=6), MODEL, params=params)
    assert 0 < abs(plain.history[-1]["loss"] - whole.history[-1]["loss"]) < 0.1
    with pytest.raises(UserError, match="other settings"):
        train(tmp_path / "whole", stage_of("dtype", steps=6), MODEL, params=params)


def stop_at(step):
    def log(line):
        if f"step {step} of" in line:
            raise RuntimeError("stopped")

    return log


def test_it_is_in_no_fingerprint_by_default():
    stage = config_from_dict({"stage2": {"method": "lora"}}).stage2
    assert "frozen" not in settings_of(stage)["lora"]
    changed = config_from_dict({"stage2": {"method": "lora", "lora": {"frozen": "nf4"}}}).stage2
    assert settings_of(changed)["lora"]["frozen"] == "nf4"
    assert loop.frozen_kind(stage) is None and loop.frozen_kind(changed) == "nf4"
    assert loop.frozen_kind(replace(changed, method="full")) is None


def test_a_mesh_that_would_split_blocks_of_experts_is_refused():
    path = "layers/mlp/experts/down_proj/kernel"
    mesh: Any = jax.sharding.AbstractMesh((1, 1, 2), sharding.AXES)
    quantized.check({path: jax.ShapeDtypeStruct((2, 4, 128, 64), "float32")}, mesh)
    with pytest.raises(UserError, match=r"mesh\.tensor=1"):
        quantized.check({path: jax.ShapeDtypeStruct((2, 4, 64, 64), "float32")}, mesh)
