"""Where arrays live: one mesh of three axes over all devices, and path rules that say how each
parameter is split over it.

`data` copies parameters and splits the batch, `fsdp` splits both, `tensor` splits parameters alone.
Rows of the vocabulary's matrices are split over `fsdp` and `tensor` together and never gathered:
who looks up an embedding or multiplies by the head brings its tokens to the rows (`look_up` here,
`training/losses.py`). All other matrices are split along two of their dimensions and put together
by XLA, one layer at a time, where they are used.

Model code asks for the mesh in context (`within`) and is ordinary code of one device where there is
none.
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
"""Of the axes, in this order."""
BATCH = (DATA, FSDP)
"""Axes over which sequences are split."""
VOCABULARY = (FSDP, TENSOR)
"""Axes over which rows of embedding and head are split."""
REPLICATED = P()

VOCABULARY_LEAVES = r"(^|/)(embed_tokens/embedding|lm_head/kernel)$"
ROWS = 256
"""In memory, a vocabulary's matrices have a multiple of so many rows, which fits the tiles of
matrix units, or of this and the devices that they are split over (`padded_shape`). Rows past the
vocabulary are zeros without effect."""

_INPUTS, _OUTPUTS = r"(q|k|v|gate|up)_proj", r"(o|down)_proj"
RULES: tuple[tuple[str, P], ...] = (
    (VOCABULARY_LEAVES, P(VOCABULARY, None)),
    (rf"experts/{_INPUTS}/kernel$", P(None, None, FSDP, TENSOR)),
    (rf"experts/{_OUTPUTS}/kernel$", P(None, None, TENSOR, FSDP)),
    (rf"experts/{_INPUTS}/lora_a$", P(None, None, FSDP, None)),
    (rf"experts/{_INPUTS}/lora_b$", P(None, None, None, TENSOR)),
    (rf"experts/{_OUTPUTS}/lora_a$", P(None, None, TENSOR, None)),
    (rf"experts/{_OUTPUTS}/lora_b$", P(None, None, None, FSDP)),
    (rf"{_INPUTS}/kernel$", P(None, FSDP, TENSOR)),
    (rf"{_OUTPUTS}/kernel$", P(None, TENSOR, FSDP)),
    (rf"{_INPUTS}/bias$", P(None, TENSOR)),
    (rf"{_INPUTS}/lora_a$", P(None, FSDP, None)),
    (rf"{_INPUTS}/lora_b$", P(None, None, TENSOR)),
    (rf"{_OUTPUTS}/lora_a$", P(None, TENSOR, None)),
    (rf"{_OUTPUTS}/lora_b$", P(None, None, FSDP)),
    ("", REPLICATED),
)
"""How a leaf is split, by its path; the same for the optimizer's arrays, whose paths end as their
parameters' do."""


# --- The mesh -----------------------------------------------------------------------------------


def make_mesh(
    config: MeshConfig = MeshConfig(),  # noqa: B008 (frozen)
    state_bytes: float = 0,
    devices: Sequence[Any] | None = None,
    share: Callable[[Sizes], float] | None = None,
) -> Mesh:
    """Arranges all devices of all processes (or `devices`) along (data, fsdp, tensor).

    Args: as for `axis_sizes`.

    Raises:
      UserError: the axes do not multiply to the number of devices, processes have unequal numbers
        of devices, or a tensor group does not fit into a process.
    """
    devices = jax.devices() if devices is None else devices
    own = [device for device in devices if device.process_index == jax.process_index()]
    shape = axis_sizes(config, len(devices), state_bytes, device_memory(own[0]), share)
    return Mesh(arranged(devices, shape), AXES, axis_types=(AxisType.Auto,) * 3)


