"""Digests of files, cached in the workdir so that only changed files are read again.

Any changed byte changes the digest. The first time takes about a minute per 100 GB on a fast disk
(all cores hash in parallel); afterwards size and times show that a file has not changed.
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
"""Name of the cache in a workdir."""
BLOCK = 64 << 20
"""Bytes of a block; blocks are hashed in parallel, so that one large file also uses all cores."""
PIECE = 1 << 20
SETTLED = 2.0
"""Age in seconds of a file's last change from which on its times identify its content."""


class Digests:
    """Cache of SHA-256 digests by path, valid while size, times and inode are the same."""

    def __init__(self, folder: Path, log: Log):
        self._cache, self._log = folder / CACHE, log
        self._entries: dict[str, list] = {}  # path: [*stamp, digest]
        with suppress(OSError, ValueError, AttributeError):  # missing or damaged: hash all again
            content = json.loads(self._cache.read_text(encoding="utf-8"))
            self._entries = {
                path: entry for path, entry in content.items() if isinstance(entry, list)
            }

    def of(self, files: Sequence[Path]) -> str:
        """Return one digest of the names, sizes and contents of files; a copy has the same."""
        sha = hashlib.sha256()
        for path, content in zip(files, self.each(files)):
            if content:
                sha.update(f"{path.name}\0{path.stat().st_size}\0{content}".encode())
        return sha.hexdigest()[:16]

    def each(self, files: Sequence[Path]) -> list[str]:
        """Return the digest of each file's content; "" for a path that is no file."""
        existing = {str(path.absolute()): path for path in files if path.is_file()}
        stamps = {name: _stamp(path) for name, path in existing.items()}
        digests = {
            name: self._entries[name][-1]
            for name in existing
            if self._entries.get(name, [])[:-1] == stamps[name]
        }
        if changed := {name: path for name, path in existing.items() if name not in digests}:
            now = time.time_ns()
            sizes = [stamps[name][0] for name in changed]
            hashed = dict(zip(changed, self._hash([*changed.values()], sizes)))
            # A file that was changed just now may change again within the resolution of its file
            # system's clock.
            settled = [name for name in hashed if now - max(stamps[name][1:3]) > SETTLED * 1e9]
            self._entries |= {name: [*stamps[name], hashed[name]] for name in settled}
            digests |= hashed
        return [digests.get(str(path.absolute()), "") for path in files]

    def save(self) -> None:
        """Write the cache, if its folder is writable."""
        with suppress(OSError):
            write_whole(self._cache, json.dumps(self._entries, indent=0) + "\n")

    def _hash(self, paths: Sequence[Path], sizes: Sequence[int]) -> list[str]:
        progress = Progress(self._log, "hashing changed files", sum(sizes), "bytes")
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
        finally:  # also if the run is stopped
            pool.shutdown(cancel_futures=True)
        return [sha.hexdigest() for sha in hashes]


def _stamp(path: Path) -> list[int]:
    """Return size, mtime, ctime and inode. No program can set the ctime back after an edit."""
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
