"""The alignment: for every target token, which rows of the source model its own rows are made of.

Each target token gets a rule, a score, and two mixtures of source rows (weights sum to 1), one for the input embedding and
one for the head. No row is random, zero or left out.

Files: `align_matrix.json` in the published form ({"target_id": source_id}, the heaviest source token of the embedding
mixture), `alignment.npz` with everything, `vectors.npz` with the token vectors of both sides, and `summary.json`.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from transformers import PreTrainedTokenizerBase

from tokalign_jax.alignment import matching, scoring, vectors
from tokalign_jax.alignment.vectors import Vectors
from tokalign_jax.config import AlignmentConfig, Config
from tokalign_jax.errors import UserError
from tokalign_jax.progress import Log
from tokalign_jax.text import canonical
from tokalign_jax.text.tokenizing import TokenShards, end_of_text_id

ROLES = ("eos", "bos", "pad", "unk", "sep", "cls", "mask")
"""Special tokens with a meaning that models share; a token of several roles takes the first."""
FEWEST_SHARED = 32
"""With fewer shared tokens that have vectors nothing can be matched by co-occurrence."""
HUBS = 10
"""The hub share is that of the rows which point at this many source tokens."""
JSON_FILE, FILE, SUMMARY_FILE = "align_matrix.json", "alignment.npz", "summary.json"

# How a token that is matched by co-occurrence, but not surely so, is made of its match and of the pieces of its text.
# Measured (llama-en16k, whose head is tied to the embedding, to Qwen3's vocabulary, aligned on 51 MB; bits per byte at the
# start, en / code / math / other): pieces alone 2.081 / 1.815 / 2.091 / 3.309; with the match at 0.15 2.036 / 1.784 / 2.051 /
# 3.288, 0.25 2.022 / 1.786 / 2.034 / 3.293, 0.35 2.013 / 1.797 / 2.026 / 3.312. A match alone is worse than the pieces alone.
MATCH_WEIGHT_EMBEDDING = 0.25
"""Weight of the match in the embedding row, times its similarity."""
MATCH_WEIGHT_HEAD = 0.25
"""The same in the head row."""
PIECE_DECAY = 0.5
"""In the embedding row, each piece weighs this much of the one behind it: the last says most of what comes next."""


class Rule(IntEnum):
    """Where a target token's rows come from. The numbers are those in `alignment.npz`."""

    EXACT = 0
    """The source token with the same bytes."""
    SPECIAL = 1
    """A special token: the source's of the same role, else of the same text, else its end-of-text."""
    SIMILAR = 2
    """The source token found by co-occurrence, mixed with the pieces of the text."""
    PIECES = 3
    """The text as the source tokenizer cuts it."""
    MEAN = 4
    """Nothing is known: the mean of all source rows."""
    GIVEN = 5
    """The source token that an alignment file names."""


class Mixture(NamedTuple):
    """A sparse matrix [V_t, V_s + 1] in compressed rows; column V_s stands for the mean of all source rows."""

    indptr: Int[np.ndarray, "V_t+1"]
    """int64: row i holds entries indptr[i] to indptr[i + 1]."""
    ids: Int[np.ndarray, "E"]
    """int32: source tokens."""
    weights: Float[np.ndarray, "E"]
    """float32: positive, each row's sum is 1."""
    source_size: int
    """V_s"""


@dataclass(frozen=True)
class Alignment:
    """How each of V_t target tokens is made of V_s source tokens."""

    embedding: Mixture
    head: Mixture
    rules: UInt8[np.ndarray, "V_t"]
    """`Rule` of each target token."""
    scores: Float[np.ndarray, "V_t"]
    """float32: 1 for EXACT, SPECIAL and GIVEN; else the calibrated similarity of the best match, 0 where there is none."""
    matches: Int[np.ndarray, "V_t"]
    """int32: the best match by co-occurrence, whether used or not; -1 for exact and special tokens, or without a vector."""
    frequency_shift: Float[np.ndarray, "V_t"]
    """float32: log frequency of the token, less the mean of those its head row is mixed from; 0 for exact, special and given
    ones. `initialization` moves head rows by it along the direction in which the source model's rows change with frequency."""
    source_log_frequency: Float[np.ndarray, "V_s"]
    """float32"""
    source_fingerprint: str
    target_fingerprint: str
    """SHA-256 of each vocabulary's canonical bytes."""

    @property
    def source_size(self) -> int:
        """V_s"""
        return self.embedding.source_size

    @property
    def target_size(self) -> int:
        """V_t"""
        return len(self.rules)

    def heaviest(self) -> Int[np.ndarray, "V_t"]:
        """int32: the source token with the largest weight in each embedding mixture, of equals the last.

        A MEAN row, which has none, gives the source token that most other rows point at.
        """
        indptr, ids, weights, source_size = self.embedding
        rows = np.repeat(np.arange(self.target_size), np.diff(indptr))
        last_of_each_row = np.lexsort((weights, rows))[indptr[1:] - 1]
        result = ids[last_of_each_row].copy()
        known = result < source_size
        result[~known] = np.bincount(result[known], minlength=1).argmax()
        return result


