"""What each stage of the pipeline reads and writes: the thin layer of I/O around the pure core."""

import dataclasses
import fnmatch
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from tokalign_jax import demo
from tokalign_jax.alignment import alignment, methods, vectors
from tokalign_jax.config import (
    AUTO,
    EXTEND,
    Config,
    DistillationConfig,
    StageConfig,
    distillation_budget,
    distills,
    distills_tokens,
    reads_source,
    teacher_of,
    training_stages,
)
from tokalign_jax.errors import UserError
from tokalign_jax.evaluation import abilities, bits_per_byte, measures, overlap, samples
from tokalign_jax.initialization import contexts, initialization
from tokalign_jax.models import hub, huggingface, opening
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.families import qwen
from tokalign_jax.parallel import distributed, sharding
from tokalign_jax.planning import advice, disk, memory, resolve
from tokalign_jax.planning.inference import Run, Source
from tokalign_jax.planning.machine import Machine
from tokalign_jax.planning.memory import Setup
from tokalign_jax.reporting import card_facts, inspection, pages, token_pieces
from tokalign_jax.reporting import report as reporting
from tokalign_jax.reporting.model_card import CARD, model_card
from tokalign_jax.text import canonical, mining, numbers, tokenizing
from tokalign_jax.text import corpus as documents
from tokalign_jax.text.canonical import vocabulary_size
from tokalign_jax.text.editing import within_rows
from tokalign_jax.training import distillation, loop
from tokalign_jax.training import states as training_states
from tokalign_jax.training.step import NEXT_TOKEN, Objective
from tokalign_jax.utils.digests import Digests
from tokalign_jax.utils.progress import Log

FORMAT = 4
"""Version of the artefacts: a workdir of another version is redone."""
INSPECTION = "inspection.json"
"""In the folder of an alignment: the tables on it that a report shows."""


