"""Lists of words that the two tokenizers split differently, as text for the initial distillation.

The new model has to learn what each of these words is from tokens that it has never read in a row.
Text has most of them once in a million tokens or never; in a list they follow one another, each
time in another order, and the source model only has to read them.
"""

import re
from collections.abc import Iterable, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from tokalign_jax.initialization.self_text import word_beginnings
from tokalign_jax.text import canonical, pairs
from tokalign_jax.text.boundaries import token_boundaries

LENGTH = 24
"""Words per list."""
SEPARATOR = ","
PASSES = 20
"""Times that a word occurs, at most."""
_WORD = re.compile(r" [^\W\d_]{2,}")


def split_differently(
    source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase, texts: Iterable[str]
) -> list[str]:
    """List the words that the tokenizers split differently, with the space before them.

    Words are the tokens of both vocabularies that begin a word, and the words of the texts.
    """
    words: dict[str, None] = {}
    for tokenizer in (source, target):
        contents, (beginnings, _) = canonical.token_bytes(tokenizer), word_beginnings(tokenizer)
        words.update(dict.fromkeys((contents[i] or b"").decode() for i in beginnings.tolist()))
    for text in texts:
        words.update(dict.fromkeys(_WORD.findall(text)))
    every = list(words)
    sides = [token_boundaries(canonical.plain_backend(t), every) for t in (source, target)]
    return [word for word, a, b in zip(every, *sides) if not np.array_equal(a.ends, b.ends)]


def draw(
    words: Sequence[str], tokens: int, pairing: pairs.Pairing, random: np.random.Generator
) -> list[pairs.Pair]:
    """Draw lists of about `tokens` target tokens, in which each word occurs `PASSES` times at most.

    All words follow in random order, then again in another.
    """
    drawn: list[pairs.Pair] = []
    for _ in range(PASSES):
        if tokens <= 0 or not words:
            break
        # A word and its separator are two tokens or more.
        order: list[int] = random.permutation(len(words))[: tokens // 2 + LENGTH].tolist()
        lists = [order[i : i + LENGTH] for i in range(0, len(order), LENGTH)]
        texts = [SEPARATOR.join(words[i] for i in numbers) for numbers in lists]
        new = pairing.pair([((text, None),) for text in texts])
        drawn += new
        tokens -= sum(len(pair.target) for pair in new)
    return drawn
