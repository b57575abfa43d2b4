"""Rotary position embedding (RoPE, arXiv 2104.09864, equation 34), Hugging Face's half-rotation.

Dimensions: B batch, T length, N heads, H head size, R rotary size (only the first R of H entries
are rotated).

Pair i of R / 2 is rotated by the angle position x frequency[i]. A scaling changes the frequencies,
and some scale the magnitude too, to extend the context beyond that of pre-training. Two scalings
depend on the length of the text.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Rotation = tuple[Float[Array, "T R/2"], Float[Array, "T R/2"]]
"""Cosine and sine of each position's angles."""

Length = int | Int[Array, ""]
"""Number of tokens of the whole text, static or traced."""


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation (arXiv 2306.15595): divides positions by `factor`."""

    factor: float

    def apply(
        self, frequencies: Float[Array, "R/2"], theta: float, length: Length
    ) -> Float[Array, "R/2"]:
        """Returns the scaled frequencies."""
        return frequencies / self.factor

    @property
    def magnitude(self) -> float:
        """Factor of the cosine and sine."""
        return 1.0


@dataclass(frozen=True)
class DynamicScaling:
    """Dynamic NTK: beyond `max_positions`, theta grows so that the longest wave fits the text."""

    factor: float
    max_positions: int

    def apply(
        self, frequencies: Float[Array, "R/2"], theta: float, length: Length
    ) -> Float[Array, "R/2"]:
        """Returns the scaled frequencies."""
        size = 2 * len(frequencies)
        length = jnp.maximum(length, self.max_positions)
        growth = self.factor * length / self.max_positions - (self.factor - 1)
        # Theta becomes theta x growth^(size / (size - 2)), and frequency i is theta^(-2 i / size).
        return frequencies * growth ** (-jnp.arange(0, size, 2) / (size - 2))

    @property
    def magnitude(self) -> float:
        """Factor of the cosine and sine."""
        return 1.0


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's scaling: stretches long waves by `factor`, keeps short ones, blends in between.

    A wave is short if it fits more than `high_frequency_factor` times into `original_positions`,
    the context length of pre-training, and long if it fits fewer than `low_frequency_factor` times.
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_positions: int

    def apply(
        self, frequencies: Float[Array, "R/2"], theta: float, length: Length
    ) -> Float[Array, "R/2"]:
        """Returns the scaled frequencies."""
        turns = self.original_positions * frequencies / (2 * math.pi)
        unscaled = (turns - self.low_frequency_factor) / (
            self.high_frequency_factor - self.low_frequency_factor
        )
        return _blend(frequencies, unscaled, self.factor)

    @property
    def magnitude(self) -> float:
        """Factor of the cosine and sine."""
        return 1.0


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071, section 3.2): as `Llama3Scaling`, with a blend linear in the index.

    The blend runs between the frequencies that make `beta_fast` and `beta_slow` turns within
    `original_positions`, rounded outwards to whole indices if `truncate`.
    """

    factor: float
    magnitude: float
    """Factor of queries and keys (the paper's square root of 1/t)."""
    beta_fast: float
    beta_slow: float
    original_positions: int
    truncate: bool

    def apply(
        self, frequencies: Float[Array, "R/2"], theta: float, length: Length
    ) -> Float[Array, "R/2"]:
        """Returns the scaled frequencies."""
        size = 2 * len(frequencies)

        def index(turns: float) -> float:
            return (
                size
                * math.log(self.original_positions / (turns * 2 * math.pi))
                / (2 * math.log(theta))
            )

        low, high = index(self.beta_fast), index(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, size - 1)
        ramp = (jnp.arange(size // 2) - low) / (high - low if high != low else 0.001)
        return _blend(frequencies, 1 - ramp, self.factor)


@dataclass(frozen=True)
class LongRopeScaling:
    """LongRoPE (arXiv 2402.13753): divides each frequency by a factor found by search.

    `long` applies to texts of more than `original_positions` tokens, `short` to all others.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    magnitude: float
    """Factor of queries and keys."""
    original_positions: int

    def apply(
        self, frequencies: Float[Array, "R/2"], theta: float, length: Length
    ) -> Float[Array, "R/2"]:
        """Returns the scaled frequencies."""
        return frequencies / jnp.where(
            length > self.original_positions, jnp.array(self.long), jnp.array(self.short)
        )


RopeScaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | LongRopeScaling


@dataclass(frozen=True)
class Rope:
    """Constants of a rotary embedding."""

    size: int
    """R, the number of rotated entries of a head."""
    theta: float
    scaling: RopeScaling | None


def rotation(positions: Int[Array, "T"], rope: Rope | None, size: int, length: Length) -> Rotation:
    """Returns the float32 cosine and sine of the angles at `positions`.

    Args:
      positions: positions in the text.
      rope: constants; None for the identity.
      size: R of the identity.
      length: number of tokens of the whole text, of which `positions` may be a part.
    """
    if rope is None:
        return jnp.ones((len(positions), size // 2)), jnp.zeros((len(positions), size // 2))
    frequencies = rope.theta ** (-jnp.arange(0, rope.size, 2, dtype=jnp.float32) / rope.size)
    magnitude = 1.0
    if rope.scaling is not None:
        frequencies = rope.scaling.apply(frequencies, rope.theta, length)
        magnitude = rope.scaling.magnitude
    angles = positions.astype(jnp.float32)[:, None] * frequencies
    return magnitude * jnp.cos(angles), magnitude * jnp.sin(angles)


@jax.custom_vjp
def rotate(x: Float[Array, "B T N H"], cos_sin: Rotation) -> Float[Array, "B T N H"]:
    """Rotates the pairs (x[i], x[i + R/2]), i < R/2, in float32; returns the dtype of `x`.

    `cos_sin` gets no gradient.
    """
    cosine, sine = (part[:, None, :] for part in cos_sin)
    half = cosine.shape[-1]
    first, second = (
        x[..., part].astype(jnp.float32) for part in (slice(half), slice(half, 2 * half))
    )
    rotated = jnp.concatenate(
        [first * cosine - second * sine, second * cosine + first * sine], axis=-1
    ).astype(x.dtype)
    if 2 * half == x.shape[-1]:
        return rotated
    if x.shape[-2] == 1:
        return _concatenate_rest(x, rotated)
    return jax.lax.platform_dependent(x, rotated, cuda=_update_prefix, default=_concatenate_rest)


def _update_prefix(
    x: Float[Array, "B T N H"], rotated: Float[Array, "B T N R"]
) -> Float[Array, "B T N H"]:
    """Overwrites the first R entries: on GPU the rest of `x` then needs no pass over memory."""
    return jax.lax.dynamic_update_slice_in_dim(x, rotated, 0, axis=-1)


def _concatenate_rest(
    x: Float[Array, "B T N H"], rotated: Float[Array, "B T N R"]
) -> Float[Array, "B T N H"]:
    """Writes a new array.

    XLA on CPU would rotate `x` in place and, with a single head, read what it has already
    overwritten (jaxlib 0.10.2).
    """
    return jnp.concatenate([rotated, x[..., rotated.shape[-1] :]], axis=-1)


def _rotate_forward(x: Float[Array, "B T N H"], cos_sin: Rotation):
    return rotate(x, cos_sin), cos_sin


def _rotate_backward(cos_sin: Rotation, gradient: Float[Array, "B T N H"]):
    """Rotates the gradient backwards; autodiff would write the whole array, not only a prefix."""
    cosine, sine = cos_sin
    # The barrier makes the bias's gradient a sum of this result, not of its input.
    return jax.lax.optimization_barrier(rotate(gradient, (cosine, -sine))), None


rotate.defvjp(_rotate_forward, _rotate_backward)


def _blend(
    frequencies: Float[Array, "R/2"], unscaled: jax.Array, factor: float
) -> Float[Array, "R/2"]:
    """Interpolates from frequencies / factor (`unscaled` <= 0) to frequencies (`unscaled` >= 1)."""
    unscaled = jnp.clip(unscaled, 0, 1)
    return unscaled * frequencies + (1 - unscaled) * frequencies / factor
