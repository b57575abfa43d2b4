"""ERNIE 4.5 (dense) and Helium: LLaMA with interleaved rotary embedding."""

from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.families import llama, reading
from tokalign_jax.models.families.reading import Raw
from tokalign_jax.models.weights import Weight

MODEL_TYPES = ("ernie4_5", "helium")

BUFFERS, HEAD = llama.BUFFERS, llama.HEAD


def config_from_hf(raw: Raw) -> ModelConfig:
    """Reads the config of an ERNIE or Helium model.

    ERNIE's `tie_word_embeddings` defaults to true and its `use_bias` to false.

    Raises:
      UserError: a constant is missing, or an option is not implemented.
    """
    if raw["model_type"] == "helium":
        reading.check_flags(raw, ("attention_bias", "mlp_bias"))
        return reading.decoder(
            raw,
            attention_bias=raw.get("attention_bias", False),
            mlp_bias=raw.get("mlp_bias", False),
        )
    reading.check_flags(raw, ("use_bias",))
    bias = raw.get("use_bias", False)
    return reading.decoder(
        raw,
        attention_bias=bias,
        attention_out_bias=bias,
        mlp_bias=bias,
        tie_word_embeddings=raw.get("tie_word_embeddings", True),
    )


def weights(config: ModelConfig) -> list[Weight]:
    """Returns the weight table."""
    return llama.weights(config, order=llama.interleaved_order(config))
