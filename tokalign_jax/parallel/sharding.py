"""Sharding: one mesh with the axes (data, fsdp, tensor), and rules for parameters by their path.

`data` replicates parameters and splits the batch, `fsdp` splits both, `tensor` splits parameters
alone. Rows of embedding and head are split over `fsdp` and `tensor` together and never gathered:
the tokens are gathered instead, where an embedding is looked up (`look_up`) or states are
multiplied by the head (`training/losses.py`). All other matrices are split along two of their
dimensions; XLA gathers them one layer at a time, where they are used.

Model code reads the mesh from the context (`within`); without one it is single-device code.
"""

import dataclasses
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from tokalign_jax.config import MeshConfig
from tokalign_jax.errors import UserError
from tokalign_jax.utils import paths

DATA, FSDP, TENSOR = AXES = "data", "fsdp", "tensor"
Sizes = tuple[int, int, int]
"""Sizes of the axes (data, fsdp, tensor)."""
BATCH = (DATA, FSDP)
"""Axes over which sequences are split."""
VOCABULARY = (FSDP, TENSOR)
"""Axes over which rows of embedding and head are split."""
REPLICATED = P()

VOCABULARY_LEAVES = r"(^|/)(embed_tokens/embedding|lm_head/kernel)$"
ROWS = 256
"""In memory, embedding and head are padded with rows of zeros to a multiple of this (the tile size
of matrix units) and of the number of devices that they are split over (`padded_shape`)."""

_INPUTS, _OUTPUTS = r"(q|k|v|gate|up)_proj", r"(o|down)_proj"
_KERNEL = r"kernel(/codes|/scales)?$"
"""A kernel, or the arrays of a quantized one (`models.quantized`)."""
RULES: tuple[tuple[str, P], ...] = (
    (VOCABULARY_LEAVES, P(VOCABULARY, None)),
    (rf"experts/{_INPUTS}/{_KERNEL}", P(None, None, FSDP, TENSOR)),
    (rf"experts/{_OUTPUTS}/{_KERNEL}", P(None, None, TENSOR, FSDP)),
    (rf"experts/{_INPUTS}/bias$", P(None, None, TENSOR)),
    (rf"experts/{_INPUTS}/lora_a$", P(None, None, FSDP, None)),
    (rf"experts/{_INPUTS}/lora_b$", P(None, None, None, TENSOR)),
    (rf"experts/{_OUTPUTS}/lora_a$", P(None, None, TENSOR, None)),
    (rf"experts/{_OUTPUTS}/lora_b$", P(None, None, None, FSDP)),
    (rf"{_INPUTS}/{_KERNEL}", P(None, FSDP, TENSOR)),
    (rf"{_OUTPUTS}/{_KERNEL}", P(None, TENSOR, FSDP)),
    (rf"{_INPUTS}/bias$", P(None, TENSOR)),
    (rf"{_INPUTS}/lora_a$", P(None, FSDP, None)),
    (rf"{_INPUTS}/lora_b$", P(None, None, TENSOR)),
    (rf"{_OUTPUTS}/lora_a$", P(None, TENSOR, None)),
    (rf"{_OUTPUTS}/lora_b$", P(None, None, FSDP)),
    ("", REPLICATED),
)
"""Partition specs by path; the first match applies. Arrays of the optimizer state have the specs of
their parameters, since their paths end alike."""


# --- The mesh -----------------------------------------------------------------------------------


def make_mesh(
    config: MeshConfig = MeshConfig(),  # noqa: B008 (frozen)
    state_bytes: float = 0,
    devices: Sequence[Any] | None = None,
    share: Callable[[Sizes], float] | None = None,
) -> Mesh:
    """Make a mesh of all devices of all processes, or of `devices`.

    Args:
      config, state_bytes, share: as for `axis_sizes`.

    Raises:
      UserError: the axes do not multiply to the number of devices, processes have unequal numbers
        of devices, or a tensor group does not fit into a process.
    """
    devices = jax.devices() if devices is None else devices
    local = [device for device in devices if device.process_index == jax.process_index()]
    shape = axis_sizes(config, len(devices), state_bytes, device_memory(local[0]), share)
    return Mesh(arrange(devices, shape), AXES, axis_types=(AxisType.Auto,) * 3)


