"""The pipeline's bookkeeping, and whole runs of every config on tiny local models."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers import SHARED, tiny_model_folder, tiny_tokenizer
from tests.processes import free_port
from tokalign_jax import main, pipeline
from tokalign_jax.alignment import alignment
from tokalign_jax.config import Config, StageConfig
from tokalign_jax.errors import UserError
from tokalign_jax.pipeline import stages
from tokalign_jax.pipeline.context import Context
from tokalign_jax.reporting.model_card import front_matter
from tokalign_jax.training import loop

REPOSITORY = Path(__file__).parents[2]
WORDS = "the a model token row text of and in is new old head layer step rate corpus align vector count 数学 день été".split()


def write_corpus(folder: Path, documents: int = 120) -> Path:
    random = np.random.default_rng(0)
    path = folder / "corpus.jsonl"
    rows = [
        {
            "text": f"{i} " + " ".join(random.choice(WORDS, 60)) + ".",
            "lang": "en" if i % 2 else "fr",
        }
        for i in range(documents)
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, Path]:
    """A tiny source model of each family, a target tokenizer of another kind, and a corpus."""
    folder = tmp_path_factory.mktemp("inputs")
    corpus = write_corpus(folder)
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    source = tiny_tokenizer(300, texts[:10])
    target = tiny_tokenizer(420, texts, kind="metaspace")
    target.save_pretrained(folder / "target")
    return {
        "corpus": corpus,
        "target": folder / "target",
        "llama": tiny_model_folder(folder / "llama", "llama", 320, tied=True, tokenizer=source),
        "gpt_neox": tiny_model_folder(folder / "gpt_neox", "gpt_neox", 320, tokenizer=source),
    }


def arguments(
    inputs: dict[str, Path], family: str, workdir: Path, config: str, *more: str
) -> list[str]:
    """A run of a few small steps; everything else is as the config file says."""
    small = {
        "source_model": inputs[family],
        "target_tokenizer": inputs["target"],
        "corpus": inputs["corpus"],
        "text.held_out_fraction": 0.1,
        "text.language_field": "lang",
        "alignment.vector_size": 16,
        "alignment.glove.iterations": 2,
        "alignment.pivots": 20,
        "alignment.min_count": 2,
        "initialization.distillation_tokens": 2000,
        "initialization.generated_tokens": 400,
        "initialization.tuning": 4000,
        "evaluation.sequence_length": 64,
        "evaluation.sample_tokens": 4,
        "evaluation.prompts": "('the model',)",
    }
    for stage in ("stage1", "stage2"):
        small |= {
            f"{stage}.steps": 3,
            f"{stage}.per_device_batch": 2,
            f"{stage}.batch_size": 4,
            f"{stage}.sequence_length": 32,
            f"{stage}.checkpoints.every": 2,
        }
    flags = [f"--config.{name}={value}" for name, value in small.items()]
    return ["main", f"--config=configs/{config}.py", f"--workdir={workdir}", *flags, *more]


def bytes_of(arrays) -> int:
    return sum(array.nbytes for array in jax.tree.leaves(arrays))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "family", "more"),
    [
        ("ultra_quick_demo", "llama", ()),
        ("three_hour_eval", "gpt_neox", ()),
        ("optimal", "llama", ()),
        ("research", "gpt_neox", ("--config.stage2.start_offset=30",)),
        ("best", "llama", ("--config.stage2.per_device_batch=auto",)),
    ],
)
def test_every_config_runs_from_end_to_end(
    config, family, more, inputs, tmp_path, capsys, monkeypatch
):
    workdir = tmp_path / "run"
    others, beside, announce = bytes_of(jax.live_arrays()), [], loop._Run.announce

    def looked_at(run, state, frozen):
        beside.append(bytes_of(jax.live_arrays()) - others - bytes_of((state, frozen)))
        announce(run, state, frozen)

    monkeypatch.setattr(loop._Run, "announce", looked_at)
    (tmp_path / "other.jsonl").write_text(
        json.dumps({"text": "quite another text\n" * 9, "lang": "en"})
    )
    more = (*more, f"--config.evaluation.other_text={tmp_path}/other.jsonl")
    assert main.main(arguments(inputs, family, workdir, config, *more)) == 0
    assert max(beside) < 1000, "on the devices is what trains, its moments and what is frozen"
    printed = capsys.readouterr().out
    assert ("stage2: per_device_batch=auto: 4 sequences per device at once" in printed) == (
        config == "best"
    )
    report = json.loads((workdir / "report" / "report.json").read_text())
    assert set(report["languages"]) == {"en", "fr", "all"}
    states = ["source", "random", "init", "stage1", "stage2"]
    for of in report["languages"].values():
        assert list(of["bits_per_byte"]) == states and all(
            np.isfinite(list(of["bits_per_byte"].values()))
        )
    kept = report["kept"]["states"]
    assert list(kept) == states and all(
        of["other_text"]["pooled"]["bytes"] == 171 for of in kept.values()
    )
    assert ["fidelity" in of for of in kept.values()] == [False, True, True, True, True]
    asked = [True, False, True, True, True] if config == "ultra_quick_demo" else [False] * 5
    assert ["abilities" in of for of in kept.values()] == asked
    assert ("Abilities by suite" in (workdir / "report" / "report.md").read_text()) == asked[0]
    assert (workdir / "report" / "report.md").read_text().count(
        "| all"
    ) == 2  # held-out and other text
    assert (workdir / "report" / "report.png").stat().st_size > 10_000
    page = (workdir / "report" / "report.html").read_text()
    assert all(
        title in page
        for title in ("stage 2", "The same text in tokens", "Continuations", "Worst rows")
    )
    assert "| all" in printed and "the model" in printed

    # The export is an ordinary Hugging Face folder with the new vocabulary, and says what the last
    # state says.
    model = AutoModelForCausalLM.from_pretrained(workdir / "export", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(workdir / "export")
    assert model.config.vocab_size == len(tokenizer) == model.get_input_embeddings().weight.shape[0]
    assert (model.config.bos_token_id, model.config.eos_token_id) == (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    )
    ids = tokenizer("the model", return_tensors="pt")
    assert (
        model.generate(**ids, max_new_tokens=3, min_new_tokens=3).shape[1]
        == ids["input_ids"].shape[1] + 3
    )
    matrix = json.loads((workdir / "align" / "align_matrix.json").read_text())
    assert sorted(map(int, matrix)) == list(range(len(tokenizer)))


@pytest.mark.slow
def test_a_second_run_skips_and_a_changed_field_redoes_what_depends_on_it(inputs, tmp_path, capsys):
    workdir = tmp_path / "run"

    def run(*more: str) -> str:
        assert main.main(arguments(inputs, "llama", workdir, "ultra_quick_demo", *more)) == 0
        return capsys.readouterr().out

    run()
    stages = json.loads((workdir / "stages.json").read_text())["stages"]
    again = run()
    assert all(f"{stage}: finished, skipped" in again for stage in stages)

    changed = run("--config.stage2.learning_rate=4e-3")
    assert (
        "stage2: to be redone, because stage2.learning_rate changed from 0.0005 to 0.004" in changed
    )
    for kept in (
        "corpus",
        "tokens",
        "align",
        "init",
        "stage1",
        "evaluate/source",
        "evaluate/stage1",
    ):
        assert f"{kept}: finished, skipped" in changed
    for redone in ("export", "evaluate/stage2", "report"):
        assert f"{redone}: to be redone, because a stage that it needs changed" in changed
    # What the old settings gave is kept, and comes back with them.
    assert any((workdir / "outdated").glob("stage2-*"))
    assert "stage2: done before with these settings, restored" in run()

    # A field without effect on results redoes nothing.
    assert "to be redone" not in run(
        "--config.stage2.log_every=1", "--config.stage2.checkpoints.keep=3"
    )


@pytest.mark.slow
def test_the_best_checkpoint_by_validation_is_exported(inputs, tmp_path, capsys):
    workdir = tmp_path / "run"
    validated = ("--config.stage2.validation_every=1", "--config.stage2.learning_rate=0.3")
    skipped = ("--config.evaluation.random_baseline=False", "--stages=export,report")

    def run(*more: str) -> str:
        given = arguments(inputs, "llama", workdir, "optimal", *validated, *skipped, *more)
        assert main.main(given) == 0
        return capsys.readouterr().out

    assert "stage2: step 1, validation loss" in run()
    record = json.loads((workdir / "report" / "report.json").read_text())["training"]["stage2"]
    measured = record["validation"]["validation_loss"]
    assert len(measured) == 3 and min(measured) < measured[-1]  # that rate is far too high
    last = (workdir / "export" / "model.safetensors").read_bytes()

    # Another result trains nothing again, only what reads it is redone.
    said = run("--config.stage2.result=best")
    assert "stage2: finished, skipped" in said and "stage1: finished, skipped" in said
    assert "export: to be redone" in said and "evaluate/stage2: to be redone" in said
    assert "evaluate/stage1: finished, skipped" in said
    best = (workdir / "export" / "model.safetensors").read_bytes()
    assert best != last
    # Turning validation off, or the last as the result, brings the other export back.
    assert "export: done before with these settings, restored" in run()
    assert (workdir / "export" / "model.safetensors").read_bytes() == last


@pytest.mark.slow
def test_a_killed_run_ends_as_one_never_killed(inputs, tmp_path):
    steps = (
        "--config.stage1.steps=6",
        "--config.stage1.log_every=1",
        "--config.evaluation.random_baseline=False",
    )
    whole, broken = (
        arguments(inputs, "gpt_neox", tmp_path / name, "three_hour_eval", *steps)
        for name in ("whole", "broken")
    )
    assert main.main(whole) == 0
    command = [sys.executable, "-m", "tokalign_jax.main", *broken[1:]]
    alone = os.environ | {
        "JAX_ENABLE_COMPILATION_CACHE": "false"
    }  # as on a CPU without these tests' settings
    with subprocess.Popen(
        command, cwd=REPOSITORY, env=alone, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        for line in process.stdout:
            if "stage1: step 3" in line:  # the newest checkpoint is of step 2
                process.kill()
                break
    assert process.returncode == -signal.SIGKILL
    record = json.loads((tmp_path / "broken" / "stages.json").read_text())["stages"]
    assert record["init"]["finished"] and not record["stage1"]["finished"]
    assert main.main(broken) == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "broken/export" / name).read_bytes() == (
            tmp_path / "whole/export" / name
        ).read_bytes()


@pytest.mark.slow
def test_a_run_as_users_compile_it_ends_where_one_of_these_tests_does(inputs, tmp_path):
    """With XLA's optimizations, which conftest.py spares."""
    more = ("--config.compute.dtype=float32", "--config.evaluation.random_baseline=False")
    quick, usual = (
        arguments(inputs, "llama", tmp_path / of, "ultra_quick_demo", *more)
        for of in ("quick", "usual")
    )
    assert main.main(quick) == 0
    spared = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS", "JAX_COMPILATION_CACHE_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in spared}
    command = [sys.executable, "-m", "tokalign_jax.main", *usual[1:]]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, other = (
        load_file(tmp_path / of / "export" / "model.safetensors") for of in ("quick", "usual")
    )
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        # Each as a whole: Adam makes of a gradient that is but rounding what it makes of any.
        assert (other[name] - tensor).norm() < 1e-3 * tensor.norm(), name
    scores, expected = (
        json.loads((tmp_path / of / "report" / "report.json").read_text())["languages"]["all"][
            "bits_per_byte"
        ]
        for of in ("usual", "quick")
    )
    assert scores == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_what_does_not_train_comes_out_bit_for_bit(inputs, tmp_path):
    """A bfloat16 source through a start of rows alone and Stage 1, computed in bfloat16: same
    names, types and bits, but for the vocabulary's rows.
    """
    source = AutoTokenizer.from_pretrained(inputs["gpt_neox"])
    folder = tiny_model_folder(
        tmp_path / "bf16", "gpt_neox", 320, tokenizer=source, dtype="bfloat16"
    )
    overrides = (
        "--config.stage2.steps=0",
        "--config.initialization.trains=rows",
        "--stages=export",
    )
    assert (
        main.main(
            arguments(
                inputs | {"gpt_neox": folder}, "gpt_neox", tmp_path / "run", "optimal", *overrides
            )
        )
        == 0
    )
    before, after = (
        load_file(folder / "model.safetensors"),
        load_file(tmp_path / "run" / "export" / "model.safetensors"),
    )
    assert list(before) == list(after)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype == torch.bfloat16
        assert torch.equal(tensor, after[name]) != ("embed" in name)


