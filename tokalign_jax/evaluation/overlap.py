"""How much of held-out text also stands in the training text, letter by letter.

Passages of `WINDOW` characters that begin where a word begins are looked for; the share is that of
the held-out characters which such passages cover, so that a copied page counts by its length and a
common phrase not at all. (GPT-3, arXiv 2005.14165, appendix C, looks for 13 words in a row, which
there are none of in a script without spaces.) Training text is streamed, and only 64-bit hashes of
the held-out passages are in memory. A character is one of UTF-16's units here, of which rare ones
have two.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt16, UInt64

from tokalign_jax.text.corpus import Document
from tokalign_jax.utils.progress import Log, Progress

WINDOW = 64
"""Characters of a passage: a multiple of the four that make 64 bits."""
WARN_ABOVE = 0.1
"""Share of a language's held-out characters past which there is a warning."""

_BETWEEN = 0xFFFF
"""Parts documents; no character, so that a passage over two documents is equal to none in a
document.
"""
_WITHOUT_SPACES = 0x0E00
"""From Thai on are the scripts that write no spaces: there a passage begins at each character."""
_BUCKETS = 24
"""Bits of a hash that say in a table of 2^24 bytes whether it may be one of the wanted."""

_IN_CACHE = 1 << 13
"""Passages that are hashed together."""


def overlap(
    texts: Mapping[str, Sequence[str]],
    training: Iterable[Sequence[Document]],
    log: Log = lambda line: None,
    total: float = 0,
) -> dict[str, Any]:
    """The share of the characters of `texts`, by language, that stand in the training documents of
    any language.

    Args:
      texts: held-out documents by language.
      training: batches of documents.
      total: bytes of the training text, where known, for the progress lines.

    Returns:
      For JSON: `window`, `warn_above`, and `languages`, each with `characters`, `seen` and `share`.
    """
    contents = {language: _joined(documents) for language, documents in texts.items()}
    starts = {language: passages(content) for language, content in contents.items()}
    wanted = {language: hashes(contents[language], starts[language]) for language in texts}
    every = np.unique(np.concatenate([np.zeros(0, np.uint64), *wanted.values()]))
    seen = np.zeros(len(every), bool)
    may_be = np.zeros(1 << _BUCKETS, bool)
    may_be[_bucket(every)] = True
    progress = Progress(log, "overlap", total, "bytes")
    for documents in training:
        content = _joined([document.text for document in documents])
        found = hashes(content, passages(content))
        found = found[may_be[_bucket(found)]]
        place = np.minimum(np.searchsorted(every, found), len(every) - 1)
        seen[place[every[place] == found]] = True
        progress.update(sum(document.bytes for document in documents))
    progress.done()
    languages = {}
    for language, content in contents.items():
        is_seen = seen[np.searchsorted(every, wanted[language])]
        size = int(np.count_nonzero(content != _BETWEEN))
        covered = _covered(len(content), starts[language][is_seen])
        languages[language] = {"characters": size, "seen": covered, "share": covered / max(size, 1)}
    return {"window": WINDOW, "warn_above": WARN_ABOVE, "languages": languages}


def warning_lines(found: Mapping[str, Any]) -> list[str]:
    """A line for each language whose share is above `warn_above`."""
    return [
        f"warning: {of['share']:.1%} of the held-out text of '{language}' stands in the training"
        f" text, in passages of {found['window']} characters or more: its bits per byte may be too"
        " low; take out what was copied"
        for language, of in found["languages"].items()
        if of["share"] > found["warn_above"]
    ]


def passages(content: UInt16[np.ndarray, "N"]) -> Int[np.ndarray, "P"]:
    """Where passages begin: at a character that follows white space or the beginning, or is of a
    script without spaces.
    """
    last = len(content) - WINDOW
    if last < 0:
        return np.zeros(0, np.int64)
    here, before = content[: last + 1], np.concatenate([np.array([0], np.uint16), content[:last]])
    is_second_half = (here & 0xFC00) == 0xDC00
    is_start = (
        (before <= 0x20) | (before == _BETWEEN) | (here >= _WITHOUT_SPACES)
    ) & ~is_second_half
    for between in np.flatnonzero(content == _BETWEEN):  # none goes on into another document
        is_start[max(0, between - WINDOW + 1) : between + 1] = False
    return np.flatnonzero(is_start)


def hashes(
    content: UInt16[np.ndarray, "N"], starts: Int[np.ndarray, "P"]
) -> UInt64[np.ndarray, "P"]:
    """64 bits of each passage."""
    if not len(starts):
        return np.zeros(0, np.uint64)
    fours = np.ndarray(
        (len(content) - 3,), np.dtype("<u8"), content.tobytes(), strides=(2,)
    )  # one at each character
    found = np.zeros(len(starts), np.uint64)
    for first in range(0, len(starts), _IN_CACHE):
        here, block = starts[first : first + _IN_CACHE], found[first : first + _IN_CACHE]
        for offset in range(0, WINDOW, 4):
            block ^= fours[here + offset]
            block *= np.uint64(0x9E3779B97F4A7C15)
            block ^= block >> np.uint64(32)
    return found


def _joined(documents: Iterable[str]) -> UInt16[np.ndarray, "N"]:
    return np.frombuffer(chr(_BETWEEN).join(documents).encode("utf-16-le"), "<u2")


def _bucket(of: UInt64[np.ndarray, "P"]) -> UInt64[np.ndarray, "P"]:
    return of >> np.uint64(64 - _BUCKETS)


def _covered(size: int, starts: Int[np.ndarray, "P"]) -> int:
    """Bytes that lie in one or more of the passages."""
    steps = np.zeros(size + 1, np.int64)
    steps[starts] += 1  # starts are different, and so are ends
    steps[starts + WINDOW] -= 1
    return int(np.count_nonzero(np.cumsum(steps)))
