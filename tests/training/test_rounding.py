"""Stochastic rounding: to a neighbour, right in expectation, the same whatever the padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokalign_jax.training.rounding import stochastic_round

ROUND = jax.jit(stochastic_round, static_argnums=1)


def neighbours(x):
    """The bfloat16 values around each float32, as float64: towards zero, and away from it."""
    bits = x.view(np.uint32) & np.uint32(0xFFFF0000)
    beyond = bits + np.uint32(1 << 16)
    return [part.view(np.float32).astype(np.float64) for part in (bits, beyond)]


def values(count=512, seed=0):
    """Of both signs, over 60 orders of magnitude."""
    rng = np.random.default_rng(seed)
    sizes = 10.0 ** rng.uniform(-30, 30, count)
    return (rng.choice([-1, 1], count) * sizes).astype(np.float32)


def test_a_value_is_rounded_to_one_of_its_neighbours():
    x = values()
    near, far = neighbours(x)
    rounded = np.asarray(ROUND(x, 1, jnp.int32(5)), np.float64)
    assert ((rounded == near) | (rounded == far)).all()
    assert (rounded == near).any() and (rounded == far).any()


@pytest.mark.parametrize("x", [0.0, -0.0, 1.0, -0.25, 3.0e38, 2.0**-133])
def test_values_of_the_type_stay_what_they_are(x):
    x = jnp.full(1000, x, jnp.bfloat16)
    for step in range(3):
        rounded = ROUND(x.astype(jnp.float32), 1, jnp.int32(step))
        assert np.asarray(rounded).tobytes() == np.asarray(x).tobytes()


def test_the_mean_over_steps_is_the_value():
    """Within five standard errors for each of 512 values, and over all of them together."""
    x, steps = values(), 4096
    near, far = neighbours(x)
    share = (x.astype(np.float64) - near) / (far - near)
    taken = np.mean(
        [np.asarray(ROUND(x, 7, jnp.int32(i)), np.float64) == far for i in range(steps)], axis=0
    )
    error = np.sqrt(share * (1 - share) / steps)
    assert (np.abs(taken - share) <= 5 * error + 1e-12).all()
    assert abs((taken - share).sum()) <= 5 * np.sqrt((error**2).sum())


def test_the_mean_over_elements_is_the_value():
    x = np.full((300, 700), 1 + 0.3 * 2.0**-7, np.float32)  # 0.3 of the way to the next value
    rounded = np.asarray(ROUND(x, 7, jnp.int32(1)), np.float64)
    assert abs((rounded > 1).mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / x.size)
    correlation = np.corrcoef(rounded[:, 1:].ravel(), rounded[:, :-1].ravel())[0, 1]
    assert abs(correlation) < 5 / np.sqrt(x.size)


def test_the_bits_depend_on_step_and_array_and_not_on_padding():
    x = np.full((64, 32), 1 + 0.5 * 2.0**-7, np.float32)
    one = np.asarray(ROUND(x, 1, jnp.int32(1)), np.float32)
    padded = np.asarray(ROUND(np.pad(x, ((0, 192), (0, 0))), 1, jnp.int32(1)), np.float32)
    np.testing.assert_array_equal(padded[:64], one)
    for stream, step in ((1, 2), (2, 1)):
        other = np.asarray(ROUND(x, stream, jnp.int32(step)), np.float32)
        assert 0.4 < (one != other).mean() < 0.6


def test_a_small_change_is_kept_in_expectation():
    """Rounded to nearest, a moment would never follow gradients a thousandth of its size."""
    moment = jnp.ones(20_000, jnp.bfloat16)
    for step in range(100):
        moment = ROUND(moment.astype(jnp.float32) - 1e-3, 0, jnp.int32(step))
    assert float(moment.astype(jnp.float32).mean()) == pytest.approx(0.9, abs=1e-3)
