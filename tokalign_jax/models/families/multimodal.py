"""Models of images and text whose text part is one of our families: it is taken alone, as a causal
LM.

Their config.json has the text model's under `text_config`, without what is the default of its
transformers class; their weights have the text model's behind a prefix. What is adapted and
exported is the text model: an ordinary checkpoint of its own class, without the image encoder and
the projector.
"""

import re
from collections.abc import Mapping
from typing import Any

from tokalign_jax.errors import UserError

MODEL_TYPES = (
    "gemma3",
    "idefics3",
    "internvl",
    "llava",
    "llava_next",
    "llava_onevision",
    "mistral3",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_vl",
    "smolvlm",
)


ARCHITECTURES = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
}
"""Class of the text model, by its model_type."""

_AS = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
"""Text models without a causal LM class of their own -> the same function on text.

Their rotary embedding has a position in time, height and width. In text all three are the same.
"""

_POSITIONS_IN_IMAGES = ("mrope_section", "mrope_interleaved")

_PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
    "model.text_model.": "model.",
}
"""Of the text model's weights -> as its own class has them; older and newer spelling."""

_OTHERS = (
    r"^(model\.)?"
    r"(vision_tower|vision_model|visual|multi_modal_projector|connector|image_newline|mlp1)\b"
)
"""What sees images."""


def text_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the text model alone.

    Raises:
      UserError: its family is not supported.
    """
    text = _with_class_of_its_own(raw)
    if text.get("model_type") not in ARCHITECTURES:
        raise UserError(
            f"the text model of this '{raw['model_type']}' model is of model_type"
            f" {text.get('model_type')!r} (text_config in its config.json), which is not supported:"
            f" choose one whose text model is of one of {', '.join(ARCHITECTURES)}"
        )
    from transformers import CONFIG_MAPPING  # Slow to import, and only needed here.

    # Files leave out what is the default of the text model's class, so that only the class can
    # complete them.
    whole = CONFIG_MAPPING[text["model_type"]](**text).to_dict()
    above = {
        key: raw[key]
        for key in ("dtype", "torch_dtype", "tie_word_embeddings", "quantization_config")
        if key in raw
    }
    if {"dtype", "torch_dtype"} & set(above):
        whole = {key: value for key, value in whole.items() if key not in ("dtype", "torch_dtype")}
    return whole | above | {"architectures": [ARCHITECTURES[text["model_type"]]]}


def _with_class_of_its_own(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`text_config` of a model_type that has a causal LM class."""
    text = dict(raw.get("text_config") or {})
    # The first files of Qwen's vision models have the text model's keys among their own.
    if not text and raw["model_type"] in ("qwen2_vl", "qwen2_5_vl"):
        text = {key: value for key, value in raw.items() if key not in _NOT_OF_TEXT}
        text["model_type"] = f"{raw['model_type']}_text"
    if text.get("model_type") not in _AS:
        return text
    text["model_type"] = _AS[text["model_type"]]
    for key in ("rope_parameters", "rope_scaling"):
        rotary = text.get(key)
        if not rotary:
            continue
        text[key] = {k: v for k, v in rotary.items() if k not in _POSITIONS_IN_IMAGES}
        for kind in ("rope_type", "type"):
            if text[key].get(kind) == "mrope":
                text[key][kind] = "default"
    return text


_NOT_OF_TEXT = ("architectures", "vision_config", "auto_map", "transformers_version")


def text_name(name: str) -> str | None:
    """What the text model's own checkpoint calls the tensor `name`; None: it sees images."""
    if re.search(_OTHERS, name):
        return None
    for prefix, ours in _PREFIXES.items():
        if name.startswith(prefix):
            return ours + name.removeprefix(prefix)
    return name
