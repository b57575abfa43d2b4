"""Frozen kernels in 8 or 4 bits, dequantized where they are used (QLoRA, arXiv 2305.14314).

A block of 64 consecutive inputs of one output shares a scale, as in bitsandbytes. `int8`: codes
from -127 to 127 times the scale. `nf4`: codes are indices of 16 levels, which hold equal shares of
a normal distribution, times the block's largest magnitude; a byte has two codes.

A `QuantizedKernel` takes the place of a kernel in a tree of parameters: it has a kernel's shape and
`astype`, which is all that projections need of one. Layers, experts and devices split its arrays as
they split a kernel, since each has a kernel's dimensions, some of them shorter.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Float, Int8, Shaped, UInt8

from tokalign_jax.errors import UserError
from tokalign_jax.parallel import sharding
from tokalign_jax.utils import paths

Kind = Literal["int8", "nf4"]

BLOCK = 64
"""Inputs that share a scale; a kernel whose inputs are no multiple of it has smaller blocks."""
_MIN_BLOCK = 16
"""Kernels with smaller blocks are not quantized: scales would take as much memory as codes."""

NF4_LEVELS = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
"""Levels of nf4 in increasing order (appendix E of the paper)."""


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["codes", "scales"], meta_fields=["kind"]
)
@dataclasses.dataclass(frozen=True)
class QuantizedKernel:
    """A kernel [*S, in, out] in 8 or 4 bits, S being layers (and experts)."""

    codes: Int8[Any, "*S in out"] | UInt8[Any, "*S in/2 out"]
    """nf4: those of inputs 2i and 2i + 1 in the low and high half of byte i."""
    scales: BFloat16[Any, "*S in/block out"]
    kind: Kind

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernel's shape."""
        *stack, rows, outputs = self.codes.shape
        return (*stack, rows * (2 if self.kind == "nf4" else 1), outputs)

    @property
    def size(self) -> int:
        """Number of the kernel's elements."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> Kind:
        """Name of the format."""
        return self.kind

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in (self.codes, self.scales))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Returns the kernel in host memory, in float32 if no type is given."""
        return np.asarray(self.astype(jnp.float32), dtype)

    def __getitem__(self, index: Any) -> "QuantizedKernel":
        """Indexes the leading dimensions."""
        return jax.tree.map(lambda x: x[index], self)

    def astype(self, dtype: DTypeLike) -> Float[Array, "*S in out"]:
        """Returns the kernel, computed in float32 and rounded to `dtype` once."""
        values = _nf4_values(self.codes) if self.kind == "nf4" else self.codes.astype(jnp.float32)
        blocks = _blocks(values, self.scales.shape[-2])
        return (
            (blocks * self.scales[..., None, :].astype(jnp.float32))
            .astype(dtype)
            .reshape(self.shape)
        )


