"""Checks of a run's inputs: everything that would fail later is refused before any long work."""

import functools
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from tokalign_jax.alignment import alignment, methods, vectors
from tokalign_jax.config import Config, training_stages
from tokalign_jax.errors import UserError
from tokalign_jax.evaluation import abilities, chat_questions
from tokalign_jax.initialization.start import not_finite
from tokalign_jax.models import hub, huggingface, opening, peft
from tokalign_jax.models.families import qwen
from tokalign_jax.pipeline import held_out
from tokalign_jax.pipeline.context import Context
from tokalign_jax.pipeline.inputs import open_tokenizer
from tokalign_jax.planning import resolve
from tokalign_jax.text import canonical, chats, mining, numbers, pruning, tokenizing
from tokalign_jax.text import corpus as documents
from tokalign_jax.text.canonical import vocabulary_size

MOST_UNUSABLE = 0.05
"""Maximum share of source tokens whose rows may hold NaN or infinity, as those of reserved tokens
that were never trained. With more of them the model is broken."""


def check(context: Context) -> None:
    """Check the models, tokenizers, corpus, alignment and lengths of a run.

    Raises:
      UserError: naming the input that the run would fail on.
    """
    config, inputs = context.config, context.inputs
    model, raw = inputs.source_model
    if config.export.adapters == "apart":
        peft.check(model)
    huggingface.check_weights(inputs.source_folder, model)
    tokenizing.check(inputs.source_tokenizer)
    _warn_of_ambiguous_files(context)
    hub.warn_dropped_values(inputs.source_folder, raw, model.vocab_size, context.log)
    _check_target(context)
    resolve.check_lengths(config, model)
    _check_teacher(context)
    _check_donor(context)
    if (corpus := documents.without_self(config)) is not None:
        _check_workdir_outside(corpus, context.workdir)
        _check_corpus(context, corpus)
    if not context.folder("init").exists():
        check_finite(context)
    _check_evaluation(context)
    _check_alignment(context)


def _check_workdir_outside(config: Config, workdir: Path) -> None:
    """Check that no folder of the corpus holds the workdir, whose files would be read as text."""
    for folder in documents.folders(config):
        if workdir.resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"--workdir '{workdir}' is in the folder '{folder}' of the corpus, so that the"
                " files of the run would be read as text: choose a --workdir elsewhere, or name the"
                " files of the corpus, such as '*.jsonl'"
            )


# --- Tokenizers ---------------------------------------------------------------------------------


def _check_target(context: Context) -> None:
    """Check the target tokenizer, or that it can be derived from the source's."""
    inputs = context.inputs
    if inputs.extends:
        mining.check(inputs.source_tokenizer)
        return
    if inputs.prunes:
        _check_pruning(context)
        return
    tokenizing.check(inputs.target_tokenizer)
    if exports_as_llama(context):
        warn_of_llama(context)
    if inputs.source_tokenizer.chat_template and not inputs.target_tokenizer.chat_template:
        context.log(
            "warning: the source model has a chat template and the target tokenizer has none, so "
            "the exported model will have none: keep the source's with --config.chat=source, or "
            "put a chat_template.jinja that writes the target's special tokens beside its "
            "tokenizer.json"
        )
    _, raw = inputs.source_model
    configs = hub.load_generation_config(inputs.source_folder) or {}, raw
    source = open_tokenizer(inputs.source_folder)
    _, missing = hub.stop_tokens(configs, source, inputs.target_tokenizer)
    if missing:
        context.log(
            f"warning: the source model stops at {', '.join(map(repr, missing))}, for which the "
            "target tokenizer has no token: the exported model does not stop there"
        )
    if (closing := tokenizing.closing_id(inputs.target_tokenizer)) is not None:
        token = inputs.target_tokenizer.convert_ids_to_tokens(closing)
        context.log(
            f"warning: the target tokenizer appends '{token}' to every text: encode prompts of "
            "the exported model with add_special_tokens=False, or it continues after the end of a "
            "text"
        )


def _warn_of_ambiguous_files(context: Context) -> None:
    """Warn of folders whose files define two different tokenizations."""
    config, inputs = context.config, context.inputs
    folders = {f"source_model '{config.source_model}'": inputs.source_folder}
    if not inputs.derives:
        folders[f"target_tokenizer '{config.target_tokenizer}'"] = inputs.target_folder
    for name, folder in folders.items():
        if contradiction := opening.file_contradiction(folder, open_tokenizer(folder)):
            context.log(f"warning: the files of {name} give two tokenizations: {contradiction}")


def _check_pruning(context: Context) -> None:
    """Check that the source tokenizer can be pruned, and that no setting contradicts it."""
    tokenizer = context.inputs.source_tokenizer
    pruning.check(tokenizer)
    config, end_of_text = context.config.alignment, context.config.end_of_text
    for name in ("file", "donor", "source_vectors", "target_vectors"):
        if getattr(config, name):
            raise UserError(
                f"alignment.{name} has no effect with target_tokenizer=prune, where every token "
                "keeps its own row: leave it out"
            )
    if end_of_text and end_of_text not in tokenizer.get_vocab():
        raise UserError(
            f"end_of_text '{end_of_text}' is no token of the source tokenizer, and "
            "target_tokenizer=prune adds none: name one of its tokens, or leave it out"
        )


