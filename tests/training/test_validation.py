"""Validation during training: the loss, its record, and the selected checkpoint."""

import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.toys import (
    CONFIG,
    LENGTH,
    LLAMA,
    STAGE,
    VOCABULARY,
    Program,
    ToyShards,
    assert_same,
    final_of,
    final_params,
    finish,
    run_programs,
    together,
    toy_params,
    train,
    unpadded,
)
from tokalign_jax.config import CheckpointConfig, StageConfig, config_from_dict, settings_of
from tokalign_jax.errors import UserError
from tokalign_jax.models.lora import LoraSpec, add_lora
from tokalign_jax.models.transformer import forward, head_matrix
from tokalign_jax.parallel import sharding
from tokalign_jax.training import validation
from tokalign_jax.training.loop import is_finished, load_trained, split
from tokalign_jax.training.metrics import read
from tokalign_jax.training.validation import Validations, held_out_sequences
from tokalign_jax.utils import paths

STAGE = replace(
    STAGE,
    checkpoints=CheckpointConfig(every=5, keep=1),
    validation_every=2,
    validation_sequences=6,
    log_every=100,
)


def losses(records):
    return [(r["step"], r["validation_loss"]) for r in records if "validation_loss" in r]


def noise(tokens=200):
    """Held-out text on which the loss rises while the model learns the toy text."""
    return ToyShards(np.random.default_rng(7).integers(0, VOCABULARY, tokens).astype(np.uint16))


def saved(folder):
    return sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())


# --- Sequences and loss -------------------------------------------------------------------------


def test_held_out_sequences_are_split_as_in_training_and_padded():
    text = ToyShards(np.arange(1, 31, dtype=np.uint16), 0, np.array([[2, 4], [28, 40]]))
    found = held_out_sequences(text, LENGTH, 10)
    assert found.shape == (3, LENGTH + 1)
    assert found[0].tolist() == [0, 2, ~3, ~4, *range(5, 14)]
    assert found[1].tolist() == [0, *range(14, 26)]
    assert found[2].tolist() == [0, 26, 27, 28, ~29, ~30, *[~0] * 7]
    assert np.array_equal(held_out_sequences(text, LENGTH, 2), found[:2])
    for nothing in (ToyShards(np.arange(1)), ToyShards(np.arange(9), 0, np.array([[0, 9]]))):
        with pytest.raises(UserError, match="no token to validate on"):
            held_out_sequences(nothing, LENGTH, 2)


@pytest.mark.parametrize("method", ["embedding", "lora", "full"])
def test_loss_is_the_mean_over_predicted_tokens(method):
    stage = replace(STAGE, method=method)
    lora = LoraSpec(3, 6.0, 0.5) if method == "lora" else None
    params = toy_params()
    if lora:
        params = add_lora(params, lora, jax.random.key(1))
        params = jax.tree.map(lambda x: jnp.where(x == 0, 0.1, x), params)
    mesh = sharding.make_mesh()
    trained, frozen = split(stage, sharding.place(params, mesh))
    text = ToyShards(noise(100).tokens, None, np.array([[5, 9]]))
    sequences = held_out_sequences(text, LENGTH, 20)
    measure = validation.make_measure(LLAMA, CONFIG.compute, lora, mesh)
    results = [
        measure(trained, frozen=frozen, batches=validation.batched(sequences, size, mesh))
        for size in (2, 64)
    ]

    inputs = np.where(sequences < 0, ~sequences, sequences)[:, :-1]
    hidden = forward(LLAMA, params, jnp.asarray(inputs), lora=lora)
    logits = np.asarray(hidden @ head_matrix(params).T, np.float64)[..., :VOCABULARY]
    likelihoods = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    labels = sequences[:, 1:]
    nll = -np.take_along_axis(likelihoods, np.maximum(labels, 0)[..., None], -1)[..., 0]
    np.testing.assert_allclose(results, nll[labels >= 0].mean(), rtol=1e-6)


# --- Validation within a stage ------------------------------------------------------------------


def test_validation_is_recorded_and_does_not_change_what_is_trained(tmp_path):
    lines = []
    plain = train(tmp_path / "plain", replace(STAGE, validation_every=0))
    result = train(tmp_path / "run", replace(STAGE, steps=7), held_out=noise(), log=lines.append)
    assert [step for step, _ in losses(result.history)] == [2, 4, 6, 7]
    assert losses(read(tmp_path / "run" / "metrics.jsonl")) == losses(result.history)
    assert any(
        f"step 2, validation loss {losses(result.history)[0][1]:.4f} on 6 held-out sequences, the"
        " lowest so far" in line
        for line in lines
    )
    result = train(tmp_path / "again", STAGE, held_out=noise())
    assert_same(result.params, plain.params)
    assert [r["loss"] for r in result.history] == [r["loss"] for r in plain.history]


