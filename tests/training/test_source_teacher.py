"""Distillation from the source model: losses against float64, sequences, resuming, plans."""

import itertools
import math
from dataclasses import replace

import jax
import numpy as np
import optax
import pytest

from tests.training.toys import (
    CONFIG,
    LENGTH,
    LLAMA,
    STAGE,
    ToyShards,
    assert_same,
    source_text,
    toy_params,
    toy_shards,
    train,
)
from tokalign_jax.config import (
    ComputeConfig,
    DistillationConfig,
    ObjectiveWeights,
    StageConfig,
    config_from_dict,
    settings_of,
)
from tokalign_jax.errors import UserError
from tokalign_jax.models import transformer
from tokalign_jax.parallel import sharding
from tokalign_jax.planning import memory
from tokalign_jax.planning.flops import flops_per_token
from tokalign_jax.planning.machine import Machine
from tokalign_jax.text.boundaries import NONE
from tokalign_jax.training import cross_tokenizer, source_teacher
from tokalign_jax.training.batches import PairedSource, TokenSource
from tokalign_jax.training.step import NEXT_TOKEN

TEACHER = replace(LLAMA, vocab_size=53, max_positions=64)
COMPUTE = ComputeConfig(dtype="float32", loss_chunk=10)


def taught(stage, mesh=None):
    params = sharding.place(toy_params(TEACHER, 1), mesh or sharding.make_mesh())
    teacher = source_teacher.Teacher(TEACHER, params, "teacher")
    return source_teacher.objective(stage, teacher, source_text(TEACHER.vocab_size))


def batch_of(count=3):
    every = PairedSource(toy_shards(), LENGTH, source_text(TEACHER.vocab_size), 32)
    items = [every[i] for i in range(count)]
    batch = {key: np.stack([item[key] for item in items]) for key in items[0]}
    batch["tokens"][1, 4:7] = ~batch["tokens"][1, 4:7]  # read, not predicted
    return batch


def reference(params, teacher, batch, weights):
    """The loss by its formulas, over whole logits in float64, with loops over positions."""

    def nats(config, tree, read, labels):
        logits = np.asarray(transformer.logits(config, tree, read), np.float64)
        logits -= logits.max(-1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        return -np.take_along_axis(logits, np.maximum(labels, 0)[..., None], -1)[..., 0]

    tokens, source, positions = (batch[key] for key in ("tokens", "source", "positions"))
    read, labels = np.where(tokens < 0, ~tokens, tokens)[:, :-1], tokens[:, 1:]
    q = nats(LLAMA, params, read, labels)
    p = nats(TEACHER, teacher, source[:, :-1], source[:, 1:])
    own = np.asarray(transformer.forward(LLAMA, params, read), np.float64)
    theirs = np.asarray(transformer.forward(TEACHER, teacher, source), np.float64)
    total, t = 0.0, cross_tokenizer.TEMPERATURE
    for row in range(len(tokens)):
        predicted = labels[row] >= 0
        total += weights.next_token * q[row][predicted].sum()
        variance = np.square(theirs[row] - theirs[row].mean(0)).sum(-1).mean()
        shared = [(i, j) for i, j in enumerate(positions[row].tolist()) if j != NONE]
        for (i, j), (k, m) in itertools.pairwise(shared):
            if predicted[i:k].all():
                a, b = math.exp(-p[row, j:m].sum() / t), math.exp(-q[row, i:k].sum() / t)
                one = a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b))
                total += weights.likelihood * t * one
            if k == i + 1 and m == j + 1 and predicted[i]:
                total += weights.states * np.square(own[row, i] - theirs[row, j]).sum() / variance
    return total, (labels >= 0).sum()


