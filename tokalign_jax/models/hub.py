"""Hugging Face folders except their weights: resolving names, configs, tokenizers, uploads.

Only data files of a repository are downloaded: safetensors, JSON, text, SentencePiece models, chat
templates and licences. Pickles are never read, and code shipped with a model is never run.
"""

import importlib.util
import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokalign_jax.errors import UserError
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.families import FAMILIES, config_from_hf, text_config
from tokalign_jax.text.canonical import shared_id, special_ids
from tokalign_jax.text.special_tokens import (
    SEPARATOR,
    end_of_text_id,
    ends_turn,
    role_id,
    stop_counterpart,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
"""Names of an unsharded weight file, and of the index of a sharded one."""

LICENSE_FILES = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*", "USE-POLICY*")
"""Glob patterns of files with a model's terms of use."""

TOKENIZER_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
"""Glob patterns of tokenizer files; they also match a model's config and weight index."""

_DATA_FILES = (*TOKENIZER_FILES, "README.md", *LICENSE_FILES)

_CODE = (".py", ".pyc", ".so", ".sh")

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".nemo")

_OTHER_FORMATS = {
    ".gguf": "GGUF",
    ".h5": "TensorFlow",
    ".msgpack": "Flax",
    ".onnx": "ONNX",
    ".safetensors": "other",
}

_ROLES = ("bos", "eos", "pad")

_SOURCE_ONLY_KEYS = (
    "auto_map",
    "tokenizer_class",
    "bad_words_ids",
    "begin_suppress_tokens",
    "force_words_ids",
    "forced_decoder_ids",
    "sequence_bias",
    "suppress_tokens",
)
"""Config keys that are dropped on export, besides all that end in `_token_id`: they refer to the
source's tokenizer, its token ids, or code that is not copied."""


def _depends_on_source(key: str) -> bool:
    return key in _SOURCE_ONLY_KEYS or re.search(r"_token_(ids?|index)$", key) is not None


# --- Names to folders ---------------------------------------------------------------------------


def resolve(name: str, *, what: str, weights: bool = True) -> Path:
    """Returns the local folder `name`, or a snapshot of the hub repository `name`.

    `name@revision` pins a branch, tag or commit. The usual environment variables apply: `HF_TOKEN`
    for private or gated repositories, `HF_HOME` for the cache, `HF_HUB_OFFLINE=1` to use only the
    cache.

    Args:
      name: a path, or a repository as `user/model`.
      what: a description for error messages, such as "source model".
      weights: also download the safetensors, not only configs and tokenizer files.

    Raises:
      UserError: the folder does not exist, the repository cannot be downloaded, or there are no
        safetensors.
    """
    if not name:
        raise UserError(f"{what} is empty: name a hub repository, or {_LOCAL_ALTERNATIVE}")
    if Path(name).expanduser().is_dir():
        folder = Path(name).expanduser()
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{what} '{name}': there is no such folder; {_LOCAL_ALTERNATIVE}")
    else:
        folder = _download(name, _DATA_FILES, what)
        if weights:
            files = shard_names(folder) or [WEIGHTS_FILE]
            if bad := [file for file in files if not re.fullmatch(r"[\w.-]+\.safetensors", file)]:
                raise UserError(
                    f"{what} '{name}': {INDEX_FILE} lists '{bad[0]}', which is not a safetensors"
                    " file in the same folder"
                )
            folder = _download(name, [*_DATA_FILES, *files], what)
    if weights and (folder / "adapter_config.json").is_file() and _has_weights(folder):
        raise UserError(
            f"{what} '{name}' has an adapter beside its weights (adapter_config.json), which would"
            " be ignored: merge it into the weights first (peft's merge_and_unload), or delete"
            " adapter_config.json to use the weights alone"
        )
    if weights and not _has_weights(folder):
        names = (
            [path.name for path in folder.iterdir()]
            if folder == Path(name).expanduser()
            else _list_repository_files(name)
        )
        raise UserError(f"{what} '{name}' {_explain_missing_safetensors(name, names)}")
    return folder