def test_a_part_of_the_stages_exports_the_untrained_model(inputs, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert (
        main.main(
            arguments(inputs, "llama", workdir, "ultra_quick_demo", "--stages=align,init,export")
        )
        == 0
    )
    assert not (workdir / "stage1").exists() and not (workdir / "report").exists()
    exported, init = (
        AutoModelForCausalLM.from_pretrained(workdir / name).state_dict()
        for name in ("export", "init")
    )
    assert all(torch.equal(exported[name], init[name]) for name in init)


def test_bad_input_is_told_in_a_paragraph_before_any_work(inputs, tmp_path, capsys):
    def refused(*more: str, workdir: Path = tmp_path / "run", family: str = "llama") -> str:
        assert main.main(arguments(inputs, family, workdir, "ultra_quick_demo", *more)) == 2
        assert not (tmp_path / "run").exists()
        return capsys.readouterr().err

    assert (
        "learning_rat'" in (said := refused("--config.stage1.learning_rat=1"))
        and "stage1.learning_rate" in said
    )
    assert "nowhere.jsonl" in refused("--config.corpus=/nowhere.jsonl")
    assert "content" in (said := refused("--config.text.text_field=content")) and "text" in said
    assert "128 positions" in refused("--config.stage1.sequence_length=129")
    assert "128 positions" in refused("--config.evaluation.sequence_length=500")
    assert "'alignn'" in (said := refused("--stages=alignn")) and "align" in said
    assert "--stages is empty" in refused("--stages=")
    said = refused("--config.source_model=nobody/nothing")
    assert "nobody/nothing" in said and "local" in said and "embedded" in said
    assert "nobody/words" in refused("--config.target_tokenizer=nobody/words")

    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert "empty" in refused(f"--config.corpus={empty}")

    broken = tmp_path / "broken"
    broken.mkdir()
    for file in inputs["llama"].iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = broken / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors" in refused(f"--config.source_model={broken}")
    weights.write_bytes(whole)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    assert "mamba" in (said := refused(f"--config.source_model={broken}")) and "gpt_neox" in said
    (broken / "config.json").write_text(json.dumps(config))
    tiny_tokenizer(500, [" ".join(f"{a}{b}" for a in WORDS for b in WORDS)]).save_pretrained(broken)
    assert "rows" in refused(f"--config.source_model={broken}")

    other = tmp_path / "align_matrix.json"
    other.write_text(json.dumps({str(i): 0 for i in range(7)}))
    assert "7" in refused(f"--config.alignment.file={other}")
    said = refused("--config.alignment.method=pieces", "--config.alignment.source_vectors=mine.npz")
    assert "'pieces' makes no use of alignment.source_vectors" in said and "composed" in said

    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("precious")
    assert "thesis" not in refused(workdir=mine) and (mine / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_sources_own_tokenizer_gives_the_source(inputs, tmp_path, dtype):
    """By default, and in the type that the source is stored in, every weight comes out bit for bit."""
    tokenizer = AutoTokenizer.from_pretrained(inputs["target"])
    source = tiny_model_folder(tmp_path / "source", "llama", 430, tokenizer=tokenizer, dtype=dtype)
    given = {**inputs, "llama": source, "target": source}
    more = ["--stages=export,evaluate", "--config.stage1.steps=0", "--config.stage2.steps=0"]
    more += [f"--config.export.dtype={dtype}", "--config.evaluation.random_baseline=False"]
    assert main.main(arguments(given, "llama", tmp_path / "run", "best", *more)) == 0
    before, after = (
        load_file(folder / "model.safetensors") for folder in (source, tmp_path / "run" / "export")
    )
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(
            tensor.view(torch.int16), before[name][: len(tensor)].view(torch.int16)
        ), name
    assert len(after["lm_head.weight"]) == len(tokenizer)


def test_a_donor_gives_combinations_or_is_refused(inputs, tmp_path, capsys):
    def run(*more: str) -> int:
        given = [
            f"--config.{setting}"
            for setting in ("initialization.tokens=2000", "stage1.steps=0", "stage2.steps=0", *more)
        ]
        return main.main(
            arguments(inputs, "llama", tmp_path / "run", "best", "--stages=export", *given)
        )

    target = AutoTokenizer.from_pretrained(inputs["target"])
    donor = tiny_model_folder(tmp_path / "donor", "gpt_neox", len(target), tokenizer=target, seed=1)
    for settings, told in (
        (["alignment.method=omp"], "needs alignment.donor"),
        ([f"alignment.donor={donor}"], "only used with alignment.method 'omp'"),
        (["alignment.method=omp", f"alignment.donor={inputs['llama']}"], "has another tokenizer"),
    ):
        assert run(*settings) == 2
        assert told in capsys.readouterr().err
    assert run("alignment.method=omp", f"alignment.donor={donor}", "alignment.atoms=3") == 0
    with np.load(tmp_path / "run" / "align" / "alignment.npz") as made:
        similar = made["rules"] == alignment.Rule.SIMILAR
        assert similar.sum() > 50 and (made["embedding_weights"] < 0).any()
        assert set(np.diff(made["embedding_indptr"])[similar]) == {3}


@pytest.mark.parametrize("tied", [True, False])
def test_a_source_model_with_broken_rows(inputs, tmp_path, capsys, tied):
    """Rows of a few unused tokens are left out, and named; more of them, or broken layers, are
    refused beforehand.
    """
    source = tiny_tokenizer(300, [" ".join(WORDS)])
    source.add_special_tokens({"additional_special_tokens": ["<|unused|>"]})
    folder = tiny_model_folder(tmp_path / "source", "llama", 320, tied, source)
    bad = [source.convert_tokens_to_ids("<|unused|>"), 315]  # the last one is padding

    def spoil(rows, name="model.embed_tokens.weight"):
        tensors = load_file(folder / "model.safetensors")
        tensors[name][rows] = float("nan")
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    given = {**inputs, "llama": folder}
    spoil(bad)
    only = ["--stages=export,evaluate", "--config.initialization.tokens=2000"]
    none = ["--config.stage1.steps=0", "--config.stage2.steps=0"]
    assert main.main(arguments(given, "llama", tmp_path / "run", "best", *only, *none)) == 0
    assert "rows of 1 token hold NaN or infinity ('<|unused|>')" in capsys.readouterr().out
    for name, tensor in load_file(tmp_path / "run" / "export" / "model.safetensors").items():
        assert torch.isfinite(tensor).all(), name
    for state in ("source", "random", "init"):
        scores = json.loads((tmp_path / "run" / "evaluate" / state / "scores.json").read_text())
        assert np.isfinite(scores["pooled"]["bits_per_byte"])
    spoil(slice(20, 60))
    assert main.main(arguments(given, "llama", tmp_path / "many", "best", *only, *none)) == 2
    assert "rows of 41 tokens hold NaN" in capsys.readouterr().err
    spoil(0, "model.layers.0.self_attn.q_proj.weight")
    assert main.main(arguments(given, "llama", tmp_path / "layers", "best", *only, *none)) == 2
    assert "model.layers.0.self_attn.q_proj.weight" in capsys.readouterr().err
    assert not (tmp_path / "layers" / "corpus").exists()


def test_bad_questions_and_other_text_are_told_before_any_work(inputs, tmp_path, capsys):
    def refused(name: str, value: object) -> str:
        flag = f"--config.evaluation.{name}={value}"
        assert (
            main.main(arguments(inputs, "llama", tmp_path / "run", "ultra_quick_demo", flag)) == 2
        )
        assert not (tmp_path / "run").exists()
        return capsys.readouterr().err

    empty, long = tmp_path / "empty.jsonl", tmp_path / "long.jsonl"
    empty.write_text("")
    long.write_text(json.dumps({"task": "a", "question": "xyz" * 100, "choices": ["b", "c"]}))
    assert "empty.jsonl' has no questions" in refused("abilities", empty)
    assert "empty.jsonl" in refused("other_text", empty)
    assert "in the corpus too" in refused("other_text", inputs["corpus"])
    assert "the model reads at most 128" in refused("abilities", long)
    assert "it must be at least 0" in refused("max_questions", -1)


def test_the_workdir_of_another_run_is_refused(inputs, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert (
        main.main(arguments(inputs, "llama", workdir, "ultra_quick_demo", "--stages=corpus")) == 0
    )
    capsys.readouterr()
    assert (
        main.main(arguments(inputs, "gpt_neox", workdir, "ultra_quick_demo", "--stages=corpus"))
        == 2
    )
    said = capsys.readouterr().err
    assert "another run" in said and "gpt_neox" in said


def test_a_full_disk_is_foreseen(inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 1000})())
    assert main.main(arguments(inputs, "llama", tmp_path / "run", "ultra_quick_demo")) == 2
    said = capsys.readouterr().err
    assert "GB free" in said and "stage2" in said and not (tmp_path / "run").exists()


def test_a_full_device_is_foreseen_and_told_with_what_would_fit(
    inputs, tmp_path, capsys, monkeypatch
):
    # A device of one megabyte: enough for Stage 1 of this model, as far as the plan can say, not
    # for Stage 2.
    monkeypatch.setattr("tokalign_jax.parallel.sharding.device_memory", lambda device: 1e6)

    def full(*_, **__):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 14.92GiB.\nand more"
        )

    monkeypatch.setattr("tokalign_jax.training.loop.run_stage", full)
    given = arguments(
        inputs, "llama", tmp_path / "run", "ultra_quick_demo", "--stages=stage1,stage2"
    )
    assert main.main(given) == 2
    said = capsys.readouterr()
    before, after = said.out.split("corpus: read", 1)
    assert (
        "warning: stage2 will not fit: it needs about" in before and "warning: stage1" not in before
    )
    assert (
        "stage1: a device's memory is full (RESOURCE_EXHAUSTED: Out of memory while" in said.err
        and "and more" not in said.err
    )
    assert (
        "lower --config.stage1.per_device_batch" in said.err
        and "the same command resumes from there" in said.err
    )
    assert "init: done" in after