def test_best_checkpoint_is_kept_and_selected(tmp_path):
    held_out, stage = noise(), replace(STAGE, steps=10, learning_rate=0.05)
    last = train(tmp_path, stage, held_out=held_out)
    best_step = min((loss, step) for step, loss in losses(last.history))[1]
    assert best_step < 10  # the text is other than what is learned
    assert saved(tmp_path) == [best_step, 10]

    best = replace(stage, result="best")
    every = replace(stage, validation_every=0, checkpoints=CheckpointConfig(every=2, keep=9))
    train(tmp_path / "every", every)
    assert_same(final_params(tmp_path, stage, toy_params()), last.params)
    assert is_finished(tmp_path, best)
    found = final_params(tmp_path, best, toy_params())
    assert_same(found, load_trained_step(tmp_path / "every", stage, best_step))
    assert_same(train(tmp_path, best, held_out=held_out).params, found)
    assert_same(train(tmp_path / "new", best, held_out=held_out).params, found)

    shutil.rmtree(tmp_path / "checkpoints" / str(best_step))
    assert not is_finished(tmp_path, best) and is_finished(tmp_path, stage)
    for again in (
        lambda: load_trained(tmp_path, best, LLAMA, sharding.make_mesh()),
        lambda: train(tmp_path, best, held_out=held_out),
    ):
        with pytest.raises(UserError, match=r"best checkpoint is gone.*result=last"):
            again()


def load_trained_step(folder, stage, step):
    """Parameters of a checkpoint that is not the last."""
    for later in saved(folder):
        if later > step:
            shutil.rmtree(folder / "checkpoints" / str(later))
    found = load_trained(
        folder, replace(stage, steps=step, validation_every=0), LLAMA, sharding.make_mesh()
    )
    return unpadded(paths.unflatten(found))


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [3, 6])
def test_validation_record_survives_a_kill(tmp_path, at):
    stage = replace(STAGE, result="best", learning_rate=0.05, log_every=1)
    whole = train(tmp_path / "whole", stage, held_out=noise())

    def kill(line):
        if f"step {at} of" in line:
            raise Killed

    with pytest.raises(Killed):
        train(tmp_path / "parts", stage, held_out=noise(), log=kill)
    parts = train(tmp_path / "parts", stage, held_out=noise())
    assert losses(parts.history) == losses(whole.history)
    assert_same(parts.params, whole.params)
    records = [
        json.loads((tmp_path / name / "checkpoints/8/position/metadata").read_text())["validations"]
        for name in ("whole", "parts")
    ]
    assert records[0] == records[1]
    assert len(records[0]["losses"]) == 4
    assert saved(tmp_path / "parts") == saved(tmp_path / "whole")


def test_best_checkpoint_of_partly_validated_steps_is_refused(tmp_path):
    plain = replace(STAGE, validation_every=0)
    train(tmp_path, plain)
    best = replace(STAGE, result="best")
    assert not is_finished(tmp_path, best)
    with pytest.raises(UserError, match="not all validated every 2 steps on 6 sequences"):
        train(tmp_path, best, held_out=noise())
    for other in (replace(best, validation_every=4), replace(best, validation_sequences=7)):
        train(tmp_path / "validated", STAGE, held_out=noise())
        with pytest.raises(UserError, match="not all validated"):
            train(tmp_path / "validated", other, held_out=noise())
    assert is_finished(tmp_path / "validated", best)


def test_record_that_begins_late_reports_known_steps(tmp_path):
    """Without a result by it, validation may begin at any time."""
    stage = replace(STAGE, checkpoints=CheckpointConfig(every=3, keep=9))
    train(tmp_path, replace(stage, validation_every=0))
    for step in (6, 8):
        shutil.rmtree(tmp_path / "checkpoints" / str(step))
    result = train(tmp_path, stage, held_out=noise())
    assert [step for step, _ in losses(result.history)] == [4, 6, 8]


def test_non_finite_losses_are_never_the_best():
    record = Validations(2, 6).adding(2, float("nan"))
    assert record.best is None and record.losses == ((2, None),)
    record = record.adding(4, 3.0).adding(6, 3.0).adding(8, float("inf"))
    assert record.best == 4
    assert record.covers(replace(STAGE, steps=9), 8)
    assert not record.covers(replace(STAGE, steps=9), 9)
    assert not record.covers(replace(STAGE, steps=7), 7)


def test_invalid_settings_are_refused():
    """Neither validation nor the choice of a result changes the training."""
    values = {"validation_every": 3, "validation_sequences": 5, "result": "best"}
    assert settings_of(config_from_dict(values, StageConfig)) == settings_of(StageConfig())
    with pytest.raises(UserError, match=r"stage1\.result.*nothing is validated"):
        config_from_dict({"stage1": {"result": "best"}})
    for name in ("validation_every", "validation_sequences"):
        with pytest.raises(UserError, match=f"stage1.{name}.*at least"):
            config_from_dict({"stage1": {name: -1}})
    with pytest.raises(ValueError, match="no held-out text"):
        train("", STAGE)


@pytest.mark.slow
def test_two_processes_give_the_validation_loss_of_one(tmp_path):
    changes = {
        "validation_every": 2,
        "result": "best",
        "learning_rate": 0.5,
        "checkpoints": CheckpointConfig(every=3, keep=1),
    }
    one = Program(tmp_path / "one", changes, devices=2)
    two = Program(tmp_path / "two", changes, fault="kill", fault_step=5)
    finish(one)
    run_programs(*together(two))
    finish(*together(replace(two, fault="")))
    found = [losses(read(folder / "metrics.jsonl")) for folder in (one.folder, two.folder)]
    assert [step for step, _ in found[1]] == [2, 4, 6, 8]
    np.testing.assert_allclose(*([loss for _, loss in record] for record in found), rtol=1e-4)
    assert saved(one.folder) == saved(two.folder)
    ended = [final_of(program) for program in (one, two)]
    for path, leaf in ended[0].items():
        np.testing.assert_allclose(ended[1][path], leaf, rtol=1e-3, atol=1e-3, err_msg=path)
