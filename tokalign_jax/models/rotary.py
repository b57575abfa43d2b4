"""Rotary position embedding (arXiv 2104.09864, equation 34) in the half-rotation layout of Hugging
Face weights.

B batch, T length, N heads, H head size, R rotary size (the leading part of H that turns; the rest
passes).

Pair i of R / 2 turns by the angle position x frequency[i]. A scaling changes the frequencies, and
some the length of what is turned, so that a model reads further than it was pre-trained for. Two of
them look at the length of the text.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Rotation = tuple[Float[Array, "T R/2"], Float[Array, "T R/2"]]
"""Cosine and sine of every position's angles."""

Length = int | Int[Array, ""]
"""Tokens of the whole text, known when the program is compiled or not."""


@dataclass(frozen=True)
class LinearScaling:
    """Positions are divided by `factor` (arXiv 2306.15595)."""

    factor: float

    def apply(
        self, frequencies: Float[Array, "R/2"], theta: float, length: Length
    ) -> Float[Array, "R/2"]:
        return frequencies / self.factor

    @property
    def magnitude(self) -> float:
        return 1.0


@dataclass(frozen=True)
class DynamicScaling:
    """Dynamic NTK: past `max_positions` theta grows with the length of the text, so that the
    longest wave just fits.
    """

    factor: float
    max_positions: int

    def apply(
        self, frequencies: Float[Array, "R/2"], theta: float, length: Length
    ) -> Float[Array, "R/2"]:
        size = 2 * len(frequencies)
        length = jnp.maximum(length, self.max_positions)
        growth = self.factor * length / self.max_positions - (self.factor - 1)
        # Theta becomes theta x growth^(size / (size - 2)), and frequency i is theta^(-2 i / size).
        return frequencies * growth ** (-jnp.arange(0, size, 2) / (size - 2))

    @property
    def magnitude(self) -> float:
        return 1.0


@dataclass(frozen=True)
class Llama3Scaling:
    """LLaMA 3.1's: long waves are stretched by `factor`, short ones kept, those between are
    blended.

    A wave is short when it fits more than `high_frequency_factor` times into `original_positions`,
    the length of pre-training, and long when fewer than `low_frequency_factor` times.
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_positions: int

    def apply(
        self, frequencies: Float[Array, "R/2"], theta: float, length: Length
    ) -> Float[Array, "R/2"]:
        turns = self.original_positions * frequencies / (2 * math.pi)
        kept = (turns - self.low_frequency_factor) / (
            self.high_frequency_factor - self.low_frequency_factor
        )
        return _blend(frequencies, kept, self.factor)

    @property
    def magnitude(self) -> float:
        return 1.0


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071, section 3.2): as LLaMA 3.1's, but blended along the index of the
    frequency.

    The blend ends at the frequencies that turn `beta_fast` and `beta_slow` times within
    `original_positions`; with `truncate` at the whole indices around them.
    """

    factor: float
    magnitude: float
    """What queries and keys are multiplied with (the paper's square root of 1/t)."""
    beta_fast: float
    beta_slow: float
    original_positions: int
    truncate: bool

    def apply(
        self, frequencies: Float[Array, "R/2"], theta: float, length: Length
    ) -> Float[Array, "R/2"]:
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
    """LongRoPE (arXiv 2402.13753): every frequency has a divisor of its own, found by search.

    `long` holds them for texts of more than `original_positions` tokens, `short` for all others.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    magnitude: float
    """What queries and keys are multiplied with."""
    original_positions: int

    def apply(
        self, frequencies: Float[Array, "R/2"], theta: float, length: Length
    ) -> Float[Array, "R/2"]:
        return frequencies / jnp.where(
            length > self.original_positions, jnp.array(self.long), jnp.array(self.short)
        )


RopeScaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | LongRopeScaling


@dataclass(frozen=True)
class Rope:
    """The constants of one rotary embedding."""

    size: int
    """R."""
    theta: float
    scaling: RopeScaling | None


def rotation(positions: Int[Array, "T"], rope: Rope | None, size: int, length: Length) -> Rotation:
    """Cosine and sine for `positions`, float32.

    Args:
      rope: None: nothing turns.
      size: R, for when nothing turns.
      length: of the whole text, which `positions` may be a part of.
    """
    if rope is None:
        return jnp.ones((len(positions), size // 2)), jnp.zeros((len(positions), size // 2))
    frequencies = rope.theta ** (-jnp.arange(0, rope.size, 2, dtype=jnp.float32) / rope.size)
    magnitude = 1.0
    if rope.scaling is not None:
        frequencies, magnitude = (
            rope.scaling.apply(frequencies, rope.theta, length),
            rope.scaling.magnitude,
        )
    angles = positions.astype(jnp.float32)[:, None] * frequencies
    return magnitude * jnp.cos(angles), magnitude * jnp.sin(angles)


@jax.custom_vjp
def rotate(x: Float[Array, "B T N H"], by: Rotation) -> Float[Array, "B T N H"]:
    """Turns the pairs (x[i], x[i + R/2]), i < R/2, in float32; the result has the type of `x`. `by`
    gets no gradient.
    """
    cosine, sine = (part[:, None, :] for part in by)
    half = cosine.shape[-1]
    first, second = (
        x[..., part].astype(jnp.float32) for part in (slice(half), slice(half, 2 * half))
    )
    turned = jnp.concatenate(
        [first * cosine - second * sine, second * cosine + first * sine], axis=-1
    ).astype(x.dtype)
    if 2 * half == x.shape[-1]:
        return turned
    if x.shape[-2] == 1:
        return _beside(x, turned)
    return jax.lax.platform_dependent(x, turned, cuda=_in_place, default=_beside)


def _in_place(
    x: Float[Array, "B T N H"], turned: Float[Array, "B T N R"]
) -> Float[Array, "B T N H"]:
    """Where only a part turns, the rest stays where it is in memory: that saves a GPU a pass over
    it.
    """
    return jax.lax.dynamic_update_slice_in_dim(x, turned, 0, axis=-1)


def _beside(x: Float[Array, "B T N H"], turned: Float[Array, "B T N R"]) -> Float[Array, "B T N H"]:
    """The same, written anew. XLA for CPUs would turn `x` within itself, and of one head read what
    it has overwritten (jaxlib 0.10.2).
    """
    return jnp.concatenate([turned, x[..., turned.shape[-1] :]], axis=-1)


def _rotate_forward(x: Float[Array, "B T N H"], by: Rotation):
    return rotate(x, by), by


def _rotate_backward(by: Rotation, gradient: Float[Array, "B T N H"]):
    """The transpose turns the other way; autodiff would write the whole for it, not the part in its
    place.
    """
    cosine, sine = by
    # Held, so that the bias's gradient is a sum of this and not of what was here before it.
    return jax.lax.optimization_barrier(rotate(gradient, (cosine, -sine))), None


rotate.defvjp(_rotate_forward, _rotate_backward)


def _blend(frequencies: Float[Array, "R/2"], kept: jax.Array, factor: float) -> Float[Array, "R/2"]:
    """Frequencies where `kept` is 1 and more, divided by `factor` where it is 0 and less."""
    kept = jnp.clip(kept, 0, 1)
    return kept * frequencies + (1 - kept) * frequencies / factor
