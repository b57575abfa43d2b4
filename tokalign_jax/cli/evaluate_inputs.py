"""Inputs of `tokalign evaluate`: its models, texts, questions and alignment, checked."""

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from tokalign_jax import demo, pipeline
from tokalign_jax.alignment import alignment
from tokalign_jax.cli import arguments
from tokalign_jax.config import (
    ComputeConfig,
    Config,
    EvaluationConfig,
    TextConfig,
    config_from_dict,
)
from tokalign_jax.errors import UserError
from tokalign_jax.evaluation import (
    abilities,
    bits_per_byte,
    chat_questions,
    downstream,
    drafting,
    measures,
    similarity,
)
from tokalign_jax.models import hub, huggingface
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.huggingface import DtypeOf
from tokalign_jax.pipeline import held_out
from tokalign_jax.pipeline.context import Context
from tokalign_jax.pipeline.states import load_state
from tokalign_jax.text import corpus as documents
from tokalign_jax.text.editing import within_rows
from tokalign_jax.utils.progress import Log
from tokalign_jax.utils.stopping import Stopped

EXPORT, SOURCE = "export", "source"


@dataclass(frozen=True)
class EvaluatedModel:
    """A model to evaluate.

    Attributes:
      name: its name in tables and `scores.json`.
      load: returns its parameters on a mesh.
      folder: in Hugging Face format; None for a state of which only checkpoints exist.
    """

    name: str
    config: ModelConfig
    tokenizer: PreTrainedTokenizerBase
    load: Callable[[Mesh, DtypeOf], dict]
    folder: Path | None


@dataclass(frozen=True)
class Inputs:
    """Everything that an evaluation reads.

    Attributes:
      context: the run of `--workdir`, if there is one.
      material: texts and questions.
      teacher: the model to draft for.
      aligned: the alignment of the second model's tokenizer to the first's.
      dtype: type of activations.
    """

    args: argparse.Namespace
    context: Context | None
    models: Sequence[EvaluatedModel]
    material: measures.Material
    teacher: EvaluatedModel | None
    aligned: alignment.Alignment | None
    encoder: similarity.Encoder | None
    dtype: str


def check(args: argparse.Namespace, log: Log) -> Inputs:
    """Open the inputs and create the output folder.

    Raises:
      UserError: an input that the evaluation would fail on later.
    """
    arguments.refuse_existing("--output", args.output, args.overwrite and args.output.is_dir())
    _check_flags(args)
    context = _open_run(args.workdir, log) if args.workdir else None
    models = _open_models(args, context)
    teacher = _open_folder(args.teacher, [args.teacher]) if args.teacher else None
    material = _read_material(args, context, models, log)
    for model in models:
        _check_questions(model, material)
    if args.training_text:
        _training_corpus(args)
    if teacher:
        _check_teacher(args, teacher, models)
    texts = material.texts
    log(
        f"{', '.join(model.name for model in models)}: {sum(map(len, texts.values()))} held-out "
        f"documents, {len(texts)} languages"
    )
    aligned = _load_alignment(args, context, models)
    encoder = similarity.sentence_encoder(args.encoder) if args.encoder else None
    _create_folder(args.output)
    dtype = material.compute.dtype
    return Inputs(args, context, models, material, teacher, aligned, encoder, dtype)


def training_text(inputs: Inputs, log: Log) -> Iterator[list[documents.Document]] | None:
    """Return the training text in batches, or None where no flag or run names it."""
    args, context = inputs.args, inputs.context
    if args.training_text:
        return map(list, documents.in_groups(documents.read(_training_corpus(args), log)))
    return documents.train_batches(context.folder("corpus")) if context else None


def _check_flags(args: argparse.Namespace) -> None:
    if args.models and args.workdir:
        raise UserError("--models and --workdir are both given: give only one of them")
    if not (args.models or args.workdir) or not args.states:
        raise UserError(
            "nothing to evaluate: give --models=FOLDER,FOLDER, or --workdir of a run with --states"
        )
    if not 0 < args.temperature < math.inf:
        raise UserError(f"--temperature is {args.temperature}; it must be above 0")
    if args.encoder and not (args.alignment or args.workdir):
        raise UserError(
            "--encoder needs an alignment to score: give --alignment with --models, or --workdir"
        )
    if args.tasks:
        downstream.check(args.tasks, args.task_folder)


def _create_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--output '{folder}' cannot be created ({error.strerror}): name another folder"
        ) from error


# --- Models -------------------------------------------------------------------------------------


