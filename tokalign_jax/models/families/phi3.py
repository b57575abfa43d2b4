"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: LLaMA with fused projections, partial RoPE, LongRoPE."""

from tokalign_jax.models.config import LayerKind, ModelConfig
from tokalign_jax.models.families import llama, reading
from tokalign_jax.models.families.llama import LAYER
from tokalign_jax.models.families.reading import Raw
from tokalign_jax.models.weights import Weight, fused, linear

MODEL_TYPES = ("phi3",)

BUFFERS, HEAD = llama.BUFFERS, llama.HEAD


def config_from_hf(raw: Raw) -> ModelConfig:
    """Reads the config of a Phi-3 model.

    `partial_rotary_factor` is newer than the format and defaults to 1. The first files name
    LongRoPE `su`.

    Raises:
      UserError: a constant is missing, or an option is not implemented.
    """
    reading.check_flags(raw, ("partial_rotary_factor", "sliding_window"))
    settings = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    if "su" in (settings.get("rope_type"), settings.get("type")):
        settings["rope_type"] = "longrope"
    kind = LayerKind(
        reading.rope({**raw, "rope_parameters": settings, "rope_scaling": None}, fraction=1.0),
        reading.nullable(raw, "sliding_window"),
    )
    return reading.decoder(raw, layer_kinds=reading.uniform_layers(raw, kind))


def weights(config: ModelConfig) -> list[Weight]:
    """Returns the weight table."""
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    qkv = [f"layers/attention/{name}/kernel" for name in ("q_proj", "k_proj", "v_proj")]
    gate_up = [f"layers/mlp/{name}/kernel" for name in ("gate_proj", "up_proj")]
    return [
        *llama.outer_weights(config),
        *llama.norms(config),
        fused(f"{LAYER}.self_attn.qkv_proj.weight", qkv, (queries, keys, keys), outputs=-2),
        *linear(f"{LAYER}.self_attn.o_proj", "layers/attention/o_proj", bias=False),
        fused(
            f"{LAYER}.mlp.gate_up_proj.weight", gate_up, (config.intermediate_size,) * 2, outputs=-2
        ),
        *linear(f"{LAYER}.mlp.down_proj", "layers/mlp/down_proj", bias=False),
    ]
