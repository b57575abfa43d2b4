"""LFM2: layers with a short convolution, interspersed with layers with attention."""

from dataclasses import replace
from typing import Any

import numpy as np

from tokalign_jax.models.config import Convolution, LayerKind, ModelConfig
from tokalign_jax.models.families import llama, reading
from tokalign_jax.models.families.llama import LAYER
from tokalign_jax.models.families.reading import FULL, Raw, required
from tokalign_jax.models.weights import Weight, direct, fused, linear

MODEL_TYPES = ("lfm2",)

BUFFERS, HEAD = llama.BUFFERS, llama.HEAD

CONVOLUTION = "conv"


def config_from_hf(raw: Raw) -> ModelConfig:
    """Reads the config of an LFM2 model.

    Older files list the layers with attention in `full_attn_idxs`, and name `intermediate_size` and
    `tie_word_embeddings` `block_ff_dim` and `tie_embedding`, which defaults to true.

    Raises:
      UserError: a constant is missing, or an option is not implemented.
    """
    reading.check_flags(raw, ("layer_types",))
    rope = reading.rope(raw)
    attention_layers = raw.get("full_attn_idxs")

    def default(layer: int) -> str:
        return FULL if attention_layers is None or layer in attention_layers else CONVOLUTION

    mixers: dict[str, Any] = {CONVOLUTION: "convolution", FULL: "attention"}
    types = reading.layer_types(raw, default, (CONVOLUTION, FULL))
    return reading.decoder(
        raw,
        intermediate_size=_intermediate_size(raw),
        activation="silu",
        norm_epsilon=required(raw, "norm_eps"),
        layer_kinds=tuple(LayerKind(rope, mixer=mixers[kind]) for kind in types),
        query_key_norm="head",
        tie_word_embeddings=raw.get("tie_embedding", raw.get("tie_word_embeddings", True)),
        convolution=Convolution(required(raw, "conv_L_cache"), _required_bool(raw, "conv_bias")),
    )


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
    names = {
        "input_norm": "operator_norm",
        "post_attention_norm": "ffn_norm",
        "attention/o_proj": "self_attn.out_proj",
        "attention/q_norm": "self_attn.q_layernorm",
        "attention/k_norm": "self_attn.k_layernorm",
        "mlp/gate_proj": "feed_forward.w1",
        "mlp/up_proj": "feed_forward.w3",
        "mlp/down_proj": "feed_forward.w2",
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
        *llama.mlp(config, names),
        *llama.restrict_to_mixer("attention", config, llama.attention(config, names)),
        *llama.restrict_to_mixer("convolution", config, _convolution(config)),
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
