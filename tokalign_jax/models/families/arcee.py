"""Arcee (AFM) and Nemotron: LLaMA with an ungated feed-forward and squared ReLU.

Nemotron has layer norms that multiply by 1 + w, and partial rotary embedding.
"""

from tokalign_jax.models.config import LayerKind, ModelConfig
from tokalign_jax.models.families import llama, reading
from tokalign_jax.models.families.reading import Raw, required

MODEL_TYPES = ("arcee", "nemotron")

BUFFERS, HEAD, weights = llama.BUFFERS, llama.HEAD, llama.weights


def config_from_hf(raw: Raw) -> ModelConfig:
    """Reads the config of an Arcee or Nemotron model.

    As in their classes, `attention_bias` and `mlp_bias` default to false and
    `partial_rotary_factor` (Nemotron) to 0.5.

    Raises:
      UserError: a constant is missing, or an option is not implemented.
    """
    is_nemotron = raw["model_type"] == "nemotron"
    flags = ("attention_bias", "mlp_bias")
    reading.check_flags(raw, (*flags, "partial_rotary_factor") if is_nemotron else flags)
    bias = raw.get("attention_bias", False)
    norm_constants = (
        {
            "norm": "layer",
            "norm_bias": True,
            "norm_plus_one": True,
            "norm_epsilon": required(raw, "norm_eps"),
        }
        if is_nemotron
        else {}
    )
    rope = reading.rope(raw, fraction=0.5 if is_nemotron else None)
    return reading.decoder(
        raw,
        attention_bias=bias,
        attention_out_bias=bias,
        mlp_bias=raw.get("mlp_bias", False),
        gated_mlp=False,
        layer_kinds=reading.uniform_layers(raw, LayerKind(rope)),
        **norm_constants,
    )
