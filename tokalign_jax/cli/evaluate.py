r"""Models side by side: bits per byte, what they keep of the first, tokens, speed, drafting,
alignment, tasks.

    tokalign evaluate --models=/models/a,/models/b --text=heldout.jsonl --language-field=lang \
        --output=out
    tokalign evaluate --workdir=runs/demo --output=out     # a run's source model and its export
    tokalign evaluate --workdir=runs/demo --states=init,stage1,export --teacher=/models/large \
        --output=out
    tokalign evaluate --workdir=runs/demo --tasks=my_task --task-folder=/tasks --output=out

The first model is the one that others are compared with. Writes `scores.json` and `scores.png` to
the output folder.
"""

import argparse
import dataclasses
import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from tokalign_jax import demo, pipeline
from tokalign_jax.alignment import alignment, scoring
from tokalign_jax.cli import arguments
from tokalign_jax.config import (
    ComputeConfig,
    Config,
    EvaluationConfig,
    TextConfig,
    config_from_dict,
)
from tokalign_jax.errors import UserError, exit_code
from tokalign_jax.evaluation import (
    abilities,
    bits_per_byte,
    chat_questions,
    downstream,
    drafting,
    measures,
    overlap,
    samples,
    similarity,
    speed,
)
from tokalign_jax.evaluation.fertility import fertility, words
from tokalign_jax.models import hub, huggingface
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.huggingface import DtypeOf
from tokalign_jax.parallel import sharding
from tokalign_jax.pipeline import held_out
from tokalign_jax.pipeline.context import Context
from tokalign_jax.pipeline.states import load_state
from tokalign_jax.reporting import pages, side_by_side
from tokalign_jax.reporting.report import PACKAGES, version
from tokalign_jax.text import canonical
from tokalign_jax.text import corpus as documents
from tokalign_jax.text.editing import within_rows
from tokalign_jax.training.states import inference_dtype
from tokalign_jax.utils import compiling
from tokalign_jax.utils.progress import Log, duration
from tokalign_jax.utils.stopping import Stopped

SCORES, PICTURE = "scores.json", "scores.png"
EXPORT, SOURCE = "export", "source"


@dataclass(frozen=True)
class Subject:
    """One model to be judged."""

    name: str
    config: ModelConfig
    tokenizer: PreTrainedTokenizerBase
    load: Callable[[Mesh, DtypeOf], dict]
    """Its parameters on a mesh."""
    folder: Path | None
    """In Hugging Face format; None for a state that only its checkpoints hold."""


@dataclass(frozen=True)
class Inputs:
    """All that is measured on, checked."""

    args: argparse.Namespace
    context: Context | None
    """Of the run in `--workdir`."""
    subjects: Sequence[Subject]
    material: measures.Material
    """Texts and questions."""
    teacher: Subject | None
    aligned: alignment.Alignment | None
    encoder: similarity.Encoder | None
    dtype: str


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    args = _parser().parse_args(argv)
    start = time.monotonic()
    compiling.prepare(
        alone=not (args.tasks or args.encoder)
    )  # which PyTorch computes on the same GPU
    return exit_code(
        lambda: run(
            args,
            lambda line: print(f"[{duration(time.monotonic() - start):>6}] {line}", flush=True),
        )
    )


