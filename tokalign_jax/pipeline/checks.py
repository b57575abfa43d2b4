"""What would fail later is found before any long work."""

import functools
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from tokalign_jax.alignment import alignment, methods, vectors
from tokalign_jax.errors import UserError
from tokalign_jax.evaluation import abilities, chat_questions
from tokalign_jax.initialization.start import not_finite
from tokalign_jax.models import hub, huggingface, opening, peft
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.families import qwen
from tokalign_jax.pipeline import held_out
from tokalign_jax.pipeline.context import Context
from tokalign_jax.pipeline.inputs import open_tokenizer
from tokalign_jax.planning import resolve
from tokalign_jax.text import canonical, chats, mining, numbers, pruning, tokenizing
from tokalign_jax.text import corpus as documents
from tokalign_jax.text.canonical import vocabulary_size


def chat_check(context: Context) -> documents.ChatCheck:
    """What checks that a chat of the corpus can be written by the new model's chat template."""
    tokenizer = _template_tokenizer(context)
    problem = functools.cache(lambda: chats.template_problem(tokenizer))

    def check_chat(messages: Sequence[chats.Message]) -> None:
        if problem():
            raise UserError(
                f"the corpus has chats, but target_tokenizer '{context.config.target_tokenizer}' "
                f"cannot "
                f"write them: {problem()}; keep the source's template with --config.chat=source, "
                f"put a "
                "chat_template.jinja beside its tokenizer.json, or read them as text with "
                "--config.text.messages_field= (and --config.text.text_field)"
            )
        chats.write(tokenizer, messages)

    return check_chat


def can_chat(context: Context) -> bool:
    """Whether the new model has a chat template that can be used."""
    return not chats.template_problem(_template_tokenizer(context))


def _template_tokenizer(context: Context) -> PreTrainedTokenizerBase:
    """The tokenizer whose chat template the new model has."""
    inputs = context.inputs
    # A tokenizer that is derived from the source's, and yet to be made, has its template.
    return inputs.source_tokenizer if inputs.derives else inputs.target_tokenizer


def check(context: Context) -> None:
    """Find what would fail later, before any long work.

    Raises:
      UserError: naming what is wrong with the model, a tokenizer, the corpus, the alignment file or
        a length.
    """
    if context.config.export.adapters == "apart":
        peft.check(context.inputs.source_model[0])
    config = context.config
    model, _ = context.inputs.source_model
    huggingface.check_weights(context.inputs.source_folder, model)
    source_size = vocabulary_size(context.inputs.source_tokenizer)
    tokenizing.check(context.inputs.source_tokenizer)
    _check_two_readings(context)
    hub.warn_dropped_values(
        context.inputs.source_folder, context.inputs.source_model[1], model.vocab_size, context.log
    )
    if context.inputs.extends:
        mining.check(context.inputs.source_tokenizer)
    elif context.inputs.prunes:
        _check_pruning(context)
    else:
        tokenizing.check(context.inputs.target_tokenizer)
        if exports_as_llama(context):
            warn_of_llama(context)
        if (
            context.inputs.source_tokenizer.chat_template
            and not context.inputs.target_tokenizer.chat_template
        ):
            context.log(
                "warning: the source model has a chat template and the target tokenizer has none, "
                "so the exported model has "
                "none: keep the source's with --config.chat=source, or put a chat_template.jinja "
                "that writes the "
                "target's special tokens beside its tokenizer.json"
            )
        if (closing := tokenizing.closing_id(context.inputs.target_tokenizer)) is not None:
            context.log(
                f"warning: the target tokenizer puts "
                f"'{context.inputs.target_tokenizer.convert_ids_to_tokens(closing)}' behind every "
                f"text: "
                "give the exported model its prompts with add_special_tokens=False, or it goes on "
                "from an end"
            )
    resolve.check_lengths(config, model)
    if context.inputs.teacher_folder and context.inputs.teacher_model:
        _check_teacher(context, context.inputs.teacher_folder, context.inputs.teacher_model)
    _check_donor(context)
    if (read := documents.without_self(config)) is not None:
        documents.check(read, chat_check(context))
    if not context.folder("init").exists():
        check_finite(context)
    _check_measures(context)
    taken = f"alignment.file '{config.alignment.file}'" if config.alignment.file else ""
    if not taken and config.alignment.method not in methods.NEED_VECTORS:
        taken = f"alignment.method '{config.alignment.method}'"
    if taken and (config.alignment.source_vectors or config.alignment.target_vectors):
        raise UserError(
            f"{taken} makes no use of alignment.source_vectors and target_vectors: leave them "
            f"out, or take "
            f"{', '.join(sorted(methods.NEED_VECTORS))} as the method and no file"
        )
    if config.alignment.file:
        if not context.inputs.derives:  # else once there is a target tokenizer
            alignment.load(
                Path(config.alignment.file),
                context.inputs.source_tokenizer,
                context.inputs.target_tokenizer,
            )
    elif config.alignment.method in methods.NEED_VECTORS:
        vectors.check(config.alignment, source_size, context.inputs.target_size)


