"""Exported tokenizers as transformers opens them, in this process and in a new one."""

import json
import os
import re
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tests.helpers import KINDS, SHARED, TEXTS, tokenizer_of_kind
from tests.models import parity_cases
from tests.pipeline.toy_runs import arguments, write_corpus
from tokalign_jax import main
from tokalign_jax.errors import UserError
from tokalign_jax.models import hub, huggingface, opening
from tokalign_jax.models.families import FAMILIES, qwen
from tokalign_jax.parallel import sharding
from tokalign_jax.text import reopening
from tokalign_jax.utils import paths

WORDS = [*TEXTS, *reopening.TEXTS]
FOURTH = "TRANSFORMERS_4_PYTHON"
OWN_CLASS = {"qwen2": "Qwen2Tokenizer", "qwen3_5_moe_text": "Qwen3_5Tokenizer"}
"""Model types whose tokens are cut by an expression of their class, whatever
tokenizer_config.json names."""


def made(kind: str) -> PreTrainedTokenizerFast:
    return tokenizer_of_kind(kind, WORDS, 1600)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_opens_every_kind_of_tokenizer_unchanged(kind):
    tokenizer = made(kind)
    others = FAMILIES if kind in ("gpt2", "llama2", "t5") else ("llama",)
    for model_type in set(others) - OWN_CLASS.keys():
        assert opening.class_difference({"model_type": model_type}, tokenizer) == "", model_type
    for model_type in OWN_CLASS.keys() & {"qwen2", *others}:
        message = opening.class_difference({"model_type": model_type}, tokenizer)
        assert message.startswith(f"{OWN_CLASS[model_type]}: ") == (kind != "qwen"), model_type


@pytest.mark.parametrize("name", ["qwen3", "neox"])
def test_transformers_opens_published_tokenizers_unchanged(name):
    if not (SHARED / "tokenizers" / name).is_dir():
        pytest.skip(f"needs {SHARED / 'tokenizers' / name}")
    tokenizer = hub.load_tokenizer(SHARED / "tokenizers" / name)
    assert opening.class_difference({"model_type": "llama"}, tokenizer) == ""
    assert (opening.class_difference({"model_type": "qwen2"}, tokenizer) == "") == (name == "qwen3")


def test_spaces_that_an_added_token_takes_are_noticed():
    """Qwen's class finds the token, but no longer with the space before it."""
    tokenizer = made("qwen")
    token = AddedToken("<|tool|>", lstrip=True, normalized=False, special=True)
    tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    assert opening.class_difference({"model_type": "llama"}, tokenizer) == ""
    message = opening.class_difference({"model_type": "qwen2"}, tokenizer)
    assert message.startswith("Qwen2Tokenizer: 'a <|tool|> b<|tool|>c")


def test_export_that_tokenizes_differently_is_refused(tmp_path):
    tokenizer = made("mistral")
    hub.save_tokenizer(tokenizer, tmp_path)
    hub.write_json(tmp_path / "config.json", {"model_type": "llama"})
    opening.check_export(tmp_path, tokenizer)
    hub.write_json(tmp_path / "config.json", {"model_type": "qwen2"})
    with pytest.raises(
        UserError,
        match=r"as Qwen2Tokenizer, which tokenizes differently.*is tokenized to.*instead of",
    ):
        opening.check_export(tmp_path, tokenizer)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="AutoTokenizer cannot open the exported folder"):
        opening.check_export(tmp_path, tokenizer)


@pytest.mark.parametrize("kind", ["gpt2", "qwen", "llama2", "mistral", "t5", "bert"])
def test_transformers_4_opens_exports_unchanged(kind, tmp_path):
    if not (python := os.environ.get(FOURTH)):
        pytest.skip(f"needs {FOURTH}, a Python interpreter that has transformers 4")
    tokenizer = made(kind)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|more|>"]})
    tokenizer.chat_template = "{{ messages[0].content }}<|more|>\n"
    tokenizer.clean_up_tokenization_spaces = True  # which version 5 ignores, but for WordPiece
    hub.save_tokenizer(tokenizer, tmp_path)
    for model_type in ("llama", "qwen2", "gemma2"):
        hub.write_json(tmp_path / "config.json", {"model_type": model_type})
        found = reopening.read_afresh(tmp_path, python)
        assert reopening.difference(reopening.read(tokenizer), found) == ""
        assert found["class"] == "PreTrainedTokenizerFast"


