"""External sorting: sums by key that may not fit in memory, as sorted runs of unique keys.

Runs are kept in memory while they fit, then on disk, and are merged in blocks.
"""

import errno
import mmap
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from jaxtyping import Int

from tokalign_jax.errors import UserError

FAN_IN = 8
"""Runs of a level that are merged to one run of the next level."""
MERGE_BLOCK = 1 << 16
"""Entries that are merged at once."""
FORGET = 256
"""Blocks after which memory-mapped pages are released."""

Sums = tuple[Int[np.ndarray, "E"], Int[np.ndarray, "E"]]
"""int64 keys, sorted and unique, and the int64 sum of each."""


class Runs:
    """Sorted runs in memory, or on disk if they do not fit.

    As in a log-structured merge tree, `FAN_IN` runs of a level are merged to one of the next.
    """

    def __init__(self, memory: int, scratch: Path | None):
        self._memory, self._scratch = memory, scratch
        self._levels: list[list[Sums]] = []

    def add(self, blocks: Iterable[Sums], entries: int, level: int = 0) -> None:
        """Add the run that consists of these blocks, with at most `entries` entries."""
        if not entries:
            return
        free = self._memory - sum(
            keys.nbytes * 2 for keys, _ in self.all() if not isinstance(keys, np.memmap)
        )
        keys, sums = concatenated(blocks, (np.int64, np.int64), entries, free, self._scratch)
        if level == len(self._levels):
            self._levels.append([])
        self._levels[level].append((keys, sums))
        if len(self._levels[level]) == FAN_IN:
            full, self._levels[level] = self._levels[level], []
            self.add(merged(full), sum(len(keys) for keys, _ in full), level + 1)

    def all(self) -> list[Sums]:
        """Return the runs of all levels."""
        return [run for level in self._levels for run in level]


def merged(
    runs: Sequence[Sums], done: Callable[[int], None] = lambda entries: None
) -> Iterator[Sums]:
    """Merge runs and yield the result in blocks, each of one range of keys."""
    step = max(MERGE_BLOCK // max(len(runs), 1), 1)
    marks = np.sort(
        np.concatenate([np.zeros(0, np.int64), *(keys[step::step] for keys, _ in runs)])
    )
    bounds = marks[:: max(len(runs), 1)]
    cuts = [np.array([0, *np.searchsorted(keys, bounds), len(keys)]) for keys, _ in runs]

    def merge_block(block: int) -> Sums:
        slices = [slice(cut[block], cut[block + 1]) for cut in cuts]
        keys = np.concatenate([keys[here] for (keys, _), here in zip(runs, slices)])
        sums = np.concatenate([sums[here] for (_, sums), here in zip(runs, slices)])
        if len(runs) == 1:
            return keys, sums
        # Stable sorting of concatenated sorted runs is a merge.
        order = np.argsort(keys, kind="stable")
        return summed(keys[order], sums[order])

    if not runs:
        return
    threads = os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool:
        for (block,), sums in in_order(
            pool, threads, merge_block, [(block,) for block in range(len(bounds) + 1)]
        ):
            if block % FORGET == 0:
                forget(*(array for run in runs for array in run))
            done(sum(int(cut[block + 1] - cut[block]) for cut in cuts))
            yield sums


def summed(keys: np.ndarray, values: np.ndarray) -> Sums:
    """Return unique sorted keys and the sum of the values of each."""
    if not len(keys):
        return keys, values
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return keys[starts], np.add.reduceat(values, starts)


def concatenated(
    blocks: Iterable[tuple[np.ndarray, ...]],
    dtypes: Sequence[type],
    entries: int,
    memory: int,
    scratch: Path | None,
) -> tuple[np.ndarray, ...]:
    """Concatenate blocks of columns in memory, or in unnamed files beyond `memory` bytes.

    Args:
      blocks: parts of all columns.
      dtypes: of the columns.
      entries: upper bound of the number of entries.
      memory: bytes.
      scratch: folder of the files; None: the system's temporary folder.

    Raises:
      UserError: the folder is full, missing or not writable.
    """
    length = 0
    if entries * sum(np.dtype(dtype).itemsize for dtype in dtypes) <= memory:
        # Pages that stay unused are never backed by memory.
        columns = [np.empty(entries, dtype) for dtype in dtypes]
        for block in blocks:
            for column, part in zip(columns, block):
                column[length : length + len(part)] = part
            length += len(block[0])
        return tuple(column[:length] for column in columns)
    try:
        # Not closed here, since they live as long as the maps.
        files = [tempfile.TemporaryFile(dir=scratch) for _ in dtypes]  # noqa: SIM115
        for block in blocks:
            length += len(block[0])
            for file, column in zip(files, block):
                file.write(np.ascontiguousarray(column).data)
        for file in files:
            file.flush()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.ENOENT, errno.EACCES):
            raise
        raise UserError(
            "co-occurrence sums do not fit into memory and cannot be written to "
            f"'{scratch or tempfile.gettempdir()}' ({error.strerror}): name a scratch folder with "
            "more space"
        ) from error
    return tuple(
        (np.memmap(cast(BinaryIO, file), dtype, "r") if length else np.zeros(0, dtype))
        for file, dtype in zip(files, dtypes)
    )


def forget(*arrays: np.ndarray) -> None:
    """Release the resident pages of memory-mapped arrays."""
    for array in arrays:
        if isinstance(array, np.memmap) and array.mode == "r":
            array._mmap.madvise(mmap.MADV_DONTNEED)  # pyright: ignore[reportAttributeAccessIssue]


def in_order(
    pool: ThreadPoolExecutor, ahead: int, function: Callable, arguments: Sequence[tuple]
) -> Iterator[tuple[tuple, Any]]:
    """Yield (arguments, result) in order, computing `ahead` results in advance."""
    waiting = deque()
    for k in range(len(arguments) + ahead):
        if k < len(arguments):
            waiting.append(pool.submit(function, *arguments[k]))
        if k >= ahead:
            yield arguments[k - ahead], waiting.popleft().result()
