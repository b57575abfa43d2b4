"""The training loop: resuming, non-finite steps, offsets, impossible plans."""

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
    ToyShards,
    assert_same,
    final_params,
    toy_params,
    toy_shards,
    train,
)
from tokalign_jax.config import AFTER_PREVIOUS, DataConfig
from tokalign_jax.errors import UserError
from tokalign_jax.parallel import sharding
from tokalign_jax.training.batches import TokenSource, make_stream
from tokalign_jax.training.loop import load_trained, plan_stage, run_stage, split
from tokalign_jax.training.metrics import read
from tokalign_jax.training.optimizer import make_optimizer, rules_for, schedule_of
from tokalign_jax.training.step import init_state, make_loss, make_train_step
from tokalign_jax.utils import paths

POISON = VOCABULARY - 1
"""The token whose embedding is NaN in the tests of steps that are not finite."""


def losses(records):
    return [record["loss"] for record in records]


def final(folder, stage):
    """Final parameters of the stage, read from its folder."""
    return final_params(folder, stage, toy_params())


# --- Resuming -----------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def test_interrupted_run_resumes_from_its_checkpoint(tmp_path):
    def interrupt(line):
        if "step 6 of" in line:
            raise Interrupted

    stage = replace(STAGE, log_every=1)
    whole = train(tmp_path / "whole", stage)
    with pytest.raises(Interrupted):
        train(tmp_path / "parts", stage, log=interrupt)
    with pytest.raises(UserError, match="no checkpoint of step 8"):
        final(tmp_path / "parts", stage)
    with pytest.raises(UserError, match="4 sequences a step, this run has 8"):
        train(tmp_path / "parts", stage.with_batch(size=8))
    with pytest.raises(UserError, match="other settings"):
        train(tmp_path / "parts", replace(stage, learning_rate=1.0))

    lines = []
    rest = train(tmp_path / "parts", stage, log=lines.append)
    assert "resumed at step 3 of 8" in lines[0]
    assert_same(rest.params, whole.params)
    assert losses(rest.history) == losses(whole.history)
    assert_same(final(tmp_path / "parts", stage), whole.params)

    lines.clear()
    again = train(tmp_path / "parts", stage, log=lines.append)
    assert lines == ["stage: finished at step 8 of 8"]
    assert_same(again.params, whole.params)
    assert (again.stream_end, again.tokens, again.history) == (
        rest.stream_end,
        rest.tokens,
        rest.history,
    )


def test_final_adapter_parameters_load(tmp_path):
    stage = replace(STAGE, method="lora", steps=2)
    result = train(tmp_path, stage)
    assert_same(final(tmp_path, stage), result.params)


# --- Non-finite steps ---------------------------------------------------------------------------


def poisoned_params():
    params = toy_params()
    table = params["embed_tokens"]["embedding"]
    return params | {"embed_tokens": {"embedding": table.at[POISON].set(jnp.nan)}}


def poisoned_shards(steps):
    """Tokens without POISON, except in the sequences that the given steps (from 1) read."""
    tokens = np.minimum(toy_shards().tokens, POISON - 1)
    numbered = TokenSource(ToyShards(np.arange(len(tokens))), LENGTH)
    batches = list(make_stream(numbered, seed=0, epochs=1, offset=0, accumulation=2, micro_batch=2))
    for step in steps:
        tokens[batches[step - 1][0, 0, 3]] = POISON
    return ToyShards(tokens)


@pytest.mark.parametrize("method", ["embedding", "full"])
def test_initial_trainable_parameters_are_not_kept_in_memory(tmp_path, method):
    """On the devices there are float32s of it and of two moments, and what is frozen."""
    stage, sizes = replace(STAGE, method=method), []

    def held():
        return sum(array.nbytes for array in jax.live_arrays())

    def log(line):
        if "parameters train" in line:
            sizes.append(held())

    start = [sharding.place(toy_params(), sharding.make_mesh(CONFIG.mesh))]
    trained, frozen = (
        sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in split(stage, start[0])
    )
    others = held() - trained - frozen
    for _ in range(2):  # anew, and from a checkpoint
        start = start or [sharding.place(toy_params(), sharding.make_mesh(CONFIG.mesh))]
        run_stage("stage", stage, CONFIG, LLAMA, start.pop(), toy_shards(), tmp_path, 0, log)
        shutil.rmtree(tmp_path / "checkpoints" / str(stage.steps))
    assert len(sizes) == 2
    assert all(size - others - frozen < 3.1 * trained for size in sizes)


def test_non_finite_step_changes_nothing_and_is_counted():
    optimizer = make_optimizer(STAGE, paths.label_tree(rules_for("full"), toy_params()))
    mesh = sharding.make_mesh()
    step = make_train_step(make_loss(LLAMA, CONFIG.compute, None), optimizer, jnp.float32, mesh)
    source = TokenSource(poisoned_shards([2]), LENGTH)
    stream = make_stream(source, seed=0, epochs=1, offset=0, accumulation=2, micro_batch=2)
    good, bad, better = (jnp.asarray(next(stream)) for _ in range(3))

    def after(*batches):
        state, metrics = init_state(sharding.place(poisoned_params(), mesh), optimizer), {}
        for batch in batches:
            state, metrics = step(state, {}, batch, jax.random.key(0), schedule_of(STAGE))
        return state, metrics

    skipped, metrics = after(good, bad)
    assert not metrics["finite"] and np.isnan(metrics["loss"])
    assert (int(skipped.step), int(skipped.skipped), int(skipped.skipped_in_a_row)) == (2, 1, 1)
    before, _ = after(good)
    for kept, old in zip(
        jax.tree.leaves((skipped.params, skipped.opt_state)),
        jax.tree.leaves((before.params, before.opt_state)),
    ):
        np.testing.assert_array_equal(kept, old)
    state, metrics = after(good, bad, better)
    assert metrics["finite"]
    assert (int(state.step), int(state.skipped), int(state.skipped_in_a_row)) == (3, 1, 0)
    assert_same(state.params, after(good, better)[0].params)


