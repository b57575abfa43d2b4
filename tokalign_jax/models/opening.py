"""Checks that AutoTokenizer follows a folder's tokenizer.json, before and after an export.

transformers forces a tokenizer class for some values of `model_type`, and some classes rebuild the
normalizer and pre-tokenizer: Qwen 2's applies Qwen's regular expression to every vocabulary.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tokalign_jax.errors import UserError
from tokalign_jax.models import hub
from tokalign_jax.text import reopening


def class_difference(config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """Describes how AutoTokenizer would change `tokenizer` if exported with this config.json.

    Returns:
      A description that begins with the tokenizer class, or "" if nothing changes.
    """
    with tempfile.TemporaryDirectory(prefix="export_") as name:
        folder = Path(name)
        hub.save_tokenizer(tokenizer, folder)
        hub.write_json(folder / "config.json", config)
        opened = AutoTokenizer.from_pretrained(folder)
    problem = reopening.difference(reopening.read(tokenizer), reopening.read(opened))
    return problem and f"{type(opened).__name__}: {problem}"


def check_export(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Opens an exported folder in a new process, as its users do, and compares the tokenizers.

    Raises:
      UserError: the folder cannot be opened, or tokenizes differently from `tokenizer`.
    """
    try:
        reopened = reopening.read_afresh(folder)
    except RuntimeError as error:
        raise UserError(
            f"AutoTokenizer cannot open the exported folder '{folder}' ({error}): check that the"
            " installation of transformers is complete, then run the same command again"
        ) from error
    if problem := reopening.difference(reopening.read(tokenizer), reopened):
        raise UserError(
            f"AutoTokenizer opens the exported folder '{folder}' as {reopened['class']}, which"
            f" tokenizes differently from the target tokenizer: {problem}. Open the folder with"
            " transformers.PreTrainedTokenizerFast, or install another version of transformers and"
            " run the same command again"
        )


def file_contradiction(folder: Path, opened: PreTrainedTokenizerBase) -> str:
    """Describes how the files of a tokenizer folder contradict each other; "" if they agree.

    Args:
      folder: the tokenizer's folder.
      opened: the same tokenizer, opened by AutoTokenizer.
    """
    state = hub.read_json(folder / "tokenizer.json")
    if state is None:
        return ""
    if problem := _vocabulary_contradiction(folder, state["model"]):
        return problem
    if type(opened) is PreTrainedTokenizerFast:
        return ""
    plain = PreTrainedTokenizerFast.from_pretrained(folder)
    problem = reopening.cut_difference(reopening.read(plain), reopening.read(opened))
    return problem and (
        f"by {type(opened).__name__}, the class that transformers opens it with, which is used,"
        f" {problem} by tokenizer.json"
    )


def _vocabulary_contradiction(folder: Path, model: Mapping[str, Any]) -> str:
    """Describes how vocab.json or merges.txt contradict the model of tokenizer.json."""
    token_ids, vocabulary = model.get("vocab"), hub.read_json(folder / "vocab.json")
    if vocabulary and isinstance(token_ids, dict):
        for token, index in token_ids.items():
            if vocabulary.get(token, index) != index:
                return (
                    f"vocab.json gives {token!r} the id {vocabulary[token]}, tokenizer.json gives"
                    f" it {index}; tokenizer.json is used"
                )
    file = folder / "merges.txt"
    if not file.is_file() or "merges" not in model:
        return ""
    expected = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    lines = file.read_text(encoding="utf-8").split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    for number, (ours, theirs) in enumerate(zip(merges, expected), start=1):
        if ours != theirs:
            return (
                f"merge {number} is {ours!r} in merges.txt and {theirs!r} in tokenizer.json;"
                " tokenizer.json is used"
            )
    if len(merges) != len(expected):
        return (
            f"merges.txt has {len(merges):,} merges, tokenizer.json has {len(expected):,};"
            " tokenizer.json is used"
        )
    return ""
