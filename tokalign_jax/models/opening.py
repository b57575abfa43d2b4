"""Whether AutoTokenizer reads a folder as its tokenizer.json says, and an export as it was trained.

transformers forces a tokenizer class by some values of `model_type`, and some classes rebuild
normaliser and pre-tokenizer: Qwen 2's cuts every vocabulary by Qwen's expression.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tokalign_jax.errors import UserError
from tokalign_jax.models import hub
from tokalign_jax.text import reopening


def difference_by_type(config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    """How AutoTokenizer reads `tokenizer` otherwise when exported beside this config.json; else "".

    In words that begin with the class.
    """
    with tempfile.TemporaryDirectory(prefix="export_") as name:
        folder = Path(name)
        hub.save_tokenizer(tokenizer, folder)
        hub.write_json(folder / "config.json", config)
        opened = AutoTokenizer.from_pretrained(folder)
    problem = reopening.difference(reopening.read(tokenizer), reopening.read(opened))
    return problem and f"{type(opened).__name__}: {problem}"


def check_export(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Opens an exported folder as its users do, in a process of its own, and compares.

    Raises:
      UserError: it cannot be opened, or reads texts otherwise than `tokenizer`.
    """
    try:
        found = reopening.read_afresh(folder)
    except RuntimeError as error:
        raise UserError(
            f"AutoTokenizer cannot open the exported folder '{folder}' ({error}): check that"
            " transformers is installed completely, then run the same command again"
        ) from error
    if problem := reopening.difference(reopening.read(tokenizer), found):
        raise UserError(
            f"AutoTokenizer opens the exported folder '{folder}' as {found['class']}, which reads"
            f" texts otherwise than the target tokenizer does: {problem}. Open the folder with"
            " transformers.PreTrainedTokenizerFast, or install another version of transformers and"
            " run the same command again"
        )


def two_readings(folder: Path, opened: PreTrainedTokenizerBase) -> str:
    """How the files of a tokenizer's folder contradict each other, in words; "" where they do not.

    Args:
      opened: the folder's tokenizer as AutoTokenizer gives it.
    """
    state = hub.read_json(folder / "tokenizer.json")
    if state is None:
        return ""
    if problem := _other_vocabulary(folder, state["model"]):
        return problem
    if type(opened) is PreTrainedTokenizerFast:
        return ""
    plain = PreTrainedTokenizerFast.from_pretrained(folder)
    problem = reopening.cut_difference(reopening.read(plain), reopening.read(opened))
    return problem and (
        f"by {type(opened).__name__}, the class that transformers opens it with here, which is"
        f" followed, {problem} by tokenizer.json"
    )


def _other_vocabulary(folder: Path, model: Mapping[str, Any]) -> str:
    """How vocab.json or merges.txt contradict the model of the tokenizer.json beside them."""
    known, vocabulary = model.get("vocab"), hub.read_json(folder / "vocab.json")
    if vocabulary and isinstance(known, dict):
        for token, index in known.items():
            if vocabulary.get(token, index) != index:
                return (
                    f"vocab.json gives {token!r} the id {vocabulary[token]}, tokenizer.json"
                    f" {index}, which is followed"
                )
    file = folder / "merges.txt"
    if not file.is_file() or "merges" not in model:
        return ""
    listed = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    lines = file.read_text(encoding="utf-8").split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    for number, (one, other) in enumerate(zip(merges, listed), start=1):
        if one != other:
            return (
                f"merge {number} is {one!r} in merges.txt and {other!r} in tokenizer.json, which is"
                " followed"
            )
    if len(merges) != len(listed):
        return (
            f"merges.txt has {len(merges):,} merges, tokenizer.json {len(listed):,}; the latter is"
            " followed"
        )
    return ""