@pytest.mark.parametrize(
    "weights",
    [
        ObjectiveWeights(1.0, 0.5, 2.0),
        ObjectiveWeights(0.0, 1.0, 0.0),
        ObjectiveWeights(0.0, 0.0, 1.0),
        ObjectiveWeights(0.7, 0.0, 0.3),
    ],
)
def test_value_and_gradient_match_float64(weights):
    params, teacher = toy_params(LLAMA), toy_params(TEACHER, 1)
    batch, make = batch_of(), source_teacher.SourceDistillation(TEACHER, weights)
    loss = make(LLAMA, COMPUTE, None)
    keys = jax.random.split(jax.random.key(0), 3)
    value = jax.jit(lambda tree: loss(tree, ({}, teacher), batch, keys))
    expected, count = reference(params, teacher, batch, weights)
    np.testing.assert_allclose(value(params), (expected, count), rtol=2e-4)

    # The slope along the gradient, by differences of the float64 reference.
    gradient = jax.jit(jax.grad(lambda tree: value(tree)[0]))(params)
    norm = float(optax.global_norm(gradient))
    step = 1e-3
    ends = [
        jax.tree.map(lambda x, g, s=s: x + s * step / norm * g, params, gradient) for s in (1, -1)
    ]
    above, below = (reference(end, teacher, batch, weights)[0] for end in ends)
    assert (above - below) / (2 * step) == pytest.approx(norm, rel=1e-3)


def test_sequences_pair_the_text_with_source_tokens():
    text, shards = source_text(TEACHER.vocab_size), toy_shards()
    plain, paired = TokenSource(shards, LENGTH), PairedSource(shards, LENGTH, text, 16)
    assert len(plain) == len(paired)
    cut = 0
    for index in range(len(plain)):
        item, begin = paired[index], index * LENGTH
        np.testing.assert_array_equal(item["tokens"], plain[index])
        shared = text.positions[begin : begin + LENGTH]
        start = shared[shared != NONE][0]
        for place, position in enumerate(item["positions"].tolist()):
            if position == NONE:
                cut += shared[place] != NONE
                assert shared[place] == NONE or shared[place] - start >= 16
            else:
                assert start + position == shared[place]
                assert item["source"][position] == text.shards.tokens[shared[place]]
    assert cut > 10, "the end of long texts has no positions"


def test_sequence_without_a_shared_boundary_has_no_positions():
    text = source_text(TEACHER.vocab_size)._replace(positions=np.full(4000, NONE, np.int32))
    assert (PairedSource(toy_shards(), LENGTH, text, 16)[5]["positions"] == NONE).all()


def test_both_sides_begin_with_their_opening_tokens():
    text, shards = source_text(TEACHER.vocab_size), replace(toy_shards(), opening=7)
    text = text._replace(shards=ToyShards(np.asarray(text.shards.tokens), opening=9))
    for index in range(50):
        item = PairedSource(shards, LENGTH, text, 16)[index]
        assert item["tokens"][0] == 7 and item["source"][0] == 9
        # The first boundary counts where both have read nothing else.
        first = item["positions"].tolist().index(0) if 0 in item["positions"] else 0
        assert first == 0


@pytest.mark.parametrize(("method", "objective"), [("full", "distillation"), ("lora", "mixture")])
def test_stage_resumes_to_the_same_bits(tmp_path, method, objective):
    stage = replace(STAGE, method=method, objective=objective)
    whole = train(tmp_path / "whole", stage, objective=taught(stage))
    if method == "full":
        losses = [record["loss"] for record in whole.history]
        half = len(losses) // 2  # batches differ more than one step changes
        assert sum(losses[half:]) < sum(losses[:half])

    class Killed(Exception):
        pass

    def kill_late(line):
        if "step 4 of" in line:
            raise Killed

    with pytest.raises(Killed):
        train(
            tmp_path / "killed", replace(stage, log_every=1), objective=taught(stage), log=kill_late
        )
    resumed = train(tmp_path / "killed", stage, objective=taught(stage))
    assert_same(whole.params, resumed.params)
    for other in (replace(stage, weights=ObjectiveWeights(1.0, 0.1, 0.2)), stage):
        with pytest.raises(UserError, match="other settings"):
            given = NEXT_TOKEN if other is stage else taught(other)
            train(tmp_path / "killed", other, objective=given)


