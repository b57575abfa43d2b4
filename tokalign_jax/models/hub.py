"""Hugging Face folders but for their weights: names to folders, configs and tokenizers in and out."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokalign_jax.errors import UserError
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.families import config_from_hf

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROLES = ("bos", "eos", "pad")

_OLD_VOCABULARY = (
    "tokenizer_class",
    "bad_words_ids",
    "begin_suppress_tokens",
    "decoder_start_token_id",
    "force_words_ids",
    "forced_bos_token_id",
    "forced_decoder_ids",
    "forced_eos_token_id",
    "sep_token_id",
    "sequence_bias",
    "suppress_tokens",
)
"""Config keys that speak of the source's tokenizer or of its token ids, and mean nothing with another vocabulary."""


# --- Names to folders -------------------------------------------------------------------------------------------------


def resolve(name: str, *, what: str, weights: bool = True) -> Path:
    """The local folder `name`, or a snapshot of the hub repository `name` (`name@revision` pins one).

    Args:
      what: what is being looked for ("source model"), for the error.
      weights: fetch the safetensors too, not only configs and tokenizer files.

    Raises:
      UserError: there is no such folder and the repository cannot be had.
    """
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    elsewhere = (
        "give the path of a local Hugging Face folder instead, or 'embedded' for the one that ships with the package"
    )
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{what} '{name}': there is no such folder; {elsewhere}")
    # Here, since importing it reads HF_HUB_OFFLINE and costs time.
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    patterns = ["*.json", "*.txt", "*.model", "*.jinja"] + (["*.safetensors"] if weights else [])
    try:
        folder = snapshot_download(
            repository, revision=revision or None, allow_patterns=patterns, ignore_patterns=["*/*"]
        )
    except Exception as error:  # Whatever stopped it (network, name, gate, disk), what the user can do is the same.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{what} '{name}' is not a local folder and cannot be had from the Hugging Face hub ({reason}): check the "
            f"name and the network, or {elsewhere}"
        ) from error
    return Path(folder)


def load_config(folder: Path | str) -> tuple[ModelConfig, dict[str, Any]]:
    """The model's constants, and its config.json as it is.

    Raises:
      UserError: no readable config.json, an unsupported model_type, or a flag that is not implemented.
    """
    raw = read_json(Path(folder) / "config.json")
    if raw is None:
        raise UserError(f"model folder '{folder}' has no config.json: give a folder in Hugging Face format")
    return config_from_hf(raw), raw


def load_generation_config(folder: Path | str) -> dict[str, Any] | None:
    """generation_config.json, if the folder has one."""
    return read_json(Path(folder) / "generation_config.json")


def load_tokenizer(name: Path | str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a local folder or hub repository; code that comes with it is never run.

    Raises:
      UserError: it cannot be had or read.
    """
    folder = resolve(str(name), what="tokenizer", weights=False)
    from transformers import AutoTokenizer  # Slow to import, and not needed by those who only read weights.

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises anything, from OSError to panics of its Rust part.
        raise UserError(
            f"tokenizer '{name}' cannot be read from '{folder}' ({type(error).__name__}: {error}): expected "
            f"tokenizer.json and tokenizer_config.json as save_pretrained writes them"
        ) from error


# --- Out --------------------------------------------------------------------------------------------------------------


def save_config_and_tokenizer(
    folder: Path,
    config: Mapping[str, Any],
    tokenizer: "PreTrainedTokenizerBase",
    source_folder: Path | str | None = None,
) -> None:
    """Writes config.json, generation_config.json and the files of `tokenizer`, whose bos, eos and pad ids both configs get.

    Args:
      config: the source's config.json with the new vocabulary size.
      source_folder: the source model, for its generation config.
    """
    generation_config = load_generation_config(source_folder) if source_folder else None
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in _ROLES}
    write_json(folder / "config.json", _adapted(config, ids))
    write_json(folder / "generation_config.json", _adapted(generation_config or {"_from_model_config": True}, ids))
    tokenizer.save_pretrained(str(folder))


def _adapted(source: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in source.items() if key not in _OLD_VOCABULARY} | dict(new)


# --- JSON -------------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in `path`; None when there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"'{path}' is not valid JSON ({error}): it was cut off or damaged; copy it again") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes the object `content` to `path`."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
