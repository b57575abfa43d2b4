"""OLMo 1: LLaMA with layer norms without parameters, and clipped queries, keys and values.

OLMo 2 and 3 have norms after attention and feed-forward only, and norms on queries and keys over
all heads. OLMo 3 has layers with a window, whose rotary embedding is never scaled.
"""

from tokalign_jax.models.config import LayerKind, ModelConfig
from tokalign_jax.models.families import llama, reading
from tokalign_jax.models.families.reading import FULL, SLIDING, Raw, required

MODEL_TYPES = ("olmo", "olmo2", "olmo3")

BUFFERS, HEAD, weights = llama.BUFFERS, llama.HEAD, llama.weights


def config_from_hf(raw: Raw) -> ModelConfig:
    """Reads the config of an OLMo model.

    Without `layer_types`, every fourth layer of OLMo 3 has no window.

    Raises:
      UserError: a constant is missing, or an option is not implemented.
    """
    if raw["model_type"] == "olmo":
        return _olmo(raw)
    windows = ("layer_types", "sliding_window") if raw["model_type"] == "olmo3" else ()
    reading.check_flags(raw, ("attention_bias", *windows))
    bias = raw.get("attention_bias", False)
    return reading.decoder(
        raw,
        layer_kinds=_layer_kinds(raw)
        if windows
        else reading.uniform_layers(raw, LayerKind(reading.rope(raw))),
        attention_bias=bias,
        attention_out_bias=bias,
        norm_placement="after",
        query_key_norm="width",
    )


def _olmo(raw: Raw) -> ModelConfig:
    reading.check_flags(raw, ("attention_bias", "clip_qkv"))
    bias = raw.get("attention_bias", False)
    return reading.decoder(
        raw,
        attention_bias=bias,
        attention_out_bias=bias,
        norm="layer",
        norm_scale=False,
        norm_epsilon=1e-5,  # A constant in transformers.
        qkv_clip=raw.get("clip_qkv"),
    )


def _layer_kinds(raw: Raw) -> tuple[LayerKind, ...]:
    full = reading.rope_by_kind(raw, FULL) or reading.rope(raw)
    sliding = reading.rope_by_kind(raw, SLIDING) or reading.rope({**raw, "rope_scaling": None})
    kinds = {FULL: LayerKind(full), SLIDING: LayerKind(sliding, required(raw, "sliding_window"))}
    return tuple(
        kinds[kind]
        for kind in reading.layer_types(raw, lambda layer: SLIDING if (layer + 1) % 4 else FULL)
    )
