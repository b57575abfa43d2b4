"""The same text in the tokens of two tokenizers, packed into rows for a student and its teacher.

A row has the target's tokens of documents, the source's tokens of the same documents, and for each
position of the target the position of the source at which both have read the same text
(`boundaries.py`). A document that does not fit goes on in the next row, as a document of its own;
one with special tokens, such as a chat, is in one row if it fits into any: the end of an answer
without the turns before it would teach to end turns anywhere.

Letters: B rows, T + 1 target tokens of a row, S source tokens of a row.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from tokalign_jax.text.boundaries import NONE, token_boundaries
from tokalign_jax.text.canonical import plain_backend

ROOM = 1.35
"""Source tokens that fit into a row, per target token; the teacher does not read those beyond."""
PASSAGE, SHORTEST_PASSAGE = 1500, 80
"""Characters per passage, at most and at least."""
SHORTEST = 16
"""Target tokens left in a row below which no document is started in it; the rest of a document that
is not longer is dropped."""


class Pair(NamedTuple):
    """A document in the tokens of both sides, each after that side's start-of-document token."""

    source: Int[np.ndarray, "n"]
    source_ends: Int[np.ndarray, "n"]
    """Characters read after each token; `NONE` if it ends within a character."""
    target: Int[np.ndarray, "m"]
    target_ends: Int[np.ndarray, "m"]
    has_special: bool = False
    """Whether the document has special tokens but for its start."""


class Rows(NamedTuple):
    """Packed documents, int32."""

    target: Int[np.ndarray, "B T+1"]
    """Padded with `NONE`."""
    source: Int[np.ndarray, "B S"]
    """Padded with 0."""
    positions: Int[np.ndarray, "B T"]
    """Position in `source` at which the same text has been read as at this position of `target`, or
    `NONE`.
    """


class Pairing(NamedTuple):
    """Two tokenizers, their start-of-document tokens, and the special tokens that they share."""

    source: PreTrainedTokenizerBase
    target: PreTrainedTokenizerBase
    starts: tuple[int, int]
    special: Mapping[int, int]
    """Target id by source id."""

    def pair(self, passages: Sequence[Iterable[tuple[str, int | None]]]) -> list[Pair]:
        """Tokenize passages of (text, the source's special token after it or None) for both sides.

        Special tokens without a counterpart in the target are dropped on both sides, and a
        start-of-document token that a passage begins with, as chat templates write it, stands once.
        """
        flat = [(i, *segment) for i, passage in enumerate(passages) for segment in passage]
        texts = [text for _, text, _ in flat]
        sides = [token_boundaries(plain_backend(t), texts) for t in (self.source, self.target)]
        collected = [[([start], [0]) for start in self.starts] for _ in passages]
        read = [0] * len(passages)
        for (number, text, special), *boundaries in zip(flat, *sides):
            for (ids, ends), side in zip(collected[number], boundaries):
                ids.extend(side.ids.tolist())
                ends.extend(np.where(side.ends == NONE, NONE, side.ends + read[number]).tolist())
            read[number] += len(text)
            if special is not None and special in self.special:
                if not read[number] and (special, self.special[special]) == self.starts:
                    continue
                read[number] += 1
                for (ids, ends), token in zip(collected[number], (special, self.special[special])):
                    ids.append(token)
                    ends.append(read[number])
        arrays = [[np.array(x) for side in passage for x in side] for passage in collected]
        return [
            Pair(*four, has_special=bool(np.isin(four[0][1:], [*self.special]).any()))
            for four in arrays
            if len(four[0]) > 1 and len(four[2]) > 1
        ]


def passages(text: str) -> list[str]:
    """Split text into passages of at most `PASSAGE` characters, after white space where possible.

    A remainder shorter than `SHORTEST_PASSAGE` is dropped.
    """
    parts = []
    while len(text) > PASSAGE:
        cut = max(text.rfind(" ", 1, PASSAGE), text.rfind("\n", 1, PASSAGE)) + 1 or PASSAGE
        parts.append(text[:cut])
        text = text[cut:]
    return parts + [text] * (len(text) >= SHORTEST_PASSAGE or not parts)


def source_length(length: int) -> int:
    """Return S of rows with T = `length`, a multiple of 64."""
    return -(-int(length * ROOM) // 64) * 64


def pack(pairs: Sequence[Pair], order: Iterable[int], length: int, width: int) -> Rows:
    """Pack the pairs in this order into rows of T = `length` and S = `width`."""
    rows, row = [], _Row()
    for number in order:
        rest: Pair | None = pairs[number]
        whole = rest.has_special and len(rest.target) <= length + 1
        while rest is not None:
            least = len(rest.target) if whole else SHORTEST + 1
            if row.target and len(row.target) + least > length + 1:
                rows.append(row.arrays(length, width))
                row = _Row()
            rest = row.add(rest, length + 1)
    if row.target:
        rows.append(row.arrays(length, width))
    return Rows(*map(np.stack, zip(*rows)))


class _Row:
    def __init__(self) -> None:
        self.target: list[int] = []
        self.source: list[int] = []
        self.positions: list[int] = []

    def add(self, pair: Pair, max_length: int) -> Pair | None:
        """Append as much of a document as fits into the row; return the rest."""
        room, begin = max_length - len(self.target), len(self.source)
        target, ends = pair.target[:room], pair.target_ends[:room]
        # Source tokens that end after the target's last one belong to the rest.
        last = ends.max()
        beyond = np.flatnonzero(pair.source_ends > last)
        stop = beyond[0] if len(beyond) else len(pair.source)
        position_of = {
            int(end): i for i, end in enumerate(pair.source_ends[:stop].tolist()) if end != NONE
        }
        positions = [position_of.get(end, NONE) for end in ends.tolist()]
        self.target += target.tolist()
        self.source += pair.source[:stop].tolist()
        self.positions += [begin + place if place != NONE else NONE for place in positions]
        at = max(i for i, place in enumerate(positions) if place != NONE)
        if len(pair.target) - room <= SHORTEST or at == 0:
            return None
        return _after(pair, positions[at], at)

    def arrays(self, length: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        target, source = np.full(length + 1, NONE, np.int32), np.zeros(width, np.int32)
        positions = np.full(length, NONE, np.int32)
        target[: len(self.target)] = self.target
        source[: min(width, len(self.source))] = self.source[:width]
        inside = np.array(self.positions[:length], np.int32)
        positions[: len(inside)] = np.where(inside < width, inside, NONE)
        return target, source, positions


def _after(pair: Pair, source: int, target: int) -> Pair:
    """Return what follows these tokens, which end at the same place, as a document."""
    end = pair.target_ends[target : target + 1]
    sides = (pair.source, pair.source_ends, source), (pair.target, pair.target_ends, target)
    arrays = []
    for ids, ends, last in sides:
        arrays += [np.concatenate([ids[:1], ids[last + 1 :]])]
        arrays += [np.concatenate([end, ends[last + 1 :]])]
    return Pair(*arrays)