# --- making -----------------------------------------------------------------------------------------------------------


def run(
    config: Config,
    corpus_folder: Path,
    tokens_folder: Path,
    source_tokenizer: PreTrainedTokenizerBase,
    target_tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    log: Log,
) -> dict[str, Any]:
    """Makes the alignment (or takes `config.alignment.file`), writes it to `folder` and returns its summary.

    Args:
      corpus_folder: what `text.corpus.run` wrote; its held-out lines are scored.
      tokens_folder: what `text.tokenizing.run` wrote.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source, target = (TokenShards.open(tokens_folder / side) for side in ("source", "target"))
    if config.alignment.file:
        alignment, accuracy = load(Path(config.alignment.file), source_tokenizer, target_tokenizer), None
        log(f"alignment: taken from {config.alignment.file}")
    else:
        source_vectors, target_vectors, measured = vectors.make(config.alignment, source, target, config.seed, log)
        vectors.save(folder, source_vectors, target_vectors)
        alignment, accuracy = make(
            config.alignment,
            source_tokenizer,
            target_tokenizer,
            source_vectors,
            target_vectors,
            source.counts,
            target.counts,
            config.seed,
            log,
        )
    save(alignment, folder)
    result = summary(alignment, target.counts)
    if accuracy is not None:
        result |= {"accuracy_at_1": accuracy, **measured}
    lines = scoring.held_out_lines(corpus_folder, config.alignment.bleu_lines, config.seed)
    result["bleu_1"] = scoring.score(alignment.heaviest(), source_tokenizer, target_tokenizer, lines)
    (folder / SUMMARY_FILE).write_text(json.dumps(result, indent=1) + "\n")
    for line in describe(result):
        log(line)
    return result


def make(
    config: AlignmentConfig,
    source_tokenizer: PreTrainedTokenizerBase,
    target_tokenizer: PreTrainedTokenizerBase,
    source: Vectors,
    target: Vectors,
    source_counts: Int[np.ndarray, "V_s"],
    target_counts: Int[np.ndarray, "V_t"],
    seed: int,
    log: Log,
) -> tuple[Alignment, float | None]:
    """The alignment, and the share of judged shared tokens that find themselves (None where nothing was matched).

    Args:
      source_counts, target_counts: how often the corpus has each token.
    """
    parts, rules = _without_vectors(source_tokenizer, target_tokenizer)
    exact = {i: parts[i][0] for i in np.flatnonzero(rules == Rule.EXACT).tolist()}
    matches, scores, accuracy = similar_matches(config, source, target, exact, len(rules), seed, log)
    sure = np.isin(rules, (Rule.EXACT, Rule.SPECIAL))
    matches[sure], scores[sure] = -1, 1.0
    similar = (matches >= 0) & (scores >= config.similarity_threshold)
    rules[similar] = Rule.SIMILAR
    source_size = canonical.vocabulary_size(source_tokenizer)
    rows = [
        mix(pieces, int(match) if use else None, float(score), source_size)
        for pieces, match, use, score in zip(parts, matches, similar, scores)
    ]
    embedding, head = (_mixture(side, source_size) for side in zip(*rows))
    source_log, target_log = log_frequency(source_counts), log_frequency(target_counts)
    shift = np.where(sure, 0.0, target_log - apply(head, source_log[:, None])[:, 0]).astype(np.float32)
    fingerprints = canonical.fingerprint(source_tokenizer), canonical.fingerprint(target_tokenizer)
    return Alignment(embedding, head, rules, scores, matches, shift, source_log, *fingerprints), accuracy


def from_pieces(source_tokenizer: PreTrainedTokenizerBase, target_tokenizer: PreTrainedTokenizerBase) -> Alignment:
    """The rival that needs no corpus: exact matches, roles, and else the plain mean of the pieces for both matrices."""
    parts, rules = _without_vectors(source_tokenizer, target_tokenizer)
    source_size = canonical.vocabulary_size(source_tokenizer)
    rows = [Counter(pieces or [source_size]) for pieces in parts]
    mixture = _mixture(rows, source_size)
    return Alignment(
        embedding=mixture,
        head=mixture,
        rules=rules,
        scores=np.isin(rules, (Rule.EXACT, Rule.SPECIAL)).astype(np.float32),
        matches=np.full(len(rules), -1, np.int32),
        **_no_shift(source_size, len(rules)),
        source_fingerprint=canonical.fingerprint(source_tokenizer),
        target_fingerprint=canonical.fingerprint(target_tokenizer),
    )


def _no_shift(source_size: int, target_size: int) -> dict[str, np.ndarray]:
    return {
        "frequency_shift": np.zeros(target_size, np.float32),
        "source_log_frequency": np.zeros(source_size, np.float32),
    }


def _without_vectors(
    source_tokenizer: PreTrainedTokenizerBase, target_tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[int]], UInt8[np.ndarray, "V_t"]]:
    """For each target token the source tokens it is spelled with (one where it is exact or special), and its rule."""
    target_bytes = canonical.token_bytes(target_tokenizer)
    exact = exact_matches(source_tokenizer, target_bytes)
    special = special_matches(source_tokenizer, target_tokenizer)
    text = [_text_bytes(target_tokenizer, target_bytes, i) for i in range(len(target_bytes))]
    parts = canonical.PieceCutter(source_tokenizer).cut_all(text)
    rules = np.array([Rule.PIECES if pieces else Rule.MEAN for pieces in parts], np.uint8)
    for rule, found in ((Rule.EXACT, exact), (Rule.SPECIAL, special)):
        for target, source in found.items():
            parts[target], rules[target] = [source], rule
    return parts, rules


def mix(
    pieces: Sequence[int], match: int | None, similarity: float, source_size: int
) -> tuple[dict[int, float], dict[int, float]]:
    """Weights of source tokens in a target token's embedding row and in its head row.

    Args:
      pieces: the source tokens that spell it, in order; none where they cannot.
      match: the source token found by co-occurrence, with its calibrated similarity, or None.
    """
    if not pieces:
        row = {source_size if match is None else match: 1.0}
        return row, row
    to_the_last = PIECE_DECAY ** np.arange(len(pieces))[::-1]
    uniform = np.ones(len(pieces))
    result = []
    for weights, match_weight in ((to_the_last, MATCH_WEIGHT_EMBEDDING), (uniform, MATCH_WEIGHT_HEAD)):
        share = 0.0 if match is None else match_weight * similarity
        entries = [*zip(pieces, (1.0 - share) * weights / weights.sum()), *([(match, share)] if share > 0 else [])]
        row: dict[int, float] = {}
        for source, weight in entries:  # a token may be a piece twice
            row[source] = row.get(source, 0.0) + float(weight)
        result.append(row)
    return result[0], result[1]


def exact_matches(source_tokenizer: PreTrainedTokenizerBase, target_bytes: Sequence[bytes | None]) -> dict[int, int]:
    """Target id -> source id where the canonical bytes are the same."""
    source = canonical.index_by_bytes(source_tokenizer)
    return {i: source[content] for i, content in enumerate(target_bytes) if content in source}


def special_matches(
    source_tokenizer: PreTrainedTokenizerBase, target_tokenizer: PreTrainedTokenizerBase
) -> dict[int, int]:
    """Target id -> source id for special tokens that have a role, or that the source has under the same text."""
    end = end_of_text_id(source_tokenizer)
    found: dict[int, int] = {}
    for role in ROLES:
        target, source = (getattr(t, f"{role}_token_id", None) for t in (target_tokenizer, source_tokenizer))
        if target is not None:
            found.setdefault(int(target), end if source is None else int(source))
    sources, targets = canonical.special_ids(source_tokenizer), canonical.special_ids(target_tokenizer)
    by_text = {source_tokenizer.convert_ids_to_tokens(i): i for i in sources}
    for i in targets - set(found):
        text = target_tokenizer.convert_ids_to_tokens(i)
        if text in by_text:
            found[i] = by_text[text]
    return found


def similar_matches(
    config: AlignmentConfig,
    source: Vectors,
    target: Vectors,
    exact: dict[int, int],
    target_size: int,
    seed: int,
    log: Log,
) -> tuple[Int[np.ndarray, "V_t"], Float[np.ndarray, "V_t"], float | None]:
    """For every target token the best source token by co-occurrence (-1: no vector), its similarity, and accuracy@1."""
    matches, scores = np.full(target_size, -1, np.int32), np.zeros(target_size, np.float32)
    source_row = {int(token): row for row, token in enumerate(source.ids)}
    shared = np.array(
        [
            (source_row[exact[token]], row)
            for row, token in enumerate(target.ids.tolist())
            if exact.get(token) in source_row
        ],
        np.int32,
    ).reshape(-1, 2)
    if len(shared) < FEWEST_SHARED:
        log(f"matching: only {len(shared)} shared tokens have vectors; tokens without an exact match get their pieces")
        return matches, scores, None
    pivots, judges = matching.choose_pivots(shared[:, 0], shared[:, 1], config.pivots, seed)
    found = matching.match(source.vectors, target.vectors, shared[pivots], shared[judges], config.neighbours)
    log(
        f"matching: {len(target.ids):,} target tokens over {len(pivots):,} pivots; of {len(judges):,} other shared tokens "
        f"{found.accuracy:.1%} find themselves"
    )
    matches[target.ids], scores[target.ids] = source.ids[found.source], found.similarity
    return matches, scores, found.accuracy


def _text_bytes(tokenizer: PreTrainedTokenizerBase, contents: Sequence[bytes | None], index: int) -> bytes:
    """What a token's pieces are cut from: its bytes, of a special token its text; nothing for an unused id."""
    content = contents[index]
    if content is None and index in tokenizer.added_tokens_decoder:
        return str(tokenizer.added_tokens_decoder[index]).encode()
    return content or b""


