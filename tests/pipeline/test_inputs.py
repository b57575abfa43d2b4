"""Inputs that a run takes, and those that it refuses before any work."""

import json
import os
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tests.helpers import SHARED, tiny_model_folder, tiny_tokenizer
from tests.pipeline.toy_runs import WORDS, arguments
from tokalign_jax import main, pipeline
from tokalign_jax.alignment import alignment
from tokalign_jax.config import BatchConfig, Config, StageConfig
from tokalign_jax.errors import UserError
from tokalign_jax.pipeline import stages
from tokalign_jax.pipeline.context import Context


def test_bad_input_is_refused_before_any_work(inputs, tmp_path, capsys):
    def refused(*more: str, workdir: Path = tmp_path / "run", family: str = "llama") -> str:
        assert main.main(arguments(inputs, family, workdir, "ultra_quick_demo", *more)) == 2
        assert not (tmp_path / "run").exists()
        return capsys.readouterr().err

    assert (
        "learning_rat'" in (output := refused("--config.stage1.learning_rat=1"))
        and "stage1.learning_rate" in output
    )
    assert "nowhere.jsonl" in refused("--config.corpus=/nowhere.jsonl")
    assert "content" in (output := refused("--config.text.text_field=content")) and "text" in output
    assert "128 positions" in refused("--config.stage1.batch.sequence_length=129")
    assert "128 positions" in refused("--config.evaluation.sequence_length=500")
    assert "'alignn'" in (output := refused("--stages=alignn")) and "align" in output
    assert "--stages is empty" in refused("--stages=")
    output = refused("--config.source_model=nobody/nothing")
    assert "nobody/nothing" in output and "local" in output and "embedded" in output
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
    assert (
        "mamba" in (output := refused(f"--config.source_model={broken}")) and "gpt_neox" in output
    )
    (broken / "config.json").write_text(json.dumps(config))
    tiny_tokenizer(500, [" ".join(f"{a}{b}" for a in WORDS for b in WORDS)]).save_pretrained(broken)
    assert "rows" in refused(f"--config.source_model={broken}")

    other = tmp_path / "align_matrix.json"
    other.write_text(json.dumps({str(i): 0 for i in range(7)}))
    assert "7" in refused(f"--config.alignment.file={other}")
    output = refused(
        "--config.alignment.method=pieces", "--config.alignment.source_vectors=mine.npz"
    )
    assert "'pieces' makes no use of alignment.source_vectors" in output and "composed" in output

    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("precious")
    assert "thesis" not in refused(workdir=mine) and (mine / "thesis.tex").read_text() == "precious"


def test_bad_questions_and_other_text_are_refused_before_any_work(inputs, tmp_path, capsys):
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
    link = tmp_path / "link.jsonl"
    link.symlink_to(inputs["corpus"])
    for same in (inputs["corpus"], os.path.relpath(inputs["corpus"]), link):
        assert "in the corpus too" in refused("other_text", same)
    assert "the model reads at most 128" in refused("abilities", long)
    assert "it must be at least 0" in refused("max_questions", -1)


