"""Multiple-choice questions that measure a model's knowledge independently of its tokenizer.

A suite is a JSON Lines file with one question per line, its correct choice first:

    {"task": "capitals", "question": "The capital of Peru is", "choices": [" Lima", " Cusco"]}

The model's answer is the choice for which the text `question + choice`, tokenized as one string
and preceded by the document separator, has the highest likelihood. N questions, C choices.
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
from tokalign_jax.evaluation.question_files import parse_object, read_questions
from tokalign_jax.evaluation.token_costs import Window, token_costs
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.text.boundaries import NONE, Boundaries, token_boundaries
from tokalign_jax.text.canonical import index_by_bytes, plain_backend, token_bytes
from tokalign_jax.text.tokenizing import end_of_text_id, opening_id
from tokalign_jax.utils.progress import Log, Progress

ALIKE, COMPOSED, QUESTION_ONLY, RECUT = "alike", "composed", "question", "recut"
SEGMENTATION_KINDS = {
    ALIKE: "question and answer split alike by both tokenizers",
    QUESTION_ONLY: "only the question split differently",
    COMPOSED: "answer has tokens that the source vocabulary lacks",
    RECUT: "answer of shared tokens, split differently",
}
"""Kinds of difference between the segmentations of a question and its correct answer."""

_TOKENS_PER_BATCH = 8192
"""Number of tokens per batch and device."""
_LOSS_CHUNK = 1024
"""Number of tokens whose logits are materialized at once."""


@dataclass(frozen=True)
class Question:
    """A multiple-choice question."""

    suite: str
    text: str
    choices: tuple[str, ...]
    """The choices, the correct one first."""

    @property
    def texts(self) -> list[str]:
        """Returns the question with each choice."""
        return [self.text + choice for choice in self.choices]


# --- Suites -------------------------------------------------------------------------------------


def read(names: str, max_questions: int = 0) -> list[Question]:
    """Reads questions, and adds the generated suite `sums` unless a suite of that name exists.

    Args:
      names: a JSON Lines file, a folder of such files (`*.jsonl`) or a glob; several are separated
        by commas.
      max_questions: number of questions to keep per suite, from the first; 0 for all.

    Raises:
      UserError: a file does not exist, or a line is not a question; names the file and line.
    """
    questions = [question for path in _files(names) for question in _read_file(path)]
    if SUMS not in {question.suite for question in questions}:
        questions += sums()
    suites = by_suite(questions).values()
    return [question for suite in suites for question in suite[: max_questions or len(suite)]]


def by_suite(questions: Sequence[Question]) -> dict[str, list[Question]]:
    """Groups questions by suite, in order of first appearance."""
    suites: dict[str, list[Question]] = {}
    for question in questions:
        suites.setdefault(question.suite, []).append(question)
    return suites


def _files(names: str) -> list[Path]:
    files: list[Path] = []
    path = Path(demo.abilities(names)).expanduser()
    for name in [str(path)] if path.exists() else filter(None, map(str.strip, names.split(","))):
        path = Path(name).expanduser()
        pattern = path / "*.jsonl" if path.is_dir() else path
        matches = [path] if path.is_file() else sorted(map(Path, glob(str(pattern))))
        if not matches:
            problem = "has no *.jsonl files" if path.is_dir() else "matches no file"
            raise UserError(
                f"abilities '{name}' {problem}: give a JSON Lines file, a folder of such files or a"
                " glob"
            )
        files += matches
    return files


def _read_file(path: Path) -> list[Question]:
    remedy = "it must be a JSON Lines file in UTF-8"
    questions = read_questions("abilities", path, remedy, _question)
    if not questions:
        raise UserError(
            f"abilities '{path}' has no questions: remove it, or add lines such as {_EXAMPLE}"
        )
    return questions


_EXAMPLE = (
    '{"task": "capitals", "question": "The capital of Peru is", "choices": [" Lima", " Cusco"]}'
)


_ANSWER_KEYS = {"answer", "answerKey", "answer_index", "correct", "gold", "label", "target"}
"""Keys by which data sets say which choice is correct."""


def _question(line: str, where: str) -> Question:
    """Parses a line.

    Raises:
      UserError: the line is not a question.
    """
    record = parse_object(line, where, {"task", "question", "choices"}, _EXAMPLE)
    choices = record["choices"]
    for key in ("task", "question"):
        if not _is_text(record[key]):
            raise UserError(f"{where}: '{key}' is {record[key]!r}; it must be a non-empty string")
    if not isinstance(choices, list) or len(choices) < 2 or not all(map(_is_text, choices)):
        raise UserError(
            f"{where}: 'choices' is {choices!r}; it must be a list of two or more non-empty"
            " strings, the correct one first"
        )
    if choices[0] in choices[1:]:
        raise UserError(
            f"{where}: the correct choice {choices[0]!r} appears twice; it may appear once, as the"
            " first"
        )
    for key in _ANSWER_KEYS & record.keys():
        if record[key] not in (0, "0", "A", choices[0]) or record[key] is False:
            raise UserError(
                f"{where}: the correct choice must be the first, but '{key}' is {record[key]!r}:"
                f" put the correct one first and remove '{key}'"
            )
    # Duplicates of wrong choices do not affect the answer.
    return Question(record["task"], record["question"], tuple(dict.fromkeys(choices)))


def _is_text(value: Any) -> bool:
    """Tells if a JSON value is a non-blank string that UTF-8 can encode."""
    return (
        isinstance(value, str)
        and bool(value.strip())
        and value == value.encode("utf-8", "ignore").decode()
    )


SUMS = "sums"


def sums(count: int = 60) -> list[Question]:
    """Generates a fixed list of additions of two two-digit numbers."""
    # Steps coprime to the number of values (90, 89), so that numbers and sums do not repeat soon.
    pairs = [(10 + 37 * i % 90, 10 + 61 * i % 89) for i in range(count)]
    choices = [[a + b, *_wrong_sums(a + b, i % 5)] for i, (a, b) in enumerate(pairs)]
    return [
        Question(SUMS, f"{a} + {b} =", tuple(f" {number}" for number in numbers))
        for (a, b), numbers in zip(pairs, choices)
    ]


def _wrong_sums(correct: int, smaller: int) -> list[int]:
    """Returns four typical wrong sums (in a digit or carry), of which `smaller` are too small.

    With a varying number of smaller choices, a preference for small or large numbers alone is right
    only by chance.
    """
    errors = (10, 1, 11, 2)
    return [correct - error for error in errors[:smaller]] + [
        correct + error for error in errors[: 4 - smaller]
    ]


# --- Scoring ------------------------------------------------------------------------------------


def beginning_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the token that precedes every text of a question.

    It is the one that the tokenizer prepends to every text, else the document separator.
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
    """Returns the log-likelihoods (nats) of each question with each of its choices.

    Entries past a question's last choice are -inf.

    Args:
      config: the model's config.
      params: its weights, with [V, D] matrices at least as long as the tokenizer.
      tokenizer: its tokenizer.
      questions: the questions.
      begin_id: the token that precedes every text (`beginning_id`).
      dtype: dtype of activations and weights; the log-sum-exp is in float32.
      mesh: mesh of the devices to run on; None for all devices.
      log: writes progress lines.
      what: their label.

    Raises:
      UserError: a question has more tokens than the model has positions.
    """
    tokens = _tokens(tokenizer, questions, config.max_positions)
    longest = min(1 << (max(map(len, tokens), default=1) - 1).bit_length(), config.max_positions)
    progress = Progress(log, what, sum(map(len, tokens)), "tokens")
    costs = token_costs(
        config,
        params,
        [Window([begin_id, *ids[:-1]], ids) for ids in tokens],
        longest=longest,
        batch=max(1, _TOKENS_PER_BATCH // longest),
        compute=ComputeConfig(dtype=dtype, loss_chunk=_LOSS_CHUNK),  # type: ignore[arg-type]
        mesh=mesh,
        progress=progress,
    )
    counts = [len(question.choices) for question in questions]
    scores = np.full((len(questions), max(counts, default=2)), -np.inf)
    is_choice = np.arange(scores.shape[1]) < np.array(counts)[:, None]
    scores[is_choice] = [-cost.nats.sum(dtype=np.float64) for cost in costs]
    progress.done(f"{is_right(scores).mean():.1%} of {len(questions):,} questions right")
    return scores


def check_lengths(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], positions: int
) -> None:
    """Checks that a model with `positions` positions can read every question.

    Raises:
      UserError: a question has more tokens.
    """
    _tokens(tokenizer, questions, positions)


def _tokens(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], positions: int
) -> list[list[int]]:
    """Returns the token ids of each text that `score` reads."""
    texts = [text for question in questions for text in question.texts]
    tokens = [
        e.ids for e in plain_backend(tokenizer).encode_batch_fast(texts, add_special_tokens=False)
    ]
    for text, ids in zip(texts, tokens):
        if len(ids) > positions:
            raise UserError(
                f"abilities: {text[:80]!r}... has {len(ids):,} tokens, but the model reads at most"
                f" {positions:,}: shorten or remove the question"
            )
    return tokens


# --- Segmentation -------------------------------------------------------------------------------


def segmentation_kinds(
    source_tokenizer: PreTrainedTokenizerBase,
    target_tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
) -> list[str]:
    """Classifies how both tokenizers segment each question with its correct answer.

    Segmentations are alike if tokens end at the same positions of the text and the source
    vocabulary has all target tokens (by their canonical bytes). A token that spans the question
    and the answer counts as part of the answer.

    Returns:
      A key of `SEGMENTATION_KINDS` for each question.
    """
    source_tokens, content = set(index_by_bytes(source_tokenizer)), token_bytes(target_tokenizer)
    texts = [question.texts[0] for question in questions]
    sources, targets = (
        token_boundaries(plain_backend(t), texts) for t in (source_tokenizer, target_tokenizer)
    )
    return [
        _kind(question, source, target, content, source_tokens)
        for question, source, target in zip(questions, sources, targets)
    ]


def _kind(
    question: Question,
    source: Boundaries,
    target: Boundaries,
    content: Sequence[bytes | None],
    source_tokens: set[bytes],
) -> str:
    (source_question, source_answer), (target_question, target_answer) = (
        np.split(boundaries.ends, [_answer_start(boundaries, len(question.text))])
        for boundaries in (source, target)
    )
    is_shared = [content[i] in source_tokens for i in target.ids.tolist()]
    if not all(is_shared[len(target_question) :]):
        return COMPOSED
    if not np.array_equal(source_answer, target_answer):
        return RECUT
    is_alike = np.array_equal(source_question, target_question) and all(is_shared)
    return ALIKE if is_alike else QUESTION_ONLY


def _answer_start(boundaries: Boundaries, question_length: int) -> int:
    """Returns the number of tokens before the answer's first."""
    ends = boundaries.ends
    within = np.flatnonzero((ends != NONE) & (ends <= question_length))
    return int(within[-1]) + 1 if len(within) else 0


