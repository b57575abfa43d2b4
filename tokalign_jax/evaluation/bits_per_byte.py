"""Bits per byte: what a model needs for held-out text, comparable across tokenizers because every
one spells the same bytes.

    bits per byte = sum of -log2 p(token | tokens before it) / UTF-8 bytes of the text

Each document begins with end-of-text (or the tokenizer's beginning-of-text) as context, as in
training. A document longer than a window is cut into windows that do not overlap; a token that the
tokenizer puts before every text begins each of them. Costs are kept by document, so that intervals
can be had (`intervals.py`).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int
from transformers import PreTrainedTokenizerBase

from tokalign_jax.config import ComputeConfig
from tokalign_jax.evaluation import intervals
from tokalign_jax.evaluation.token_costs import TokenCosts, Window, token_costs
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.text.canonical import plain_backend
from tokalign_jax.text.corpus import Document
from tokalign_jax.text.special_tokens import end_of_text_id, is_of_chat, role_id
from tokalign_jax.text.tokenizing import opening_id
from tokalign_jax.utils.progress import Log, Progress


@dataclass(frozen=True)
class Score:
    """What one group of documents cost."""

    nats: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / max(
            self.tokens, 1
        )  # a vocabulary without bytes may have no token for a text

    def __add__(self, other: "Score") -> "Score":
        return Score(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes)

    def summary(self) -> dict[str, float]:
        """The sums and what follows from them, for JSON."""
        return {
            **asdict(self),
            "bits_per_byte": self.bits_per_byte,
            "bytes_per_token": self.bytes_per_token,
        }


@dataclass(frozen=True)
class Costs:
    """What each of N documents of a group cost."""

    nats: Float[np.ndarray, "N"]
    """float64"""
    tokens: Int[np.ndarray, "N"]
    """int64"""
    bytes: Int[np.ndarray, "N"]
    """int64"""
    beginnings: Sequence[TokenCosts] = ()
    """What each document's first window cost, token by token, with the likeliest tokens; only where
    asked for.
    """

    @property
    def total(self) -> Score:
        return Score(float(self.nats.sum()), int(self.tokens.sum()), int(self.bytes.sum()))


def summaries(costs: Mapping[str, Costs], seed: int) -> dict[str, dict[str, Any]]:
    """Each group's `Score.summary`, with its documents and the 95% `interval` of its bits per byte
    where there are two or more.
    """
    return {group: summary([of], seed) for group, of in costs.items()}


def summary(groups: Sequence[Costs], seed: int) -> dict[str, Any]:
    """The sums over `groups` and what follows from them, for JSON; documents are drawn again within
    each group.
    """
    nats, _, size = pooled(groups)
    counts = [len(of.nats) for of in groups]
    interval = intervals.of_ratio(nats / math.log(2), size, counts, seed)
    total = sum((of.total for of in groups), Score(0.0, 0, 0))
    return {
        **total.summary(),
        "documents": sum(counts),
        **({"interval": list(interval)} if interval else {}),
    }


def difference(one: Sequence[Costs], other: Sequence[Costs], seed: int) -> dict[str, Any]:
    """How many bits per byte `one` needs less `other`, with its 95% `interval`, from the same
    documents of both.

    Raises:
      ValueError: the documents are not the same.
    """
    (nats, _, size), (others, _, other_size) = pooled(one), pooled(other)
    if not np.array_equal(size, other_size):
        raise ValueError("the costs are of different documents")
    bits = (nats - others) / math.log(2)
    interval = intervals.of_ratio(bits, size, [len(of.nats) for of in one], seed)
    return {
        "difference": float(bits.sum() / size.sum()),
        **({"interval": list(interval)} if interval else {}),
    }


def pooled(groups: Sequence[Costs]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nats, tokens and bytes of the documents of all groups, one behind the other."""
    return tuple(
        np.concatenate([getattr(of, what) for of in groups]) for what in ("nats", "tokens", "bytes")
    )  # type: ignore[return-value]


