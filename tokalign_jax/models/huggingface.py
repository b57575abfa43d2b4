"""Weights of Hugging Face folders, in and out. No PyTorch on the way.

They are read and written through the family's weight table (`weights`): every tensor of a
checkpoint is used exactly once, every leaf filled, every shape checked.
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
from tokalign_jax.models.hub import INDEX, SINGLE
from tokalign_jax.models.transformer import Params, abstract_params
from tokalign_jax.models.weights import Weight
from tokalign_jax.parallel import sharding
from tokalign_jax.text.canonical import vocabulary_size
from tokalign_jax.utils import paths

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARD = "model-{number:05d}-of-{count:05d}.safetensors"

DtypeOf = Callable[[str], DTypeLike | None]
"""The type of a parameter by its path; None: as stored."""

_FLOATS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
"""Types of weights, as safetensors spells them."""

# --- Reading weights -----------------------------------------------------------------------------


def check_weights(folder: Path | str, config: ModelConfig) -> None:
    """Compares names, types and shapes of the stored weights with what `config` needs; reads none,
    but for a second copy of a tied embedding.

    Raises:
      UserError: as `load_params`.
    """
    stored = _stored(Path(folder))
    _check_copies_of_embedding(stored, _match(Path(folder), stored, config), config)


def load_params(
    folder: Path | str,
    config: ModelConfig,
    dtype: DTypeLike | DtypeOf | None = None,
    mesh: Mesh | None = None,
    skip: Collection[str] = (),
) -> Params:
    """All parameters, read block by block: in host memory are never more than one block and the
    file that it is in.

    Args: dtype: of all leaves, or of each by its path; None: as stored. skip: paths of leaves that
      are left out. mesh: each leaf goes straight to the parts of it on this mesh
      (`sharding.RULES`), vocabulary matrices with padding rows. None: on
        the default device, without padding.

    Raises: UserError: a file is missing or broken; a weight is missing, fits nowhere, or has an
      unexpected shape or type.
    """
    folder, stored = Path(folder), _stored(Path(folder))
    matched = _match(folder, stored, config)
    shapes = _leaf_shapes(config)
    leaves: dict[str, _Leaf] = {}
    for weight, places in matched:
        own = _type_of_all({_FLOATS[stored[name].dtype] for _, name in places})
        for path in weight.leaves:
            if path not in skip:
                leaves[path] = _Leaf(
                    path, shapes[path], np.dtype(_dtype_of(path, dtype) or own), mesh
                )
    # File by file: a mapped file counts as memory until it is closed.
    by_file = sorted(
        (
            (stored[name].file, weight, part, name)
            for weight, places in matched
            if not leaves.keys().isdisjoint(weight.leaves)
            for part, name in places
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
    _check_copies_of_embedding(stored, matched, config)
    return paths.unflatten({path: leaf.array() for path, leaf in leaves.items()})


Reader = Callable[..., np.ndarray]
"""`read(path, *index)`: a parameter, indexed, in host memory."""


def stored_reader(folder: Path | str, config: ModelConfig) -> Reader:
    """Reads parameters of a folder tensor by tensor; nothing stays in memory.

    It takes the index of a layer (and expert or head), or a slice of the rows of a vocabulary's
    matrix.

    Raises:
      UserError: as `load_params`.
    """
    folder, stored, shapes = Path(folder), _stored(Path(folder)), _leaf_shapes(config)
    places = {
        path: (weight, number, {part: stored[name] for part, name in parts})
        for weight, parts in _match(folder, stored, config)
        for number, path in enumerate(weight.leaves)
    }

    def read(path: str, *index: Any) -> np.ndarray:
        weight, number, tensors = places[path]
        if len(index) < weight.stacked:  # asked for in one tensor, stored in several
            return np.stack([read(path, *index, i) for i in range(shapes[path][len(index)])])
        part, rest = index[: weight.stacked], index[weight.stacked :]
        tensor = tensors[part]
        with _open(tensor.file) as file:
            block = file.get_slice(tensor.key)
            if sharding.is_vocabulary(
                path
            ):  # it is its own leaf: no more of it is read than asked for
                return block[rest or slice(None)]
            return weight.split(block[...])[number][rest]

    return read


def non_finite_rows(folder: Path | str, config: ModelConfig) -> dict[str, Int[np.ndarray, "n"]]:
    """Rows of the vocabulary's matrices that hold NaN or infinity, by the path of the matrix; reads
    every weight.

    Raises:
      UserError: another weight holds NaN or infinity, or as `load_params`.
    """
    folder, stored = Path(folder), _stored(Path(folder))
    matched = _match(folder, stored, config)
    by_file = sorted(
        ((stored[name].file, weight, name) for weight, places in matched for _, name in places),
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
            f"weights of '{folder}' hold NaN or infinity: {', '.join(broken[:5])}{more}; its"
            " training diverged, or its files were damaged or badly converted: take another"
            " checkpoint of it"
        )
    return rows


def _non_finite(tensor: np.ndarray) -> Int[np.ndarray, "n"]:
    """Indices along the first axis at which something is NaN or infinite."""
    if (
        tensor.dtype.itemsize == 2
    ):  # all bits of the exponent: faster than arithmetic that the host does not have
        exponent = 0x7C00 if tensor.dtype == np.float16 else 0x7F80
        finite = (tensor.view(np.uint16) & exponent) != exponent
    else:
        finite = np.isfinite(tensor)
    return np.flatnonzero(~finite.reshape(len(tensor), -1).all(axis=1))


def _type_of_all(dtypes: set[np.dtype]) -> np.dtype:
    """What holds a leaf whose tensors are stored in these: float32, which is exact but for float64,
    unless all are of one narrower type.
    """
    first, *others = dtypes
    return first if not others and first.itemsize < 4 else np.dtype(np.float32)


def stored_dtypes(folder: Path | str) -> dict[str, np.dtype]:
    """The type of every float tensor in the folder's safetensors, by its name there."""
    return {
        name: _FLOATS[tensor.dtype]
        for name, tensor in _stored(Path(folder)).items()
        if tensor.dtype in _FLOATS
    }


