"""Special tokens by their purpose: document separators, and the ends and beginnings of chat turns.

In a chat model's tokenizer the eos role belongs to the end of a turn, while its pre-training
documents were separated by another token (`<|endoftext|>` in Qwen and SmolLM, `<|end_of_text|>` in
LLaMA 3). Names distinguish them; roles do not.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from tokalign_jax.errors import UserError
from tokalign_jax.text.canonical import index_by_bytes, special_ids, token_bytes

SEPARATOR = "document_separator"
"""Key of tokenizer_config.json that names the document separator explicitly."""

_TEXT_ENDS = (
    "endoftext",
    "endofsentence",
    "endofdocument",
    "endofdoc",
    "eod",
    "eos",
    "eostoken",
    "/s",
)
"""Names of tokens that end a text, best first; all names here are in the form of `_plain_name`."""

_TURN_ENDS = (
    "imend",
    "eotid",
    "endofturn",
    "end",
    "endofturntoken",
    "eot",
    "return",
    "endofmessage",
    "eomid",
    "eom",
)

_TURN_STARTS = (
    "imstart",
    "startheaderid",
    "startofturn",
    "startofrole",
    "startofturntoken",
    "headerstart",
    "start",
)

_SAME_USE = (
    _TURN_ENDS,
    _TURN_STARTS,
    ("fimprefix", "pre", "prefix", "fimbegin"),
    ("fimmiddle", "mid", "middle", "fimend"),
    ("fimsuffix", "suf", "suffix", "fimhole"),
)
"""Names of special tokens of the same use: end and start of a turn, and infilling."""


class Counterpart(NamedTuple):
    """The token of one tokenizer that corresponds to a special token of another."""

    token: int
    why: str
    """The reason, for reports."""


def end_of_text_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that separates documents.

    It is the eos, unless that ends a turn of a chat and another special token is named as the end
    of a text. Without an eos it is the sep, else a token named as the end of a text, else the bos.
    `SEPARATOR` in tokenizer_config.json overrides all of these.

    Raises:
      UserError: the tokenizer has none of them.
    """
    if chosen := tokenizer.init_kwargs.get(SEPARATOR):
        return _id_of(tokenizer, chosen)
    named = _text_ends(tokenizer)
    eos, sep, bos = (role_id(tokenizer, role) for role in ("eos", "sep", "bos"))
    if named and ends_turn(tokenizer, eos):
        return named[0]
    for index in (eos, sep, *named, bos):
        if index is not None:
            return index
    shown = ", ".join(
        repr(tokenizer.convert_ids_to_tokens(i)) for i in sorted(special_ids(tokenizer))[:10]
    )
    raise UserError(
        f"the tokenizer '{tokenizer.name_or_path}' has neither an eos, a sep nor a bos token, so"
        " nothing can end a document: set eos_token in its tokenizer_config.json to one of its"
        f" tokens (special ones: {shown or 'none'}), or, if it is the target's,"
        " --config.end_of_text to one of them or to a new one, such as <|endoftext|>"
    )


def role_id(tokenizer: PreTrainedTokenizerBase, role: str) -> int | None:
    """Return the id of the token that has a role (`eos`, `bos`, `pad`, ...), or None."""
    index = getattr(tokenizer, f"{role}_token_id", None)
    return index if isinstance(index, int) else None


def ends_turn(tokenizer: PreTrainedTokenizerBase, index: int | None) -> bool:
    """Return whether a token ends turns of a chat, by its name, or as the template's eos.

    A token named as the end of a text does not, although LLaMA 2's template ends answers with
    `</s>`.
    """
    if index is None:
        return False
    token = str(tokenizer.convert_ids_to_tokens(index))
    name = _plain_name(token)
    if name in _TURN_ENDS or name in _TEXT_ENDS:
        return name in _TURN_ENDS
    return index == role_id(tokenizer, "eos") and in_chat_template(tokenizer, token)


def is_of_chat(tokenizer: PreTrainedTokenizerBase, index: int | None) -> bool:
    """Return whether the token `index` is named as the start or the end of a turn."""
    return index is not None and _plain_name(str(tokenizer.convert_ids_to_tokens(index))) in (
        *_TURN_STARTS,
        *_TURN_ENDS,
    )


