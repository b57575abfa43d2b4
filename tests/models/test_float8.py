"""Float8 products against NumPy's float64, and the models that are made of them."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tests.training.toys import CONFIG, LENGTH, LLAMA, NEOX, STAGE, VOCABULARY, train
from tokalign_jax.errors import UserError
from tokalign_jax.models import float8
from tokalign_jax.models.config import Convolution, DeltaRule, Experts
from tokalign_jax.models.lora import LoraSpec, add_lora
from tokalign_jax.models.transformer import forward, init_params
from tokalign_jax.utils import paths

E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
MODELS = {"llama": replace(LLAMA, **WIDE), "gpt_neox": replace(NEOX, **WIDE)}
SPEC = LoraSpec(rank=3, alpha=6.0, dropout=0.0)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, VOCABULARY, (2, LENGTH)), jnp.int32)


def quantized(x, dtype):
    """`x` in float64 after rounding to a float8 type with the largest power of two that fits."""
    x = np.asarray(x, np.float64)
    scale = 2.0 ** np.floor(np.log2(float(ml_dtypes.finfo(dtype).max) / np.abs(x).max()))
    return (x * scale).astype(dtype).astype(np.float64) / scale


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spread", [1.0, 6.0], ids=["narrow", "past the smallest numbers"])
def test_values_and_gradients_are_those_of_quantized_operands(dtype, spread):
    random = np.random.default_rng(0)

    def sample(*shape):
        values = random.normal(size=shape) * np.exp(spread * random.normal(size=shape))
        return jnp.asarray(values, dtype)

    x, kernel, gradient = sample(3, 20, 64), sample(64, 48), sample(3, 20, 48)
    y, vjp = jax.vjp(jax.jit(float8.product), x, kernel)
    found = y, *vjp(gradient)
    x8, kernel8, gradient8 = quantized(x, E4M3), quantized(kernel, E4M3), quantized(gradient, E5M2)
    expected = (
        np.einsum("bti,io->bto", x8, kernel8),
        np.einsum("bto,io->bti", gradient8, kernel8),
        np.einsum("bti,bto->io", x8, gradient8),
    )
    terms = (
        np.einsum("bti,io->bto", np.abs(x8), np.abs(kernel8)),
        np.einsum("bto,io->bti", np.abs(gradient8), np.abs(kernel8)),
        np.einsum("bti,bto->io", np.abs(x8), np.abs(gradient8)),
    )
    for one, other, size in zip(found, expected, terms):
        assert one.dtype == jnp.dtype(dtype)
        rounding = (2.0**-8 if dtype == "bfloat16" else 0) * np.abs(other) + 1e-5 * size
        assert (np.abs(np.asarray(one, np.float64) - other) <= rounding).all()
    # Without quantization the values are others.
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    assert np.abs(exact - expected[0]).max() > 1e-3 * np.abs(exact).max()


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])
def test_a_scale_is_the_largest_power_of_two_that_fits(dtype):
    most = float(ml_dtypes.finfo(dtype).max)
    for largest in (most, np.nextafter(np.float32(most), 1e9), 1.0, 1.75, 1.76, 3e-9, 2e7):
        scale = float(float8.scale(jnp.array([largest / 3, -largest], jnp.float32), dtype))
        assert np.log2(scale) == np.round(np.log2(scale))
        assert largest * scale <= most < 2 * largest * scale


def test_zeros_stay_zeros_and_what_is_not_finite_stays_so():
    kernel = jnp.ones((16, 16))
    assert (float8.product(jnp.zeros((2, 16)), kernel) == 0).all()
    for broken in (jnp.nan, jnp.inf):
        assert not jnp.isfinite(float8.product(jnp.array([[broken] * 16]), kernel)).any()
        _, vjp = jax.vjp(float8.product, jnp.ones((2, 16)), kernel)
        assert not jnp.isfinite(vjp(jnp.full((2, 16), broken))[1]).any()


@pytest.mark.parametrize("shape", [(64, 24), (24, 64)])
def test_other_sizes_are_multiplied_as_usual(shape):
    x, kernel = (
        jax.random.normal(jax.random.key(i), s) for i, s in enumerate(((5, shape[0]), shape))
    )
    np.testing.assert_array_equal(float8.product(x, kernel), x @ kernel)


# --- Models -------------------------------------------------------------------------------------


def loss_of(model, lora=None, **options):
    weights = jax.random.normal(jax.random.key(7), (2, LENGTH, model.hidden_size))

    def loss(trainable, frozen):
        params = paths.merge(trainable, frozen)
        return (forward(model, params, TOKENS, lora=lora, **options) * weights).sum()

    return loss


def params_of(model, lora=None):
    params = jax.jit(lambda key: init_params(model, key, std=0.1))(jax.random.key(0))
    if lora is None:
        return params
    leaves = paths.flatten(add_lora(params, lora, jax.random.key(2)))
    for i, path in enumerate(leaves):
        if path.endswith("lora_b"):
            leaves[path] = 0.2 * jax.random.normal(jax.random.key(i), leaves[path].shape)
    return paths.unflatten(leaves)


def gradients_of(model, lora=None, trains="", **options):
    trainable, frozen = paths.split(params_of(model, lora), lambda path: trains in path)
    gradient = jax.jit(jax.grad(loss_of(model, lora, **options)))
    return paths.flatten(gradient(trainable, frozen))


def difference(one, other):
    """The norm of the difference of two arrays, relative to that of the second."""
    return float(jnp.linalg.norm((one - other).ravel()) / jnp.linalg.norm(other.ravel()))


@pytest.mark.parametrize("lora", [None, SPEC], ids=["full", "lora"])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_model_differs_from_bfloat16_by_the_rounding_of_float8(model, lora):
    trains = "lora" if lora else "layers"
    exact = gradients_of(model, lora, trains)
    for matmul, least, most in (("dtype", 0.0, 0.05), ("float8", 0.005, 0.35)):
        found = gradients_of(model, lora, trains, dtype=jnp.bfloat16, matmul=matmul)
        differences = {path: difference(found[path], leaf) for path, leaf in exact.items()}
        assert all(least < size < most for size in differences.values()), differences


@pytest.mark.parametrize("policy", ["attention", "layer"])
@pytest.mark.parametrize("unroll", [1, 2])
def test_neither_remat_nor_unrolling_changes_a_gradient(policy, unroll):
    model = MODELS["llama"]
    expected = gradients_of(model, trains="layers", matmul="float8")
    found = gradients_of(model, trains="layers", matmul="float8", remat=policy, unroll=unroll)
    for path, leaf in expected.items():
        assert difference(found[path], leaf) < 1e-5, path


def dots(model, trains, lora=None, **options):
    """The float8 products of a compiled gradient, by the types of their operands."""
    trainable, frozen = paths.split(params_of(model, lora), lambda path: trains in path)
    gradient = jax.jit(jax.grad(loss_of(model, lora, unroll=model.num_layers, **options)))
    lowered = gradient.lower(trainable, frozen).as_text(dialect="hlo")
    compiled = gradient.lower(trainable, frozen).compile().as_text() or ""
    types = dict(re.findall(r"([\w.-]+) = (f8\w+)\[", lowered))
    found = re.findall(r" dot\(([\w.-]+), ([\w.-]+)\)", lowered)
    operands = [tuple(types.get(name, "") for name in names) for names in found]
    return [pair for pair in operands if all(pair)], len(re.findall(r" dot\(", compiled))


def test_every_projection_is_in_float8_and_no_frozen_kernel_has_a_gradient():
    model = MODELS["llama"]
    layers, projections = model.num_layers, 7
    trained, programs = dots(model, "layers", matmul="float8")
    assert {("f8e4m3fn", "f8e4m3fn"), ("f8e5m2", "f8e4m3fn"), ("f8e4m3fn", "f8e5m2")} == set(
        trained
    )
    assert trained.count(("f8e4m3fn", "f8e5m2")) == projections * layers
    assert not dots(model, "layers")[0]
    # The gradient of a frozen kernel is never computed: one product less for each projection.
    frozen = dots(model, "embed", matmul="float8")[1]
    assert programs - frozen == dots(model, "layers")[1] - dots(model, "embed")[1]
    assert programs - frozen == projections * layers


@pytest.mark.parametrize("policy", ["dots", "layer"])
def test_scales_of_forward_operands_are_not_recomputed(policy):
    """Each is a reduction of the whole operand: two for each projection, one for its gradient."""
    model = MODELS["llama"]
    params = params_of(model)
    reductions = []
    for matmul in ("dtype", "float8"):
        loss = loss_of(model, unroll=model.num_layers, remat=policy, matmul=matmul)
        lowered = jax.jit(jax.grad(loss)).lower(params, {}).as_text(dialect="hlo")
        reductions.append(len(re.findall(r" reduce\(", lowered)))
    assert reductions[1] - reductions[0] == 7 * model.num_layers * 3


HYBRID = replace(
    MODELS["llama"],
    num_layers=3,
    layer_kinds=tuple(
        replace(LLAMA.layer_kinds[0], mixer=mixer)
        for mixer in ("delta", "convolution", "attention")
    ),
    delta=DeltaRule(2, 4, 8, 8, kernel_size=3),
    convolution=Convolution(3, bias=True),
    experts=Experts(count=4, per_token=2, normalized=True, shared_size=32, shared_gate=True),
)


def test_other_mixers_and_shared_experts_are_in_float8_and_routers_are_not():
    # delta q, k, v, gate, o; convolution gate, output gate, v, o; attention q, k, v, o; in each of
    # the three layers the three of the shared expert
    pairs, _ = dots(HYBRID, "layers", matmul="float8")
    assert pairs.count(("f8e4m3fn", "f8e5m2")) == 5 + 4 + 4 + 3 * 3
    lines = float8.messages(paths.flatten(params_of(HYBRID)), jax.devices()[0])
    assert "delta/beta_proj (64 x 4)" in lines[0] and "router" not in lines[0]
    assert "experts are not in float8" in lines[1]
    assert "emulated" in lines[2]


@pytest.mark.parametrize(
    "capability, has", [("9.0", True), ("8.9", True), ("8.0", False), ("gfx942", False)]
)
def test_gpus_with_float8_kernels_are_known_by_their_capability(capability, has):
    class Device:
        platform, device_kind, compute_capability = "gpu", "GPU", capability

    assert float8.has_kernels(Device()) is has
    assert bool(float8.messages(paths.flatten(params_of(MODELS["llama"])), Device())) is not has


def test_a_stage_trains_says_once_what_is_not_in_float8_and_keeps_its_checkpoints_apart(tmp_path):
    config = replace(CONFIG, compute=replace(CONFIG.compute, matmul="float8"))
    model = replace(MODELS["llama"], intermediate_size=72)
    lines: list[str] = []
    stage = replace(STAGE, steps=4)
    float8_losses = train(tmp_path, stage, model, config, log=lines.append).history
    assert sum("layers/mlp/up_proj (64 x 72)" in line for line in lines) == 1
    assert sum("emulated" in line for line in lines) == 1
    assert all(np.isfinite(record["loss"]) for record in float8_losses)
    with pytest.raises(UserError, match="other settings"):
        train(tmp_path, stage, model)
    exact = train(tmp_path / "exact", stage, model, log=lines.append).history
    for one, other in zip(float8_losses, exact):
        assert 0 < abs(one["loss"] - other["loss"]) < 0.1
