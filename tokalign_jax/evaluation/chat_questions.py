"""Questions asked through the chat template, answered greedily: which answers are right, which
turns end.

A question has several accepted answers; a reply is right if it holds one of them in whole words,
whatever else it says. A reply ends its turn if the model writes a token that ends a turn or a
document, at which `generate` of transformers stops too. Intervals and differences are over the same
questions.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Bool
from transformers import PreTrainedTokenizerBase

from tokalign_jax.errors import UserError
from tokalign_jax.evaluation import intervals
from tokalign_jax.evaluation.question_files import read_questions
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.sampling import sample
from tokalign_jax.text import chats
from tokalign_jax.text.canonical import special_ids
from tokalign_jax.text.special_tokens import end_of_text_id, ends_turn, role_id
from tokalign_jax.utils.progress import Log

_EXAMPLE = '{"question": "What is the capital of Peru?", "answers": ["Lima"]}'
SHOWN = 10
"""Replies that are kept to be read."""


class ChatQuestion(NamedTuple):
    question: str
    answers: tuple[str, ...]
    """Any of them is right."""


class Replies(NamedTuple):
    texts: list[str]
    right: Bool[np.ndarray, "N"]
    ended: Bool[np.ndarray, "N"]


def read(name: str, most: int = 0) -> list[ChatQuestion]:
    """The questions of a file of JSON lines.

    Args:
      most: as many as are taken, the first ones; 0: all.

    Raises:
      UserError: the file cannot be read, or a line is no question.
    """
    path = Path(name).expanduser()
    remedy = "name a file of JSON lines in UTF-8"
    found = read_questions("chat questions", path, remedy, _question)
    if not found:
        raise UserError(f"chat questions '{path}' is empty: add lines such as {_EXAMPLE}")
    return found[: most or len(found)]


def _question(line: str, where: str) -> ChatQuestion:
    try:
        record: Any = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is no JSON ({error}); a line looks like {_EXAMPLE}") from error
    if not isinstance(record, dict) or (missing := {"question", "answers"} - record.keys()):
        lacks = f"has no '{min(missing)}'" if isinstance(record, dict) else "is no JSON object"
        raise UserError(f"{where} {lacks}; a line looks like {_EXAMPLE}")
    question, answers = record["question"], record["answers"]
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"{where}: 'question' is {question!r}; it must be a text that is not empty")
    usable = isinstance(answers, list) and answers
    if not usable or not all(isinstance(answer, str) and _words(answer) for answer in answers):
        raise UserError(
            f"{where}: 'answers' is {answers!r}; it must be a list of texts with letters or digits"
        )
    return ChatQuestion(question, tuple(answers))


def digest(questions: Sequence[ChatQuestion]) -> str:
    """Tells sets of questions apart."""
    return hashlib.sha256(json.dumps(questions).encode()).hexdigest()[:16]


def check(
    tokenizer: PreTrainedTokenizerBase,
    whose: str,
    questions: Sequence[ChatQuestion],
    reply_tokens: int,
    positions: int,
) -> None:
    """
    Raises: UserError: the tokenizer has no usable chat template, or a model of so many positions
      cannot read a
        question and write a reply.
    """
    if not questions:
        return
    if problem := chats.template_problem(tokenizer):
        raise UserError(
            f"chat questions cannot be asked of {whose}: {problem}; add a chat_template.jinja to"
            " its folder, keep the source's with --config.chat=source in a run, or ask no chat"
            " questions"
        )
    longest = max(len(prompt) for prompt in _prompts(tokenizer, questions))
    if longest + reply_tokens > positions:
        raise UserError(
            f"a chat question has {longest:,} tokens for {whose}, and a reply up to"
            f" {reply_tokens:,}, but the model has {positions:,} positions: shorten the question or"
            " lower reply_tokens"
        )


def _prompts(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[ChatQuestion]
) -> list[list[int]]:
    try:
        return [chats.prompt_ids(tokenizer, question.question) for question in questions]
    except chats.Unusable as error:
        raise UserError(f"a chat question {error}") from error


def ask(
    config: ModelConfig,
    params: dict,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[ChatQuestion],
    reply_tokens: int,
    dtype: DTypeLike,
    mesh: Mesh,
    log: Log,
    what: str = "chat questions",
) -> Replies:
    """The model's greedy replies of at most `reply_tokens` tokens."""
    prompts = _prompts(tokenizer, questions)
    length = max(map(len, prompts)) + reply_tokens
    drawn = sample(config, params, prompts, length, 0.0, 0, dtype, mesh)
    stops, special = stop_ids(tokenizer), special_ids(tokenizer)
    texts, ended = [], []
    for prompt, tokens in zip(prompts, drawn):
        reply = tokens[len(prompt) : len(prompt) + reply_tokens]
        end = next((i for i, token in enumerate(reply) if token in special), len(reply))
        texts.append(str(tokenizer.decode(reply[:end])))
        ended.append(end < len(reply) and reply[end] in stops)
    right = [is_right(text, of.answers) for text, of in zip(texts, questions)]
    replies = Replies(texts, np.array(right), np.array(ended))
    log(
        f"{what}: {replies.right.mean():.1%} of {len(questions):,} right,"
        f" {replies.ended.mean():.1%} ended their turn"
    )
    return replies


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a turn or a document."""
    ends = {index for index in special_ids(tokenizer) if ends_turn(tokenizer, index)}
    eos = role_id(tokenizer, "eos")
    return ends | {end_of_text_id(tokenizer)} | ({eos} if eos is not None else set())


def is_right(reply: str, answers: Sequence[str]) -> bool:
    """Whether the reply holds an accepted answer in whole words."""
    said = _words(reply)
    return any(re.search(_pattern(_words(answer)), said) for answer in answers)


def _words(text: str) -> str:
    """Letters and digits without case, with single spaces between them."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def _pattern(words: str) -> str:
    """A search for whole words; scripts without cases, some of which have no spaces, need no ends."""
    before = "" if unicodedata.category(words[0]) == "Lo" else r"(?<!\w)"
    after = "" if unicodedata.category(words[-1]) == "Lo" else r"(?!\w)"
    return before + re.escape(words) + after


def summary(
    questions: Sequence[ChatQuestion],
    replies: Replies,
    source: Mapping[str, Any] | None,
    seed: int,
) -> dict[str, Any]:
    """Shares with 95% intervals, and beside the source's, for JSON.

    Args:
      source: the summary of the source model on the same questions; None for itself.
    """
    content: dict[str, Any] = {
        "digest": digest(questions),
        "questions": len(questions),
        "right": _share(replies.right, seed),
        "ended": _share(replies.ended, seed),
        "answers": _bits(replies.right),
        "replies": [
            {"question": of.question, "reply": text}
            for of, text in list(zip(questions, replies.texts))[:SHOWN]
        ],
    }
    if source and source["digest"] == content["digest"]:
        before = np.array([bit == "1" for bit in source["answers"]])
        content["difference"] = _share(replies.right.astype(float) - before, seed)
        if before.any():
            content["kept"] = _share(replies.right[before], seed)
    return content


def _share(values: np.ndarray, seed: int) -> dict[str, Any]:
    interval = intervals.of_ratio(values, np.ones(len(values)), [len(values)], seed)
    found = {"value": float(values.mean())}
    return found | ({"interval": list(interval)} if interval else {})


def _bits(values: Bool[np.ndarray, "N"]) -> str:
    return "".join("01"[bool(value)] for value in values)
