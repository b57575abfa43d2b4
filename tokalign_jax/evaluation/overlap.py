"""Share of held-out text that also occurs verbatim in the training text.

Passages of `WINDOW` characters that start at the beginning of a word are looked up; the result is
the share of held-out characters covered by passages that occur, so that a copied page counts by its
length and a common phrase not at all. (GPT-3, arXiv 2005.14165, appendix C, searches 13-grams of
words, which do not exist in scripts without spaces.) Training text is streamed; only 64-bit hashes
of held-out passages are in memory. Characters are UTF-16 code units here, of which rare characters
have two.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt16, UInt64

from tokalign_jax.text.corpus import Document
from tokalign_jax.utils.progress import Log, Progress

WINDOW = 64
"""Number of characters per passage, a multiple of the four that make 64 bits."""
WARN_ABOVE = 0.1
"""Share of a language's held-out characters above which a warning is given."""

_SEPARATOR = 0xFFFF
"""Separates documents. It is not a character, so passages across documents match none within."""
_WITHOUT_SPACES = 0x0E00
"""First code point (Thai) of scripts without spaces, where a passage begins at every character."""
_BUCKET_BITS = 24
"""Number of hash bits that index a table of 2^24 bytes, which rules out most other passages."""

_HASH_BLOCK = 1 << 13
"""Number of passages hashed together, to stay in cache."""


def overlap(
    texts: Mapping[str, Sequence[str]],
    training: Iterable[Sequence[Document]],
    log: Log = lambda line: None,
    total: float = 0,
) -> dict[str, Any]:
    """Returns the share of the characters of `texts` that occur in any training document.

    Args:
      texts: held-out documents by language.
      training: batches of documents.
      log: writes progress lines.
      total: bytes of the training text for the progress lines, if known.

    Returns:
      For JSON: `window`, `warn_above`, and `languages`, each with `characters`, `seen` and `share`.
    """
    contents = {language: _join(documents) for language, documents in texts.items()}
    starts = {language: passages(content) for language, content in contents.items()}
    keys = {language: hashes(contents[language], starts[language]) for language in texts}
    all_keys = np.unique(np.concatenate([np.zeros(0, np.uint64), *keys.values()]))
    seen = np.zeros(len(all_keys), bool)
    is_candidate = np.zeros(1 << _BUCKET_BITS, bool)
    is_candidate[_bucket(all_keys)] = True
    progress = Progress(log, "overlap", total, "bytes")
    for documents in training:
        content = _join([document.text for document in documents])
        training_keys = hashes(content, passages(content))
        training_keys = training_keys[is_candidate[_bucket(training_keys)]]
        index = np.minimum(np.searchsorted(all_keys, training_keys), len(all_keys) - 1)
        seen[index[all_keys[index] == training_keys]] = True
        progress.update(sum(document.bytes for document in documents))
    progress.done()
    languages = {}
    for language, content in contents.items():
        is_seen = seen[np.searchsorted(all_keys, keys[language])]
        size = int(np.count_nonzero(content != _SEPARATOR))
        covered = _covered(len(content), starts[language][is_seen])
        languages[language] = {"characters": size, "seen": covered, "share": covered / max(size, 1)}
    return {"window": WINDOW, "warn_above": WARN_ABOVE, "languages": languages}


def warning_lines(result: Mapping[str, Any]) -> list[str]:
    """Returns a warning for each language whose share is above `warn_above`."""
    return [
        f"warning: {figures['share']:.1%} of the held-out text of '{language}' occurs in the"
        f" training text, in passages of {result['window']} characters or more: its bits per byte"
        " may be too low; remove the copied text"
        for language, figures in result["languages"].items()
        if figures["share"] > result["warn_above"]
    ]


def passages(content: UInt16[np.ndarray, "N"]) -> Int[np.ndarray, "P"]:
    """Returns the start of each passage.

    That is a character after white space or a beginning, or any of a script without spaces.
    """
    last = len(content) - WINDOW
    if last < 0:
        return np.zeros(0, np.int64)
    current, previous = (
        content[: last + 1],
        np.concatenate([np.array([0], np.uint16), content[:last]]),
    )
    is_second_half = (current & 0xFC00) == 0xDC00
    is_start = (
        (previous <= 0x20) | (previous == _SEPARATOR) | (current >= _WITHOUT_SPACES)
    ) & ~is_second_half
    for end in np.flatnonzero(content == _SEPARATOR):  # Passages end with their document.
        is_start[max(0, end - WINDOW + 1) : end + 1] = False
    return np.flatnonzero(is_start)


def hashes(
    content: UInt16[np.ndarray, "N"], starts: Int[np.ndarray, "P"]
) -> UInt64[np.ndarray, "P"]:
    """Returns a 64-bit hash of each passage."""
    if not len(starts):
        return np.zeros(0, np.uint64)
    # Four characters as one integer, at each character.
    fours = np.ndarray((len(content) - 3,), np.dtype("<u8"), content.tobytes(), strides=(2,))
    result = np.zeros(len(starts), np.uint64)
    for first in range(0, len(starts), _HASH_BLOCK):
        positions, block = starts[first : first + _HASH_BLOCK], result[first : first + _HASH_BLOCK]
        for offset in range(0, WINDOW, 4):
            block ^= fours[positions + offset]
            block *= np.uint64(0x9E3779B97F4A7C15)
            block ^= block >> np.uint64(32)
    return result


def _join(documents: Iterable[str]) -> UInt16[np.ndarray, "N"]:
    return np.frombuffer(chr(_SEPARATOR).join(documents).encode("utf-16-le"), "<u2")


def _bucket(keys: UInt64[np.ndarray, "P"]) -> UInt64[np.ndarray, "P"]:
    return keys >> np.uint64(64 - _BUCKET_BITS)


def _covered(size: int, starts: Int[np.ndarray, "P"]) -> int:
    """Returns the number of characters in one or more passages."""
    steps = np.zeros(size + 1, np.int64)
    steps[starts] += 1  # Starts are distinct, and so are ends.
    steps[starts + WINDOW] -= 1
    return int(np.count_nonzero(np.cumsum(steps)))
