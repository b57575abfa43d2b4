"""Canonical bytes of tokens, and splitting bytes into tokens."""

import json

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.helpers import SHARED, tiny_tokenizer, tokenizer_of_kind
from tokalign_jax.errors import UserError
from tokalign_jax.text import canonical

TEXTS = (
    "The quick brown fox jumps over the lazy dog; don't you think?   Yes.\n",
    "def f(x, *, y=None):\n\treturn [x ** 2 for _ in range(10)]  # ok\r\n",
    "Größe, été, año, Ελλάδα, мир, שלום, العربية, हिन्दी, ภาษา, 日本語, 한국어, 中文 🙂👩‍💻",
    " leading space, trailing space ",
    "<|endoftext|> and </s> are only words here",
)
REAL = ["models/llama-en16k", "tokenizers/neox", "tokenizers/qwen3"]


def metaspace_without_prefix() -> PreTrainedTokenizerFast:
    """Like Gemma's: ▁ for a space, no prefix, byte fallback."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["The fox, the dog and the mice of été"] * 3, trainer)
    # Bytes are ordinary tokens; the trainer only needed them to be in the vocabulary.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][:3]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="</s>", unk_token="<unk>"
    )


def tokenizers(kind: str) -> PreTrainedTokenizerFast:
    if kind == "byte_level":
        return tiny_tokenizer(400, TEXTS[:2])
    if kind == "metaspace":
        return tiny_tokenizer(400, TEXTS[:2], kind="metaspace")
    if kind == "gemma":
        return metaspace_without_prefix()
    if not (SHARED / kind).exists():
        pytest.skip(f"needs {SHARED / kind}")
    return AutoTokenizer.from_pretrained(SHARED / kind)


@pytest.mark.parametrize("kind", ["byte_level", "gemma", *REAL])
def test_canonical_bytes_of_tokens_join_to_the_text(kind):
    tokenizer = tokenizers(kind)
    content = canonical.token_bytes(tokenizer)
    backend = canonical.plain_backend(tokenizer)
    for text in TEXTS:
        if tokenizer.backend_tokenizer.normalizer and kind != "gemma":
            text = tokenizer.backend_tokenizer.normalizer.normalize_str(text)
        assert (
            b"".join(content[i] for i in backend.encode(text, add_special_tokens=False).ids)
            == text.encode()
        )


def test_llama_2_tokenizers_differ_only_by_a_leading_space():
    tokenizer = tokenizers("metaspace")
    content = canonical.token_bytes(tokenizer)
    for text in TEXTS:
        ids = canonical.plain_backend(tokenizer).encode(text, add_special_tokens=False).ids
        assert b"".join(content[i] for i in ids) == b" " + text.encode()


@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "gemma"])
def test_canonical_bytes_of_each_spelling(kind):
    tokenizer = tokenizers(kind)
    content = canonical.token_bytes(tokenizer)
    assert len(content) == canonical.vocabulary_size(tokenizer) == len(tokenizer)
    assert content[tokenizer.eos_token_id] is None
    word = {"byte_level": "Ġ", "metaspace": "▁", "gemma": "▁"}[kind]
    assert content[tokenizer.convert_tokens_to_ids(word)] == b" "
    if kind == "byte_level":
        assert content[tokenizer.convert_tokens_to_ids("Ċ")] == b"\n"
        assert {c for c in content if c and len(c) == 1} == {bytes([b]) for b in range(256)}
    else:
        assert content[tokenizer.convert_tokens_to_ids("<0x0A>")] == b"\n"
        assert content[tokenizer.convert_tokens_to_ids("<0xE9>")] == b"\xe9"


def test_byte_alphabet_matches_the_tokenizers_library():
    alphabet = canonical._byte_alphabet()
    assert sorted(alphabet.values()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    # The library's own decoder is the reference for which byte a character stands for.
    for text in ("é", "日", " ", "\n", "\x00", "\xad"):
        spelled = "".join(alphabet[byte] for byte in text.encode())
        assert decoders.ByteLevel().decode([spelled]) == text


def test_added_tokens_have_their_texts_bytes_unless_special():
    tokenizer = tokenizers("byte_level")
    tokenizer.add_tokens([AddedToken("  été", normalized=False), "Ġ raw"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    content = canonical.token_bytes(tokenizer)
    assert content[tokenizer.convert_tokens_to_ids("  été")] == "  été".encode()
    assert content[tokenizer.convert_tokens_to_ids("Ġ raw")] == "Ġ raw".encode()
    assert content[tokenizer.convert_tokens_to_ids("<|tool|>")] is None


def test_index_prefers_ordinary_tokens_to_byte_tokens():
    tokenizer = tokenizers("metaspace")
    index = canonical.index_by_bytes(tokenizer)
    assert tokenizer.convert_ids_to_tokens(index[b"e"]) == "e"
    assert tokenizer.convert_ids_to_tokens(index[b"\xff"]) == "<0xFF>"


def test_fingerprints_distinguish_vocabularies():
    first, same, other = (
        tiny_tokenizer(300, TEXTS),
        tiny_tokenizer(300, TEXTS),
        tiny_tokenizer(301, TEXTS),
    )
    assert (
        canonical.fingerprint(first) == canonical.fingerprint(same) != canonical.fingerprint(other)
    )


def test_plain_backend_reads_special_tokens_as_text_in_a_copy():
    tokenizer = tokenizers("byte_level")
    plain = (
        canonical.plain_backend(tokenizer).encode("a<|endoftext|>", add_special_tokens=False).ids
    )
    assert tokenizer.eos_token_id not in plain
    assert (
        tokenizer("a<|endoftext|>", add_special_tokens=False)["input_ids"][-1]
        == tokenizer.eos_token_id
    )


CONTENTS = [
    b"quick", b" quick", b"  ", b"\n\n", b"\xff", b"\xe6\x97", b"\x97\xa5 fox", b"abc\xe4\xb8", "日本".encode(), b"",
    "e\u0301".encode(), b"<|endoftext|>", b"\x00", "▁".encode(),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "gemma", *REAL])
def test_pieces_join_to_the_split_bytes(kind):
    tokenizer = tokenizers(kind)
    content = canonical.token_bytes(tokenizer)
    cutter = canonical.PieceCutter(tokenizer)
    cut = cutter.cut_all(CONTENTS)
    single = {c for c in content if c and len(c) == 1}
    for given, ids in zip(CONTENTS, cut):
        assert cutter(given) == ids
        if ids or not given:
            assert b"".join(content[i] for i in ids) == given
        else:
            assert (
                not {bytes([b]) for b in given} <= single
            )  # only what the vocabulary cannot spell stays uncut


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_every_token_splits_into_itself(kind):
    tokenizer = tokenizers(kind)
    index = canonical.index_by_bytes(tokenizer)
    cutter = canonical.PieceCutter(tokenizer)
    for ids, (given, i) in zip(cutter.cut_all(list(index)), index.items()):
        assert ids, given
        if given.isascii() and given.isalpha():
            assert ids == [i], given


def test_pieces_follow_the_tokenizers_merges():
    tokenizer = tokenizers("byte_level")
    for text in ("The quick", " lazy dog", "def f(x)"):
        assert (
            canonical.PieceCutter(tokenizer)(text.encode())
            == tokenizer(text, add_special_tokens=False)["input_ids"]
        )


def test_greedy_split_takes_the_longest_or_fails():
    tokenizer = tokenizers("byte_level")
    cutter = canonical.PieceCutter(tokenizer)
    cutter._index = {b"a": 1, b"ab": 2, b"c": 3}
    cutter._longest = 2
    assert cutter._greedy(b"aabc") == [1, 2, 3]
    assert cutter._greedy(b"ad") == []


def test_cached_listing_is_renewed_when_tokens_or_roles_are_added():
    tokenizer = tokenizers("byte_level")
    size, before = canonical.vocabulary_size(tokenizer), canonical.fingerprint(tokenizer)
    canonical.token_bytes(tokenizer)[0] = (
        b"changed"  # what a caller does with its list is its own matter
    )
    assert canonical.token_bytes(tokenizer)[0] != b"changed" and canonical.spelled(tokenizer)[0]
    tokenizer.add_tokens(["<new>"])
    assert canonical.vocabulary_size(tokenizer) == size + 1
    assert (
        canonical.token_bytes(tokenizer)[size] == b"<new>"
        and canonical.spelled(tokenizer)[size] == "<new>"
    )
    tokenizer.pad_token = "<new>"
    assert (
        canonical.token_bytes(tokenizer)[size] is None
        and canonical.fingerprint(tokenizer) != before
    )


def test_failed_listing_is_not_cached(monkeypatch):
    tokenizer = tiny_tokenizer(300, TEXTS)

    def fails(tokenizer):
        raise UserError("no such spelling")

    with monkeypatch.context() as patch, pytest.raises(UserError):
        patch.setattr(canonical, "_spelling", fails)
        canonical.token_bytes(tokenizer)
    assert any(canonical.token_bytes(tokenizer))


def test_text_token_with_a_role_keeps_its_bytes():
    """Some tokenizers pad with `!`."""
    tokenizer = tiny_tokenizer(400, TEXTS[:2])
    mark = tokenizer.convert_tokens_to_ids("!")
    tokenizer.add_special_tokens({"pad_token": "!"})
    assert tokenizer.pad_token_id == mark and mark not in canonical.special_ids(tokenizer)
    assert canonical.token_bytes(tokenizer)[mark] == b"!"
    assert canonical.special_ids(tokenizer) == {tokenizer.eos_token_id}
    assert "capitals" not in canonical.losses(tokenizer)


@pytest.mark.parametrize(
    "role", ["pad_token", "unk_token", "bos_token", "eos_token", "sep_token", "mask_token"]
)
@pytest.mark.parametrize("kind", ["gpt2", "qwen", "gemma", "bert", "t5", "unigram_with_bytes"])
def test_no_role_removes_a_text_token(kind, role):
    tokenizer = tokenizer_of_kind(kind, [*TEXTS, "Stop! Go! Now!"])
    mark = tokenizer.convert_tokens_to_ids("!")
    setattr(tokenizer, role, "!")
    assert getattr(tokenizer, f"{role}_id") == mark and mark not in canonical.special_ids(tokenizer)
    content = canonical.token_bytes(tokenizer)
    assert content[mark] == b"!"
    ids = canonical.plain_backend(tokenizer).encode("Go!", add_special_tokens=False).ids
    assert b"".join(content[i] or b"" for i in ids).strip().lower() == b"go!"


@pytest.mark.parametrize("name", ["</s>", "<s>", "<pad>"])
def test_unigram_reads_a_special_tokens_name_as_text(name):
    pieces = [
        ("<pad>", 0.0),
        ("<s>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *((c, -3.0) for c in "</>▁spadxy"),
    ]
    backend = Tokenizer(models.Unigram(pieces, unk_id=3))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    plain, content = canonical.plain_backend(tokenizer), canonical.token_bytes(tokenizer)
    text = f"x{name}y {name}"
    ids = plain.encode(text, add_special_tokens=False).ids
    assert not set(ids) & canonical.special_ids(tokenizer)
    assert b"".join(content[i] for i in ids) == f" {text}".encode()
    assert (
        plain.encode("x?", add_special_tokens=False).ids[-1] == 3
    )  # the unknown one goes on being it
    assert backend.encode(text).ids != ids and canonical.vocabulary_size(tokenizer) == len(pieces)


def test_bpe_dropout_is_disabled():
    backend = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "<e>": 3}, [("a", "b")], dropout=0.9))
    plain = canonical.plain_backend(
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>")
    )
    assert {tuple(plain.encode("abab").ids) for _ in range(20)} == {(2, 2)}


@pytest.mark.parametrize("model", [models.WordPiece, models.WordLevel])
def test_tokenizer_that_fails_on_a_text_is_refused(model):
    backend = Tokenizer(model({"a": 0, "<e>": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UserError, match=r"cannot read every text .*unk_token"):
        canonical.losses(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>"))


def test_characters_as_words_keep_their_spaces():
    letters = {letter: i for i, letter in enumerate([*"a fox!", "<e>"])}
    backend = Tokenizer(models.WordLevel(letters, unk_token="<e>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>")
    content = canonical.token_bytes(tokenizer)
    assert (
        b"".join(content[i] for i in canonical.plain_backend(tokenizer).encode("a fox!").ids)
        == b"a fox!"
    )


def test_pieces_of_words_with_a_prefix_mark():
    """BPE may have WordPiece's `##` too."""
    vocabulary = {"p": 0, "##l": 1, "##a": 2, "pl": 3, "<e>": 4}
    backend = Tokenizer(models.BPE(vocabulary, [("p", "##l")], continuing_subword_prefix="##"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>")
    assert canonical.token_bytes(tokenizer)[:4] == [b" p", b"l", b"a", b" pl"]