def _mixture(rows: Sequence[Mapping[int, float]], source_size: int) -> Mixture:
    indptr = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    ids = np.fromiter((i for row in rows for i in row), np.int32, int(indptr[-1]))
    weights = np.fromiter((w for row in rows for w in row.values()), np.float64, int(indptr[-1]))
    sums = np.add.reduceat(weights, indptr[:-1])
    return Mixture(indptr, ids, (weights / np.repeat(sums, np.diff(indptr))).astype(np.float32), source_size)


def log_frequency(counts: Int[np.ndarray, "V"]) -> Float[np.ndarray, "V"]:
    """float32: log of each token's share of the corpus; a token that it never has counts a half."""
    return np.log((counts + 0.5) / max(int(counts.sum()), 1)).astype(np.float32)


def one_to_one(source_ids: Int[np.ndarray, "V_t"], source_size: int) -> Mixture:
    """The mixture in which each target token is one source token."""
    n = len(source_ids)
    return Mixture(np.arange(n + 1, dtype=np.int64), source_ids.astype(np.int32), np.ones(n, np.float32), source_size)


# --- using ------------------------------------------------------------------------------------------------------------


def apply(mixture: Mixture, rows: Float[np.ndarray, "R D"]) -> Float[np.ndarray, "V_t D"]:
    """float32: the rows that a mixture makes of the source model's `rows` (any float type; added up in float32).

    Args:
      rows: R >= V_s; a source matrix may be padded, and only its first V_s rows count for the mean.

    Raises:
      UserError: when the matrix has fewer rows than the source tokenizer has tokens.
    """
    source_size = mixture.source_size
    if rows.shape[0] < source_size:
        raise UserError(
            f"the source model's matrix has {rows.shape[0]:,} rows, its tokenizer {source_size:,} tokens: they do not belong "
            "together; give the model folder its own tokenizer"
        )
    rows = np.asarray(rows)
    mean = rows[:source_size].mean(axis=0, dtype=np.float64).astype(np.float32)
    result = np.empty((len(mixture.indptr) - 1, rows.shape[1]), np.float32)
    block = 8192
    for start in range(0, len(result), block):
        indptr = mixture.indptr[start : start + block + 1]
        ids, weights = mixture.ids[indptr[0] : indptr[-1]], mixture.weights[indptr[0] : indptr[-1]]
        parts = rows[np.where(ids < source_size, ids, 0)].astype(np.float32)
        parts[ids >= source_size] = mean
        parts *= weights[:, None]
        result[start : start + block] = np.add.reduceat(parts, indptr[:-1] - indptr[0], axis=0)
    return result


