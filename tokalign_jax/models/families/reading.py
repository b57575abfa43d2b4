"""Parsing of config.json: keys shared by the families, as named by transformers 5 and earlier."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from tokalign_jax.errors import UserError
from tokalign_jax.models.config import LayerKind, ModelConfig
from tokalign_jax.models.rotary import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    RopeScaling,
    YarnScaling,
)

Raw = Mapping[str, Any]
"""The contents of config.json."""

SLIDING, FULL = "sliding_attention", "full_attention"
"""Layer types as named in config.json."""

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu_squared",
    "silu": "silu",
    "swish": "silu",
}

_SCALINGS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")

# Options of some families, each with the values that turn it off.
_FLAGS: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "alibi": (False,),
    "attention_bias": (False,),
    "attention_multiplier": (),
    "attention_out_bias": (False,),
    "attn_logit_softcapping": (),
    "clip_qkv": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "is_causal": (True,),
    "lm_head_bias": (False,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "mlp_bias": (False,),
    "mlp_only_layers": ([],),
    "no_rope_layers": ([],),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "partial_rotary_factor": (1,),
    "qk_layernorm": (False,),
    "qkv_bias": (),
    "qk_norm": (False,),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
    "rope_interleaved": (False,),
    "rotary_pct": (1,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "sliding_window": (),
    "use_bias": (False,),
    "use_bidirectional_attention": (False,),
    "use_mrope": (False,),
    "use_parallel_residual": (False,),
    "use_qk_norm": (False,),
    "use_qkv_bias": (False,),
    "use_sliding_window": (False,),
}


# --- Single keys --------------------------------------------------------------------------------


def required(raw: Raw, key: str) -> Any:
    """Returns `raw[key]`; constants of a model are never guessed.

    Raises:
      UserError: the key is missing or null.
    """
    if raw.get(key) is None:
        raise _missing(key)
    return raw[key]


def nullable(raw: Raw, key: str) -> Any:
    """Returns `raw[key]`, which may be null but must be present.

    Raises:
      UserError: the key is missing.
    """
    if key not in raw:
        raise _missing(key)
    return raw[key]


def refuse(raw: Raw, flag: str, implemented: str) -> UserError:
    """Returns the error for an option that is not implemented for the family."""
    return UserError(
        f"the model's config.json sets '{flag}' to {raw.get(flag)!r}, which is not implemented for"
        f" model_type '{raw.get('model_type')}' (implemented: {implemented}): choose another model,"
        " since the results of this one would be wrong"
    )


def check_flags(raw: Raw, implemented: Collection[str] = ()) -> None:
    """Refuses quantized models and options that are not implemented for the family.

    Args:
      raw: the config.
      implemented: the options that the family reads.

    Raises:
      UserError: names the option.
    """
    if raw.get("quantization_config"):
        quantization = raw["quantization_config"]
        method = (
            quantization.get("quant_method", "unknown")
            if isinstance(quantization, Mapping)
            else quantization
        )
        raise UserError(
            f"the model's config.json has a 'quantization_config' (method {method}): quantized"
            " weights are not supported; give the original model in float32, float16 or bfloat16"
            " from which it was quantized"
        )
    for flag, off_values in _FLAGS.items():
        if flag not in implemented and raw.get(flag) is not None and raw[flag] not in off_values:
            raise refuse(raw, flag, " or ".join(["null", *map(repr, off_values)]))
    if "layer_types" not in implemented and not set(raw.get("layer_types") or ()) <= {FULL}:
        raise refuse(raw, "layer_types", f"only '{FULL}'")


def activation(raw: Raw, key: str = "hidden_act") -> Any:
    """Returns the activation as named in `ModelConfig`."""
    name = required(raw, key)
    if name not in _ACTIVATIONS:
        raise refuse(raw, key, ", ".join(_ACTIVATIONS))
    return _ACTIVATIONS[name]


def _missing(key: str) -> UserError:
    return UserError(
        f"the model's config.json has no '{key}', which is needed to rebuild the model exactly: add"
        " the value used in training"
    )


# --- Rotary embedding ---------------------------------------------------------------------------


def rope(
    raw: Raw,
    *,
    theta: float | None = None,
    fraction: float | None = None,
    alpha: bool = False,
) -> Rope:
    """Reads the rotary embedding.

    transformers 5 stores all settings in `rope_parameters`; older files have `rope_theta` and
    `partial_rotary_factor` at the top level, and the scaling in `rope_scaling`, its kind as `type`.

    Args:
      raw: the config.
      theta: default of `rope_theta`; None if it is required.
      fraction: default of the rotated share of a head; None if the family has no partial rotary
        embedding.
      alpha: dynamic scaling with an `alpha` means a larger base and no scaling.

    Raises:
      UserError: a constant is missing, or the scaling is not implemented.
    """
    settings = _rope_settings(raw)
    if fraction is None and settings.get("partial_rotary_factor") not in (None, 1):
        raise refuse({**raw, **settings}, "partial_rotary_factor", "1.0")
    if theta is not None and settings.get("rope_theta") is None:
        settings["rope_theta"] = theta
    if settings.get("llama_4_scaling_beta"):
        raise refuse(settings | {"model_type": raw.get("model_type")}, "llama_4_scaling_beta", "0")
    size = int(head_dim(raw) * (settings.get("partial_rotary_factor") or fraction or 1.0))
    base = float(required(settings, "rope_theta"))
    if settings.get("rope_type", settings.get("type")) == "dynamic" and settings.get("alpha"):
        if not alpha:
            raise refuse(settings | {"model_type": raw.get("model_type")}, "alpha", "null")
        return Rope(size, base * settings["alpha"] ** (size / (size - 2)), None)
    return Rope(size, base, _rope_scaling(raw, settings))


def rope_by_kind(raw: Raw, kind: str) -> Rope | None:
    """Reads the rotary embedding of a layer type from files that store it by type.

    Returns:
      The embedding, or None for older files without `rope_parameters`.

    Raises:
      UserError: `rope_parameters` has no entry for this type.
    """
    settings = raw.get("rope_parameters")
    if not settings:
        return None
    if kind not in settings:
        raise refuse(raw, "rope_parameters", f"an object by layer type, including '{kind}'")
    return rope({**raw, "rope_parameters": settings[kind], "rope_scaling": None})


def head_dim(raw: Raw) -> int:
    """Returns H; older files lack the key, and their heads share the model's width."""
    return raw.get("head_dim") or required(raw, "hidden_size") // required(
        raw, "num_attention_heads"
    )


