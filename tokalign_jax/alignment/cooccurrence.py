"""Exact, deterministic co-occurrence counts of tokens in a window, weighted by 1/distance.

As in GloVe's C programs, tokens below the minimum count, and the end of text, are dropped before
windows are taken, so that the tokens around them move together. Windows never cross documents.

All sums are of integers: a pair at distance d adds lcm(1..window) / d. The result therefore does
not depend on the order of additions, nor on chunks, threads, processes or devices.

A corpus of T tokens has `window` T pairs, each added to its sum:

- On a CPU, an addition to a cached cell is far cheaper than a pair's share of a sort. As in GloVe's
  C program, pairs of frequent tokens have a dense table (all cells that expect more than `EXPECTED`
  pairs, as memory allows), and only the others are sorted.
- On an accelerator, integers are sorted at nearly the speed of memory. Pairs are generated, sorted
  and summed there in chunks; the results are gathered in a buffer that is sorted and summed when it
  is full.

Both produce runs: sorted pair keys (row << 32 | col) and their sums, on disk past the memory
budget, so that memory does not depend on the length of the corpus. benchmarks/cooccurrence.py
measures the speed.
"""

import functools
import itertools
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from tokalign_jax.alignment.runs import Runs, Sums, concatenated, forget, in_order, merged, summed
from tokalign_jax.errors import UserError
from tokalign_jax.parallel import sharding
from tokalign_jax.text.tokenizing import TokenShards
from tokalign_jax.utils.progress import Log, Progress

HOST_CHUNK = 1 << 15
"""Tokens in a CPU thread's chunk: its arrays of one distance fit in the cache."""
DEVICE_CHUNK = 1 << 22
"""Tokens whose pairs an accelerator sorts at once."""
HOST_THREADS = 4
"""CPU threads, at most: NumPy holds the GIL while it adds to a table. Use processes (`count_part`)
for more.
"""
EXPECTED = 1.0
"""Pairs that a cell of the dense table expects by chance, at least."""
BLOCK = 1 << 15
"""Pairs or cells that a CPU thread turns into a run at once."""
READERS = 4
"""Threads that prepare chunks for an accelerator."""
FETCHED = 1 << 22
"""Entries copied from a device at once."""
DEVICE_ENTRY_BYTES = 128
"""Device memory per entry (16 bytes) of the buffer while it is sorted and summed."""

_EMPTY = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Cooccurrence:
    """A symmetric matrix X over the n tokens that are frequent enough.

    Stored are the entries of its upper triangle. A large matrix is memory-mapped from unnamed
    temporary files, which are freed with the arrays.
    """

    vocabulary: Int[np.ndarray, "n"]
    """int32: token ids sorted by frequency (ties by id), which rows and columns are indices into.
    """
    rows: Int[np.ndarray, "E"]
    """int32, sorted."""
    cols: Int[np.ndarray, "E"]
    """int32, rows <= cols, sorted within a row."""
    counts: Float[np.ndarray, "E"]
    """float64: X[row, col] = X[col, row] > 0. Each pair adds 1/d to both, so twice to the
    diagonal."""

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class Resources:
    """Resources for counting; they do not change the result."""

    memory: int = 4 << 30
    """Bytes of host memory, without the system's file cache."""
    device_memory: int = 40 << 30
    """Bytes of an accelerator's memory; at most two thirds of it are used."""
    scratch: Path | None = None
    """Folder for data beyond `memory`; None: the system's temporary folder."""
    workers: int | None = None
    """Threads on a CPU, or accelerators; None: all, and at most `HOST_THREADS` threads."""
    device: bool | None = None
    """Sort on JAX's devices; None: if they are not CPUs."""
    chunk: int | None = None
    """Tokens at once; None: `HOST_CHUNK` or `DEVICE_CHUNK`."""


