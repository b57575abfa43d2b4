"""Reading and writing the weights of Hugging Face folders, without PyTorch.

Both directions use the family's weight table (`weights`): every tensor of a checkpoint is used
exactly once, every leaf is filled, and every shape is checked.
"""

import functools
import itertools
import json
import math
import os
import re
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Int
from safetensors import SafetensorError, safe_open

from tokalign_jax.errors import UserError
from tokalign_jax.models import hub
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.families import family, text_name, weight_table
from tokalign_jax.models.hub import INDEX_FILE, WEIGHTS_FILE
from tokalign_jax.models.transformer import Params, abstract_params
from tokalign_jax.models.weights import Weight
from tokalign_jax.parallel import sharding
from tokalign_jax.text.canonical import vocabulary_size
from tokalign_jax.utils import paths

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHARD_FILE = "model-{number:05d}-of-{count:05d}.safetensors"

DtypeOf = Callable[[str], DTypeLike | None]
"""A function from a parameter's path to its dtype; None keeps the stored dtype."""

_FLOATS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
"""NumPy dtypes of weights by their names in safetensors."""

# --- Reading weights -----------------------------------------------------------------------------


def check_weights(folder: Path | str, config: ModelConfig) -> None:
    """Checks the names, dtypes and shapes of the stored weights against `config`.

    Reads no weights, except a stored second copy of a tied embedding.

    Raises:
      UserError: as for `load_params`.
    """
    stored = _stored_tensors(Path(folder))
    _check_tied_head(stored, _match(Path(folder), stored, config), config)


def load_params(
    folder: Path | str,
    config: ModelConfig,
    dtype: DTypeLike | DtypeOf | None = None,
    mesh: Mesh | None = None,
    skip: Collection[str] = (),
) -> Params:
    """Loads all parameters block by block.

    Host memory holds at most one block and the file that it is read from.

    Args:
      folder: a Hugging Face folder.
      config: its model's config.
      dtype: of all leaves, or a function of the path; None keeps the stored dtype.
      mesh: each leaf is placed on this mesh directly, sharded by `sharding.RULES` and with
        vocabulary rows padded. None puts leaves on the default device without padding.
      skip: paths of leaves that are not loaded.

    Raises:
      UserError: a file is missing or damaged; a weight is missing, unexpected, or has the wrong
        shape or dtype.
    """
    folder, stored = Path(folder), _stored_tensors(Path(folder))
    matched = _match(folder, stored, config)
    shapes = _leaf_shapes(config)
    leaves: dict[str, _Leaf] = {}
    for weight, sources in matched:
        default = _common_dtype({_FLOATS[stored[name].dtype] for _, name in sources})
        for path in weight.leaves:
            if path not in skip:
                leaves[path] = _Leaf(
                    path, shapes[path], np.dtype(_dtype_of(path, dtype) or default), mesh
                )
    # Grouped by file: a memory-mapped file counts as memory until it is closed.
    by_file = sorted(
        (
            (stored[name].file, weight, part, name)
            for weight, sources in matched
            if not leaves.keys().isdisjoint(weight.leaves)
            for part, name in sources
        ),
        key=lambda item: item[0],
    )
    for file, items in itertools.groupby(by_file, key=lambda item: item[0]):
        with _open(file) as tensors:
            for _, weight, part, name in items:
                for start, blocks in _blocks(tensors.get_slice(stored[name].key), weight):
                    for path, block in zip(weight.leaves, blocks, strict=True):
                        if path in leaves:
                            leaves[path].write(block, (*part, *start))
    _check_tied_head(stored, matched, config)
    return paths.unflatten({path: leaf.array() for path, leaf in leaves.items()})


Reader = Callable[..., np.ndarray]
"""`read(path, *index)` returns a parameter, indexed, in host memory."""


