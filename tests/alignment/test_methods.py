"""Alignment methods: complete alignments that do not depend on how tokens are numbered."""

import dataclasses
import json
import typing
import zlib

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from tests.alignment.test_alignment import assert_whole, row, tokenizer_pair
from tests.alignment.test_combinations import pursuit
from tokalign_jax.alignment import alignment, methods
from tokalign_jax.alignment.alignment import Alignment, Rule
from tokalign_jax.alignment.methods import Inputs
from tokalign_jax.alignment.vectors import Vectors
from tokalign_jax.config import AlignmentConfig
from tokalign_jax.text import canonical

EVERY = sorted(methods.METHODS)
DRAWN = ("exact", "random", "tokalign")
"""Methods with random rows, which follow a token's number."""


@pytest.fixture(scope="module")
def tokenizers():
    return tokenizer_pair()


def texts(tokenizer) -> list[int]:
    return [i for i, content in enumerate(canonical.token_bytes(tokenizer)) if content is not None]


def counts(tokenizer) -> np.ndarray:
    """Distinct counts that fall with the token id."""
    return (
        10_000 // (1 + np.arange(canonical.vocabulary_size(tokenizer)))
        + 5000
        - np.arange(canonical.vocabulary_size(tokenizer))
    )


def inputs(source, target, method="composed", seed=0, d=24, noise=0.3, **config) -> Inputs:
    """Vectors in which tokens of the same bytes are the same but for noise and a rotation, and
    others have none in common.
    """
    rng = np.random.default_rng(5)
    source_bytes, target_bytes = canonical.token_bytes(source), canonical.token_bytes(target)
    names = sorted({c for c in (*source_bytes, *target_bytes) if c is not None})
    spread = np.linspace(2, 0.3, d)
    of_name = dict(zip(names, rng.normal(size=(len(names), d)) * spread + rng.normal(size=d)))
    noise_of_name = dict(zip(names, noise * rng.normal(size=(len(names), d))))
    rotation = np.linalg.qr(rng.normal(size=(d, d)))[0]
    of_source = Vectors(
        np.array(texts(source), np.int32),
        np.float32([of_name[source_bytes[i]] for i in texts(source)]),
    )
    of_target = Vectors(
        np.array(texts(target), np.int32),
        np.float32(
            [
                (of_name[target_bytes[i]] + noise_of_name[target_bytes[i]]) @ rotation
                for i in texts(target)
            ]
        ),
    )
    settings = AlignmentConfig(
        method=method, **{"pivots": 200, "similarity_threshold": 0.1, "atoms": 6, **config}
    )
    given = (
        settings,
        source,
        target,
        counts(source),
        counts(target),
        seed,
        lambda line: None,
        of_source,
        of_target,
    )
    return Inputs(*given, donor=donor(target))


def donor(tokenizer) -> methods.Donor:
    """Rows that follow a token's name."""
    seeds = [zlib.crc32(name.encode()) for name in canonical.spelled(tokenizer)]
    rows = [np.random.default_rng(seed).normal(size=(2, 12)) for seed in seeds]
    return methods.Donor(*np.float32(rows).swapaxes(0, 1))


