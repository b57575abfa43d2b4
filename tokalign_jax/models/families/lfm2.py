"""LFM2: layers with a short convolution, interspersed with layers with attention.

LFM2 MoE has experts in all layers but the first.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from tokalign_jax.models.config import Convolution, Experts, LayerKind, ModelConfig
from tokalign_jax.models.families import llama, mixture, reading
from tokalign_jax.models.families.llama import LAYER
from tokalign_jax.models.families.reading import FULL, Raw, required
from tokalign_jax.models.weights import Weight, direct, fused, linear

MODEL_TYPES = ("lfm2", "lfm2_moe")

BUFFERS, HEAD = llama.BUFFERS, llama.HEAD

CONVOLUTION = "conv"
BLOCK = f"{LAYER}.feed_forward"
PROJECTIONS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def config_from_hf(raw: Raw) -> ModelConfig:
    """Reads the config of an LFM2 or LFM2 MoE model.

    Older files list the layers with attention in `full_attn_idxs`, and name `intermediate_size` and
    `tie_word_embeddings` `block_ff_dim` and `tie_embedding`, which defaults to true.

    Raises:
      UserError: a constant is missing, or an option is not implemented.
    """
    if raw["model_type"] == "lfm2_moe":
        return _config(raw, **_mixture(raw))
    return _config(raw, intermediate_size=_intermediate_size(raw))


def _config(raw: Raw, dense_layers: int = 0, **constants: Any) -> ModelConfig:
    """Reads what both families have; the first layers are `dense_mlp`."""
    reading.check_flags(raw, ("layer_types", *(("num_experts",) if "experts" in constants else ())))
    rope = reading.rope(raw)
    attention_layers = raw.get("full_attn_idxs")

    def default(layer: int) -> str:
        return FULL if attention_layers is None or layer in attention_layers else CONVOLUTION

    def kind(layer: int, mixer: Any) -> LayerKind:
        return LayerKind(
            rope, mixer=mixer, feed_forward="dense_mlp" if layer < dense_layers else "mlp"
        )

    mixers = {CONVOLUTION: "convolution", FULL: "attention"}
    types = reading.layer_types(raw, default, (CONVOLUTION, FULL))
    return reading.decoder(
        raw,
        activation="silu",
        norm_epsilon=required(raw, "norm_eps"),
        layer_kinds=tuple(kind(layer, mixers[name]) for layer, name in enumerate(types)),
        query_key_norm="head",
        tie_word_embeddings=raw.get("tie_embedding", raw.get("tie_word_embeddings", True)),
        convolution=Convolution(required(raw, "conv_L_cache"), _required_bool(raw, "conv_bias")),
        **constants,
    )


def _mixture(raw: Raw) -> dict[str, Any]:
    """Returns the constants of the feed-forward layers with and without experts."""
    required(raw, "layer_types")
    return {
        "dense_layers": required(raw, "num_dense_layers"),
        "dense_size": required(raw, "intermediate_size"),
        "intermediate_size": required(raw, "moe_intermediate_size"),
        "experts": Experts(
            required(raw, "num_experts"),
            required(raw, "num_experts_per_tok"),
            _required_bool(raw, "norm_topk_prob"),
            score="sigmoid",
            normalization_epsilon=1e-6,
            selection_bias=_required_bool(raw, "use_expert_bias"),
            weight_scale=float(required(raw, "routed_scaling_factor")),
        ),
    }


def _required_bool(raw: Raw, key: str) -> bool:
    return bool(required(raw, key))


def _intermediate_size(raw: Raw) -> int:
    """Returns the width, by default two thirds of the key, rounded up to a multiple."""
    size = raw.get("block_ff_dim") or required(raw, "intermediate_size")
    if not _required_bool(raw, "block_auto_adjust_ff_dim"):
        return size
    size = int(2 * size / 3)
    if raw.get("block_ffn_dim_multiplier") is None:
        return size
    multiple = required(raw, "block_multiple_of")
    return multiple * -(-int(raw["block_ffn_dim_multiplier"] * size) // multiple)


def weights(config: ModelConfig) -> list[Weight]:
    """Returns the weight table; the final norm is named embedding_norm."""
    if config.experts is None:
        return [*_outside(config), *_projections(config, "mlp")]
    return _with_experts(config, mixture.feed_forward(config, BLOCK, PROJECTIONS))


def packed_weights(config: ModelConfig) -> list[Weight]:
    """Returns the weight table of mixtures saved by transformers 5, with packed experts."""
    return _with_experts(config, mixture.packed_feed_forward(config, BLOCK))


def _with_experts(config: ModelConfig, experts: list[Weight]) -> list[Weight]:
    if config.experts and config.experts.selection_bias:
        experts = [*experts, direct(f"{BLOCK}.expert_bias", "layers/mlp/selection_bias")]
    return [
        *_outside(config),
        *llama.restrict_to_part("dense_mlp", config, _projections(config, "dense_mlp")),
        *llama.restrict_to_part("mlp", config, experts),
    ]


def _projections(config: ModelConfig, part: str) -> list[Weight]:
    """Returns the weights of feed-forward layers without experts."""
    return [
        weight
        for ours, theirs in PROJECTIONS.items()
        for weight in linear(f"{BLOCK}.{theirs}", f"layers/{part}/{ours}", bias=False)
    ]


def _outside(config: ModelConfig) -> list[Weight]:
    """Returns the weights outside the feed-forward layers."""
    names = {
        "input_norm": "operator_norm",
        "post_attention_norm": "ffn_norm",
        "attention/o_proj": "self_attn.out_proj",
        "attention/q_norm": "self_attn.q_layernorm",
        "attention/k_norm": "self_attn.k_layernorm",
    }
    outer = [
        replace(weight, name="model.embedding_norm.weight")
        if weight.name == "model.norm.weight"
        else weight
        for weight in llama.outer_weights(config)
    ]
    return [
        *outer,
        *llama.norms(config, names),
        *llama.restrict_to_part("attention", config, llama.attention(config, names)),
        *llama.restrict_to_part("convolution", config, _convolution(config)),
    ]


def _convolution(config: ModelConfig) -> list[Weight]:
    assert config.convolution is not None, "the config has no convolution"
    theirs, ours, width = f"{LAYER}.conv", "layers/convolution", config.hidden_size
    bias = config.convolution.bias
    parts = [f"{ours}/{name}" for name in ("gate_proj", "output_gate_proj", "v_proj")]
    return [
        fused(f"{theirs}.in_proj.weight", [f"{p}/kernel" for p in parts], [width] * 3, outputs=-2),
        *(
            [fused(f"{theirs}.in_proj.bias", [f"{p}/bias" for p in parts], [width] * 3, outputs=-1)]
            if bias
            else []
        ),
        Weight(
            f"{theirs}.conv.weight",
            (f"{ours}/convolution/kernel",),
            lambda tensor: (np.ascontiguousarray(tensor[:, 0].T),),
            lambda leaves: leaves[0].T[:, None],
        ),
        *([direct(f"{theirs}.conv.bias", f"{ours}/convolution/bias")] if bias else []),
        *linear(f"{theirs}.out_proj", f"{ours}/o_proj", bias),
    ]
