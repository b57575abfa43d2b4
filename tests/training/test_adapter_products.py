"""Adapters of projections that read the same input: one product is what separate ones are."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.toys import LENGTH, LLAMA, NEOX, VOCABULARY, toy_params
from tokalign_jax.models import mixers, modules
from tokalign_jax.models.lora import LoraSpec, add_lora
from tokalign_jax.models.transformer import forward
from tokalign_jax.utils import paths

SPEC = LoraSpec(rank=3, alpha=6.0, dropout=0.3)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, VOCABULARY, (2, LENGTH)), jnp.int32)


def separate(linears, x, key):
    """`modules.lora_down` with a product for each map."""
    lora = linears[0].lora
    if lora is None:
        return [None] * len(linears)
    dropped = modules.dropout(x, lora.dropout, key)
    return [
        modules.scale_in_float32(dropped @ linear.lora_a[...].astype(x.dtype), lora.scale)
        for linear in linears
    ]


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated attention"])
@pytest.mark.parametrize("model", [LLAMA, NEOX], ids=["llama", "gpt_neox"])
def test_results_and_gradients_are_those_of_separate_products(model, gated, monkeypatch):
    model = replace(model, attention_gate=gated)
    leaves = paths.flatten(add_lora(toy_params(model), SPEC, jax.random.key(2)))
    for i, path in enumerate(leaves):
        if "lora_b" in path:
            leaves[path] = 0.2 * jax.random.normal(jax.random.key(i), leaves[path].shape)
    params = paths.unflatten(leaves)
    weights = jax.random.normal(jax.random.key(7), (2, LENGTH, model.hidden_size))

    def loss(params):
        hidden = forward(model, params, TOKENS, lora=SPEC, dropout_key=jax.random.key(1))
        return (hidden * weights).sum(), hidden

    (_, joined), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    monkeypatch.setattr(modules, "lora_down", separate)
    monkeypatch.setattr(mixers, "lora_down", separate)
    jax.clear_caches()
    (_, apart), expected = jax.value_and_grad(loss, has_aux=True)(params)
    np.testing.assert_allclose(joined, apart, atol=1e-5)
    gradients, expected = paths.flatten(gradients), paths.flatten(expected)
    for path, gradient in gradients.items():
        if "lora" in path:
            scale = float(jnp.abs(expected[path]).max())
            assert scale > 0, path
            np.testing.assert_allclose(gradient, expected[path], atol=1e-5 * scale, err_msg=path)
