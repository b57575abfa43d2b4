"""Stage 3: whole runs with a teacher, and refused teachers."""

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from tests.helpers import tiny_model_folder, tiny_tokenizer
from tests.pipeline.toy_runs import write_corpus
from tests.training.toys import LLAMA, NEOX
from tokalign_jax import pipeline
from tokalign_jax.config import (
    BatchConfig,
    ComputeConfig,
    Config,
    DistillationConfig,
    MeshConfig,
    StageConfig,
    config_from_dict,
)
from tokalign_jax.errors import UserError
from tokalign_jax.parallel import sharding
from tokalign_jax.pipeline import checks, stages, states
from tokalign_jax.pipeline.context import Context
from tokalign_jax.planning import memory
from tokalign_jax.planning.flops import flops_per_token
from tokalign_jax.planning.machine import Machine, Speed
from tokalign_jax.planning.report import make_plan
from tokalign_jax.reporting.model_card import front_matter
from tokalign_jax.training import distillation
from tokalign_jax.training.losses import head_of
from tokalign_jax.training.optimizer import make_optimizer, rules_for, schedule_of
from tokalign_jax.training.step import init_state, make_train_step
from tokalign_jax.utils import paths

TOKENIZER = tiny_tokenizer(300, ["a"])
"""Tokenizer of models whose tokenizer files are then replaced."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, Path]:
    """A source model, a target tokenizer, and a teacher of another family that has it and more rows
    than it needs.
    """
    folder = tmp_path_factory.mktemp("inputs")
    corpus = write_corpus(folder)
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    target = tiny_tokenizer(420, texts, kind="metaspace")
    target.save_pretrained(folder / "target")
    return {
        "corpus": corpus,
        "target": folder / "target",
        "llama": tiny_model_folder(
            folder / "llama", "llama", 320, tied=True, tokenizer=tiny_tokenizer(300, texts[:10])
        ),
        "teacher": tiny_model_folder(
            folder / "teacher", "gpt_neox", 600, tokenizer=target, hidden_size=24, seed=1
        ),
    }


def config_of(
    inputs: dict[str, Path], changes: Mapping[str, Any] = MappingProxyType({}), **stage3: Any
) -> Config:
    """A run of Stage 1 and Stage 3, a few small steps each, with `changes` and those of Stage 3."""
    stage = {
        "batch": {"size": 4, "per_device": 2, "sequence_length": 32},
        "checkpoints": {"every": 2},
        "log_every": 1,
    }
    taught = {
        "teacher": str(inputs["teacher"]),
        "divergence": "mixed",
        "temperature": 2.0,
        "weight": 0.8,
    }
    given = {
        "source_model": str(inputs["llama"]),
        "target_tokenizer": str(inputs["target"]),
        "corpus": str(inputs["corpus"]),
        "text": {"held_out_fraction": 0.1},
        "alignment": {"method": "pieces"},
        "initialization": {"tokens": 0},
        "stage1": {**stage, "steps": 3},
        "stage2": {"steps": 0},
        "stage3": {**stage, **taught, "steps": 4, "learning_rate": 0.01, **stage3},
        "compute": {"dtype": "float32", "remat": "dots"},
        "evaluation": {
            "sequence_length": 32,
            "sample_tokens": 4,
            "prompts": ("the model",),
            "random_baseline": False,
        },
    }
    return config_from_dict({**given, **changes})


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory) -> Path:
    """The workdir of a whole run."""
    return pipeline.run(config_of(inputs), tmp_path_factory.mktemp("runs") / "run", None, print)


def records(workdir: Path) -> dict:
    return json.loads((workdir / "stages.json").read_text())["stages"]


# --- Runs ---------------------------------------------------------------------------------------


def test_stage_3_trains_and_is_exported_and_reported(inputs, run):
    stages = records(run)
    assert all(record["finished"] for record in stages.values()) and "evaluate/stage3" in stages
    # It reads on where the stage before stopped, and what it ends with is exported and reported.
    ends = [stages[name]["summary"]["stream_end"] for name in ("stage1", "stage3")]
    assert ends == [3 * 4 * 32, 7 * 4 * 32]
    assert stages["export"]["needs"] == ["init", "stage1", "stage3"]
    report = json.loads((run / "report" / "report.json").read_text())
    assert list(report["languages"]["all"]["bits_per_byte"]) == [
        "source",
        "init",
        "stage1",
        "stage3",
    ]
    before, after = (load_file(run / name / "model.safetensors") for name in ("init", "export"))
    assert any((before[name] != after[name]).any() for name in before if "layers.1.mlp" in name)
    card = (run / "export" / "README.md").read_text()
    assert (
        "stage3.divergence" in card
        and "stage2.steps" not in card
        and str(inputs["teacher"]) not in card
    )
    assert "distilled from `teacher`" in card and front_matter(card)


def test_stage_3_lowers_the_divergence_from_the_teacher(run):
    """In four steps, the divergence falls, which is most of the loss."""
    losses = [
        json.loads(line)["loss"]
        for line in (run / "stage3" / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(losses) == 4 and losses[-1] < losses[0]


class Killed(BaseException):
    pass


def test_killed_stage_3_resumes_to_the_same_bits(inputs, run, tmp_path):
    def kill(line: str) -> None:
        if "stage3: step 3 of" in line:  # the newest checkpoint is of step 2
            raise Killed

    def final(workdir: Path) -> dict[str, np.ndarray]:
        context = Context(config_of(inputs), workdir, print)
        _, params = states.load_state(context, ["init", "stage1", "stage3"])
        return {path: np.asarray(leaf) for path, leaf in paths.flatten(params).items()}

    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    shutil.rmtree(broken / "stage3")
    content = json.loads((broken / "stages.json").read_text())
    content["stages"]["stage3"]["finished"] = False
    (broken / "stages.json").write_text(json.dumps(content))
    with pytest.raises(Killed):
        pipeline.run(config_of(inputs), broken, ["stage3"], kill)
    lines: list[str] = []
    pipeline.run(config_of(inputs), broken, ["stage3"], lines.append)
    assert any("stage3: resumed at step 2 of 4" in line for line in lines)
    one, other = final(run), final(broken)
    assert one.keys() == other.keys() and all(
        np.array_equal(one[path], other[path]) for path in one
    )


def test_fingerprint_of_stage_3_covers_the_teacher(inputs, run, tmp_path):
    def prints(**changes: Any) -> dict[str, str]:
        return pipeline.fingerprints_of(Context(config_of(inputs, **changes), run, print))

    recorded = {name: record["fingerprint"] for name, record in records(run).items()}
    assert prints() == recorded
    # A copy of the teacher elsewhere is the same one; other weights are not.
    same, other = tmp_path / "same", tmp_path / "other"
    shutil.copytree(inputs["teacher"], same)
    assert prints(teacher=str(same)) == recorded
    shutil.copytree(inputs["teacher"], other)
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"1234")
    for changed in (
        prints(teacher=str(other)),
        prints(temperature=3.0),
        prints(divergence="reverse"),
    ):
        redone = {name for name in recorded if changed[name] != recorded[name]}
        assert redone == {"stage3", "evaluate/stage3", "export", "report"}
    assert "stage3" not in prints(teacher="") and prints(teacher="")["stage1"] == recorded["stage1"]


def test_unsuitable_teacher_is_refused_before_any_work(inputs, tmp_path):
    def refused(changes: Mapping[str, Any] = MappingProxyType({}), **stage3: Any) -> str:
        with pytest.raises(UserError) as error:
            pipeline.run(config_of(inputs, changes, **stage3), tmp_path / "run", None, print)
        assert not (tmp_path / "run").exists()
        return str(error.value)

    output = refused(teacher=str(inputs["llama"]))
    assert (
        "another tokenizer" in output
        and "ids are other tokens, the first is 0, '<unk>' here" in output
    )
    short = tiny_model_folder(
        tmp_path / "short", "llama", 420, tokenizer=TOKENIZER, max_position_embeddings=16
    )
    for file in inputs["target"].iterdir():
        shutil.copyfile(file, short / file.name)
    assert (
        "16 positions" in (output := refused(teacher=str(short)))
        and "stage3.batch.sequence_length" in output
    )
    assert "target_tokenizer=extend" in refused({"target_tokenizer": "extend"})
    assert "stage3.temperature" in refused(temperature=0.0)
    assert "stage3.teacher 'nobody/nothing'" in refused(teacher="nobody/nothing")
    few = tiny_model_folder(tmp_path / "few", "llama", 400, tokenizer=TOKENIZER)
    for file in inputs["target"].iterdir():
        shutil.copyfile(file, few / file.name)
    assert "400 rows" in refused(teacher=str(few))
    whole = (few / "model.safetensors").read_bytes()
    (few / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors" in refused(teacher=str(few))


def test_teacher_may_lack_rows_of_unused_special_tokens(inputs, tmp_path):
    """As Gemma 3 1B, which has no row for the image token of its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(inputs["target"])
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    folder = str(tiny_model_folder(tmp_path / "teacher", "llama", rows, tokenizer=tokenizer))

    def context(**changes: Any) -> Context:
        return Context(
            config_of(inputs, {"target_tokenizer": folder, **changes}, teacher=folder),
            tmp_path / "run",
            print,
        )

    taught = context()
    checks.check(taught)
    assert taught.inputs.target_size == rows + 1
    objective = stages._objective(taught, taught.config.stage3, taught.inputs.new_model)
    assert objective.facts["vocabulary"] == rows
    with pytest.raises(UserError, match=f"{rows} rows"):
        checks.check(context(end_of_text="<image>"))


