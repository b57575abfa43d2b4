"""Adam's moments in less memory: against the formula in float64, over interruptions, on meshes."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.training.toys import (
    CONFIG,
    LLAMA,
    STAGE,
    Program,
    assert_same,
    final_params,
    run_programs,
    toy_params,
    train,
)
from tokalign_jax.config import OptimizerConfig, StageConfig, config_from_dict, settings_of
from tokalign_jax.errors import UserError
from tokalign_jax.training.optimizer import (
    make_optimizer,
    moment_shapes,
    rules_for,
    schedule_of,
    state_format,
)
from tokalign_jax.training.step import init_state
from tokalign_jax.utils import paths

COMPACT = OptimizerConfig(
    moment_dtype="bfloat16",
    row_second_moment=True,
    body_moment_dtype="bfloat16",
    body_row_second_moment=True,
)
FORMATS = {
    "vocabulary": replace(COMPACT, body_moment_dtype="float32", body_row_second_moment=False),
    "body": replace(COMPACT, moment_dtype="float32", row_second_moment=False),
    "first": replace(COMPACT, row_second_moment=False, body_row_second_moment=False),
    "second": replace(COMPACT, moment_dtype="float32", body_moment_dtype="float32"),
    "all": COMPACT,
}
SHAPES = {
    "embed_tokens/embedding": (11, 4),
    "lm_head/kernel": (11, 4),
    "layers/input_norm/scale": (2, 4),
    "layers/attention/q_proj/kernel": (2, 4, 6),
    "layers/attention/q_proj/bias": (2, 6),
    "layers/mlp/experts/up_proj/kernel": (2, 3, 4, 5),
    "layers/mlp/router/kernel": (2, 4, 3),
}
INPUTS = {"layers/attention/q_proj/kernel": -2, "layers/mlp/experts/up_proj/kernel": -2}
"""The axis of a projection's inputs."""


def random_tree(seed):
    rng = np.random.default_rng(seed)
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in SHAPES.items()}


def is_vocabulary(path):
    return path.startswith(("embed_tokens", "lm_head"))


def moments_of(state):
    """(first, second) moments by path, of embedding and head and of the rest."""
    first, second = {}, {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for kind, found in (("mu", first), ("nu", second)):
            if f"/{kind}/" in name:
                found[name.partition(f"/{kind}/")[2]] = leaf
    return first, second


@pytest.mark.parametrize("name", FORMATS)
def test_five_steps_match_a_float64_reference(name):
    """Every step from the state that the one before left, whose rounding is checked by itself."""
    settings = replace(
        FORMATS[name], weight_decay=0.1, clip_norm=1e9, beta1=0.8, beta2=0.9, epsilon=1e-3
    )
    stage = StageConfig(
        method="full", learning_rate=0.01, embedding_learning_rate=0.03, optimizer=settings
    )
    labels = paths.label_tree(rules_for("full"), paths.unflatten(SHAPES))
    optimizer = make_optimizer(stage, labels, 9)  # the last two rows are padding
    params = {path: leaf.astype(np.float64) for path, leaf in random_tree(0).items()}
    tree = paths.unflatten(random_tree(0))
    state = optimizer.init(tree)
    for update in range(5):
        gradients = random_tree(update + 1)
        for path in filter(is_vocabulary, gradients):
            gradients[path][9:] = 0
        old_first, old_second = moments_of(state)
        updates, state = jax.jit(optimizer.update)(
            paths.unflatten(gradients), state, tree, rates=schedule_of(stage).rates(update)
        )
        tree = optax.apply_updates(tree, updates)
        first, second = moments_of(state)
        for path, gradient in gradients.items():
            gradient = gradient.astype(np.float64)
            vocabulary = is_vocabulary(path)
            by_row = settings.row_second_moment if vocabulary else settings.body_row_second_moment
            dtype = settings.moment_dtype if vocabulary else settings.body_moment_dtype
            axis = -1 if vocabulary else INPUTS.get(path)
            square = gradient**2
            if by_row and axis is not None:
                square = square.mean(axis, keepdims=True)
            m = 0.8 * np.asarray(old_first[path], np.float64) + 0.2 * gradient
            v = 0.9 * np.asarray(old_second[path], np.float64) + 0.1 * square
            assert second[path].shape == square.shape
            np.testing.assert_allclose(second[path], v, rtol=1e-6, err_msg=path)
            assert first[path].dtype == dtype
            ulp = 2.0**-7 if dtype == "bfloat16" else 1e-6
            np.testing.assert_allclose(np.asarray(first[path], np.float64), m, ulp, 1e-7)

            corrected = v / (1 - 0.9 ** (update + 1))
            mean = corrected[:9].mean() if vocabulary else 0.0
            floor = settings.epsilon + settings.row_damping * np.sqrt(mean)
            adam = m / (1 - 0.8 ** (update + 1)) / (np.sqrt(corrected) + floor)
            rate = float(schedule_of(stage).rates(update)["embedding" if vocabulary else "body"])
            decay = 0.0 if path.endswith(("scale", "bias")) else 0.1
            params[path] -= rate * (adam + decay * params[path])
    for path, leaf in paths.flatten(tree).items():
        np.testing.assert_allclose(leaf, params[path], rtol=1e-5, atol=1e-6, err_msg=path)


def test_state_has_the_shapes_that_are_planned():
    stage = replace(STAGE, optimizer=COMPACT)
    for method in ("embedding", "lora", "full"):
        stage = replace(stage, method=method)
        tree = paths.unflatten({k: jnp.zeros(s) for k, s in SHAPES.items()})
        trained, _ = paths.split(tree, lambda p, m=method: m == "full" or is_vocabulary(p))
        labels = paths.label_tree(rules_for(method), trained)
        found = moments_of(make_optimizer(stage, labels).init(trained))
        for planned, kind in zip(moment_shapes(stage, trained), found):
            planned = paths.flatten(planned)
            assert {p: (x.shape, x.dtype) for p, x in planned.items()} == {
                p: (x.shape, x.dtype) for p, x in kind.items()
            }


def test_moments_take_the_memory_of_their_format():
    params = toy_params()
    state = init_state(params, make_optimizer(replace(STAGE, optimizer=COMPACT), full(params)))
    sizes = {path: leaf.size for path, leaf in paths.flatten(params).items()}
    bytes_of = {
        path: tuple(moments[path].nbytes for moments in moments_of(state.opt_state))
        for path in ("embed_tokens/embedding", "layers/mlp/up_proj/kernel")
    }
    assert bytes_of["embed_tokens/embedding"] == (2 * sizes["embed_tokens/embedding"], 4 * 61)
    assert bytes_of["layers/mlp/up_proj/kernel"] == (
        2 * sizes["layers/mlp/up_proj/kernel"],
        4 * LLAMA.num_layers * LLAMA.intermediate_size,
    )


def full(params):
    return paths.label_tree(rules_for("full"), params)


# --- Training stages ----------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def interrupted(folder, stage):
    """A stage that ends after step 6 of 8, with a checkpoint of step 3."""

    def interrupt(line):
        if "step 6 of" in line:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(folder, stage, log=interrupt)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_an_interrupted_stage_goes_on_with_the_same_bits(tmp_path, method):
    stage = replace(STAGE, method=method, log_every=1, optimizer=COMPACT)
    whole = train(tmp_path / "whole", stage)
    interrupted(tmp_path / "parts", stage)
    rest = train(tmp_path / "parts", stage)
    assert_same(rest.params, whole.params)
    assert [r["loss"] for r in rest.history] == [r["loss"] for r in whole.history]
    assert_same(final_params(tmp_path / "parts", stage, toy_params()), whole.params)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"moment_dtype": "bfloat16"}, "stage.optimizer.moment_dtype=float32, this run has bfloat"),
        ({"body_row_second_moment": True}, "optimizer.body_row_second_moment=False, this run has"),
    ],
)
def test_a_checkpoint_in_one_format_refuses_another(tmp_path, changes, message):
    plain, compact = (replace(STAGE, log_every=1, optimizer=x) for x in (OptimizerConfig(), None))
    compact = replace(compact, optimizer=replace(OptimizerConfig(), **changes))
    interrupted(tmp_path / "plain", plain)
    with pytest.raises(UserError, match=message):
        train(tmp_path / "plain", compact)
    interrupted(tmp_path / "compact", compact)
    (field,) = changes
    with pytest.raises(UserError, match=rf"set --config.stage.optimizer.{field}=\w+ to go on"):
        train(tmp_path / "compact", plain)


