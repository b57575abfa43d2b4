"""Inspection: readable tokens, weak rows, neighbours against NumPy, the page, the command."""

import json
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import tiny_tokenizer
from tokalign_jax.alignment import alignment, methods
from tokalign_jax.alignment.alignment import Alignment, Mixture, Rule
from tokalign_jax.alignment.vectors import Vectors
from tokalign_jax.cli import inspect
from tokalign_jax.config import AlignmentConfig
from tokalign_jax.errors import UserError
from tokalign_jax.reporting import inspection, pages
from tokalign_jax.reporting.pages import Bar, Code, Section
from tokalign_jax.text import canonical

WORDS = ("a house", "the horse", "Häuser\n\tan", "数学")
SHARED = 120
"""The first target tokens have these sources: themselves."""


def synthetic(source_tokenizer, target_tokenizer, seed=0) -> Alignment:
    """Shared ids are exact; the rest alternate between similar and pieces, of two source tokens
    each.
    """
    rng = np.random.default_rng(seed)
    m, n = (canonical.vocabulary_size(t) for t in (source_tokenizer, target_tokenizer))
    rules = np.where(
        np.arange(n) < SHARED, Rule.EXACT, np.where(np.arange(n) % 2, Rule.SIMILAR, Rule.PIECES)
    )
    rows = [[i] if i < SHARED else [5, 6 + i % 3] for i in range(n)]
    indptr = np.cumsum([0, *map(len, rows)])
    weights = np.concatenate([[1.0] if len(row) == 1 else [0.75, 0.25] for row in rows]).astype(
        np.float32
    )
    mixture = Mixture(indptr, np.concatenate(rows).astype(np.int32), weights, m)
    return Alignment(
        embedding=mixture,
        head=mixture._replace(weights=np.where(weights == 1, 1, 0.5).astype(np.float32)),
        rules=rules.astype(np.uint8),
        scores=np.where(rules == Rule.EXACT, 1, rng.uniform(0, 1, n)).astype(np.float32),
        matches=np.where(rules == Rule.SIMILAR, 7, -1).astype(np.int32),
        frequency_shift=np.where(rules == Rule.EXACT, 0, -1.5).astype(np.float32),
        source_log_frequency=np.zeros(m, np.float32),
        source_fingerprint=canonical.fingerprint(source_tokenizer),
        target_fingerprint=canonical.fingerprint(target_tokenizer),
    )


@pytest.fixture(scope="module")
def tokenizers():
    return tiny_tokenizer(270, WORDS[:2]), tiny_tokenizer(280, WORDS)


@pytest.fixture(scope="module")
def vectors(tokenizers):
    """Both sides' ids, in some order and not all of them, and vectors that agree on shared tokens
    but for noise.
    """
    rng = np.random.default_rng(1)
    source_ids, target_ids = (
        rng.permutation(260).astype(np.int32),
        rng.permutation(275).astype(np.int32),
    )
    common = rng.normal(size=(300, 12)) * np.linspace(2, 0.5, 12)
    turn = np.linalg.qr(rng.normal(size=(12, 12)))[0]
    source, target = (
        common[ids] + 0.3 * rng.normal(size=(len(ids), 12)) for ids in (source_ids, target_ids)
    )
    return source_ids, source.astype(np.float32), target_ids, (target @ turn).astype(np.float32)


@pytest.fixture(scope="module")
def subject(tokenizers, vectors):
    aligned = synthetic(*tokenizers)
    source, target = (
        inspection.vocabulary(t, name, np.arange(canonical.vocabulary_size(t))[::-1].copy())
        for t, name in zip(tokenizers, ("old", "new"))
    )
    space = inspection.common_space(aligned, *vectors, seed=0)
    return inspection.Subject(aligned, source, target, canonical.PieceCutter(tokenizers[0]), space)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, tokenizers, vectors):
    """Workdir with the files of a finished align stage that inspection reads."""
    folder = tmp_path_factory.mktemp("inspected")
    run = {}
    for role, side, tokenizer in zip(
        ("source_model", "target_tokenizer"), ("source", "target"), tokenizers
    ):
        run[role] = str(folder / "outside" / side)
        tokenizer.save_pretrained(run[role])
        (folder / "tokens" / side).mkdir(parents=True)
        np.save(
            folder / "tokens" / side / "counts.npy", np.arange(canonical.vocabulary_size(tokenizer))
        )
    alignment.save(synthetic(*tokenizers), folder / "align")
    names = ("source_ids", "source_vectors", "target_ids", "target_vectors")
    np.savez(folder / "align" / "vectors.npz", allow_pickle=False, **dict(zip(names, vectors)))
    settings = {"alignment": {"neighbours": 5, "method": "composed"}, "seed": 0}
    stages = {"align": {"finished": True, "settings": settings}}
    (folder / "stages.json").write_text(json.dumps({"run": run, "stages": stages}))
    return folder


