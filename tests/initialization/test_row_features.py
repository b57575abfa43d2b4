"""Features of composed tokens, against a computation on whole arrays, and their memory."""

import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest

from tokalign_jax.initialization import row_features


def inputs(count, width=24, vocabulary=300, seed=0):
    random = np.random.default_rng(seed)
    rows = random.normal(size=(vocabulary, width)).astype(np.float32)
    parts = [random.integers(0, vocabulary, random.integers(1, 6)).tolist() for _ in range(count)]
    states = [random.normal(3, 2, (count, width)).astype(np.float32) for _ in row_features.DEPTHS]
    return rows, parts, random.integers(1, 20, count), states


def whole(rows, parts, sizes, states):
    """All standardised blocks of all tokens at once."""

    def standardised(values):
        values = values.astype(np.float32)
        values -= values.mean(axis=0)
        return values / (values.std() + 1e-6)

    blocks = [
        np.stack([rows[pieces].mean(axis=0) for pieces in parts]),
        *(rows[[pieces[min(i, len(pieces) - 1)] for pieces in parts]] for i in (0, 1)),
        rows[[pieces[-1] for pieces in parts]],
        np.stack([list(map(len, parts)), sizes], axis=1),
        *states,
    ]
    return np.concatenate([standardised(block) for block in blocks], axis=1)


@pytest.mark.parametrize("at_once", [7, 50, 1000])
def test_features_do_not_depend_on_how_many_are_computed_at_once(at_once, monkeypatch):
    monkeypatch.setattr(row_features, "ROWS", at_once)
    arguments = inputs(50)
    found = row_features.features(*arguments, seed=0)
    np.testing.assert_array_equal(found[:, :-1], whole(*arguments))
    assert found.dtype == np.float32 and (found[:, -1] == 1).all()


@pytest.mark.parametrize("at_once", [7, 1000])
def test_many_features_are_projected(at_once, monkeypatch):
    monkeypatch.setattr(row_features, "ROWS", at_once)
    monkeypatch.setattr(row_features, "MOST", 16)
    arguments = inputs(50)
    found, values = row_features.features(*arguments, seed=3), whole(*arguments)
    width = values.shape[1]
    projection = np.random.default_rng(3).normal(0, width**-0.5, (width, 16))
    np.testing.assert_allclose(found[:, :-1], values @ projection, atol=1e-5)
    assert found.shape == (50, 17) and (found[:, -1] == 1).all()


def test_features_are_rounded_once_to_a_narrower_type():
    arguments = inputs(50)
    narrow = row_features.features(*arguments, seed=0, dtype=jnp.bfloat16)
    exact = row_features.features(*arguments, seed=0)
    np.testing.assert_array_equal(narrow, exact.astype(jnp.bfloat16))


def test_memory_beside_the_result_is_that_of_two_blocks_at_most(monkeypatch):
    """All blocks together have the size of the result, which copies of them would multiply."""
    monkeypatch.setattr(row_features, "ROWS", 500)
    arguments = inputs(20_000)
    tracemalloc.start()
    found = row_features.features(*arguments, seed=0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    block = arguments[-1][0].nbytes
    assert peak < found.nbytes + 2 * block