@pytest.mark.slow
def test_eight_devices_give_what_one_gives(tmp_path):
    """Rounding is the same on all meshes but where sums in another order tip it over, which moves
    a parameter by less than a hundredth of its largest step.
    """
    changes = {"optimizer": replace(COMPACT, row_damping=0.3), "steps": 3}
    changes |= {"batch": replace(STAGE.batch, size=8, per_device=1)}
    results = {}
    for mesh in ((1, 1, 1), (1, 8, 1), (2, 2, 2)):
        folder = tmp_path / "-".join(map(str, mesh))
        ((code, output),) = run_programs(Program(folder, changes, math.prod(mesh), mesh))
        assert code == 0, output
        results[mesh] = np.load(folder / "final.npz")
    one = results.pop((1, 1, 1))
    rate = STAGE.learning_rate
    for mesh, found in results.items():
        for path in one.files:
            differences = np.abs(found[path] - one[path])
            assert differences.max() < 0.01 * rate, (mesh, path)
            assert (differences < 1e-3 * rate).mean() > 0.99, (mesh, path)


# --- Config -------------------------------------------------------------------------------------


def test_results_of_versions_without_these_fields_stay_valid():
    assert (
        not {"moment_dtype", "row_second_moment"} & settings_of(StageConfig())["optimizer"].keys()
    )
    assert state_format(OptimizerConfig()) == {}
    values = {"optimizer": {"moment_dtype": "bfloat16"}}
    stage = config_from_dict(values, StageConfig)
    assert settings_of(stage)["optimizer"]["moment_dtype"] == "bfloat16"
    assert state_format(stage.optimizer) == {"moment_dtype": "bfloat16"}
    with pytest.raises(UserError, match="moment_dtype' is 'float16'; it must be one of"):
        config_from_dict({"optimizer": {"moment_dtype": "float16"}}, StageConfig)


def test_the_default_is_optax_adam_bit_for_bit():
    params = toy_params()
    stage = replace(
        STAGE, optimizer=OptimizerConfig(row_damping=0.0, weight_decay=0.0, clip_norm=1e9)
    )
    optimizer = make_optimizer(stage, full(params))
    adam = optax.scale_by_adam(0.9, 0.95, 1e-8)
    state, expected_state = optimizer.init(params), adam.init(params)
    assert CONFIG.stage2.optimizer.moment_dtype == "float32"
    for seed in range(3):
        gradients = toy_params(seed=seed + 1)
        rates = dict.fromkeys(("embedding", "body", "lora"), jnp.float32(1.0))
        updates, state = optimizer.update(gradients, state, params, rates=rates)
        expected, expected_state = adam.update(gradients, expected_state)
        assert_same(updates, jax.tree.map(lambda x: -x, expected))
