"""Co-occurrence counts against a brute-force count in exact fractions."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from tokalign_jax.alignment import cooccurrence
from tokalign_jax.text.tokenizing import TokenShards

END = 0


def shards_of(documents: list[list[int]], vocabulary: int) -> TokenShards:
    """In memory what the tokens stage writes: each document with its end-of-text behind it."""
    tokens = np.array([token for document in documents for token in [*document, END]], np.uint16)
    ends = np.cumsum([len(document) + 1 for document in documents])
    counts = np.bincount(tokens, minlength=vocabulary).astype(np.int64)
    return TokenShards(tokens, ends, counts, {"end_of_text": END})


def random_documents(seed: int, documents: int = 30, longest: int = 60, vocabulary: int = 25) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    zipf = 1 / np.arange(1, vocabulary)
    return [
        rng.choice(np.arange(1, vocabulary), rng.integers(0, longest), p=zipf / zipf.sum()).tolist()
        for _ in range(documents)
    ]


def brute_force(documents: list[list[int]], window: int, min_count: int) -> dict[tuple[int, int], Fraction]:
    """GloVe's definition, token by token: rare tokens dropped first, both directions, no document left."""
    frequency = Counter(token for document in documents for token in document)
    counts: Counter[tuple[int, int]] = Counter()
    for document in documents:
        kept = [token for token in document if frequency[token] >= min_count]
        for i, left in enumerate(kept):
            for distance in range(1, window + 1):
                if i + distance < len(kept):
                    right = kept[i + distance]
                    counts[left, right] += Fraction(1, distance)
                    counts[right, left] += Fraction(1, distance)
    return counts


def as_dict(found: cooccurrence.Cooccurrence) -> dict[tuple[int, int], float]:
    """Both triangles, by token ids."""
    entries = {}
    for row, col, count in zip(found.rows, found.cols, found.counts):
        left, right = int(found.vocabulary[row]), int(found.vocabulary[col])
        entries[left, right] = entries[right, left] = float(count)
    return entries


@pytest.mark.parametrize(("window", "min_count"), [(1, 1), (4, 1), (15, 5), (15, 20)])
def test_counts_are_the_brute_force_counts(window, min_count):
    documents = random_documents(seed=window)
    found = cooccurrence.count(shards_of(documents, 25), window, min_count, lambda line: None)
    expected = brute_force(documents, window, min_count)
    assert as_dict(found) == {pair: float(count) for pair, count in expected.items()}


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
def test_counts_do_not_depend_on_the_chunks(chunk):
    shards = shards_of(random_documents(seed=1, documents=12), 25)
    expected = cooccurrence.count(shards, 5, 3, lambda line: None, chunk=100)
    found = cooccurrence.count(shards, 5, 3, lambda line: None, chunk=chunk)
    for name in ("vocabulary", "rows", "cols", "counts"):
        assert np.array_equal(getattr(found, name), getattr(expected, name))


def test_the_vocabulary_is_by_falling_frequency_and_without_the_end():
    documents = [[3, 3, 3, 2, 2, 5, 5, 4]] * 2
    found = cooccurrence.count(shards_of(documents, 8), 3, 3, lambda line: None)
    assert found.vocabulary.tolist() == [3, 2, 5]  # ties by id; 4 is too rare, 0 ends documents
    assert found.vocabulary.dtype == found.rows.dtype == found.cols.dtype == np.int32


def test_pairs_are_sorted_and_on_or_above_the_diagonal():
    found = cooccurrence.count(shards_of(random_documents(seed=2), 25), 5, 1, lambda line: None)
    assert np.all(found.rows <= found.cols)
    assert np.all(np.diff(found.rows.astype(np.int64) * 1000 + found.cols) > 0)


def test_rare_tokens_are_dropped_before_windows_are_taken():
    found = cooccurrence.count(shards_of([[1, 2, 3], [1, 3]], 8), 1, 2, lambda line: None)
    assert as_dict(found) == {(1, 3): 2.0, (3, 1): 2.0}


def test_nothing_to_count():
    for documents in ([[]], [[1], [2]], [[1, 2, 3]]):
        found = cooccurrence.count(shards_of(documents, 8), 5, 2, lambda line: None)
        assert len(found) == 0
