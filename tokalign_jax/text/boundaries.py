"""Token boundaries: where each token ends in the original text, and where two tokenizers agree.

After a shared boundary two models have read the same text, so their states and likelihoods can be
compared there. Boundaries come from the offsets that the tokenizer itself records, so they hold
under normalisers (NFC, lower-casing, collapsed white space), prefixed spaces, unknown tokens and
characters that are spelled in several tokens.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Int

NONE = -1
"""End of a token after which no position of the text has been read: it ends within a character, or
before the first one.
"""


class Boundaries(NamedTuple):
    """Tokens of a text and their ends."""

    ids: Int[np.ndarray, "n"]
    """int64."""
    ends: Int[np.ndarray, "n"]
    """int64: the number of characters of the original text that have been read after each token.
    Strictly increasing except for `NONE`, which marks tokens that end within a character, or
    together with a later one.
    """


def token_boundaries(backend: tokenizers.Tokenizer, texts: Sequence[str]) -> list[Boundaries]:
    """Return the tokens of each text and their ends, without added special tokens.

    Args:
      backend: `canonical.plain_backend` of a tokenizer, without a post-processor that trims
        offsets.
      texts: the texts.
    """
    encodings = backend.encode_batch(list(texts), add_special_tokens=False)
    return [
        Boundaries(np.array(encoding.ids, np.int64), _ends(text, encoding.offsets))
        for text, encoding in zip(texts, encodings)
    ]


def shared_boundaries(
    source_ends: Int[np.ndarray, "n"], target_ends: Int[np.ndarray, "m"]
) -> tuple[Int[np.ndarray, "k"], Int[np.ndarray, "k"]]:
    """Return positions of source and target tokens that end at the same place of the same text.

    Args:
      source_ends: `Boundaries.ends` of the text by the source tokenizer.
      target_ends: the same by the target tokenizer.

    Returns:
      Positions of source tokens, and of the target tokens that end with them, both ascending.
    """
    source, target = (np.flatnonzero(ends != NONE) for ends in (source_ends, target_ends))
    _, first, second = np.intersect1d(
        source_ends[source], target_ends[target], assume_unique=True, return_indices=True
    )
    return source[first], target[second]


def _ends(text: str, offsets: Sequence[tuple[int, int]]) -> Int[np.ndarray, "n"]:
    if not offsets:
        return np.zeros(0, np.int64)
    flat = itertools.chain.from_iterable(offsets)
    starts, ends = np.fromiter(flat, np.int64, 2 * len(offsets)).reshape(-1, 2).T
    # Start of the next text: the smallest start of any later token, since pieces of one character
    # all have that character's offsets.
    following = np.minimum.accumulate(np.append(starts[1:], len(text))[::-1])[::-1]
    # A character that composition joined to the one before (a combining mark, a Hangul vowel) is in
    # no token's offsets.
    for i in np.flatnonzero(ends < following).tolist():
        while ends[i] < following[i] and not text[ends[i]].isspace():
            ends[i] += 1
    is_last = np.append(ends[1:] != ends[:-1], True)
    return np.where((ends <= following) & is_last & (ends > 0), ends, NONE)
