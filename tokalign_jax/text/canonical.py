"""Canonical bytes: what a token stands for, however its tokenizer spells it.

Tokenizers spell the same bytes differently: byte-level BPE writes a space as `Ġ` and every other byte as one printable
character, SentencePiece writes it as `▁` and a byte without a character as `<0x0A>`. Two tokens are the same when their
bytes are. A string comparison misses most shared tokens and finds false friends.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import tokenizers
from transformers import PreTrainedTokenizerBase

from tokalign_jax.errors import UserError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that an embedding for `tokenizer` needs: its largest id and one (ids may have gaps)."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes | None]:
    """The bytes of every id in `range(vocabulary_size(tokenizer))`; None for special tokens and unused ids."""
    decode = _spelling(tokenizer).decode
    special = special_ids(tokenizer)
    added = tokenizer.added_tokens_decoder
    result: list[bytes | None] = [None] * vocabulary_size(tokenizer)
    for token, index in tokenizer.get_vocab().items():
        if index not in special:
            result[index] = str(added[index]).encode() if index in added else decode(token)
    return result


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of tokens that stand for no text: those flagged special, and those with a role (eos, pad, ...)."""
    flagged = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return flagged | set(tokenizer.all_special_ids)


def index_by_bytes(tokenizer: PreTrainedTokenizerBase) -> dict[bytes, int]:
    """The id for each canonical byte string; where several share one, the one that is no `<0x41>`, then the lowest."""
    spelled = {index: token for token, index in tokenizer.get_vocab().items()}
    index: dict[bytes, int] = {}
    for i, content in enumerate(token_bytes(tokenizer)):
        if content and (content not in index or _BYTE_TOKEN.fullmatch(spelled[index[content]])):
            index[content] = i
    return index


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the vocabulary: every id's canonical bytes, of special tokens their text."""
    digest = hashlib.sha256()
    spelled = {index: token for token, index in tokenizer.get_vocab().items()}
    for index, content in enumerate(token_bytes(tokenizer)):
        kind, shown = (b"t", content) if content is not None else (b"s", spelled.get(index, "").encode())
        digest.update(kind + len(shown).to_bytes(4, "big") + shown)
    return digest.hexdigest()