def _parser() -> argparse.ArgumentParser:
    parser = arguments.parser("evaluate", __doc__)
    parser.add_argument(
        "--models",
        type=arguments.names,
        default=[],
        help="folders or hub names in Hugging Face format",
    )
    parser.add_argument("--workdir", type=arguments.path, help="of a run, instead of --models")
    parser.add_argument(
        "--states",
        type=arguments.names,
        default=[SOURCE, EXPORT],
        help="of the run: source, init, stage1, ..., export",
    )
    parser.add_argument(
        "--text",
        help="held-out files, as config.corpus; with --workdir the run's own by default",
    )
    parser.add_argument(
        "--training-text",
        help="files to look for the held-out text in; with --workdir the run's own",
    )
    parser.add_argument(
        "--text-field", default="text", help="field of a record that holds the text"
    )
    parser.add_argument(
        "--language-field",
        default="",
        help="field that holds its language (none: all text is taken together)",
    )
    parser.add_argument(
        "--bytes-per-language",
        type=arguments.at_least(1),
        help="of held-out text (200,000, or what the run has)",
    )
    parser.add_argument(
        "--sequence-length",
        type=arguments.at_least(1),
        help="tokens of a window (1,024, or what the run has)",
    )
    parser.add_argument(
        "--alignment",
        type=arguments.path,
        help="folder or file of an alignment of the second model's tokenizer to the first's",
    )
    parser.add_argument(
        "--lines",
        type=arguments.at_least(1),
        default=1000,
        help="held-out lines that the alignment is judged on",
    )
    parser.add_argument(
        "--encoder",
        default="",
        help="folder of a sentence encoder (without one the first model's mean states)",
    )
    parser.add_argument(
        "--teacher", default="", help="folder or hub name of the model that drafts are for"
    )
    parser.add_argument("--gamma", type=arguments.at_least(1), default=4, help="tokens of a draft")
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="at which draft and teacher sample"
    )
    parser.add_argument(
        "--prompts", type=arguments.at_least(1), default=8, help="a language gives for drafting"
    )
    parser.add_argument(
        "--prompt-tokens", type=arguments.at_least(1), default=64, help="of each of them"
    )
    parser.add_argument(
        "--steps",
        type=arguments.at_least(1),
        default=64,
        help="tokens of a continuation, for speed and drafting",
    )
    parser.add_argument(
        "--repeats",
        type=arguments.at_least(1),
        default=3,
        help="how often speed is timed on each prompt",
    )
    parser.add_argument(
        "--abilities",
        help="multiple-choice questions, as config.evaluation.abilities; with --workdir the run's "
        "own by default",
    )
    parser.add_argument(
        "--max-questions",
        type=arguments.at_least(0),
        help="of each suite (0: all; with --workdir as the run has it)",
    )
    parser.add_argument(
        "--chat-questions",
        help="questions for the chat template, as config.evaluation.chat_questions; with "
        "--workdir the run's own by default",
    )
    parser.add_argument(
        "--reply-tokens",
        type=arguments.at_least(1),
        help="of a reply to them, at most (64, or what the run has)",
    )
    parser.add_argument(
        "--other-text",
        help="files of another kind of text; with --workdir the run's own by default",
    )
    parser.add_argument("--tasks", type=arguments.names, default=[], help="tasks of lm-eval")
    parser.add_argument(
        "--task-folder",
        type=arguments.path,
        help="with tasks of your own: YAML files and their data",
    )
    parser.add_argument(
        "--limit", type=arguments.at_least(0), default=0, help="examples of each task (0: all)"
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="to compute in (float32 on a CPU, else bfloat16)",
    )
    parser.add_argument(
        "--batch", type=arguments.at_least(1), default=8, help="windows that a device reads at once"
    )
    parser.add_argument(
        "--seed",
        type=arguments.at_least(0),
        default=0,
        help="of bootstrap draws and of the choice of lines",
    )
    parser.add_argument(
        "--output", type=arguments.path, required=True, help="folder for scores.json and scores.png"
    )
    arguments.add_overwrite(parser, "--output")
    return parser