def test_two_runs_in_one_workdir_are_refused(tmp_path):
    with (
        pipeline.lock(tmp_path),
        pytest.raises(UserError, match="another process"),
        pipeline.lock(tmp_path),
    ):
        pass


def test_a_workdir_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    workdir = (
        tmp_path / "file" / "run"
    )  # as in a folder of somebody else's, which root could write to
    with (
        pytest.raises(UserError, match=f"'{workdir}' cannot be written to"),
        pipeline.lock(workdir),
    ):
        pass


def test_offset_past_the_end_states_the_length(inputs, tmp_path, capsys):
    overrides = ("--config.stage2.start_offset=2560000", "--stages=stage2")
    assert (
        main.main(arguments(inputs, "llama", tmp_path / "run", "ultra_quick_demo", *overrides)) == 2
    )
    printed = capsys.readouterr()
    assert "2,560,000" in printed.err and "sequences" in printed.err
    assert (
        "tokens: done" in printed.out and "align:" not in printed.out
    )  # before the work that takes long


def test_many_passes_over_a_small_text_are_told(inputs, tmp_path):
    said = []
    stage = StageConfig(steps=1000, batch_size=8, sequence_length=32)
    names = {
        "source_model": inputs["llama"],
        "target_tokenizer": inputs["target"],
        "corpus": inputs["corpus"],
    }
    config = Config(
        **{key: str(name) for key, name in names.items()},
        stage1=stage,
        stage2=replace(stage, steps=1),
    )
    context = Context(config, tmp_path, said.append)
    for name in ("corpus", "tokens"):
        (tmp_path / name).mkdir()
        getattr(stages, name)(context)
    stages.check_stream(context)
    (warning,) = [line for line in said if line.startswith("warning: stage")]
    assert warning.startswith("warning: stage1 reads the") and "times: lower its steps" in warning


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--help"], ["--plan"], ["--stages=corpus"]])
def test_a_run_does_not_end_with_the_reader_of_its_output(flags, inputs, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    command = arguments(inputs, "llama", tmp_path / "run", "ultra_quick_demo", *flags)
    run = subprocess.run(
        [sys.executable, "-m", "tokalign_jax.main", *command[1:]],
        cwd=REPOSITORY,
        stdout=writer,
        stderr=subprocess.PIPE,
        timeout=120,
    )
    os.close(writer)
    assert run.returncode == 0 and b"Error" not in run.stderr, run.stderr.decode()
    assert flags != ["--stages=corpus"] or (tmp_path / "run" / "corpus").is_dir()


LISTENERS = """
import os, signal, sys
from tokalign_jax import errors
from tokalign_jax.cli import session
from tokalign_jax.utils import stopping
log = session.logger()
log("one")
with stopping.listening():
    os.kill(os.getpid(), signal.SIGTERM)
    assert stopping.requested()
    errors.complain("stopped")
    log("two")
sys.exit(75)
"""


@pytest.mark.parametrize("where", ["a closed pipe", "a full disk"])
def test_a_request_is_one_also_where_nobody_listens_any_more(where):
    """Ctrl-C reaches `tee` too, and a log may be on another disk than the run."""
    reader, writer = os.pipe()
    os.close(reader)
    if where == "a full disk":
        os.close(writer)
        writer = os.open("/dev/full", os.O_WRONLY)
    done = subprocess.run(
        [sys.executable, "-c", LISTENERS], cwd=REPOSITORY, stdout=writer, stderr=writer, timeout=60
    )
    os.close(writer)
    assert done.returncode == 75


def test_command_line_exit_codes(tmp_path):
    def code(*flags: str) -> int:
        command = [sys.executable, "-m", "tokalign_jax.main", *flags]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, timeout=120).returncode

    assert code("--help") == 0
    assert code("--config=configs/nothing.py", f"--workdir={tmp_path}/run") == 2
    assert code() == 2


