"""Co-occurrence counts against a brute-force count in exact fractions."""

import json
import os
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from tokalign_jax.alignment import cooccurrence, runs
from tokalign_jax.alignment.cooccurrence import Cooccurrence, Part, Resources
from tokalign_jax.errors import UserError
from tokalign_jax.text.tokenizing import TokenShards

END = 0
SPILLING = Resources(memory=1 << 12, chunk=50)
"""So little memory that most pairs have no cell in a table and all runs are on disk."""
SPILLING_ON_DEVICE = Resources(device=True, device_memory=1, memory=1, chunk=64)
RESOURCES = [Resources(), SPILLING, SPILLING_ON_DEVICE]


def shards_of(documents: list[list[int]], vocabulary: int) -> TokenShards:
    """In memory what the tokens stage writes: each document with its end-of-text behind it."""
    tokens = np.array([token for document in documents for token in [*document, END]], np.uint16)
    ends = np.cumsum([len(document) + 1 for document in documents])
    counts = np.bincount(tokens, minlength=vocabulary).astype(np.int64)
    return TokenShards(tokens, ends, counts, {"end_of_text": END})


def random_documents(
    seed: int, documents: int = 30, longest: int = 60, vocabulary: int = 25
) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    zipf = 1 / np.arange(1, vocabulary)
    return [
        rng.choice(np.arange(1, vocabulary), rng.integers(0, longest), p=zipf / zipf.sum()).tolist()
        for _ in range(documents)
    ]


def brute_force(
    documents: list[list[int]], window: int, min_count: int
) -> dict[tuple[int, int], Fraction]:
    """GloVe's definition, token by token: rare tokens dropped first, both directions, no document
    left.
    """
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


def as_dict(found: Cooccurrence) -> dict[tuple[int, int], float]:
    """Both triangles, by token ids."""
    entries = {}
    for row, col, count in zip(found.rows, found.cols, found.counts):
        left, right = int(found.vocabulary[row]), int(found.vocabulary[col])
        entries[left, right] = entries[right, left] = float(count)
    return entries


def quiet(line: str) -> None:
    pass


def assert_equal(found: Cooccurrence, expected: Cooccurrence) -> None:
    for name in ("vocabulary", "rows", "cols", "counts"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name
        assert getattr(found, name).dtype == getattr(expected, name).dtype, name


@pytest.mark.parametrize("resources", RESOURCES)
@pytest.mark.parametrize(("window", "min_count"), [(1, 1), (4, 1), (15, 5), (15, 20)])
def test_counts_are_the_brute_force_counts(window, min_count, resources):
    documents = random_documents(seed=window)
    found = cooccurrence.count(
        shards_of(documents, 25), window, min_count, quiet, resources=resources
    )
    expected = brute_force(documents, window, min_count)
    assert as_dict(found) == {pair: float(count) for pair, count in expected.items()}


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("memory", [1 << 8, 1 << 14, 1 << 30])
def test_counts_do_not_depend_on_chunks_workers_or_memory(chunk, workers, memory):
    shards = shards_of(random_documents(seed=1, documents=12), 25)
    expected = cooccurrence.count(shards, 5, 3, quiet)
    assert_equal(
        cooccurrence.count(
            shards, 5, 3, quiet, "", Resources(memory, chunk=chunk, workers=workers)
        ),
        expected,
    )


@pytest.mark.parametrize("resources", [SPILLING, SPILLING_ON_DEVICE])
def test_counts_past_the_memory_budget_spill_to_unnamed_files(resources, tmp_path, monkeypatch):
    shards = shards_of(random_documents(seed=2, documents=200), 25)
    merges = []
    merged = runs.merged
    monkeypatch.setattr(
        runs, "merged", lambda parts, *rest: merges.append(len(parts)) or merged(parts, *rest)
    )
    monkeypatch.setattr(runs, "MERGE_BLOCK", 32)  # so that there is more than one block
    monkeypatch.setattr(runs, "FORGET", 1)
    monkeypatch.setattr(cooccurrence, "BLOCK", 32)
    monkeypatch.setattr(cooccurrence, "FETCHED", 10)
    resources = Resources(**{**vars(resources), "scratch": tmp_path, "chunk": 10})
    found = cooccurrence.count(shards, 3, 1, quiet, resources=resources)
    assert isinstance(found.rows, np.memmap) and isinstance(found.counts, np.memmap)
    assert not list(tmp_path.iterdir())
    assert runs.FAN_IN in merges  # more than one level of runs
    monkeypatch.undo()
    assert_equal(found, cooccurrence.count(shards, 3, 1, quiet))


def test_error_names_a_missing_scratch_folder(tmp_path):
    resources = Resources(memory=1, scratch=tmp_path / "missing")
    with pytest.raises(UserError, match=r"missing.*scratch folder"):
        cooccurrence.count(
            shards_of(random_documents(seed=2), 25), 3, 1, quiet, resources=resources
        )


@pytest.mark.parametrize("times", [2, 5])
def test_corpus_repeated_k_times_counts_k_times_as_much(times):
    documents = random_documents(seed=3)
    once = cooccurrence.count(shards_of(documents, 25), 15, 2, quiet)
    repeated = cooccurrence.count(shards_of(documents * times, 25), 15, 2 * times, quiet)
    assert np.array_equal(repeated.vocabulary, once.vocabulary)
    assert np.array_equal(repeated.rows, once.rows) and np.array_equal(repeated.cols, once.cols)
    # X is an integer over lcm(1..15), rounded once: exactly k times as much before that.
    unit = 360360
    assert np.array_equal(np.rint(repeated.counts * unit), times * np.rint(once.counts * unit))


@pytest.mark.parametrize("number", [2, 3, 7])
def test_parts_cut_anywhere_add_up_to_the_whole(number):
    # One long document, so that every cut is inside it, and rare tokens around the cuts.
    shards = shards_of([*random_documents(seed=4, documents=1, longest=900), [1, 2, 3]], 25)
    parts = [cooccurrence.count_part(shards, 15, 9, quiet, part=(k, number)) for k in range(number)]
    assert_equal(cooccurrence.merge(parts, quiet), cooccurrence.count(shards, 15, 9, quiet))


def save_shards(shards: TokenShards, folder: Path) -> None:
    """Write shards in the format of the tokens stage."""
    folder.mkdir()
    shards.tokens.tofile(folder / "tokens.bin")
    np.save(folder / "documents.npy", shards.documents)
    np.save(folder / "unlearned.npy", shards.unlearned)
    np.save(folder / "counts.npy", shards.counts)
    sizes = {"dtype": "uint16", "tokens": len(shards.tokens), "vocabulary": len(shards.counts)}
    (folder / "index.json").write_text(json.dumps({**shards.index, **sizes}))


PROCESS = """
import sys
from pathlib import Path
from tokalign_jax.alignment.cooccurrence import Resources, count_part
from tokalign_jax.text.tokenizing import TokenShards

folder, k, device = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "device"
shards = TokenShards.open(folder / "shards")
count_part(shards, 5, 3, resources=Resources(device=device, chunk=100), part=(k, 2)).save(folder / f"part{k}")
"""


def test_two_processes_with_unequal_devices_count_as_one_does(tmp_path):
    shards = shards_of(random_documents(seed=5, documents=40), 25)
    save_shards(shards, tmp_path / "shards")
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "2"}
    root = Path(__file__).parents[2]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(tmp_path), str(k), kind], env=env, cwd=root
        )
        for k, kind in enumerate(["host", "device"])
    ]
    assert [process.wait() for process in processes] == [0, 0]
    found = cooccurrence.merge(
        [Part.open(tmp_path / "part0"), Part.open(tmp_path / "part1")], quiet
    )
    assert_equal(found, cooccurrence.count(shards, 5, 3, quiet))