class _Stored(NamedTuple):
    """A tensor of a checkpoint."""

    file: Path
    key: str
    """Its name there; one of a multimodal model goes by the name that it has in the text model
    alone.
    """
    dtype: str
    """As safetensors spells it."""
    shape: tuple[int, ...]


class _Leaf:
    """A parameter that is being filled: whole on the host, or the parts of it that this process's
    devices have.
    """

    def __init__(self, path: str, shape: tuple[int, ...], dtype: np.dtype, mesh: Mesh | None):
        self._dtype, self._sharding = dtype, None
        if mesh is None:
            self._host = np.zeros(shape, dtype)
            return
        self._shape = sharding.padded_shape(path, shape, mesh)
        self._sharding = sharding.sharding_of(path, self._shape, mesh)
        # As bits: where there is no bfloat16 arithmetic, XLA would write a block by way of float32
        # of the whole array.
        self._bits = np.dtype(f"uint{8 * dtype.itemsize}")
        self._parts: list[tuple[Any, tuple[range, ...], jax.Array]] = []
        for device, index in self._sharding.addressable_devices_indices_map(self._shape).items():
            ranges = tuple(
                range(*along.indices(size)) for along, size in zip(index or (), self._shape)
            )
            zeros = jnp.zeros([len(along) for along in ranges], self._bits, device=device)
            self._parts.append((device, ranges, zeros))

    def write(self, block: np.ndarray, start: tuple[int, ...]) -> None:
        """Puts a block where it begins; dimensions in front that it lacks count one."""
        dimensions = len(self._host.shape if self._sharding is None else self._shape)
        start = start + (0,) * (dimensions - len(start))
        block = block.reshape((1,) * (dimensions - block.ndim) + block.shape)
        if self._sharding is None:
            self._host[
                tuple(slice(first, first + size) for first, size in zip(start, block.shape))
            ] = block
            return
        for place, (device, ranges, part) in enumerate(self._parts):
            covers = [range(first, first + size) for first, size in zip(start, block.shape)]
            here, inside = sharding.overlap(covers, ranges)
            if all(along.start < along.stop for along in here):
                cut = block[here].astype(self._dtype, copy=False).view(self._bits)
                # A transposed view goes as it lies in memory: the device turns it faster than NumPy
                # does.
                turned = cut.ndim > 1 and cut.strides[-2] < cut.strides[-1]
                there = jax.device_put(
                    np.ascontiguousarray(cut.swapaxes(-1, -2) if turned else cut), device
                )
                offset = np.array([along.start for along in inside], np.int32)
                self._parts[place] = device, ranges, _update(part, there, offset, turned)

    def array(self) -> jax.Array:
        if self._sharding is None:
            return jnp.asarray(self._host)
        parts = [_from_bits(part, self._dtype) for _, _, part in self._parts]
        self._parts = []
        return jax.make_array_from_single_device_arrays(self._shape, self._sharding, parts)