def summary(alignment: Alignment, target_counts: Int[np.ndarray, "V_t"]) -> dict[str, Any]:
    """Rows, and the share of the target corpus, by rule; and how many unmatched rows crowd at few source tokens.

    `hub_share` is of the tokens matched by co-occurrence and over the threshold; `hub_share_file` of all rows without an
    exact or special match, as `align_matrix.json` has them.
    """
    total = max(int(target_counts.sum()), 1)
    by_rule = {
        rule.name.lower(): {
            "rows": int(np.sum(alignment.rules == rule)),
            "frequency": float(target_counts[alignment.rules == rule].sum() / total),
        }
        for rule in Rule
    }
    unmatched = ~np.isin(alignment.rules, (Rule.EXACT, Rule.SPECIAL))
    return {
        "target_size": alignment.target_size,
        "source_size": alignment.source_size,
        "rules": by_rule,
        "hub_share": scoring.hub_share(alignment.matches[alignment.rules == Rule.SIMILAR], HUBS),
        "hub_share_file": scoring.hub_share(alignment.heaviest()[unmatched], HUBS),
    }


def describe(result: dict[str, Any]) -> list[str]:
    """The summary for a person: a few lines."""
    lines = [f"alignment: {result['target_size']:,} target tokens of {result['source_size']:,} source tokens"]
    for name, part in result["rules"].items():
        if part["rows"]:
            lines.append(f"  {name:8} {part['rows']:9,} rows  {part['frequency']:7.2%} of the corpus")
    lines.append(
        f"  hub share {result['hub_share']:.1%} of similar, {result['hub_share_file']:.1%} of all unmatched rows"
    )
    lines += [f"  BLEU-1 {result['bleu_1']:.3f}"] if "bleu_1" in result else []
    return lines