def stored_reader(folder: Path | str, config: ModelConfig) -> Reader:
    """Returns a reader that loads a folder's parameters tensor by tensor, without caching.

    The index is that of a layer (and expert or head), or a slice of a vocabulary matrix's rows.

    Raises:
      UserError: as for `load_params`.
    """
    folder, stored, shapes = Path(folder), _stored_tensors(Path(folder)), _leaf_shapes(config)
    tensors_by_path = {
        path: (weight, number, {part: stored[name] for part, name in parts})
        for weight, parts in _match(folder, stored, config)
        for number, path in enumerate(weight.leaves)
    }

    def read(path: str, *index: Any) -> np.ndarray:
        weight, number, tensors = tensors_by_path[path]
        if len(index) < weight.stacked:  # The requested array is stored as several tensors.
            return np.stack([read(path, *index, i) for i in range(shapes[path][len(index)])])
        part, rest = index[: weight.stacked], index[weight.stacked :]
        tensor = tensors[part]
        with _open(tensor.file) as file:
            block = file.get_slice(tensor.key)
            if sharding.is_vocabulary(path):  # One leaf per tensor: read only the requested rows.
                return block[rest or slice(None)]
            return weight.split(block[...])[number][rest]

    return read


def non_finite_rows(folder: Path | str, config: ModelConfig) -> dict[str, Int[np.ndarray, "n"]]:
    """Returns the rows with NaN or infinity of each vocabulary matrix, by its path.

    Reads every weight.

    Raises:
      UserError: another weight holds NaN or infinity, or as for `load_params`.
    """
    folder, stored = Path(folder), _stored_tensors(Path(folder))
    matched = _match(folder, stored, config)
    by_file = sorted(
        ((stored[name].file, weight, name) for weight, sources in matched for _, name in sources),
        key=lambda item: item[0],
    )
    rows: dict[str, np.ndarray] = {}
    broken: list[str] = []
    for file, items in itertools.groupby(by_file, key=lambda item: item[0]):
        with _open(file) as tensors:
            for _, weight, name in items:
                tensor, leaf = tensors.get_slice(stored[name].key), weight.leaves[0]
                if sharding.is_vocabulary(leaf):
                    blocks = _blocks(tensor, weight)
                    rows[leaf] = np.concatenate(
                        [sum(start) + _non_finite(block) for start, (block,) in blocks]
                    )
                elif len(_non_finite(np.atleast_1d(tensor[...]))):
                    broken.append(name)
    if broken:
        more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise UserError(
            f"weights of '{folder}' hold NaN or infinity: {', '.join(broken[:5])}{more}; the"
            " training diverged, or files were damaged or badly converted: use another checkpoint"
            " of this model"
        )
    return rows


def _non_finite(tensor: np.ndarray) -> Int[np.ndarray, "n"]:
    """Returns the indices along the first axis of entries with NaN or infinity."""
    if tensor.dtype.itemsize == 2:
        # Tests the exponent bits: faster than arithmetic in a dtype that the CPU lacks.
        exponent = 0x7C00 if tensor.dtype == np.float16 else 0x7F80
        finite = (tensor.view(np.uint16) & exponent) != exponent
    else:
        finite = np.isfinite(tensor)
    return np.flatnonzero(~finite.reshape(len(tensor), -1).all(axis=1))


def _common_dtype(dtypes: set[np.dtype]) -> np.dtype:
    """Returns the dtype of a leaf whose tensors are stored in `dtypes`.

    That is float32 (exact except for float64), unless all share one narrower dtype.
    """
    first, *rest = dtypes
    return first if not rest and first.itemsize < 4 else np.dtype(np.float32)


def stored_dtypes(folder: Path | str) -> dict[str, np.dtype]:
    """Returns the dtype of every float tensor in a folder's safetensors, by its name."""
    return {
        name: _FLOATS[tensor.dtype]
        for name, tensor in _stored_tensors(Path(folder)).items()
        if tensor.dtype in _FLOATS
    }


class _StoredTensor(NamedTuple):
    """A tensor of a checkpoint."""

    file: Path
    key: str
    """Its name in the file. A multimodal model's tensors are looked up by their text model names.
    """
    dtype: str
    """As named by safetensors."""
    shape: tuple[int, ...]


