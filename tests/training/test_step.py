"""Training methods, and one step against PyTorch, other batch splits and several devices."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from tests.helpers import tiny_model
from tests.training.toys import (
    CONFIG,
    LENGTH,
    LLAMA,
    NEOX,
    STAGE,
    VOCABULARY,
    assert_same,
    toy_params,
    toy_shards,
    train,
)
from tokalign_jax.models import hub, huggingface
from tokalign_jax.parallel import sharding
from tokalign_jax.training.batches import TokenSource, make_stream
from tokalign_jax.training.optimizer import schedule_of
from tokalign_jax.training.step import init_state, make_loss, make_train_step
from tokalign_jax.utils import paths

FAMILIES = [
    replace(model, tie_word_embeddings=tied) for model in (LLAMA, NEOX) for tied in (False, True)
]


def changed(before, after):
    """Paths of the leaves that changed by any bit."""
    after = paths.flatten(after)
    return {
        path
        for path, leaf in paths.flatten(before).items()
        if not np.array_equal(leaf, after[path])
    }


@pytest.mark.parametrize(
    "model", FAMILIES, ids=lambda m: f"{m.model_type}{'-tied' if m.tie_word_embeddings else ''}"
)
def test_embedding_stage_changes_embedding_and_head_alone(tmp_path, model):
    # In float16, and computed in bfloat16: the frozen leaves of the result must be the given ones,
    # not rounded copies.
    given = jax.tree.map(lambda leaf: np.asarray(leaf.astype(jnp.float16)), toy_params(model))
    config = replace(CONFIG, compute=replace(CONFIG.compute, dtype="bfloat16", remat="layer"))
    before = jax.tree.map(np.copy, given)
    result = train(
        tmp_path, replace(STAGE, method="embedding", steps=2), model, config, params=given
    )
    assert_same(given, before)
    vocabulary = {
        "embed_tokens/embedding",
        *(() if model.tie_word_embeddings else ("lm_head/kernel",)),
    }
    assert changed(before, result.params) == vocabulary
    for path, leaf in paths.flatten(result.params).items():
        assert leaf.dtype == (np.float32 if path in vocabulary else np.float16)


@pytest.mark.parametrize("model", [LLAMA, NEOX], ids=lambda m: m.model_type)
def test_full_stage_changes_everything(tmp_path, model):
    params = toy_params(model)
    before = jax.tree.map(np.array, params)
    result = train(tmp_path, replace(STAGE, steps=2), model, params=params)
    assert_same(params, before)
    # Shifting all keys alike changes no attention weight: the key bias has no gradient but
    # rounding.
    assert changed(before, result.params) >= set(paths.flatten(before)) - {
        "layers/attention/k_proj/bias"
    }


def test_lora_stage_changes_adapters_embedding_and_head_at_their_own_rates(tmp_path):
    before = jax.tree.map(np.array, toy_params())
    stage = replace(
        STAGE,
        method="lora",
        steps=1,
        warmup_fraction=0.0,
        optimizer=replace(STAGE.optimizer, weight_decay=0.0, row_damping=0.0),
        learning_rate=0.002,
        embedding_learning_rate=0.05,
    )
    first = paths.flatten(train(tmp_path / "one", stage).params)
    vocabulary = {"embed_tokens/embedding", "lm_head/kernel"}
    assert changed(before, paths.unflatten(first)) == vocabulary
    adapters = {path for path in first if "lora_" in path}
    projections = {
        path.removesuffix("/kernel")
        for path in paths.flatten(before["layers"])
        if path.endswith("_proj/kernel")
    }
    assert adapters == {f"layers/{path}/lora_{factor}" for path in projections for factor in "ab"}
    # Adam's first update is the rate times a sign. B starts at 0; A has no gradient as long as B is
    # 0.
    for path in adapters:
        if path.endswith("lora_b"):
            assert np.abs(first[path]).max() == pytest.approx(0.002, rel=1e-3), path
    for path in vocabulary:
        step = np.abs(first[path] - paths.flatten(before)[path]).max()
        assert step == pytest.approx(0.05, rel=1e-3), path

    second = paths.flatten(train(tmp_path / "two", replace(stage, steps=3)).params)
    assert changed(before, paths.unflatten(second)) == vocabulary
    assert all(np.any(first[path] != second[path]) for path in adapters)


def stepper(stage, optimizer, model=LLAMA):
    mesh = sharding.make_mesh()
    step = make_train_step(make_loss(model, CONFIG.compute, None), optimizer, jnp.float32, mesh)
    return lambda batch: step(
        init_state(sharding.place(toy_params(model), mesh), optimizer),
        {},
        batch,
        jax.random.key(0),
        schedule_of(stage),
    )


def test_accumulation_equals_one_large_batch():
    batch = next(
        make_stream(
            TokenSource(toy_shards(), LENGTH),
            seed=0,
            epochs=1,
            offset=0,
            accumulation=4,
            micro_batch=2,
        )
    )
    step = stepper(STAGE, optax.sgd(1.0))
    parts, part_metrics = step(jnp.asarray(batch))
    whole, whole_metrics = step(jnp.asarray(batch.reshape(1, 8, LENGTH + 1)))
    assert part_metrics["tokens"] == whole_metrics["tokens"] == 8 * LENGTH
    for name in ("loss", "gradient_norm"):
        assert float(part_metrics[name]) == pytest.approx(float(whole_metrics[name]), rel=1e-5)
    for path, leaf in paths.flatten(parts.params).items():
        np.testing.assert_allclose(leaf, paths.flatten(whole.params)[path], atol=1e-6, err_msg=path)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_golden_steps_against_pytorch(tmp_path, family):
    """The losses of six steps of clipped AdamW with two rates, warm-up and cosine, against a
    PyTorch loop in float32.
    """
    reference = tiny_model(family, VOCABULARY)
    reference.save_pretrained(tmp_path / "model")
    model, _ = hub.load_config(tmp_path / "model")
    params = huggingface.load_params(tmp_path / "model", model)
    stage = replace(
        STAGE,
        steps=6,
        learning_rate=1e-2,
        embedding_learning_rate=3e-2,
        optimizer=replace(STAGE.optimizer, row_damping=0.0, weight_decay=0.1, clip_norm=0.7),
        warmup_fraction=1 / 3,
    )
    history = train(tmp_path / "stage", stage, model, params=params).history

    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in reference.named_parameters():
        rate = (
            3e-2
            if name.split(".")[-2] in ("embed_tokens", "lm_head", "embed_in", "embed_out")
            else 1e-2
        )
        groups.setdefault((rate, 0.1 if parameter.ndim == 2 else 0.0), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {"params": members, "lr": rate, "weight_decay": decay}
            for (rate, decay), members in groups.items()
        ],
        betas=(stage.optimizer.beta1, stage.optimizer.beta2),
        eps=stage.optimizer.epsilon,
    )
    factors = [1 / 3, 2 / 3, 1.0, *(0.5 + 0.5 * np.cos(np.pi * k / 4) for k in (1, 2, 3))]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factors[min(step, 5)])
    stream = make_stream(
        TokenSource(toy_shards(), LENGTH), seed=0, epochs=1, offset=0, accumulation=2, micro_batch=2
    )
    for record, batch in zip(history, stream):
        tokens = torch.from_numpy(batch.reshape(4, LENGTH + 1)).long()
        logits = reference(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(
            logits.reshape(-1, VOCABULARY), tokens[:, 1:].reshape(-1)
        )
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), stage.optimizer.clip_norm)
        assert record["loss"] == pytest.approx(loss.item(), abs=1e-4)
        assert record["gradient_norm"] == pytest.approx(norm.item(), rel=1e-3)
        assert record["learning_rate"] == pytest.approx(
            1e-2 * factors[record["step"] - 1], rel=1e-5
        )
        optimizer.step()
        schedule.step()
    assert history[-1]["loss"] < history[0]["loss"]
