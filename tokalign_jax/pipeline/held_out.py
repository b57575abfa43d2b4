"""Held-out text and questions: what states of a model are measured and validated on."""

import dataclasses
import heapq
import random

from tokalign_jax.config import Config
from tokalign_jax.evaluation import abilities, bits_per_byte, chat_questions, measures
from tokalign_jax.pipeline.context import Context
from tokalign_jax.text import corpus as documents
from tokalign_jax.text import tokenizing

BYTES_PER_TOKEN = 8
"""Upper bound of the UTF-8 bytes per token of ordinary text."""


def questions(config: Config) -> list[abilities.Question]:
    """Read the multiple-choice questions (`evaluation.abilities`); empty: there are none."""
    settings = config.evaluation
    return abilities.read(settings.abilities, settings.max_questions) if settings.abilities else []


def chats(config: Config) -> list[chat_questions.ChatQuestion]:
    """Read the chat questions (`evaluation.chat_questions`); empty: there are none."""
    settings = config.evaluation
    if not settings.chat_questions:
        return []
    return chat_questions.read(settings.chat_questions, settings.max_questions)


def other_config(config: Config) -> Config | None:
    """Return the config with `evaluation.other_text` as its corpus; None if there is none."""
    names = config.evaluation.other_text
    return dataclasses.replace(config, corpus=names) if names else None


def material(context: Context) -> measures.Material:
    """Read held-out text, other text and questions. The corpus stage must be finished."""
    config, settings = context.config, context.config.evaluation
    return measures.Material(
        texts(context, settings.bytes_per_language),
        other_texts(context),
        questions(config),
        settings.sequence_length,
        settings.batch,
        config.compute,
        config.seed,
        chats(config),
        settings.reply_tokens,
    )


def texts(context: Context, bytes_per_language: int) -> dict[str, list[str]]:
    """Choose held-out documents of a run, by language."""
    folder = context.folder("corpus")
    files = documents.num_files(folder)
    return bits_per_byte.choose_texts(documents.held_out(folder), bytes_per_language, files)


def other_texts(context: Context) -> dict[str, list[str]]:
    """Read the documents of `evaluation.other_text`, by language."""
    other = other_config(context.config)
    if other is None:
        return {}
    size, files = context.config.evaluation.bytes_per_language, len(documents.names(other))
    return bits_per_byte.choose_texts(documents.read(other, context.log), size, files)


def validation_shards(context: Context, name: str) -> tokenizing.TokenShards | None:
    """Tokenise held-out text for a training stage's validations; None if it has none.

    Documents are drawn at random, about as many as a validation reads, the same on all processes.
    """
    stage = getattr(context.config, name)
    if not stage.validation_every:
        return None
    num_tokens = stage.validation_sequences * stage.batch.sequence_length + 1
    chosen = draw(context, num_tokens * BYTES_PER_TOKEN)
    return tokenizing.tokenize(context.inputs.target_tokenizer, chosen)


def draw(context: Context, size: int) -> list[documents.Document]:
    """Draw held-out documents at random, in random order, of at most `size` bytes in total.

    The last one may exceed that; unless it is a chat, it is cut.
    """
    rng = random.Random(context.config.seed)
    heap: list[tuple[float, documents.Document]] = []
    total = 0
    for document in documents.held_out(context.folder("corpus")):
        heapq.heappush(heap, (-rng.random(), document))
        total += document.bytes
        while total - heap[0][1].bytes >= size:
            total -= heapq.heappop(heap)[1].bytes
    chosen = [document for _, document in sorted(heap, reverse=True)]
    if chosen and not chosen[-1].chat:
        remaining = size - (total - chosen[-1].bytes)
        text = chosen[-1].text.encode()[:remaining].decode(errors="ignore")
        chosen[-1] = chosen[-1]._replace(text=text, bytes=len(text.encode()))
    return chosen
