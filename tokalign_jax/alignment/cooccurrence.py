"""Co-occurrence counts of tokens in a window, weighted by 1/distance, exact and deterministic.

As the C programs of GloVe do, tokens below the minimum count are dropped before windows are taken, so that the tokens
around them move together; so is the end-of-text. Windows never cross a document.

All sums are of integers: a pair at distance d adds lcm(1..window) / d. So the result depends neither on the order of
adding nor on the size of the chunks.
"""

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from tokalign_jax.progress import Log, Progress
from tokalign_jax.text.tokenizing import TokenShards

CHUNK = 1 << 20
"""Tokens whose pairs are sorted at once (`window` pairs of 8 bytes each)."""

Sums = tuple[Int[np.ndarray, "E"], Int[np.ndarray, "E"]]
"""Sorted distinct pair keys, and the integer sum of each."""


@dataclass(frozen=True)
class Cooccurrence:
    """A symmetric matrix X over the n tokens that are frequent enough; entries on and above its diagonal."""

    vocabulary: Int[np.ndarray, "n"]
    """int32: token ids by falling frequency (ties by id); rows and columns number this list."""
    rows: Int[np.ndarray, "E"]
    """int32, sorted."""
    cols: Int[np.ndarray, "E"]
    """int32, rows <= cols, sorted within a row."""
    counts: Float[np.ndarray, "E"]
    """float64: X[row, col] = X[col, row] > 0. Each pair of places adds 1/d to both, so twice to the diagonal."""

    def __len__(self) -> int:
        return len(self.rows)


def count(
    shards: TokenShards, window: int, min_count: int, log: Log = print, what: str = "co-occurrence", chunk: int = CHUNK
) -> Cooccurrence:
    """The co-occurrences of `shards`, each token with the `window` tokens to either side.

    Work is sorting packed int64 keys, chunk by chunk on all cores; partial sums are merged when they reach equal levels,
    as in a binary counter, so that memory is that of the result and a few chunks.
    """
    vocabulary, rank = _vocabulary(shards, min_count)
    progress = Progress(log, what, len(shards), "tokens")
    levels: list[tuple[int, Sums]] = []  # (level, sums) with falling levels
    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        for chunks in _groups(_chunks(shards, rank, window, chunk), workers):
            for part, sums in zip(chunks, pool.map(lambda c: _chunk_sums(c, len(vocabulary), window), chunks)):
                level = 0
                while levels and levels[-1][0] == level:
                    sums, level = _merge(levels.pop()[1], sums), level + 1
                levels.append((level, sums))
                progress.update(part.read)
    keys, sums = np.zeros(0, np.int64), np.zeros(0, np.int64)
    while levels:
        keys, sums = _merge(levels.pop()[1], (keys, sums))
    rows, cols = np.divmod(keys, max(len(vocabulary), 1))
    counts = sums / math.lcm(*range(1, window + 1))
    counts[rows == cols] *= 2
    progress.done(f"{len(keys):,} pairs of {len(vocabulary):,} tokens")
    return Cooccurrence(vocabulary, rows.astype(np.int32), cols.astype(np.int32), counts)


def _vocabulary(shards: TokenShards, min_count: int) -> tuple[np.ndarray, np.ndarray]:
    """The kept ids by falling frequency, and int32 [V] with each id's place among them (-1: dropped)."""
    frequency = shards.counts.copy()
    frequency[shards.index["end_of_text"]] = 0
    order = np.argsort(-frequency, kind="stable")
    vocabulary = order[frequency[order] >= max(min_count, 1)].astype(np.int32)
    rank = np.full(len(frequency), -1, np.int32)
    rank[vocabulary] = np.arange(len(vocabulary), dtype=np.int32)
    return vocabulary, rank


class _Chunk(NamedTuple):
    """Kept tokens one behind the other; the first `whole` of them have their whole right context here."""

    read: int
    whole: int
    ranks: np.ndarray
    documents: np.ndarray


def _chunks(shards: TokenShards, rank: np.ndarray, window: int, chunk: int) -> Iterator[_Chunk]:
    """The kept tokens, chunk by chunk; the last `window` of one chunk stand again at the head of the next."""
    ranks, documents = np.zeros(0, np.int32), np.zeros(0, np.int32)
    for start in range(0, len(shards), chunk):
        part = rank[shards.tokens[start : start + chunk]]
        place = np.arange(start, start + len(part))
        document = np.searchsorted(shards.documents, place, side="right").astype(np.int32)
        ranks = np.concatenate([ranks, part[part >= 0]])
        documents = np.concatenate([documents, document[part >= 0]])
        last = start + chunk >= len(shards)
        whole = len(ranks) if last else max(len(ranks) - window, 0)
        yield _Chunk(len(part), whole, ranks, documents)
        ranks, documents = ranks[whole:], documents[whole:]


def _chunk_sums(chunk: _Chunk, size: int, window: int) -> Sums:
    """The pairs (i, i + d), 1 <= d <= window, whose left token is among the first `whole`; the key is row * size + col.

    The distance rides in the low bits of what is sorted, so that a plain sort of int64 does and nothing is permuted.
    """
    ranks, documents, whole = chunk.ranks.astype(np.int64), chunk.documents, chunk.whole
    bits = window.bit_length()
    packed = []
    for distance in range(1, window + 1):
        left, right = ranks[:whole], ranks[distance : whole + distance]
        left = left[: len(right)]
        inside = documents[: len(right)] == documents[distance : whole + distance]
        pair = np.minimum(left, right) * size + np.maximum(left, right)
        packed.append((pair << bits | distance)[inside])
    keys = np.concatenate(packed)
    keys.sort()
    unit = math.lcm(*range(1, window + 1))
    weights = np.array([0, *(unit // d for d in range(1, window + 1))], np.int64)[keys & ((1 << bits) - 1)]
    return _summed(keys >> bits, weights)


def _merge(left: Sums, right: Sums) -> Sums:
    """The sum of two sparse vectors."""
    keys = np.concatenate([left[0], right[0]])
    order = np.argsort(keys, kind="stable")  # two sorted runs, which this merges in linear time
    return _summed(keys[order], np.concatenate([left[1], right[1]])[order])


def _summed(keys: np.ndarray, values: np.ndarray) -> Sums:
    """Sorted keys, each once, and the sum of its values."""
    if not len(keys):
        return keys, values
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return keys[starts], np.add.reduceat(values, starts)


def _groups(items: Iterator, size: int) -> Iterator[list]:
    """`items`, `size` at a time."""
    group = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
