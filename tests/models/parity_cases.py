"""Random tiny models, one for each set of features of a family, and how far ours is from PyTorch's
on them.

The tests and `benchmarks/parity.py` share the list.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from tests.helpers import tiny_tokenizer
from tokalign_jax.models import hub, huggingface
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.families import weight_table
from tokalign_jax.models.transformer import abstract_params, head_matrix, logits
from tokalign_jax.utils import paths

VOCABULARY = 260
TOKENIZER = tiny_tokenizer(257, [])
LENGTHS = (9, 70)
"""Tokens of the texts that are compared; windows and original lengths are between them."""

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
_GPT2_SIZES = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 80,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


@dataclass(frozen=True)
class Case:
    family: str
    """`model_type` of its config.json."""
    features: str
    """Features that the case enables."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Config settings beside the sizes."""

    def __str__(self) -> str:
        return f"{self.family}: {self.features}"


def _rope(kind: str, theta: float = 500.0, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **settings}}


_LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
_SLIDING, _FULL = "sliding_attention", "full_attention"


def _longrope(pairs: int) -> dict[str, Any]:
    return {
        "short_factor": [1.0 + 0.1 * i for i in range(pairs)],
        "long_factor": [2.0 + 0.5 * i for i in range(pairs)],
        "original_max_position_embeddings": 32,
    }


