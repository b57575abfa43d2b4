"""Rotary position embedding (arXiv 2104.09864, equation 34) in the half-rotation layout of Hugging Face weights.

B batch, T length, N heads, H head size, R rotary size (the leading part of H that turns; the rest passes).
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Rotation = tuple[Float[Array, "T R/2"], Float[Array, "T R/2"]]
"""Cosine and sine of every position's angles."""


@dataclass(frozen=True)
class LinearScaling:
    """Positions are divided by `factor` (arXiv 2306.15595)."""

    factor: float

    def apply(self, frequencies: Float[Array, "R/2"]) -> Float[Array, "R/2"]:
        return frequencies / self.factor


@dataclass(frozen=True)
class Llama3Scaling:
    """LLaMA 3.1's: long waves are stretched by `factor`, short ones kept, those between are blended.

    A wave is short when it fits more than `high_frequency_factor` times into `original_positions`, the length of
    pre-training, and long when fewer than `low_frequency_factor` times.
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_positions: int

    def apply(self, frequencies: Float[Array, "R/2"]) -> Float[Array, "R/2"]:
        turns = self.original_positions * frequencies / (2 * math.pi)
        kept = (turns - self.low_frequency_factor) / (self.high_frequency_factor - self.low_frequency_factor)
        kept = jnp.clip(kept, 0, 1)
        return kept * frequencies + (1 - kept) * frequencies / self.factor


RopeScaling = LinearScaling | Llama3Scaling


def rotation(positions: Int[Array, "T"], theta: float, size: int, scaling: RopeScaling | None) -> Rotation:
    """Cosine and sine for `positions`, float32; `size` is R."""
    frequencies = theta ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    if scaling is not None:
        frequencies = scaling.apply(frequencies)
    angles = positions.astype(jnp.float32)[:, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B T N H"], by: Rotation) -> Float[Array, "B T N H"]:
    """Turns the pairs (x[i], x[i + R/2]), i < R/2, in float32; the result has the type of `x`."""
    cosine, sine = (part[:, None, :] for part in by)
    half = cosine.shape[-1]
    first, second, rest = jnp.split(x.astype(jnp.float32), [half, 2 * half], axis=-1)
    turned = [first * cosine - second * sine, second * cosine + first * sine, rest]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
