"""Properties of all families: continuation, causality, precision, parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import SHARED, tiny_model
from tests.models.parity_cases import (
    Case,
    cases_of,
    compiled,
    our_logits,
    pair,
    reference,
    reference_logits,
    tokens,
)
from tokalign_jax.errors import UserError
from tokalign_jax.models import families, hub, huggingface
from tokalign_jax.models.transformer import (
    abstract_params,
    adjust_logits,
    forward,
    generate,
    init_params,
)
from tokalign_jax.utils import paths

LLAMA, NEOX = cases_of("llama")[0], cases_of("gpt_neox")[0]
WINDOWED, CAPPED = cases_of("smollm3")[1], cases_of("gemma2")[0]
CONFIG = families.config_from_hf(tiny_model("llama", 90).config.to_dict())
BOTH = pytest.mark.parametrize("case", [LLAMA, NEOX], ids=lambda case: case.family)


@pytest.mark.parametrize(
    ("case", "length"),
    [
        (LLAMA, 1),
        (LLAMA, 20),
        (CAPPED, 20),
        (WINDOWED, 20),
        (cases_of("gpt2")[0], 1),
        (cases_of("ministral3")[0], 20),
        (cases_of("gpt_oss")[0], 20),
        (cases_of("lfm2_moe")[0], 20),
        (cases_of("llama4_text")[0], 20),
        *zip(cases_of("qwen3_5_text", "lfm2"), (20, 1, 1, 20), strict=True),
    ],
    ids=str,
)
def test_greedy_continuation_matches_pytorch(case: Case, length: int, tmp_path):
    both = pair(case, tmp_path)
    prompt = expected = tokens(length)
    for _ in range(12):  # beyond the windows
        following = reference_logits(both.reference, expected)[:, -1:].argmax(-1)
        expected = np.append(expected, following, axis=1)
    found = generate(both.config, both.params, jnp.asarray(prompt), 12)
    np.testing.assert_array_equal(found, expected)


def test_continuation_by_no_tokens_adds_nothing():
    shape = jax.eval_shape(
        lambda params, text: generate(CONFIG, params, text, 0), abstract_params(CONFIG), tokens(20)
    )
    assert shape.shape == (2, 20)


def test_text_longer_than_the_learned_positions_is_refused(tmp_path):
    both = pair(cases_of("gpt2")[0], tmp_path)
    with pytest.raises(UserError, match=r"81 tokens is too long.*80 positions"):
        forward(both.config, both.params, tokens(81))
    with pytest.raises(UserError, match="81 tokens is too long"):
        generate(both.config, both.params, jnp.asarray(tokens(70)), 11)


def test_logits_are_soft_capped_where_the_family_does(tmp_path):
    both = pair(CAPPED, tmp_path)
    scores = jnp.linspace(-20, 20, 9)
    np.testing.assert_allclose(
        adjust_logits(both.config, scores), 3 * np.tanh(scores / 3), rtol=1e-6
    )
    assert adjust_logits(CONFIG, scores) is scores


def test_program_size_does_not_grow_with_depth(tmp_path):
    config = pair(cases_of("gemma3_text")[0], tmp_path).config  # of two kinds of layers
    deep = dataclasses.replace(config, num_layers=24, layer_kinds=config.layer_kinds * 6)

    def lines(config):
        return (
            jax.jit(forward, static_argnums=0)
            .lower(config, abstract_params(config), tokens(20))
            .as_text()
            .count("\n")
        )

    assert lines(deep) == lines(config)


@pytest.mark.parametrize(
    "case, reach", [(LLAMA, 9), (cases_of("mistral")[0], 22)], ids=["llama", "mistral"]
)
def test_attention_is_causal_and_within_windows(case, reach, tmp_path):
    """Two layers of a window of 12 reach 2 x 11 positions back."""
    both = pair(case, tmp_path)
    # Every position has a token of its own, so that the row of the table stands for the position.
    length = reach + 4
    text = jnp.arange(length)[None]

    @compiled
    @jax.jacobian
    def influence(embedding):
        hidden = forward(
            both.config, both.params | {"embed_tokens": {"embedding": embedding}}, text
        )
        return jnp.square(hidden[0]).sum(-1)

    seen = jnp.abs(influence(both.params["embed_tokens"]["embedding"])).max(-1)[:, :length] > 0
    distance = np.arange(length)[:, None] - np.arange(length)
    window = reach if case is not LLAMA else length
    np.testing.assert_array_equal(seen, (distance >= 0) & (distance <= window))


@BOTH
def test_bf16_is_close_to_float32(case, tmp_path):
    both = pair(case, tmp_path)
    hidden, exact = (
        compiled(lambda p, d=d: forward(both.config, p, tokens(32), dtype=d))(both.params)
        for d in ("bfloat16", "float32")
    )
    assert hidden.dtype == jnp.bfloat16
    assert jnp.abs(hidden - exact).mean() < 0.03 * jnp.abs(exact).mean()


def test_initial_parameters_have_the_given_scale():
    params = paths.flatten(init_params(CONFIG, jax.random.key(0), std=0.5))
    assert set(params) == set(paths.flatten(abstract_params(CONFIG)))
    kernel = params["layers/mlp/up_proj/kernel"]
    assert abs(float(kernel.std()) - 0.5) < 0.02
    assert not np.array_equal(kernel[0], kernel[1])
    np.testing.assert_array_equal(params["final_norm/scale"], 1)


def test_initial_norms_of_one_plus_weight_are_zero(tmp_path):
    config = pair(cases_of("gemma")[0], tmp_path).config
    np.testing.assert_array_equal(init_params(config, jax.random.key(0))["final_norm"]["scale"], 0)


def test_parameters_of_another_model_are_refused():
    params = init_params(CONFIG, jax.random.key(0))
    del params["final_norm"]
    with pytest.raises(ValueError, match=r"missing.*final_norm/scale"):
        forward(CONFIG, params, jnp.zeros((1, 4), jnp.int32))


def test_old_checkpoint_without_the_newest_keys_is_read(tmp_path):
    both = pair(LLAMA, tmp_path)
    old = {**both.raw, "rope_theta": 10000.0}
    for key in ("rope_parameters", "attention_bias", "mlp_bias", "tie_word_embeddings", "head_dim"):
        old.pop(key, None)
    assert families.config_from_hf(old) == both.config


@pytest.mark.skipif(
    not (SHARED / "models/llama-en16k").exists(), reason="the shared model is not at hand"
)
def test_logits_of_a_trained_model_match_pytorch():
    folder = SHARED / "models/llama-en16k"
    config, _ = hub.load_config(folder)
    params = huggingface.load_params(folder, config, jnp.float32)
    np.testing.assert_allclose(
        our_logits(config, params, tokens(200)),
        reference_logits(reference(folder), tokens(200)),
        atol=1e-4,
        rtol=0,
    )
