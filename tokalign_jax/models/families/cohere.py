"""Cohere's Command and Aya: parallel layers with one norm, scaled logits, interleaved rotation.

Cohere 2 (Command R7B, Command A) has layers with windows, and the others no rotary embedding.
"""

from tokalign_jax.models.config import LayerKind, ModelConfig
from tokalign_jax.models.families import llama, reading
from tokalign_jax.models.families.reading import FULL, SLIDING, Raw, required
from tokalign_jax.models.weights import Weight

MODEL_TYPES = ("cohere", "cohere2")

BUFFERS, HEAD = llama.BUFFERS, llama.HEAD


def config_from_hf(raw: Raw) -> ModelConfig:
    """Reads the config of a Cohere model.

    `tie_word_embeddings` defaults to true. Without `layer_types`, every `sliding_window_pattern`th
    layer of Cohere 2 has no window.

    Raises:
      UserError: a constant is missing, or an option is not implemented.
    """
    is_cohere2 = raw["model_type"] == "cohere2"
    flags = ("layer_types", "sliding_window") if is_cohere2 else ("use_qk_norm",)
    reading.check_flags(raw, ("attention_bias", "logit_scale", *flags))
    bias = raw.get("attention_bias", False)
    return reading.decoder(
        raw,
        layer_kinds=_layer_kinds(raw)
        if is_cohere2
        else reading.uniform_layers(raw, LayerKind(reading.rope(raw))),
        norm="layer",
        norm_epsilon=required(raw, "layer_norm_eps"),
        parallel_residual=True,
        shared_norm=True,
        attention_bias=bias,
        attention_out_bias=bias,
        query_key_norm="each_head" if raw.get("use_qk_norm") else None,
        output_scale=float(required(raw, "logit_scale")),
        tie_word_embeddings=raw.get("tie_word_embeddings", True),
    )


def _layer_kinds(raw: Raw) -> tuple[LayerKind, ...]:
    def default(layer: int) -> str:
        return SLIDING if (layer + 1) % required(raw, "sliding_window_pattern") else FULL

    kinds = {
        SLIDING: LayerKind(reading.rope(raw), required(raw, "sliding_window")),
        FULL: LayerKind(None),
    }
    return tuple(kinds[kind] for kind in reading.layer_types(raw, default))


def weights(config: ModelConfig) -> list[Weight]:
    """Returns the weight table."""
    return llama.weights(config, order=llama.interleaved_order(config))
