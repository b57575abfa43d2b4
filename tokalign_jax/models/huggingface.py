"""Hugging Face folders: models and tokenizers in, the adapted model out. No PyTorch on the way.

Weights are read and written through the family's weight table (`weights`): every tensor of a checkpoint is used exactly once, every
leaf filled, every shape checked.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tokalign_jax import paths
from tokalign_jax.errors import UserError
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.families import family
from tokalign_jax.models.transformer import Params, abstract_params
from tokalign_jax.models.weights import Weight

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

_FLOATS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Types of weights, as safetensors spells them."""


# --- Names to folders ---------------------------------------------------------------------------------------------------


def resolve(name: str, *, what: str, weights: bool = True) -> Path:
    """The local folder `name`, or the snapshot of the hub repository `name` (`name@revision` pins one), downloaded if need be.

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
            f"{what} '{name}' is neither a local folder nor could it be had from the Hugging Face hub ({reason}): check the "
            f"name and the network, or {elsewhere}"
        ) from error
    return Path(folder)


def load_config(folder: Path | str) -> tuple[ModelConfig, dict[str, Any]]:
    """The model's constants, and its config.json as it is.

    Raises:
      UserError: no readable config.json, an unsupported model_type, or a flag that is not implemented.
    """
    raw = _read_json(Path(folder) / "config.json")
    if raw is None:
        raise UserError(f"model folder '{folder}' has no config.json: give a folder in Hugging Face format")
    return family(raw.get("model_type")).config_from_hf(raw), raw


def load_generation_config(folder: Path | str) -> dict[str, Any] | None:
    """generation_config.json, if the folder has one."""
    return _read_json(Path(folder) / "generation_config.json")


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
            f"tokenizer '{name}' cannot be read from '{folder}' ({type(error).__name__}: {error}): expected tokenizer.json and "
            f"tokenizer_config.json as save_pretrained writes them"
        ) from error


# --- Reading weights ----------------------------------------------------------------------------------------------------


def load_params(folder: Path | str, config: ModelConfig, dtype: DTypeLike | None = None) -> Params:
    """All parameters, read one tensor at a time; in `dtype`, or each in its stored type.

    Raises:
      UserError: a file is missing or broken; a weight is missing, has another shape than `config` says, or fits nowhere.
    """
    folder, module = Path(folder), family(config.model_type)
    expected = {path: leaf.shape for path, leaf in paths.flatten(abstract_params(config)).items()}
    with _open(folder) as files:
        unused = {name for name in files if not re.search(module.BUFFERS, name)}
        leaves = {}
        for weight in module.weights(config):
            names = [_stored_name(weight, layer, files, folder) for layer in _layers(weight, config)]
            leaves |= _read(weight, names, files, expected, dtype)
            unused -= set(names)
        if config.tie_word_embeddings:
            unused -= _copies_of_embedding(module.HEAD, files, leaves["embed_tokens/embedding"])
    if unused:
        raise UserError(
            f"'{folder}' has weights that a {config.model_type} model as its config.json describes it has no place for: "
            f"{_some(unused)}; either config.json is of another model, or the model has parts that are not implemented"
        )
    return paths.unflatten({path: jnp.asarray(leaf) for path, leaf in leaves.items()})


def stored_dtypes(folder: Path | str) -> dict[str, np.dtype]:
    """The type of every weight in the folder's safetensors, by its name there."""
    with _open(Path(folder)) as files:
        return {name: _dtype(name, files) for name in files if files[name].get_slice(name).get_dtype() in _FLOATS}


