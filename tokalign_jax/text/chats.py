"""Chats as training text, written by the target's chat template and learned on assistant turns.

A chat is a list of messages, objects with `role` and `content`. The target tokenizer's template
writes them; the source model, as a teacher, reads the same text with its own special tokens of the
same use (`special_tokens.counterparts`). The loss covers the assistant's messages, up to and
including the token that ends the turn.
"""

import bisect
import copy
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import numpy as np
from jaxtyping import Bool, Int
from transformers import PreTrainedTokenizerBase

from tokalign_jax.errors import UserError
from tokalign_jax.text.boundaries import NONE, Boundaries, token_boundaries
from tokalign_jax.text.canonical import plain_backend, special_ids
from tokalign_jax.text.special_tokens import (
    SEPARATOR,
    counterparts,
    end_of_text_id,
    ends_turn,
    in_chat_template,
    role_id,
)

ROLES = ("system", "developer", "user", "assistant", "tool")
Message = Mapping[str, str]
_EXAMPLE: tuple[Message, ...] = (
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
)
"""A minimal chat that any chat template should be able to write."""


class Unusable(ValueError):
    """An unusable chat; the message describes the problem."""


# --- Messages -----------------------------------------------------------------------------------


def messages_of(value: Any) -> list[dict[str, str]]:
    """Return the checked messages of a record; contents in parts are joined.

    Raises:
      Unusable: `value` is not a list of messages, or no assistant message has text.
    """
    if not isinstance(value, list) or not value:
        raise Unusable("has no list of messages: expected objects with 'role' and 'content'")
    messages = [_message(number, message) for number, message in enumerate(value, start=1)]
    if not any(_is_reply(message) for message in messages):
        raise Unusable(
            "has no message of the role 'assistant' with text: there is nothing to learn"
        )
    return messages


def unused_fields(value: list[dict[str, Any]]) -> set[str]:
    """Return the fields of a chat's messages that hold something `messages_of` leaves out."""
    return {
        key
        for message in value
        for key, content in message.items()
        if key not in ("role", "content") and content not in (None, "", [], {})
    }


