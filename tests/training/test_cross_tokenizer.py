"""Distillation across tokenizers against float64 NumPy and autodiff of full logits."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.toys import LLAMA as TWO_LAYERS
from tests.training.toys import toy_params
from tokalign_jax.config import ComputeConfig
from tokalign_jax.models import transformer
from tokalign_jax.parallel import sharding
from tokalign_jax.training import cross_tokenizer
from tokalign_jax.training.cross_tokenizer import Batch, Models, Weights

LLAMA = replace(TWO_LAYERS, num_layers=4, layer_kinds=TWO_LAYERS.layer_kinds[:1] * 4)
COMPUTE = ComputeConfig(dtype="float32", loss_chunk=10)
TEACHER = replace(LLAMA, vocab_size=53)
MODELS = Models(LLAMA, TEACHER, COMPUTE)
# Two rows. The first: chunks of 1+1, 2+1 and 1+2 tokens (target + source), then one without an end.
POSITIONS = np.array([[0, 1, -1, 2, 4, -1], [0, -1, 3, 4, 5, -1]])


def batch(seed=0):
    random = np.random.default_rng(seed)
    target = random.integers(0, LLAMA.vocab_size, (2, 7)).astype(np.int32)
    target[0, 3] = target[0, 0]  # Another document starts.
    target[1, -1] = -1
    source = random.integers(0, TEACHER.vocab_size, (2, 8)).astype(np.int32)
    weights = np.array([1.0, 0.5], np.float32), np.array([0.5, 1.0], np.float32)
    return Batch(target, source, POSITIONS.astype(np.int32), *weights)


def whole_loss(params, teacher, data, weights):
    """The loss by its formulas, with whole logits and Python loops over chunks; jnp, for autodiff."""

    def nll(config, params, tokens, labels):
        logits = jax.nn.log_softmax(transformer.logits(config, params, tokens))
        return -jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], -1)[..., 0]

    target, source = jnp.asarray(data.target), jnp.asarray(data.source)
    student_nll = nll(LLAMA, params, jnp.maximum(target[:, :-1], 0), target[:, 1:])
    teacher_nll = nll(TEACHER, teacher, source[:, :-1], source[:, 1:])
    hidden = transformer.forward(LLAMA, params, jnp.maximum(target[:, :-1], 0))
    taught = transformer.forward(TEACHER, teacher, source)
    learned = (data.target[:, 1:] >= 0) & (data.target[:, 1:] != data.target[:, :1])
    count = learned.sum()
    next_token, likelihood, chunks, pairs = 0.0, 0.0, 0, []
    for row in range(2):
        shared = [(t, p) for t, p in enumerate(data.positions[row].tolist()) if p >= 0]
        alike = {t for (t, p), (u, q) in itertools.pairwise(shared) if u == t + 1 and q == p + 1}
        for t in range(6):
            if data.target[row, t + 1] >= 0:
                factor = 1.0 if t in alike else weights.emphasis
                loss = factor * student_nll[row, t] / count
                next_token += data.next_token[row] * loss * learned[row, t]
                if t in alike:
                    pairs.append((hidden[row, t], taught[row, data.positions[row, t]]))
        for (t, p), (u, q) in itertools.pairwise(shared):
            nats_q, nats_p = student_nll[row, t:u].sum(), teacher_nll[row, p:q].sum()
            log_p, log_q = (
                -nats_p / cross_tokenizer.TEMPERATURE,
                -nats_q / cross_tokenizer.TEMPERATURE,
            )
            p_, q_ = jnp.exp(log_p), jnp.exp(log_q)
            each = p_ * (log_p - log_q) + (1 - p_) * jnp.log((1 - p_) / (1 - q_))
            factor = 1.0 if t in alike else weights.emphasis
            likelihood += data.likelihood[row] * factor * cross_tokenizer.TEMPERATURE * each
            chunks += 1
    own, theirs = (jnp.stack(states) for states in zip(*pairs))
    states = jnp.square(own - theirs).sum() / jnp.square(theirs - theirs.mean(0)).sum()
    inner = inner_distances(params, teacher, data)
    return (
        next_token + likelihood / chunks + weights.states * states + weights.inner * jnp.mean(inner)
    )


def inner_distances(params, teacher, data):
    """The distance after each layer that is compared."""
    read, layers = jnp.maximum(jnp.asarray(data.target)[:, :-1], 0), [1, 2, 3]
    own = transformer.forward_with_inner_states(LLAMA, params, read, layers)[1]
    theirs = transformer.forward_with_inner_states(TEACHER, teacher, data.source, layers)[1]
    places = [(row, t) for row, t in zip(*np.nonzero(data.positions >= 0)) if t > 0]
    distances = []
    for student, taught in zip(own, theirs, strict=True):
        mine = jnp.stack([student[row, t] for row, t in places])
        others = jnp.stack([taught[row, data.positions[row, t]] for row, t in places])
        error = jnp.square(mine - others).mean(0)
        distances.append(jnp.mean(error / jnp.square(others - others.mean(0)).mean(0)))
    return jnp.stack(distances)


def test_loss_and_gradients_match_the_formulas():
    params, teacher, weights = toy_params(LLAMA, 0), toy_params(TEACHER, 1), Weights()
    params, teacher = (
        jax.tree.map(lambda x: 3 * jnp.asarray(x), tree) for tree in (params, teacher)
    )
    data = batch()
    expected, expected_gradients = jax.value_and_grad(whole_loss)(params, teacher, data, weights)
    (value, terms), gradients = jax.jit(
        jax.value_and_grad(cross_tokenizer.loss, argnums=1, has_aux=True), static_argnums=(0, 4)
    )(MODELS, params, teacher, data, weights)
    np.testing.assert_allclose(value, expected, rtol=2e-5)
    np.testing.assert_allclose(terms.loss, expected, rtol=2e-5)
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients)):
        np.testing.assert_allclose(one, other, atol=2e-5 * float(jnp.abs(other).max() + 1e-3))


def test_student_equal_to_its_teacher_has_only_the_next_token_loss():
    params = toy_params(LLAMA, 0)
    tokens = np.random.default_rng(0).integers(0, LLAMA.vocab_size, (2, 8)).astype(np.int32)
    same = Batch(
        tokens[:, :7],
        tokens,
        np.tile(np.arange(6, dtype=np.int32), (2, 1)),
        *np.zeros((2, 2), np.float32),
    )
    models = Models(LLAMA, LLAMA, COMPUTE)
    value, terms = cross_tokenizer.loss(models, params, params, same, Weights())
    assert abs(float(value)) < 1e-5 and float(terms.states) < 1e-6 and float(terms.distance) < 1e-5
    assert float(terms.inner) < 1e-6


def test_inner_states_are_compared_at_quarters_of_the_layers():
    assert cross_tokenizer.inner_layers(30) == [8, 15, 22]
    assert cross_tokenizer.inner_layers(4) == [1, 2, 3]
    assert cross_tokenizer.inner_layers(2) == [1] and not cross_tokenizer.inner_layers(1)


def test_dimensions_count_alike_whatever_their_size():
    random = np.random.default_rng(0)
    teacher, error = random.normal(size=(2, 3, 20, 5))
    counts, sizes = random.random((3, 20)) < 0.7, np.array([1.0, 1e3, 1e-3, 1.0, 10.0])
    found = cross_tokenizer.inner_distance(
        jnp.asarray((teacher + error) * sizes), jnp.asarray(teacher * sizes), jnp.asarray(counts)
    )
    expected = np.square(error)[counts].mean(0) / teacher[counts].var(0)
    np.testing.assert_allclose(found, expected.mean(), rtol=1e-4)


@pytest.mark.parametrize("value", [0.0, 3.0, 1234.5])
def test_dimensions_without_variance_do_not_count(value):
    """Also where the mean of equal values is not exact."""
    random = np.random.default_rng(0)
    teacher, student = random.normal(size=(2, 7, 1000, 3)).astype(np.float32)
    teacher[..., 1], counts = value, jnp.ones((7, 1000), bool)
    student = jnp.asarray(student)
    found, slope = jax.value_and_grad(cross_tokenizer.inner_distance)(student, teacher, counts)
    others = [0, 2]
    expected = cross_tokenizer.inner_distance(student[..., others], teacher[..., others], counts)
    np.testing.assert_allclose(found, expected * 2 / 3, rtol=1e-5)
    assert jnp.isfinite(slope).all() and not slope[..., 1].any() and slope[..., others].any()


@pytest.mark.parametrize("number", [0, 1])
def test_states_at_one_position_have_no_distance(number):
    student, teacher = np.random.default_rng(0).normal(size=(2, 2, 6, 8)).astype(np.float32)
    counts = jnp.zeros((2, 6), bool).at[1, 3].set(bool(number))
    for distance in (cross_tokenizer.inner_distance, cross_tokenizer.state_distance):
        found, slope = jax.value_and_grad(distance)(jnp.asarray(student), teacher, counts)
        assert found == 0 and not slope.any()


def test_rows_that_share_one_boundary_have_a_usual_loss_and_gradients():
    params, teacher, data = toy_params(LLAMA, 0), toy_params(TEACHER, 1), batch()
    few = np.full_like(data.positions, -1)
    few[:, 0], few[0, 2] = 0, 3
    for dtype in ("float32", "bfloat16"):
        models = MODELS._replace(compute=replace(COMPUTE, dtype=dtype))
        (value, terms), gradients = jax.jit(
            jax.value_and_grad(cross_tokenizer.loss, argnums=1, has_aux=True),
            static_argnums=(0, 4),
        )(models, params, teacher, data._replace(positions=few), Weights())
        assert value < 20 and terms.inner == terms.states == 0
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(gradients))


def test_divergence_is_the_binary_one_in_float64():
    student, teacher = np.array([0.5, 3.0, 20.0]), np.array([0.7, 1.0, 40.0])
    p, q = (np.exp(-nats / cross_tokenizer.TEMPERATURE) for nats in (teacher, student))
    expected = cross_tokenizer.TEMPERATURE * (
        p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    )
    np.testing.assert_allclose(cross_tokenizer.divergence(student, teacher), expected, rtol=1e-3)


def test_loss_is_the_same_on_several_devices():
    """Rows of the vocabulary split over the mesh, on as many devices as there are."""
    params, teacher, data = toy_params(LLAMA, 0), toy_params(TEACHER, 1), batch()
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    placed = sharding.place(params, mesh), sharding.place(teacher, mesh)

    @jax.jit
    def on_mesh(params, teacher):
        with sharding.within(mesh):
            return cross_tokenizer.loss(MODELS, params, teacher, data, Weights())[0]

    alone, _ = cross_tokenizer.loss(MODELS, params, teacher, data, Weights())
    np.testing.assert_allclose(on_mesh(*placed), alone, rtol=1e-5)
