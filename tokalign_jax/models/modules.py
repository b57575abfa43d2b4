"""Building blocks of the decoder's layers: linear maps with adapters, norms, feed-forward.

Dimensions: see `transformer`.
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

from tokalign_jax.models import float8
from tokalign_jax.models import remat as rematerialization
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.lora import LoraSpec


def _gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU by erf in float32: the erfc of jax.nn.gelu costs several times the arithmetic."""
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
    """Linear map y = x W + b, plus (alpha / rank) dropout(x) A B with adapters."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        bias: bool,
        lora: LoraSpec | None,
        remat_name: str | None = rematerialization.PROJECTIONS,
    ):
        """Declares the parameters.

        Args:
          inputs: input size.
          outputs: output size.
          bias: adds a bias.
          lora: adds adapters.
          remat_name: checkpoint name of x W for remat policies; None if no policy saves it. The
            bias is added to the named array: on GPU, a product without a fused bias reads its
            weights from the stack of all layers in place, while a fused one needs a copy.
        """
        self.kernel = param(inputs, outputs)
        self.bias = param(outputs) if bias else None
        self.lora = lora
        self.remat_name = remat_name
        self.matmul: float8.Matmul = "dtype"
        """How x W is computed, set by the model that the map is a projection of."""
        if lora:
            self.lora_a = param(inputs, lora.rank)
            self.lora_b = param(lora.rank, outputs)

    def __call__(
        self,
        x: Float[Array, "B T in"],
        key: jax.Array | None,
        low: Float[Array, "B T r"] | None = None,
    ) -> Float[Array, "B T out"]:
        """Applies the map; `low` is its result of `lora_down`, if computed already."""
        kernel = self.kernel.astype(x.dtype)
        y = float8.product(x, kernel) if self.matmul == "float8" else x @ kernel
        if self.lora:
            (low,) = lora_down([self], x, key) if low is None else (low,)
            y += low @ self.lora_b.astype(x.dtype)
        y = y if self.remat_name is None else checkpoint_name(y, self.remat_name)
        return y if self.bias is None else add_broadcast(y, self.bias)


def lora_down(
    linears: Sequence[Linear], x: Float[Array, "B T in"], key: jax.Array | None
) -> list[Any]:
    """Computes alpha / rank dropout(x) A for maps that share their input, in one product.

    Returns None for each map if there are no adapters.
    """
    lora = linears[0].lora
    if lora is None:
        return [None] * len(linears)
    a = jnp.concatenate([linear.lora_a[...].astype(x.dtype) for linear in linears], axis=-1)
    # Scaled in the rank, the smallest dimension.
    low = scale_in_float32(dropout(x, lora.dropout, key) @ a, lora.scale)
    return jnp.split(low, len(linears), axis=-1)


@jax.custom_vjp
def add_broadcast(x: Float[Array, "*B N"], added: Float[Array, "*A N"]) -> Float[Array, "*B N"]:
    """Adds a lower-rank array in the dtype of x, summing its gradient in float32.

    Autodiff would sum that gradient over x's leading axes in the dtype of x, and a sequential sum
    in bfloat16 stops growing at some hundred times its terms. On NVIDIA GPUs the native sum is
    kept: XLA sums in a tree, with a relative error of 5e-3 over 16,384 tokens, fused into the
    operation before it; a float32 sum would take a pass over memory.
    """
    return x + added.astype(x.dtype)


def _add_forward(x: jax.Array, added: jax.Array) -> tuple[jax.Array, jax.Array]:
    return add_broadcast(x, added), added


def _add_backward(added: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    axes = tuple(range(gradient.ndim - added.ndim))
    wide = jnp.promote_types(gradient.dtype, jnp.float32)
    summed = jax.lax.platform_dependent(
        gradient,
        cuda=lambda gradient: jax.lax.reduce_sum(gradient, axes).astype(wide),
        default=lambda gradient: gradient.sum(axes, dtype=wide),
    )
    return gradient, summed.astype(added.dtype)


add_broadcast.defvjp(_add_forward, _add_backward)


class Norm(nnx.Module):
    """Layer norm or RMS norm over the last axis."""

    def __init__(self, config: ModelConfig, *shape: int, bias: bool = False, gain: float = 1.0):
        """Declares a scale (and bias) of `shape`; the result is multiplied by `gain`."""
        self.config = config
        self.gain = gain
        self.scale = param(*shape) if config.norm_scale else None
        self.bias = param(*shape) if bias else None

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Normalizes `x` in float32, keeping its dtype."""
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
        """Applies the activation."""
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
        """Declares the projections; `width` is F if it differs from the model's."""
        self.activation = config.activation
        self.xielu = XIELU() if config.activation == "xielu" else None
        width = width or config.intermediate_size
        linear = functools.partial(Linear, bias=config.mlp_bias, lora=lora)
        self.gate_proj = linear(config.hidden_size, width) if config.gated_mlp else None
        self.up_proj = linear(config.hidden_size, width)
        self.down_proj = linear(width, config.hidden_size)

    def __call__(self, x: Float[Array, "B T D"], key: jax.Array | None) -> Float[Array, "B T D"]:
        """Applies the feed-forward; `key` is for dropout in the adapters."""
        in_key, out_key = split_keys(key, 2)
        activation: Any = self.xielu or ACTIVATIONS[self.activation]
        if self.gate_proj is None:
            return self.down_proj(activation(self.up_proj(x, in_key)), out_key)
        up_low, gate_low = lora_down([self.up_proj, self.gate_proj], x, in_key)
        y = self.up_proj(x, in_key, up_low)
        y = activation(self.gate_proj(x, in_key, gate_low)) * y
        return self.down_proj(y, out_key)


