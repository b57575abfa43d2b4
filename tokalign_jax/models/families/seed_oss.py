"""Seed-OSS: LLaMA with biases on queries, keys and values."""

from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.families import llama, reading
from tokalign_jax.models.families.reading import Raw, required

MODEL_TYPES = ("seed_oss",)

BUFFERS, HEAD, weights = llama.BUFFERS, llama.HEAD, llama.weights


def config_from_hf(raw: Raw) -> ModelConfig:
    """Reads the config of a Seed-OSS model.

    Raises:
      UserError: a constant is missing, or an option is not implemented.
    """
    reading.check_flags(raw, ("attention_bias", "attention_out_bias", "mlp_bias"))
    return reading.decoder(
        raw,
        attention_bias=required(raw, "attention_bias"),
        attention_out_bias=required(raw, "attention_out_bias"),
        mlp_bias=raw.get("mlp_bias", False),
    )
