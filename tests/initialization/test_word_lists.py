"""Lists of words that two tokenizers split differently."""

from collections import Counter

import numpy as np
import pytest

from tests.helpers import TEXTS, tiny_tokenizer
from tokalign_jax.initialization import word_lists
from tokalign_jax.text import pairs

SOURCE, TARGET = tiny_tokenizer(300, TEXTS), tiny_tokenizer(340, TEXTS)
PAIRING = pairs.Pairing(SOURCE, TARGET, (SOURCE.eos_token_id, TARGET.eos_token_id), {})


def pieces(tokenizer, word):
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    return [tokenizer.decode([i]) for i in ids]


def test_words_are_those_that_the_tokenizers_split_differently():
    words = word_lists.split_differently(SOURCE, TARGET, ["Where is Tbilisi? Not in 1984, é!"])
    assert len(words) == len(set(words)) and all(word[0] == " " for word in words)
    assert all(pieces(SOURCE, word) != pieces(TARGET, word) for word in words)
    every = {word for text in TEXTS for word in word_lists._WORD.findall(" " + text)}
    found = word_lists.split_differently(SOURCE, TARGET, [" " + text for text in TEXTS])
    differ = {word for word in every if pieces(SOURCE, word) != pieces(TARGET, word)}
    assert differ and differ <= set(found)
    assert not word_lists.split_differently(SOURCE, SOURCE, TEXTS)


@pytest.mark.parametrize("tokens", [100, 1000])
def test_every_word_occurs_about_as_often_as_the_others(tokens):
    words = word_lists.split_differently(SOURCE, TARGET, TEXTS)
    drawn = word_lists.draw(words, tokens, PAIRING, np.random.default_rng(0))
    assert tokens <= sum(len(pair.target) for pair in drawn) < 2 * tokens + 500
    texts = [TARGET.decode(pair.target[1:]) for pair in drawn]
    counts = Counter(word for text in texts for word in text.split(word_lists.SEPARATOR))
    assert set(counts) <= set(words) and max(counts.values()) - min(counts.values()) <= 1
    again = word_lists.draw(words, tokens, PAIRING, np.random.default_rng(0))
    assert [x.target.tolist() for x in again] == [x.target.tolist() for x in drawn]


def test_few_words_are_not_repeated_without_end():
    drawn = word_lists.draw([" the"], 10_000, PAIRING, np.random.default_rng(0))
    assert len(drawn) == word_lists.PASSES
    assert not word_lists.draw([], 10_000, PAIRING, np.random.default_rng(0))
