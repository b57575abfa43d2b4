"""Token vectors: excluded contexts, and a user's own vector files."""

import dataclasses

import numpy as np
import pytest

from tests.alignment.test_cooccurrence import random_documents, shards_of
from tokalign_jax.alignment import matching, ppmi, vectors
from tokalign_jax.config import AlignmentConfig, GloveConfig
from tokalign_jax.errors import UserError

CONFIG = AlignmentConfig(vectors="ppmi", vector_size=6, min_count=1, window=5)


def silent(line: str) -> None:
    pass


def two_sides(vocabulary: int = 80):
    documents = random_documents(1, documents=80, longest=80, vocabulary=vocabulary)
    renamed = np.concatenate([[0], 1 + np.random.default_rng(0).permutation(vocabulary - 1)])
    target = [renamed[document].tolist() for document in documents]
    shared = np.stack([np.arange(vocabulary), renamed], axis=1)[1:].astype(np.int32)
    return shards_of(documents, vocabulary), shards_of(target, vocabulary), shared


def test_validation_pairs_are_excluded_from_contexts(monkeypatch):
    source, target, shared = two_sides()
    seen = {}

    def train(sides, columns, *rest, **options):
        seen["columns"] = np.stack(columns, axis=1)
        return [np.zeros((len(side.vocabulary), 2), np.float32) for side in sides]

    monkeypatch.setattr(ppmi, "train", train)
    of_source, of_target, measured = vectors.make(CONFIG, source, target, 7, silent, shared=shared)
    rows = vectors.shared_rows(of_source.ids, of_target.ids, shared)
    assert (
        shared[:, 1][np.searchsorted(shared[:, 0], of_source.ids[rows[:, 0]])]
        == of_target.ids[rows[:, 1]]
    ).all()
    assert (np.diff(rows[:, 0]) > 0).all()
    _, validation = matching.choose_pivots(rows[:, 0], rows[:, 1], CONFIG.pivots, 7)
    chosen = {tuple(pair) for pair in seen["columns"].tolist()}
    assert len(validation) and chosen == {
        tuple(pair) for i, pair in enumerate(rows.tolist()) if i not in set(validation)
    }
    assert measured == {"ppmi_shared_contexts": len(chosen)}


@pytest.mark.parametrize("with_shared", [True, False])
def test_ppmi_with_and_without_shared_tokens(with_shared):
    source, target, shared = two_sides()
    of_source, of_target, measured = vectors.make(
        CONFIG, source, target, 0, silent, shared=shared if with_shared else None
    )
    assert of_source.vectors.shape == (len(of_source.ids), 6) and of_target.vectors.shape == (
        len(of_target.ids),
        6,
    )
    assert (measured["ppmi_shared_contexts"] > 0) == with_shared
    if with_shared:
        rows = vectors.shared_rows(of_source.ids, of_target.ids, shared)
        found = (of_target.vectors @ of_source.vectors.T).argmax(axis=1)
        assert (found[rows[:, 1]] == rows[:, 0]).all()


def test_glove_reports_its_loss():
    source, target, _ = two_sides()
    config = dataclasses.replace(CONFIG, vectors="glove", glove=GloveConfig(iterations=2))
    of_source, _, measured = vectors.make(config, source, target, 0, silent)
    assert of_source.vectors.shape == (len(of_source.ids), 6)
    assert [len(losses) for losses in measured["glove_loss"].values()] == [2, 2]


@pytest.mark.parametrize("kind", ["ppmi", "glove"])
def test_too_short_a_text_gives_no_vectors(kind):
    source, target, _ = two_sides()
    few = shards_of([[1, 2, 3]], len(target.counts))
    config = dataclasses.replace(CONFIG, vectors=kind, min_count=5)
    of_source, of_target, _ = vectors.make(config, source, few, 0, silent)
    assert (
        len(of_target.ids)
        == len(of_target.vectors)
        == 0
        < len(of_source.ids)
        == len(of_source.vectors)
    )


