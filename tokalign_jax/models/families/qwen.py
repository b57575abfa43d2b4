"""Qwen 2 and 2.5, LLaMA with biases on queries, keys and values, and Qwen 3, with norms on queries and keys instead."""

from tokalign_jax.models.config import LayerKind, ModelConfig
from tokalign_jax.models.families import llama, reading
from tokalign_jax.models.families.reading import FULL, SLIDING, Raw, required

MODEL_TYPES = ("qwen2", "qwen3")

BUFFERS, HEAD, weights = llama.BUFFERS, llama.HEAD, llama.weights


def config_from_hf(raw: Raw) -> ModelConfig:
    """The constants of a Qwen model.

    `layer_types` and `attention_bias` (Qwen 3) are younger than the format: without the first, layers from
    `max_window_layers` on have the window if `use_sliding_window`; without the second there are no biases.

    Raises:
      UserError: a constant is missing, or a flag asks for what is not implemented.
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
        return reading.uniform(raw, LayerKind(rope))
    window = required(raw, "sliding_window")

    def default(layer: int) -> str:
        return SLIDING if layer >= required(raw, "max_window_layers") else FULL

    return tuple(LayerKind(rope, window if kind == SLIDING else None) for kind in reading.layer_types(raw, default))
