"""Whole runs of every config on tiny local models."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers import tiny_model_folder
from tests.pipeline.toy_runs import LICENSE, REPOSITORY, arguments
from tokalign_jax import main
from tokalign_jax.parallel import sharding
from tokalign_jax.reporting.model_card import front_matter
from tokalign_jax.training import loop, metrics

CONFIGS = {
    "ultra_quick_demo": ("llama", ()),
    "three_hour_eval": ("gpt_neox", ()),
    "optimal": ("llama", ()),
    "research": ("gpt_neox", ("--config.stage2.start_offset=30",)),
    "best": ("llama", ("--config.stage2.batch.per_device=auto",)),
}
"""Model family and further flags of the run of each config."""
STATES = ["source", "random", "init", "stage1", "stage2"]


def array_bytes(arrays) -> int:
    return sum(array.nbytes for array in jax.tree.leaves(arrays))


def teacher_bytes(source: Path) -> int:
    """Return the bytes of a model with tied embeddings in bfloat16, with the mesh's padding rows."""
    sizes = {name: tuple(x.shape) for name, x in load_file(source / "model.safetensors").items()}
    embedding = sizes["model.embed_tokens.weight"]
    mesh = sharding.make_mesh()
    sizes["model.embed_tokens.weight"] = sharding.padded_shape(
        "embed_tokens/embedding", embedding, mesh
    )
    return sum(2 * int(np.prod(size)) for size in sizes.values())


@dataclass(frozen=True)
class FinishedRun:
    command: list[str]
    workdir: Path
    printed: str
    other_device_bytes: int
    """Most bytes on the devices at the start of a stage, beyond its state and frozen parameters."""


def whole_run(config: str, inputs: dict[str, Path], folder: Path) -> FinishedRun:
    """Run every stage of a config."""
    family, more = CONFIGS[config]
    other_text = folder / "other.jsonl"
    other_text.write_text(json.dumps({"text": "quite another text\n" * 9, "lang": "en"}))
    more = (*more, f"--config.evaluation.other_text={other_text}")
    before, beside, announce = array_bytes(jax.live_arrays()), [], loop._Run.announce

    def measuring(run, state, frozen):
        beside.append(array_bytes(jax.live_arrays()) - before - array_bytes((state, frozen)))
        announce(run, state, frozen)

    command = arguments(inputs, family, folder / "run", config, *more)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(loop._Run, "announce", measuring)
        assert main.main(command) == 0
    return FinishedRun(command, folder / "run", out.getvalue(), max(beside))


@pytest.fixture(scope="module")
def demo(inputs, tmp_path_factory) -> FinishedRun:
    """The run of `ultra_quick_demo`; tests that change its workdir copy it."""
    return whole_run("ultra_quick_demo", inputs, tmp_path_factory.mktemp("demo"))


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_every_config_runs_end_to_end(config, inputs, tmp_path, request):
    if config == "ultra_quick_demo":
        run = request.getfixturevalue("demo")
    else:
        run = whole_run(config, inputs, tmp_path)
    teacher = teacher_bytes(inputs[CONFIGS[config][0]]) if config == "best" else 0
    assert teacher <= run.other_device_bytes < teacher + 1000
    assert ("stage2: batch.per_device=auto: 4 sequences per device at once" in run.printed) == (
        config == "best"
    )
    report = json.loads((run.workdir / "report" / "report.json").read_text())
    assert set(report["languages"]) == {"en", "fr", "all"}
    for language in report["languages"].values():
        assert list(language["bits_per_byte"]) == STATES
        assert all(np.isfinite(list(language["bits_per_byte"].values())))
    kept = report["kept"]["states"]
    assert list(kept) == STATES
    assert all(state["other_text"]["pooled"]["bytes"] == 171 for state in kept.values())
    assert ["fidelity" in state for state in kept.values()] == [False, True, True, True, True]
    asked = [True, False, True, True, True] if config == "ultra_quick_demo" else [False] * 5
    assert ["abilities" in state for state in kept.values()] == asked
    markdown = (run.workdir / "report" / "report.md").read_text()
    assert ("Abilities by suite" in markdown) == asked[0]
    assert markdown.count("| all") == 2  # held-out and other text
    assert (run.workdir / "report" / "report.png").stat().st_size > 10_000
    page = (run.workdir / "report" / "report.html").read_text()
    for title in ("stage 2", "The same text in tokens", "Continuations", "Worst rows"):
        assert title in page
    assert "| all" in run.printed and "the model" in run.printed

    check_export(run.workdir)