def _check_two_readings(context: Context) -> None:
    folders = {f"source_model '{context.config.source_model}'": context.inputs.source_folder}
    folders |= (
        {}
        if context.inputs.derives
        else {f"target_tokenizer '{context.config.target_tokenizer}'": context.inputs.target_folder}
    )
    for whose, folder in folders.items():
        if contradiction := opening.file_contradiction(folder, open_tokenizer(folder)):
            context.log(f"warning: the files of {whose} give two tokenizations: {contradiction}")


def _check_pruning(context: Context) -> None:
    """Check that the source's tokenizer can be pruned, and nothing else makes its alignment."""
    pruning.check(context.inputs.source_tokenizer)
    config, end_of_text = context.config.alignment, context.config.end_of_text
    for name in ("file", "donor", "source_vectors", "target_vectors"):
        if getattr(config, name):
            raise UserError(
                f"alignment.{name} has no effect with target_tokenizer=prune, where every token "
                f"has "
                "its own row: leave it out"
            )
    if end_of_text and end_of_text not in context.inputs.source_tokenizer.get_vocab():
        raise UserError(
            f"end_of_text '{end_of_text}' is no token of the source tokenizer, and "
            "target_tokenizer=prune adds none: name one that it has, or leave it out"
        )


def _check_measures(context: Context) -> None:
    """Check that questions and other text can be measured; warn of numbers."""
    tokenizers = [
        context.inputs.source_tokenizer,
        *([] if context.inputs.derives else [context.inputs.target_tokenizer]),
    ]
    for tokenizer in tokenizers:
        abilities.check_lengths(
            tokenizer,
            held_out.questions(context.config),
            context.inputs.source_model[0].max_positions,
        )
    for tokenizer, whose in zip(tokenizers, ("the source model", "the new model")):
        chat_questions.check(
            tokenizer,
            whose,
            held_out.chats(context.config),
            context.config.evaluation.reply_tokens,
            context.inputs.source_model[0].max_positions,
        )
    if (other := held_out.other_config(context.config)) is not None:
        if same := set(documents.names(context.config)) & set(documents.names(other)):
            raise UserError(
                f"evaluation.other_text names '{min(same)}', which is in the corpus too: name "
                f"text that is not trained on"
            )
        documents.check(other)
    if not context.inputs.derives and (line := numbers.warning_line(*tokenizers)):
        context.log(line)


def _check_teacher(context: Context, folder: Path, model: ModelConfig) -> None:
    """That the teacher is whole, and can say something about each token and sequence that the
    student reads.
    """
    stage = context.config.stage3
    who = f"stage3.teacher '{stage.teacher}'"
    if context.inputs.derives:
        raise UserError(
            f"{who}: no model has the tokenizer that "
            f"target_tokenizer={context.config.target_tokenizer} is yet to make; run Stage 3 in a "
            f"run of its own, whose "
            "source model is this one's export, or leave stage3.teacher empty"
        )
    huggingface.check_weights(folder, model)
    if stage.sequence_length > model.max_positions:
        raise UserError(
            f"{who} has {model.max_positions:,} positions but config.stage3.sequence_length is "
            f"{stage.sequence_length:,}; set "
            f"--config.stage3.sequence_length={model.max_positions} or less"
        )
    _check_same_tokenizer(context, who, folder)
    met = {
        tokenizing.end_of_text_id(context.inputs.target_tokenizer),
        tokenizing.opening_id(context.inputs.target_tokenizer),
    }
    if set(range(model.vocab_size, context.inputs.target_size)) - (
        canonical.special_ids(context.inputs.target_tokenizer) - met
    ):
        raise UserError(
            f"{who} has {model.vocab_size:,} rows for the {context.inputs.target_size:,} tokens "
            f"of the target tokenizer: it says "
            "nothing of the last ones; take the tokenizer as that model has it (without "
            "end_of_text)"
        )


