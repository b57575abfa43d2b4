"""GLM 4.5: experts in all layers but the first, with a bias that only chooses, and a shared one."""

from tokalign_jax.models.config import Experts, LayerKind, ModelConfig
from tokalign_jax.models.families import llama, mixture, reading
from tokalign_jax.models.families.llama import LAYER
from tokalign_jax.models.families.reading import Raw, required
from tokalign_jax.models.weights import Weight, direct, linear

MODEL_TYPES = ("glm4_moe",)

BUFFERS, HEAD = rf"{llama.BUFFERS}|^model\.layers\.(46|92)\.", llama.HEAD
"""With the layers for multi-token prediction of published models, behind the last layer."""

BLOCK = f"{LAYER}.mlp"


def config_from_hf(raw: Raw) -> ModelConfig:
    """Reads the config of a GLM 4.5 model; half of each head is rotated by default.

    Raises:
      UserError: a constant is missing, or an option is not implemented.
    """
    reading.check_flags(raw, ("attention_bias", "partial_rotary_factor", "use_qk_norm"))
    for key in ("n_group", "topk_group"):
        if required(raw, key) != 1:
            raise reading.refuse(raw, key, "1: experts are not chosen by groups")
    rope, dense_layers = reading.rope(raw, fraction=0.5), required(raw, "first_k_dense_replace")
    size = required(raw, "moe_intermediate_size")
    return reading.decoder(
        raw,
        layer_kinds=tuple(
            LayerKind(rope, feed_forward="dense_mlp" if layer < dense_layers else "mlp")
            for layer in range(required(raw, "num_hidden_layers"))
        ),
        attention_bias=required({"attention_bias": False, **raw}, "attention_bias"),
        query_key_norm="head" if reading.nullable(raw, "use_qk_norm") else None,
        intermediate_size=size,
        dense_size=required(raw, "intermediate_size"),
        experts=Experts(
            required(raw, "n_routed_experts"),
            required(raw, "num_experts_per_tok"),
            reading.nullable(raw, "norm_topk_prob"),
            score="sigmoid",
            normalization_epsilon=1e-20,
            selection_bias=True,
            weight_scale=float(required(raw, "routed_scaling_factor")),
            shared_size=size * required(raw, "n_shared_experts"),
        ),
    )


def weights(config: ModelConfig) -> list[Weight]:
    """Returns the weight table of checkpoints on the hub."""
    return _table(config, mixture.experts(config, BLOCK))


def packed_weights(config: ModelConfig) -> list[Weight]:
    """Returns the weight table of checkpoints saved by transformers 5, with packed experts."""
    return _table(config, mixture.packed_experts(config, BLOCK))


def _table(config: ModelConfig, experts: list[Weight]) -> list[Weight]:
    mixtures = [
        *linear(f"{BLOCK}.gate", "layers/mlp/router", bias=False),
        direct(f"{BLOCK}.gate.e_score_correction_bias", "layers/mlp/selection_bias"),
        *llama.projections(f"{BLOCK}.shared_experts", "layers/mlp/shared"),
        *experts,
    ]
    return [
        *llama.outer_weights(config),
        *llama.norms(config),
        *llama.attention(config),
        *llama.restrict_to_part("mlp", config, mixtures),
        *llama.restrict_to_part("dense_mlp", config, llama.projections(BLOCK, "layers/dense_mlp")),
    ]
