"""Warnings about features of an exported folder that llama.cpp or vLLM do not support."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tokalign_jax.models import hub, llama_cpp

_SENTENCEPIECE_MODEL_ONLY = ("gemma", "gemma2")
"""Families that llama.cpp's converter reads with a SentencePiece tokenizer.model only."""

_SENTENCEPIECE_FROM_JSON = ("llama", "mistral", "mixtral")
"""Families whose SentencePiece BPE the converter reads from tokenizer.json."""


def warnings(
    config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, tokenizer_folder: Path | None
) -> list[str]:
    """Returns warnings, as sentences, about serving the model.

    Args:
      config: the exported config.json.
      tokenizer: the exported tokenizer.
      tokenizer_folder: source of the target tokenizer, which may be a model's folder.
    """
    return [*_llama_cpp(config, tokenizer), *_draft_rows(config, tokenizer_folder)]


def _llama_cpp(config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else {}
    kind = state.get("model", {}).get("type")
    if kind != "BPE":
        yield (
            f"llama.cpp cannot serve this model: it supports no decoder with a {kind or 'slow'}"
            " tokenizer; serve it with transformers or vLLM, or choose a target tokenizer of"
            " type BPE"
        )
        return
    if config.get("model_type") in _SENTENCEPIECE_MODEL_ONLY:
        yield (
            f"llama.cpp's converter reads '{config['model_type']}' models with a SentencePiece"
            " tokenizer.model only, which exports do not have: serve it with transformers or vLLM"
        )
        return
    if state["model"].get("byte_fallback"):
        if config.get("model_type") not in _SENTENCEPIECE_FROM_JSON:
            yield (
                f"llama.cpp's converter reads '{config.get('model_type')}' models with a"
                " SentencePiece tokenizer from tokenizer.model only, which exports do not have:"
                " serve it with transformers or vLLM"
            )
        return
    if recognized_vocabulary(tokenizer):
        return
    name = llama_cpp.PRE_TOKENIZERS.get(pre_tokenizer_steps(state))
    if name is None:
        yield (
            "llama.cpp does not support this tokenizer's pre-tokenizer, so a converted model would"
            " read different ids: serve it with transformers or vLLM, or choose a target tokenizer"
            " with the pre-tokenizer of GPT-2, SmolLM, LLaMA 3 or Qwen"
        )
        return
    yield (
        "llama.cpp's convert_hf_to_gguf.py stops at unknown vocabularies ('BPE pre-tokenizer was"
        f" not recognized'): this one has the pre-tokenizer '{name}'; docs/serving.md has the"
        " command that registers it"
    )


def recognized_vocabulary(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Returns the name that llama.cpp's converter has for a vocabulary, or None."""
    ids = str(tokenizer.encode(llama_cpp.TEXT))
    prefix = hashlib.sha256(ids.encode()).hexdigest()[:12]
    for name, hashes in llama_cpp.VOCABULARIES.items():
        if prefix in hashes.split():
            return name
    return None


def pre_tokenizer_steps(state: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the pre-tokenizer of a tokenizer.json as regular expressions and type names.

    A step that cannot be expressed so is returned alone, as its string representation.
    """
    pre_tokenizer = state.get("pre_tokenizer") or {}
    steps = []
    for part in pre_tokenizer.get("pretokenizers", [pre_tokenizer]):
        match part:
            case {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated"}:
                steps.append(expression)
            case {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False}:
                continue
            case {"type": "Digits", "individual_digits": True}:
                steps.append("Digits")
            case {"type": "ByteLevel", "add_prefix_space": False}:
                steps.append("ByteLevel")
            case _:
                return (f"{part}",)
    return tuple(steps)


def _draft_rows(config: Mapping[str, Any], tokenizer_folder: Path | None) -> Iterator[str]:
    """Warns if the model and that of the target tokenizer differ in their number of rows.

    vLLM, and transformers without tokenizers, require equal rows of a draft and its target.
    """
    raw = tokenizer_folder and hub.read_json(tokenizer_folder / "config.json")
    if not raw:
        return
    rows = (raw.get("text_config") or raw).get("vocab_size")
    if isinstance(rows, int) and rows > config["vocab_size"]:
        yield (
            f"the model has {config['vocab_size']:,} rows and the target tokenizer's model"
            f" {rows:,}: vLLM and transformers' assistant_model accept neither as a draft of the"
            f" other; set --config.initialization.rows_multiple_of={rows} to give it as many"
        )