def _rope_settings(raw: Raw) -> dict[str, Any]:
    """Returns all rotary settings under their names in transformers 5."""
    new, old = raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {}
    if new and old and any(new.get(key) != value for key, value in old.items()):
        raise UserError(
            f"the model's config.json has both 'rope_parameters' ({new}) and 'rope_scaling'"
            f" ({old}), which differ: keep the one used in training"
        )
    top_level = {
        key: raw[key] for key in ("rope_theta", "partial_rotary_factor") if raw.get(key) is not None
    }
    return top_level | dict(new or old)


def _rope_scaling(raw: Raw, settings: Raw) -> RopeScaling | None:
    positions = required(raw, "max_position_embeddings")
    original = (
        raw.get("original_max_position_embeddings")
        or settings.get("original_max_position_embeddings")
        or positions
    )
    factor = settings.get("factor") or positions / original
    match settings.get("rope_type", settings.get("type", "default")):
        case "default":
            return None
        case "linear":
            return LinearScaling(float(required(settings, "factor")))
        case "dynamic":
            return DynamicScaling(float(required(settings, "factor")), int(positions))
        case "llama3":
            return Llama3Scaling(
                factor=float(required(settings, "factor")),
                low_frequency_factor=float(required(settings, "low_freq_factor")),
                high_frequency_factor=float(required(settings, "high_freq_factor")),
                original_positions=int(original),
            )
        case "yarn":
            return YarnScaling(
                factor=float(factor),
                magnitude=_yarn_magnitude(settings, factor),
                beta_fast=float(settings.get("beta_fast") or 32),
                beta_slow=float(settings.get("beta_slow") or 1),
                original_positions=int(original),
                truncate=settings.get("truncate", True),
            )
        case "longrope":
            growth = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
            return LongRopeScaling(
                short=tuple(required(settings, "short_factor")),
                long=tuple(required(settings, "long_factor")),
                magnitude=float(settings.get("attention_factor") or growth),
                original_positions=int(original),
            )
    flag = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    raise refuse(raw, flag, f"rope_type {', '.join(_SCALINGS)}")


