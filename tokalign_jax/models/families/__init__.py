"""The model families, one file each: how config.json becomes a `ModelConfig`, and the weight table."""

from types import ModuleType

from tokalign_jax.errors import UserError
from tokalign_jax.models.families import gpt_neox, llama

FAMILIES = {module.MODEL_TYPE: module for module in (gpt_neox, llama)}


def family(model_type: str | None) -> ModuleType:
    """The module of `model_type`.

    Raises:
      UserError: there is none.
    """
    if model_type not in FAMILIES:
        raise UserError(
            f"model_type '{model_type}' is not supported: choose a source model of one of the families "
            f"{', '.join(sorted(FAMILIES))} (the model_type in its config.json)"
        )
    return FAMILIES[model_type]
