"""Hunyuan (dense): LLaMA with norms on rotated queries and keys."""

from tokalign_jax.models.config import LayerKind, ModelConfig
from tokalign_jax.models.families import llama, reading
from tokalign_jax.models.families.reading import Raw
from tokalign_jax.models.weights import Weight

MODEL_TYPES = ("hunyuan_v1_dense",)

BUFFERS, HEAD = llama.BUFFERS, llama.HEAD


def config_from_hf(raw: Raw) -> ModelConfig:
    """Reads the config of a Hunyuan model.

    Dynamic scaling with an `alpha` is another base, independent of the length of the text. The
    class always has norms of queries and keys; files with `use_qk_norm` set it to true.

    Raises:
      UserError: a constant is missing, or an option is not implemented.
    """
    reading.check_flags(raw, ("attention_bias", "use_qk_norm"))
    if raw.get("use_qk_norm") is False:
        raise reading.refuse(raw, "use_qk_norm", "True")
    bias = raw.get("attention_bias", False)
    return reading.decoder(
        raw,
        attention_bias=bias,
        attention_out_bias=bias,
        query_key_norm="head",
        rotate_before_norm=True,
        layer_kinds=reading.uniform_layers(raw, LayerKind(reading.rope(raw, alpha=True))),
    )


def weights(config: ModelConfig) -> list[Weight]:
    """Returns the weight table."""
    names = {
        "attention/q_norm": "self_attn.query_layernorm",
        "attention/k_norm": "self_attn.key_layernorm",
    }
    return llama.weights(config, names)
