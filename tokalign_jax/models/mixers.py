"""Token mixers of the layers: attention here, others in `recurrent`.

A mixer takes normed states, a `LayerContext`, dropout keys and, when a text is continued, its part
of the cache, which it returns updated. Dimensions: see `transformer`.
"""

import dataclasses
import functools
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from tokalign_jax.models import remat as rematerialization
from tokalign_jax.models.attention import attend
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.lora import LoraSpec
from tokalign_jax.models.modules import (
    Linear,
    Norm,
    fan_out,
    lora_down,
    param,
    split_keys,
)
from tokalign_jax.models.rotary import Rotation, rotate

_Item = TypeVar("_Item", bound=Hashable)


Cache = tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]
"""Keys and values of S positions, filled from the left."""


class LayerContext(NamedTuple):
    """Position-dependent inputs of a mixer."""

    positions: Int[Array, "T"]
    cos_sin: Rotation
    span: Int[Array, ""] | int
    """Index of the layer's window and chunk among those of the model (`spans`)."""
    query_factor: Float[Array, "T"] | None
    """Factor of the queries by position; None for 1."""
    query_key_norm: Bool[Array, ""] | bool
    """The layer has the norms of queries and keys."""
    num_valid: Int[Array, ""] | int | None
    """Number of tokens that are not padding when the cache is filled; None for all."""


