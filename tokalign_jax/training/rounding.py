"""Stochastic rounding to bfloat16, reproducible on any mesh."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float32, Int, UInt32


def stochastic_round(
    x: Float32[Array, "..."], stream: int, step: Int[Array, ""]
) -> BFloat16[Array, "..."]:
    """Round to one of the two nearest bfloat16 values so that the expectation is `x`.

    The upper neighbour (away from zero) is taken with the probability of the distance to the lower
    one in units of their distance, in steps of 2^-16, which for a float32 is exact. The random bits
    are a hash of (stream, step, index of the element): equal on every mesh, without a state, and
    computed where they are used. A vocabulary's padding rows do not change the indices.

    Args:
      x: finite values.
      stream: distinguishes arrays that are rounded at the same step.
      step: distinguishes roundings of the same array.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = _hash(_indices(x.shape), np.uint32(stream & 0xFFFFFFFF), step.astype(jnp.uint32)) >> 16
    upper = ((bits + noise) >> 16).astype(jnp.uint16)
    return jax.lax.bitcast_convert_type(upper, jnp.bfloat16)


def _indices(shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """The index of each element in row-major order, modulo 2^32."""
    index = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = np.uint32(math.prod(shape[axis + 1 :]) % 2**32)
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    return index


def _hash(x: UInt32[Array, "..."], *seeds: Array | np.uint32) -> UInt32[Array, "..."]:
    """MurmurHash3's finaliser, once for each seed."""
    for seed in seeds:
        x = x + seed
        x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
        x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
        x = x ^ (x >> 16)
    return x