def _open_models(args: argparse.Namespace, context: Context | None) -> list[EvaluatedModel]:
    if context:
        _refuse_stale(context, args.states)
        models = [_open_state(context, name) for name in args.states]
    else:
        models = [_open_folder(name, args.models) for name in args.models]
    names = [model.name for model in models]
    if duplicates := [name for i, name in enumerate(names) if name in names[:i]]:
        raise UserError(
            f"two models are called '{duplicates[0]}': name each model once, and put folders of "
            "the same name under parents of different names"
        )
    return models


def _open_run(workdir: Path, log: Log) -> Context:
    if not (workdir / pipeline.STATE_FILE).is_file():
        raise UserError(
            f"--workdir '{workdir}' is not the workdir of a run (it has no {pipeline.STATE_FILE}); "
            "for model folders use --models"
        )
    try:
        written = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"--workdir '{workdir}' has no readable config.json ({error}): repeat the command of "
            "the run, which writes it"
        ) from error
    return Context(config_from_dict(written), workdir, log)


def _refuse_stale(context: Context, names: Sequence[str]) -> None:
    """Refuse states that are unfinished, or of other settings than the last command's."""
    states = pipeline.model_states(context.config)
    try:
        fingerprints = [pipeline.fingerprints_of(context, exported) for exported in states]
    except UserError:
        return  # an input of the run no longer exists
    records = pipeline.read_records(context.workdir)
    for name in ("corpus", *(name for name in names if name in fingerprints[0])):
        record = records.get(name)
        if not record:
            continue
        if not record["finished"]:
            problem = "is not finished"
        elif record["fingerprint"] not in {entry[name] for entry in fingerprints}:
            problem = "was made with other settings than the run's current ones"
        else:
            continue
        raise UserError(
            f"--workdir '{context.workdir}': {name} {problem}; repeat the command of the run to "
            "finish it, or name other --states"
        )


def _open_state(context: Context, name: str) -> EvaluatedModel:
    """Open a state of the run: the source model, a trained state or the exported folder."""
    if name == EXPORT:
        folder = context.folder(EXPORT)
        if not (folder / "config.json").is_file():
            raise UserError(
                f"--workdir '{context.workdir}' has no export yet: finish the run's stages, or "
                "name other --states"
            )
        return dataclasses.replace(_open_folder(str(folder), []), name=EXPORT)
    inputs = context.inputs
    if name == SOURCE:
        return EvaluatedModel(
            name,
            inputs.source_model[0],
            inputs.source_tokenizer,
            lambda mesh, dtype: load_state(context, [], dtype)[1],
            inputs.source_folder,
        )
    known = pipeline.model_states(context.config)
    if name not in known or not context.folder(name).exists():
        existing = [SOURCE, *(n for n in [*known, EXPORT] if context.folder(n).exists())]
        raise UserError(
            f"--states names '{name}', which the run in '{context.workdir}' does not have; it has "
            f"{', '.join(existing)}"
        )
    states = known[: known.index(name) + 1]
    config, _ = hub.load_config(context.folder("init"))
    return EvaluatedModel(
        name,
        config,
        inputs.target_tokenizer,
        lambda mesh, dtype: _load_trained(context, states, dtype),
        context.folder(name) if name == "init" else None,
    )


def _load_trained(context: Context, states: Sequence[str], dtype: DtypeOf) -> Any:
    try:
        return load_state(context, states, dtype)[1]
    except Stopped as stopped:
        raise UserError(f"{stopped}: repeat the command of the workdir's run") from stopped


def _open_folder(name: str, others: Sequence[str]) -> EvaluatedModel:
    """Open a model in Hugging Face format.

    It is called by its folder's name, with the parent's where several of `others` have that name.
    """
    folder = hub.resolve(demo.source_model(name), what="model")
    config, _ = hub.load_config(folder)
    huggingface.check_weights(folder, config)
    tokenizer = within_rows(hub.load_tokenizer(folder), config.vocab_size, f"model '{name}'")
    parts = _absolute(name).parts
    is_unique = [_absolute(other).name for other in others].count(parts[-1]) < 2
    return EvaluatedModel(
        parts[-1] if is_unique else "/".join(parts[-2:]),
        config,
        tokenizer,
        lambda mesh, dtype: huggingface.load_params(folder, config, dtype, mesh),
        folder,
    )


def _absolute(name: str) -> Path:
    """Return the absolute path of a folder; a hub name as it is."""
    return Path(name).resolve() if Path(name).is_dir() else Path(name)


