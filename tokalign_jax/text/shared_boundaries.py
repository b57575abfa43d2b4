"""Shared boundaries of the token shards: for each target token, the source token that ends with it.

The shards of both sides have the same documents. Where a source token and a target token end at the
same place of the text (`boundaries.py`), both models have read the same text, and the source model
can teach the new one. The artifact is `positions.bin` (int32 or int64 for each target token: the
position of the source token in the source's shards, or `NONE`) and `index.json`.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from tokalign_jax.errors import UserError
from tokalign_jax.text import chats, corpus
from tokalign_jax.text.boundaries import NONE, Boundaries, shared_boundaries
from tokalign_jax.text.tokenizing import TokenShards
from tokalign_jax.utils.progress import Log, Progress

_POSITIONS, _INDEX = "positions.bin", "index.json"


def run(
    documents: Iterable[Sequence[corpus.Document]],
    source: tuple[PreTrainedTokenizerBase, TokenShards],
    target: tuple[PreTrainedTokenizerBase, TokenShards],
    folder: Path,
    log: Log,
) -> dict[str, Any]:
    """Find the shared boundaries of the training documents; return the content of `index.json`.

    Args:
      documents: in groups, in the order of the shards (`corpus.train_batches`).
      source: the source tokenizer and its shards of the documents.
      target: the target tokenizer and its shards of the documents.
      folder: receives the artifact.
      log: receives progress.
    """
    shards = source[1], target[1]
    encoders = [chats.Encoder(tokenizer, target[0]) for tokenizer, _ in (source, target)]
    kind = np.dtype("<i4" if len(shards[0]) < 1 << 31 else "<i8")
    progress = Progress(log, "boundaries", len(shards[1]), "tokens")
    shared = 0
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _INDEX).unlink(missing_ok=True)  # Written last, to mark a complete artifact.
    with (folder / _POSITIONS).open("wb") as file, ThreadPoolExecutor(2) as pool:
        bounds = zip(*(_bounds(side) for side in shards))
        for group in documents:
            columns = [d.text for d in group], [d.chat for d in group]
            sides = pool.map(
                lambda encoder, columns=columns: encoder.boundaries(*columns), encoders
            )
            for (one, other), (source_span, target_span) in zip(zip(*sides), bounds):
                positions = _positions(one, other, source_span, target_span).astype(kind)
                shared += int((positions != NONE).sum())
                file.write(positions.tobytes())
                progress.update(len(positions))
    share = shared / max(len(shards[1]), 1)
    progress.done(f"{share:.1%} of the target tokens end with a source token")
    index = {"dtype": kind.name, "tokens": len(shards[1]), "shared": shared}
    (folder / _INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return index


def open_positions(folder: Path) -> Int[np.ndarray, "tokens"]:
    """Open the positions written by `run`, memory-mapped.

    Raises:
      UserError: the folder does not contain all of them.
    """
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        kind = np.dtype(index["dtype"]).newbyteorder("<")
        positions = np.memmap(folder / _POSITIONS, dtype=kind, mode="r")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"'{folder}' holds no shared boundaries ({error}): run the boundaries stage again"
        ) from error
    if len(positions) != index["tokens"]:
        raise UserError(
            f"the shared boundaries in '{folder}' are incomplete: {len(positions):,} of "
            f"{index['tokens']:,} tokens: run the boundaries stage again"
        )
    return positions


def _bounds(shards: TokenShards) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) of each document in the shards."""
    ends = shards.documents.tolist()
    return zip([0, *ends], ends)


def _positions(
    source: Boundaries,
    target: Boundaries,
    source_span: tuple[int, int],
    target_span: tuple[int, int],
) -> Int[np.ndarray, "n"]:
    """Return positions of the source tokens that end with a document's target tokens.

    End-of-text is included, which is shared.
    """
    for side, (begin, end) in ((source, source_span), (target, target_span)):
        if len(side.ids) != end - begin - 1:
            raise ValueError(f"a document of {end - begin - 1} tokens now has {len(side.ids)}")
    positions = np.full(target_span[1] - target_span[0], NONE, np.int64)
    source_places, target_places = shared_boundaries(source.ends, target.ends)
    positions[target_places] = source_span[0] + source_places
    positions[-1] = source_span[1] - 1
    return positions