# --- Tokens as text -----------------------------------------------------------------------------


@given(st.binary(max_size=40))
def test_readable_bytes_are_read_back_and_printable(content):
    shown = inspection.readable(content)
    assert shown.isprintable()
    assert inspection.unescape(shown) == content


@given(st.text(max_size=20))
def test_readable_text_is_read_back(text):
    content = text.encode("utf-8", "surrogatepass")
    assert inspection.unescape(inspection.readable(content)) == content


@pytest.mark.parametrize(
    ("written", "content"),
    [(r"\n\t", b"\n\t"), (r"\u00e9", "é".encode()), (r"\x0a\xff", b"\n\xff"), (r"\U0001f600", "😀".encode()),
     (r"\\n", rb"\n"), (r"\alpha", rb"\alpha"), ("\\", b"\\"), (r"\xg0", rb"\xg0"), (" Haus", b" Haus")],
)  # fmt: skip
def test_special_characters_are_escaped(written, content):
    assert inspection.unescape(written) == content


@pytest.mark.parametrize(
    ("content", "kind"),
    [(b" \n", "white space"), (b"\xe3\x82", "byte"), (b" 12", "digits"), ("数学".encode(), "CJK"), ("한".encode(), "CJK"),
     ("三".encode(), "CJK"), (b"word", "other"), (b"", "white space")],
)  # fmt: skip
def test_tokens_are_classified(content, kind):
    assert inspection.kind(content, "x") == kind


def test_non_text_tokens_are_classified():
    assert inspection.kind(None, "</s>") == "special"
    assert inspection.kind(None, "") == "unused"


def test_tokens_are_found_by_text_escape_and_spelling(subject, tokenizers):
    ids = tokenizers[1].get_vocab()
    assert (
        inspection.find(subject.target, r"\n") == inspection.find(subject.target, "Ċ") == [ids["Ċ"]]
    )
    assert inspection.find(subject.target, " ") == [ids["Ġ"]]
    assert inspection.find(subject.target, "<|endoftext|>") == [ids["<|endoftext|>"]]


def test_tokens_with_the_same_text_are_all_found():
    both = inspection.vocabulary(tiny_tokenizer(300, WORDS, "metaspace"), "llama", None)
    found = inspection.find(both, "e")
    assert sorted(both.spelled[i] for i in found) == ["<0x65>", "e"]


def test_unknown_token_suggests_similar_ones(subject):
    near = next(i for i in range(257, 276) if len(subject.target.contents[i] or b"") > 3)
    with pytest.raises(UserError, match="nearest are") as error:
        inspection.find(subject.target, subject.target.show(near).text + "q")
    assert f"(--id {near})" in str(error.value)
    assert "'new'" in str(error.value)


# --- Numbers ------------------------------------------------------------------------------------


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("pool", [3, 256])
def test_neighbours_match_brute_force(subject, monkeypatch, pool):
    monkeypatch.setattr(inspection, "POOL", pool)
    space, around = subject.space, 5
    source, target = (np.asarray(v, np.float64) for v in (space.source, space.target))
    cosines = target @ source.T
    around_target = np.sort(cosines, axis=1)[:, -around:].mean(axis=1)
    around_source = np.sort(cosines, axis=0)[-around:].mean(axis=0)
    csls = cosines - (around_target[:, None] + around_source) / 2
    for row in (0, 1, 274):
        found = inspection.neighbours(space, int(space.target_ids[row]), 5, around)
        pooled = np.argsort(-cosines[row])[: max(pool, around)]
        expected = pooled[np.argsort(-csls[row, pooled])][:5]
        assert [n.source for n in found] == space.source_ids[expected].tolist()
        np.testing.assert_allclose([n.cosine for n in found], cosines[row, expected], atol=1e-5)
        np.testing.assert_allclose([n.csls for n in found], csls[row, expected], atol=1e-5)