# --- Results ------------------------------------------------------------------------------------


def is_right(log_likelihoods: Float[np.ndarray, "N C"]) -> Bool[np.ndarray, "N"]:
    """Tells for each question if its first choice is the most likely.

    Ties count as wrong: a tokenizer that has only unknown tokens for the choices makes all of them
    equally likely.
    """
    return log_likelihoods[:, 0] > log_likelihoods[:, 1:].max(axis=1)


def summary(
    questions: Sequence[Question], right: Bool[np.ndarray, "N"], seed: int
) -> dict[str, Any]:
    """Summarizes accuracy by suite and its mean over suites, with 95% intervals, for JSON.

    `right` has the answers of each suite as a string of 0 and 1, for paired differences
    (`difference`).
    """
    suites = _suite_rows(questions)
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
    """Summarizes the difference to the source's answers, with paired 95% intervals, for JSON.

    Returns:
      `difference` (the `mean` over suites, and each of the `suites`), and `by_cut`: for each kind
      of segmentation the number of questions, the accuracy of model and source, and their
      difference, with equal weight for the questions of all suites.
    """
    suites, change = _suite_rows(questions), right.astype(float) - source_right
    by_cut = {kind: np.flatnonzero(np.array(kinds) == kind) for kind in SEGMENTATION_KINDS}
    return {
        "difference": {
            "mean": {
                "difference": _mean_over_suites(change, suites),
                **_mean_interval(change, suites, seed),
            },
            "suites": {suite: _difference(change[rows], seed) for suite, rows in suites.items()},
        },
        "by_cut": {
            kind: {
                **_accuracy(right[rows], seed),
                "source": float(source_right[rows].mean()),
                "difference": _difference(change[rows], seed),
            }
            for kind, rows in by_cut.items()
            if len(rows)
        },
    }