def chat_check(context: Context) -> documents.ChatCheck:
    """Return a check that the new model's chat template can write a chat of the corpus."""
    tokenizer = _template_tokenizer(context)
    problem = functools.cache(lambda: chats.template_problem(tokenizer))

    def check_chat(messages: Sequence[chats.Message]) -> None:
        if problem():
            raise UserError(
                f"the corpus has chats, but target_tokenizer '{context.config.target_tokenizer}' "
                f"cannot write them: {problem()}; keep the source's template with "
                "--config.chat=source, put a chat_template.jinja beside its tokenizer.json, or "
                "read chats as text with --config.text.messages_field= (and "
                "--config.text.text_field)"
            )
        chats.write(tokenizer, messages)

    return check_chat


def _check_corpus(context: Context, corpus: Config) -> None:
    """Check the corpus, and warn if a chat model is to train on text without chats."""
    check_chat, chat_found = chat_check(context), False

    def check_found_chat(messages: Sequence[chats.Message]) -> None:
        nonlocal chat_found
        chat_found = True
        check_chat(messages)

    documents.check(corpus, check_found_chat)
    trains = training_stages(context.config) and not documents.has_self(context.config)
    answers = context.inputs.source_tokenizer.chat_template and can_chat(context)
    if trains and answers and not chat_found:
        context.log(
            "warning: the source model has a chat template, but the files of the corpus begin with "
            "other text, and a model that trains on that alone may no longer end its turns: add "
            "chats (JSON Lines with messages), or text of the source model, which has some, as in "
            "--config.corpus='TEXT=0.8,self=0.2'"
        )


def can_chat(context: Context) -> bool:
    """Return whether the new model has a usable chat template."""
    return not chats.template_problem(_template_tokenizer(context))


def _template_tokenizer(context: Context) -> PreTrainedTokenizerBase:
    """Return the tokenizer whose chat template the new model will have."""
    inputs = context.inputs
    # A derived tokenizer has the template of the source's, and may not exist yet.
    return inputs.source_tokenizer if inputs.derives else inputs.target_tokenizer


def _check_same_tokenizer(context: Context, name: str, folder: Path) -> None:
    """Check that a model has the target tokenizer.

    Args:
      name: how the message names the model.
    """
    inputs, config = context.inputs, context.config
    other = open_tokenizer(folder, config.end_of_text)
    if differing := canonical.differing(inputs.target_tokenizer, other):
        first, here, there = differing[0]
        raise UserError(
            f"{name} has another tokenizer than target_tokenizer '{config.target_tokenizer}': "
            f"{len(differing):,} of {inputs.target_size:,} ids are other tokens, the first is "
            f"{first}, {here!r} here and {there!r} there; take target_tokenizer from that model's "
            "folder, or another model"
        )


# --- Models -------------------------------------------------------------------------------------


def _check_teacher(context: Context) -> None:
    """Check that the teacher of Stage 3 is complete and covers the student's tokens and lengths."""
    inputs, stage = context.inputs, context.config.stage3
    folder, model = inputs.teacher_folder, inputs.teacher_model
    if not (folder and model):
        return
    name = f"stage3.teacher '{stage.teacher}'"
    if inputs.derives:
        raise UserError(
            f"{name}: no model has the tokenizer that "
            f"target_tokenizer={context.config.target_tokenizer} will make; do Stage 3 in a run of "
            "its own whose source model is this run's export, or leave stage3.teacher empty"
        )
    huggingface.check_weights(folder, model)
    if stage.batch.sequence_length > model.max_positions:
        raise UserError(
            f"{name} has {model.max_positions:,} positions but "
            f"config.stage3.batch.sequence_length is {stage.batch.sequence_length:,}; set "
            f"--config.stage3.batch.sequence_length={model.max_positions} or less"
        )
    _check_same_tokenizer(context, name, folder)
    target = inputs.target_tokenizer
    in_text = {tokenizing.end_of_text_id(target), tokenizing.opening_id(target)}
    without_row = set(range(model.vocab_size, inputs.target_size))
    if without_row - (canonical.special_ids(target) - in_text):
        raise UserError(
            f"{name} has {model.vocab_size:,} rows for the {inputs.target_size:,} tokens of the "
            "target tokenizer, so it predicts nothing for the last ones; take the tokenizer as "
            "that model has it (without end_of_text)"
        )