class _Leaf:
    """A parameter being filled: the whole array on the host, or this process's shards of it."""

    def __init__(self, path: str, shape: tuple[int, ...], dtype: np.dtype, mesh: Mesh | None):
        self._dtype, self._sharding = dtype, None
        if mesh is None:
            self._host = np.zeros(shape, dtype)
            return
        self._shape = sharding.padded_shape(path, shape, mesh)
        self._sharding = sharding.sharding_of(path, self._shape, mesh)
        # Stored as unsigned integers: without native bfloat16 arithmetic, XLA would convert the
        # whole array to float32 for each block that is written.
        self._bits = np.dtype(f"uint{8 * dtype.itemsize}")
        self._parts: list[tuple[Any, tuple[range, ...], jax.Array]] = []
        for device, index in self._sharding.addressable_devices_indices_map(self._shape).items():
            ranges = tuple(
                range(*along.indices(size)) for along, size in zip(index or (), self._shape)
            )
            zeros = jnp.zeros([len(along) for along in ranges], self._bits, device=device)
            self._parts.append((device, ranges, zeros))

    def write(self, block: np.ndarray, start: tuple[int, ...]) -> None:
        """Writes a block at index `start`; leading dimensions that it lacks have size one."""
        dimensions = len(self._host.shape if self._sharding is None else self._shape)
        start = start + (0,) * (dimensions - len(start))
        block = block.reshape((1,) * (dimensions - block.ndim) + block.shape)
        if self._sharding is None:
            self._host[
                tuple(slice(first, first + size) for first, size in zip(start, block.shape))
            ] = block
            return
        for i, (device, ranges, part) in enumerate(self._parts):
            covers = [range(first, first + size) for first, size in zip(start, block.shape)]
            in_block, in_part = sharding.overlap(covers, ranges)
            if all(along.start < along.stop for along in in_block):
                cut = block[in_block].astype(self._dtype, copy=False).view(self._bits)
                # Transposed views are copied in memory order and transposed on the device, which
                # is faster than in NumPy.
                transposed = cut.ndim > 1 and cut.strides[-2] < cut.strides[-1]
                on_device = jax.device_put(
                    np.ascontiguousarray(cut.swapaxes(-1, -2) if transposed else cut), device
                )
                offset = np.array([along.start for along in in_part], np.int32)
                self._parts[i] = device, ranges, _update(part, on_device, offset, transposed)

    def array(self) -> jax.Array:
        """Returns the filled array and releases the buffers of its parts."""
        if self._sharding is None:
            return jnp.asarray(self._host)
        parts = [_from_bits(part, self._dtype) for _, _, part in self._parts]
        self._parts = []
        return jax.make_array_from_single_device_arrays(self._shape, self._sharding, parts)


@functools.partial(jax.jit, static_argnames="transposed", donate_argnums=0)
def _update(
    array: jax.Array, block: jax.Array, start: Int[jax.Array, "n"], transposed: bool
) -> jax.Array:
    """Writes a block (or its transpose) into the donated array."""
    return jax.lax.dynamic_update_slice(
        array, jnp.swapaxes(block, -1, -2) if transposed else block, tuple(start)
    )


@functools.partial(jax.jit, static_argnames="dtype", donate_argnums=0)
def _from_bits(array: jax.Array, dtype: np.dtype) -> jax.Array:
    return jax.lax.bitcast_convert_type(array, dtype)


def _blocks(tensor: Any, weight: Weight) -> Iterator[tuple[tuple[int, ...], Sequence[np.ndarray]]]:
    """Yields the leaves of a stored tensor with their start index.

    A vocabulary matrix, which is a leaf of its own, comes in blocks of rows; others come whole.
    """
    shape = tensor.get_shape()
    size = math.prod(shape) * _FLOATS[tensor.get_dtype()].itemsize
    if not sharding.is_vocabulary(weight.leaves[0]) or size <= _BLOCK_BYTES:
        yield (), weight.split(tensor[...])
        return
    rows = shape[0]
    step = max(1, rows * _BLOCK_BYTES // size)
    for first in range(0, rows, step):
        yield (first,), (tensor[first : min(first + step, rows)],)


_BLOCK_BYTES = 64 << 20
"""Size of a block of a vocabulary matrix."""


def _dtype_of(path: str, dtype: DTypeLike | DtypeOf | None) -> DTypeLike | None:
    return dtype(path) if isinstance(dtype, types.FunctionType) else cast(DTypeLike | None, dtype)


def _stored_tensors(folder: Path) -> dict[str, _StoredTensor]:
    """Returns the folder's tensors by name; of a multimodal model, those of its text model."""
    names = [WEIGHTS_FILE] if (folder / WEIGHTS_FILE).is_file() else hub.shard_names(folder)
    if not names:
        raise UserError(
            f"model folder '{folder}' has neither {WEIGHTS_FILE} nor {INDEX_FILE}: only"
            " safetensors are supported; convert other formats with transformers' save_pretrained"
        )
    model_type = (hub.read_json(folder / "config.json") or {}).get("model_type")
    stored = {}
    for file in names:
        with _open(folder / file) as tensors:
            for key in tensors.keys():  # noqa: SIM118 (not a dict)
                if (name := text_name(model_type, key)) is not None:
                    tensor = tensors.get_slice(key)
                    stored[name] = _StoredTensor(
                        folder / file, key, tensor.get_dtype(), tuple(tensor.get_shape())
                    )
    return stored


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    try:
        tensors = safe_open(file, framework="numpy")
    except FileNotFoundError as error:
        raise UserError(
            f"'{file}', which {INDEX_FILE} lists, is missing: copy or download it again"
        ) from error
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"'{file}' is not a complete safetensors file ({error}): it is truncated or damaged;"
            " copy or download it again"
        ) from error
    with tensors:
        yield tensors


