"""Probability of tokens that the training text lacks, by Good and Turing."""

import numpy as np
import pytest
from scipy.special import softmax

from tests.training.toys import LLAMA
from tokalign_jax.initialization import unseen


@pytest.fixture
def head():
    random = np.random.default_rng(0)
    states = (random.normal(size=(200, 16)) + random.normal(size=16)).astype(np.float32)
    return states, random.normal(size=(90, 16)).astype(np.float32)


@pytest.mark.parametrize("block", [unseen.BLOCK, 32])
def test_unseen_tokens_share_the_estimated_probability(head, block, monkeypatch):
    monkeypatch.setattr(unseen, "BLOCK", block)
    states, rows = head
    absent = np.arange(20, 60)
    before = softmax(states.astype(np.float64) @ rows.T, axis=-1)[:, absent].sum(axis=-1).mean()
    nats, change = unseen.shift(LLAMA, states, rows, absent, before / 10)
    lowered = states.astype(np.float64) @ rows.T
    lowered[:, absent] -= nats
    found = softmax(lowered, axis=-1)[:, absent].sum(axis=-1).mean()
    np.testing.assert_allclose(found, before / 10, rtol=1e-4)
    np.testing.assert_allclose((states @ change).mean(), -nats, rtol=1e-5)


def test_no_logit_is_raised(head):
    nats, change = unseen.shift(LLAMA, *head, np.arange(3), 0.9)
    assert nats < 1e-6 and np.abs(change).max() < 1e-6


def test_estimate_is_the_share_of_tokens_that_occur_once():
    counts, composed = np.array([5, 1, 1, 0, 3]), np.array([True, True, False, True, True])
    assert unseen.good_turing(counts, composed) == 1 / 10
    assert unseen.good_turing(np.array([4, 0]), np.ones(2, bool)) == 1 / 4
