"""Fidelity of a model to its source on unlabelled text, across tokenizers.

Both models read the beginning of a document, as far as their first windows reach. Where both
segmentations have a token end at the same position, both models have read the same bytes. The text
between two consecutive shared boundaries is a chunk c, whose likelihood is the product of its
tokens' likelihoods: p_c for the source, q_c for the new model. The measures are

    divergence = mean over chunks of
                 p_c ln(p_c / q_c) + (1 - p_c) ln((1 - p_c) / (1 - q_c))                    [nats]
    gap        = sum over chunks of |log2 p_c - log2 q_c| / bytes of the chunks    [bits per byte]
    agreement  = share of shared boundaries at which both models predict the same continuation

The divergence is the binarized Kullback-Leibler divergence (this chunk, or any other text) used in
training by approximate likelihood matching (Minixhofer et al. 2025, arXiv 2503.20083). It weights
chunks by the source's likelihood; the gap weights all bytes equally. Continuations are equal if the
bytes of one model's most likely token begin with those of the other's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from transformers import PreTrainedTokenizerBase

from tokalign_jax.evaluation import intervals
from tokalign_jax.evaluation.token_costs import TokenCosts
from tokalign_jax.text.boundaries import Boundaries, shared_boundaries, token_boundaries
from tokalign_jax.text.canonical import plain_backend, token_bytes

Readings = Mapping[str, Sequence[TokenCosts]]
"""By group of text: the token costs of each document's first window, with most likely tokens."""

_CERTAIN = -1e-6
"""Log-likelihood above which a chunk counts as certain, the limit of float32."""


@dataclass(frozen=True)
class Fidelity:
    """Sums over the chunks of each of N documents."""

    chunks: Int[np.ndarray, "N"]
    bytes: Int[np.ndarray, "N"]
    divergence: Float[np.ndarray, "N"]
    """In nats."""
    gap: Float[np.ndarray, "N"]
    """In bits."""
    boundaries: Int[np.ndarray, "N"]
    """Number of shared boundaries within the text, followed by predictions of both models."""
    agreed: Int[np.ndarray, "N"]
    """Number of them at which the predictions agree."""


def compare(
    source_tokenizer: PreTrainedTokenizerBase,
    target_tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, Sequence[str]],
    source: Readings,
    target: Readings,
) -> dict[str, Fidelity]:
    """Computes the fidelity of `target` to `source` on each group of texts.

    Args:
      source_tokenizer: the source's tokenizer.
      target_tokenizer: the target's tokenizer.
      texts: documents by group (language).
      source: the source's token costs of these documents.
      target: the target's token costs of these documents.
    """
    sides = [(plain_backend(t), token_bytes(t)) for t in (source_tokenizer, target_tokenizer)]
    contents = [content for _, content in sides]
    result = {}
    for group, documents in texts.items():
        boundaries = [token_boundaries(backend, documents) for backend, _ in sides]
        rows = [
            _document_fidelity(text, *sides_boundaries, *costs, contents)  # type: ignore[arg-type]
            for text, *sides_boundaries, costs in zip(
                documents, *boundaries, zip(source[group], target[group]), strict=True
            )
        ]
        result[group] = Fidelity(*(np.array(column) for column in zip(*rows)))
    return result


def summaries(by_group: Mapping[str, Fidelity], seed: int) -> dict[str, Any]:
    """Summarizes `languages` (each group) and all groups `pooled`, for JSON.

    Each has `divergence`, `gap` and `agreement` with their 95% `interval` over documents, and
    `chunks`. Groups without a chunk are omitted.
    """
    by_group = {group: result for group, result in by_group.items() if result.chunks.sum()}
    if not by_group:
        return {"languages": {}, "pooled": None}
    languages = {group: _summary([result], seed) for group, result in by_group.items()}
    return {"languages": languages, "pooled": _summary([*by_group.values()], seed)}


def save(path: Path, readings: Readings) -> None:
    """Writes readings to an `.npz` file."""
    costs = [cost for group in readings.values() for cost in group]
    np.savez_compressed(
        path,
        documents=np.array([len(cost.nats) for cost in costs], np.int64),
        nats=np.concatenate([cost.nats for cost in costs]),
        likeliest=np.concatenate([cost.likeliest for cost in costs]),  # type: ignore[misc]
    )