LOGITS = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], torch_dtype=torch.float32)
print(json.dumps(model(torch.tensor([json.loads(sys.argv[2])])).logits[0].tolist()))
"""


@pytest.mark.parametrize(
    ("family", "number"),
    [("llama", 0), ("llama", 3), ("gpt_neox", 1), ("phi3", 0), ("gemma3_text", 0), ("olmo3", 0)],
)
def test_transformers_4_computes_the_logits_of_a_source_saved_by_5(family, number, tmp_path):
    """Which has all rotary settings in `rope_parameters`, a key that version 4 ignores."""
    if not (python := os.environ.get(FOURTH)):
        pytest.skip(f"needs {FOURTH}, a Python interpreter that has transformers 4 and PyTorch")
    case = parity_cases.cases_of(family)[number]
    case = replace(case, settings={**case.settings, "vocab_size": 400})
    both = parity_cases.pair(case, tmp_path / "source")
    tokenizer = tokenizer_of_kind("llama2", TEXTS, 400)
    written = tmp_path / "written"
    huggingface.save_checkpoint(
        written, both.params, both.config, both.raw, tokenizer, source_folder=both.folder
    )
    ids = list(range(5, 25))
    printed = subprocess.run(
        [python, "-c", LOGITS, written, json.dumps(ids)], capture_output=True, text=True, check=True
    )
    expected = parity_cases.reference_logits(both.reference, np.array([ids]))[0]
    np.testing.assert_allclose(json.loads(printed.stdout), expected, atol=1e-3)


def test_rotary_settings_are_also_written_for_transformers_4():
    scaled = {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}
    assert hub._version_4_rotary({"model_type": "llama", "rope_parameters": scaled}) == {
        "rope_theta": 5e5,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
    }
    partial = {"rope_theta": 100.0, "rope_type": "default", "partial_rotary_factor": 0.25}
    assert hub._version_4_rotary({"model_type": "gpt_neox", "rope_parameters": partial}) == {
        "rotary_emb_base": 100.0,
        "rotary_pct": 0.25,
    }
    by_kind = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    assert hub._version_4_rotary({"model_type": "gemma3_text", "rope_parameters": by_kind}) == {
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
    }
    for untouched in (
        {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_theta": 1e4}, "rope_theta": 1e4},
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "longrope"}},
    ):
        assert hub._version_4_rotary(untouched) == {}


def test_settings_that_transformers_4_needs_are_written(tmp_path):
    tokenizer = made("gpt2")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|more|>"]})
    tokenizer.clean_up_tokenization_spaces = True
    hub.save_tokenizer(tokenizer, tmp_path)
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    expected = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<|more|>"],
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
    assert {key: written[key] for key in expected} == expected
    assert not {"extra_special_tokens", "backend", "is_local", "local_files_only"} & set(written)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.extra_special_tokens == ["<|more|>"] and "token_type_ids" not in again("a")


def case_of(family: str, **settings) -> parity_cases.Case:
    """The first parity case of a family that has no windows, with more settings."""
    case = next(
        case
        for case in parity_cases.cases_of(family)
        if not case.settings.get("use_sliding_window")
    )
    return replace(case, settings={**case.settings, **settings})


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt_neox", "gemma2", "phi3"])
def test_export_with_a_sentencepiece_tokenizer_gives_the_same_logits(family, tmp_path):
    """Opened by AutoTokenizer and AutoModelForCausalLM, of the text itself."""
    tokenizer = tokenizer_of_kind("llama2", TEXTS, 400)
    both = parity_cases.pair(case_of(family, vocab_size=400), tmp_path / "source")
    leaves = paths.flatten(both.params)
    config, raw, read = (
        both.config,
        both.raw,
        lambda path, *index: sharding.to_host(leaves[path], *index),
    )
    if opening.class_difference(raw, tokenizer):
        assert family == "qwen2" and qwen.is_llama(config)
        config, read, raw = qwen.as_llama(config, read, raw)
        assert hub.config_from_hf(raw) == config
    written = tmp_path / "written"
    huggingface.save_checkpoint(written, read, config, raw, tokenizer, source_folder=both.folder)
    opened = AutoTokenizer.from_pretrained(written)
    ids = opened("the model said: don't 2023\n")["input_ids"]
    assert opened.decode(ids, skip_special_tokens=True) == "the model said: don't 2023\n"
    text = np.array([ids])
    expected = parity_cases.reference_logits(both.reference, text)
    np.testing.assert_allclose(
        parity_cases.reference_logits(parity_cases.reference(written), text), expected, atol=1e-5
    )
    stored = huggingface.stored_dtypes(written)
    assert len(set(stored.values())) == 1
    assert any(name.endswith("o_proj.bias") for name in stored) == (family == "qwen2")


def test_qwen2_model_with_windows_is_not_rewritten(tmp_path):
    windowed = [
        case for case in parity_cases.cases_of("qwen2") if case.settings.get("use_sliding_window")
    ]
    assert windowed
    both = parity_cases.pair(windowed[0], tmp_path)
    assert not qwen.is_llama(both.config)


def test_run_from_qwen2_exports_what_it_trained(tmp_path, capsys):
    """A run by the command, from a Qwen 2 model to a tokenizer with `▁` for spaces."""
    corpus = write_corpus(tmp_path)
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    parity_cases.pair(case_of("qwen2"), tmp_path / "source")
    (tmp_path / "source" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    target = tokenizer_of_kind("llama2", texts, 500)
    target.save_pretrained(tmp_path / "target")
    inputs = {"corpus": corpus, "target": tmp_path / "target", "qwen2": tmp_path / "source"}
    more = ("--config.alignment.method=pieces", "--stages=init,export")
    assert main.main(arguments(inputs, "qwen2", tmp_path / "run", "ultra_quick_demo", *more)) == 0
    printed = capsys.readouterr().out
    assert "opens the exported tokenizer, beside model_type 'qwen2', as Qwen2Tokenizer" in printed
    assert "chat: the new model has the source's chat template" in printed
    opened = AutoTokenizer.from_pretrained(tmp_path / "run" / "export")
    assert opened(texts[:5])["input_ids"] == target(texts[:5])["input_ids"]
    ids = torch.tensor(opened(texts[:1])["input_ids"])
    config, _ = hub.load_config(tmp_path / "run" / "init")
    params = huggingface.load_params(tmp_path / "run" / "init", config, jnp.float32)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "run" / "export", dtype=torch.float32
        )
        found = model(ids).logits.numpy()
    assert type(model).__name__ == "LlamaForCausalLM"
    np.testing.assert_allclose(
        found, parity_cases.our_logits(config, params, ids.numpy()), atol=0.05
    )


def two_readings(folder: Path) -> str:
    return opening.file_contradiction(folder, hub.load_tokenizer(folder))


def test_contradicting_tokenizer_files_are_reported(tmp_path):
    tokenizer = made("llama3")
    tokenizer.save_pretrained(tmp_path)
    assert two_readings(tmp_path) == ""
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    # The class cuts numbers otherwise than the file does.
    hub.write_json(
        tmp_path / "tokenizer_config.json", settings | {"tokenizer_class": "GPT2Tokenizer"}
    )
    message = two_readings(tmp_path)
    assert message.startswith(
        "by GPT2Tokenizer, the class that transformers opens it with, which is used, "
    )
    assert message.endswith(" by tokenizer.json")
    hub.write_json(
        tmp_path / "config.json", {"model_type": "olmo2"}
    )  # beside which the file is followed
    assert two_readings(tmp_path) == ""
    state = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    merges = [" ".join(merge) for merge in state["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    hub.write_json(tmp_path / "vocab.json", state["vocab"])
    assert two_readings(tmp_path) == ""
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *reversed(merges), ""]))
    assert two_readings(tmp_path).startswith(
        f"merge 1 is {merges[-1]!r} in merges.txt and {merges[0]!r} in tokenizer.json"
    )
    hub.write_json(tmp_path / "vocab.json", state["vocab"] | {"a": 7})
    assert "vocab.json gives 'a' the id 7" in two_readings(tmp_path)


def test_vocabulary_of_wordpiece_that_contradicts_its_file_is_reported(tmp_path):
    tokenizer = made("bert")
    tokenizer.save_pretrained(tmp_path)
    tokens = [tokenizer.convert_ids_to_tokens(i) for i in range(tokenizer.vocab_size)]
    (tmp_path / "vocab.txt").write_text("\n".join([*tokens, ""]), encoding="utf-8")
    assert two_readings(tmp_path) == ""
    tokens[20:22] = reversed(tokens[20:22])
    (tmp_path / "vocab.txt").write_text("\n".join([*tokens, ""]), encoding="utf-8")
    assert two_readings(tmp_path).startswith("vocab.txt gives")


def test_files_beside_tokenizer_json_need_not_be_readable(tmp_path):
    """transformers ignores them, too."""
    made("gpt2").save_pretrained(tmp_path)
    (tmp_path / "old.model").mkdir()
    (tmp_path / "vocab.txt").write_bytes("café\n".encode("latin-1"))
    assert two_readings(tmp_path) == ""
    (tmp_path / "merges.txt").write_bytes("é a\n".encode("latin-1"))
    assert two_readings(tmp_path).startswith("merge 1 is")


def sentencepiece_model(pieces: list[tuple[str, float]]) -> bytes:
    """A SentencePiece model of these pieces, in the encoding of protocol buffers."""
    encoded = []
    for piece, score in pieces:
        name = piece.encode()
        byte = b"\x18\x06" if re.fullmatch("<0x..>", piece) else b""
        body = b"\x0a" + bytes([len(name)]) + name + b"\x15" + struct.pack("<f", score) + byte
        encoded.append(b"\x0a" + bytes([len(body)]) + body)
    return b"".join(encoded) + b"\x12\x03\x18\x90\x4e"  # and settings of its trainer


@pytest.mark.parametrize("kind", ["llama2", "t5"])
def test_sentencepiece_model_that_contradicts_tokenizer_json_is_reported(kind, tmp_path):
    tokenizer = tokenizer_of_kind(kind, TEXTS, 400)
    tokenizer.save_pretrained(tmp_path)
    vocabulary = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    pieces = (
        [(token, 0.0) for token in vocabulary]
        if kind == "llama2"
        else [tuple(p) for p in vocabulary]
    )
    path = tmp_path / "tokenizer.model"
    path.write_bytes(sentencepiece_model(pieces))
    assert two_readings(tmp_path) == ""
    swapped = [*pieces[:-2], pieces[-1], pieces[-2]]
    cases = {
        f"tokenizer.model has {pieces[-2][0]!r} after {pieces[-1][0]!r}": swapped,
        "tokenizer.model has the piece 'another one'": [*pieces, ("another one", -9.0)],
    }
    if kind == "t5":
        cases[f"tokenizer.model gives {pieces[-1][0]!r} the score"] = [
            *pieces[:-1],
            (pieces[-1][0], pieces[-1][1] - 1),
        ]
    for message, changed in cases.items():
        path.write_bytes(sentencepiece_model(changed))
        assert two_readings(tmp_path).startswith(message)
    path.write_bytes(b"IQ== 0\n")  # tiktoken's
    assert two_readings(tmp_path) == ""
