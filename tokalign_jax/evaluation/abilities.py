"""Multiple-choice abilities: what a model knows, whatever tokenizer it has.

A suite is a file of JSON lines, each a question with its choices, the right one first:

    {"task": "capitals", "question": "The capital of Peru is the city of", "choices": [" Lima", " Cusco"]}

A model answers with the choice for which the text `question + choice`, cut into tokens as one
string and read after the token that separates documents, has the highest likelihood. N questions, C
choices.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int
from transformers import PreTrainedTokenizerBase

from tokalign_jax import demo
from tokalign_jax.config import ComputeConfig
from tokalign_jax.errors import UserError
from tokalign_jax.evaluation import intervals
from tokalign_jax.evaluation.question_files import read_questions
from tokalign_jax.evaluation.token_costs import Window, token_costs
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.text.boundaries import NONE, Boundaries, token_boundaries
from tokalign_jax.text.canonical import index_by_bytes, plain_backend, token_bytes
from tokalign_jax.text.tokenizing import end_of_text_id, opening_id
from tokalign_jax.utils.progress import Log, Progress

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


# --- Suites -------------------------------------------------------------------------------------


def read(names: str, max_questions: int = 0) -> list[Question]:
    """The questions of all suites in `names`, and the generated suite `sums` unless one of that
    name is there.

    Args: names: a file of JSON lines, a folder with such files (`*.jsonl`) or a glob; several
      separated by commas. max_questions: of each suite, the first ones; 0: all.

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
    whole = Path(demo.abilities(names)).expanduser()
    for name in [str(whole)] if whole.exists() else filter(None, map(str.strip, names.split(","))):
        path = Path(name).expanduser()
        pattern = path / "*.jsonl" if path.is_dir() else path
        found = [path] if path.is_file() else sorted(map(Path, glob(str(pattern))))
        if not found:
            why = "has no *.jsonl files" if path.is_dir() else "names no file"
            raise UserError(
                f"abilities '{name}' {why}: give a file of JSON lines, a folder with such files or"
                " a glob"
            )
        files += found
    return files


def _read_file(path: Path) -> list[Question]:
    remedy = "it must be JSON lines in UTF-8"
    questions = read_questions("abilities", path, remedy, _question)
    if not questions:
        raise UserError(
            f"abilities '{path}' has no questions: take it away, or add lines such as {_EXAMPLE}"
        )
    return questions


_EXAMPLE = (
    '{"task": "capitals", "question": "The capital of Peru is", "choices": [" Lima", " Cusco"]}'
)


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
            raise UserError(
                f"{where}: '{key}' is {record[key]!r}; it must be a text that is not empty"
            )
    if not isinstance(choices, list) or len(choices) < 2 or not all(map(_is_text, choices)):
        raise UserError(
            f"{where}: 'choices' is {choices!r}; it must be two texts or more, none empty, the"
            " right one first"
        )
    if choices[0] in choices[1:]:
        raise UserError(
            f"{where}: the right choice {choices[0]!r} is there twice; it may be there once, as the"
            " first"
        )
    # A wrong choice that is there twice changes no answer.
    return Question(record["task"], record["question"], tuple(dict.fromkeys(choices)))


def _is_text(value: Any) -> bool:
    """Whether a JSON value is a string that is not blank and that UTF-8 can spell."""
    return (
        isinstance(value, str)
        and bool(value.strip())
        and value == value.encode("utf-8", "ignore").decode()
    )


SUMS = "sums"


def sums(count: int = 60) -> list[Question]:
    """Additions of two numbers of two digits, always the same ones."""
    # Steps through 90 and 89 numbers that have no factor in common with these, so that neither
    # repeats soon nor their sum.
    pairs = [(10 + 37 * i % 90, 10 + 61 * i % 89) for i in range(count)]
    choices = [[a + b, *_near(a + b, i % 5)] for i, (a, b) in enumerate(pairs)]
    return [
        Question(SUMS, f"{a} + {b} =", tuple(f" {number}" for number in of))
        for (a, b), of in zip(pairs, choices)
    ]


def _near(right: int, smaller: int) -> list[int]:
    """Four wrong numbers, as a mistake in a digit or a carry gives them; so many are smaller.

    A model that only prefers small, or large, numbers is right by chance if their number varies.
    """
    mistakes = (10, 1, 11, 2)
    return [right - of for of in mistakes[:smaller]] + [
        right + of for of in mistakes[: 4 - smaller]
    ]