def load(path: Path, texts: Mapping[str, Sequence[str]]) -> Readings:
    """Loads readings written by `save` for these texts."""
    with np.load(path) as file:
        starts = np.cumsum(file["documents"])[:-1]
        columns = (np.split(file[name], starts) for name in ("nats", "likeliest"))
        costs = iter([TokenCosts(*arrays) for arrays in zip(*columns)])
    return {group: [next(costs) for _ in documents] for group, documents in texts.items()}


def _document_fidelity(
    text: str,
    source_boundaries: Boundaries,
    target_boundaries: Boundaries,
    source: TokenCosts,
    target: TokenCosts,
    contents: Sequence[Sequence[bytes | None]],
) -> tuple[int, int, float, float, int, int]:
    """Returns the fields of `Fidelity` for a document."""
    source_ends = source_boundaries.ends[: len(source.nats)]
    target_ends = target_boundaries.ends[: len(target.nats)]
    last = shared_boundaries(source_ends, target_ends)
    log_p, log_q = (_log_likelihoods(costs, ends) for costs, ends in zip((source, target), last))
    size = len(text[: source_ends[last[0][-1]]].encode()) if len(last[0]) else 0
    gap = np.abs(log_p - log_q).sum() / np.log(2)
    boundaries, agreed = _agreement(source, target, *last, contents)
    return (
        len(log_p),
        size,
        float(binary_divergence(log_p, log_q).sum()),
        float(gap),
        boundaries,
        agreed,
    )


def _log_likelihoods(costs: TokenCosts, last: Int[np.ndarray, "K"]) -> Float[np.ndarray, "K"]:
    """Returns the log-likelihoods of consecutive chunks, given the index of their last tokens."""
    return -np.diff(np.append(0.0, np.cumsum(costs.nats, dtype=np.float64)[last]))


def binary_divergence(
    log_p: Float[np.ndarray, "K"], log_q: Float[np.ndarray, "K"]
) -> Float[np.ndarray, "K"]:
    """Computes KL(p || q) in nats of Bernoulli distributions, from log p and log q."""
    log_p, log_q = np.minimum(log_p, _CERTAIN), np.minimum(log_q, _CERTAIN)
    rest_p, rest_q = (np.log(-np.expm1(log)) for log in (log_p, log_q))
    return np.exp(log_p) * (log_p - log_q) + np.exp(rest_p) * (rest_p - rest_q)


def _agreement(
    source: TokenCosts,
    target: TokenCosts,
    source_last: Int[np.ndarray, "k"],
    target_last: Int[np.ndarray, "k"],
    contents: Sequence[Sequence[bytes | None]],
) -> tuple[int, int]:
    """Returns the number of shared boundaries before a token of both windows, and of agreements."""
    assert source.likeliest is not None and target.likeliest is not None
    has_next = (source_last + 1 < len(source.likeliest)) & (target_last + 1 < len(target.likeliest))
    pairs = zip(
        source.likeliest[source_last[has_next] + 1].tolist(),
        target.likeliest[target_last[has_next] + 1].tolist(),
    )
    source_content, target_content = contents
    agreed = sum(
        _is_prefix_pair(_bytes(source_content, first), _bytes(target_content, second))
        for first, second in pairs
    )
    return int(has_next.sum()), agreed


def _bytes(content: Sequence[bytes | None], token: int) -> bytes | None:
    """Returns a token's text; None for special tokens and rows without a token."""
    return content[token] if token < len(content) else None


def _is_prefix_pair(first: bytes | None, second: bytes | None) -> bool:
    """Tells if one continuation is a prefix of the other, or both have no text."""
    if not (first and second):
        return not (first or second)
    return first.startswith(second) or second.startswith(first)


def _summary(groups: Sequence[Fidelity], seed: int) -> dict[str, Any]:
    """Summarizes documents with chunks, resampling them within each group."""

    def ratio(numerator: str, denominator: str) -> dict[str, Any]:
        pairs = [(getattr(group, numerator), getattr(group, denominator)) for group in groups]
        pairs = [(above[below > 0], below[below > 0]) for above, below in pairs]
        above, below = (np.concatenate(column) for column in zip(*pairs))
        if not len(below):
            return {"value": None}
        counts = [len(below) for _, below in pairs if len(below)]
        interval = intervals.bootstrap_ratio(above, below, counts, seed)
        return {
            "value": float(above.sum() / below.sum()),
            **({"interval": list(interval)} if interval else {}),
        }

    return {
        "divergence": ratio("divergence", "chunks"),
        "gap": ratio("gap", "bytes"),
        "agreement": ratio("agreed", "boundaries"),
        "chunks": int(sum(group.chunks.sum() for group in groups)),
        "documents": sum(len(group.chunks) for group in groups),
    }
