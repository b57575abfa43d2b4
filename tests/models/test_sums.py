"""Gradient sums over tokens, sequences or channels are float32 in every compute type."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoConfig

from tests.models.parity_cases import Case, cases_of, settings
from tokalign_jax.models import families
from tokalign_jax.models.modules import add_broadcast
from tokalign_jax.models.transformer import abstract_params, forward


@pytest.mark.parametrize(
    "case",
    [cases_of("gpt_neox")[0], cases_of("gpt2")[0], cases_of("mixtral")[0], cases_of("qwen2")[0]],
    ids=str,
)
def test_no_gradient_is_summed_in_bfloat16(case: Case):
    config = families.config_from_hf(AutoConfig.for_model(case.family, **settings(case)).to_dict())

    def summed(params, tokens):
        return forward(config, params, tokens, dtype=jnp.bfloat16).astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(summed)).trace(
        abstract_params(config), jax.ShapeDtypeStruct((2, 40), jnp.int32)
    )
    program = traced.lower(lowering_platforms=("cpu",)).as_text()
    sums = re.findall(r"stablehlo\.reduce.* applies stablehlo\.add .*", program)
    assert len(sums) > 5, "the program was not searched"
    assert not [each for each in sums if "bf16" in each]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_gradient_of_a_shared_term_is_the_sum_over_tokens(dtype):
    """The terms have one sign: a bfloat16 sum of such terms stalls after some hundred."""
    gradient = jnp.abs(jax.random.normal(jax.random.key(0), (4, 512, 8), dtype))
    bias, positions = jnp.ones(8), jnp.ones((512, 8))
    _, pull = jax.vjp(
        lambda b, p: add_broadcast(add_broadcast(jnp.zeros_like(gradient), p), b), bias, positions
    )
    exact = np.asarray(gradient, np.float64)
    for got, axes in zip(jax.jit(pull)(gradient), ((0, 1), 0)):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, exact.sum(axes), rtol=1e-6)
