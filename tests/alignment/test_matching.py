"""Matching: relative representations, blocked retrieval and CSLS against NumPy, calibration."""

from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest

from tokalign_jax.alignment import matching


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def centred(rows):
    rows = unit(rows)
    return unit(rows - rows.mean(axis=0))


def space(n=600, d=24, seed=0):
    """Vectors with directions of unequal weight and an offset, as GloVe's have."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, d)) * np.linspace(2, 0.3, d) + rng.normal(size=d)).astype(
        np.float32
    )


def rotation(d, seed=1):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]


def split(n, pivots=300, validation=100, seed=2):
    order = np.random.default_rng(seed).permutation(n)
    same = np.stack([order, order], axis=1)
    return same[:pivots], same[pivots : pivots + validation]


def test_relative_representations_are_whitened_cosines_to_the_pivots():
    vectors = space()
    pivots = np.arange(0, 600, 3)
    found = np.asarray(matching.relative(jnp.asarray(vectors), jnp.asarray(pivots)))
    x = centred(vectors.astype(np.float64))
    anchors = x[pivots]
    gram = anchors.T @ anchors
    values, directions = np.linalg.eigh(
        gram + matching.RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
    )
    expected = unit(x @ (directions / np.sqrt(values)) @ directions.T @ anchors.T)
    np.testing.assert_allclose(found, expected, atol=2e-4)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, rtol=1e-5)
    # Whitening keeps lengths: the products of representations are nearly those of the vectors.
    np.testing.assert_allclose(found @ found.T, x @ x.T, atol=0.05)


def test_common_space_gives_the_products_of_relative_representations():
    source, target = space(500, 16, seed=3), space(400, 24, seed=4)
    pivots = np.stack([np.arange(0, 400, 2), np.arange(1, 400, 2)], axis=1)
    keys, queries = matching.common_space(
        jnp.asarray(source), jnp.asarray(target), jnp.asarray(pivots)
    )
    of_source = matching.relative(jnp.asarray(source), jnp.asarray(pivots[:, 0]))
    of_target = matching.relative(jnp.asarray(target), jnp.asarray(pivots[:, 1]))
    np.testing.assert_allclose(queries @ keys.T, of_target @ of_source.T, atol=2e-4)


@pytest.mark.parametrize(("queries", "keys", "k"), [(5, 7, 3), (130, 300, 10), (64, 128, 1)])
def test_blocked_retrieval_is_retrieval_from_the_whole_matrix(monkeypatch, queries, keys, k):
    monkeypatch.setattr(matching, "SCORES", 32 * 300)
    rng = np.random.default_rng(0)
    q, key, penalty = (
        rng.normal(size=(queries, 9)),
        rng.normal(size=(keys, 9)),
        rng.normal(size=keys),
    )
    values, indices = matching.nearest(jnp.float32(q), jnp.float32(key), jnp.float32(penalty), k)
    scores = q @ key.T - penalty
    expected = np.argsort(-scores, axis=1)[:, :k]
    assert np.array_equal(indices, expected)
    np.testing.assert_allclose(
        values, np.take_along_axis(scores, expected, axis=1), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(("queries", "around"), [(80, 2**16), (90, 30)])
def test_csls_is_the_published_score(monkeypatch, queries, around):
    """The ranking is, with hubness against the most frequent queries; and the score but for r_q,
    the mean cosine with the best keys instead of the nearest.
    """
    monkeypatch.setattr(matching, "AROUND", around)
    rng = np.random.default_rng(0)
    queries, keys = unit(rng.normal(size=(queries, 12))), unit(rng.normal(size=(120, 12)))
    found, scores = matching.csls(jnp.float32(queries), jnp.float32(keys), neighbours=5, k=3)
    cosines = queries @ keys.T
    around_keys = np.sort(cosines[:around], axis=0)[-5:].mean(axis=0)
    best = np.argsort(-(2 * cosines - around_keys), axis=1)
    around_queries = np.take_along_axis(cosines, best[:, :5], axis=1).mean(axis=1)
    published = 2 * cosines - around_queries[:, None] - around_keys
    assert np.array_equal(found, best[:, :3])
    np.testing.assert_allclose(
        scores, np.take_along_axis(published, best[:, :3], axis=1) / 2, atol=1e-5
    )


def test_csls_avoids_a_hub():
    """A key in the centre is every query's nearest by cosine, and none's by CSLS."""
    rng = np.random.default_rng(0)
    queries = unit(rng.normal(size=(200, 40)) + 0.5)
    keys = np.concatenate(
        [unit(queries + 1.3 * unit(rng.normal(size=(200, 40)))), unit(queries.mean(axis=0)[None])]
    )
    hub = 200
    by_cosine = (queries @ keys.T).argmax(axis=1)
    by_csls = np.asarray(matching.csls(jnp.float32(queries), jnp.float32(keys), 10)[0])[:, 0]
    assert np.mean(by_cosine == hub) > 0.1
    assert np.mean(by_csls == hub) < np.mean(by_cosine == hub) / 3
    assert np.mean(by_csls == np.arange(200)) > np.mean(by_cosine == np.arange(200))


def test_space_matches_its_own_rotation():
    source = space()
    target = source @ rotation(24).astype(np.float32)
    found = matching.match(source, target, *split(600), neighbours=10)
    assert np.array_equal(found.source[:, 0], np.arange(600))
    assert found.accuracy == 1.0
    assert found.similarity.mean() > 0.97
    assert found.similarity.min() > 0.8  # a hundred pairs are no proof of certainty


def test_order_of_tokens_does_not_matter():
    rng = np.random.default_rng(5)
    source = space()
    target = source @ rotation(24).astype(np.float32) + 0.3 * rng.normal(size=source.shape).astype(
        np.float32
    )
    pivots, validation = split(600)
    found = matching.match(source, target, pivots, validation, neighbours=10)
    order, place = rng.permutation(600), np.empty(600, int)
    place[order] = np.arange(600)  # row `order[i]` of before is row i of now
    moved = [np.stack([pairs[:, 0], place[pairs[:, 1]]], axis=1) for pairs in (pivots, validation)]
    again = matching.match(source, target[order], *moved, neighbours=10)
    assert np.mean(again.source == found.source[order]) > 0.995
    np.testing.assert_allclose(again.similarity, found.similarity[order], atol=0.02)
    assert 0.3 < found.accuracy <= 1.0


def test_unrelated_spaces_fall_below_every_threshold():
    source, target = (
        space(seed=6),
        np.random.default_rng(7).normal(size=(600, 32)).astype(np.float32),
    )
    found = matching.match(source, target, *split(600), neighbours=10)
    assert found.accuracy < 0.05
    assert np.quantile(found.similarity, 0.99) < 0.3


def test_fewer_pivots_than_dimensions_still_work():
    source = space(d=64)
    target = source @ rotation(64).astype(np.float32)
    found = matching.match(source, target, *split(600, pivots=32), neighbours=10)
    assert np.isfinite(found.similarity).all()
    assert found.accuracy > 0.9


def test_platt_recovers_a_logistic_curve():
    rng = np.random.default_rng(0)
    scores = rng.normal(0.3, 0.1, 20_000)
    right = rng.random(20_000) < 1 / (1 + np.exp(-(15 * scores - 6)))
    slope, offset = matching.platt(scores[right], scores[~right])
    assert slope == pytest.approx(15, rel=0.1)
    assert offset == pytest.approx(-6, rel=0.1)


def test_platt_scores_are_monotone_and_below_one():
    slope, offset = matching.platt(np.full(10, 0.9), np.full(10, 0.1))
    assert 0.8 < 1 / (1 + np.exp(-(slope * 0.9 + offset))) < 0.99
    slope, offset = matching.platt(np.full(10, 0.1), np.full(10, 0.9))
    assert slope == 0.0
    slope, offset = matching.platt(np.zeros(0), np.linspace(0, 1, 50))
    assert 1 / (1 + np.exp(-(slope * 1.0 + offset))) < 0.1


def test_pivots_are_frequent_and_disjoint_from_validation_pairs():
    ranks = np.random.default_rng(0).permutation(5000)
    pivots, validation = matching.choose_pivots(ranks, np.arange(5000), 100, seed=0)
    assert len(pivots) == 100 and len(validation) == 500
    assert not set(pivots) & set(validation)
    worst = np.maximum(ranks, np.arange(5000))
    assert worst[pivots].max() <= np.sort(worst)[100 * matching.PIVOT_POOL + len(validation)]
    again, _ = matching.choose_pivots(ranks, np.arange(5000), 100, seed=0)
    other, _ = matching.choose_pivots(ranks, np.arange(5000), 100, seed=1)
    assert np.array_equal(pivots, again) and not np.array_equal(pivots, other)
    everything, validation = matching.choose_pivots(ranks, np.arange(5000), 10**6, seed=0)
    assert sorted([*everything, *validation]) == list(range(5000))


@pytest.mark.parametrize("share", ["1/10", "3/20", "1/3"])
def test_share_of_validation_pairs_is_rounded_up(monkeypatch, share):
    monkeypatch.setattr(matching, "VALIDATION_SHARE", Fraction(share))
    numerator, denominator = map(int, share.split("/"))
    for shared in range(1, 100):
        _, validation = matching.choose_pivots(np.arange(shared), np.arange(shared), 5, seed=0)
        assert len(validation) == -(-shared * numerator // denominator)


def test_temperature_maximises_the_likelihood_of_validation_pairs():
    rng = np.random.default_rng(0)
    scores = np.sort(rng.normal(0.2, 0.1, (4000, 6)))[:, ::-1].astype(np.float32)
    weights = matching.softmax_weights(scores, 0.05)
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    drawn = np.array([rng.choice(6, p=w) for w in weights])  # whose own token is which of the six
    found = matching.Matches(np.tile(np.arange(6), (4000, 1)), scores, scores[:, 0], 0.0)
    validation = np.stack([drawn, np.arange(4000)], axis=1)
    assert matching.temperature(found, validation) == pytest.approx(0.05, rel=0.15)
    nowhere = np.stack([np.full(4000, 99), np.arange(4000)], axis=1)
    assert matching.temperature(found, nowhere) == matching.TEMPERATURES[-1]