@dataclass(frozen=True)
class Part:
    """Exact sums over a part of the corpus, for `merge`."""

    vocabulary: Int[np.ndarray, "n"]
    window: int
    runs: tuple[Sums, ...]

    def save(self, folder: Path) -> None:
        """Write the part to `folder`, `part.json` last."""
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "vocabulary.npy", self.vocabulary)
        entries = 0
        with (folder / "keys.bin").open("wb") as keys, (folder / "sums.bin").open("wb") as sums:
            for block in merged(self.runs):
                keys.write(block[0].data)
                sums.write(block[1].data)
                entries += len(block[0])
        (folder / "part.json").write_text(
            json.dumps({"window": self.window, "entries": entries}), encoding="utf-8"
        )

    @classmethod
    def open(cls, folder: Path) -> "Part":
        """Open a part written by `save`, memory-mapped.

        Raises:
          UserError: the folder contains no complete part.
        """
        try:
            index = json.loads((folder / "part.json").read_text(encoding="utf-8"))
            vocabulary = np.load(folder / "vocabulary.npy")
            files = [folder / "keys.bin", folder / "sums.bin"]
            keys, sums = (
                np.memmap(f, np.int64, "r") if index["entries"] else np.zeros(0, np.int64)
                for f in files
            )
            if not len(keys) == len(sums) == index["entries"]:
                raise ValueError("files of different lengths")
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"'{folder}' contains no complete part of a co-occurrence count ({error}): count "
                "it again"
            ) from error
        return cls(vocabulary, index["window"], ((keys, sums),))


def count(
    shards: TokenShards,
    window: int,
    min_count: int,
    log: Log = print,
    what: str = "co-occurrence",
    resources: Resources = Resources(),
) -> Cooccurrence:
    """Count co-occurrences of each token with the `window` tokens to either side.

    Args:
      shards: the tokens.
      window: tokens to either side.
      min_count: occurrences that a token needs to take part.
      log: receives progress.
      what: name of the work in the log.
      resources: memory and workers.

    Raises:
      UserError: the sums do not fit into 64 bits, or the scratch folder is full.
    """
    return merge(
        [count_part(shards, window, min_count, log, what, resources)], log, what, resources
    )