def arranged(devices: Sequence[Any], shape: Sizes) -> np.ndarray:
    """The devices as an array of this shape, (data, fsdp, tensor); neighbours along the last axes
    have the fastest connections.

    Hosts of GPUs and slices of TPUs (`slice_index`) are split along `data` first. Within a TPU
    slice, axes follow the physical torus, whose axes may be split among several of the mesh
    (`jax.make_mesh` allows that on v5e only, and refuses devices of several slices or hosts).

    Raises:
      UserError: see `make_mesh`.
    """
    counts = Counter(device.process_index for device in devices)
    if len(set(counts.values())) > 1:
        raise UserError(
            f"the processes have unequal numbers of devices "
            f"({', '.join(map(str, counts.values()))}): give each as "
            f"many, for example by CUDA_VISIBLE_DEVICES"
        )
    tensor = shape[2]
    per_process = len(devices) // len(counts)
    if per_process % tensor:
        raise UserError(
            f"mesh.tensor={tensor} does not divide the {per_process} devices of a process. The "
            f"devices of a tensor "
            f"group read the same sequences, so they must belong to one process: use a divisor of "
            f"{per_process}, and "
            f"mesh.fsdp to split parameters further"
        )
    in_order = sorted(devices, key=lambda device: (_slice(device), device.process_index, device.id))
    slices = [list(group) for _, group in itertools.groupby(in_order, _slice)]
    if all(map(_is_torus, slices)) and len(set(map(len, slices))) == 1:
        grid = _on_tori(slices, shape)
        if all(
            len({device.process_index for device in group}) == 1
            for group in grid.reshape(-1, tensor)
        ):
            return grid
    # Also for TPUs where the torus would put a tensor group on several hosts: in the order of
    # processes no group can be, since `tensor` divides the devices of each.
    return np.array(in_order, dtype=object).reshape(shape)


def _on_tori(slices: Sequence[Sequence[Any]], shape: Sizes) -> np.ndarray:
    """TPU slices along `data`, or along `fsdp` too where `data` is not a multiple of them; within
    each, axes follow its torus.
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
    """The number of the device's TPU slice, or of its host for other kinds."""
    return getattr(device, "slice_index", None) or 0


def _is_torus(devices: Sequence[Any]) -> bool:
    """Whether these are TPU devices that fill a cuboid of coordinates."""
    if devices[0].platform != "tpu":
        return False
    places = np.array([(*device.coords, device.core_on_chip) for device in devices])
    return len(devices) == np.prod(np.ptp(places, axis=0) + 1)


def reader(mesh: Mesh) -> tuple[int, int]:
    """This process's place among the processes of the mesh in the order of the batch they read, and
    how many they are.
    """
    order = list(dict.fromkeys(device.process_index for device in mesh.devices.flat))
    return order.index(jax.process_index()), len(order)


def axis_sizes(
    config: MeshConfig,
    devices: int,
    state_bytes: float,
    memory: float,
    share: Callable[[Sizes], float] | None = None,
) -> Sizes:
    """The sizes of (data, fsdp, tensor).

    Args:
      config: sizes of the axes; 0: chosen here.
      state_bytes: bytes of parameters, gradients and optimizer state in all; `fsdp` is made as
        large as it takes for a device's part of them to leave half of its memory to activations.
      memory: bytes of a device; infinite where that is not known.
      share: the share of `state_bytes` that each device of a mesh holds; None: all of it is split.

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    tensor = config.tensor or 1
    given = {name: size for name, size in dataclasses.asdict(config).items() if size}
    rest, remainder = divmod(devices, math.prod({**given, "tensor": tensor}.values()))
    both = config.data and config.fsdp
    if remainder or not rest or (both and rest != 1):
        raise UserError(
            f"mesh.data={config.data}, mesh.fsdp={config.fsdp}, mesh.tensor={config.tensor} do "
            f"not fit {devices} devices: "
            f"their product must be that (0 stands for what is left over)"
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
    """Bytes that JAX may take of a device; infinite where it does not say (a CPU)."""
    return (device.memory_stats() or {}).get("bytes_limit", math.inf)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a program, or an array, found no room on its device."""
    return "RESOURCE_EXHAUSTED" in str(error)


def usable(config: MeshConfig, devices: int, batch_sizes: Sequence[int]) -> int:
    """The devices that a run takes of those that there are: where the mesh is left to us, as many
    as divide the sequences of every step.
    """
    if any(dataclasses.astuple(config)):
        return devices
    return max(n for n in range(1, devices + 1) if all(size % n == 0 for size in batch_sizes))


def within(mesh: Mesh) -> AbstractContextManager[Any]:
    """Makes `mesh` the one that model code sees, inside a function that is being traced."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def current() -> AbstractMesh | None:
    """The mesh in context; None where there is none, or only one of one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def sequences_at_once(mesh: Mesh | AbstractMesh) -> int:
    """Devices that read sequences of their own: a batch must be a multiple of this."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


# --- Placing ------------------------------------------------------------------------------------


def sharding_of(path: str, shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """Return the first matching rule's sharding; a dimension not divisible by axes stays whole."""
    return fitting(paths.label(RULES, path), shape, mesh)


