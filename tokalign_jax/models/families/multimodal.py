"""Multimodal models whose text model is of a supported family and is used alone, as a causal LM.

Their config.json has the text model's under `text_config`, without the defaults of its transformers
class; their weights have the text model's behind a prefix. Only the text model is adapted and
exported, as an ordinary checkpoint of its own class without image encoder and projector.
"""

import re
from collections.abc import Mapping
from typing import Any

from tokalign_jax.errors import UserError

MODEL_TYPES = (
    "gemma3",
    "idefics3",
    "internvl",
    "llama4",
    "llava",
    "llava_next",
    "llava_onevision",
    "mistral3",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_vl",
    "smolvlm",
)


ARCHITECTURES = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "llama4_text": "Llama4ForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
}
"""Class of the text model by its model_type."""

_CAUSAL_LM_TYPES = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
"""Text model types without a causal LM class -> types that compute the same function on text.

Their rotary embedding has positions in time, height and width, which are equal in text.
"""

_MROPE_KEYS = ("mrope_section", "mrope_interleaved")

_PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
    "model.text_model.": "model.",
}
"""Prefixes of the text model's weights -> prefixes in its own class; older and newer format."""

_NON_TEXT = (
    r"^(model\.)?"
    r"(vision_tower|vision_model|visual|multi_modal_projector|connector|image_newline|mlp1)\b"
)
"""Regular expression for the weights of the image encoder and projector."""


def text_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config.json of the text model.

    Raises:
      UserError: its family is not supported.
    """
    text = _causal_lm_config(raw)
    if text.get("model_type") not in ARCHITECTURES:
        raise UserError(
            f"the text model of this '{raw['model_type']}' model is of model_type"
            f" {text.get('model_type')!r} (text_config in its config.json), which is not supported:"
            f" choose a model whose text model is one of {', '.join(ARCHITECTURES)}"
        )
    from transformers import CONFIG_MAPPING  # Slow to import, and only needed here.

    # Files omit the defaults of the text model's class, so only the class can complete them.
    text_values = CONFIG_MAPPING[text["model_type"]](**text).to_dict()
    outer_values = {
        key: raw[key]
        for key in (
            "dtype",
            "torch_dtype",
            "tie_word_embeddings",
            "quantization_config",
            "eos_token_id",  # A list that includes the end of a turn, unlike the text model's.
        )
        if raw.get(key) is not None
    }
    dtype_keys = {"dtype", "torch_dtype"}
    if dtype_keys & set(outer_values):
        text_values = {key: value for key, value in text_values.items() if key not in dtype_keys}
    architectures = {"architectures": [ARCHITECTURES[text["model_type"]]]}
    return text_values | outer_values | architectures


def _causal_lm_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `text_config`, rewritten to a model_type that has a causal LM class."""
    text = dict(raw.get("text_config") or {})
    # The first config files of Qwen's vision models have the text model's keys at the top level.
    if not text and raw["model_type"] in ("qwen2_vl", "qwen2_5_vl"):
        text = {key: value for key, value in raw.items() if key not in _NON_TEXT_KEYS}
        text["model_type"] = f"{raw['model_type']}_text"
    if text.get("model_type") not in _CAUSAL_LM_TYPES:
        return text
    text["model_type"] = _CAUSAL_LM_TYPES[text["model_type"]]
    for key in ("rope_parameters", "rope_scaling"):
        rotary = text.get(key)
        if not rotary:
            continue
        text[key] = {k: v for k, v in rotary.items() if k not in _MROPE_KEYS}
        for kind in ("rope_type", "type"):
            if text[key].get(kind) == "mrope":
                text[key][kind] = "default"
    return text


_NON_TEXT_KEYS = ("architectures", "vision_config", "auto_map", "transformers_version")


def text_name(name: str) -> str | None:
    """Returns a tensor's name in the text model's own checkpoint; None if it is not part of it."""
    if re.search(_NON_TEXT, name):
        return None
    for prefix, own_prefix in _PREFIXES.items():
        if name.startswith(prefix):
            return own_prefix + name.removeprefix(prefix)
    return name
