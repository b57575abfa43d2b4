"""A decoder-only transformer: defined in Flax NNX, run as pure functions of a plain nested dict of arrays.

Dimension letters, here and in the rest of the package: B batch, T length, D model, V vocabulary, N heads, K key-value
heads, H head size, L layers, F intermediate, E experts.

The modules declare which parameters exist (`abstract_params`) and what is computed from them (`forward`); arrays are in
them for the length of a call. All leaves under `layers` are stacked over L, and one compiled layer body is scanned over
them. Layers may differ in window and rotary embedding: the scan hands each the numbers of its own among the few that the
model has. Activations have the `dtype` of the caller, to which each layer casts its own weights; norms, rotary embedding,
softmax and routing are computed in float32.
"""

import functools
import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt32

from tokalign_jax.errors import UserError
from tokalign_jax.models import remat as rematerialization
from tokalign_jax.models.attention import attend
from tokalign_jax.models.config import Experts, ModelConfig, QueryGrowth
from tokalign_jax.models.lora import LoraSpec
from tokalign_jax.models.rotary import Length, Rotation, rotate, rotation
from tokalign_jax.parallel import sharding
from tokalign_jax.utils import compiling, paths

Params = dict[str, Any]
"""A nested dict of arrays; docs/architecture.md lists the paths."""

Cache = tuple[Float[Array, "*L B S K H"], Float[Array, "*L B S K H"]]
"""Keys and values of S positions, filled from the left; of all layers, or inside one without L."""

UNROLLED = 32
"""Layers up to which the loop over them is unrolled by default, where that pays: compilation takes longer by as much."""

_Item = TypeVar("_Item", bound=Hashable)


def _gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x Phi(x), in float32 inside. By erf: erfc, which jax.nn.gelu takes, is several times the arithmetic and no memory less."""
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


_ACTIVATIONS = {
    "gelu": _gelu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
}


# --- The definition ---------------------------------------------------------------------------------------------------


class Linear(nnx.Module):
    """y = x W + b, and with adapters + (alpha / rank) dropout(x) A B."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        bias: bool,
        lora: LoraSpec | None,
        kept_as: str | None = rematerialization.PROJECTED,
    ):
        """`kept_as`: what policies that keep x W for the backward pass call it; None: no policy keeps it.

        It is kept before the bias is added: the product is then free of it, and on a GPU one without a bias takes its weights
        from the stack of all layers where they are, while one with it needs a copy of them.
        """
        self.kernel = _param(inputs, outputs)
        self.bias = _param(outputs) if bias else None
        self.lora = lora
        self.kept_as = kept_as
        if lora:
            self.lora_a = _param(inputs, lora.rank)
            self.lora_b = _param(lora.rank, outputs)

    def __call__(self, x: Float[Array, "B T in"], key: jax.Array | None) -> Float[Array, "B T out"]:
        y = x @ self.kernel.astype(x.dtype)
        if self.lora:
            dropped = _dropout(x, self.lora.dropout, key)
            # The factor where there are few numbers: in the rank.
            low = _scaled(dropped @ self.lora_a.astype(x.dtype), self.lora.scale)
            y += low @ self.lora_b.astype(x.dtype)
        y = y if self.kept_as is None else checkpoint_name(y, self.kept_as)
        return y if self.bias is None else _plus(y, self.bias)


@jax.custom_vjp
def _plus(x: Float[Array, "*B N"], added: Float[Array, "*A N"]) -> Float[Array, "*B N"]:
    """x + a in the type of x; the gradient of a, which has the last axes of x, is summed over the others in float32.

    Autodiff sums it in the type of x, and one after the other a sum in bfloat16 grows no more once it is some hundred times its
    terms. XLA for NVIDIA sums in a tree, with a relative error of 5e-3 over 16,384 tokens, on its way through what comes before:
    left so, as a sum in float32 would be a pass of its own over memory.
    """
    return x + added.astype(x.dtype)