class Context:
    """A run's config, folders and outside inputs, each loaded when first asked for."""

    def __init__(self, config: Config, workdir: Path, log: Log, digests: Digests | None = None):
        self.config, self.workdir, self.log = config, workdir, log
        self.digests = digests or Digests(workdir, log)

    def folder(self, stage: str) -> Path:
        return self.workdir / stage

    @cached_property
    def source_folder(self) -> Path:
        return hub.resolve(demo.source_model(self.config.source_model), what="source_model")

    @property
    def extends(self) -> bool:
        """Whether the target tokenizer is the source's with more tokens; there is none before the stage `extend` is done."""
        return self.config.target_tokenizer == EXTEND

    @cached_property
    def target_folder(self) -> Path:
        if self.extends:
            return self.folder("extend")
        return hub.resolve(
            demo.target_tokenizer(self.config.target_tokenizer),
            what="target_tokenizer",
            weights=False,
        )

    @cached_property
    def source_model(self) -> tuple[ModelConfig, dict[str, Any]]:
        return hub.load_config(self.source_folder)

    @cached_property
    def teacher_folder(self) -> Path | None:
        """Of the model that teaches in Stage 3; None without that stage."""
        if "stage3" not in training_stages(self.config):
            return None
        return hub.resolve(self.config.stage3.teacher, what="stage3.teacher")

    @cached_property
    def teacher_model(self) -> ModelConfig | None:
        return hub.load_config(self.teacher_folder)[0] if self.teacher_folder else None

    @cached_property
    def donor_folder(self) -> Path | None:
        """Of the model that method `omp` finds its combinations in; None for other methods."""
        if self.config.alignment.method != "omp" or self.config.alignment.file:
            return None
        return hub.resolve(self.config.alignment.donor, what="alignment.donor")

    @cached_property
    def source_tokenizer(self) -> PreTrainedTokenizerBase:
        """Without the tokens that the model has no rows for."""
        whole, rows = _tokenizer(self.source_folder), self.source_model[0].vocab_size
        known = within_rows(whole, rows, f"source_model '{self.config.source_model}'")
        if known is not whole:
            gone = set(whole.get_vocab()) - set(known.get_vocab())
            self.log(
                f"source_model: it has no rows for {len(gone)} tokens, which are left out: {', '.join(sorted(gone)[:5])}"
            )
        return known

    @cached_property
    def target_tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = _tokenizer(self.target_folder, self.config.end_of_text)
        if (
            tokenizer.eos_token_id is None
        ):  # what ends documents in training is to end what the exported model writes
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(
                tokenizing.end_of_text_id(tokenizer)
            )
        return tokenizer

    @cached_property
    def target_size(self) -> int:
        """Ids of the target tokenizer; of one that is yet to be made as many as it may have."""
        if self.extends:
            return mining.largest_size(self.config, self.source_tokenizer)
        return vocabulary_size(self.target_tokenizer)

    @cached_property
    def kept(self) -> int:
        """The first rows of the new vocabulary that are the source's: all of these where it is extended."""
        return vocabulary_size(self.source_tokenizer) if self.extends else 0

    @cached_property
    def new_model(self) -> ModelConfig:
        """The source model with rows for the target's tokens (`target_size`)."""
        return dataclasses.replace(self.source_model[0], vocab_size=self.target_size)

    @cached_property
    def mesh(self) -> Mesh:
        """All devices, with as many parts as it takes for the training state of every stage to fit (`config.mesh`)."""
        stages, devices = training_stages(self.config).values(), jax.devices()
        if distributed.count() == 1:
            taken = sharding.usable(
                self.config.mesh, len(devices), [stage.batch_size for stage in stages]
            )
            if taken < len(devices):
                self.log(
                    f"{taken} of {len(devices)} devices are used: more do not divide the sequences of a step; a batch_size that "
                    f"is a multiple of {len(devices)} would use all"
                )
            devices = devices[:taken]
        needed = memory.state_bytes(self.config, self.new_model, self.teacher_model)
        share = functools.partial(memory.share, self.new_model)
        mesh = sharding.make_mesh(self.config.mesh, needed, devices, share)
        for warning in advice.not_split(self.new_model, mesh.devices.shape):
            self.log(f"warning: {warning}")
        return mesh

    @cached_property
    def questions(self) -> list[abilities.Question]:
        """What every state is asked (`evaluation.abilities`); empty: nothing."""
        settings = self.config.evaluation
        return (
            abilities.read(settings.abilities, settings.max_questions) if settings.abilities else []
        )

    @cached_property
    def other_config(self) -> Config | None:
        """This config with `evaluation.other_text` for a corpus; None where there is no such text."""
        names = self.config.evaluation.other_text
        return dataclasses.replace(self.config, corpus=names) if names else None

    @cached_property
    def material(self) -> measures.Material:
        """What every state is measured on; known once there is a corpus."""
        settings = self.config.evaluation
        held_out = documents.held_out(self.folder("corpus"))
        return measures.Material(
            bits_per_byte.choose(held_out, settings.bytes_per_language),
            self.other_texts,
            self.questions,
            settings.sequence_length,
            settings.batch,
            self.config.compute,
            self.config.seed,
        )

    @cached_property
    def other_texts(self) -> dict[str, list[str]]:
        """The documents of another kind that states are measured on, by language."""
        if self.other_config is None:
            return {}
        return bits_per_byte.choose(
            documents.read(self.other_config, self.log), self.config.evaluation.bytes_per_language
        )

    def run_identity(self) -> dict[str, str]:
        """What makes this another run than the one of a workdir with other values."""
        return {
            "source_model": str(self.source_folder),
            "target_tokenizer": EXTEND if self.extends else str(self.target_folder),
        }

    @cached_property
    def identities(self) -> dict[str, Any]:
        """Digests of the outside files that stages depend on; the first process alone reads them."""
        return distributed.on_first(self._identities)

    def _identities(self) -> dict[str, Any]:
        digests, file = self.digests, self.config.alignment.file
        given = {
            side: getattr(self.config.alignment, side)
            for side in ("source_vectors", "target_vectors")
        }

        def texts_of(config: Config) -> list[str]:
            """By file, of a hub dataset the name; and how the parts are mixed."""
            names = documents.names(config)
            contents = zip(names, digests.each([Path(name) for name in names]))
            return [*(digest[:16] or name for name, digest in contents), *documents.mixture(config)]

        return {
            "corpus": texts_of(self.config),
            "source_model": digests.of(_model_files(self.source_folder)),
            "source_tokenizer": digests.of(_tokenizer_files(self.source_folder)),
            # One that is extended follows from the stage that does it.
            "target_tokenizer": EXTEND
            if self.extends
            else digests.of(_tokenizer_files(self.target_folder)),
            "alignment": digests.of([Path(file)]) if file else "",
            "vectors": {
                side: digests.of([Path(name)]) if name else "" for side, name in given.items()
            },
            "questions": abilities.digest(self.questions) if self.questions else "",
            "other_text": texts_of(self.other_config) if self.other_config else "",
            "teacher": digests.of(_model_files(self.teacher_folder)) if self.teacher_folder else "",
            "donor": digests.of(_model_files(self.donor_folder)) if self.donor_folder else "",
        }

    @cached_property
    def exports_as_llama(self) -> bool:
        """Whether the export is written with model_type `llama` (`qwen.as_llama`).

        That is done to a Qwen 2 model where transformers would open the target tokenizer as Qwen's.

        Raises:
          UserError: transformers would open it otherwise, and the model cannot be written so.
        """
        model, raw = self.source_model
        difference = opening.difference_by_type(raw, self.target_tokenizer)
        if not difference:
            return False
        beside = f"beside model_type '{raw['model_type']}'"
        problem = f"transformers opens the exported tokenizer, {beside}, as {difference}"
        if qwen.is_llama(model):
            self.log(
                f"warning: {problem}; so the export is written as the same model of model_type 'llama'"
            )
            return True
        raise UserError(
            f"{problem}: the exported model would read other tokens than it was trained with; take another target tokenizer, or "
            "a source model of another family"
        )

    def _check_two_readings(self) -> None:
        folders = {f"source_model '{self.config.source_model}'": self.source_folder}
        folders |= (
            {}
            if self.extends
            else {f"target_tokenizer '{self.config.target_tokenizer}'": self.target_folder}
        )
        for whose, folder in folders.items():
            if contradiction := opening.two_readings(folder, _tokenizer(folder)):
                self.log(f"warning: the files of {whose} give two tokenizations: {contradiction}")

    def check(self) -> None:
        """Finds what would fail later, before any long work.

        Raises:
          UserError: naming what is wrong with the model, a tokenizer, the corpus, the alignment file or a length.
        """
        config = self.config
        model, _ = self.source_model
        huggingface.check_weights(self.source_folder, model)
        source_size = vocabulary_size(self.source_tokenizer)
        tokenizing.check(self.source_tokenizer)
        self._check_two_readings()
        hub.warn_of_values_left_out(
            self.source_folder, self.source_model[1], model.vocab_size, self.log
        )
        if self.extends:
            mining.check(self.source_tokenizer)
        else:
            tokenizing.check(self.target_tokenizer)
            _ = self.exports_as_llama
            if self.source_tokenizer.chat_template and not self.target_tokenizer.chat_template:
                self.log(
                    "warning: the source model has a chat template and the target tokenizer has none, so the exported model has "
                    "none: put a chat_template.jinja that writes the target's special tokens beside its tokenizer.json"
                )
            if (closing := tokenizing.closing_id(self.target_tokenizer)) is not None:
                self.log(
                    f"warning: the target tokenizer puts '{self.target_tokenizer.convert_ids_to_tokens(closing)}' behind every text: "
                    "give the exported model its prompts with add_special_tokens=False, or it goes on from an end"
                )
        resolve.check_lengths(config, model)
        if self.teacher_folder and self.teacher_model:
            self._check_teacher(self.teacher_folder, self.teacher_model)
        self._check_donor()
        documents.check(config)
        if not self.folder("init").exists():
            check_finite(self)
        self._check_measures()
        taken = f"alignment.file '{config.alignment.file}'" if config.alignment.file else ""
        if not taken and config.alignment.method not in methods.NEED_VECTORS:
            taken = f"alignment.method '{config.alignment.method}'"
        if taken and (config.alignment.source_vectors or config.alignment.target_vectors):
            raise UserError(
                f"{taken} makes no use of alignment.source_vectors and target_vectors: leave them out, or take "
                f"{', '.join(sorted(methods.NEED_VECTORS))} as the method and no file"
            )
        if config.alignment.file:
            if not self.extends:  # else once there is a target tokenizer
                alignment.load(
                    Path(config.alignment.file), self.source_tokenizer, self.target_tokenizer
                )
        elif config.alignment.method in methods.NEED_VECTORS:
            vectors.check(config.alignment, source_size, self.target_size)

    def _check_measures(self) -> None:
        """Whether questions and other text can be measured, and what is to be known of numbers."""
        tokenizers = [self.source_tokenizer, *([] if self.extends else [self.target_tokenizer])]
        for tokenizer in tokenizers:
            abilities.check_lengths(tokenizer, self.questions, self.source_model[0].max_positions)
        if self.other_config is not None:
            if same := set(documents.names(self.config)) & set(documents.names(self.other_config)):
                raise UserError(
                    f"evaluation.other_text names '{min(same)}', which is in the corpus too: name text that is not trained on"
                )
            documents.check(self.other_config)
        if not self.extends and (line := numbers.warning_line(*tokenizers)):
            self.log(line)

    def _check_teacher(self, folder: Path, model: ModelConfig) -> None:
        """That the teacher is whole, and can say something about each token and sequence that the student reads."""
        stage = self.config.stage3
        who = f"stage3.teacher '{stage.teacher}'"
        if self.extends:
            raise UserError(
                f"{who}: no model has the tokenizer that target_tokenizer=extend is yet to make; run Stage 3 in a run of its own, whose "
                "source model is this one's export, or leave stage3.teacher empty"
            )
        huggingface.check_weights(folder, model)
        if stage.sequence_length > model.max_positions:
            raise UserError(
                f"{who} has {model.max_positions:,} positions but config.stage3.sequence_length is {stage.sequence_length:,}; set "
                f"--config.stage3.sequence_length={model.max_positions} or less"
            )
        self._check_same_tokenizer(who, folder)
        met = {
            tokenizing.end_of_text_id(self.target_tokenizer),
            tokenizing.opening_id(self.target_tokenizer),
        }
        if set(range(model.vocab_size, self.target_size)) - (
            canonical.special_ids(self.target_tokenizer) - met
        ):
            raise UserError(
                f"{who} has {model.vocab_size:,} rows for the {self.target_size:,} tokens of the target tokenizer: it says nothing of the "
                "last ones; take the tokenizer as that model has it (without end_of_text)"
            )

    def _check_donor(self) -> None:
        """That method `omp` has a donor with the target tokenizer, and no other method has one."""
        config = self.config.alignment
        if config.method != "omp" or config.file:
            if config.donor:
                raise UserError(
                    "alignment.donor is for alignment.method 'omp' alone: leave it out, or take that method and no file"
                )
            return
        who = f"alignment.donor '{config.donor}'"
        if self.extends or not config.donor:
            raise UserError(
                "alignment.method 'omp' needs alignment.donor, a model that has the target tokenizer already"
                + (
                    "; none has one that target_tokenizer=extend is yet to make: take another method"
                    if self.extends
                    else ""
                )
            )
        assert self.donor_folder
        huggingface.check_weights(self.donor_folder, hub.load_config(self.donor_folder)[0])
        self._check_same_tokenizer(who, self.donor_folder)

    def _check_same_tokenizer(self, who: str, folder: Path) -> None:
        if differing := canonical.differing(
            self.target_tokenizer, _tokenizer(folder, self.config.end_of_text)
        ):
            first, here, there = differing[0]
            raise UserError(
                f"{who} has another tokenizer than target_tokenizer '{self.config.target_tokenizer}': {len(differing):,} of "
                f"{self.target_size:,} ids are other tokens, the first is {first}, {here!r} here and {there!r} there; take "
                "target_tokenizer from that model's folder, or another model"
            )