def test_merging_parts_of_different_counts_is_refused(tmp_path):
    shards = shards_of(random_documents(seed=6), 25)
    first = cooccurrence.count_part(shards, 5, 3, quiet)
    with pytest.raises(UserError, match="windows 5 and 4"):
        cooccurrence.merge([first, cooccurrence.count_part(shards, 4, 3, quiet)], quiet)
    with pytest.raises(UserError, match="different co-occurrence counts"):
        cooccurrence.merge([first, cooccurrence.count_part(shards, 5, 30, quiet)], quiet)
    with pytest.raises(UserError, match="no complete part of a co-occurrence count"):
        Part.open(tmp_path)


def test_counts_that_overflow_int64_are_refused():
    shards = shards_of([[1, 2, 3]], 8)
    with pytest.raises(UserError, match="narrow it"):
        cooccurrence.count(shards, 45, 1, quiet)


def test_vocabulary_is_sorted_by_frequency_without_end_of_text():
    documents = [[3, 3, 3, 2, 2, 5, 5, 4]] * 2
    found = cooccurrence.count(shards_of(documents, 8), 3, 3, quiet)
    assert found.vocabulary.tolist() == [3, 2, 5]  # ties by id; 4 is too rare, 0 ends documents
    assert found.vocabulary.dtype == found.rows.dtype == found.cols.dtype == np.int32


def test_pairs_are_sorted_and_on_or_above_the_diagonal():
    found = cooccurrence.count(shards_of(random_documents(seed=2), 25), 5, 1, quiet)
    assert np.all(found.rows <= found.cols)
    assert np.all(np.diff(found.rows.astype(np.int64) * 1000 + found.cols) > 0)


def test_rare_tokens_are_dropped_before_windows_are_taken():
    found = cooccurrence.count(shards_of([[1, 2, 3], [1, 3]], 8), 1, 2, quiet)
    assert as_dict(found) == {(1, 3): 2.0, (3, 1): 2.0}


def test_empty_corpus_gives_no_pairs():
    for documents in ([[]], [[1], [2]], [[1, 2, 3]]):
        for resources in (Resources(), SPILLING, Resources(device=True)):
            found = cooccurrence.count(shards_of(documents, 8), 5, 2, quiet, resources=resources)
            assert len(found) == 0
