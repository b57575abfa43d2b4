"""Atomic writes of files, which also survive a power cut."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically: readers see the old text or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # else the rename may reach the disk before the text
    os.replace(partial, path)


def partial_of(path: Path) -> Path:
    """Return the path of a file while it is written."""
    return path.with_name(f"{path.name}.partial")


def unused(path: Path) -> Path:
    """Return `path`, with a number appended if it exists already."""
    candidates = (path.with_name(f"{path.name}{number or ''}") for number in range(10_000))
    return next(candidate for candidate in candidates if not os.path.lexists(candidate))