def fitting(spec: P, shape: Sequence[int], mesh: Any) -> NamedSharding:
    """`spec` for an array of this shape. An axis that does not divide its dimension splits another
    one of those that `spec` splits, or else none.
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
            other = next(
                (n for n in split if n != dimension and divides(n, [*axes[n], *moved])), None
            )
            if other is not None:
                axes[other] += moved
    return NamedSharding(
        mesh,
        P(*(tuple(names) if len(names) > 1 else names[0] if names else None for names in axes)),
    )


def shardings(tree: Any, mesh: Mesh) -> Any:
    """The tree of shardings of a tree of arrays (or their shapes): parameters, or a train state."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: sharding_of(
            jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape, mesh
        ),
        tree,
    )


def place(params: paths.Tree, mesh: Mesh) -> paths.Tree:
    """Parameters on the mesh, vocabulary matrices padded (`ROWS`); an array that is there already
    is not copied.
    """
    return paths.unflatten(
        {path: _placed(path, leaf, mesh) for path, leaf in paths.flatten(params).items()}
    )


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
    """A host array, the same on all processes, as a global one; each process brings the parts of
    its own devices.
    """
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def is_vocabulary(path: str) -> bool:
    """Whether a parameter is one of the vocabulary's matrices, the input embedding or the head."""
    return bool(re.search(VOCABULARY_LEAVES, path))


