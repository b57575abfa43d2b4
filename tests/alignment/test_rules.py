"""The rule for each kind of token, both ways between byte-level and SentencePiece-style
vocabularies.

The tokenizers here have exactly the words they are given, so that every test can name the tokens
that it expects.
"""

from collections.abc import Sequence

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.alignment.test_alignment import row
from tests.helpers import KINDS, TEXTS, tokenizer_of_kind
from tokalign_jax.alignment import alignment, methods
from tokalign_jax.alignment.alignment import Alignment, Rule
from tokalign_jax.alignment.methods import Inputs
from tokalign_jax.alignment.vectors import Vectors
from tokalign_jax.config import AlignmentConfig
from tokalign_jax.text import canonical

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TO_CHARACTERS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def chained(
    words: Sequence[str], first: Sequence[str]
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges by which every word grows from its first character; of two, the earlier
    wins.
    """
    vocabulary = {token: i for i, token in enumerate(first)}
    merges = []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in vocabulary:
                vocabulary[word[:end]] = len(vocabulary)
                merges.append((word[: end - 1], word[end - 1]))
    return vocabulary, merges


def byte_level(
    *words: str, first: Sequence[str] = ("<|endoftext|>",), **roles: str
) -> PreTrainedTokenizerFast:
    """Like GPT-2's: each word is a token, and so are its beginnings and all bytes."""
    spelled = [TO_CHARACTERS.pre_tokenize_str(word)[0][0] for word in words]
    vocabulary, merges = chained(spelled, [*first, *ALPHABET])
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = TO_CHARACTERS
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*first])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **(roles or {"eos_token": "<|endoftext|>"})
    )


