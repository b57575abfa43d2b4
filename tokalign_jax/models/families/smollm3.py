"""SmolLM3: LLaMA with some layers without rotary embedding, which may have a window."""

from tokalign_jax.models.config import LayerKind, ModelConfig
from tokalign_jax.models.families import llama, reading
from tokalign_jax.models.families.reading import FULL, SLIDING, Raw, required

MODEL_TYPES = ("smollm3",)

BUFFERS, HEAD, weights = llama.BUFFERS, llama.HEAD, llama.weights


def config_from_hf(raw: Raw) -> ModelConfig:
    """Reads the config of a SmolLM3 model.

    `no_rope_layers` has a 1 for each layer with rotary embedding; without it every
    `no_rope_layer_interval`th layer has none. Without `layer_types`, layers without rotary
    embedding have the window if `use_sliding_window`. `tie_word_embeddings` defaults to true.

    Raises:
      UserError: a constant is missing, or an option is not implemented.
    """
    reading.check_flags(
        raw,
        (
            "attention_bias",
            "layer_types",
            "mlp_bias",
            "no_rope_layers",
            "sliding_window",
            "use_sliding_window",
        ),
    )
    bias = raw.get("attention_bias", False)
    return reading.decoder(
        raw,
        layer_kinds=_layer_kinds(raw),
        attention_bias=bias,
        attention_out_bias=bias,
        mlp_bias=raw.get("mlp_bias", False),
        tie_word_embeddings=raw.get("tie_word_embeddings", True),
    )


def _layer_kinds(raw: Raw) -> tuple[LayerKind, ...]:
    layers, rope = required(raw, "num_hidden_layers"), reading.rope(raw)
    has_rope = raw.get("no_rope_layers") or [
        (layer + 1) % required(raw, "no_rope_layer_interval") != 0 for layer in range(layers)
    ]
    if len(has_rope) != layers:
        raise reading.refuse(raw, "no_rope_layers", f"one number for each of the {layers} layers")
    window = raw.get("sliding_window") if raw.get("use_sliding_window") else None
    types = reading.layer_types(
        raw, lambda layer: FULL if has_rope[layer] or window is None else SLIDING
    )
    if SLIDING in types and window is None:
        raise reading.refuse(
            raw, "layer_types", f"'{SLIDING}' only with use_sliding_window and sliding_window"
        )
    return tuple(
        LayerKind(rope if rotated else None, window if kind == SLIDING else None)
        for rotated, kind in zip(has_rope, types)
    )
