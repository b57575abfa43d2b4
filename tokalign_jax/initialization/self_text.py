"""Text written by the source model, which covers what the model knows, whatever the corpus.

Three kinds of documents are sampled from the model:

- free: continuations of a document separator;
- by word: a short document for each token of the source's vocabulary that begins a word, in random
  order, so that rare words and names occur that free text would contain once in a million tokens;
- chats, if the source has a chat template: a question is sampled after the template's user turn,
  then the answer to it (Magpie, arXiv 2406.08464). Answers that are cut off are dropped: most are
  long, and a model that reads few ends of turns ends few of its own.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from transformers import PreTrainedTokenizerBase

from tokalign_jax.evaluation.bits_per_byte import first_context
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.sampling import sample
from tokalign_jax.models.transformer import Params
from tokalign_jax.text import canonical, chats
from tokalign_jax.text.special_tokens import ends_turn
from tokalign_jax.utils.progress import Log

TEMPERATURE = 0.8
FREE_SHARE, WORD_SHARE, CHAT_SHARE = 0.2, 0.6, 0.2
"""Shares of the sampled tokens; without a chat template, the share of chats goes to free text."""
FREE_LENGTH, WORD_LENGTH = 192, 48
"""Tokens per document."""
QUESTION_LENGTH, ANSWER_LENGTH = 40, 120
SHORT_WORD = 4
"""Beginnings of words of up to so many bytes, a space included, are used repeatedly once all others
were used: they have many completions.
"""


class Segment(NamedTuple):
    """Plain text, and the special token of the source after it, if there is one."""

    text: str
    special: int | None = None


Passage = tuple[Segment, ...]
"""A document, without its document separator."""


class Writer(NamedTuple):
    """The source model as a writer of text."""

    config: ModelConfig
    params: Params
    tokenizer: PreTrainedTokenizerBase
    dtype: DTypeLike
    mesh: Mesh
    seed: int

    def write(self, budget: int, log: Log, special: Collection[int] = ()) -> list[Passage]:
        """Return passages, sampled until about `budget` tokens are used, prompts included.

        Args:
          budget: tokens of the source.
          log: receives the number of passages.
          special: the source's special tokens that passages may contain. Chats are written only if
            those of the template are among them.
        """
        chat = _turn(self.tokenizer)
        if chat and not {*chat[0], *chat[1]} & canonical.special_ids(self.tokenizer) <= set(
            special
        ):
            chat = None
        free_share = FREE_SHARE if chat else FREE_SHARE + CHAT_SHARE
        passages = self._free(int(budget * free_share) // FREE_LENGTH)
        passages += self._by_word(int(budget * WORD_SHARE) // WORD_LENGTH)
        if chat:
            size = len(chat[0]) + len(chat[1]) + 2 * QUESTION_LENGTH + ANSWER_LENGTH + len(chat[0])
            passages += self._chats(int(budget * CHAT_SHARE) // size, *chat)
        text = sum(len(segment.text) for passage in passages for segment in passage)
        log(f"self-text: the source model wrote {len(passages):,} passages, {text:,} characters")
        return passages

    def _draw(self, prompts: Sequence[Sequence[int]], length: int, stream: int) -> list[list[int]]:
        if not prompts:
            return []
        longest = max(map(len, prompts))
        length = min(max(length, longest + 1), self.config.max_positions)
        prompts = [prompt for prompt in prompts if len(prompt) < length]
        seed = int(np.random.SeedSequence([self.seed, stream]).generate_state(1)[0] >> 1)
        settings = TEMPERATURE, seed, self.dtype, self.mesh
        return sample(self.config, self.params, prompts, length, *settings)

    def _free(self, count: int) -> list[Passage]:
        start = first_context(self.tokenizer)
        return self._plain(self._draw([[start]] * count, FREE_LENGTH, 0))

    def _by_word(self, count: int) -> list[Passage]:
        beginnings, sizes = word_beginnings(self.tokenizer)
        random, chosen = np.random.default_rng([self.seed, 1]), np.zeros(0, np.int64)
        while len(beginnings) and len(chosen) < count:
            chosen = np.concatenate([chosen, random.permutation(beginnings)])
            if (sizes <= SHORT_WORD).any():
                beginnings, sizes = beginnings[sizes <= SHORT_WORD], sizes[sizes <= SHORT_WORD]
        start = first_context(self.tokenizer)
        return self._plain(self._draw([[start, int(i)] for i in chosen[:count]], WORD_LENGTH, 2))

    def _chats(self, count: int, before: list[int], after: list[int]) -> list[Passage]:
        """Sample questions, and answers to them.

        Args:
          count: number of questions.
          before: the template's tokens before a user's turn.
          after: the template's tokens after it.
        """
        special = canonical.special_ids(self.tokenizer)
        sampled = self._draw([before] * count, len(before) + QUESTION_LENGTH, 3)
        questions = [_until(tokens[len(before) :], special) for tokens in sampled]
        prompts = [[*before, *q, *after] for q in questions if 3 < len(q) < QUESTION_LENGTH]
        length = len(before) + QUESTION_LENGTH + len(after) + ANSWER_LENGTH
        passages = []
        for prompt, tokens in zip(prompts, self._draw(prompts, length, 4)):
            answer = tokens[len(prompt) :]
            reply = _until(answer, special)
            end = answer[len(reply) : len(reply) + 1]
            if reply and end and ends_turn(self.tokenizer, end[0]):
                passages.append(self._segments([*prompt, *reply, *end], special))
        return passages

    def _plain(self, sampled: Sequence[Sequence[int]]) -> list[Passage]:
        """Return the text up to the first special token after the start."""
        special = canonical.special_ids(self.tokenizer)
        texts = (self._text(_until(tokens[1:], special)) for tokens in sampled)
        return [(Segment(text),) for text in texts if text.strip()]

    def _segments(self, tokens: Sequence[int], special: set[int]) -> Passage:
        segments, run = [], []
        for token in tokens:
            if token in special:
                segments.append(Segment(self._text(run), token))
                run = []
            else:
                run.append(token)
        return (*segments, Segment(self._text(run))) if run else tuple(segments)

    def _text(self, tokens: Sequence[int]) -> str:
        """Decode, without the replacement characters that stand for truncated characters."""
        text = self.tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)
        return str(text).replace("\ufffd", "")


def word_beginnings(tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of tokens that begin a word, and their sizes in bytes."""
    texts = texts_of_word_beginnings(tokenizer)
    return np.array(list(texts), np.int64), np.array([len(t.encode()) for t in texts.values()])


def texts_of_word_beginnings(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return tokens that are a space and letters, or letters alone if there are no such tokens."""
    texts = {}
    for i, content in enumerate(canonical.token_bytes(tokenizer)):
        if content:
            try:
                texts[i] = content.decode()
            except UnicodeDecodeError:
                continue
    spaced = {i: t for i, t in texts.items() if t[0] == " " and t[1:].isalpha()}
    return spaced or {i: t for i, t in texts.items() if t.isalpha()}


def _turn(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]] | None:
    """Return the tokens before a user's first message, and those between it and the answer.

    Returns None without a template that has both.
    """
    around = chats.around_question(tokenizer)
    if around is None:
        return None
    parts = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in around]
    return (parts[0], parts[1]) if set(parts[0]) & canonical.special_ids(tokenizer) else None


def _until(tokens: Sequence[int], stops: set[int]) -> list[int]:
    end = next((i for i, token in enumerate(tokens) if token in stops), len(tokens))
    return list(tokens[:end])
