"""Extended vocabularies: old tokens stay, no text gets longer, merges follow the counts."""

import itertools
import json
import lzma
from collections import Counter

import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.helpers import SHARED, tokenizer_of_kind
from tests.text.test_kinds import CODE, LANGUAGES, TEXTS
from tokalign_jax.alignment import methods
from tokalign_jax.alignment.alignment import Rule
from tokalign_jax.config import Config
from tokalign_jax.errors import UserError
from tokalign_jax.text import canonical, corpus, mining
from tokalign_jax.text.mining import extended_tokenizer

DOMAIN = [
    "Die Sonnenblumenkerne und die Sonnenblumenöle der Sonnenblumenfelder, im Jahr 2024 und 2025.",
    "def sonnenblume(x):\n    return sonnenblume(x - 1) + sonnenblume(x - 2)  # 1234 sonnenblumen\n",
    "向日葵油、向日葵籽和向日葵田。 向日葵!",
] * 4
KINDS = ["gpt2", "llama3", "qwen", "llama2", "gemma", "mistral", "bpe_without_bytes"]
OLD_TEXTS = [LANGUAGES["en"], LANGUAGES["de"], CODE, "0 1 2 3 4 5 6 7 8 9 - +"]


def source(kind: str) -> PreTrainedTokenizerFast:
    made = tokenizer_of_kind(kind, OLD_TEXTS, 700)
    made.add_tokens([AddedToken("<think>", normalized=False)])
    made.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    return made


def ids(tokenizer, text: str) -> list[int]:
    return canonical.plain_backend(tokenizer).encode(text, add_special_tokens=False).ids


def ends(content: list[bytes | None], tokens: list[int]) -> set[int]:
    """Byte positions at which tokens end."""
    return set(itertools.accumulate(len(content[i] or b"?") for i in tokens))


@pytest.mark.parametrize("kind", KINDS)
def test_extension_keeps_old_tokens_and_lengthens_no_text(kind):
    old = source(kind)
    new = extended_tokenizer(old, DOMAIN, 40, min_count=2)
    size, before, after = canonical.vocabulary_size(old), old.get_vocab(), new.get_vocab()
    assert {token: after[token] for token in before} == before
    assert sorted(i for i in after.values() if i >= size) == list(range(size, size + 40))
    assert new.special_tokens_map == old.special_tokens_map
    assert canonical.special_ids(new) == canonical.special_ids(old)
    contents, old_contents = canonical.token_bytes(new), canonical.token_bytes(old)
    assert contents[:size] == old_contents
    spared = 0
    for text in [*TEXTS.values(), *DOMAIN, "a <think> b"]:
        shorter, longer = ids(new, text), ids(old, text)
        if old.unk_token_id not in longer:
            spared += len(longer) - len(shorter)
            assert len(shorter) <= len(longer)
            assert b"".join(contents[i] for i in shorter) == b"".join(
                old_contents[i] for i in longer
            )
            assert ends(contents, shorter) <= ends(old_contents, longer)
    assert old("<|tool|>")["input_ids"] == new("<|tool|>")["input_ids"]
    assert spared > 50


@pytest.mark.parametrize("kind", KINDS)
def test_text_round_trips_after_extension(kind):
    new = extended_tokenizer(source(kind), DOMAIN, 40, min_count=2)
    for text in [*OLD_TEXTS, *DOMAIN]:
        decoded = new.decode(ids(new, text), clean_up_tokenization_spaces=False)
        assert decoded.strip() == text.strip()


@pytest.mark.parametrize("kind", KINDS)
def test_merges_are_the_most_frequent_pairs_recounted_each_time(kind):
    """Against the definition: encode all text with what there is, count neighbours, take the most
    frequent pair.
    """
    old = source(kind)
    words = mining.count_words(old, DOMAIN, lambda line: None)
    found = mining.mine(old, words, 12, 2, 24)
    now, merges = old, []
    rules = mining._Vocabulary.of(old)
    for merge in found:
        counts: Counter[tuple[int, int]] = Counter()
        for word, count in mining.count_words(now, DOMAIN, lambda line: None).items():
            tokens = memoryview(word).cast("i").tolist()
            for pair in itertools.pairwise(tokens):
                counts[pair] += count
        names = now.convert_ids_to_tokens(range(canonical.vocabulary_size(now)))
        allowed = {
            pair: n
            for pair, n in counts.items()
            if names[pair[0]] + names[pair[1]] not in now.get_vocab()
            and rules.allows(names[pair[0]] + names[pair[1]], 24)
        }
        most = max(allowed.values())
        first = min(pair for pair, n in allowed.items() if n == most)
        assert merge == (names[first[0]], names[first[1]], most)
        merges.append(merge)
        now = mining._with_tokens(old, mining.Mined([], merges))
    assert len(found) == 12


def test_mining_is_deterministic_and_survives_saving(tmp_path):
    for kind in ("qwen", "llama2"):
        first, second = (
            extended_tokenizer(source(kind), DOMAIN, 40, min_count=2) for _ in range(2)
        )
        assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()
        first.chat_template = "{{ messages[0]['content'] }}"
        first.save_pretrained(tmp_path / kind)
        again = AutoTokenizer.from_pretrained(tmp_path / kind)
        assert again.get_vocab() == first.get_vocab() and again.chat_template == first.chat_template
        for text in [*TEXTS.values(), *DOMAIN]:
            assert ids(again, text) == ids(first, text)


