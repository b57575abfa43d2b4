"""Embedded demo: a small model, a multilingual tokenizer, text and questions.

`build.py` made them; `LICENSES/` names the sources of the text.
"""

from pathlib import Path

from tokalign_jax.config import EMBEDDED

_HERE = Path(__file__).parent

SOURCE_MODEL = _HERE / "source_model"
TARGET_TOKENIZER = _HERE / "target_tokenizer"
TEXT = _HERE / "text" / "sample.jsonl.xz"
ABILITIES = _HERE / "abilities"


def source_model(name: str) -> str:
    """Return the embedded model's folder for the name `embedded`, else the name itself."""
    return str(SOURCE_MODEL) if name == EMBEDDED else name


def target_tokenizer(name: str) -> str:
    """Return the embedded tokenizer's folder for the name `embedded`, else the name itself."""
    return str(TARGET_TOKENIZER) if name == EMBEDDED else name


def corpus(name: str) -> str:
    """Return the embedded text's file for the name `embedded`, else the name itself."""
    return str(TEXT) if name == EMBEDDED else name


def abilities(names: str) -> str:
    """Return the folder of the embedded questions for `embedded`, else the names themselves."""
    return str(ABILITIES) if names == EMBEDDED else names