def in_chat_template(tokenizer: PreTrainedTokenizerBase, token: str) -> bool:
    """Return whether a chat template writes `token`, by its text or by the name of its role."""
    template = tokenizer.chat_template or ""
    templates = template if isinstance(template, str) else "".join(template.values())
    roles = (
        role
        for role in tokenizer.SPECIAL_TOKENS_ATTRIBUTES
        if getattr(tokenizer, role, None) == token
    )
    return bool(token) and (token in templates or any(role in templates for role in roles))


def counterparts(
    ids: Iterable[int], tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase
) -> dict[int, Counterpart]:
    """Return the special tokens of `other` that correspond to `ids` of `tokenizer`, by id.

    In order: the token of the same text, also an added one that is not special (Qwen 3's
    `<think>`); the document separator for a document separator, or for a token named like one; the
    token of the same use in chats or infilling (`<|im_end|>` and `<end_of_turn>`), where an eos
    that ends turns may have any name.
    """
    names = {i: str(tokenizer.convert_ids_to_tokens(i)) for i in ids}
    others = {
        str(other.convert_ids_to_tokens(i)): i for i in sorted(special_ids(other), reverse=True)
    }
    by_text = {token.content: i for i, token in other.added_tokens_decoder.items()} | others
    matches = {
        i: Counterpart(by_text[text], "same text") for i, text in names.items() if text in by_text
    }
    rest = {i: text for i, text in names.items() if i not in matches}
    end_of_text = end_of_text_id(tokenizer) if rest else None
    by_name = {_plain_name(name): name for name in others}
    for index, text in rest.items():
        if index == end_of_text or _plain_name(text) in _TEXT_ENDS:
            matches[index] = Counterpart(end_of_text_id(other), "ends a document")
            continue
        is_turn_end = ends_turn(tokenizer, index)
        uses = next(
            (use for use in _SAME_USE if _plain_name(text) in use),
            _TURN_ENDS if is_turn_end else (),
        )
        same = next((by_name[name] for name in uses if name in by_name), None)
        if same is None and is_turn_end and ends_turn(other, role_id(other, "eos")):
            same = str(other.eos_token)
        if same is not None:
            matches[index] = Counterpart(others[same], f"same use as {same}")
    return matches


def stop_counterpart(
    index: int, tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase
) -> int | None:
    """Return the token at which `other`'s model stops where `tokenizer`'s stops at `index`.

    Besides special tokens (`counterparts`), models stop at tokens of text, such as a line end, and
    at tokens of any name that they use as the end of a turn (GLM at `<|user|>`).
    """
    if match := counterparts([index], tokenizer, other).get(index):
        return match.token
    if (content := token_bytes(tokenizer)[index]) is not None:
        return index_by_bytes(other).get(content)
    by_name = {
        _plain_name(str(other.convert_ids_to_tokens(i))): i
        for i in sorted(special_ids(other), reverse=True)
    }
    named = next((by_name[name] for name in _TURN_ENDS if name in by_name), None)
    eos = role_id(other, "eos")
    return eos if named is None and ends_turn(other, eos) else named


def _text_ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """List the special tokens that are named as the end of a text, best first."""
    names = {
        i: _plain_name(str(tokenizer.convert_ids_to_tokens(i)))
        for i in sorted(special_ids(tokenizer))
    }
    return sorted(
        (i for i, name in names.items() if name in _TEXT_ENDS),
        key=lambda i: _TEXT_ENDS.index(names[i]),
    )


def _plain_name(token: str) -> str:
    """Normalize a bracketed name: `<｜end▁of▁text｜>` becomes `endoftext`; else ""."""
    return (
        re.sub(r"[^a-z0-9/]", "", token.casefold()) if re.fullmatch(r"<.*>|\[.*\]", token) else ""
    )


def _id_of(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    index = tokenizer.get_vocab().get(token)
    if index is None:
        raise UserError(
            f"the tokenizer '{tokenizer.name_or_path}' has no token {token!r}, which {SEPARATOR} in"
            " its tokenizer_config.json names as the end of documents: name one of its tokens, or"
            " remove the line"
        )
    return index
