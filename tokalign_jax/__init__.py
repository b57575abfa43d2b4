"""Give a pre-trained language model a new vocabulary, on JAX.

    import tokalign_jax as ta

    source = ta.load_model("embedded")
    tokenizer = ta.load_tokenizer("embedded")
    alignment = ta.align(source.tokenizer, tokenizer)
    model = ta.initialize(source, tokenizer, alignment)
    ta.save(model, "adapted")

Names are loaded when first used, so that importing the package takes no time. `dir(tokalign_jax)`
lists all of them.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokalign_jax.api import (
        Alignment,
        Model,
        Rule,
        align,
        evaluate,
        explain,
        generate,
        initialize,
        load_model,
        load_texts,
        load_tokenizer,
        run,
        save,
        train,
    )
    from tokalign_jax.config import Config, StageConfig
    from tokalign_jax.errors import UserError

__version__ = "0.1.0"

_HOMES = {
    "tokalign_jax.api": (
        "Alignment",
        "Model",
        "Rule",
        "align",
        "evaluate",
        "explain",
        "generate",
        "initialize",
        "load_model",
        "load_texts",
        "load_tokenizer",
        "run",
        "save",
        "train",
    ),
    "tokalign_jax.config": ("Config", "StageConfig"),
    "tokalign_jax.errors": ("UserError",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Alignment",
    "Config",
    "Model",
    "Rule",
    "StageConfig",
    "UserError",
    "align",
    "evaluate",
    "explain",
    "generate",
    "initialize",
    "load_model",
    "load_texts",
    "load_tokenizer",
    "run",
    "save",
    "train",
]

# transformers would say that PyTorch is missing, which nothing here needs.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def __getattr__(name: str) -> Any:
    """Load a name of the API from its module."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'tokalign_jax' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
