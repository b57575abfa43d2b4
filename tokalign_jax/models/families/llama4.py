"""LLaMA 4 (text): layers with and without experts, attention in chunks, some without rotation."""

from tokalign_jax.models.config import Experts, LayerKind, ModelConfig, QueryGrowth
from tokalign_jax.models.families import llama, reading
from tokalign_jax.models.families.llama import LAYER
from tokalign_jax.models.families.reading import FULL, Raw, nullable, required
from tokalign_jax.models.weights import Weight, direct, fused, linear

MODEL_TYPES = ("llama4_text",)

BUFFERS, HEAD = llama.BUFFERS, llama.HEAD

CHUNKED = "chunked_attention"
BLOCK = f"{LAYER}.feed_forward"


def config_from_hf(raw: Raw) -> ModelConfig:
    """Reads the config of a LLaMA 4 text model.

    `attention_bias` is newer than the format and defaults to false. `moe_layers`, `no_rope_layers`
    and `layer_types` may be missing: they then follow from `interleave_moe_layer_step`,
    `no_rope_layer_interval` and `attention_chunk_size`.

    Raises:
      UserError: a constant is missing, or an option is not implemented.
    """
    reading.check_flags(
        raw,
        ("attention_bias", "layer_types", "no_rope_layers", "num_local_experts", "use_qk_norm"),
    )
    bias, normed = raw.get("attention_bias", False), bool(required(raw, "use_qk_norm"))
    return reading.decoder(
        raw,
        layer_kinds=_layer_kinds(raw),
        attention_bias=bias,
        attention_out_bias=bias,
        query_key_norm="unscaled" if normed else None,
        rotate_before_norm=normed,
        dense_size=required(raw, "intermediate_size_mlp"),
        experts=Experts(
            required(raw, "num_local_experts"),
            required(raw, "num_experts_per_tok"),
            normalized=False,
            score="sigmoid",
            weighted_inputs=True,
            shared_size=required(raw, "intermediate_size"),
        ),
    )


def _layer_kinds(raw: Raw) -> tuple[LayerKind, ...]:
    """Returns the layers; those without rotation have no norms, and queries that grow."""
    layers, rope = required(raw, "num_hidden_layers"), reading.rope(raw)
    rotated = raw.get("no_rope_layers") or [
        (layer + 1) % required(raw, "no_rope_layer_interval") != 0 for layer in range(layers)
    ]
    if len(rotated) < layers:
        raise reading.refuse(raw, "no_rope_layers", f"one number for each of the {layers} layers")
    chunk = nullable(raw, "attention_chunk_size")
    types = reading.layer_types(
        raw, lambda layer: FULL if chunk is None or not rotated[layer] else CHUNKED, (CHUNKED, FULL)
    )
    if CHUNKED in types:
        required(raw, "attention_chunk_size")
    with_experts = raw.get("moe_layers")
    if with_experts is None:
        step = required(raw, "interleave_moe_layer_step")
        with_experts = range(step - 1, layers, step)
    growth = None
    if required(raw, "attn_temperature_tuning"):
        growth = QueryGrowth(required(raw, "attn_scale"), required(raw, "floor_scale"), offset=1)
    return tuple(
        LayerKind(
            rope if rotated[layer] else None,
            query_growth=None if rotated[layer] else growth,
            feed_forward="mlp" if layer in with_experts else "dense_mlp",
            chunk=chunk if types[layer] == CHUNKED else None,
            query_key_norm=bool(rotated[layer]),
        )
        for layer in range(layers)
    )


def weights(config: ModelConfig) -> list[Weight]:
    """Returns the weight table; all experts of a layer share tensors [E, in, out]."""
    experts, width = "layers/mlp/experts", config.intermediate_size
    gate_up = [f"{experts}/{name}/kernel" for name in ("gate_proj", "up_proj")]
    mixtures = [
        *linear(f"{BLOCK}.router", "layers/mlp/router", bias=False),
        fused(f"{BLOCK}.experts.gate_up_proj", gate_up, (width, width), outputs=-1),
        direct(f"{BLOCK}.experts.down_proj", f"{experts}/down_proj/kernel"),
        *llama.projections(f"{BLOCK}.shared_expert", "layers/mlp/shared"),
    ]
    return [
        *llama.outer_weights(config),
        *llama.norms(config),
        *llama.attention(config, order=llama.interleaved_order(config)),
        *llama.restrict_to_part("mlp", config, mixtures),
        *llama.restrict_to_part("dense_mlp", config, llama.projections(BLOCK, "layers/dense_mlp")),
    ]


packed_weights = weights