def plain_backend(tokenizer: PreTrainedTokenizerBase) -> tokenizers.Tokenizer:
    """A copy of the Rust tokenizer that reads everything as text: no truncation, no padding, and `<|endoftext|>` in a
    document is those characters, not the token.

    Raises:
      UserError: for a tokenizer without one (a "slow" tokenizer).
    """
    backend = tokenizers.Tokenizer.from_str(_backend(tokenizer).to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


class PieceCutter:
    """Cuts bytes into ids of `tokenizer` whose canonical bytes join up to them again.

    First choice is the tokenizer's own segmentation of the text; where that does not give the bytes back (they are no
    UTF-8, or a normaliser or a prefixed space changes them) its bare model, without normaliser and pre-tokenizer; as
    the last resort the longest matching tokens from left to right.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._bytes = token_bytes(tokenizer)
        self._index = index_by_bytes(tokenizer)
        self._longest = max(map(len, self._index), default=0)
        self._backend = plain_backend(tokenizer)
        self._spelling = _spelling(tokenizer)

    def __call__(self, content: bytes) -> list[int]:
        """The ids for `content`; [] where no tokens join up to it."""
        return self.cut_all([content])[0]

    def cut_all(self, contents: Sequence[bytes]) -> list[list[int]]:
        """`__call__` for many, with the tokenizer's own parallelism."""
        # What is no UTF-8 becomes a text that cannot give the bytes back.
        texts = [content.decode("utf-8", errors="replace") for content in contents]
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [self._cut(content, encoding.ids) for content, encoding in zip(contents, encodings)]

    def _cut(self, content: bytes, own: list[int]) -> list[int]:
        if self._joined(own) == content:
            return own
        bare = self._bare(content)
        if self._joined(bare) == content:
            return bare
        return self._greedy(content)

    def _joined(self, ids: Iterable[int]) -> bytes | None:
        parts = [self._bytes[i] for i in ids]
        return None if None in parts else b"".join(parts)  # type: ignore[arg-type]

    def _bare(self, content: bytes) -> list[int]:
        spelled = self._spelling.encode(content)
        return [token.id for token in self._backend.model.tokenize(spelled)] if spelled else []

    def _greedy(self, content: bytes) -> list[int]:
        ids, start = [], 0
        while start < len(content):
            ends = range(min(start + self._longest, len(content)), start, -1)
            end = next((e for e in ends if content[start:e] in self._index), None)
            if end is None:
                return []
            ids.append(self._index[content[start:end]])
            start = end
        return ids


# --- spellings --------------------------------------------------------------------------------------------------------


def _byte_alphabet() -> dict[int, str]:
    """The byte-level alphabet: printable Latin-1 stands for itself, the 68 other bytes are U+0100 and up in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + n) for n, byte in enumerate(others)}


class _Plain:
    """Tokens that are written as they read."""

    def decode(self, token: str) -> bytes:
        return token.encode("utf-8", errors="replace")

    def encode(self, content: bytes) -> str | None:
        try:
            return content.decode()
        except UnicodeDecodeError:
            return None


class _ByteLevel(_Plain):
    """One printable character a byte (GPT-2, GPT-NeoX, LLaMA 3, Qwen)."""

    _to_characters = _byte_alphabet()
    # Latin-1 characters outside the alphabet (a plain space) must not pass for bytes: U+FFFF is no Latin-1.
    _to_bytes = {byte: 0xFFFF for byte in range(256)} | {ord(c): byte for byte, c in _to_characters.items()}

    def decode(self, token: str) -> bytes:
        try:
            return token.translate(self._to_bytes).encode("latin-1")
        except UnicodeEncodeError:
            return super().decode(token)

    def encode(self, content: bytes) -> str | None:
        return content.decode("latin-1").translate(self._to_characters)


class _SentencePiece(_Plain):
    """`▁` for a space and `<0x0A>` for a byte (LLaMA 1 and 2, Mistral, Gemma, T5)."""

    def __init__(self, space: str):
        self._space = space

    def decode(self, token: str) -> bytes:
        if byte := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(byte[1], 16)])
        return super().decode(token.replace(self._space, " "))

    def encode(self, content: bytes) -> str | None:
        text = super().encode(content)
        return None if text is None else text.replace(" ", self._space)


def _spelling(tokenizer: PreTrainedTokenizerBase) -> _Plain:
    """How a tokenizer spells bytes, from its own description of its pre-tokenizer, decoder and model."""
    backend = _backend(tokenizer)
    components = [json.loads(c.__getstate__()) for c in (backend.pre_tokenizer, backend.decoder) if c is not None]
    parts = [part for component in components for part in _parts(component)]
    if any(part["type"] == "ByteLevel" for part in parts):
        return _ByteLevel()
    spaces = [part["replacement"] for part in parts if part["type"] == "Metaspace"]
    spaces += [
        part["pattern"]["String"]
        for part in parts
        if part["type"] == "Replace" and part["content"] == " " and "String" in part["pattern"]
    ]
    if spaces or getattr(backend.model, "byte_fallback", False):
        return _SentencePiece(spaces[0] if spaces else "▁")
    return _Plain()


def _parts(component: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A pre-tokenizer or decoder and, where it is a sequence, what that holds."""
    yield component
    for inner in (*component.get("pretokenizers", ()), *component.get("decoders", ())):
        yield from _parts(inner)


def _backend(tokenizer: PreTrainedTokenizerBase) -> tokenizers.Tokenizer:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"the tokenizer '{tokenizer.name_or_path}' ({type(tokenizer).__name__}) has no tokenizer.json: it must be "
            f"a 'fast' one; convert it with AutoTokenizer.from_pretrained(..., use_fast=True).save_pretrained(folder)"
        )
    return backend