def renumbered(tokenizer: PreTrainedTokenizerFast, new_id: np.ndarray) -> PreTrainedTokenizerFast:
    """The same tokenizer, in which the token that was i is new_id[i]."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"] = {t: int(new_id[i]) for t, i in state["model"]["vocab"].items()}
    for added in state[
        "added_tokens"
    ]:  # those that the model knows keep the numbers that they have there
        added["id"] = int(new_id[added["id"]])
        state["model"]["vocab"][added["content"]] = added["id"]
    roles = {
        f"{role}_token": getattr(tokenizer, f"{role}_token")
        for role in methods.ROLES
        if getattr(tokenizer, f"{role}_token")
    }
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), **roles)


def same_rows(one: Alignment, i: int, other: Alignment, j: int) -> bool:
    return all(
        row(getattr(one, side), i) == pytest.approx(row(getattr(other, side), j), abs=2e-3)
        for side in ("embedding", "head")
    )


def test_every_method_in_the_config_is_implemented():
    named = typing.get_args(typing.get_type_hints(AlignmentConfig)["method"])
    assert set(named) == set(methods.METHODS) and set(methods.METHODS) > methods.NEED_VECTORS


@pytest.mark.parametrize("method", EVERY)
def test_every_method_gives_a_complete_alignment(tokenizers, method):
    made, measured = methods.make(inputs(*tokenizers, method))
    assert_whole(made, *tokenizers, convex=method != "omp")
    again, _ = methods.make(inputs(*tokenizers, method))
    for one, other in zip(dataclasses.astuple(made), dataclasses.astuple(again)):
        assert all(np.array_equal(a, b) for a, b in zip(one, other))
    assert all(np.isfinite(value) for value in measured.values())


@pytest.mark.parametrize("method", EVERY)
def test_vocabulary_aligned_with_itself_maps_to_itself(tokenizers, method):
    for tokenizer in tokenizers if method != "random" else ():
        made, _ = methods.make(inputs(tokenizer, tokenizer, method))
        known = texts(tokenizer)
        content = canonical.token_bytes(tokenizer)
        found = made.heaviest()
        assert [content[found[i]] for i in known] == [content[i] for i in known]
        special = np.flatnonzero(made.rules == Rule.SPECIAL)
        if method == "tokalign":
            assert np.array_equal(found, np.arange(len(found)))
        assert np.array_equal(found[special], special)


@pytest.mark.parametrize("method", EVERY)
def test_doubling_the_corpus_leaves_the_map_unchanged(tokenizers, method):
    given = inputs(*tokenizers, method)
    doubled = dataclasses.replace(
        given, source_counts=2 * given.source_counts, target_counts=2 * given.target_counts
    )
    one, other = (methods.make(i)[0] for i in (given, doubled))
    for side in ("embedding", "head"):
        for a, b in zip(getattr(one, side), getattr(other, side)):
            np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(one.rules, other.rules)
    np.testing.assert_allclose(one.frequency_shift, other.frequency_shift, atol=1e-3)


@pytest.mark.parametrize("method", EVERY)
def test_permuting_target_ids_permutes_the_result(tokenizers, method):
    source, target = tokenizers
    given = inputs(source, target, method)
    new_id = np.random.default_rng(3).permutation(given.target_size)
    permuted = dataclasses.replace(
        given,
        target_tokenizer=renumbered(target, new_id),
        target_counts=given.target_counts[np.argsort(new_id)],
        target=given.target._replace(ids=new_id[given.target.ids].astype(np.int32)),
        donor=methods.Donor(*(rows[np.argsort(new_id)] for rows in given.donor)),
    )
    one, other = (methods.make(i)[0] for i in (given, permuted))
    np.testing.assert_array_equal(one.rules, other.rules[new_id])
    np.testing.assert_array_equal(one.matches, other.matches[new_id])
    np.testing.assert_allclose(one.scores, other.scores[new_id], atol=1e-5)
    np.testing.assert_allclose(one.frequency_shift, other.frequency_shift[new_id], atol=1e-5)
    checked = np.flatnonzero(one.rules != Rule.RANDOM)
    assert len(checked) or method == "random"
    for i in checked:
        assert same_rows(one, i, other, new_id[i])


@pytest.mark.parametrize("method", sorted(methods.NEED_VECTORS - {"tokalign"}))
def test_permuting_source_ids_permutes_the_result(tokenizers, method):
    source, target = tokenizers
    given = inputs(source, target, method)
    new_id = np.random.default_rng(4).permutation(given.source_size + 1)
    new_id = np.append(
        np.argsort(np.argsort(new_id[:-1])), given.source_size
    )  # the mean of all rows stays the last
    permuted = dataclasses.replace(
        given,
        source_tokenizer=renumbered(source, new_id),
        source_counts=given.source_counts[np.argsort(new_id[:-1])],
        source=given.source._replace(ids=new_id[given.source.ids].astype(np.int32)),
    )
    one, other = (methods.make(i)[0] for i in (given, permuted))
    np.testing.assert_array_equal(one.rules, other.rules)
    for side in ("embedding", "head"):
        for i in range(given.target_size):
            expected = {
                int(new_id[source]): weight for source, weight in row(getattr(one, side), i).items()
            }
            assert row(getattr(other, side), i) == pytest.approx(expected, abs=2e-3)


def test_noise_vectors_fall_back_to_pieces(tokenizers):
    given = inputs(*tokenizers, pivots=100, similarity_threshold=0.3)
    noise = np.random.default_rng(0).normal(size=given.target.vectors.shape).astype(np.float32)
    made, measured = methods.make(
        dataclasses.replace(given, target=given.target._replace(vectors=noise))
    )
    assert measured["accuracy_at_1"] < 0.1
    assert np.mean(made.rules == Rule.SIMILAR) < 0.02
    assert_whole(made, *tokenizers)


@pytest.mark.parametrize("method", sorted(methods.NEED_VECTORS))
def test_without_vectors_nothing_is_matched(tokenizers, method):
    output = []
    given = dataclasses.replace(
        inputs(*tokenizers, method),
        source=methods.NO_VECTORS,
        target=methods.NO_VECTORS,
        log=output.append,
    )
    made, measured = methods.make(given)
    assert measured == {} and "shared tokens have vectors" in output[0]
    assert_whole(made, *tokenizers)
    others = {Rule.RANDOM} if method == "tokalign" else {Rule.PIECES}
    assert set(made.rules) <= {*methods.SURE} | others


def test_exact_and_random_draw_the_same_rows_for_unmatched_tokens(tokenizers):
    exact, random = (methods.make(inputs(*tokenizers, m))[0] for m in ("exact", "random"))
    known = np.isin(exact.rules, methods.SURE)
    assert 0.2 < known.mean() < 1 and set(random.rules) == {Rule.RANDOM}
    np.testing.assert_array_equal(exact.heaviest()[~known], random.heaviest()[~known])
    assert len(set(random.heaviest())) > 300  # all over the vocabulary
    other = methods.make(inputs(*tokenizers, "random", seed=1))[0]
    assert np.mean(other.heaviest() == random.heaviest()) < 0.05


def test_mixture_weights_follow_the_method():
    parts = [[5, 6, 7], [5, 5], [5, 6], [], []]
    matches, similarity = (
        np.array([-1, 9, 6, 9, -1]),
        np.array([0.0, 0.8, 0.5, 0.5, 0.0], np.float32),
    )
    embedding, head = methods.mix(parts, matches, similarity, 100)
    assert row(embedding, 0) == pytest.approx({5: 1 / 7, 6: 2 / 7, 7: 4 / 7})
    assert row(head, 0) == pytest.approx({5: 1 / 3, 6: 1 / 3, 7: 1 / 3})
    share = methods.MATCH_WEIGHT_EMBEDDING * 0.8
    assert row(embedding, 1) == pytest.approx({5: 1 - share, 9: share})
    share = methods.MATCH_WEIGHT_HEAD * 0.5  # of a match that is a piece, too
    assert row(head, 2) == pytest.approx({5: (1 - share) / 2, 6: (1 + share) / 2})
    assert row(embedding, 3) == row(head, 3) == {9: 1.0}
    assert row(embedding, 4) == row(head, 4) == {100: 1.0}
    assert embedding.ids.tolist()[:3] == [5, 6, 7]  # in the order of the text


def test_focus_is_the_published_weighted_mean(tokenizers):
    """Rows against Dobler & de Melo (2023), section 3, in NumPy float64."""
    given = inputs(*tokenizers, "focus")
    made, _ = methods.make(
        dataclasses.replace(given, source=methods.NO_VECTORS)
    )  # it has no use for these
    rows = np.random.default_rng(0).normal(size=(given.source_size, 5)).astype(np.float32)
    found = alignment.apply(made.embedding, rows)
    ids, exact = given.target.ids, given.spelled.exact
    unit = given.target.vectors / np.linalg.norm(
        given.target.vectors.astype(np.float64), axis=1, keepdims=True
    )
    shared = np.array([i in exact for i in ids])
    sources = np.array([exact[i] for i in ids[shared]])
    checked = np.flatnonzero([made.rules[i] == Rule.SIMILAR for i in ids])
    assert len(checked) > 100 and np.isin(made.rules[ids[shared]], (Rule.EXACT,)).all()
    for place in checked[::10]:
        cosines = unit[shared] @ unit[place]
        falling = np.sort(cosines)[::-1]
        size = max(
            k for k in range(1, len(falling) + 1) if 1 + k * falling[k - 1] > falling[:k].sum()
        )
        weights = np.maximum(cosines - (falling[:size].sum() - 1) / size, 0)
        np.testing.assert_allclose(
            found[ids[place]], weights @ rows[sources].astype(np.float64), atol=1e-4
        )
        assert made.matches[ids[place]] == sources[cosines.argmax()]
    np.testing.assert_array_equal(
        alignment.apply(made.head, rows)[ids[checked]], found[ids[checked]]
    )


def test_omp_uses_the_donors_matrix_for_each_matrix(tokenizers):
    given = inputs(*tokenizers, "omp")
    made, _ = methods.make(given)
    exact = given.spelled.exact
    sources = np.array(list(exact.values()))
    for mixture, table in zip((made.embedding, made.head), given.donor):
        for i in np.flatnonzero(made.rules == Rule.SIMILAR)[::25]:
            expected, _ = pursuit(
                table[i].astype(np.float64), table[list(exact)].astype(np.float64), 6
            )
            named = {sources[j]: expected[j] for j in np.flatnonzero(expected)}
            assert row(mixture, i) == pytest.approx(named, abs=5e-3)
    assert (made.embedding.weights < 0).any()


def test_donor_may_lack_tokens(tokenizers):
    given = inputs(*tokenizers, "omp")
    fewer = [rows[:-30].copy() for rows in given.donor]
    fewer[1][500] = np.nan
    made, _ = methods.make(dataclasses.replace(given, donor=methods.Donor(*fewer)))
    pieces, _ = methods.make(
        dataclasses.replace(given, config=dataclasses.replace(given.config, method="pieces"))
    )
    assert_whole(made, *tokenizers, convex=False)
    for i in (500, *range(len(made.rules) - 30, len(made.rules))):
        assert made.rules[i] == pieces.rules[i] and same_rows(made, i, pieces, i)