@pytest.mark.slow
def test_two_processes_do_what_one_does(inputs, tmp_path):
    """Every stage, with parameters split over the devices of both; then the same command has
    nothing left to do.
    """
    overrides = (
        "--config.compute.dtype=float32",
        "--config.mesh.fsdp=2",
        "--config.mesh.tensor=2",
        "--config.evaluation.random_baseline=False",
        "--config.initialization.rows_multiple_of=64",
        "--config.evaluation.abilities=embedded",
        "--config.evaluation.max_questions=3",
    )
    assert (
        main.main(
            arguments(inputs, "llama", tmp_path / "one", "optimal", overrides[0], *overrides[3:])
        )
        == 0
    )
    command = [sys.executable, "-m", "tokalign_jax.main"]
    command += arguments(inputs, "llama", tmp_path / "two", "optimal", *overrides)[1:]

    def run() -> str:
        environment = os.environ | {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_NUM_CPU_DEVICES": "2",
            "JAX_PLATFORMS": "cpu",
        }
        both = [
            subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env=environment | {"JAX_PROCESS_ID": str(i)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for i in range(2)
        ]
        said = [process.communicate(timeout=400)[0] for process in both]
        assert [process.returncode for process in both] == [0, 0], "\n".join(said)
        assert "stage1" in said[0] and "stage1" not in said[1]  # one speaks for all
        return said[0]

    assert "on 4 cpu devices" in run()
    one, two = (
        load_file(tmp_path / name / "export" / "model.safetensors") for name in ("one", "two")
    )
    assert one.keys() == two.keys() and one["model.embed_tokens.weight"].shape[0] % 64 == 0
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4)
    reports = [
        json.loads((tmp_path / name / "report" / "report.json").read_text())
        for name in ("one", "two")
    ]
    scores = [report["languages"]["all"]["bits_per_byte"] for report in reports]
    assert scores[1] == pytest.approx(scores[0], rel=1e-4)
    kept = [report["kept"]["states"]["stage2"] for report in reports]
    assert kept[0]["abilities"]["right"] == kept[1]["abilities"]["right"]
    gaps = [of["fidelity"]["pooled"]["gap"]["value"] for of in kept]
    assert gaps[1] == pytest.approx(gaps[0], rel=1e-2)
    assert "report: finished, skipped" in run()