def _plus_forward(x: jax.Array, added: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _plus(x, added), added


def _plus_backward(added: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    axes, wide = (
        tuple(range(gradient.ndim - added.ndim)),
        jnp.promote_types(gradient.dtype, jnp.float32),
    )
    summed = jax.lax.platform_dependent(
        gradient,
        cuda=lambda gradient: jax.lax.reduce_sum(gradient, axes).astype(wide),
        default=lambda gradient: gradient.sum(axes, dtype=wide),
    )
    return gradient, summed.astype(added.dtype)


_plus.defvjp(_plus_forward, _plus_backward)


class Norm(nnx.Module):
    """Layer norm (mean removed) or RMS norm over the last axis."""

    def __init__(self, config: ModelConfig, *shape: int, bias: bool = False, gain: float = 1.0):
        """`shape`: of the scale; `gain`: one more factor of the result."""
        self.config = config
        self.gain = gain
        self.scale = _param(*shape) if config.norm_scale else None
        self.bias = _param(*shape) if bias else None

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        if self.scale is None:
            scale = jnp.full(x.shape[-1:], self.gain, jnp.float32)
        else:
            scale = self.gain * (
                self.scale.astype(jnp.float32) + (1.0 if self.config.norm_plus_one else 0.0)
            )
        bias = None if self.bias is None else self.gain * self.bias.astype(jnp.float32)
        return _normed(x, scale, bias, self.config.norm == "layer", self.config.norm_epsilon)


class Place(NamedTuple):
    """Where a layer's attention looks from and how far."""

    positions: Int[Array, "T"]
    by: Rotation
    window: Int[Array, ""] | int
    """Number of the layer's window among those of the model."""
    query_factor: Float[Array, "T"] | None
    """By position; None: 1."""


class Attention(nnx.Module):
    """Causal attention, in which N / K query heads share a key-value head."""

    def __init__(self, config: ModelConfig, lora: LoraSpec | None):
        self.config = config
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        project = functools.partial(Linear, bias=config.attention_bias, lora=lora)
        # Queries and keys are kept as attention reads them, turned; but where a norm comes before, as its gradient needs them.
        self.kept_turned = config.query_key_norm is None or config.rotate_before_norm
        projected = None if self.kept_turned else rematerialization.ATTENTION
        self.q_proj = project(config.hidden_size, queries, kept_as=projected)
        self.k_proj = project(config.hidden_size, keys, kept_as=projected)
        self.v_proj = project(config.hidden_size, keys, kept_as=None)
        self.o_proj = Linear(queries, config.hidden_size, config.attention_out_bias, lora)
        self.q_norm = self._query_key_norm(config.num_heads)
        self.k_norm = self._query_key_norm(config.num_kv_heads)

    def __call__(
        self, x: Float[Array, "B T D"], place: Place, key: jax.Array | None, cache: Cache | None
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        in_key, out_key = _split(key, 2)
        readers: Any = _each(x, 3)
        for_q, for_k, for_v = readers
        q = self._placed(self._clipped(self.q_proj(for_q, in_key)), self.q_norm, place)
        k = self._placed(self._clipped(self.k_proj(for_k, in_key)), self.k_norm, place)
        v = self._heads(self._clipped(self.v_proj(for_v, in_key)))
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
        return self.o_proj(y.reshape(*x.shape[:2], -1), out_key), cache

    def _clipped(self, x: Float[Array, "B T NH"]) -> Float[Array, "B T NH"]:
        clip = self.config.qkv_clip
        return x if clip is None else jnp.clip(x, -clip, clip)

    def _placed(
        self, x: Float[Array, "B T NH"], norm: Norm | None, place: Place
    ) -> Float[Array, "B T N H"]:
        """Queries or keys as attention reads them: in heads, normed and rotated."""
        if self.config.rotate_before_norm:
            rotated = self._rotated(self._heads(x), place)
            return _apply(norm, rotated)
        if self.config.query_key_norm == "width":
            return self._rotated(self._heads(_apply(norm, x)), place)
        return self._rotated(_apply(norm, self._heads(x)), place)

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
        windows, _ = _numbered([kind.window for kind in self.config.layer_kinds])
        # One branch a window, so that each knows its own when it is compiled, as fused kernels must.
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
        windows, _ = _numbered([kind.window for kind in self.config.layer_kinds])
        window = jnp.array([window or k.shape[1] for window in windows])[place.window]
        distance = place.positions[:, None] - jnp.arange(k.shape[1])
        return attend(q, k, v, mask=(distance >= 0) & (distance < window), **self._logits)


class XIELU(nnx.Module):
    """xIELU (arXiv 2411.13010), computed in float32; `beta` and `epsilon` are constants."""

    def __init__(self):
        self.alpha_positive, self.alpha_negative = _param(1), _param(1)
        self.beta, self.epsilon = _param(), _param()

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        wide = x.astype(jnp.float32)
        beta, epsilon = (
            jax.lax.stop_gradient(leaf.astype(jnp.float32)) for leaf in (self.beta, self.epsilon)
        )
        positive = jax.nn.softplus(self.alpha_positive.astype(jnp.float32))
        negative = beta + jax.nn.softplus(self.alpha_negative.astype(jnp.float32))
        below = (jnp.expm1(jnp.minimum(wide, epsilon)) - wide) * negative
        y = jnp.where(wide > 0, positive * jnp.square(wide), below) + beta * wide
        return y.astype(x.dtype)


class MLP(nnx.Module):
    """down(activation(up(x))), or gated: down(activation(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, lora: LoraSpec | None):
        self.activation = config.activation
        self.xielu = XIELU() if config.activation == "xielu" else None
        self.gate_proj = (
            Linear(config.hidden_size, config.intermediate_size, config.mlp_bias, lora)
            if config.gated_mlp
            else None
        )
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, config.mlp_bias, lora)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, config.mlp_bias, lora)

    def __call__(self, x: Float[Array, "B T D"], key: jax.Array | None) -> Float[Array, "B T D"]:
        in_key, out_key = _split(key, 2)
        activation: Any = self.xielu or _ACTIVATIONS[self.activation]
        y = self.up_proj(x, in_key)
        y = activation(y) if self.gate_proj is None else activation(self.gate_proj(x, in_key)) * y
        return self.down_proj(y, out_key)


class ExpertLinear(nnx.Module):
    """The linear maps of all experts, with their adapters: y[e] = x[e] W[e], or summed over the experts."""

    def __init__(
        self, experts: int, inputs: int, outputs: int, lora: LoraSpec | None, summed: bool = False
    ):
        self.kernel = _param(experts, inputs, outputs)
        self.outputs = "bto" if summed else "ebto"
        self.lora = lora
        if lora:
            self.lora_a = _param(experts, inputs, lora.rank)
            self.lora_b = _param(experts, lora.rank, outputs)

    def __call__(
        self, x: Float[Array, "*E B T in"], key: jax.Array | None
    ) -> Float[Array, "*E B T out"]:
        inputs = "ebti" if x.ndim == 4 else "bti"
        y = jnp.einsum(f"{inputs},eio->{self.outputs}", x, self.kernel.astype(x.dtype))
        if self.lora:
            x = _dropout(x, self.lora.dropout, key)
            low = _scaled(
                jnp.einsum(f"{inputs},eio->ebto", x, self.lora_a.astype(x.dtype)), self.lora.scale
            )
            y += jnp.einsum(f"ebti,eio->{self.outputs}", low, self.lora_b.astype(x.dtype))
        return y


class ExpertMLP(nnx.Module):
    """The gated feed-forward layers of all experts, weighted for each token and summed."""

    def __init__(self, config: ModelConfig, count: int, lora: LoraSpec | None):
        self.activation = config.activation
        self.gate_proj = ExpertLinear(count, config.hidden_size, config.intermediate_size, lora)
        self.up_proj = ExpertLinear(count, config.hidden_size, config.intermediate_size, lora)
        self.down_proj = ExpertLinear(
            count, config.intermediate_size, config.hidden_size, lora, summed=True
        )

    def __call__(
        self, x: Float[Array, "B T D"], weights: Float[Array, "B T E"], key: jax.Array | None
    ) -> Float[Array, "B T D"]:
        in_key, out_key = _split(key, 2)
        y = _ACTIVATIONS[self.activation](self.gate_proj(x, in_key)) * self.up_proj(x, in_key)
        # Weighted before the last product, so that it sums over experts and [E, B, T, D] never exists.
        # In the type of the weights, in which their gradient is then summed over the width.
        weighted = y * jnp.moveaxis(weights, -1, 0)[..., None]
        return self.down_proj(weighted.astype(x.dtype), out_key)


class MixtureOfExperts(nnx.Module):
    """Each token through its few experts (arXiv 1701.06538), weighted by the router's probabilities.

    All experts compute all tokens, and those that a token is not sent to count for nothing: exact, without sorting and
    without a capacity, at the price of E / per_token times the arithmetic.
    """

    def __init__(self, config: ModelConfig, experts: Experts, lora: LoraSpec | None):
        self.settings = experts
        self.router = Linear(config.hidden_size, experts.count, bias=False, lora=None)
        self.experts = ExpertMLP(config, experts.count, lora)

    def __call__(self, x: Float[Array, "B T D"], key: jax.Array | None) -> Float[Array, "B T D"]:
        probabilities = jax.nn.softmax(self.router(x.astype(jnp.float32), None))
        chosen, numbers = jax.lax.top_k(probabilities, self.settings.per_token)
        if self.settings.normalized:
            chosen /= chosen.sum(-1, keepdims=True)
        places = jax.nn.one_hot(numbers, self.settings.count, dtype=jnp.float32)
        return self.experts(x, jnp.einsum("btk,btke->bte", chosen, places), key)


class Block(nnx.Module):
    """One layer: attention and feed-forward with their norms, one after the other or side by side."""

    def __init__(self, config: ModelConfig, lora: LoraSpec | None):
        self.config = config
        norm = functools.partial(Norm, config, config.hidden_size, bias=config.norm_bias)
        before, after = config.norm_placement != "after", config.norm_placement != "before"
        self.input_norm = norm() if before else None
        self.attention = Attention(config, lora)
        self.attention_out_norm = norm() if after else None
        self.post_attention_norm = norm() if before and not config.shared_norm else None
        self.mlp = (
            MixtureOfExperts(config, config.experts, lora) if config.experts else MLP(config, lora)
        )
        self.mlp_out_norm = norm() if after else None

    def __call__(
        self, x: Float[Array, "B T D"], place: Place, key: jax.Array | None, cache: Cache | None
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        attention_key, mlp_key = _split(key, 2)
        normed = _apply(self.input_norm, x)
        attended, cache = self.attention(normed, place, attention_key, cache)
        scale = self.config.residual_scale
        y = x + _scaled(_apply(self.attention_out_norm, attended), scale)
        if not self.config.shared_norm:
            normed = _apply(self.post_attention_norm, x if self.config.parallel_residual else y)
        # The product comes first: so the compiler adds to it what was before, in the product's kernel.
        return _scaled(_apply(self.mlp_out_norm, self.mlp(normed, mlp_key)), scale) + y, cache


class Embed(nnx.Module):
    def __init__(self, config: ModelConfig):
        self.embedding = _param(config.vocab_size, config.hidden_size)


class Positions(nnx.Module):
    def __init__(self, config: ModelConfig):
        self.embedding = _param(config.max_positions, config.hidden_size)


class Head(nnx.Module):
    def __init__(self, config: ModelConfig):
        self.kernel = _param(config.vocab_size, config.hidden_size)


class Transformer(nnx.Module):
    """Tokens to hidden states. The head is only declared here: who needs logits applies it, in chunks or at once."""

    def __init__(self, config: ModelConfig, lora: LoraSpec | None):
        self.config = config
        self.embed_tokens = Embed(config)
        self.embed_positions = Positions(config) if config.learned_positions else None
        self.embed_norm = (
            Norm(config, config.hidden_size, bias=config.norm_bias)
            if config.embedding_norm
            else None
        )
        self.layers = nnx.vmap(lambda: Block(config, lora), axis_size=config.num_layers)()
        self.final_norm = Norm(
            config, config.hidden_size, bias=config.norm_bias, gain=config.output_scale
        )
        self.lm_head = None if config.tie_word_embeddings else Head(config)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        key: jax.Array | None,
        dtype: DTypeLike,
        remat: rematerialization.Policy,
        unroll: int = 1,
        cache: Cache | None = None,
        start: Int[Array, ""] | int = 0,
        length: Length | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """`length` is that of the whole text, for rotary embeddings which look at it; None: T."""
        config = self.config
        positions = start + jnp.arange(tokens.shape[1])
        ropes, rope_of = _numbered([kind.rope for kind in config.layer_kinds])
        _, window_of = _numbered([kind.window for kind in config.layer_kinds])
        size = max((rope.size for rope in ropes if rope), default=0)
        turns = [
            rotation(positions, rope, size, tokens.shape[1] if length is None else length)
            for rope in ropes
        ]
        growing, growth_of = _numbered([kind.query_growth for kind in config.layer_kinds])
        growths = [_query_factor(growth, positions) for growth in growing]
        if growing == [None]:
            growths = [None]
        definition, weights = nnx.split(self.layers)

        def layer(x, weights, by, window, growth, key, cache):
            place = Place(positions, by, window, growth)
            x, cache = nnx.merge(definition, weights)(x, place, key, cache)
            return sharding.by_sequence(x), cache

        def turn(x, scanned):
            weights, key, cache, rope, window, growth = scanned
            return layer(x, weights, _nth(turns, rope), window, _nth(growths, growth), key, cache)

        keys = None if key is None else _split(key, config.num_layers)
        x = sharding.by_sequence(sharding.look_up(self.embed_tokens.embedding[...], tokens, dtype))
        x = self._placed(x, positions)
        unroll = _at_once(unroll, config.num_layers, remat)
        if unroll < config.num_layers:
            numbers = map(jnp.array, (rope_of, window_of, growth_of))
            scanned = weights, keys, cache, *numbers
            x, cache = jax.lax.scan(rematerialization.wrap(turn, remat), x, scanned, unroll=unroll)
            return self.final_norm(x), cache
        still = jax.lax.stop_gradient(weights)
        for i, slot in enumerate(_unstacked(weights, config.num_layers)):

            def own(x, slot, key, i=i):
                place = turns[rope_of[i]], window_of[i], growths[growth_of[i]]
                return layer(x, _taken(slot, still, i), *place, key, None)

            x, _ = rematerialization.wrap(own, remat, in_loop=False)(
                x, slot, None if keys is None else keys[i]
            )
        return self.final_norm(x), None

    def _placed(
        self, x: Float[Array, "B T D"], positions: Int[Array, "T"]
    ) -> Float[Array, "B T D"]:
        """The embedding as the first layer reads it."""
        if self.config.embedding_scale != 1:
            x *= jnp.asarray(self.config.embedding_scale, x.dtype)
        if self.embed_positions is not None:
            x = _plus(x, self.embed_positions.embedding[positions])
        return _apply(self.embed_norm, x)


# --- Pure functions ---------------------------------------------------------------------------------------------------


def forward(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    *,
    lora: LoraSpec | None = None,
    dropout_key: jax.Array | None = None,
    dtype: DTypeLike = jnp.float32,
    remat: rematerialization.Policy = "dots",
    unroll: int = 1,
) -> Float[Array, "B T D"]:
    """Hidden states after the final norm, in `dtype`.

    Args:
      lora: says that `params` hold adapters, and of which kind.
      dropout_key: draws the adapters' dropout, one key or one a sequence [B] (what is drawn then does not depend on which sequences
        are computed together); None: no dropout.
      remat: what each layer keeps for the backward pass; of no effect without one.
      unroll: layers in one turn of the compiled loop over them, at most all. With all of them there is no loop, and what layers
        keep for the backward pass is not copied into a stack: faster, for a compilation that grows with depth. 0: all of up to
        `UNROLLED` on GPUs, where layers keep more than their input; else 1.

    Raises:
      ValueError: `params` are not those of `config` and `lora`.
      UserError: the model has no positions for so long a text.
    """
    _check_length(config, tokens.shape[1])
    if dropout_key is not None and not dropout_key.shape:
        dropout_key = jax.random.split(dropout_key, len(tokens))
    with compiling.products(dtype):
        return _bind(config, lora, params)(tokens, dropout_key, dtype, remat, unroll)[0]


def head_matrix(params: Params) -> Float[Array, "V D"]:
    """The matrix that turns hidden states into logits: the head, or when tied the input embedding."""
    return (
        params["lm_head"]["kernel"] if "lm_head" in params else params["embed_tokens"]["embedding"]
    )


def adjust_logits(config: ModelConfig, logits: Float[Array, "..."]) -> Float[Array, "..."]:
    """What the model does to its logits one by one: the soft-cap, for the families that have one, else nothing."""
    if config.logit_softcap is None:
        return logits
    return config.logit_softcap * jnp.tanh(logits / config.logit_softcap)


def logits(
    config: ModelConfig, params: Params, tokens: Int[Array, "B T"], **options
) -> Float[Array, "B T V"]:
    """All logits in float32, for short inputs; `options` are those of `forward`."""
    return adjust_logits(
        config, _project(config, forward(config, params, tokens, **options), params)
    )


def generate(
    config: ModelConfig,
    params: Params,
    prompt: Int[Array, "B T"],
    steps: int,
    dtype: DTypeLike = jnp.float32,
) -> Int[Array, "B T+steps"]:
    """`prompt` and its greedy continuation by `steps` tokens.

    Rotary embeddings that look at the length of the text take that of the whole, `prompt` and continuation, for each
    of its tokens.

    Raises:
      UserError: the model has no positions for so long a text.
    """
    length = prompt.shape[1]
    _check_length(config, length + steps)
    # Padded, so that prompts of all lengths run through a few programs.
    padded = jnp.pad(prompt, ((0, 0), (0, -length % 64)))
    return jnp.concatenate(
        [prompt, _continue(config, params, padded, length, steps, jnp.dtype(dtype))], axis=1
    )


@functools.partial(jax.jit, static_argnames=("config", "steps", "dtype"))
def _continue(
    config: ModelConfig,
    params: Params,
    prompt: Int[Array, "B T"],
    length: Int[Array, ""],
    steps: int,
    dtype: DTypeLike,
) -> Int[Array, "B steps"]:
    """The greedy continuation of the first `length` tokens, with a cache of keys and values.

    The cache is filled from the whole prompt; what is after `length` is out of sight until it is overwritten.
    """
    model = _bind(config, None, params)
    batch, padded_length = prompt.shape
    empty = jnp.zeros(
        (config.num_layers, batch, padded_length + steps, config.num_kv_heads, config.head_dim),
        dtype,
    )

    def advance(tokens, last, cache, start):
        with compiling.products(dtype):
            hidden, cache = model(tokens, None, dtype, "layer", 1, cache, start, length + steps)
        scores = adjust_logits(config, _project(config, hidden[:, last], params))
        return scores.argmax(-1).astype(prompt.dtype), cache

    def step(carry, position):
        token, cache = carry
        return advance(token[:, None], 0, cache, position), token

    first = advance(prompt, length - 1, (empty, empty), 0)
    return jax.lax.scan(step, first, length + jnp.arange(steps))[1].T


def abstract_params(config: ModelConfig, lora: LoraSpec | None = None) -> Params:
    """Shapes of all parameters, as a tree of float32 ShapeDtypeStruct; with `lora` those of the adapters too."""
    return nnx.to_pure_dict(_definition(config, lora)[1])


def init_params(config: ModelConfig, key: jax.Array, std: float = 0.02) -> Params:
    """Float32 parameters to pre-train from: matrices normal with deviation `std`, norms neutral, biases zero."""

    def init(path: str, shape: tuple[int, ...], key: jax.Array) -> jax.Array:
        match path.rpartition("/")[2]:
            case "scale":
                return jnp.zeros(shape) if config.norm_plus_one else jnp.ones(shape)
            case "bias":
                return jnp.zeros(shape)
            case _:
                return std * jax.random.normal(key, shape)

    leaves = paths.flatten(abstract_params(config))
    keys = jax.random.split(key, len(leaves))
    return paths.unflatten(
        {path: init(path, leaf.shape, k) for (path, leaf), k in zip(leaves.items(), keys)}
    )


# --- Small things -----------------------------------------------------------------------------------------------------


@functools.cache
def _definition(config: ModelConfig, lora: LoraSpec | None) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: Transformer(config, lora)))


def _bind(config: ModelConfig, lora: LoraSpec | None, params: Params) -> Transformer:
    """The model that `params` belong to."""
    definition, _ = _definition(config, lora)
    expected, given = (set(paths.flatten(tree)) for tree in (abstract_params(config, lora), params))
    if expected != given:
        raise ValueError(
            f"parameters do not fit the model: missing {sorted(expected - given)}, left over {sorted(given - expected)}"
            f" ({config}, {lora})"
        )
    return nnx.merge(definition, params)


def _param(*shape: int) -> nnx.Param:
    """Declares a parameter; only its shape is ever looked at."""
    return nnx.Param(jnp.zeros(shape, jnp.float32))


def bind(config: ModelConfig, params: Params) -> Transformer:
    """The model that `params` belong to, to be called with a cache; `forward` calls it without one.

    Raises:
      ValueError: `params` are not those of `config`.
    """
    return _bind(config, None, params)


def last_logits(
    config: ModelConfig, hidden: Float[Array, "... D"], params: Params
) -> Float[Array, "... V"]:
    """The logits of final states, float32, as the model adjusts them (soft-cap)."""
    return adjust_logits(config, _project(config, hidden, params))


def _project(
    config: ModelConfig, hidden: Float[Array, "... D"], params: Params
) -> Float[Array, "... V"]:
    head = head_matrix(params).astype(hidden.dtype)
    with compiling.products(hidden.dtype):
        every = jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)
    return every[..., : config.vocab_size]  # without rows that only fill the matrix up


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _normed(x: Array, scale: Array, bias: Array | None, centred: bool, epsilon: float) -> Array:
    """`x`, less its mean where `centred`, over the root of its mean square along the last axis, times `scale`, plus `bias`; all
    in float32, the result in the type of `x`."""
    return _norm(x, scale, bias, centred, epsilon)


def _norm(x: Array, scale: Array, bias: Array | None, centred: bool, epsilon: float) -> Array:
    mean, factor = _moments(x, centred, epsilon)
    y = (x.astype(jnp.float32) - mean) * factor * scale
    return (y if bias is None else y + bias).astype(x.dtype)


def _moments(x: Array, centred: bool, epsilon: float) -> tuple[Array, Array]:
    """What a norm takes off, and what it then multiplies with."""
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True) if centred else jnp.zeros_like(wide[..., :1])
    return mean, jax.lax.rsqrt(jnp.square(wide - mean).mean(-1, keepdims=True) + epsilon)


def _normed_forward(x: Array, scale: Array, bias: Array | None, centred: bool, epsilon: float):
    return _norm(x, scale, bias, centred, epsilon), (x, scale, bias)


def _normed_backward(
    centred: bool, epsilon: float, kept: tuple[Array, Array, Array | None], gradient: Array
):
    """As autodiff has it, but sums over tokens begin at `x` again, with moments of their own: the normed tokens, shared with the
    gradient of `x`, would be an array in float32."""
    x, scale, bias = kept
    (x_gradient,) = jax.vjp(lambda x: _norm(x, scale, bias, centred, epsilon), x)[1](gradient)
    wide, tokens = gradient.astype(jnp.float32), tuple(range(x.ndim - scale.ndim))
    mean, factor = jax.lax.optimization_barrier(_moments(x, centred, epsilon))
    scale_gradient = (wide * ((x.astype(jnp.float32) - mean) * factor)).sum(tokens)
    return x_gradient, scale_gradient, None if bias is None else wide.sum(tokens)


_normed.defvjp(_normed_forward, _normed_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _each(x: Float[Array, "..."], times: int) -> list[Any]:
    """`x` for each of the products that read it. What comes back from the later is added to what came from the earlier, in this
    order: so the compiler does it in the kernel of the product, where autodiff's order takes a pass of its own."""
    return [x] * times


def _each_forward(x: Array, times: int):
    return _each(x, times), None


def _each_backward(times: int, _: None, gradients: list[Array]):
    return (functools.reduce(lambda total, one: one + total, gradients),)


_each.defvjp(_each_forward, _each_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _unstacked(stack: Any, layers: int) -> list[Any]:
    """What each layer has of a stack; the gradients are put together once, and not again for each of what reads them."""
    return [_layer_of(stack, i) for i in range(layers)]


def _unstacked_forward(stack: Any, layers: int):
    return _unstacked(stack, layers), None


def _unstacked_backward(layers: int, _: None, gradients: list[Any]):
    return (
        jax.lax.optimization_barrier(jax.tree.map(lambda *parts: jnp.stack(parts), *gradients)),
    )


_unstacked.defvjp(_unstacked_forward, _unstacked_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _taken(slot: Any, stack: Any, layer: int) -> Any:
    """What a layer has of the stack, whose gradient goes to `slot`.

    So a layer that is computed again takes its weights from the stack again, where a slice would be a copy that lives from the
    forward to the backward pass; a product that is the only reader of its slice takes it in place.
    """
    return _layer_of(stack, layer)


_taken.defvjp(
    lambda slot, stack, layer: (_taken(slot, stack, layer), None),
    lambda layer, _, gradient: (gradient, None),
)


def _layer_of(stack: Any, layer: int) -> Any:
    return jax.tree.map(lambda x: x[layer], stack)


def _at_once(unroll: int, layers: int, remat: rematerialization.Policy) -> int:
    """Layers in one turn of the loop over them."""
    if unroll:
        return min(unroll, layers)
    # A loop copies what layers keep into a stack and out of it: on two GPUs 8% of a step with `dots`; `layer` keeps next to nothing.
    pays = jax.default_backend() == "gpu" and remat != "layer"
    return layers if pays and layers <= UNROLLED else 1


def _apply(norm: Norm | None, x: Float[Array, "..."]) -> Float[Array, "..."]:
    return x if norm is None else norm(x)


def _numbered(items: Sequence[_Item]) -> tuple[list[_Item], list[int]]:
    """The different items, and of each item its number among them."""
    different = list(dict.fromkeys(items))
    return different, [different.index(item) for item in items]


def _nth(items: Sequence[Any], number: Int[Array, ""]) -> Any:
    """The item of this number, among trees of arrays of the same shapes."""
    if len(items) == 1:
        return items[0]
    return jax.tree.map(lambda *parts: jnp.stack(parts)[number], *items)


def _query_factor(growth: QueryGrowth | None, positions: Int[Array, "T"]) -> Float[Array, "T"]:
    if growth is None:
        return jnp.ones(len(positions))
    return 1 + growth.beta * jnp.log1p((positions // growth.original_positions).astype(jnp.float32))


def _check_length(config: ModelConfig, length: int) -> None:
    if config.learned_positions and length > config.max_positions:
        raise UserError(
            f"a text of {length:,} tokens is too long for this model: it has learned {config.max_positions:,} positions "
            f"and no others; use sequences of at most {config.max_positions:,} tokens"
        )


def _split(key: jax.Array | None, count: int):
    """`count` times as many keys: [count, B] from [B]."""
    return (
        [None] * count
        if key is None
        else jax.vmap(lambda k: jax.random.split(k, count), out_axes=1)(key)
    )


def _scaled(x: Array, factor: float) -> Array:
    """`x` times a number, in the type of `x`; multiplied in float32, since a half-precision factor is off by up to 0.4%."""
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


def _dropout(
    x: Float[Array, "*E B T D"], rate: float, key: jax.Array | None
) -> Float[Array, "*E B T D"]:
    """Drops a share of `x` that is `rate`.

    An element's chance is a hash of its number in its sequence, seeded by the sequence's key: computed where it is used,
    where bits of a cipher are a program of their own and an array in memory.
    """
    if key is None or rate == 0:
        return x
    *shape, width = (*x.shape[:-3], *x.shape[-2:])
    number = jax.lax.iota(jnp.uint32, math.prod(shape) * width).reshape(*shape, width)
    chance = jax.vmap(functools.partial(_hash, number), out_axes=-3)(jax.random.key_data(key))
    return jnp.where(chance >= np.uint32(rate * 2**32), _scaled(x, 1 / (1 - rate)), 0)


def _hash(x: UInt32[Array, "..."], seed: UInt32[Array, "2"]) -> UInt32[Array, "..."]:
    """A hash of 32-bit integers: three rounds of shift and product, with the published constants of `triple32`
    (C. Wellons, Prospecting for hash functions), and half of the seed before each of the first two."""
    x ^= seed[0]
    x = (x ^ (x >> 17)) * np.uint32(0xED5AD4BB) + seed[1]
    x = (x ^ (x >> 11)) * np.uint32(0xAC4C1B51)
    x = (x ^ (x >> 15)) * np.uint32(0x31848BAB)
    return x ^ (x >> 14)
