"""Warnings, with a remedy, of what llama.cpp and vLLM would refuse in an exported folder."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tokalign_jax.models import hub, llama_cpp

_NEEDS_SENTENCE_PIECE = ("gemma", "gemma2")
"""Families for which llama.cpp's converter wants a tokenizer.model and nothing else."""


_TAKE_SENTENCE_PIECE = ("llama", "mistral", "mixtral")
"""Families for which it reads SentencePiece's BPE from tokenizer.json."""


def warnings(
    config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, tokenizer_folder: Path | None
) -> list[str]:
    """What to know before the model is served, in sentences.

    Args:
      config: the exported config.json.
      tokenizer_folder: where the target tokenizer was read from; it may be a model's.
    """
    return [*_llama_cpp(config, tokenizer), *_rows(config, tokenizer_folder)]


def _llama_cpp(config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else {}
    kind = state.get("model", {}).get("type")
    if kind != "BPE":
        yield (
            f"llama.cpp cannot serve this model: it has no decoder with a {kind or 'slow'}"
            " tokenizer; serve it with transformers or vLLM, or choose a target tokenizer of"
            " type BPE"
        )
        return
    if config.get("model_type") in _NEEDS_SENTENCE_PIECE:
        yield (
            f"llama.cpp's converter reads '{config['model_type']}' models with a SentencePiece"
            " tokenizer.model only, which no export has: serve it with transformers or vLLM"
        )
        return
    if state["model"].get("byte_fallback"):
        if config.get("model_type") not in _TAKE_SENTENCE_PIECE:
            yield (
                f"llama.cpp's converter reads '{config.get('model_type')}' models with a"
                " SentencePiece tokenizer from tokenizer.model only, which no export has: serve it"
                " with transformers or vLLM"
            )
        return
    known = known_vocabulary(tokenizer)
    if known:
        return
    name = llama_cpp.PRE_TOKENIZERS.get(cuts(state))
    if name is None:
        yield (
            "llama.cpp does not cut text as this tokenizer does, so that a converted model would"
            " read other ids: serve it with transformers or vLLM, or choose a target tokenizer that"
            " cuts as GPT-2, SmolLM, LLaMA 3 or Qwen do"
        )
        return
    yield (
        "llama.cpp's convert_hf_to_gguf.py stops at a vocabulary that it has not met ('BPE"
        f" pre-tokenizer was not recognized'): this one is cut as '{name}' says; docs/serving.md"
        " has the command that tells it so"
    )


def known_vocabulary(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The name by which llama.cpp's converter recognizes a vocabulary, or None."""
    ids = str(tokenizer.encode(llama_cpp.TEXT))
    digits = hashlib.sha256(ids.encode()).hexdigest()[:12]
    for name, hashes in llama_cpp.VOCABULARIES.items():
        if digits in hashes.split():
            return name
    return None


def cuts(state: Mapping[str, Any]) -> tuple[str, ...]:
    """How tokenizer.json splits text before BPE: expressions, and names of other pre-tokenizers."""
    whole = state.get("pre_tokenizer") or {}
    found = []
    for part in whole.get("pretokenizers", [whole]):
        match part:
            case {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated"}:
                found.append(expression)
            case {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False}:
                continue
            case {"type": "Digits", "individual_digits": True}:
                found.append("Digits")
            case {"type": "ByteLevel", "add_prefix_space": False}:
                found.append("ByteLevel")
            case _:
                return (f"{part}",)
    return tuple(found)


def _rows(config: Mapping[str, Any], tokenizer_folder: Path | None) -> Iterator[str]:
    """A draft must have as many rows as its target in vLLM, and in transformers without tokenizers."""
    other = tokenizer_folder and hub.read_json(tokenizer_folder / "config.json")
    if not other:
        return
    rows = (other.get("text_config") or other).get("vocab_size")
    if isinstance(rows, int) and rows > config["vocab_size"]:
        yield (
            f"the model has {config['vocab_size']:,} rows and the one that the target tokenizer"
            f" comes with {rows:,}: vLLM and transformers' assistant_model refuse the one as a"
            f" draft of the other; --config.initialization.rows_multiple_of={rows} gives it as many"
        )