def run(args: argparse.Namespace, log: Log) -> dict[str, Any]:
    """Checks everything, measures, writes and prints; returns what `scores.json` says.

    Raises:
      UserError: bad input, before any long work.
    """
    inputs = check(args, log)
    content = measure(inputs, log)
    (args.output / SCORES).write_text(
        json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    side_by_side.picture(content, args.output / PICTURE)
    for line in (
        "",
        *pages.terminal(side_by_side.sections(content)),
        "",
        *side_by_side.warning_lines(content),
    ):
        print(line)
    print(f"written to {args.output / SCORES} and {args.output / PICTURE}")
    return content


# --- Inputs -------------------------------------------------------------------------------------


def check(args: argparse.Namespace, log: Log) -> Inputs:
    """Reads all that is small, and finds what would fail later."""
    arguments.refuse_existing("--output", args.output, args.overwrite and args.output.is_dir())
    if bool(args.models) == bool(args.workdir) or not args.states:
        raise UserError(
            "nothing to evaluate: give --models=FOLDER,FOLDER, or --workdir of a run with "
            "--states (not both)"
        )
    context = _context(args.workdir, log) if args.workdir else None
    if context:
        _refuse_stale(context, args.states)
    subjects = (
        [_state(context, name) for name in args.states]
        if context
        else [_folder(n, args.models) for n in args.models]
    )
    if twice := [
        s.name for i, s in enumerate(subjects) if s.name in [entry.name for entry in subjects[:i]]
    ]:
        raise UserError(
            f"two models are called '{twice[0]}': name each once, and give folders of one name "
            f"different parents"
        )
    settings = context.config.evaluation if context else EvaluationConfig()
    length = min(
        [
            args.sequence_length or settings.sequence_length,
            *(subject.config.max_positions for subject in subjects),
        ]
    )
    teacher = _folder(args.teacher, [args.teacher]) if args.teacher else None
    if teacher and all(
        gaps := [
            drafting.difference_of_vocabularies(s.tokenizer, teacher.tokenizer) for s in subjects
        ]
    ):
        raise UserError(
            f"--teacher '{args.teacher}' has another vocabulary than every model to be judged "
            f"({gaps[-1]}): give one with theirs"
        )
    if not 0 < args.temperature < math.inf:
        raise UserError(f"--temperature is {args.temperature}; it must be above 0")
    if args.encoder and not (args.alignment or context):
        raise UserError(
            "--encoder is for judging an alignment: give --alignment of --models too, or a "
            "--workdir"
        )
    if args.tasks:
        downstream.check(args.tasks, args.task_folder)
    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    texts = _texts(args, context, settings.bytes_per_language, log)
    material = measures.Material(
        texts,
        _other_texts(args, context, settings, log),
        _questions(args, settings),
        length,
        args.batch,
        ComputeConfig(dtype=dtype),
        args.seed,
        _chat_questions(args, settings),
        args.reply_tokens or settings.reply_tokens,
    )
    for subject in subjects:
        chat_questions.check(
            subject.tokenizer,
            f"'{subject.name}'",
            material.asked,
            material.reply_tokens,
            subject.config.max_positions,
        )
        abilities.check_lengths(subject.tokenizer, material.questions, subject.config.max_positions)
    if args.training_text:
        _training_corpus(args)
    if teacher:
        needed = args.prompt_tokens + args.steps
        for who, config in (
            ("the teacher", teacher.config),
            *((f"'{s.name}'", s.config) for s in subjects),
        ):
            if needed > config.max_positions:
                raise UserError(
                    f"--prompt-tokens and --steps are {needed} tokens together, but {who} has "
                    f"{config.max_positions} positions: lower them"
                )
    log(
        f"{', '.join(s.name for s in subjects)}: {sum(map(len, texts.values()))} held-out "
        f"documents, {len(texts)} languages"
    )
    inputs = Inputs(
        args,
        context,
        subjects,
        material,
        teacher,
        _aligned(args, context, subjects),
        similarity.sentence_encoder(args.encoder) if args.encoder else None,
        dtype,
    )
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--output '{args.output}' cannot be made ({error.strerror}): name another folder"
        ) from error
    return inputs


def _context(workdir: Path, log: Log) -> Context:
    if not (workdir / pipeline.STATE_FILE).is_file():
        raise UserError(
            f"--workdir '{workdir}' is no workdir of a run (it has no {pipeline.STATE_FILE}); for "
            f"folders give --models"
        )
    try:
        written = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"--workdir '{workdir}' has no whole config.json ({error}): run its command again, "
            f"which writes it"
        ) from error
    return Context(config_from_dict(written), workdir, log)


def _refuse_stale(context: Context, names: Sequence[str]) -> None:
    """States are of one run: what a later command with other settings has left behind is not judged
    beside what it made.
    """
    models = pipeline.model_states(context.config)
    try:
        fingerprints = [pipeline.fingerprints_of(context, exported) for exported in models]
    except UserError:
        return  # what the run was made of is not there any more
    books = pipeline.read_records(context.workdir)
    for name in ("corpus", *(name for name in names if name in fingerprints[0])):
        record = books.get(name)
        if record and not (
            record["finished"] and record["fingerprint"] in {entry[name] for entry in fingerprints}
        ):
            why = (
                "was made with other settings than the last command's"
                if record["finished"]
                else "is not finished"
            )
            raise UserError(
                f"--workdir '{context.workdir}': {name} {why}; run that command's stages to their "
                f"end first, or name other --states"
            )