def padded_shape(path: str, shape: Sequence[int], mesh: Mesh | None = None) -> tuple[int, ...]:
    """The shape in memory on a mesh (None: of one device): as it is, but for the rows of a
    vocabulary's matrix.
    """
    if not is_vocabulary(path):
        return tuple(shape)
    rows, width = shape
    multiple = math.lcm(ROWS, math.prod(mesh.shape[axis] for axis in VOCABULARY) if mesh else 1)
    return -(-rows // multiple) * multiple, width


def to_host(array: Any, *index: int | slice) -> np.ndarray:
    """`array[index]` in host memory of this process, put together from the parts that devices have:
    none ever holds all of it.

    Of several processes all call this together.
    """
    if not isinstance(array, jax.Array) or (
        array.is_fully_replicated and not array.is_fully_addressable
    ):
        return np.asarray(array)[index]
    index = index + (slice(None),) * (array.ndim - len(index))
    wanted = [
        range(n)[i if isinstance(i, slice) else slice(i, i + 1)] for i, n in zip(index, array.shape)
    ]
    found = np.zeros([len(along) for along in wanted], array.dtype)
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            here, there = overlap(
                [range(n)[along] for along, n in zip(shard.index, array.shape)], wanted
            )
            if all(along.start < along.stop for along in here):
                found[there] = _part_to_host(shard.data, here)
    if found.size and not array.is_fully_addressable:
        found = _from_all_processes(found)
    return found[tuple(0 if isinstance(i, int) else slice(None) for i in index)]


def overlap(
    one: Sequence[range], other: Sequence[range]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """What two boxes of an array share, as an index into the first and one into the second; empty
    slices where they share nothing.
    """
    both = [
        range(start := max(a.start, b.start), max(start, min(a.stop, b.stop)))
        for a, b in zip(one, other)
    ]
    first, second = (
        tuple(slice(b.start - o.start, b.stop - o.start) for b, o in zip(both, of))
        for of in (one, other)
    )
    return first, second


def _part_to_host(data: jax.Array, index: tuple[slice, ...]) -> np.ndarray:
    """A part of an array of one device; on a CPU, where there is nothing to copy, without a program
    for it.
    """
    return (
        np.asarray(data)[index]
        if next(iter(data.devices())).platform == "cpu"
        else np.asarray(data[index])
    )


def _from_all_processes(found: np.ndarray) -> np.ndarray:
    """What each process found of an array, and zeros elsewhere, put together."""
    from jax.experimental import multihost_utils

    bits = np.ascontiguousarray(found).view(np.uint8).reshape(-1)
    step = _EXCHANGED_BYTES // jax.process_count()
    parts = [
        multihost_utils.process_allgather(bits[i : i + step]) for i in range(0, len(bits), step)
    ]
    joined = np.concatenate([np.bitwise_or.reduce(part, axis=0) for part in parts])
    return joined.view(found.dtype).reshape(found.shape)


_EXCHANGED_BYTES = 256 << 20
"""What is on a device at once while processes exchange parts of an array."""


def global_batch(local: np.ndarray, mesh: Mesh) -> jax.Array:
    """The global array of a step from this process's part of it.

    Args:
      local: [accumulation, sequences of this process, ...]; all processes have as many sequences.
    """
    accumulation, sequences, *rest = local.shape
    shape = (accumulation, sequences * reader(mesh)[1], *rest)
    return jax.make_array_from_process_local_data(NamedSharding(mesh, P(None, BATCH)), local, shape)


# --- Inside the model ---------------------------------------------------------------------------


def constrain(x: Array, *spec: Any) -> Array:
    """`x` split as `spec` says over the mesh in context; without one `x` as it is."""
    return x if current() is None else jax.lax.with_sharding_constraint(x, P(*spec))


def by_sequence(x: Array) -> Array:
    """Activations, one sequence after the other along the first dimension."""
    mesh = current()
    return x if mesh is None or len(x) % sequences_at_once(mesh) else constrain(x, BATCH)


def look_up(
    table: Float[Array, "V D"], tokens: Int[Array, "B T"], dtype: DTypeLike
) -> Float[Array, "B T D"]:
    """Rows of the input embedding, in `dtype`.

    The cast comes after the look-up: the gradient of the rows then adds up in the table's own type.
    Where rows are split over devices, each brings those that it holds for the tokens of all; a sum
    over the devices, of which one alone has the row, is exact.
    """

    def rows(table: Array, tokens: Array) -> Array:
        return table[tokens].astype(dtype)

    mesh = current()
    if mesh is None or len(tokens) % sequences_at_once(mesh):
        return rows(table, tokens)

    def local(table: Array, tokens: Array) -> Array:
        return summed(rows_of(table, gathered(tokens))[0].astype(dtype))

    return jax.shard_map(local, in_specs=(P(VOCABULARY), P(BATCH)), out_specs=P(BATCH))(
        table, tokens
    )


# --- Inside shard_map, where rows of the vocabulary are split; on one device, nothing -----------


def by_device(local: Callable[..., Any], inputs: Any, outputs: Any) -> Callable[..., Any]:
    """`local` on each device's part of its inputs, split as these specs say.

    Replication is not checked: sums over devices are in `local` itself, which nothing
    differentiates.
    """
    if current() is None:
        return local
    return jax.shard_map(local, in_specs=inputs, out_specs=outputs, check_vma=False)


def over(axes: str | tuple[str, ...], x: Array) -> Array:
    """The sum over the devices along `axes`."""
    return x if current() is None else jax.lax.psum(x, axes)


def row_part() -> Array | int:
    """Which part of the rows this device has."""
    return 0 if current() is None else jax.lax.axis_index(VOCABULARY)


def rows_of(
    table: Float[Array, "r D"], tokens: Int[Array, "..."]
) -> tuple[Float[Array, "... D"], Int[Array, "..."]]:
    """The rows of tokens that this device has, zeros for others and for negative ids, and where in
    its table they are: for others past its end.
    """
    places = tokens - row_part() * len(table)
    places = jnp.where((tokens >= 0) & (places >= 0) & (places < len(table)), places, len(table))
    return jnp.take(table, places, axis=0, mode="fill", fill_value=0), places


def gathered(x: Array) -> Array:
    """Tokens of all devices that have other rows for the same copy of the parameters."""
    return x if current() is None else jax.lax.all_gather(x, FSDP, axis=0, tiled=True)


def own(x: Array) -> Array:
    """This device's part of what was `gathered`."""
    if current() is None:
        return x
    return jax.lax.dynamic_slice_in_dim(
        x, jax.lax.axis_index(FSDP) * (part := len(x) // jax.lax.axis_size(FSDP)), part
    )


def summed(x: Array) -> Array:
    """This device's part of the sum of what all have for `gathered` tokens."""
    if current() is None:
        return x
    return jax.lax.psum_scatter(jax.lax.psum(x, TENSOR), FSDP, scatter_dimension=0, tiled=True)