@contextmanager
def _open(folder: Path) -> Iterator[dict[str, Any]]:
    """Every tensor's name -> the open safetensors file that holds it."""
    if (folder / SINGLE).is_file():
        names = [SINGLE]
    elif index := _read_json(folder / INDEX):
        names = sorted(set(index["weight_map"].values()))
    else:
        raise UserError(
            f"model folder '{folder}' has neither {SINGLE} nor {INDEX}: only safetensors are read; convert other formats with "
            f"transformers' save_pretrained"
        )
    with ExitStack() as stack:
        files = {}
        for name in names:
            try:
                file = stack.enter_context(safe_open(folder / name, framework="numpy"))
            except FileNotFoundError as error:
                raise UserError(
                    f"'{folder / name}', which {INDEX} lists, is missing: copy or download it again"
                ) from error
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"'{folder / name}' is not a whole safetensors file ({error}): it was cut off or damaged on its way; copy or "
                    f"download it again"
                ) from error
            files |= dict.fromkeys(file.keys(), file)
        yield files


def _read(
    weight: Weight,
    names: list[str],
    files: Mapping[str, Any],
    expected: Mapping[str, tuple[int, ...]],
    dtype: DTypeLike | None,
) -> dict[str, np.ndarray]:
    """The leaves that `weight` fills, from one tensor, or stacked from one a layer."""
    stacked = weight.layered
    shapes = [expected[leaf][1:] if stacked else expected[leaf] for leaf in weight.leaves]
    shape = _joined_shape(weight, shapes)
    dtype = np.dtype(dtype or np.result_type(*[_dtype(name, files) for name in names]))
    buffers = [np.empty((len(names), *s), dtype) for s in shapes]
    for layer, name in enumerate(names):
        found = tuple(files[name].get_slice(name).get_shape())
        if found != shape:
            raise UserError(
                f"weight '{name}' has shape {list(found)} where config.json asks for {list(shape)}: config.json and safetensors "
                f"are of different models"
            )
        for buffer, part in zip(buffers, weight.split(files[name].get_tensor(name)), strict=True):
            buffer[layer] = part
    return {leaf: buffer if stacked else buffer[0] for leaf, buffer in zip(weight.leaves, buffers)}


def _layers(weight: Weight, config: ModelConfig) -> list[int | None]:
    return list(range(config.num_layers)) if weight.layered else [None]


def _stored_name(weight: Weight, layer: int | None, files: Mapping[str, Any], folder: Path) -> str:
    names = [name.format(layer=layer) for name in (weight.name, *weight.aliases)]
    for name in names:
        if name in files:
            return name
    raise UserError(
        f"'{folder}' has no weight '{names[0]}', which the model that its config.json describes needs: a shard is missing, or "
        f"config.json is of another model"
    )


def _dtype(name: str, files: Mapping[str, Any]) -> np.dtype:
    spelled = files[name].get_slice(name).get_dtype()
    if spelled not in _FLOATS:
        raise UserError(
            f"weight '{name}' is stored as {spelled}, which is not one of {', '.join(_FLOATS)}: quantized weights cannot be "
            f"adapted; use the model's original weights"
        )
    return _FLOATS[spelled]


def _copies_of_embedding(head: Weight, files: Mapping[str, Any], embedding: np.ndarray) -> set[str]:
    """Names under which a tied model's checkpoint stores its embedding a second time, as the head."""
    copies = {name for name in (head.name, *head.aliases) if name in files}
    for name in copies:
        if not np.array_equal(files[name].get_tensor(name).astype(embedding.dtype), embedding):
            raise UserError(
                f"config.json says tie_word_embeddings, but '{name}' differs from the input embedding: set tie_word_embeddings to "
                f"false to use both, or remove '{name}'"
            )
    return copies


def _joined_shape(weight: Weight, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape in the checkpoint of a tensor whose leaves have `shapes`."""
    return weight.join([np.broadcast_to(np.int8(0), shape) for shape in shapes]).shape


def _some(names: set[str]) -> str:
    first = ", ".join(f"'{name}'" for name in sorted(names)[:5])
    return first + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in `path`; None when there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(
            f"'{path}' is not valid JSON ({error}): it was cut off or damaged; copy or download it again"
        ) from error