def _state(context: Context, name: str) -> Subject:
    """A state of the run, or its exported folder."""
    if name == EXPORT:
        if not (context.folder(EXPORT) / "config.json").is_file():
            raise UserError(
                f"--workdir '{context.workdir}' has no export yet: run its stages to the end, or "
                f"name other --states"
            )
        return dataclasses.replace(_folder(str(context.folder(EXPORT)), []), name=EXPORT)
    if name == SOURCE:
        config, _ = context.inputs.source_model
        return Subject(
            name,
            config,
            context.inputs.source_tokenizer,
            lambda mesh, dtype: load_state(context, [], dtype)[1],
            context.inputs.source_folder,
        )
    known = pipeline.model_states(context.config)
    if name not in known or not context.folder(name).exists():
        there = [SOURCE, *(n for n in [*known, EXPORT] if context.folder(n).exists())]
        raise UserError(
            f"--states names '{name}', which the run in '{context.workdir}' does not have; it has "
            f"{', '.join(there)}"
        )
    states = known[: known.index(name) + 1]
    config, _ = hub.load_config(context.folder("init"))
    folder = context.folder(name) if name == "init" else None
    return Subject(
        name,
        config,
        context.inputs.target_tokenizer,
        lambda mesh, dtype: _loaded(context, states, dtype),
        folder,
    )


def _loaded(context: Context, states: Sequence[str], dtype: DtypeOf) -> Any:
    try:
        return load_state(context, states, dtype)[1]
    except Stopped as stopped:
        raise UserError(f"{stopped}: run the command that the workdir is of once more") from stopped


def _folder(name: str, others: Sequence[str]) -> Subject:
    """A model in Hugging Face format, called by its folder's name, with that of the folder above
    where others are called so too.
    """
    folder = hub.resolve(demo.source_model(name), what="model")
    config, _ = hub.load_config(folder)
    huggingface.check_weights(folder, config)
    tokenizer = within_rows(hub.load_tokenizer(folder), config.vocab_size, f"model '{name}'")
    whole = lambda name: Path(name).resolve() if Path(name).is_dir() else Path(name)  # noqa: E731
    parts = whole(name).parts
    alone = [whole(other).name for other in others].count(parts[-1]) < 2
    called = parts[-1] if alone else "/".join(parts[-2:])
    return Subject(
        called,
        config,
        tokenizer,
        lambda mesh, dtype: huggingface.load_params(folder, config, dtype, mesh),
        folder,
    )


def _texts(
    args: argparse.Namespace, context: Context | None, size: int, log: Log
) -> dict[str, list[str]]:
    """The held-out text: what is named, else the run's."""
    if args.text:
        held_out = documents.read(_corpus(args, args.text), log)
    elif context:
        held_out = documents.held_out(context.folder("corpus"))
    else:
        raise UserError(
            "--text is missing: name the files of held-out text, such as --text=heldout.jsonl"
        )
    return bits_per_byte.choose(held_out, args.bytes_per_language or size)


def _other_texts(
    args: argparse.Namespace, context: Context | None, settings: EvaluationConfig, log: Log
) -> dict[str, list[str]]:
    """The text of another kind: what is named, else the run's."""
    if args.other_text is None:
        return held_out.other_texts(context) if context else {}
    if not args.other_text:
        return {}
    read = documents.read(_corpus(args, args.other_text), log)
    return bits_per_byte.choose(read, args.bytes_per_language or settings.bytes_per_language)


def _questions(args: argparse.Namespace, settings: EvaluationConfig) -> list[abilities.Question]:
    """The questions that are named, else the run's."""
    names = settings.abilities if args.abilities is None else args.abilities
    most = settings.max_questions if args.max_questions is None else args.max_questions
    return abilities.read(names, most) if names else []


def _chat_questions(
    args: argparse.Namespace, settings: EvaluationConfig
) -> list[chat_questions.ChatQuestion]:
    """The chat questions that are named, else the run's."""
    name = settings.chat_questions if args.chat_questions is None else args.chat_questions
    most = settings.max_questions if args.max_questions is None else args.max_questions
    return chat_questions.read(name, most) if name else []


def _corpus(args: argparse.Namespace, names: str) -> Config:
    """`names` as a corpus, looked at."""
    config = Config(
        corpus=names,
        text=TextConfig(text_field=args.text_field, language_field=args.language_field),
    )
    documents.check(config)
    return config


def _training_corpus(args: argparse.Namespace) -> Config:
    return _corpus(
        argparse.Namespace(text_field=args.text_field, language_field=""), args.training_text
    )


