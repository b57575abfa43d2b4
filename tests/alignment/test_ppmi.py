"""PPMI vectors: the matrix by its definition, the factorisation against an exact SVD, shared
axes.
"""

import numpy as np
import pytest

from tests.alignment.test_cooccurrence import random_documents, shards_of
from tokalign_jax.alignment import cooccurrence, ppmi


def counts_of(documents, vocabulary: int) -> cooccurrence.Cooccurrence:
    return cooccurrence.count(shards_of(documents, vocabulary), 5, 1, lambda line: None)


def dense(counts: cooccurrence.Cooccurrence) -> np.ndarray:
    full = np.zeros((len(counts.vocabulary),) * 2)
    full[counts.rows, counts.cols] = full[counts.cols, counts.rows] = counts.counts
    return full


def by_definition(counts: cooccurrence.Cooccurrence, columns: np.ndarray) -> np.ndarray:
    """max(0, log p(w, c) / (p(w) p_s(c))), over the co-occurrences with the contexts."""
    joint = dense(counts)[:, columns]
    context = joint.sum(axis=0) ** 0.75
    with np.errstate(divide="ignore", invalid="ignore"):
        pmi = (
            np.log(joint / joint.sum())
            - np.log(joint.sum(axis=1) / joint.sum())[:, None]
            - np.log(context / context.sum())
        )
    return np.nan_to_num(np.maximum(pmi, 0.0), nan=0.0, posinf=0.0)


def written_out(blocks: ppmi.Blocks) -> np.ndarray:
    n, width = blocks.shape
    rows = []
    for start, end in zip(blocks.starts, blocks.ends):
        block = np.zeros(blocks.rows * width)
        block[blocks.cells[start:end]] = blocks.values[start:end]
        rows.append(block.reshape(blocks.rows, width))
    return np.concatenate(rows)[:n]


COUNTS = counts_of(random_documents(3, documents=60, longest=80, vocabulary=50), 50)


@pytest.mark.parametrize(("rows", "memory"), [(4, 1 << 30), (64, 1 << 30), (4, 0)])
def test_matrix_is_the_published_one(rows, memory, monkeypatch):
    monkeypatch.setattr(ppmi, "SLICE", 100)
    monkeypatch.setattr(ppmi, "MEMORY", memory)
    columns = np.array([0, 2, 3, 7, 11, 30])
    blocks = ppmi.positive_pmi(COUNTS, columns, rows)
    assert len(blocks.starts) == -(-len(COUNTS.vocabulary) // rows)
    np.testing.assert_allclose(written_out(blocks), by_definition(COUNTS, columns), atol=1e-5)


def test_vectors_are_the_left_singular_vectors():
    """With as many dimensions as the iteration has, the products of rows are those of an exact
    decomposition's.
    """
    columns = np.arange(12)
    (vectors,) = ppmi.train([COUNTS], [columns], 12, 0, lambda line: None)
    left, _, _ = np.linalg.svd(by_definition(COUNTS, columns), full_matrices=False)
    unit = left / np.maximum(np.linalg.norm(left, axis=1, keepdims=True), 1e-30)
    np.testing.assert_allclose(vectors @ vectors.T, unit @ unit.T, atol=2e-3)


def test_few_dimensions_hold_nearly_all_of_the_variance(monkeypatch):
    monkeypatch.setattr(ppmi, "SPARE", 4)
    columns = np.arange(len(COUNTS.vocabulary))
    matrix = ppmi.positive_pmi(COUNTS, columns, 16)
    values = np.linalg.svd(by_definition(COUNTS, columns), compute_uv=False)
    lines = []
    (vectors,) = ppmi.train([COUNTS], [columns], 6, 0, lines.append)
    projection = vectors / np.maximum(np.linalg.norm(vectors, axis=0), 1e-30)
    captured = np.linalg.norm(projection.T @ written_out(matrix))
    assert vectors.shape == (len(COUNTS.vocabulary), 6)
    assert captured > 0.7 * np.linalg.norm(values[:6])


def test_same_tokens_under_other_ids_get_the_same_vectors():
    """Two sides with the same text under permuted ids: each token finds itself on the shared axes,
    context or not.
    """
    documents, vocabulary = random_documents(5, documents=80, longest=80, vocabulary=40), 40
    rng = np.random.default_rng(0)
    renamed = np.concatenate([[0], 1 + rng.permutation(vocabulary - 1)])
    source = counts_of(documents, vocabulary)
    target = counts_of([renamed[document].tolist() for document in documents], vocabulary)
    source_place = {int(renamed[token]): row for row, token in enumerate(source.vocabulary)}
    match = np.array(
        [source_place[int(token)] for token in target.vocabulary]
    )  # source row of each target row
    context_rows = np.arange(0, len(match), 2)
    of_source, of_target = ppmi.train(
        [source, target], [match[context_rows], context_rows], 8, 0, lambda line: None
    )
    assert ((of_target @ of_source.T).argmax(axis=1) == match).all()
    np.testing.assert_allclose(of_target, of_source[match], atol=1e-4)


def test_same_seed_gives_the_same_bits_whatever_the_slices(monkeypatch):
    columns = np.arange(20)
    first, again = (ppmi.train([COUNTS], [columns], 6, 0, lambda line: None)[0] for _ in range(2))
    assert np.array_equal(first, again)
    monkeypatch.setattr(ppmi, "SLICE", 37)
    np.testing.assert_allclose(
        ppmi.train([COUNTS], [columns], 6, 0, lambda line: None)[0], first, atol=1e-5
    )


def test_vectors_without_contexts_or_pairs_are_finite():
    documents = [[1, 2, 1, 2, 1], [3, 4, 3, 4]]
    (vectors,) = ppmi.train([counts_of(documents, 5)], [np.array([0])], 3, 0, lambda line: None)
    assert np.isfinite(vectors).all() and vectors.shape == (4, 1)
    nothing = np.zeros(0, np.int32)
    empty = cooccurrence.Cooccurrence(np.arange(3, dtype=np.int32), nothing, nothing, np.zeros(0))
    (vectors,) = ppmi.train([empty], [np.array([0, 1])], 2, 0, lambda line: None)
    assert not vectors.any()


def test_columns_are_the_most_frequent_shared_tokens_without_the_excluded(monkeypatch):
    monkeypatch.setattr(ppmi, "COLUMNS", 2)
    shared = np.array([[0, 9], [1, 2], [2, 0], [3, 1]])
    assert ppmi.shared_columns(shared, np.array([1])).tolist() == [[2, 0], [3, 1]]


def test_block_sizes_are_bounded():
    assert ppmi.block_rows(150_000, 8192) * 8192 <= ppmi.CELLS
    assert ppmi.block_rows(5, 8192) == 8
    assert ppmi.block_rows(1, 1) == 1
