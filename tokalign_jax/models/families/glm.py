"""GLM 4 (9B and 0414): interleaved partial rotary embedding, fused gate and up projection.

The 0414 models (`glm4`) have norms before and after attention and feed-forward.
"""

from tokalign_jax.models.config import LayerKind, ModelConfig
from tokalign_jax.models.families import llama, reading
from tokalign_jax.models.families.reading import Raw
from tokalign_jax.models.weights import Weight, fused, linear

MODEL_TYPES = ("glm", "glm4")

BUFFERS, HEAD = llama.BUFFERS, llama.HEAD


def config_from_hf(raw: Raw) -> ModelConfig:
    """Reads the config of a GLM model; half of each head is rotated by default.

    Raises:
      UserError: a constant is missing, or an option is not implemented.
    """
    reading.check_flags(raw, ("attention_bias", "partial_rotary_factor"))
    return reading.decoder(
        raw,
        attention_bias=reading.required(raw, "attention_bias"),
        layer_kinds=reading.uniform_layers(raw, LayerKind(reading.rope(raw, fraction=0.5))),
        norm_placement="both" if raw["model_type"] == "glm4" else "before",
    )


def weights(config: ModelConfig) -> list[Weight]:
    """Returns the weight table."""
    names = {
        "attention_out_norm": "post_self_attn_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "mlp_out_norm": "post_mlp_layernorm",
    }
    gate_up = [f"layers/mlp/{name}/kernel" for name in ("gate_proj", "up_proj")]
    return [
        *llama.outer_weights(config),
        *llama.norms(config, names),
        *llama.attention(config, order=llama.interleaved_order(config)),
        fused(
            f"{llama.LAYER}.mlp.gate_up_proj.weight",
            gate_up,
            (config.intermediate_size,) * 2,
            outputs=-2,
        ),
        *linear(f"{llama.LAYER}.mlp.down_proj", "layers/mlp/down_proj", bias=False),
    ]