# --- Scoring ------------------------------------------------------------------------------------


def beginning_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that a question is read after.

    The one that the tokenizer puts before every text, else the one that separates documents.
    """
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
    """Log-likelihoods (nats) of each question with each of its choices; -inf where a question has
    fewer choices than C.

    Args:
      params: weights of the model, [V, D] matrices at least as long as the tokenizer.
      begin_id: the token that every text is read after (see `beginning_id`).
      dtype: type of activations and weights; the log-sum-exp is float32 always.
      mesh: of the devices to run on, where `params` are or go; None: all devices.

    Raises:
      UserError: a question is longer than the model's positions.
    """
    tokens = _tokens(tokenizer, questions, config.max_positions)
    longest = min(1 << (max(map(len, tokens), default=1) - 1).bit_length(), config.max_positions)
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
    found = np.full((len(questions), max((len(q.choices) for q in questions), default=2)), -np.inf)
    filled = np.arange(found.shape[1]) < np.array([[len(q.choices)] for q in questions])
    found[filled] = [-of.nats.sum(dtype=np.float64) for of in costs]
    progress.done(f"{is_right(found).mean():.1%} of {len(questions):,} questions right")
    return found


def check_lengths(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], positions: int
) -> None:
    """
    Raises:
      UserError: a question has more tokens than a model of so many positions reads.
    """
    _tokens(tokenizer, questions, positions)


def _tokens(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], positions: int
) -> list[list[int]]:
    """The tokens of each text that `score` reads."""
    texts = [text for question in questions for text in question.texts]
    tokens = [
        e.ids for e in plain_backend(tokenizer).encode_batch_fast(texts, add_special_tokens=False)
    ]
    for text, ids in zip(texts, tokens):
        if len(ids) > positions:
            raise UserError(
                f"abilities: {text[:80]!r}... has {len(ids):,} tokens, but the model reads"
                f" {positions:,} at most: shorten the question, or leave it out"
            )
    return tokens


# --- How two tokenizers cut a question ----------------------------------------------------------


def kinds_of_cut(
    source_tokenizer: PreTrainedTokenizerBase,
    target_tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
) -> list[str]:
    """How both tokenizers cut each question with its right answer: a key of `KINDS_OF_CUT`.

    Two cuts are alike where tokens end at the same places of the text and the source vocabulary has
    all target tokens (by their canonical bytes). A token with a part of the question and a part of
    the answer is the answer's.
    """
    known, content = set(index_by_bytes(source_tokenizer)), token_bytes(target_tokenizer)
    texts = [question.texts[0] for question in questions]
    source, target = (
        token_boundaries(plain_backend(t), texts) for t in (source_tokenizer, target_tokenizer)
    )
    return [
        _kind(question, one, other, content, known)
        for question, one, other in zip(questions, source, target)
    ]


def _kind(
    question: Question,
    source: Boundaries,
    target: Boundaries,
    content: Sequence[bytes | None],
    known: set[bytes],
) -> str:
    (source_question, source_answer), (target_question, target_answer) = (
        np.split(of.ends, [_answer_start(of, len(question.text))]) for of in (source, target)
    )
    shared = [content[i] in known for i in target.ids.tolist()]
    if not all(shared[len(target_question) :]):
        return COMPOSED
    if not np.array_equal(source_answer, target_answer):
        return RECUT
    alike = np.array_equal(source_question, target_question) and all(shared)
    return ALIKE if alike else QUESTION_ONLY


def _answer_start(cut: Boundaries, question_length: int) -> int:
    """How many tokens come before the answer's first."""
    within = np.flatnonzero((cut.ends != NONE) & (cut.ends <= question_length))
    return int(within[-1]) + 1 if len(within) else 0


# --- What came of it ----------------------------------------------------------------------------


def is_right(log_likelihoods: Float[np.ndarray, "N C"]) -> Bool[np.ndarray, "N"]:
    """Whether the first choice is the likeliest one of each question.

    A tie is no answer: a tokenizer that has only unknown tokens for the choices makes them all
    equally likely.
    """
    return log_likelihoods[:, 0] > log_likelihoods[:, 1:].max(axis=1)


