"""The devices a plan is for, how fast they train, and numbers with units as users write them."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax

from tokalign_jax.config import ComputeConfig
from tokalign_jax.errors import UserError
from tokalign_jax.models.attention import has_kernel
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.parallel import sharding
from tokalign_jax.utils import compiling
from tokalign_jax.utils.progress import quantity

MeshSizes = tuple[int, int, int]
"""Sizes of the mesh axes data, fsdp and tensor."""
USABLE = compiling.MEMORY
"""Share of a device's memory that arrays can have; the rest is the runtime's."""
PEAKS = {
    "A10": 125e12,
    "A100": 312e12,
    "B200": 2250e12,
    "GB200": 2500e12,
    "GH200": 989e12,
    "H100": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "L4": 121e12,
    "L40": 181e12,
    "L40S": 362e12,
    "TPU v4": 275e12,
    "TPU v4 lite": 138e12,
    "TPU v5": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,
}
"""Dense bfloat16 FLOP/s of a device by name (the makers' data sheets). A chip of TPU7x is two
devices."""


BANDWIDTHS = {
    "A10": 600e9,
    "A100": 2039e9,
    "B200": 8000e9,
    "GB200": 8000e9,
    "GH200": 4000e9,
    "H100": 3350e9,
    "H100 NVL": 3900e9,
    "H100 PCIe": 2000e9,
    "H200": 4800e9,
    "H200 NVL": 4800e9,
    "L4": 300e9,
    "L40": 864e9,
    "L40S": 864e9,
    "TPU v4": 1228e9,
    "TPU v4 lite": 614e9,
    "TPU v5": 2765e9,
    "TPU v5 lite": 819e9,
    "TPU v5e": 819e9,
    "TPU v5p": 2765e9,
    "TPU v6 lite": 1640e9,
    "TPU v6e": 1640e9,
    "TPU7x": 3690e9,
}
"""Bytes a second of a device's memory by name (the makers' data sheets)."""


def peak_flops(device_kind: str) -> float | None:
    """The device's entry in `PEAKS`; None if there is none."""
    return _by_name(PEAKS, device_kind)


def bandwidth(device_kind: str) -> float | None:
    """The device's entry in `BANDWIDTHS`; None if there is none."""
    return _by_name(BANDWIDTHS, device_kind)


def _by_name(table: Mapping[str, float], device_kind: str) -> float | None:
    """The entry that has the most words of the device's name, from its first on.

    None for a part of a GPU (`NVIDIA H100 80GB HBM3 MIG 1g.10gb`).
    """
    words = re.split(r"[\s-]+", device_kind.removeprefix("NVIDIA "))
    if "MIG" in words:
        return None
    names = (" ".join(words[:count]) for count in range(len(words), 0, -1))
    return next((table[name] for name in names if name in table), None)


@dataclass(frozen=True)
class Machine:
    """The devices that a plan is for."""

    devices: int
    memory: float
    """Bytes of a device that arrays can have; infinite if unknown."""
    kind: str = ""
    """`device_kind` of the devices; empty if they are not attached to this process."""
    fused_attention: bool = True
    """True for devices that can have a fused attention kernel (GPUs and TPUs)."""
    host_memory: float = math.inf
    """Bytes of host memory for a process; infinite if unknown."""

    @classmethod
    def of(cls, devices: int = 0, memory: str = "", host_memory: str = "") -> "Machine":
        """The machine that flags describe (memory as in `80GB`), or the attached one.

        Raises:
          UserError: `memory` or `host_memory` is not a number of bytes.
        """
        usable = (
            USABLE * parse_number(memory, "--device-memory", "80GB", _BYTES) if memory else math.inf
        )
        host = (
            parse_number(host_memory, "--host-memory", "256GB", _BYTES) if host_memory else math.inf
        )
        if devices:
            return cls(devices, usable, host_memory=host)
        attached = jax.devices()
        return cls(
            len(attached),
            min(usable, sharding.device_memory(jax.local_devices()[0])),
            attached[0].device_kind,
            attached[0].platform != "cpu",
            min(host, available_host_memory()),
        )

    @property
    def on_cpu(self) -> bool:
        """True if arrays of the devices are in host memory."""
        return self.kind == "cpu"

    def fuses(self, model: ModelConfig, compute: ComputeConfig) -> bool:
        """Return True if a fused attention kernel takes the model's head size, type and
        soft-cap.
        """
        device = jax.devices()[0] if self.kind else None
        return self.fused_attention and has_kernel(
            model.head_dim, compute.dtype, model.attention_softcap, device
        )


