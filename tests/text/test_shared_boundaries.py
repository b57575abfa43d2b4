"""Shared boundaries of token shards."""

import pytest

from tests.helpers import TEXTS, tiny_tokenizer
from tokalign_jax.errors import UserError
from tokalign_jax.text import shared_boundaries, tokenizing
from tokalign_jax.text.boundaries import NONE
from tokalign_jax.text.corpus import Document
from tokalign_jax.text.tokenizing import TokenShards


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """By side a tokenizer and its shards of `DOCUMENTS`."""
    folder = tmp_path_factory.mktemp("tokens")
    found = []
    for name, tokenizer in (
        ("source", tiny_tokenizer(300, TEXTS)),
        ("target", tiny_tokenizer(420, TEXTS * 5, kind="metaspace")),
    ):
        writer = tokenizing.ShardWriter(folder / name, tokenizer)
        writer.add(DOCUMENTS)
        writer.close()
        found.append((tokenizer, TokenShards.open(folder / name)))
    return found


DOCUMENTS = [
    Document(text, "all", len(text.encode()))
    for text in [*TEXTS, "Ünïcödé — 東京 \u200d!", TEXTS[0]]
]


def test_shared_boundaries_end_the_same_text_on_both_sides(sides, tmp_path):
    (source, old), (target, new) = sides
    groups = [DOCUMENTS[:3], DOCUMENTS[3:]]
    index = shared_boundaries.run(groups, sides[0], sides[1], tmp_path, lambda line: None)
    positions = shared_boundaries.open_positions(tmp_path)
    assert len(positions) == len(new.tokens) and index["shared"] == (positions != NONE).sum()
    found = 0
    for number, document in enumerate(DOCUMENTS):
        begins = [shards.documents[number - 1] if number else 0 for shards in (old, new)]
        for i in range(begins[1], new.documents[number] - 1):
            if positions[i] != NONE:
                one = source.decode(old.tokens[begins[0] : positions[i] + 1].tolist())
                other = target.decode(new.tokens[begins[1] : i + 1].tolist())
                assert one.strip() == other.strip() and document.text.startswith(one.strip())
                found += 1
        # The separators after a document are shared.
        assert positions[new.documents[number] - 1] == old.documents[number] - 1
    assert found > 0.2 * len(new.tokens)


def test_missing_and_incomplete_boundaries_are_refused(sides, tmp_path):
    with pytest.raises(UserError, match="run the boundaries stage again"):
        shared_boundaries.open_positions(tmp_path)
    shared_boundaries.run([DOCUMENTS], sides[0], sides[1], tmp_path, lambda line: None)
    file = tmp_path / "positions.bin"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match="incomplete"):
        shared_boundaries.open_positions(tmp_path)


def test_shards_of_different_documents_are_refused(sides, tmp_path):
    with pytest.raises(ValueError, match="tokens now has"):
        shared_boundaries.run([DOCUMENTS[1:]], sides[0], sides[1], tmp_path, lambda line: None)
