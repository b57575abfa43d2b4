"""Scores of an alignment without a model: BLEU-1 of mapped ids, and the share of hubs."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from tokalign_jax.text import corpus
from tokalign_jax.text.canonical import plain_backend

BLEU_LINES = 1000
"""Held-out lines for BLEU-1 of the mapped target ids against the source ids."""


def score(
    mapping: Int[np.ndarray, "V_t"],
    source_tokenizer: PreTrainedTokenizerBase,
    target_tokenizer: PreTrainedTokenizerBase,
    lines: Sequence[str],
) -> float:
    """Return BLEU-1 of mapped target ids against source ids (TokAlign, section 4.3)."""
    source, target = (
        [
            encoding.ids
            for encoding in plain_backend(tokenizer).encode_batch_fast(
                list(lines), add_special_tokens=False
            )
        ]
        for tokenizer in (source_tokenizer, target_tokenizer)
    )
    return bleu_1(([int(mapping[i]) for i in ids] for ids in target), source)


def bleu_1(candidates: Iterable[Sequence[int]], references: Iterable[Sequence[int]]) -> float:
    """Return corpus-level unigram BLEU with its brevity penalty."""
    matched = candidate_tokens = reference_tokens = 0
    for candidate, reference in zip(candidates, references, strict=True):
        matched += sum((Counter(candidate) & Counter(reference)).values())
        candidate_tokens += len(candidate)
        reference_tokens += len(reference)
    if not matched:
        return 0.0
    brevity = min(1.0, math.exp(1.0 - reference_tokens / candidate_tokens))
    return brevity * matched / candidate_tokens


def held_out_lines(corpus_folder: Path, lines: int, seed: int) -> list[str]:
    """Draw `lines` non-empty lines of the held-out documents, or return all if there are fewer."""
    count = sum(1 for _ in _lines(corpus_folder))
    chosen = set(np.random.default_rng(seed).permutation(count)[:lines].tolist())
    return [line for number, line in enumerate(_lines(corpus_folder)) if number in chosen]


def _lines(corpus_folder: Path) -> Iterator[str]:
    """Yield non-empty lines; all of them would fill the memory, so they are read twice."""
    for document in corpus.held_out(corpus_folder):
        yield from (line for line in document.text.splitlines() if line.strip())


def hub_share(matches: Int[np.ndarray, "n"], hubs: int) -> float:
    """Return the share of rows that point at the `hubs` most used source tokens."""
    if not len(matches):
        return 0.0
    uses = np.sort(np.unique(matches, return_counts=True)[1])[::-1]
    return float(uses[:hubs].sum() / len(matches))
