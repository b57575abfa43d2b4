"""BLEU-1 by hand and by brute force, and hub shares."""

import math
import tracemalloc

import numpy as np
import pytest

from tests.helpers import tiny_tokenizer
from tokalign_jax.alignment import scoring
from tokalign_jax.config import Config, TextConfig
from tokalign_jax.text import corpus


def test_bleu_1_by_hand():
    # 3 of 4 match (the second 7 is clipped, as the reference has one); as long as the reference: no
    # penalty.
    assert scoring.bleu_1([[7, 7, 1, 2]], [[7, 1, 2, 3]]) == pytest.approx(3 / 4)
    # 2 of 2 match, but the reference has 4 tokens: exp(1 - 4 / 2).
    assert scoring.bleu_1([[1, 2]], [[1, 2, 3, 4]]) == pytest.approx(math.exp(-1))
    # Longer candidates pay in precision only.
    assert scoring.bleu_1([[1, 2, 3, 4]], [[1, 2]]) == pytest.approx(1 / 2)
    # Over the corpus, not a mean of lines: (1 + 3) / (4 + 3).
    assert scoring.bleu_1([[1, 9, 9, 9], [1, 2, 3]], [[1, 1, 1, 1], [1, 2, 3]]) == pytest.approx(
        4 / 7
    )
    assert (
        scoring.bleu_1([[5]], [[6]]) == scoring.bleu_1([[]], [[6]]) == scoring.bleu_1([], []) == 0.0
    )


def test_bleu_1_by_brute_force():
    rng = np.random.default_rng(0)
    candidates = [rng.integers(0, 12, rng.integers(0, 20)).tolist() for _ in range(50)]
    references = [rng.integers(0, 12, rng.integers(1, 20)).tolist() for _ in range(50)]
    matched = 0
    for candidate, reference in zip(candidates, references):
        left = list(reference)
        for token in candidate:
            if token in left:
                left.remove(token)
                matched += 1
    c, r = sum(map(len, candidates)), sum(map(len, references))
    assert scoring.bleu_1(candidates, references) == pytest.approx(
        matched / c * min(1, math.exp(1 - r / c))
    )


def test_bleu_refuses_unequal_numbers_of_lines():
    with pytest.raises(ValueError, match="shorter"):
        scoring.bleu_1([[1], [2]], [[1]])


def test_tokenizer_mapped_to_itself_scores_1():
    tokenizer = tiny_tokenizer(300, ["some words to learn from"])
    lines = ["some words", "other words <|endoftext|>"]
    identity = np.arange(len(tokenizer))
    assert scoring.score(identity, tokenizer, tokenizer, lines) == 1.0
    assert scoring.score(np.zeros_like(identity), tokenizer, tokenizer, lines) == 0.0


def test_hub_share_counts_tokens_that_share_a_source_token():
    assert scoring.hub_share(np.array([1, 1, 1, 2, 2, 3]), 2) == pytest.approx(5 / 6)
    assert scoring.hub_share(np.arange(100), 10) == pytest.approx(0.1)
    assert scoring.hub_share(np.zeros(0, int), 10) == 0.0


def test_held_out_lines_are_sampled_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "GROUP_BYTES", 50_000)
    texts = [
        "\n".join(f"line {i}.{k} ".ljust(1000, "x") for k in range(40)) + "\n \n"
        for i in range(100)
    ]
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(texts))
    corpus.run(
        Config(corpus=str(path), text=TextConfig(held_out_fraction=0.5)),
        tmp_path / "corpus",
        lambda line: None,
    )
    lines = [
        line
        for document in corpus.held_out(tmp_path / "corpus")
        for line in document.text.splitlines()
    ]
    expected = [lines[i] for i in sorted(np.random.default_rng(3).permutation(len(lines))[:20])]
    assert scoring.held_out_lines(tmp_path / "corpus", 20, seed=3) == expected
    assert scoring.held_out_lines(tmp_path / "corpus", 10**6, seed=3) == lines
    tracemalloc.start()
    scoring.held_out_lines(tmp_path / "corpus", 20, seed=3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < sum(map(len, lines)) / 3
