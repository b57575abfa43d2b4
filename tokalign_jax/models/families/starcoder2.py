"""StarCoder 2: layer norms, biases, ungated feed-forward, and a window."""

from tokalign_jax.models.config import LayerKind, ModelConfig
from tokalign_jax.models.families import llama, reading
from tokalign_jax.models.families.reading import Raw, nullable, required
from tokalign_jax.models.weights import Weight

MODEL_TYPES = ("starcoder2",)

BUFFERS, HEAD = llama.BUFFERS, llama.HEAD


def config_from_hf(raw: Raw) -> ModelConfig:
    """Reads the config of a StarCoder 2 model; `tie_word_embeddings` defaults to true.

    Raises:
      UserError: a constant is missing, or an option is not implemented.
    """
    reading.check_flags(raw, ("sliding_window", "use_bias"))
    bias = required(raw, "use_bias")
    kind = LayerKind(reading.rope(raw), nullable(raw, "sliding_window"))
    return reading.decoder(
        raw,
        layer_kinds=reading.uniform_layers(raw, kind),
        norm="layer",
        norm_bias=True,
        norm_epsilon=required(raw, "norm_epsilon"),
        gated_mlp=False,
        attention_bias=bias,
        attention_out_bias=bias,
        mlp_bias=bias,
        tie_word_embeddings=raw.get("tie_word_embeddings", True),
    )


def weights(config: ModelConfig) -> list[Weight]:
    """Returns the weight table."""
    return llama.weights(config, {"mlp/up_proj": "mlp.c_fc", "mlp/down_proj": "mlp.c_proj"})
