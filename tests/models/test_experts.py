"""Sparse computation of experts equals the dense one, dropout included."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.parity_cases import cases_of, pair, tokens
from tokalign_jax.models.lora import LoraSpec, add_lora
from tokalign_jax.models.transformer import forward
from tokalign_jax.utils import paths

CASES = pytest.mark.parametrize(
    "case",
    [
        cases_of("qwen2_moe")[0],
        cases_of("qwen3_moe")[0],
        cases_of("granitemoeshared")[0],
        cases_of("gpt_oss")[0],
        cases_of("lfm2_moe")[0],
        cases_of("llama4_text")[0],
    ],
    ids=str,
)


def both_ways(config, sparse="blocks"):
    assert config.experts
    return [
        replace(config, experts=replace(config.experts, computed=way)) for way in ("dense", sparse)
    ]


@CASES
@pytest.mark.parametrize("sparse", ["blocks", "ragged"])
def test_dense_and_sparse_experts_agree_in_states_and_gradients(case, sparse, tmp_path):
    both = pair(case, tmp_path)
    text = jnp.asarray(tokens(23, batch=3))

    def loss(params, config):
        hidden = forward(config, params, text)
        return jnp.sin(hidden).sum(), hidden

    dense, other = (
        jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)(both.params, config)
        for config in both_ways(both.config, sparse)
    )
    np.testing.assert_allclose(other[0][1], dense[0][1], atol=2e-5)
    for path, gradient in paths.flatten(dense[1]).items():
        np.testing.assert_allclose(
            paths.flatten(other[1])[path],
            gradient,
            atol=2e-5 * max(1, np.abs(gradient).max()),
            err_msg=path,
        )


@pytest.mark.parametrize(
    "case",
    [cases_of(family)[0] for family in ("qwen2_moe", "qwen3_moe", "gpt_oss", "llama4_text")],
    ids=str,
)
def test_dense_and_sparse_experts_agree_with_adapters_and_dropout(case, tmp_path):
    both = pair(case, tmp_path)
    spec = LoraSpec(rank=3, alpha=6.0, dropout=0.4)
    leaves = paths.flatten(add_lora(both.params, spec, jax.random.key(0)))
    for i, path in enumerate(path for path in leaves if path.endswith("lora_b")):
        leaves[path] = 0.2 * jax.random.normal(jax.random.key(i), leaves[path].shape)
    params, text = paths.unflatten(leaves), jnp.asarray(tokens(23, batch=3))

    def loss(params, config):
        hidden = forward(config, params, text, lora=spec, dropout_key=jax.random.key(5))
        return jnp.sin(hidden).sum(), hidden

    dense, sparse = (
        jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)(params, config)
        for config in both_ways(both.config)
    )
    np.testing.assert_allclose(sparse[0][1], dense[0][1], atol=5e-5)
    plain = forward(both.config, params, text, lora=spec)
    assert np.abs(dense[0][1] - plain).max() > 0.01, "nothing was dropped"
    for path, gradient in paths.flatten(dense[1]).items():
        if "lora" in path:
            np.testing.assert_allclose(
                paths.flatten(sparse[1])[path],
                gradient,
                atol=5e-5 * max(1, np.abs(gradient).max()),
                err_msg=path,
            )
