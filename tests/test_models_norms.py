"""Norms: their gradients by hand are those of autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokalign_jax.models import transformer

SHAPE = 2, 3, 4, 8


@pytest.mark.parametrize("centred, bias", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("scaled", [(8,), (4, 8)])
def test_gradients_are_those_of_the_formula(centred, bias, scaled):
    random = np.random.default_rng(0)
    x, upstream = (jnp.asarray(random.normal(1.0, size=SHAPE), jnp.float32) for _ in range(2))
    scale, shift = (jnp.asarray(random.normal(size=scaled), jnp.float32) for _ in range(2))

    def formula(x, scale, shift):
        y = x - x.mean(-1, keepdims=True) if centred else x
        return scale * y / jnp.sqrt((y**2).mean(-1, keepdims=True) + 1e-3) + (shift if bias else 0)

    def own(x, scale, shift):
        return transformer._normed(x, scale, shift if bias else None, centred, 1e-3)

    (expected, pull), (found, pull_own) = (jax.vjp(f, x, scale, shift) for f in (formula, own))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for a, b in zip(pull(upstream), pull_own(upstream)):
        np.testing.assert_allclose(b, a, atol=2e-5)
