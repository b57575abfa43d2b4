"""Digests of whole files, remembered beside the workdir so that a file is read again only when it
has changed.

An edit of any byte changes the digest. Reading everything costs about a minute per 100 GB on a fast
disk (all cores hash at once) the first time; afterwards sizes and times tell that a file is the
same.
"""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from tokalign_jax.utils.files import write_whole
from tokalign_jax.utils.progress import Log, Progress

CACHE = "digests.json"
"""The file in a workdir that holds what is known."""
BLOCK = 64 << 20
"""Bytes that are hashed by themselves, so that one large file keeps all cores busy too."""
PIECE = 1 << 20
SETTLED = 2.0
"""Seconds that a file must not have changed for, before its times can tell that it is the same."""


class Digests:
    """SHA-256 of files, by path, with what a file system says of a file that is still the same."""

    def __init__(self, folder: Path, log: Log):
        self._cache, self._log = folder / CACHE, log
        self._known: dict[str, list] = {}
        with suppress(
            OSError, ValueError, AttributeError
        ):  # not there or damaged: all is hashed again
            content = json.loads(self._cache.read_text(encoding="utf-8"))
            self._known = {
                path: known for path, known in content.items() if isinstance(known, list)
            }

    def of(self, files: Sequence[Path]) -> str:
        """One digest of several files: names, sizes and contents, so the same for a copy of
        them.
        """
        sha = hashlib.sha256()
        for path, content in zip(files, self.each(files)):
            if content:
                sha.update(f"{path.name}\0{path.stat().st_size}\0{content}".encode())
        return sha.hexdigest()[:16]

    def each(self, files: Sequence[Path]) -> list[str]:
        """The digest of each file's content; "" for what is no file."""
        there = {str(path.absolute()): path for path in files if path.is_file()}
        stamps = {name: _stamp(path) for name, path in there.items()}
        found = {
            name: self._known[name][-1]
            for name in there
            if self._known.get(name, [])[:-1] == stamps[name]
        }
        if unknown := {name: path for name, path in there.items() if name not in found}:
            now = time.time_ns()
            hashed = dict(
                zip(unknown, self._hash([*unknown.values()], [stamps[name][0] for name in unknown]))
            )
            # What has just been changed may be changed once more at what its file system takes for
            # the same time.
            settled = [name for name in hashed if now - max(stamps[name][1:3]) > SETTLED * 1e9]
            self._known |= {name: [*stamps[name], hashed[name]] for name in settled}
            found |= hashed
        return [found.get(str(path.absolute()), "") for path in files]

    def save(self) -> None:
        """Remembers what is known, if the folder can be written to."""
        with suppress(OSError):
            write_whole(self._cache, json.dumps(self._known, indent=0) + "\n")

    def _hash(self, paths: Sequence[Path], sizes: Sequence[int]) -> list[str]:
        progress = Progress(self._log, "looking for changed files", sum(sizes), "bytes")
        blocks = [
            (i, start) for i, size in enumerate(sizes) for start in range(0, max(size, 1), BLOCK)
        ]
        hashes = [hashlib.sha256() for _ in paths]
        pool = ThreadPoolExecutor(os.cpu_count())
        try:
            results = pool.map(lambda block: _block(paths[block[0]], block[1]), blocks)
            for (i, _), (digest, size) in zip(blocks, results):
                hashes[i].update(digest)
                progress.update(size)
        finally:  # also where the run was asked to stop
            pool.shutdown(cancel_futures=True)
        return [sha.hexdigest() for sha in hashes]


def _stamp(path: Path) -> list[int]:
    """What changes with a file. Nothing that edits one can set its ctime (the third) back."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _block(path: Path, start: int) -> tuple[bytes, int]:
    sha, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        file.seek(start)
        while size < BLOCK and (piece := file.read(min(PIECE, BLOCK - size))):
            sha.update(piece)
            size += len(piece)
    return sha.digest(), size
