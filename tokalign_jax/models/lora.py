"""Low-rank adapters (arXiv 2106.09685): y = x W + (alpha / rank) dropout(x) A B on every projection
of every layer.

L layers, E experts, r rank. The factors are float32 leaves beside the kernel they adapt: `lora_a`
[L, in, r] and `lora_b` [L, r, out], for experts [L, E, in, r] and [L, E, r, out]. A mixture's
router keeps to its kernel: which experts a token goes to is no matter of the vocabulary, and would
jump.
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
    rank: int
    alpha: float
    dropout: float
    """Share of a projection's inputs that the adapter does not see, drawn anew for each input while
    training: projections that read the same lose the same.
    """

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def add_lora(params: dict[str, Any], spec: LoraSpec, key: jax.Array) -> dict[str, Any]:
    """`params` with adapters beside each kernel of the layers; they change nothing yet.

    A is uniform in +-1/sqrt(in), B zero.
    """
    leaves = paths.flatten(params)
    projections = _projections(leaves)
    for name, k in zip(projections, jax.random.split(key, len(projections))):
        *stack, inputs, outputs = leaves[f"{name}/kernel"].shape
        bound = inputs**-0.5
        leaves[f"{name}/lora_a"] = jax.random.uniform(
            k, (*stack, inputs, spec.rank), jnp.float32, -bound, bound
        )
        leaves[f"{name}/lora_b"] = jnp.zeros((*stack, spec.rank, outputs), jnp.float32)
    return paths.unflatten(leaves)


class Adapter(NamedTuple):
    """The trained adapter of one stacked kernel [*S, in, out], S the layers (and experts)."""

    spec: LoraSpec
    a: Float[Array, "*S in r"]
    b: Float[Array, "*S r out"]


def merged(
    kernel: Any, adapters: Sequence[Adapter], index: tuple[int, ...]
) -> Float[Array, "*E in out"]:
    """One layer's kernel with its adapters added, in float32.

    Not compiled as one program: XLA would contract product and sum into fused multiply-adds, and
    the digits of an exported model would depend on how it was merged.

    Args: kernel: [in, out] of one layer or expert, or [E, in, out] of all experts of a layer; of
      any float type. index: of the layer (and expert) in the adapters.
    """
    place, total = np.array(index, np.int32), jnp.asarray(kernel).astype(jnp.float32)
    for spec, a, b in adapters:
        update = jnp.matmul(_take(a, place), _take(b, place), precision=jax.lax.Precision.HIGHEST)
        total = total + spec.scale * update
    return total


def merge_into(
    kernel: Float[Array, "*S in out"], adapters: Sequence[Adapter]
) -> Float[Array, "*S in out"]:
    """The stacked kernel, in its own type, with its adapters added one layer at a time, in place.

    `kernel` is donated: beside it and the adapters only a few float32 matrices of one layer exist.
    """
    for index in np.ndindex(kernel.shape[:-2]):
        place = np.array(index, np.int32)
        kernel = _put(kernel, merged(_take(kernel, place), adapters, index), place)
    return kernel


@jax.jit
def _take(stack: Float[Array, "*S in out"], index: Int[Array, "s"]) -> Float[Array, "*E in out"]:
    """`stack[index]`, by one program for all indices."""
    rest = stack.shape[len(index) :]
    start = (*index, *(0 for _ in rest))
    return jax.lax.dynamic_slice(stack, start, (1,) * len(index) + rest).reshape(rest)


@functools.partial(jax.jit, donate_argnums=0)
def _put(
    stack: Float[Array, "*S in out"], matrix: Float[Array, "in out"], index: Int[Array, "s"]
) -> Array:
    matrix = matrix.astype(stack.dtype).reshape((1,) * len(index) + matrix.shape)
    return jax.lax.dynamic_update_slice(stack, matrix, (*index, 0, 0))


def _projections(leaves: dict[str, Any]) -> list[str]:
    """Paths of the layers' projections, always in one order."""
    ending = "_proj/kernel"
    return sorted(
        path.removesuffix("/kernel")
        for path in leaves
        if path.startswith("layers/") and path.endswith(ending)
    )
