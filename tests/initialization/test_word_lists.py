"""Lists of words that two tokenizers split differently."""

from collections import Counter

import numpy as np
import pytest

from tests.helpers import TEXTS, tiny_tokenizer, tokenizer_of_kind
from tokalign_jax.initialization import word_lists
from tokalign_jax.text import boundaries, canonical, pairs

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


@pytest.mark.parametrize("kind", ["llama2", "gemma", "t5", "unigram_first", "bert_cased"])
def test_words_count_as_they_are_split_behind_a_separator(kind):
    """At the beginning of a text, LLaMA 2's tokenizer puts a second space before a word."""
    other = tokenizer_of_kind(kind, TEXTS, 360)
    words = word_lists.split_differently(SOURCE, other, TEXTS)
    candidates = {word for text in TEXTS for word in word_lists._WORD.findall(text)} | set(words)
    assert words and len(candidates) > len(words)

    def ends(tokenizer, word):
        backend = canonical.plain_backend(tokenizer)
        (text,) = boundaries.token_boundaries(backend, ["Go, " + "to," + word])
        return [int(end) - 7 for end in text.ends if end > 7]

    for word in candidates:
        unknown = other.unk_token_id in canonical.plain_backend(other).encode("a," + word).ids
        differs = ends(SOURCE, word) != ends(other, word)
        assert (word in words) == (differs and not unknown), word


@pytest.mark.parametrize("turned", [False, True])
def test_words_with_unknown_characters_are_left_out(turned):
    tokenizers = SOURCE, tokenizer_of_kind("bert", TEXTS, 90)
    if turned:
        tokenizers = tokenizers[::-1]
    words = word_lists.split_differently(*tokenizers, ["The Jumping Привет зверь"])
    assert " Jumping" in words and not {" Привет", " зверь"} & set(words)


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
