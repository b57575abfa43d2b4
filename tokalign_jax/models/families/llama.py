"""LLaMA 1 to 3 and other models of type `llama` (SmolLM 1 and 2, TinyLlama, Yi, small DeepSeek)."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType

from tokalign_jax.models.config import LayerKind, ModelConfig
from tokalign_jax.models.families import reading
from tokalign_jax.models.families.reading import Raw
from tokalign_jax.models.weights import Order, Weight, direct, linear, norm

MODEL_TYPES = ("llama",)

BUFFERS = r"rotary_emb\.inv_freq$"
"""Tensors of old checkpoints that are not parameters."""


def config_from_hf(raw: Raw) -> ModelConfig:
    """Reads the config of a LLaMA model.

    Keys that are newer than the format (head_dim, num_key_value_heads, rope_theta, the biases)
    default to the values built into earlier code.

    Raises:
      UserError: a constant is missing, or an option is not implemented.
    """
    reading.check_flags(raw, ("attention_bias", "mlp_bias", "partial_rotary_factor"))
    attention_bias = raw.get("attention_bias", False)
    return reading.decoder(
        raw,
        attention_bias=attention_bias,
        attention_out_bias=attention_bias,
        mlp_bias=raw.get("mlp_bias", False),
        layer_kinds=reading.uniform_layers(raw, LayerKind(reading.rope(raw, theta=10000.0))),
    )


Names = Mapping[str, str]
"""Path below `layers/` -> name below `model.layers.{layer}.`, where it differs from LLaMA's."""


def weights(
    config: ModelConfig, names: Names = MappingProxyType({}), order: Order | None = None
) -> list[Weight]:
    """Returns the weight table with LLaMA's names, which most families use.

    Args:
      config: the model's config.
      names: names of modules that differ.
      order: permutation of the elements of each query and key, for rotary embeddings that pair
        them differently (`interleaved_order`). Attention depends only on their products, which a
        common permutation does not change.
    """
    return [
        *outer_weights(config),
        *norms(config, names),
        *attention(config, names, order),
        *mlp(config, names),
    ]


def interleaved_order(config: ModelConfig) -> Order:
    """Returns the permutation from interleaved pairs to pairs half the rotary size apart."""
    size = max((kind.rope.size for kind in config.layer_kinds if kind.rope), default=0)
    return [*range(0, size, 2), *range(1, size, 2), *range(size, config.head_dim)]


HEAD = direct("lm_head.weight", "lm_head/kernel")

LAYER = "model.layers.{layer}"


def outer_weights(config: ModelConfig) -> list[Weight]:
    """Returns the weights outside the layers."""
    return [
        direct("model.embed_tokens.weight", "embed_tokens/embedding"),
        *norm("model.norm", "final_norm", config.norm_bias, config.norm_scale),
        *([] if config.tie_word_embeddings else [HEAD]),
    ]


def attention(
    config: ModelConfig, names: Names = MappingProxyType({}), order: Order | None = None
) -> list[Weight]:
    """Returns the projections, and the norms of queries and keys; args as for `weights`."""
    biases = dict.fromkeys(("q_proj", "k_proj", "v_proj"), config.attention_bias)
    projections = biases | {"o_proj": config.attention_out_bias}
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    has_norms = config.query_key_norm not in (None, "unscaled") and config.norm_scale
    normed = ("q_norm", "k_norm") if has_norms else ()
    return [
        *(
            weight
            for name, bias in projections.items()
            for weight in linear(
                _name(names, f"attention/{name}", f"self_attn.{name}"),
                f"layers/attention/{name}",
                bias,
                order=_repeat_by_head(order, heads[name]) if order and name in heads else None,
            )
        ),
        *(
            weight
            for name in normed
            for weight in norm(
                _name(names, f"attention/{name}", f"self_attn.{name}"),
                f"layers/attention/{name}",
                False,
                order=order,
            )
        ),
    ]


def _repeat_by_head(order: Order, heads: int) -> Order:
    return [head * len(order) + element for head in range(heads) for element in order]


def norms(config: ModelConfig, names: Names = MappingProxyType({})) -> list[Weight]:
    """Returns the layers' norms.

    With norms only after attention, Hugging Face gives the norm after attention the name that
    otherwise denotes the norm before the MLP.
    """
    module_names = {
        "before": {
            "input_layernorm": "input_norm",
            "post_attention_layernorm": "post_attention_norm",
        },
        "after": {
            "post_attention_layernorm": "attention_out_norm",
            "post_feedforward_layernorm": "mlp_out_norm",
        },
        "both": {
            "input_layernorm": "input_norm",
            "post_attention_layernorm": "attention_out_norm",
            "pre_feedforward_layernorm": "post_attention_norm",
            "post_feedforward_layernorm": "mlp_out_norm",
        },
    }[config.norm_placement]
    return [
        weight
        for theirs, ours in module_names.items()
        if not (config.shared_norm and ours == "post_attention_norm")
        for weight in norm(
            _name(names, ours, theirs), f"layers/{ours}", config.norm_bias, config.norm_scale
        )
    ]


def mlp(config: ModelConfig, names: Names = MappingProxyType({})) -> list[Weight]:
    """Returns the feed-forward projections."""
    projections = ("gate_proj", "up_proj", "down_proj")[0 if config.gated_mlp else 1 :]
    return [
        weight
        for name in projections
        for weight in linear(
            _name(names, f"mlp/{name}", f"mlp.{name}"), f"layers/mlp/{name}", config.mlp_bias
        )
    ]


def projections(theirs: str, ours: str) -> list[Weight]:
    """Returns the projections of a gated feed-forward without biases, by its name and path."""
    return [
        weight
        for name in ("gate_proj", "up_proj", "down_proj")
        for weight in linear(f"{theirs}.{name}", f"{ours}/{name}", bias=False)
    ]


def restrict_to_part(part: str, config: ModelConfig, weights: Iterable[Weight]) -> list[Weight]:
    """Restricts weights to the layers with this mixer or feed-forward."""
    layers = tuple(i for i, kind in enumerate(config.layer_kinds) if part in kind.parts)
    return [replace(weight, layers=layers) for weight in weights if layers]


def _name(names: Names, ours: str, default: str) -> str:
    return f"{LAYER}.{names.get(ours, default)}"
