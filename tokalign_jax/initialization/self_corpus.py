"""The source model's own text (`self_text.py`) as a part of the corpus, in JSON lines.

Free text becomes a document; a question and its answer become a chat, which is written by the new
model's template later on. Chats with a truncated answer are dropped, since a template would end
the answer there.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tokalign_jax.config import SELF
from tokalign_jax.initialization.self_text import Passage, Writer
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
    before, after = chats.around_question(tokenizer) or ("", "")
    for passage in passages:
        if all(segment.special is None for segment in passage):
            yield {"text": "".join(segment.text for segment in passage), "language": SELF}
            continue
        *rest, last = passage
        text = "".join(
            segment.text + str(tokenizer.convert_ids_to_tokens(segment.special))
            for segment in rest
            if segment.special is not None
        )
        question, mark, answer = (text + last.text).removeprefix(before).partition(after)
        if before and mark and last.special is not None and question.strip() and answer.strip():
            messages = [
                {"role": "user", "content": question.strip()},
                {"role": "assistant", "content": answer.strip()},
            ]
            yield {"messages": messages, "language": SELF}
