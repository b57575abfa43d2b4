"""GPT-NeoX: Pythia and GPT-NeoX-20B."""

from collections.abc import Sequence

import numpy as np

from tokalign_jax.models.config import LayerKind, ModelConfig
from tokalign_jax.models.families import reading
from tokalign_jax.models.families.reading import Raw, required
from tokalign_jax.models.weights import Weight, direct, linear, norm

MODEL_TYPES = ("gpt_neox",)

BUFFERS = r"rotary_emb\.inv_freq$|attention\.(bias|masked_bias)$"
"""Tensors of old checkpoints that are not parameters."""


def config_from_hf(raw: Raw) -> ModelConfig:
    """Reads the config of a GPT-NeoX model.

    `use_parallel_residual` and `attention_bias` are newer than the format and default to true.

    Raises:
      UserError: a constant is missing, or an option is not implemented.
    """
    reading.check_flags(
        raw, ("attention_bias", "partial_rotary_factor", "rotary_pct", "use_parallel_residual")
    )
    rope_parameters = raw.get("rope_parameters") or {}
    attention_bias = raw.get("attention_bias", True)
    rope = reading.rope(
        raw,
        fraction=rope_parameters.get("partial_rotary_factor") or required(raw, "rotary_pct"),
        theta=None if "rope_theta" in rope_parameters else required(raw, "rotary_emb_base"),
    )
    return reading.decoder(
        raw,
        num_kv_heads=required(raw, "num_attention_heads"),
        gated_mlp=False,
        norm="layer",
        norm_bias=True,
        norm_epsilon=required(raw, "layer_norm_eps"),
        parallel_residual=raw.get("use_parallel_residual", True),
        attention_bias=attention_bias,
        attention_out_bias=attention_bias,
        mlp_bias=True,
        layer_kinds=reading.uniform_layers(raw, LayerKind(rope)),
    )


def weights(config: ModelConfig) -> list[Weight]:
    """Returns the weight table."""
    hf, ours = "gpt_neox.layers.{layer}", "layers"
    return [
        direct("gpt_neox.embed_in.weight", "embed_tokens/embedding"),
        *norm(f"{hf}.input_layernorm", f"{ours}/input_norm", bias=True),
        *_query_key_value(f"{hf}.attention.query_key_value", f"{ours}/attention", config),
        *linear(f"{hf}.attention.dense", f"{ours}/attention/o_proj", config.attention_out_bias),
        *norm(f"{hf}.post_attention_layernorm", f"{ours}/post_attention_norm", bias=True),
        *linear(f"{hf}.mlp.dense_h_to_4h", f"{ours}/mlp/up_proj", config.mlp_bias),
        *linear(f"{hf}.mlp.dense_4h_to_h", f"{ours}/mlp/down_proj", config.mlp_bias),
        *norm("gpt_neox.final_layer_norm", "final_norm", bias=True),
        *([] if config.tie_word_embeddings else [HEAD]),
    ]


HEAD = direct("embed_out.weight", "lm_head/kernel", aliases=("lm_head.weight",))


def _query_key_value(name: str, path: str, config: ModelConfig) -> list[Weight]:
    """Maps the fused projection, rows [head, query or key or value, H]."""
    heads, size = config.num_heads, config.head_dim

    def split(tensor: np.ndarray) -> list[np.ndarray]:
        parts = tensor.reshape(heads, 3, size, *tensor.shape[1:])
        return [parts[:, i].reshape(heads * size, *tensor.shape[1:]).T for i in range(3)]

    def join(leaves: Sequence[np.ndarray]) -> np.ndarray:
        parts = np.stack([leaf.T.reshape(heads, size, *leaf.shape[:-1]) for leaf in leaves], axis=1)
        return parts.reshape(3 * heads * size, *leaves[0].shape[:-1])

    suffixes = [("weight", "kernel"), *([("bias", "bias")] if config.attention_bias else [])]
    return [
        Weight(
            f"{name}.{theirs}",
            tuple(f"{path}/{p}/{ours}" for p in ("q_proj", "k_proj", "v_proj")),
            split,
            join,
        )
        for theirs, ours in suffixes
    ]
