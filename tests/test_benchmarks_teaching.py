"""What the source model teaches at meetings, against float64."""

import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokalign_jax.training.losses import Head

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import teaching
from meetings import NONE
from teaching import MetSource, unpack

B, T, S, D, V, R = 2, 7, 11, 5, 13, 16
HOW = Head(V, 4, jnp.float32)
PLACES = np.array([[NONE, 1, 2, NONE, 6, 7, NONE], [0, NONE, NONE, 10, NONE, NONE, NONE]])


@dataclass(frozen=True)
class Tokens:
    tokens: np.ndarray
    opening: int | None = None


@pytest.fixture
def draw():
    rng = np.random.default_rng(0)
    return lambda *shape: rng.normal(size=shape).astype(np.float32)


def log_softmax(states, head):
    logits = states.astype(np.float64) @ head[:V].astype(np.float64).T
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_sequences_come_with_a_window_of_the_source_from_their_first_meeting():
    target, source = Tokens(np.arange(100, 121)), Tokens(np.arange(500, 540))
    meetings = np.array(
        [NONE, 3, 5, 6, NONE, 9, 19, 20, NONE, NONE, NONE, NONE, NONE, NONE, NONE, 38, 39]
        + [NONE] * 4
    )
    sequences = MetSource(target, source, meetings, 5, 8)
    assert len(sequences) == 4
    tokens, window, places = (
        np.asarray(of) for of in unpack(jnp.stack([sequences[i] for i in range(4)]), 5)
    )
    np.testing.assert_array_equal(tokens, [range(100 + i, 106 + i) for i in (0, 5, 10, 15)])
    np.testing.assert_array_equal(window[:2], [range(503, 511), range(509, 517)])
    np.testing.assert_array_equal(window[3], [538, 539, 0, 0, 0, 0, 0, 0])  # the source ends there
    np.testing.assert_array_equal(
        places,
        [[NONE, 0, 2, 3, NONE], [0, NONE, NONE, NONE, NONE], [NONE] * 5, [0, 1, NONE, NONE, NONE]],
    )
    assert teaching.window_length(source, target, 64, 999) == 192
    assert teaching.window_length(source, target, 64, 100) == 100


def test_states_are_compared_at_meetings_alone(draw):
    states, source = draw(B, T, D), draw(B, S, D)
    taught, is_met = teaching.at_places(jnp.array(source), jnp.array(PLACES)), PLACES != NONE
    found = states[is_met].astype(np.float64)
    wanted = np.array([source[b, PLACES[b, t]] for b, t in np.argwhere(is_met)], np.float64)
    error = teaching.state_error(states, taught, is_met)
    np.testing.assert_allclose(
        error, np.sum((found - wanted) ** 2) / np.sum((wanted - wanted.mean(0)) ** 2), rtol=1e-5
    )
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(wanted, axis=1)
    angle = teaching.angle_error(states, taught, is_met)
    np.testing.assert_allclose(
        angle, np.mean(1 - np.sum(found * wanted, axis=1) / norms), rtol=1e-5
    )
    nowhere = np.zeros_like(is_met)
    assert teaching.state_error(states, taught, nowhere) == 0
    assert teaching.angle_error(states, taught, nowhere) == 0


def test_divergence_and_its_gradient(draw):
    states, taught, own, other = draw(B, T, D), draw(B, T, D), draw(R, D), draw(R, D)
    is_met = PLACES != NONE

    def loss(states, own):
        return teaching.divergence((states, own), (taught, other), is_met, HOW)

    value, (of_states, of_rows) = jax.jit(jax.value_and_grad(loss, (0, 1)))(states, own)
    expected, found = log_softmax(taught, other), log_softmax(states, own)
    terms = np.sum(np.exp(expected) * (expected - found), axis=-1)
    np.testing.assert_allclose(value, terms[is_met].mean(), rtol=1e-5)
    slope = np.where(is_met[..., None], np.exp(found) - np.exp(expected), 0.0) / is_met.sum()
    np.testing.assert_allclose(of_states, slope @ own[:V], atol=1e-6)
    np.testing.assert_allclose(of_rows[:V], np.einsum("btv,btd->vd", slope, states), atol=1e-6)
    assert not np.any(of_rows[V:])


def test_each_likelihood_has_a_gradient_of_its_own(draw):
    states, head, weights = draw(B, T, D), draw(R, D), draw(B, T)
    labels = np.random.default_rng(1).integers(NONE, V, (B, T))
    given = jnp.array(labels)
    value, gradient = jax.jit(
        jax.value_and_grad(lambda states: jnp.sum(weights * teaching.nll(states, head, given, HOW)))
    )(states)
    logs = log_softmax(states, head)
    counts, chosen = (
        labels >= 0,
        np.take_along_axis(logs, np.maximum(labels, 0)[..., None], -1)[..., 0],
    )
    assert counts.any() and not counts.all()
    np.testing.assert_allclose(value, -np.sum(weights * chosen * counts), rtol=1e-5)
    slope = (np.exp(logs) - np.eye(V)[np.maximum(labels, 0)]) * (weights * counts)[..., None]
    np.testing.assert_allclose(gradient, slope @ head[:V], atol=1e-5)


def test_likelihoods_are_of_the_bytes_between_meetings(draw):
    student, teacher = 0.1 + np.abs(draw(B, T)), 0.1 + np.abs(draw(B, S))
    spans = [(0, (1, 2), (1, 2)), (0, (2, 4), (2, 6)), (0, (4, 5), (6, 7)), (1, (0, 3), (0, 10))]
    terms = []
    for row, (begin, end), (first, last) in spans:
        p = np.exp(-teacher[row, first:last].sum(dtype=np.float64) / teaching.TEMPERATURE)
        q = np.exp(-student[row, begin:end].sum(dtype=np.float64) / teaching.TEMPERATURE)
        terms.append(p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q)))
    loss = jax.jit(jax.value_and_grad(teaching.likelihood_error))
    value, gradient = loss(student, teacher, PLACES)
    np.testing.assert_allclose(value, teaching.TEMPERATURE * np.mean(terms), rtol=2e-3)
    assert (
        np.all(np.isfinite(gradient))
        and not np.any(gradient[0, [0, 5, 6]])
        and not np.any(gradient[1, 3:])
    )
    alone, slope = loss(student, teacher, np.full((B, T), NONE))
    assert alone == 0 and not np.any(slope)
