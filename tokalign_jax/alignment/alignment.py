"""The alignment of a target vocabulary: mixtures of source rows for each target token.

Each target token has a rule, a score, and two mixtures of source rows (weights sum to 1), one for
the input embedding and one for the head. Every target token has both, and none is zero.
`methods.py` makes alignments; this module defines them and their files: `align_matrix.json` in the
published form ({"target_id": source_id}, the heaviest source token of the embedding mixture), and
`alignment.npz` with everything.
"""

import json
import operator
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
from jaxtyping import Bool, Float, Int, UInt8
from transformers import PreTrainedTokenizerBase

from tokalign_jax.alignment import scoring
from tokalign_jax.errors import UserError
from tokalign_jax.text import canonical

HUBS = 10
"""Number of most used source tokens; the hub share is the share of rows that point at them."""
BLOCK = 4096
"""Rows that a thread computes at once."""
THREADS = 8
JSON_FILE, FILE = "align_matrix.json", "alignment.npz"


class Rule(IntEnum):
    """Rule that a target token's rows follow. The numbers are stored in `alignment.npz`."""

    EXACT = 0
    """The source token with the same bytes."""
    SPECIAL = 1
    """A special token of the same role (else the source's end of text), text, or use."""
    SIMILAR = 2
    """Source tokens matched by co-occurrence, in some methods mixed with the pieces."""
    PIECES = 3
    """The token's text as the source tokenizer splits it."""
    MEAN = 4
    """The mean of all source rows: nothing else applies."""
    GIVEN = 5
    """The source token that an alignment file names."""
    RANDOM = 6
    """A random source token, only in baselines."""
    UNWRITTEN = 7
    """A second token of bytes that another token already has (`<0x2C>` beside `,`), so that the
    tokenizer never writes it, without such a second token in the source. Its embedding row is that
    of its bytes. Its head row is the mean of all source rows: with the row of its bytes it would
    take half of the other token's probability, while the mean gets at most 1 / V_s of the summed
    exponentials (Jensen).
    """


SURE = (Rule.EXACT, Rule.SPECIAL, Rule.UNWRITTEN)
"""Rules of tokens that are not matched by co-occurrence."""


class Mixture(NamedTuple):
    """A sparse matrix [V_t, V_s + 1] in compressed rows.

    Column V_s stands for the mean of all source rows.
    """

    indptr: Int[np.ndarray, "V_t+1"]
    """int64: row i holds entries indptr[i] to indptr[i + 1]."""
    ids: Int[np.ndarray, "E"]
    """int32: source tokens."""
    weights: Float[np.ndarray, "E"]
    """float32: positive, summing to 1 in each row; any numbers in method `omp`."""
    source_size: int
    """V_s."""


@dataclass(frozen=True)
class Alignment:
    """Mixtures of V_s source tokens for V_t target tokens."""

    embedding: Mixture
    head: Mixture
    rules: UInt8[np.ndarray, "V_t"]
    """`Rule` of each target token."""
    scores: Float[np.ndarray, "V_t"]
    """float32: 1 for EXACT, SPECIAL, UNWRITTEN and GIVEN; else the similarity of the best match
    (calibrated, except in `tokalign`), 0 without a match."""
    matches: Int[np.ndarray, "V_t"]
    """int32: the best match by co-occurrence, used or not; -1 for exact and special tokens, and for
    tokens without a vector."""
    frequency_shift: Float[np.ndarray, "V_t"]
    """float32: log frequency of the token minus the mean of those that its head row is mixed from;
    0 for exact, special and given tokens. `initialization` moves head rows by it along the slope of
    the source model's rows with log frequency."""
    source_log_frequency: Float[np.ndarray, "V_s"]
    """Log frequency of each source token, float32."""
    source_fingerprint: str
    target_fingerprint: str
    """SHA-256 of each vocabulary's canonical bytes."""

    @property
    def source_size(self) -> int:
        """V_s, the number of source tokens."""
        return self.embedding.source_size

    @property
    def target_size(self) -> int:
        """V_t, the number of target tokens."""
        return len(self.rules)

    def heaviest(self) -> Int[np.ndarray, "V_t"]:
        """Return the source token with the largest weight in each embedding mixture, int32.

        Of equal weights the last one counts; a MEAN row gets the source token that most other rows
        point at.
        """
        indptr, ids, weights, source_size = self.embedding
        rows = np.repeat(np.arange(self.target_size), np.diff(indptr))
        last_of_each_row = np.lexsort((weights, rows))[indptr[1:] - 1]
        result = ids[last_of_each_row].copy()
        single = result < source_size
        result[~single] = np.bincount(result[single], minlength=1).argmax()
        return result


