"""Gradients that are added in place are those that are added as arrays of their own."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.training.toys import (
    CONFIG,
    LENGTH,
    LLAMA,
    NEOX,
    STAGE,
    VOCABULARY,
    Program,
    run_programs,
    toy_params,
)
from tokalign_jax.config import OptimizerConfig, StageConfig, settings_of
from tokalign_jax.models.lora import add_lora
from tokalign_jax.parallel import sharding
from tokalign_jax.training.loop import lora_spec, split
from tokalign_jax.training.losses import Head, cross_entropy, cross_entropy_in_place
from tokalign_jax.training.optimizer import schedule_of
from tokalign_jax.training.step import init_state, make_loss, make_train_step
from tokalign_jax.utils import paths

HOW = Head(VOCABULARY, 5, jnp.float32, lambda x: 3 * jnp.tanh(x / 3))


def gradients_of(model, method, in_place, dtype="float32", micro_batches=3):
    """The gradients of a step, as an optimizer gets them, and its metrics."""
    stage = replace(STAGE, method=method)
    lora = lora_spec(stage)
    params = toy_params(model)
    params = add_lora(params, lora, jax.random.key(3)) if lora else params
    mesh = sharding.make_mesh()
    trainable, frozen = split(stage, sharding.place(params, mesh))
    keep = optax.GradientTransformationExtraArgs(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda updates, state, params, **_: (jax.tree.map(jnp.zeros_like, updates), updates),
    )
    compute = replace(CONFIG.compute, dtype=dtype, loss_chunk=7)
    step = make_train_step(make_loss(model, compute, lora), keep, dtype, mesh, in_place)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (micro_batches, 2, LENGTH + 1))
    tokens[-1, 0, 3:] = ~tokens[-1, 0, 3:]  # read, but not learned
    batch = jnp.asarray(tokens, jnp.int32)
    state, metrics = step(
        init_state(trainable, keep), frozen, batch, jax.random.key(1), schedule_of(stage)
    )
    return paths.flatten(state.opt_state), metrics


@pytest.mark.parametrize(
    "model, method, tied",
    [
        (LLAMA, "full", False),
        (LLAMA, "full", True),
        (NEOX, "lora", False),
        (LLAMA, "embedding", True),
    ],
)
def test_in_place_and_apart_are_the_same(model, method, tied):
    model = replace(model, tie_word_embeddings=tied)
    (apart, metrics), (in_place, others) = (gradients_of(model, method, x) for x in (False, True))
    assert apart.keys() == in_place.keys() and ("lm_head/kernel" in apart) != tied
    for path, expected in apart.items():
        scale = float(jnp.abs(expected).max())
        assert in_place[path].dtype == jnp.float32 and (scale > 0 or "lora_a" in path)
        np.testing.assert_allclose(in_place[path], expected, atol=2e-6 * scale, err_msg=path)
    for name in ("loss", "gradient_norm", "tokens"):
        assert float(metrics[name]) == pytest.approx(float(others[name]), rel=1e-6)


def test_sums_are_float32_where_the_compute_type_is_not():
    apart, _ = gradients_of(LLAMA, "full", False, "bfloat16")
    in_place, _ = gradients_of(LLAMA, "full", True, "bfloat16")
    for path in ("embed_tokens/embedding", "lm_head/kernel"):
        scale = float(jnp.abs(apart[path]).max())
        np.testing.assert_allclose(in_place[path], apart[path], atol=1e-5 * scale, err_msg=path)


def test_a_single_micro_batch_has_no_sums():
    (apart, _), (in_place, _) = (
        gradients_of(LLAMA, "full", x, micro_batches=1) for x in (False, True)
    )
    for path, expected in apart.items():
        np.testing.assert_array_equal(in_place[path], expected, path)


def test_the_loss_in_place_is_the_loss_and_adds_the_gradient():
    rng = np.random.default_rng(0)
    hidden, head, sums = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((3, 7, 16), (64, 16), (64, 16))
    )
    labels = jnp.asarray(
        np.where(rng.random((3, 7)) < 0.2, -1, rng.integers(0, VOCABULARY, (3, 7)))
    )

    def plain(hidden, head):
        return 2.5 * cross_entropy(hidden, head, labels, HOW)[0]

    def in_place(hidden):
        total, count, added = cross_entropy_in_place(hidden, head, labels, sums, HOW)
        return 2.5 * total, (count, added)

    value, (of_hidden, of_head) = jax.value_and_grad(plain, (0, 1))(hidden, head)
    (found, (count, added)), gradient = jax.value_and_grad(in_place, has_aux=True)(hidden)
    assert float(found) == pytest.approx(float(value), rel=1e-6) and count == (labels >= 0).sum()
    np.testing.assert_allclose(gradient, of_hidden, atol=1e-6)
    # Not scaled as the loss is: the sums are over losses.
    np.testing.assert_allclose(added, sums + of_head / 2.5, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_micro_batch_needs_an_array_of_the_vocabulary_less(tied):
    """By the memory that XLA plans for the loop over micro-batches."""
    rows, width = 16_384, 64
    model = replace(
        LLAMA, vocab_size=rows, hidden_size=width, head_dim=16, tie_word_embeddings=tied
    )
    params = jax.eval_shape(lambda: toy_params(model))
    trainable, frozen = split(replace(STAGE, method="embedding"), params)
    loss = make_loss(model, replace(CONFIG.compute, remat="layer", loss_chunk=8), None)
    batch = jax.ShapeDtypeStruct((4, 1, LENGTH + 1), jnp.int32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))

    def apart(sums, trainable, frozen, batch, keys):
        def add(sums, part):
            gradients = jax.grad(lambda params: loss(params, frozen, part, keys)[0])(trainable)
            return jax.tree.map(jnp.add, sums, gradients), None

        return jax.lax.scan(add, sums, batch)[0]

    def in_place(sums, trainable, frozen, batch, keys):
        def add(sums, part):
            return loss.add_gradients(trainable, frozen, part, keys, sums)[1], None

        return jax.lax.scan(add, sums, batch)[0]

    tables = []
    for accumulate in (apart, in_place):
        lowered = jax.jit(accumulate, donate_argnums=0).lower(
            trainable, trainable, frozen, batch, keys
        )
        memory = lowered.compile().memory_analysis()
        tables.append(memory.temp_size_in_bytes / (4 * rows * width))
    # On a CPU a chunk's product is an array of the head's size too, before it is added.
    assert tables[1] < min(1.3, tables[0] - 0.9), tables


@pytest.mark.slow
def test_eight_devices_give_what_one_gives(tmp_path):
    changes = {"batch": replace(STAGE.batch, size=16, per_device=1), "steps": 3}
    results = {}
    for mesh, in_place in (
        ((1, 1, 1), False),
        ((1, 8, 1), True),
        ((4, 1, 2), True),
        ((8, 1, 1), True),
    ):
        changes["optimizer"] = OptimizerConfig(accumulate_in_place=in_place)
        folder = tmp_path / "-".join(map(str, mesh))
        ((code, output),) = run_programs(Program(folder, changes, math.prod(mesh), mesh))
        assert code == 0, output
        results[mesh] = np.load(folder / "final.npz")
    one = results.pop((1, 1, 1))
    for mesh, found in results.items():
        for path in one.files:
            np.testing.assert_allclose(found[path], one[path], atol=1e-5, err_msg=f"{mesh} {path}")


def test_results_do_not_depend_on_it_by_more_than_rounding():
    changed = replace(StageConfig(), optimizer=OptimizerConfig(accumulate_in_place=True))
    assert settings_of(changed) == settings_of(StageConfig())
