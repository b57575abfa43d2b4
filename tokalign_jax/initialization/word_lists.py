"""Lists of words that the two tokenizers split differently, as text for the initial distillation.

The new model has to learn each of these words from a sequence of tokens that it has never read.
Most of them occur once in a million tokens of text or never. A list consists of such words alone,
in an order that differs from pass to pass; the source model only reads it.
"""

import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from tokalign_jax.initialization.self_text import texts_of_word_beginnings
from tokalign_jax.text import canonical, pairs
from tokalign_jax.text.boundaries import token_boundaries

LENGTH = 24
"""Words per list."""
SEPARATOR = ","
PASSES = 20
"""Maximum number of lists that a word is in."""
_WORD = re.compile(r" [^\W\d_]{2,}")


def split_differently(
    source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase, texts: Iterable[str]
) -> list[str]:
    """List the words that the tokenizers split differently, with the space before them.

    Candidates are the tokens of both vocabularies that begin a word, and the words of the texts.
    Words with characters that one of the tokenizers does not know are left out: all of them would
    be the same unknown token.
    """
    candidates: dict[str, None] = {}
    for tokenizer in (source, target):
        candidates.update(dict.fromkeys(texts_of_word_beginnings(tokenizer).values()))
    for text in texts:
        candidates.update(dict.fromkeys(_WORD.findall(text)))
    words = list(candidates)
    ends = zip(*(_ends_in_list(tokenizer, words) for tokenizer in (source, target)))
    return [
        word
        for word, (a, b) in zip(words, ends)
        if a is not None and b is not None and not np.array_equal(a, b)
    ]


def _ends_in_list(
    tokenizer: PreTrainedTokenizerBase, words: Sequence[str]
) -> Iterator[Int[np.ndarray, "n"] | None]:
    """Yield the ends of each word's tokens after a separator; None for unknown characters.

    At the beginning of a text SentencePiece would put a second space before the word.
    """
    texts = [SEPARATOR + word for word in words]
    for ids, ends in token_boundaries(canonical.plain_backend(tokenizer), texts):
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
            yield None
        else:
            # Tokens up to the separator, which may be one more on one side; none if it is joined.
            before = np.flatnonzero(ends == len(SEPARATOR))
            yield ends[before[-1] + 1 :] if len(before) else ends


def draw(
    words: Sequence[str], tokens: int, pairing: pairs.Pairing, random: np.random.Generator
) -> list[pairs.Pair]:
    """Draw lists of about `tokens` target tokens; each word is in `PASSES` of them at most.

    All words follow one another in a random order, then again in another.
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