def arrange(devices: Sequence[Any], shape: Sizes) -> np.ndarray:
    """Arrange devices in an array of this shape: the later an axis, the faster its connections.

    Hosts of GPUs and slices of TPUs (`slice_index`) are split along `data` first. Within a TPU
    slice, axes follow the physical torus, whose axes may be split among several axes of the mesh
    (`jax.make_mesh` allows that on v5e only, and refuses devices of several slices or hosts).

    Raises:
      UserError: see `make_mesh`.
    """
    counts = Counter(device.process_index for device in devices)
    if len(set(counts.values())) > 1:
        raise UserError(
            "the processes have unequal numbers of devices "
            f"({', '.join(map(str, counts.values()))}): give each process as many, for example "
            "by CUDA_VISIBLE_DEVICES"
        )
    tensor = shape[2]
    per_process = len(devices) // len(counts)
    if per_process % tensor:
        raise UserError(
            f"mesh.tensor={tensor} does not divide the {per_process} devices of a process. The "
            "devices of a tensor group read the same sequences, so they must belong to one "
            f"process: use a divisor of {per_process}, and mesh.fsdp to split parameters further"
        )
    ordered = sorted(devices, key=lambda device: (_slice(device), device.process_index, device.id))
    slices = [list(group) for _, group in itertools.groupby(ordered, _slice)]
    if all(map(_is_torus, slices)) and len(set(map(len, slices))) == 1:
        grid = _arrange_slices(slices, shape)
        if all(
            len({device.process_index for device in group}) == 1
            for group in grid.reshape(-1, tensor)
        ):
            return grid
    # Also for TPUs whose torus would put a tensor group on several hosts. In the order of processes
    # no group is, since `tensor` divides the devices of each.
    return np.array(ordered, dtype=object).reshape(shape)