def _check_teacher(
    args: argparse.Namespace, teacher: EvaluatedModel, models: Sequence[EvaluatedModel]
) -> None:
    differences = [
        drafting.vocabulary_difference(model.tokenizer, teacher.tokenizer) for model in models
    ]
    if all(differences):
        raise UserError(
            f"--teacher '{args.teacher}' shares its vocabulary with none of the models "
            f"({differences[-1]}): name a teacher with the vocabulary of one of them"
        )
    needed = args.prompt_tokens + args.steps
    named = {"the teacher": teacher, **{f"'{model.name}'": model for model in models}}
    for name, model in named.items():
        if needed > model.config.max_positions:
            raise UserError(
                f"--prompt-tokens and --steps are {needed} tokens together, but {name} has "
                f"{model.config.max_positions} positions: lower them"
            )


def _load_alignment(
    args: argparse.Namespace, context: Context | None, models: Sequence[EvaluatedModel]
) -> alignment.Alignment | None:
    """Load `--alignment`, else the run's, of the second model's tokenizer to the first's."""
    if args.alignment and len(models) < 2:
        raise UserError(
            "--alignment needs two models: the source model, and one with the target tokenizer"
        )
    if args.alignment:
        path = args.alignment
    elif context and len(models) >= 2 and models[0].name == SOURCE:
        path = context.folder("align")
    else:
        return None
    return alignment.load(path, models[0].tokenizer, models[1].tokenizer)


# --- Texts and questions ------------------------------------------------------------------------


def _read_material(
    args: argparse.Namespace, context: Context | None, models: Sequence[EvaluatedModel], log: Log
) -> measures.Material:
    settings = context.config.evaluation if context else EvaluationConfig()
    size = args.bytes_per_language or settings.bytes_per_language
    positions = [model.config.max_positions for model in models]
    default_dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return measures.Material(
        _read_texts(args, context, size, log),
        _read_other_texts(args, context, size, log),
        _read_questions(args, settings),
        min(args.sequence_length or settings.sequence_length, *positions),
        args.batch,
        ComputeConfig(dtype=args.dtype or default_dtype),
        args.seed,
        _read_chat_questions(args, settings),
        args.reply_tokens or settings.reply_tokens,
    )


def _read_texts(
    args: argparse.Namespace, context: Context | None, size: int, log: Log
) -> dict[str, list[str]]:
    """Read `--text`, else the run's held-out documents."""
    if args.text:
        return _chosen(_corpus(args.text, args.text_field, args.language_field), size, log)
    if context:
        return held_out.texts(context, size)
    raise UserError(
        "--text is missing: name the files of held-out text, such as --text=heldout.jsonl"
    )


def _chosen(corpus: Config, size: int, log: Log) -> dict[str, list[str]]:
    """Choose documents of files, by language."""
    files = len(documents.names(corpus))
    return bits_per_byte.choose_texts(documents.read(corpus, log), size, files)


def _read_other_texts(
    args: argparse.Namespace, context: Context | None, size: int, log: Log
) -> dict[str, list[str]]:
    """Read `--other-text`, else the run's."""
    if args.other_text is None:
        return held_out.other_texts(context) if context else {}
    if not args.other_text:
        return {}
    return _chosen(_corpus(args.other_text, args.text_field, args.language_field), size, log)


def _read_questions(
    args: argparse.Namespace, settings: EvaluationConfig
) -> list[abilities.Question]:
    """Read `--abilities`, else the run's questions."""
    names = settings.abilities if args.abilities is None else args.abilities
    return abilities.read(names, _max_questions(args, settings)) if names else []


def _read_chat_questions(
    args: argparse.Namespace, settings: EvaluationConfig
) -> list[chat_questions.ChatQuestion]:
    """Read `--chat-questions`, else the run's."""
    name = settings.chat_questions if args.chat_questions is None else args.chat_questions
    return chat_questions.read(name, _max_questions(args, settings)) if name else []


def _max_questions(args: argparse.Namespace, settings: EvaluationConfig) -> int:
    return settings.max_questions if args.max_questions is None else args.max_questions


def _check_questions(model: EvaluatedModel, material: measures.Material) -> None:
    positions = model.config.max_positions
    chat_questions.check(
        model.tokenizer,
        f"'{model.name}'",
        material.chat_questions,
        material.reply_tokens,
        positions,
    )
    abilities.check_lengths(model.tokenizer, material.questions, positions)


def _training_corpus(args: argparse.Namespace) -> Config:
    return _corpus(args.training_text, args.text_field, language_field="")


def _corpus(names: str, text_field: str, language_field: str) -> Config:
    """Return a config with the named files as its corpus, which was checked."""
    text = TextConfig(text_field=text_field, language_field=language_field)
    config = Config(corpus=names, text=text)
    documents.check(config)
    return config
