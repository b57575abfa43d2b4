"""LLaMA 1 to 3, and whatever else calls itself `llama` (SmolLM 1 and 2, TinyLlama, Yi, DeepSeek's
small ones ...).
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType

from tokalign_jax.models.config import LayerKind, ModelConfig
from tokalign_jax.models.families import reading
from tokalign_jax.models.families.reading import Raw
from tokalign_jax.models.weights import Order, Weight, linear, norm, same

MODEL_TYPES = ("llama",)

BUFFERS = r"rotary_emb\.inv_freq$"
"""Tensors in old checkpoints that hold no parameters."""


def config_from_hf(raw: Raw) -> ModelConfig:
    """The constants of a LLaMA model.

    Where keys that are younger than the format (head_dim, num_key_value_heads, rope_theta, the
    biases) are absent, the value is the one that the code of that time had built in.

    Raises:
      UserError: a constant is missing, or a flag asks for what is not implemented.
    """
    reading.check_flags(raw, ("attention_bias", "mlp_bias", "partial_rotary_factor"))
    attention_bias = raw.get("attention_bias", False)
    return reading.decoder(
        raw,
        attention_bias=attention_bias,
        attention_out_bias=attention_bias,
        mlp_bias=raw.get("mlp_bias", False),
        layer_kinds=reading.uniform(raw, LayerKind(reading.rope(raw, theta=10000.0))),
    )


Names = Mapping[str, str]
"""Our path below `layers/` -> the name below `model.layers.{layer}.`, where it is not LLaMA's."""


def weights(
    config: ModelConfig, names: Names = MappingProxyType({}), order: Order | None = None
) -> list[Weight]:
    """The weight table under LLaMA's names, which most families took over.

    Args:
      names: other names of single modules.
      order: of the elements of each query and key, where the rotary embedding pairs them
        otherwise (`interleaved`). Only their products count, which no order changes.
    """
    return [
        *ends(config),
        *norms(config, names),
        *attention(config, names, order),
        *mlp(config, names),
    ]


def interleaved(config: ModelConfig) -> Order:
    """The order of a head whose neighbours are pairs: ours are half the rotary size apart."""
    size = max((kind.rope.size for kind in config.layer_kinds if kind.rope), default=0)
    return [*range(0, size, 2), *range(1, size, 2), *range(size, config.head_dim)]


HEAD = same("lm_head.weight", "lm_head/kernel")

LAYER = "model.layers.{layer}"


def ends(config: ModelConfig) -> list[Weight]:
    """All that is not of a layer."""
    return [
        same("model.embed_tokens.weight", "embed_tokens/embedding"),
        *norm("model.norm", "final_norm", config.norm_bias, config.norm_scale),
        *([] if config.tie_word_embeddings else [HEAD]),
    ]


def attention(
    config: ModelConfig, names: Names = MappingProxyType({}), order: Order | None = None
) -> list[Weight]:
    """Projections, and norms of queries and keys. Args: as for `weights`."""
    biases = dict.fromkeys(("q_proj", "k_proj", "v_proj"), config.attention_bias)
    projections = biases | {"o_proj": config.attention_out_bias}
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    normed = ("q_norm", "k_norm") if config.query_key_norm and config.norm_scale else ()
    return [
        *(
            weight
            for name, bias in projections.items()
            for weight in linear(
                _name(names, f"attention/{name}", f"self_attn.{name}"),
                f"layers/attention/{name}",
                bias,
                order=_in_heads(order, heads[name]) if order and name in heads else None,
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


def _in_heads(order: Order, heads: int) -> Order:
    return [head * len(order) + element for head in range(heads) for element in order]


def norms(config: ModelConfig, names: Names = MappingProxyType({})) -> list[Weight]:
    """Those of the layers. A norm after attention alone has the name that otherwise the one before
    the MLP has."""
    usual = {
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
        for theirs, ours in usual.items()
        if not (config.shared_norm and ours == "post_attention_norm")
        for weight in norm(
            _name(names, ours, theirs), f"layers/{ours}", config.norm_bias, config.norm_scale
        )
    ]


def mlp(config: ModelConfig, names: Names = MappingProxyType({})) -> list[Weight]:
    """The feed-forward projections."""
    projections = ("gate_proj", "up_proj", "down_proj")[0 if config.gated_mlp else 1 :]
    return [
        weight
        for name in projections
        for weight in linear(
            _name(names, f"mlp/{name}", f"mlp.{name}"), f"layers/mlp/{name}", config.mlp_bias
        )
    ]


def only_in(mixer: str, config: ModelConfig, weights: Iterable[Weight]) -> list[Weight]:
    """Weights that only the layers with this mixer have."""
    layers = tuple(i for i, kind in enumerate(config.layer_kinds) if kind.mixer == mixer)
    return [replace(weight, layers=layers) for weight in weights if layers]


def _name(names: Names, ours: str, usual: str) -> str:
    return f"{LAYER}.{names.get(ours, usual)}"