def test_the_export_has_a_card_and_the_terms_of_the_source(inputs, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(inputs["llama"], source)
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\nA small model.\n")
    (source / "LICENSE").write_text("the terms")
    workdir = tmp_path / "run"
    assert (
        main.main(arguments(inputs | {"llama": source}, "llama", workdir, "ultra_quick_demo")) == 0
    )
    export = workdir / "export"
    metadata = front_matter((export / "README.md").read_text())
    assert metadata["license"] == "apache-2.0" and set(metadata["language"]) == {"en", "fr"}
    assert (export / "LICENSE").read_text() == "the terms"
    text = (export / "README.md").read_text()
    assert "stage1.learning_rate" in text and "initialised" in text and "exact" in text


@pytest.mark.slow
@pytest.mark.skipif(
    not SHARED.exists(), reason="needs the larger models and tokenizers of ../shared"
)
def test_a_real_model_and_tokenizer_are_taken(tmp_path, capsys):
    overrides = [
        f"--config.source_model={SHARED / 'models' / 'llama-en16k'}",
        f"--config.target_tokenizer={SHARED / 'tokenizers' / 'qwen3'}",
        f"--config.corpus={SHARED / 'corpus' / 'mix-valid.jsonl.xz'}",
        "--config.text.language_field=lang",
        "--stages=tokens",
    ]
    workdir = tmp_path / "run"
    assert (
        main.main(
            ["main", "--config=configs/ultra_quick_demo.py", f"--workdir={workdir}", *overrides]
        )
        == 0
    )
    index = json.loads((workdir / "tokens" / "target" / "index.json").read_text())
    assert index["dtype"] == "uint32" and index["vocabulary"] == 151_669