@dataclass(frozen=True)
class Speed:
    """Training speed, from the first of these that is known."""

    tokens_per_second: float = 0.0
    """Of all devices together, for every stage."""
    measured: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Tokens a second of one device, by `kind_of` a stage."""
    mfu: float = 0.4
    """Model FLOPs utilization: the share of the peak that is reached."""
    peak: float = 0.0
    """FLOP/s of a device; 0: looked up by the device's name (`PEAKS`)."""

    @classmethod
    def of(cls, tokens_per_second: float, measured: str, mfu: float, peak: str) -> "Speed":
        """From flags; `measured` is a JSON file of benchmarks/train_throughput.py.

        Raises:
          UserError: `measured` is not such a file, or `peak` is not a number.
        """
        return cls(
            tokens_per_second,
            _measured(Path(measured)) if measured else {},
            mfu,
            parse_number(peak, "--peak", "989TFLOPS", _FLOPS) if peak else 0.0,
        )

    def seconds(
        self, tokens: int, flops: float, kind: str, machine: Machine
    ) -> tuple[float | None, str]:
        """Return the seconds of training on `tokens`, None if unknown, and the figure's source.

        Args:
          kind: `kind_of` the stage.
        """
        if not tokens:
            return 0.0, ""
        if self.tokens_per_second:
            return (
                tokens / self.tokens_per_second,
                f"at the {quantity(self.tokens_per_second)} tokens/s given",
            )
        if rate := self.measured.get(kind):
            return (
                tokens / rate / machine.devices,
                f"at the {quantity(rate)} tokens/s measured on one device, times {machine.devices}",
            )
        peak = self.peak or peak_flops(machine.kind)
        if not peak:
            return None, ""
        # The peak is that of 16-bit products, also for stages in float8.
        rate = self.mfu * peak * machine.devices / (flops / tokens)
        return (
            tokens / rate,
            (
                f"assuming {self.mfu:.0%} of {peak / 1e12:.0f} TFLOP/s on each device,"
                f" {quantity(rate)} tokens/s; not measured"
            ),
        )


class _CgroupFiles(NamedTuple):
    """Files in which a version of Linux control groups keeps its memory figures."""

    mount: str
    controller: str
    """In /proc/self/cgroup."""
    limit: str
    usage: str
    cache: str
    """Of memory.stat: file pages, which the system can take back."""


_CGROUPS = (
    _CgroupFiles("sys/fs/cgroup", "", "memory.max", "memory.current", "file"),
    _CgroupFiles(
        "sys/fs/cgroup/memory",
        "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_cache",
    ),
)


def available_host_memory(root: Path = Path("/")) -> float:
    """Bytes that this process can still allocate; infinite where the system does not say.

    That is MemAvailable, or less where a control group (a container, a batch job) has a limit.
    """
    sizes = [math.inf]
    if found := re.search(r"MemAvailable:\s*(\d+) kB", _read(root / "proc/meminfo")):
        sizes.append(1024 * int(found[1]))
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, name = line.split(":", 2)
        for files in _CGROUPS:
            if files.controller in controllers.split(","):
                group = root / files.mount / name.lstrip("/")
                # In a container the group may be mounted as the root.
                sizes += [_left_in_group(folder, files) for folder in (group, *group.parents)]
    return min(sizes)


def _left_in_group(folder: Path, files: _CgroupFiles) -> float:
    limit, usage = _read(folder / files.limit).strip(), _read(folder / files.usage).strip()
    if not (limit.isdigit() and usage.isdigit()):
        return math.inf
    cache = re.search(rf"^{files.cache} (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)
    return int(limit) - max(0, int(usage) - (int(cache[1]) if cache else 0))


def _read(file: Path) -> str:
    """A file's text; empty where it cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""


_BYTES = {"": 1, "B": 1, **{f"{letter}B": 1000**n for n, letter in enumerate("KMGT", 1)}} | {
    f"{letter}iB": 1024**n for n, letter in enumerate("KMGT", 1)
}
_FLOPS = {
    "": 1,
    **{f"{letter}FLOPS": 1000**n for n, letter in enumerate(("K", "M", "G", "T", "P"), 1)},
}


def parse_number(text: str, flag: str, example: str, units: Mapping[str, float]) -> float:
    """A flag's number with a unit, such as `80GB`.

    Raises:
      UserError: `text` is not a number with one of `units`.
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    units = {unit.lower(): size for unit, size in units.items()}
    try:
        number, unit = match.groups() if match else ("", "")
        return float(number) * units[unit.lower()]
    except (ValueError, KeyError):
        raise UserError(f"{flag}={text}: expected a number and a unit, such as {example}") from None


def format_bytes(size: float) -> str:
    """A number of bytes for people: `15.3 MB`, `2.07 GB`."""
    return f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.2f} GB"


def kind_of(method: str, matmul: str = "dtype", frozen: str = "dtype") -> str:
    """Return the key of a stage's measured speed: its method, and what makes steps others.

    Args:
      method: `StageConfig.method`.
      matmul: `ComputeConfig.matmul`.
      frozen: `LoraConfig.frozen`, of a LoRA stage.
    """
    others = [matmul, frozen if method == "lora" else "dtype"]
    return ", ".join([method, *(name for name in others if name != "dtype")])


def _measured(file: Path) -> dict[str, float]:
    """Tokens a second of one device by `kind_of` its stage.

    Args:
      file: output of benchmarks/train_throughput.py.

    Raises:
      UserError: the file does not hold that.
    """
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        return {
            kind_of(row["method"], row.get("matmul", "dtype"), row.get("frozen", "dtype")): row[
                "tokens_per_second"
            ]
            / row["devices"]
            for row in rows
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--throughput={file}: expected a JSON list of rows with method, tokens_per_second and"
            f" devices ({error})"
        ) from error
