"""SmolLM3: LLaMA in which every few layers have no rotary embedding, and these perhaps a window."""

from tokalign_jax.models.config import LayerKind, ModelConfig
from tokalign_jax.models.families import llama, reading
from tokalign_jax.models.families.reading import FULL, SLIDING, Raw, required

MODEL_TYPES = ("smollm3",)

BUFFERS, HEAD, weights = llama.BUFFERS, llama.HEAD, llama.weights


def config_from_hf(raw: Raw) -> ModelConfig:
    """The constants of a SmolLM3 model.

    `no_rope_layers` has a 1 for each layer with rotary embedding; without it every
    `no_rope_layer_interval`th has none. Without `layer_types` the layers without rotary embedding
    have the window if `use_sliding_window`. Files leave `tie_word_embeddings` out where it is on.

    Raises:
      UserError: a constant is missing, or a flag asks for what is not implemented.
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
    turns = raw.get("no_rope_layers") or [
        (layer + 1) % required(raw, "no_rope_layer_interval") != 0 for layer in range(layers)
    ]
    if len(turns) != layers:
        raise reading.refuse(raw, "no_rope_layers", f"one number for each of the {layers} layers")
    window = raw.get("sliding_window") if raw.get("use_sliding_window") else None
    types = reading.layer_types(
        raw, lambda layer: FULL if turns[layer] or window is None else SLIDING
    )
    if SLIDING in types and window is None:
        raise reading.refuse(
            raw, "layer_types", f"'{SLIDING}' only with use_sliding_window and sliding_window"
        )
    return tuple(
        LayerKind(rope if turned else None, window if kind == SLIDING else None)
        for turned, kind in zip(turns, types)
    )
