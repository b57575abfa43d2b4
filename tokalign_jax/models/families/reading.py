"""Reading config.json: what every family needs, in the spellings of transformers 5 and of older releases."""

from collections.abc import Mapping
from typing import Any

from tokalign_jax.errors import UserError
from tokalign_jax.models.rotary import LinearScaling, Llama3Scaling, RopeScaling

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def required(raw: Mapping[str, Any], key: str) -> Any:
    """`raw[key]`.

    Raises:
      UserError: it is absent. A model's constant is never guessed.
    """
    if raw.get(key) is None:
        raise UserError(
            f"the model's config.json has no '{key}': it is needed to rebuild the model exactly; add the value with "
            f"which the model was trained"
        )
    return raw[key]


def refuse(raw: Mapping[str, Any], flag: str, implemented: str) -> UserError:
    """The error for a config flag that asks for something that is not there."""
    return UserError(
        f"the model's config.json sets '{flag}' to {raw.get(flag)!r}, which is not implemented for model_type "
        f"'{raw.get('model_type')}' (implemented: {implemented}): choose another model, as this one would be computed "
        f"wrongly"
    )


def activation(raw: Mapping[str, Any]) -> Any:
    """`hidden_act` under our name."""
    name = required(raw, "hidden_act")
    if name not in _ACTIVATIONS:
        raise refuse(raw, "hidden_act", ", ".join(_ACTIVATIONS))
    return _ACTIVATIONS[name]


def check_unquantized(raw: Mapping[str, Any]) -> None:
    if raw.get("quantization_config"):
        raise refuse(raw, "quantization_config", "plain float weights")


def rope_parameters(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings by their transformers 5 names; older files keep scaling in `rope_scaling`, the rest elsewhere."""
    return dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})


def rope_scaling(raw: Mapping[str, Any]) -> RopeScaling | None:
    """How rotary frequencies are scaled.

    Raises:
      UserError: in a way that is not implemented (dynamic, yarn, longrope ...).
    """
    parameters = rope_parameters(raw)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    match kind:
        case "default":
            return None
        case "linear":
            return LinearScaling(float(required(parameters, "factor")))
        case "llama3":
            return Llama3Scaling(
                factor=float(required(parameters, "factor")),
                low_frequency_factor=float(required(parameters, "low_freq_factor")),
                high_frequency_factor=float(required(parameters, "high_freq_factor")),
                original_positions=int(
                    parameters.get("original_max_position_embeddings") or required(raw, "max_position_embeddings")
                ),
            )
    flag = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    raise refuse(raw, flag, "rope_type default, linear, llama3")
