"""Low-rank adapters (LoRA, arXiv 2106.09685) on every projection of every layer.

y = x W + (alpha / rank) dropout(x) A B.

L layers, E experts, r rank. The factors are float32 leaves beside the kernel they adapt: `lora_a`
[L, in, r] and `lora_b` [L, r, out], for experts [L, E, in, r] and [L, E, r, out]. The router of a
mixture of experts has none: routing does not depend on the vocabulary, and changes abruptly.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tokalign_jax.utils import paths


@dataclass(frozen=True)
class LoraSpec:
    """Hyperparameters of the adapters."""

    rank: int
    alpha: float
    dropout: float
    """Share of a projection's inputs that the adapter drops during training. Projections with the
    same input share the mask.
    """

    @property
    def scale(self) -> float:
        """Factor of A B."""
        return self.alpha / self.rank


def add_lora(params: dict[str, Any], spec: LoraSpec, key: jax.Array) -> dict[str, Any]:
    """Adds adapters to the kernels of the layers, initialized to change nothing.

    A is uniform in +-1/sqrt(in), B zero.
    """
    leaves = paths.flatten(params)
    projections = _projection_paths(leaves)
    for name, k in zip(projections, jax.random.split(key, len(projections))):
        *stack, inputs, outputs = leaves[f"{name}/kernel"].shape
        bound = inputs**-0.5
        leaves[f"{name}/lora_a"] = jax.random.uniform(
            k, (*stack, inputs, spec.rank), jnp.float32, -bound, bound
        )
        leaves[f"{name}/lora_b"] = jnp.zeros((*stack, spec.rank, outputs), jnp.float32)
    return paths.unflatten(leaves)


class Adapter(NamedTuple):
    """Trained adapter of a stacked kernel [*S, in, out], S being layers (and experts)."""

    spec: LoraSpec
    a: Float[Array, "*S in r"]
    b: Float[Array, "*S r out"]


def merged(
    kernel: Any, adapters: Sequence[Adapter], index: tuple[int, ...]
) -> Float[Array, "*E in out"]:
    """Returns one layer's kernel in float32 with its adapters added.

    Not jitted as a whole: XLA would contract product and sum into fused multiply-adds, and the
    digits of an exported model would depend on how it was merged.

    Args:
      kernel: [in, out] of a layer or expert, or [E, in, out] of all experts of a layer; any float
        dtype.
      adapters: the adapters of the stacked kernel.
      index: index of the layer (and expert) in the stack.
    """
    position, total = np.array(index, np.int32), jnp.asarray(kernel).astype(jnp.float32)
    for spec, a, b in adapters:
        a, b = _take(a, position), _take(b, position)
        update = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        total = total + spec.scale * update
    return total


def merge_into(
    kernel: Float[Array, "*S in out"], adapters: Sequence[Adapter]
) -> Float[Array, "*S in out"]:
    """Adds adapters to a stacked kernel in its own dtype, in place, one layer at a time.

    `kernel` is donated; additional memory is a few float32 matrices of one layer.
    """
    for index in np.ndindex(kernel.shape[:-2]):
        position = np.array(index, np.int32)
        kernel = _put(kernel, merged(_take(kernel, position), adapters, index), position)
    return kernel


@jax.jit
def _take(stack: Float[Array, "*S in out"], index: Int[Array, "s"]) -> Float[Array, "*E in out"]:
    """Returns `stack[index]`, compiled once for all indices."""
    rest = stack.shape[len(index) :]
    start = (*index, *(0 for _ in rest))
    return jax.lax.dynamic_slice(stack, start, (1,) * len(index) + rest).reshape(rest)


@functools.partial(jax.jit, donate_argnums=0)
def _put(
    stack: Float[Array, "*S in out"], matrix: Float[Array, "in out"], index: Int[Array, "s"]
) -> Array:
    matrix = matrix.astype(stack.dtype).reshape((1,) * len(index) + matrix.shape)
    return jax.lax.dynamic_update_slice(stack, matrix, (*index, 0, 0))


def _projection_paths(leaves: dict[str, Any]) -> list[str]:
    """Returns the sorted paths of the layers' projections."""
    ending = "_proj/kernel"
    return sorted(
        path.removesuffix("/kernel")
        for path in leaves
        if path.startswith("layers/") and path.endswith(ending)
    )
