"""Token shards: content, index, special tokens, damaged files."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from tests.helpers import tiny_tokenizer, tokenizer_of_kind
from tokalign_jax.config import SELF, Config, TextConfig
from tokalign_jax.errors import UserError
from tokalign_jax.text import corpus, tokenizing

WORDS = "the a fox dog runs sleeps größer мир 数学 <|endoftext|> return def".split()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    rng = np.random.default_rng(0)
    rows = [
        {
            "text": " ".join(rng.choice(WORDS, rng.integers(1, 40))) + f" {i}",
            "lang": "de" if i % 3 else "fr",
        }
        for i in range(60)
    ]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config(
        corpus=str(folder / "a.jsonl"),
        text=TextConfig(language_field="lang", held_out_fraction=0.1),
    )
    corpus.run(config, folder / "corpus", lambda line: None)
    sides = (
        tiny_tokenizer(300, [row["text"] for row in rows]),
        tiny_tokenizer(340, WORDS, kind="metaspace"),
    )
    index = tokenizing.run(config, folder / "corpus", *sides, folder / "tokens", lambda line: None)
    documents = [d for batch in corpus.train_batches(folder / "corpus") for d in batch]
    return folder, dict(zip(tokenizing.SIDES, sides)), documents, index


@pytest.mark.parametrize("side", tokenizing.SIDES)
def test_documents_are_concatenated_each_with_its_separator(made, side):
    folder, tokenizers, documents, _ = made
    shards, tokenizer = tokenizing.TokenShards.open(folder / "tokens" / side), tokenizers[side]
    assert isinstance(shards.tokens, np.memmap)
    assert shards.tokens.dtype == np.uint16
    assert len(shards) == len(shards.tokens) == shards.documents[-1] == shards.index["tokens"]
    assert len(shards.documents) == len(documents)
    start = 0
    for document, end in zip(documents, shards.documents):
        ids = tokenizer(document.text, add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ]
        assert shards.tokens[start:end].tolist() == [*ids, tokenizer.eos_token_id]
        start = end
    assert np.array_equal(shards.counts, np.bincount(shards.tokens, minlength=len(tokenizer)))
    assert shards.counts[tokenizer.eos_token_id] == len(
        documents
    )  # none of those in the text became one


def test_beginning_and_end_of_generated_text_are_not_predicted(tmp_path):
    tokenizer = tiny_tokenizer(300, WORDS)
    texts = [("one two", "web"), ("three four", SELF), ("", SELF), ("five", "web"), ("o", SELF)]
    writer = tokenizing.ShardWriter(tmp_path, tokenizer)
    writer.add([corpus.Document(text, "", len(text), source) for text, source in texts])
    writer.close()
    shards = tokenizing.TokenShards.open(tmp_path)
    first, second, third, fourth, last = shards.documents.tolist()
    assert second - first > 3 and last - fourth == 2
    # The end of the second document and the third one, which is nothing but its end, are one span.
    unlearned = [i for begin, end in shards.unlearned.tolist() for i in range(begin, end)]
    assert unlearned == [first, second - 1, third - 1, fourth, last - 1]


def test_space_before_the_given_word_is_not_predicted_either(tmp_path):
    tokenizer = tiny_tokenizer(257, WORDS)  # Every byte is a token of its own.
    writer = tokenizing.ShardWriter(tmp_path, tokenizer)
    writer.add([corpus.Document(text, "", 4, SELF) for text in (" abc", "  ")])
    writer.close()
    unlearned = tokenizing.TokenShards.open(tmp_path).unlearned.tolist()
    assert unlearned == [[0, 2], [4, 5], [5, 8]]


@pytest.mark.parametrize("side", tokenizing.SIDES)
def test_index_counts_by_language(made, side):
    folder, tokenizers, documents, index = made
    stored = json.loads((folder / "tokens" / side / "index.json").read_text())
    assert stored == index[side]
    assert stored["vocabulary"] == len(tokenizers[side])
    assert stored["end_of_text"] == tokenizers[side].eos_token_id
    for language in ("de", "fr"):
        counts = stored["languages"][language]
        texts = [d.text for d in documents if d.language == language]
        tokens = tokenizers[side](texts, add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ]
        assert counts["documents"] == len(texts)
        assert counts["bytes"] == sum(len(t.encode()) for t in texts)
        assert counts["text_tokens"] == sum(map(len, tokens))
        assert counts["bytes_per_token"] == pytest.approx(counts["bytes"] / counts["text_tokens"])
    assert stored["tokens"] == stored["text_tokens"] + stored["documents"]


def test_large_vocabularies_have_four_byte_tokens(tmp_path):
    tokenizer = tiny_tokenizer(300, WORDS)
    tokenizer.add_tokens([f"word{i}" for i in range(70_000)])
    writer = tokenizing.ShardWriter(tmp_path, tokenizer)
    writer.add([corpus.Document("word69999 word1", "all", 15)])
    writer.close()
    shards = tokenizing.TokenShards.open(tmp_path)
    assert shards.tokens.dtype == np.uint32
    assert shards.tokens[0] == tokenizer.convert_tokens_to_ids("word69999") > 65_535


def test_end_of_text_falls_back_to_sep_a_name_and_bos():
    def made(end="<|endoftext|>", **roles):
        state = tiny_tokenizer(300, WORDS).backend_tokenizer.to_str().replace("<|endoftext|>", end)
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(state), **roles)

    for tokenizer, expected in (
        (made(eos_token="a", sep_token="b"), "a"),
        (made(sep_token="b", bos_token="c"), "b"),
        (made(bos_token="c"), "<|endoftext|>"),
        (made("</s>"), "</s>"),
        (made("<|other|>", bos_token="c"), "c"),
    ):
        assert tokenizing.end_of_text_id(tokenizer) == tokenizer.convert_tokens_to_ids(expected)
    with pytest.raises(UserError, match=r"neither an eos.*set eos_token.*'<\|other\|>'"):
        tokenizing.end_of_text_id(made("<|other|>"))


def test_text_lost_by_a_tokenizer_is_reported_and_counted(tmp_path):
    texts = ["the quick brown fox", "the dog\nand the Ж fox"]
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"{text} {i}"}) + "\n" for i in range(9) for text in texts)
    )
    config = Config(corpus=str(tmp_path / "a.jsonl"), text=TextConfig(held_out_fraction=0.1))
    corpus.run(config, tmp_path / "corpus", lambda line: None)
    letters = ["the quick brown fox dog and 0123456789"]
    sides = tokenizer_of_kind("bert", letters), tokenizer_of_kind("gpt2", letters)
    lines = []
    index = tokenizing.run(config, tmp_path / "corpus", *sides, tmp_path / "tokens", lines.append)
    documents = [d for batch in corpus.train_batches(tmp_path / "corpus") for d in batch]
    assert index["source"]["unknown_tokens"] == sum("Ж" in d.text for d in documents) > 0
    assert index["target"]["unknown_tokens"] == 0 and index["target"]["loses"] == []
    assert "line ends" in index["source"]["loses"]
    message = [line for line in lines if "does not keep" in line]
    assert (
        len(message) == 1
        and "the source tokenizer does not keep" in message[0]
        and "capitals, accents" in message[0]
    )


def test_missing_or_truncated_shards_are_reported(made, tmp_path):
    folder, _, _, _ = made
    with pytest.raises(UserError, match="holds no token shards"):
        tokenizing.TokenShards.open(tmp_path)
    for path in (folder / "tokens" / "source").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "tokens.bin").write_bytes((tmp_path / "tokens.bin").read_bytes()[:-20])
    with pytest.raises(UserError, match="not complete"):
        tokenizing.TokenShards.open(tmp_path)


def opened(kind: str, opening: str, **roles: str) -> PreTrainedTokenizerFast:
    """A tokenizer that puts `opening` before, and `</s>` behind, every text, and pads on the left."""
    made = tokenizer_of_kind(kind, WORDS, 700)
    made.add_special_tokens({"extra_special_tokens": [opening, "</s>"]})
    backend = made.backend_tokenizer
    ends = [(token, backend.token_to_id(token)) for token in (opening, "</s>")]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{opening} $A </s>", special_tokens=ends
    )
    backend.enable_padding(direction="left", length=8)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles)


def test_opening_token_of_the_tokenizer_is_detected(made, tmp_path):
    folder, tokenizers, _, index = made
    assert (
        tokenizing.opening_id(tokenizers["source"]) is None and index["source"]["opening"] is None
    )
    assert tokenizing.TokenShards.open(folder / "tokens" / "source").opening is None
    # LLaMA 3 and Gemma have a bos there; what BERT has is none by its role.
    for tokenizer in (
        opened("llama3", "<s>", bos_token="<s>", eos_token="</s>"),
        opened("bert", "[CLS]"),
    ):
        opening = tokenizing.opening_id(tokenizer)
        assert tokenizer.convert_ids_to_tokens(opening) in ("<s>", "[CLS]")
        assert tokenizing.closing_id(tokenizer) == tokenizer.convert_tokens_to_ids("</s>")
    assert tokenizing.closing_id(tokenizers["source"]) is None
    bases = {base: i for i, base in enumerate([*"CGT", "<s>", "</s>"])}
    backend = Tokenizer(models.BPE(bases, []))  # knows no "a"
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 3)]
    )
    bases_alone = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
    )
    assert tokenizing.opening_id(bases_alone) == 3 and tokenizing.closing_id(bases_alone) is None
    index = tokenizing.run(
        Config(), folder / "corpus", tokenizer, tokenizers["target"], tmp_path, lambda line: None
    )
    shards = tokenizing.TokenShards.open(tmp_path / "source")
    assert shards.opening == index["source"]["opening"] == opening
    assert opening not in shards.tokens


def added(single: str, *ids: tuple[str, int]) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single=single, special_tokens=list(ids))


@pytest.mark.parametrize(
    ("post_processor", "message"),
    [
        (
            added("<s> $A", ("<s>", 128_000)),
            r"adds '<s>' to texts as the id 128000, which is no token.*write its id, 0",
        ),
        (
            added("$A </s>", ("</s>", 128_000)),
            "adds '</s>' to texts as the id 128000, which is no token.*its id, 1",
        ),
        (
            added("<s> $A", ("<s>", 5)),
            "as the id 5, which is the token .*: its model has no such row, or another",
        ),
        (
            added("$A </s>", ("</s>", 0)),
            "adds '</s>' to texts as the id 0, which is the token '<s>'",
        ),
        (
            added("<gone> $A", ("<gone>", 0)),
            "adds '<gone>' to texts as the id 0, .*under post_processor, take it out",
        ),
        (processors.BertProcessing(("</s>", 1), ("<s>", 9)), "adds '<s>' to texts as the id 9"),
        (
            processors.RobertaProcessing(("</s>", 700), ("<s>", 0)),
            "adds '</s>' to texts as the id 700",
        ),
        (
            processors.Sequence([processors.ByteLevel(), added("<s> $A", ("<s>", 1))]),
            "adds '<s>' to texts as the id 1",
        ),
        (added("<s>", ("<s>", 0)), "puts each text 0 times"),
        (
            processors.Sequence([processors.ByteLevel(), added("$A <s> $A", ("<s>", 0))]),
            "puts each text 2 times",
        ),
        (added("<s> $A </s>", ("<s>", 0), ("</s>", 1)), None),
        (added("$A", ("<s>", 128_000)), None),  # named, but never added
        (processors.BertProcessing(("</s>", 1), ("<s>", 0)), None),
    ],
)
def test_post_processor_that_adds_wrong_ids_is_refused(post_processor, message):
    backend = Tokenizer(
        models.BPE({token: i for i, token in enumerate(["<s>", "</s>", *"abcdef"])}, [])
    )
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = post_processor
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    if message is None:
        tokenizing.check_added_tokens(tokenizer)
    else:
        with pytest.raises(UserError, match=message):
            tokenizing.check(tokenizer)


def test_ordinary_token_can_be_the_opening_token():
    """Training adds the tokens that the exported tokenizer adds, special or not."""
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(["</s>", *"abcdef"])}, []))
    backend.post_processor = added("b $A a a", ("b", 2), ("a", 1))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert (tokenizing.opening_id(tokenizer), tokenizing.closing_id(tokenizer)) == (2, 1)
    backend.post_processor = added("$A a", ("a", 1))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert (tokenizing.opening_id(tokenizer), tokenizing.closing_id(tokenizer)) == (None, 1)
