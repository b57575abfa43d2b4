"""Hugging Face folders but for their weights: names to folders, configs and tokenizers in and out,
folders to the hub.

Of a repository only what is plain data is ever fetched: safetensors, JSON, text, SentencePiece
models, chat templates and licences. Pickles are never read, and code that comes with a model is
never run.
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
from tokalign_jax.text.special_tokens import (
    SEPARATOR,
    counterpart,
    end_of_text_id,
    ends_turn,
    role_id,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""The files of weights: the only one, or what lists them."""

TERMS = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*", "USE-POLICY*")
"""Files that say what may be done with a model, as patterns."""

TOKENIZER = ("*.json", "*.txt", "*.model", "*.jinja")
"""Files that a tokenizer may be made of, as patterns; those of a model's config and index are among
them.
"""

_DATA = (*TOKENIZER, "README.md", *TERMS)

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

_OLD_VOCABULARY = (
    "auto_map",
    "tokenizer_class",
    "bad_words_ids",
    "begin_suppress_tokens",
    "force_words_ids",
    "forced_decoder_ids",
    "sequence_bias",
    "suppress_tokens",
)
"""Config keys about the source's tokenizer or its token ids, like all keys that end in `_token_id`,
which mean nothing with another vocabulary; and about code that is not carried over."""


def _is_of_old_vocabulary(key: str) -> bool:
    return key in _OLD_VOCABULARY or re.search(r"_token_(ids?|index)$", key) is not None


# --- Names to folders ---------------------------------------------------------------------------


def resolve(name: str, *, what: str, weights: bool = True) -> Path:
    """The local folder `name`, or a snapshot of the hub repository `name` (`name@revision` pins a
    branch, tag or commit).

    The hub's own settings hold: `HF_TOKEN` for what is private or gated, `HF_HOME` for the cache,
    and `HF_HUB_OFFLINE=1` to use the cache alone.

    Args:
      what: what is being looked for ("source model"), for the error.
      weights: fetch the safetensors too, not only configs and tokenizer files.

    Raises: UserError: there is no such folder, the repository cannot be had, or has no weights in
      safetensors.
    """
    if Path(name).expanduser().is_dir():
        folder = Path(name).expanduser()
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{what} '{name}': there is no such folder; {_ELSEWHERE}")
    else:
        folder = _fetched(name, _DATA, what)
        if weights:
            index = read_json(folder / INDEX)
            files = sorted(set(index["weight_map"].values())) if index else [SINGLE]
            if odd := [file for file in files if not re.fullmatch(r"[\w.-]+\.safetensors", file)]:
                raise UserError(
                    f"{what} '{name}': its {INDEX} lists '{odd[0]}', which is no safetensors file"
                    " beside it"
                )
            folder = _fetched(name, [*_DATA, *files], what)
    if weights and (folder / "adapter_config.json").is_file() and _has_weights(folder):
        raise UserError(
            f"{what} '{name}' has an adapter beside its weights (adapter_config.json), which would"
            " be left out: merge it into them first (peft's merge_and_unload), or take"
            " adapter_config.json away if they are what is meant"
        )
    if weights and not _has_weights(folder):
        names = (
            [path.name for path in folder.iterdir()]
            if folder == Path(name).expanduser()
            else _listed(name)
        )
        raise UserError(f"{what} '{name}' {_no_safetensors(name, names)}")
    return folder


def _has_weights(folder: Path) -> bool:
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()


_ELSEWHERE = (
    "give the path of a local Hugging Face folder instead, or 'embedded' for the one that ships"
    " with the package"
)


def _fetched(name: str, patterns: Sequence[str], what: str) -> Path:
    """The folder in the cache with the files of a repository's top level that `patterns` name."""
    # Here, since importing it reads HF_HUB_OFFLINE and costs time.
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
    except Exception as error:  # Whatever stopped it (network, name, gate, disk), it is told with what can be done.
        raise UserError(
            f"{what} '{name}' is not a local folder and cannot be had from the Hugging Face hub"
            f" ({_reason(error)}): {_remedy(error, repository, revision)}, or {_ELSEWHERE}"
        ) from error


