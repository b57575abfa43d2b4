"""The model families, one file each: how config.json becomes a `ModelConfig`, and the weight table."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from tokalign_jax.errors import UserError
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.families import (
    gemma,
    gpt2,
    gpt_neox,
    granite,
    llama,
    mistral,
    olmo,
    phi3,
    qwen,
    smollm3,
    stablelm,
)

_MODULES = (gemma, gpt2, gpt_neox, granite, llama, mistral, olmo, phi3, qwen, smollm3, stablelm)

FAMILIES = {name: module for module in _MODULES for name in module.MODEL_TYPES}
"""Module of each model_type."""


def family(model_type: str | None) -> ModuleType:
    """The module of `model_type`.

    Raises:
      UserError: there is none.
    """
    if model_type not in FAMILIES:
        raise UserError(
            f"model_type '{model_type}' is not supported: choose a source model of one of the families "
            f"{', '.join(sorted(FAMILIES))} (the model_type in its config.json)"
        )
    return FAMILIES[model_type]


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """The constants that a config.json declares.

    Raises:
      UserError: the family is not supported, a constant is missing, or a flag is not implemented.
    """
    return family(raw.get("model_type")).config_from_hf(raw)