def test_nearest_neighbour_is_the_aligned_token(tokenizers, vectors):
    counts = [np.ones(canonical.vocabulary_size(t), np.int64) for t in tokenizers]
    sides = Vectors(*vectors[:2]), Vectors(*vectors[2:])
    settings = AlignmentConfig(method="composed", neighbours=5)
    made, _ = methods.make(
        methods.Inputs(settings, *tokenizers, *counts, 3, lambda line: None, *sides)
    )
    space = inspection.common_space(made, *vectors, seed=3)
    matched = np.flatnonzero(made.matches >= 0)
    assert len(matched)
    assert [inspection.neighbours(space, i, 1, 5)[0].source for i in matched] == made.matches[
        matched
    ].tolist()


def test_shared_tokens_are_their_own_nearest_neighbours(subject):
    shared = sorted(
        set(subject.space.source_ids) & set(subject.space.target_ids) & set(range(SHARED))
    )
    found = [inspection.neighbours(subject.space, int(i), 1, 5)[0].source for i in shared]
    assert np.mean(np.array(found) == shared) > 0.9


def test_match_is_listed_at_any_rank(subject):
    token, far = int(subject.space.target_ids[0]), int(subject.space.source_ids[200])
    assert far in [n.source for n in inspection.neighbours(subject.space, token, 2, 5, [far])]


def test_tokens_without_vectors_have_no_neighbours(subject, tokenizers, vectors):
    without = next(i for i in range(276) if i not in subject.space.target_ids)
    assert inspection.neighbours(subject.space, without, 5, 5) is None
    assert "no vector" in "\n".join(pages.terminal(inspection.explain(subject, without)))
    ids, values, target_ids, target_values = vectors
    assert (
        inspection.common_space(
            subject.alignment, ids[:8], values[:8], target_ids, target_values, 0
        )
        is None
    )


def test_worst_rows_have_low_scores_and_occur_in_text(monkeypatch):
    counts = np.array([60, 40, 40, 9, 1, 0, 500])
    scores = np.array([0.5, 0.2, 0.2, 0.1, 0.0, 0.0, 1.0])
    uncertain = np.array([1, 1, 1, 1, 1, 1, 0], bool)
    monkeypatch.setattr(inspection, "USED_TEXT", 0.9)
    assert inspection.worst(uncertain, counts, scores).tolist() == [
        1,
        2,
        0,
    ]  # 3 and 4 are the last tenth of the text
    monkeypatch.setattr(inspection, "USED_TEXT", 0.5)
    assert inspection.worst(uncertain, counts, scores).tolist() == [1, 0]
    assert inspection.most_frequent(uncertain, counts).tolist() == [0, 1, 2, 3, 4]
    assert inspection.examples(uncertain, counts, 3) == [0, 2, 4]
    assert inspection.examples(np.zeros(7, bool), counts, 3) == []


def test_worst_rows_without_counts_cover_all_rows():
    uncertain = np.array([0, 1, 1], bool)
    assert inspection.worst(uncertain, np.zeros(3, int), np.array([0, 0.9, 0.1])).tolist() == [2, 1]


def test_hubs_are_listed_with_their_tokens():
    counts = np.array([1, 5, 3, 9, 2])
    found = inspection.hubs(np.array([0, 1, 2, 4]), np.array([8, 6, 8, 8]), counts)
    assert found == [(8, 3, [2, 4, 0]), (6, 1, [1])]


def test_histogram_bins():
    assert inspection.histogram(np.array([0, 0.05, 0.1, 0.99, 1.0, -0.2])).tolist() == [
        0,
        0,
        1,
        9,
        9,
        0,
    ]


def test_explanation_names_pieces_match_and_weights(subject):
    index = SHARED + 1  # similar
    found = {part.source: part for part in inspection.parts(subject, index)}
    made = inspection.row(subject.alignment.embedding, index)
    assert {i for i, part in found.items() if part.embedding} == set(made)
    assert {i: pytest.approx(found[i].embedding) for i in made} == made
    assert "match" in found[7].role
    pieces = subject.cut(subject.target.contents[index])
    assert [p.source for p in inspection.parts(subject, index)][: len(pieces)] == pieces


