"""Whole runs that extend the source's vocabulary, and the tokenizers that a run accepts."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tests.helpers import tiny_model_folder, tiny_tokenizer, tokenizer_of_kind
from tests.pipeline.toy_runs import arguments, write_corpus
from tokalign_jax import main
from tokalign_jax.cli import inspect
from tokalign_jax.config import BatchConfig, Config, EvaluationConfig, ExtendConfig, StageConfig
from tokalign_jax.errors import UserError
from tokalign_jax.models import hub, huggingface
from tokalign_jax.pipeline import checks
from tokalign_jax.pipeline import identities as run_identities
from tokalign_jax.pipeline.context import Context
from tokalign_jax.planning.machine import Machine, Speed
from tokalign_jax.planning.report import plan_run
from tokalign_jax.text import canonical, mining

NEW = 30
SHORT = "--config.stage2.steps=0"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, Path]:
    """A tiny model whose matrices have more rows than its tokenizer has tokens, a corpus, and
    tokenizers of other kinds.
    """
    folder = tmp_path_factory.mktemp("inputs")
    corpus = write_corpus(folder)
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    tokenizer = tiny_tokenizer(300, texts[:2])
    silent = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(320, texts).backend_tokenizer)
    silent.save_pretrained(folder / "silent")  # <|endoftext|> is special, but nothing says what for
    return {
        "corpus": corpus,
        "target": Path("extend"),
        "silent": folder / "silent",
        "gpt_neox": tiny_model_folder(folder / "gpt_neox", "gpt_neox", 320, tokenizer=tokenizer),
        "llama": tiny_model_folder(folder / "llama", "llama", 320, tied=True, tokenizer=tokenizer),
    }


def flags(inputs: dict[str, Path], family: str, workdir: Path, *more: str) -> list[str]:
    overrides = (
        f"--config.extend.new_tokens={NEW}",
        "--config.extend.min_count=2",
        "--config.initialization.tokens=4000",
    )
    return arguments(inputs, family, workdir, "extend_demo", *overrides, *more)


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory) -> Path:
    """The workdir of a whole run, of one training stage."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    assert main.main(flags(inputs, "gpt_neox", workdir, SHORT)) == 0
    return workdir


def test_new_tokens_get_rows_and_old_ones_keep_theirs(inputs, run):
    source, new = (
        AutoTokenizer.from_pretrained(folder) for folder in (inputs["gpt_neox"], run / "extend")
    )
    size = canonical.vocabulary_size(source)
    assert canonical.vocabulary_size(new) == size + NEW
    assert {token: new.get_vocab()[token] for token in source.get_vocab()} == source.get_vocab()
    before, after = (
        load_file(folder / "model.safetensors") for folder in (inputs["gpt_neox"], run / "init")
    )
    for name, tensor in before.items():
        if "embed" not in name:
            assert torch.equal(after[name], tensor)
            continue
        assert len(after[name]) == size + NEW and torch.isfinite(after[name]).all()
        assert torch.equal(after[name][:size], tensor[:size])
        assert not torch.equal(
            after[name][size : len(tensor)], tensor[size:]
        )  # rows that stood for no token