def sentence_piece(*words: str, **roles: str) -> PreTrainedTokenizerFast:
    """Like Gemma's: `▁` for a space, a token for every character of the words, `<0x00>` to `<0xFF>`
    for the rest.
    """
    spelled = [word.replace(" ", "▁") for word in words]
    characters = sorted({c for word in spelled for c in word} | {"▁"})
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *characters]
    vocabulary, merges = chained(spelled, first)
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    roles = roles or {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


def aligned(
    source, target, method="pieces", vectors: tuple[Vectors, Vectors] | None = None, counts=None
) -> Alignment:
    source_counts = np.full(canonical.vocabulary_size(source), 100)
    counts = np.full(canonical.vocabulary_size(target), 100) if counts is None else counts
    config = AlignmentConfig(method=method, similarity_threshold=0.0)
    given = Inputs(
        config, source, target, source_counts, counts, 0, lambda line: None, *(vectors or ())
    )
    return methods.make(given)[0]


def token(tokenizer, content: str | bytes) -> int:
    content = content.encode() if isinstance(content, str) else content
    return canonical.index_by_bytes(tokenizer)[content]


def assert_exact(source, target, *contents: str | bytes):
    made = aligned(source, target)
    for content in contents:
        i = token(target, content)
        assert made.rules[i] == Rule.EXACT
        assert row(made.embedding, i) == row(made.head, i) == {token(source, content): 1.0}


def assert_pieces(source, target, content: str | bytes, *expected: str | bytes):
    """`content`, a target token, is the mean of these source tokens."""
    made, i = aligned(source, target), token(target, content)
    assert made.rules[i] == Rule.PIECES
    weights: dict[int, float] = {}
    for piece in expected:
        weights[token(source, piece)] = weights.get(token(source, piece), 0.0) + 1 / len(expected)
    assert row(made.embedding, i) == pytest.approx(weights) and row(made.head, i) == pytest.approx(
        weights
    )


def test_leading_spaces_match_in_every_spelling():
    byte, piece = byte_level(" the", "the"), sentence_piece(" the", "the")
    assert byte.convert_ids_to_tokens(token(byte, " the")) == "Ġthe"
    assert piece.convert_ids_to_tokens(token(piece, " the")) == "▁the"
    assert_exact(byte, piece, " the", "the", " ")
    assert_exact(piece, byte, " the", "the", " ")


def test_equal_strings_of_different_bytes_do_not_match():
    """`Ã` is the byte C3 in a byte-level vocabulary and a character, C3 83, elsewhere; `Ġ` a space,
    or a letter of Maltese.
    """
    byte, piece = byte_level(), sentence_piece("Ã", "Ġ")
    assert {"Ã", "Ġ"} <= set(byte.get_vocab()) & set(piece.get_vocab())
    assert_pieces(byte, piece, "Ã", b"\xc3", b"\x83")
    assert_pieces(byte, piece, "Ġ", b"\xc4", b"\xa0")
    assert_exact(piece, byte, b"\xc3", " ")


@pytest.mark.parametrize("content", [b"\n", b"\t", b"\x00", b"\xc3", b"\xff"])
def test_byte_tokens_match_by_byte(content):
    byte, piece = byte_level(), sentence_piece("a")
    assert piece.convert_ids_to_tokens(token(piece, content)) == f"<0x{content[0]:02X}>"
    assert_exact(byte, piece, content)
    assert_exact(piece, byte, content)


def test_character_token_is_preferred_to_its_byte_token():
    byte, piece = byte_level(), sentence_piece("A")
    assert_exact(piece, byte, "A")
    assert piece.convert_ids_to_tokens(token(piece, "A")) == "A"
    assert_exact(byte, piece, "A")


@pytest.mark.parametrize("method", sorted(methods.METHODS.keys() - {"tokalign", "random", "omp"}))
def test_byte_token_takes_no_probability_from_its_character_token(method):
    """With the same head row both would get half of it, though no text is cut into `<0x41>` where
    there is an `A`.
    """
    byte, piece = byte_level(), sentence_piece("A")
    double = piece.convert_tokens_to_ids("<0x41>")
    assert canonical.unwritten_ids(piece) == {double, piece.convert_tokens_to_ids("<0x20>")}
    made = aligned(byte, piece, method)
    assert made.rules[double] == Rule.UNWRITTEN
    assert row(made.embedding, double) == {token(byte, "A"): 1.0}
    assert row(made.head, double) == {made.source_size: 1.0}
    rows = np.random.default_rng(0).normal(size=(made.source_size, 8)).astype(np.float32)
    logits = rows @ rows[token(byte, "A")]
    shares = (
        np.exp(alignment.apply(made.head, rows) @ rows[token(byte, "A")]) / np.exp(logits).sum()
    )
    assert shares[double] <= 1 / made.source_size < shares[token(piece, "A")]


def test_duplicate_runs_of_spaces_are_aligned():
    """GPT-NeoX's: the added tokens are written, those of its model never are."""
    twice, once = byte_level("  ", " " * 4), byte_level("  ")
    twice.add_tokens([AddedToken("  ", normalized=True), AddedToken(" " * 4, normalized=True)])
    merged = twice.convert_tokens_to_ids(["ĠĠ", "ĠĠĠĠ"])
    assert canonical.unwritten_ids(twice) == set(merged)
    made = aligned(once, twice)
    for i, embedding in zip(merged, ({token(once, "  "): 1.0}, {token(once, "  "): 1.0})):
        assert made.rules[i] == Rule.UNWRITTEN and row(made.embedding, i) == embedding
        assert row(made.head, i) == {made.source_size: 1.0}
    assert_exact(once, twice, "  ")
    assert_pieces(once, twice, " " * 4, "  ", "  ")
    # As the source, it gives the rows of the tokens that it writes: the others were never trained.
    assert row(aligned(twice, once).head, token(once, "  ")) == {
        twice.convert_tokens_to_ids("  "): 1.0
    }


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_tokens_of_the_same_tokenizer_map_to_themselves(kind):
    tokenizer = tokenizer_of_kind(kind, TEXTS)
    made = aligned(tokenizer, tokenizer)
    assert set(made.rules) <= {Rule.EXACT, Rule.SPECIAL}
    np.testing.assert_array_equal(made.heaviest(), np.arange(made.target_size))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_tokens_in_the_text_are_not_marked_unwritten(kind):
    tokenizer = tokenizer_of_kind(kind, TEXTS)
    plain = canonical.plain_backend(tokenizer)
    used = {i for text in TEXTS for i in plain.encode(text, add_special_tokens=False).ids}
    content = canonical.token_bytes(tokenizer)
    unwritten = canonical.unwritten_ids(tokenizer)
    assert not used & unwritten
    assert {content[i] for i in unwritten} <= {
        content[i] for i in range(len(content)) if i not in unwritten
    }
    if kind in ("llama2", "gemma", "mistral", "unigram_with_bytes", "unigram_first"):
        assert tokenizer.convert_tokens_to_ids("<0x61>") in unwritten


def test_numbers_split_differently_map_to_their_digits():
    whole, pairs, single = byte_level("2024", "100"), byte_level("20", "24", "10"), byte_level()
    assert_pieces(single, whole, "2024", "2", "0", "2", "4")
    assert_pieces(pairs, whole, "2024", "20", "24")
    assert_pieces(pairs, whole, "100", "10", "0")
    assert_pieces(sentence_piece("0124"), whole, "2024", "2", "0", "2", "4")
    assert_exact(whole, single, *"0123456789")
    assert_pieces(sentence_piece("0124"), sentence_piece(" 20"), " 20", " ", "2", "0")


def test_runs_of_white_space_map_to_shorter_runs():
    long, short = byte_level(" " * 8, "\t\t\t", "\n\n\n"), sentence_piece("  ", "\t", "\n\n")
    assert_exact(short, long, " ", "  ", "\t", "\n\n")
    assert_pieces(short, long, " " * 8, *["  "] * 4)
    assert_pieces(short, long, " " * 7, *["  "] * 3, " ")
    assert_pieces(short, long, "\t\t\t", "\t", "\t", "\t")
    assert_pieces(short, long, "\n\n\n", "\n\n", "\n")


def test_indentation_maps_to_line_break_and_spaces():
    target, source = (
        byte_level("\n    ", "    return", "):\n    "),
        sentence_piece("  ", "return", "):", "\n"),
    )
    assert_pieces(source, target, "\n    ", "\n", "  ", "  ")
    assert_pieces(source, target, "    return", "  ", "  ", "return")
    assert_pieces(source, target, "):\n    ", "):", "\n", "  ", "  ")


def test_added_tokens_of_spaces_are_aligned_as_text():
    """GPT-NeoX's tokenizer has runs of spaces as added tokens, which are not special."""
    source, target = byte_level("  "), byte_level()
    target.add_tokens([AddedToken("  ", normalized=True), AddedToken(" " * 6, normalized=True)])
    assert_exact(source, target, "  ")
    assert_pieces(source, target, " " * 6, "  ", "  ", "  ")


def test_cjk_maps_to_characters_or_their_bytes():
    target, some, none = (
        sentence_piece("日本語", "日本", "날"),
        sentence_piece("日", "本"),
        byte_level("日"[:1]),
    )
    assert_exact(some, target, "日", "本")
    assert_pieces(some, target, "日本", "日", "本")
    assert_pieces(some, target, "日本語", "日", "本", *(bytes([b]) for b in "語".encode()))
    assert_pieces(some, target, "날", *(bytes([b]) for b in "날".encode()))
    assert_pieces(none, target, "日本", "日", *(bytes([b]) for b in "本".encode()))


def test_partial_characters_map_to_bytes():
    """Byte-level tokens may end within a character; no text spells them."""
    target = byte_level("語")  # its beginnings are E8 AA and E8
    assert_pieces(sentence_piece("a"), target, "語".encode()[:2], b"\xe8", b"\xaa")
    assert_exact(sentence_piece("a"), target, b"\xe8")


def test_special_tokens_are_aligned_by_role_despite_their_text():
    source = sentence_piece("a")  # <unk>, <s>, </s>
    roles = {
        "eos_token": "<|im_end|>",
        "bos_token": "<|begin|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<?>",
    }
    target = byte_level(first=list(roles.values()), **roles)
    made = aligned(source, target)
    ends = {
        "<|im_end|>": "</s>",
        "<|begin|>": "<s>",
        "<?>": "<unk>",
        "<|endoftext|>": "</s>",
    }  # no pad: end of text
    for text, of_source in ends.items():
        i = target.convert_tokens_to_ids(text)
        assert made.rules[i] == Rule.SPECIAL and made.scores[i] == 1
        assert (
            row(made.embedding, i)
            == row(made.head, i)
            == {source.convert_tokens_to_ids(of_source): 1.0}
        )


@pytest.mark.parametrize("role", [role for role in methods.ROLES if role != "eos"])
@pytest.mark.parametrize("method", ["pieces", "composed", "exact"])
def test_roles_do_not_claim_text_tokens(method, role):
    """`!` as the padding token, say, of the target or of the source."""
    names = {"eos_token": "<|endoftext|>"}
    plain, marked = sentence_piece("!"), byte_level("ab", **names, **{f"{role}_token": "!"})
    mark = marked.convert_tokens_to_ids("!")
    made = aligned(plain, marked, method)
    assert made.rules[mark] == Rule.EXACT
    assert row(made.embedding, mark) == row(made.head, mark) == {token(plain, "!"): 1.0}
    target = byte_level(first=["<|endoftext|>", "<?>"], **names, **{f"{role}_token": "<?>"})
    made, special = aligned(marked, target, method), target.convert_tokens_to_ids("<?>")
    assert made.rules[special] == Rule.SPECIAL
    assert row(made.head, special) == {marked.eos_token_id: 1.0}  # not the row of `!`
    assert row(made.head, token(target, "!")) == {mark: 1.0}


def test_end_of_text_that_occurs_as_text_is_aligned_as_text():
    lines = byte_level(first=["<other>"], eos_token="\u010a")  # byte-level for a line break
    plain = byte_level("ab")
    made, i = aligned(plain, lines), token(lines, "\n")
    assert lines.eos_token_id == i and made.rules[i] == Rule.EXACT
    assert row(made.head, i) == {token(plain, "\n"): 1.0}
    assert row(aligned(lines, plain).head, plain.eos_token_id) == {
        i: 1.0
    }  # what ends the source's texts


def test_end_of_turn_maps_to_end_of_text_where_it_is_the_eos():
    """As in Qwen3, `<|im_end|>` is the eos and `<|endoftext|>` the pad token; the source's eos is
    `<|endoftext|>`, and it has no chat tokens.
    """
    target = byte_level(
        first=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    source = byte_level("<|", "im", "start", "|>")
    made = aligned(source, target)
    for text in ("<|im_end|>", "<|endoftext|>"):
        assert row(made.embedding, target.convert_tokens_to_ids(text)) == {source.eos_token_id: 1.0}
    i = target.convert_tokens_to_ids("<|im_start|>")  # no role, unknown to the source: its text
    assert made.rules[i] == Rule.PIECES
    names = [source.convert_ids_to_tokens(piece) for piece in row(made.head, i)]
    assert set(names) == {"<|", "im", "_", "start", "|>"}


def test_chat_tokens_match_by_their_text():
    roles = {"first": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "eos_token": "<|endoftext|>"}
    source, target = byte_level(**roles), byte_level("ab", **roles)
    made = aligned(source, target)
    for text in roles["first"]:
        i = target.convert_tokens_to_ids(text)
        assert made.rules[i] == Rule.SPECIAL
        assert row(made.embedding, i) == {source.convert_tokens_to_ids(text): 1.0}


def test_added_tokens_that_are_not_special_are_aligned_by_text():
    source, target = byte_level("<th", "ink", ">"), byte_level()
    target.add_tokens(["<think>"])
    assert_pieces(source, target, "<think>", "<th", "ink", ">")


def test_added_token_that_only_one_side_flags_as_special_matches_by_its_text():
    """As `<think>`, which is special in some tokenizers and not in Qwen 3's."""
    special = byte_level(first=["<|endoftext|>", "<think>"], eos_token="<|endoftext|>")
    ordinary = byte_level(first=["<|endoftext|>"], eos_token="<|endoftext|>")
    ordinary.add_tokens(["<think>"])
    for source, target in ((special, ordinary), (ordinary, special)):
        made, i = aligned(source, target), target.convert_tokens_to_ids("<think>")
        assert made.rules[i] == Rule.SPECIAL
        of_source = {source.convert_tokens_to_ids("<think>"): 1.0}
        assert row(made.embedding, i) == row(made.head, i) == of_source


def test_unused_ids_get_the_mean_of_all_rows():
    source, target = byte_level(), byte_level("ab")
    state = target.backend_tokenizer.to_str().replace(
        f'"ab":{token(target, "ab")}', f'"ab":{token(target, "ab") + 3}'
    )
    target = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(state), eos_token="<|endoftext|>"
    )
    made = aligned(source, target)
    unused = np.arange(token(target, "ab") - 3, token(target, "ab"))
    assert set(made.rules[unused]) == {Rule.MEAN}
    assert row(made.embedding, unused[0]) == {made.source_size: 1.0}


def test_rare_and_unseen_tokens_use_pieces_and_lower_frequency():
    """A token seen too rarely has no vector: nothing is matched, and its head row is moved by how
    rare it is.
    """
    words = ["ab", "cd", "ef", "gh"]
    source, target = byte_level(*words), byte_level(*words, "abcd", "abef", "abgh")
    rng = np.random.default_rng(0)
    names = {
        c: rng.normal(size=16)
        for t in (source, target)
        for c in canonical.token_bytes(t)
        if c is not None
    }
    sides = []
    unseen, rare, common = (token(target, word) for word in ("abgh", "abef", "abcd"))
    for tokenizer, without in ((source, ()), (target, (unseen, rare))):
        ids = [
            i
            for i, c in enumerate(canonical.token_bytes(tokenizer))
            if c is not None and i not in without
        ]
        content = canonical.token_bytes(tokenizer)
        sides.append(Vectors(np.array(ids), np.float32([names[content[i]] for i in ids])))
    counts = np.full(canonical.vocabulary_size(target), 100)
    counts[[unseen, rare]] = 0, 3
    made = aligned(source, target, "composed", (sides[0], sides[1]), counts)
    assert made.rules[common] == Rule.SIMILAR and made.matches[common] >= 0
    for i, last in ((unseen, "gh"), (rare, "ef")):
        assert made.rules[i] == Rule.PIECES and made.matches[i] == -1 and made.scores[i] == 0
        ab, end = token(source, "ab"), token(source, last)
        assert row(made.embedding, i) == pytest.approx(
            {ab: 1 / 3, end: 2 / 3}
        )  # the last says most of what comes next
        assert row(made.head, i) == pytest.approx({ab: 1 / 2, end: 1 / 2})
    assert (
        made.frequency_shift[unseen]
        < made.frequency_shift[rare]
        < made.frequency_shift[common]
        < 0.1
    )
    assert not made.frequency_shift[made.rules == Rule.EXACT].any()


@pytest.mark.parametrize("method", ["exact", "composed", "lexicon", "topk"])
def test_every_method_but_the_published_follows_bytes_and_roles(method):
    source, target = sentence_piece(" the", "日"), byte_level(" the", "日", "then")
    pieces, made = aligned(source, target), aligned(source, target, method)
    sure = np.isin(pieces.rules, methods.SURE)
    np.testing.assert_array_equal(np.isin(made.rules, methods.SURE), sure)
    for i in np.flatnonzero(sure):
        assert row(made.embedding, i) == row(made.head, i) == row(pieces.embedding, i)