class Attention(nnx.Module):
    """Causal attention with grouped query heads: N / K of them share a key-value head."""

    def __init__(self, config: ModelConfig, lora: LoraSpec | None):
        self.config = config
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        project = functools.partial(Linear, bias=config.attention_bias, lora=lora)
        # Rotated queries and keys are saved for attention's gradient; if a norm comes before the
        # rotation, the norm's gradient needs the projections instead.
        self.save_rotated = config.query_key_norm is None or config.rotate_before_norm
        projected = None if self.save_rotated else rematerialization.ATTENTION
        self.q_proj = project(config.hidden_size, queries, remat_name=projected)
        self.k_proj = project(config.hidden_size, keys, remat_name=projected)
        self.v_proj = project(config.hidden_size, keys, remat_name=None)
        self.sinks = param(config.num_heads) if config.attention_sinks else None
        self.gate_proj = project(config.hidden_size, queries) if config.attention_gate else None
        self.o_proj = Linear(queries, config.hidden_size, config.attention_out_bias, lora)
        self.q_norm = self._query_key_norm(config.num_heads)
        self.k_norm = self._query_key_norm(config.num_kv_heads)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: LayerContext,
        key: jax.Array | None,
        cache: Cache | None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Attends to `x` and the cache; returns the result and the updated cache."""
        in_key, out_key = split_keys(key, 2)
        copies: Any = fan_out(x, 4)
        readers = [self.q_proj, self.k_proj, self.v_proj]
        readers += [] if self.gate_proj is None else [self.gate_proj]
        low = lora_down(readers, copies[3], in_key)
        q, k, v = (
            self._clipped(project(states, in_key, part))
            for project, states, part in zip(readers, copies[:3], low)
        )
        q, k = (
            self._normed_and_rotated(q, self.q_norm, context),
            self._normed_and_rotated(k, self.k_norm, context),
        )
        v = self._heads(v)
        v = checkpoint_name(v, rematerialization.ATTENTION)
        if context.query_factor is not None:
            q = (q * context.query_factor[:, None, None]).astype(q.dtype)
        if cache is None:
            y = self._attend(q, k, v, context)
        else:
            k = jax.lax.dynamic_update_slice_in_dim(cache[0], k, context.positions[0], axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(cache[1], v, context.positions[0], axis=1)
            cache = k, v
            y = self._attend_cached(q, k, v, context)
        y = y.reshape(*x.shape[:2], -1)
        if self.gate_proj is not None:
            y = y * jax.nn.sigmoid(self.gate_proj(x, in_key, low[3]))
        return self.o_proj(y, out_key), cache

    @staticmethod
    def empty_cache(config: ModelConfig, batch: int, length: int) -> Any:
        """Returns the shapes of a layer's cache."""
        return ((batch, length, config.num_kv_heads, config.head_dim),) * 2

    def _clipped(self, x: Float[Array, "B T NH"]) -> Float[Array, "B T NH"]:
        clip = self.config.qkv_clip
        return x if clip is None else jnp.clip(x, -clip, clip)

    def _normed_and_rotated(
        self, x: Float[Array, "B T NH"], norm: Norm | None, context: LayerContext
    ) -> Float[Array, "B T N H"]:
        """Splits queries or keys into heads, then applies their norm and rotation."""
        if self.config.rotate_before_norm:
            rotated = self._rotated(self._heads(x), context)
            return self._normed(rotated, norm, context)
        if self.config.query_key_norm == "width":
            return self._rotated(self._heads(self._normed(x, norm, context)), context)
        return self._rotated(self._normed(self._heads(x), norm, context), context)

    def _normed(self, x: Array, norm: Norm | None, context: LayerContext) -> Array:
        if norm is None or context.query_key_norm is False:
            return x
        return (
            norm(x)
            if context.query_key_norm is True
            else jnp.where(context.query_key_norm, norm(x), x)
        )

    def _rotated(
        self, x: Float[Array, "B T N H"], context: LayerContext
    ) -> Float[Array, "B T N H"]:
        rotated = rotate(x, context.cos_sin)
        return (
            checkpoint_name(rotated, rematerialization.ATTENTION) if self.save_rotated else rotated
        )

    def _query_key_norm(self, heads: int) -> Norm | None:
        size = self.config.head_dim
        match self.config.query_key_norm:
            case None:
                return None
            case "head":
                return Norm(self.config, size)
            case "each_head":
                return Norm(self.config, heads, size)
            case "width":
                return Norm(self.config, heads * size)
            case "unscaled":
                return Norm(dataclasses.replace(self.config, norm_scale=False), size)

    def _heads(self, x: Float[Array, "B T NH"]) -> Float[Array, "B T N H"]:
        return x.reshape(*x.shape[:2], -1, self.config.head_dim)

    @property
    def _logit_options(self) -> dict[str, Any]:
        """Options of `attend` that define the logits."""
        scale = self.config.attention_scale
        return {
            "scale": self.config.head_dim**-0.5 if scale is None else scale,
            "softcap": self.config.attention_softcap,
            "sinks": None if self.sinks is None else self.sinks[...],
        }

    def _attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        context: LayerContext,
    ) -> Float[Array, "B T N H"]:
        # One branch per span, since fused kernels need a static window.
        branches = [
            functools.partial(attend, window=window, chunk=chunk, **self._logit_options)
            for window, chunk in spans(self.config)[0]
        ]
        if isinstance(context.span, int) or len(branches) == 1:
            return branches[context.span if isinstance(context.span, int) else 0](q, k, v)
        return jax.lax.switch(context.span, branches, q, k, v)

    def _attend_cached(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
        context: LayerContext,
    ) -> Float[Array, "B T N H"]:
        length, keys = k.shape[1], jnp.arange(k.shape[1])
        window, chunk = jnp.array(
            [[size or length for size in span] for span in spans(self.config)[0]]
        )[context.span]
        queries = context.positions[:, None]
        distance = queries - keys
        mask = (distance >= 0) & (distance < window) & (queries // chunk == keys // chunk)
        return attend(q, k, v, mask=mask, **self._logit_options)


def spans(config: ModelConfig) -> tuple[list[tuple[int | None, int | None]], list[int]]:
    """Returns the model's distinct pairs of window and chunk, and each layer's index of them."""
    return unique_with_indices([(kind.window, kind.chunk) for kind in config.layer_kinds])


def unique_with_indices(items: Sequence[_Item]) -> tuple[list[_Item], list[int]]:
    """Returns the distinct items, and the index of each item among them."""
    distinct = list(dict.fromkeys(items))
    return distinct, [distinct.index(item) for item in items]
