"""Pruned vocabularies: which tokens stay, and that every text keeps its bytes."""

import functools
import json

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests.helpers import KINDS, TEXTS, tokenizer_of_kind
from tokalign_jax.errors import UserError
from tokalign_jax.text import pruning
from tokalign_jax.text.canonical import plain_backend, special_ids, token_bytes

ODD = [
    "naïve café ﬁ ① cafe\u0301",
    "日本語のテキスト、और हिन्दी 🧿 ꙮ",
    "  runs   of spaces\t\n\n and tabs",
    "12345 <s> </s> <0x41> ▁ Ġ",
    "def f(x):\n    return x ** 2\r\n",
]
NEEDED = TEXTS[:1]
"""The text that the vocabularies are pruned for; they are trained on much more."""
REFUSED = {"bert", "bert_cased", "gpt1"}


@functools.cache
def tokenizer(kind: str) -> PreTrainedTokenizerBase:
    return tokenizer_of_kind(kind, TEXTS, 900)


@functools.cache
def pruned(kind: str, min_count: int = 1, most_tokens: int = 0) -> pruning.Pruned:
    counts = pruning.count(tokenizer(kind), NEEDED)
    return pruning.prune(tokenizer(kind), counts, min_count, most_tokens)


def ids_of(made: PreTrainedTokenizerBase, text: str) -> list[int]:
    return plain_backend(made).encode(text, add_special_tokens=False).ids


def spelled(made: PreTrainedTokenizerBase, text: str) -> bytes:
    contents = token_bytes(made)
    return b"".join(contents[i] or b"<special>" for i in ids_of(made, text))


TAKEN = pytest.mark.parametrize("kind", sorted(KINDS.keys() - REFUSED))


@TAKEN
@pytest.mark.parametrize("options", [(1, 0), (4, 0), (1, 280)], ids=["unused", "rare", "few"])
def test_every_text_is_spelled_by_the_same_bytes(kind, options):
    whole, made = tokenizer(kind), pruned(kind, *options).tokenizer
    assert len(made) < len(whole) or kind == "t5"  # of few tokens, all of them needed
    for text in [*TEXTS, *ODD]:
        assert spelled(made, text) == spelled(whole, text)
        assert len(ids_of(made, text)) >= len(ids_of(whole, text))
        assert made.decode(ids_of(made, text)) == whole.decode(ids_of(whole, text))


@TAKEN
def test_text_without_removed_tokens_splits_as_before(kind):
    whole, (made, kept) = tokenizer(kind), pruned(kind)
    for text in NEEDED:
        assert kept[ids_of(made, text)].tolist() == ids_of(whole, text)


@TAKEN
def test_tokens_keep_their_order_bytes_and_roles(kind):
    whole, (made, kept) = tokenizer(kind), pruned(kind, 4)
    assert (np.diff(kept) > 0).all()
    names, contents = whole.convert_ids_to_tokens(kept.tolist()), token_bytes(whole)
    assert made.convert_ids_to_tokens(list(range(len(kept)))) == names
    assert token_bytes(made) == [contents[i] for i in kept.tolist()]
    assert {int(kept[i]) for i in special_ids(made)} == special_ids(whole)
    for role in ("bos", "eos", "unk", "pad"):
        assert getattr(made, f"{role}_token") == getattr(whole, f"{role}_token")


@TAKEN
def test_every_kept_token_can_be_produced(kind, tmp_path):
    made = pruned(kind, 4).tokenizer
    model = json.loads(made.backend_tokenizer.to_str())["model"]
    for first, second in model.get("merges", []):
        assert {first, second, first + second} <= model["vocab"].keys()
    made.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, *ODD]:
        assert again(text)["input_ids"] == made(text)["input_ids"]


def test_smaller_vocabularies_keep_more_frequent_tokens():
    counts = pruning.count(tokenizer("gpt2"), NEEDED)
    few = pruned("gpt2", 1, 280)
    assert 275 <= len(few.kept) <= 280 < len(pruned("gpt2").kept)
    most_frequent = np.argsort(-counts, kind="stable")[:10]
    assert set(most_frequent.tolist()) <= set(few.kept.tolist())


def test_tokens_of_the_chat_template_are_kept():
    whole = tokenizer_of_kind("qwen", TEXTS, 900)
    whole.chat_template = "{% for m in messages %}<|im_start|>{{ m.role }}{% endfor %} corpus"
    made, kept = pruning.prune(whole, np.zeros(len(whole), np.int64))
    assert set(ids_of(whole, whole.chat_template)) <= set(kept.tolist())
    assert made.chat_template == whole.chat_template


def test_post_processor_gets_the_new_ids():
    whole = tokenizer_of_kind("llama2", TEXTS, 900)
    whole.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[("<s>", whole.bos_token_id), ("</s>", whole.eos_token_id)],
    )
    whole.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<tool>"]})
    made, _ = pruning.prune(whole, pruning.count(whole, NEEDED))
    for text in NEEDED:
        names = [t.convert_ids_to_tokens(t(f"{text}<tool>")["input_ids"]) for t in (whole, made)]
        assert names[0] == names[1] and names[1][0] == "<s>" and names[1][-2:] == ["<tool>", "</s>"]
    assert made.pad_token_id == len(made) - 2


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_unsupported_kinds_are_refused_by_name(kind):
    with pytest.raises(UserError, match="cannot be pruned"):
        pruning.prune(tokenizer(kind), np.zeros(900, np.int64))
