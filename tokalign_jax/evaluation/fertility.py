"""Fertility: tokens per word.

A word is a run of Unicode letters, marks and digits, with apostrophes inside it ("don't" is one);
punctuation and space are none. Chinese and Japanese write no spaces: there each ideograph and kana
counts as one (as in Unicode's annex 29). In Thai, Lao, Khmer and Burmese, whose words only a
dictionary finds, each letter with its marks does. For these languages fertility is tokens per
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
    """How many words each text has (int64)."""
    return np.array([sum(1 for _ in WORD.finditer(text)) for text in texts], np.int64)


def fertility(tokens: int, words: int) -> float | None:
    """Tokens per word; None where there are no words."""
    return tokens / words if words else None