def _model_files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.suffix in (".json", ".safetensors"))


def _tokenizer(folder: Path, end_of_text: str = "") -> PreTrainedTokenizerBase:
    """A folder's tokenizer, read again only when its files have changed: the runs of a sweep share it."""
    stamps = tuple(
        (file.name, file.stat().st_mtime_ns, file.stat().st_size)
        for file in _tokenizer_files(folder)
    )
    return _read_tokenizer(folder, end_of_text, stamps)


@functools.lru_cache(maxsize=4)
def _read_tokenizer(folder: Path, end_of_text: str, stamps: Any) -> PreTrainedTokenizerBase:
    del stamps
    return hub.load_tokenizer(folder, end_of_text)


def _tokenizer_files(folder: Path) -> list[Path]:
    """What a tokenizer is made of, without the model's own files and the licences beside them."""
    others = (*hub.TERMS, "config*", "generation*", hub.INDEX)
    return sorted(
        f
        for f in folder.iterdir()
        if _matches(f.name, hub.TOKENIZER) and not _matches(f.name, others)
    )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def check_disk(context: Context, wanted: set[str]) -> None:
    """Refuses a run that the disk of the workdir cannot hold, with the sum of what is to come.

    Raises:
      UserError: stating the bytes needed by kind and those free.
    """
    config, (_, raw) = context.config, context.source_model
    text, exported = disk.text_bytes(config), disk.exported_bytes(config, raw)
    sizes = disk.disk_bytes(config, context.new_model, text, exported)
    missing = {
        name: size
        for name, size in sizes.items()
        if name in wanted and not context.folder(name).exists()
    }
    free = disk.free_bytes(context.workdir)
    if sum(missing.values()) > free:
        parts = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in missing.items() if size)
        raise UserError(
            f"the disk of --workdir '{context.workdir}' has {free / 1e9:.2f} GB free but the run needs about "
            f"{sum(missing.values()) / 1e9:.2f} GB ({parts}); free some, use another disk, or lower text.budget_bytes or keep_checkpoints"
        )


