"""Mixtures of experts in the place of a feed-forward layer (arXiv 1701.06538).

Each token goes through a few of the experts, weighted by the router's probabilities, and through
the shared expert if there is one. Both ways to compute that are exact and have no capacity:

- sparse: the tokens, sorted by expert, times the experts' matrices in grouped products
  (`jax.lax.ragged_dot`), on each device for the tokens that it has;
- dense: all experts compute all tokens, and those that a token is not sent to count for nothing, at
  E / per_token times the arithmetic. For backends without a kernel for grouped products (CPUs).

Dimension letters: `transformer`; R rows: a token as often as it has experts.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from tokalign_jax.models.config import Experts, ModelConfig
from tokalign_jax.models.lora import LoraSpec
from tokalign_jax.models.modules import (
    ACTIVATIONS,
    MLP,
    Linear,
    dropout,
    dropout_mask,
    param,
    scaled,
    split,
)
from tokalign_jax.parallel import sharding


class ExpertLinear(nnx.Module):
    """The linear maps of all experts, with their adapters."""

    def __init__(
        self, experts: int, inputs: int, outputs: int, lora: LoraSpec | None, summed: bool = False
    ):
        """`summed`: `dense` sums over the experts."""
        self.kernel = param(experts, inputs, outputs)
        self.outputs = "bto" if summed else "ebto"
        self.lora = lora
        if lora:
            self.lora_a = param(experts, inputs, lora.rank)
            self.lora_b = param(experts, lora.rank, outputs)

    def dense(
        self, x: Float[Array, "*E B T in"], key: jax.Array | None
    ) -> Float[Array, "*E B T out"]:
        """y[e] = x[e] W[e], or x W[e] where `x` is the same for all experts."""
        inputs = "ebti" if x.ndim == 4 else "bti"
        y = jnp.einsum(f"{inputs},eio->{self.outputs}", x, self.kernel.astype(x.dtype))
        if self.lora:
            x = dropout(x, self.lora.dropout, key)
            low = scaled(
                jnp.einsum(f"{inputs},eio->ebto", x, self.lora_a.astype(x.dtype)), self.lora.scale
            )
            y += jnp.einsum(f"ebti,eio->{self.outputs}", low, self.lora_b.astype(x.dtype))
        return y

    def weights(self) -> dict[str, Array]:
        """What `grouped` needs."""
        names = ("kernel", "lora_a", "lora_b") if self.lora else ("kernel",)
        return {name: getattr(self, name)[...] for name in names}


class ExpertMLP(nnx.Module):
    """The gated feed-forward layers of all experts, weighted for each token and summed."""

    def __init__(self, config: ModelConfig, count: int, lora: LoraSpec | None):
        self.activation = config.activation
        self.lora = lora
        self.count = count
        self.gate_proj = ExpertLinear(count, config.hidden_size, config.intermediate_size, lora)
        self.up_proj = ExpertLinear(count, config.hidden_size, config.intermediate_size, lora)
        self.down_proj = ExpertLinear(
            count, config.intermediate_size, config.hidden_size, lora, summed=True
        )

    def dense(
        self, x: Float[Array, "B T D"], weights: Float[Array, "B T E"], key: jax.Array | None
    ) -> Float[Array, "B T D"]:
        """All experts for all tokens."""
        in_key, out_key = split(key, 2)
        gate, up = self.gate_proj.dense(x, in_key), self.up_proj.dense(x, in_key)
        y = ACTIVATIONS[self.activation](gate) * up
        # Weighted before the last product, which then sums over experts: [E, B, T, D] never exists.
        # In the type of the weights, in which their gradient is then summed over the width.
        weighted = y * jnp.moveaxis(weights, -1, 0)[..., None]
        return self.down_proj.dense(weighted.astype(x.dtype), out_key)

    def sparse(
        self,
        x: Float[Array, "B T D"],
        chosen: Int[Array, "B T k"],
        weights: Float[Array, "B T k"],
        key: jax.Array | None,
    ) -> Float[Array, "B T D"]:
        """The chosen experts for each token, on each device for its own tokens.

        Experts' matrices are gathered over `fsdp` and split over `tensor` by their width.
        """
        in_key, out_key = split(key, 2)
        rate = self.lora.dropout if self.lora else 0.0
        projections = {
            name: getattr(self, name).weights() for name in ("gate_proj", "up_proj", "down_proj")
        }
        compute = functools.partial(self._grouped, rate=rate)
        seen = dropout(x, rate, in_key) if rate and in_key is not None else None
        arguments = (x, seen, chosen, weights, out_key, projections)
        mesh = sharding.current()
        if mesh is None:
            return compute(*arguments, axis=None)
        batch = sharding.BATCH if len(x) % sharding.sequences_at_once(mesh) == 0 else None
        axis = sharding.TENSOR
        if self.gate_proj.kernel.shape[-1] % mesh.shape[axis]:
            axis = None
        tokens, whole = PartitionSpec(batch), PartitionSpec()
        inputs = {"kernel": PartitionSpec(None, None, axis), "lora_a": whole}
        inputs["lora_b"] = inputs["kernel"]
        outputs = dict.fromkeys(("kernel", "lora_a"), PartitionSpec(None, axis)) | {"lora_b": whole}
        specs = {
            name: {part: by[part] for part in projections[name]}
            for name, by in (("gate_proj", inputs), ("up_proj", inputs), ("down_proj", outputs))
        }
        return jax.shard_map(
            functools.partial(compute, axis=axis),
            in_specs=(*(None if leaf is None else tokens for leaf in arguments[:-1]), specs),
            out_specs=tokens,
        )(*arguments)

    def _grouped(
        self,
        x: Float[Array, "B T D"],
        seen: Float[Array, "B T D"] | None,
        chosen: Int[Array, "B T k"],
        weights: Float[Array, "B T k"],
        key: jax.Array | None,
        projections: dict[str, Any],
        *,
        rate: float,
        axis: str | None,
    ) -> Float[Array, "B T D"]:
        """`sparse` on one device, which has a part of the width under a mesh axis.

        Args:
          seen: `x` as adapters see it, where they see less.
        """
        *batch, width = x.shape
        order = jnp.argsort(chosen.reshape(-1), stable=True)
        back = jnp.argsort(order)
        sizes = jnp.bincount(chosen.reshape(-1), length=self.count).astype(jnp.int32)
        product = functools.partial(_product, sizes=sizes, scale=self.lora and self.lora.scale)

        def rows(tokens: Float[Array, "B T D"]) -> Float[Array, "R D"]:
            repeated = jnp.repeat(tokens.reshape(-1, 1, width), chosen.shape[-1], axis=1)
            return _permuted(repeated.reshape(-1, width), order, back)

        plain = rows(x)
        seen_rows = plain if seen is None else rows(seen)
        gate = product(plain, seen_rows, projections["gate_proj"])
        up = product(plain, seen_rows, projections["up_proj"])
        y = ACTIVATIONS[self.activation](gate) * up
        by_row = _permuted(weights.reshape(-1, 1), order, back)
        y = (y * by_row).astype(x.dtype)
        seen_rows = y
        if seen is not None and key is not None:
            kept = self._kept(y, key, chosen, order, rate, axis)
            seen_rows = jnp.where(kept, scaled(y, 1 / (1 - rate)), 0)
        out = product(y, seen_rows, projections["down_proj"])
        total = _permuted(out, back, order).reshape(*batch, -1, width).astype(jnp.float32).sum(-2)
        total = total if axis is None else jax.lax.psum(total, axis)
        return total.astype(x.dtype)

    def _kept(
        self,
        y: Float[Array, "R F"],
        key: jax.Array,
        chosen: Int[Array, "B T k"],
        order: Int[Array, "R"],
        rate: float,
        axis: str | None,
    ) -> Array:
        """Dropout's mask of rows, which is that of `dense`: by expert, position and element."""
        _, length, choices = chosen.shape
        token = order // choices
        parts = 1 if axis is None else jax.lax.axis_size(axis)
        first = 0 if axis is None else jax.lax.axis_index(axis) * y.shape[-1]
        row = chosen.reshape(-1)[order] * length + token % length
        number = row[:, None] * (y.shape[-1] * parts) + first + jnp.arange(y.shape[-1])
        mask = functools.partial(dropout_mask, rate=rate)
        return jax.vmap(mask)(number.astype(jnp.uint32), key[token // length])


class MixtureOfExperts(nnx.Module):
    """Each token through its few experts, and through the shared one if there is one."""

    def __init__(self, config: ModelConfig, experts: Experts, lora: LoraSpec | None):
        self.settings = experts
        self.router = Linear(config.hidden_size, experts.count, bias=False, lora=None)
        self.experts = ExpertMLP(config, experts.count, lora)
        self.shared = MLP(config, lora, experts.shared_size) if experts.shared_size else None
        self.shared_gate = (
            Linear(config.hidden_size, 1, bias=False, lora=None) if experts.shared_gate else None
        )

    def __call__(self, x: Float[Array, "B T D"], key: jax.Array | None) -> Float[Array, "B T D"]:
        key, shared_key = split(key, 2) if self.shared else (key, None)
        probabilities = jax.nn.softmax(self.router(x.astype(jnp.float32), None))
        weights, chosen = jax.lax.top_k(probabilities, self.settings.per_token)
        if self.settings.normalized:
            weights /= weights.sum(-1, keepdims=True)
        if self._is_sparse:
            y = self.experts.sparse(x, chosen, weights, key)
        else:
            places = jax.nn.one_hot(chosen, self.settings.count, dtype=jnp.float32)
            y = self.experts.dense(x, jnp.einsum("btk,btke->bte", weights, places), key)
        if self.shared is None:
            return y
        shared = self.shared(x, shared_key)
        if self.shared_gate is not None:
            open_ = jax.nn.sigmoid(self.shared_gate(x, None).astype(jnp.float32))
            shared = (open_ * shared).astype(x.dtype)
        return y + shared

    @property
    def _is_sparse(self) -> bool:
        if self.settings.computed == "auto":
            return jax.default_backend() != "cpu"
        return self.settings.computed == "sparse"


def _product(
    x: Float[Array, "R in"],
    seen: Float[Array, "R in"],
    weights: dict[str, Array],
    *,
    sizes: Int[Array, "E"],
    scale: float | None,
) -> Float[Array, "R out"]:
    """Rows times the matrices of their experts; `seen` is what the adapters multiply."""
    y = jax.lax.ragged_dot(x, weights["kernel"].astype(x.dtype), sizes)
    if scale is not None:
        low = scaled(jax.lax.ragged_dot(seen, weights["lora_a"].astype(x.dtype), sizes), scale)
        y += jax.lax.ragged_dot(low, weights["lora_b"].astype(x.dtype), sizes)
    return y


@jax.custom_vjp
def _permuted(
    x: Float[Array, "R D"], order: Int[Array, "R"], back: Int[Array, "R"]
) -> Float[Array, "R D"]:
    """Rows in another order, whose inverse is `back`. Autodiff would scatter the gradients."""
    return x[order]


_permuted.defvjp(
    lambda x, order, back: (x[order], back),
    lambda back, gradient: (gradient[back], None, None),
)
