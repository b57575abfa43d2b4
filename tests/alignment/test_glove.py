"""GloVe: loss and gradient against float64, the block program against a plain loop, convergence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.alignment.test_cooccurrence import random_documents, shards_of
from tokalign_jax.alignment import cooccurrence, glove
from tokalign_jax.config import AlignmentConfig, GloveConfig

OBJECTIVE = glove.Objective(rate=0.2, x_max=10.0, power=0.75)


def random_block(side: int, dimensions: int, pairs: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    words, contexts = (rng.normal(size=(side, dimensions + 2)) for _ in range(2))
    words[:, -1], contexts[:, -2] = 1.0, 1.0
    cells = np.sort(rng.choice(side * side, pairs, replace=False))
    counts = np.exp(rng.normal(1.0, 2.0, pairs))
    return words, contexts, cells, counts


def reference(words, contexts, cells, counts):
    """Equations 8 and 9, pair by pair in float64; the gradient without its factor 2, as the C
    program has it.
    """
    side = len(words)
    for_words, for_contexts = np.zeros_like(words), np.zeros_like(contexts)
    for cell, count in zip(cells, counts):
        i, j = divmod(int(cell), side)
        w, b, c, b_context = words[i, :-2], words[i, -2], contexts[j, :-2], contexts[j, -1]
        weight = min(1.0, (count / 10.0) ** 0.75)
        error = w @ c + b + b_context - np.log(count)
        for_words[i, :-2] += weight * error * c
        for_words[i, -2] += weight * error
        for_contexts[j, :-2] += weight * error * w
        for_contexts[j, -1] += weight * error
    return published_loss(words, contexts, cells, counts), for_words, for_contexts


def published_loss(words, contexts, cells, counts):
    """Equation 8 with the weights of equation 9, in float64: J = sum f(X_ij) (w_i . c_j + b_i + b_j
    - log X_ij)^2.
    """
    i, j = np.divmod(cells, len(words))
    product = np.sum(words[i, :-2] * contexts[j, :-2], axis=1) + words[i, -2] + contexts[j, -1]
    return np.sum(
        np.where(counts < 10.0, (counts / 10.0) ** 0.75, 1.0) * (product - np.log(counts)) ** 2
    )


def test_reference_gradient_is_half_the_slope_of_the_published_loss():
    """Central differences in float64, for every parameter."""
    words, contexts, cells, counts = random_block(side=4, dimensions=2, pairs=9)
    _, for_words, for_contexts = reference(words, contexts, cells, counts)
    for values, gradient, fixed in ((words, for_words, -1), (contexts, for_contexts, -2)):
        for place in np.ndindex(values.shape):
            if place[1] == values.shape[1] + fixed:
                continue
            kept, losses = values[place], []
            for step in (1e-5, -1e-5):
                values[place] = kept + step
                losses.append(published_loss(words, contexts, cells, counts))
            values[place] = kept
            assert (losses[0] - losses[1]) / 4e-5 == pytest.approx(
                gradient[place], rel=1e-6, abs=1e-8
            )


@pytest.mark.parametrize("dense", [True, False])
def test_loss_and_gradient_are_the_published_ones(dense):
    words, contexts, cells, counts = random_block(side=16, dimensions=5, pairs=70)
    padded = np.concatenate([cells, np.full(10, 16 * 16)]).astype(np.int32)
    logs = np.concatenate([np.log(counts), np.full(10, 3.0)]).astype(np.float32)
    found = glove.gradients(
        jnp.float32(words),
        jnp.float32(contexts),
        jnp.asarray(padded),
        jnp.asarray(logs),
        OBJECTIVE,
        dense,
    )
    for got, expected in zip(found, reference(words, contexts, cells, counts)):
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())


def test_gradient_is_half_that_of_the_loss():
    words, contexts, cells, counts = random_block(side=8, dimensions=3, pairs=20)
    arguments = (jnp.asarray(cells.astype(np.int32)), jnp.float32(np.log(counts)), OBJECTIVE, True)
    words, contexts = jnp.float32(words), jnp.float32(contexts)
    _, for_words, for_contexts = glove.gradients(words, contexts, *arguments)
    automatic = jax.grad(lambda w, c: glove.gradients(w, c, *arguments)[0], argnums=(0, 1))(
        words, contexts
    )
    np.testing.assert_allclose(2 * for_words[:, :-1], automatic[0][:, :-1], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(2 * for_contexts[:, :-2], automatic[1][:, :-2], rtol=1e-4, atol=1e-4)
    assert not np.any(for_words[:, -1]) and not np.any(
        for_contexts[:, -2]
    )  # the constant columns stay 1


def counts_of(seed: int = 3, vocabulary: int = 60) -> cooccurrence.Cooccurrence:
    documents = random_documents(seed, documents=40, longest=80, vocabulary=vocabulary)
    return cooccurrence.count(shards_of(documents, vocabulary), 5, 1, lambda line: None)


WAYS = pytest.mark.parametrize("way", ["dense", "pairwise", "strata"])


def trained(way: str, monkeypatch, counts, config, seed=0):
    monkeypatch.setattr(
        glove, "DENSE_SHARE", {"dense": 0.0, "pairwise": 2.0}.get(way, glove.DENSE_SHARE)
    )
    return glove.train(counts, config, seed, lambda line: None, strata=way == "strata")


@WAYS
def test_first_reported_loss_is_the_initial_one(way, monkeypatch):
    """One pass at a rate of next to nothing: the sum over blocks, mirrors included, is the sum over
    all pairs.
    """
    counts = counts_of()
    config = AlignmentConfig(vector_size=4, glove=GloveConfig(iterations=1, learning_rate=1e-12))
    _, losses = trained(way, monkeypatch, counts, config)
    words, contexts = start_of(counts, config)
    loss, _, _ = reference(words, contexts, *full_matrix(counts, len(words)))
    assert losses[0] == pytest.approx(
        loss / (2 * len(counts) - np.sum(counts.rows == counts.cols)), rel=1e-5
    )


def start_of(counts, config) -> tuple[np.ndarray, np.ndarray]:
    """Initial state of `train` with seed 0, in float64."""
    objective = glove.Objective(
        config.glove.learning_rate * glove.RATE_SCALE, config.glove.x_max, config.glove.alpha
    )
    size = glove.block_size(len(counts.vocabulary))
    blocks = glove._start(counts, objective, config.vector_size, size, np.random.default_rng(0))
    words, contexts = (
        np.asarray(a, np.float64).reshape(-1, a.shape[-1]) for a in (blocks.words, blocks.contexts)
    )
    return words, contexts


def full_matrix(counts, side: int) -> tuple[np.ndarray, np.ndarray]:
    """(cells, values) of both triangles; a cell is row * side + column."""
    off = counts.rows != counts.cols
    cells = np.concatenate(
        [counts.rows * side + counts.cols, (counts.cols * side + counts.rows)[off]]
    )
    return cells, np.concatenate([counts.counts, counts.counts[off]])


def test_pass_over_strata_equals_adagrad_over_disjoint_blocks():
    """Against float64: for each stratum in the order drawn, one step from its gradient at one
    point.
    """
    counts, config = counts_of(), AlignmentConfig(vector_size=4, glove=GloveConfig(iterations=1))
    vectors, losses = glove.train(counts, config, 0, lambda line: None, strata=True)
    rng = np.random.default_rng(0)
    words, contexts = start_of(counts, config)
    rng.random((2, len(words), 4))  # what the start has drawn
    size = glove.block_size(len(counts.vocabulary))
    blocks = len(words) // size
    cells, values = full_matrix(counts, len(words))
    rows, cols = np.divmod(cells, len(words))
    stratum = (cols // size - rows // size) % blocks
    squares, loss = [np.ones_like(words), np.ones_like(contexts)], 0.0
    for k in rng.permutation(blocks):
        part, *gradients = reference(words, contexts, cells[stratum == k], values[stratum == k])
        loss += part
        for parameters, sums, gradient in zip((words, contexts), squares, gradients):
            sums += gradient**2
            parameters -= 0.05 * glove.RATE_SCALE * gradient / np.sqrt(sums)
    assert losses[0] == pytest.approx(loss / len(cells), rel=1e-4)
    np.testing.assert_allclose(vectors, (words + contexts)[: len(vectors), :4], atol=1e-4)


def test_dense_and_pairwise_steps_learn_the_same(monkeypatch):
    counts, config = counts_of(), AlignmentConfig(vector_size=8, glove=GloveConfig(iterations=3))
    results = [trained(way, monkeypatch, counts, config) for way in ("dense", "pairwise")]
    np.testing.assert_allclose(results[0][0], results[1][0], atol=2e-3)
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-3)


def test_pairs_larger_than_device_memory_are_streamed(monkeypatch):
    counts, config = counts_of(), AlignmentConfig(vector_size=4, glove=GloveConfig(iterations=2))
    resident = glove.train(counts, config, 0, lambda line: None, strata=True)
    monkeypatch.setattr(glove, "_fits_device", lambda size: False)
    copied = glove.train(counts, config, 0, lambda line: None, strata=True)
    assert np.array_equal(resident[0], copied[0]) and resident[1] == copied[1]


@pytest.mark.parametrize("strata", [True, False])
def test_loss_falls_as_with_one_adagrad_step_per_pair(strata):
    """Against the C program's loop in float64 with the published rate: the same loss after as many
    passes.
    """
    counts, config = (
        counts_of(vocabulary=200),
        AlignmentConfig(vector_size=10, glove=GloveConfig(iterations=10)),
    )
    vectors, losses = glove.train(counts, config, 0, lambda line: None, strata=strata)
    assert vectors.shape == (len(counts.vocabulary), 10)
    assert np.isfinite(vectors).all()
    published = sgd(counts, dimensions=10, passes=10)
    assert losses[-1] < 0.8 * losses[0]
    assert losses[-1] < 1.25 * published


def sgd(counts: cooccurrence.Cooccurrence, dimensions: int, passes: int) -> float:
    """Published GloVe: for each pair in random order an AdaGrad step of rate 0.05, accumulators
    from 1.
    """
    rng = np.random.default_rng(0)
    n = len(counts.vocabulary)
    off = counts.rows != counts.cols
    rows = np.concatenate([counts.rows, counts.cols[off]])
    cols = np.concatenate([counts.cols, counts.rows[off]])
    values = np.concatenate([counts.counts, counts.counts[off]])
    words, contexts = ((rng.random((n, dimensions + 1)) - 0.5) / dimensions for _ in range(2))
    word_squares, context_squares = np.ones_like(words), np.ones_like(contexts)
    loss = 0.0
    for _ in range(passes):
        loss = 0.0
        for k in rng.permutation(len(rows)):
            w, c, i, j = words[rows[k]], contexts[cols[k]], rows[k], cols[k]
            error = w[:-1] @ c[:-1] + w[-1] + c[-1] - np.log(values[k])
            weight = min(1.0, (values[k] / 10.0) ** 0.75)
            loss += weight * error**2
            pull = 0.05 * weight * error
            for_word, for_context = pull * np.append(c[:-1], 1.0), pull * np.append(w[:-1], 1.0)
            words[i] = w - for_word / np.sqrt(word_squares[i])
            contexts[j] = c - for_context / np.sqrt(context_squares[j])
            word_squares[i] += for_word**2
            context_squares[j] += for_context**2
    return loss / len(rows)


@WAYS
def test_same_seed_gives_the_same_vectors(way, monkeypatch):
    counts, config = counts_of(), AlignmentConfig(vector_size=4, glove=GloveConfig(iterations=2))
    first, again, other = (trained(way, monkeypatch, counts, config, seed)[0] for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.allclose(first, other)


def test_starting_biases_nearly_minimise_the_loss_without_vectors():
    counts = counts_of()
    biases = glove._biases(counts, OBJECTIVE)
    n = len(biases)

    def loss(b):
        weights = np.minimum(1.0, (counts.counts / 10.0) ** 0.75) * np.where(
            counts.rows == counts.cols, 1, 2
        )
        return np.sum(weights * (b[counts.rows] + b[counts.cols] - np.log(counts.counts)) ** 2)

    rng = np.random.default_rng(0)
    assert loss(biases) < 0.5 * loss(np.zeros(n))
    assert loss(biases) <= min(loss(biases + 0.05 * rng.normal(size=n)) for _ in range(20))


def test_block_sizes_leave_enough_steps():
    assert [glove.block_size(n) for n in (1, 100, 200, 1000, 8192, 200_000)] == [
        8,
        8,
        8,
        32,
        512,
        512,
    ]


@pytest.mark.parametrize("strata", [True, False])
def test_vectors_without_pairs_keep_their_initial_values(strata):
    counts = cooccurrence.count(shards_of([[1], [2], [1], [2]], 4), 5, 1, lambda line: None)
    vectors, losses = glove.train(
        counts,
        AlignmentConfig(vector_size=4, glove=GloveConfig(iterations=2)),
        0,
        lambda line: None,
        strata=strata,
    )
    assert vectors.shape == (2, 4) and losses == [0.0, 0.0]
