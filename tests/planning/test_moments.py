"""The plan's bytes of Adam's moments against the arrays of a real state."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from tests.training.toys import LLAMA
from tokalign_jax.config import (
    BatchConfig,
    ComputeConfig,
    Config,
    LoraConfig,
    OptimizerConfig,
    StageConfig,
)
from tokalign_jax.models import quantized
from tokalign_jax.parallel import sharding
from tokalign_jax.planning import disk, memory
from tokalign_jax.planning.machine import Machine, Speed
from tokalign_jax.planning.report import make_plan
from tokalign_jax.training import loop
from tokalign_jax.training.optimizer import make_optimizer, rules_for
from tokalign_jax.training.step import init_state
from tokalign_jax.utils import paths

ROWS = OptimizerConfig(moment_dtype="bfloat16", row_second_moment=True)
COMPACT = replace(ROWS, body_moment_dtype="bfloat16", body_row_second_moment=True)
MODEL = replace(
    LLAMA,
    vocab_size=1000,  # in memory 1,024
    hidden_size=64,
    head_dim=16,
    intermediate_size=96,
)


def setup_of(stage, mesh=(1, 1, 1)):
    compute = ComputeConfig(dtype="float32", remat="dots")
    return memory.Setup("stage1", stage, compute, MODEL, mesh, Machine(math.prod(mesh), math.inf))


def stage_of(method, optimizer, batch=4):
    return StageConfig(
        method=method,
        optimizer=optimizer,
        steps=1,
        batch=BatchConfig(size=batch, per_device=2, sequence_length=16),
    )


def state_of(setup):
    """Shapes, types and places of a train state on the setup's mesh."""
    mesh = memory.abstract_mesh(setup.mesh)
    trained = {
        path: jax.ShapeDtypeStruct(sharding.padded_shape(path, leaf.shape, mesh), jnp.float32)
        for path, leaf in paths.flatten(memory.shapes(MODEL, setup.stage)[0]).items()
    }
    trained = paths.unflatten(trained)
    labels = paths.label_tree(rules_for(setup.stage.method), trained)
    optimizer = make_optimizer(setup.stage, labels, MODEL.vocab_size)
    state = jax.eval_shape(lambda params: init_state(params, optimizer), trained)
    return state, sharding.shardings(state, mesh)


@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 4, 1), (1, 2, 2)])
@pytest.mark.parametrize("method", ["embedding", "lora", "full"])
@pytest.mark.parametrize("optimizer", [OptimizerConfig(), ROWS, COMPACT])
def test_moments_are_those_of_a_state(optimizer, method, mesh):
    setup = setup_of(stage_of(method, optimizer), mesh)
    state, places = state_of(setup)
    held = sum(
        math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, place in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(places.opt_state))
    )
    (planned,) = (size for kind, size in memory.stage_memory(setup).items() if "moments" in kind)
    assert 0 <= held - planned <= 16  # the counters of updates


def test_the_kind_says_whether_moments_are_compact():
    for optimizer, kind in (
        (OptimizerConfig(), "float32"),
        (ROWS, "compact"),
        (COMPACT, "compact"),
    ):
        kinds = memory.stage_memory(setup_of(stage_of("full", optimizer)))
        assert f"Adam's two moments ({kind})" in kinds


@pytest.mark.parametrize(
    "optimizer, batch, expected",
    [
        (OptimizerConfig(), 2, 16),
        (OptimizerConfig(), 4, 20),
        (replace(ROWS, row_second_moment=False), 4, 18),
        (ROWS, 4, 14 + 4 / 64),
        (replace(ROWS, accumulate_in_place=True), 4, 10 + 4 / 64),
        (replace(ROWS, accumulate_in_place=True), 2, 10 + 4 / 64),
    ],
)
def test_bytes_per_parameter_of_the_vocabulary(optimizer, batch, expected):
    stage = stage_of("embedding", optimizer, batch)
    plan = make_plan(
        Config(stage1=stage, stage2=replace(stage, steps=0)),
        MODEL,
        Machine(1, math.inf),
        Speed(),
        10**6,
        2,
    )
    (one,) = plan.stages
    assert sum(one.vocabulary_state.values()) == pytest.approx(expected)
    assert f"  {expected:.3g} bytes per parameter of embedding and head (param" in plan.table()


