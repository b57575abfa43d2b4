"""Parameter labels, the schedule, and AdamW by group against a float64 reference."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tokalign_jax.config import OptimizerConfig, StageConfig
from tokalign_jax.training.optimizer import make_optimizer, rules_for, schedule_of
from tokalign_jax.utils import paths

SHAPES = {
    "embed_tokens/embedding": (11, 4),
    "lm_head/kernel": (11, 4),
    "layers/input_norm/scale": (2, 4),
    "layers/attention/q_proj/kernel": (2, 4, 4),
    "layers/attention/q_proj/bias": (2, 4),
    "layers/attention/sinks": (2, 4),
    "layers/attention/q_proj/lora_a": (2, 4, 3),
    "layers/attention/q_proj/lora_b": (2, 3, 4),
    "final_norm/scale": (4,),
}
MATRICES = {path for path in SHAPES if not path.endswith(("scale", "bias", "sinks"))}
STAGE = StageConfig(
    method="full", steps=10, warmup_fraction=0.2, learning_rate=0.01, embedding_learning_rate=0.03,
    optimizer=OptimizerConfig(
        weight_decay=0.1, clip_norm=0.5, beta1=0.8, beta2=0.9, epsilon=1e-3, row_damping=0.3
    ),
)  # fmt: skip


def random_tree(seed):
    rng = np.random.default_rng(seed)
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in SHAPES.items()}


def expected_rate(update, steps=10, warmup=2):
    if update < warmup:
        return (update + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (update - warmup) / (steps - warmup)))


def test_trainable_parameters_of_each_method():
    def labels(method):
        return paths.flatten(
            paths.label_tree(rules_for(method), paths.unflatten(dict.fromkeys(SHAPES, 0)))
        )

    vocabulary = {"embed_tokens/embedding": "embedding", "lm_head/kernel": "embedding"}
    adapters = {path: "lora" for path in SHAPES if "lora" in path}
    assert labels("embedding") == dict.fromkeys(SHAPES, "frozen") | vocabulary
    assert labels("lora") == dict.fromkeys(SHAPES, "frozen") | vocabulary | adapters
    assert labels("full") == dict.fromkeys(SHAPES, "body") | vocabulary


def rates(**settings):
    schedule = schedule_of(StageConfig(learning_rate=0.5, **settings))
    return lambda update: schedule.rates(update)["body"]


def test_schedule_rises_to_the_peak_and_falls_to_zero():
    rate = rates(steps=10, warmup_fraction=0.2)
    np.testing.assert_allclose(
        [rate(u) for u in range(11)], [0.5 * expected_rate(u) for u in range(11)], atol=1e-7
    )
    assert rate(-1) == 0 and rate(2) == 0.5 and rate(10) == 0 and rate(11) == 0
    assert rates(steps=3, warmup_fraction=0.03)(0) == 0.5  # no warm-up: straight to the peak
    assert rates(steps=1, warmup_fraction=1.0)(0) == 0.25  # all of it warm-up


def test_three_steps_match_a_float64_reference():
    """Clipping over everything, moments, bias correction, damping of rows, schedule, a rate by
    group, decay of matrices only.
    """
    params, expected = random_tree(0), {k: v.astype(np.float64) for k, v in random_tree(0).items()}
    labels = paths.label_tree(
        [("^(embed_tokens|lm_head)", "embedding"), ("lora_", "lora"), ("", "body")],
        paths.unflatten(SHAPES),
    )
    optimizer = make_optimizer(STAGE, labels)
    tree = paths.unflatten({k: jnp.asarray(v) for k, v in params.items()})
    state = optimizer.init(tree)
    moments = {k: (np.zeros(s), np.zeros(s)) for k, s in SHAPES.items()}
    for update in range(3):
        gradients = {
            k: g * (10.0 if update != 1 else 1e-3) for k, g in random_tree(update + 1).items()
        }
        updates, state = jax.jit(optimizer.update)(
            paths.unflatten(gradients), state, tree, rates=schedule_of(STAGE).rates(update)
        )
        tree = optax.apply_updates(tree, updates)

        norm = math.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradients.values()))
        for path in SHAPES:
            gradient = gradients[path].astype(np.float64) * min(
                1.0, STAGE.optimizer.clip_norm / norm
            )
            first = 0.8 * moments[path][0] + 0.2 * gradient
            second = 0.9 * moments[path][1] + 0.1 * gradient**2
            moments[path] = first, second
            vocabulary = path.startswith(("embed", "lm_head"))
            corrected = second / (1 - 0.9 ** (update + 1))
            floor = STAGE.optimizer.epsilon + (
                0.3 * np.sqrt(corrected.mean()) if vocabulary else 0.0
            )
            adam = (first / (1 - 0.8 ** (update + 1))) / (np.sqrt(corrected) + floor)
            rate = (0.03 if vocabulary else 0.01) * expected_rate(update)
            decay = 0.1 if path in MATRICES else 0.0
            expected[path] -= rate * (adam + decay * expected[path])
    for path, leaf in paths.flatten(tree).items():
        np.testing.assert_allclose(leaf, expected[path], rtol=1e-5, atol=1e-6, err_msg=path)


def test_frozen_leaves_are_excluded_from_updates_and_clipping():
    labels = paths.label_tree(rules_for("embedding"), paths.unflatten(SHAPES))
    stage = StageConfig(
        optimizer=OptimizerConfig(row_damping=0.0, weight_decay=0.1),
        steps=10,
        warmup_fraction=0.0,
        learning_rate=0.01,
    )
    tree, gradients = (paths.unflatten(random_tree(seed)) for seed in (0, 1))
    gradients["final_norm"]["scale"] = np.full(4, 1e9, np.float32)
    optimizer = make_optimizer(stage, labels)
    updates = paths.flatten(
        optimizer.update(gradients, optimizer.init(tree), tree, rates=schedule_of(stage).rates(0))[
            0
        ]
    )
    for path, update in updates.items():
        assert np.any(update) == path.startswith(("embed_tokens", "lm_head")), path
    # Adam's first step is sign-like whatever the clipping, as long as the gradient was not crushed
    # towards epsilon.
    step = updates["lm_head/kernel"] + 0.01 * 0.1 * tree["lm_head"]["kernel"]
    np.testing.assert_allclose(np.abs(step), 0.01, rtol=1e-3)


def test_embedding_rate_defaults_to_the_stage_rate():
    stage = StageConfig(
        optimizer=OptimizerConfig(row_damping=0.0, weight_decay=0.0),
        method="lora",
        steps=10,
        warmup_fraction=0.0,
        learning_rate=0.02,
    )
    labels = paths.label_tree(rules_for("lora"), paths.unflatten(SHAPES))
    tree, gradients = (paths.unflatten(random_tree(seed)) for seed in (0, 1))
    optimizer = make_optimizer(stage, labels)
    updates = paths.flatten(
        optimizer.update(gradients, optimizer.init(tree), tree, rates=schedule_of(stage).rates(0))[
            0
        ]
    )
    for path in ("embed_tokens/embedding", "layers/attention/q_proj/lora_a"):
        assert np.abs(updates[path]).max() == pytest.approx(0.02, rel=1e-3)
