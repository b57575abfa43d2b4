"""Held-out passages, tokenised by both tokenizers, to show what a vocabulary does to text."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from tokalign_jax.evaluation.samples import passages
from tokalign_jax.text.canonical import plain_backend

PASSAGES, LENGTH = 8, 220
"""Number of passages, each in another language, and their length in characters."""


def of_passages(
    tokenizers: Mapping[str, PreTrainedTokenizerBase], texts: Mapping[str, Sequence[str]]
) -> list[dict[str, Any]]:
    """Tokenise a passage of each of the first languages.

    Args:
      tokenizers: by side.
      texts: documents by language.

    Returns:
      For each passage its `language`, and its pieces by side.
    """
    languages = list(texts)[:PASSAGES]
    chosen = [passages({language: texts[language]}, 1, LENGTH)[0] for language in languages]
    by_side = {side: pieces(tokenizer, chosen) for side, tokenizer in tokenizers.items()}
    return [
        {"language": language} | {side: passage[i] for side, passage in by_side.items()}
        for i, language in enumerate(languages)
    ]


def pieces(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[tuple[str, int]]]:
    """Split texts into the pieces that tokens cover, each with its number of tokens.

    A piece has several tokens if they share a character. The pieces joined are the text; characters
    that no token covers (a space that the tokenizer trims) belong to the next token's piece.
    """
    encodings = plain_backend(tokenizer).encode_batch(list(texts), add_special_tokens=False)
    return [
        _pieces(text, [stop for _, stop in encoding.offsets])
        for text, encoding in zip(texts, encodings)
    ]


def _pieces(text: str, stops: Sequence[int]) -> list[tuple[str, int]]:
    result, end = [], 0
    for stop in stops:
        if stop > end:
            result.append((text[end:stop], 1))
            end = stop
        elif result:
            result[-1] = (result[-1][0], result[-1][1] + 1)
    return [*result, (text[end:], 0)] if end < len(text) else result
