"""The embedded default: a small real model, a multilingual tokenizer and text, so that a run needs
nothing from outside.

`build.py` made them; `LICENSES/` says where the text comes from.
"""

from pathlib import Path

from tokalign_jax.config import EMBEDDED

_HERE = Path(__file__).parent

SOURCE_MODEL = _HERE / "source_model"
TARGET_TOKENIZER = _HERE / "target_tokenizer"
TEXT = _HERE / "text" / "sample.jsonl.xz"
ABILITIES = _HERE / "abilities"


def source_model(name: str) -> str:
    """`name`, or the embedded model's folder where the name is `embedded`."""
    return str(SOURCE_MODEL) if name == EMBEDDED else name


def target_tokenizer(name: str) -> str:
    """`name`, or the embedded tokenizer's folder where the name is `embedded`."""
    return str(TARGET_TOKENIZER) if name == EMBEDDED else name


def corpus(name: str) -> str:
    """`name`, or the embedded text where the name is `embedded`."""
    return str(TEXT) if name == EMBEDDED else name


def abilities(names: str) -> str:
    """`names`, or the folder of the embedded questions where that is `embedded`."""
    return str(ABILITIES) if names == EMBEDDED else names