def change(before: Mapping[str, Any], after: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Returns the difference of two `summary` of the same questions, with its 95% interval."""
    ends = np.cumsum([0, *(len(right) for right in before["right"].values())])
    suites = {suite: np.arange(*ends[i : i + 2]) for i, suite in enumerate(before["right"])}
    changes = right_answers(after).astype(float) - right_answers(before)
    return {
        "difference": _mean_over_suites(changes, suites),
        **_mean_interval(changes, suites, seed),
    }


def right_answers(summary: Mapping[str, Any]) -> Bool[np.ndarray, "N"]:
    """Returns the answers in a `summary`, concatenated over suites."""
    suites = summary["right"].values()
    return np.array([answer == "1" for answers in suites for answer in answers])


def digest(questions: Sequence[Question]) -> str:
    """Returns a digest that identifies a set of questions."""
    content = json.dumps([(q.suite, q.text, q.choices) for q in questions])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _suite_rows(questions: Sequence[Question]) -> dict[str, Int[np.ndarray, "n"]]:
    names = np.array([question.suite for question in questions])
    return {suite: np.flatnonzero(names == suite) for suite in dict.fromkeys(names.tolist())}


def _mean_over_suites(values: np.ndarray, suites: Mapping[str, np.ndarray]) -> float:
    return float(np.mean([values[rows].mean() for rows in suites.values()]))


def _mean_interval(
    values: np.ndarray, suites: Mapping[str, np.ndarray], seed: int
) -> dict[str, Any]:
    """Returns the interval of `_mean_over_suites` by resampling within suites."""
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


def _difference(changes: np.ndarray, seed: int) -> dict[str, Any]:
    return {"difference": float(changes.mean()), **_plain_interval(changes, seed)}


def _plain_interval(values: np.ndarray, seed: int) -> dict[str, Any]:
    return _interval(values, np.ones(len(values)), [len(values)], seed)


def _interval(
    values: np.ndarray, weights: np.ndarray, sizes: Sequence[int], seed: int
) -> dict[str, Any]:
    interval = intervals.bootstrap_ratio(values, weights, sizes, seed)
    return {"interval": list(interval)} if interval else {}
