"""Rotary embedding as multiplication of complex numbers, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokalign_jax.models.rotary import Rope, rotate, rotation

SHAPE = 2, 5, 3, 8  # B, T, N, H


@pytest.mark.parametrize("size", [8, 4])
def test_rotary_rotates_pairs_and_gradients_rotate_back(size):
    random = np.random.default_rng(0)
    x, upstream = random.normal(size=(2, *SHAPE)).astype(np.float32)
    by = rotation(jnp.arange(7, 12), Rope(size, 100.0, None), size, 12)
    turn = (np.asarray(by[0], np.float64) + 1j * np.asarray(by[1], np.float64))[:, None]

    def turned(x, turn):
        pairs = (x[..., : size // 2] + 1j * x[..., size // 2 : size]) * turn
        return np.concatenate([pairs.real, pairs.imag, x[..., size:]], axis=-1)

    y, pull = jax.vjp(lambda x: rotate(x, by), jnp.asarray(x))
    np.testing.assert_allclose(y, turned(x, turn), atol=1e-6)
    np.testing.assert_allclose(
        pull(jnp.asarray(upstream))[0], turned(upstream, turn.conj()), atol=1e-6
    )
