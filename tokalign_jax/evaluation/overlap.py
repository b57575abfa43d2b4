"""How much of held-out text also stands in the training text, letter by letter.

Passages of `WINDOW` bytes that begin where a word begins are looked for; the share is that of the held-out bytes which such passages
cover, so that a copied page counts by its length and a common phrase not at all. (GPT-3, arXiv 2005.14165, appendix C, looks for 13
words in a row, which are about as long, but which there are none of in a script without spaces.) Training text is streamed, and only
64-bit hashes of the held-out passages are in memory.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8, UInt64

from tokalign_jax.progress import Log, Progress
from tokalign_jax.text.corpus import Document

WINDOW = 48
"""Bytes of a passage: a whole number of 8-byte words."""
WARN_ABOVE = 0.05
"""Share of a language's held-out bytes past which there is a warning."""

_BETWEEN = b"\xff"
"""Parts documents; in no UTF-8, so that a passage over two documents is equal to none in a document."""
_BUCKETS = 24
"""Bits of a hash that say in a table of 2^24 bytes whether it may be one of the wanted."""


def overlap(
    texts: Mapping[str, Sequence[str]],
    training: Iterable[Sequence[Document]],
    log: Log = lambda line: None,
    total: float = 0,
) -> dict[str, Any]:
    """The share of the bytes of `texts`, by language, that stand in the training documents of any language.

    Args:
      texts: held-out documents by language.
      training: batches of documents.
      total: bytes of the training text, where known, for the progress lines.

    Returns:
      For JSON: `window_bytes`, `warn_above`, and `languages`, each with `bytes`, `seen_bytes` and `share`.
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
        seen[np.searchsorted(every, found[np.isin(found, every)])] = True
        progress.update(len(content))
    progress.done()
    languages = {}
    for language, content in contents.items():
        is_seen = seen[np.searchsorted(every, wanted[language])]
        size = int(np.count_nonzero(content != _BETWEEN[0]))
        covered = _covered(len(content), starts[language][is_seen])
        languages[language] = {"bytes": size, "seen_bytes": covered, "share": covered / max(size, 1)}
    return {"window_bytes": WINDOW, "warn_above": WARN_ABOVE, "languages": languages}


def warning_lines(found: Mapping[str, Any]) -> list[str]:
    """A line for each language whose share is above `warn_above`."""
    return [
        f"warning: {of['share']:.1%} of the held-out text of '{language}' stands in the training text, in passages of "
        f"{found['window_bytes']} bytes or more: its bits per byte are too low; take out what was copied"
        for language, of in found["languages"].items()
        if of["share"] > found["warn_above"]
    ]


def passages(content: UInt8[np.ndarray, "N"]) -> Int[np.ndarray, "P"]:
    """Where passages begin: at a character that follows white space or the beginning, or is of three bytes or more (from U+0800 on, where
    the scripts are that write no spaces)."""
    last = len(content) - WINDOW
    if last < 0:
        return np.zeros(0, np.int64)
    here = content[: last + 1]
    before = np.concatenate([np.frombuffer(b" ", np.uint8), content[:last]])
    is_character = (here & 0xC0) != 0x80
    after_space = (before <= 0x20) | (before == _BETWEEN[0])
    return np.flatnonzero(is_character & (after_space | (here >= 0xE0)))


def hashes(content: UInt8[np.ndarray, "N"], starts: Int[np.ndarray, "P"]) -> UInt64[np.ndarray, "P"]:
    """64 bits of each passage."""
    if not len(starts):
        return np.zeros(0, np.uint64)
    words = np.ndarray((len(content) - 7,), np.dtype("<u8"), content.tobytes(), strides=(1,))  # one at each byte
    found = np.zeros(len(starts), np.uint64)
    for offset in range(0, WINDOW, 8):
        found = (found ^ words[starts + offset]) * np.uint64(0x9E3779B97F4A7C15)
        found ^= found >> np.uint64(32)
    return found


def _joined(documents: Iterable[str]) -> UInt8[np.ndarray, "N"]:
    return np.frombuffer(_BETWEEN.join(text.encode() for text in documents), np.uint8)


def _bucket(of: UInt64[np.ndarray, "P"]) -> UInt64[np.ndarray, "P"]:
    return of >> np.uint64(64 - _BUCKETS)


def _covered(size: int, starts: Int[np.ndarray, "P"]) -> int:
    """Bytes that lie in one or more of the passages."""
    steps = np.zeros(size + 1, np.int64)
    steps[starts] += 1  # starts are different, and so are ends
    steps[starts + WINDOW] -= 1
    return int(np.count_nonzero(np.cumsum(steps)))
