"""Checks that a run fits on disk and in memory, with remedies if it does not."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from tokalign_jax.config import training_stages
from tokalign_jax.errors import UserError
from tokalign_jax.parallel import sharding
from tokalign_jax.pipeline.context import Context
from tokalign_jax.planning import advice, disk, resolve
from tokalign_jax.planning.inference import Run, Source
from tokalign_jax.planning.machine import Machine
from tokalign_jax.planning.memory import Setup


def check_disk(context: Context, selected: set[str]) -> None:
    """Check that the disk of the workdir can hold the artifacts of the selected stages.

    Raises:
      UserError: with the bytes needed by stage and those free.
    """
    config, (_, raw) = context.config, context.inputs.source_model
    text, exported = disk.text_bytes(config), disk.exported_bytes(config, raw)
    sizes = disk.disk_bytes(config, context.inputs.new_model, text, exported)
    missing = {
        name: size
        for name, size in sizes.items()
        if name in selected and not context.folder(name).exists()
    }
    free = disk.free_bytes(context.workdir)
    if sum(missing.values()) > free:
        parts = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in missing.items() if size)
        raise UserError(
            f"the disk of --workdir '{context.workdir}' has {free / 1e9:.2f} GB free but the run "
            f"needs about {sum(missing.values()) / 1e9:.2f} GB ({parts}); free some space, use "
            "another disk, or lower text.budget_bytes or checkpoints.keep"
        )


def warn_of_memory(context: Context, selected: set[str]) -> None:
    """Warn of selected stages that are not expected to fit in device or host memory."""
    names = {name.partition("/")[0] for name in selected}
    too_large = advice.too_large(setups(context)) | advice.too_large_untrained(_run(context))
    for name, text in too_large.items():
        if name in names:
            context.log(f"warning: {text}")


@contextmanager
def naming_full_memory(context: Context, name: str) -> Iterator[None]:
    """Turn a stage's out-of-memory error on a device into a UserError with the remedy."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not sharding.is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0][:160].rstrip(".")
        raise UserError(
            f"{name}: a device's memory is full ({reason}); {_remedy(context, name)}. Other "
            "programs on the device take some of its memory. Finished stages and checkpoints are "
            "kept: the same command resumes from there"
        ) from error


def _remedy(context: Context, name: str) -> str:
    """Return what to change so that a stage needs less device memory."""
    if name in training_stages(context.config):
        stages = setups(context)
        per_device = stages[name].stage.batch.per_device
        smaller = (
            f"lower --config.{name}.batch.per_device (it is {per_device}) or "
            "--config.compute.loss_chunk, or set --config.compute.remat=layer"
        )
        return advice.too_large(stages).get(name, smaller)
    kind = name.partition("/")[0]
    smaller = {
        "init": "train less of the model with --config.initialization.trains=lora (adapters and "
        "rows) or =rows, or use a larger device",
        "evaluate": "lower --config.evaluation.batch (it is "
        f"{context.config.evaluation.batch}), or use a larger device",
    }.get(kind, "use a larger device")
    return advice.too_large_untrained(_run(context)).get(kind, smaller)


def setups(context: Context) -> dict[str, Setup]:
    """Return the training stages with every `auto` resolved for these devices."""
    mesh, machine = context.mesh.devices.shape, Machine.of()
    return resolve.resolved_stages(
        context.config, context.inputs.new_model, mesh, machine, context.inputs.teachers
    )


def _run(context: Context) -> Run:
    """Describe the run on these devices, for the memory of stages that do not train."""
    model, raw = context.inputs.source_model
    source, mesh = Source.of(model, raw), context.mesh.devices.shape
    machine = dataclasses.replace(Machine.of(), devices=len(context.mesh.local_devices))
    return Run(context.config, source, context.inputs.new_model, mesh, machine)
