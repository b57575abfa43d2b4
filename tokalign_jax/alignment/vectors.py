"""Token vectors of both sides, from co-occurrence in the same corpus."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from tokalign_jax.alignment import cooccurrence, glove
from tokalign_jax.config import AlignmentConfig
from tokalign_jax.progress import Log
from tokalign_jax.text.tokenizing import TokenShards

FILE = "vectors.npz"


class Vectors(NamedTuple):
    """Token vectors of one side, by falling frequency."""

    ids: Int[np.ndarray, "n"]
    vectors: Float[np.ndarray, "n d"]


def make(
    config: AlignmentConfig, source: TokenShards, target: TokenShards, seed: int, log: Log
) -> tuple[Vectors, Vectors, dict[str, Any]]:
    """Vectors of the source and the target tokens seen `min_count` times or more, and what was measured on the way."""
    made, losses = {}, {}
    for offset, (side, shards) in enumerate((("source", source), ("target", target))):
        counts = cooccurrence.count(shards, config.window, config.min_count, log, f"{side} co-occurrence")
        found, losses[side] = glove.train(counts, config, seed + offset, log, f"{side} GloVe")
        made[side] = Vectors(counts.vocabulary, found)
    return made["source"], made["target"], {"glove_loss": losses}


def save(folder: Path, source: Vectors, target: Vectors) -> None:
    """Writes `vectors.npz`: both sides' ids and vectors; float16 keeps cosines to three digits at half the size."""
    arrays = {}
    for side, vectors in (("source", source), ("target", target)):
        arrays |= {f"{side}_ids": vectors.ids, f"{side}_vectors": vectors.vectors.astype(np.float16)}
    part = folder / f"partial-{FILE}"
    np.savez(part, allow_pickle=False, **arrays)
    os.replace(part, folder / FILE)
