"""Files and folders that are there whole or not at all, also after a power cut."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Writes a file, so that whoever reads it finds the old or the new text, and none cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # else the name may reach the disk before the text
    os.replace(partial, path)


def partial_of(path: Path) -> Path:
    """Where a file is until it is whole."""
    return path.with_name(f"{path.name}.partial")


def unused(path: Path) -> Path:
    """`path`, or with the first number behind it that makes it the name of nothing."""
    places = (path.with_name(f"{path.name}{number or ''}") for number in range(10_000))
    return next(place for place in places if not os.path.lexists(place))
