"""Building blocks of the decoder's layers: linear maps with adapters, norms, feed-forward.

Dimension letters: `transformer`.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, UInt32

from tokalign_jax.models import remat as rematerialization
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.lora import LoraSpec


def _gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU, computed in float32 by erf: jax.nn.gelu's erfc costs several times the arithmetic."""
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


ACTIVATIONS = {
    "gelu": _gelu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
}


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
        """Declare the parameters.

        Args:
          kept_as: checkpoint name of x W, for remat policies; None: no policy keeps it. It is named
            before the bias is added: on a GPU, a product without a bias reads its weights from the
            stack of all layers in place, while one with a bias needs a copy of them.
        """
        self.kernel = param(inputs, outputs)
        self.bias = param(outputs) if bias else None
        self.lora = lora
        self.kept_as = kept_as
        if lora:
            self.lora_a = param(inputs, lora.rank)
            self.lora_b = param(lora.rank, outputs)

    def __call__(
        self,
        x: Float[Array, "B T in"],
        key: jax.Array | None,
        low: Float[Array, "B T r"] | None = None,
    ) -> Float[Array, "B T out"]:
        """`low`: what `lows` gives for this map; None: it is computed here."""
        y = x @ self.kernel.astype(x.dtype)
        if self.lora:
            (low,) = lows([self], x, key) if low is None else (low,)
            y += low @ self.lora_b.astype(x.dtype)
        y = y if self.kept_as is None else checkpoint_name(y, self.kept_as)
        return y if self.bias is None else plus(y, self.bias)


def lows(linears: Sequence[Linear], x: Float[Array, "B T in"], key: jax.Array | None) -> list[Any]:
    """alpha / rank dropout(x) A for linear maps that share their input, in one product.

    None for each without adapters.
    """
    lora = linears[0].lora
    if lora is None:
        return [None] * len(linears)
    a = jnp.concatenate([linear.lora_a[...].astype(x.dtype) for linear in linears], axis=-1)
    # The factor where there are few numbers: in the rank.
    low = scaled(dropout(x, lora.dropout, key) @ a, lora.scale)
    return jnp.split(low, len(linears), axis=-1)


@jax.custom_vjp
def plus(x: Float[Array, "*B N"], added: Float[Array, "*A N"]) -> Float[Array, "*B N"]:
    """x + a in the type of x; the gradient of a is summed over x's leading axes in float32.

    Autodiff sums it in the type of x, and a sequential sum in bfloat16 stops growing at some
    hundred times its terms. XLA for NVIDIA sums in a tree, with a relative error of 5e-3 over
    16,384 tokens, fused into the operation before: left so, as a float32 sum would be a pass of its
    own over memory.
    """
    return x + added.astype(x.dtype)


def _plus_forward(x: jax.Array, added: jax.Array) -> tuple[jax.Array, jax.Array]:
    return plus(x, added), added


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


plus.defvjp(_plus_forward, _plus_backward)


class Norm(nnx.Module):
    """Layer norm (mean removed) or RMS norm over the last axis."""

    def __init__(self, config: ModelConfig, *shape: int, bias: bool = False, gain: float = 1.0):
        """`shape`: of the scale; `gain`: one more factor of the result."""
        self.config = config
        self.gain = gain
        self.scale = param(*shape) if config.norm_scale else None
        self.bias = param(*shape) if bias else None

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        if self.scale is None:
            scale = jnp.full(x.shape[-1:], self.gain, jnp.float32)
        else:
            scale = self.gain * (
                self.scale.astype(jnp.float32) + (1.0 if self.config.norm_plus_one else 0.0)
            )
        bias = None if self.bias is None else self.gain * self.bias.astype(jnp.float32)
        return _normed(x, scale, bias, self.config.norm == "layer", self.config.norm_epsilon)


class XIELU(nnx.Module):
    """xIELU (arXiv 2411.13010), computed in float32; `beta` and `epsilon` are constants."""

    def __init__(self):
        self.alpha_positive, self.alpha_negative = param(1), param(1)
        self.beta, self.epsilon = param(), param()

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

    def __init__(self, config: ModelConfig, lora: LoraSpec | None, width: int | None = None):
        """`width`: F, where it is not the model's."""
        self.activation = config.activation
        self.xielu = XIELU() if config.activation == "xielu" else None
        width = width or config.intermediate_size
        linear = functools.partial(Linear, bias=config.mlp_bias, lora=lora)
        self.gate_proj = linear(config.hidden_size, width) if config.gated_mlp else None
        self.up_proj = linear(config.hidden_size, width)
        self.down_proj = linear(width, config.hidden_size)

    def __call__(self, x: Float[Array, "B T D"], key: jax.Array | None) -> Float[Array, "B T D"]:
        in_key, out_key = split(key, 2)
        activation: Any = self.xielu or ACTIVATIONS[self.activation]
        if self.gate_proj is None:
            return self.down_proj(activation(self.up_proj(x, in_key)), out_key)
        for_up, for_gate = lows([self.up_proj, self.gate_proj], x, in_key)
        y = self.up_proj(x, in_key, for_up)
        y = activation(self.gate_proj(x, in_key, for_gate)) * y
        return self.down_proj(y, out_key)