# --- Making mixtures ----------------------------------------------------------------------------


def mixture_of(
    rows: Int[np.ndarray, "E"],
    ids: Int[np.ndarray, "E"],
    weights: Float[np.ndarray, "E"],
    size: int,
    source_size: int,
) -> Mixture:
    """Make a mixture of V_t = `size` rows from entries (target token, source token, weight >= 0).

    The source token V_s is the mean of all rows. A row keeps the order of its entries; weights of
    the same source token are added, and each row is normalized to sum to 1. Every row needs a
    positive weight.
    """
    rows, ids, weights = (x[weights > 0] for x in (rows, ids, weights))
    keys = rows.astype(np.int64) * (source_size + 1) + ids
    _, first, place = np.unique(keys, return_index=True, return_inverse=True)
    weights = np.bincount(place, weights)  # Sums follow the order of the entries.
    order = np.lexsort((first, rows[first]))
    indptr = np.concatenate([[0], np.cumsum(np.bincount(rows[first], minlength=size))])
    ids, weights = ids[first[order]].astype(np.int32), weights[order]
    sums = np.add.reduceat(weights, indptr[:-1])
    return Mixture(
        indptr, ids, (weights / np.repeat(sums, np.diff(indptr))).astype(np.float32), source_size
    )


def replaced(
    mixture: Mixture,
    rows: Int[np.ndarray, "E"],
    ids: Int[np.ndarray, "E"],
    weights: Float[np.ndarray, "E"],
) -> Mixture:
    """Return the mixture with the rows of these target tokens replaced by these entries.

    Args:
      mixture: the mixture to change.
      rows: the target token of each entry.
      ids: the source token of each entry.
      weights: the weight of each entry.
    """
    size = len(mixture.indptr) - 1
    old = np.repeat(np.arange(size), np.diff(mixture.indptr))
    unchanged = ~np.isin(old, rows)
    rows = np.append(old[unchanged], rows)
    order = np.argsort(rows, kind="stable")
    indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=size))])
    ids = np.append(mixture.ids[unchanged], ids)[order].astype(np.int32)
    return Mixture(
        indptr,
        ids,
        np.append(mixture.weights[unchanged], weights)[order].astype(np.float32),
        mixture.source_size,
    )


def with_mean(mixture: Mixture, targets: Int[np.ndarray, "n"]) -> Mixture:
    """Return the mixture with the mean of all source rows for these target tokens."""
    return replaced(
        mixture, targets, np.full(len(targets), mixture.source_size), np.ones(len(targets))
    )


def one_to_one(source_ids: Int[np.ndarray, "V_t"], source_size: int) -> Mixture:
    """Make the mixture in which each target token is one source token."""
    n = len(source_ids)
    return Mixture(
        np.arange(n + 1, dtype=np.int64),
        source_ids.astype(np.int32),
        np.ones(n, np.float32),
        source_size,
    )


# --- Applying mixtures --------------------------------------------------------------------------


