"""Where tokens of two tokenizers end at the same byte."""

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import TEXTS, tokenizer_of_kind

from tokalign_jax.text import canonical
from tokalign_jax.text.tokenizing import TokenShards, end_of_text_id

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import meetings
from meetings import NONE

DOCUMENTS = [
    *TEXTS,
    "  two spaces first, a\ttab and   runs  of them ",
    "decomposed cafe\u0301 \ufb01t, then plain words again",
    "CAPITALS and lower, \ua66e rare",
    "the the the dog",
    "\u2460",
]
KINDS = (
    "gpt2",
    "qwen",
    "llama2",
    "gemma",
    "mistral",
    "bpe_without_bytes",
    "unigram_first",
    "bert",
    "gpt1",
)


@pytest.fixture(scope="module")
def sides():
    """By kind: shards of `DOCUMENTS`, and what each id spells."""
    made = {}
    for kind in KINDS:
        tokenizer = tokenizer_of_kind(kind, TEXTS, 300 + 20 * KINDS.index(kind))
        backend, end = canonical.plain_backend(tokenizer), end_of_text_id(tokenizer)
        ids = [
            np.array([*backend.encode(text, add_special_tokens=False).ids, end])
            for text in DOCUMENTS
        ]
        counts = np.zeros(canonical.vocabulary_size(tokenizer), np.int64)
        shards = TokenShards(
            np.concatenate(ids), np.cumsum([len(of) for of in ids]), counts, {"end_of_text": end}
        )
        made[kind] = shards, canonical.token_bytes(tokenizer)
    return made


def prefixes(shards, spelled, document):
    """All bytes up to the end of each token of a document; None where the token has none. End-of-text is a byte that no text has."""
    start = shards.documents[document - 1] if document else 0
    read, found = b"", []
    for token in shards.tokens[start : shards.documents[document]]:
        content = b"\xff" if token == shards.index["end_of_text"] else spelled[token]
        read += content or b""
        found.append(read if content else None)
    return start, found


def by_prefix(source, target):
    """The meaning of a meeting, one prefix at a time."""
    result = []
    for document in range(len(DOCUMENTS)):
        (start, of_source), (_, of_target) = (
            prefixes(shards, of, document) for shards, of in (source, target)
        )
        leads = [len(of[-1]) - len(of[-1].lstrip(b" ")) for of in (of_source, of_target)]
        cut = [lead - min(leads) for lead in leads]
        ends = {
            of[cut[0] :]: start + i for i, of in enumerate(of_source) if of and len(of) > cut[0]
        }
        near = abs(leads[0] - leads[1]) <= 1
        result += [
            ends.get(of[cut[1] :], NONE) if near and of and len(of) > cut[1] else NONE
            for of in of_target
        ]
    return np.array(result)


@pytest.mark.parametrize("kinds", itertools.combinations(KINDS, 2))
def test_tokens_meet_where_they_have_read_the_same_bytes(sides, kinds):
    (source, of_source), (target, of_target) = (sides[kind] for kind in kinds)
    found = meetings.find(source, target, of_source, of_target)
    np.testing.assert_array_equal(found, by_prefix(sides[kinds[0]], sides[kinds[1]]))
    assert np.mean(found != NONE) > 0.02


def test_tokenizers_that_keep_everything_meet_at_every_end_of_text(sides):
    (source, of_source), (target, of_target) = (
        sides["gpt2"],
        sides["llama2"],
    )  # the second puts a space before each text
    found = meetings.find(source, target, of_source, of_target)
    np.testing.assert_array_equal(found[target.documents - 1], source.documents - 1)
    whole = found[found != NONE]
    assert np.all(np.diff(whole) > 0)


def test_nothing_meets_behind_the_first_byte_that_a_tokenizer_changes(sides):
    (source, of_source), (target, of_target) = (
        sides["gpt2"],
        sides["qwen"],
    )  # the second composes characters
    found = meetings.find(source, target, of_source, of_target)
    document = next(i for i, text in enumerate(DOCUMENTS) if "\u0301" in text)
    start, read = prefixes(target, of_target, document)
    changed = len(DOCUMENTS[document].split("e\u0301")[0].encode())
    met = [len(of) for of, place in zip(read, found[start:]) if of and place != NONE]
    assert met and max(met) <= changed
    others = np.delete(np.arange(len(DOCUMENTS)), document)
    np.testing.assert_array_equal(found[target.documents[others] - 1], source.documents[others] - 1)


def test_blocks_do_not_show(sides, monkeypatch, tmp_path):
    (source, of_source), (target, of_target) = sides["gpt2"], sides["llama2"]
    whole = meetings.find(source, target, of_source, of_target)
    for block in (1, 40):
        monkeypatch.setattr(meetings, "BLOCK", block)
        out = np.memmap(tmp_path / f"{block}", np.int64, "w+", shape=whole.shape)
        np.testing.assert_array_equal(
            meetings.find(source, target, of_source, of_target, out), whole
        )