@functools.partial(jax.jit, static_argnames="turned", donate_argnums=0)
def _update(
    array: jax.Array, block: jax.Array, start: Int[jax.Array, "n"], turned: bool
) -> jax.Array:
    """Writes a block, or its transpose, into an array, in its memory."""
    return jax.lax.dynamic_update_slice(
        array, jnp.swapaxes(block, -1, -2) if turned else block, tuple(start)
    )


@functools.partial(jax.jit, static_argnames="dtype", donate_argnums=0)
def _from_bits(array: jax.Array, dtype: np.dtype) -> jax.Array:
    return jax.lax.bitcast_convert_type(array, dtype)


def _blocks(tensor: Any, weight: Weight) -> Iterator[tuple[tuple[int, ...], Sequence[np.ndarray]]]:
    """The leaves of a stored tensor, and where they begin: all at once, or a vocabulary's matrix,
    which is its own leaf, by rows.
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
"""What is read of a large matrix at once."""


def _dtype_of(path: str, dtype: DTypeLike | DtypeOf | None) -> DTypeLike | None:
    return dtype(path) if isinstance(dtype, types.FunctionType) else cast(DTypeLike | None, dtype)


def _stored(folder: Path) -> dict[str, _Stored]:
    """Every tensor of the folder by its name; of a multimodal model those of its text model."""
    if (folder / SINGLE).is_file():
        names = [SINGLE]
    elif index := hub.read_json(folder / INDEX):
        names = sorted(set(index["weight_map"].values()))
    else:
        raise UserError(
            f"model folder '{folder}' has neither {SINGLE} nor {INDEX}: only safetensors are read;"
            " convert other formats with transformers' save_pretrained"
        )
    model_type = (hub.read_json(folder / "config.json") or {}).get("model_type")
    found = {}
    for file in names:
        with _open(folder / file) as tensors:
            for key in tensors.keys():  # noqa: SIM118 (not a dict)
                if (name := text_name(model_type, key)) is not None:
                    tensor = tensors.get_slice(key)
                    found[name] = _Stored(
                        folder / file, key, tensor.get_dtype(), tuple(tensor.get_shape())
                    )
    return found


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    try:
        tensors = safe_open(file, framework="numpy")
    except FileNotFoundError as error:
        raise UserError(
            f"'{file}', which {INDEX} lists, is missing: copy or download it again"
        ) from error
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"'{file}' is not a whole safetensors file ({error}): it was cut off or damaged on its"
            " way; copy or download it again"
        ) from error
    with tensors:
        yield tensors


_Places = list[tuple[tuple[int, ...], str]]
"""Slices of the leaves, and the stored names of the tensors that fill them."""


def _match(
    folder: Path, stored: Mapping[str, _Stored], config: ModelConfig
) -> list[tuple[Weight, _Places]]:
    """Every row of the weight table with its stored tensors; none is missing or left over."""
    module = family(config.model_type)
    matched = [
        (
            weight,
            [
                (part, _stored_name(folder, stored, weight.names(part) + _tied(weight, config)))
                for part in weight.slices(config.num_layers)
            ],
        )
        for weight in weight_table(config, stored)
    ]
    shapes = _leaf_shapes(config)
    for weight, places in matched:
        expected = _tensor_shape(weight, shapes)
        for _, name in places:
            _check_tensor(name, stored[name], expected)
    used = {name for _, places in matched for _, name in places}
    if config.tie_word_embeddings:
        used |= {module.HEAD.name, *module.HEAD.aliases}
    unused = sorted(
        name for name in stored if name not in used and not re.search(module.BUFFERS, name)
    )
    if unused:
        more = f" and {len(unused) - 5} more" if len(unused) > 5 else ""
        raise UserError(
            f"'{folder}' has weights for which a {config.model_type} model with its config.json has"
            f" no place: {', '.join(unused[:5])}{more}; either config.json is of another model, or"
            " parts of it are not implemented"
        )
    return matched


def _tied(weight: Weight, config: ModelConfig) -> tuple[str, ...]:
    """Names under which a tied model's embedding may be stored instead: those of the head that it
    is.
    """
    if not (config.tie_word_embeddings and weight.leaves == ("embed_tokens/embedding",)):
        return ()
    return family(config.model_type).HEAD.names(())


def _stored_name(folder: Path, stored: Mapping[str, _Stored], names: tuple[str, ...]) -> str:
    for name in names:
        if name in stored:
            return name
    is_head = names[0] in ("lm_head.weight", "embed_out.weight")
    raise UserError(
        f"'{folder}' has no weight '{names[0]}', which the model that its config.json describes"
        " needs: a shard is missing, or config.json is of another model"
        + (
            ', or lacks "tie_word_embeddings": true, if the head is the input embedding'
            if is_head
            else ""
        )
    )


def _check_tensor(name: str, tensor: _Stored, expected: tuple[int, ...]) -> None:
    if tensor.dtype not in _FLOATS:
        raise UserError(
            f"weight '{name}' is stored as {tensor.dtype}, which is not one of"
            f" {', '.join(_FLOATS)}: quantized weights cannot be adapted; use the model's original"
            " weights"
        )
    if tensor.shape != expected:
        raise UserError(
            f"weight '{name}' has shape {list(tensor.shape)} where config.json asks for"
            f" {list(expected)}: config.json and safetensors are of different models"
        )


def _leaf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in paths.flatten(abstract_params(config)).items()}


def _tensor_shape(weight: Weight, leaf_shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The checkpoint shape of a tensor whose leaves have these shapes: `join` tells, from arrays
    without content.
    """
    shapes = [leaf_shapes[leaf][weight.stacked :] for leaf in weight.leaves]
    return weight.join([np.broadcast_to(np.int8(0), shape) for shape in shapes]).shape