def test_export_uses_the_new_tokens(run):
    model = AutoModelForCausalLM.from_pretrained(run / "export", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    assert (
        model.config.vocab_size
        == len(tokenizer)
        == len(load_file(run / "export" / "model.safetensors")["embed_out.weight"])
    )
    ids = tokenizer("the model and the corpus", return_tensors="pt")["input_ids"]
    size = json.loads((run / "align" / "summary.json").read_text())["source_size"]
    assert (ids >= size).any() and torch.isfinite(model(ids).logits).all()
    card = (run / "export" / "README.md").read_text()
    assert "with an extended vocabulary" in card and f"from {size} to {size + NEW} tokens" in card


def test_report_compares_both_vocabularies(run):
    content = json.loads((run / "report" / "report.json").read_text())
    assert list(content["languages"]["all"]["bits_per_byte"]) == [
        "source",
        "random",
        "init",
        "stage1",
    ]
    per_token = content["languages"]["all"]["bytes_per_token"]
    assert per_token["target"] > 1.2 * per_token["source"]
    text = (run / "report" / "report.md").read_text()
    assert text.startswith("# gpt_neox with an extended vocabulary")
    assert "## Special tokens" in text and r"`<\|endoftext\|>`" in text
    assert content["loses"] == {"source": [], "target": []} and "warning" not in text


def test_repeated_run_skips_and_changed_settings_extend_again(inputs, run, capsys):
    assert main.main(flags(inputs, "gpt_neox", run, SHORT)) == 0
    output = capsys.readouterr().out
    assert "extend: finished, skipped" in output and "to be redone" not in output
    fewer = (
        SHORT,
        "--config.extend.new_tokens=20",
        "--stages=tokens,evaluate/source,evaluate/random",
    )
    assert main.main(flags(inputs, "gpt_neox", run, *fewer)) == 0
    output = capsys.readouterr().out
    assert f"extend.new_tokens changed from {NEW} to 20" in output
    assert "tokens: to be redone, because a stage that it needs changed" in output
    assert (
        "evaluate/source: finished, skipped" in output and "evaluate/random: to be redone" in output
    )
    size = json.loads((run / "tokens" / "target" / "index.json").read_text())["vocabulary"]
    assert (
        size
        == json.loads((run / "tokens" / "source" / "index.json").read_text())["vocabulary"] + 20
    )
    assert main.main(flags(inputs, "gpt_neox", run, SHORT)) == 0
    assert "extend: done before with these settings, restored" in capsys.readouterr().out


def test_alignment_of_an_extension_can_be_inspected(run, capsys):
    assert inspect.main(["--workdir", str(run), "--token", " the"]) == 0
    assert " the" in capsys.readouterr().out


def test_tied_model_keeps_its_old_rows(inputs, tmp_path):
    assert (
        main.main(
            flags(
                inputs,
                "llama",
                tmp_path / "run",
                "--config.initialization.tokens=0",
                "--stages=init",
            )
        )
        == 0
    )
    before, after = (
        load_file(f / "model.safetensors") for f in (inputs["llama"], tmp_path / "run" / "init")
    )
    size = canonical.vocabulary_size(AutoTokenizer.from_pretrained(inputs["llama"]))
    name = "model.embed_tokens.weight"
    assert torch.equal(after[name][:size], before[name][:size]) and len(after[name]) == size + NEW


def test_tokenizer_that_cannot_be_extended_is_refused_before_any_work(inputs, tmp_path, capsys):
    folder = tmp_path / "unigram"
    shutil.copytree(inputs["llama"], folder)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    tokenizer_of_kind("t5", ["the model and the corpus of words"] * 3, 300).save_pretrained(folder)
    assert main.main(flags(inputs | {"llama": folder}, "llama", tmp_path / "run")) == 2
    assert "of kind Unigram, whose vocabulary cannot be extended" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_extension_is_planned_before_it_is_made(inputs):
    config = Config(
        source_model=str(inputs["llama"]),
        target_tokenizer="extend",
        corpus=str(inputs["corpus"]),
        extend=ExtendConfig(100),
        stage1=StageConfig(batch=BatchConfig(sequence_length=64)),
        stage2=StageConfig(batch=BatchConfig(sequence_length=64)),
        evaluation=EvaluationConfig(sequence_length=64),
    )
    planned = plan_run(config, None, Machine(1, 1e12), Speed(1000.0))
    size = canonical.vocabulary_size(AutoTokenizer.from_pretrained(inputs["llama"]))
    assert planned.stages[0].trained == 32 * (size + 100)


def test_text_to_mine_is_drawn_from_the_whole_corpus(run):
    summary = json.loads((run / "corpus" / "summary.json").read_text())
    everything = mining.sample(run / "corpus", 10**9, 0)
    assert sum(len(text.encode()) for text in everything) == summary["train_bytes"]
    half = mining.sample(run / "corpus", summary["train_bytes"] // 2, 0)
    assert (
        half
        == mining.sample(run / "corpus", summary["train_bytes"] // 2, 0)
        != everything[: len(half)]
    )
    assert (
        0.2 * summary["train_bytes"]
        < sum(len(text.encode()) for text in half)
        <= summary["train_bytes"] // 2
    )


# --- Tokenizers of a run ------------------------------------------------------------------------


def test_document_separator_is_the_eos_of_the_export(inputs, tmp_path):
    """A separator recognised by its name alone, and one that the config names and the run adds."""
    silent = AutoTokenizer.from_pretrained(inputs["silent"])
    assert silent.eos_token is None
    for name, expected in (("", silent.get_vocab()["<|endoftext|>"]), ("<|stop|>", len(silent))):
        workdir = tmp_path / f"run{name.strip('<|>')}"
        more = (
            f"--config.end_of_text={name}",
            "--config.alignment.method=pieces",
            "--stages=init,export",
        )
        taken = inputs | {"target": inputs["silent"]}
        assert main.main(arguments(taken, "llama", workdir, "ultra_quick_demo", *more)) == 0
        exported = AutoTokenizer.from_pretrained(workdir / "export")
        configs = [
            json.loads((workdir / "export" / f"{prefix}config.json").read_text())
            for prefix in ("", "generation_")
        ]
        assert (
            [config["eos_token_id"] for config in configs]
            == [expected, expected]
            == [exported.eos_token_id] * 2
        )
        assert (
            json.loads((workdir / "tokens" / "target" / "index.json").read_text())["end_of_text"]
            == expected
        )
        assert inspect.main(["--workdir", str(workdir), "--id", "5"]) == 0


def test_identities_cover_only_files_that_define_the_tokenizer(inputs, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(inputs["llama"], folder)

    def identities() -> dict:
        config = Config(
            source_model=str(folder), target_tokenizer=str(folder), corpus=str(inputs["corpus"])
        )
        return run_identities.identities(Context(config, tmp_path / "run", print))

    before = identities()
    for name in ("README.md", "LICENSE", "LICENSE.txt", "NOTICE", ".gitattributes"):
        (folder / name).write_text("words")
    assert identities() == before
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings | {"pad_token": "<|endoftext|>"})
    )
    changed = identities()
    assert {name for name in before if before[name] != changed[name]} >= {
        "source_tokenizer",
        "target_tokenizer",
    }


def test_ids_with_gaps_need_rows_up_to_the_largest(inputs, tmp_path):
    """The tokenizer has fewer tokens than the matrices have rows, but an id beyond them."""
    folder = tmp_path / "model"
    shutil.copytree(inputs["llama"], folder)
    state = json.loads((folder / "tokenizer.json").read_text())
    last = max(state["model"]["vocab"], key=state["model"]["vocab"].get)
    state["model"]["vocab"][last] = 330
    (folder / "tokenizer.json").write_text(json.dumps(state))
    context = Context(
        Config(source_model=str(folder), corpus=str(inputs["corpus"])), tmp_path / "run", print
    )
    tokenizer = hub.load_tokenizer(folder)
    assert len(tokenizer) <= 320
    with pytest.raises(UserError, match="has 331 tokens but its matrices have only 320 rows"):
        checks.check(context)
    model, raw = context.inputs.source_model
    params = huggingface.load_params(folder, model)
    with pytest.raises(UserError, match="has 331 tokens but the model has only 320 rows"):
        huggingface.save_checkpoint(
            tmp_path / "out", params, model, raw, tokenizer, dtypes="float32"
        )


def test_added_tokens_without_source_rows_are_dropped(inputs, tmp_path):
    """As in Gemma 3 1B, whose tokenizer has an image token beyond the last row, and in fine-tuned
    models with an added pad token.
    """
    folder = tmp_path / "model"
    shutil.copytree(inputs["llama"], folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    fillers = [f"<unused{i}>" for i in range(320 - len(tokenizer))]
    tokenizer.add_tokens(fillers)
    tokenizer.add_special_tokens(
        {"pad_token": "<pad>", "extra_special_tokens": ["<image>", fillers[0]]}
    )
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**settings, "image_token": "<image>"})
    )
    logged = []
    config = Config(
        source_model=str(folder), target_tokenizer="extend", corpus=str(inputs["corpus"])
    )
    context = Context(config, tmp_path / "run", logged.append)
    known = context.inputs.source_tokenizer
    assert any("no rows for 2 tokens" in line and "<image>, <pad>" in line for line in logged)
    assert canonical.vocabulary_size(known) == 320 == context.inputs.kept
    assert (
        known.pad_token is None
        and known.extra_special_tokens == [fillers[0]]
        and known.chat_template
    )
    whole = AutoTokenizer.from_pretrained(folder)
    assert len(whole) == 322
    assert known.get_vocab() == {token: i for token, i in whole.get_vocab().items() if i < 320}
    extended = mining.extended_tokenizer(known, ["abcd " * 50], 3, min_count=2)
    assert (
        extended.convert_ids_to_tokens(319) == fillers[-1]
        and canonical.vocabulary_size(extended) > 320
    )