def test_workdir_in_a_folder_of_the_corpus_is_refused(inputs, tmp_path, capsys):
    """The first command would read its own config.json, a later one all that the run wrote."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "corpus.jsonl").write_bytes(inputs["corpus"].read_bytes())
    for name, code in ((folder, 2), (folder / "*.jsonl", 0)):
        taken = inputs | {"corpus": name}
        workdir = folder / "runs" / "first"
        argv = arguments(taken, "llama", workdir, "ultra_quick_demo", "--stages=corpus")
        assert main.main(argv) == code
    assert f"is in the folder '{folder}' of the corpus" in capsys.readouterr().err


def test_workdir_of_another_run_is_refused(inputs, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert (
        main.main(arguments(inputs, "llama", workdir, "ultra_quick_demo", "--stages=corpus")) == 0
    )
    capsys.readouterr()
    assert (
        main.main(arguments(inputs, "gpt_neox", workdir, "ultra_quick_demo", "--stages=corpus"))
        == 2
    )
    output = capsys.readouterr().err
    assert "another run" in output and "gpt_neox" in output


def test_two_runs_in_one_workdir_are_refused(tmp_path):
    with (
        pipeline.lock(tmp_path),
        pytest.raises(UserError, match="another process"),
        pipeline.lock(tmp_path),
    ):
        pass


def test_error_names_a_workdir_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    workdir = (
        tmp_path / "file" / "run"
    )  # as in a folder of somebody else's, which root could write to
    with (
        pytest.raises(UserError, match=f"'{workdir}' cannot be written to"),
        pipeline.lock(workdir),
    ):
        pass


def test_error_on_an_offset_past_the_end_states_the_length(inputs, tmp_path, capsys):
    overrides = ("--config.stage2.start_offset=2560000", "--stages=stage2")
    assert (
        main.main(arguments(inputs, "llama", tmp_path / "run", "ultra_quick_demo", *overrides)) == 2
    )
    printed = capsys.readouterr()
    assert "2,560,000" in printed.err and "sequences" in printed.err
    assert (
        "tokens: done" in printed.out and "align:" not in printed.out
    )  # before the work that takes long


def test_many_passes_over_a_small_text_are_warned_of(inputs, tmp_path):
    output = []
    stage = StageConfig(steps=1000, batch=BatchConfig(size=8, sequence_length=32))
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
    context = Context(config, tmp_path, output.append)
    for name in ("corpus", "tokens"):
        (tmp_path / name).mkdir()
        getattr(stages, name)(context)
    stages.check_stream(context)
    (warning,) = [line for line in output if line.startswith("warning: stage")]
    assert warning.startswith("warning: stage1 reads the") and "times: lower its steps" in warning


def test_too_small_a_disk_is_refused_before_any_work(inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 1000})())
    assert main.main(arguments(inputs, "llama", tmp_path / "run", "ultra_quick_demo")) == 2
    output = capsys.readouterr().err
    assert "GB free" in output and "stage2" in output and not (tmp_path / "run").exists()


def test_full_device_is_predicted_and_reported_with_what_would_fit(
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
    output = capsys.readouterr()
    before, after = output.out.split("corpus: read", 1)
    assert (
        "warning: stage2 will not fit: it needs about" in before and "warning: stage1" not in before
    )
    assert (
        "stage1: a device's memory is full (RESOURCE_EXHAUSTED: Out of memory while" in output.err
        and "and more" not in output.err
    )
    assert (
        "lower --config.stage1.batch.per_device" in output.err
        and "the same command resumes from there" in output.err
    )
    assert "init: done" in after


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_own_tokenizer_as_target_exports_the_source(inputs, tmp_path, dtype):
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


def test_new_special_tokens_alone_leave_the_source_as_it_is(inputs, tmp_path):
    """They occur in no text, so the whole model would be trained for nothing."""
    source = inputs["llama"]
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.add_tokens(["<tool>"], special_tokens=True)
    tokenizer.save_pretrained(tmp_path / "target")
    given = {**inputs, "target": tmp_path / "target"}
    more = ["--stages=init,export", "--config.export.dtype=float32"]
    assert main.main(arguments(given, "llama", tmp_path / "run", "best", *more)) == 0
    before, after = (
        load_file(folder / "model.safetensors") for folder in (source, tmp_path / "run" / "export")
    )
    assert len(after["model.embed_tokens.weight"]) == len(tokenizer)
    for name, tensor in after.items():
        rows = len(tokenizer) - 2 if "embed_tokens" in name else len(tensor)
        assert torch.equal(tensor[:rows], before[name][:rows]), name


def test_omp_mixes_rows_by_a_donor_or_refuses_it(inputs, tmp_path, capsys):
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
    for settings, message in (
        (["alignment.method=omp"], "needs alignment.donor"),
        ([f"alignment.donor={donor}"], "only used with alignment.method 'omp'"),
        (["alignment.method=omp", f"alignment.donor={inputs['llama']}"], "has another tokenizer"),
    ):
        assert run(*settings) == 2
        assert message in capsys.readouterr().err
    assert run("alignment.method=omp", f"alignment.donor={donor}", "alignment.atoms=3") == 0
    with np.load(tmp_path / "run" / "align" / "alignment.npz") as made:
        similar = made["rules"] == alignment.Rule.SIMILAR
        assert similar.sum() > 50 and (made["embedding_weights"] < 0).any()
        assert set(np.diff(made["embedding_indptr"])[similar]) == {3}


@pytest.mark.parametrize("tied", [True, False])
def test_rows_with_nan_are_left_out_or_refused(inputs, tmp_path, capsys, tied):
    """A few unused tokens are left out and named; more of them, or NaN in layers, are refused
    before any work.
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
    # A tied matrix is also the head, whose logits evaluation needs.
    states = ("source", "random", "init") if tied else ()
    only = ["--stages=export" + ",evaluate" * tied, "--config.initialization.tokens=2000"]
    none = ["--config.stage1.steps=0", "--config.stage2.steps=0"]
    assert main.main(arguments(given, "llama", tmp_path / "run", "best", *only, *none)) == 0
    assert "rows of 1 token hold NaN or infinity ('<|unused|>')" in capsys.readouterr().out
    for name, tensor in load_file(tmp_path / "run" / "export" / "model.safetensors").items():
        assert torch.isfinite(tensor).all(), name
    for state in states:
        scores = json.loads((tmp_path / "run" / "evaluate" / state / "scores.json").read_text())
        assert np.isfinite(scores["pooled"]["bits_per_byte"])
    spoil(slice(20, 60))
    assert main.main(arguments(given, "llama", tmp_path / "many", "best", *only, *none)) == 2
    assert "rows of 41 tokens hold NaN" in capsys.readouterr().err
    spoil(0, "model.layers.0.self_attn.q_proj.weight")
    assert main.main(arguments(given, "llama", tmp_path / "layers", "best", *only, *none)) == 2
    assert "model.layers.0.self_attn.q_proj.weight" in capsys.readouterr().err
    assert not (tmp_path / "layers" / "corpus").exists()


@pytest.mark.slow
@pytest.mark.skipif(
    not SHARED.exists(), reason="needs the larger models and tokenizers of ../shared"
)
def test_larger_model_and_tokenizer_are_tokenized(tmp_path, capsys):
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
