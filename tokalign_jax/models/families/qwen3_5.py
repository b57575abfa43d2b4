"""Qwen 3.5 (text) and Qwen3-Next: three layers with a gated delta rule per layer with attention.

The mixtures among them (`qwen3_5_moe_text`, `qwen3_next`) have experts in every layer.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tokalign_jax.models.config import DeltaRule, Experts, LayerKind, ModelConfig
from tokalign_jax.models.families import llama, mixture, reading
from tokalign_jax.models.families.llama import LAYER
from tokalign_jax.models.families.reading import FULL, Raw, required
from tokalign_jax.models.weights import Weight, direct, fused, linear

MODEL_TYPES = ("qwen3_5_moe_text", "qwen3_5_text", "qwen3_next")

BUFFERS, HEAD = rf"{llama.BUFFERS}|^mtp\.", llama.HEAD
"""Besides buffers, the layers for multi-token prediction, which transformers does not read either.
"""

LINEAR = "linear_attention"


def config_from_hf(raw: Raw) -> ModelConfig:
    """Reads the config of a Qwen 3.5 text model or a Qwen3-Next model.

    Without `layer_types`, every `full_attention_interval`th layer (default 4) has attention;
    without `partial_rotary_factor`, a quarter of each head is rotated.

    Raises:
      UserError: a constant is missing, or an option is not implemented.
    """
    implemented = ["attention_bias", "layer_types", "partial_rotary_factor"]
    mixture_constants: dict[str, Any] = {}
    if raw["model_type"] != "qwen3_5_text":
        implemented.append("num_experts")
        mixture.check_all_layers_have_experts(raw)
        mixture_constants = {
            "intermediate_size": required(raw, "moe_intermediate_size"),
            "experts": _experts(raw),
        }
    reading.check_flags(raw, implemented)
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
        **mixture_constants,
    )


def _experts(raw: Raw) -> Experts:
    """Reads the mixture; only Qwen3-Next can leave weights of the chosen experts unnormalized."""
    normalized = raw["model_type"] != "qwen3_next" or reading.nullable(raw, "norm_topk_prob")
    return Experts(
        required(raw, "num_experts"),
        required(raw, "num_experts_per_tok"),
        normalized,
        shared_size=required(raw, "shared_expert_intermediate_size"),
        shared_gate=True,
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
    """Returns the weight table, of mixtures with a tensor per expert."""
    feed_forward = mixture.feed_forward(config) if config.experts else llama.mlp(config)
    return [*_common(config), *feed_forward]


def packed_weights(config: ModelConfig) -> list[Weight]:
    """Returns the weight table of mixtures with all experts of a layer in one tensor."""
    return [*_common(config), *mixture.packed_feed_forward(config)]


def _common(config: ModelConfig) -> list[Weight]:
    delta = _mixed_delta(config) if config.model_type == "qwen3_next" else _delta(config)
    return [
        *llama.outer_weights(config),
        *llama.norms(config),
        *llama.restrict_to_part("attention", config, _attention(config)),
        *llama.restrict_to_part("delta", config, [*delta, *_delta_rest(config)]),
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
    """Returns Qwen 3.5's projections of the delta rule; queries, keys and values are one tensor."""
    theirs, ours = f"{LAYER}.linear_attn", "layers/delta"
    linears = {"in_proj_z": "gate_proj", "in_proj_b": "beta_proj", "in_proj_a": "decay_proj"}
    return [
        fused(
            f"{theirs}.in_proj_qkv.weight",
            [f"{ours}/{name}_proj/kernel" for name in "qkv"],
            _sizes(config),
            outputs=-2,
        ),
        *(
            weight
            for name, path in linears.items()
            for weight in linear(f"{theirs}.{name}", f"{ours}/{path}", bias=False)
        ),
    ]


def _mixed_delta(config: ModelConfig) -> list[Weight]:
    """Returns Qwen3-Next's projections of the delta rule, two tensors ordered by key head."""
    assert config.delta is not None, "the config has no delta rule"
    delta = config.delta
    values = delta.num_value_heads // delta.num_key_heads
    sizes = {
        "qkvz": (delta.key_dim, delta.key_dim, *(values * delta.value_dim,) * 2),
        "ba": (values, values),
    }
    names = {"qkvz": ("q", "k", "v", "gate"), "ba": ("beta", "decay")}
    return [
        _by_key_head(
            f"{LAYER}.linear_attn.in_proj_{part}.weight",
            [f"layers/delta/{name}_proj/kernel" for name in names[part]],
            part_sizes,
            delta.num_key_heads,
        )
        for part, part_sizes in sizes.items()
    ]


def _by_key_head(name: str, leaves: Sequence[str], sizes: Sequence[int], key_heads: int) -> Weight:
    """Maps a tensor whose rows are, for each key head, `sizes` rows of each projection."""
    ends = np.cumsum(sizes)[:-1]

    def split(tensor: np.ndarray) -> list[np.ndarray]:
        parts = np.split(tensor.reshape(key_heads, sum(sizes), -1), ends, axis=1)
        return [part.reshape(-1, part.shape[-1]).T for part in parts]

    def join(leaves: Sequence[np.ndarray]) -> np.ndarray:
        parts = [leaf.T.reshape(key_heads, -1, leaf.shape[0]) for leaf in leaves]
        joined = np.concatenate(parts, axis=1)
        return joined.reshape(-1, joined.shape[-1])

    return Weight(name, tuple(leaves), split, join)


def _delta_rest(config: ModelConfig) -> list[Weight]:
    """Returns the other weights of the delta rule; kernels of its convolutions are one tensor."""
    theirs, ours = f"{LAYER}.linear_attn", "layers/delta"
    ends = np.cumsum(_sizes(config))[:-1]
    return [
        Weight(
            f"{theirs}.conv1d.weight",
            tuple(f"{ours}/{name}_convolution/kernel" for name in "qkv"),
            lambda tensor: np.split(tensor[:, 0].T, ends, axis=-1),
            lambda leaves: np.concatenate(leaves, axis=-1).T[:, None],
        ),
        *linear(f"{theirs}.out_proj", f"{ours}/o_proj", bias=False),
        direct(f"{theirs}.A_log", f"{ours}/log_decay"),
        direct(f"{theirs}.dt_bias", f"{ours}/decay_bias"),
        direct(f"{theirs}.norm.weight", f"{ours}/out_scale"),
    ]


def _sizes(config: ModelConfig) -> tuple[int, int, int]:
    """Returns the widths of queries, keys and values of the delta rule."""
    assert config.delta is not None, "the config has no delta rule"
    delta = config.delta
    keys = delta.num_key_heads * delta.key_dim
    return keys, keys, delta.num_value_heads * delta.value_dim
