"""Low-rank adapters (arXiv 2106.09685): y = x W + (alpha / rank) dropout(x) A B on every projection of every layer.

L layers, r rank. The factors are float32 leaves beside the kernel they adapt: `lora_a` [L, in, r] and `lora_b`
[L, r, out].
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


@dataclass(frozen=True)
class LoraSpec:
    rank: int
    alpha: float
    dropout: float
    """Share of a projection's inputs that the adapter does not see, drawn anew for each projection while training."""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def add_lora(params: dict[str, Any], spec: LoraSpec, key: jax.Array) -> dict[str, Any]:
    """`params` with adapters beside each kernel of the layers; they change nothing yet.

    A is uniform in +-1/sqrt(in), B zero.
    """

    def adapt(projection: dict[str, Any], key: jax.Array) -> dict[str, Any]:
        layers, inputs, outputs = projection["kernel"].shape
        bound = inputs**-0.5
        a = jax.random.uniform(key, (layers, inputs, spec.rank), jnp.float32, -bound, bound)
        return projection | {"lora_a": a, "lora_b": jnp.zeros((layers, spec.rank, outputs), jnp.float32)}

    return params | {"layers": _map_projections(adapt, params["layers"], key)}


def merge_lora(params: dict[str, Any], spec: LoraSpec, dtype: DTypeLike | None = None) -> dict[str, Any]:
    """`params` without adapters, each added to its kernel in float32.

    The adapted kernels then have the type that they had, or `dtype` (float32 keeps every digit of the sum).
    """

    def merge(projection: dict[str, Any], key: None) -> dict[str, Any]:
        kept = {name: leaf for name, leaf in projection.items() if name not in ("lora_a", "lora_b")}
        if "lora_a" not in projection:
            return kept
        return kept | {"kernel": _merged(projection, spec.scale, dtype or projection["kernel"].dtype)}

    return params | {"layers": _map_projections(merge, params["layers"], None)}


def _merged(projection: dict[str, Any], scale: float, dtype: DTypeLike) -> jax.Array:
    update = jnp.matmul(projection["lora_a"], projection["lora_b"], precision=jax.lax.Precision.HIGHEST)
    return (projection["kernel"].astype(jnp.float32) + scale * update).astype(dtype)


def _map_projections(function: Callable, layers: dict[str, Any], key: jax.Array | None) -> dict[str, Any]:
    """`layers` with `function(projection, key)` in place of each dict with a kernel, every one with its own key."""
    keys = [None] * len(layers) if key is None else jax.random.split(key, len(layers))
    return {
        name: function(part, k)
        if "kernel" in part
        else _map_projections(function, part, k)
        if isinstance(part, dict)
        else part
        for (name, part), k in zip(sorted(layers.items()), keys)
    }