def _message(number: int, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or (missing := {"role", "content"} - value.keys()):
        lacks = f"lacks '{min(missing)}'" if isinstance(value, dict) else "is no object"
        raise Unusable(f"message {number} {lacks}: expected 'role' and 'content'")
    role, content = value["role"], value["content"]
    if role not in ROLES:
        raise Unusable(f"message {number} has the role {role!r}; it must be one of {list(ROLES)}")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        content = "".join(texts) if len(texts) == len(parts) else None
    if not isinstance(content, str):
        raise Unusable(f"message {number} has a content that is no text")
    # JSON can contain unpaired surrogates, which UTF-8 cannot encode.
    return {"role": role, "content": content.encode("utf-8", errors="replace").decode()}


def _is_reply(message: Message) -> bool:
    return message["role"] == "assistant" and bool(message["content"].strip())


def plain_text(messages: Sequence[Message]) -> str:
    """Join the contents, for uses that do not read chats: evaluation, mining, co-occurrence."""
    return "\n\n".join(message["content"] for message in messages if message["content"].strip())


# --- Templates ----------------------------------------------------------------------------------


class Piece(NamedTuple):
    """A part of a written chat: text, or a special token."""

    start: int
    """Its first character in the whole chat."""
    text: str
    special: int | None = None
    """Its id in the template's tokenizer."""

    @property
    def end(self) -> int:
        """The character of the whole chat after its last one."""
        return self.start + len(self.text)


class Written(NamedTuple):
    """A chat written by a template."""

    pieces: list[Piece]
    learned: list[tuple[int, int]]
    """The assistant's turns: (begin, end) in characters of the whole chat."""


def write(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> Written:
    """Write a chat with the tokenizer's template.

    Raises:
      Unusable: the template rejects the messages, or omits an assistant message.
    """
    text = _apply(tokenizer, messages)
    pieces = split_at_special(tokenizer, text)
    ends_of_special = [piece.end for piece in pieces if piece.special is not None]
    learned, begin = [], 0
    for number, message in enumerate(messages):
        content = message["content"].strip()
        if not _is_reply(message):
            # Contents may repeat, so each is searched for after the previous one.
            place = text.find(content, begin)
            begin = place + len(content) if content and place >= 0 else begin
            continue
        prompt = _prompt(tokenizer, messages[:number])
        is_prefix = prompt is not None and len(prompt) >= begin and text.startswith(prompt)
        begin = len(prompt) if prompt is not None and is_prefix else begin
        place = text.find(content, begin)
        if place < 0:
            raise Unusable(
                f"cannot be written: the chat template leaves out or changes message {number + 1}"
            )
        end = place + len(content)
        after = bisect.bisect_left(ends_of_special, end + 1)
        stop = ends_of_special[after] if after < len(ends_of_special) else len(text)
        if not _ends_there(pieces, end, stop):
            stop = end
        learned.append((begin if is_prefix else place, stop))
        begin = stop
    return Written(pieces, learned)


def _ends_there(pieces: Sequence[Piece], end: int, stop: int) -> bool:
    """Return whether only white space is between `end` and the special token ending at `stop`."""
    texts = [p for p in pieces if p.special is None and end < p.end <= stop]
    return not any(p.text[max(0, end - p.start) :].strip() for p in texts)


def template_problem(tokenizer: PreTrainedTokenizerBase) -> str:
    """Describe why the tokenizer's chat template cannot be used; "" if it can."""
    if not tokenizer.chat_template:
        return "it has no chat template"
    try:
        write(tokenizer, _EXAMPLE)
    except Unusable as error:
        return f"its chat template fails at a question and an answer: a chat {error}"
    return ""


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **kwargs: Any) -> str:
    try:
        conversation = [dict(message) for message in messages]
        return str(tokenizer.apply_chat_template(conversation, tokenize=False, **kwargs))
    except (ValueError, TypeError, AttributeError, KeyError, jinja2.TemplateError) as error:
        raise Unusable(f"cannot be written: the chat template says {str(error)[:160]!r}") from error


def _prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str | None:
    """Return the prompt for an answer to these messages; None if the template rejects them."""
    if not messages:
        return None
    try:
        return _apply(tokenizer, messages, add_generation_prompt=True)
    except Unusable:
        return None


def around_question(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str] | None:
    """Return what the template writes before a user's first message, and between it and the answer.

    Returns None if it has no such parts.
    """
    mark = "@@@"
    prompt = _prompt(tokenizer, [{"role": "user", "content": mark}])
    before, mark_found, after = (prompt or "").partition(mark)
    return (before, after) if mark_found and before and after else None


def prompt_ids(tokenizer: PreTrainedTokenizerBase, questions: Sequence[str]) -> list[list[int]]:
    """Return the tokens of each question in the chat template, up to the answer.

    Raises:
      Unusable: the template rejects it.
    """
    pieces = []
    for question in questions:
        message = {"role": "user", "content": question}
        text = _apply(tokenizer, [message], add_generation_prompt=True)
        pieces.append(split_at_special(tokenizer, text))
    # One encoder for all: making it takes a large vocabulary a fifth of a second.
    return [tokens.ids.tolist() for tokens in Encoder(tokenizer).encode(pieces)]


def split_at_special(tokenizer: PreTrainedTokenizerBase, text: str) -> list[Piece]:
    """Split text at special tokens, which may absorb the white space beside them."""
    specials = {str(tokenizer.convert_ids_to_tokens(i)): i for i in special_ids(tokenizer)}
    pattern = "|".join(
        re.escape(token) for token in sorted(specials, key=len, reverse=True) if token
    )
    added, pieces, begin, strip = tokenizer.added_tokens_decoder, [], 0, False
    for match in re.finditer(pattern, text) if pattern else ():
        index = specials[match[0]]
        token = added.get(index)
        _add_text(pieces, text, begin, match.start(), strip, bool(token and token.lstrip))
        pieces.append(Piece(match.start(), match[0], index))
        begin, strip = match.end(), bool(token and token.rstrip)
    _add_text(pieces, text, begin, len(text), strip, False)
    return pieces


def _add_text(
    pieces: list[Piece], text: str, begin: int, end: int, lstrip: bool, rstrip: bool
) -> None:
    part = text[begin:end]
    stripped = part.lstrip() if lstrip else part
    begin += len(part) - len(stripped)
    stripped = stripped.rstrip() if rstrip else stripped
    if stripped:
        pieces.append(Piece(begin, stripped))


# --- Tokens -------------------------------------------------------------------------------------


class Encoder:
    """A tokenizer for documents and chats."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, writer: PreTrainedTokenizerBase | None = None
    ):
        """Create an encoder.

        Args:
          tokenizer: the tokenizer.
          writer: the tokenizer whose template writes chats; None: the same one.
        """
        self.backend, self.writer = plain_backend(tokenizer), writer or tokenizer
        special = special_ids(self.writer)
        if self.writer is tokenizer:
            self._special = {index: index for index in special}
        else:
            matches = counterparts(special, self.writer, tokenizer)
            self._special = {index: match.token for index, match in matches.items()}

    def boundaries(self, texts: Sequence[str], chats: Sequence[str]) -> list[Boundaries]:
        """Return the tokens of documents and their ends.

        Args:
          texts: the documents.
          chats: for each text its messages as JSON, or "" if it is not a chat.
        """
        pieces = [
            self.written(chat).pieces if chat else [Piece(0, text)]
            for text, chat in zip(texts, chats, strict=True)
        ]
        return self.encode(pieces)

    def written(self, chat: str) -> Written:
        """Write a chat from its messages as JSON.

        Raises:
          UserError: the template rejects it.
        """
        try:
            return write(self.writer, json.loads(chat))
        except Unusable as error:
            raise UserError(f"a chat of the corpus {error}: {chat[:160]}") from error

    def encode(self, documents: Sequence[Sequence[Piece]]) -> list[Boundaries]:
        """Encode written chats; special tokens without a counterpart here are dropped."""
        texts = [p.text for pieces in documents for p in pieces if p.special is None]
        encoded = iter(token_boundaries(self.backend, texts))
        return [self._joined(pieces, encoded) for pieces in documents]

    def _joined(self, pieces: Sequence[Piece], encoded: Any) -> Boundaries:
        ids, ends = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for piece in pieces:
            if piece.special is None:
                part = next(encoded)
                ids.append(part.ids)
                ends.append(np.where(part.ends == NONE, NONE, part.ends + piece.start))
            elif piece.special in self._special:
                ids.append(np.array([self._special[piece.special]]))
                ends.append(np.array([piece.end]))
        return Boundaries(np.concatenate(ids), np.concatenate(ends))


def is_learned(
    ends: Int[np.ndarray, "n"], learned: Sequence[tuple[int, int]]
) -> Bool[np.ndarray, "n"]:
    """Return which tokens of a chat belong to the assistant.

    Args:
      ends: `Boundaries.ends` of its tokens.
      learned: the assistant's turns in characters.
    """
    # A token that ends within a character belongs to the next one that does not.
    ends = np.where(ends == NONE, np.iinfo(np.int64).max, ends)
    ends = np.minimum.accumulate(ends[::-1])[::-1]
    mask = np.zeros(len(ends), bool)
    for begin, end in learned:
        mask |= (ends > begin) & (ends <= end)
    return mask


# --- The template of the new vocabulary ---------------------------------------------------------


def with_template(
    target: PreTrainedTokenizerBase, source: PreTrainedTokenizerBase, choice: str
) -> PreTrainedTokenizerBase:
    """Return the target tokenizer with the chat template of the new model.

    It is the source's, with missing special tokens added, if `choice` is `source`, or if the target
    has no template but all special tokens that the source's template writes; otherwise the target's
    own.

    Args:
      target: the target tokenizer.
      source: the source tokenizer.
      choice: `config.chat`.

    Raises:
      UserError: `choice` is `source`, which has no template.
    """
    if choice == "source" and not source.chat_template:
        raise UserError(
            "chat=source keeps the source model's chat template, but its tokenizer has none: "
            "leave out --config.chat"
        )
    if not source.chat_template or (choice != "source" and target.chat_template):
        return target
    needed = template_tokens(source)
    vocabulary = target.get_vocab()
    missing = [token for token in needed if token not in vocabulary]
    if missing and choice != "source":
        return target
    extended, end = copy.deepcopy(target), str(target.convert_ids_to_tokens(end_of_text_id(target)))
    extended.add_tokens(needed, special_tokens=True)
    if len(set(extended.get_vocab().values())) != len(vocabulary) + len(missing):
        raise UserError(
            f"target_tokenizer '{target.name_or_path}' cannot get the source's special tokens "
            f"{missing}: the ids of its tokens have gaps"
        )
    extended.chat_template = source.chat_template
    for role in ("bos", "eos"):
        token = getattr(source, f"{role}_token", None)
        if token in needed:
            setattr(extended, f"{role}_token", token)
    if end_of_text_id(extended) != vocabulary[end]:
        extended.init_kwargs[SEPARATOR] = end
    return extended


def template_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """List special tokens that the chat template writes or names, and the eos that ends a turn."""
    try:
        written = {p.special for p in write(tokenizer, _EXAMPLE).pieces}
    except Unusable:
        written = set()
    tokens = []
    for index in sorted(special_ids(tokenizer)):
        token = str(tokenizer.convert_ids_to_tokens(index))
        is_eos = index == role_id(tokenizer, "eos") and ends_turn(tokenizer, index)
        if index in written or is_eos or in_chat_template(tokenizer, token):
            tokens.append(token)
    return tokens