def test_numbers_split_as_before_and_merges_stay_within_words():
    for kind in ("qwen", "gemma", "mistral"):
        old = source(kind)
        size, new = (
            canonical.vocabulary_size(old),
            extended_tokenizer(old, DOMAIN, 200, min_count=2),
        )
        mined = [content.decode(errors="replace") for content in canonical.token_bytes(new)[size:]]
        longest = mining._Vocabulary.of(old).digits
        assert all(sum(c.isdigit() for c in text) <= longest for text in mined)
        assert not any(
            " " in text.strip(" ") or (" " in text[1:] and text.strip(" ")) for text in mined
        )
        assert "向日葵" in mined or " 向日葵" in mined


def test_unknown_characters_become_tokens_where_they_save_most():
    old = source("llama2")
    assert ids(old, "向")[-3:] == [
        old.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "向".encode()
    ]
    characters = mining.unknown_characters(old, DOMAIN, 2)
    assert dict(characters)["向"] == 2 * 16  # three bytes, sixteen times
    one = extended_tokenizer(old, DOMAIN, 3, min_count=2)
    added = one.convert_ids_to_tokens(
        range(canonical.vocabulary_size(old), canonical.vocabulary_size(one))
    )
    assert set(added) == {"向", "日", "葵"}
    assert mining.unknown_characters(source("gpt2"), DOMAIN, 2) == []
    without = source("bpe_without_bytes")
    assert without.unk_token_id in ids(without, "向")
    assert without.unk_token_id not in ids(
        extended_tokenizer(without, DOMAIN, 40, min_count=2), "向日葵"
    )


def test_new_tokens_can_be_aligned_and_old_ones_are_exact():
    old = source("llama3")
    new = extended_tokenizer(old, DOMAIN, 40, min_count=2)
    parts, rules = methods.spell(old, new)
    size, contents = canonical.vocabulary_size(old), canonical.token_bytes(old)
    assert set(rules[:size]) <= {Rule.EXACT, Rule.SPECIAL} and set(rules[size:]) == {Rule.PIECES}
    for i, content in enumerate(canonical.token_bytes(new)[size:], start=size):
        assert b"".join(contents[piece] for piece in parts[i]) == content


def test_tokenizers_without_merges_are_refused():
    for kind, named in (
        ("t5", "Unigram"),
        ("bert", "WordPiece"),
        ("gpt1", "BPE with marks within words"),
    ):
        with pytest.raises(
            UserError, match=f"of kind {named}, whose vocabulary cannot be extended"
        ):
            extended_tokenizer(tokenizer_of_kind(kind, OLD_TEXTS), DOMAIN, 10)


def test_too_little_text_gives_fewer_tokens():
    old = source("gpt2")
    assert canonical.vocabulary_size(
        extended_tokenizer(old, ["ab"], 10)
    ) == canonical.vocabulary_size(old)
    few = extended_tokenizer(old, ["sonnenblume"] * 10, 100, min_count=10)
    assert 0 < canonical.vocabulary_size(few) - canonical.vocabulary_size(old) <= len("sonnenblume")
    assert len(ids(few, "sonnenblume")) == 1


def test_new_ids_follow_gaps_and_added_tokens():
    state = json.loads(source("qwen").backend_tokenizer.to_str())
    state["model"]["vocab"][max(state["model"]["vocab"], key=state["model"]["vocab"].get)] += 1000
    old = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<|im_end|>"
    )
    size = canonical.vocabulary_size(old)
    new = extended_tokenizer(old, DOMAIN, 5, min_count=2)
    assert canonical.vocabulary_size(new) == size + 5
    assert new.eos_token_id == old.eos_token_id


def test_extended_tokenizer_shortens_held_out_text_of_the_domain():
    folder, corpus = SHARED / "tokenizers" / "neox", SHARED / "corpus" / "mix-valid.jsonl.xz"
    if not (folder.exists() and corpus.exists()):
        pytest.skip(f"needs {folder} and {corpus}")
    with lzma.open(corpus, "rt", encoding="utf-8") as lines:
        texts = [row["text"][:4000] for row in map(json.loads, lines) if row["lang"] == "de"]
    assert len(texts) > 4
    old = AutoTokenizer.from_pretrained(folder)
    new = extended_tokenizer(old, texts[::2], 300, min_count=3)
    found = new.get_vocab()
    assert {token: found[token] for token in old.get_vocab()} == old.get_vocab()
    before, after = (
        sum(map(len, canonical.plain_backend(t).encode_batch_fast(texts[1::2]))) for t in (old, new)
    )
    assert after < 0.97 * before


def test_documents_larger_than_the_budget_are_truncated(tmp_path):
    texts = [f"{name} größer " * 20_000 for name in ("eins", "zwei", "drei")]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in [*texts, "klein"])
    )
    corpus.run(Config(corpus=str(tmp_path / "a.jsonl")), tmp_path / "corpus", lambda line: None)
    for seed in range(8):  # with few documents chance may draw none
        drawn = mining.sample(tmp_path / "corpus", 100_000, seed)
        size = sum(len(text.encode()) for text in drawn)
        assert 50_000 <= size <= 100_000 and all(
            any(whole.startswith(text) for whole in texts) for text in drawn if text != "klein"
        )
    assert mining.sample(tmp_path / "corpus", 100_000, 0) == mining.sample(
        tmp_path / "corpus", 100_000, 0
    )


def test_reading_stops_when_the_budget_is_spent(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "GROUP_BYTES", 1000)
    texts = [f"document {i} ".ljust(500, "x") for i in range(200)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus.run(Config(corpus=str(tmp_path / "a.jsonl")), tmp_path / "corpus", lambda line: None)
    read, batches = [], corpus.train_batches
    monkeypatch.setattr(
        corpus, "train_batches", lambda folder: (read.append(b) or b for b in batches(folder))
    )
    mining._drawn(tmp_path / "corpus", 5000, lambda: True)
    assert 4 < len(read) < 8