def choose(documents: Iterable[Document], bytes_per_language: int) -> dict[str, list[str]]:
    """Texts by language: whole documents up to the given bytes, the last one cut."""
    chosen: dict[str, list[str]] = {}
    room: dict[str, int] = {}
    for text, language, size, *_ in documents:
        left = room.get(language, bytes_per_language)
        if left > 0:
            cut_off = text if size <= left else text.encode()[:left].decode(errors="ignore")
            if not (cut_off or chosen.get(language)):
                cut_off = text[:1]  # no language is left without text
            if cut_off:
                chosen.setdefault(language, []).append(cut_off)
            room[language] = left - size
    return chosen


def cut(tokens: list[int], start: int, length: int, each: bool = False) -> list[Window]:
    """Windows of at most `length` tokens; every token of the document is a label exactly once.

    Args:
      start: the token before the document's first.
      each: it begins every window, in the place of the token before.
    """
    context = [start, *tokens[:-1]]
    windows = [
        Window(context[i : i + length], tokens[i : i + length])
        for i in range(0, len(tokens), length)
    ]
    return [Window([start, *w.inputs[1:]], w.labels) for w in windows] if each else windows


def first_context(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token before a document's first: the one that the tokenizer adds, else bos, else the
    separator.

    A bos that begins turns (SmolLM2's `<|im_start|>`) is passed over: no document began behind it.
    """
    if (opening := opening_id(tokenizer)) is not None:
        return opening
    bos = role_id(tokenizer, "bos")
    return end_of_text_id(tokenizer) if bos is None or is_of_chat(tokenizer, bos) else bos


def evaluate(
    config: ModelConfig,
    params: dict,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, list[str]],
    **options: Any,
) -> dict[str, Score]:
    """Scores of the texts of every language; see `evaluate_documents`."""
    return {
        language: of.total
        for language, of in evaluate_documents(config, params, tokenizer, texts, **options).items()
    }


def evaluate_documents(
    config: ModelConfig,
    params: dict,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, list[str]],
    *,
    sequence_length: int,
    batch: int,
    compute: ComputeConfig = ComputeConfig(dtype="float32"),  # noqa: B008 (frozen)
    mesh: Mesh | None = None,
    log: Log = lambda line: None,
    what: str = "evaluate",
    beginnings: bool = False,
) -> dict[str, Costs]:
    """What every document of every language costs.

    Args: params: weights of the model, [V, D] matrices at least as long as the tokenizer. texts:
      documents by language. sequence_length: tokens of a window; must not exceed the model's
      positions. batch: windows that a device reads at once. compute: type of activations and
      weights; the log-sum-exp is float32 always. mesh: of the devices to run on, where `params` are
      or go; None: all devices. beginnings: also keep each token's cost and the likeliest token in
      each document's first window.

    Returns:
      Costs by language, documents in the order of `texts`.
    """
    start, each = first_context(tokenizer), opening_id(tokenizer) is not None
    backend = plain_backend(tokenizer)  # as the shards are made
    windows: list[Window] = []
    owners: list[tuple[str, int]] = []  # the document that each window is of
    costs = {}
    for language, documents in texts.items():
        encoded = [e.ids for e in backend.encode_batch_fast(documents, add_special_tokens=False)]
        costs[language] = Costs(
            np.zeros(len(documents)),
            np.array([len(ids) for ids in encoded], np.int64),
            np.array([len(text.encode()) for text in documents], np.int64),
            [_NOTHING] * len(documents) if beginnings else (),
        )
        for document, tokens in enumerate(encoded):
            cut_up = cut(tokens, start, sequence_length, each)
            windows += cut_up
            owners += [(language, document)] * len(cut_up)

    progress = Progress(log, what, sum(len(w.labels) for w in windows), "tokens")
    found = token_costs(
        config,
        params,
        windows,
        longest=sequence_length,
        batch=batch,
        compute=compute,
        mesh=mesh,
        progress=progress,
        likeliest=beginnings,
    )
    for (language, document), of_window in zip(owners, found, strict=True):
        of = costs[language]
        of.nats[document] += of_window.nats.sum(dtype=np.float64)
        if beginnings and of.beginnings[document] is _NOTHING:
            of.beginnings[document] = of_window  # type: ignore[index]
    average = sum((of.total for of in costs.values()), Score(0.0, 0, 0))
    progress.done(f"{average.bits_per_byte:.3f} bits per byte")
    return costs


_NOTHING = TokenCosts(np.zeros(0, np.float32), np.zeros(0, np.int32))
"""The first window of a document without a token."""
