"""Whole runs of tiny models whose layers have different mixers, with and without experts."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers import tiny_tokenizer
from tests.models.parity_cases import TOKENIZER, cases_of, model
from tests.pipeline.toy_runs import arguments, write_corpus
from tokalign_jax import main


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["lfm2", "qwen3_next", "gpt_oss", "lfm2_moe", "llama4_text", "glm4_moe"]
)
def test_a_run_trains_and_exports_an_ordinary_model(family, tmp_path):
    corpus = write_corpus(tmp_path)
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    model(cases_of(family)[0]).save_pretrained(tmp_path / family)
    TOKENIZER.save_pretrained(tmp_path / family)
    target = tiny_tokenizer(420, texts, kind="metaspace")
    target.save_pretrained(tmp_path / "target")
    inputs = {"corpus": corpus, "target": tmp_path / "target", family: tmp_path / family}
    assert main.main(arguments(inputs, family, tmp_path / "run", "optimal")) == 0

    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "run/export").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/export")
    assert exported.config.model_type == family
    assert exported.get_input_embeddings().weight.shape[0] >= len(tokenizer) == len(target)
    inputs = tokenizer("the model token row text", return_tensors="pt")
    with torch.no_grad():
        assert torch.isfinite(exported(input_ids=inputs["input_ids"]).logits).all()
    report = json.loads((tmp_path / "run/report/report.json").read_text())
    states = report["kept"]["states"]
    assert {"source", "init", "stage1", "stage2"} <= set(states)
    assert all(np.isfinite(state["pooled"]["bits_per_byte"]) for state in states.values())
    losses = [stage["loss"] for stage in report["training"].values()]
    assert np.isfinite(losses).all() and len(losses) == 2
