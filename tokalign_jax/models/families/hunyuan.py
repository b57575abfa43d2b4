"""Hunyuan (dense): LLaMA with norms on queries and keys after they are rotated."""

from tokalign_jax.models.config import LayerKind, ModelConfig
from tokalign_jax.models.families import llama, reading
from tokalign_jax.models.families.reading import Raw
from tokalign_jax.models.weights import Weight

MODEL_TYPES = ("hunyuan_v1_dense",)

BUFFERS, HEAD = llama.BUFFERS, llama.HEAD


def config_from_hf(raw: Raw) -> ModelConfig:
    """The constants of a Hunyuan model.

    Dynamic scaling with an `alpha` is another base, whatever the length of the text. The class
    has no key for its norms of queries and keys; files that have `use_qk_norm` have it on.

    Raises:
      UserError: a constant is missing, or a flag asks for what is not implemented.
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
        layer_kinds=reading.uniform(raw, LayerKind(reading.rope(raw, alpha=True))),
    )


def weights(config: ModelConfig) -> list[Weight]:
    """The weight table."""
    names = {
        "attention/q_norm": "self_attn.query_layernorm",
        "attention/k_norm": "self_attn.key_layernorm",
    }
    return llama.weights(config, names)