def warn_of_memory(context: Context, wanted: set[str]) -> None:
    """Warns of stages to come that are not expected to fit a device or host memory, hours before they begin."""
    names = {name.partition("/")[0] for name in wanted}
    for name, text in {
        **advice.too_large(_setups(context)),
        **advice.too_large_untrained(_run(context)),
    }.items():
        if name in names:
            context.log(f"warning: {text}")


@contextmanager
def naming_full_memory(context: Context, name: str) -> Iterator[None]:
    """
    Raises:
      UserError: a device had no room left for a stage's arrays: with what would fit.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not sharding.is_out_of_memory(error):
            raise
        kind = name.partition("/")[0]
        others = {
            "init": "use a larger one, or train the rows alone with --config.initialization.trains=rows",
            "evaluate": f"lower --config.evaluation.batch (it is {context.config.evaluation.batch}), or use a larger one",
        }
        remedy = advice.too_large_untrained(_run(context)).get(
            kind, others.get(kind, "use a larger one")
        )
        if name in training_stages(context.config):
            setups = _setups(context)
            held = setups[name].stage.per_device_batch
            fewer = f"lower --config.{name}.per_device_batch (it is {held}) or --config.compute.loss_chunk"
            remedy = advice.too_large(setups).get(
                name, f"{fewer}, or set --config.compute.remat=layer"
            )
        raise UserError(
            f"{name}: a device's memory is full ({str(error).splitlines()[0][:160].rstrip('.')}); {remedy}. Other programs on the "
            "device leave it less. What is finished or saved is kept: the same command goes on from there"
        ) from error


def _setups(context: Context) -> dict[str, Setup]:
    """The training stages on these devices, without `auto`."""
    mesh, machine = context.mesh.devices.shape, Machine.of()
    return resolve.resolved_stages(
        context.config, context.new_model, mesh, machine, context.teacher_model
    )


def _run(context: Context) -> Run:
    """The run on these devices, for the memory of stages that do not train."""
    model, raw = context.source_model
    source, mesh = Source(model.vocab_size, disk.stored_bytes(raw)), context.mesh.devices.shape
    machine = dataclasses.replace(Machine.of(), devices=len(context.mesh.local_devices))
    return Run(context.config, source, context.new_model, mesh, machine)


def corpus(context: Context) -> Mapping[str, Any]:
    return documents.run(context.config, context.folder("corpus"), context.log)


def extend(context: Context) -> Mapping[str, Any]:
    return mining.run(
        context.config,
        context.folder("corpus"),
        context.source_tokenizer,
        context.folder("extend"),
        context.log,
    )


def tokens(context: Context) -> Mapping[str, Any]:
    return tokenizing.run(
        context.config,
        context.folder("corpus"),
        context.source_tokenizer,
        context.target_tokenizer,
        context.folder("tokens"),
        context.log,
    )


def align(context: Context) -> Mapping[str, Any]:
    summary = methods.run(
        context.config,
        context.folder("corpus"),
        context.folder("tokens"),
        context.source_tokenizer,
        context.target_tokenizer,
        context.folder("align"),
        context.log,
        _donor(context),
    )
    content = json.dumps(_inspected(context), ensure_ascii=False)
    (context.folder("align") / INSPECTION).write_text(content + "\n", encoding="utf-8")
    return summary


def _donor(context: Context) -> methods.Donor | None:
    if context.donor_folder is None:
        return None
    config, _ = hub.load_config(context.donor_folder)
    read = huggingface.stored_reader(context.donor_folder, config)
    embedding = read("embed_tokens/embedding")
    return methods.Donor(
        embedding, embedding if config.tie_word_embeddings else read("lm_head/kernel")
    )


def _inspected(context: Context) -> list[dict[str, Any]]:
    """The alignment's tables, but for the first of them, which says what is aligned."""
    source, target = context.source_tokenizer, context.target_tokenizer
    aligned = alignment.load(context.folder("align") / "alignment.npz", source, target)
    old, new = (
        inspection.vocabulary(
            tokenizer, side, np.load(context.folder("tokens") / side / "counts.npy")
        )
        for side, tokenizer in (("source", source), ("target", target))
    )
    subject = inspection.Subject(aligned, old, new, canonical.PieceCutter(source), space=None)
    return [pages.to_json(section) for section in inspection.report(subject)[1:]]


