"""Edits of tokenizers through their files, whose format all tokenizers share."""

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tokalign_jax.errors import UserError
from tokalign_jax.text.canonical import vocabulary_size


def edited(
    tokenizer: PreTrainedTokenizerBase, edit: Callable[[dict[str, Any], dict[str, Any]], None]
) -> PreTrainedTokenizerBase:
    """Return the tokenizer after `edit` changed its tokenizer.json and tokenizer_config.json.

    Args:
      tokenizer: the tokenizer.
      edit: changes the contents of both files in place.
    """
    with tempfile.TemporaryDirectory(prefix="tokenizer_") as folder:
        tokenizer.save_pretrained(folder)
        files = [Path(folder) / name for name in ("tokenizer.json", "tokenizer_config.json")]
        state, settings = (json.loads(file.read_text("utf-8")) for file in files)
        edit(state, settings)
        # Other classes rebuild their own tokenizer from the vocabulary.
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        for file, content in zip(files, (state, settings)):
            file.write_text(json.dumps(content, ensure_ascii=False), "utf-8")
        result = PreTrainedTokenizerFast.from_pretrained(folder)
    result.name_or_path = tokenizer.name_or_path
    return result


def within_rows(
    tokenizer: PreTrainedTokenizerBase, rows: int, owner: str
) -> PreTrainedTokenizerBase:
    """Return the tokenizer without added tokens past the `rows` rows of its model.

    Some models are published with such tokens: Gemma 3 1B with one for images, CodeLLaMA 34B with
    those for infilling.

    Args:
      tokenizer: the tokenizer.
      rows: rows of the model's embedding.
      owner: name of the model, for the error.

    Raises:
      UserError: tokens other than added ones have no rows.
    """
    if vocabulary_size(tokenizer) <= rows:
        return tokenizer
    removed = [
        token.content for index, token in tokenizer.added_tokens_decoder.items() if index >= rows
    ]
    if any(
        index >= rows and token not in removed for token, index in tokenizer.get_vocab().items()
    ):
        raise UserError(
            f"{owner}: its tokenizer has {vocabulary_size(tokenizer):,} tokens but its matrices"
            f" have only {rows:,} rows; the tokenizer belongs to another model: put the right"
            " tokenizer's files beside the weights"
        )

    def remove(state: dict[str, Any], settings: dict[str, Any]) -> None:
        state["added_tokens"] = [
            token for token in state["added_tokens"] if token["content"] not in removed
        ]
        remaining = _without(settings, removed)
        settings.clear()
        settings.update(remaining)

    return edited(tokenizer, remove)


def _without(content: Any, removed: Sequence[str]) -> Any:
    """Return JSON `content` without the strings `removed`, at any depth."""
    if isinstance(content, dict):
        return {
            key: _without(value, removed) for key, value in content.items() if value not in removed
        }
    if isinstance(content, list):
        return [_without(value, removed) for value in content if value not in removed]
    return content
