"""The model families, one file each: how config.json becomes a `ModelConfig`, and the weight table.

A module has MODEL_TYPES, `config_from_hf`, `weights`, HEAD (the row of the head, which a tied model
may store too) and BUFFERS (an expression for tensors in old checkpoints that hold no parameters).
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

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
    gpt2,
    gpt_neox,
    granite,
    hunyuan,
    lfm2,
    llama,
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
    gpt2,
    gpt_neox,
    granite,
    hunyuan,
    lfm2,
    llama,
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
"""Module of each model_type."""


_PER_LAYER_EMBEDDINGS = (
    "each layer has an embedding table of the vocabulary's size of its own, whose rows would need a"
    " start too"
)
_HEAD_BIAS = "its head has a bias for each token, which would need a start too"
REFUSED = {
    "gemma3n": _PER_LAYER_EMBEDDINGS,
    "gemma3n_text": _PER_LAYER_EMBEDDINGS,
    "gemma4": _PER_LAYER_EMBEDDINGS,
    "gemma4_text": _PER_LAYER_EMBEDDINGS,
    "gptj": _HEAD_BIAS,
    "paligemma": "prompts see each other in both directions, so its text model is no causal LM",
    "phi": _HEAD_BIAS,
}
"""Families that would nearly fit, with the reason why they do not."""


def family(model_type: str | None) -> ModuleType:
    """The module of `model_type`.

    Raises:
      UserError: there is none.
    """
    if model_type in REFUSED:
        raise UserError(
            f"model_type '{model_type}' is not supported: {REFUSED[model_type]}; choose a source"
            " model of another family"
        )
    if model_type not in FAMILIES:
        raise UserError(
            f"model_type '{model_type}' is not supported: choose a source model of one of the"
            f" families {', '.join(sorted(FAMILIES))}, or of {', '.join(multimodal.MODEL_TYPES)}"
            " for its text model alone (the model_type in its config.json)"
        )
    return FAMILIES[model_type]


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """The constants that a config.json declares.

    Raises:
      UserError: the family is not supported, a constant is missing, or a flag is not implemented.
    """
    return family(raw.get("model_type")).config_from_hf(raw)


def weight_table(config: ModelConfig, stored: Collection[str] = ()) -> list[Weight]:
    """The weight table of `config`, in the layout of the checkpoint whose tensors are `stored`, or
    the usual one.

    Checkpoints of the model without its head, as the first of GPT-2 and embedding models are, lack
    the first part of names.
    """
    module = family(config.model_type)
    packed = config.experts is not None and any(
        name.endswith(".experts.gate_up_proj") for name in stored
    )
    table = module.packed_weights(config) if packed else module.weights(config)
    return [
        replace(weight, aliases=(*weight.aliases, _BASE.sub("", weight.name))) for weight in table
    ]


_BASE = re.compile(r"^(model|gpt_neox|transformer)\.")
"""What is before the names of all weights but the head's."""


def text_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`raw`, or if it is of a multimodal model the config.json of its text model alone.

    Raises:
      UserError: the text model's family is not supported.
    """
    return (
        multimodal.text_config(raw)
        if raw.get("model_type") in multimodal.MODEL_TYPES
        else dict(raw)
    )


def text_name(model_type: str | None, name: str) -> str | None:
    """The name of a tensor of a `model_type` checkpoint, or if that is multimodal the one in its
    text model's own.

    None: it is of no part of the text model.
    """
    return multimodal.text_name(name) if model_type in multimodal.MODEL_TYPES else name
