"""Settings with which a stage would fit its devices and host."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tokalign_jax.config import distills, loss_chunk_of, reads_source
from tokalign_jax.models import quantized, remat
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.planning import memory
from tokalign_jax.planning.inference import Run, needs
from tokalign_jax.planning.machine import MeshSizes, format_bytes
from tokalign_jax.planning.memory import Setup, needed, policy


def too_large(setups: Mapping[str, Setup]) -> dict[str, str]:
    """For each training stage that does not fit a device: what it needs, and what would fit."""
    return {
        name: what_would_fit(setup)
        for name, setup in setups.items()
        if needed(setup) > setup.machine.memory
    }


def what_would_fit(setup: Setup) -> str:
    """Say that a training stage does not fit a device, and settings with which it would.

    Each setting by itself where one is enough, otherwise several together.

    Args:
      setup: without `auto`.
    """
    room = setup.machine.memory
    alone: dict[str, str] = {}
    together, combined = [], setup
    for key, changes in _CHANGES.items():
        key = key.replace("stage.", f"{setup.name}.")
        for value, changed in changes(setup):
            if key not in alone and needed(changed) <= room:
                alone[key] = f"{key}={value} ({format_bytes(needed(changed))})"
        if needed(combined) > room:
            for value, changed in list(changes(combined))[-1:]:
                together, combined = [*together, f"{key}={value}"], changed
    if alone:
        remedy = f"it would with {', or '.join(alone.values())}"
    elif needed(combined) <= room:
        remedy = f"it would with {', '.join(together)} together ({format_bytes(needed(combined))})"
    else:
        remedy = "no settings change that: use more or larger devices"
    return (
        f"{setup.name} will not fit: it needs about {format_bytes(needed(setup))} on each device,"
        f" which has {format_bytes(room)} for arrays; {remedy}"
    )


def not_split(model: ModelConfig, mesh: MeshSizes) -> list[str]:
    """A warning if much of a model is whole on each device although the mesh splits parameters."""
    parts, held = mesh[1] * mesh[2], memory.share(model, mesh)
    if held <= 1.2 / parts:
        return []
    sizes = f"{model.hidden_size:,} and {model.intermediate_size:,}"
    return [
        f"mesh.fsdp x mesh.tensor splits parameters in {parts}, but each device holds {held:.0%} of"
        f" them: matrices of layers whose sizes ({sizes}) are no multiples of that stay whole;"
        " other numbers of parts save more memory"
    ]


_Changes = Iterator[tuple[Any, Setup]]


def _powers_of_two(below: int, least: int) -> list[int]:
    """Powers of two in [least, below), the largest first."""
    return [2**n for n in reversed(range(below.bit_length())) if least <= 2**n < below]


def _fewer_sequences(setup: Setup) -> _Changes:
    for batch in _powers_of_two(int(setup.stage.batch.per_device), 1):
        yield batch, setup.with_batch(per_device=batch)


def _less_kept(setup: Setup) -> _Changes:
    for cheaper in remat.POLICIES[remat.POLICIES.index(policy(setup.compute)) + 1 :]:
        yield cheaper, setup.with_compute(remat=cheaper)


def _smaller_chunks(setup: Setup) -> _Changes:
    for chunk in _powers_of_two(loss_chunk_of(setup.compute), 128):
        yield chunk, setup.with_compute(loss_chunk=chunk)


def _more_parts(setup: Setup) -> _Changes:
    data, fsdp, tensor = setup.mesh
    for more in (n for n in range(2, data + 1) if data % n == 0):
        yield fsdp * more, dataclasses.replace(setup, mesh=(data // more, fsdp * more, tensor))


def _adapters(setup: Setup) -> _Changes:
    if setup.stage.method == "full":
        yield "lora", setup.with_stage(method="lora")


def _fewer_bits(setup: Setup) -> _Changes:
    if setup.stage.method == "lora" and setup.stage.lora.frozen == "dtype":
        for kind in quantized.KINDS:
            lora = dataclasses.replace(setup.stage.lora, frozen=kind)
            yield kind, setup.with_stage(lora=lora)


_CHANGES: dict[str, Callable[[Setup], _Changes]] = {
    "mesh.fsdp": _more_parts,
    "compute.loss_chunk": _smaller_chunks,
    "stage.batch.per_device": _fewer_sequences,
    "compute.remat": _less_kept,
    "stage.method": _adapters,
    "stage.lora.frozen": _fewer_bits,
}
"""Settings that save memory, the least change of each first; in order of what they cost. The last
two also change what is learned."""


# --- Stages that do not train -------------------------------------------------------------------


def too_large_untrained(run: Run) -> dict[str, str]:
    """For `init`, `evaluate` and `export`, those that do not fit a device or host memory: settings
    with which they would.
    """
    warnings = {}
    for name, stage in needs(run).items():
        device, host = sum(stage.device.values()), stage.on_host(run.machine)
        short = []
        if device > run.machine.memory:
            room = format_bytes(run.machine.memory)
            short.append(f"{format_bytes(device)} on each device, which has {room} for arrays")
        if host > run.machine.host_memory:
            short.append(
                f"{format_bytes(host)} of host memory, of which"
                f" {format_bytes(run.machine.host_memory)} are free"
            )
        if short:
            warnings[name] = (
                f"{name} will not fit: it needs about {' and '.join(short)}; {_remedy(name, run)}"
            )
    return warnings


def _remedy(name: str, run: Run) -> str:
    """The settings that would each be enough, the one that costs least of every kind."""
    remedies: dict[str, str] = {}
    for key, value, changed in _untrained_changes(name, run):
        stage = needs(changed)[name]
        fits = sum(stage.device.values()) <= run.machine.memory
        if key not in remedies and fits and stage.on_host(run.machine) <= run.machine.host_memory:
            remedies[key] = f"{key}={value}"
    if remedies:
        return f"it would with {', or '.join(remedies.values())}"
    return "no settings change that: use devices or a host with more memory"


def _untrained_changes(name: str, run: Run) -> Iterator[tuple[str, Any, Run]]:
    data, fsdp, tensor = run.mesh
    for more in (n for n in range(2, data + 1) if data % n == 0):
        yield (
            "mesh.fsdp",
            fsdp * more,
            dataclasses.replace(run, mesh=(data // more, fsdp * more, tensor)),
        )
    if name == "evaluate":
        for batch in _powers_of_two(run.config.evaluation.batch, 1):
            yield "evaluation.batch", batch, _with(run, "evaluation", batch=batch)
        for chunk in _powers_of_two(loss_chunk_of(run.config.compute), 128):
            yield "compute.loss_chunk", chunk, _with(run, "compute", loss_chunk=chunk)
        yield "evaluation.random_baseline", False, _with(run, "evaluation", random_baseline=False)
    if name == "init":
        if distills(run.config):
            choices = ("all", "lora", "rows")
            for trains in choices[choices.index(run.config.initialization.trains) + 1 :]:
                less = _with(run, "initialization", trains=trains)
                yield "initialization.trains", trains, less
                if not (run.config.mesh.data or run.config.mesh.fsdp):
                    # The mesh would be chosen again (`inference.mesh_sizes`).
                    split = dataclasses.replace(less, mesh=(1, data * fsdp, tensor))
                    yield "initialization.trains", trains, split
            yield (
                "initialization.distillation_tokens",
                0,
                _with(run, "initialization", distillation_tokens=0),
            )
            times = [] if run.machine.on_cpu else _powers_of_two(MOST_TIMES + 1, 2)[::-1]
            for parts in times:
                more = dataclasses.replace(run, mesh=(1, data * fsdp * parts, tensor))
                yield "mesh.fsdp", f"{more.mesh[1]} on {math.prod(more.mesh)} devices", more
        elif reads_source(run.config):
            for key in ("tuning", "tokens"):
                yield f"initialization.{key}", 0, _with(run, "initialization", **{key: 0})


MOST_TIMES = 16
"""Times as many devices as a run has that advice considers, at most."""


def _with(run: Run, group: str, **fields: Any) -> Run:
    changed = dataclasses.replace(getattr(run.config, group), **fields)
    return dataclasses.replace(run, config=dataclasses.replace(run.config, **{group: changed}))
