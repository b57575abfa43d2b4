"""What every state of a model is measured on."""

import dataclasses

from tokalign_jax.config import Config
from tokalign_jax.evaluation import abilities, bits_per_byte, chat_questions, measures
from tokalign_jax.pipeline.context import Context
from tokalign_jax.text import corpus as documents


def questions(config: Config) -> list[abilities.Question]:
    """Return what every state is asked (`evaluation.abilities`); empty: nothing."""
    settings = config.evaluation
    return abilities.read(settings.abilities, settings.max_questions) if settings.abilities else []


def chats(config: Config) -> list[chat_questions.ChatQuestion]:
    """Return what every state is asked through its chat template; empty: nothing."""
    settings = config.evaluation
    if not settings.chat_questions:
        return []
    return chat_questions.read(settings.chat_questions, settings.max_questions)


def other_config(config: Config) -> Config | None:
    """Return the config with `evaluation.other_text` for a corpus; None where there is no such
    text.
    """
    names = config.evaluation.other_text
    return dataclasses.replace(config, corpus=names) if names else None


def material(context: Context) -> measures.Material:
    """Return held-out text, text of another kind, and questions; there must be a corpus."""
    config, settings = context.config, context.config.evaluation
    held_out = documents.held_out(context.folder("corpus"))
    return measures.Material(
        bits_per_byte.choose(held_out, settings.bytes_per_language),
        other_texts(context),
        questions(config),
        settings.sequence_length,
        settings.batch,
        config.compute,
        config.seed,
        chats(config),
        settings.reply_tokens,
    )


def other_texts(context: Context) -> dict[str, list[str]]:
    """Return the documents of another kind that states are measured on, by language."""
    other = other_config(context.config)
    if other is None:
        return {}
    read = documents.read(other, context.log)
    return bits_per_byte.choose(read, context.config.evaluation.bytes_per_language)