def shard_names(folder: Path) -> list[str]:
    """Returns the weight files that the index of a folder lists; [] without an index.

    Raises:
      UserError: the index lists no files.
    """
    if (index := read_json(folder / INDEX_FILE)) is None:
        return []
    files = index.get("weight_map")
    if not (files and isinstance(files, dict) and all(isinstance(f, str) for f in files.values())):
        raise UserError(
            f"'{folder / INDEX_FILE}' has no weight_map that gives the file of each weight: it is"
            " damaged; copy it again"
        )
    return sorted(set(files.values()))


def _has_weights(folder: Path) -> bool:
    return (folder / WEIGHTS_FILE).is_file() or (folder / INDEX_FILE).is_file()


_LOCAL_ALTERNATIVE = (
    "give the path of a local Hugging Face folder instead, or 'embedded' for the one included in"
    " the package"
)


def _download(name: str, patterns: Sequence[str], what: str) -> Path:
    """Downloads a repository's top-level files that match `patterns`; returns the cache folder."""
    # Imported here because the import reads HF_HUB_OFFLINE and is slow.
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision or None,
                allow_patterns=list(patterns),
                ignore_patterns=["*/*", *(f"*{ending}" for ending in (*_CODE, *_PICKLES))],
            )
        )
    except Exception as error:  # Network, name, access and disk errors come as many types.
        raise UserError(
            f"{what} '{name}' is not a local folder and cannot be downloaded from the Hugging Face"
            f" hub ({_reason(error)}): {_remedy(error, repository, revision)},"
            f" or {_LOCAL_ALTERNATIVE}"
        ) from error


def _reason(error: Exception) -> str:
    """Returns the first line of an error message with the access token masked."""
    from huggingface_hub import get_token

    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    token = get_token()
    return text.replace(token, "***") if token else text


