"""Canonical bytes: the bytes that a token stands for, independent of its tokenizer's spelling.

Tokenizers spell the same bytes differently: byte-level BPE writes a space as `Ġ` and every other
byte as one printable character, SentencePiece writes it as `▁` and a byte without a character as
`<0x0A>`, WordPiece marks continuations of words. Two tokens are equal if their bytes are. Comparing
strings misses most shared tokens and finds false matches.
"""

import hashlib
import itertools
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence, Set
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import tokenizers
from transformers import AddedToken, PreTrainedTokenizerBase

from tokalign_jax.errors import UserError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

_NO_SPACE_BEFORE = re.compile(
    r"[\W_\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u3400-\u9fff\uf900-\ufaff"
    r"\uff66-\uff9f\U00020000-\U0003ffff]"
)
"""First characters of words that are not preceded by a space: punctuation, Thai, Lao, Burmese,
Khmer, kana and Chinese characters.
"""

_PROBES = {
    "capitals": "a Fox",
    "accents": "a café",
    "line ends": "a\nb",
    "tabs": "a\tb",
    "runs of spaces": "a   b",
    "decomposed characters": "a cafe\u0301",
    "compatibility forms": "a ﬁ ①",
    "rare characters": "a ꙮ \U0001f9ff \U00012031",
}
"""Texts with properties that a tokenizer may lose, by the name of the property."""


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the rows that an embedding for `tokenizer` needs: its largest id plus one."""
    return len(_vocabulary(tokenizer).contents)


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes | None]:
    """Return the bytes of every id; None for special and unused ids."""
    return list(_vocabulary(tokenizer).contents)


def spelled(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the string of every id; "" for unused ids."""
    return list(_vocabulary(tokenizer).spelled)


class _Vocabulary(NamedTuple):
    """All tokens of a tokenizer."""

    stamp: tuple[Any, ...]
    """Identifies the state of the tokenizer; changes when tokens or roles are added."""
    spelled: list[str]
    contents: list[bytes | None]


_VOCABULARIES: WeakKeyDictionary[PreTrainedTokenizerBase, _Vocabulary] = WeakKeyDictionary()


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> _Vocabulary:
    """Return the tokenizer's vocabulary, cached.

    The library rebuilds its vocabulary on every call (150,000 tokens: 0.2 s, with their bytes 0.4
    s). Tokens and roles may be added later; other components must not be changed in place.
    """
    backend, special, added = (
        _backend(tokenizer),
        special_ids(tokenizer),
        tokenizer.added_tokens_decoder,
    )
    stamp = backend, len(tokenizer), special, added
    cached = _VOCABULARIES.get(tokenizer)
    if cached is None or cached.stamp != stamp:
        vocabulary = tokenizer.get_vocab()
        size = max(len(tokenizer), 1 + max(vocabulary.values()))
        cached = _Vocabulary(stamp, [""] * size, [None] * size)
        spelling = _spelling(tokenizer)
        # Some vocabularies list tokens of the model as added ones too (Gemma's runs of `▁`). Those
        # are read by the model, except in byte-level vocabularies, where the library reads them
        # unless they are special (`Ċ` as eos).
        by_model = {
            i
            for i, token in added.items()
            if backend.model.token_to_id(token.content) == i
            and (token.special or not isinstance(spelling, _ByteLevel))
        }
        added = {i: token for i, token in added.items() if i not in by_model}
        for token, index in vocabulary.items():
            cached.spelled[index] = token
            if index not in special:
                content = (
                    _added_bytes(backend, added[index])
                    if index in added
                    else spelling.decode(token)
                )
                cached.contents[index] = content
        _VOCABULARIES[tokenizer] = cached
    return cached


def differing(
    one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase
) -> list[tuple[int, str, str]]:
    """List (id, token, other's token) for all ids whose tokens differ in bytes."""
    (_, names, contents), (_, other_names, other_contents) = _vocabulary(one), _vocabulary(other)
    other_names = other_names + [""] * (len(names) - len(other_names))
    other_contents = other_contents + [None] * (len(names) - len(other_contents))
    return [
        (i, name, other_names[i])
        for i, (name, content) in enumerate(zip(names, contents))
        if name != other_names[i] and (content is None or content != other_contents[i])
    ]