def _reason(error: Exception) -> str:
    """The first line of an error, without the token."""
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
            f" unset it, or run `{download}` where there is a network and take the cache along"
            " (HF_HOME)"
        )
    if isinstance(error, errors.GatedRepoError):
        return (
            f"accept its terms on https://huggingface.co/{repository} and set HF_TOKEN to a token"
            " of that account"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return (
            f"there is no revision '{revision}'; see"
            f" https://huggingface.co/{repository}/commits/main"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return "check the name; if it is private, set HF_TOKEN"
    return "check the name and the network"


def _listed(name: str) -> list[str]:
    """The names of a repository's files; none where they cannot be had."""
    from huggingface_hub import HfApi

    repository, _, revision = name.partition("@")
    try:
        return HfApi().list_repo_files(repository, revision=revision or None)
    except Exception:  # it only explains an error
        return []


def _no_safetensors(name: str, files: Iterable[str]) -> str:
    """What there is instead of weights that can be read, and the way out."""
    files, at = sorted(files), f"'{name}'"
    if not Path(name).expanduser().is_dir() and "@" in name:
        at = "'{}', revision='{}'".format(*name.split("@", 1))
    out = f"{Path(name.partition('@')[0]).name}-safetensors"
    if "adapter_config.json" in files:
        code = (
            "from peft import AutoPeftModelForCausalLM as M;"
            f" M.from_pretrained({at}).merge_and_unload()"
        )
        return (
            "is an adapter, not a whole model: merge it into its base first (`python -c"
            f" \"{code}.save_pretrained('{out}')\"`), copy the tokenizer's files there, and give"
            " that folder"
        )

    def convert(options: str = "") -> str:
        return (
            '`python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
            f"M.from_pretrained({at}, dtype='auto'{options}).save_pretrained('{out}'); "
            f"T.from_pretrained({at}{options}).save_pretrained('{out}')\"`"
        )

    if pickled := [file for file in files if file.endswith(_PICKLES)]:
        return (
            f"has its weights in '{pickled[0]}' and not in {SINGLE}: pickles can run any code when"
            " they are read, and never are here; if you trust it, convert it where PyTorch is"
            f" ({convert()}) and give that folder, or name a revision that has safetensors"
            " (name@revision)"
        )
    for ending, kind in _OTHER_FORMATS.items():
        if found := [file for file in files if file.endswith(ending)]:
            way = convert(f", gguf_file='{found[0]}'" if ending == ".gguf" else "")
            return (
                f"has its weights in '{found[0]}' ({kind} format) and neither {SINGLE} nor {INDEX}:"
                " give the model's original folder; where there is none, transformers may convert"
                f" it ({way})"
            )
    return (
        f"has neither {SINGLE} nor {INDEX}: only safetensors are read; convert other formats with"
        " save_pretrained"
    )


# --- In -----------------------------------------------------------------------------------------


def load_config(folder: Path | str) -> tuple[ModelConfig, dict[str, Any]]:
    """The model's constants, and its config.json as it is; of a multimodal model that of its text
    model alone.

    Raises: UserError: no readable config.json, an unsupported model_type, or a flag that is not
      implemented.
    """
    raw = read_json(Path(folder) / "config.json")
    if raw is None:
        raise UserError(
            f"model folder '{folder}' has no config.json: give a folder in Hugging Face format"
        )
    raw = text_config(raw)
    if "auto_map" in raw and raw.get("model_type") not in FAMILIES:
        raise UserError(
            f"model folder '{folder}' brings its own code (config.json: model_type"
            f" '{raw.get('model_type')}', auto_map), which is never run: choose a source model of"
            f" one of the families {', '.join(sorted(FAMILIES))}, or one of the same weights that"
            " was converted to one of them"
        )
    return config_from_hf(raw), raw


def load_generation_config(folder: Path | str) -> dict[str, Any] | None:
    """generation_config.json, if the folder has one."""
    return read_json(Path(folder) / "generation_config.json")


_AT_LEAST_ONE = ("max_length", "max_new_tokens", "num_beams", "num_return_sequences")
_WHOLE = ("min_length", "min_new_tokens", "no_repeat_ngram_size", "top_k")
_POSITIVE = ("temperature", "repetition_penalty", "encoder_repetition_penalty", "max_time")
_SHARE = ("top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def out_of_range(config: Mapping[str, Any], rows: float = math.inf) -> dict[str, Any]:
    """The values of a config.json or generation_config.json that loading or generation would fail
    at.

    Args:
      rows: of the model: what token ids must be below.
    """

    def is_valid(key: str, value: Any) -> bool:
        if key in _TOKEN_IDS:
            return all(type(i) is int and 0 <= i < rows for i in _as_list(value))
        if key == "early_stopping":
            return value in (True, False, "never")
        is_number = type(value) in (int, float)
        if key in (*_AT_LEAST_ONE, *_WHOLE):
            return type(value) is int and value >= (key in _AT_LEAST_ONE)
        if key in _POSITIVE:
            return is_number and 0 < value < math.inf
        return is_number and 0 <= value <= 1 if key in _SHARE else True

    return {
        key: value
        for key, value in config.items()
        if value is not None and not is_valid(key, value)
    }


def warn_of_values_left_out(
    folder: Path | str, config: Mapping[str, Any], rows: int, log: Callable[[str], None]
) -> None:
    """Names the values of the source's configs that an export leaves out (`out_of_range`)."""
    files = {"config.json": config, "generation_config.json": load_generation_config(folder) or {}}
    found = [
        f"{key}={value!r} ({name})"
        for name, of in files.items()
        for key, value in out_of_range(of, rows).items()
    ]
    if found:
        log(
            "warning: the export leaves out values of the source model that are out of range:"
            f" {', '.join(found)}"
        )


def load_tokenizer(name: Path | str, end_of_text: str = "") -> "PreTrainedTokenizerBase":
    """The tokenizer of a local folder or hub repository; code that comes with it is never run.

    Args:
      end_of_text: the token that separates documents, instead of the one chosen by
        `special_tokens.end_of_text_id`; added behind all others where it does not exist.

    Raises:
      UserError: it cannot be had or read.
    """
    folder = resolve(str(name), what="tokenizer", weights=False)
    settings = read_json(folder / "tokenizer_config.json") or {}
    has_json = (folder / "tokenizer.json").is_file()
    _check_tokenizer_files(name, folder, settings, has_json)
    from transformers import (
        AutoTokenizer,
        PreTrainedTokenizerFast,
    )  # Slow to import, and not needed for weights.

    # tokenizer.json says all that code beside it would do.
    kind = PreTrainedTokenizerFast if has_json and "auto_map" in settings else AutoTokenizer
    try:
        tokenizer = kind.from_pretrained(folder, trust_remote_code=False)
    except (
        Exception
    ) as error:  # transformers raises anything, from OSError to panics of its Rust part.
        raise UserError(
            f"tokenizer '{name}' cannot be read from '{folder}' ({type(error).__name__}:"
            f" {_reason(error)}): expected tokenizer.json and tokenizer_config.json as"
            f" save_pretrained writes them; the folder holds {_listing(folder)}"
        ) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and not backend.get_vocab_size(with_added_tokens=False):
        raise UserError(
            f"tokenizer '{name}' has not one token in '{folder}': copy or download it again"
        )
    tokenizer.init_kwargs.pop("auto_map", None)  # that code does not go along
    if end_of_text:
        _set_document_separator(name, tokenizer, end_of_text)
    return tokenizer


def _set_document_separator(
    name: Path | str, tokenizer: "PreTrainedTokenizerBase", end_of_text: str
) -> None:
    """Makes `end_of_text` the document separator, and the eos unless that ends turns of a chat.

    Raises:
      UserError: the token is new and would not get the id behind all others.
    """
    known = tokenizer.get_vocab()
    if ends_turn(tokenizer, role_id(tokenizer, "eos")):
        tokenizer.add_tokens(end_of_text, special_tokens=True)
    else:
        tokenizer.add_special_tokens({"eos_token": end_of_text})
    tokenizer.init_kwargs[SEPARATOR] = end_of_text
    if end_of_text_id(tokenizer) != known.get(end_of_text, max(known.values()) + 1):
        raise UserError(
            f"tokenizer '{name}' cannot get the token '{end_of_text}': the ids of its tokens have"
            " gaps; name one of them"
        )


_VOCABULARIES = ("*.model", "*.tiktoken", "*.spm", "*vocab*", "*.bpe", "tekken.json")
"""Files, one of which a tokenizer without tokenizer.json has its tokens in."""


def _check_tokenizer_files(
    name: Path | str, folder: Path, settings: Mapping[str, Any], has_json: bool
) -> None:
    """Says what is missing where transformers' own error would not, or where it would make a
    tokenizer of nothing but special tokens.
    """
    if has_json:
        return
    if "auto_map" in settings:
        raise UserError(
            f"tokenizer '{name}' is code that comes with it (tokenizer_config.json: auto_map),"
            " which is never run, and has no tokenizer.json: take one of the same model that was"
            " converted to tokenizer.json"
        )
    if not any(file for kind in _VOCABULARIES for file in folder.glob(kind)):
        raise UserError(
            f"tokenizer '{name}' cannot be read, as it has no vocabulary: there is neither"
            f" tokenizer.json in '{folder}' nor a file that it is made from (tokenizer.model,"
            f" vocab.json, vocab.txt); the folder holds {_listing(folder)}: copy them there, or"
            " give the folder that has them"
        )
    for file in sorted(folder.glob("*.model")):
        # SentencePiece's files are protocol buffers that begin with this tag; tiktoken's are base64
        # text.
        needed = (
            ("sentencepiece", "google.protobuf")
            if file.read_bytes()[:1] == b"\n"
            else ("tiktoken",)
        )
        missing = [module for module in needed if not _is_installed(module)]
        if missing:
            raise UserError(
                f"tokenizer '{name}' has only '{file.name}', and to convert it"
                f" {' and '.join(missing)} must be installed: pip install 'tokalign_jax[convert]',"
                " or give a folder that has tokenizer.json"
            )
        if "tokenizer_class" not in settings and not (folder / "config.json").is_file():
            raise UserError(
                f"tokenizer '{name}' has only '{file.name}', which does not say all (whether a"
                " space is put before a text, say): name its tokenizer_class ('LlamaTokenizer',"
                " say) in a tokenizer_config.json beside it"
            )
    if (folder / "tekken.json").is_file():
        raise UserError(
            f"tokenizer '{name}' has only tekken.json, the form of mistral-common: take it from a"
            " repository in transformers' form, which has tokenizer.json"
        )


def _listing(folder: Path) -> str:
    return ", ".join(sorted(file.name for file in folder.iterdir())) or "nothing"


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


# --- Out ----------------------------------------------------------------------------------------


def save_config_and_tokenizer(
    folder: Path,
    config: Mapping[str, Any],
    tokenizer: "PreTrainedTokenizerBase",
    source_folder: Path | str | None = None,
) -> None:
    """Writes config.json, generation_config.json and the tokenizer; both configs get its bos, eos,
    pad.

    The generation config's eos ids are the tokenizer's eos, the counterparts of the source's eos
    ids and the document separator. config.json has a list where the source's has one.

    Args:
      config: the source's config.json with the new vocabulary size.
      source_folder: the source model, for its generation config and its tokenizer.
    """
    generation_config = (load_generation_config(source_folder) if source_folder else None) or {
        "_from_model_config": True
    }
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in _ROLES}
    old = [*_as_list(generation_config.get("eos_token_id")), *_as_list(config.get("eos_token_id"))]
    ends = _all_ends(old, load_tokenizer(source_folder) if source_folder else None, tokenizer)
    listed = {"eos_token_id": ends} if len(ends) > 1 else {}
    for name, source in {
        "config.json": config,
        "generation_config.json": generation_config,
    }.items():
        invalid = out_of_range(source)
        kept = {
            key: of
            for key, of in source.items()
            if key not in invalid and not _is_of_old_vocabulary(key)
        }
        is_list = source is generation_config or isinstance(source.get("eos_token_id"), list)
        write_json(folder / name, kept | ids | (listed if is_list else {}))
    save_tokenizer(tokenizer, folder)


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Writes a tokenizer so that transformers 4 and 5 open it as tokenizer.json says.

    The class is `PreTrainedTokenizerFast`, which both have and which rebuilds nothing. The
    remaining settings are those in which version 4 would differ by its defaults.
    """
    tokenizer.save_pretrained(str(folder))
    settings = read_json(folder / "tokenizer_config.json") or {}
    kept = {key: value for key, value in settings.items() if key not in _OF_THIS_PROCESS}
    kept["tokenizer_class"] = "PreTrainedTokenizerFast"
    state = read_json(folder / "tokenizer.json") or {}
    # Version 5 ignores it for BPE, whose spaces it would take away; version 4 does not.
    is_bpe = state["model"]["type"] == "BPE"
    kept["clean_up_tokenization_spaces"] = (
        bool(tokenizer.clean_up_tokenization_spaces) and not is_bpe
    )
    # Version 4 adds token_type_ids by default, which decoders refuse.
    kept["model_input_names"] = ["input_ids", "attention_mask"]
    # Version 4 rewrites a pre-tokenizer that says otherwise.
    kept["add_prefix_space"] = (state.get("pre_tokenizer") or {}).get("add_prefix_space", False)
    # Version 4 has no list under the key of version 5, which reads the old one as well.
    if isinstance(kept.get("extra_special_tokens"), list):
        kept["additional_special_tokens"] = kept.pop("extra_special_tokens")
    write_json(folder / "tokenizer_config.json", kept)


_OF_THIS_PROCESS = ("backend", "is_local", "local_files_only")
"""Keys that transformers 5 writes into tokenizer_config.json, about how it was read here."""


def _as_list(ids: Any) -> list[Any]:
    return [] if ids is None else ids if isinstance(ids, list) else [ids]


def _all_ends(
    old: Sequence[Any],
    source_tokenizer: "PreTrainedTokenizerBase | None",
    tokenizer: "PreTrainedTokenizerBase",
) -> list[int]:
    """The eos of `tokenizer`, the counterparts of the source's eos ids `old`, and its separator."""
    found = [role_id(tokenizer, "eos")]
    if source_tokenizer is not None:
        # The source's separator has the new one as its counterpart, whatever its text.
        known = set(source_tokenizer.get_vocab().values()) - {end_of_text_id(source_tokenizer)}
        matches = [
            counterpart(i, source_tokenizer, tokenizer)
            for i in old
            if type(i) is int and i in known
        ]
        found += [match.token for match in matches if match is not None]
    found.append(end_of_text_id(tokenizer))
    return [i for i in dict.fromkeys(found) if i is not None]


def copy_terms(source_folder: Path | str, folder: Path) -> list[str]:
    """Copies the files that say what may be done with the source model; returns their names."""
    files = sorted(
        {path for pattern in TERMS for path in Path(source_folder).glob(pattern) if path.is_file()}
    )
    for path in files:
        shutil.copyfile(path, folder / path.name)  # the content behind the cache's links
    return [path.name for path in files]


def push_to_hub(
    folder: Path | str, repository: str, private: bool = True, revision: str | None = None
) -> str:
    """Uploads a finished folder to the hub repository `repository`, made if there is none; returns
    its address.

    Args:
      private: of a repository that is made; one that exists stays as it is.
      revision: a branch to push to, made if there is none; else the main one.

    Raises:
      UserError: there is no token in the environment, or the hub refuses.
    """
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"'{folder}' cannot be pushed to '{repository}': HF_HUB_OFFLINE is set; unset it"
        )
    if get_token() is None:
        raise UserError(
            f"'{folder}' cannot be pushed to '{repository}' without a token: set HF_TOKEN to one"
            " with the right to write"
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
    except Exception as error:  # as in `_fetched`
        raise UserError(
            f"'{folder}' cannot be pushed to '{repository}' ({_reason(error)}): check the name"
            " ('user/model'), the network, and that HF_TOKEN may write there; the folder itself is"
            f" whole, and `hf upload {repository} {folder}` does the same"
        ) from error
    return f"https://huggingface.co/{repository}" + (f"/tree/{revision}" if revision else "")


# --- JSON ---------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in `path`; None when there is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(
            f"'{path}' is not valid JSON ({error}): it was cut off or damaged; copy it again"
        ) from error
    if not isinstance(content, dict):
        raise UserError(
            f"'{path}' holds no JSON object but {type(content).__name__}: copy it again"
        )
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes the object `content` to `path`."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
