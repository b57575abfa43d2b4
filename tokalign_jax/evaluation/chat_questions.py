"""Questions asked through the chat template: shares of correct replies and of finished turns.

Replies are decoded greedily. A question has several accepted answers; a reply is correct if it
contains one of them as whole words. A reply finishes its turn if the model writes a token that ends
a turn or a document, at which `generate` of transformers stops too. Intervals and differences are
over the same questions.
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
from tokalign_jax.evaluation.question_files import parse_object, read_questions
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.sampling import sample
from tokalign_jax.text import chats
from tokalign_jax.text.canonical import special_ids
from tokalign_jax.text.special_tokens import end_of_text_id, ends_turn, role_id
from tokalign_jax.utils.progress import Log

_EXAMPLE = '{"question": "What is the capital of Peru?", "answers": ["Lima"]}'
SAMPLE_REPLIES = 10
"""Number of replies that are stored for reading."""


class ChatQuestion(NamedTuple):
    """A question with its accepted answers."""

    question: str
    answers: tuple[str, ...]
    """Accepted answers."""


class Replies(NamedTuple):
    """Replies to N questions, with flags for correct replies and finished turns."""

    texts: list[str]
    right: Bool[np.ndarray, "N"]
    ended: Bool[np.ndarray, "N"]


def read(name: str, max_questions: int = 0) -> list[ChatQuestion]:
    """Reads the questions of a JSON Lines file.

    Args:
      name: path of the file.
      max_questions: number of questions to keep, from the first; 0 for all.

    Raises:
      UserError: the file cannot be read, or a line is not a question.
    """
    path = Path(name).expanduser()
    remedy = "give a JSON Lines file in UTF-8"
    questions = read_questions("chat questions", path, remedy, _question)
    if not questions:
        raise UserError(f"chat questions '{path}' is empty: add lines such as {_EXAMPLE}")
    return questions[: max_questions or len(questions)]


def _question(line: str, where: str) -> ChatQuestion:
    record = parse_object(line, where, {"question", "answers"}, _EXAMPLE)
    question, answers = record["question"], record["answers"]
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"{where}: 'question' is {question!r}; it must be a non-empty string")
    is_list = isinstance(answers, list) and answers
    if not is_list or not all(isinstance(answer, str) and _words(answer) for answer in answers):
        raise UserError(
            f"{where}: 'answers' is {answers!r}; it must be a list of strings with letters or"
            " digits"
        )
    return ChatQuestion(question, tuple(answers))


def digest(questions: Sequence[ChatQuestion]) -> str:
    """Returns a digest that identifies a list of questions."""
    return hashlib.sha256(json.dumps(questions).encode()).hexdigest()[:16]


def check(
    tokenizer: PreTrainedTokenizerBase,
    whose: str,
    questions: Sequence[ChatQuestion],
    reply_tokens: int,
    positions: int,
) -> None:
    """Checks that the questions can be asked and answered.

    Raises:
      UserError: the tokenizer has no usable chat template, or a question and its reply exceed the
        model's positions.
    """
    if not questions:
        return
    if problem := chats.template_problem(tokenizer):
        raise UserError(
            f"chat questions cannot be asked of {whose}: {problem}; add a chat_template.jinja to"
            " its folder, keep the source's template with --config.chat=source in a run, or"
            " configure no chat questions"
        )
    longest = max(len(prompt) for prompt in _prompts(tokenizer, questions))
    if longest + reply_tokens > positions:
        raise UserError(
            f"a chat question has {longest:,} tokens for {whose}, and a reply up to"
            f" {reply_tokens:,}, but the model has only {positions:,} positions: shorten the"
            " question or lower reply_tokens"
        )


def _prompts(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[ChatQuestion]
) -> list[list[int]]:
    try:
        return chats.prompt_ids(tokenizer, [question.question for question in questions])
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
    """Decodes the model's greedy replies of at most `reply_tokens` tokens."""
    prompts = _prompts(tokenizer, questions)
    length = max(map(len, prompts)) + reply_tokens
    samples = sample(config, params, prompts, length, 0.0, 0, dtype, mesh)
    stops, special = stop_ids(tokenizer), special_ids(tokenizer)
    texts, ended = [], []
    for prompt, tokens in zip(prompts, samples):
        reply = tokens[len(prompt) : len(prompt) + reply_tokens]
        end = next((i for i, token in enumerate(reply) if token in special), len(reply))
        texts.append(str(tokenizer.decode(reply[:end])))
        ended.append(end < len(reply) and reply[end] in stops)
    right = [is_right(text, question.answers) for text, question in zip(texts, questions)]
    replies = Replies(texts, np.array(right), np.array(ended))
    log(
        f"{what}: {replies.right.mean():.1%} of {len(questions):,} right,"
        f" {replies.ended.mean():.1%} ended their turn"
    )
    return replies


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Returns the tokens that end a turn or a document."""
    ends = {index for index in special_ids(tokenizer) if ends_turn(tokenizer, index)}
    eos = role_id(tokenizer, "eos")
    return ends | {end_of_text_id(tokenizer)} | ({eos} if eos is not None else set())


def is_right(reply: str, answers: Sequence[str]) -> bool:
    """Tells if the reply contains an accepted answer as whole words."""
    words = _words(reply)
    return any(re.search(_pattern(_words(answer)), words) for answer in answers)


def _words(text: str) -> str:
    """Returns the case-folded words of letters and digits, separated by single spaces."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def _pattern(words: str) -> str:
    """Returns a pattern for whole words.

    Scripts without case, some of which have no spaces, need no word boundary.
    """
    before = "" if unicodedata.category(words[0]) == "Lo" else r"(?<!\w)"
    after = "" if unicodedata.category(words[-1]) == "Lo" else r"(?!\w)"
    return before + re.escape(words) + after


def summary(
    questions: Sequence[ChatQuestion],
    replies: Replies,
    source: Mapping[str, Any] | None,
    seed: int,
) -> dict[str, Any]:
    """Summarizes replies with 95% intervals and the difference to the source's, for JSON.

    Args:
      questions: the questions.
      replies: the model's replies.
      source: summary of the source model on the same questions; None for the source itself.
      seed: seed of the bootstrap.
    """
    content: dict[str, Any] = {
        "digest": digest(questions),
        "questions": len(questions),
        "right": _share(replies.right, seed),
        "ended": _share(replies.ended, seed),
        "answers": _bits(replies.right),
        "replies": [
            {"question": question.question, "reply": text}
            for question, text in list(zip(questions, replies.texts))[:SAMPLE_REPLIES]
        ],
    }
    if source and source["digest"] == content["digest"]:
        before = np.array([bit == "1" for bit in source["answers"]])
        content["difference"] = _share(replies.right.astype(float) - before, seed)
        if before.any():
            content["kept"] = _share(replies.right[before], seed)
    return content


def _share(values: np.ndarray, seed: int) -> dict[str, Any]:
    interval = intervals.bootstrap_ratio(values, np.ones(len(values)), [len(values)], seed)
    share = {"value": float(values.mean())}
    return share | ({"interval": list(interval)} if interval else {})


def _bits(values: Bool[np.ndarray, "N"]) -> str:
    return "".join("01"[bool(value)] for value in values)
