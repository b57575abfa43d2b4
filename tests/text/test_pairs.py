"""Documents in two tokenizers' tokens, packed into rows."""

import numpy as np
import pytest

from tests.helpers import TEXTS, tiny_tokenizer
from tokalign_jax.text import pairs
from tokalign_jax.text.boundaries import NONE


@pytest.fixture(scope="module")
def pairing():
    source = tiny_tokenizer(300, TEXTS)
    target = tiny_tokenizer(420, TEXTS * 5)
    starts = source.eos_token_id, target.eos_token_id
    return pairs.Pairing(source, target, starts, {source.eos_token_id: target.eos_token_id})


def read(tokenizer, tokens):
    return tokenizer.decode([t for t in tokens if t >= 0], skip_special_tokens=True)


def test_start_of_a_document_is_not_repeated(pairing):
    """Chat templates write it themselves."""
    start = pairing.source.eos_token_id
    written, plain = pairing.pair([(("", start), (TEXTS[0], start)), ((TEXTS[0], start),)])
    for one, other in zip(written, plain, strict=True):
        np.testing.assert_array_equal(one, other)


def test_paired_positions_cover_the_same_text(pairing):
    documents = pairing.pair([((text, None),) for text in TEXTS])
    packed = pairs.pack(documents, [2, 0, 1, 0], 40, 64)
    found = 0
    for target, source, positions in zip(*packed):
        for place, position in enumerate(positions.tolist()):
            if position != NONE:
                one = read(pairing.target, target[: place + 1].tolist())
                assert one == read(pairing.source, source[: position + 1].tolist())
                found += 1
    assert found > 40


def test_long_documents_go_on_in_the_next_row(pairing):
    (document,) = pairing.pair([((" ".join(TEXTS * 6), None),)])
    packed = pairs.pack([document], [0], 40, 64)
    start, ids, reached = document.target[0], document.target[1:].tolist(), 0
    assert len(packed.target) > 3
    for target, source, positions in zip(*packed):
        assert target[0] == start and source[0] == document.source[0]
        part = target[1:][target[1:] != NONE].tolist()
        begin = next(i for i in range(reached, -1, -1) if ids[i : i + len(part)] == part)
        assert reached - begin < 8  # What follows the last shared boundary is read again.
        reached = begin + len(part)
        shared = np.flatnonzero(positions != NONE)
        assert len(shared) > 5
        for place in shared.tolist():
            one = read(pairing.target, target[: place + 1].tolist())
            assert one == read(pairing.source, source[: positions[place] + 1].tolist())
    assert 0 <= len(ids) - reached <= pairs.SHORTEST


def test_rows_are_packed_until_full(pairing):
    documents = pairing.pair([((text, None),) for text in TEXTS])
    packed = pairs.pack(documents, range(len(documents)), 1000, 1408)
    assert len(packed.target) == 1
    assert read(pairing.target, packed.target[0].tolist()) == "".join(TEXTS)
    assert read(pairing.source, packed.source[0].tolist()).startswith("".join(TEXTS))


def test_chats_are_not_divided_between_rows(pairing):
    """What follows in the next row would be an end of turn without the turns before it."""
    end = pairing.source.eos_token_id
    chat, text, long_chat = pairing.pair(
        [((TEXTS[0], end),), ((TEXTS[1], None),), ((" ".join(TEXTS * 3), end),)]
    )
    length = len(chat.target) + len(text.target) - 4
    assert len(chat.target) > pairs.SHORTEST and len(long_chat.target) > length + 1
    packed = pairs.pack([text, chat], [0, 1], length, 4 * length)
    for row, document in zip(packed.target, (text, chat), strict=True):
        np.testing.assert_array_equal(row[row != NONE], document.target)
    divided = pairs.pack([text, long_chat], [0, 1], length, 4 * length)
    assert len(divided.target) > 2


def test_special_tokens_appear_on_both_sides_or_neither(pairing):
    end = pairing.source.eos_token_id
    known, unknown = pairing.pair(
        [(("a dog", end), (" sleeps", None)), (("a dog", 7), (" sleeps", None))]
    )
    assert (known.source == end).sum() == 2 and (
        known.target == pairing.target.eos_token_id
    ).sum() == 2
    at = np.flatnonzero(known.source == end)[1]
    assert (
        known.source_ends[at]
        == known.target_ends[np.flatnonzero(known.target == pairing.target.eos_token_id)[1]]
        == 6
    )
    assert (unknown.source == 7).sum() == pairing.source("a dog sleeps")["input_ids"].count(7)
    assert unknown.source_ends[-1] == unknown.target_ends[-1] == len("a dog sleeps")


def test_passages_are_split_after_white_space():
    text = "word " * 1000 + "end"
    found = pairs.passages(text)
    assert all(len(passage) <= pairs.PASSAGE for passage in found)
    assert (
        text.startswith("".join(found)) and len(text) - len("".join(found)) < pairs.SHORTEST_PASSAGE
    )
    assert pairs.passages("short") == ["short"]
