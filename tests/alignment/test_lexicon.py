"""Induced lexicons: hidden rotations are recovered from few seeds, and induced pairs are
correct.
"""

import numpy as np
import pytest

from tokalign_jax.alignment import lexicon, matching


def spaces(n=900, d=24, e=24, noise=0.35, seed=0):
    """Source vectors, and the same under a hidden rotation (into e >= d dimensions) and noise;
    token i is token i.
    """
    rng = np.random.default_rng(seed)
    source = rng.normal(size=(n, d)) * np.linspace(1.5, 0.5, d)
    rotation = np.linalg.qr(rng.normal(size=(e, e)))[0][:d]
    target = source @ rotation + noise * rng.normal(size=(n, e))
    return source.astype(np.float32), target.astype(np.float32), rotation


def same(rows):
    return np.stack([rows, rows], axis=1).astype(np.int32)


@pytest.mark.parametrize("e", [24, 30])
def test_hidden_rotation_is_found(e):
    source, target, rotation = spaces(e=e, noise=0.05)
    keys, queries, _ = lexicon.common_space(source, target, same(np.arange(40)), 10)
    found = matching.retrieve(keys, queries, same(np.arange(40, 900)), 10)
    assert found.accuracy > 0.99
    unit = target / np.linalg.norm(target, axis=1, keepdims=True)
    unit = unit - unit.mean(axis=0)
    turned = unit @ rotation.T
    turned /= np.linalg.norm(turned, axis=1, keepdims=True)
    assert np.mean(np.sum(turned * np.asarray(queries), axis=1)) > 0.99


def test_induced_pairs_are_correct_and_improve_the_map():
    source, target, _ = spaces(noise=0.8)
    seeds, validation = same(np.arange(0, 900, 20)), same(np.arange(1, 900, 2))
    keys, queries, joined = lexicon.common_space(source, target, seeds, 10)
    assert len(joined) > 200 and np.mean(joined[:, 0] == joined[:, 1]) > 0.95
    assert (
        not np.isin(joined[:, 1], seeds[:, 1]).any()
        and not np.isin(joined[:, 0], seeds[:, 0]).any()
    )
    assert len(set(joined[:, 0])) == len(set(joined[:, 1])) == len(joined)
    of_seeds = lexicon._mapped(keys, matching.centred(target), seeds)
    alone, induced = (
        matching.retrieve(keys, q, validation, 10).accuracy for q in (of_seeds, queries)
    )
    assert induced > alone + 0.1


def test_lexicon_is_deterministic_and_independent_of_seed_order():
    source, target, _ = spaces(n=400)
    seeds = same(np.arange(0, 400, 8))
    one = lexicon.common_space(source, target, seeds, 10)
    again = lexicon.common_space(source, target, seeds, 10)
    for a, b in zip(one, again):
        np.testing.assert_array_equal(a, b)
    other = lexicon.common_space(source, target, seeds[::-1], 10)
    np.testing.assert_array_equal(one[2], other[2])
    np.testing.assert_allclose(one[1], other[1], atol=1e-4)


def test_unrelated_spaces_induce_no_pairs():
    rng = np.random.default_rng(1)
    source, target = rng.normal(size=(500, 20)), rng.normal(size=(500, 20))
    keys, queries, _ = lexicon.common_space(source, target, same(np.arange(100)), 10)
    found = matching.retrieve(keys, queries, same(np.arange(100, 300)), 10)
    assert found.accuracy < 0.05 and np.quantile(found.similarity, 0.99) < 0.3


def test_only_frequent_tokens_are_induced(monkeypatch):
    monkeypatch.setattr(lexicon, "FREQUENT", 150)
    source, target, _ = spaces(n=400)
    keys, queries, joined = lexicon.common_space(source, target, same(np.arange(0, 400, 8)), 10)
    assert len(joined) and joined.max() < 150
    assert len(keys) == len(queries) == 400
