"""LoRA adapters: zero at first, equal to their product once trained, dropout only with a key."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import merge_adapters, tiny_model
from tokalign_jax.models import families, modules
from tokalign_jax.models.lora import Adapter, LoraSpec, add_lora, merged
from tokalign_jax.models.transformer import abstract_params, forward, init_params
from tokalign_jax.utils import paths

SPEC = LoraSpec(rank=3, alpha=6.0, dropout=0.5)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 60, (2, 12)), jnp.int32)
run = jax.jit(forward, static_argnums=0, static_argnames=("lora", "dtype"))


@pytest.fixture(params=["llama", "gpt_neox"])
def model(request):
    config = families.config_from_hf(tiny_model(request.param, 60).config.to_dict())
    return config, init_params(config, jax.random.key(1), std=0.2)


@pytest.fixture
def adapted(model):
    """Parameters with adapters whose factors are all far from zero."""
    config, params = model
    leaves = paths.flatten(add_lora(params, SPEC, jax.random.key(2)))
    for i, path in enumerate(leaves):
        if "lora_b" in path:
            leaves[path] = 0.2 * jax.random.normal(jax.random.key(i), leaves[path].shape)
    return config, paths.unflatten(leaves)


def test_new_adapters_cover_every_projection_and_change_nothing(model):
    config, params = model
    adapted = add_lora(params, SPEC, jax.random.key(2))
    leaves = paths.flatten(adapted)
    projections = [
        path.removesuffix("/kernel")
        for path in leaves
        if path.startswith("layers") and "/kernel" in path
    ]
    assert len(projections) == (7 if config.gated_mlp else 6)
    assert {p for p in leaves if "lora" in p} == {
        f"{p}/lora_{x}" for p in projections for x in "ab"
    }
    assert jax.tree.structure(adapted) == jax.tree.structure(abstract_params(config, SPEC))
    assert jax.tree.map(jnp.shape, adapted) == jax.tree.map(
        lambda leaf: leaf.shape, abstract_params(config, SPEC)
    )
    q, k = leaves["layers/attention/q_proj/lora_a"], leaves["layers/attention/k_proj/lora_a"]
    assert 0.5 < float(jnp.abs(q).max()) * config.hidden_size**0.5 <= 1
    assert not np.array_equal(q, k) and not np.array_equal(q[0], q[1])
    np.testing.assert_array_equal(
        run(config, adapted, TOKENS, lora=SPEC), run(config, params, TOKENS)
    )


def test_merged_equals_unmerged(adapted):
    config, params = adapted
    together = merge_adapters(params, SPEC)
    assert jax.tree.structure(together) == jax.tree.structure(abstract_params(config))
    unmerged = run(config, params, TOKENS, lora=SPEC)
    assert jnp.abs(unmerged - run(config, _without(params), TOKENS)).max() > 0.1
    np.testing.assert_allclose(run(config, together, TOKENS), unmerged, atol=1e-4)


def test_merge_is_in_float32(adapted):
    _, params = adapted
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), _without(params))
    adapters = {path: leaf for path, leaf in paths.flatten(params).items() if "lora" in path}
    params = paths.unflatten(paths.flatten(half) | adapters)
    name = "layers/mlp/up_proj"
    kernel, a, b = (
        np.asarray(paths.flatten(params)[f"{name}/{x}"], np.float64)
        for x in ("kernel", "lora_a", "lora_b")
    )
    expected = kernel + SPEC.alpha / SPEC.rank * (a @ b)
    stack, *factors = (paths.flatten(params)[f"{name}/{x}"] for x in ("kernel", "lora_a", "lora_b"))
    full = jnp.stack(
        [merged(layer, [Adapter(SPEC, *factors)], (i,)) for i, layer in enumerate(stack)]
    )
    assert stack.dtype == jnp.bfloat16 and full.dtype == jnp.float32
    np.testing.assert_allclose(full, expected, rtol=1e-5, atol=1e-6)
    own = paths.flatten(merge_adapters(params, SPEC))[f"{name}/kernel"]
    np.testing.assert_array_equal(own, full.astype(jnp.bfloat16))


def test_dropout_is_active_with_a_key_only(adapted):
    config, params = adapted
    still = run(config, params, TOKENS, lora=SPEC)
    np.testing.assert_array_equal(run(config, params, TOKENS, lora=SPEC), still)
    first, again, other = (
        run(config, params, TOKENS, lora=SPEC, dropout_key=jax.random.key(k)) for k in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert jnp.abs(first - still).max() > 0.01
    assert jnp.abs(first - other).max() > 0.01


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_drops_the_given_share_in_every_adapter(rate):
    """Of all elements, of each sequence and of neighbouring pairs; the rest is scaled up."""
    keys = jax.random.split(jax.random.key(0), 4)
    dropped = modules.dropout(jnp.ones((4, 64, 512)), rate, keys)
    gone = np.asarray(dropped == 0)
    np.testing.assert_allclose(dropped[dropped > 0], 1 / (1 - rate), rtol=1e-6)
    deviation = np.sqrt(rate * (1 - rate) / gone[0].size)
    np.testing.assert_allclose(gone.mean((1, 2)), rate, atol=4 * deviation)
    for one, other in [
        (gone[..., 1:], gone[..., :-1]),
        (gone[:, 1:], gone[:, :-1]),
        (gone[1:], gone[:-1]),
    ]:
        assert (one & other).mean() == pytest.approx(
            rate**2, abs=4 * rate * (1 - rate) / np.sqrt(one.size)
        )
    np.testing.assert_array_equal(
        modules.dropout(jnp.ones((2, 64, 512)), rate, keys[2:]), dropped[2:]
    )


def test_adapters_without_their_spec_are_refused(adapted):
    config, params = adapted
    with pytest.raises(ValueError, match="lora_a"):
        forward(config, params, TOKENS)


def _without(params):
    """The parameters under the adapters."""
    return paths.unflatten(
        {path: leaf for path, leaf in paths.flatten(params).items() if "lora" not in path}
    )


def test_projections_of_the_same_input_share_a_product():
    """In the lowered forward pass of a layer: products of inputs with A for two groups, not five."""
    config = families.config_from_hf(tiny_model("llama", 60).config.to_dict())
    spec = LoraSpec(rank=4, alpha=8.0, dropout=0.3)
    text = (
        jax.jit(lambda params, key: forward(config, params, TOKENS, lora=spec, dropout_key=key))
        .lower(abstract_params(config, spec), jax.random.key(0))
        .as_text()
    )
    plain = (
        jax.jit(lambda params: forward(config, params, TOKENS))
        .lower(abstract_params(config))
        .as_text()
    )
    products = [program.count("stablehlo.dot_general") for program in (text, plain)]
    # Seven with B; with A one for queries, keys and values, one for gate and up, two for the
    # others.
    assert products[0] - products[1] == 7 + 4
