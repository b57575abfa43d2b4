"""Models of images and text whose text part is one of our families: that part is taken alone, as the causal LM it is.

Their config.json has the text model's under `text_config`, without what is the default of its transformers class; their
weights have the text model's behind a prefix. What is adapted and exported is the text model: an ordinary checkpoint of
its own class, without the encoder of images and the projector.
"""

import re
from collections.abc import Mapping
from typing import Any

from tokalign_jax.errors import UserError

MODEL_TYPES = ("gemma3", "llava", "llava_next", "mistral3")

ARCHITECTURES = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""Class of the text model, by its model_type."""

_PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}
"""Of the text model's weights -> as its own class has them; older and newer spelling."""

_OTHERS = r"^(model\.)?(vision_tower|multi_modal_projector|image_newline)\b"
"""What sees images."""


def text_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the text model alone.

    Raises:
      UserError: its family is not supported.
    """
    text = raw.get("text_config") or {}
    if text.get("model_type") not in ARCHITECTURES:
        raise UserError(
            f"the text model of this '{raw['model_type']}' model is of model_type {text.get('model_type')!r} (text_config "
            f"in its config.json), which is not supported: choose one whose text model is of one of "
            f"{', '.join(ARCHITECTURES)}"
        )
    from transformers import CONFIG_MAPPING  # Slow to import, and only needed here.

    # Files leave out what is the default of the text model's class, so that only the class can complete them.
    whole = CONFIG_MAPPING[text["model_type"]](**text).to_dict()
    above = {
        key: raw[key]
        for key in ("dtype", "torch_dtype", "tie_word_embeddings", "quantization_config")
        if key in raw
    }
    if {"dtype", "torch_dtype"} & set(above):
        whole = {key: value for key, value in whole.items() if key not in ("dtype", "torch_dtype")}
    return whole | above | {"architectures": [ARCHITECTURES[text["model_type"]]]}


def text_name(name: str) -> str | None:
    """What the text model's own checkpoint calls the tensor `name`; None: it sees images."""
    if re.search(_OTHERS, name):
        return None
    for prefix, ours in _PREFIXES.items():
        if name.startswith(prefix):
            return ours + name.removeprefix(prefix)
    return name