_Sources = list[tuple[tuple[int, ...], str]]
"""Indices of the slices of a weight's leaves, each with the name of the tensor that fills it."""


def _match(
    folder: Path, stored: Mapping[str, _StoredTensor], config: ModelConfig
) -> list[tuple[Weight, _Sources]]:
    """Pairs every weight of the table with its stored tensors; all must be present and used."""
    module = family(config.model_type)
    matched = [
        (
            weight,
            [
                (
                    part,
                    _stored_name(folder, stored, weight.names(part) + _tied_names(weight, config)),
                )
                for part in weight.slices(config.num_layers)
            ],
        )
        for weight in weight_table(config, stored)
    ]
    shapes = _leaf_shapes(config)
    for weight, sources in matched:
        expected = _tensor_shape(weight, shapes)
        for _, name in sources:
            _check_tensor(name, stored[name], expected)
    used = {name for _, sources in matched for _, name in sources}
    if config.tie_word_embeddings:
        used |= {module.HEAD.name, *module.HEAD.aliases}
    unused = sorted(
        name for name in stored if name not in used and not re.search(module.BUFFERS, name)
    )
    if unused:
        more = f" and {len(unused) - 5} more" if len(unused) > 5 else ""
        raise UserError(
            f"'{folder}' has weights that a {config.model_type} model with its config.json does"
            f" not have: {', '.join(unused[:5])}{more}; either config.json belongs to another"
            " model, or the model uses options that are not implemented"
        )
    return matched


def _tied_names(weight: Weight, config: ModelConfig) -> tuple[str, ...]:
    """Returns the names of the head, under which a tied embedding may be stored instead."""
    if not (config.tie_word_embeddings and weight.leaves == ("embed_tokens/embedding",)):
        return ()
    return family(config.model_type).HEAD.names(())


def _stored_name(folder: Path, stored: Mapping[str, _StoredTensor], names: tuple[str, ...]) -> str:
    for name in names:
        if name in stored:
            return name
    is_head = names[0] in ("lm_head.weight", "embed_out.weight")
    raise UserError(
        f"'{folder}' has no weight '{names[0]}', which its config.json requires: a shard is"
        " missing, or config.json belongs to another model"
        + (
            ', or lacks "tie_word_embeddings": true, if the head is the input embedding'
            if is_head
            else ""
        )
    )


def _check_tensor(name: str, tensor: _StoredTensor, expected: tuple[int, ...]) -> None:
    if tensor.dtype not in _FLOATS:
        raise UserError(
            f"weight '{name}' is stored as {tensor.dtype}, which is not one of"
            f" {', '.join(_FLOATS)}: quantized weights are not supported; use the model's original"
            " weights"
        )
    if tensor.shape != expected:
        raise UserError(
            f"weight '{name}' has shape {list(tensor.shape)} but config.json requires"
            f" {list(expected)}: config.json and safetensors belong to different models"
        )


def _leaf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in paths.flatten(abstract_params(config)).items()}