def _training(inputs: Inputs, log: Log) -> Iterator[list[documents.Document]] | None:
    """The training text in batches, where it is known."""
    args, context = inputs.args, inputs.context
    if args.training_text:
        return map(list, documents.in_groups(documents.read(_training_corpus(args), log)))
    return documents.train_batches(context.folder("corpus")) if context else None


def _aligned(
    args: argparse.Namespace, context: Context | None, subjects: Sequence[Subject]
) -> alignment.Alignment | None:
    """The alignment of a later subject's tokenizer to the first one's: that which is named, else
    the run's.
    """
    path = args.alignment or (context.folder("align") if context else None)
    if path is None or (not args.alignment and (len(subjects) < 2 or subjects[0].name != SOURCE)):
        return None
    if len(subjects) < 2:
        raise UserError(
            "--alignment needs two models: the source model, and one with the target tokenizer"
        )
    return alignment.load(path, subjects[0].tokenizer, subjects[1].tokenizer)


# --- Measuring ----------------------------------------------------------------------------------


def measure(inputs: Inputs, log: Log) -> dict[str, Any]:
    """Everything, as `scores.json` has it."""
    args, subjects = inputs.args, inputs.subjects
    # First, and in a process of its own, while the memory of a GPU is free.
    tasks = _tasks(inputs, log)
    training = _training(inputs, log)
    overlapping = (
        {"overlap": overlap.overlap(inputs.material.texts, training, log)} if training else {}
    )
    everyone = [*subjects, *([inputs.teacher] if inputs.teacher else [])]
    mesh = (
        inputs.context.mesh
        if inputs.context
        else sharding.make_mesh(state_bytes=2 * max(map(_bytes, everyone)))
    )
    dtype = inference_dtype(inputs.dtype)
    teacher = (
        drafting.Model(inputs.teacher.config, inputs.teacher.load(mesh, dtype))
        if inputs.teacher
        else None
    )
    models, costs, aligned = {}, {}, {}
    reference: measures.Reference | None = None
    for subject in subjects:
        model = drafting.Model(subject.config, subject.load(mesh, dtype))
        arguments = model.config, model.params, subject.tokenizer, inputs.material, mesh, log
        measured = measures.measure(subject.name, *arguments)
        costs[subject.name] = measured.costs
        models[subject.name] = {
            "folder": str(subject.folder or ""),
            "vocabulary": subject.config.vocab_size,
            "loses": canonical.losses(subject.tokenizer),
            **measures.summary(measured, reference, inputs.material),
            **_scores(inputs, costs[subject.name]),
            **tasks.get(subject.name, {}),
        }
        models[subject.name]["generation"] = _speed(
            inputs, subject, model, models[subject.name]["pooled"]["tokens"], log
        )
        if teacher and inputs.teacher:
            models[subject.name]["drafting"] = _drafting(
                inputs, subject, model, inputs.teacher, teacher, mesh, log
            )
        if inputs.aligned is not None and subject is subjects[0]:
            aligned = {"alignment": _alignment(inputs, inputs.aligned, model, log)}
        reference = reference or measured.reference
        del model
    others = subjects[1:]
    return {
        "models": models,
        "differences": {
            s.name: _difference(costs[s.name], costs[subjects[0].name], args.seed) for s in others
        },
        **(
            {"teacher": {"name": inputs.teacher.name, "folder": str(inputs.teacher.folder)}}
            if inputs.teacher
            else {}
        ),
        **aligned,
        **overlapping,
        "settings": {
            **{k: _plain(v) for k, v in vars(args).items()},
            "sequence_length": inputs.material.sequence_length,
            "dtype": inputs.dtype,
        },
        "versions": {**{p: version(p) for p in PACKAGES}, "python": platform.python_version()},
        "devices": [str(device.device_kind) for device in jax.devices()],
    }


def _tasks(inputs: Inputs, log: Log) -> dict[str, dict[str, Any]]:
    """By model; states without a folder have none."""
    args = inputs.args
    within = [(s.name, s.folder) for s in inputs.subjects if s.folder] if args.tasks else []
    if not within:
        return {}
    log(f"tasks: {', '.join(args.tasks)} on {', '.join(name for name, _ in within)}, by lm-eval")
    found = downstream.run_apart(
        [folder for _, folder in within], args.tasks, args.task_folder, args.limit
    )
    return {name: {"tasks": entry} for (name, _), entry in zip(within, found)}


