"""LLaMA 1 to 3, and whatever else calls itself `llama` (SmolLM 1 and 2, TinyLlama, Yi, DeepSeek's small ones ...)."""

from tokalign_jax.models.config import LayerKind, ModelConfig
from tokalign_jax.models.families import reading
from tokalign_jax.models.families.reading import Raw
from tokalign_jax.models.weights import Weight, linear, norm, same

MODEL_TYPES = ("llama",)

BUFFERS = r"rotary_emb\.inv_freq$"
"""Tensors in old checkpoints that hold no parameters."""


def config_from_hf(raw: Raw) -> ModelConfig:
    """The constants of a LLaMA model.

    Where keys that are younger than the format (head_dim, num_key_value_heads, rope_theta, the biases) are absent, the
    value is the one that the code of that time had built in.

    Raises:
      UserError: a constant is missing, or a flag asks for what is not implemented.
    """
    reading.check_flags(raw, ("attention_bias", "mlp_bias", "partial_rotary_factor"))
    attention_bias = raw.get("attention_bias", False)
    return reading.decoder(
        raw,
        attention_bias=attention_bias,
        attention_out_bias=attention_bias,
        mlp_bias=raw.get("mlp_bias", False),
        layer_kinds=reading.uniform(raw, LayerKind(reading.rope(raw, theta=10000.0))),
    )


def weights(config: ModelConfig) -> list[Weight]:
    """The weight table, under the names that most families took over; the config says which of them there are."""
    return [*ends(config), *norms(config), *attention(config), *mlp(config)]


HEAD = same("lm_head.weight", "lm_head/kernel")

LAYER = "model.layers.{layer}"


def ends(config: ModelConfig) -> list[Weight]:
    """All that is not of a layer."""
    return [
        same("model.embed_tokens.weight", "embed_tokens/embedding"),
        *norm("model.norm", "final_norm", config.norm == "layer"),
        *([] if config.tie_word_embeddings else [HEAD]),
    ]


def attention(config: ModelConfig) -> list[Weight]:
    biases = dict.fromkeys(("q_proj", "k_proj", "v_proj"), config.attention_bias)
    projections = biases | {"o_proj": config.attention_out_bias}
    normed = ("q_norm", "k_norm") if config.query_key_norm in ("head", "width") else ()
    return [
        *(
            weight
            for name, bias in projections.items()
            for weight in linear(f"{LAYER}.self_attn.{name}", f"layers/attention/{name}", bias)
        ),
        *(
            weight
            for name in normed
            for weight in norm(f"{LAYER}.self_attn.{name}", f"layers/attention/{name}", False)
        ),
    ]


def norms(config: ModelConfig) -> list[Weight]:
    """Those of the layers. A norm after attention alone has the name that otherwise the one before the MLP has."""
    names = {
        "before": {
            "input_layernorm": "input_norm",
            "post_attention_layernorm": "post_attention_norm",
        },
        "after": {
            "post_attention_layernorm": "attention_out_norm",
            "post_feedforward_layernorm": "mlp_out_norm",
        },
        "both": {
            "input_layernorm": "input_norm",
            "post_attention_layernorm": "attention_out_norm",
            "pre_feedforward_layernorm": "post_attention_norm",
            "post_feedforward_layernorm": "mlp_out_norm",
        },
    }[config.norm_placement]
    return [
        weight
        for theirs, ours in names.items()
        if not (config.shared_norm and ours == "post_attention_norm")
        for weight in norm(f"{LAYER}.{theirs}", f"layers/{ours}", config.norm == "layer")
    ]


def mlp(config: ModelConfig) -> list[Weight]:
    return [
        weight
        for name in ("gate_proj", "up_proj", "down_proj")
        for weight in linear(f"{LAYER}.mlp.{name}", f"layers/mlp/{name}", config.mlp_bias)
    ]
