"""Parser of the collectives in a compiled program's HLO text."""

import re
from typing import NamedTuple

import numpy as np

KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


class Collective(NamedTuple):
    kind: str
    groups: tuple[tuple[int, ...], ...]
    """Devices that exchange with one another."""
    in_loop: bool
    """True inside a loop, at any depth."""
    elements: int
    """Number of elements of its results on a device."""


def collectives(text: str) -> list[Collective]:
    """All collectives of an HLO module."""
    computations, entry = _computations(text)
    found = []

    def visit(name: str, in_loop: bool) -> None:
        for line in computations[name]:
            if match := re.search(rf" ({KINDS})(-start)?\(", line):
                result = line[: match.start()].split("=", 1)[1]
                sizes = [
                    int(np.prod([int(n) for n in dims.split(",") if n]))
                    for dims in re.findall(r"\w+\[([\d,]*)\]", result)
                ]
                found.append(Collective(match[1], _groups(line), in_loop, sum(sizes)))
            loops = " while(" in line
            for called in re.findall(r"(?:body|condition|calls|to_apply)=%?([\w.-]+)", line):
                visit(called, in_loop or loops)
            for called in re.findall(r"branch_computations=\{([^}]*)\}", line):
                for branch in called.split(","):
                    visit(branch.strip().lstrip("%"), in_loop)

    visit(entry, False)
    return found


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """(lines of each computation, name of the entry)."""
    computations: dict[str, list[str]] = {}
    entry = lines = None
    for line in text.splitlines():
        if match := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            lines = computations.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        elif lines is not None:
            lines.append(line)
    assert entry, "no entry computation"
    return computations, entry


def _groups(line: str) -> tuple[tuple[int, ...], ...]:
    if match := re.search(r"source_target_pairs=\{(\{.*?\})\}", line):
        return _sets(match[1])
    if match := re.search(r"replica_groups=\{(\{.*?\})\}", line):
        return _sets(match[1])
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        devices = _transposed(match[2], match[3]).reshape(_numbers(match[1]))
        return tuple(map(tuple, devices.tolist()))
    # Axes of a mesh, whose devices are in order or in that of `device_ids`.
    match = re.search(r"replica_groups=mesh\[([^\]]*)\](.*?) \{([^}]*)\}", line)
    assert match, line
    axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
    devices = np.arange(np.prod(list(axes.values())))
    if order := re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", match[2]):
        devices = _transposed(*order.groups())
    else:
        assert "device_ids" not in match[2], line
    names, used = list(axes), re.findall(r"'(\w+)'", match[3])
    others = [name for name in names if name not in used]
    devices = devices.reshape(list(axes.values())).transpose(
        [names.index(name) for name in others + used]
    )
    size = np.prod([axes[name] for name in used], dtype=int)
    return tuple(map(tuple, devices.reshape(-1, size).tolist()))


def _transposed(dimensions: str, order: str | None) -> np.ndarray:
    """The devices in order, as an array of these dimensions that is transposed."""
    sizes = _numbers(dimensions)
    return np.arange(np.prod(sizes)).reshape(sizes).transpose(_numbers(order) if order else None)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _sets(text: str) -> tuple[tuple[int, ...], ...]:
    return tuple(
        tuple(int(n) for n in group.split(",")) for group in re.findall(r"\{([\d,]+)\}", text)
    )
