"""Multiple-choice abilities: what a model knows, whatever tokenizer it has.

A suite is a file of JSON lines, each a question with its choices, the right one first:

    {"task": "capitals", "question": "The capital of Peru is the city of", "choices": [" Lima", " Cusco"]}

A model answers with the choice for which the text `question + choice`, cut into tokens as one string
and read after the token that separates documents, has the highest likelihood. N questions, C choices.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float
from transformers import PreTrainedTokenizerBase

from tokalign_jax.config import ComputeConfig
from tokalign_jax.errors import UserError
from tokalign_jax.evaluation.token_costs import Window, token_costs
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.progress import Log, Progress
from tokalign_jax.text.canonical import index_by_bytes, plain_backend, token_bytes
from tokalign_jax.text.tokenizing import end_of_text_id, opening_id

ALIKE, COMPOSED, QUESTION_ONLY, RECUT = "alike", "composed", "question", "recut"
KINDS_OF_CUT = {
    ALIKE: "question and answer cut alike by both tokenizers",
    QUESTION_ONLY: "only the question cut differently",
    COMPOSED: "answer has tokens that the source vocabulary lacks",
    RECUT: "answer of shared tokens, cut differently",
}
"""How two tokenizers cut a question and its right answer, and what each kind means."""

_TOKENS_AT_ONCE = 8192
"""Tokens that a device reads in one batch."""
_LOGITS_AT_ONCE = 1024
"""Tokens whose logits exist at once."""


@dataclass(frozen=True)
class Question:
    """One multiple-choice question."""

    suite: str
    text: str
    choices: tuple[str, ...]
    """The right one is the first."""

    @property
    def texts(self) -> list[str]:
        """What a model reads, one text a choice."""
        return [self.text + choice for choice in self.choices]


# --- Suites -----------------------------------------------------------------------------------------------------------


def read(names: str, max_questions: int = 0) -> list[Question]:
    """The questions of all suites in `names`, and the generated suite `sums` unless one of that name is there.

    Args:
      names: a file of JSON lines, a folder with such files (`*.jsonl`) or a glob; several separated by commas.
      max_questions: of each suite, the first ones; 0: all.

    Raises:
      UserError: there is no such file, or a line is no question; names the file and the line.
    """
    questions = [question for path in _files(names) for question in _read_file(path)]
    if SUMS not in {question.suite for question in questions}:
        questions += sums()
    return [q for of in by_suite(questions).values() for q in of[: max_questions or len(of)]]


def by_suite(questions: Sequence[Question]) -> dict[str, list[Question]]:
    """The questions of each suite, suites in the order of their first questions."""
    suites: dict[str, list[Question]] = {}
    for question in questions:
        suites.setdefault(question.suite, []).append(question)
    return suites


def _files(names: str) -> list[Path]:
    files: list[Path] = []
    for name in filter(None, map(str.strip, names.split(","))):
        path = Path(name).expanduser()
        pattern = path / "*.jsonl" if path.is_dir() else path
        found = [path] if path.is_file() else sorted(map(Path, glob(str(pattern))))
        if not found:
            why = "has no *.jsonl files" if path.is_dir() else "names no file"
            raise UserError(f"abilities '{name}' {why}: give a file of JSON lines, a folder with such files or a glob")
        files += found
    return files


def _read_file(path: Path) -> list[Question]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"abilities '{path}' cannot be read ({error}): it must be JSON lines in UTF-8") from error
    questions = [_question(line, f"abilities '{path}', line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    if not questions:
        raise UserError(f"abilities '{path}' has no questions: take it away, or add lines such as {_EXAMPLE}")
    return questions


_EXAMPLE = '{"task": "capitals", "question": "The capital of Peru is", "choices": [" Lima", " Cusco"]}'


def _question(line: str, where: str) -> Question:
    """
    Raises:
      UserError: `line` is no question.
    """
    try:
        record: Any = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is no JSON ({error}); a line looks like {_EXAMPLE}") from error
    if not isinstance(record, dict) or (missing := {"task", "question", "choices"} - record.keys()):
        lacks = f"has no '{min(missing)}'" if isinstance(record, dict) else "is no JSON object"
        raise UserError(f"{where} {lacks}; a line looks like {_EXAMPLE}")
    choices = record["choices"]
    for key in ("task", "question"):
        if not _is_text(record[key]):
            raise UserError(f"{where}: '{key}' is {record[key]!r}; it must be a text that is not empty")
    if not isinstance(choices, list) or len(choices) < 2 or not all(map(_is_text, choices)):
        raise UserError(
            f"{where}: 'choices' is {choices!r}; it must be two texts or more, none empty, the right one first"
        )
    if len(set(choices)) < len(choices):
        twice = next(choice for i, choice in enumerate(choices) if choice in choices[:i])
        raise UserError(f"{where}: the choice {twice!r} is there twice; each may be there once")
    return Question(record["task"], record["question"], tuple(choices))


def _is_text(value: Any) -> bool:
    """Whether a JSON value is a string with something in it that UTF-8 can spell (no half of a surrogate pair)."""
    return isinstance(value, str) and bool(value.strip()) and value == value.encode("utf-8", "ignore").decode()


SUMS = "sums"


def sums(count: int = 60) -> list[Question]:
    """Additions of two numbers of two digits, always the same: whether digits still mean what they did."""
    # Strides without a factor in common with 90 go through all numbers from 10 to 99.
    pairs = [(10 + 37 * i % 90, 10 + (53 * i + 11) % 90) for i in range(count)]
    return [Question(SUMS, f"{a} + {b} =", tuple(f" {n}" for n in _near(a + b))) for a, b in pairs]


def _near(right: int) -> list[int]:
    """A number, and wrong ones of a like size, such as mistakes with one digit or a carry give."""
    return [right, right + 10, right - 10, right + 1, right - 2, right + 11]


# --- Scoring ----------------------------------------------------------------------------------------------------------


def beginning_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the token that a question is read after: the tokenizer's own before every text, else what separates documents."""
    opening = opening_id(tokenizer)
    return end_of_text_id(tokenizer) if opening is None else opening