def _check_copies_of_embedding(
    stored: Mapping[str, _Stored], matched: Sequence[tuple[Weight, _Places]], config: ModelConfig
) -> None:
    """A tied model's checkpoint may store its embedding a second time, as the head, but nothing
    else there.
    """
    if not config.tie_word_embeddings:
        return
    head = family(config.model_type).HEAD
    embedding = next(
        places[0][1] for weight, places in matched if weight.leaves == ("embed_tokens/embedding",)
    )
    for name in {head.name, *head.aliases} & set(stored) - {embedding}:
        with _open(stored[name].file) as one, _open(stored[embedding].file) as other:
            pairs = zip(
                *(
                    _blocks(file.get_slice(stored[key].key), head)
                    for file, key in ((one, name), (other, embedding))
                )
            )
            if all(_same(ours[0], theirs[0]) for (_, ours), (_, theirs) in pairs):
                continue
        raise UserError(
            f"config.json says tie_word_embeddings, but '{name}' differs from the input embedding:"
            f" set tie_word_embeddings to false to use both, or remove '{name}'"
        )


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays hold the same numbers, NaN being the same as NaN."""
    return one.shape == other.shape and bool(
        np.all((one == other) | ((one != one) & (other != other)))
    )


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

    It holds safetensors (split, with an index, when larger than `max_shard_bytes`), the source's
    config.json and generation_config.json with the new vocabulary size and the bos, eos and pad ids
    of `tokenizer`, and the tokenizer.

    Args: params: without adapters; on any devices, with or without the padding rows of
      `sharding.place`. Or what reads them part by part. raw_config: the source's config.json.
      dtypes: the type of all written weights, or `source`: each as `source_folder` stores it.
      source_folder: the source model, for its names of weights, its types and its generation
      config. writes: False in all but one of several processes. All call this: each brings its
      parts of the arrays.

    Raises:
      UserError: the folder is not empty, or the tokenizer has more tokens than the model has rows.
      ValueError: the parameters are not those of `config`, or `source` has no folder.
    """
    if dtypes == "source" and source_folder is None:
        raise ValueError("dtypes 'source' needs a source_folder")
    folder = Path(folder)
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
    if writes and any(folder.iterdir()):
        raise UserError(
            f"'{folder}' is not empty: a model is written into a new folder only; move it away"
        )
    if vocabulary_size(tokenizer) > config.vocab_size:
        raise UserError(
            f"the tokenizer has {vocabulary_size(tokenizer):,} tokens but the model has only"
            f" {config.vocab_size:,} rows: some tokens would have none; give the model at least as"
            " many rows"
        )
    new: dict[str, Any] = {"vocab_size": config.vocab_size}
    if dtypes != "source":  # one key, the one that is there: readers prefer the one or the other
        name = "torch_dtype" if "torch_dtype" in raw_config else "dtype"
        raw_config = {
            key: value for key, value in raw_config.items() if key not in ("dtype", "torch_dtype")
        }
        new[name] = dtypes
    if writes:
        hub.save_config_and_tokenizer(folder, {**raw_config, **new}, tokenizer, source_folder)
    stored = stored_dtypes(source_folder) if source_folder else {}
    write_weights(folder, params, config, dtypes, stored, max_shard_bytes, writes)


