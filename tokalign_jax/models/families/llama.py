"""LLaMA 1 to 3, and whatever else calls itself `llama` (SmolLM, TinyLlama, ...)."""

from collections.abc import Mapping
from typing import Any

from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.families import reading
from tokalign_jax.models.families.reading import required
from tokalign_jax.models.weights import Weight, linear, norm, same

MODEL_TYPE = "llama"

BUFFERS = r"rotary_emb\.inv_freq$"
"""Tensors in old checkpoints that hold no parameters."""


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """The constants of a LLaMA model.

    Where keys that are younger than the format (head_dim, num_key_value_heads, rope_theta, the biases) are absent, the
    value is the one that the code of that time had built in.

    Raises:
      UserError: a constant is missing, or a flag asks for what is not implemented.
    """
    reading.check_unquantized(raw)
    rope = reading.rope_parameters(raw)
    # transformers ignores this key here or fails on it, depending on the kind of scaling.
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor")) not in (None, 1.0):
        raise reading.refuse({**raw, **rope}, "partial_rotary_factor", "1.0")
    hidden_size, num_heads = required(raw, "hidden_size"), required(raw, "num_attention_heads")
    head_dim = raw.get("head_dim") or hidden_size // num_heads
    attention_bias = raw.get("attention_bias", False)
    return ModelConfig(
        model_type=MODEL_TYPE,
        vocab_size=required(raw, "vocab_size"),
        hidden_size=hidden_size,
        num_layers=required(raw, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=raw.get("num_key_value_heads") or num_heads,
        head_dim=head_dim,
        intermediate_size=required(raw, "intermediate_size"),
        activation=reading.activation(raw),
        gated_mlp=True,
        norm="rms",
        norm_epsilon=required(raw, "rms_norm_eps"),
        parallel_residual=False,
        attention_bias=attention_bias,
        attention_out_bias=attention_bias,
        mlp_bias=raw.get("mlp_bias", False),
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        max_positions=required(raw, "max_position_embeddings"),
        rotary_dim=head_dim,
        rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10000.0))),
        rope_scaling=reading.rope_scaling(raw),
    )


def weights(config: ModelConfig) -> list[Weight]:
    """The weight table."""
    hf, ours = "model.layers.{layer}", "layers"
    attention = [
        weight
        for name, bias in (
            ("q_proj", config.attention_bias),
            ("k_proj", config.attention_bias),
            ("v_proj", config.attention_bias),
            ("o_proj", config.attention_out_bias),
        )
        for weight in linear(f"{hf}.self_attn.{name}", f"{ours}/attention/{name}", bias)
    ]
    mlp = [
        weight
        for name in ("gate_proj", "up_proj", "down_proj")
        for weight in linear(f"{hf}.mlp.{name}", f"{ours}/mlp/{name}", config.mlp_bias)
    ]
    return [
        same("model.embed_tokens.weight", "embed_tokens/embedding"),
        *norm(f"{hf}.input_layernorm", f"{ours}/input_norm", bias=False),
        *attention,
        *norm(f"{hf}.post_attention_layernorm", f"{ours}/post_attention_norm", bias=False),
        *mlp,
        *norm("model.norm", "final_norm", bias=False),
        *([] if config.tie_word_embeddings else [HEAD]),
    ]


HEAD = same("lm_head.weight", "lm_head/kernel")
