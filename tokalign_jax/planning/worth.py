"""Estimate if a new vocabulary pays: text per second before and after, from bytes and FLOPs.

A vocabulary that splits text into fewer tokens needs fewer steps for it, and each step costs more
where the vocabulary is larger, since the head has a row for each token.

- Generation of one sequence is bound by memory: a token costs the bytes of all weights that are
  multiplied for it, the head's among them. The cache of keys and values is not counted.
- Training is bound by arithmetic: a token costs the FLOPs of a step of full training.

Both costs are a constant and a term for each row of the vocabulary. So for text that the new
vocabulary splits into tokens r times as long there is a size at which it stops paying.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokalign_jax.config import StageConfig
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.transformer import abstract_params
from tokalign_jax.planning import flops, memory
from tokalign_jax.planning.machine import Machine, bandwidth, peak_flops

MFU = 0.4
"""Model FLOPs utilization that training is taken to reach."""
SIDES = ("source", "target")


@dataclass(frozen=True)
class Cost:
    """Cost of a token: `fixed + per_row` times the rows of the vocabulary."""

    fixed: float
    per_row: float

    def of(self, rows: int) -> float:
        """The cost with so many rows."""
        return self.fixed + self.per_row * rows


def generation_cost(model: ModelConfig, itemsize: int) -> Cost:
    """Bytes of weights that are read for a token."""
    used = itemsize * flops.products(model, abstract_params(model))
    per_row = itemsize * model.hidden_size
    return Cost(used - per_row * model.vocab_size, per_row)


def training_cost(model: ModelConfig, length: int) -> Cost:
    """FLOPs of a step of full training for a token of a sequence of `length`."""
    stage = StageConfig(method="full").with_batch(sequence_length=length)
    per_row = 6.0 * model.hidden_size
    return Cost(flops.flops_per_token(model, stage) - per_row * model.vocab_size, per_row)


def costs(model: ModelConfig, itemsize: int, length: int) -> dict[str, Cost]:
    """Both costs by name."""
    return {
        "generation": generation_cost(model, itemsize),
        "training": training_cost(model, length),
    }


def break_even(cost: Cost, source_rows: int, target_rows: int) -> float:
    """Factor by which a token must hold more text for the new vocabulary to be as fast."""
    return cost.of(target_rows) / cost.of(source_rows)


def largest_vocabulary(cost: Cost, source_rows: int, ratio: float) -> int:
    """Rows at which a vocabulary whose tokens hold `ratio` times as much text stops paying; 0: none
    pays.
    """
    return max(0, int((ratio * cost.of(source_rows) - cost.fixed) / cost.per_row))


def worth(
    model: ModelConfig,
    rows: Mapping[str, int],
    characters_per_token: Mapping[str, float],
    itemsize: int,
    length: int,
    machine: Machine,
) -> dict[str, Any]:
    """Estimate what the new vocabulary changes, ready for JSON; only sizes are exact.

    Args:
      model: either of both; its number of rows does not matter.
      rows: of both vocabularies, by `SIDES`.
      characters_per_token: of the user's text, by `SIDES`.
      itemsize: bytes of a stored weight.
    """
    ratio = characters_per_token["target"] / characters_per_token["source"]
    matrices = 1 if model.tie_word_embeddings else 2
    body = memory.parameters(abstract_params(model))
    body -= matrices * model.vocab_size * model.hidden_size
    parameters = {side: body + matrices * model.hidden_size * rows[side] for side in SIDES}
    rates = {
        "generation": bandwidth(machine.kind),
        "training": MFU * peak if (peak := peak_flops(machine.kind)) else None,
    }
    content: dict[str, Any] = {
        "device": machine.kind,
        "rows": dict(rows),
        "characters_per_token": dict(characters_per_token),
        "parameters": parameters,
        "bytes": {side: itemsize * count for side, count in parameters.items()},
    }
    for name, cost in costs(model, itemsize, length).items():
        each = {side: cost.of(rows[side]) / characters_per_token[side] for side in SIDES}
        rate = rates[name]
        content[name] = {
            "change": each["source"] / each["target"] - 1,
            "largest_vocabulary": largest_vocabulary(cost, rows["source"], ratio),
        }
        if rate:
            content[name]["characters_per_second"] = {side: rate / each[side] for side in SIDES}
    return content


def plan_lines(
    model: ModelConfig, rows: Mapping[str, int], itemsize: int, length: int
) -> list[str]:
    """Return the lines of a plan, made before any text is read."""
    needed = {
        name: break_even(cost, rows["source"], rows["target"])
        for name, cost in costs(model, itemsize, length).items()
    }
    return [
        "",
        f"is it worth it? {rows['source']:,} rows become {rows['target']:,}: a token must hold",
        (
            f"  {needed['generation']:.2f} times as much text for generation to be as fast"
            " (estimated from bytes of weights)"
        ),
        (
            f"  {needed['training']:.2f} times as much text for training to be as fast (estimated"
            " from FLOPs)"
        ),
    ]