def summary(
    questions: Sequence[Question], right: Bool[np.ndarray, "N"], seed: int
) -> dict[str, Any]:
    """Accuracy by suite and its mean over suites, with 95% intervals over questions, for JSON.

    `right` has the answers of each suite as a text of 0 and 1, for paired differences
    (`difference`).
    """
    suites = _rows_of_suites(questions)
    return {
        "digest": digest(questions),
        "chance": _mean_over_suites(np.array([1 / len(q.choices) for q in questions]), suites),
        "mean": {
            "accuracy": _mean_over_suites(right, suites),
            **_mean_interval(right, suites, seed),
        },
        "suites": {suite: _accuracy(right[rows], seed) for suite, rows in suites.items()},
        "right": {
            suite: "".join("01"[answer] for answer in right[rows].tolist())
            for suite, rows in suites.items()
        },
    }


def difference(
    questions: Sequence[Question],
    right: Bool[np.ndarray, "N"],
    source_right: Bool[np.ndarray, "N"],
    kinds: Sequence[str],
    seed: int,
) -> dict[str, Any]:
    """A model's answers less the source's, with 95% intervals over the same questions, for JSON.

    Returns: `difference` (of the `mean` over suites and of each of the `suites`), and `by_cut`: by
      kind of cut its questions, the accuracy of the model and of the source on them, and their
      difference; questions of all suites count alike there.
    """
    suites, less = _rows_of_suites(questions), right.astype(float) - source_right
    by_cut = {kind: np.flatnonzero(np.array(kinds) == kind) for kind in KINDS_OF_CUT}
    return {
        "difference": {
            "mean": {
                "difference": _mean_over_suites(less, suites),
                **_mean_interval(less, suites, seed),
            },
            "suites": {suite: _difference(less[rows], seed) for suite, rows in suites.items()},
        },
        "by_cut": {
            kind: {
                **_accuracy(right[rows], seed),
                "source": float(source_right[rows].mean()),
                "difference": _difference(less[rows], seed),
            }
            for kind, rows in by_cut.items()
            if len(rows)
        },
    }


def change(before: Mapping[str, Any], after: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The difference between two `summary` of the same questions, with its 95% interval."""
    ends = np.cumsum([0, *(len(right) for right in before["right"].values())])
    suites = {suite: np.arange(*ends[i : i + 2]) for i, suite in enumerate(before["right"])}
    less = right_of(after).astype(float) - right_of(before)
    return {"difference": _mean_over_suites(less, suites), **_mean_interval(less, suites, seed)}


def right_of(summary: Mapping[str, Any]) -> Bool[np.ndarray, "N"]:
    """The answers that `summary` was made of, one suite behind the other."""
    return np.array([answer == "1" for of in summary["right"].values() for answer in of])


def digest(questions: Sequence[Question]) -> str:
    """Tells sets of questions apart."""
    content = json.dumps([(q.suite, q.text, q.choices) for q in questions])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _rows_of_suites(questions: Sequence[Question]) -> dict[str, Int[np.ndarray, "n"]]:
    names = np.array([question.suite for question in questions])
    return {suite: np.flatnonzero(names == suite) for suite in dict.fromkeys(names.tolist())}


def _mean_over_suites(values: np.ndarray, suites: Mapping[str, np.ndarray]) -> float:
    return float(np.mean([values[rows].mean() for rows in suites.values()]))


def _mean_interval(
    values: np.ndarray, suites: Mapping[str, np.ndarray], seed: int
) -> dict[str, Any]:
    """Questions are drawn again within each suite; one of n in a suite weighs 1 / n."""
    sizes = [len(rows) for rows in suites.values()]
    weights = np.repeat(1 / np.array(sizes), sizes)
    return _interval(
        np.concatenate([values[rows] for rows in suites.values()]) * weights, weights, sizes, seed
    )


def _accuracy(right: np.ndarray, seed: int) -> dict[str, Any]:
    return {
        "accuracy": float(right.mean()),
        "questions": len(right),
        **_plain_interval(right, seed),
    }


def _difference(less: np.ndarray, seed: int) -> dict[str, Any]:
    return {"difference": float(less.mean()), **_plain_interval(less, seed)}


def _plain_interval(values: np.ndarray, seed: int) -> dict[str, Any]:
    return _interval(values, np.ones(len(values)), [len(values)], seed)


def _interval(
    values: np.ndarray, weights: np.ndarray, sizes: Sequence[int], seed: int
) -> dict[str, Any]:
    interval = intervals.of_ratio(values, weights, sizes, seed)
    return {"interval": list(interval)} if interval else {}
