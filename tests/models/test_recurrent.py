"""Mixed layer kinds: the gated delta rule, short convolutions, and scans over layers."""

import itertools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import merge_adapters
from tests.models.parity_cases import cases_of, our_logits, pair, tokens
from tokalign_jax.models import remat
from tokalign_jax.models.lora import LoraSpec, add_lora
from tokalign_jax.models.recurrent import CHUNK, delta_rule
from tokalign_jax.models.transformer import abstract_params, forward, segments
from tokalign_jax.planning import flops
from tokalign_jax.utils import paths


def token_by_token(q, k, v, decay, beta, state):
    """The recurrence as the paper has it, in float64."""
    q, k = (np.repeat(x, v.shape[2] // x.shape[2], axis=2).astype(float) for x in (q, k))
    q, k = (x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    state, found = state.astype(float), []
    for t in range(q.shape[1]):
        state = state * np.exp(decay[:, t])[..., None, None]
        missing = v[:, t] - np.einsum("bnhu,bnh->bnu", state, k[:, t])
        state = state + np.einsum("bnh,bnu->bnhu", k[:, t], beta[:, t][..., None] * missing)
        found.append(np.einsum("bnhu,bnh->bnu", state, q[:, t]) / q.shape[-1] ** 0.5)
    return np.stack(found, axis=1), state


@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, 2 * CHUNK + 3])
def test_chunked_delta_rule_equals_token_by_token(length):
    draw = np.random.default_rng(length)
    q, k = (draw.normal(size=(2, length, 2, 8)).astype(np.float32) for _ in range(2))
    v = draw.normal(size=(2, length, 4, 6)).astype(np.float32)
    decay = -draw.exponential(0.3, size=(2, length, 4)).astype(np.float32)
    beta = draw.uniform(size=(2, length, 4)).astype(np.float32)
    state = draw.normal(size=(2, 4, 8, 6)).astype(np.float32)
    expected, last = token_by_token(q, k, v, decay, beta, state)
    inputs: Any = map(jnp.asarray, (q, k, v, decay, beta, state))
    y, found = delta_rule(*inputs)
    assert found is not None
    np.testing.assert_allclose(y, expected, atol=2e-5)
    np.testing.assert_allclose(found, last, atol=2e-5)


def test_segments_cover_the_layers_in_order():
    assert [(s.layers, s.repeats) for s in segments("aaaa")] == [(("a",), 4)]
    assert [(s.layers, s.repeats) for s in segments("ddda" * 8)] == [(tuple("ddda"), 8)]
    lfm2 = segments("ccaccaccacacacac")
    assert [(s.layers, s.repeats) for s in lfm2] == [
        (tuple("cca"), 3),
        (tuple("ca"), 3),
        (("c",), 1),
    ]
    for length in range(1, 8):
        for mixers in itertools.product("ab", repeat=length):
            found = segments(mixers)
            assert sum((s.layers * s.repeats for s in found), ()) == mixers
            for segment in found:
                assert segment.before == mixers[: len(segment.before)]


@pytest.mark.parametrize(
    ("case", "unroll", "policy"),
    [
        (case, *loop)
        for case, loop in zip(
            [
                *cases_of("qwen3_5_text", "lfm2"),
                *(cases_of(family)[0] for family in ("lfm2_moe", "llama4_text")),
            ],
            [*[(1, "layer"), (2, "attention")] * 2, (2, "dots"), (1, "dots")],
            strict=True,
        )
    ],
    ids=str,
)
def test_scan_over_layers_equals_the_unrolled_layers(case, unroll, policy, tmp_path):
    both = pair(case, tmp_path)
    text = jnp.asarray(tokens(20))

    def loss(params, unroll, policy):
        hidden = forward(both.config, params, text, unroll=unroll, remat=policy)
        return jnp.sin(hidden).sum(), hidden

    step = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=(1, 2))
    (_, expected), gradients = step(both.params, both.config.num_layers, "dots")
    (_, found), others = step(both.params, unroll, policy)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(
            one, other, atol=1e-4 * max(1, np.abs(other).max())
        ),
        others,
        gradients,
    )


@pytest.mark.parametrize("policy", remat.POLICIES)
@pytest.mark.parametrize(
    "case",
    [cases_of("qwen3_5_text")[0], cases_of("lfm2")[0], cases_of("lfm2_moe")[0]],
    ids=lambda c: c.family,
)
def test_mixers_save_the_predicted_activations(case, policy, tmp_path):
    config = pair(case, tmp_path).config
    attends = [kind for kind in config.layer_kinds if kind.mixer == "attention"]
    kinds = [config.layer_kinds[0], attends[-1]]  # one with and one without experts, if any has
    config = replace(config, num_layers=6, layer_kinds=tuple(kinds * 3))
    text = jax.ShapeDtypeStruct((2, 40), jnp.int32)

    def loss(params, text):
        return forward(config, params, text, remat=policy).sum()

    kept = jax.eval_shape(
        lambda params, text: jax.vjp(lambda p: loss(p, text), params)[1],
        abstract_params(config),
        text,
    )
    stacked = [x for x in jax.tree.leaves(kept) if x.shape[:3] == (3, 2, 40)]
    total = sum(x.size * x.dtype.itemsize for x in stacked) // 80
    log_sum_exp = 4 * config.num_heads * 3 * (policy != "layer")  # the einsum here has none
    assert total == remat.activation_bytes(config, policy, jnp.float32) - log_sum_exp


def test_only_layers_with_attention_count_as_such(tmp_path):
    config = pair(cases_of("lfm2")[0], tmp_path).config
    whole = replace(
        config, layer_kinds=tuple(replace(k, mixer="attention") for k in config.layer_kinds)
    )
    assert flops.attention(config, 100) == flops.attention(whole, 100) * 2 / 5


@pytest.mark.parametrize(
    "case",
    [cases_of("qwen3_5_text")[0], cases_of("lfm2")[0], cases_of("lfm2_moe")[0]],
    ids=lambda c: c.family,
)
def test_adapters_of_all_mixers_equal_the_merged_model(case, tmp_path):
    both = pair(case, tmp_path)
    spec = LoraSpec(rank=2, alpha=6.0, dropout=0.0)
    leaves = paths.flatten(add_lora(both.params, spec, jax.random.key(0)))
    for i, path in enumerate(path for path in leaves if path.endswith("lora_b")):
        leaves[path] = 0.1 * jax.random.normal(jax.random.key(i), leaves[path].shape)
    params = paths.unflatten(leaves)
    ours = our_logits(both.config, params, tokens(20), lora=spec)
    assert np.abs(ours - our_logits(both.config, both.params, tokens(20))).max() > 0.01
    np.testing.assert_allclose(
        our_logits(both.config, merge_adapters(params, spec), tokens(20)), ours, atol=2e-4
    )


def test_products_count_the_chosen_experts_of_the_layers_that_have_them(tmp_path):
    config = pair(cases_of("lfm2_moe")[0], tmp_path).config
    dense, mixture = config.layer_kinds[1], config.layer_kinds[4]
    assert (dense.feed_forward, mixture.feed_forward) == ("dense_mlp", "mlp")
    assert dense.mixer == mixture.mixer

    def products(kind):
        deeper = replace(config, num_layers=7, layer_kinds=(*config.layer_kinds, kind))
        return flops.products(deeper, abstract_params(deeper))

    width, experts = config.hidden_size, config.experts
    chosen = experts.count * width + experts.per_token * 3 * width * config.intermediate_size
    assert products(mixture) - products(dense) == chosen - 3 * width * config.dense_size
