"""Statistics of held-out text: bootstrap intervals, words, overlap with the training text."""

import math

import numpy as np
import pytest

from tokalign_jax.evaluation import bits_per_byte, fertility, intervals, overlap
from tokalign_jax.evaluation.bits_per_byte import Costs, difference, summaries, summary
from tokalign_jax.text.corpus import Document


def costs(nats, size) -> Costs:
    return Costs(np.asarray(nats, float), np.ones(len(size), int), np.asarray(size, int))


def test_interval_equals_a_bootstrap_of_single_documents():
    """Against a plain loop that draws documents with replacement."""
    random = np.random.default_rng(1)
    size = random.integers(50, 500, 40)
    nats = size * random.normal(1.0, 0.2, 40)
    found = intervals.bootstrap_ratio(nats, size, [40], seed=0)
    assert found is not None and found == intervals.bootstrap_ratio(nats, size, [40], seed=0)
    draws = []
    for _ in range(4000):
        chosen = random.integers(0, 40, 40)
        draws.append(nats[chosen].sum() / size[chosen].sum())
    expected = np.quantile(draws, [0.025, 0.975])
    np.testing.assert_allclose(found, expected, atol=0.15 * (expected[1] - expected[0]))
    assert found[0] < nats.sum() / size.sum() < found[1]


def test_groups_are_resampled_separately():
    """Documents that are all alike within their language leave no doubt, however different the
    languages are.
    """
    alike = [1.0] * 5 + [3.0] * 7
    low, high = intervals.bootstrap_ratio(np.array(alike), np.ones(12), [5, 7], seed=0) or (0, 0)
    assert low == high == pytest.approx(sum(alike) / 12)
    assert (
        intervals.bootstrap_ratio(np.ones(1), np.ones(1), [1], 0) is None
    )  # one document says nothing about others


def test_draws_do_not_depend_on_how_many_are_in_memory(monkeypatch):
    nats, size = np.arange(30.0), np.arange(1.0, 31.0)
    whole = intervals.bootstrap_ratio(nats, size, [10, 20], seed=3)
    monkeypatch.setattr(intervals, "_MAX_COUNTS", 70)
    assert intervals.bootstrap_ratio(nats, size, [10, 20], seed=3) == whole


def test_interval_of_a_difference_is_narrower_than_those_of_both():
    """One document is much harder than another for both models; that one is better by a tenth is
    certain all the same.
    """
    random = np.random.default_rng(0)
    size = np.full(30, 1000)
    hard = random.uniform(300, 3000, 30)
    one, other = costs(hard, size), costs(hard + random.normal(100, 10, 30), size)
    found = difference([other], [one], seed=0)
    low, high = found["interval"]
    assert 0 < low < found["difference"] < high
    alone = summaries({"en": one}, seed=0)["en"]
    assert alone["documents"] == 30 and alone["bits_per_byte"] == pytest.approx(
        hard.sum() / math.log(2) / 30_000
    )
    assert high - low < 0.1 * (alone["interval"][1] - alone["interval"][0])
    with pytest.raises(ValueError, match="different documents"):
        difference([one], [costs(hard, size + 1)], seed=0)


def test_one_document_has_no_interval():
    assert "interval" not in summary([costs([5.0], [7])], seed=0)
    assert "interval" not in difference([costs([5.0], [7])], [costs([4.0], [7])], seed=0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The quick brown fox, don't stop: 3.14", 8),
        ("Größe, l’été", 2),
        ("हिन्दी में शब्द हैं", 4),  # vowel signs are part of their letters
        ("数学とカナ。", 5),  # one a character
        ("ดี", 1),  # a letter and its mark
        ("한국어 단어", 2),
        ("{ } ;", 0),
    ],
)
def test_words_are_counted(text, words):
    assert fertility.words([text]).tolist() == [words]


def test_fertility_of_nothing_is_none():
    assert fertility.fertility(6, 4) == 1.5 and fertility.fertility(6, 0) is None


def brute_force(held_out: str, training: list[str]) -> int:
    """Characters of `held_out` in passages of WINDOW characters that begin at a word and stand in a
    training document.
    """

    def begins(text: str, at: int) -> bool:
        return at == 0 or text[at - 1] <= " " or text[at] >= "\u0e00"

    covered = set()
    for start in range(len(held_out) - overlap.WINDOW + 1):
        passage = held_out[start : start + overlap.WINDOW]
        places = (
            (other, at)
            for other in training
            for at in range(len(other))
            if other[at:].startswith(passage)
        )
        if begins(held_out, start) and any(begins(*place) for place in places):
            covered |= set(range(start, start + overlap.WINDOW))
    return len(covered)


def test_overlap_equals_a_brute_force_search():
    random = np.random.default_rng(0)
    vocabulary = ["the", "of", "größe", "été", "数学", "ここは", "word", "x", "\n"]
    text = lambda n: " ".join(random.choice(vocabulary, n))  # noqa: E731
    training = [text(200), text(30), text(100)]
    copied = training[0][100:400]
    held_out = {
        "a": [text(40) + copied + text(20), training[1]],
        "b": [text(50), "short"],
        "c": [copied[7:] + "?"],
    }
    batches = [
        [Document(t, "x", len(t.encode())) for t in part] for part in (training[:1], training[1:])
    ]
    found = overlap.overlap(held_out, batches)["languages"]
    for language, documents in held_out.items():
        assert found[language]["characters"] == sum(map(len, documents))
        assert found[language]["seen"] == sum(brute_force(d, training) for d in documents)
    assert found["a"]["seen"] > 0 and found["b"]["seen"] == 0 and found["c"]["share"] > 0.5


def test_passage_does_not_run_over_two_documents():
    parts = ["one two three four five six seven", "eight nine ten eleven twelve thirteen"]
    batches = [[Document(part, "x", 0) for part in parts]]
    for joined in ("".join(parts), " ".join(parts), "\n".join(parts)):
        assert overlap.overlap({"a": [joined]}, batches)["languages"]["a"]["share"] == 0.0


def test_document_separators_do_not_count_as_overlap():
    short = [c * 63 for c in "数学文"]
    batches = [[Document(text, "x", 0) for text in reversed(short)]]
    assert (
        overlap.overlap({"a": short}, batches)["languages"]["a"]["seen"] == 0
    )  # none is as long as a passage
    long = ["".join(chr(0x4E00 + 7 * i + j) for j in range(71)) for i in range(40)]
    found = overlap.overlap({"a": long}, [[Document(text, "x", 0) for text in long]])["languages"][
        "a"
    ]
    assert found["share"] == 1.0 and found["seen"] == found["characters"]


def test_documents_are_never_cut_to_nothing():
    chosen = bits_per_byte.choose_texts(
        [Document("a" * 10, "en", 10), Document("日本", "en", 6), Document("日本", "ja", 6)], 11
    )
    assert chosen == {"en": ["a" * 10], "ja": ["日本"]}
    assert bits_per_byte.choose_texts([Document("日本", "ja", 6)], 2) == {"ja": ["日"]}


def test_overlap_warns_by_language():
    training = [[Document("a b c d e f " * 20, "x", 240)]]
    found = overlap.overlap(
        {"copied": ["a b c d e f " * 10], "own": ["g h i j k l " * 10]}, training
    )
    (line,) = overlap.warning_lines(found)
    assert "'copied'" in line and "100.0%" in line and "too low" in line
    assert found["languages"]["own"]["seen"] == 0
