"""FOCUS and OMP against their formulas in NumPy float64, and as methods of alignment."""

import numpy as np
import pytest

from tokalign_jax.alignment import combinations


def dense(found: combinations.Combinations, rows: int, shared: int) -> np.ndarray:
    weights = np.zeros((rows, shared))
    np.add.at(weights, (found.rows, found.shared), found.weights)
    return weights


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("scores_at_once", [2**25, 300])
def test_focus_weights_are_the_sparsemax_of_cosines(monkeypatch, scores_at_once):
    monkeypatch.setattr(combinations, "SCORES", scores_at_once)
    rng = np.random.default_rng(0)
    centre = rng.normal(size=8)  # cosines near one another: many tokens have a part
    targets, shared = rng.normal(size=(40, 8)) + centre, rng.normal(size=(60, 8)) + centre
    found = combinations.focus(targets, shared)
    weights = dense(found, 40, 60)
    sizes = []
    for cosines, row in zip(unit(targets) @ unit(shared).T, weights):
        falling = np.sort(cosines)[::-1]
        size = max(k for k in range(1, 61) if 1 + k * falling[k - 1] > falling[:k].sum())
        expected = np.maximum(cosines - (falling[:size].sum() - 1) / size, 0)
        np.testing.assert_allclose(row, expected, atol=1e-5)
        sizes.append(size)
    assert len(set(sizes)) > 3 and max(sizes) > 5
    np.testing.assert_allclose(
        found.scores, (unit(targets) @ unit(shared).T).max(axis=1).clip(0, 1), atol=1e-6
    )


def pursuit(target, table, atoms):
    """Orthogonal matching pursuit as published, a least squares fit a step."""
    chosen, left = [], target
    for _ in range(atoms):
        products = np.abs(table @ left)
        products[chosen] = -1
        chosen.append(int(products.argmax()))
        fit, *_ = np.linalg.lstsq(table[chosen].T, target, rcond=None)
        left = target - fit @ table[chosen]
    weights = np.zeros(len(table))
    weights[chosen] = fit
    return weights, left


SHARED = [
    [-0.65, -0.17, 1.66, 0.66],
    [-1.64, -0.01, -0.62, 0.15],
    [-1.61, 0.24, 0.24, 1.58],
    [0.32, 0.51, -1.49, 2.25],
    [-1.92, 1.1, -0.33, -0.88],
]
NEW = [[-0.66, -0.67, 0.38, -0.11], [1.48, -1.83, 0.0, -0.89], [0.78, -2.12, -0.34, 0.21]]
BY_DEEPFOCUS = [
    [0.41843, 0.31916, 0.20495, 0.0, 0.05747],
    [0.45689, 0.14056, 0.0, 0.36084, 0.0417],
    [0.28138, 0.16051, 0.12273, 0.43538, 0.0],
]
"""Results of deepfocus 1.0.1 for these vectors, with an identity matrix as the source's rows."""


def test_focus_weights_match_deepfocus():
    found = combinations.focus(np.array(NEW), np.array(SHARED))
    np.testing.assert_allclose(dense(found, 3, 5), BY_DEEPFOCUS, atol=2e-5)


@pytest.mark.parametrize("atoms", [1, 5, 12])
@pytest.mark.parametrize("scores_at_once", [2**25, 100])
def test_omp_is_orthogonal_matching_pursuit(monkeypatch, atoms, scores_at_once):
    monkeypatch.setattr(combinations, "SCORES", scores_at_once)
    rng = np.random.default_rng(0)
    targets, table = (
        rng.normal(size=(25, 16)),
        rng.normal(size=(40, 16)) * rng.uniform(0.5, 2, (40, 1)),
    )
    found = combinations.omp(targets, table, atoms)
    weights = dense(found, 25, 40)
    for target, row, score in zip(targets, weights, found.scores):
        expected, left = pursuit(target, table, atoms)
        np.testing.assert_allclose(row, expected, atol=2e-4)
        assert score == pytest.approx(1 - left @ left / (target @ target), abs=1e-4)


def test_omp_finds_a_sparse_combination_and_takes_no_atom_twice():
    rng = np.random.default_rng(1)
    table = unit(rng.normal(size=(200, 64)))
    truth = np.zeros((10, 200))
    for row in truth:
        row[rng.choice(200, 3, replace=False)] = rng.choice([-2.0, 1.5, 3.0], 3)
    found = combinations.omp(truth @ table, table, 3)
    np.testing.assert_allclose(dense(found, 10, 200), truth, atol=1e-4)
    again = combinations.omp(
        truth @ table, np.repeat(table[:5], 2, axis=0), 10
    )  # atoms that add nothing
    assert np.isfinite(again.weights).all() and len(again.rows) <= 50


def test_omp_matches_mergekit():
    """`mergekit.tokensurgeon.batch_omp` of mergekit 0.1.5 on the same numbers."""
    rng = np.random.default_rng(3)
    targets, table = (np.round(rng.normal(size=shape), 2) for shape in ((3, 6), (9, 6)))
    chosen = [[3, 6, 7], [6, 3, 4], [1, 6, 3]]
    coefficients = [
        [-1.134214, 1.243323, 0.536405],
        [-1.664548, 0.482122, 1.14301],
        [-0.553915, 0.239925, 0.065663],
    ]
    expected = np.zeros((3, 9))
    np.put_along_axis(expected, np.array(chosen), np.array(coefficients), axis=1)
    np.testing.assert_allclose(
        dense(combinations.omp(targets, table, 3), 3, 9), expected, atol=1e-5
    )
