"""Granite 3, and Granite 4 without Mamba layers.

LLaMA with multipliers for embedding, attention, residual stream and logits. Granite 4 may have no
rotary embedding.
"""

from typing import Any

from tokalign_jax.models.config import LayerKind, ModelConfig
from tokalign_jax.models.families import llama, reading
from tokalign_jax.models.families.reading import FULL, Raw, required
from tokalign_jax.models.weights import Weight, fused, linear

MODEL_TYPES = ("granite", "granitemoehybrid")

BUFFERS, HEAD = llama.BUFFERS, llama.HEAD


def config_from_hf(raw: Raw) -> ModelConfig:
    """Reads the config of a Granite model.

    Raises:
      UserError: a constant is missing, or an option is not implemented.
    """
    if raw["model_type"] == "granitemoehybrid":
        return _granite4(raw)
    reading.check_flags(raw, ("attention_bias", "mlp_bias", *MULTIPLIERS))
    return reading.decoder(
        raw,
        layer_kinds=reading.uniform_layers(raw, LayerKind(reading.rope(raw))),
        mlp_bias=raw.get("mlp_bias", False),
        **shared_constants(raw),
    )


MULTIPLIERS = (
    "attention_multiplier",
    "embedding_multiplier",
    "logits_scaling",
    "residual_multiplier",
)
"""Keys that `shared_constants` reads besides `attention_bias`."""


def shared_constants(raw: Raw) -> dict[str, Any]:
    """Reads the constants that all Granite models share."""
    bias = raw.get("attention_bias", False)
    return {
        "attention_bias": bias,
        "attention_out_bias": bias,
        "attention_scale": float(required(raw, "attention_multiplier")),
        "embedding_scale": float(required(raw, "embedding_multiplier")),
        "residual_scale": float(required(raw, "residual_multiplier")),
        "output_scale": 1 / required(raw, "logits_scaling"),
    }


def _granite4(raw: Raw) -> ModelConfig:
    flags = ("attention_bias", "layer_types", "layers_block_type", "position_embedding_type")
    reading.check_flags(raw, (*flags, *MULTIPLIERS))
    types = raw.get("layer_types") or raw.get("layers_block_type")
    if not types or not set(types) <= {"attention", FULL}:
        raise reading.refuse(raw, "layer_types", f"only 'attention' or '{FULL}': no Mamba layers")
    positions = raw.get("position_embedding_type")
    if positions not in ("rope", "nope", None):
        raise reading.refuse(raw, "position_embedding_type", "'rope', 'nope'")
    rope = reading.rope(raw) if positions == "rope" else None
    return reading.decoder(
        raw,
        intermediate_size=required(raw, "shared_intermediate_size"),
        layer_kinds=reading.uniform_layers(raw, LayerKind(rope)),
        **shared_constants(raw),
    )


def weights(config: ModelConfig) -> list[Weight]:
    """Returns the weight table; Granite 4 has gate and up projection in one tensor."""
    if config.model_type == "granite":
        return llama.weights(config)
    gate_up = [f"layers/mlp/{name}/kernel" for name in ("gate_proj", "up_proj")]
    block = f"{llama.LAYER}.shared_mlp"
    return [
        *llama.outer_weights(config),
        *llama.norms(config),
        *llama.attention(config),
        fused(f"{block}.input_linear.weight", gate_up, (config.intermediate_size,) * 2, outputs=-2),
        *linear(f"{block}.output_linear", "layers/mlp/down_proj", bias=False),
    ]