def test_loss_does_not_depend_on_micro_batches(tmp_path):
    """Sequences have unlike numbers of chunks; micro-batches of 1 and of 4 still make the same
    step.
    """
    stage = replace(STAGE, objective="mixture", steps=2)
    one, other = (
        train(tmp_path / str(n), stage.with_batch(per_device=n), objective=taught(stage))
        for n in (1, 4)
    )
    for first, second in zip(one.history, other.history):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
        assert first["gradient_norm"] == pytest.approx(second["gradient_norm"], rel=1e-4)


@pytest.mark.parametrize("objective", ["next_token", "mixture", "distillation"])
def test_steps_without_predicted_tokens_change_nothing(tmp_path, objective):
    """Such are sequences inside a user's long message, or of generated texts of one token."""
    shards = replace(toy_shards(), unlearned=np.array([[0, 4000]]))
    optimizer = replace(STAGE.optimizer, weight_decay=0.0)
    stage = replace(STAGE, method="full", objective=objective, steps=2, optimizer=optimizer)
    given = NEXT_TOKEN if objective == "next_token" else taught(stage)
    result = train(tmp_path, stage, objective=given, shards=shards)
    assert {record["loss"] for record in result.history} == {0.0}
    assert_same(result.params, toy_params())


def test_contradicting_settings_are_refused():
    with pytest.raises(UserError, match=r"stage1\.weights\.likelihood"):
        config_from_dict(
            {"stage1": {"objective": "mixture", "weights": {"likelihood": 0.0, "states": 0.0}}}
        )
    with pytest.raises(UserError, match=r"stage3\.teacher"):
        config_from_dict({"stage3": {"objective": "distillation"}})
    with pytest.raises(UserError, match="mixture"):
        config_from_dict({"stage2": {"objective": "mixed"}})
    partly = config_from_dict({"stage2": {"weights": {"states": 0.0}}}).stage2.weights
    assert partly == ObjectiveWeights(states=0.0)


def test_fingerprint_excludes_weights_without_effect():
    plain, other = StageConfig(), StageConfig(weights=ObjectiveWeights(likelihood=9.0))
    assert settings_of(plain) == settings_of(other)
    taught = replace(plain, objective="distillation")
    assert settings_of(taught) != settings_of(replace(other, objective="distillation"))
    further = replace(taught, weights=ObjectiveWeights(next_token=9.0))
    assert settings_of(taught) == settings_of(further)
    assert source_teacher.weights_of(further).next_token == 0


def test_plan_counts_the_teacher():
    stage = replace(STAGE, objective="mixture")
    config = replace(CONFIG, stage1=stage, stage2=replace(STAGE, steps=0))
    teachers = memory.teachers(config, TEACHER, None)
    assert teachers == {"stage1": TEACHER}
    machine = Machine(1, math.inf, fused_attention=False)
    setup = memory.Setup("stage1", stage, config.compute, LLAMA, (1, 1, 1), machine, TEACHER)
    with_teacher = memory.stage_memory(setup)
    without = memory.stage_memory(replace(setup, teacher=None))
    size = memory.elements(transformer.abstract_params(TEACHER), (1, 1, 1))
    assert with_teacher["teacher (float32)"] == 4 * size
    assert sum(with_teacher.values()) > sum(without.values()) + 4 * size
    alone = memory.state_bytes(config, LLAMA, {})
    parameters = memory.parameters(transformer.abstract_params(TEACHER))
    assert memory.state_bytes(config, LLAMA, teachers) == alone + 2 * parameters

    length = source_teacher.source_length(LENGTH, TEACHER)
    more = flops_per_token(LLAMA, stage, TEACHER) - flops_per_token(LLAMA, stage)
    forward = 2 * 2 * (16 * (16 + 8 + 8 + 16) + 3 * 16 * 24) + 2 * 16 * 53 + 4 * 2 * 16 * length
    assert more == forward * length / LENGTH + 2 * LLAMA.vocab_size * 16
    assert memory.teachers(replace(config, stage3=DistillationConfig()), TEACHER, None) == teachers


def test_teacher_reads_at_most_its_positions():
    assert source_teacher.source_length(2048, TEACHER) == 64
    assert source_teacher.source_length(16, TEACHER) == 64
    assert source_teacher.source_length(2048, replace(TEACHER, max_positions=4096)) == 2816