def _tensor_shape(weight: Weight, leaf_shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Returns a tensor's shape in the checkpoint, from `join` applied to zero-stride arrays."""
    shapes = [leaf_shapes[leaf][weight.stacked :] for leaf in weight.leaves]
    return weight.join([np.broadcast_to(np.int8(0), shape) for shape in shapes]).shape


def _check_tied_head(
    stored: Mapping[str, _StoredTensor],
    matched: Sequence[tuple[Weight, _Sources]],
    config: ModelConfig,
) -> None:
    """Checks that a tied model's stored head, if any, equals its embedding."""
    if not config.tie_word_embeddings:
        return
    head = family(config.model_type).HEAD
    embedding = next(
        sources[0][1] for weight, sources in matched if weight.leaves == ("embed_tokens/embedding",)
    )
    for name in {head.name, *head.aliases} & set(stored) - {embedding}:
        with _open(stored[name].file) as head_file, _open(stored[embedding].file) as embed_file:
            pairs = zip(
                *(
                    _blocks(file.get_slice(stored[key].key), head)
                    for file, key in ((head_file, name), (embed_file, embedding))
                )
            )
            if all(_equal(a[0], b[0]) for (_, a), (_, b) in pairs):
                continue
        raise UserError(
            f"config.json sets tie_word_embeddings, but '{name}' differs from the input embedding:"
            f" set tie_word_embeddings to false to use both, or remove '{name}'"
        )


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Compares two arrays, treating NaN as equal to NaN."""
    return a.shape == b.shape and bool(np.all((a == b) | ((a != a) & (b != b))))


# --- Writing ------------------------------------------------------------------------------------


def save_checkpoint(
    folder: Path | str,
    params: Params | Reader,
    config: ModelConfig,
    raw_config: Mapping[str, Any],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    dtypes: str = "source",
    source_folder: Path | str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    writes: bool = True,
) -> None:
    """Writes a new folder that AutoModelForCausalLM and AutoTokenizer load.

    It contains safetensors (sharded, with an index, if larger than `max_shard_bytes`), the source's
    config.json and generation_config.json with the new vocabulary size and the bos, eos and pad ids
    of `tokenizer`, and the tokenizer.

    In a multi-process run all processes must call this, since each holds shards of the arrays.

    Args:
      folder: the new folder.
      params: parameters without adapters, on any devices, with or without the padding rows of
        `sharding.place`; or a reader of them.
      config: the model's config.
      raw_config: the source's config.json.
      tokenizer: the new tokenizer.
      dtypes: the dtype of all written weights, or `source` for the dtype of each weight in
        `source_folder`.
      source_folder: the source model, for its weight names, dtypes and generation config.
      max_shard_bytes: the maximum size of a weight file.
      writes: True in the one process that writes the files.

    Raises:
      UserError: the folder is a file or not empty, or the tokenizer has more tokens than the
        model has rows.
      ValueError: the parameters do not match `config`, or `source_folder` is missing.
    """
    if dtypes == "source" and source_folder is None:
        raise ValueError("dtypes 'source' needs a source_folder")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"'{folder}' is a file: name a new folder")
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
    if writes and any(folder.iterdir()):
        raise UserError(
            f"'{folder}' is not empty: models are written to new folders only; move it away"
        )
    if vocabulary_size(tokenizer) > config.vocab_size:
        raise UserError(
            f"the tokenizer has {vocabulary_size(tokenizer):,} tokens but the model has only"
            f" {config.vocab_size:,} rows: give the model at least as many rows as there are"
            " tokens"
        )
    if writes:
        new_config = _output_config(raw_config, config, dtypes)
        hub.save_config_and_tokenizer(folder, new_config, tokenizer, source_folder)
    stored = stored_dtypes(source_folder) if source_folder else {}
    write_weights(folder, params, config, dtypes, stored, max_shard_bytes, writes)


def _output_config(
    raw_config: Mapping[str, Any], config: ModelConfig, dtypes: str
) -> dict[str, Any]:
    """Returns the source's config.json with the new vocabulary size and dtype."""
    if dtypes == "source":
        return {**raw_config, "vocab_size": config.vocab_size}
    # Keep to the one dtype key that is present: readers differ in precedence.
    name = "torch_dtype" if "torch_dtype" in raw_config else "dtype"
    others = {
        key: value for key, value in raw_config.items() if key not in ("dtype", "torch_dtype")
    }
    return {**others, "vocab_size": config.vocab_size, name: dtypes}


def write_weights(
    folder: Path,
    params: Params | Reader,
    config: ModelConfig,
    dtypes: str,
    stored: Mapping[str, np.dtype],
    max_shard_bytes: int,
    writes: bool = True,
) -> None:
    """Writes the weights alone, with an index if they are sharded.

    Args as for `save_checkpoint`; `stored` has the dtypes of the source's weights.
    """
    shapes = _leaf_shapes(config)
    read = params if callable(params) else _reader(params, shapes)
    tensors = []
    for weight in weight_table(config, stored):
        shape = _tensor_shape(weight, shapes)
        for part in weight.slices(config.num_layers):
            default, *aliases = weight.names(part) + _tied_names(weight, config)
            name = next((n for n in (default, *aliases) if n in stored), default)
            # A bias that the source lacks (`qwen.as_llama`) gets the dtype of its weight.
            reference = name if name in stored else re.sub(r"\.bias$", ".weight", name)
            dtype = stored[reference] if dtypes == "source" else np.dtype(dtypes)
            tensors.append(_OutputTensor(name, weight, part, dtype, shape))
    shards = _shards(tensors, max_shard_bytes)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = (
            WEIGHTS_FILE
            if len(shards) == 1
            else _SHARD_FILE.format(number=number, count=len(shards))
        )
        _write_shard(folder / file if writes else None, shard, read, config.vocab_size)
        weight_map |= {tensor.name: file for tensor in shard}
    if len(shards) > 1 and writes:
        total = sum(tensor.size for tensor in tensors)
        hub.write_json(
            folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map}
        )