def init(context: Context) -> Mapping[str, Any]:
    """Writes an ordinary Hugging Face folder: the source model with the new vocabulary, not yet trained."""
    config, raw = context.source_model
    params = huggingface.load_params(context.source_folder, config, mesh=context.mesh)
    aligned = alignment.load(
        context.folder("align") / "alignment.npz",
        context.source_tokenizer,
        context.target_tokenizer,
    )
    params, unusable = initialization.usable(params, aligned.source_size)
    if unusable:
        context.log(
            f"init: warning: {_named(unusable, context.source_tokenizer)}: nothing is made of them"
        )
        tokenizers = context.source_tokenizer, context.target_tokenizer
        counts = np.load(context.folder("tokens") / "target" / "counts.npy")
        aligned = methods.without(aligned, unusable, *tokenizers, counts)
    settings, tuned = context.config, {}
    multiple_of = settings.initialization.rows_multiple_of
    new_config, new = initialization.initialize(config, params, aligned, multiple_of, context.kept)
    # Where no row is composed there is nothing to learn, calibrate, tune or distil.
    learns = np.isin(aligned.rules[context.kept :], initialization.COMPOSED).any()
    make = _learned_start(settings)
    if learns and make:
        shards = [
            tokenizing.TokenShards.open(context.folder("tokens") / side)
            for side in tokenizing.SIDES
        ]
        source = initialization.Side(config, params, context.source_tokenizer, shards[0], unusable)
        target = initialization.Side(new_config, new, context.target_tokenizer, shards[1])
        new, tuned = make(context, source, target, aligned)
    _write(context, "init", new_config, new, raw, "float32")
    return {"tuned": dict(tuned)}


