"""The norms' custom backward pass against autodiff."""

import jax
import jax.numpy as jnp
import pytest

from tokalign_jax.models.modules import _norm, _normed


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("shape", [(16,), (3, 16)])
def test_backward_pass_equals_autodiff(centred, shape):
    """A scale for the last axis, as layers have, and one for each head."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = 2 + jax.random.normal(keys[0], (2, 5, 3, 16))
    scale, bias = 1 + 0.1 * jax.random.normal(keys[1], shape), jax.random.normal(keys[2], shape)
    towards = jax.random.normal(keys[3], x.shape)
    y, pull = jax.vjp(lambda *inputs: _normed(*inputs, centred, 1e-5), x, scale, bias)
    expected_y, expected = jax.vjp(lambda *inputs: _norm(*inputs, centred, 1e-5), x, scale, bias)
    assert jnp.array_equal(y, expected_y)
    for got, want in zip(pull(towards), expected(towards)):
        assert jnp.allclose(got, want, rtol=1e-5, atol=1e-5)


def test_result_and_gradients_keep_their_dtypes():
    x, scale = jnp.ones((4, 8), jnp.bfloat16), jnp.ones(8)
    y, pull = jax.vjp(lambda x, scale: _normed(x, scale, None, False, 1e-5), x, scale)
    assert y.dtype == jnp.bfloat16
    assert [gradient.dtype for gradient in pull(y)] == [jnp.bfloat16, jnp.float32]
