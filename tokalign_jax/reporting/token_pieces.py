"""Held-out passages as both tokenizers cut them, so that a person can see what a vocabulary does to
a text.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from tokalign_jax.evaluation.samples import passages
from tokalign_jax.text.canonical import plain_backend

PASSAGES, LENGTH = 8, 220
"""Passages, each of another language, and their characters."""


def of_passages(
    tokenizers: Mapping[str, PreTrainedTokenizerBase], texts: Mapping[str, Sequence[str]]
) -> list[dict[str, Any]]:
    """A passage of each of the first languages, as {"language", and by side its pieces}.

    Args:
      tokenizers: by side.
      texts: documents by language.
    """
    languages = list(texts)[:PASSAGES]
    shown = [passages({language: texts[language]}, 1, LENGTH)[0] for language in languages]
    cut = {side: pieces(tokenizer, shown) for side, tokenizer in tokenizers.items()}
    return [
        {"language": language} | {side: of[number] for side, of in cut.items()}
        for number, language in enumerate(languages)
    ]


def pieces(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[tuple[str, int]]]:
    """Each text in pieces, each with the tokens that it is cut into: more than one where they share
    a character.

    The pieces joined are the text. What no token covers (a space that the tokenizer trims off) goes
    with the token behind it.
    """
    encodings = plain_backend(tokenizer).encode_batch(list(texts), add_special_tokens=False)
    return [
        _pieces(text, [stop for _, stop in encoding.offsets])
        for text, encoding in zip(texts, encodings)
    ]


def _pieces(text: str, stops: Sequence[int]) -> list[tuple[str, int]]:
    found, end = [], 0
    for stop in stops:
        if stop > end:
            found.append((text[end:stop], 1))
            end = stop
        elif found:
            found[-1] = (found[-1][0], found[-1][1] + 1)
    return [*found, (text[end:], 0)] if end < len(text) else found
