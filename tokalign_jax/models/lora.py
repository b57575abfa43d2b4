"""Low-rank adapters (arXiv 2106.09685): y = x W + (alpha / rank) dropout(x) A B on every projection of every layer.

L layers, E experts, r rank. The factors are float32 leaves beside the kernel they adapt: `lora_a` [L, in, r] and `lora_b`
[L, r, out], for experts [L, E, in, r] and [L, E, r, out]. A mixture's router keeps to its kernel: which experts a token
goes to is no matter of the vocabulary, and would jump.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from tokalign_jax import paths


@dataclass(frozen=True)
class LoraSpec:
    rank: int
    alpha: float
    dropout: float
    """Share of a projection's inputs that the adapter does not see, drawn anew for each input while training:
    projections that read the same lose the same."""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def add_lora(params: dict[str, Any], spec: LoraSpec, key: jax.Array) -> dict[str, Any]:
    """`params` with adapters beside each kernel of the layers; they change nothing yet.

    A is uniform in +-1/sqrt(in), B zero.
    """
    leaves = paths.flatten(params)
    projections = _projections(leaves, "kernel")
    for name, k in zip(projections, jax.random.split(key, len(projections))):
        *stack, inputs, outputs = leaves[f"{name}/kernel"].shape
        bound = inputs**-0.5
        leaves[f"{name}/lora_a"] = jax.random.uniform(k, (*stack, inputs, spec.rank), jnp.float32, -bound, bound)
        leaves[f"{name}/lora_b"] = jnp.zeros((*stack, spec.rank, outputs), jnp.float32)
    return paths.unflatten(leaves)


def merge_lora(params: dict[str, Any], spec: LoraSpec, dtype: DTypeLike | None = None) -> dict[str, Any]:
    """`params` without adapters, each added to its kernel in float32.

    The adapted kernels then have the type that they had, or `dtype` (float32 keeps every digit of the sum).
    """
    leaves = paths.flatten(params)
    for name in _projections(leaves, "lora_a"):
        kernel, a, b = leaves[f"{name}/kernel"], leaves.pop(f"{name}/lora_a"), leaves.pop(f"{name}/lora_b")
        update = spec.scale * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        leaves[f"{name}/kernel"] = (kernel.astype(jnp.float32) + update).astype(dtype or kernel.dtype)
    return paths.unflatten(leaves)


def _projections(leaves: dict[str, Any], leaf: str) -> list[str]:
    """Paths of the layers' projections that have such a leaf, always in one order."""
    ending = f"_proj/{leaf}"
    return sorted(
        path.removesuffix(f"/{leaf}") for path in leaves if path.startswith("layers/") and path.endswith(ending)
    )