def test_id_out_of_range_is_refused(subject):
    with pytest.raises(UserError, match="0 to 275"):
        inspection.explain(subject, 276)


# --- Pages --------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Checks that tags are closed in order, and collects tags, links and text."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.links, self.text = [], set(), [], ""
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [value for name, value in attrs if name in ("href", "src")]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


NASTY = '<script>alert("&amp;")</script>'


def test_text_is_escaped_everywhere_in_the_page():
    row = (NASTY, Code(NASTY), (Code(NASTY), NASTY), Bar(0.5))
    page = pages.html(NASTY, [Section(NASTY, NASTY, (NASTY, "", "", ""), [row])])
    read = Reader(page)
    assert "script" not in read.tags
    assert read.text.count(NASTY) == 9


def test_page_is_complete_and_self_contained(subject):
    read = Reader(
        pages.html("page", [*inspection.explain(subject, 257), *inspection.report(subject)])
    )
    assert not read.links and not read.tags & {"script", "link", "img", "iframe"}
    assert "url(" not in read.text and "@import" not in read.text and "://" not in read.text
    for title in (
        "Rules",
        "Scores",
        "Hubs",
        "Kinds of tokens",
        "Worst rows",
        "Most frequent uncertain",
        "Examples",
    ):
        assert title in read.text


def test_columns_are_aligned_in_the_terminal():
    lines = pages.terminal(
        [Section("T", "", ("a", "n"), [(Code("数学"), "5"), (Code("ab"), "1,000")])]
    )
    assert lines == ["T", "  a           n", '  "数学"      5', '  "ab"    1,000']
    assert len(pages.terminal([Section("T", rows=[("x" * 500,)])])[1]) < 110


# --- The command --------------------------------------------------------------------------------


def test_inspect_reads_workdirs_and_bare_alignments(workdir, capsys, tmp_path):
    page = tmp_path / "page.html"
    assert (
        inspect.main(
            ["--workdir", str(workdir), "--token", r"\n", "--id", "30", "--html", str(page)]
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert "Target token 30" in shown and "CSLS" in shown and "exact" in shown
    assert "Worst rows" in page.read_text() and "Target token 30" in page.read_text()

    names = [
        "--source-model",
        str(workdir / "outside/source"),
        "--target-tokenizer",
        str(workdir / "outside/target"),
    ]
    assert inspect.main(["--alignment", str(workdir / "align"), *names]) == 0
    assert "Worst rows" in capsys.readouterr().out
    assert (
        inspect.main(
            ["--alignment", str(workdir / "align" / "align_matrix.json"), *names, "--id", "30"]
        )
        == 0
    )
    assert "given" in capsys.readouterr().out


def test_page_states_that_there_are_no_vectors(workdir, tokenizers, tmp_path, capsys):
    alignment.save(synthetic(*tokenizers), tmp_path / "align")
    names = [
        "--source-model",
        str(workdir / "outside/source"),
        "--target-tokenizer",
        str(workdir / "outside/target"),
    ]
    assert inspect.main(["--alignment", str(tmp_path / "align"), *names, "--id", "130"]) == 0
    assert "no token vectors" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--workdir", "{tmp}/none"], "is not the workdir"),
        (["--workdir", "{tmp}"], "align stage is not finished"),
        ([], "nothing to inspect"),
        (["--alignment", "{work}/align"], "nothing to inspect"),
        (["--workdir", "{work}", "--id", "99999"], "0 to 275"),
        (["--workdir", "{work}", "--token", "qqqqq"], "nearest are"),
        (["--workdir", "{work}", "--html", "{tmp}/no/folder/page.html"], "cannot be written"),
        (["--workdir", "{work}", "--html", "{tmp}/stages.json"], "exists already"),
    ],
)
def test_user_errors_name_a_remedy(arguments, says, workdir, tmp_path, capsys):
    (tmp_path / "stages.json").write_text(
        json.dumps({"run": {}, "stages": {"align": {"finished": False}}})
    )
    assert inspect.main([a.format(tmp=tmp_path, work=workdir) for a in arguments]) == 2
    assert says in capsys.readouterr().err