def _learned_start(config: Config) -> Callable[..., tuple[dict, Mapping[str, float]]] | None:
    """What goes on from the alignment's mixtures with the source model as teacher, if anything does."""
    if distills(config):
        return _distilled
    if distills_tokens(config):
        return _token_distilled
    return _composed if reads_source(config) else None


def _token_distilled(
    context: Context,
    source: initialization.Side,
    target: initialization.Side,
    aligned: alignment.Alignment,
) -> tuple[dict, Mapping[str, float]]:
    """(parameters, facts) of a start by method `token_distillation`."""
    settings = context.config
    texts = _drawn(context, source, settings.initialization.token_distillation.tokens)
    rows, facts = initialization.distill_tokens(
        settings, source, target, aligned, texts, context.mesh, context.log, context.kept
    )
    return {**target.params, "embed_tokens": {"embedding": rows}}, facts


def _composed(
    context: Context,
    source: initialization.Side,
    target: initialization.Side,
    aligned: alignment.Alignment,
) -> tuple[dict, Mapping[str, float]]:
    """(parameters, facts) of a start by method `composed`."""
    settings, how = context.config, (context.mesh, context.log, context.kept)
    texts = _drawn(context, source, settings.initialization.tokens)
    reading = initialization.read(settings, source, target, texts, context.mesh, context.log)
    target = target._replace(
        params=initialization.learn(settings, source, target, aligned, reading, *how)
    )
    target = target._replace(
        params=initialization.calibrate(settings, source, target, aligned, *how)
    )
    return initialization.tune(settings, source, target, aligned, reading, *how)


def _distilled(
    context: Context,
    source: initialization.Side,
    target: initialization.Side,
    aligned: alignment.Alignment,
) -> tuple[dict, Mapping[str, float]]:
    """(parameters, facts) of a start by method `distilled`."""
    settings = context.config
    _, budget = distillation_budget(settings, aligned.source_size, aligned.target_size)
    texts = _drawn(context, source, round(settings.initialization.corpus_share * budget))
    return initialization.distill(
        settings, source, target, aligned, texts, context.mesh, context.log, context.kept
    )


def _drawn(
    context: Context, source: initialization.Side, tokens: int
) -> Iterator[documents.Document]:
    """Training documents of about so many source tokens, drawn at random."""
    chosen = contexts.draw(source.shards, tokens, context.config.seed)
    return documents.at(context.folder("corpus"), chosen)