def param(*shape: int) -> nnx.Param:
    """Declares a parameter, of which only the shape is used."""
    return nnx.Param(jnp.zeros(shape, jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _normed(x: Array, scale: Array, bias: Array | None, centred: bool, epsilon: float) -> Array:
    """Layer norm (`centred`) or RMS norm over the last axis, in float32; keeps the dtype of `x`."""
    return _norm(x, scale, bias, centred, epsilon)


def _norm(x: Array, scale: Array, bias: Array | None, centred: bool, epsilon: float) -> Array:
    mean, factor = _moments(x, centred, epsilon)
    y = (x.astype(jnp.float32) - mean) * factor * scale
    return (y if bias is None else y + bias).astype(x.dtype)


def _moments(x: Array, centred: bool, epsilon: float) -> tuple[Array, Array]:
    """Returns the mean (zero unless `centred`) and the reciprocal standard deviation."""
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True) if centred else jnp.zeros_like(wide[..., :1])
    return mean, jax.lax.rsqrt(jnp.square(wide - mean).mean(-1, keepdims=True) + epsilon)


def _normed_forward(x: Array, scale: Array, bias: Array | None, centred: bool, epsilon: float):
    return _norm(x, scale, bias, centred, epsilon), (x, scale, bias)


def _normed_backward(
    centred: bool, epsilon: float, residuals: tuple[Array, Array, Array | None], gradient: Array
):
    """Autodiff's gradient, but recomputes the moments from `x` for the sums over tokens.

    Sharing the normed tokens with the gradient of `x` would keep a float32 array alive.
    """
    x, scale, bias = residuals
    (x_gradient,) = jax.vjp(lambda x: _norm(x, scale, bias, centred, epsilon), x)[1](gradient)
    wide, tokens = gradient.astype(jnp.float32), tuple(range(x.ndim - scale.ndim))
    mean, factor = jax.lax.optimization_barrier(_moments(x, centred, epsilon))
    scale_gradient = (wide * ((x.astype(jnp.float32) - mean) * factor)).sum(tokens)
    return x_gradient, scale_gradient, None if bias is None else wide.sum(tokens)


_normed.defvjp(_normed_forward, _normed_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def fan_out(x: Float[Array, "..."], times: int) -> list[Any]:
    """Copies `x` for each product that reads it, adding gradients in the order of the readers.

    The compiler fuses additions in that order into the products; autodiff's order takes an
    additional pass.
    """
    return [x] * times


def _fan_out_forward(x: Array, times: int):
    return fan_out(x, times), None


def _fan_out_backward(times: int, _: None, gradients: list[Array]):
    return (functools.reduce(lambda total, part: part + total, gradients),)


fan_out.defvjp(_fan_out_forward, _fan_out_backward)


def apply_norm(norm: Norm | None, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Applies a norm, or the identity for None."""
    return x if norm is None else norm(x)


def split_keys(key: jax.Array | None, count: int):
    """Splits each key: [count, B] from [B], or a list of None."""
    return (
        [None] * count
        if key is None
        else jax.vmap(lambda k: jax.random.split(k, count), out_axes=1)(key)
    )


def scale_in_float32(x: Array, factor: float) -> Array:
    """Multiplies in float32, keeping the dtype: a bfloat16 factor is off by up to 0.4%."""
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


def dropout(
    x: Float[Array, "*E B T D"], rate: float, key: jax.Array | None
) -> Float[Array, "*E B T D"]:
    """Zeroes a share `rate` of the elements and scales the others by 1 / (1 - rate).

    The mask is a hash of each element's index in its sequence, seeded by the sequence's key. It
    fuses with its use, whereas random bits are a computation and an array of their own.
    """
    if key is None or rate == 0:
        return x
    *shape, width = (*x.shape[:-3], *x.shape[-2:])
    index = jax.lax.iota(jnp.uint32, math.prod(shape) * width).reshape(*shape, width)
    keep = jax.vmap(lambda key: dropout_mask(index, key, rate), out_axes=-3)(key)
    return jnp.where(keep, scale_in_float32(x, 1 / (1 - rate)), 0)


def dropout_mask(index: UInt32[Array, "..."], key: jax.Array, rate: float) -> Bool[Array, "..."]:
    """Returns True for the elements that `dropout` keeps, by their index in a sequence."""
    return _hash(index, jax.random.key_data(key)) >= np.uint32(rate * 2**32)


def _hash(x: UInt32[Array, "..."], seed: UInt32[Array, "2"]) -> UInt32[Array, "..."]:
    """Hashes 32-bit integers by `triple32` (C. Wellons, Prospecting for hash functions).

    Half of the seed is mixed in before each of the first two rounds.
    """
    x ^= seed[0]
    x = (x ^ (x >> 17)) * np.uint32(0xED5AD4BB) + seed[1]
    x = (x ^ (x >> 11)) * np.uint32(0xAC4C1B51)
    x = (x ^ (x >> 15)) * np.uint32(0x31848BAB)
    return x ^ (x >> 14)
