"""Token vectors of both vocabularies, from co-occurrence in the corpus or from files."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from tokalign_jax.alignment import cooccurrence, glove, matching, ppmi
from tokalign_jax.alignment.cooccurrence import Cooccurrence
from tokalign_jax.config import AlignmentConfig
from tokalign_jax.errors import UserError
from tokalign_jax.text.tokenizing import TokenShards
from tokalign_jax.utils.progress import Log

FILE = "vectors.npz"
FEWEST_COLUMNS = 32
"""Fewest shared tokens that PPMI factors both sides over; with fewer, each side is factored alone.
"""
FORMATS = (
    "an .npz with ids [n] and vectors [n, d], or GloVe's text format with token ids for words (see "
    "config.AlignmentConfig)"
)


class Vectors(NamedTuple):
    """Token vectors of one side, sorted by frequency."""

    ids: Int[np.ndarray, "n"]
    vectors: Float[np.ndarray, "n d"]


def make(
    config: AlignmentConfig,
    source: TokenShards,
    target: TokenShards,
    seed: int,
    log: Log,
    shared: Int[np.ndarray, "S 2"] | None = None,
    folder: Path | None = None,
) -> tuple[Vectors, Vectors, dict[str, Any]]:
    """Compute or read vectors of tokens seen `min_count` times or more.

    Args:
      config: method and settings, or files.
      source: the text in source tokens.
      target: the text in target tokens.
      seed: of training.
      log: receives progress.
      shared: ids (source, target) of tokens of the same bytes. `ppmi` puts both sides on the same
        axes with them, leaving out the validation pairs of `matching.choose_pivots`. None: each
        side alone.
      folder: for co-occurrences that do not fit into memory; None: the system's temporary folder.

    Returns:
      Source vectors, target vectors, and measurements by name.

    Raises:
      UserError: invalid files of vectors.
    """
    files = check(config, len(source.counts), len(target.counts))
    if files is not None:
        vectors = [
            _by_frequency(side, shards.counts) for side, shards in zip(files, (source, target))
        ]
        log(
            f"vectors: {len(vectors[0].ids):,} of the source and {len(vectors[1].ids):,} of the "
            "target read from files"
        )
        return vectors[0], vectors[1], {}
    resources = cooccurrence.Resources(scratch=folder)
    counts = {
        side: cooccurrence.count(
            shards, config.window, config.min_count, log, f"{side} co-occurrence", resources
        )
        for side, shards in (("source", source), ("target", target))
    }
    if not all(len(side.vocabulary) for side in counts.values()):
        log(
            f"vectors: no token occurs min_count={config.min_count} times in the text; nothing "
            "can be matched by co-occurrence"
        )
        rows = [np.zeros((len(side.vocabulary), 1), np.float32) for side in counts.values()]
        measured = {}
    elif config.vectors == "ppmi":
        rows, measured = _by_ppmi(config, list(counts.values()), shared, seed, log, folder)
    else:
        rows, measured = _by_glove(config, counts, seed, log)
    source_vectors, target_vectors = map(
        Vectors, (side.vocabulary for side in counts.values()), rows
    )
    return source_vectors, target_vectors, measured


def _by_glove(
    config: AlignmentConfig, counts: Mapping[str, Cooccurrence], seed: int, log: Log
) -> tuple[list[Float[np.ndarray, "n d"]], dict[str, Any]]:
    trained = [
        glove.train(side, config, seed + offset, log, f"{name} GloVe")
        for offset, (name, side) in enumerate(counts.items())
    ]
    losses = {name: loss for name, (_, loss) in zip(counts, trained)}
    return [vectors for vectors, _ in trained], {"glove_loss": losses}


def _by_ppmi(
    config: AlignmentConfig,
    sides: list[Cooccurrence],
    shared: Int[np.ndarray, "S 2"] | None,
    seed: int,
    log: Log,
    folder: Path | None,
) -> tuple[list[Float[np.ndarray, "n d"]], dict[str, Any]]:
    columns = contexts(config, sides[0], sides[1], shared, seed)
    if columns is not None:
        vectors = ppmi.train(
            sides, [columns[:, 0], columns[:, 1]], config.vector_size, seed, log, folder=folder
        )
        return vectors, {"ppmi_shared_contexts": len(columns)}
    log("PPMI: too few shared tokens to be contexts of both sides; each side is factored alone")
    columns_by_side = [np.arange(min(ppmi.COLUMNS, len(side.vocabulary))) for side in sides]
    return [
        ppmi.train([side], [c], config.vector_size, seed, log, folder=folder)[0]
        for side, c in zip(sides, columns_by_side)
    ], {"ppmi_shared_contexts": 0}


def contexts(
    config: AlignmentConfig,
    source: Cooccurrence,
    target: Cooccurrence,
    shared: Int[np.ndarray, "S 2"] | None,
    seed: int,
) -> Int[np.ndarray, "P 2"] | None:
    """Return indices (source, target) of shared tokens that serve as contexts.

    Validation pairs are excluded; None if too few tokens remain.
    """
    if shared is None:
        return None
    rows = shared_rows(source.vocabulary, target.vocabulary, shared)
    _, validation = matching.choose_pivots(rows[:, 0], rows[:, 1], len(rows), seed)
    columns = ppmi.shared_columns(rows, validation)
    return columns if len(columns) >= FEWEST_COLUMNS else None


def shared_rows(
    source_ids: Int[np.ndarray, "n"],
    target_ids: Int[np.ndarray, "m"],
    shared: Int[np.ndarray, "S 2"],
) -> Int[np.ndarray, "R 2"]:
    """Return rows (source, target) of the `shared` ids that have vectors on both sides."""
    places = []
    for ids, shared_ids in ((source_ids, shared[:, 0]), (target_ids, shared[:, 1])):
        place = np.full(max(ids.max(initial=-1), shared_ids.max(initial=-1)) + 1, -1, np.int32)
        place[ids] = np.arange(len(ids))
        places.append(place[shared_ids])
    rows = np.stack(places, axis=1)
    rows = rows[(rows >= 0).all(axis=1)]
    return rows[np.lexsort((rows[:, 1], rows[:, 0]))]


# --- Vectors from files -------------------------------------------------------------------------


def check(
    config: AlignmentConfig, source_size: int, target_size: int
) -> tuple[Vectors, Vectors] | None:
    """Read and validate the vectors that the config names; None if it names none.

    Args:
      config: names the files.
      source_size: tokens of the source vocabulary.
      target_size: tokens of the target vocabulary.

    Raises:
      UserError: only one file is named, or a file is missing, malformed, not finite, or has
        duplicate ids or ids out of range.
    """
    paths = {
        "alignment.source_vectors": config.source_vectors,
        "alignment.target_vectors": config.target_vectors,
    }
    if config.method == "focus" and config.target_vectors:  # FOCUS needs no source vectors.
        target = read(Path(config.target_vectors), target_size, "alignment.target_vectors")
        return Vectors(np.zeros(0, np.int32), target.vectors[:0]), target
    missing = [name for name, path in paths.items() if not path]
    if len(missing) == 2:
        return None
    if missing:
        raise UserError(f"{missing[0]} is missing: give files for both sides or for neither")
    source, target = (
        read(Path(path), size, name)
        for (name, path), size in zip(paths.items(), (source_size, target_size))
    )
    return source, target


def read(path: Path, size: int, name: str) -> Vectors:
    """Read vectors of one side, float32; a vector of zeros is none.

    Args:
      path: the file.
      size: tokens of the vocabulary that the ids belong to.
      name: the setting, for messages.

    Raises:
      UserError: the file is missing, malformed, not finite, all zero, or has duplicate ids or ids
        out of range.
    """
    try:
        ids, vectors = _read_npz(path) if path.suffix == ".npz" else _read_text(path)
    except Exception as error:  # zip and zlib have many types
        raise UserError(
            f"{name}: '{path}' cannot be read as token vectors ({error}); give {FORMATS}"
        ) from error
    if (
        vectors.ndim != 2
        or ids.shape != vectors.shape[:1]
        or not vectors.size
        or ids.dtype.kind not in "iu"
    ):
        raise UserError(
            f"{name}: '{path}' has ids {ids.dtype}{list(ids.shape)} and vectors "
            f"{vectors.dtype}{list(vectors.shape)}; give {FORMATS}"
        )
    outside = ids[(ids < 0) | (ids >= size)]
    if len(outside):
        raise UserError(
            f"{name}: '{path}' has the token id {outside[0]}, but that vocabulary has ids 0 to "
            f"{size - 1}: were these vectors made with another tokenizer, or are the two files "
            "swapped?"
        )
    unique, times = np.unique(ids, return_counts=True)
    if len(unique) < len(ids):
        raise UserError(
            f"{name}: '{path}' has the token id {unique[times > 1][0]} more than once; leave only "
            "one of them"
        )
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise UserError(
            f"{name}: the vector of token id {ids[bad[0]]} in '{path}' is not finite; correct or "
            "remove it"
        )
    # Other programs write zeros for tokens that they have no vector of.
    has_vector = vectors.any(axis=1)
    if not has_vector.any():
        raise UserError(f"{name}: all vectors in '{path}' are zero; compute them again")
    return Vectors(ids[has_vector].astype(np.int32), vectors[has_vector])


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(path, allow_pickle=False) as arrays:
        return arrays["ids"], arrays["vectors"].astype(np.float32)


def _read_text(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read lines `id x1 ... xd`; GloVe's last line, `<unk>`, is skipped."""
    ids, rows = [], []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            word, *numbers = line.split()
            if word == "<unk>":
                continue
            try:
                ids.append(int(word))
                rows.append(np.array(numbers, np.float32))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
            if len(rows[-1]) != len(rows[0]):
                raise ValueError(
                    f"line {number} has {len(rows[-1])} numbers, line 1 {len(rows[0])}"
                )
    return np.array(ids, np.int64), np.array(rows, np.float32)


def _by_frequency(side: Vectors, counts: Int[np.ndarray, "V"]) -> Vectors:
    order = np.argsort(-counts[side.ids], kind="stable")
    return Vectors(side.ids[order], side.vectors[order])


def save(folder: Path, source: Vectors, target: Vectors) -> None:
    """Write ids and vectors of both sides to `vectors.npz`.

    They are stored in float16 if they fit, which keeps 3 digits of cosines.
    """
    arrays = {}
    for side, vectors in (("source", source), ("target", target)):
        fits = np.abs(vectors.vectors).max(initial=0.0) < np.finfo(np.float16).max
        stored = vectors.vectors.astype(np.float16 if fits else np.float32)
        arrays |= {f"{side}_ids": vectors.ids, f"{side}_vectors": stored}
    part = folder / f"partial-{FILE}"
    np.savez(part, allow_pickle=False, **arrays)
    os.replace(part, folder / FILE)