def _check_donor(context: Context) -> None:
    """Check that method `omp` has a donor with the target tokenizer, and no other method one."""
    config = context.config.alignment
    if config.method != "omp" or config.file:
        if config.donor:
            raise UserError(
                "alignment.donor is for alignment.method 'omp' alone: leave it out, or take that "
                "method and no file"
            )
        return
    who = f"alignment.donor '{config.donor}'"
    if context.inputs.derives or not config.donor:
        raise UserError(
            "alignment.method 'omp' needs alignment.donor, a model that has the target tokenizer "
            "already"
            + (
                f"; none has one that target_tokenizer={context.config.target_tokenizer} is yet "
                f"to make: "
                "take another method"
                if context.inputs.derives
                else ""
            )
        )
    assert context.inputs.donor_folder
    huggingface.check_weights(
        context.inputs.donor_folder, hub.load_config(context.inputs.donor_folder)[0]
    )
    _check_same_tokenizer(context, who, context.inputs.donor_folder)


def _check_same_tokenizer(context: Context, who: str, folder: Path) -> None:
    if differing := canonical.differing(
        context.inputs.target_tokenizer, open_tokenizer(folder, context.config.end_of_text)
    ):
        first, here, there = differing[0]
        raise UserError(
            f"{who} has another tokenizer than target_tokenizer "
            f"'{context.config.target_tokenizer}': {len(differing):,} of "
            f"{context.inputs.target_size:,} ids are other tokens, the first is {first}, {here!r} "
            f"here and {there!r} there; take "
            "target_tokenizer from that model's folder, or another model"
        )


def exports_as_llama(context: Context) -> bool:
    """Whether the export is written with model_type `llama` (`qwen.as_llama`).

    That is done to a Qwen 2 model where transformers would open the target tokenizer as Qwen's.

    Raises:
      UserError: transformers would open it otherwise, and the model cannot be written so.
    """
    problem = _opening_problem(context)
    if not problem or qwen.is_llama(context.inputs.source_model[0]):
        return bool(problem)
    raise UserError(
        f"{problem}: the exported model would read other tokens than it was trained with; take "
        "another target tokenizer, or a source model of another family"
    )


def warn_of_llama(context: Context) -> None:
    """Log that, and why, the export is written with another model_type."""
    context.log(
        f"warning: {_opening_problem(context)}; so the export is written as the same model of "
        "model_type 'llama'"
    )


def _opening_problem(context: Context) -> str:
    """Say how transformers would open the exported tokenizer other than it is; empty: as it is."""
    _, raw = context.inputs.source_model
    difference = opening.class_difference(raw, context.inputs.target_tokenizer)
    beside = f"beside model_type '{raw['model_type']}'"
    return (
        f"transformers opens the exported tokenizer, {beside}, as {difference}"
        if difference
        else ""
    )


MOST_UNUSABLE = 0.05
"""Share of the source tokens whose rows may be not finite: reserved ones that were never trained.
With more the model is broken."""


def check_finite(context: Context) -> None:
    """Read all weights of the source model, before the work that a broken one would waste.

    Raises:
      UserError: a weight of its layers, or the rows of many tokens, hold NaN or infinity.
    """
    config, _ = context.inputs.source_model
    rows = huggingface.non_finite_rows(context.inputs.source_folder, config)
    size = vocabulary_size(context.inputs.source_tokenizer)
    unusable = {i for found in rows.values() for i in found.tolist() if i < size}
    if len(unusable) > MOST_UNUSABLE * size:
        raise UserError(
            f"source_model '{context.config.source_model}': "
            f"{not_finite(unusable, context.inputs.source_tokenizer)}, of {size:,}: its "
            "training diverged, or its files were damaged or badly converted; take another "
            "checkpoint of it"
        )
