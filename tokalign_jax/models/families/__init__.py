"""Model families, one module each: reading config.json, and the weight table.

A module has MODEL_TYPES, `config_from_hf`, `weights`, HEAD (the table row of the head, which tied
models may store too) and BUFFERS (a regular expression for tensors of old checkpoints that are not
parameters).
"""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import fields, is_dataclass, replace
from types import ModuleType
from typing import Any, get_args, get_type_hints

from tokalign_jax.errors import UserError
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.families import (
    apertus,
    arcee,
    cohere,
    ernie,
    exaone4,
    gemma,
    glm,
    glm4_moe,
    gpt2,
    gpt_neox,
    gpt_oss,
    granite,
    hunyuan,
    lfm2,
    llama,
    llama4,
    mistral,
    mixture,
    multimodal,
    nanochat,
    olmo,
    phi3,
    qwen,
    qwen3_5,
    seed_oss,
    smollm3,
    stablelm,
    starcoder2,
)
from tokalign_jax.models.weights import Weight

_MODULES = (
    apertus,
    arcee,
    cohere,
    ernie,
    exaone4,
    gemma,
    glm,
    glm4_moe,
    gpt2,
    gpt_neox,
    gpt_oss,
    granite,
    hunyuan,
    lfm2,
    llama,
    llama4,
    mistral,
    mixture,
    nanochat,
    olmo,
    phi3,
    qwen,
    qwen3_5,
    seed_oss,
    smollm3,
    stablelm,
    starcoder2,
)

FAMILIES = {name: module for module in _MODULES for name in module.MODEL_TYPES}
"""Module by model_type."""


_PER_LAYER_EMBEDDINGS = (
    "each of its layers has an embedding table of the vocabulary's size, whose rows would need a"
    " start too"
)
_HEAD_BIAS = "its head has a bias for each token, which would need a start too"
REFUSED = {
    "gemma3n": _PER_LAYER_EMBEDDINGS,
    "gemma3n_text": _PER_LAYER_EMBEDDINGS,
    "gemma4": _PER_LAYER_EMBEDDINGS,
    "gemma4_text": _PER_LAYER_EMBEDDINGS,
    "gptj": _HEAD_BIAS,
    "paligemma": "its prompts use bidirectional attention, so its text model is no causal LM",
    "phi": _HEAD_BIAS,
}
"""Unsupported families that are close to a supported one, with the reason."""

_MAMBA = "layers with Mamba 2"
_LATENT = "latent attention, and experts that are chosen by groups"
UNIMPLEMENTED = {
    "bamba": _MAMBA,
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "falcon_h1": f"{_MAMBA} and attention side by side",
    "jamba": "layers with Mamba",
    "mamba2": _MAMBA,
    "nemotron_h": _MAMBA,
}
"""Families with a part that the decoder lacks, and that part."""


def family(model_type: str | None) -> ModuleType:
    """Returns the module of `model_type`.

    Raises:
      UserError: the family is not supported.
    """
    if model_type in REFUSED:
        raise UserError(
            f"model_type '{model_type}' is not supported: {REFUSED[model_type]}; choose a source"
            " model of another family"
        )
    if model_type in UNIMPLEMENTED:
        raise UserError(
            f"model_type '{model_type}' is not supported: it has {UNIMPLEMENTED[model_type]}, which"
            " this decoder lacks; choose a source model of another family (docs/models.md)"
        )
    if model_type not in FAMILIES:
        raise UserError(
            f"model_type '{model_type}' is not supported: choose a source model of one of the"
            f" families {', '.join(sorted(FAMILIES))}, or, for its text model alone, of"
            f" {', '.join(multimodal.MODEL_TYPES)} (the model_type in its config.json)"
        )
    return FAMILIES[model_type]


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """Reads a model's config from its config.json.

    Raises:
      UserError: the family is not supported, a constant is missing or has a wrong type, or an
        option is not implemented.
    """
    if not isinstance(name := raw.get("model_type"), str | None):
        raise _wrong_value(raw, name, "the name of a family")
    module = family(name)
    try:
        config = module.config_from_hf(raw)
    except UserError:
        raise
    except Exception as error:  # of arithmetic with values of other types
        raise UserError(
            "config.json has a value of a wrong type or out of range"
            f" ({type(error).__name__}: {error}): correct it, or copy the file again"
        ) from error
    _check_types(raw, config)
    return config


def _check_types(raw: Mapping[str, Any], constants: Any) -> None:
    """Checks the types of a config's constants, and that its sizes are positive.

    Raises:
      UserError: naming the value.
    """
    hints = get_type_hints(type(constants))
    lowest = int(isinstance(constants, ModelConfig))
    for name in (field.name for field in fields(constants)):
        values, kinds = getattr(constants, name), get_args(hints[name]) or (hints[name],)
        for value in values if isinstance(values, tuple) else (values,):
            if is_dataclass(value):
                _check_types(raw, value)
            elif problem := _type_problem(value, kinds, lowest):
                raise _wrong_value(raw, value, f"{problem} ({name})")


def _type_problem(value: Any, kinds: Collection[Any], lowest: int) -> str:
    """Describes what a value should be; "" if it is one of `kinds`."""
    # JSON files written by hand have 0, 1 or null for a flag; "false" would be true.
    if bool in kinds:
        return "" if value in (True, False, None) else "true or false"
    if value is None or not {int, float} & {*kinds}:
        return ""
    if int in kinds:
        is_valid = type(value) is int and value >= lowest
        return "" if is_valid else f"an integer of at least {lowest}"
    return "" if type(value) in (int, float) and math.isfinite(value) else "a finite number"


def _wrong_value(raw: Mapping[str, Any], value: Any, expected: str) -> UserError:
    same = (type(value), repr(value))
    keys = [key for key, other in raw.items() if (type(other), repr(other)) == same]
    named = " or ".join(map(repr, keys)) or "a constant"
    return UserError(
        f"config.json has the value {value!r:.80} for {named}; it must be {expected}: correct it,"
        " or copy the file again"
    )


def weight_table(config: ModelConfig, stored: Collection[str] = ()) -> list[Weight]:
    """Returns the weight table in the layout of the checkpoint with the tensors `stored`.

    Without `stored` it is the default layout. Checkpoints of the base model without its head, such
    as the first of GPT-2 and embedding models, lack the first component of names.
    """
    module = family(config.model_type)
    packed = config.experts is not None and any(
        name.endswith(".experts.gate_up_proj") for name in stored
    )
    table = module.packed_weights(config) if packed else module.weights(config)
    return [
        replace(weight, aliases=(*weight.aliases, _BASE_PREFIX.sub("", weight.name)))
        for weight in table
    ]


_BASE_PREFIX = re.compile(r"^(model|gpt_neox|transformer)\.")
"""First component of the names of all weights except the head's."""


def text_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `raw`, or for a multimodal model the config.json of its text model.

    Raises:
      UserError: the text model's family is not supported.
    """
    return (
        multimodal.text_config(raw)
        if raw.get("model_type") in multimodal.MODEL_TYPES
        else dict(raw)
    )


def text_name(model_type: str | None, name: str) -> str | None:
    """Maps a tensor's name in a `model_type` checkpoint to its name in the text model's.

    Returns:
      The name, unchanged unless the model is multimodal; None for tensors outside the text model.
    """
    return multimodal.text_name(name) if model_type in multimodal.MODEL_TYPES else name
