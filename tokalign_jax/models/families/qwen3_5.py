"""Qwen 3.5 (text): three layers with a gated delta rule for each one with gated full attention."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tokalign_jax.models.config import DeltaRule, LayerKind, ModelConfig
from tokalign_jax.models.families import llama, reading
from tokalign_jax.models.families.llama import LAYER
from tokalign_jax.models.families.reading import FULL, Raw, required
from tokalign_jax.models.weights import Weight, direct, fused, linear

MODEL_TYPES = ("qwen3_5_text",)

BUFFERS, HEAD = llama.BUFFERS, llama.HEAD

LINEAR = "linear_attention"


def config_from_hf(raw: Raw) -> ModelConfig:
    """Reads the config of a Qwen 3.5 text model.

    Without `layer_types`, every `full_attention_interval`th layer (default 4) has attention;
    without `partial_rotary_factor`, a quarter of each head is rotated.

    Raises:
      UserError: a constant is missing, or an option is not implemented.
    """
    reading.check_flags(raw, ("attention_bias", "layer_types", "partial_rotary_factor"))
    bias = raw.get("attention_bias", False)
    return reading.decoder(
        raw,
        head_dim=required(raw, "head_dim"),
        attention_bias=bias,
        attention_out_bias=bias,
        attention_gate=True,
        layer_kinds=_layer_kinds(raw),
        norm_plus_one=True,
        query_key_norm="head",
        delta=DeltaRule(
            num_key_heads=required(raw, "linear_num_key_heads"),
            num_value_heads=required(raw, "linear_num_value_heads"),
            key_dim=required(raw, "linear_key_head_dim"),
            value_dim=required(raw, "linear_value_head_dim"),
            kernel_size=required(raw, "linear_conv_kernel_dim"),
        ),
    )


def _layer_kinds(raw: Raw) -> tuple[LayerKind, ...]:
    interval = raw.get("full_attention_interval") or 4

    def default(layer: int) -> str:
        return LINEAR if (layer + 1) % interval else FULL

    rope = reading.rope(raw, fraction=0.25)
    mixers: dict[str, Any] = {LINEAR: "delta", FULL: "attention"}
    return tuple(
        LayerKind(rope, mixer=mixers[kind])
        for kind in reading.layer_types(raw, default, (LINEAR, FULL))
    )


def weights(config: ModelConfig) -> list[Weight]:
    """Returns the weight table."""
    return [
        *llama.outer_weights(config),
        *llama.norms(config),
        *llama.mlp(config),
        *llama.restrict_to_mixer("attention", config, _attention(config)),
        *llama.restrict_to_mixer("delta", config, _delta(config)),
    ]


def _attention(config: ModelConfig) -> list[Weight]:
    """Returns the attention weights; queries and their gates are one tensor."""
    name = f"{LAYER}.self_attn.q_proj"
    others = [
        weight
        for weight in llama.attention(config)
        if weight.name not in (f"{name}.weight", f"{name}.bias")
    ]
    suffixes = [("weight", "kernel"), *([("bias", "bias")] if config.attention_bias else [])]
    return [
        *others,
        *(_queries_and_gates(f"{name}.{theirs}", ours, config) for theirs, ours in suffixes),
    ]


def _queries_and_gates(name: str, leaf: str, config: ModelConfig) -> Weight:
    """Maps the tensor of queries and gates, rows [head, query or gate, H]."""
    heads, size = config.num_heads, config.head_dim

    def split(tensor: np.ndarray) -> list[np.ndarray]:
        parts = tensor.reshape(heads, 2, size, *tensor.shape[1:])
        return [parts[:, i].reshape(heads * size, *tensor.shape[1:]).T for i in range(2)]

    def join(leaves: Sequence[np.ndarray]) -> np.ndarray:
        parts = np.stack([leaf.T.reshape(heads, size, *leaf.shape[:-1]) for leaf in leaves], axis=1)
        return parts.reshape(2 * heads * size, *leaves[0].shape[:-1])

    leaves = tuple(f"layers/attention/{part}_proj/{leaf}" for part in ("q", "gate"))
    return Weight(name, leaves, split, join)


def _delta(config: ModelConfig) -> list[Weight]:
    """Returns the delta rule weights.

    Queries, keys and values are one tensor, and so are the kernels of their convolutions.
    """
    assert config.delta is not None, "the config has no delta rule"
    theirs, ours, delta = f"{LAYER}.linear_attn", "layers/delta", config.delta
    keys, values = delta.num_key_heads * delta.key_dim, delta.num_value_heads * delta.value_dim
    ends = np.cumsum((keys, keys, values))[:-1]
    linears = {
        "in_proj_z": "gate_proj",
        "in_proj_b": "beta_proj",
        "in_proj_a": "decay_proj",
        "out_proj": "o_proj",
    }
    return [
        fused(
            f"{theirs}.in_proj_qkv.weight",
            [f"{ours}/{name}_proj/kernel" for name in "qkv"],
            (keys, keys, values),
            outputs=-2,
        ),
        Weight(
            f"{theirs}.conv1d.weight",
            tuple(f"{ours}/{name}_convolution/kernel" for name in "qkv"),
            lambda tensor: np.split(tensor[:, 0].T, ends, axis=-1),
            lambda leaves: np.concatenate(leaves, axis=-1).T[:, None],
        ),
        *(
            weight
            for name, path in linears.items()
            for weight in linear(f"{theirs}.{name}", f"{ours}/{path}", bias=False)
        ),
        direct(f"{theirs}.A_log", f"{ours}/log_decay"),
        direct(f"{theirs}.dt_bias", f"{ours}/decay_bias"),
        direct(f"{theirs}.norm.weight", f"{ours}/out_scale"),
    ]
