"""GPT-NeoX: Pythia and GPT-NeoX-20B."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.families import reading
from tokalign_jax.models.families.reading import required
from tokalign_jax.models.weights import Weight, linear, norm, same

MODEL_TYPE = "gpt_neox"

BUFFERS = r"rotary_emb\.inv_freq$|attention\.(bias|masked_bias)$"
"""Tensors in old checkpoints that hold no parameters."""


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """The constants of a GPT-NeoX model.

    `use_parallel_residual` and `attention_bias` are younger than the format: older files mean that they are on.

    Raises:
      UserError: a constant is missing, or a flag asks for what is not implemented.
    """
    reading.check_unquantized(raw)
    rope = reading.rope_parameters(raw)
    hidden_size, num_heads = required(raw, "hidden_size"), required(raw, "num_attention_heads")
    head_dim = hidden_size // num_heads
    fraction = rope.get("partial_rotary_factor") or required(raw, "rotary_pct")
    attention_bias = raw.get("attention_bias", True)
    return ModelConfig(
        model_type=MODEL_TYPE,
        vocab_size=required(raw, "vocab_size"),
        hidden_size=hidden_size,
        num_layers=required(raw, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        intermediate_size=required(raw, "intermediate_size"),
        activation=reading.activation(raw),
        gated_mlp=False,
        norm="layer",
        norm_epsilon=required(raw, "layer_norm_eps"),
        parallel_residual=raw.get("use_parallel_residual", True),
        attention_bias=attention_bias,
        attention_out_bias=attention_bias,
        mlp_bias=True,
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        max_positions=required(raw, "max_position_embeddings"),
        rotary_dim=int(head_dim * fraction),
        rope_theta=float(rope.get("rope_theta") or required(raw, "rotary_emb_base")),
        rope_scaling=reading.rope_scaling(raw),
    )


def weights(config: ModelConfig) -> list[Weight]:
    """The weight table."""
    hf, ours = "gpt_neox.layers.{layer}", "layers"
    return [
        same("gpt_neox.embed_in.weight", "embed_tokens/embedding"),
        *norm(f"{hf}.input_layernorm", f"{ours}/input_norm", bias=True),
        *_query_key_value(f"{hf}.attention.query_key_value", f"{ours}/attention", config),
        *linear(f"{hf}.attention.dense", f"{ours}/attention/o_proj", config.attention_out_bias),
        *norm(f"{hf}.post_attention_layernorm", f"{ours}/post_attention_norm", bias=True),
        *linear(f"{hf}.mlp.dense_h_to_4h", f"{ours}/mlp/up_proj", config.mlp_bias),
        *linear(f"{hf}.mlp.dense_4h_to_h", f"{ours}/mlp/down_proj", config.mlp_bias),
        *norm("gpt_neox.final_layer_norm", "final_norm", bias=True),
        *([] if config.tie_word_embeddings else [HEAD]),
    ]


HEAD = same("embed_out.weight", "lm_head/kernel", aliases=("lm_head.weight",))


def _query_key_value(name: str, path: str, config: ModelConfig) -> list[Weight]:
    """The fused projection: its rows run over heads, then over query, key and value, then over H."""
    heads, size = config.num_heads, config.head_dim

    def split(tensor: np.ndarray) -> list[np.ndarray]:
        parts = tensor.reshape(heads, 3, size, *tensor.shape[1:])
        return [parts[:, i].reshape(heads * size, *tensor.shape[1:]).T for i in range(3)]

    def join(leaves: Sequence[np.ndarray]) -> np.ndarray:
        parts = np.stack([leaf.T.reshape(heads, size, *leaf.shape[:-1]) for leaf in leaves], axis=1)
        return parts.reshape(3 * heads * size, *leaves[0].shape[:-1])

    suffixes = [("weight", "kernel"), *([("bias", "bias")] if config.attention_bias else [])]
    return [
        Weight(f"{name}.{theirs}", tuple(f"{path}/{p}/{ours}" for p in ("q_proj", "k_proj", "v_proj")), split, join)
        for theirs, ours in suffixes
    ]