# --- files ------------------------------------------------------------------------------------------------------------


def save(alignment: Alignment, folder: Path) -> None:
    """Writes `align_matrix.json` and `alignment.npz`, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = asdict(alignment)
    for side in ("embedding", "head"):
        del arrays[side]
        arrays |= {f"{side}_{name}": array for name, array in getattr(alignment, side)._asdict().items()}
    _write(folder / FILE, lambda path: np.savez_compressed(path, **arrays))
    published = {str(target): int(source) for target, source in enumerate(alignment.heaviest())}
    _write(folder / JSON_FILE, lambda path: path.write_text(json.dumps(published)))


def load(path: Path, source_tokenizer: PreTrainedTokenizerBase, target_tokenizer: PreTrainedTokenizerBase) -> Alignment:
    """Reads an alignment: a folder that `save` wrote, its `alignment.npz`, or any `align_matrix.json`.

    Raises:
      UserError: when it cannot be read, or is of another vocabulary than the two tokenizers'.
    """
    path = Path(path)
    if path.is_dir():
        path = path / (FILE if (path / FILE).exists() else JSON_FILE)
    try:
        read = _read_json if path.suffix == ".json" else _read_npz
        return read(path, source_tokenizer, target_tokenizer)
    except (OSError, ValueError, KeyError, AttributeError, EOFError) as error:
        raise UserError(
            f"the alignment '{path}' cannot be read ({type(error).__name__}: {error}): it must be an {FILE} that this program "
            f'wrote, or an {JSON_FILE} of the form {{"target_id": source_id}}'
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
    for side, tokenizer, size, found in (
        ("source", source_tokenizer, alignment.source_size, alignment.source_fingerprint),
        ("target", target_tokenizer, alignment.target_size, alignment.target_fingerprint),
    ):
        if canonical.fingerprint(tokenizer) != found:
            raise UserError(
                _other_vocabulary(path, side, tokenizer, f"is of another {side} vocabulary, of {size:,} tokens")
            )
    return alignment


def _read_json(path: Path, source_tokenizer, target_tokenizer) -> Alignment:
    entries = {int(target): int(source) for target, source in json.loads(path.read_text()).items()}
    source_size, target_size = (canonical.vocabulary_size(t) for t in (source_tokenizer, target_tokenizer))
    if sorted(entries) != list(range(target_size)):
        raise UserError(_other_vocabulary(path, "target", target_tokenizer, f"has {len(entries):,} rows"))
    largest = max(entries.values())
    if not 0 <= min(entries.values()) <= largest < source_size:
        raise UserError(_other_vocabulary(path, "source", source_tokenizer, f"names source token {largest:,}"))
    mixture = one_to_one(np.array([entries[i] for i in range(target_size)]), source_size)
    return Alignment(
        embedding=mixture,
        head=mixture,
        rules=np.full(target_size, Rule.GIVEN, np.uint8),
        scores=np.ones(target_size, np.float32),
        matches=np.full(target_size, -1, np.int32),
        **_no_shift(source_size, target_size),
        source_fingerprint=canonical.fingerprint(source_tokenizer),
        target_fingerprint=canonical.fingerprint(target_tokenizer),
    )


def _other_vocabulary(path: Path, side: str, tokenizer: PreTrainedTokenizerBase, what: str) -> str:
    return (
        f"the {side} tokenizer '{tokenizer.name_or_path}' has {canonical.vocabulary_size(tokenizer):,} tokens, the alignment "
        f"'{path}' {what}: it belongs to another {side} tokenizer; name that one, or leave alignment.file empty to make an "
        f"alignment for this pair"
    )


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """`path`, whole or not at all."""
    part = path.with_name(f"partial-{path.name}")
    write(part)
    os.replace(part, path)
