"""Alignments: a rule and a mixture for every row, saving and loading, other vocabularies
refused.
"""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest

from tests.helpers import tiny_tokenizer
from tokalign_jax.alignment import alignment, methods
from tokalign_jax.alignment.alignment import Rule
from tokalign_jax.config import AlignmentConfig, Config, GloveConfig, TextConfig
from tokalign_jax.errors import UserError
from tokalign_jax.text import canonical, corpus, tokenizing


def words(count: int, seed: int) -> list[str]:
    """Made-up words, so that a few hundred tokens are whole words of both vocabularies."""
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list("abdeiklmnoprstu"), rng.integers(2, 6))) for _ in range(count)]


ENGLISH = words(150, 10)
GERMAN = [f"{word}ä" for word in words(80, 11)]


def sentences(from_words: list[str], count: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(from_words, rng.integers(8, 40))) for _ in range(count)]


def tokenizer_pair():
    """A byte-level source, and a SentencePiece-like target with more words and a few more special
    tokens.
    """
    source = tiny_tokenizer(600, sentences(ENGLISH, 50, 0))
    target = tiny_tokenizer(800, sentences(ENGLISH + GERMAN, 100, 1), kind="metaspace")
    target.add_special_tokens(
        {"pad_token": "<pad>", "additional_special_tokens": ["<|im_start|>", "<|endoftext|>"]}
    )
    return source, target


@pytest.fixture(scope="module")
def tokenizers():
    return tokenizer_pair()


@pytest.fixture(scope="module")
def made(tokenizers, tmp_path_factory):
    """The whole stage, on a real small corpus."""
    folder = tmp_path_factory.mktemp("align")
    texts = sentences(ENGLISH, 150, 2) + sentences(GERMAN, 150, 3)
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = Config(
        corpus=str(folder / "a.jsonl"),
        text=TextConfig(held_out_fraction=0.1),
        alignment=AlignmentConfig(
            method="composed",
            window=5,
            min_count=2,
            vector_size=16,
            glove=GloveConfig(iterations=4),
            pivots=100,
            similarity_threshold=0.02,
        ),
    )
    corpus.run(config, folder / "corpus", lambda line: None)
    tokenizing.run(config, folder / "corpus", *tokenizers, folder / "tokens", lambda line: None)
    lines = []
    summary = methods.run(
        config, folder / "corpus", folder / "tokens", *tokenizers, folder / "align", lines.append
    )
    return config, folder, summary, lines


def row(mixture: alignment.Mixture, i: int) -> dict[int, float]:
    here = slice(mixture.indptr[i], mixture.indptr[i + 1])
    return dict(zip(mixture.ids[here].tolist(), mixture.weights[here].tolist()))


def assert_whole(found: alignment.Alignment, source, target, convex=True):
    """`convex`: whether weights are positive and sum to 1."""
    assert (
        len(found.rules)
        == len(found.scores)
        == found.target_size
        == canonical.vocabulary_size(target)
    )
    assert found.source_size == canonical.vocabulary_size(source)
    assert np.all((found.scores >= 0) & (found.scores <= 1))
    for mixture in (found.embedding, found.head):
        assert len(mixture.indptr) == found.target_size + 1
        assert np.all(np.diff(mixture.indptr) > 0)  # no row is empty
        assert np.all(mixture.weights > 0) or not convex
        assert mixture.ids.min() >= 0 and mixture.ids.max() <= found.source_size
        sums = np.add.reduceat(mixture.weights, mixture.indptr[:-1])
        np.testing.assert_allclose(sums if convex else 1.0, 1.0, rtol=1e-6)
        for i in range(found.target_size):
            assert (
                len(row(mixture, i)) == np.diff(mixture.indptr)[i]
            )  # no token stands twice in a row


def test_every_row_has_a_rule_and_weights(made, tokenizers):
    _, folder, summary, lines = made
    source, target = tokenizers
    found = alignment.load(folder / "align", source, target)
    assert_whole(found, source, target)
    source_bytes, target_bytes = canonical.token_bytes(source), canonical.token_bytes(target)
    for i in range(found.target_size):
        embedding, head = row(found.embedding, i), row(found.head, i)
        if found.rules[i] == Rule.EXACT:
            ((only, weight),) = embedding.items()
            assert weight == 1.0 and head == embedding and source_bytes[only] == target_bytes[i]
        elif found.rules[i] == Rule.SIMILAR:
            assert (
                found.scores[i] >= 0.02
                and found.matches[i] in embedding
                and found.matches[i] in head
            )
        elif found.rules[i] == Rule.PIECES and target_bytes[i] is not None:
            assert set(embedding) == set(canonical.PieceCutter(source)(target_bytes[i]))
            assert set(head) == set(embedding)
    kinds = {Rule(rule) for rule in found.rules}
    assert (
        kinds >= {Rule.EXACT, Rule.SPECIAL, Rule.SIMILAR, Rule.PIECES} and Rule.GIVEN not in kinds
    )
    exact = {c for c in target_bytes if c} & {c for c in source_bytes if c}
    assert {target_bytes[i] for i in np.flatnonzero(found.rules == Rule.EXACT)} == exact
    assert any("BLEU-1" in line for line in lines)
    assert json.loads((folder / "align" / "summary.json").read_text()) == summary