# --- The plan -----------------------------------------------------------------------------------

SIZES = {"vocab_size": 4000, "hidden_size": 64, "intermediate_size": 128, "max_positions": 512}
STUDENT = replace(LLAMA, **SIZES, head_dim=16)
TEACHER = replace(NEOX, **SIZES | {"vocab_size": 4096, "hidden_size": 96}, head_dim=24)
STAGE = DistillationConfig(
    method="full",
    steps=4,
    teacher="somewhere",
    weight=0.5,
    batch=BatchConfig(size=4, per_device=4, sequence_length=128),
)
COMPUTE = ComputeConfig(dtype="float32", remat="dots", loss_chunk=256)


def compiled_memory() -> tuple[int, int]:
    """Bytes of arguments and temporaries of a real step, compiled and not run."""
    mesh = sharding.make_mesh(MeshConfig(1, 1, 1), devices=jax.devices()[:1])

    def in_memory(tree):
        leaves = paths.flatten(tree).items()
        return paths.unflatten(
            {p: jax.ShapeDtypeStruct(sharding.padded_shape(p, x.shape), x.dtype) for p, x in leaves}
        )

    trained, frozen = map(in_memory, memory.shapes(STUDENT, STAGE))
    taught, _ = map(in_memory, memory.shapes(TEACHER, StageConfig(method="full")))
    optimizer = make_optimizer(STAGE, paths.label_tree(rules_for("full"), trained))
    how = distillation.Teaching(
        head_of(STUDENT, COMPUTE), head_of(TEACHER, COMPUTE), 4000, weight=0.5
    )
    loss = distillation.make_distillation_loss(STUDENT, TEACHER, how, COMPUTE, None)
    step = make_train_step(loss, optimizer, jnp.float32, mesh)
    state = jax.eval_shape(lambda params: init_state(params, optimizer), trained)
    batch = jax.ShapeDtypeStruct((1, 4, 129), jnp.int32)
    found = step.lower(
        state, (frozen, taught), batch, jax.random.key(0), schedule_of(STAGE)
    ).compile()
    sizes = found.memory_analysis()
    return sizes.argument_size_in_bytes, sizes.temp_size_in_bytes


