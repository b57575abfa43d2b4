"""Gemma 1, 2 and 3 (text): embeddings scaled by sqrt(D), norms that multiply by 1 + w.

Gemma 2 and 3 have norms before and after attention and feed-forward, and alternate between layers
with and without a window. Gemma 2 has soft-caps; Gemma 3 has norms on queries and keys, and another
rotary base in layers with a window.
"""

from typing import Any

from tokalign_jax.models.config import LayerKind, ModelConfig
from tokalign_jax.models.families import llama, reading
from tokalign_jax.models.families.reading import FULL, SLIDING, Raw, nullable, required

MODEL_TYPES = ("gemma", "gemma2", "gemma3_text")

BUFFERS, HEAD, weights = llama.BUFFERS, llama.HEAD, llama.weights


def config_from_hf(raw: Raw) -> ModelConfig:
    """Reads the config of a Gemma model.

    `tie_word_embeddings` defaults to true, the value of all releases. `attention_bias` is newer
    than the format and defaults to no biases. So is `layer_types`: without it every second layer of
    Gemma 2 has no window, and every `sliding_window_pattern`th of Gemma 3.

    Raises:
      UserError: a constant is missing, or an option is not implemented.
    """
    read = {"gemma": _gemma, "gemma2": _gemma2, "gemma3_text": _gemma3}[raw["model_type"]]
    hidden_size, bias = required(raw, "hidden_size"), raw.get("attention_bias", False)
    return reading.decoder(
        raw,
        head_dim=required(raw, "head_dim"),
        tie_word_embeddings=raw.get("tie_word_embeddings", True),
        norm_plus_one=True,
        embedding_scale=hidden_size**0.5,
        attention_bias=bias,
        attention_out_bias=bias,
        **read(raw),
    )


def _gemma(raw: Raw) -> dict[str, Any]:
    reading.check_flags(raw, ("attention_bias",))
    # The first files name "gelu", although the model was trained with the tanh approximation that
    # later files name.
    legacy = required(raw, "hidden_act") == "gelu" and raw.get("hidden_activation") in (
        None,
        "gelu_pytorch_tanh",
    )
    return {"activation": "gelu_tanh" if legacy else reading.activation(raw)}


def _gemma2(raw: Raw) -> dict[str, Any]:
    softcaps = ("attn_logit_softcapping", "final_logit_softcapping")
    reading.check_flags(
        raw, ("attention_bias", "layer_types", "query_pre_attn_scalar", "sliding_window", *softcaps)
    )
    rope, window = reading.rope(raw), required(raw, "sliding_window")
    types = reading.layer_types(raw, lambda layer: FULL if layer % 2 else SLIDING)
    return {
        **_shared_constants(raw),
        "layer_kinds": tuple(
            LayerKind(rope, window if kind == SLIDING else None) for kind in types
        ),
        "attention_softcap": nullable(raw, "attn_logit_softcapping"),
        "logit_softcap": nullable(raw, "final_logit_softcapping"),
    }


def _gemma3(raw: Raw) -> dict[str, Any]:
    reading.check_flags(
        raw,
        (
            "attention_bias",
            "final_logit_softcapping",
            "layer_types",
            "query_pre_attn_scalar",
            "sliding_window",
        ),
    )
    pattern = raw.get("sliding_window_pattern") or raw.get("_sliding_window_pattern")

    def default(layer: int) -> str:
        return (
            SLIDING if (layer + 1) % (pattern or required(raw, "sliding_window_pattern")) else FULL
        )

    kinds = {
        FULL: LayerKind(_rope(raw, FULL)),
        SLIDING: LayerKind(_rope(raw, SLIDING), required(raw, "sliding_window")),
    }
    return {
        **_shared_constants(raw),
        "layer_kinds": tuple(kinds[kind] for kind in reading.layer_types(raw, default)),
        "logit_softcap": raw.get("final_logit_softcapping"),
        "query_key_norm": "head",
    }


def _shared_constants(raw: Raw) -> dict[str, Any]:
    """Reads constants shared by Gemma 2 and 3; old files use the activation key of others."""
    key = "hidden_activation" if raw.get("hidden_activation") else "hidden_act"
    return {
        "activation": reading.activation(raw, key),
        "attention_scale": required(raw, "query_pre_attn_scalar") ** -0.5,
        "norm_placement": "both",
    }


def _rope(raw: Raw, kind: str):
    """Reads Gemma 3's rotary embedding of a layer type.

    Older files scale only that of layers without a window.
    """
    if rope := reading.rope_by_kind(raw, kind):
        return rope
    if kind == FULL:
        return reading.rope(raw)
    return reading.rope(
        {**raw, "rope_scaling": None, "rope_theta": required(raw, "rope_local_base_freq")}
    )
