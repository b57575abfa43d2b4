"""Qwen 2 and 2.5 (LLaMA with biases on q, k and v) and Qwen 3 (norms on queries and keys)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from tokalign_jax.models.config import LayerKind, ModelConfig
from tokalign_jax.models.families import llama, reading
from tokalign_jax.models.families.reading import FULL, SLIDING, Raw, required

MODEL_TYPES = ("qwen2", "qwen3")

Read = Callable[..., np.ndarray]
"""(path, *index) -> the slice of a parameter in host memory."""

BUFFERS, HEAD, weights = llama.BUFFERS, llama.HEAD, llama.weights


def config_from_hf(raw: Raw) -> ModelConfig:
    """Reads the config of a Qwen model.

    `layer_types` and `attention_bias` (Qwen 3) are newer than the format. Without the first, layers
    from `max_window_layers` on have the window if `use_sliding_window`; without the second, there
    are no biases.

    Raises:
      UserError: a constant is missing, or an option is not implemented.
    """
    windows = ("use_sliding_window", "sliding_window", "layer_types")
    if raw["model_type"] == "qwen2":
        reading.check_flags(raw, windows)
        return reading.decoder(raw, layer_kinds=_layer_kinds(raw), attention_bias=True)
    reading.check_flags(raw, (*windows, "attention_bias"))
    bias = raw.get("attention_bias", False)
    return reading.decoder(
        raw,
        head_dim=required(raw, "head_dim"),
        layer_kinds=_layer_kinds(raw),
        attention_bias=bias,
        attention_out_bias=bias,
        query_key_norm="head",
    )


def _layer_kinds(raw: Raw) -> tuple[LayerKind, ...]:
    rope = reading.rope(raw)
    if not raw.get("use_sliding_window"):
        if SLIDING in (raw.get("layer_types") or ()):
            raise reading.refuse(raw, "layer_types", f"only '{FULL}' without use_sliding_window")
        return reading.uniform_layers(raw, LayerKind(rope))
    window = required(raw, "sliding_window")

    def default(layer: int) -> str:
        return SLIDING if layer >= required(raw, "max_window_layers") else FULL

    return tuple(
        LayerKind(rope, window if kind == SLIDING else None)
        for kind in reading.layer_types(raw, default)
    )


def is_llama(config: ModelConfig) -> bool:
    """Tells if `as_llama` can convert the model: Qwen 2 without a sliding window."""
    return config.model_type == "qwen2" and all(kind.window is None for kind in config.layer_kinds)


def as_llama(config: ModelConfig, read: Read, raw: Raw) -> tuple[ModelConfig, Read, dict[str, Any]]:
    """Converts a Qwen 2 model (`is_llama`) to an equivalent one of model_type `llama`.

    LLaMA with `attention_bias` has the biases of Qwen 2 and another on o_proj, set to zero here.

    Args:
      config: the model's config.
      read: reads its parameters, as for `huggingface.write_weights`.
      raw: its config.json.

    Returns:
      The new config, reader and config.json.
    """
    bias = np.zeros((config.num_layers, config.hidden_size), np.float32)

    def read_with_bias(path: str, *index: int | slice) -> np.ndarray:
        return bias[index] if path == "layers/attention/o_proj/bias" else read(path, *index)

    old_keys = {key: value for key, value in raw.items() if key not in _WINDOW_KEYS}
    new_keys = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": True,
        "mlp_bias": False,
        "head_dim": config.head_dim,
    }
    llama_config = dataclasses.replace(config, model_type="llama", attention_out_bias=True)
    return llama_config, read_with_bias, old_keys | new_keys


_WINDOW_KEYS = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