_TEXT_MODELS = {
    "gemma3": "gemma3_text",
    "idefics3": "llama",
    "internvl": "qwen3",
    "llama4": "llama4_text",
    "llava": "llama",
    "llava_onevision": "qwen2",
    "mistral3": "mistral",
    "qwen2_vl": "qwen2_vl_text",
    "qwen2_5_vl": "qwen2_5_vl_text",
    "qwen3_vl": "qwen3_vl_text",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "smolvlm": "llama",
}
"""model_type of the text model in each that sees images too."""
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 8,
    "image_size": 28,
    "patch_size": 14,
}
_VISION_OF: dict[str, dict[str, Any]] = {
    "internvl": {"image_size": [28, 28], "patch_size": [14, 14]},
    "llama4": {
        "vision_output_dim": 16,
        "projector_input_dim": 16,
        "projector_output_dim": 16,
        "image_size": 56,
    },
    "qwen2_vl": {"embed_dim": 16, "hidden_size": 32, "depth": 1, "num_heads": 2},
    "qwen2_5_vl": {"out_hidden_size": 32, "depth": 1, "num_heads": 2},
    "qwen3_vl": {
        "out_hidden_size": 32,
        "depth": 1,
        "num_heads": 2,
        "deepstack_visual_indexes": [0],
    },
}
"""Differences from `_VISION` by family."""
_GRANITE_MOE = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "intermediate_size": 24,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.3,
    "logits_scaling": 0.7,
}
_DELTA = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
_NO_MAMBA = {
    "mamba_n_heads": 4,
    "num_local_experts": 0,
    "layer_types": ["attention", "attention"],
    "shared_intermediate_size": 48,
}
_GPT_OSS = {
    "head_dim": 16,
    "intermediate_size": 24,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "sliding_window": 12,
    "swiglu_limit": 0.4,
}
"""With a limit that some of the activations reach."""
_LFM2_MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_GLM4_MOE = {
    "head_dim": 16,
    "num_hidden_layers": 3,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
_LLAMA4 = {
    "head_dim": 16,
    "intermediate_size": 24,
    "intermediate_size_mlp": 40,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "attention_chunk_size": 12,
    "attn_scale": 0.5,
    "floor_scale": 8,
}
_QWEN_MOE = {"head_dim": 8, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

CASES = (
    Case("llama", "one key-value head, untied", {"num_key_value_heads": 1}),
    Case(
        "llama",
        "biases, LLaMA 3 scaling",
        {"attention_bias": True, "mlp_bias": True, **_rope("llama3", **_LLAMA3)},
    ),
    Case(
        "llama",
        "tied, wide heads, linear scaling",
        {
            "tie_word_embeddings": True,
            "head_dim": 16,
            "hidden_act": "gelu_pytorch_tanh",
            **_rope("linear", factor=4.0),
        },
    ),
    Case(
        "llama", "all heads have keys, YaRN", {"num_key_value_heads": 4, **_rope("yarn", **_YARN)}
    ),
    Case(
        "llama",
        "YaRN as DeepSeek weighs it, not truncated",
        _rope(
            "yarn",
            **_YARN,
            mscale=1.0,
            mscale_all_dim=0.5,
            beta_fast=16,
            beta_slow=2,
            truncate=False,
        ),
    ),
    Case(
        "llama",
        "dynamic NTK past its length",
        {"max_position_embeddings": 32, **_rope("dynamic", factor=2.0)},
    ),
    Case("llama", "LongRoPE, short and long", _rope("longrope", **_longrope(4))),
    Case("gpt_neox", "parallel, partial rotary", _rope("default", partial_rotary_factor=0.25)),
    Case(
        "gpt_neox",
        "sequential, tied, linear scaling",
        {
            "use_parallel_residual": False,
            "tie_word_embeddings": True,
            "hidden_act": "gelu_new",
            **_rope("linear", factor=2.0, partial_rotary_factor=0.5),
        },
    ),
    Case(
        "gpt_neox",
        "no attention biases, whole rotary, ReLU",
        {
            "attention_bias": False,
            "hidden_act": "relu",
            **_rope("default", partial_rotary_factor=1.0),
        },
    ),
    Case(
        "qwen2",
        "window in the later layers",
        {
            "use_sliding_window": True,
            "sliding_window": 12,
            "max_window_layers": 1,
            "num_hidden_layers": 3,
        },
    ),
    Case("qwen2", "tied, YaRN", {"tie_word_embeddings": True, **_rope("yarn", **_YARN)}),
    Case(
        "qwen3",
        "query and key norms, wide heads, tied",
        {"head_dim": 16, "tie_word_embeddings": True},
    ),
    Case(
        "qwen3",
        "biases, window in the later layers",
        {
            "head_dim": 8,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 12,
            "max_window_layers": 1,
        },
    ),
    Case("mistral", "window, wide heads", {"sliding_window": 12, "head_dim": 16}),
    Case("mistral", "no window, tied", {"sliding_window": None, "tie_word_embeddings": True}),
    Case(
        "gemma",
        "scaled embedding, 1 + w norms",
        {"head_dim": 16, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    Case(
        "gemma2",
        "soft-caps, alternating windows, sandwich norms",
        {
            "head_dim": 16,
            "sliding_window": 12,
            "num_hidden_layers": 3,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "tie_word_embeddings": True,
        },
    ),
    Case(
        "gemma2",
        "no soft-caps, biases, untied",
        {
            "head_dim": 8,
            "sliding_window": 12,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "attention_bias": True,
        },
    ),
    Case(
        "gemma3_text",
        "two rotary bases, one scaled, windows, query and key norms",
        {
            "head_dim": 16,
            "sliding_window": 12,
            "num_hidden_layers": 4,
            "layer_types": [_SLIDING, _SLIDING, _FULL, _SLIDING],
            "query_pre_attn_scalar": 20,
            "tie_word_embeddings": True,
            "rope_parameters": {
                _FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
                _SLIDING: {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    Case(
        "gemma3_text",
        "logit soft-cap, untied",
        {"head_dim": 8, "sliding_window": 12, "final_logit_softcapping": 3.0},
    ),
    Case("phi3", "fused projections, window", {"sliding_window": 12}),
    Case(
        "phi3",
        "one key-value head, partial rotary",
        {"num_key_value_heads": 1, **_rope("default", partial_rotary_factor=0.5)},
    ),
    Case(
        "phi3",
        "LongRoPE, partial rotary, tied",
        {
            "hidden_size": 64,
            "original_max_position_embeddings": 32,
            "tie_word_embeddings": True,
            **_rope("longrope", **_longrope(6), partial_rotary_factor=0.75),
        },
    ),
    Case("gpt2", "learned positions, tied"),
    Case(
        "gpt2",
        "untied, unscaled attention, own width",
        {"tie_word_embeddings": False, "scale_attn_weights": False, "n_inner": 40},
    ),
    Case(
        "smollm3",
        "layers without rotary embedding, tied",
        {"no_rope_layer_interval": 2, "tie_word_embeddings": True},
    ),
    Case(
        "smollm3",
        "windows in these, biases",
        {
            "num_hidden_layers": 3,
            "no_rope_layer_interval": 2,
            "use_sliding_window": True,
            "sliding_window": 12,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    Case("olmo2", "norms after, query and key norms over the width"),
    Case("olmo2", "tied, biases", {"tie_word_embeddings": True, "attention_bias": True}),
    Case(
        "olmo3",
        "windows, YaRN in the other layers",
        {
            "sliding_window": 12,
            "layer_types": [_SLIDING, _FULL],
            "rope_parameters": {
                _FULL: {"rope_type": "yarn", "rope_theta": 500.0, **_YARN},
                _SLIDING: {"rope_type": "default", "rope_theta": 500.0},
            },
        },
    ),
    Case(
        "stablelm",
        "partial rotary, query and key norms for each head",
        {
            "qk_layernorm": True,
            "use_qkv_bias": True,
            **_rope("default", partial_rotary_factor=0.5),
        },
    ),
    Case(
        "stablelm",
        "one key-value head, query and key norms",
        {
            "num_key_value_heads": 1,
            "qk_layernorm": True,
            **_rope("default", partial_rotary_factor=0.5),
        },
    ),
    Case(
        "stablelm",
        "parallel with one norm, tied",
        {
            "use_parallel_residual": True,
            "tie_word_embeddings": True,
            **_rope("default", partial_rotary_factor=0.25),
        },
    ),
    Case(
        "granite",
        "multipliers, biases, tied",
        {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.3,
            "logits_scaling": 0.7,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    Case(
        "granitemoehybrid",
        "no Mamba layers, rotary embedding, multipliers, tied",
        {
            **_NO_MAMBA,
            "position_embedding_type": "rope",
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.3,
            "logits_scaling": 0.7,
            "tie_word_embeddings": True,
        },
    ),
    Case("granitemoehybrid", "no rotary embedding, biases", {**_NO_MAMBA, "attention_bias": True}),
    Case(
        "ministral",
        "window in some layers, wide heads",
        {"sliding_window": 12, "head_dim": 16, "layer_types": [_SLIDING, _FULL]},
    ),
    Case(
        "ministral3",
        "growing queries, YaRN, window",
        {
            "head_dim": 16,
            "sliding_window": 12,
            **_rope("yarn", **_YARN, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.4),
        },
    ),
    Case(
        "ministral3",
        "queries do not grow, tied",
        {
            "head_dim": 8,
            "tie_word_embeddings": True,
            **_rope("default", llama_4_scaling_beta=0.0, original_max_position_embeddings=32),
        },
    ),
    Case("olmo", "norms without parameters, clipping", {"clip_qkv": 0.2}),
    Case("olmo", "biases, tied", {"attention_bias": True, "tie_word_embeddings": True}),
    Case(
        "exaone4",
        "norms after, windows, no rotary embedding in the other layers",
        {"sliding_window": 12, "layer_types": [_SLIDING, _FULL]},
    ),
    Case(
        "exaone4",
        "no windows, LLaMA 3 scaling, tied",
        {
            "sliding_window": None,
            "layer_types": [_FULL, _FULL],
            "tie_word_embeddings": True,
            **_rope("llama3", **_LLAMA3),
        },
    ),
    Case("seed_oss", "biases of queries, keys and values", {"head_dim": 16}),
    Case(
        "seed_oss",
        "all biases, tied",
        {
            "head_dim": 8,
            "attention_out_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    Case("arcee", "two matrices, ReLU squared, YaRN", _rope("yarn", **_YARN)),
    Case(
        "arcee",
        "biases, tied, wide heads",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 16},
    ),
    Case(
        "nemotron",
        "layer norms of 1 + w, partial rotary",
        _rope("default", partial_rotary_factor=0.5),
    ),
    Case(
        "nemotron",
        "biases, tied, wide heads",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 16},
    ),
    Case(
        "hunyuan_v1_dense",
        "query and key norms after rotation, base by alpha, tied",
        {"head_dim": 16, "tie_word_embeddings": True, **_rope("dynamic", alpha=50.0, factor=1.0)},
    ),
    Case("hunyuan_v1_dense", "biases", {"head_dim": 8, "attention_bias": True}),
    Case("starcoder2", "window, biases, tied", {"sliding_window": 12, "tie_word_embeddings": True}),
    Case("starcoder2", "no biases, untied", {"use_bias": False, "tie_word_embeddings": False}),
    Case("cohere", "parallel with one norm, interleaved rotary, tied", {"logit_scale": 0.5}),
    Case(
        "cohere",
        "query and key norms for each head, biases, untied",
        {"use_qk_norm": True, "attention_bias": True, "logit_scale": 0.5},
    ),
    Case(
        "cohere2",
        "windows, no rotary embedding in the other layers, tied",
        {
            "sliding_window": 12,
            "layer_types": [_SLIDING, _FULL],
            "logit_scale": 0.5,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    Case("glm", "interleaved partial rotary, fused gate and up", {"head_dim": 16}),
    Case(
        "glm",
        "no biases, tied, linear scaling",
        {
            "head_dim": 8,
            "attention_bias": False,
            "tie_word_embeddings": True,
            **_rope("linear", factor=2.0, partial_rotary_factor=0.5),
        },
    ),
    Case("glm4", "norms before and after", {"head_dim": 16}),
    Case(
        "glm4",
        "no biases, tied",
        {"head_dim": 8, "attention_bias": False, "tie_word_embeddings": True},
    ),
    Case(
        "glm4_moe",
        "first layer without experts, bias that only chooses, shared expert, partial rotary",
        {**_GLM4_MOE, "use_qk_norm": True, "routed_scaling_factor": 1.5},
    ),
    Case(
        "glm4_moe",
        "weights that are not normalized, biases, wider shared expert, tied",
        {
            **_GLM4_MOE,
            "norm_topk_prob": False,
            "attention_bias": True,
            "n_shared_experts": 2,
            "tie_word_embeddings": True,
        },
    ),
    Case("ernie4_5", "interleaved rotary, tied", {"head_dim": 16, "tie_word_embeddings": True}),
    Case("ernie4_5", "biases, untied", {"head_dim": 8, "use_bias": True}),
    Case("helium", "interleaved rotary", {"head_dim": 8}),
    Case(
        "helium",
        "biases, tied",
        {"head_dim": 8, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    Case("apertus", "learned activation, LLaMA 3 scaling", _rope("llama3", **_LLAMA3)),
    Case(
        "apertus",
        "biases, tied, ReLU",
        {"attention_bias": True, "tie_word_embeddings": True, "hidden_act": "relu"},
    ),
    Case("nanochat", "norms without parameters, soft-cap", {"final_logit_softcapping": 3.0}),
    Case(
        "nanochat",
        "biases, tied, no soft-cap",
        {"attention_bias": True, "tie_word_embeddings": True, "final_logit_softcapping": None},
    ),
    Case(
        "mixtral",
        "experts, window",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 12,
            "intermediate_size": 24,
        },
    ),
    Case(
        "qwen3_moe",
        "experts of normalized weight, tied",
        {**_QWEN_MOE, "norm_topk_prob": True, "tie_word_embeddings": True},
    ),
    Case(
        "qwen3_moe",
        "biases, window",
        {**_QWEN_MOE, "attention_bias": True, "use_sliding_window": True, "sliding_window": 12},
    ),
    Case(
        "qwen2_moe",
        "shared expert with a gate",
        {**_QWEN_MOE, "shared_expert_intermediate_size": 24},
    ),
    Case(
        "qwen2_moe",
        "normalized weights, windows, no biases, tied",
        {
            **_QWEN_MOE,
            "shared_expert_intermediate_size": 24,
            "norm_topk_prob": True,
            "qkv_bias": False,
            "use_sliding_window": True,
            "sliding_window": 12,
            "layer_types": [_SLIDING, _FULL],
            "tie_word_embeddings": True,
        },
    ),
    Case(
        "olmoe", "query and key norms over the width", {"num_experts": 6, "num_experts_per_tok": 2}
    ),
    Case(
        "olmoe",
        "biases, normalized weights, tied",
        {
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "attention_bias": True,
            "norm_topk_prob": True,
            "tie_word_embeddings": True,
        },
    ),
    Case("granitemoe", "multipliers, tied", {**_GRANITE_MOE, "tie_word_embeddings": True}),
    Case(
        "granitemoeshared",
        "shared expert, biases",
        {**_GRANITE_MOE, "shared_intermediate_size": 24, "attention_bias": True},
    ),
    Case(
        "gpt_oss",
        "attention sinks, experts with biases and clamped SwiGLU, YaRN, windows",
        {
            **_GPT_OSS,
            **_rope("yarn", **_YARN, beta_fast=32.0, beta_slow=1.0, truncate=False),
        },
    ),
    Case(
        "gpt_oss",
        "no attention biases, windows in the later layers, tied",
        {
            **_GPT_OSS,
            "swiglu_alpha": 1.1,
            "attention_bias": False,
            "layer_types": [_FULL, _SLIDING],
            "tie_word_embeddings": True,
            **_rope("default"),
        },
    ),
    Case(
        "qwen3_5_text",
        "gated delta rule, gated attention, partial rotary",
        {**_DELTA, "num_hidden_layers": 4},
    ),
    Case(
        "qwen3_5_text",
        "as many key as value heads, biases, tied, layers out of step",
        {
            **_DELTA,
            "num_hidden_layers": 3,
            "linear_num_key_heads": 4,
            "linear_key_head_dim": 4,
            "linear_conv_kernel_dim": 3,
            "layer_types": ["linear_attention", "full_attention", "full_attention"],
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    Case(
        "qwen3_5_moe_text",
        "gated delta rule, shared expert with a gate",
        {**_DELTA, **_QWEN_MOE, "shared_expert_intermediate_size": 24, "num_hidden_layers": 4},
    ),
    Case(
        "qwen3_5_moe_text",
        "biases, tied, layers out of step",
        {
            **_DELTA,
            **_QWEN_MOE,
            "shared_expert_intermediate_size": 24,
            "linear_num_key_heads": 4,
            "layer_types": ["full_attention", "linear_attention"],
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    Case(
        "qwen3_next",
        "gated delta rule ordered by key head, shared expert with a gate",
        {**_DELTA, **_QWEN_MOE, "shared_expert_intermediate_size": 24, "num_hidden_layers": 4},
    ),
    Case(
        "qwen3_next",
        "weights that are not normalized, biases, tied",
        {
            **_DELTA,
            **_QWEN_MOE,
            "shared_expert_intermediate_size": 24,
            "layer_types": ["linear_attention", "full_attention"],
            "norm_topk_prob": False,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    Case(
        "lfm2",
        "short convolutions, tied",
        {
            "num_hidden_layers": 5,
            "layer_types": ["conv", _FULL, "conv", _FULL, "conv"],
            "block_multiple_of": 8,
        },
    ),
    Case(
        "lfm2",
        "biases, width as it is, untied",
        {
            "layer_types": [_FULL, "conv"],
            "conv_bias": True,
            "conv_L_cache": 4,
            "block_auto_adjust_ff_dim": False,
            "tie_word_embeddings": False,
        },
    ),
    Case(
        "lfm2_moe",
        "first layers without experts, sigmoid router with a bias that only chooses, tied",
        {
            **_LFM2_MOE,
            "num_hidden_layers": 6,
            "layer_types": ["conv", _FULL, "conv", "conv", _FULL, "conv"],
            "num_dense_layers": 2,
            "routed_scaling_factor": 1.5,
            "tie_word_embeddings": True,
        },
    ),
    Case(
        "lfm2_moe",
        "no bias, weights that are not normalized, biases of the convolution, untied",
        {
            **_LFM2_MOE,
            "num_hidden_layers": 3,
            "layer_types": [_FULL, "conv", _FULL],
            "num_dense_layers": 1,
            "use_expert_bias": False,
            "norm_topk_prob": False,
            "conv_bias": True,
        },
    ),
    Case(
        "llama4_text",
        "chunks, layers without rotation or experts, weighted inputs, LLaMA 3 scaling",
        {
            **_LLAMA4,
            "num_hidden_layers": 5,
            "interleave_moe_layer_step": 2,
            "no_rope_layer_interval": 3,
            **_rope("llama3", **_LLAMA3),
        },
    ),
    Case(
        "llama4_text",
        "lists of layers, one expert per token, biases, no norms, queries do not grow, tied",
        {
            **_LLAMA4,
            "num_hidden_layers": 3,
            "num_experts_per_tok": 1,
            "moe_layers": [0, 1],
            "no_rope_layers": [0, 1, 1],
            "layer_types": ["chunked_attention", _FULL, "chunked_attention"],
            "use_qk_norm": False,
            "attn_temperature_tuning": False,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    Case(
        "gemma3",
        "text model of images and text",
        {"head_dim": 16, "sliding_window": 12, "num_hidden_layers": 6, "tie_word_embeddings": True},
    ),
    Case("mistral3", "text model of images and text", {"head_dim": 16, "sliding_window": None}),
    Case("llava", "text model of images and text", {"tie_word_embeddings": True}),
    Case("llava_onevision", "text model of images and text", {"tie_word_embeddings": True}),
    Case("internvl", "text model of images and text", {"head_dim": 8}),
    Case("idefics3", "text model of images and text", {"tie_word_embeddings": True}),
    Case(
        "qwen3_5",
        "text model of images and text",
        {**_DELTA, **_rope("default", mrope_section=[1, 1, 0], partial_rotary_factor=0.25)},
    ),
    Case(
        "qwen3_5_moe",
        "text model of images and text",
        {
            **_DELTA,
            **_QWEN_MOE,
            "shared_expert_intermediate_size": 24,
            **_rope("default", mrope_section=[1, 1, 0], partial_rotary_factor=0.25),
        },
    ),
    Case("llama4", "text model of images and text", {**_LLAMA4, "num_hidden_layers": 4}),
    Case("smolvlm", "text model of images and text"),
    Case("qwen2_vl", "text model of images and text", _rope("default", mrope_section=[1, 1, 2])),
    Case(
        "qwen2_5_vl",
        "text model of images and text, YaRN",
        _rope("yarn", **_YARN, mrope_section=[1, 1, 2]),
    ),
    Case(
        "qwen3_vl",
        "text model of images and text",
        {
            "head_dim": 16,
            "tie_word_embeddings": True,
            **_rope("default", mrope_section=[4, 2, 2], mrope_interleaved=True),
        },
    ),
)


def cases_of(*families: str) -> list[Case]:
    return [case for case in CASES if case.family in families]


def model(case: Case, seed: int = 0) -> torch.nn.Module:
    """A random PyTorch model in eval mode, in bfloat16."""
    torch.manual_seed(seed)
    made = (
        _auto_class(case.family)
        .from_config(AutoConfig.for_model(case.family, **settings(case)))
        .eval()
    )
    with torch.no_grad():
        for (
            parameter
        ) in made.parameters():  # biases and norms too, which otherwise start at 0 and 1
            parameter += 0.1 * torch.randn_like(parameter)
        for name, buffer in made.named_buffers():
            if name in made.state_dict():
                buffer += 0.1 * torch.randn_like(buffer)
    return made.bfloat16()


def settings(case: Case) -> dict[str, Any]:
    sizes = _GPT2_SIZES if case.family == "gpt2" else _SIZES
    if case.family not in _TEXT_MODELS:
        return {**sizes, **case.settings}
    text = {"model_type": _TEXT_MODELS[case.family], **_SIZES, **case.settings}
    vision = _VISION | _VISION_OF.get(case.family, {})
    return {
        "text_config": text,
        "vision_config": vision,
        "tie_word_embeddings": text["tie_word_embeddings"],
    }


def _auto_class(family: str) -> Any:
    return AutoModelForImageTextToText if family in _TEXT_MODELS else AutoModelForCausalLM


@dataclass(frozen=True)
class Pair:
    """One checkpoint as ours and as PyTorch's in float32, and the folder from which both were read."""

    folder: Path
    config: ModelConfig
    raw: dict[str, Any]
    params: dict[str, Any]
    reference: torch.nn.Module


def pair(case: Case, folder: Path) -> Pair:
    model(case).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    config, raw = hub.load_config(folder)
    return Pair(
        folder, config, raw, huggingface.load_params(folder, config, jnp.float32), reference(folder)
    )


def reference(folder: Path) -> torch.nn.Module:
    """The PyTorch model of a folder, in float32."""
    family = json.loads((folder / "config.json").read_text())["model_type"]
    made = _auto_class(family).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    # The whole of LLaMA 4 asks its text model for a field that this does not return (5.24).
    return (made.language_model if family == "llama4" else made).eval()


def tokens(length: int, batch: int = 2) -> np.ndarray:
    return np.random.default_rng(length).integers(0, VOCABULARY, (batch, length), dtype=np.int32)


def reference_logits(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens).long(), use_cache=False).logits.numpy()


compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""Compiling is nearly all of the time that a tiny model takes; the arithmetic is the same."""

our_logits = compiled(logits, static_argnums=0, static_argnames="lora")


def logit_error(pair: Pair, lengths: Sequence[int] = LENGTHS) -> float:
    """The largest difference from PyTorch's logits over texts of these lengths."""
    apart = []
    for text in map(tokens, lengths):
        found = our_logits(pair.config, pair.params, text)
        apart.append(_logit_difference(pair, text, found))
    return max(apart)


def _logit_difference(pair: Pair, text: np.ndarray, found: jax.Array) -> float:
    expected = reference_logits(pair.reference, text)
    assert np.abs(expected).max() > 0.5, "the logits are all close to zero"
    return float(np.abs(found - expected).max())


def gradient_error(pair: Pair) -> float:
    """The largest difference from PyTorch's gradients of embedding and head, relative to the
    largest element of each.
    """
    return gradient_and_logit_errors(pair)[0]


def gradient_and_logit_errors(pair: Pair) -> tuple[float, float]:
    """`gradient_error`, and `logit_error` at the longer length, from one compiled program."""
    text = tokens(LENGTHS[1])
    vocabulary = {
        name: pair.params[name] for name in ("embed_tokens", "lm_head") if name in pair.params
    }
    gradients, found = _gradients_and_logits(pair.config, vocabulary, pair.params, text)
    _reference_loss(pair, text).backward()
    gradient = max(
        _relative(gradients["embed_tokens"]["embedding"], pair.reference.get_input_embeddings()),
        _relative(head_matrix(gradients), pair.reference.get_output_embeddings()),
    )
    return gradient, _logit_difference(pair, text, found)


def _reference_loss(pair: Pair, text: np.ndarray) -> torch.Tensor:
    scores = pair.reference(torch.tensor(text).long(), use_cache=False).logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(scores, torch.tensor(text[:, 1:]).long().flatten())


@functools.partial(compiled, static_argnums=0)
def _gradients_and_logits(
    config: ModelConfig, vocabulary: dict[str, Any], params: dict[str, Any], text: jax.Array
):
    def loss(vocabulary):
        found = logits(config, params | vocabulary, text)
        probabilities = jax.nn.log_softmax(found[:, :-1])
        return -jnp.take_along_axis(probabilities, text[:, 1:, None], -1).mean(), found

    return jax.grad(loss, has_aux=True)(vocabulary)


def _relative(ours: jax.Array, module: torch.nn.Module) -> float:
    gradient = module.weight.grad
    assert isinstance(gradient, torch.Tensor)
    assert gradient.abs().max() > 1e-5, "no gradient"
    return float(np.abs(ours - gradient.numpy()).max() / gradient.abs().max())


def parameter_gradient_error(pair: Pair) -> float:
    """The largest difference from PyTorch's gradients of any parameter, relative to the largest
    element of each.
    """
    text = tokens(LENGTHS[1])
    gradients, _ = _gradients_and_logits(pair.config, pair.params, {}, text)
    pair.reference.zero_grad()
    _reference_loss(pair, text).backward()
    theirs = {
        name: np.zeros(parameter.shape) if parameter.grad is None else parameter.grad.numpy()
        for name, parameter in pair.reference.named_parameters()
    }
    apart = [0.0]
    ours = paths.flatten(gradients)
    for weight in weight_table(pair.config, theirs):
        for part in weight.slices(pair.config.num_layers):
            name = next((name for name in weight.names(part) if name in theirs), None)
            if name is None:
                continue  # a buffer, or one of several names of a tied matrix
            for path, expected in zip(weight.leaves, weight.split(theirs[name]), strict=True):
                difference = np.abs(ours[path][part] - expected).max()
                apart.append(float(difference / max(1e-3, np.abs(expected).max())))
    assert len(apart) > pair.config.num_layers * 10, "hardly any gradient was compared"
    return max(apart)


def export(pair: Pair, folder: Path) -> Path:
    """The checkpoint as we write it, in the types in which it was stored."""
    params = huggingface.load_params(pair.folder, pair.config)
    huggingface.save_checkpoint(
        folder, params, pair.config, pair.raw, TOKENIZER, source_folder=pair.folder
    )
    return folder


def check(case: Case, folder: Path) -> None:
    """Check our model against PyTorch's, and that the exported checkpoint is the one that was read.

    Gradients and a second length are compared once per family, the length also where it changes the
    model: other cases of a family share its code. The text model of a multimodal family is one of
    the other families.
    """
    both = pair(case, folder / "source")
    shapes = {
        path: (leaf.shape, leaf.dtype)
        for path, leaf in paths.flatten(abstract_params(both.config)).items()
    }
    assert {
        path: (leaf.shape, leaf.dtype) for path, leaf in paths.flatten(both.params).items()
    } == shapes
    by_length = case.settings.get("rope_parameters", {}).get("rope_type") in ("dynamic", "longrope")
    if case == cases_of(case.family)[0] and case.family not in _TEXT_MODELS:
        gradient, logit = gradient_and_logit_errors(both)
        assert gradient < 1e-4
        assert max(logit, logit_error(both, LENGTHS[:1])) < 1e-4
    else:
        assert logit_error(both, LENGTHS if by_length else LENGTHS[1:]) < 1e-4
    written = export(both, folder / "written")
    if case.family not in _TEXT_MODELS:
        before, after = stored(both.folder), stored(written)
        assert {name: tensor.dtype for name, tensor in after.items()} == {
            name: t.dtype for name, t in before.items()
        }
        for name, tensor in before.items():
            np.testing.assert_array_equal(after[name], tensor)
    text = tokens(20)
    np.testing.assert_array_equal(
        reference_logits(reference(written), text), reference_logits(both.reference, text)
    )


def stored(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint."""
    return load_file(folder / huggingface.WEIGHTS_FILE)
