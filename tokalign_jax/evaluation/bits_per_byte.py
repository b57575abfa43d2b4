"""Bits per byte of held-out text, comparable across tokenizers since all encode the same bytes.

    bits per byte = sum of -log2 p(token | preceding tokens) / UTF-8 bytes of the text

As in training, a document is preceded by end-of-text or the tokenizer's beginning-of-text. A
document longer than a window is split into non-overlapping windows; a token that the tokenizer
prepends to every text begins each of them. Costs are kept by document for bootstrap intervals
(`intervals.py`).
"""

import hashlib
import heapq
import math
from collections import Counter
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
    """Total cost of a group of documents."""

    nats: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        """Cost in bits, divided by the number of UTF-8 bytes."""
        return self.nats / math.log(2) / self.bytes

    @property
    def bytes_per_token(self) -> float:
        """Mean number of bytes per token; a vocabulary without bytes may yield no token."""
        return self.bytes / max(self.tokens, 1)

    def __add__(self, other: "Score") -> "Score":
        return Score(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes)

    def summary(self) -> dict[str, float]:
        """Returns the totals and ratios, for JSON."""
        return {
            **asdict(self),
            "bits_per_byte": self.bits_per_byte,
            "bytes_per_token": self.bytes_per_token,
        }


@dataclass(frozen=True)
class Costs:
    """Cost of each of the N documents of a group."""

    nats: Float[np.ndarray, "N"]
    """float64"""
    tokens: Int[np.ndarray, "N"]
    """int64"""
    bytes: Int[np.ndarray, "N"]
    """int64"""
    beginnings: Sequence[TokenCosts] = ()
    """Token costs of each document's first window, with the most likely tokens, if requested."""

    @property
    def total(self) -> Score:
        """Sum over the documents."""
        return Score(float(self.nats.sum()), int(self.tokens.sum()), int(self.bytes.sum()))


def summaries(costs: Mapping[str, Costs], seed: int) -> dict[str, dict[str, Any]]:
    """Returns the `summary` of each group."""
    return {group: summary([group_costs], seed) for group, group_costs in costs.items()}


def summary(groups: Sequence[Costs], seed: int) -> dict[str, Any]:
    """Returns the totals over `groups` and their ratios, for JSON.

    With two or more documents, there is also the 95% `interval` of bits per byte, by resampling
    documents within each group.
    """
    nats, _, size = pooled(groups)
    counts = [len(group.nats) for group in groups]
    interval = intervals.bootstrap_ratio(nats / math.log(2), size, counts, seed)
    total = sum((group.total for group in groups), Score(0.0, 0, 0))
    return {
        **total.summary(),
        "documents": sum(counts),
        **({"interval": list(interval)} if interval else {}),
    }


def difference(first: Sequence[Costs], second: Sequence[Costs], seed: int) -> dict[str, Any]:
    """Returns the bits per byte of `first` minus those of `second`, with a paired 95% `interval`.

    Raises:
      ValueError: the documents differ.
    """
    (nats, _, size), (other_nats, _, other_size) = pooled(first), pooled(second)
    if not np.array_equal(size, other_size):
        raise ValueError("the costs are of different documents")
    bits = (nats - other_nats) / math.log(2)
    counts = [len(group.nats) for group in first]
    interval = intervals.bootstrap_ratio(bits, size, counts, seed)
    return {
        "difference": float(bits.sum() / size.sum()),
        **({"interval": list(interval)} if interval else {}),
    }


