"""Mixtures of experts that replace a feed-forward layer (arXiv 1701.06538).

Each token goes through a few of the experts, weighted by the router's probabilities, and through
the shared expert if there is one. All implementations are exact and without a capacity limit:

- blocks: the tokens are sorted by expert and padded to blocks of rows of one expert each, which a
  batched product multiplies with a copy of that expert's matrix, on each device for its own tokens.
  At most E blocks are padding, however tokens are routed. For GPUs, where XLA (jaxlib 0.11) has no
  kernel for `ragged_dot` but expands it to the product of every row with every expert.
- ragged: the same sorted rows in grouped products (`jax.lax.ragged_dot`). For TPUs.
- dense: all experts compute all tokens, with weight zero where a token is not routed, at E /
  per_token times the arithmetic.

Dimensions: see `transformer`; P pairs of a token and a chosen expert, R rows (a row for each pair,
and padding), S blocks of C rows.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

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
from tokalign_jax.utils import compiling


class ExpertLinear(nnx.Module):
    """Linear maps of all experts, with their adapters."""

    def __init__(
        self,
        experts: int,
        inputs: int,
        outputs: int,
        bias: bool,
        lora: LoraSpec | None,
        summed: bool = False,
    ):
        """Declares the parameters.

        Args:
          experts: E.
          inputs: input size.
          outputs: output size.
          bias: adds biases.
          lora: adds adapters.
          summed: `dense` sums over the experts; biases are then left to the caller.
        """
        self.kernel = param(experts, inputs, outputs)
        self.bias = param(experts, outputs) if bias else None
        self.summed = summed
        self.lora = lora
        if lora:
            self.lora_a = param(experts, inputs, lora.rank)
            self.lora_b = param(experts, lora.rank, outputs)

    def dense(
        self, x: Float[Array, "*E B T in"], key: jax.Array | None
    ) -> Float[Array, "*E B T out"]:
        """Computes y[e] = x[e] W[e] + b[e], or x W[e] + b[e] if `x` is shared by all experts."""
        inputs, outputs = "ebti" if x.ndim == 4 else "bti", "bto" if self.summed else "ebto"
        y = jnp.einsum(f"{inputs},eio->{outputs}", x, self.kernel.astype(x.dtype))
        if self.lora:
            x = dropout(x, self.lora.dropout, key)
            low = scale_in_float32(
                jnp.einsum(f"{inputs},eio->ebto", x, self.lora_a.astype(x.dtype)), self.lora.scale
            )
            y += jnp.einsum(f"ebti,eio->{outputs}", low, self.lora_b.astype(x.dtype))
        if self.bias is None or self.summed:
            return y
        # In float32, in which the gradient is then summed over the tokens.
        biases = self.bias.astype(jnp.float32)[:, None, None]
        return (y.astype(jnp.float32) + biases).astype(y.dtype)

    def weights(self) -> dict[str, Array]:
        """Returns the arrays that `_product` needs."""
        names = ("kernel", "lora_a", "lora_b") if self.lora else ("kernel",)
        names += ("bias",) if self.bias is not None and not self.summed else ()
        return {name: getattr(self, name)[...] for name in names}


class ExpertMLP(nnx.Module):
    """Gated feed-forward layers of all experts, weighted for each token and summed."""

    def __init__(self, config: ModelConfig, experts: Experts, lora: LoraSpec | None):
        self.activation = config.activation
        self.settings = experts
        self.lora = lora
        self.count = experts.count
        linear = functools.partial(ExpertLinear, experts.count, bias=experts.bias, lora=lora)
        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size, summed=True)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        chosen: Int[Array, "B T k"],
        weights: Float[Array, "B T k"],
        key: jax.Array | None,
    ) -> Float[Array, "B T D"]:
        """Applies the chosen experts of each token and sums their results by `weights`."""
        one_hot = jax.nn.one_hot(chosen, self.count, dtype=jnp.float32)
        by_expert = jnp.einsum("btk,btke->bte", weights, one_hot)
        if implementation(self.settings) == "dense":
            y = self.dense(x, by_expert, key)
        else:
            y = self.sparse(x, chosen, weights, key)
        if self.down_proj.bias is None:
            return y
        biases = self.down_proj.bias.astype(x.dtype)
        return y + jnp.einsum("bte,ed->btd", by_expert.astype(x.dtype), biases)

    def _gated(
        self, gate: Float[Array, "*R F"], up: Float[Array, "*R F"], weights: Float[Array, "*R 1"]
    ) -> Float[Array, "*R F"]:
        """Returns the weighted input of the last projection, in the dtype of `weights`."""
        if self.settings.weighted_inputs:  # Which the first projections pass on.
            return self._activated(gate * weights, up * weights)
        return self._activated(gate, up) * weights

    def _activated(self, gate: Float[Array, "*R F"], up: Float[Array, "*R F"]) -> Array:
        clamped = self.settings.clamped
        if clamped is None:
            return ACTIVATIONS[self.activation](gate) * up
        gate = jnp.minimum(gate, clamped.limit)
        up = jnp.clip(up, -clamped.limit, clamped.limit)
        return gate * jax.nn.sigmoid(clamped.alpha * gate) * (up + 1)

    def dense(
        self, x: Float[Array, "B T D"], weights: Float[Array, "B T E"], key: jax.Array | None
    ) -> Float[Array, "B T D"]:
        """Applies all experts to all tokens, but for the biases of `down_proj`."""
        in_key, out_key = split_keys(key, 2)
        gate, up = self.gate_proj.dense(x, in_key), self.up_proj.dense(x, in_key)
        # Weighted before the last product, which sums over experts, so that [E, B, T, D] is never
        # materialized; in the dtype of the weights, so that their gradient is summed in it.
        y = self._gated(gate, up, jnp.moveaxis(weights, -1, 0)[..., None])
        return self.down_proj.dense(y.astype(x.dtype), out_key)

    def sparse(
        self,
        x: Float[Array, "B T D"],
        chosen: Int[Array, "B T k"],
        weights: Float[Array, "B T k"],
        key: jax.Array | None,
    ) -> Float[Array, "B T D"]:
        """Computes the same as `dense`, on each device for its own tokens.

        The experts' matrices are gathered over `fsdp` and split over `tensor` by their width.
        """
        in_key, out_key = split_keys(key, 2)
        rate = self.lora.dropout if self.lora else 0.0
        projections = {
            name: getattr(self, name).weights() for name in ("gate_proj", "up_proj", "down_proj")
        }
        group = _sorted_rows if implementation(self.settings) == "ragged" else _blocks
        compute = functools.partial(self._grouped, group=group, rate=rate)
        adapter_x = dropout(x, rate, in_key) if rate and in_key is not None else None
        arguments = (x, adapter_x, chosen, weights, out_key, projections)
        mesh = sharding.current()
        if mesh is None:
            return compute(*arguments, axis=None)
        batch = sharding.BATCH if len(x) % sharding.sequences_at_once(mesh) == 0 else None
        token_axes = tuple(name for name in batch or () if name not in mesh.manual_axes)
        axis = sharding.TENSOR
        if self.gate_proj.kernel.shape[-1] % mesh.shape[axis]:
            axis = None
        tokens, replicated = PartitionSpec(batch), PartitionSpec()
        inputs = {"kernel": PartitionSpec(None, None, axis), "lora_a": replicated}
        inputs["lora_b"] = inputs["kernel"]
        inputs["bias"] = PartitionSpec(None, axis)
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
            functools.partial(compute, axis=axis, token_axes=token_axes),
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
        group: "Callable[..., _Rows]",
        rate: float,
        axis: str | None,
        token_axes: tuple[str, ...] = (),
    ) -> Float[Array, "B T D"]:
        """Computes `sparse` on one device, which under a mesh axis holds a part of the width.

        Args:
          x: tokens.
          adapter_x: the adapters' input after dropout, or None if it is `x`.
          chosen: experts of each token.
          weights: weights of these experts.
          key: dropout key of each sequence.
          projections: the arrays of each projection.
          group: groups the pairs of token and expert (`_sorted_rows` or `_blocks`).
          rate: dropout rate.
          axis: the mesh axis that splits the width.
          token_axes: the mesh axes that split the tokens, over which gradients of the projections
            are summed.
        """
        *batch, width = x.shape
        if token_axes:
            projections = jax.lax.pcast(projections, token_axes, to="varying")
        rows = group(chosen.reshape(-1), self.count)
        product = functools.partial(_product, rows=rows, scale=self.lora and self.lora.scale)

        def gather(tokens: Float[Array, "B T D"]) -> Float[Array, "R D"]:
            return _token_rows(tokens.reshape(-1, width), rows.pair, rows.row, chosen.shape[-1])

        x_rows = gather(x)
        adapter_rows = x_rows if adapter_x is None else gather(adapter_x)
        gate = product(x_rows, adapter_rows, projections["gate_proj"])
        up = product(x_rows, adapter_rows, projections["up_proj"])
        row_weights = _take(weights.reshape(-1, 1), rows.pair, rows.row)
        y = self._gated(gate, up, row_weights).astype(x.dtype)
        adapter_rows = y
        if adapter_x is not None and key is not None:
            keep = self._keep_mask(y, key, chosen, rows.pair, rate, axis)
            adapter_rows = jnp.where(keep, scale_in_float32(y, 1 / (1 - rate)), 0)
        out = product(y, adapter_rows, projections["down_proj"])
        out = _take(out, rows.row, rows.pair).reshape(*batch, -1, width)
        total = out.astype(jnp.float32).sum(-2)
        total = total if axis is None else jax.lax.psum(total, axis)
        return total.astype(x.dtype)

    def _keep_mask(
        self,
        y: Float[Array, "R F"],
        key: jax.Array,
        chosen: Int[Array, "B T k"],
        pair: Int[Array, "R"],
        rate: float,
        axis: str | None,
    ) -> Array:
        """Returns the rows' dropout mask, equal to that of `dense`."""
        _, length, choices = chosen.shape
        pair = jnp.minimum(pair, chosen.size - 1)  # Padding is zero whatever its mask.
        token = pair // choices
        parts = 1 if axis is None else jax.lax.axis_size(axis)
        first = 0 if axis is None else jax.lax.axis_index(axis) * y.shape[-1]
        row = chosen.reshape(-1)[pair] * length + token % length
        index = row[:, None] * (y.shape[-1] * parts) + first + jnp.arange(y.shape[-1])
        mask = functools.partial(dropout_mask, rate=rate)
        return jax.vmap(mask)(index.astype(jnp.uint32), key[token // length])


class MixtureOfExperts(nnx.Module):
    """Router, experts, and optionally a shared expert that all tokens go through."""

    def __init__(self, config: ModelConfig, experts: Experts, lora: LoraSpec | None):
        self.settings = experts
        self.router = Linear(config.hidden_size, experts.count, bias=experts.bias, lora=None)
        self.selection_bias = param(experts.count) if experts.selection_bias else None
        self.experts = ExpertMLP(config, experts, lora)
        self.shared = MLP(config, lora, experts.shared_size) if experts.shared_size else None
        self.shared_gate = (
            Linear(config.hidden_size, 1, bias=False, lora=None) if experts.shared_gate else None
        )

    def __call__(self, x: Float[Array, "B T D"], key: jax.Array | None) -> Float[Array, "B T D"]:
        """Applies the mixture; `key` is for dropout in the adapters."""
        key, shared_key = split_keys(key, 2) if self.shared else (key, None)
        chosen, weights = self._route(x)
        y = self.experts(x, chosen, weights, key)
        if self.shared is None:
            return y
        shared = self.shared(x, shared_key)
        if self.shared_gate is not None:
            gate = jax.nn.sigmoid(self.shared_gate(x, None).astype(jnp.float32))
            shared = (gate * shared).astype(x.dtype)
        return y + shared

    def _route(self, x: Float[Array, "B T D"]) -> tuple[Int[Array, "B T k"], Float[Array, "B T k"]]:
        """Returns the experts of each token and their weights, in float32."""
        settings = self.settings
        logits = self.router(x.astype(jnp.float32), None)
        scores = {"sigmoid": jax.nn.sigmoid, "softmax": jax.nn.softmax}[settings.score](logits)
        if self.selection_bias is None:
            weights, chosen = jax.lax.top_k(scores, settings.per_token)
        else:
            biased = scores + self.selection_bias.astype(jnp.float32)
            _, chosen = jax.lax.top_k(jax.lax.stop_gradient(biased), settings.per_token)
            weights = jnp.take_along_axis(scores, chosen, axis=-1)
        if settings.normalized:
            weights /= weights.sum(-1, keepdims=True) + settings.normalization_epsilon
        if settings.weight_scale != 1:
            weights *= settings.weight_scale
        return chosen, weights


def implementation(experts: Experts) -> str:
    """Returns how `experts` are computed on the default backend: dense, blocks or ragged."""
    backend = jax.default_backend()
    match experts.computed:
        case "auto" if backend == "cpu":
            return "dense"
        case "auto" | "sparse":
            return "ragged" if backend == "tpu" else "blocks"
        case chosen:
            return chosen


# --- Rows grouped by expert ---------------------------------------------------------------------


class _Rows(NamedTuple):
    """Pairs of token and expert in rows grouped by expert."""

    pair: Int[Array, "R"]
    """The pair in each row; P for padding."""
    row: Int[Array, "P"]
    """The row of each pair."""
    expert: Int[Array, "R"]
    """The expert of each row."""
    multiply: Callable[[Float[Array, "R in"], Float[Array, "E in out"]], Float[Array, "R out"]]
    """Multiplies each row with its expert's matrix."""


def _sorted_rows(chosen: Int[Array, "P"], experts: int) -> _Rows:
    """Sorts the pairs by expert, without padding."""
    order = jnp.argsort(chosen, stable=True)
    sizes = jnp.bincount(chosen, length=experts).astype(jnp.int32)

    def multiply(x: Float[Array, "R in"], kernel: Float[Array, "E in out"]) -> Array:
        return jax.lax.ragged_dot(x, kernel, sizes)

    return _Rows(order, jnp.argsort(order), chosen[order], multiply)


def _blocks(chosen: Int[Array, "P"], experts: int) -> _Rows:
    """Sorts the pairs by expert and pads each expert's rows to whole blocks."""
    pairs = len(chosen)
    size = block_size(pairs, experts)
    blocks = (pairs + experts * (size - 1)) // size  # As many as any routing can need.
    order = jnp.argsort(chosen, stable=True)
    sizes = jnp.bincount(chosen, length=experts)
    block_ends = jnp.cumsum(-(-sizes // size))
    first_rows = size * (block_ends - -(-sizes // size))
    first_pairs = jnp.cumsum(sizes) - sizes
    grouped = chosen[order]
    sorted_rows = first_rows[grouped] + jnp.arange(pairs) - first_pairs[grouped]
    pair = jnp.full(blocks * size, pairs).at[sorted_rows].set(order)
    # The last blocks may be empty; any expert will do for them.
    past = jnp.arange(blocks)[:, None] >= block_ends[:-1]
    expert = past.sum(-1)

    def multiply(x: Float[Array, "R in"], kernel: Float[Array, "E in out"]) -> Array:
        y = jnp.einsum("sci,sio->sco", x.reshape(blocks, size, -1), _select(kernel, expert))
        return y.reshape(blocks * size, -1)

    return _Rows(pair, sorted_rows[jnp.argsort(order)], jnp.repeat(expert, size), multiply)


MAX_BLOCK = 512
"""Largest number of rows of a block; beyond it copies of matrices cost little beside products."""


def block_size(pairs: int, experts: int) -> int:
    """Returns the number of rows of a block: about half of an expert's, a power of two.

    Smaller blocks have less padding, larger ones fewer copies of the experts' matrices.
    """
    return min(MAX_BLOCK, 1 << max(3, (pairs // (2 * experts)).bit_length() - 1))


@jax.custom_vjp
def _select(array: Float[Array, "E ..."], expert: Int[Array, "S"]) -> Float[Array, "S ..."]:
    """Returns `array[expert]`; a product sums its gradient, where autodiff would scatter."""
    return array[expert]


def _select_backward(
    residuals: tuple[Array, int], gradient: Float[Array, "S in out"]
) -> tuple[Array, None]:
    expert, experts = residuals
    one_hot = jax.nn.one_hot(expert, experts, dtype=gradient.dtype)
    # Backward passes are traced outside of the context of the forward pass.
    with compiling.products(gradient.dtype):
        return jnp.einsum("se,s...->e...", one_hot, gradient), None


_select.defvjp(
    lambda array, expert: (_select(array, expert), (expert, len(array))), _select_backward
)


def _product(
    x: Float[Array, "R in"],
    adapter_x: Float[Array, "R in"],
    weights: dict[str, Array],
    *,
    rows: _Rows,
    scale: float | None,
) -> Float[Array, "R out"]:
    """Applies their experts' maps to rows, the adapters to `adapter_x`."""
    y = rows.multiply(x, weights["kernel"].astype(x.dtype))
    if scale is not None:
        low = rows.multiply(adapter_x, weights["lora_a"].astype(x.dtype))
        y += rows.multiply(scale_in_float32(low, scale), weights["lora_b"].astype(x.dtype))
    if "bias" in weights:
        y += _select(weights["bias"].astype(x.dtype), rows.expert)
    return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _token_rows(
    tokens: Float[Array, "M D"], pair: Int[Array, "R"], row: Int[Array, "P"], choices: int
) -> Float[Array, "R D"]:
    """Returns the token of each row's pair, zero for padding.

    The gradient sums a token's rows in float32, where autodiff would scatter.
    """
    return tokens.at[pair // choices].get(mode="fill", fill_value=0)


def _token_rows_backward(
    choices: int, row: Int[Array, "P"], gradient: Float[Array, "R D"]
) -> tuple[Array, None, None]:
    by_token = gradient[row].reshape(-1, choices, gradient.shape[-1])
    return by_token.astype(jnp.float32).sum(1).astype(gradient.dtype), None, None


_token_rows.defvjp(
    lambda tokens, pair, row, choices: (_token_rows(tokens, pair, row, choices), row),
    _token_rows_backward,
)


@jax.custom_vjp
def _take(x: Float[Array, "N D"], index: Int[Array, "M"], inverse: Int[Array, "N"]) -> Array:
    """Returns `x[index]`, zero where the index is past the end.

    `inverse` are the indices of x in the result, which gather the gradient where autodiff would
    scatter.
    """
    return x.at[index].get(mode="fill", fill_value=0)


_take.defvjp(
    lambda x, index, inverse: (_take(x, index, inverse), inverse),
    lambda inverse, gradient: (
        gradient.at[inverse].get(mode="fill", fill_value=0),
        None,
        None,
    ),
)
