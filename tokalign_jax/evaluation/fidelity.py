"""Fidelity of a model to its source on any text, without labels, across tokenizers.

Both models read the beginning of a document, as far as each one's first window goes. Where both
segmentations end a token at the same place of the text, both models have read the same bytes. Two
such shared boundaries, one after the other, hold a chunk c; its likelihood is the product of its
tokens' likelihoods: p_c by the source, q_c by the new model. Compared are

    divergence = mean over chunks of p_c ln(p_c / q_c) + (1 - p_c) ln((1 - p_c) / (1 - q_c))      nats
    gap        = sum over chunks of |log2 p_c - log2 q_c| / bytes of the chunks                   bits per byte
    agreement  = share of shared boundaries at which both models hold the same continuation likeliest

The divergence is that of the two-way outcome "the text goes on with this chunk, or with anything
else": the binarised Kullback-Leibler divergence that approximate likelihood matching (Minixhofer et
al. 2025, arXiv 2503.20083) trains with. It weighs what the source holds likely; the gap weighs all
bytes alike. Continuations are the same where the bytes of one model's likeliest token begin with
those of the other's.
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
"""By group of text, what a model makes of the tokens in each document's first window, with the
likeliest ones.
"""

_CERTAIN = -1e-6
"""Log-likelihood past which a chunk counts as certain, since float32 cannot tell."""


@dataclass(frozen=True)
class Fidelity:
    """Sums over the chunks of each of N documents."""

    chunks: Int[np.ndarray, "N"]
    bytes: Int[np.ndarray, "N"]
    divergence: Float[np.ndarray, "N"]
    """nats"""
    gap: Float[np.ndarray, "N"]
    """bits"""
    boundaries: Int[np.ndarray, "N"]
    """Shared boundaries within the text, where both models say how it goes on."""
    agreed: Int[np.ndarray, "N"]
    """How many of them they agree at."""


def compare(
    source_tokenizer: PreTrainedTokenizerBase,
    target_tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, Sequence[str]],
    source: Readings,
    target: Readings,
) -> dict[str, Fidelity]:
    """The fidelity of `target` to `source` on each group of texts.

    Args:
      texts: documents by group (language).
      source, target: what each model makes of these very documents, cut by its own tokenizer.
    """
    sides = [(plain_backend(t), token_bytes(t)) for t in (source_tokenizer, target_tokenizer)]
    found = {}
    for group, documents in texts.items():
        cuts = [token_boundaries(backend, documents) for backend, _ in sides]
        contents = [content for _, content in sides]
        rows = [
            _of_document(text, *both, *of, contents)  # type: ignore[arg-type]
            for text, *both, of in zip(
                documents, *cuts, zip(source[group], target[group]), strict=True
            )
        ]
        found[group] = Fidelity(*(np.array(column) for column in zip(*rows)))
    return found


def summaries(found: Mapping[str, Fidelity], seed: int) -> dict[str, Any]:
    """`languages` by group and all groups `pooled`: `divergence`, `gap` and `agreement`, each with
    its 95% `interval` over documents, and `chunks`; for JSON. Groups without a chunk are left
    out.
    """
    found = {group: of for group, of in found.items() if of.chunks.sum()}
    if not found:
        return {"languages": {}, "pooled": None}
    languages = {group: _summary([of], seed) for group, of in found.items()}
    return {"languages": languages, "pooled": _summary([*found.values()], seed)}


def save(path: Path, readings: Readings) -> None:
    """Writes readings to an `.npz` file."""
    every = [of for group in readings.values() for of in group]
    np.savez_compressed(
        path,
        documents=np.array([len(of.nats) for of in every], np.int64),
        nats=np.concatenate([of.nats for of in every]),
        likeliest=np.concatenate([of.likeliest for of in every]),  # type: ignore[misc]
    )


def load(path: Path, texts: Mapping[str, Sequence[str]]) -> Readings:
    """What `save` wrote of these texts."""
    with np.load(path) as file:
        places = np.cumsum(file["documents"])[:-1]
        columns = (np.split(file[name], places) for name in ("nats", "likeliest"))
        every = iter([TokenCosts(*of) for of in zip(*columns)])
    return {group: [next(every) for _ in documents] for group, documents in texts.items()}


def _of_document(
    text: str,
    source_cut: Boundaries,
    target_cut: Boundaries,
    source: TokenCosts,
    target: TokenCosts,
    contents: Sequence[Sequence[bytes | None]],
) -> tuple[int, int, float, float, int, int]:
    """The fields of `Fidelity` for one document."""
    source_ends, target_ends = (
        c.ends[: len(of.nats)] for c, of in ((source_cut, source), (target_cut, target))
    )
    last = shared_boundaries(source_ends, target_ends)
    log_p, log_q = (_log_likelihoods(of, ends) for of, ends in zip((source, target), last))
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


def _log_likelihoods(of: TokenCosts, last: Int[np.ndarray, "K"]) -> Float[np.ndarray, "K"]:
    """Of chunks that end with these tokens, the first of them beginning with the first token."""
    return -np.diff(np.append(0.0, np.cumsum(of.nats, dtype=np.float64)[last]))


def binary_divergence(
    log_p: Float[np.ndarray, "K"], log_q: Float[np.ndarray, "K"]
) -> Float[np.ndarray, "K"]:
    """KL(p || q) in nats of two-way outcomes with probabilities p, 1 - p and q, 1 - q."""
    log_p, log_q = np.minimum(log_p, _CERTAIN), np.minimum(log_q, _CERTAIN)
    rest_p, rest_q = (np.log(-np.expm1(of)) for of in (log_p, log_q))
    return np.exp(log_p) * (log_p - log_q) + np.exp(rest_p) * (rest_p - rest_q)


def _agreement(
    source: TokenCosts,
    target: TokenCosts,
    source_last: Int[np.ndarray, "k"],
    target_last: Int[np.ndarray, "k"],
    contents: Sequence[Sequence[bytes | None]],
) -> tuple[int, int]:
    """Shared boundaries with a token behind them in both windows, and those agreed at."""
    assert source.likeliest is not None and target.likeliest is not None
    after = (source_last + 1 < len(source.likeliest)) & (target_last + 1 < len(target.likeliest))
    pairs = zip(
        source.likeliest[source_last[after] + 1].tolist(),
        target.likeliest[target_last[after] + 1].tolist(),
    )
    return int(after.sum()), sum(
        _alike(*(_bytes(*of) for of in zip(contents, pair))) for pair in pairs
    )


def _bytes(content: Sequence[bytes | None], token: int) -> bytes | None:
    """The text of a token; None of a special one, and of a row that the tokenizer has no token for."""
    return content[token] if token < len(content) else None


def _alike(one: bytes | None, other: bytes | None) -> bool:
    """Whether one continuation begins with the other; those without text are alike."""
    if not (one and other):
        return not (one or other)
    return one.startswith(other) or other.startswith(one)


def _summary(groups: Sequence[Fidelity], seed: int) -> dict[str, Any]:
    """Documents without a chunk are left out, and drawn again within each group."""

    def ratio(numerator: str, denominator: str) -> dict[str, Any]:
        kept = [(getattr(of, numerator), getattr(of, denominator)) for of in groups]
        kept = [(above[below > 0], below[below > 0]) for above, below in kept]
        above, below = (np.concatenate(column) for column in zip(*kept))
        if not len(below):
            return {"value": None}
        interval = intervals.of_ratio(above, below, [len(of) for _, of in kept if len(of)], seed)
        return {
            "value": float(above.sum() / below.sum()),
            **({"interval": list(interval)} if interval else {}),
        }

    return {
        "divergence": ratio("divergence", "chunks"),
        "gap": ratio("gap", "bytes"),
        "agreement": ratio("agreed", "boundaries"),
        "chunks": int(sum(of.chunks.sum() for of in groups)),
        "documents": sum(len(of.chunks) for of in groups),
    }