def test_special_tokens_take_their_role(made, tokenizers):
    _, folder, _, _ = made
    source, target = tokenizers
    found = alignment.load(folder / "align", source, target)
    end = source.eos_token_id
    for token in ("</s>", "<s>", "<unk>", "<pad>", "<|endoftext|>"):  # the last one by its text
        i = target.convert_tokens_to_ids(token)
        assert found.rules[i] == Rule.SPECIAL and row(found.embedding, i) == {end: 1.0}
    i = target.convert_tokens_to_ids("<|im_start|>")
    pieces = canonical.PieceCutter(source)(b"<|im_start|>")
    assert found.rules[i] == Rule.PIECES and set(row(found.embedding, i)) == set(pieces)


def test_summary_counts_rows_and_frequency_by_rule(made, tokenizers):
    _, folder, summary, _ = made
    found = alignment.load(folder / "align", *tokenizers)
    counts = tokenizing.TokenShards.open(folder / "tokens" / "target").counts
    assert sum(rule["rows"] for rule in summary["rules"].values()) == found.target_size
    assert sum(rule["frequency"] for rule in summary["rules"].values()) == pytest.approx(1)
    for rule in Rule:
        part = summary["rules"][rule.name.lower()]
        assert part["rows"] == sum(found.rules == rule)
        assert part["frequency"] == pytest.approx(sum(counts[found.rules == rule]) / sum(counts))
    assert (
        0 <= summary["hub_share"] <= 1
        and 0 < summary["bleu_1"] <= 1
        and 0 <= summary["accuracy_at_1"] <= 1
    )
    with np.load(folder / "align" / "vectors.npz") as vectors:
        assert vectors["source_vectors"].shape == (len(vectors["source_ids"]), 16)


def test_published_file_maps_every_target_id_to_a_source_id(made, tokenizers):
    _, folder, _, _ = made
    source, target = tokenizers
    found = alignment.load(folder / "align", source, target)
    published = json.loads((folder / "align" / "align_matrix.json").read_text())
    assert list(published) == [str(i) for i in range(canonical.vocabulary_size(target))]
    assert all(type(i) is int and 0 <= i < found.source_size for i in published.values())
    for i in range(found.target_size):
        weights = row(found.embedding, i)
        assert weights[published[str(i)]] == max(weights.values())


def test_saved_alignments_load_unchanged(made, tokenizers, tmp_path):
    _, folder, _, _ = made
    found = alignment.load(folder / "align" / "alignment.npz", *tokenizers)
    alignment.save(found, tmp_path)
    again = alignment.load(tmp_path, *tokenizers)
    for field in dataclasses.fields(found):
        for one, other in zip(getattr(found, field.name), getattr(again, field.name)):
            np.testing.assert_array_equal(one, other)
    assert found.embedding.ids.dtype == again.embedding.ids.dtype == np.int32
    assert {path.name for path in tmp_path.iterdir()} == {"align_matrix.json", "alignment.npz"}


@pytest.mark.parametrize("method", sorted(set(methods.METHODS) - methods.NEED_VECTORS - {"omp"}))
def test_methods_without_vectors_compute_none(made, tokenizers, tmp_path, monkeypatch, method):
    config, folder, by_default, _ = made
    assert by_default["method"] == "composed"
    monkeypatch.setattr(methods.vectors, "make", lambda *_: pytest.fail("vectors were made"))
    other = dataclasses.replace(
        config, alignment=dataclasses.replace(config.alignment, method=method)
    )
    summary = methods.run(
        other, folder / "corpus", folder / "tokens", *tokenizers, tmp_path, lambda line: None
    )
    assert summary["method"] == method and "glove_loss" not in summary
    assert {path.name for path in tmp_path.iterdir()} == {
        "align_matrix.json",
        "alignment.npz",
        "summary.json",
    }
    assert_whole(alignment.load(tmp_path, *tokenizers), *tokenizers)


def test_user_align_matrix_is_used_unchanged(made, tokenizers, tmp_path):
    config, folder, _, _ = made
    source, target = tokenizers
    size = canonical.vocabulary_size(target)
    mapping = {str(i): (7 * i) % canonical.vocabulary_size(source) for i in range(size)}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(mapping))
    given = dataclasses.replace(
        config, alignment=dataclasses.replace(config.alignment, file=str(path))
    )
    summary = methods.run(
        given,
        folder / "corpus",
        folder / "tokens",
        *tokenizers,
        tmp_path / "out",
        lambda line: None,
    )
    assert summary["rules"]["given"]["rows"] == size and summary["method"] == "file"
    found = alignment.load(tmp_path / "out", source, target)
    assert_whole(found, source, target)
    rows = (
        np.random.default_rng(0)
        .normal(size=(canonical.vocabulary_size(source), 4))
        .astype(np.float32)
    )
    expected = rows[[mapping[str(i)] for i in range(size)]]
    np.testing.assert_array_equal(alignment.apply(found.embedding, rows), expected)
    np.testing.assert_array_equal(alignment.apply(found.head, rows), expected)
    assert json.loads((tmp_path / "out" / "align_matrix.json").read_text()) == mapping