def apply(mixture: Mixture, rows: Float[np.ndarray, "R D"]) -> Float[np.ndarray, "V_t D"]:
    """Mix the source model's rows (of any float type) in float32.

    The row of a target token that is a single source token is copied bit for bit. Source rows with
    NaN or infinity are replaced by the mean of the others.

    Args:
      mixture: the mixture to apply.
      rows: R >= V_s; a source matrix may be padded, and only its first V_s rows count for the mean.

    Raises:
      UserError: the matrix has fewer rows than the source tokenizer has tokens.
    """
    source_size = mixture.source_size
    if rows.shape[0] < source_size:
        raise UserError(
            f"the source model's matrix has {rows.shape[0]:,} rows, its tokenizer {source_size:,}"
            " tokens: they do not belong together; put the model's own tokenizer into its folder"
        )
    rows = rows[:source_size]
    finite = finite_rows(rows)
    mean = (rows if finite.all() else rows[finite]).mean(axis=0, dtype=np.float64)
    table = np.concatenate([rows, mean[None]], dtype=np.float32)
    table[:-1][~finite] = mean
    size = len(mixture.indptr) - 1
    matrix = scipy.sparse.csr_array(
        (mixture.weights, mixture.ids, mixture.indptr), shape=(size, source_size + 1)
    )
    single = (np.diff(mixture.indptr) == 1) & (mixture.weights[mixture.indptr[:-1]] == 1)
    result = np.empty((size, rows.shape[1]), np.float32)

    def make(start: int) -> None:
        block = result[start : start + BLOCK]
        block[:] = matrix[start : start + BLOCK] @ table
        copied = np.flatnonzero(single[start : start + BLOCK])
        # Copied, since a product turns -0.0 into 0.0.
        block[copied] = table[mixture.ids[mixture.indptr[start + copied]]]

    with ThreadPoolExecutor(min(os.cpu_count() or 1, THREADS)) as pool:
        list(pool.map(make, range(0, size, BLOCK)))
    return result


def finite_rows(rows: Float[np.ndarray, "R D"]) -> Bool[np.ndarray, "R"]:
    """Return which rows contain neither NaN nor infinity."""
    blocks = [rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK)]
    return np.concatenate(
        [np.isfinite(block.astype(np.float32)).all(axis=1) for block in blocks]
        or [np.ones(0, bool)]
    )


def summary(alignment: Alignment, target_counts: Int[np.ndarray, "V_t"]) -> dict[str, Any]:
    """Summarize rows and the share of the target corpus by rule, and how concentrated matches are.

    `hub_share` is over tokens that use their match by co-occurrence, `hub_share_file` over all rows
    of `align_matrix.json` that are neither exact, special nor unwritten.
    """
    total = max(int(target_counts.sum()), 1)
    by_rule = {
        rule.name.lower(): {
            "rows": int(np.sum(alignment.rules == rule)),
            "frequency": float(target_counts[alignment.rules == rule].sum() / total),
        }
        for rule in Rule
    }
    unmatched = ~np.isin(alignment.rules, SURE)
    return {
        "target_size": alignment.target_size,
        "source_size": alignment.source_size,
        "rules": by_rule,
        "hub_share": scoring.hub_share(alignment.matches[alignment.rules == Rule.SIMILAR], HUBS),
        "hub_share_file": scoring.hub_share(alignment.heaviest()[unmatched], HUBS),
    }


def describe(result: Mapping[str, Any]) -> list[str]:
    """Describe a summary, including the method's name, in a few lines."""
    lines = [
        f"alignment by {result['method']}: {result['target_size']:,} target tokens of "
        f"{result['source_size']:,} source tokens"
    ]
    for name, part in result["rules"].items():
        if part["rows"]:
            lines.append(
                f"  {name:9} {part['rows']:9,} rows  {part['frequency']:7.2%} of the corpus"
            )
    lines.append(
        f"  hub share {result['hub_share']:.1%} of similar, {result['hub_share_file']:.1%} of all "
        "unmatched rows"
    )
    lines += [f"  BLEU-1 {result['bleu_1']:.3f}"] if "bleu_1" in result else []
    return lines


# --- Files --------------------------------------------------------------------------------------