def losses(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """List the kinds of text (names of `_PROBES`) that decoding does not restore.

    Surrounding spaces do not count. Bits per byte of a tokenizer that drops part of the text are
    too low to be compared.
    """
    content = token_bytes(tokenizer)
    encoded = _encode(tokenizer, plain_backend(tokenizer), list(_PROBES.values()))
    decoded = [b"".join(content[i] or b"" for i in ids) for ids in encoded]
    restored = [x.strip(b" ") == text.encode() for x, text in zip(decoded, _PROBES.values())]
    return [name for name, is_restored in zip(_PROBES, restored) if not is_restored]


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return ids of tokens without text: flagged special, or with a role (eos, pad, ...).

    Tokens that the tokenizer flags as special but that occur in text are excluded: converted
    SentencePiece models flag all tokens that must stay whole, such as line ends and runs of spaces.
    """
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    roles = (getattr(tokenizer, f"{role}_id") for role in tokenizer.SPECIAL_TOKENS_ATTRIBUTES)
    special |= {index for index in roles if isinstance(index, int)}
    backend = _backend(tokenizer)
    cached = _ALSO_TEXT.get(tokenizer)
    if cached is None or cached[:2] != (backend, special):
        cached = _ALSO_TEXT[tokenizer] = backend, special, _also_text(tokenizer, special)
    return special - cached[2]


_ALSO_TEXT: WeakKeyDictionary[
    PreTrainedTokenizerBase, tuple[tokenizers.Tokenizer, set[int], set[int]]
] = WeakKeyDictionary()


def _also_text(tokenizer: PreTrainedTokenizerBase, special: set[int]) -> set[int]:
    """Return the special tokens that text is tokenized into as well: some tokenizers pad with `!`.

    A Unigram model reads the name of a special token as that token unless told not to
    (`plain_backend`), so its scores decide: special tokens have none. The model's own unknown token
    is never text.
    """
    backend = _backend(tokenizer)
    names = {
        i: name
        for i in special
        if (name := backend.id_to_token(i)) and backend.model.token_to_id(name) == i
    }
    if isinstance(backend.model, tokenizers.models.Unigram):
        model = json.loads(backend.to_str())["model"] if names else {}
        return {i for i in names if i != model["unk_id"] and model["vocab"][i][1] < 0}
    names = {
        i: name for i, name in names.items() if name != getattr(backend.model, "unk_token", None)
    }
    if not names:
        return set()
    plain, spelling = _without_special(backend), _spelling(tokenizer)
    # The decoder returns the name of an added token, even for byte-level's `Ċ`, a line break.
    shown = [backend.decode([i], skip_special_tokens=False) for i in names]
    bare = [spelling.decode(name).decode(errors="replace") for name in names.values()]
    encoded = _encode(tokenizer, plain, [f"x{text}x" for text in (*shown, *bare)])
    pairs = zip(names, encoded, encoded[len(names) :])
    return {i for i, *ids in pairs if i in itertools.chain(*ids)}


def shared_id(tokenizer: PreTrainedTokenizerBase) -> tuple[int, str, str] | None:
    """Return an id that belongs to an added token and to another one of text, with their names.

    The library gives a token that its files only name, such as a `pad_token` without an entry, the
    id after the number of tokens, which is taken if the ids have gaps.
    """
    backend = _backend(tokenizer)
    for index, token in tokenizer.added_tokens_decoder.items():
        other = backend.model.id_to_token(index)
        # A reserved token in brackets is in no text.
        is_text = other and not re.fullmatch(r"<(?!0x)[^>]*>|\[[^\]]*\]", other)
        if is_text and other != token.content:
            return index, token.content, other
    return None


def space_mark(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the string for a space in tokenizers of SentencePiece's kind; "" for others."""
    spelling = _spelling(tokenizer)
    return spelling.space if isinstance(spelling, _SentencePiece) else ""


def index_by_bytes(tokenizer: PreTrainedTokenizerBase) -> dict[bytes, int]:
    """Return the id of each canonical byte string, the first one of `ids_by_bytes`."""
    return {content: ids[0] for content, ids in ids_by_bytes(tokenizer).items()}


def ids_by_bytes(tokenizer: PreTrainedTokenizerBase) -> dict[bytes, list[int]]:
    """Return all ids of each canonical byte string.

    Ids that the tokenizer writes come first, then a `<0x41>` after the others, then by number.
    """
    unwritten = unwritten_ids(tokenizer)
    names = _vocabulary(tokenizer).spelled
    groups = _ids_by_bytes(_vocabulary(tokenizer))
    return {
        content: sorted(
            ids, key=lambda i: (i in unwritten, bool(_BYTE_TOKEN.fullmatch(names[i])), i)
        )
        for content, ids in groups.items()
    }


def unwritten_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return ids that no text is ever tokenized into, because another token has the same bytes.

    Examples are `<0x2C>` beside `,` in SentencePiece vocabularies, and GPT-NeoX's runs of spaces,
    which are both in its model and among its added tokens.
    """
    vocabulary = _vocabulary(tokenizer)
    cached = _UNWRITTEN.get(tokenizer)
    if cached is None or cached[0] is not vocabulary:
        cached = _UNWRITTEN[tokenizer] = vocabulary, _find_unwritten(tokenizer, vocabulary)
    return cached[1]


_UNWRITTEN: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[_Vocabulary, frozenset[int]]] = (
    WeakKeyDictionary()
)

_SURROUNDINGS = (
    "{0}",
    "x{0}",
    "{0}x",
    "x{0}x",
    " {0} ",
    "\n{0}\n",
    "1{0}1",
    ".{0}.",
    "か{0}か",
    "{0}{0}",
)
"""Contexts of a token's text that show whether it is written: at the ends of words, within them,
and between words.
"""


def _find_unwritten(tokenizer: PreTrainedTokenizerBase, vocabulary: _Vocabulary) -> frozenset[int]:
    shared = {content: ids for content, ids in _ids_by_bytes(vocabulary).items() if len(ids) > 1}
    texts = [content.decode("utf-8", errors="replace") for content in shared]
    around = [surrounding.format(text) for text in texts for surrounding in _SURROUNDINGS]
    encoded = _encode(tokenizer, plain_backend(tokenizer), around) if around else []
    written = set(itertools.chain(*encoded))
    unwritten: set[int] = set()
    for ids in shared.values():
        # If none of them occurs, byte tokens are assumed to be unwritten.
        written_ids = written & set(ids) or [
            min(ids, key=lambda i: (bool(_BYTE_TOKEN.fullmatch(vocabulary.spelled[i])), i))
        ]
        unwritten |= set(ids) - set(written_ids)
    return frozenset(unwritten)


def _ids_by_bytes(vocabulary: _Vocabulary) -> dict[bytes, list[int]]:
    groups: dict[bytes, list[int]] = defaultdict(list)
    for i, content in enumerate(vocabulary.contents):
        if content:
            groups[content].append(i)
    return groups


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of the vocabulary: canonical bytes, or text of special tokens."""
    digest = hashlib.sha256()
    _, names, contents = _vocabulary(tokenizer)
    for name, content in zip(names, contents):
        kind, shown = (b"t", content) if content is not None else (b"s", name.encode())
        digest.update(kind + len(shown).to_bytes(4, "big") + shown)
    return digest.hexdigest()


def plain_backend(tokenizer: PreTrainedTokenizerBase) -> tokenizers.Tokenizer:
    """Return a copy of the Rust tokenizer that reads everything as text.

    It neither truncates nor pads.

    `<|endoftext|>` in a document becomes those characters, not the token.

    Raises:
      UserError: the tokenizer has none (a "slow" tokenizer).
    """
    backend = _backend(tokenizer)
    if isinstance(backend.model, tokenizers.models.Unigram):
        hidden = special_ids(tokenizer) - {cast(int, tokenizer.unk_token_id)}
        return _without_special(backend, hidden)
    return _without_special(backend)


def _without_special(
    backend: tokenizers.Tokenizer, hidden: Iterable[int] = ()
) -> tokenizers.Tokenizer:
    """Make a deterministic copy that reads the names of special tokens as text.

    Args:
      backend: the tokenizer.
      hidden: ids of a Unigram model's vocabulary that must not match text: in it the names of
        special tokens are ordinary pieces.
    """
    state_json = backend.to_str()
    if hidden := set(hidden):
        state = json.loads(state_json)
        for i in hidden & set(range(len(state["model"]["vocab"]))):
            state["model"]["vocab"][i][0] = f"\uffff{i}"  # Renamed, so that other ids stay.
        state["added_tokens"] = [
            token for token in state["added_tokens"] if token["id"] not in hidden
        ]
        state_json = json.dumps(state)
    plain = tokenizers.Tokenizer.from_str(state_json)
    if getattr(plain.model, "dropout", None):
        plain.model.dropout = None  # type: ignore[attr-defined]
    plain.no_truncation()
    plain.no_padding()
    # A post-processor would trim spaces from offsets.
    plain.post_processor = None  # type: ignore[assignment]
    plain.encode_special_tokens = True
    return plain


def _encode(
    tokenizer: PreTrainedTokenizerBase, plain: tokenizers.Tokenizer, texts: Sequence[str]
) -> list[list[int]]:
    """Encode texts to ids.

    Raises:
      UserError: the vocabulary cannot spell one of them and has no unknown token.
    """
    try:
        return [
            encoding.ids
            for encoding in plain.encode_batch_fast(list(texts), add_special_tokens=False)
        ]
    except Exception as error:  # The library raises bare Exceptions.
        raise UserError(
            f"the tokenizer '{tokenizer.name_or_path}' cannot read every text ({error}): give its "
            "tokenizer.json an unknown token (model.unk_token), or take another tokenizer"
        ) from error


class PieceCutter:
    """Splits bytes into ids of `tokenizer` whose canonical bytes join up to them again.

    The first choice is the tokenizer's own segmentation of the text; where that does not restore
    the bytes (they are not UTF-8, or a normaliser or a prefixed space changes them), its bare model
    without normaliser and pre-tokenizer; then the longest matching tokens from left to right. A
    tokenizer that cannot spell a text (without capitals, say) yields the tokens that its model
    would read for it, if they are all known.

    Args:
      tokenizer: the tokenizer.
      avoid: ids that are never used.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, avoid: Set[int] = frozenset()):
        self._bytes = [
            None if i in avoid else content for i, content in enumerate(token_bytes(tokenizer))
        ]
        usable = {
            content: [i for i in ids if i not in avoid]
            for content, ids in ids_by_bytes(tokenizer).items()
        }
        self._index = {content: ids[0] for content, ids in usable.items() if ids}
        self._longest = max(map(len, self._index), default=0)
        self._backend = plain_backend(tokenizer)
        self._spelling = _spelling(tokenizer)

    def __call__(self, content: bytes) -> list[int]:
        """Return the ids for `content`; [] if no tokens join up to it."""
        return self.cut_all([content])[0]

    def cut_all(self, contents: Sequence[bytes]) -> list[list[int]]:
        """Split many byte strings, with the tokenizer's own parallelism."""
        # Bytes that are not UTF-8 become a text that cannot restore them.
        texts = [content.decode("utf-8", errors="replace") for content in contents]
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [self._cut(content, encoding.ids) for content, encoding in zip(contents, encodings)]

    def _cut(self, content: bytes, own: list[int]) -> list[int]:
        if self._join(own) == content:
            return own
        bare = self._bare(content)
        if self._join(bare) == content:
            return bare
        return self._greedy(content) or self._as_read(content, own)

    def _join(self, ids: Iterable[int]) -> bytes | None:
        parts = [self._bytes[i] for i in ids]
        return None if None in parts else b"".join(parts)  # type: ignore[arg-type]

    def _bare(self, content: bytes) -> list[int]:
        spelled = self._spelling.encode(content)
        return [token.id for token in self._backend.model.tokenize(spelled)] if spelled else []

    def _as_read(self, content: bytes, own: list[int]) -> list[int]:
        joined = self._join(own)
        is_text = content.decode("utf-8", errors="ignore").encode() == content
        return own if is_text and joined and joined.strip() else []

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


# --- Spellings ----------------------------------------------------------------------------------


def _byte_alphabet() -> dict[int, str]:
    """Return the byte-level alphabet of each byte.

    Printable Latin-1 maps to itself, the 68 other bytes to U+0100 and up.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(0x100 + n) for n, byte in enumerate(others)
    }


class _Plain:
    """Tokens written as their text."""

    def decode(self, token: str) -> bytes:
        return token.encode("utf-8", errors="replace")

    def encode(self, content: bytes) -> str | None:
        try:
            return content.decode()
        except UnicodeDecodeError:
            return None


class _ByteLevel(_Plain):
    """One printable character per byte (GPT-2, GPT-NeoX, LLaMA 3, Qwen)."""

    _to_characters = _byte_alphabet()
    # Latin-1 characters outside the alphabet (a plain space) must not decode to bytes; U+FFFF is
    # not Latin-1.
    _to_bytes = {byte: 0xFFFF for byte in range(256)} | {
        ord(c): byte for byte, c in _to_characters.items()
    }

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
        self.space = space

    def decode(self, token: str) -> bytes:
        if byte := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(byte[1], 16)])
        return super().decode(token.replace(self.space, " "))

    def encode(self, content: bytes) -> str | None:
        text = super().encode(content)
        return None if text is None else text.replace(" ", self.space)


class _Words(_Plain):
    """Words without surrounding spaces, whose later pieces have a prefix: `play ##ing` (BERT).

    A first piece stands for a space and its text, unless it begins with a character that is usually
    not preceded by a space. That is a convention, since the token itself does not tell.
    """

    def __init__(self, mark: str):
        self._mark = mark

    def decode(self, token: str) -> bytes:
        if self._mark and token.startswith(self._mark) and token != self._mark:
            return super().decode(token.removeprefix(self._mark))
        return super().decode(token if _NO_SPACE_BEFORE.match(token) else f" {token}")

    def encode(self, content: bytes) -> str | None:
        text = super().encode(content)
        if not text or _NO_SPACE_BEFORE.match(text.removeprefix(" ")):
            return text
        return (
            text.removeprefix(" ")
            if text.startswith(" ")
            else self._mark + text
            if self._mark
            else None
        )


class _WordEnds(_Plain):
    """Words whose last piece has a suffix for the space after it: `play ing</w>` (GPT-1, CLIP)."""

    def __init__(self, mark: str, inner: _Plain):
        self._mark, self._inner = mark, inner

    def decode(self, token: str) -> bytes:
        text = token.removesuffix(self._mark)
        return self._inner.decode(text) + (b" " if text != token else b"")

    def encode(self, content: bytes) -> str | None:
        # The model adds the suffix itself.
        return self._inner.encode(content[:-1]) if content.endswith(b" ") else None


def _spelling(tokenizer: PreTrainedTokenizerBase) -> _Plain:
    """Detect a tokenizer's spelling of bytes from its components."""
    backend = _backend(tokenizer)
    parts = [*_parts(backend.normalizer), *_parts(backend.pre_tokenizer), *_parts(backend.decoder)]
    spaces = [part["replacement"] for part in parts if part["type"] == "Metaspace"]
    spaces += [part["pattern"]["String"] for part in _parts(backend.decoder) if _makes_space(part)]
    if any(part["type"] == "ByteLevel" for part in parts):
        spelling: _Plain = _ByteLevel()
    elif _splits_words(backend):
        spelling = _Words(getattr(backend.model, "continuing_subword_prefix", None) or "")
    elif spaces or getattr(backend.model, "byte_fallback", False):
        spelling = _SentencePiece(spaces[0] if spaces else "▁")
    else:
        spelling = _Plain()
    mark = getattr(backend.model, "end_of_word_suffix", None)
    return _WordEnds(mark, spelling) if mark else spelling


def _splits_words(backend: tokenizers.Tokenizer) -> bool:
    """Return whether tokens are words and continuations, without the white space between words."""
    model = backend.model
    by_words = isinstance(model, tokenizers.models.WordPiece | tokenizers.models.WordLevel)
    if not (by_words or getattr(model, "continuing_subword_prefix", None)):
        return False
    if backend.pre_tokenizer is None:
        return isinstance(model, tokenizers.models.WordPiece)
    return [text for text, _ in backend.pre_tokenizer.pre_tokenize_str("a b")] == ["a", "b"]


def _makes_space(part: dict[str, Any]) -> bool:
    return part["type"] == "Replace" and part["content"] == " " and "String" in part["pattern"]


def _added_bytes(backend: tokenizers.Tokenizer, token: AddedToken) -> bytes:
    """Return the bytes of an added token that the model does not know.

    They are its text. The library looks for it in the normalised text if so configured, where a
    space may be a `▁`, or have been prefixed.
    """
    if not (token.normalized and backend.normalizer):
        return token.content.encode()
    text = backend.normalizer.normalize_str(token.content)
    kinds = {part["type"] for part in _parts(backend.normalizer)}
    if "ByteLevel" in kinds:
        return _ByteLevel().decode(text)
    return (text.replace("▁", " ") if kinds & {"Replace", "Prepend"} else text).encode()


def _parts(component: Any) -> Iterator[dict[str, Any]]:
    """Yield a normaliser, pre-tokenizer or decoder as in tokenizer.json, sequences flattened."""
    if component is not None:
        yield from _unfolded(json.loads(component.__getstate__()))


def _unfolded(part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield part
    for inner in (
        *part.get("normalizers", ()),
        *part.get("pretokenizers", ()),
        *part.get("decoders", ()),
    ):
        yield from _unfolded(inner)


def _backend(tokenizer: PreTrainedTokenizerBase) -> tokenizers.Tokenizer:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"the tokenizer '{tokenizer.name_or_path}' ({type(tokenizer).__name__}) works in"
            " Python, without a tokenizer.json: convert it to that form, with transformers'"
            " convert_slow_tokenizer if it knows the kind"
        )
    return backend
