"""The source model's own text (`self_text.py`) as records of a corpus, and in another template.

In records free text becomes a document; a question and its answer become a chat, which is written
by the new model's template later on.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from tokalign_jax.config import SELF
from tokalign_jax.initialization.self_text import Passage, Segment, Writer
from tokalign_jax.text import canonical, chats
from tokalign_jax.utils.progress import Log


def write(writer: Writer, tokens: int, with_chats: bool, log: Log) -> list[dict[str, Any]]:
    """Return records for which the source model writes about `tokens` tokens.

    Args:
      writer: the source model.
      tokens: prompts included.
      with_chats: whether to write chats as well, which needs a chat template.
      log: receives progress.
    """
    special = canonical.special_ids(writer.tokenizer) if with_chats else set()
    return list(records(writer.write(tokens, log, special), writer.tokenizer))


def save(written: Iterable[Mapping[str, Any]], file: Path) -> dict[str, int]:
    """Write records as JSON lines; return their number by kind."""
    counts = {"documents": 0, "chats": 0}
    with file.open("w", encoding="utf-8", errors="replace") as lines:
        for record in written:
            counts["chats" if "messages" in record else "documents"] += 1
            lines.write(json.dumps(record, ensure_ascii=False) + "\n")
    return counts


def records(
    passages: Iterable[Passage], tokenizer: PreTrainedTokenizerBase
) -> Iterator[dict[str, Any]]:
    """Yield passages as records of a corpus."""
    around = chats.around_question(tokenizer)
    for passage in passages:
        if all(segment.special is None for segment in passage):
            yield {"text": "".join(segment.text for segment in passage), "language": SELF}
        elif chat := _chat(passage, tokenizer, around):
            messages = [
                {"role": "user", "content": chat.question},
                {"role": "assistant", "content": chat.answer},
            ]
            yield {"messages": messages, "language": SELF}


def in_template(
    passages: Iterable[Passage],
    source: PreTrainedTokenizerBase,
    target: PreTrainedTokenizerBase,
    special: Mapping[int, int],
) -> Iterator[Passage]:
    """Yield passages with their chats as the target's template prompts and ends them.

    The source's template may write more, such as a system message, which prompts of the new model
    do not have. Chats are as they were if the target has no template, or one that writes special
    tokens which the source lacks.

    Args:
      passages: passages that the source wrote.
      source: its tokenizer.
      target: the new model's tokenizer.
      special: the target's special tokens by those of the source with the same use.
    """
    around = chats.around_question(source)
    prompt = _segments(chats.around_question(target), target, special)
    if prompt is None:
        yield from passages
        return
    before, after = prompt
    for passage in passages:
        chat = _chat(passage, source, around)
        if chat is None:
            yield passage
            continue
        asked = before[-1].text + chat.question + after[0].text
        answered = after[-1].text + chat.answer
        yield (
            *before[:-1],
            Segment(asked, after[0].special),
            *after[1:-1],
            Segment(answered, chat.end),
        )


class _Chat(NamedTuple):
    question: str
    answer: str
    end: int
    """The special token after the answer."""


def _chat(
    passage: Passage, tokenizer: PreTrainedTokenizerBase, around: tuple[str, str] | None
) -> _Chat | None:
    """Return the question and the answer of a passage, None if it has no such parts.

    Args:
      passage: a passage with special tokens.
      tokenizer: the source's.
      around: what its template writes before the question and between question and answer.
    """
    *rest, last = passage
    if around is None or last.special is None:
        return None
    text = "".join(
        segment.text + str(tokenizer.convert_ids_to_tokens(segment.special))
        for segment in rest
        if segment.special is not None
    )
    before, after = around
    question, _, answer = (text + last.text).removeprefix(before).partition(after)
    question, answer = question.strip(), answer.strip()
    return _Chat(question, answer, last.special) if question and answer else None


def _segments(
    around: tuple[str, str] | None, target: PreTrainedTokenizerBase, special: Mapping[int, int]
) -> tuple[list[Segment], list[Segment]] | None:
    """Return the parts of the target's prompt, each with plain text as its last segment.

    Returns None if there is no prompt, no special token between question and answer, or one that
    the source lacks.
    """
    source_ids = {token: index for index, token in special.items()}
    parts: list[list[Segment]] = []
    for part in around or ():
        segments, text = [], ""
        for piece in chats.split_at_special(target, part):
            if piece.special is None:
                text += piece.text
            elif piece.special in source_ids:
                segments.append(Segment(text, source_ids[piece.special]))
                text = ""
            else:
                return None
        parts.append([*segments, Segment(text)])
    return (parts[0], parts[1]) if len(parts) == 2 and len(parts[1]) > 1 else None
