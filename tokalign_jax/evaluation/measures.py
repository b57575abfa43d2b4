"""Likelihood-based measures of a model: bits per byte, abilities, and fidelity to a reference.

Shared by the pipeline's evaluations and the command `evaluate`. The reference is the source model,
or the first of several models.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool
from transformers import PreTrainedTokenizerBase

from tokalign_jax.config import ComputeConfig
from tokalign_jax.evaluation import abilities, bits_per_byte, chat_questions, fidelity
from tokalign_jax.evaluation.chat_questions import ChatQuestion, Replies
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.utils.progress import Log

SCORES = "scores.json"
"""Name of the file with a model's summary."""
Texts = Mapping[str, list[str]]
"""Documents by language."""


@dataclass(frozen=True)
class Material:
    """Data and settings shared by the measurements of all models."""

    texts: Texts
    """Held-out text."""
    other_texts: Texts
    """Out-of-domain text; may be empty."""
    questions: Sequence[abilities.Question]
    """Multiple-choice questions; may be empty."""
    sequence_length: int
    """Number of tokens per window."""
    batch: int
    """Number of windows per device and batch."""
    compute: ComputeConfig
    seed: int
    """Seed of the bootstrap."""
    chat_questions: Sequence[ChatQuestion] = ()
    """Questions that are asked through the chat template."""
    reply_tokens: int = 64
    """Maximum number of tokens of a reply to a chat question."""


@dataclass(frozen=True)
class Measured:
    """Results of a model."""

    tokenizer: PreTrainedTokenizerBase
    costs: Mapping[str, bits_per_byte.Costs]
    other_costs: Mapping[str, bits_per_byte.Costs]
    right: Bool[np.ndarray, "N"]
    """True for each question that is answered correctly."""
    replies: Replies | None = None
    """Replies to the chat questions."""
    chat: Mapping[str, Any] | None = None
    """Summary of the replies, for comparisons with this model."""

    @property
    def reference(self) -> "Reference":
        """Results as a reference for other models."""
        return Reference(
            self.tokenizer,
            _readings(self.costs),
            _readings(self.other_costs),
            self.right,
            self.chat,
        )


@dataclass(frozen=True)
class Reference:
    """Results of the model that others are compared with."""

    tokenizer: PreTrainedTokenizerBase
    readings: fidelity.Readings
    other_readings: fidelity.Readings
    right: Bool[np.ndarray, "N"]
    chat: Mapping[str, Any] | None = None
    """Summary of the replies to chat questions."""

    def save(self, folder: Path) -> None:
        """Writes the data that the model's `scores.json` does not contain."""
        fidelity.save(folder / _READINGS_FILE, self.readings)
        if self.other_readings:
            fidelity.save(folder / _OTHER_READINGS_FILE, self.other_readings)

    @classmethod
    def load(
        cls, folder: Path, tokenizer: PreTrainedTokenizerBase, material: Material
    ) -> "Reference":
        """Loads the data written by `save`, for the same material."""
        scores = json.loads((folder / SCORES).read_text(encoding="utf-8"))
        answers = scores.get("abilities")
        return cls(
            tokenizer,
            fidelity.load(folder / _READINGS_FILE, material.texts),
            fidelity.load(folder / _OTHER_READINGS_FILE, material.other_texts)
            if material.other_texts
            else {},
            abilities.right_answers(answers) if answers else np.zeros(0, bool),
            scores.get("chat"),
        )


_READINGS_FILE, _OTHER_READINGS_FILE = "held_out.npz", "other_text.npz"


def measure(
    name: str,
    config: ModelConfig,
    params: dict,
    tokenizer: PreTrainedTokenizerBase,
    material: Material,
    mesh: Mesh,
    log: Log,
    with_questions: bool = True,
) -> Measured:
    """Evaluates a model on the texts and questions.

    Args:
      name: the model's name in the log.
      config: its config.
      params: its parameters.
      tokenizer: its tokenizer.
      material: data and settings.
      mesh: mesh of the devices to run on.
      log: writes progress lines.
      with_questions: also ask the questions.
    """
    model, dtype = (config, params, tokenizer), material.compute.dtype

    def read(texts: Texts, what: str) -> dict[str, bits_per_byte.Costs]:
        return bits_per_byte.evaluate_documents(
            *model,
            texts,
            sequence_length=material.sequence_length,
            batch=material.batch,
            compute=material.compute,
            mesh=mesh,
            log=log,
            what=what,
            beginnings=True,
        )

    costs = read(material.texts, f"evaluate {name}")
    other_costs = read(material.other_texts, f"other text {name}") if material.other_texts else {}
    right = np.zeros(0, bool)
    if material.questions and with_questions:
        inputs = material.questions, abilities.beginning_id(tokenizer), dtype, mesh
        right = abilities.is_right(
            abilities.score(*model, *inputs, log=log, what=f"abilities {name}")
        )
    replies = chat = None
    if material.chat_questions and with_questions:
        inputs = material.chat_questions, material.reply_tokens, dtype, mesh, log
        replies = chat_questions.ask(*model, *inputs, f"chat {name}")
        chat = chat_questions.summary(material.chat_questions, replies, None, material.seed)
    return Measured(tokenizer, costs, other_costs, right, replies, chat)


def summary(measured: Measured, reference: Reference | None, material: Material) -> dict[str, Any]:
    """Summarizes a model's results for its `scores.json` (docs/evaluation.md).

    Args:
      measured: the results.
      reference: the reference to compare with; None for the reference itself.
      material: data and settings.
    """
    readings = (reference.readings, reference.other_readings) if reference else (None, None)

    def summarize_texts(
        texts: Texts,
        costs: Mapping[str, bits_per_byte.Costs],
        reference_readings: fidelity.Readings | None,
    ) -> dict[str, Any]:
        content: dict[str, Any] = {
            "languages": bits_per_byte.summaries(costs, material.seed),
            "pooled": bits_per_byte.summary([*costs.values()], material.seed),
        }
        if reference and reference_readings is not None:
            compared = fidelity.compare(
                reference.tokenizer,
                measured.tokenizer,
                texts,
                reference_readings,
                _readings(costs),
            )
            content["fidelity"] = fidelity.summaries(compared, material.seed)
        return content

    content = summarize_texts(material.texts, measured.costs, readings[0])
    if measured.other_costs:
        content["other_text"] = summarize_texts(
            material.other_texts, measured.other_costs, readings[1]
        )
    if len(measured.right):
        content["abilities"] = abilities.summary(material.questions, measured.right, material.seed)
        if reference:
            kinds = abilities.segmentation_kinds(
                reference.tokenizer, measured.tokenizer, material.questions
            )
            answers = measured.right, reference.right
            content["abilities"] |= abilities.difference(
                material.questions, *answers, kinds, material.seed
            )
    if measured.replies:
        content["chat"] = chat_questions.summary(
            material.chat_questions,
            measured.replies,
            reference.chat if reference else None,
            material.seed,
        )
    return content


def _readings(costs: Mapping[str, bits_per_byte.Costs]) -> fidelity.Readings:
    return {group: group_costs.beginnings for group, group_costs in costs.items()}