def write_weights(
    folder: Path,
    params: Params | Reader,
    config: ModelConfig,
    dtypes: str,
    stored: Mapping[str, np.dtype],
    max_shard_bytes: int,
    writes: bool = True,
) -> None:
    """The weights alone, and their index where they are several files. Args: as for
    `save_checkpoint`; `stored` are its source's.
    """
    shapes = _leaf_shapes(config)
    read = params if callable(params) else _reader(params, shapes)
    tensors = []
    for weight in weight_table(config, stored):
        shape = _tensor_shape(weight, shapes)
        for part in weight.slices(config.num_layers):
            usual, *others = weight.names(part) + _tied(weight, config)
            name = next((n for n in (usual, *others) if n in stored), usual)
            # A bias that the source does not have (`qwen.as_llama`) is stored as its weight is.
            alike = name if name in stored else re.sub(r"\.bias$", ".weight", name)
            dtype = stored[alike] if dtypes == "source" else np.dtype(dtypes)
            tensors.append(_Tensor(name, weight, part, dtype, shape))
    shards = _shards(tensors, max_shard_bytes)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else SHARD.format(number=number, count=len(shards))
        _write_file(folder / file if writes else None, shard, read, config.vocab_size)
        weight_map |= {tensor.name: file for tensor in shard}
    if len(shards) > 1 and writes:
        total = sum(tensor.size for tensor in tensors)
        hub.write_json(
            folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map}
        )


def _reader(params: Params, shapes: Mapping[str, tuple[int, ...]]) -> Reader:
    """Reads parameters that are in memory.

    Raises:
      ValueError: they do not have these shapes, with or without padding rows.
    """
    leaves = paths.flatten(params)
    if {path: leaf.shape for path, leaf in leaves.items()} not in (shapes, _padded(shapes, leaves)):
        raise ValueError(
            f"parameters do not fit the model: they are {jax.tree.map(jnp.shape, leaves)}, expected"
            f" {shapes}"
        )
    return lambda path, *index: sharding.to_host(leaves[path], *index)


def _padded(
    shapes: Mapping[str, tuple[int, ...]], leaves: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """The shapes with the rows of padding that the meshes of these leaves ask for."""

    def mesh(path: str) -> Mesh | None:
        return getattr(getattr(leaves.get(path), "sharding", None), "mesh", None)

    return {path: sharding.padded_shape(path, shape, mesh(path)) for path, shape in shapes.items()}


@dataclass(frozen=True)
class _Tensor:
    """A tensor to be written."""

    name: str
    weight: Weight
    part: tuple[int, ...]
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def blocks(self, read: Reader, vocabulary: int) -> Iterator[np.ndarray]:
        """The tensor, a vocabulary's matrix by rows, so that little of it is in host memory at
        once.
        """
        path = self.weight.leaves[0]
        if not sharding.is_vocabulary(path):
            parts = [read(path, *self.part) for path in self.weight.leaves]
            yield self.weight.join(parts).astype(self.dtype)
            return
        step = max(1, vocabulary * _BLOCK_BYTES // self.size)
        for first in range(0, vocabulary, step):
            yield read(path, slice(first, min(first + step, vocabulary))).astype(self.dtype)


def _write_file(
    path: Path | None, tensors: Sequence[_Tensor], read: Reader, vocabulary: int
) -> None:
    """A safetensors file (https://huggingface.co/docs/safetensors), block by block; the library's
    own writer wants all of it in memory.

    Args:
      path: None: another process writes; this one only brings its parts of the arrays.
      read: reads the parameters.
    """
    # In the order of the library's own.
    tensors = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        spelled = next(name for name, dtype in _FLOATS.items() if dtype == tensor.dtype)
        header[tensor.name] = {
            "dtype": spelled,
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


def _shards(tensors: Sequence[_Tensor], max_bytes: int) -> list[list[_Tensor]]:
    """`tensors` in order, in as many shards as their size asks for; one larger than a shard has a
    file to itself.
    """
    shards, room = [], 0
    for tensor in tensors:
        if not shards or tensor.size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(tensor)
        room -= tensor.size
    return shards
