"""Replaces `auto` in the settings of training stages by what fits the devices and is fastest."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from tokalign_jax.config import AUTO, LOSS_CHUNK, Config, training_stages
from tokalign_jax.errors import UserError
from tokalign_jax.models import remat
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.planning.machine import Machine, MeshSizes
from tokalign_jax.planning.memory import Setup, abstract_mesh, needed
from tokalign_jax.training import loop

AUTO_MEMORY = 0.9
"""Share of a device's usable memory that an automatic choice may fill: the estimates of working
memory may be too low."""
SATURATING_TOKENS = 8_192
"""Tokens held at once from which on an accelerator is saturated: recomputation then costs more
than fewer tokens do."""
MAX_TOKENS = 65_536
"""Tokens held at once beyond which more are not faster (docs/results/throughput.md)."""
MAX_TOKENS_ON_CPU = 4_096
"""The same on a CPU, which is always saturated."""
LOSS_CHUNKS = ((LOSS_CHUNK, LOSS_CHUNK // 2), (LOSS_CHUNK // 4,), (LOSS_CHUNK // 8,))
"""Choices of tokens whose logits exist at once, by what they are expected to cost, since every
chunk takes a pass over the head's gradient: less than holding half as many sequences (first group),
less than recomputation (second); those of the third are taken if nothing else fits."""

_Choice = tuple[int | str, remat.Policy, int | str]
"""Sequences at once, rematerialisation policy, tokens whose logits exist at once."""


def resolve(setup: Setup) -> Setup:
    """`setup` with a choice for `auto`: of those that fit a device the one expected to be fastest.

    While the sequences held at once saturate the device, as much as possible is kept for the
    backward pass, since fewer sequences cost less than recomputation; then as many sequences as fit
    are held, up to where more are not faster. Logits exist for fewer tokens at once where that lets
    these choices fit. If nothing fits: the choice that needs the least.

    Raises:
      UserError: the step's sequences cannot be divided among the devices.
    """
    stage, machine = setup.stage, setup.machine
    batches, room = [stage.batch.per_device], machine.memory
    if stage.batch.per_device == AUTO:
        most = (
            MAX_TOKENS if machine.fused_attention else MAX_TOKENS_ON_CPU
        ) // stage.batch.sequence_length
        divisors = loop.held_at_once(setup.name, stage, abstract_mesh(setup.mesh))
        batches = [n for n in divisors if n <= max(1, most)][::-1]
        room *= AUTO_MEMORY
    choices = _choices(batches, setup)

    def chosen(batch: int | str, policy: remat.Policy, chunk: int | str) -> Setup:
        return setup.with_batch(per_device=batch).with_compute(remat=policy, loss_chunk=chunk)

    fitting = (choice for choice in choices if needed(chosen(*choice)) <= room)
    return chosen(*next(fitting, choices[-1]))


def _choices(batches: Sequence[int | str], setup: Setup) -> list[_Choice]:
    """Choices from the fastest to the one that needs the least memory.

    Args:
      batches: sequences at once, the most first.
    """
    policies: Sequence[Any] = [setup.compute.remat]
    if setup.compute.remat == "auto":
        policies = remat.POLICIES
    given = setup.compute.loss_chunk
    first, second, third = LOSS_CHUNKS if given == AUTO else ((given,), (), ())
    length = setup.stage.batch.sequence_length
    many = [n for n in batches if int(n) * length >= SATURATING_TOKENS]
    few = [n for n in batches if n not in many]
    order: list[tuple[Any, ...]] = [
        (n, policy, chunk)
        for policy in policies
        for group in (first, second)
        for n in many
        for chunk in group
    ]
    order += itertools.product(few, policies, (*first, *second))
    order += ((n, policy, chunk) for chunk in third for n in batches for policy in policies)
    least = batches[-1], policies[-1], (*first, *second, *third)[-1]
    return [*order, least]


def resolved_stages(
    config: Config,
    model: ModelConfig,
    mesh: MeshSizes,
    machine: Machine,
    teachers: Mapping[str, ModelConfig],
) -> dict[str, Setup]:
    """The training stages of a run by name, without `auto`.

    Args:
      teachers: of the stages that have one (`memory.teachers`).
    """
    return {
        name: resolve(Setup(name, stage, config.compute, model, mesh, machine, teachers.get(name)))
        for name, stage in training_stages(config).items()
    }


def check_lengths(config: Config, model: ModelConfig) -> None:
    """Checks sequence lengths against the positions of the source model.

    Raises:
      UserError: a sequence is longer than that.
    """
    lengths = {
        f"{name}.batch.sequence_length": stage.batch.sequence_length
        for name, stage in training_stages(config).items()
    }
    for name, length in {
        **lengths,
        "evaluation.sequence_length": config.evaluation.sequence_length,
    }.items():
        if length > model.max_positions:
            raise UserError(
                f"config.{name} is {length} but source_model '{config.source_model}' has"
                f" {model.max_positions} positions; set --config.{name}={model.max_positions} or"
                " less"
            )
