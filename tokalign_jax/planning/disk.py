"""Disk space of a run's workdir."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from tokalign_jax.config import SELF, Config, learns_from_source, training_stages
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.transformer import abstract_params
from tokalign_jax.planning.memory import FLOAT, parameters, shapes
from tokalign_jax.text import corpus
from tokalign_jax.training.optimizer import moment_shapes

BYTES_PER_TOKEN = 4
"""UTF-8 bytes of a token of ordinary text, to estimate how many tokens there will be."""


def free_bytes(folder: Path) -> int:
    """Free bytes of the disk that a folder is on, or will be on once it is made."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def text_bytes(config: Config) -> int:
    """UTF-8 bytes of text that a run keeps, estimated from file sizes."""
    files = [Path(name) for name in corpus.names(config)]
    # Compressed text expands to about five times its size; a hub dataset only has a budget.
    sizes = [
        5 * file.stat().st_size if file.exists() else config.text.budget_bytes
        for file in files
        if file != Path(SELF)
    ]
    if corpus.has_self(config):
        sizes.append(config.text.self_tokens * BYTES_PER_TOKEN)
    return min(config.text.budget_bytes, sum(sizes))


def stored_bytes(raw: Mapping[str, Any]) -> int:
    """Bytes of a parameter in the source's folder, from its config.json."""
    return jnp.dtype(_dtype(raw)).itemsize


def _dtype(raw: Mapping[str, Any]) -> str:
    return raw.get("dtype") or raw.get("torch_dtype") or "float32"


def exported_bytes(config: Config, raw: Mapping[str, Any]) -> int:
    """Bytes of a parameter in the exported folder, from the source's config.json (`raw`)."""
    return jnp.dtype(
        _dtype(raw) if config.export.dtype == "source" else config.export.dtype
    ).itemsize


def disk_bytes(config: Config, model: ModelConfig, text: int, exported: int) -> dict[str, int]:
    """Bytes by folder of the workdir.

    Args:
      model: with the target vocabulary's rows.
      text: UTF-8 bytes of text that are kept (`text_bytes`).
      exported: bytes of a parameter in the exported folder (`exported_bytes`).
    """
    everything = parameters(abstract_params(model))
    disk = {
        "corpus": text // 3,  # compressed
        # Source token ids in two or four bytes, target ids by the number of rows.
        "tokens": text // BYTES_PER_TOKEN * (FLOAT + (2 if model.vocab_size <= 1 << 16 else FLOAT)),
        "init": FLOAT * everything,
    }
    if any(learns_from_source(stage) for stage in training_stages(config).values()):
        disk["boundaries"] = text // BYTES_PER_TOKEN * FLOAT
    for name, stage in training_stages(config).items():
        # What trains and Adam's two moments. A checkpoint is written before the oldest is deleted;
        # the one with the lowest validation loss stays besides the newest.
        count = stage.checkpoints.keep + 1 + bool(stage.validation_every)
        trained, _ = shapes(model, stage)
        moments = jax.tree.leaves(moment_shapes(stage, trained))
        each = FLOAT * parameters(trained) + sum(x.size * x.dtype.itemsize for x in moments)
        disk[name] = each * count
    return {**disk, "export": exported * everything}