def quantize(kernel: Float[Array, "*S in out"], kind: Kind) -> QuantizedKernel:
    """Quantizes a kernel, whose inputs must be a multiple of 16, to the nearest codes.

    Scales are rounded to bfloat16 before codes are chosen.
    """
    blocks = _blocks(kernel.astype(jnp.float32), kernel.shape[-2] // block_size(kernel.shape))
    largest = jnp.abs(blocks).max(-2)
    scales = (largest / 127 if kind == "int8" else largest).astype(jnp.bfloat16)
    wide = scales[..., None, :].astype(jnp.float32)
    scaled = jnp.where(wide > 0, blocks / jnp.where(wide > 0, wide, 1), 0).reshape(kernel.shape)
    if kind == "int8":
        return QuantizedKernel(
            jnp.clip(jnp.round(scaled), -127, 127).astype(jnp.int8), scales, kind
        )
    boundaries = (NF4_LEVELS[1:] + NF4_LEVELS[:-1]) / 2
    above = [(scaled > boundary).astype(jnp.uint8) for boundary in boundaries]
    codes = functools.reduce(jnp.add, above)
    low, high = codes[..., ::2, :], codes[..., 1::2, :]
    return QuantizedKernel(low | (high << 4), scales, kind)


def block_size(shape: tuple[int, ...]) -> int:
    """Returns the number of inputs that share a scale, for a kernel [*S, in, out]."""
    return math.gcd(BLOCK, shape[-2])


def is_quantized(path: str, shape: tuple[int, ...]) -> bool:
    """Returns whether a parameter is quantized where it is frozen: a kernel of a projection."""
    is_projection = path.startswith("layers/") and path.endswith("_proj/kernel")
    return is_projection and block_size(shape) >= _MIN_BLOCK


def abstract(kernel: Any, kind: Kind) -> QuantizedKernel:
    """Returns the shapes of a kernel's codes and scales."""
    return jax.eval_shape(functools.partial(quantize, kind=kind), kernel)


def quantize_leaf(path: str, kernel: Any, kind: Kind, mesh: Mesh) -> Any:
    """Quantizes a parameter on the mesh, one layer at a time, if it is quantized at all.

    Returns:
      The quantized kernel, sharded by the path; or the parameter itself.
    """
    if isinstance(kernel, QuantizedKernel) or not is_quantized(path, kernel.shape):
        return kernel
    tree = paths.unflatten({path: abstract(kernel, kind)})
    (places,) = paths.flatten(sharding.shardings(tree, mesh)).values()
    return jax.jit(
        functools.partial(jax.lax.map, functools.partial(quantize, kind=kind)),
        out_shardings=places,
    )(kernel)


def quantize_tree(params: Mapping[str, Any], kind: Kind, mesh: Mesh) -> paths.Tree:
    """Quantizes the projections of a tree; other parameters, and quantized ones, stay.

    Raises:
      UserError: a tensor group would split a block of an expert's kernel.
    """
    leaves = paths.flatten(params)
    check(leaves, mesh)
    return paths.unflatten(
        {path: quantize_leaf(path, leaf, kind, mesh) for path, leaf in leaves.items()}
    )


def pinned(tree: Any, varying: Array) -> Any:
    """Returns a tree whose quantized kernels seem to depend on an array that varies in a loop.

    Otherwise a compiler may dequantize all of them before the loop, and hold them all.
    """

    def is_kernel(leaf: Any) -> bool:
        return isinstance(leaf, QuantizedKernel)

    leaves, structure = jax.tree.flatten(tree, is_leaf=is_kernel)
    kernels = [leaf for leaf in leaves if is_kernel(leaf)]
    if not kernels:
        return tree
    kernels, _ = jax.lax.optimization_barrier((kernels, varying))
    remaining = iter(kernels)
    return structure.unflatten([next(remaining) if is_kernel(leaf) else leaf for leaf in leaves])


def abstract_tree(params: Mapping[str, Any], kind: Kind) -> paths.Tree:
    """Returns a tree of shapes with quantized projections."""
    return paths.unflatten(
        {
            path: abstract(leaf, kind) if is_quantized(path, leaf.shape) else leaf
            for path, leaf in paths.flatten(params).items()
        }
    )


def check(leaves: Mapping[str, Any], mesh: Mesh) -> None:
    """Refuses meshes that would split the blocks of experts, which are computed device by device.

    Raises:
      UserError: see above.
    """
    parts = mesh.shape[sharding.TENSOR]
    for path, leaf in leaves.items():
        if not (path.endswith("experts/down_proj/kernel") and is_quantized(path, leaf.shape)):
            continue
        blocks = leaf.shape[-2] // block_size(leaf.shape)
        if leaf.shape[-2] % parts == 0 and blocks % parts:
            raise UserError(
                f"lora.frozen: the {blocks} blocks of an expert's width {leaf.shape[-2]} cannot be"
                f" split over mesh.tensor={parts}: set --config.mesh.tensor=1"
            )


def _blocks(x: Shaped[Array, "*S in out"], count: int) -> Shaped[Array, "*S n block out"]:
    *stack, inputs, outputs = x.shape
    return x.reshape(*stack, count, inputs // count, outputs)


def _nf4_values(codes: UInt8[Array, "*S in/2 out"]) -> Float[Array, "*S in out"]:
    """Returns the levels of packed codes, by selects: gathers are slow on accelerators."""
    codes = jnp.stack([codes & 15, codes >> 4], axis=-2)
    codes = codes.reshape(*codes.shape[:-3], -1, codes.shape[-1])
    values: list[Any] = list(NF4_LEVELS)
    for bit in range(4):
        is_set = (codes >> bit) & 1 == 1
        values = [jnp.where(is_set, odd, even) for even, odd in zip(values[::2], values[1::2])]
    return values[0]


KINDS: tuple[Kind, ...] = get_args(Kind)
