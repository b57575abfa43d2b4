"""Reading config.json: what every family needs, in the spellings of transformers 5 and of older
releases.
"""

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
"""The content of config.json."""

SLIDING, FULL = "sliding_attention", "full_attention"
"""Kinds of layers by their names in config.json."""

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

# What some family computes otherwise, with the values that mean that nothing is otherwise.
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
    """`raw[key]`.

    Raises:
      UserError: it is absent. A model's constant is never guessed.
    """
    if raw.get(key) is None:
        raise _missing(key)
    return raw[key]


def nullable(raw: Raw, key: str) -> Any:
    """`raw[key]`, which may say null but must be there.

    Raises:
      UserError: it is absent.
    """
    if key not in raw:
        raise _missing(key)
    return raw[key]


def refuse(raw: Raw, flag: str, implemented: str) -> UserError:
    """The error for a config flag that asks for something that is not there."""
    return UserError(
        f"the model's config.json sets '{flag}' to {raw.get(flag)!r}, which is not implemented for"
        f" model_type '{raw.get('model_type')}' (implemented: {implemented}): choose another model,"
        " as this one would be computed wrongly"
    )


def check_flags(raw: Raw, implemented: Collection[str] = ()) -> None:
    """Refuses a model that is quantized, or whose config.json asks for what another family has and
    this one has not.

    Args:
      implemented: the flags that this family reads.

    Raises:
      UserError: naming the flag.
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
            " weights cannot be adapted; give the original model in float32, float16 or bfloat16,"
            " from which this one was made"
        )
    for flag, harmless in _FLAGS.items():
        if flag not in implemented and raw.get(flag) is not None and raw[flag] not in harmless:
            raise refuse(raw, flag, " or ".join(["null", *map(repr, harmless)]))
    if "layer_types" not in implemented and not set(raw.get("layer_types") or ()) <= {FULL}:
        raise refuse(raw, "layer_types", f"only '{FULL}'")


def activation(raw: Raw, key: str = "hidden_act") -> Any:
    """The activation under our name."""
    name = required(raw, key)
    if name not in _ACTIVATIONS:
        raise refuse(raw, key, ", ".join(_ACTIVATIONS))
    return _ACTIVATIONS[name]


def _missing(key: str) -> UserError:
    return UserError(
        f"the model's config.json has no '{key}': it is needed to rebuild the model exactly; add"
        " the value with which the model was trained"
    )


# --- Rotary embedding ---------------------------------------------------------------------------


def rope(
    raw: Raw,
    *,
    theta: float | None = None,
    fraction: float | None = None,
    alpha: bool = False,
) -> Rope:
    """The rotary embedding that config.json describes.

    transformers 5 keeps all of it in `rope_parameters`; older files have `rope_theta` and
    `partial_rotary_factor` on their own, scaling in `rope_scaling`, and its kind under `type`.

    Args: theta: the value where the file says none. fraction: the share of a head that turns where
      the file says none; None: the family has no partial rotary embedding. alpha: dynamic scaling
      with an `alpha` is a larger base and no scaling.

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


def rope_of_kind(raw: Raw, kind: str) -> Rope | None:
    """The rotary embedding of one kind of layers, in files that tell it by kind; None in older
    ones.

    Raises:
      UserError: `rope_parameters` does not say of which kind it is.
    """
    settings = raw.get("rope_parameters")
    if not settings:
        return None
    if kind not in settings:
        raise refuse(
            raw, "rope_parameters", f"an object for each kind of layer, '{kind}' among them"
        )
    return rope({**raw, "rope_parameters": settings[kind], "rope_scaling": None})


def head_dim(raw: Raw) -> int:
    """H; the key is younger than the format, and without it the heads share the width."""
    return raw.get("head_dim") or required(raw, "hidden_size") // required(
        raw, "num_attention_heads"
    )


def _rope_settings(raw: Raw) -> dict[str, Any]:
    """All rotary settings under their names in transformers 5."""
    new, old = raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {}
    if new and old and any(new.get(key) != value for key, value in old.items()):
        raise UserError(
            f"the model's config.json has both 'rope_parameters' ({new}) and 'rope_scaling'"
            f" ({old}), which differ: keep the one with which the model was trained"
        )
    apart = {
        key: raw[key] for key in ("rope_theta", "partial_rotary_factor") if raw.get(key) is not None
    }
    return apart | dict(new or old)


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
    """The paper's 0.1 ln(factor) + 1, or as DeepSeek weighs its logarithm; or what the file says."""

    def growth(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    above, below = settings.get("mscale"), settings.get("mscale_all_dim")
    computed = growth(above) / growth(below) if above and below else growth(1.0)
    given = settings.get("attention_factor")
    return float(computed if given is None else given)


# --- The whole ----------------------------------------------------------------------------------

_USUAL: dict[str, Callable[[Raw], Any]] = {
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
    "layer_kinds": lambda raw: uniform(raw, LayerKind(rope(raw))),
}


def decoder(raw: Raw, **constants: Any) -> ModelConfig:
    """A decoder as most families have it: RMS norms, gated feed-forward, no biases, all layers
    alike, LLaMA's spellings.

    `constants` stand in the place of what would be read, or add to it. Without num_key_value_heads
    every query head has its own: the key is younger than the format. Without tie_word_embeddings
    the head is a matrix of its own, which is what the files leave out.

    Raises:
      UserError: a constant is missing, or has a value that is not implemented.
    """
    read = {name: usual(raw) for name, usual in _USUAL.items() if name not in constants}
    return ModelConfig(**read, **constants)


def uniform(raw: Raw, kind: LayerKind) -> tuple[LayerKind, ...]:
    """All layers alike."""
    return (kind,) * required(raw, "num_hidden_layers")


def layer_types(
    raw: Raw, default: Callable[[int], str], kinds: Sequence[str] = (SLIDING, FULL)
) -> list[str]:
    """`layer_types`, or where the file is older than the key, `default` of each layer's number.

    Raises:
      UserError: there are others than `kinds`, or not one for each layer.
    """
    layers = required(raw, "num_hidden_layers")
    types = raw.get("layer_types") or [default(layer) for layer in range(layers)]
    if len(types) != layers or not set(types) <= set(kinds):
        known = " or ".join(f"'{kind}'" for kind in kinds)
        raise refuse(raw, "layer_types", f"{known} for each of the {layers} layers")
    return list(types)
