"""What mixes the tokens of a sequence in a layer: attention; for others see `recurrent`.

A mixer takes normed states, the layer's `Place`, keys of dropout, and its part of the cache when a
text is continued, which it returns filled. Dimension letters: `transformer`.
"""

import functools
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from tokalign_jax.models import remat as rematerialization
from tokalign_jax.models.attention import attend
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.lora import LoraSpec
from tokalign_jax.models.modules import Linear, Norm, apply, each, lows, split
from tokalign_jax.models.rotary import Rotation, rotate

_Item = TypeVar("_Item", bound=Hashable)


Cache = tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]
"""Keys and values of S positions, filled from the left."""


class Place(NamedTuple):
    """What a mixer needs to know of a layer's positions."""

    positions: Int[Array, "T"]
    by: Rotation
    window: Int[Array, ""] | int
    """Index of the layer's window among those of the model."""
    query_factor: Float[Array, "T"] | None
    """By position; None: 1."""
    used: Int[Array, ""] | int | None
    """Tokens that count where the cache is filled, the rest being padding; None: all."""


class Attention(nnx.Module):
    """Causal attention, in which N / K query heads share a key-value head."""

    def __init__(self, config: ModelConfig, lora: LoraSpec | None):
        self.config = config
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        project = functools.partial(Linear, bias=config.attention_bias, lora=lora)
        # Queries and keys are kept rotated, as attention reads them; where a norm comes before, as
        # the norm's gradient needs them.
        self.kept_turned = config.query_key_norm is None or config.rotate_before_norm
        projected = None if self.kept_turned else rematerialization.ATTENTION
        self.q_proj = project(config.hidden_size, queries, kept_as=projected)
        self.k_proj = project(config.hidden_size, keys, kept_as=projected)
        self.v_proj = project(config.hidden_size, keys, kept_as=None)
        self.gate_proj = project(config.hidden_size, queries) if config.attention_gate else None
        self.o_proj = Linear(queries, config.hidden_size, config.attention_out_bias, lora)
        self.q_norm = self._query_key_norm(config.num_heads)
        self.k_norm = self._query_key_norm(config.num_kv_heads)

    def __call__(
        self, x: Float[Array, "B T D"], place: Place, key: jax.Array | None, cache: Cache | None
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        in_key, out_key = split(key, 2)
        readers: Any = each(x, 4)
        reading = [self.q_proj, self.k_proj, self.v_proj]
        reading += [] if self.gate_proj is None else [self.gate_proj]
        low = lows(reading, readers[3], in_key)
        q, k, v = (
            self._clipped(project(states, in_key, part))
            for project, states, part in zip(reading, readers[:3], low)
        )
        q, k = self._placed(q, self.q_norm, place), self._placed(k, self.k_norm, place)
        v = self._heads(v)
        v = checkpoint_name(v, rematerialization.ATTENTION)
        if place.query_factor is not None:
            q = (q * place.query_factor[:, None, None]).astype(q.dtype)
        if cache is None:
            y = self._attend(q, k, v, place)
        else:
            k = jax.lax.dynamic_update_slice_in_dim(cache[0], k, place.positions[0], axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(cache[1], v, place.positions[0], axis=1)
            cache = k, v
            y = self._attend_cached(q, k, v, place)
        y = y.reshape(*x.shape[:2], -1)
        if self.gate_proj is not None:
            y = y * jax.nn.sigmoid(self.gate_proj(x, in_key, low[3]))
        return self.o_proj(y, out_key), cache

    @staticmethod
    def empty_cache(config: ModelConfig, batch: int, length: int) -> Any:
        """Shapes of the cache of a layer."""
        return ((batch, length, config.num_kv_heads, config.head_dim),) * 2

    def _clipped(self, x: Float[Array, "B T NH"]) -> Float[Array, "B T NH"]:
        clip = self.config.qkv_clip
        return x if clip is None else jnp.clip(x, -clip, clip)

    def _placed(
        self, x: Float[Array, "B T NH"], norm: Norm | None, place: Place
    ) -> Float[Array, "B T N H"]:
        """Queries or keys as attention reads them: in heads, normed and rotated."""
        if self.config.rotate_before_norm:
            rotated = self._rotated(self._heads(x), place)
            return apply(norm, rotated)
        if self.config.query_key_norm == "width":
            return self._rotated(self._heads(apply(norm, x)), place)
        return self._rotated(apply(norm, self._heads(x)), place)

    def _rotated(self, x: Float[Array, "B T N H"], place: Place) -> Float[Array, "B T N H"]:
        rotated = rotate(x, place.by)
        return (
            checkpoint_name(rotated, rematerialization.ATTENTION) if self.kept_turned else rotated
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

    def _heads(self, x: Float[Array, "B T NH"]) -> Float[Array, "B T N H"]:
        return x.reshape(*x.shape[:2], -1, self.config.head_dim)

    @property
    def _logits(self) -> dict[str, Any]:
        """How attention logits are made."""
        scale = self.config.attention_scale
        return {
            "scale": self.config.head_dim**-0.5 if scale is None else scale,
            "softcap": self.config.attention_softcap,
        }

    def _attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        place: Place,
    ) -> Float[Array, "B T N H"]:
        windows, _ = numbered([kind.window for kind in self.config.layer_kinds])
        # One branch per window, so that each is static, as fused kernels need it.
        branches = [functools.partial(attend, window=window, **self._logits) for window in windows]
        if isinstance(place.window, int) or len(branches) == 1:
            return branches[place.window if isinstance(place.window, int) else 0](q, k, v)
        return jax.lax.switch(place.window, branches, q, k, v)

    def _attend_cached(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
        place: Place,
    ) -> Float[Array, "B T N H"]:
        windows, _ = numbered([kind.window for kind in self.config.layer_kinds])
        window = jnp.array([window or k.shape[1] for window in windows])[place.window]
        distance = place.positions[:, None] - jnp.arange(k.shape[1])
        return attend(q, k, v, mask=(distance >= 0) & (distance < window), **self._logits)


def numbered(items: Sequence[_Item]) -> tuple[list[_Item], list[int]]:
    """The different items, and of each item its number among them."""
    different = list(dict.fromkeys(items))
    return different, [different.index(item) for item in items]