def test_plan_counts_the_teacher():
    machine = Machine(1, math.inf, fused_attention=False)
    setup = memory.Setup("stage3", STAGE, COMPUTE, STUDENT, (1, 1, 1), machine, TEACHER)
    kinds = memory.stage_memory(setup)
    arguments, temporaries = compiled_memory()
    held = sum(
        size for kind, size in kinds.items() if kind.startswith(("parameters", "teacher", "Adam"))
    )
    assert 0 <= arguments - held - 4 * 4 * 129 < 1000
    assert 0.9 < (sum(kinds.values()) - held) / temporaries < 1.7

    config = Config(stage1=STAGE, stage2=STAGE, stage3=STAGE, compute=COMPUTE)
    found = make_plan(
        config, STUDENT, Machine.of(1, "1GB"), Speed(peak=1e12), 10**6, 2, 1e12, TEACHER
    )
    assert [stage.name for stage in found.stages] == [
        "stage1",
        "stage2",
        "stage3",
    ] and "stage3" in found.disk
    assert "teacher (float32)" in found.table()
    alone = replace(STAGE, weight=0.0)
    more = flops_per_token(STUDENT, STAGE, TEACHER) - flops_per_token(STUDENT, alone)
    products = 2 * (4 * 96**2 + 2 * 96 * 128) + 4096 * 96
    assert more == 2 * products + 2 * 4 * 96 * 128, "a forward pass of it"
    without = make_plan(
        replace(config, stage3=replace(STAGE, teacher="")),
        STUDENT,
        found.machine,
        Speed(),
        10**6,
        2,
    )
    assert [stage.name for stage in without.stages] == [
        "stage1",
        "stage2",
    ] and "stage3" not in without.disk