def save(alignment: Alignment, folder: Path) -> None:
    """Write `align_matrix.json` and `alignment.npz` atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = asdict(alignment)
    for side in ("embedding", "head"):
        del arrays[side]
        arrays |= {
            f"{side}_{name}": array for name, array in getattr(alignment, side)._asdict().items()
        }
    _write(folder / FILE, lambda path: np.savez_compressed(path, **arrays))
    published = {str(target): int(source) for target, source in enumerate(alignment.heaviest())}
    _write(
        folder / JSON_FILE, lambda path: path.write_text(json.dumps(published), encoding="utf-8")
    )


def load(
    path: Path, source_tokenizer: PreTrainedTokenizerBase, target_tokenizer: PreTrainedTokenizerBase
) -> Alignment:
    """Read an alignment: a folder of `save`, its `alignment.npz`, or an `align_matrix.json`.

    Raises:
      UserError: it cannot be read, or belongs to other tokenizers.
    """
    path = Path(path)
    if path.is_dir():
        path = path / (FILE if (path / FILE).exists() else JSON_FILE)
    try:
        read = _read_json if path.suffix == ".json" else _read_npz
        return read(path, source_tokenizer, target_tokenizer)
    except UserError:
        raise
    except Exception as error:  # JSON, zip and zlib have many types.
        raise UserError(
            f"the alignment '{path}' cannot be read ({type(error).__name__}: {error}): it must be "
            f'an {FILE} that this program wrote, or an {JSON_FILE} of the form {{"target_id": '
            "source_id}"
        ) from error


def _read_npz(path: Path, source_tokenizer, target_tokenizer) -> Alignment:
    with np.load(path, allow_pickle=False) as file:
        entries = dict(file)

    def mixture(side: str) -> Mixture:
        indptr, ids, weights, source_size = (entries[f"{side}_{name}"] for name in Mixture._fields)
        return Mixture(indptr, ids, weights, int(source_size))

    alignment = Alignment(
        embedding=mixture("embedding"),
        head=mixture("head"),
        rules=entries["rules"],
        scores=entries["scores"],
        matches=entries["matches"],
        frequency_shift=entries["frequency_shift"],
        source_log_frequency=entries["source_log_frequency"],
        source_fingerprint=str(entries["source_fingerprint"]),
        target_fingerprint=str(entries["target_fingerprint"]),
    )
    for side, tokenizer, size, fingerprint in (
        ("source", source_tokenizer, alignment.source_size, alignment.source_fingerprint),
        ("target", target_tokenizer, alignment.target_size, alignment.target_fingerprint),
    ):
        if canonical.fingerprint(tokenizer) != fingerprint:
            reason = f"is of another {side} vocabulary, of {size:,} tokens"
            raise UserError(_other_vocabulary(path, side, tokenizer, reason))
    return alignment


def _read_json(path: Path, source_tokenizer, target_tokenizer) -> Alignment:
    content = json.loads(path.read_text(encoding="utf-8"))
    entries = {
        int(target): int(source) if isinstance(source, str) else operator.index(source)
        for target, source in content.items()
    }
    source_size, target_size = (
        canonical.vocabulary_size(t) for t in (source_tokenizer, target_tokenizer)
    )
    if sorted(entries) != list(range(target_size)):
        raise UserError(
            _other_vocabulary(path, "target", target_tokenizer, f"has {len(entries):,} rows")
        )
    for source in (min(entries.values()), max(entries.values())):
        if not 0 <= source < source_size:
            reason = f"names source token {source:,}"
            raise UserError(_other_vocabulary(path, "source", source_tokenizer, reason))
    mixture = one_to_one(np.array([entries[i] for i in range(target_size)]), source_size)
    return Alignment(
        embedding=mixture,
        head=mixture,
        rules=np.full(target_size, Rule.GIVEN, np.uint8),
        scores=np.ones(target_size, np.float32),
        matches=np.full(target_size, -1, np.int32),
        frequency_shift=np.zeros(target_size, np.float32),
        source_log_frequency=np.zeros(source_size, np.float32),
        source_fingerprint=canonical.fingerprint(source_tokenizer),
        target_fingerprint=canonical.fingerprint(target_tokenizer),
    )


def _other_vocabulary(
    path: Path, side: str, tokenizer: PreTrainedTokenizerBase, reason: str
) -> str:
    return (
        f"the {side} tokenizer '{tokenizer.name_or_path}' has "
        f"{canonical.vocabulary_size(tokenizer):,} tokens, the alignment '{path}' {reason}: it "
        f"belongs to another {side} tokenizer; name that one, or leave alignment.file empty to "
        "make an alignment for this pair"
    )


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file atomically."""
    part = path.with_name(f"partial-{path.name}")
    write(part)
    os.replace(part, path)