def _reader(params: Params, shapes: Mapping[str, tuple[int, ...]]) -> Reader:
    """Returns a reader of parameters that are in memory.

    Raises:
      ValueError: their shapes differ from `shapes`, with or without padding rows.
    """
    leaves = paths.flatten(params)
    if {path: leaf.shape for path, leaf in leaves.items()} not in (
        shapes,
        _padded_shapes(shapes, leaves),
    ):
        raise ValueError(
            f"parameters do not fit the model: shapes are {jax.tree.map(jnp.shape, leaves)},"
            f" expected {shapes}"
        )
    return lambda path, *index: sharding.to_host(leaves[path], *index)


def _padded_shapes(
    shapes: Mapping[str, tuple[int, ...]], leaves: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """Returns the shapes including the padding rows required by the meshes of `leaves`."""

    def mesh(path: str) -> Mesh | None:
        return getattr(getattr(leaves.get(path), "sharding", None), "mesh", None)

    return {path: sharding.padded_shape(path, shape, mesh(path)) for path, shape in shapes.items()}


@dataclass(frozen=True)
class _OutputTensor:
    """A tensor to be written."""

    name: str
    weight: Weight
    part: tuple[int, ...]
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def blocks(self, read: Reader, vocabulary: int) -> Iterator[np.ndarray]:
        """Yields the tensor, a vocabulary matrix in blocks of rows to limit host memory."""
        path = self.weight.leaves[0]
        if not sharding.is_vocabulary(path):
            parts = [read(path, *self.part) for path in self.weight.leaves]
            yield self.weight.join(parts).astype(self.dtype)
            return
        step = max(1, vocabulary * _BLOCK_BYTES // self.size)
        for first in range(0, vocabulary, step):
            yield read(path, slice(first, min(first + step, vocabulary))).astype(self.dtype)


def _write_shard(
    path: Path | None, tensors: Sequence[_OutputTensor], read: Reader, vocabulary: int
) -> None:
    """Writes a safetensors file (https://huggingface.co/docs/safetensors) block by block.

    The library's own writer needs the whole file in memory.

    Args:
      path: None if another process writes, and this one only contributes its array shards.
      tensors: the file's tensors.
      read: reads the parameters.
      vocabulary: the number of rows of the vocabulary matrices.
    """
    # The order that the library writes.
    tensors = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        dtype_name = next(name for name, dtype in _FLOATS.items() if dtype == tensor.dtype)
        header[tensor.name] = {
            "dtype": dtype_name,
            "shape": tensor.shape,
            "data_offsets": [end, end := end + tensor.size],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path or os.devnull, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            for block in tensor.blocks(read, vocabulary):
                file.write(np.ascontiguousarray(block).view(np.uint8).data)


def _shards(tensors: Sequence[_OutputTensor], max_bytes: int) -> list[list[_OutputTensor]]:
    """Splits `tensors`, in order, into shards; a tensor above the limit gets its own shard."""
    shards, free = [], 0
    for tensor in tensors:
        if not shards or tensor.size > free:
            shards.append([])
            free = max_bytes
        shards[-1].append(tensor)
        free -= tensor.size
    return shards