@pytest.mark.parametrize(
    "mesh, tied, expected",
    [
        ((1, 1, 1), False, 10),
        ((4, 1, 1), False, 10),
        ((1, 4, 1), False, 12),  # the embedding's gradient is half of both
        ((1, 1, 1), True, 10),
        ((1, 4, 1), True, 14),
    ],
)
def test_rows_that_a_mesh_splits_have_gradients_of_their_own(mesh, tied, expected):
    optimizer = replace(ROWS, accumulate_in_place=True)
    setup = setup_of(stage_of("full", optimizer, 16), mesh)
    setup = replace(setup, model=replace(MODEL, tie_word_embeddings=tied))
    state = memory.vocabulary_state(setup)
    assert sum(state.values()) == pytest.approx(expected + 4 / 64)
    kinds = memory.stage_memory(setup)
    apart = memory.stage_memory(setup.with_stage(optimizer=ROWS))
    vocabulary = (1 if tied else 2) * 1024 * 64 // (mesh[1] * mesh[2])
    saved = apart["gradients (float32)"] - kinds["gradients (float32)"]
    assert saved == (14 - expected) * vocabulary
    taught = setup.with_stage(objective="mixture")
    assert memory.vocabulary_state(taught)["gradients"] == 4


def test_checkpoints_are_smaller_by_as_much():
    def sizes(optimizer):
        stage = stage_of("full", optimizer)
        return disk.disk_bytes(Config(stage1=replace(stage, steps=0), stage2=stage), MODEL, 0, 2)

    plain, compact = (sizes(optimizer)["stage2"] for optimizer in (OptimizerConfig(), COMPACT))
    count = memory.parameters(memory.shapes(MODEL, stage_of("full", COMPACT))[0])
    assert plain == 3 * 12 * count
    assert 3 * 6 * count < compact < 3 * 6.2 * count


def test_the_mesh_is_chosen_by_the_state_that_there_is():
    plain, compact = (
        loop.state_bytes(stage_of("embedding", optimizer), MODEL)
        for optimizer in (OptimizerConfig(), ROWS)
    )
    vocabulary = 2 * MODEL.vocab_size * MODEL.hidden_size
    assert plain - compact == vocabulary * 6 - 2 * MODEL.vocab_size * 4


@pytest.mark.parametrize("tensor", [1, 2])
def test_float8_operands_of_the_largest_projection_count_twice(tensor):
    setup = setup_of(stage_of("full", OptimizerConfig()), (1, 1, tensor))
    narrow, wide = MODEL.hidden_size, MODEL.intermediate_size
    assert memory.float8_bytes(setup, 100) == 0
    in_float8 = setup.with_compute(matmul="float8")
    operands = 2 * (100 * (narrow + wide) + narrow * wide)
    assert memory.float8_bytes(in_float8, 100) == operands // tensor


@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 2, 2)])
@pytest.mark.parametrize("kind", quantized.KINDS)
def test_frozen_parameters_are_those_of_quantized_arrays(kind, mesh):
    stage = replace(stage_of("lora", OptimizerConfig()), lora=LoraConfig(3, 6.0, 0.1, kind))
    setup = replace(setup_of(stage, mesh), compute=ComputeConfig(remat="dots"))
    frozen = memory.shapes(MODEL, stage)[1]
    stored = jax.eval_shape(
        lambda params: {
            path: quantized.quantize(leaf, kind)
            if quantized.is_quantized(path, leaf.shape)
            else leaf.astype(jnp.bfloat16)
            for path, leaf in params.items()
        },
        paths.flatten(frozen),
    )
    places = sharding.shardings(paths.unflatten(stored), memory.abstract_mesh(mesh))
    held = sum(
        math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, place in zip(
            jax.tree.leaves(paths.unflatten(stored)), jax.tree.leaves(places), strict=True
        )
    )
    planned = memory.stage_memory(setup)
    assert planned[f"frozen parameters ({kind}, others bfloat16)"] == held
    plain = memory.stage_memory(replace(setup, stage=stage_of("lora", OptimizerConfig())))
    assert held < 0.6 * plain["frozen parameters (bfloat16)"]
    # Besides frozen parameters, only two dequantized kernels of one layer.
    wide = 2 * 2 * MODEL.hidden_size * MODEL.intermediate_size // mesh[2]
    assert memory.dequantized_bytes(setup) == wide
    assert loop.state_bytes(stage, MODEL) < loop.state_bytes(
        replace(stage, lora=LoraConfig(3, 6.0, 0.1)), MODEL
    )