def _scores(inputs: Inputs, costs: Mapping[str, bits_per_byte.Costs]) -> dict[str, Any]:
    """Bits per byte, bytes per token and fertility, by language and pooled."""
    seed = inputs.args.seed
    counted = {
        language: int(words(entry).sum()) for language, entry in inputs.material.texts.items()
    }

    def with_words(entry: dict[str, Any], count: int) -> dict[str, Any]:
        return {**entry, "words": count, "fertility": fertility(entry["tokens"], count)}

    by_language = bits_per_byte.summaries(costs, seed)
    return {
        "languages": {
            language: with_words(entry, counted[language])
            for language, entry in by_language.items()
        },
        "pooled": with_words(bits_per_byte.summary([*costs.values()], seed), sum(counted.values())),
    }


def _difference(
    costs: Mapping[str, bits_per_byte.Costs], first: Mapping[str, bits_per_byte.Costs], seed: int
) -> dict[str, Any]:
    by_language = {
        language: bits_per_byte.difference([entry], [first[language]], seed)
        for language, entry in costs.items()
    }
    return {
        "languages": by_language,
        "pooled": bits_per_byte.difference([*costs.values()], [*first.values()], seed),
    }


def _speed(
    inputs: Inputs, subject: Subject, model: drafting.Model, tokens: int, log: Log
) -> dict[str, Any]:
    args, prompts = inputs.args, samples.passages(inputs.material.texts, 2)
    params = jax.tree.map(lambda x: x.astype(inputs.dtype), model.params)
    found = speed.measure(
        model.config,
        params,
        subject.tokenizer,
        prompts,
        steps=args.steps,
        repeats=args.repeats,
        dtype=inputs.dtype,
    )
    entry = found.summary(
        [text for group in inputs.material.texts.values() for text in group], tokens
    )
    log(
        f"{subject.name}: {found.median:.1f} steps/s, {entry['characters_per_second']:.0f} "
        f"characters/s"
    )
    return entry


def _drafting(
    inputs: Inputs,
    subject: Subject,
    model: drafting.Model,
    big: Subject,
    teacher: drafting.Model,
    mesh: Mesh,
    log: Log,
) -> dict[str, Any]:
    if gap := drafting.difference_of_vocabularies(subject.tokenizer, big.tokenizer):
        return {"not_comparable": gap}
    args = inputs.args
    return {
        "languages": drafting.acceptance(
            model,
            teacher,
            big.tokenizer,
            inputs.material.texts,
            gamma=args.gamma,
            temperature=args.temperature,
            prompts=args.prompts,
            length=args.prompt_tokens,
            steps=args.steps,
            dtype=inputs.dtype,
            mesh=mesh,
            log=log,
            what=f"{subject.name} drafts",
        )
    }


def _alignment(
    inputs: Inputs, found: alignment.Alignment, model: drafting.Model, log: Log
) -> dict[str, Any]:
    """BLEU-1 and similarity of lines drawn at random, by language."""
    source, target = (subject.tokenizer for subject in inputs.subjects[:2])
    every = [
        (language, line)
        for language, entry in inputs.material.texts.items()
        for text in entry
        for line in text.splitlines()
        if line.strip()
    ]
    chosen = np.random.default_rng(inputs.args.seed).permutation(len(every))[: inputs.args.lines]
    lines: dict[str, list[str]] = {}
    for i in np.sort(chosen):
        lines.setdefault(every[i][0], []).append(every[i][1])
    log(f"alignment: {len(chosen)} lines")
    mapping = found.heaviest()
    encode = inputs.encoder or similarity.mean_states(
        model.config, model.params, source, inputs.dtype
    )
    by_language = similarity.compare(mapping, source, target, lines, encode)
    for language, entry in by_language.items():
        entry["bleu_1"] = scoring.score(mapping, source, target, lines[language])
    return {
        "bleu_1": scoring.score(
            mapping, source, target, [line for entry in lines.values() for line in entry]
        ),
        "embedded_by": Path(inputs.args.encoder).name
        if inputs.encoder
        else "the mean final states of the first model",
        "languages": by_language,
    }


def _bytes(subject: Subject) -> int:
    return (
        sum(file.stat().st_size for file in subject.folder.glob("*.safetensors"))
        if subject.folder
        else 0
    )


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
