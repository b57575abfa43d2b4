"""Token boundaries in the original text, against the bytes of the tokens."""

import itertools
import unicodedata

import numpy as np
import pytest
from tokenizers import AddedToken, processors

from tests.helpers import KINDS, tokenizer_of_kind
from tests.text.test_kinds import EXACT, LANGUAGES, PREFIXED, REAL, read, tokenizer
from tests.text.test_kinds import TEXTS as EVERY_SCRIPT
from tokalign_jax.text import canonical
from tokalign_jax.text.boundaries import NONE, shared_boundaries, token_boundaries

CASES = [
    *EVERY_SCRIPT.values(),
    "",
    " ",
    "cafe\u0301, e\u0302tre and \u0041\u030a",  # composed by NFC
    unicodedata.normalize("NFD", LANGUAGES["ko"]),
    "\u095c \u0958\u0902",  # decomposed by NFC
    "ﬁne ①②, ｆｕｌｌ\u3000width",  # several letters for one by NFKC
    "\U00012031\ua66e\U0001f9ff a \ufeffb\u200d",
    "one\r\n\r\n  two\t\tthree   \n",
]


def bounded(kind: str, text: str):
    return token_boundaries(read(kind)[1], [text])[0]


@pytest.mark.parametrize("kind", [*KINDS, *REAL])
def test_ends_increase_and_lie_within_the_text(kind):
    for text in CASES:
        ids, ends = bounded(kind, text)
        assert ids.tolist() == read(kind)[1].encode(text, add_special_tokens=False).ids and len(
            ids
        ) == len(ends)
        usable = ends[ends != NONE]
        assert (np.diff(usable) > 0).all() and (usable > 0).all() and (usable <= len(text)).all()
        if (
            len(ids) and text.strip()
        ):  # after the last token the text has been read, but for white space that was dropped
            assert text[ends[-1] :].strip() == ""


@pytest.mark.parametrize(
    "kind", [k for k in (*EXACT, *PREFIXED, *REAL) if k not in ("qwen", "tokenizers/qwen3")]
)
def test_tokens_up_to_a_boundary_spell_the_text_up_to_it(kind):
    """For kinds that keep every byte (behind a prefixed space), and where no normaliser changes the
    text.
    """
    content, backend = read(kind)
    for text in CASES:
        normalizer = backend.normalizer
        if normalizer and normalizer.normalize_str(text).lstrip("▁ ") != text.replace(
            " ", "▁"
        ).lstrip("▁"):
            continue
        ids, ends = bounded(kind, text)
        for count, end in enumerate(ends.tolist(), start=1):
            joined = b"".join(content[i] or b"" for i in ids[:count])
            assert end == NONE or joined in (text[:end].encode(), b" " + text[:end].encode())
        if ends.size and kind in EXACT:  # every boundary that there is was found
            sizes = {len(text[:i].encode()): i for i in range(1, len(text) + 1)}
            read_bytes = itertools.accumulate(len(content[i] or b"") for i in ids)
            assert ends.tolist() == [sizes.get(size, NONE) for size in read_bytes]


@pytest.mark.parametrize("kind", [*KINDS, *REAL])
def test_tokens_between_boundaries_spell_the_text_between_them(kind):
    content, backend = read(kind)
    unknown = tokenizer(kind).unk_token_id if kind not in REAL else None
    for text in CASES:
        ids, ends = bounded(kind, text)
        begin, first = 0, 0
        for stop in np.flatnonzero(ends != NONE).tolist():
            part, tokens = text[begin : ends[stop]], ids[first : stop + 1].tolist()
            begin, first = int(ends[stop]), stop + 1
            if unknown in tokens:
                continue
            spelled = b"".join(content[i] or b"" for i in tokens).decode()
            wanted = backend.normalizer.normalize_str(part) if backend.normalizer else part
            assert "".join(spelled.split()) == "".join(wanted.replace("▁", " ").split())


def test_character_of_several_tokens_has_one_boundary():
    ids, ends = bounded("gpt2", "a\U00012031b")
    assert len(ids) == 6 and ends.tolist() == [1, NONE, NONE, NONE, 2, 3]


def test_unicode_composition_stays_within_the_token():
    ends = bounded("qwen", "xe\u0301y").ends  # NFC: é
    assert ends.tolist()[-2:] == [3, 4] and 2 not in ends


def test_offsets_are_not_trimmed():
    trimming = tokenizer_of_kind("gpt2", ["a b"], 300)
    trimming.add_tokens([AddedToken("one ", normalized=False)])
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    assert token_boundaries(canonical.plain_backend(trimming), ["one one x"])[0].ends.tolist() == [
        4,
        8,
        9,
    ]


@pytest.mark.parametrize("one", ["gpt2", "llama2"])
@pytest.mark.parametrize("other", KINDS)
def test_every_pair_of_kinds_shares_boundaries(one, other):
    shared, total = 0, 0
    for text in EVERY_SCRIPT.values():
        source, target = bounded(one, text), bounded(other, text)
        first, second = shared_boundaries(source.ends, target.ends)
        np.testing.assert_array_equal(source.ends[first], target.ends[second])
        assert set(source.ends[first]) == (set(source.ends) & set(target.ends)) - {NONE}
        assert (np.diff(first) > 0).all() and (np.diff(second) > 0).all()
        shared, total = shared + len(first), total + min(len(source.ids), len(target.ids))
    assert shared > 0.5 * total
