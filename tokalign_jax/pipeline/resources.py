"""Whether a run fits disk and memory, and what to do where it does not."""

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


def check_disk(context: Context, wanted: set[str]) -> None:
    """Refuses a run that the disk of the workdir cannot hold, with the sum of what is to come.

    Raises:
      UserError: stating the bytes needed by kind and those free.
    """
    config, (_, raw) = context.config, context.inputs.source_model
    text, exported = disk.text_bytes(config), disk.exported_bytes(config, raw)
    sizes = disk.disk_bytes(config, context.inputs.new_model, text, exported)
    missing = {
        name: size
        for name, size in sizes.items()
        if name in wanted and not context.folder(name).exists()
    }
    free = disk.free_bytes(context.workdir)
    if sum(missing.values()) > free:
        parts = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in missing.items() if size)
        raise UserError(
            f"the disk of --workdir '{context.workdir}' has {free / 1e9:.2f} GB free but the run "
            f"needs about "
            f"{sum(missing.values()) / 1e9:.2f} GB ({parts}); free some, use another disk, or "
            f"lower text.budget_bytes or checkpoints.keep"
        )


def warn_of_memory(context: Context, wanted: set[str]) -> None:
    """Warns of stages to come that are not expected to fit a device or host memory, hours before
    they begin.
    """
    names = {name.partition("/")[0] for name in wanted}
    for name, text in {
        **advice.too_large(setups(context)),
        **advice.too_large_untrained(_run(context)),
    }.items():
        if name in names:
            context.log(f"warning: {text}")


@contextmanager
def naming_full_memory(context: Context, name: str) -> Iterator[None]:
    """Raises:
    UserError: a device had no room left for a stage's arrays: with what would fit.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not sharding.is_out_of_memory(error):
            raise
        kind = name.partition("/")[0]
        others = {
            "init": "use a larger one, or train the rows alone with "
            "--config.initialization.trains=rows",
            "evaluate": f"lower --config.evaluation.batch (it is "
            f"{context.config.evaluation.batch}), or use a larger one",
        }
        remedy = advice.too_large_untrained(_run(context)).get(
            kind, others.get(kind, "use a larger one")
        )
        if name in training_stages(context.config):
            stages = setups(context)
            held = stages[name].stage.per_device_batch
            fewer = f"lower --config.{name}.per_device_batch (it is {held})"
            fewer += " or --config.compute.loss_chunk"
            remedy = advice.too_large(stages).get(
                name, f"{fewer}, or set --config.compute.remat=layer"
            )
        raise UserError(
            f"{name}: a device's memory is full ({str(error).splitlines()[0][:160].rstrip('.')}); "
            f"{remedy}. Other programs on the "
            "device leave it less. What is finished or saved is kept: the same command goes on "
            "from there"
        ) from error


def setups(context: Context) -> dict[str, Setup]:
    """The training stages on these devices, without `auto`."""
    mesh, machine = context.mesh.devices.shape, Machine.of()
    return resolve.resolved_stages(
        context.config, context.inputs.new_model, mesh, machine, context.inputs.teachers
    )


def _run(context: Context) -> Run:
    """The run on these devices, for the memory of stages that do not train."""
    model, raw = context.inputs.source_model
    source, mesh = Source(model.vocab_size, disk.stored_bytes(raw)), context.mesh.devices.shape
    machine = dataclasses.replace(Machine.of(), devices=len(context.mesh.local_devices))
    return Run(context.config, source, context.inputs.new_model, mesh, machine)