def score(
    config: ModelConfig,
    params: dict,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    begin_id: int,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    *,
    log: Log = lambda line: None,
    what: str = "abilities",
) -> Float[np.ndarray, "N C"]:
    """Log-likelihoods (nats) of each question with each of its choices; -inf where a question has fewer choices than C.

    Args:
      params: weights of the model, [V, D] matrices at least as long as the tokenizer.
      begin_id: the token that every text is read after (see `beginning_id`).
      dtype: type of activations and weights; the log-sum-exp is float32 always.
      mesh: of the devices to run on, where `params` are or go; None: all devices.

    Raises:
      UserError: a question is longer than the model's positions.
    """
    texts = [text for question in questions for text in question.texts]
    tokens = [e.ids for e in plain_backend(tokenizer).encode_batch_fast(texts, add_special_tokens=False)]
    longest = max(map(len, tokens), default=1)
    if longest > config.max_positions:
        text = texts[[len(ids) for ids in tokens].index(longest)]
        raise UserError(
            f"abilities: {text[:80]!r}... has {longest:,} tokens, but the model reads {config.max_positions:,} at most: "
            "shorten the question"
        )
    longest = min(1 << (longest - 1).bit_length(), config.max_positions)
    progress = Progress(log, what, sum(map(len, tokens)), "tokens")
    costs = token_costs(
        config,
        params,
        [Window([begin_id, *ids[:-1]], ids) for ids in tokens],
        longest=longest,
        batch=max(1, _TOKENS_AT_ONCE // longest),
        compute=ComputeConfig(dtype=dtype, loss_chunk=_LOGITS_AT_ONCE),  # type: ignore[arg-type]
        mesh=mesh,
        progress=progress,
    )
    found = np.full((len(questions), max((len(q.choices) for q in questions), default=0)), -np.inf)
    filled = np.arange(found.shape[1]) < np.array([[len(q.choices)] for q in questions])
    found[filled] = [-of.nats.sum(dtype=np.float64) for of in costs]
    progress.done(f"{np.mean(found.argmax(1) == 0):.1%} of {len(questions):,} questions right")
    return found


# --- How two tokenizers cut a question --------------------------------------------------------------------------------


def kinds_of_cut(
    source_tokenizer: PreTrainedTokenizerBase,
    target_tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
) -> list[str]:
    """For each question the key in `KINDS_OF_CUT` of how both tokenizers cut it with its right answer.

    Tokens are compared by their canonical bytes. A token with bytes of the question and of the answer is the answer's.
    """
    shared = set(index_by_bytes(source_tokenizer))
    cuts = [_cuts(tokenizer, questions) for tokenizer in (source_tokenizer, target_tokenizer)]
    return [_kind(source, target, shared) for source, target in zip(*cuts)]


_Cut = tuple[list[bytes | None], list[bytes | None]]
"""The canonical bytes of the tokens of a question and of its answer."""


def _cuts(tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]) -> list[_Cut]:
    content = token_bytes(tokenizer)
    texts = [question.texts[0] for question in questions]
    encoded = plain_backend(tokenizer).encode_batch_fast(texts, add_special_tokens=False)
    return [
        _split([content[i] for i in encoding.ids], len(question.choices[0].encode()))
        for encoding, question in zip(encoded, questions)
    ]


def _split(tokens: list[bytes | None], answer_bytes: int) -> _Cut:
    """Tokens before, and of, the last `answer_bytes` bytes."""
    at = len(tokens)
    while at and answer_bytes > 0:
        at -= 1
        answer_bytes -= len(tokens[at] or b"")
    return tokens[:at], tokens[at:]


def _kind(source: _Cut, target: _Cut, shared: set[bytes]) -> str:
    if source[1] == target[1]:
        return ALIKE if source[0] == target[0] else QUESTION_ONLY
    return RECUT if shared.issuperset(target[1]) else COMPOSED