def _remedy(error: Exception, repository: str, revision: str) -> str:
    from huggingface_hub import constants, errors

    download = f"hf download {repository}" + (f" --revision {revision}" if revision else "")
    if constants.HF_HUB_OFFLINE:
        return (
            f"HF_HUB_OFFLINE is set and the cache ({constants.HF_HUB_CACHE}) has no such snapshot;"
            f" unset it, or run `{download}` on a machine with a network connection and copy its"
            " cache (HF_HOME)"
        )
    if isinstance(error, errors.GatedRepoError):
        return (
            f"accept its terms on https://huggingface.co/{repository} and set HF_TOKEN to a token"
            " of the same account"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return (
            f"there is no revision '{revision}'; see"
            f" https://huggingface.co/{repository}/commits/main"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return "check the name; if it is private, set HF_TOKEN"
    return "check the name and the network"


def _list_repository_files(name: str) -> list[str]:
    """Returns the file names in a repository, or [] if they cannot be listed."""
    from huggingface_hub import HfApi

    repository, _, revision = name.partition("@")
    try:
        return HfApi().list_repo_files(repository, revision=revision or None)
    except Exception:  # The list only improves another error's message.
        return []


def _explain_missing_safetensors(name: str, files: Iterable[str]) -> str:
    """Returns an error message that says which format was found instead, and how to convert it."""
    files, location = sorted(files), f"'{name}'"
    if not Path(name).expanduser().is_dir() and "@" in name:
        location = "'{}', revision='{}'".format(*name.split("@", 1))
    out = f"{Path(name.partition('@')[0]).name}-safetensors"
    if "adapter_config.json" in files:
        code = (
            "from peft import AutoPeftModelForCausalLM as M;"
            f" M.from_pretrained({location}).merge_and_unload()"
        )
        return (
            "is an adapter, not a whole model: merge it into its base model first (`python -c"
            f" \"{code}.save_pretrained('{out}')\"`), copy the tokenizer files there, and give"
            " that folder"
        )

    def convert(options: str = "") -> str:
        return (
            '`python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
            f"M.from_pretrained({location}, dtype='auto'{options}).save_pretrained('{out}'); "
            f"T.from_pretrained({location}{options}).save_pretrained('{out}')\"`"
        )

    if pickled := [file for file in files if file.endswith(_PICKLES)]:
        return (
            f"has its weights in '{pickled[0]}' and not in {WEIGHTS_FILE}: loading a pickle can run"
            " any code, so pickles are never read; if you trust it, convert it where PyTorch is"
            f" installed ({convert()}) and give that folder, or name a revision with safetensors"
            " (name@revision)"
        )
    for ending, kind in _OTHER_FORMATS.items():
        if matches := [file for file in files if file.endswith(ending)]:
            command = convert(f", gguf_file='{matches[0]}'" if ending == ".gguf" else "")
            return (
                f"has its weights in '{matches[0]}' ({kind} format) and neither {WEIGHTS_FILE} nor"
                f" {INDEX_FILE}: give the model's original folder; if there is none, transformers"
                f" may be able to convert it ({command})"
            )
    return (
        f"has neither {WEIGHTS_FILE} nor {INDEX_FILE}: only safetensors are supported; convert"
        " other formats with save_pretrained"
    )


# --- Reading ------------------------------------------------------------------------------------


def load_config(folder: Path | str) -> tuple[ModelConfig, dict[str, Any]]:
    """Returns the model's config and its raw config.json (for a multimodal model, the text part).

    Raises:
      UserError: config.json is missing or unreadable, its model_type is unsupported, or it sets
        an option that is not implemented.
    """
    raw = read_json(Path(folder) / "config.json")
    if raw is None:
        raise UserError(
            f"model folder '{folder}' has no config.json: give a folder in Hugging Face format"
        )
    raw = text_config(raw)
    if "auto_map" in raw and raw.get("model_type") not in FAMILIES:
        raise UserError(
            f"model folder '{folder}' needs its own code (config.json: model_type"
            f" '{raw.get('model_type')}', auto_map), which is never run: choose a source model of"
            f" one of the families {', '.join(sorted(FAMILIES))}, or a conversion of the same"
            " weights to one of them"
        )
    return config_from_hf(raw), raw


def load_generation_config(folder: Path | str) -> dict[str, Any] | None:
    """Returns generation_config.json, or None if the folder has none."""
    return read_json(Path(folder) / "generation_config.json")


_AT_LEAST_ONE = (
    "max_length",
    "max_new_tokens",
    "num_beams",
    "num_return_sequences",
    "prefill_chunk_size",
    "prompt_lookup_num_tokens",
)
_NON_NEGATIVE = ("min_length", "min_new_tokens", "no_repeat_ngram_size", "top_k")
_POSITIVE = ("temperature", "repetition_penalty", "encoder_repetition_penalty", "max_time")
_UNIT_INTERVAL = ("top_p", "min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff")
_NOT_ZERO = ("typical_p", "top_h")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def out_of_range(config: Mapping[str, Any], rows: float = math.inf) -> dict[str, Any]:
    """Returns the config values that would make loading or generation fail.

    Args:
      config: the contents of a config.json or generation_config.json.
      rows: the number of embedding rows, an exclusive upper bound for token ids.
    """

    def is_valid(key: str, value: Any) -> bool:
        if key in _TOKEN_IDS:
            return all(type(i) is int and 0 <= i < rows for i in _as_list(value))
        if key == "early_stopping":
            return value in (True, False, "never")
        is_number = type(value) in (int, float)
        if key in (*_AT_LEAST_ONE, *_NON_NEGATIVE):
            return type(value) is int and value >= (key in _AT_LEAST_ONE)
        if key in _POSITIVE:
            return is_number and 0 < value < math.inf
        if key in _UNIT_INTERVAL:
            return is_number and 0 <= value <= 1 and (value > 0 or key not in _NOT_ZERO)
        return True

    return {
        key: value
        for key, value in config.items()
        if value is not None and not is_valid(key, value)
    }


def warn_dropped_values(
    folder: Path | str, config: Mapping[str, Any], rows: int, log: Callable[[str], None]
) -> None:
    """Logs the values of the source's configs that an export drops (`out_of_range`)."""
    files = {"config.json": config, "generation_config.json": load_generation_config(folder) or {}}
    dropped = [
        f"{key}={value!r} ({name})"
        for name, content in files.items()
        for key, value in out_of_range(content, rows).items()
    ]
    if dropped:
        log(
            "warning: the export drops values of the source model that are out of range:"
            f" {', '.join(dropped)}"
        )


def load_tokenizer(name: Path | str, end_of_text: str = "") -> "PreTrainedTokenizerBase":
    """Loads the tokenizer of a local folder or hub repository, without running its own code.

    Args:
      name: a path, or a repository as `user/model`.
      end_of_text: the token that separates documents, instead of the one chosen by
        `special_tokens.end_of_text_id`. If it is not in the vocabulary, it is appended.

    Raises:
      UserError: it cannot be downloaded or read.
    """
    folder = resolve(str(name), what="tokenizer", weights=False)
    settings = read_json(folder / "tokenizer_config.json") or {}
    has_json = (folder / "tokenizer.json").is_file()
    _check_tokenizer_files(name, folder, settings, has_json)
    # Imported here because the import is slow and not needed for weights.
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # tokenizer.json fully specifies the tokenizer, so custom code (auto_map) is not needed.
    kind = PreTrainedTokenizerFast if has_json and "auto_map" in settings else AutoTokenizer
    try:
        tokenizer = kind.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # Anything from OSError to panics of the Rust library.
        raise UserError(
            f"tokenizer '{name}' cannot be read from '{folder}' ({type(error).__name__}:"
            f" {_reason(error)}): expected tokenizer.json and tokenizer_config.json as written by"
            f" save_pretrained; the folder contains {_listing(folder)}"
        ) from error
    for key, kinds in (("chat_template", str | dict | None), ("model_max_length", int | float)):
        if not isinstance(value := getattr(tokenizer, key), kinds):
            raise UserError(
                f"tokenizer '{name}' has {key} {value!r:.80} of type {type(value).__name__} in"
                f" '{folder / 'tokenizer_config.json'}': correct or remove it"
            )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and not backend.get_vocab_size(with_added_tokens=False):
        raise UserError(
            f"tokenizer '{name}' has an empty vocabulary in '{folder}': copy or download it again"
        )
    if backend is not None and (shared := shared_id(tokenizer)):
        raise UserError(
            "tokenizer '{}' gives the id {} to both {!r} and {!r}: its ids have gaps, and the first"
            " of the two is named in its settings alone; give it an id of its own in the"
            " added_tokens of tokenizer.json, or remove it".format(name, *shared)
        )
    if backend is not None and getattr(backend.model, "dropout", None):
        backend.model.dropout = None  # Else every call would give other tokens (BPE-dropout).
    tokenizer.init_kwargs.pop("auto_map", None)  # The code is not exported with the tokenizer.
    if end_of_text:
        _set_document_separator(name, tokenizer, end_of_text)
    return tokenizer


def _set_document_separator(
    name: Path | str, tokenizer: "PreTrainedTokenizerBase", end_of_text: str
) -> None:
    """Makes `end_of_text` the document separator, and the eos unless the eos ends chat turns.

    Raises:
      UserError: the token is text, or is new and would not get the next free id.
    """
    vocabulary = tokenizer.get_vocab()
    is_bracketed = re.fullmatch(r"[<\[].*[>\]]", end_of_text) is not None
    if not is_bracketed and vocabulary.get(end_of_text) not in special_ids(tokenizer):
        raise UserError(
            f"end_of_text {end_of_text!r} can occur in text, where tokenizer '{name}' would take"
            " it for the end of a document: name one of its special tokens, or a new token in"
            " brackets, such as <|endoftext|>"
        )
    if ends_turn(tokenizer, role_id(tokenizer, "eos")):
        tokenizer.add_tokens(end_of_text, special_tokens=True)
    else:
        tokenizer.add_special_tokens({"eos_token": end_of_text})
    tokenizer.init_kwargs[SEPARATOR] = end_of_text
    next_id = max(vocabulary.values()) + 1
    if end_of_text_id(tokenizer) != vocabulary.get(end_of_text, next_id):
        raise UserError(
            f"the token '{end_of_text}' cannot be added to tokenizer '{name}': its token ids have"
            " gaps; choose a token of its vocabulary"
        )


_VOCABULARY_FILES = ("*.model", "*.tiktoken", "*.spm", "*vocab*", "*.bpe", "tekken.json")
"""Glob patterns of vocabulary files in a tokenizer folder without tokenizer.json."""


def _check_tokenizer_files(
    name: Path | str, folder: Path, settings: Mapping[str, Any], has_json: bool
) -> None:
    """Refuses folders for which transformers' own error would not name what is missing.

    Also refuses those that it would load as a tokenizer of special tokens alone.
    """
    if has_json:
        return
    if "auto_map" in settings:
        raise UserError(
            f"tokenizer '{name}' is defined by its own code (tokenizer_config.json: auto_map),"
            " which is never run, and has no tokenizer.json: use a conversion of the same"
            " tokenizer to tokenizer.json"
        )
    if not any(file for pattern in _VOCABULARY_FILES for file in folder.glob(pattern)):
        raise UserError(
            f"tokenizer '{name}' has no vocabulary and cannot be read: there is neither"
            f" tokenizer.json in '{folder}' nor a file to convert (tokenizer.model, vocab.json,"
            f" vocab.txt); the folder contains {_listing(folder)}: copy the missing files there,"
            " or give the folder that has them"
        )
    for file in sorted(folder.glob("*.model")):
        # A SentencePiece file is a protocol buffer that begins with this tag; tiktoken's is base64.
        is_sentencepiece = file.read_bytes()[:1] == b"\n"
        needed = "sentencepiece" if is_sentencepiece else "tiktoken"
        if not _is_installed(needed):
            raise UserError(
                f"tokenizer '{name}' has only '{file.name}', and to convert it {needed} must be"
                " installed: pip install 'tokalign_jax[convert]', or give a folder with"
                " tokenizer.json"
            )
        if "tokenizer_class" not in settings and not (folder / "config.json").is_file():
            raise UserError(
                f"tokenizer '{name}' has only '{file.name}', which does not contain all settings"
                " (such as whether a leading space is added): name its tokenizer_class (such as"
                " 'LlamaTokenizer') in a tokenizer_config.json beside it"
            )
    if (folder / "tekken.json").is_file():
        raise UserError(
            f"tokenizer '{name}' has only tekken.json, the format of mistral-common: use a"
            " repository in transformers' format, with tokenizer.json"
        )


def _listing(folder: Path) -> str:
    return ", ".join(sorted(file.name for file in folder.iterdir())) or "nothing"


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


# --- Writing ------------------------------------------------------------------------------------


def save_config_and_tokenizer(
    folder: Path,
    config: Mapping[str, Any],
    tokenizer: "PreTrainedTokenizerBase",
    source_folder: Path | str | None = None,
) -> None:
    """Writes config.json, generation_config.json and the tokenizer.

    The tokenizer's maximum length is that of the source's tokenizer, or the positions of the model.
    Both configs get the tokenizer's bos, eos and pad ids. The eos ids of the generation config are
    the tokenizer's eos, the counterparts of the source's eos ids, and the document separator;
    config.json gets the same list if the source's eos is a list.

    Args:
      folder: an existing folder.
      config: the source's config.json with the new vocabulary size.
      tokenizer: the new tokenizer.
      source_folder: the source model, for its generation config and its tokenizer.
    """
    generation_config = (load_generation_config(source_folder) if source_folder else None) or {
        "_from_model_config": True
    }
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in _ROLES}
    source_tokenizer = load_tokenizer(source_folder) if source_folder else None
    eos, _ = stop_tokens((generation_config, config), source_tokenizer, tokenizer)
    eos_list = {"eos_token_id": eos} if len(eos) > 1 else {}
    for name, source in {
        "config.json": config,
        "generation_config.json": generation_config,
    }.items():
        invalid = out_of_range(source)
        content = {
            key: value
            for key, value in source.items()
            if key not in invalid and not _depends_on_source(key)
        }
        is_list = source is generation_config or isinstance(source.get("eos_token_id"), list)
        content |= ids | (eos_list if is_list else {})
        write_json(folder / name, content | _version_4_rotary(content))
    save_tokenizer(tokenizer, folder)
    # The target tokenizer's limit is of the model that it was made for.
    limit = getattr(source_tokenizer, "model_max_length", _UNLIMITED)
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    if (longest := positions if limit >= _UNLIMITED else limit) is not None:
        settings = read_json(folder / "tokenizer_config.json") or {}
        write_json(folder / "tokenizer_config.json", settings | {"model_max_length": longest})


_UNLIMITED = 10**29
"""A tokenizer without `model_max_length` has a value above this."""

_VERSION_4_SCALINGS = ("dynamic", "linear", "llama3", "yarn")


def _version_4_rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the rotary settings of `rope_parameters` under their names in transformers 4.

    Version 4 ignores `rope_parameters` and would take the default base without a word. LongRoPE is
    left out, whose names differ by family.
    """
    settings = config.get("rope_parameters") or {}
    keys = {}
    if "full_attention" in settings:
        if config.get("model_type") == "gemma3_text":
            sliding = settings.get("sliding_attention") or {}
            keys["rope_local_base_freq"] = sliding.get("rope_theta")
        settings = settings["full_attention"]
    kind = settings.get("rope_type", "default")
    if kind != "default" and kind not in _VERSION_4_SCALINGS:
        return {}
    names = {"rope_theta": "rope_theta", "partial_rotary_factor": "partial_rotary_factor"}
    if config.get("model_type") == "gpt_neox":
        names = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
    keys |= {names[key]: settings.get(key) for key in names}
    if kind != "default":
        keys["rope_scaling"] = {key: value for key, value in settings.items() if key not in names}
    return {k: v for k, v in keys.items() if v is not None and config.get(k) is None}


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Writes a tokenizer so that transformers 4 and 5 both follow its tokenizer.json.

    The class is `PreTrainedTokenizerFast`, which exists in both and rebuilds nothing. The other
    settings are those whose defaults differ in version 4.
    """
    tokenizer.save_pretrained(str(folder))
    settings = read_json(folder / "tokenizer_config.json") or {}
    settings = {key: value for key, value in settings.items() if key not in _LOADER_KEYS}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    state = read_json(folder / "tokenizer.json") or {}
    # Version 5 ignores this for BPE, where it would delete spaces; version 4 does not.
    is_bpe = state["model"]["type"] == "BPE"
    settings["clean_up_tokenization_spaces"] = (
        bool(tokenizer.clean_up_tokenization_spaces) and not is_bpe
    )
    # Version 4 adds token_type_ids by default, which decoders reject.
    settings["model_input_names"] = ["input_ids", "attention_mask"]
    # Version 4 rewrites the pre-tokenizer if this setting differs from it.
    pre_tokenizer = state.get("pre_tokenizer") or {}
    settings["add_prefix_space"] = pre_tokenizer.get("add_prefix_space", False)
    # Version 4 accepts no list under the new key; version 5 also reads the old key.
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    write_json(folder / "tokenizer_config.json", settings)


_LOADER_KEYS = ("backend", "is_local", "local_files_only")
"""Keys of transformers 5's tokenizer_config.json that describe how the tokenizer was loaded."""


def _as_list(ids: Any) -> list[Any]:
    return [] if ids is None else ids if isinstance(ids, list) else [ids]


def stop_tokens(
    configs: Iterable[Mapping[str, Any]],
    source: "PreTrainedTokenizerBase | None",
    tokenizer: "PreTrainedTokenizerBase",
) -> tuple[list[int], list[str]]:
    """Returns the ids at which an exported model stops.

    They are the eos of `tokenizer`, the counterparts of the tokens at which the source model stops
    (eos of its configs and tokenizer), and the document separator.

    Args:
      configs: the source's generation_config.json and config.json.
      source: the source's tokenizer; None adds no counterparts.
      tokenizer: the new tokenizer.

    Returns:
      The ids, and the source's tokens that have no counterpart.
    """
    ids, missing = [role_id(tokenizer, "eos")], []
    if source is not None:
        # The counterpart of the source's separator is the new separator, added below.
        stops = set(source.get_vocab().values()) - {end_of_text_id(source)}
        special = special_ids(source)
        configured = []
        for content in configs:
            listed = [i for i in _as_list(content.get("eos_token_id")) if type(i) is int]
            # Without a special token it is a default of the config's class, often 2.
            configured += listed if special & set(listed) else []
        configured.append(role_id(source, "eos"))
        for index in dict.fromkeys(i for i in configured if i in stops):
            if (match := stop_counterpart(index, source, tokenizer)) is not None:
                ids.append(match)
            else:
                missing.append(str(source.convert_ids_to_tokens(index)))
    ids.append(end_of_text_id(tokenizer))
    return [i for i in dict.fromkeys(ids) if i is not None], missing


def copy_license_files(source_folder: Path | str, folder: Path) -> list[str]:
    """Copies the source model's licence and terms of use; returns their file names."""
    files = sorted(
        {
            path
            for pattern in LICENSE_FILES
            for path in Path(source_folder).glob(pattern)
            if path.is_file()
        }
    )
    for path in files:
        shutil.copyfile(path, folder / path.name)  # Follows the symbolic links of the hub cache.
    return [path.name for path in files]


def push_to_hub(
    folder: Path | str, repository: str, private: bool = True, revision: str | None = None
) -> str:
    """Uploads a finished folder to a hub repository, created if needed; returns its URL.

    Args:
      folder: the folder to upload.
      repository: as `user/model`.
      private: visibility of a new repository; an existing one keeps its own.
      revision: the branch to push to, created if needed; None is the default branch.

    Raises:
      UserError: no token is set, or the hub rejects the upload.
    """
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"'{folder}' cannot be pushed to '{repository}': HF_HUB_OFFLINE is set; unset it"
        )
    if get_token() is None:
        raise UserError(
            f"'{folder}' cannot be pushed to '{repository}' without a token: set HF_TOKEN to one"
            " with write access"
        )
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if revision:
            api.create_branch(repository, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=revision,
            commit_message="Upload the model with its new vocabulary",
        )
    except Exception as error:  # Many types, as in `_download`.
        raise UserError(
            f"'{folder}' cannot be pushed to '{repository}' ({_reason(error)}): check the name"
            " ('user/model'), the network, and that HF_TOKEN may write there; the folder itself is"
            f" complete, and `hf upload {repository} {folder}` uploads it"
        ) from error
    return f"https://huggingface.co/{repository}" + (f"/tree/{revision}" if revision else "")


# --- JSON ---------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any] | None:
    """Returns the JSON object in `path`, or None if the file does not exist.

    Raises:
      UserError: the file is not JSON, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(
            f"'{path}' is not valid JSON ({error}): the file is truncated or damaged; copy it again"
        ) from error
    if not isinstance(content, dict):
        raise UserError(
            f"'{path}' holds no JSON object but {type(content).__name__}: copy it again"
        )
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes the object `content` to `path`."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
