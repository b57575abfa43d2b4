"""Granite 3: LLaMA with a multiplier for embedding, attention, residual stream and logits each."""

from tokalign_jax.models.config import LayerKind, ModelConfig
from tokalign_jax.models.families import llama, reading
from tokalign_jax.models.families.reading import Raw, required

MODEL_TYPES = ("granite",)

BUFFERS, HEAD, weights = llama.BUFFERS, llama.HEAD, llama.weights


def config_from_hf(raw: Raw) -> ModelConfig:
    """The constants of a Granite model.

    Raises:
      UserError: a constant is missing, or a flag asks for what is not implemented.
    """
    multipliers = (
        "attention_multiplier",
        "embedding_multiplier",
        "logits_scaling",
        "residual_multiplier",
    )
    reading.check_flags(raw, ("attention_bias", "mlp_bias", *multipliers))
    bias = raw.get("attention_bias", False)
    return reading.decoder(
        raw,
        layer_kinds=reading.uniform(raw, LayerKind(reading.rope(raw))),
        attention_bias=bias,
        attention_out_bias=bias,
        mlp_bias=raw.get("mlp_bias", False),
        attention_scale=float(required(raw, "attention_multiplier")),
        embedding_scale=float(required(raw, "embedding_multiplier")),
        residual_scale=float(required(raw, "residual_multiplier")),
        output_scale=1 / required(raw, "logits_scaling"),
    )
