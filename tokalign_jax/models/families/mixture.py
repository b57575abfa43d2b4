"""Mixtures of experts: Mixtral, Qwen 2 and 3 MoE, OLMoE and Granite MoE.

Granite stores all experts of a layer in one tensor, the others one tensor per expert. Qwen 2 MoE
and Granite (shared) also have an expert for all tokens.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from tokalign_jax.models.config import Experts, LayerKind, ModelConfig
from tokalign_jax.models.families import granite, llama, reading
from tokalign_jax.models.families.llama import LAYER
from tokalign_jax.models.families.reading import FULL, SLIDING, Raw, required
from tokalign_jax.models.weights import Weight, fused, linear

MODEL_TYPES = (
    "granitemoe",
    "granitemoeshared",
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
)

BUFFERS, HEAD = llama.BUFFERS, llama.HEAD


def config_from_hf(raw: Raw) -> ModelConfig:
    """Reads the config of a mixture of experts; training settings (jitter, losses) are ignored.

    Keys that are newer than the format: `attention_bias` (Qwen 3; defaults to no biases) and
    `qkv_bias` (Qwen 2; defaults to biases on queries, keys and values).

    Raises:
      UserError: a constant is missing, or an option is not implemented.
    """
    return reading.decoder(raw, **_READERS[raw["model_type"]](raw))


def weights(config: ModelConfig) -> list[Weight]:
    """Returns the weight table of checkpoints on the hub."""
    if config.model_type in ("granitemoe", "granitemoeshared"):
        return _granite_weights(config)
    mixtral = config.model_type == "mixtral"
    block = f"{LAYER}.block_sparse_moe" if mixtral else f"{LAYER}.mlp"
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"} if mixtral else {}
    return [*_outside(config), *feed_forward(config, block, names)]


def feed_forward(
    config: ModelConfig,
    block: str = f"{LAYER}.mlp",
    names: Mapping[str, str] = MappingProxyType({}),
) -> list[Weight]:
    """Returns the weights of the mixtures with a tensor per expert.

    Args:
      config: the model's config.
      block: the name of a layer's mixture.
      names: names of the experts' projections that differ from ours.
    """
    return [*_router_and_shared(config, f"{block}.gate"), *experts(config, block, names)]


def experts(
    config: ModelConfig, block: str, names: Mapping[str, str] = MappingProxyType({})
) -> list[Weight]:
    """Returns the weights of the experts with a tensor for each; args as for `feed_forward`."""
    return [
        weight
        for ours in ("gate_proj", "up_proj", "down_proj")
        for weight in linear(
            f"{block}.experts.{{index}}.{names.get(ours, ours)}",
            f"layers/mlp/experts/{ours}",
            bias=False,
            count=_experts(config).count,
        )
    ]


def packed_weights(config: ModelConfig) -> list[Weight]:
    """Returns the weight table of checkpoints saved by transformers 5, with packed experts."""
    if config.model_type in ("granitemoe", "granitemoeshared"):
        return _granite_weights(config)
    return [*_outside(config), *packed_feed_forward(config)]


def packed_feed_forward(config: ModelConfig, block: str = f"{LAYER}.mlp") -> list[Weight]:
    """Returns the weights of the mixtures with all experts of a layer in one tensor.

    Args:
      config: the model's config.
      block: the name of a layer's mixture.
    """
    return [*_router_and_shared(config, f"{block}.gate"), *packed_experts(config, block)]


def packed_experts(config: ModelConfig, block: str) -> list[Weight]:
    """Returns the weights of the experts of the mixture `block`, all of a layer in one tensor."""
    return _packed(config, f"{block}.experts.gate_up_proj", f"{block}.experts.down_proj")


def _packed(config: ModelConfig, gate_up: str, down: str) -> list[Weight]:
    path, width = "layers/mlp/experts", config.intermediate_size
    leaves = [f"{path}/{name}/kernel" for name in ("gate_proj", "up_proj")]
    return [
        fused(gate_up, leaves, (width, width), outputs=-2),
        fused(down, [f"{path}/down_proj/kernel"], (config.hidden_size,), outputs=-2),
    ]


def _granite_weights(config: ModelConfig) -> list[Weight]:
    block, shared = f"{LAYER}.block_sparse_moe", f"{LAYER}.shared_mlp"
    size = _experts(config).shared_size
    leaves = [f"layers/mlp/shared/{name}/kernel" for name in ("gate_proj", "up_proj")]
    aliases = {
        f"{block}.input_linear.weight": f"{block}.experts.gate_up_proj",
        f"{block}.output_linear.weight": f"{block}.experts.down_proj",
        f"{block}.router.layer.weight": f"{block}.router.weight",
    }
    table = [
        *_outside(config),
        *linear(f"{block}.router.layer", "layers/mlp/router", bias=False),
        *_packed(config, f"{block}.input_linear.weight", f"{block}.output_linear.weight"),
    ]
    if size:
        table += [
            fused(f"{shared}.input_linear.weight", leaves, (size, size), outputs=-2),
            *linear(f"{shared}.output_linear", "layers/mlp/shared/down_proj", bias=False),
        ]
    return [
        replace(weight, aliases=(aliases[weight.name],)) if weight.name in aliases else weight
        for weight in table
    ]


def _outside(config: ModelConfig) -> list[Weight]:
    """Returns the weights outside the mixtures."""
    return [*llama.outer_weights(config), *llama.norms(config), *llama.attention(config)]


def _router_and_shared(config: ModelConfig, router: str) -> list[Weight]:
    experts = _experts(config)
    shared = ("gate_proj", "up_proj", "down_proj") if experts.shared_size else ()
    gates = ("shared_expert_gate",) if experts.shared_gate else ()
    return [
        *linear(router, "layers/mlp/router", bias=False),
        *(
            weight
            for name in shared
            for weight in linear(
                f"{LAYER}.mlp.shared_expert.{name}", f"layers/mlp/shared/{name}", bias=False
            )
        ),
        *(
            weight
            for name in gates
            for weight in linear(f"{LAYER}.mlp.{name}", "layers/mlp/shared_gate", bias=False)
        ),
    ]


def _experts(config: ModelConfig) -> Experts:
    assert config.experts is not None, "the config has no experts"
    return config.experts


def _mixtral(raw: Raw) -> dict[str, Any]:
    reading.check_flags(raw, ("num_local_experts", "sliding_window"))
    kind = LayerKind(reading.rope(raw), raw.get("sliding_window"))
    return {
        "layer_kinds": reading.uniform_layers(raw, kind),
        "experts": Experts(
            required(raw, "num_local_experts"),
            required(raw, "num_experts_per_tok"),
            normalized=True,
        ),
    }


def _olmoe(raw: Raw) -> dict[str, Any]:
    reading.check_flags(raw, ("attention_bias", "num_experts"))
    bias = raw.get("attention_bias", False)
    return {
        "attention_bias": bias,
        "attention_out_bias": bias,
        "query_key_norm": "width",
        "experts": _qwen_experts(raw, "num_experts"),
    }


def _granite(raw: Raw) -> dict[str, Any]:
    reading.check_flags(raw, ("attention_bias", "num_local_experts", *granite.MULTIPLIERS))
    has_shared = raw["model_type"] == "granitemoeshared"
    return {
        **granite.shared_constants(raw),
        "experts": Experts(
            required(raw, "num_local_experts"),
            required(raw, "num_experts_per_tok"),
            normalized=True,
            shared_size=(raw.get("shared_intermediate_size") or None) if has_shared else None,
        ),
    }


def _qwen2(raw: Raw) -> dict[str, Any]:
    reading.check_flags(
        raw, ("layer_types", "num_experts", "sliding_window", "use_sliding_window", "qkv_bias")
    )
    check_all_layers_have_experts(raw)
    rope, window = reading.rope(raw), raw.get("sliding_window")
    use_window = raw.get("use_sliding_window", False)

    def default(layer: int) -> str:
        has_window = use_window and layer < required(raw, "max_window_layers")
        return SLIDING if has_window and (layer + 1) % 2 else FULL

    types = reading.layer_types(raw, default)
    if SLIDING in types and not (use_window and window):
        raise reading.refuse(
            raw, "layer_types", f"'{SLIDING}' only with use_sliding_window and sliding_window"
        )
    return {
        "intermediate_size": required(raw, "moe_intermediate_size"),
        "attention_bias": raw.get("qkv_bias", True),
        "layer_kinds": tuple(
            LayerKind(rope, window if kind == SLIDING else None) for kind in types
        ),
        "experts": replace(
            _qwen_experts(raw, "num_experts"),
            shared_size=required(raw, "shared_expert_intermediate_size"),
            shared_gate=True,
        ),
    }


def _qwen3(raw: Raw) -> dict[str, Any]:
    count = "num_experts" if "num_experts" in raw else "num_local_experts"
    flags = ("attention_bias", "sliding_window", "use_sliding_window", count)
    if raw.get("num_local_experts") == required(raw, count):  # Some files have both keys.
        flags = (*flags, "num_local_experts")
    reading.check_flags(raw, flags)
    check_all_layers_have_experts(raw)
    window = required(raw, "sliding_window") if raw.get("use_sliding_window") else None
    bias = raw.get("attention_bias", False)
    return {
        "head_dim": required(raw, "head_dim"),
        "intermediate_size": required(raw, "moe_intermediate_size"),
        "layer_kinds": reading.uniform_layers(raw, LayerKind(reading.rope(raw), window)),
        "attention_bias": bias,
        "attention_out_bias": bias,
        "query_key_norm": "head",
        "experts": _qwen_experts(raw, count),
    }


def check_all_layers_have_experts(raw: Raw) -> None:
    """Refuses models with experts in some of their layers only (`mlp_only_layers` is a flag).

    Raises:
      UserError: names the option.
    """
    if raw.get("decoder_sparse_step", 1) != 1:
        raise reading.refuse(raw, "decoder_sparse_step", "1: experts in every layer")


def _qwen_experts(raw: Raw, count: str) -> Experts:
    return Experts(
        required(raw, count),
        required(raw, "num_experts_per_tok"),
        reading.nullable(raw, "norm_topk_prob"),
    )


_READERS = {
    "granitemoe": _granite,
    "granitemoeshared": _granite,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "qwen2_moe": _qwen2,
    "qwen3_moe": _qwen3,
}