def test_user_vectors_load_from_npz_and_glove_text(tmp_path):
    source, target, _ = two_sides()
    ids = np.array([5, 3, 70])
    rows = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    np.savez(tmp_path / "source.npz", ids=ids, vectors=rows)
    lines = [f"{i} " + " ".join(f"{x:.6f}" for x in row[:3]) for i, row in zip(ids, rows)]
    (tmp_path / "target.txt").write_text("\n".join([*lines, "7 0 0 0", "<unk> 0.1 0.2 0.3", ""]))
    config = AlignmentConfig(
        source_vectors=str(tmp_path / "source.npz"), target_vectors=str(tmp_path / "target.txt")
    )
    of_source, of_target, measured = vectors.make(config, source, target, 0, silent)
    assert measured == {}
    for side, shards, width in ((of_source, source, 4), (of_target, target, 3)):
        assert (np.diff(shards.counts[side.ids]) <= 0).all()  # by falling frequency
        assert side.vectors.dtype == np.float32
        assert sorted(side.ids) == sorted(ids)  # a vector of zeros is none
        for i, row in zip(side.ids, side.vectors):
            np.testing.assert_allclose(row, rows[ids.tolist().index(i), :width], atol=1e-6)
    assert vectors.check(AlignmentConfig(), 10, 10) is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "1 0.5 0.5\n1 0.1 0.2\n", "more than once"),
        ("a.txt", "1 0.5 0.5\n80 0.1 0.2\n", "ids 0 to 79"),
        ("a.txt", "-1 0.5 0.5\n", "ids 0 to 79"),
        ("a.txt", "1 0.5 0.5\n2 0.1\n", "line 2 has 1 numbers"),
        ("a.txt", "1 0.5 nan\n", "token id 1 .* not finite"),
        ("a.txt", "1 0.0 0.0\n2 0 -0\n", "are zero"),
        ("a.npz", "PK\x03\x04 and no more of it, as of an interrupted copy", "cannot be read"),
        ("a.txt", "the 0.5 0.5\n", "line 1"),
        ("a.txt", "", "ids"),
        ("a.npz", {"ids": np.arange(2), "vectors": np.ones(2)}, "ids int64"),
        ("a.npz", {"ids": np.arange(2.0), "vectors": np.ones((2, 2))}, "ids float64"),
        ("a.npz", {"ids": np.arange(3), "vectors": np.ones((2, 2))}, r"\[3\]"),
        ("a.npz", {"v": np.ones((2, 2))}, "cannot be read"),
        ("a.npz", "no archive", "cannot be read"),
        ("missing.npz", None, "cannot be read"),
    ],
)
def test_errors_on_bad_vector_files_name_the_problem(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, dict):
        np.savez(path, **content)
    elif content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        vectors.check(AlignmentConfig(source_vectors=str(path), target_vectors=str(path)), 80, 80)


def test_vectors_of_both_sides_are_required():
    with pytest.raises(UserError, match=r"alignment\.target_vectors is missing"):
        vectors.check(AlignmentConfig(source_vectors="a.npz"), 80, 80)


def test_saved_vectors_keep_their_range(tmp_path):
    small, large = (
        vectors.Vectors(np.arange(2, dtype=np.int32), np.full((2, 3), x, np.float32))
        for x in (0.5, 1e6)
    )
    vectors.save(tmp_path, small, large)
    with np.load(tmp_path / vectors.FILE) as arrays:
        assert arrays["source_vectors"].dtype == np.float16
        np.testing.assert_array_equal(arrays["target_vectors"], large.vectors)


def test_focus_needs_vectors_of_the_target_alone(tmp_path):
    np.savez(tmp_path / "mine.npz", ids=np.arange(5), vectors=np.eye(5, 3) + 1)
    source, target = vectors.check(
        AlignmentConfig(method="focus", target_vectors=str(tmp_path / "mine.npz")), 10, 10
    )
    assert not len(source.ids) and len(target.ids) == 5
    with pytest.raises(UserError, match="source_vectors is missing"):
        vectors.check(
            AlignmentConfig(method="topk", target_vectors=str(tmp_path / "mine.npz")), 10, 10
        )
