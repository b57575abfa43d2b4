"""Fertility: tokens per word.

A word is a run of Unicode letters, marks and digits, possibly with inner apostrophes ("don't" is
one); punctuation and space are not words. Chinese and Japanese have no spaces: each ideograph and
kana counts as a word (as in Unicode's annex 29). Thai, Lao, Khmer and Burmese need a dictionary to
find words: each letter with its marks counts as one. For these languages fertility is tokens per
character.
"""

from collections.abc import Sequence

import numpy as np
import regex
from jaxtyping import Int

_NO_SPACES = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_LETTER = rf"[[\p{{L}}\p{{N}}]--[{_NO_SPACES}]]"
WORD = regex.compile(
    rf"[[{_NO_SPACES}]&&[\p{{L}}\p{{N}}]]\p{{M}}*|{_LETTER}\p{{M}}*(?:['’]?{_LETTER}\p{{M}}*)*",
    flags=regex.VERSION1,
)


def words(texts: Sequence[str]) -> Int[np.ndarray, "N"]:
    """Returns the number of words in each text (int64)."""
    return np.array([sum(1 for _ in WORD.finditer(text)) for text in texts], np.int64)


def fertility(tokens: int, words: int) -> float | None:
    """Returns tokens per word; None if there are no words."""
    return tokens / words if words else None