def _named(tokens: Set[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Says that the source model's rows of these tokens are not finite, with the names of the first ones."""
    names = ", ".join(repr(tokenizer.convert_ids_to_tokens(i)) for i in sorted(tokens)[:10])
    more = f" and {len(tokens) - 10:,} more" if len(tokens) > 10 else ""
    count = f"{len(tokens):,} token{'s' if len(tokens) > 1 else ''}"
    return f"the source model's rows of {count} hold NaN or infinity ({names}{more})"


MOST_UNUSABLE = 0.05
"""Share of the source tokens whose rows may be not finite: reserved ones that were never trained. With more the model is broken."""


def check_finite(context: Context) -> None:
    """Reads all weights of the source model, before the work that a broken one would waste.

    Raises:
      UserError: a weight of its layers, or the rows of many tokens, hold NaN or infinity.
    """
    config, _ = context.source_model
    rows = huggingface.non_finite_rows(context.source_folder, config)
    size = vocabulary_size(context.source_tokenizer)
    unusable = {i for found in rows.values() for i in found.tolist() if i < size}
    if len(unusable) > MOST_UNUSABLE * size:
        raise UserError(
            f"source_model '{context.config.source_model}': {_named(unusable, context.source_tokenizer)}, of {size:,}: its "
            "training diverged, or its files were damaged or badly converted; take another checkpoint of it"
        )


def load_state(
    context: Context, states: Sequence[str], dtype: huggingface.DtypeOf = lambda path: None
) -> tuple[ModelConfig, dict]:
    """The model after the last of `states` (`init` and training stages), on the mesh, adapters merged.

    No states: the source model, its rows that are not finite replaced (`initialization.usable`).

    Args:
      dtype: of each parameter by its path.
    """
    folder, config, changes = _state(context, states)
    params = training_states.assemble(folder, config, changes, dtype, context.mesh)
    if not states:
        params, _ = initialization.usable(params, vocabulary_size(context.source_tokenizer))
    return config, params


def _state(
    context: Context, states: Sequence[str]
) -> tuple[Path, ModelConfig, training_states.Changes]:
    """The folder of a state's stored weights, its model, and what the training stages have changed."""
    folder = context.folder("init") if states else context.source_folder
    config, _ = hub.load_config(folder)
    trained = [(context.folder(name), getattr(context.config, name)) for name in states[1:]]
    return folder, config, training_states.load_changes(config, trained, context.mesh)


MANY_PASSES = 4
"""Passes over the text from which on it teaches little that is new (Muennighoff et al. 2023, arXiv 2305.16264)."""


def stream_starts(context: Context, shards: tokenizing.TokenShards) -> dict[str, int]:
    """How many tokens into the shuffled stream each training stage starts, all of them planned before the first begins.

    Raises:
      UserError: the text is too short for a stage (`loop.plan_stage`).
    """
    end, starts = 0, {}
    for name, stage in training_stages(context.config).items():
        starts[name] = end
        _, end = loop.plan_stage(name, stage, context.config, context.new_model, shards, end)
    return starts


def check_stream(context: Context) -> None:
    """What can be told of the training stages once the text is cut: told now, not after the alignment.

    Raises:
      UserError: as `stream_starts`.
    """
    shards = tokenizing.TokenShards.open(context.folder("tokens") / "target")
    stream_starts(context, shards)
    size = len(shards.tokens)
    for name, stage in training_stages(context.config).items():
        passes = stage.steps * stage.batch_size * stage.sequence_length / size
        if passes > MANY_PASSES:
            context.log(
                f"warning: {name} reads the {size:,} tokens of the text {passes:.0f} times over: take fewer steps, or give more text"
            )


def train(context: Context, name: str, before: Sequence[str]) -> Mapping[str, Any]:
    setup = _setups(context)[name]
    stage, compute = setup.stage, setup.compute
    if getattr(context.config, name).per_device_batch == AUTO:
        context.log(
            f"{name}: per_device_batch=auto: at most {stage.per_device_batch} sequences at once on a device, remat={compute.remat}"
        )
    dtype = training_states.training_dtype(stage, jnp.dtype(context.config.compute.dtype))
    config, *begun_with = load_state(context, before, dtype)
    shards = tokenizing.TokenShards.open(context.folder("tokens") / "target")
    starts = stream_starts(context, shards)
    settings = dataclasses.replace(context.config, compute=compute)
    objective = _objective(context, stage, config)
    result = loop.run_stage(
        name,
        stage,
        settings,
        config,
        begun_with.pop(),  # no reference stays here: the stage has its own copy of what trains
        shards,
        context.folder(name),
        starts[name],
        context.log,
        context.mesh,
        objective,
    )
    return {"stream_end": result.stream_end, "tokens": result.tokens}


def _objective(context: Context, stage: StageConfig, model: ModelConfig) -> Objective:
    """What a stage minimises; its teacher, if there is one, is read for it."""
    folder, config = context.teacher_folder, context.teacher_model
    if not (isinstance(stage, DistillationConfig) and teacher_of(stage) and folder and config):
        return NEXT_TOKEN
    context.log(f"stage3: reads its teacher '{stage.teacher}'")
    params = huggingface.load_params(
        folder, config, jnp.dtype(context.config.compute.dtype), context.mesh
    )
    params = distillation.with_rows(params, model.vocab_size, context.mesh)
    # The teacher may lack rows for special tokens that no text has (Gemma 3 1B).
    both = min(config.vocab_size, context.target_size)
    teacher = distillation.Teacher(config, params, both, context.identities["teacher"])
    return distillation.objective(stage, teacher)


def has_tokens(context: Context) -> bool:
    """Whether the shards of both sides are whole."""
    try:
        for side in tokenizing.SIDES:
            tokenizing.TokenShards.open(context.folder("tokens") / side)
    except UserError:
        return False
    return True


def has_model(context: Context, name: str) -> bool:
    """Whether the folder holds a whole model, as far as sizes tell."""
    try:
        config, _ = hub.load_config(context.folder(name))
        huggingface.check_weights(context.folder(name), config)
    except UserError:
        return False
    return True


def is_trained(context: Context, name: str) -> bool:
    """Whether the stage's last checkpoint is there."""
    return loop.is_finished(context.folder(name), getattr(context.config, name))


def export(context: Context, states: Sequence[str]) -> Mapping[str, Any]:
    base, config, changes = _state(context, states)
    _, raw = context.source_model
    folder = context.folder("export")
    read = training_states.reader(base, config, changes)
    if context.exports_as_llama:
        config, read, raw = qwen.as_llama(config, read, raw)
    _write(context, "export", config, read, raw, context.config.export.dtype)
    return distributed.on_first(lambda: _publish(context, states, config, folder))


def _publish(
    context: Context, states: Sequence[str], model: ModelConfig, folder: Path
) -> Mapping[str, Any]:
    """Opens a written folder as users do, adds model card and licence, and pushes it if asked to.

    Raises:
      UserError: AutoTokenizer does not open it, or not as the tokenizer that the model was trained with.
    """
    opening.check_export(folder, context.target_tokenizer)
    terms = hub.copy_terms(context.source_folder, folder)
    facts = card_facts.facts(
        context.config, context.workdir, states, model, context.source_folder, terms
    )
    (folder / CARD).write_text(model_card(facts), encoding="utf-8", errors="replace")
    done = {"folder": str(folder), "bytes": sum(f.stat().st_size for f in folder.iterdir())}
    if repository := context.config.export.push_to_hub:
        done["pushed_to"] = hub.push_to_hub(folder, repository)
        context.log(f"export: pushed to {done['pushed_to']}")
    return done


def _write(
    context: Context,
    name: str,
    config: ModelConfig,
    params: dict | huggingface.Reader,
    raw: dict[str, Any],
    dtypes: str,
) -> None:
    """Writes a Hugging Face folder with the target tokenizer."""
    folder = context.folder(name)
    huggingface.save_checkpoint(
        folder,
        params,
        config,
        raw,
        context.target_tokenizer,
        dtypes=dtypes,
        source_folder=context.source_folder,
        max_shard_bytes=context.config.export.max_shard_bytes,
        writes=distributed.is_first(),
    )
    distributed.barrier(f"{name} is written")


def evaluate(context: Context, name: str, states: Sequence[str]) -> Mapping[str, Any]:
    """Measures one state of the model and lets it continue the prompts; writes `scores.json`.

    The evaluation of the source also keeps its likelihoods, token by token, for the fidelity of later states.
    """
    settings = context.config.evaluation
    compute = context.config.compute
    config, params = load_state(
        context, states, training_states.inference_dtype(jnp.dtype(compute.dtype))
    )
    tokenizer = context.source_tokenizer if name == "source" else context.target_tokenizer
    if name == "random":
        size, key = vocabulary_size(tokenizer), jax.random.key(context.config.seed)
        config, params = initialization.random_rows(config, params, size, key, context.kept)
        params = jax.tree.map(
            lambda x: x.astype(compute.dtype) if isinstance(x, np.ndarray) else x, params
        )
    material, folder = context.material, context.folder("evaluate/source")
    asks = name != "random"
    measured = measures.measure(
        name, config, params, tokenizer, material, context.mesh, context.log, asks
    )
    prompts = settings.prompts or samples.passages(material.texts)
    continued = (
        samples.continuations(
            config, params, tokenizer, prompts, settings.sample_tokens, compute.dtype
        )
        if asks
        else []
    )
    if distributed.is_first():
        if name == "source":  # the text is the same in all states
            measured.reference.save(folder)
            content = measures.summary(measured, None, material)
            content["overlap"] = _overlap(context, material.texts)
        else:
            reference = measures.Reference.load(folder, context.source_tokenizer, material)
            content = measures.summary(measured, reference, material)
        path = context.folder(f"evaluate/{name}") / measures.SCORES
        text = json.dumps({**content, "samples": continued}, indent=1, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")
    return {}


def _overlap(context: Context, texts: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """How much of the held-out texts stands in the training text, with a warning where that is much."""
    folder = context.folder("corpus")
    total = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["train_bytes"]
    found = overlap.overlap(texts, documents.train_batches(folder), context.log, total)
    for line in overlap.warning_lines(found):
        context.log(line)
    return found


def report(context: Context, states: Sequence[str]) -> Mapping[str, Any]:
    settings = context.config
    tokenizers = {"source": context.source_tokenizer, "target": context.target_tokenizer}
    texts = context.material.texts
    inspected = json.loads((context.folder("align") / INSPECTION).read_text(encoding="utf-8"))
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()
    shown = {
        "passages": token_pieces.of_passages(tokenizers, texts),
        "inspection": inspected,
        "held_out": digest,
    }
    shown["numbers"] = numbers.warning_line(*tokenizers.values())
    identity = context.run_identity()
    return reporting.run(
        settings, context.workdir, states, identity, context.folder("report"), context.log, shown
    )
