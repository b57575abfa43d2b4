"""Weights of Hugging Face folders, in and out. No PyTorch on the way.

They are read and written through the family's weight table (`weights`): every tensor of a checkpoint is used exactly
once, every leaf filled, every shape checked.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tokalign_jax import paths
from tokalign_jax.errors import UserError
from tokalign_jax.models import hub
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.families import family
from tokalign_jax.models.transformer import Params, abstract_params
from tokalign_jax.models.weights import Weight

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = "model-{number:05d}-of-{count:05d}.safetensors"

_FLOATS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
"""Types of weights, as safetensors spells them."""

# --- Reading weights --------------------------------------------------------------------------------------------------


def check_weights(folder: Path | str, config: ModelConfig) -> None:
    """Compares names, types and shapes of the stored weights with what `config` needs; reads no weights.

    Raises:
      UserError: as `load_params`.
    """
    with _open(Path(folder)) as files:
        _match(Path(folder), files, config)


def load_params(folder: Path | str, config: ModelConfig, dtype: DTypeLike | None = None) -> Params:
    """All parameters, read one tensor at a time; in `dtype`, or each in its stored type.

    Raises:
      UserError: a file is missing or broken; a weight is missing, fits nowhere, or has an unexpected shape or type.
    """
    leaves = {}
    with _open(Path(folder)) as files:
        for weight, names in _match(Path(folder), files, config):
            read = _read(weight, names, config.num_layers, files, dtype)
            leaves |= {path: jnp.asarray(leaf) for path, leaf in read.items()}
        if config.tie_word_embeddings:
            _check_copies_of_embedding(files, config, leaves["embed_tokens/embedding"])
    return paths.unflatten(leaves)


def stored_dtypes(folder: Path | str) -> dict[str, np.dtype]:
    """The type of every float tensor in the folder's safetensors, by its name there."""
    with _open(Path(folder)) as files:
        spelled = {name: file.get_slice(name).get_dtype() for name, file in files.items()}
    return {name: _FLOATS[s] for name, s in spelled.items() if s in _FLOATS}


@contextmanager
def _open(folder: Path) -> Iterator[dict[str, Any]]:
    """Every tensor's name -> the open safetensors file that holds it."""
    if (folder / SINGLE).is_file():
        names = [SINGLE]
    elif index := hub.read_json(folder / INDEX):
        names = sorted(set(index["weight_map"].values()))
    else:
        raise UserError(
            f"model folder '{folder}' has neither {SINGLE} nor {INDEX}: only safetensors are read; convert other "
            f"formats with transformers' save_pretrained"
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
                    f"'{folder / name}' is not a whole safetensors file ({error}): it was cut off or damaged on its "
                    f"way; copy or download it again"
                ) from error
            files |= dict.fromkeys(file.keys(), file)
        yield files


def _match(folder: Path, files: Mapping[str, Any], config: ModelConfig) -> list[tuple[Weight, list[str]]]:
    """Every row of the weight table with the stored names of its tensors in order; none is missing or left over."""
    module = family(config.model_type)
    matched = [
        (weight, [_stored_name(folder, files, name) for name in names]) for weight, names in _tensor_names(config)
    ]
    shapes = _leaf_shapes(config)
    for weight, names in matched:
        expected = _tensor_shape(weight, shapes)
        for name in names:
            _check_tensor(name, files[name].get_slice(name), expected)
    used = {name for _, names in matched for name in names}
    if config.tie_word_embeddings:
        used |= {module.HEAD.name, *module.HEAD.aliases}
    unused = sorted(name for name in files if name not in used and not re.search(module.BUFFERS, name))
    if unused:
        more = f" and {len(unused) - 5} more" if len(unused) > 5 else ""
        raise UserError(
            f"'{folder}' has weights for which a {config.model_type} model with its config.json has no place: "
            f"{', '.join(unused[:5])}{more}; either config.json is of another model, or parts of it are not implemented"
        )
    return matched


def _tensor_names(config: ModelConfig) -> list[tuple[Weight, list[tuple[str, ...]]]]:
    """Every row of the weight table with its tensors in order, each as all the names that it may have."""
    return [
        (weight, [weight.names(part) for part in weight.slices(config.num_layers)])
        for weight in family(config.model_type).weights(config)
    ]


def _stored_name(folder: Path, files: Mapping[str, Any], names: tuple[str, ...]) -> str:
    for name in names:
        if name in files:
            return name
    raise UserError(
        f"'{folder}' has no weight '{names[0]}', which the model that its config.json describes needs: a shard is "
        f"missing, or config.json is of another model"
    )


def _check_tensor(name: str, tensor: Any, expected: tuple[int, ...]) -> None:
    if tensor.get_dtype() not in _FLOATS:
        raise UserError(
            f"weight '{name}' is stored as {tensor.get_dtype()}, which is not one of {', '.join(_FLOATS)}: quantized "
            f"weights cannot be adapted; use the model's original weights"
        )
    if tuple(tensor.get_shape()) != expected:
        raise UserError(
            f"weight '{name}' has shape {list(tensor.get_shape())} where config.json asks for {list(expected)}: "
            f"config.json and safetensors are of different models"
        )


def _leaf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in paths.flatten(abstract_params(config)).items()}


