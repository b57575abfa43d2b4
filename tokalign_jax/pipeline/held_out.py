"""Held-out text: what every state of a model is measured on, and training stages validate on."""

import dataclasses
import heapq
import random

from tokalign_jax.config import Config
from tokalign_jax.evaluation import abilities, bits_per_byte, chat_questions, measures
from tokalign_jax.pipeline.context import Context
from tokalign_jax.text import corpus as documents
from tokalign_jax.text import tokenizing


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
        bits_per_byte.choose_texts(held_out, settings.bytes_per_language),
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
    return bits_per_byte.choose_texts(read, context.config.evaluation.bytes_per_language)


BYTES_PER_TOKEN = 8
"""More UTF-8 bytes than a token of ordinary text has."""


def validation_shards(context: Context, name: str) -> tokenizing.TokenShards | None:
    """Return held-out text in the target's tokens for a training stage's validations, or None.

    It is drawn at random by document, about as much as the stage reads (`draw`). Every process gets
    the same.
    """
    stage = getattr(context.config, name)
    if not stage.validation_every:
        return None
    tokens = stage.validation_sequences * stage.sequence_length + 1
    chosen = draw(context, tokens * BYTES_PER_TOKEN)
    return tokenizing.tokenize(context.inputs.target_tokenizer, chosen)


def draw(context: Context, size: int) -> list[documents.Document]:
    """Draw held-out documents at random, in random order, of at most `size` bytes in all.

    The last one may go past that; if it is no chat it is cut.
    """
    chance = random.Random(context.config.seed)
    heap: list[tuple[float, documents.Document]] = []
    total = 0
    for document in documents.held_out(context.folder("corpus")):
        heapq.heappush(heap, (-chance.random(), document))
        total += document.bytes
        while total - heap[0][1].bytes >= size:
            total -= heapq.heappop(heap)[1].bytes
    chosen = [document for _, document in sorted(heap, reverse=True)]
    if chosen and not chosen[-1].chat:
        room = size - (total - chosen[-1].bytes)
        text = chosen[-1].text.encode()[:room].decode(errors="ignore")
        chosen[-1] = chosen[-1]._replace(text=text, bytes=len(text.encode()))
    return chosen
