"""Mixtures of experts that replace a feed-forward layer (arXiv 1701.06538).

Each token goes through a few of the experts, weighted by the router's probabilities, and through
the shared expert if there is one. Both implementations are exact and without a capacity limit:

- sparse: grouped products (`jax.lax.ragged_dot`) of the tokens, sorted by expert, with the experts'
  matrices, on each device for its own tokens;
- dense: all experts compute all tokens, with weight zero where a token is not routed, at E /
  per_token times the arithmetic. For backends without a kernel for grouped products (CPU).

Dimensions: see `transformer`; R rows, one for each pair of token and chosen expert.
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
    scale_in_float32,
    split_keys,
)
from tokalign_jax.parallel import sharding


class ExpertLinear(nnx.Module):
    """Linear maps of all experts, with their adapters."""

    def __init__(
        self, experts: int, inputs: int, outputs: int, lora: LoraSpec | None, summed: bool = False
    ):
        """Declares the parameters; with `summed`, `dense` sums over the experts."""
        self.kernel = param(experts, inputs, outputs)
        self.outputs = "bto" if summed else "ebto"
        self.lora = lora
        if lora:
            self.lora_a = param(experts, inputs, lora.rank)
            self.lora_b = param(experts, lora.rank, outputs)

    def dense(
        self, x: Float[Array, "*E B T in"], key: jax.Array | None
    ) -> Float[Array, "*E B T out"]:
        """Computes y[e] = x[e] W[e], or x W[e] if `x` is shared by all experts."""
        inputs = "ebti" if x.ndim == 4 else "bti"
        y = jnp.einsum(f"{inputs},eio->{self.outputs}", x, self.kernel.astype(x.dtype))
        if self.lora:
            x = dropout(x, self.lora.dropout, key)
            low = scale_in_float32(
                jnp.einsum(f"{inputs},eio->ebto", x, self.lora_a.astype(x.dtype)), self.lora.scale
            )
            y += jnp.einsum(f"ebti,eio->{self.outputs}", low, self.lora_b.astype(x.dtype))
        return y

    def weights(self) -> dict[str, Array]:
        """Returns the arrays that `_product` needs."""
        names = ("kernel", "lora_a", "lora_b") if self.lora else ("kernel",)
        return {name: getattr(self, name)[...] for name in names}


class ExpertMLP(nnx.Module):
    """Gated feed-forward layers of all experts, weighted for each token and summed."""

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
        """Applies all experts to all tokens."""
        in_key, out_key = split_keys(key, 2)
        gate, up = self.gate_proj.dense(x, in_key), self.up_proj.dense(x, in_key)
        y = ACTIVATIONS[self.activation](gate) * up
        # Weighted before the last product, which sums over experts, so that [E, B, T, D] is never
        # materialized; in the dtype of the weights, so that their gradient is summed in it.
        weighted = y * jnp.moveaxis(weights, -1, 0)[..., None]
        return self.down_proj.dense(weighted.astype(x.dtype), out_key)

    def sparse(
        self,
        x: Float[Array, "B T D"],
        chosen: Int[Array, "B T k"],
        weights: Float[Array, "B T k"],
        key: jax.Array | None,
    ) -> Float[Array, "B T D"]:
        """Applies the chosen experts of each token, on each device for its own tokens.

        The experts' matrices are gathered over `fsdp` and split over `tensor` by their width.
        """
        in_key, out_key = split_keys(key, 2)
        rate = self.lora.dropout if self.lora else 0.0
        projections = {
            name: getattr(self, name).weights() for name in ("gate_proj", "up_proj", "down_proj")
        }
        compute = functools.partial(self._grouped, rate=rate)
        adapter_x = dropout(x, rate, in_key) if rate and in_key is not None else None
        arguments = (x, adapter_x, chosen, weights, out_key, projections)
        mesh = sharding.current()
        if mesh is None:
            return compute(*arguments, axis=None)
        batch = sharding.BATCH if len(x) % sharding.sequences_at_once(mesh) == 0 else None
        axis = sharding.TENSOR
        if self.gate_proj.kernel.shape[-1] % mesh.shape[axis]:
            axis = None
        tokens, replicated = PartitionSpec(batch), PartitionSpec()
        inputs = {"kernel": PartitionSpec(None, None, axis), "lora_a": replicated}
        inputs["lora_b"] = inputs["kernel"]
        outputs = dict.fromkeys(("kernel", "lora_a"), PartitionSpec(None, axis)) | {
            "lora_b": replicated
        }
        specs = {
            name: {part: part_specs[part] for part in projections[name]}
            for name, part_specs in (
                ("gate_proj", inputs),
                ("up_proj", inputs),
                ("down_proj", outputs),
            )
        }
        return sharding.shard_map(
            functools.partial(compute, axis=axis),
            (*(None if leaf is None else tokens for leaf in arguments[:-1]), specs),
            tokens,
            check_vma=True,
        )(*arguments)

    def _grouped(
        self,
        x: Float[Array, "B T D"],
        adapter_x: Float[Array, "B T D"] | None,
        chosen: Int[Array, "B T k"],
        weights: Float[Array, "B T k"],
        key: jax.Array | None,
        projections: dict[str, Any],
        *,
        rate: float,
        axis: str | None,
    ) -> Float[Array, "B T D"]:
        """Computes `sparse` on one device, which under a mesh axis holds a part of the width.

        Args:
          x: tokens.
          adapter_x: the adapters' input after dropout, or None if it is `x`.
          chosen: experts of each token.
          weights: weights of these experts.
          key: dropout key of each sequence.
          projections: the arrays of each projection.
          rate: dropout rate.
          axis: the mesh axis that splits the width.
        """
        *batch, width = x.shape
        order = jnp.argsort(chosen.reshape(-1), stable=True)
        inverse = jnp.argsort(order)
        sizes = jnp.bincount(chosen.reshape(-1), length=self.count).astype(jnp.int32)
        product = functools.partial(_product, sizes=sizes, scale=self.lora and self.lora.scale)

        def rows(tokens: Float[Array, "B T D"]) -> Float[Array, "R D"]:
            repeated = jnp.repeat(tokens.reshape(-1, 1, width), chosen.shape[-1], axis=1)
            return _permute(repeated.reshape(-1, width), order, inverse)

        x_rows = rows(x)
        adapter_rows = x_rows if adapter_x is None else rows(adapter_x)
        gate = product(x_rows, adapter_rows, projections["gate_proj"])
        up = product(x_rows, adapter_rows, projections["up_proj"])
        y = ACTIVATIONS[self.activation](gate) * up
        row_weights = _permute(weights.reshape(-1, 1), order, inverse)
        y = (y * row_weights).astype(x.dtype)
        adapter_rows = y
        if adapter_x is not None and key is not None:
            keep = self._keep_mask(y, key, chosen, order, rate, axis)
            adapter_rows = jnp.where(keep, scale_in_float32(y, 1 / (1 - rate)), 0)
        out = product(y, adapter_rows, projections["down_proj"])
        out = _permute(out, inverse, order).reshape(*batch, -1, width)
        total = out.astype(jnp.float32).sum(-2)
        total = total if axis is None else jax.lax.psum(total, axis)
        return total.astype(x.dtype)

    def _keep_mask(
        self,
        y: Float[Array, "R F"],
        key: jax.Array,
        chosen: Int[Array, "B T k"],
        order: Int[Array, "R"],
        rate: float,
        axis: str | None,
    ) -> Array:
        """Returns the rows' dropout mask, equal to that of `dense`."""
        _, length, choices = chosen.shape
        token = order // choices
        parts = 1 if axis is None else jax.lax.axis_size(axis)
        first = 0 if axis is None else jax.lax.axis_index(axis) * y.shape[-1]
        row = chosen.reshape(-1)[order] * length + token % length
        index = row[:, None] * (y.shape[-1] * parts) + first + jnp.arange(y.shape[-1])
        mask = functools.partial(dropout_mask, rate=rate)
        return jax.vmap(mask)(index.astype(jnp.uint32), key[token // length])


class MixtureOfExperts(nnx.Module):
    """Router, experts, and optionally a shared expert that all tokens go through."""

    def __init__(self, config: ModelConfig, experts: Experts, lora: LoraSpec | None):
        self.settings = experts
        self.router = Linear(config.hidden_size, experts.count, bias=False, lora=None)
        self.experts = ExpertMLP(config, experts.count, lora)
        self.shared = MLP(config, lora, experts.shared_size) if experts.shared_size else None
        self.shared_gate = (
            Linear(config.hidden_size, 1, bias=False, lora=None) if experts.shared_gate else None
        )

    def __call__(self, x: Float[Array, "B T D"], key: jax.Array | None) -> Float[Array, "B T D"]:
        """Applies the mixture; `key` is for dropout in the adapters."""
        key, shared_key = split_keys(key, 2) if self.shared else (key, None)
        probabilities = jax.nn.softmax(self.router(x.astype(jnp.float32), None))
        weights, chosen = jax.lax.top_k(probabilities, self.settings.per_token)
        if self.settings.normalized:
            weights /= weights.sum(-1, keepdims=True)
        if self._is_sparse:
            y = self.experts.sparse(x, chosen, weights, key)
        else:
            one_hot = jax.nn.one_hot(chosen, self.settings.count, dtype=jnp.float32)
            y = self.experts.dense(x, jnp.einsum("btk,btke->bte", weights, one_hot), key)
        if self.shared is None:
            return y
        shared = self.shared(x, shared_key)
        if self.shared_gate is not None:
            gate = jax.nn.sigmoid(self.shared_gate(x, None).astype(jnp.float32))
            shared = (gate * shared).astype(x.dtype)
        return y + shared

    @property
    def _is_sparse(self) -> bool:
        if self.settings.computed == "auto":
            return jax.default_backend() != "cpu"
        return self.settings.computed == "sparse"


def _product(
    x: Float[Array, "R in"],
    adapter_x: Float[Array, "R in"],
    weights: dict[str, Array],
    *,
    sizes: Int[Array, "E"],
    scale: float | None,
) -> Float[Array, "R out"]:
    """Multiplies rows with their experts' matrices, and `adapter_x` with the adapters."""
    y = jax.lax.ragged_dot(x, weights["kernel"].astype(x.dtype), sizes)
    if scale is not None:
        low = scale_in_float32(
            jax.lax.ragged_dot(adapter_x, weights["lora_a"].astype(x.dtype), sizes), scale
        )
        y += jax.lax.ragged_dot(low, weights["lora_b"].astype(x.dtype), sizes)
    return y


@jax.custom_vjp
def _permute(
    x: Float[Array, "R D"], order: Int[Array, "R"], inverse: Int[Array, "R"]
) -> Float[Array, "R D"]:
    """Permutes rows, and gradients by the `inverse` permutation, where autodiff would scatter."""
    return x[order]


_permute.defvjp(
    lambda x, order, inverse: (x[order], inverse),
    lambda inverse, gradient: (gradient[inverse], None, None),
)
