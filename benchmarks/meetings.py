"""Meetings: where a document's tokens of two tokenizers end at the same byte, so that both have read the same text.

A tokenizer may put a space before a text, change its bytes (a normaliser) or lose some (an unknown token). So the bytes that the tokens
of both sides stand for are compared, not counted: a document's tokens meet up to the first byte in which its two spellings differ.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from tokalign_jax.text.tokenizing import TokenShards

NONE = -1
"""Instead of a source token, where none ends with the target token."""
BLOCK = 1 << 18
"""Target tokens that are looked at together, and at least a document."""

_SPACE, _END = 0x20, 0xFF
"""`_END` is what end-of-text is spelled as: no UTF-8 text has this byte."""


class Spelled(NamedTuple):
    """The bytes of a vocabulary's tokens, one behind the other."""

    content: UInt8[np.ndarray, "n"]
    starts: Int[np.ndarray, "V"]
    lengths: Int[np.ndarray, "V"]

    @classmethod
    def of(cls, contents: Sequence[bytes | None], end_of_text: int) -> "Spelled":
        """Of `canonical.token_bytes`; tokens that stand for no text have no bytes, end-of-text has one that no text has."""
        parts = [content or b"" for content in contents]
        parts[end_of_text] = bytes([_END])
        lengths = np.array([len(part) for part in parts], np.int64)
        return cls(np.frombuffer(b"".join(parts), np.uint8), np.cumsum(lengths) - lengths, lengths)

    def text(
        self, tokens: Int[np.ndarray, "n"]
    ) -> tuple[UInt8[np.ndarray, "m"], Int[np.ndarray, "n"]]:
        """The bytes that the tokens join up to, and where each token ends among them."""
        lengths = self.lengths[tokens]
        ends = np.cumsum(lengths)
        return self.content[_ranges(self.starts[tokens], lengths)], ends


def find(
    source: TokenShards,
    target: TokenShards,
    source_bytes: Sequence[bytes | None],
    target_bytes: Sequence[bytes | None],
    out: Int[np.ndarray, "tokens"] | None = None,
) -> Int[np.ndarray, "tokens"]:
    """For each target token the source token that ends at the same byte of the same document; `NONE` where there is none.

    Args:
      source, target: shards of the same documents in the same order.
      source_bytes, target_bytes: of each id, as `canonical.token_bytes` has them.
      out: where to write, one place a target token (a memory-mapped file, for a corpus larger than memory); None: a new int64 array.

    Returns:
      `out`: positions in `source.tokens`. Time and memory beside it grow with the corpus and with a block of it.
    """
    sides = (source, target)
    spelled = [
        Spelled.of(of, side.index["end_of_text"])
        for of, side in zip((source_bytes, target_bytes), sides)
    ]
    out = np.empty(len(target), np.int64) if out is None else out
    first, documents = 0, len(target.documents)
    starts = [np.concatenate([[0], side.documents]) for side in sides]
    while first < documents:
        last = max(
            first + 1, int(np.searchsorted(target.documents, starts[1][first] + BLOCK, "right"))
        )
        texts = [
            _Text.of(side, how, of[first : last + 1])
            for side, how, of in zip(sides, spelled, starts)
        ]
        found = _met(texts[0], texts[1])
        begin, end = starts[1][first], starts[1][last]
        out[begin:end] = np.where(found == NONE, NONE, found + starts[0][first])
        first = last
    return out


class _Text(NamedTuple):
    """Some documents as one side has them: their bytes, where each of their tokens ends, and where each document is among both."""

    content: UInt8[np.ndarray, "m"]
    ends: Int[np.ndarray, "n"]
    has_bytes: np.ndarray
    """bool [n]"""
    tokens: Int[np.ndarray, "d"]
    """Tokens of each document."""
    starts: Int[np.ndarray, "d"]
    """The byte with which each begins."""
    stops: Int[np.ndarray, "d"]

    @classmethod
    def of(cls, shards: TokenShards, spelled: Spelled, bounds: Int[np.ndarray, "d+1"]) -> "_Text":
        ids = np.asarray(shards.tokens[bounds[0] : bounds[-1]]).astype(np.int64)
        content, ends = spelled.text(ids)
        stops = ends[bounds[1:] - bounds[0] - 1]
        return cls(
            content,
            ends,
            spelled.lengths[ids] > 0,
            np.diff(bounds),
            np.concatenate([[0], stops[:-1]]),
            stops,
        )


def _met(source: _Text, target: _Text) -> Int[np.ndarray, "n"]:
    """For each target token the number of the source token that ends with it, or `NONE`."""
    begins, agreed = _agreed(source, target)
    base = np.cumsum(agreed + 1) - (
        agreed + 1
    )  # each document has its own places: one a byte, and one for its beginning
    at = np.full(base[-1] + agreed[-1] + 1, NONE, np.int64)
    places = []
    for side, begin in zip((source, target), begins):
        document = np.repeat(np.arange(len(begin)), side.tokens)
        read = side.ends - begin[document]
        real = side.has_bytes & (read > 0) & (read <= agreed[document])
        places.append((real, base[document] + read))
    real, place = places[0]
    at[place[real]] = np.flatnonzero(real)
    real, place = places[1]
    return np.where(real, at[np.where(real, place, 0)], NONE)


def _agreed(source: _Text, target: _Text) -> tuple[list[np.ndarray], Int[np.ndarray, "d"]]:
    """Where each document's common text begins among the bytes of either side, and the bytes before its first difference."""
    firsts = [_first_other(side.content, side.starts) for side in (source, target)]
    spaces = [first - side.starts for first, side in zip(firsts, (source, target))]
    common = np.minimum(*spaces)
    begins = [first - common for first in firsts]
    lengths = np.minimum(source.stops - begins[0], target.stops - begins[1])
    # A tokenizer may put one space there; without more of them it has read another text.
    lengths = np.where(np.abs(spaces[0] - spaces[1]) <= 1, lengths, 0)
    differs = (
        source.content[_ranges(begins[0], lengths)] != target.content[_ranges(begins[1], lengths)]
    )
    stops = np.cumsum(lengths)
    different = np.append(np.flatnonzero(differs), stops[-1])
    first = different[np.searchsorted(different[:-1], stops - lengths)]
    return begins, np.minimum(first - (stops - lengths), lengths)


def _first_other(
    content: UInt8[np.ndarray, "m"], starts: Int[np.ndarray, "d"]
) -> Int[np.ndarray, "d"]:
    """The first byte from each start on that is no space; every document ends with one."""
    others = np.flatnonzero(content != _SPACE)
    return others[np.searchsorted(others, starts)]


def _ranges(starts: Int[np.ndarray, "n"], lengths: Int[np.ndarray, "n"]) -> Int[np.ndarray, "m"]:
    """starts[0], starts[0] + 1, ... (lengths[0] of them), then those of starts[1], and so on."""
    stops = np.cumsum(lengths)
    return np.arange(stops[-1] if len(stops) else 0) + np.repeat(
        starts - (stops - lengths), lengths
    )