def param(*shape: int) -> nnx.Param:
    """Declares a parameter; only its shape is ever looked at."""
    return nnx.Param(jnp.zeros(shape, jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _normed(x: Array, scale: Array, bias: Array | None, centred: bool, epsilon: float) -> Array:
    """Layer norm (`centred`) or RMS norm over the last axis, in float32; the result has the type of
    `x`.
    """
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
    """Autodiff's gradient, with sums over tokens that recompute the moments from `x`: sharing the
    normed tokens with the gradient of `x` would keep a float32 array."""
    x, scale, bias = kept
    (x_gradient,) = jax.vjp(lambda x: _norm(x, scale, bias, centred, epsilon), x)[1](gradient)
    wide, tokens = gradient.astype(jnp.float32), tuple(range(x.ndim - scale.ndim))
    mean, factor = jax.lax.optimization_barrier(_moments(x, centred, epsilon))
    scale_gradient = (wide * ((x.astype(jnp.float32) - mean) * factor)).sum(tokens)
    return x_gradient, scale_gradient, None if bias is None else wide.sum(tokens)


_normed.defvjp(_normed_forward, _normed_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def each(x: Float[Array, "..."], times: int) -> list[Any]:
    """`x` for each of the products that read it. Gradients are added in the order of the readers,
    which the compiler fuses into the products; autodiff's order takes a pass of its own.
    """
    return [x] * times


def _each_forward(x: Array, times: int):
    return each(x, times), None


def _each_backward(times: int, _: None, gradients: list[Array]):
    return (functools.reduce(lambda total, one: one + total, gradients),)


each.defvjp(_each_forward, _each_backward)


def apply(norm: Norm | None, x: Float[Array, "..."]) -> Float[Array, "..."]:
    return x if norm is None else norm(x)


def split(key: jax.Array | None, count: int):
    """`count` times as many keys: [count, B] from [B]."""
    return (
        [None] * count
        if key is None
        else jax.vmap(lambda k: jax.random.split(k, count), out_axes=1)(key)
    )


def scaled(x: Array, factor: float) -> Array:
    """`x` times a number, in the type of `x`; multiplied in float32, as a bfloat16 factor is off by
    up to 0.4%.
    """
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


def dropout(
    x: Float[Array, "*E B T D"], rate: float, key: jax.Array | None
) -> Float[Array, "*E B T D"]:
    """Drops a share of `x` that is `rate`.

    The mask is a hash of each element's index in its sequence, seeded by the sequence's key: it
    fuses with its use, where random bits are a program of their own and an array in memory.
    """
    if key is None or rate == 0:
        return x
    *shape, width = (*x.shape[:-3], *x.shape[-2:])
    number = jax.lax.iota(jnp.uint32, math.prod(shape) * width).reshape(*shape, width)
    kept = jax.vmap(lambda key: dropout_mask(number, key, rate), out_axes=-3)(key)
    return jnp.where(kept, scaled(x, 1 / (1 - rate)), 0)


def dropout_mask(number: UInt32[Array, "..."], key: jax.Array, rate: float) -> Bool[Array, "..."]:
    """Which elements of a sequence, by their numbers in it, `dropout` keeps."""
    return _hash(number, jax.random.key_data(key)) >= np.uint32(rate * 2**32)


def _hash(x: UInt32[Array, "..."], seed: UInt32[Array, "2"]) -> UInt32[Array, "..."]:
    """A hash of 32-bit integers: `triple32` (C. Wellons, Prospecting for hash functions), with half
    of the seed mixed in before each of the first two rounds.
    """
    x ^= seed[0]
    x = (x ^ (x >> 17)) * np.uint32(0xED5AD4BB) + seed[1]
    x = (x ^ (x >> 11)) * np.uint32(0xAC4C1B51)
    x = (x ^ (x >> 15)) * np.uint32(0x31848BAB)
    return x ^ (x >> 14)
