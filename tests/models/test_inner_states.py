"""The residual stream after chosen layers, in models of every structure."""

import jax
import numpy as np
import pytest
from transformers import AutoConfig

from tests.models.parity_cases import cases_of, compiled, settings, tokens
from tokalign_jax.models import families, transformer

FAMILIES = ("gpt_neox", "gpt2", "olmo2", "gemma2", "qwen3_next", "lfm2", "lfm2_moe")
"""Parallel residual, learned positions, norms after, sandwich norms and three hybrids, two of them
with experts.
"""


@pytest.mark.parametrize("family", FAMILIES)
def test_inner_states_are_those_of_a_model_of_the_first_layers(family):
    case = cases_of(family)[0]
    raw = AutoConfig.for_model(family, **settings(case)).to_dict()
    config = families.config_from_hf(raw)
    params = transformer.init_params(config, jax.random.key(0), std=0.2)
    text, count = tokens(20), config.num_layers - 1
    shallow, first = transformer.first_layers(config, params, count)

    @compiled
    def states(params, first):
        final, inner = transformer.forward_with_inner_states(
            config, params, text, range(1, config.num_layers)
        )
        normed = transformer.bind(shallow, first).outer.final_norm(inner[-1])
        expected = (
            transformer.forward(config, params, text),
            transformer.forward(shallow, first, text),
        )
        return len(inner), (final, normed), expected

    number, found, expected = states(params, first)
    assert number == count
    for ours, theirs in zip(found, expected):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
