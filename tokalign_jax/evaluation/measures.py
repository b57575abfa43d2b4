"""All that a model's likelihoods tell of it: bits per byte, abilities and, beside a reference,
fidelity and differences.

The pipeline's evaluations and the command `evaluate` measure alike; the reference is the source
model, or the first of several.
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
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.utils.progress import Log

SCORES = "scores.json"
Texts = Mapping[str, list[str]]
"""Documents by language."""


@dataclass(frozen=True)
class Material:
    """What every model is measured on, and how."""

    texts: Texts
    """Held-out text."""
    other_texts: Texts
    """Text of another kind; may be empty."""
    questions: Sequence[abilities.Question]
    """May be empty."""
    sequence_length: int
    """Tokens of a window."""
    batch: int
    """Windows that a device reads at once."""
    compute: ComputeConfig
    seed: int
    """Of bootstrap draws."""
    asked: Sequence[chat_questions.ChatQuestion] = ()
    """Chat questions."""
    reply_tokens: int = 64
    """Tokens of a reply to a chat question, at most."""


@dataclass(frozen=True)
class Measured:
    """What a model makes of the material."""

    tokenizer: PreTrainedTokenizerBase
    costs: Mapping[str, bits_per_byte.Costs]
    other_costs: Mapping[str, bits_per_byte.Costs]
    right: Bool[np.ndarray, "N"]
    """Whether each question is answered right."""
    replies: chat_questions.Replies | None = None
    """To the chat questions."""
    chat: Mapping[str, Any] | None = None
    """Their summary, of a model that others are compared with."""

    @property
    def reference(self) -> "Reference":
        return Reference(
            self.tokenizer,
            _readings(self.costs),
            _readings(self.other_costs),
            self.right,
            self.chat,
        )


@dataclass(frozen=True)
class Reference:
    """What the source makes of the same material: what others are compared with."""

    tokenizer: PreTrainedTokenizerBase
    readings: fidelity.Readings
    other_readings: fidelity.Readings
    right: Bool[np.ndarray, "N"]
    chat: Mapping[str, Any] | None = None
    """Summary of its replies to chat questions."""

    def save(self, folder: Path) -> None:
        """Writes beside the source's `scores.json` what that does not hold."""
        fidelity.save(folder / _READINGS, self.readings)
        if self.other_readings:
            fidelity.save(folder / _OTHER_READINGS, self.other_readings)

    @classmethod
    def load(
        cls, folder: Path, tokenizer: PreTrainedTokenizerBase, material: Material
    ) -> "Reference":
        """What `save` wrote of the same material."""
        scores = json.loads((folder / SCORES).read_text(encoding="utf-8"))
        answers = scores.get("abilities")
        return cls(
            tokenizer,
            fidelity.load(folder / _READINGS, material.texts),
            fidelity.load(folder / _OTHER_READINGS, material.other_texts)
            if material.other_texts
            else {},
            abilities.right_of(answers) if answers else np.zeros(0, bool),
            scores.get("chat"),
        )


_READINGS, _OTHER_READINGS = "held_out.npz", "other_text.npz"


def measure(
    name: str,
    config: ModelConfig,
    params: dict,
    tokenizer: PreTrainedTokenizerBase,
    material: Material,
    mesh: Mesh,
    log: Log,
    asks: bool = True,
) -> Measured:
    """Lets a model read the texts and answer the questions.

    Args:
      name: of the model, for the log.
      asks: whether it is asked the questions.
    """

    def read(texts: Texts, what: str) -> dict[str, bits_per_byte.Costs]:
        return bits_per_byte.evaluate_documents(
            config,
            params,
            tokenizer,
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
    if material.questions and asks:
        begin = abilities.beginning_id(tokenizer)
        arguments = (
            config,
            params,
            tokenizer,
            material.questions,
            begin,
            material.compute.dtype,
            mesh,
        )
        right = abilities.is_right(abilities.score(*arguments, log=log, what=f"abilities {name}"))
    replies = chat = None
    if material.asked and asks:
        replies = chat_questions.ask(
            config,
            params,
            tokenizer,
            material.asked,
            material.reply_tokens,
            material.compute.dtype,
            mesh,
            log,
            f"chat {name}",
        )
        chat = chat_questions.summary(material.asked, replies, None, material.seed)
    return Measured(tokenizer, costs, other_costs, right, replies, chat)


def summary(measured: Measured, reference: Reference | None, material: Material) -> dict[str, Any]:
    """What was measured, for a `scores.json` (docs/evaluation.md).

    Args:
      reference: None for the reference itself.
    """
    readings = (reference.readings, reference.other_readings) if reference else (None, None)

    def of_texts(
        texts: Texts, costs: Mapping[str, bits_per_byte.Costs], of: fidelity.Readings | None
    ) -> dict[str, Any]:
        content: dict[str, Any] = {
            "languages": bits_per_byte.summaries(costs, material.seed),
            "pooled": bits_per_byte.summary([*costs.values()], material.seed),
        }
        if reference and of is not None:
            compared = fidelity.compare(
                reference.tokenizer, measured.tokenizer, texts, of, _readings(costs)
            )
            content["fidelity"] = fidelity.summaries(compared, material.seed)
        return content

    content = of_texts(material.texts, measured.costs, readings[0])
    if measured.other_costs:
        content["other_text"] = of_texts(material.other_texts, measured.other_costs, readings[1])
    if len(measured.right):
        content["abilities"] = abilities.summary(material.questions, measured.right, material.seed)
        if reference:
            kinds = abilities.kinds_of_cut(
                reference.tokenizer, measured.tokenizer, material.questions
            )
            answers = measured.right, reference.right
            content["abilities"] |= abilities.difference(
                material.questions, *answers, kinds, material.seed
            )
    if measured.replies:
        content["chat"] = chat_questions.summary(
            material.asked,
            measured.replies,
            reference.chat if reference else None,
            material.seed,
        )
    return content


def _readings(costs: Mapping[str, bits_per_byte.Costs]) -> fidelity.Readings:
    return {group: of.beginnings for group, of in costs.items()}