def _yarn_magnitude(settings: Raw, factor: float) -> float:
    """Returns `attention_factor`, else the paper's 0.1 ln(factor) + 1 or DeepSeek's variant."""

    def growth(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    numerator, denominator = settings.get("mscale"), settings.get("mscale_all_dim")
    default = growth(1.0)
    if numerator and denominator:
        default = growth(numerator) / growth(denominator)
    magnitude = settings.get("attention_factor")
    return float(default if magnitude is None else magnitude)


# --- Configs ------------------------------------------------------------------------------------

_LLAMA_READERS: dict[str, Callable[[Raw], Any]] = {
    "model_type": lambda raw: raw["model_type"],
    "vocab_size": lambda raw: required(raw, "vocab_size"),
    "hidden_size": lambda raw: required(raw, "hidden_size"),
    "num_layers": lambda raw: required(raw, "num_hidden_layers"),
    "num_heads": lambda raw: required(raw, "num_attention_heads"),
    "num_kv_heads": lambda raw: (
        raw.get("num_key_value_heads") or required(raw, "num_attention_heads")
    ),
    "head_dim": head_dim,
    "intermediate_size": lambda raw: required(raw, "intermediate_size"),
    "activation": activation,
    "gated_mlp": lambda raw: True,
    "norm": lambda raw: "rms",
    "norm_epsilon": lambda raw: required(raw, "rms_norm_eps"),
    "parallel_residual": lambda raw: False,
    "attention_bias": lambda raw: False,
    "attention_out_bias": lambda raw: False,
    "mlp_bias": lambda raw: False,
    "tie_word_embeddings": lambda raw: raw.get("tie_word_embeddings", False),
    "max_positions": lambda raw: required(raw, "max_position_embeddings"),
    "layer_kinds": lambda raw: uniform_layers(raw, LayerKind(rope(raw))),
}


def decoder(raw: Raw, **constants: Any) -> ModelConfig:
    """Reads a decoder with LLaMA's keys.

    Defaults are RMS norms, a gated feed-forward, no biases and uniform layers. Files without
    num_key_value_heads, which is newer than the format, have as many as query heads; files without
    tie_word_embeddings have an untied head.

    Args:
      raw: the config.
      **constants: fields that are set to these values instead of being read.

    Raises:
      UserError: a constant is missing, or has a value that is not implemented.
    """
    read = {name: reader(raw) for name, reader in _LLAMA_READERS.items() if name not in constants}
    return ModelConfig(**read, **constants)


def uniform_layers(raw: Raw, kind: LayerKind) -> tuple[LayerKind, ...]:
    """Returns the same kind for all layers."""
    return (kind,) * required(raw, "num_hidden_layers")


def layer_types(
    raw: Raw, default: Callable[[int], str], kinds: Sequence[str] = (SLIDING, FULL)
) -> list[str]:
    """Returns `layer_types`; files older than the key get `default` of each layer number.

    Raises:
      UserError: there are types other than `kinds`, or not one per layer.
    """
    layers = required(raw, "num_hidden_layers")
    types = raw.get("layer_types") or [default(layer) for layer in range(layers)]
    if len(types) != layers or not set(types) <= set(kinds):
        allowed = " or ".join(f"'{kind}'" for kind in kinds)
        raise refuse(raw, "layer_types", f"{allowed} for each of the {layers} layers")
    return list(types)
