"""Models and tokenizers that a run reads, each opened on first use."""

import dataclasses
import fnmatch
import functools
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tokalign_jax import demo
from tokalign_jax.config import DERIVED, EXTEND, PRUNE, Config, training_stages
from tokalign_jax.models import hub
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.planning.memory import teachers
from tokalign_jax.text import mining, pruning, tokenizing
from tokalign_jax.text.canonical import vocabulary_size
from tokalign_jax.text.chats import with_template
from tokalign_jax.text.editing import within_rows
from tokalign_jax.utils.progress import Log


class Inputs:
    """The models and tokenizers that a config names."""

    def __init__(self, config: Config, workdir: Path, log: Log):
        """Store the names of the inputs, without opening them.

        Args:
          workdir: holds the target tokenizer if a stage of the run makes it.
        """
        self.config, self._workdir, self._log = config, workdir, log

    @cached_property
    def source_folder(self) -> Path:
        """Folder of the source model."""
        return hub.resolve(demo.source_model(self.config.source_model), what="source_model")

    @property
    def extends(self) -> bool:
        """True if the target tokenizer is the source's with added tokens."""
        return self.config.target_tokenizer == EXTEND

    @property
    def prunes(self) -> bool:
        """True if the target tokenizer is the source's with tokens removed."""
        return self.config.target_tokenizer == PRUNE

    @property
    def derives(self) -> bool:
        """True if a stage of the run makes the target tokenizer."""
        return self.config.target_tokenizer in DERIVED

    @cached_property
    def target_folder(self) -> Path:
        """Folder of the target tokenizer."""
        if self.derives:
            return self._workdir / self.config.target_tokenizer
        return hub.resolve(
            demo.target_tokenizer(self.config.target_tokenizer),
            what="target_tokenizer",
            weights=False,
        )

    @cached_property
    def source_model(self) -> tuple[ModelConfig, dict[str, Any]]:
        """Config of the source model, and its config.json."""
        return hub.load_config(self.source_folder)

    @cached_property
    def teacher_folder(self) -> Path | None:
        """Folder of Stage 3's teacher; None without that stage."""
        if "stage3" not in training_stages(self.config):
            return None
        return hub.resolve(self.config.stage3.teacher, what="stage3.teacher")

    @cached_property
    def teacher_model(self) -> ModelConfig | None:
        """Config of Stage 3's teacher; None without one."""
        return hub.load_config(self.teacher_folder)[0] if self.teacher_folder else None

    @property
    def teachers(self) -> dict[str, ModelConfig]:
        """Configs of the teachers of training stages, by stage."""
        return teachers(self.config, self.source_model[0], self.teacher_model)

    @cached_property
    def donor_folder(self) -> Path | None:
        """Folder of method `omp`'s donor model; None for other methods."""
        if self.config.alignment.method != "omp" or self.config.alignment.file:
            return None
        return hub.resolve(self.config.alignment.donor, what="alignment.donor")

    @cached_property
    def source_tokenizer(self) -> PreTrainedTokenizerBase:
        """The source tokenizer, without tokens that the model has no rows for."""
        original, rows = open_tokenizer(self.source_folder), self.source_model[0].vocab_size
        tokenizer = within_rows(original, rows, f"source_model '{self.config.source_model}'")
        if tokenizer is not original:
            removed = set(original.get_vocab()) - set(tokenizer.get_vocab())
            self._log(
                f"source_model: it has no rows for {len(removed)} tokens, which are left out: "
                f"{', '.join(sorted(removed)[:5])}"
            )
        return tokenizer

    @cached_property
    def target_tokenizer(self) -> PreTrainedTokenizerBase:
        """The target tokenizer, with an end of text and a chat template."""
        original = open_tokenizer(self.target_folder, self.config.end_of_text)
        tokenizer = with_template(original, self.source_tokenizer, self.config.chat)
        if tokenizer is not original:
            added = sorted(set(tokenizer.get_vocab()) - set(original.get_vocab()))
            self._log(
                "chat: the new model has the source's chat template"
                + (f"; special tokens added for it: {', '.join(added)}" if added else "")
            )
        if tokenizer.eos_token_id is None:
            # The exported model stops at the token that ends documents in training.
            end_of_text = tokenizing.end_of_text_id(tokenizer)
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end_of_text)
        return tokenizer

    @cached_property
    def target_size(self) -> int:
        """Number of the target tokenizer's ids; the maximum if it does not exist yet."""
        if self.extends:
            return mining.largest_size(self.config, self.source_tokenizer)
        if self.prunes and not (self.target_folder / pruning.KEPT).is_file():
            return vocabulary_size(self.source_tokenizer)
        return vocabulary_size(self.target_tokenizer)

    @cached_property
    def kept(self) -> int:
        """Number of leading rows that are the source's: all of them if it is extended, else 0."""
        return vocabulary_size(self.source_tokenizer) if self.extends else 0

    @cached_property
    def new_model(self) -> ModelConfig:
        """Config of the source model with `target_size` rows."""
        return dataclasses.replace(self.source_model[0], vocab_size=self.target_size)


def model_files(folder: Path) -> list[Path]:
    """Return the files in a model's folder that its outputs depend on."""
    return sorted(f for f in folder.iterdir() if f.suffix in (".json", ".safetensors"))


def open_tokenizer(folder: Path, end_of_text: str = "") -> PreTrainedTokenizerBase:
    """Open a folder's tokenizer; it is cached until its files change, for the runs of a sweep."""
    stamps = tuple(
        (file.name, file.stat().st_mtime_ns, file.stat().st_size)
        for file in tokenizer_files(folder)
    )
    return _read_tokenizer(folder, end_of_text, stamps)


@functools.lru_cache(maxsize=4)
def _read_tokenizer(folder: Path, end_of_text: str, stamps: Any) -> PreTrainedTokenizerBase:
    del stamps
    return hub.load_tokenizer(folder, end_of_text)


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files of a tokenizer in a folder that may also hold a model and licences."""
    others = (*hub.LICENSE_FILES, "config*", "generation*", hub.INDEX_FILE)
    return sorted(
        f
        for f in folder.iterdir()
        if _matches(f.name, hub.TOKENIZER_FILES) and not _matches(f.name, others)
    )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