def _check_donor(context: Context) -> None:
    """Check that method `omp`, and no other, has a donor with the target tokenizer."""
    config, inputs = context.config.alignment, context.inputs
    if config.method != "omp" or config.file:
        if config.donor:
            raise UserError(
                "alignment.donor is only used with alignment.method 'omp' and without "
                "alignment.file: leave it out, or choose that method"
            )
        return
    if inputs.derives:
        raise UserError(
            "alignment.method 'omp' needs alignment.donor, a model with the target tokenizer, and "
            f"none has the one that target_tokenizer={context.config.target_tokenizer} will make: "
            "choose another method"
        )
    if not config.donor:
        raise UserError(
            "alignment.method 'omp' needs alignment.donor, a model with the target tokenizer"
        )
    assert inputs.donor_folder
    huggingface.check_weights(inputs.donor_folder, hub.load_config(inputs.donor_folder)[0])
    _check_same_tokenizer(context, f"alignment.donor '{config.donor}'", inputs.donor_folder)


def check_finite(context: Context) -> None:
    """Read all weights of the source model and refuse a broken one.

    Raises:
      UserError: a weight of its layers, or the rows of many tokens, hold NaN or infinity.
    """
    config, _ = context.inputs.source_model
    rows = huggingface.non_finite_rows(context.inputs.source_folder, config)
    size = vocabulary_size(context.inputs.source_tokenizer)
    unusable = {i for ids in rows.values() for i in ids.tolist() if i < size}
    if len(unusable) > MOST_UNUSABLE * size:
        raise UserError(
            f"source_model '{context.config.source_model}': "
            f"{not_finite(unusable, context.inputs.source_tokenizer)}, of {size:,}: its training "
            "diverged, or its files were damaged or badly converted; take another checkpoint of it"
        )


# --- Alignment and evaluation -------------------------------------------------------------------


def _check_alignment(context: Context) -> None:
    config, inputs = context.config.alignment, context.inputs
    needs_vectors = config.method in methods.NEED_VECTORS and not config.file
    if (config.source_vectors or config.target_vectors) and not needs_vectors:
        setting = f"file '{config.file}'" if config.file else f"method '{config.method}'"
        raise UserError(
            f"alignment.{setting} makes no use of alignment.source_vectors and target_vectors: "
            f"leave them out, or choose one of {', '.join(sorted(methods.NEED_VECTORS))} as "
            "alignment.method and no alignment.file"
        )
    if needs_vectors:
        source_size = vocabulary_size(inputs.source_tokenizer)
        vectors.check(config, source_size, inputs.target_size)
    elif config.file and not inputs.derives:  # else the target tokenizer does not exist yet
        alignment.load(Path(config.file), inputs.source_tokenizer, inputs.target_tokenizer)


def _check_evaluation(context: Context) -> None:
    """Check that both models can read the questions and the other text; warn of numbers."""
    config, inputs = context.config, context.inputs
    tokenizers = {"the source model": inputs.source_tokenizer}
    if not inputs.derives:
        tokenizers["the new model"] = inputs.target_tokenizer
    positions = inputs.source_model[0].max_positions
    for tokenizer in tokenizers.values():
        abilities.check_lengths(tokenizer, held_out.questions(config), positions)
    for name, tokenizer in tokenizers.items():
        asked, reply_tokens = held_out.chats(config), config.evaluation.reply_tokens
        chat_questions.check(tokenizer, name, asked, reply_tokens, positions)
    if (other := held_out.other_config(config)) is not None:
        trained = {Path(name).resolve() for name in documents.names(config)}
        if shared := [name for name in documents.names(other) if Path(name).resolve() in trained]:
            raise UserError(
                f"evaluation.other_text names '{shared[0]}', which is in the corpus too: name "
                "text that is not trained on"
            )
        documents.check(other)
    if not inputs.derives and (line := numbers.warning_line(*tokenizers.values())):
        context.log(line)


# --- Export -------------------------------------------------------------------------------------


def exports_as_llama(context: Context) -> bool:
    """Return whether the export is written with model_type `llama` (`qwen.as_llama`).

    It is if the model is a Qwen 2 and transformers would open the target tokenizer as Qwen's.

    Raises:
      UserError: transformers would open it differently, and the model cannot be written so.
    """
    problem = _opening_problem(context)
    if not problem or qwen.is_llama(context.inputs.source_model[0]):
        return bool(problem)
    raise UserError(
        f"{problem}: the exported model would read other tokens than it was trained with; take "
        "another target tokenizer, or a source model of another family"
    )


def warn_of_llama(context: Context) -> None:
    """Warn that the export is written with another model_type, and why."""
    context.log(
        f"warning: {_opening_problem(context)}; so the export is written as the same model with "
        "model_type 'llama'"
    )


def _opening_problem(context: Context) -> str:
    """Return how transformers would misread the exported tokenizer; "" if it would not."""
    _, raw = context.inputs.source_model
    difference = opening.class_difference(raw, context.inputs.target_tokenizer)
    if not difference:
        return ""
    return (
        f"transformers opens the exported tokenizer, beside model_type '{raw['model_type']}', as "
        f"{difference}"
    )