def test_skipped_steps_are_reported_and_training_goes_on(tmp_path):
    lines = []
    shards = poisoned_shards([2, 3, 5])
    history = train(
        tmp_path,
        replace(STAGE, max_skipped_in_a_row=3),
        params=poisoned_params(),
        shards=shards,
        log=lines.append,
    ).history
    assert [record["step"] for record in history if record["loss"] is None] == [2, 3, 5]
    assert [record["skipped"] for record in history] == [0, 1, 2, 2, 3, 3, 3, 3]
    assert sum("is not finite and was skipped" in line for line in lines) == 3


def test_consecutive_skipped_steps_stop_and_name_the_last_good_checkpoint(tmp_path):
    stage = replace(STAGE, steps=20, max_skipped_in_a_row=4)
    shards = poisoned_shards(range(8, 21))
    for _ in range(2):  # running it again comes to the same end
        with pytest.raises(UserError, match="4 steps in a row, the last one step 11,") as error:
            train(tmp_path, stage, params=poisoned_params(), shards=shards)
        assert f"'{tmp_path / 'checkpoints' / '9'}'" in str(error.value)
        assert (tmp_path / "checkpoints" / "9").is_dir()
        assert [record["step"] for record in read(tmp_path / "metrics.jsonl")] == list(range(1, 12))
    with pytest.raises(UserError, match="no checkpoint yet"):
        train(
            tmp_path / "early",
            replace(stage, max_skipped_in_a_row=1),
            params=poisoned_params(),
            shards=poisoned_shards([1]),
        )


# --- Position in the stream ---------------------------------------------------------------------


def test_stage_continues_reading_where_the_previous_one_stopped(tmp_path):
    # With a rate of 0 the loss is a function of the data alone.
    still = replace(STAGE, learning_rate=0.0, start_offset=AFTER_PREVIOUS)
    whole = losses(train(tmp_path / "whole", replace(still, steps=6)).history)
    first = train(tmp_path / "first", replace(still, steps=3))
    assert (first.stream_end, first.tokens) == (12 * LENGTH, 12 * LENGTH)
    rest = train(tmp_path / "rest", replace(still, steps=3), previous_end=first.stream_end)
    np.testing.assert_allclose([*losses(first.history), *losses(rest.history)], whole, rtol=1e-6)
    assert rest.stream_end == 24 * LENGTH


def plan(previous_end=0, epochs=0, sequence_length=LENGTH, **changes):
    return plan_stage(
        "stage1",
        replace(STAGE, **changes).with_batch(sequence_length=sequence_length),
        replace(CONFIG, data=DataConfig(epochs)),
        LLAMA,
        toy_shards(),
        previous_end,
    )


def test_stage_plans_follow_the_settings():
    sequences = (4000 - 1) // LENGTH
    assert plan() == (0, 32 * LENGTH)
    assert plan(start_offset=AFTER_PREVIOUS, previous_end=32 * LENGTH) == (32, 64 * LENGTH)
    assert plan(start_offset=0.5) == (sequences // 2, (sequences // 2 + 32) * LENGTH)
    assert plan(steps=0, previous_end=7) == (0, 7)
    assert plan(steps=1000) == (0, 4000 * LENGTH)  # as many passes as needed


def test_position_is_kept_in_tokens_across_sequence_lengths():
    assert plan(start_offset=AFTER_PREVIOUS, previous_end=10 * 8, sequence_length=8) == (
        10,
        (10 + 32) * 8,
    )
    assert plan(start_offset=AFTER_PREVIOUS, previous_end=10 * 8, sequence_length=20) == (
        4,
        (4 + 32) * 20,
    )
    assert plan(start_offset=AFTER_PREVIOUS, previous_end=10 * 8 + 1, sequence_length=20) == (
        5,
        (5 + 32) * 20,
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(sequence_length=33), r"stage1.batch.sequence_length is 33 .* 32 positions"),
        (dict(sequence_length=20, start_offset=1000), "the stream has 199 sequences"),
        (dict(steps=100, epochs=1), r"0 to 400 .* ends at 333 .* data.epochs to 2"),
    ],
)
def test_impossible_stage_plans_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        plan(**changes)


def test_corpus_shorter_than_a_sequence_is_refused():
    with pytest.raises(UserError, match="12 tokens, fewer than the 13"):
        plan_stage("stage1", STAGE, CONFIG, LLAMA, toy_shards(12), 0)


def test_stage_without_steps_is_skipped(tmp_path):
    params, stage = toy_params(), replace(STAGE, steps=0)
    result = run_stage("stage", stage, CONFIG, LLAMA, params, toy_shards(), tmp_path, 5, print)
    assert result.params is params and result.stream_end == 5
    assert load_trained(tmp_path, stage, LLAMA, sharding.make_mesh()) == {}
    assert not list(tmp_path.iterdir())