def check_export(workdir: Path) -> None:
    """Check that the export is an ordinary Hugging Face folder with the new vocabulary."""
    model = AutoModelForCausalLM.from_pretrained(workdir / "export", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(workdir / "export")
    assert model.config.vocab_size == len(tokenizer) == model.get_input_embeddings().weight.shape[0]
    assert model.config.bos_token_id == tokenizer.bos_token_id
    assert model.config.eos_token_id == tokenizer.eos_token_id
    prompt = tokenizer("the model", return_tensors="pt")
    continued = model.generate(**prompt, max_new_tokens=3, min_new_tokens=3)
    assert continued.shape[1] == prompt["input_ids"].shape[1] + 3
    matrix = json.loads((workdir / "align" / "align_matrix.json").read_text())
    assert sorted(map(int, matrix)) == list(range(len(tokenizer)))


def test_export_has_a_model_card_and_the_licence_of_the_source(demo):
    export = demo.workdir / "export"
    card = (export / "README.md").read_text()
    metadata = front_matter(card)
    assert metadata["license"] == "apache-2.0" and set(metadata["language"]) == {"en", "fr"}
    assert (export / "LICENSE").read_text() == LICENSE
    assert "stage1.learning_rate" in card and "initialised" in card and "exact" in card


@pytest.mark.slow
def test_repeated_run_skips_and_a_changed_field_redoes_what_depends_on_it(demo, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(demo.workdir, workdir)

    def run(*more: str) -> str:
        command = [f"--workdir={workdir}" if "--workdir" in flag else flag for flag in demo.command]
        assert main.main([*command, *more]) == 0
        return capsys.readouterr().out

    stages = json.loads((workdir / "stages.json").read_text())["stages"]
    repeated = run()
    assert all(f"{stage}: finished, skipped" in repeated for stage in stages)

    changed = run("--config.stage2.learning_rate=4e-3")
    assert (
        "stage2: to be redone, because stage2.learning_rate changed from 0.0005 to 0.004" in changed
    )
    for kept in ("corpus", "tokens", "align", "init", "stage1"):
        assert f"{kept}: finished, skipped" in changed
    for kept in ("source", "stage1"):
        assert f"evaluate/{kept}: finished, skipped" in changed
    for redone in ("export", "evaluate/stage2", "report"):
        assert f"{redone}: to be redone, because a stage that it needs changed" in changed
    # The outdated result is kept, and restored with its settings.
    assert any((workdir / "outdated").glob("stage2-*"))
    assert "stage2: done before with these settings, restored" in run()

    # A field without effect on results redoes nothing.
    assert "to be redone" not in run(
        "--config.stage2.log_every=1", "--config.stage2.checkpoints.keep=3"
    )


@pytest.mark.slow
def test_best_checkpoint_by_validation_is_exported(inputs, tmp_path, capsys):
    workdir = tmp_path / "run"
    validated = ("--config.stage2.validation_every=1", "--config.stage2.learning_rate=0.3")
    skipped = ("--config.evaluation.random_baseline=False", "--stages=export,report")

    def run(*more: str) -> str:
        command = arguments(inputs, "llama", workdir, "optimal", *validated, *skipped, *more)
        assert main.main(command) == 0
        return capsys.readouterr().out

    assert "stage2: step 1, validation loss" in run()
    record = json.loads((workdir / "report" / "report.json").read_text())["training"]["stage2"]
    measured = record["validation"]["validation_loss"]
    assert len(measured) == 3 and min(measured) < measured[-1]  # that rate is far too high
    last = (workdir / "export" / "model.safetensors").read_bytes()

    # Another `result` trains nothing again; only what reads it is redone.
    printed = run("--config.stage2.result=best")
    assert "stage2: finished, skipped" in printed and "stage1: finished, skipped" in printed
    assert "export: to be redone" in printed and "evaluate/stage2: to be redone" in printed
    assert "evaluate/stage1: finished, skipped" in printed
    best = (workdir / "export" / "model.safetensors").read_bytes()
    assert best != last
    # The last as the result brings the other export back.
    assert "export: done before with these settings, restored" in run()
    assert (workdir / "export" / "model.safetensors").read_bytes() == last


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_bits(inputs, tmp_path):
    flags = ("--config.stage1.steps=6", "--config.stage1.log_every=1", "--stages=export")
    uninterrupted, killed = (
        arguments(inputs, "gpt_neox", tmp_path / name, "three_hour_eval", *flags)
        for name in ("uninterrupted", "killed")
    )
    assert main.main(uninterrupted) == 0
    command = [sys.executable, "-m", "tokalign_jax.main", *killed[1:]]
    # As without these tests' settings, on a CPU.
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    with subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        for line in process.stdout:
            if "stage1: step 3" in line:  # the newest checkpoint is of step 2
                process.kill()
                break
    assert process.returncode == -signal.SIGKILL
    record = json.loads((tmp_path / "killed" / "stages.json").read_text())["stages"]
    assert record["init"]["finished"] and not record["stage1"]["finished"]
    assert main.main(killed) == 0
    for name in ("model.safetensors", "config.json"):
        resumed = (tmp_path / "killed" / "export" / name).read_bytes()
        assert resumed == (tmp_path / "uninterrupted" / "export" / name).read_bytes()


@pytest.mark.slow
def test_results_do_not_depend_on_the_xla_settings_of_these_tests(demo, inputs, tmp_path):
    """With XLA's optimizations, which conftest.py disables, losses and weights are the same."""
    disabled = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS", "JAX_COMPILATION_CACHE_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in disabled}
    workdir = tmp_path / "run"
    command = arguments(inputs, "llama", workdir, "ultra_quick_demo", "--stages=export")
    done = subprocess.run(
        [sys.executable, "-m", "tokalign_jax.main", *command[1:]],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    optimized, expected = (
        load_file(folder / "export" / "model.safetensors") for folder in (workdir, demo.workdir)
    )
    assert optimized.keys() == expected.keys()
    for name, tensor in expected.items():
        # As a whole: Adam makes a gradient of nothing but rounding as large as any other.
        assert (optimized[name] - tensor).norm() < 1e-3 * tensor.norm(), name
    for stage in ("stage1", "stage2"):
        losses = [
            [record["loss"] for record in metrics.read(folder / stage / "metrics.jsonl")]
            for folder in (workdir, demo.workdir)
        ]
        assert len(losses[1]) == 3 and losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.slow
def test_frozen_weights_are_exported_bit_for_bit(inputs, tmp_path):
    """A bfloat16 source through an initialisation of rows alone and Stage 1, computed in bfloat16:
    same names, types and bits, except for the rows of the vocabulary.
    """
    source = AutoTokenizer.from_pretrained(inputs["gpt_neox"])
    folder = tiny_model_folder(
        tmp_path / "bf16", "gpt_neox", 320, tokenizer=source, dtype="bfloat16"
    )
    flags = ("--config.stage2.steps=0", "--config.initialization.trains=rows", "--stages=export")
    bfloat16 = inputs | {"gpt_neox": folder}
    assert main.main(arguments(bfloat16, "gpt_neox", tmp_path / "run", "optimal", *flags)) == 0
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "run" / "export" / "model.safetensors")
    assert list(before) == list(after)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype == torch.bfloat16
        assert torch.equal(tensor, after[name]) != ("embed" in name)


def test_export_without_training_is_the_initialised_model(inputs, tmp_path):
    workdir = tmp_path / "run"
    flags = "--stages=align,init,export"
    assert main.main(arguments(inputs, "llama", workdir, "ultra_quick_demo", flags)) == 0
    assert not (workdir / "stage1").exists() and not (workdir / "report").exists()
    exported, initialised = (
        AutoModelForCausalLM.from_pretrained(workdir / name).state_dict()
        for name in ("export", "init")
    )
    assert all(torch.equal(exported[name], initialised[name]) for name in initialised)
