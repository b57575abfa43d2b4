"""Checks that AutoTokenizer follows a folder's tokenizer.json, before and after an export.

transformers forces a tokenizer class for some values of `model_type`, and some classes rebuild the
normalizer and pre-tokenizer: Qwen 2's applies Qwen's regular expression to every vocabulary.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import import_protobuf

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
    """Describes how a vocabulary file contradicts the model of tokenizer.json.

    The files are vocab.json, vocab.txt, merges.txt, and those of SentencePiece.
    """
    token_ids, lists = model.get("vocab"), {"vocab.json": hub.read_json(folder / "vocab.json")}
    if (folder / "vocab.txt").is_file():
        lines = _lines(folder / "vocab.txt")
        lists["vocab.txt"] = {line: i for i, line in enumerate(lines) if line}
    for name, vocabulary in lists.items():
        if not (vocabulary and isinstance(token_ids, dict)):
            continue
        for token, index in token_ids.items():
            if vocabulary.get(token, index) != index:
                return (
                    f"{name} gives {token!r} the id {vocabulary[token]}, tokenizer.json gives"
                    f" it {index}; tokenizer.json is used"
                )
    for path in filter(Path.is_file, sorted(folder.glob("*.model"))):
        if problem := _sentencepiece_contradiction(path, token_ids):
            return f"{problem}; tokenizer.json is used"
    file = folder / "merges.txt"
    if not file.is_file() or "merges" not in model:
        return ""
    expected = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    lines = _lines(file)
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


def _lines(path: Path) -> list[str]:
    """Reads lines for a comparison; bytes that are no text differ from every token."""
    text = path.read_bytes().decode("utf-8", errors="replace")
    return [line.removesuffix("\r") for line in text.split("\n")]


def _sentencepiece_contradiction(path: Path, vocabulary: Any) -> str:
    """Describes how a SentencePiece model differs from the vocabulary of tokenizer.json.

    Ids may differ, as in conversions of fairseq's models. The order of pieces decides between
    merges, and scores between the pieces of a Unigram model.

    Args:
      path: the model; a file of another format is skipped.
      vocabulary: ids by token, or the tokens and scores of a Unigram model.
    """
    module: Any = import_protobuf()
    try:
        model = module.ModelProto.FromString(path.read_bytes())
    except DecodeError:
        return ""
    is_unigram = isinstance(vocabulary, list)
    entries = (
        {token: (i, score) for i, (token, score) in enumerate(vocabulary)}
        if is_unigram
        else {token: (i, 0.0) for token, i in vocabulary.items()}
    )
    before, last = "", -1
    for entry in model.pieces:
        piece = entry.piece
        if entry.type != entry.NORMAL:
            continue
        if piece not in entries:
            return f"{path.name} has the piece {piece!r}, which tokenizer.json lacks"
        index, score = entries[piece]
        if is_unigram and abs(entry.score - score) > 1e-3:
            return (
                f"{path.name} gives {piece!r} the score {entry.score:g}, tokenizer.json {score:g}"
            )
        if index < last:
            return f"{path.name} has {piece!r} after {before!r}, tokenizer.json before it"
        before, last = piece, index
    return ""
