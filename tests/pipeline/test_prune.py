"""Whole runs that prune the source's vocabulary."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers import TEXTS, tiny_model_folder, tiny_tokenizer
from tests.pipeline.toy_runs import arguments, write_corpus
from tokalign_jax import main
from tokalign_jax.cli import inspect
from tokalign_jax.text.pruning import KEPT, SUMMARY


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    corpus = write_corpus(folder)
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    tokenizer = tiny_tokenizer(320, [*texts[:2], *TEXTS])
    inputs = {"corpus": corpus, "target": "prune"}
    for name, tied in (("gpt_neox", False), ("llama", True)):
        made = tiny_model_folder(folder / name, name, 330, tied=tied, tokenizer=tokenizer)
        inputs[name] = made
        model = AutoModelForCausalLM.from_pretrained(made).to(torch.bfloat16)
        model.save_pretrained(made)
    return inputs


def flags(inputs, family, workdir, *more):
    untrained = "--config.stage1.steps=0", "--config.stage2.steps=0"
    return arguments(
        inputs, family, workdir, "prune_demo", *untrained, "--config.prune.most_tokens=300", *more
    )


@pytest.fixture(scope="module", params=["gpt_neox", "llama"])
def run(request, inputs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / request.param
    assert main.main(flags(inputs, request.param, workdir)) == 0
    return inputs[request.param], workdir


def test_kept_rows_equal_the_sources_bit_for_bit(run):
    folder, workdir = run
    kept = np.load(workdir / "prune" / KEPT)
    before = load_file(folder / "model.safetensors")
    after = load_file(workdir / "export" / "model.safetensors")
    assert before.keys() == after.keys()
    vocabularies = 0
    for name, tensor in before.items():
        if after[name].shape != tensor.shape:
            tensor, vocabularies = tensor[torch.tensor(kept)], vocabularies + 1
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name
    assert vocabularies in (1, 2) and len(kept) < 320


def test_export_gives_the_sources_logits(run):
    folder, workdir = run
    kept = torch.tensor(np.load(workdir / "prune" / KEPT))
    models, tokenizers = (
        [kind.from_pretrained(at) for at in (folder, workdir / "export")]
        for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    assert models[1].config.vocab_size == len(tokenizers[1]) == len(kept)
    ids = [tokenizer(TEXTS[0], return_tensors="pt")["input_ids"] for tokenizer in tokenizers]
    assert tokenizers[1].decode(ids[1][0]) == tokenizers[0].decode(ids[0][0])
    both = kept[ids[1]]
    logits = [model(x).logits.float() for model, x in zip(models, (both, ids[1]))]
    torch.testing.assert_close(logits[0][..., kept], logits[1], atol=0.05, rtol=0.05)


def test_savings_and_costs_are_reported(run):
    _, workdir = run
    summary = json.loads((workdir / "prune" / SUMMARY).read_text())
    assert summary["tokens"] < summary["source_tokens"]
    assert summary["held_out"]["tokens"] >= summary["held_out"]["source_tokens"] > 0
    assert json.loads((workdir / "align" / "summary.json").read_text())["method"] == "prune"
    assert "with a pruned vocabulary" in (workdir / "export" / "README.md").read_text()
    assert inspect.main(["--workdir", str(workdir), "--token", " the"]) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--config.alignment.file=somewhere.json", "alignment.file has no effect"),
        ("--config.end_of_text=<new>", "is no token of the source tokenizer"),
    ],
)
def test_settings_without_effect_are_refused(inputs, tmp_path, capsys, more, message):
    assert main.main(flags(inputs, "llama", tmp_path / "run", more)) == 2
    output = capsys.readouterr()
    assert message in output.out + output.err


def test_report_states_whether_pruning_pays(run):
    folder, workdir = run
    content = json.loads((workdir / "report" / "report.json").read_text())["worth"]
    before, after = (
        sum(tensor.numel() for tensor in load_file(at / "model.safetensors").values())
        for at in (folder, workdir / "export")
    )
    assert content["parameters"] == {"source": before, "target": after}
    assert content["rows"]["target"] < content["rows"]["source"]
    assert "## Is it worth it?" in (workdir / "report" / "report.md").read_text()