def count_part(
    shards: TokenShards,
    window: int,
    min_count: int,
    log: Log = print,
    what: str = "co-occurrence",
    resources: Resources = Resources(),
    part: tuple[int, int] = (0, 1),
) -> Part:
    """Count the co-occurrences of one of several equal parts of the tokens.

    A pair belongs to the part of its left token, so that parts can be cut anywhere. Hosts with
    their own files each count all of these, with `shards.counts` summed over all hosts, since it
    defines the vocabulary.

    Args:
      shards: the tokens.
      window: tokens to either side.
      min_count: occurrences that a token needs to take part.
      log: receives progress.
      what: name of the work in the log.
      resources: memory and workers.
      part: index of the part, and number of parts.
    """
    vocabulary, rank = _vocabulary(shards, min_count)
    frequency = shards.counts[vocabulary]
    _check_sums_fit(int(frequency.max(initial=0)), window)
    on_device = jax.default_backend() != "cpu" if resources.device is None else resources.device
    everyone = jax.local_devices() if on_device else range(min(os.cpu_count() or 1, HOST_THREADS))
    workers = list(everyone)[: resources.workers]
    index, number = part
    start, stop = len(shards) * index // number, len(shards) * (index + 1) // number
    edges = [start + (stop - start) * w // len(workers) for w in range(len(workers) + 1)]
    progress = Progress(log, what, stop - start, "tokens")
    lock = threading.Lock()

    def count_share(w: int) -> list[Sums]:
        def done(tokens: int) -> None:
            with lock:
                progress.update(tokens)
            forget(shards.tokens)

        share = _Share(
            shards, rank, frequency, window, edges[w], edges[w + 1], len(workers), resources, done
        )
        return _count_on_device(share, workers[w]) if on_device else _count_on_host(share)

    with ThreadPoolExecutor(len(workers)) as pool:
        runs = [run for share in pool.map(count_share, range(len(workers))) for run in share]
    progress.done(
        f"{sum(len(keys) for keys, _ in runs):,} partial sums of {len(vocabulary):,} tokens"
    )
    return Part(vocabulary, window, tuple(runs))


def merge(
    parts: Sequence[Part],
    log: Log = print,
    what: str = "co-occurrence",
    resources: Resources = Resources(),
) -> Cooccurrence:
    """Sum the parts exactly.

    Args:
      parts: parts of one count.
      log: receives progress.
      what: name of the work in the log.
      resources: memory; past a quarter of it the matrix is on disk.

    Raises:
      UserError: the parts differ in vocabulary or window.
    """
    first = parts[0]
    for part in parts:
        if part.window != first.window or not np.array_equal(part.vocabulary, first.vocabulary):
            raise UserError(
                "parts of different co-occurrence counts: windows "
                f"{first.window} and {part.window}, {len(first.vocabulary):,} and "
                f"{len(part.vocabulary):,} tokens: count all parts with the same settings and "
                "with the token counts of the whole corpus"
            )
    runs = [run for part in parts for run in part.runs]
    entries = sum(len(keys) for keys, _ in runs)
    progress = Progress(log, f"{what}, merged", entries, "partial sums")
    unit = math.lcm(*range(1, first.window + 1))

    def columns() -> Iterator[tuple[np.ndarray, ...]]:
        for keys, sums in merged(runs, progress.update):
            rows, cols, counts = (keys >> 32).astype(np.int32), keys.astype(np.int32), sums / unit
            counts[rows == cols] *= 2
            yield rows, cols, counts

    rows, cols, counts = concatenated(
        columns(),
        (np.int32, np.int32, np.float64),
        entries,
        resources.memory // 4,
        resources.scratch,
    )
    progress.done(f"{len(rows):,} pairs of {len(first.vocabulary):,} tokens")
    return Cooccurrence(first.vocabulary, rows, cols, counts)


def _vocabulary(shards: TokenShards, min_count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of the vocabulary by frequency, and each id's rank in it, int32.

    The rank of dropped tokens is -1.
    """
    frequency = shards.counts.copy()
    frequency[shards.index["end_of_text"]] = 0
    order = np.argsort(-frequency, kind="stable")
    vocabulary = order[frequency[order] >= max(min_count, 1)].astype(np.int32)
    rank = np.full(len(frequency), -1, np.int32)
    rank[vocabulary] = np.arange(len(vocabulary), dtype=np.int32)
    return vocabulary, rank


def _check_sums_fit(largest_count: int, window: int) -> None:
    """Check the largest possible sum: that of the most frequent token with its whole window."""
    unit = math.lcm(*range(1, window + 1))
    if 2 * largest_count * sum(unit // d for d in range(1, window + 1)) >= _EMPTY:
        raise UserError(
            f"a window of {window} is too wide for exact counts of a token seen "
            f"{largest_count:,} times: narrow it"
        )


class _Share(NamedTuple):
    """The share of one worker: pairs whose left token is in [start, stop)."""

    shards: TokenShards
    rank: np.ndarray
    frequency: np.ndarray
    window: int
    start: int
    stop: int
    workers: int
    resources: Resources
    done: Callable[[int], None]

    def chunks(self, chunk: int) -> list[tuple[int, int]]:
        return [
            (start, min(start + chunk, self.stop)) for start in range(self.start, self.stop, chunk)
        ]

    def runs(self) -> Runs:
        return Runs(self.resources.memory // self.workers // 2, self.resources.scratch)

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens of the vocabulary in order, and the neighbours of each to its right.

        Returns:
          int32 ranks [m + k], where the m are those in [start, stop) and the k (at most `window`)
            follow
          them in the same document; uint8 [m], how many of the next tokens are in a token's window.
        """
        tokens, documents, window = self.shards.tokens, self.shards.documents, self.window
        end = (
            min(int(documents[np.searchsorted(documents, stop)]), len(tokens))
            if stop < len(tokens)
            else stop
        )
        reach, span = stop, 2 * window
        while reach < end and np.count_nonzero(self.rank[tokens[stop:reach]] >= 0) < window:
            reach, span = min(stop + span, end), 2 * span
        ranks = self.rank[tokens[start:reach]]
        places = np.flatnonzero(ranks >= 0)
        inside = slice(*np.searchsorted(documents, [start, reach], side="right"))
        last = np.searchsorted(places, np.append(documents[inside], reach) - start)
        ahead = np.repeat(last, np.diff(last, prepend=0)) - np.arange(1, len(places) + 1)
        whole = int(np.searchsorted(places, stop - start))
        return ranks[places[: whole + window]], np.minimum(ahead[:whole], window).astype(np.uint8)


# --- On a CPU -----------------------------------------------------------------------------------


class _Table(NamedTuple):
    """Sums of the pairs that are expected often.

    Cells are (row, col) with row <= col < ends[row], row by row.
    """

    sums: Int[np.ndarray, "cells+1"]
    """The last cell collects all other pairs: adding to it costs less than selecting pairs."""
    bases: Int[np.ndarray, "n"]
    """The cell of (row, col) is bases[row] + col; non-decreasing."""
    ends: Int[np.ndarray, "n"]
    """Non-increasing."""

    @classmethod
    def empty(cls, frequency: np.ndarray, window: int, cells: int) -> "_Table":
        """Make a table of at most `cells` cells.

        Two tokens seen f and g times among T are expected in 2 window f g / T pairs.
        """
        n = len(frequency)
        place, rising = np.arange(n), frequency[::-1].astype(np.float64)
        least = EXPECTED * frequency.sum() / (2 * window)
        while True:
            ends = n - np.searchsorted(rising, least / frequency)
            widths = np.maximum(ends - place, 0)
            if widths.sum() <= cells:
                break
            least *= 1.25
        stops = np.cumsum(widths)
        bases = np.where(widths > 0, stops - widths - place, stops[-1] if n else 0)
        return cls(np.zeros(int(widths.sum()) + 1, np.int64), bases, ends)

    def entries(self) -> Iterator[Sums]:
        """Yield the cells that are not zero, as blocks of one run."""
        rows = np.arange(np.count_nonzero(self.ends > np.arange(len(self.ends))))
        starts = self.bases[rows] + rows
        cells_only = self.sums[:-1]
        for start in range(0, len(cells_only), BLOCK):
            cells = start + np.flatnonzero(cells_only[start : start + BLOCK])
            row = np.searchsorted(starts, cells, side="right") - 1
            yield row << 32 | (cells - self.bases[row]), self.sums[cells]


def _count_on_host(share: _Share) -> list[Sums]:
    """Count frequent pairs in a table and the others by sorting.

    The sort keys pack (row, col, distance) into one int64, so that no values are permuted.
    """
    chunk, pairs = share.resources.chunk or HOST_CHUNK, (share.stop - share.start) * share.window
    # An eighth of the memory each for the table and for sorting, in elements of 8 bytes.
    memory = share.resources.memory // share.workers // 8
    table = _Table.empty(share.frequency, share.window, memory // 8)
    packed, used = np.empty(min(memory // 8, pairs) + chunk, np.int64), 0
    runs = share.runs()
    for start, stop in share.chunks(chunk):
        ranks, ahead = share.read(start, stop)
        for rest in _add(table, ranks.astype(np.int64), ahead, share.window):
            if used + len(rest) > len(packed):
                runs.add(_packed_sums(packed[:used], share.window), used)
                used = 0
            packed[used : used + len(rest)] = rest
            used += len(rest)
        share.done(stop - start)
    runs.add(_packed_sums(packed[:used], share.window), used)
    del packed
    runs.add(table.entries(), int(np.count_nonzero(table.sums)))
    return runs.all()


def _add(table: _Table, ranks: np.ndarray, ahead: np.ndarray, window: int) -> Iterator[np.ndarray]:
    """Add the pairs that have a cell to `table`; yield the others, packed, by distance."""
    bases, ends = table.bases[ranks], table.ends[ranks]
    unit, bits = math.lcm(*range(1, window + 1)), window.bit_length()
    for distance in range(1, window + 1):
        size = min(len(ahead), len(ranks) - distance)
        if size <= 0:
            return
        left, right = slice(size), slice(distance, distance + size)
        col = np.maximum(ranks[left], ranks[right])
        inside = ahead[left] >= distance
        # Ends fall and bases rise with the row, which is the smaller rank, so that no look-up for
        # each pair is needed.
        dense = (col < np.maximum(ends[left], ends[right])) & inside
        cell = np.minimum(bases[left], bases[right])
        cell += col
        np.copyto(cell, len(table.sums) - 1, where=~dense)
        np.add.at(table.sums, cell, unit // distance)
        rest = np.flatnonzero(inside ^ dense)
        row = np.minimum(ranks[rest], ranks[rest + distance])
        yield (row << 32 | col[rest]) << bits | distance


def _packed_sums(packed: np.ndarray, window: int) -> Iterator[Sums]:
    """Sort `packed` in place and yield its sums in blocks."""
    packed.sort()
    unit, bits = math.lcm(*range(1, window + 1)), window.bit_length()
    weights = np.array([0, *(unit // d for d in range(1, window + 1))], np.int64)
    firsts = packed[::BLOCK] >> bits << bits  # Start of the pair that a block would split.
    cuts = [*np.searchsorted(packed, firsts), len(packed)]
    for start, stop in itertools.pairwise(cuts):
        block = packed[start:stop]
        yield summed(block >> bits, weights[block & ((1 << bits) - 1)])


# --- On an accelerator --------------------------------------------------------------------------


def _count_on_device(share: _Share, device: Any) -> list[Sums]:
    """Sort and sum chunks to the end of a buffer.

    A full buffer is compacted, and emitted as a run if it is still half full.
    """
    # A power of two of tokens at once, and a power of eight of these in the buffer, so that texts
    # of similar sizes share their compiled programs.
    tokens = max(share.stop - share.start, 1)
    chunk = share.resources.chunk or min(DEVICE_CHUNK, 1 << (tokens - 1).bit_length())
    new_entries = chunk * share.window
    memory = int(min(share.resources.device_memory, sharding.device_memory(device) * 2 / 3))
    chunks = 8 ** -(-((tokens - 1) // chunk).bit_length() // 3)
    capacity = new_entries + min(
        max(memory // DEVICE_ENTRY_BYTES, new_entries), chunks * new_entries
    )
    runs = share.runs()

    def read(start: int, stop: int):
        ranks, ahead = share.read(start, stop)
        padded = np.zeros(chunk + share.window, np.int32), np.zeros(chunk, np.uint8)
        padded[0][: len(ranks)], padded[1][: len(ahead)] = ranks, ahead
        return jax.device_put(padded, device)

    # 64-bit keys are enabled in this thread only. They are unsigned because XLA has a radix sort
    # for unsigned keys with 64-bit values, and none for signed ones.
    with jax.enable_x64(True), jax.default_device(device), ThreadPoolExecutor(READERS) as readers:
        # Committed to the device like the tokens; otherwise the first chunk would compile a program
        # of its own.
        (keys, sums), used = jax.device_put(_empty(capacity), device), 0
        for (start, stop), tokens in in_order(readers, READERS, read, share.chunks(chunk)):
            keys, sums, added = _append(keys, sums, used, *tokens, window=share.window)
            used += int(added)
            if used + new_entries > capacity:
                keys, sums, count = _compacted(keys, sums)
                used = int(count)
                if 2 * used > capacity - new_entries:
                    runs.add(_fetched(keys, sums, used), used)
                    del keys, sums
                    (keys, sums), used = jax.device_put(_empty(capacity), device), 0
            share.done(stop - start)
        keys, sums, count = _compacted(keys, sums)
        runs.add(_fetched(keys, sums, int(count)), int(count))
    return runs.all()


@functools.partial(jax.jit, static_argnums=0)
def _empty(capacity: int):
    """Make the keys and sums of an empty buffer."""
    return jnp.full(capacity, _EMPTY, jnp.uint64), jnp.zeros(capacity, jnp.int64)


@functools.partial(jax.jit, static_argnames="window", donate_argnums=(0, 1))
def _append(keys, sums, used, ranks, ahead, *, window: int):
    """Append the sums of a chunk's pairs after the `used` entries; also return their number."""
    chunk, bits, unit = len(ahead), window.bit_length(), math.lcm(*range(1, window + 1))
    ranks = ranks.astype(jnp.uint64)
    packed = []
    for distance in range(1, window + 1):
        left, right = ranks[:chunk], ranks[distance : distance + chunk]
        pair = jnp.minimum(left, right) << 32 | jnp.maximum(left, right)
        packed.append(jnp.where(ahead >= distance, pair << bits | distance, _EMPTY))
    sorted_ = jax.lax.sort(jnp.concatenate(packed), is_stable=False)
    weights = jnp.array(
        [0] + [unit // d for d in range(1, window + 1)] + [0] * (2**bits - window - 1)
    )
    pairs = jnp.where(sorted_ == _EMPTY, _EMPTY, sorted_ >> bits)
    pair_keys, totals, count = _run_sums(pairs, weights[sorted_ & (2**bits - 1)])
    keys = jax.lax.dynamic_update_slice(keys, pair_keys, (used,))
    return keys, jax.lax.dynamic_update_slice(sums, totals, (used,)), count


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _compacted(keys, sums):
    """Sort the buffer and merge equal keys; also return their number."""
    return _run_sums(*jax.lax.sort((keys, sums), num_keys=1, is_stable=False))


def _run_sums(keys, values):
    """Sum the values of equal keys of a sorted list.

    A running sum is read where runs end, so that no two threads add to the same place.

    Returns:
      Each key once, with its sum, followed by empty entries; and the number of keys.
    """
    last = jnp.append(keys[1:] != keys[:-1], True) & (keys != _EMPTY)
    number = jnp.cumsum(last, dtype=jnp.int32)
    place, count = jnp.where(last, number - 1, len(keys)), number[-1]
    running = (
        jnp.zeros_like(values).at[place].set(jnp.cumsum(values), mode="drop", unique_indices=True)
    )
    keys = jnp.full_like(keys, _EMPTY).at[place].set(keys, mode="drop", unique_indices=True)
    sums = running - jnp.concatenate([jnp.zeros_like(running[:1]), running[:-1]])
    return keys, jnp.where(jnp.arange(len(keys)) < count, sums, 0), count


def _fetched(keys: jax.Array, sums: jax.Array, used: int) -> Iterator[Sums]:
    """Yield the first `used` entries in blocks.

    Blocks have one size on the device, so that only one program is compiled.
    """
    size = min(FETCHED, len(keys))
    for start in range(0, used, size):
        from_ = min(start, len(keys) - size)
        here = slice(start - from_, min(size, used - from_))
        block_keys, block_sums = (np.asarray(x)[here] for x in _block(keys, sums, from_, size=size))
        yield block_keys.view(np.int64), block_sums


@functools.partial(jax.jit, static_argnames="size")
def _block(keys, sums, start, *, size: int):
    return tuple(jax.lax.dynamic_slice_in_dim(x, start, size) for x in (keys, sums))