def test_alignments_of_another_vocabulary_are_refused(made, tokenizers, tmp_path):
    _, folder, _, _ = made
    source, target = tokenizers
    other = tiny_tokenizer(601, sentences(ENGLISH, 50, 4))
    for path in (folder / "align" / "alignment.npz", folder / "align" / "align_matrix.json"):
        with pytest.raises(
            UserError, match=f"target tokenizer.* has {canonical.vocabulary_size(other)} tokens"
        ):
            alignment.load(path, source, other)
    with pytest.raises(UserError, match="another source vocabulary"):
        alignment.load(folder / "align", other, target)
    size = canonical.vocabulary_size(target)
    (tmp_path / "large.json").write_text(json.dumps({str(i): 700 for i in range(size)}))
    with pytest.raises(UserError, match="names source token 700"):
        alignment.load(tmp_path / "large.json", source, target)
    (tmp_path / "negative.json").write_text(json.dumps({str(i): i - 1 for i in range(size)}))
    with pytest.raises(UserError, match="names source token -1"):
        alignment.load(tmp_path / "negative.json", source, target)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", "{"),
        ("a.json", "[1, 2]"),
        ("a.json", '{"a": 1}'),
        ("a.json", '{"0": 1.5}'),
        ("a.json", '{"0": null}'),
        ("a.json", "[" * 100_000),
        ("a.npz", "no"),
        ("a.npz", ""),
        ("a.npz", "PK\x03\x04 and no more of it, as of an interrupted copy"),
        ("gone.json", None),
    ],
)
def test_errors_name_unreadable_alignment_files(tokenizers, tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"{name}' cannot be read"):
        alignment.load(tmp_path / name, *tokenizers)


def test_pieces_baseline_is_the_plain_mean(tokenizers):
    source, target = tokenizers
    found = methods.from_pieces(source, target)
    assert_whole(found, source, target)
    rows = np.random.default_rng(0).normal(size=(found.source_size, 6)).astype(np.float32)
    made = alignment.apply(found.embedding, rows)
    cutter = canonical.PieceCutter(source)
    for i in np.flatnonzero(found.rules == Rule.PIECES)[:50]:
        content = canonical.token_bytes(target)[i]
        if content is not None:
            np.testing.assert_allclose(
                made[i], rows[cutter(content)].mean(axis=0), rtol=1e-5, atol=1e-6
            )


def test_tokens_the_source_cannot_spell_get_the_mean_of_all_rows():
    """A source without bytes: only its characters can be spelled."""
    source = tiny_tokenizer(400, ["abc"], kind="metaspace")
    state = json.loads(source.backend_tokenizer.to_str())
    vocabulary = {t: i for t, i in state["model"]["vocab"].items() if not t.startswith("<0x")}
    state["model"] |= {
        "vocab": {t: n for n, t in enumerate(sorted(vocabulary, key=vocabulary.get))},
        "byte_fallback": False,
    }
    source.backend_tokenizer.__setstate__(json.dumps(state).encode())
    target = tiny_tokenizer(300, ["日本"])
    found = methods.from_pieces(source, target)
    assert_whole(found, source, target)
    i = int(np.flatnonzero(found.rules == Rule.MEAN)[0])
    assert row(found.embedding, i) == {found.source_size: 1.0}
    rows = (
        np.random.default_rng(0).normal(size=(found.source_size + 5, 3)).astype(np.float32)
    )  # five padded rows
    np.testing.assert_allclose(
        alignment.apply(found.embedding, rows)[i], rows[: found.source_size].mean(axis=0), rtol=1e-5
    )
    assert found.heaviest()[i] in found.heaviest()[found.rules != Rule.MEAN]


def test_apply_is_the_sparse_product_in_float32():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 6, 20_000)  # more rows than one block
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    ids, weights = (
        rng.integers(0, 50, indptr[-1]).astype(np.int32),
        rng.random(indptr[-1]).astype(np.float32),
    )
    rows = rng.normal(size=(60, 7)).astype(ml_dtypes.bfloat16)
    found = alignment.apply(alignment.Mixture(indptr, ids, weights, 50), rows)
    assert found.dtype == np.float32
    dense = np.zeros((len(lengths), 60))
    np.add.at(dense, (np.repeat(np.arange(len(lengths)), lengths), ids), weights.astype(np.float64))
    np.testing.assert_allclose(found, dense @ rows.astype(np.float64), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="40 rows, its tokenizer 50 tokens"):
        alignment.apply(alignment.Mixture(indptr, ids, weights, 50), rows[:40])