def _arrange_slices(slices: Sequence[Sequence[Any]], shape: Sizes) -> np.ndarray:
    """Arrange TPU slices along `data`, and along `fsdp` if `data` is not a multiple of them.

    Within a slice, axes follow its torus.
    """
    along_data = math.gcd(shape[0], len(slices))
    along_fsdp = len(slices) // along_data
    inner = (shape[0] // along_data, shape[1] // along_fsdp, shape[2])
    grids = [
        mesh_utils.create_device_mesh(inner, one, allow_split_physical_axes=True) for one in slices
    ]
    return np.block(
        [[[grids[i * along_fsdp + j]] for j in range(along_fsdp)] for i in range(along_data)]
    )


def _slice(device: Any) -> int:
    """Return the index of the device's TPU slice; 0 for other devices."""
    return getattr(device, "slice_index", None) or 0


def _is_torus(devices: Sequence[Any]) -> bool:
    """Return whether these are TPU devices whose coordinates fill a cuboid."""
    if devices[0].platform != "tpu":
        return False
    places = np.array([(*device.coords, device.core_on_chip) for device in devices])
    return len(devices) == np.prod(np.ptp(places, axis=0) + 1)


def reader(mesh: Mesh) -> tuple[int, int]:
    """Return the part of each batch that this process reads, and the number of parts."""
    order = list(dict.fromkeys(device.process_index for device in mesh.devices.flat))
    return order.index(jax.process_index()), len(order)


def axis_sizes(
    config: MeshConfig,
    devices: int,
    state_bytes: float,
    memory: float,
    share: Callable[[Sizes], float] | None = None,
) -> Sizes:
    """Choose the sizes of (data, fsdp, tensor).

    Args:
      config: sizes of the axes; 0: chosen here.
      state_bytes: total bytes of parameters, gradients and optimizer state. `fsdp` is the smallest
        size with which a device's part leaves half of its memory to activations.
      memory: bytes of a device's memory; infinite if not known.
      share: returns the share of `state_bytes` that each device of a mesh holds; None: all of it is
        split.

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    tensor = config.tensor or 1
    rest, remainder = divmod(devices, (config.data or 1) * (config.fsdp or 1) * tensor)
    is_fixed = config.data and config.fsdp
    if remainder or not rest or (is_fixed and rest != 1):
        raise UserError(
            f"mesh.data={config.data}, mesh.fsdp={config.fsdp}, mesh.tensor={config.tensor} do "
            f"not fit {devices} devices: their product must be {devices} (0: chosen)"
        )
    if config.fsdp:
        return (config.data or rest), config.fsdp, tensor
    if config.data:
        return config.data, rest, tensor
    choices = [(rest // fsdp, fsdp, tensor) for fsdp in range(1, rest + 1) if rest % fsdp == 0]
    held = {
        sizes: state_bytes * (share(sizes) if share else 1 / math.prod(sizes[1:]))
        for sizes in choices
    }
    fits = [sizes for sizes in choices if held[sizes] <= memory / 2]
    return fits[0] if fits else min(choices, key=held.__getitem__)


def device_memory(device: Any) -> float:
    """Return the bytes of a device's memory that JAX may use; infinite if not known (a CPU)."""
    return (device.memory_stats() or {}).get("bytes_limit", math.inf)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error is a device's out-of-memory error."""
    return "RESOURCE_EXHAUSTED" in str(error)


def usable(config: MeshConfig, devices: int, batch_sizes: Sequence[int]) -> int:
    """Return how many of the devices a run can use: a number that divides every batch size.

    All of them if the config fixes an axis of the mesh.
    """
    if any(dataclasses.astuple(config)):
        return devices
    return max(n for n in range(1, devices + 1) if all(size % n == 0 for size in batch_sizes))


def within(mesh: Mesh) -> AbstractContextManager[Any]:
    """Return a context in which model code that is being traced sees `mesh`."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def current() -> AbstractMesh | None:
    """Return the mesh in context; None if there is none over whose automatic axes arrays are split.

    Axes that are manual in the context (`sum_over_replicas`) do not count: code under them is that
    of one of their devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return None if math.prod(mesh.shape[axis] for axis in _automatic(mesh)) == 1 else mesh


def _automatic(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """Return the axes of a mesh over which the partitioner splits arrays."""
    manual = getattr(mesh, "manual_axes", ())
    return tuple(axis for axis in mesh.axis_names if axis not in manual)


def sequences_at_once(mesh: Mesh | AbstractMesh) -> int:
    """Return the number of data-parallel devices, which must divide a batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH if axis in _automatic(mesh))


# --- Placing ------------------------------------------------------------------------------------


def sharding_of(path: str, shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """Return the sharding of a parameter by the first rule that matches its path."""
    # Scales that cannot be split as their codes are better whole than split in another way.
    return fitting(paths.label(RULES, path), shape, mesh, moves=not path.endswith("/scales"))


def fitting(spec: P, shape: Sequence[int], mesh: Any, moves: bool = True) -> NamedSharding:
    """Return the sharding of an array of this shape by `spec`.

    An axis that does not divide its dimension splits another dimension of those that `spec` splits,
    or none.

    Args:
      moves: False: it splits none.
    """
    axes = [
        list((names,) if isinstance(names, str) else names or ())
        for names in (*spec, *[None] * len(shape))
    ]
    axes = axes[: len(shape)]

    def divides(dimension: int, names: Sequence[str]) -> bool:
        return shape[dimension] % math.prod(mesh.shape[name] for name in names) == 0

    split = [dimension for dimension, names in enumerate(axes) if names]
    for dimension in split:
        if not divides(dimension, axes[dimension]):
            moved, axes[dimension] = axes[dimension], []
            others = (n for n in split if n != dimension and divides(n, [*axes[n], *moved]))
            if moves and (other := next(others, None)) is not None:
                axes[other] += moved
    entries = (tuple(names) if len(names) > 1 else names[0] if names else None for names in axes)
    return NamedSharding(mesh, P(*entries))


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Return the shardings of a tree of arrays or shapes: parameters, or a train state."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: sharding_of(
            jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape, mesh
        ),
        tree,
    )


def place(params: paths.Tree, mesh: Mesh) -> paths.Tree:
    """Place parameters on the mesh, with embedding and head padded (`ROWS`).

    An array that is placed already is not copied.
    """

    def placed(path: str, leaf: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda inner, x: _placed("/".join([path, *(key.name for key in inner)]), x, mesh), leaf
        )

    return paths.unflatten({path: placed(path, x) for path, x in paths.flatten(params).items()})


def _placed(path: str, leaf: Any, mesh: Mesh) -> jax.Array:
    shape = padded_shape(path, leaf.shape, mesh)
    sharding = sharding_of(path, shape, mesh)
    if (
        isinstance(leaf, jax.Array)
        and leaf.shape == shape
        and leaf.is_fully_addressable == sharding.is_fully_addressable
    ):
        return jax.device_put(leaf, sharding)
    host = np.zeros(shape, leaf.dtype)
    host[: len(leaf)] = np.asarray(leaf)
    return put(host, sharding)


def put(host: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Place a host array that all processes have; each copies the parts of its own devices."""
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def is_vocabulary(path: str) -> bool:
    """Return whether a parameter is the input embedding or the output head."""
    return bool(re.search(VOCABULARY_LEAVES, path))


def padded_shape(path: str, shape: Sequence[int], mesh: Mesh | None = None) -> tuple[int, ...]:
    """Return the shape of a parameter in memory: embedding and head have padded rows.

    Args:
      mesh: None: a single device.
    """
    if not is_vocabulary(path):
        return tuple(shape)
    rows, width = shape
    multiple = math.lcm(ROWS, math.prod(mesh.shape[axis] for axis in VOCABULARY) if mesh else 1)
    return -(-rows // multiple) * multiple, width


def to_host(array: Any, *index: int | slice) -> np.ndarray:
    """Return `array[index]` in host memory; no device ever holds all of it.

    A collective: all processes must call it together.
    """
    if not isinstance(array, jax.Array) or (
        array.is_fully_replicated and not array.is_fully_addressable
    ):
        return np.asarray(array)[index]
    index = index + (slice(None),) * (array.ndim - len(index))
    box = [
        range(n)[i if isinstance(i, slice) else slice(i, i + 1)] for i, n in zip(index, array.shape)
    ]
    host = np.zeros([len(side) for side in box], array.dtype)
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            shard_box = [range(n)[side] for side, n in zip(shard.index, array.shape)]
            in_shard, in_host = overlap(shard_box, box)
            if all(side.start < side.stop for side in in_shard):
                host[in_host] = _part_to_host(shard.data, in_shard)
    if host.size and not array.is_fully_addressable:
        host = _combine_processes(host)
    return host[tuple(0 if isinstance(i, int) else slice(None) for i in index)]


def overlap(
    one: Sequence[range], other: Sequence[range]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Return the intersection of two boxes as an index into each; empty slices if there is none."""
    both = [
        range(start := max(a.start, b.start), max(start, min(a.stop, b.stop)))
        for a, b in zip(one, other)
    ]

    def relative_to(box: Sequence[range]) -> tuple[slice, ...]:
        return tuple(slice(b.start - s.start, b.stop - s.start) for b, s in zip(both, box))

    return relative_to(one), relative_to(other)


def _part_to_host(data: jax.Array, index: tuple[slice, ...]) -> np.ndarray:
    """Copy a part of a single-device array to the host.

    On a CPU, slicing a view of it saves the compilation of a slice.
    """
    if next(iter(data.devices())).platform == "cpu":
        return np.asarray(data)[index]
    return np.asarray(data[index])


def _combine_processes(host: np.ndarray) -> np.ndarray:
    """Combine the processes' parts of an array, each with zeros elsewhere."""
    from jax.experimental import multihost_utils

    bits = np.ascontiguousarray(host).view(np.uint8).reshape(-1)
    step = _EXCHANGED_BYTES // jax.process_count()
    parts = [
        multihost_utils.process_allgather(bits[i : i + step]) for i in range(0, len(bits), step)
    ]
    joined = np.concatenate([np.bitwise_or.reduce(part, axis=0) for part in parts])
    return joined.view(host.dtype).reshape(host.shape)


_EXCHANGED_BYTES = 256 << 20
"""Bytes on a device at once while processes exchange parts of an array."""


def global_batch(local: np.ndarray, mesh: Mesh) -> jax.Array:
    """Return the global batch of a step, from this process's part.

    Args:
      local: [accumulation, sequences of this process, ...], as many on every process.
    """
    accumulation, sequences, *rest = local.shape
    shape = (accumulation, sequences * reader(mesh)[1], *rest)
    return jax.make_array_from_process_local_data(NamedSharding(mesh, P(None, BATCH)), local, shape)


# --- Inside the model ---------------------------------------------------------------------------


def constrain(x: Array, *spec: Any) -> Array:
    """Constrain the sharding of `x` over the mesh in context; without one, return `x`."""
    mesh = current()
    return x if mesh is None else jax.lax.with_sharding_constraint(x, _only_automatic(spec, mesh))


def _only_automatic(spec: Any, mesh: AbstractMesh) -> P:
    """Return a partition spec without the axes that are manual in the context."""
    automatic = _automatic(mesh)

    def kept(names: str | tuple[str, ...] | None) -> tuple[str, ...] | None:
        names = (names,) if isinstance(names, str) else names or ()
        return tuple(name for name in names if name in automatic) or None

    return P(*map(kept, spec))


def sum_over_replicas(local: Callable[..., Any], inputs: Any, mesh: Mesh) -> Callable[..., Any]:
    """Run `local` on each data-parallel replica of the parameters and sum the results.

    Nothing is communicated along `data` within `local`, so that gradients accumulated there are
    reduced once, at its end. The other axes stay automatic.

    Args:
      inputs: partition specs of the arguments, over `data` alone.
    """
    if mesh.shape[DATA] == 1:
        return local

    def summed(*arguments: Any) -> Any:
        return jax.lax.psum(local(*arguments), DATA)

    return jax.shard_map(summed, in_specs=inputs, out_specs=P(), axis_names={DATA}, check_vma=False)


def by_sequence(x: Array) -> Array:
    """Constrain activations [sequences, ...] to be split by sequence."""
    mesh = current()
    return x if mesh is None or len(x) % sequences_at_once(mesh) else constrain(x, BATCH)


def look_up(
    table: Float[Array, "V D"], tokens: Int[Array, "B T"], dtype: DTypeLike
) -> Float[Array, "B T D"]:
    """Look up rows of the input embedding, in `dtype`.

    The cast follows the look-up, so that the gradient of the rows is summed in the table's dtype.
    If rows are split over devices, each looks up the rows it has for the tokens of all of them; the
    sum over devices is exact, since a single one has the row.
    """

    def rows(table: Array, tokens: Array) -> Array:
        return table[tokens].astype(dtype)

    mesh = current()
    if mesh is None or len(tokens) % sequences_at_once(mesh):
        return rows(table, tokens)

    def local(table: Array, tokens: Array) -> Array:
        return psum_scatter(local_rows(table, all_gather(tokens))[0].astype(dtype))

    inputs = P(VOCABULARY), P(BATCH)
    return shard_map(local, inputs, P(BATCH), check_vma=True)(table, tokens)


# --- Collectives over split rows of the vocabulary; without a mesh they return their input ------


def shard_map(
    local: Callable[..., Any], inputs: Any, outputs: Any, check_vma: bool = False
) -> Callable[..., Any]:
    """Map `local` over the mesh in context by `jax.shard_map`; without one, return it.

    The map is over the automatic axes; specs may name others, which are left out.

    Args:
      inputs, outputs: partition specs.
      check_vma: check replication. Not if `local` itself sums over devices, and nothing
        differentiates it.
    """
    mesh = current()
    if mesh is None:
        return local
    in_specs, out_specs = jax.tree.map(
        lambda spec: _only_automatic(spec, mesh),
        (inputs, outputs),
        is_leaf=lambda node: isinstance(node, P),
    )
    return jax.shard_map(
        local,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(_automatic(mesh)),
        check_vma=check_vma,
    )


def rows_are_split() -> bool:
    """Return whether this code runs in a `shard_map` over devices with different rows."""
    return FSDP in getattr(jax.sharding.get_abstract_mesh(), "manual_axes", ())


def psum(x: Array) -> Array:
    """Sum over the devices that have different rows."""
    return jax.lax.psum(x, VOCABULARY) if rows_are_split() else x


def vocabulary_part() -> Array | int:
    """Return the index of the part of the vocabulary's rows that this device has."""
    return jax.lax.axis_index(VOCABULARY) if rows_are_split() else 0


def local_rows(
    table: Float[Array, "r D"], tokens: Int[Array, "..."]
) -> tuple[Float[Array, "... D"], Int[Array, "..."]]:
    """Look up the rows of tokens in this device's part of a table.

    Returns:
      The rows, zeros for tokens of other devices and for negative ids; and their indices in the
      table, `r` for those tokens.
    """
    indices = tokens - vocabulary_part() * len(table)
    is_local = (tokens >= 0) & (indices >= 0) & (indices < len(table))
    indices = jnp.where(is_local, indices, len(table))
    return jnp.take(table, indices, axis=0, mode="fill", fill_value=0), indices


def all_gather(x: Array) -> Array:
    """Gather the tokens of the devices along `fsdp`, which have different rows."""
    return jax.lax.all_gather(x, FSDP, axis=0, tiled=True) if rows_are_split() else x


def local_tokens(x: Array) -> Array:
    """Return this device's part of an array of gathered tokens: the inverse of `all_gather`."""
    if not rows_are_split():
        return x
    size = len(x) // jax.lax.axis_size(FSDP)
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(FSDP) * size, size)


def psum_scatter(x: Array) -> Array:
    """Sum an array of gathered tokens over the devices; return this device's part of the sum."""
    if not rows_are_split():
        return x
    return jax.lax.psum_scatter(jax.lax.psum(x, TENSOR), FSDP, scatter_dimension=0, tiled=True)
