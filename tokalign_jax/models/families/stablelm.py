"""StableLM: LLaMA with layer norms and partial rotary embedding.

Some models have biases, norms for each head, or parallel layers.
"""

from dataclasses import replace

from tokalign_jax.models.config import LayerKind, ModelConfig
from tokalign_jax.models.families import llama, reading
from tokalign_jax.models.families.llama import LAYER
from tokalign_jax.models.families.reading import Raw, required
from tokalign_jax.models.weights import Weight, direct

MODEL_TYPES = ("stablelm",)

BUFFERS, HEAD = llama.BUFFERS, llama.HEAD


def config_from_hf(raw: Raw) -> ModelConfig:
    """Reads the config of a StableLM model.

    `use_qkv_bias`, `qk_layernorm` and `use_parallel_residual` are newer than the format and default
    to false.

    Raises:
      UserError: a constant is missing, or an option is not implemented.
    """
    reading.check_flags(
        raw, ("partial_rotary_factor", "qk_layernorm", "use_parallel_residual", "use_qkv_bias")
    )
    rotary = raw.get("rope_parameters") or {}
    fraction = rotary.get("partial_rotary_factor") or required(raw, "partial_rotary_factor")
    parallel = raw.get("use_parallel_residual", False)
    return reading.decoder(
        raw,
        norm="layer",
        norm_bias=True,
        norm_epsilon=required(raw, "layer_norm_eps"),
        attention_bias=raw.get("use_qkv_bias", False),
        parallel_residual=parallel,
        shared_norm=parallel,
        query_key_norm="each_head" if raw.get("qk_layernorm") else None,
        layer_kinds=reading.uniform_layers(raw, LayerKind(reading.rope(raw, fraction=fraction))),
    )


def weights(config: ModelConfig) -> list[Weight]:
    """Returns the weight table."""
    heads = {"q": config.num_heads, "k": config.num_kv_heads} if config.query_key_norm else {}
    each_head = "{index}"
    return [
        *llama.outer_weights(config),
        *llama.norms(config),
        *llama.attention(replace(config, query_key_norm=None)),
        *llama.mlp(config),
        *(
            direct(
                f"{LAYER}.self_attn.{name}_layernorm.norms.{each_head}.weight",
                f"layers/attention/{name}_norm/scale",
                count=count,
            )
            for name, count in heads.items()
        ),
    ]