def pooled(groups: Sequence[Costs]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns nats, tokens and bytes of the documents of all groups, concatenated."""
    return tuple(
        np.concatenate([getattr(group, field) for group in groups])
        for field in ("nats", "tokens", "bytes")
    )  # type: ignore[return-value]


def choose_texts(
    documents: Iterable[Document], bytes_per_language: int, files: int = 1
) -> dict[str, list[str]]:
    """Selects texts by language: documents up to a number of bytes, the last one truncated.

    Args:
      documents: documents in reading order.
      bytes_per_language: bytes of the selected text of each language.
      files: number of files that the documents come from. With several, documents are drawn by the
        hashes of their texts, since the first ones may all be from one file.
    """
    if files > 1:
        documents = _drawn(documents, bytes_per_language)
    chosen: dict[str, list[str]] = {}
    free: dict[str, int] = {}
    for text, language, size, *_ in documents:
        available = free.get(language, bytes_per_language)
        if available > 0:
            part = text
            if size > available:
                part = text.encode()[:available].decode(errors="ignore")
            if not (part or chosen.get(language)):
                part = text[:1]  # Every language gets some text.
            if part:
                chosen.setdefault(language, []).append(part)
            free[language] = available - size
    return chosen


def _drawn(documents: Iterable[Document], bytes_per_language: int) -> list[Document]:
    """Returns the documents of each language with the smallest hashes, in order of their hashes.

    They have at least `bytes_per_language` bytes, if there are as many, without the last of them
    less.
    """
    heaps: dict[str, list[tuple[int, int, Document]]] = {}
    sizes: Counter[str] = Counter()
    for number, document in enumerate(documents):
        digest = hashlib.sha256(document.text.encode(errors="replace")).digest()[:8]
        heap = heaps.setdefault(document.language, [])
        heapq.heappush(heap, (-int.from_bytes(digest, "big"), number, document))
        sizes[document.language] += document.bytes
        while sizes[document.language] - heap[0][2].bytes >= bytes_per_language:
            sizes[document.language] -= heapq.heappop(heap)[2].bytes
    return [entry[2] for heap in heaps.values() for entry in sorted(heap, reverse=True)]


def split_windows(
    tokens: list[int], start: int, length: int, starts_every_window: bool = False
) -> list[Window]:
    """Splits a document into windows of at most `length` tokens, each token a label exactly once.

    Args:
      tokens: the document's tokens.
      start: the token before the document's first.
      length: maximum number of tokens per window.
      starts_every_window: begin every window with `start` instead of the preceding token.
    """
    context = [start, *tokens[:-1]]
    windows = [
        Window(context[i : i + length], tokens[i : i + length])
        for i in range(0, len(tokens), length)
    ]
    if not starts_every_window:
        return windows
    return [Window([start, *window.inputs[1:]], window.labels) for window in windows]


def first_context(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the token that precedes a document.

    It is the token that the tokenizer prepends, else bos, else the document separator. A bos that
    begins turns of chats (SmolLM2's `<|im_start|>`) is not used, since no document begins with it.
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
    """Scores the texts of every language; options as for `evaluate_documents`."""
    costs = evaluate_documents(config, params, tokenizer, texts, **options)
    return {language: language_costs.total for language, language_costs in costs.items()}


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
    """Computes the cost of every document of every language.

    Args:
      config: the model's config.
      params: its weights, with [V, D] matrices at least as long as the tokenizer.
      tokenizer: its tokenizer.
      texts: documents by language.
      sequence_length: number of tokens per window, at most the model's positions.
      batch: number of windows per device and batch.
      compute: dtype of activations and weights; the log-sum-exp is in float32.
      mesh: mesh of the devices to run on; None for all devices.
      log: writes progress lines.
      what: their label.
      beginnings: also keep each token's cost and the most likely token in each document's first
        window.

    Returns:
      Costs by language, documents in the order of `texts`.
    """
    costs, windows, owners = _split_documents(tokenizer, texts, sequence_length, beginnings)

    progress = Progress(log, what, sum(len(w.labels) for w in windows), "tokens")
    window_costs = token_costs(
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
    for (language, document), cost in zip(owners, window_costs, strict=True):
        language_costs = costs[language]
        language_costs.nats[document] += cost.nats.sum(dtype=np.float64)
        if beginnings and language_costs.beginnings[document] is _EMPTY:
            language_costs.beginnings[document] = cost  # type: ignore[index]
    average = sum((group.total for group in costs.values()), Score(0.0, 0, 0))
    progress.done(f"{average.bits_per_byte:.3f} bits per byte")
    return costs


def _split_documents(
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, list[str]],
    length: int,
    beginnings: bool,
) -> tuple[dict[str, Costs], list[Window], list[tuple[str, int]]]:
    """Returns zero costs, the windows of all documents, and each window's (language, document)."""
    start = first_context(tokenizer)
    starts_every_window = opening_id(tokenizer) is not None
    backend = plain_backend(tokenizer)  # The one that token shards are written with.
    windows: list[Window] = []
    owners: list[tuple[str, int]] = []
    costs = {}
    for language, documents in texts.items():
        encoded = [e.ids for e in backend.encode_batch_fast(documents, add_special_tokens=False)]
        costs[language] = Costs(
            np.zeros(len(documents)),
            np.array([len(ids) for ids in encoded], np.int64),
            np.array([len(text.encode()) for text in documents], np.int64),
            [_EMPTY] * len(documents) if beginnings else (),
        )
        for document, tokens in enumerate(encoded):
            document_windows = split_windows(tokens, start, length, starts_every_window)
            windows += document_windows
            owners += [(language, document)] * len(document_windows)
    return costs, windows, owners


_EMPTY = TokenCosts(np.zeros(0, np.float32), np.zeros(0, np.int32))
"""Costs of the first window of a document without tokens."""