def _tensor_shape(weight: Weight, leaf_shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The checkpoint shape of a tensor whose leaves have these shapes: `join` tells, from arrays without content."""
    shapes = [leaf_shapes[leaf][weight.stacked :] for leaf in weight.leaves]
    return weight.join([np.broadcast_to(np.int8(0), shape) for shape in shapes]).shape


def _read(
    weight: Weight, names: list[str], num_layers: int, files: Mapping[str, Any], dtype: DTypeLike | None
) -> dict[str, np.ndarray]:
    """The leaves that `weight` fills, from one tensor, or stacked from those of all layers."""
    dtype = np.dtype(dtype or np.result_type(*{_FLOATS[files[name].get_slice(name).get_dtype()] for name in names}))
    stack = (num_layers, weight.count)[: weight.stacked]
    leaves: dict[str, np.ndarray] = {}
    for place, name in zip(weight.slices(num_layers), names, strict=True):
        for leaf, part in zip(weight.leaves, weight.split(files[name].get_tensor(name)), strict=True):
            if leaf not in leaves:
                leaves[leaf] = np.empty((*stack, *part.shape), dtype)
            leaves[leaf][place] = part
    return leaves


def _check_copies_of_embedding(files: Mapping[str, Any], config: ModelConfig, embedding: jax.Array) -> None:
    """A tied model's checkpoint may store its embedding a second time, as the head, but nothing else there."""
    head = family(config.model_type).HEAD
    for name in {head.name, *head.aliases} & set(files):
        if not np.array_equal(files[name].get_tensor(name).astype(embedding.dtype), embedding):
            raise UserError(
                f"config.json says tie_word_embeddings, but '{name}' differs from the input embedding: set "
                f"tie_word_embeddings to false to use both, or remove '{name}'"
            )


# --- Writing ----------------------------------------------------------------------------------------------------------


def save_checkpoint(
    folder: Path | str,
    params: Params,
    config: ModelConfig,
    raw_config: Mapping[str, Any],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    dtypes: str = "source",
    source_folder: Path | str | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a new folder that AutoModelForCausalLM and AutoTokenizer load.

    It holds safetensors (split, with an index, when larger than `max_shard_bytes`), the source's config.json and
    generation_config.json with the new vocabulary size and the bos, eos and pad ids of `tokenizer`, and the tokenizer.

    Args:
      params: without adapters (`lora.merge_lora`).
      raw_config: the source's config.json.
      dtypes: the type of all written weights, or `source`: each as `source_folder` stores it.
      source_folder: the source model, for its names of weights, its types and its generation config.

    Raises:
      UserError: the folder is not empty, or the tokenizer has more tokens than the model has rows.
      ValueError: the parameters are not those of `config`, or `source` has no folder.
    """
    if dtypes == "source" and source_folder is None:
        raise ValueError("dtypes 'source' needs a source_folder")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise UserError(f"'{folder}' is not empty: a model is written into a new folder only; move it away")
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(tokenizer):,} tokens but the model has only {config.vocab_size:,} rows: some "
            f"tokens would have none; give the model at least as many rows"
        )
    dtype = {} if dtypes == "source" else {"torch_dtype" if "torch_dtype" in raw_config else "dtype": dtypes}
    new = dtype | {"vocab_size": config.vocab_size}
    hub.save_config_and_tokenizer(folder, {**raw_config, **new}, tokenizer, source_folder)
    stored = stored_dtypes(source_folder) if source_folder else {}
    _write_weights(folder, params, config, dtypes, stored, max_shard_bytes)


def _write_weights(
    folder: Path, params: Params, config: ModelConfig, dtypes: str, stored: Mapping[str, np.dtype], max_shard_bytes: int
) -> None:
    leaves, shapes = paths.flatten(params), _leaf_shapes(config)
    if {path: leaf.shape for path, leaf in leaves.items()} != shapes:
        raise ValueError(
            f"parameters do not fit the model: they are {jax.tree.map(jnp.shape, leaves)}, expected {shapes}"
        )
    tensors = []
    for weight, names in _tensor_names(config):
        shape = _tensor_shape(weight, shapes)
        for place, (name, *aliases) in zip(weight.slices(config.num_layers), names, strict=True):
            name = next((n for n in (name, *aliases) if n in stored), name)
            dtype = stored[name] if dtypes == "source" else np.dtype(dtypes)
            tensors.append(_Tensor(name, weight, place, dtype, math.prod(shape) * dtype.itemsize))
    shards = _shards(tensors, max_shard_bytes)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else SHARD.format(number=number, count=len(shards))
        save_file({t.name: t.value(leaves) for t in shard}, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors lets only the owner read
        weight_map |= {tensor.name: file for tensor in shard}
    if len(shards) > 1:
        total = sum(tensor.size for tensor in tensors)
        hub.write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


@dataclass(frozen=True)
class _Tensor:
    """A tensor to be written."""

    name: str
    weight: Weight
    place: tuple[int, ...]
    """The slice of its leaves."""
    dtype: np.dtype
    size: int
    """In bytes."""

    def value(self, leaves: Mapping[str, jax.Array]) -> np.ndarray:
        parts = [np.asarray(leaves[path])[self.place] for path in self.weight.leaves]
        return np.ascontiguousarray(self.weight.join(parts).astype(self.dtype))


def _shards(tensors: Sequence[_Tensor], max_bytes: int) -> list[list[_Tensor]]:
    """`tensors` in order, in as many shards as their size asks for; one larger than a shard has a file to itself."""
    shards, room = [], 0
    for tensor in tensors:
        if not shards or tensor.size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(tensor)
        room -= tensor.size
    return shards
