"""Warnings of exports that llama.cpp or vLLM would refuse."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers import SHARED, TEXTS, tokenizer_of_kind
from tests.models.parity_cases import cases_of, export, pair, reference, tokens
from tokalign_jax.models import hub, serving


def warned(kind: str, model_type: str = "llama", rows: int = 2000, folder=None) -> str:
    config = {"model_type": model_type, "vocab_size": rows}
    return " ".join(serving.warnings(config, tokenizer_of_kind(kind, TEXTS), folder))


@pytest.mark.parametrize(
    "kind, name", [("llama3", "llama-bpe"), ("qwen", "qwen2"), ("gpt2", "gpt-2")]
)
def test_unknown_vocabularies_of_the_converter_are_reported(kind, name):
    assert f"has the pre-tokenizer '{name}'; docs/serving.md" in warned(kind)


@pytest.mark.parametrize("kind", ["bert", "t5", "gpt1"])
def test_tokenizers_unsupported_by_llama_cpp_are_reported(kind):
    assert "llama.cpp" in warned(kind)
    assert "transformers or vLLM" in warned(kind)


def test_sentence_piece_is_read_for_some_families():
    assert not warned("llama2")
    assert "tokenizer.model" in warned("llama2", "qwen3")
    assert "tokenizer.model" in warned("qwen", "gemma2")


def test_draft_with_other_rows_is_reported_with_the_setting(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 2304}))
    assert "rows_multiple_of=2304" in warned("llama2", folder=tmp_path)
    assert not warned("llama2", rows=2304, folder=tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"vocab_size": 2304}}))
    assert "rows_multiple_of=2304" in warned("llama2", folder=tmp_path)


@pytest.mark.skipif(
    not (SHARED / "tokenizers/qwen3").exists(), reason="the shared tokenizer is not at hand"
)
def test_published_vocabulary_is_recognised():
    tokenizer = hub.load_tokenizer(SHARED / "tokenizers/qwen3")
    assert serving.recognized_vocabulary(tokenizer) == "qwen2"
    assert not serving.warnings({"model_type": "llama", "vocab_size": 151669}, tokenizer, None)


def test_exported_draft_reproduces_the_larger_models_text(tmp_path):
    draft = cases_of("llama")[0]
    both = pair(draft, tmp_path / "draft")
    drafting = reference(export(both, tmp_path / "written"))
    larger = replace(draft, settings={**draft.settings, "num_hidden_layers": 4})
    target: Any = pair(larger, tmp_path / "target").reference
    prompt = torch.tensor(tokens(12, batch=1)).long()
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    alone = target.generate(prompt, **options)
    together = target.generate(prompt, assistant_model=drafting, **options)
    np.testing.assert_array_equal(together, alone)
