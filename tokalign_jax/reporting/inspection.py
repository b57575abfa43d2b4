"""Why a target token got its rows, and where an alignment is weak: numbers from a finished
alignment, and their tables.

A row is *certain* where the two vocabularies name the same thing (rules EXACT, SPECIAL and GIVEN),
and else *uncertain*.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from transformers import PreTrainedTokenizerBase

from tokalign_jax.alignment import matching, scoring
from tokalign_jax.alignment.alignment import HUBS, SURE, Alignment, Mixture, Rule
from tokalign_jax.errors import UserError
from tokalign_jax.reporting.pages import Bar, Cell, Code, Section
from tokalign_jax.text import canonical

CERTAIN = (*SURE, Rule.GIVEN)
POOL = 256
"""Neighbours by CSLS are looked for among this many source tokens with the largest cosines."""
FEWEST_SHARED = 32
"""With fewer shared tokens that have vectors the two sides have no space in common."""
USED_TEXT = 0.5
"""The worst rows are those of the lowest scores among the most frequent uncertain ones that make up
this share of the uncertain
text: tokens that are hardly used have no vector, so no score, and do no harm."""
BINS = 10
"""Of the histogram of scores."""

OWN_SPACE = ("lexicon", "tokalign", "focus", "omp")
"""Methods that do not match in `matching.common_space`."""

SAYS = {
    "EXACT": "the source has a token of the same bytes",
    "SPECIAL": "the source's special token of the same role, text or use, else its end-of-text",
    "SIMILAR": (
        "matched by co-occurrence (omp: in the donor model), by most methods mixed with "
        "the pieces of the text"
    ),
    "PIECES": "the text as the source tokenizer cuts it",
    "MEAN": "the mean of all source rows, since nothing is known",
    "GIVEN": "named by an alignment file",
    "RANDOM": "a source token drawn at random",
    "UNWRITTEN": (
        "no text is cut into it, since another token has the same bytes; its head row is "
        "the mean of all"
    ),
}


# --- tokens as text -----------------------------------------------------------------------------


def readable(content: bytes) -> str:
    r"""`content` as text that `unescape` reads back: UTF-8 where it is printable, else `\n`, `\t`,
    `\x0a`, `\u00a0`.
    """
    return "".join(map(_readable_character, content.decode("utf-8", "surrogateescape")))


def unescape(text: str) -> bytes:
    r"""The bytes that `text` names: `\n \r \t \\`, `\x0a` (a byte), `\u00e9` and `\U0001f600`
    (characters); all else as it is.
    """
    parts = re.split(
        r"(\\(?:[nrt\\]|x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U00(?:0[0-9A-Fa-f]|10)[0-9A-Fa-f]{4}))",
        text,
    )
    return b"".join(
        _escape(p) if i % 2 else p.encode("utf-8", "surrogateescape") for i, p in enumerate(parts)
    )


_NAMED = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}


def _readable_character(character: str) -> str:
    code = ord(character)
    named = next((f"\\{name}" for name, c in _NAMED.items() if c == character), None)
    if named or character.isprintable():
        return named or character
    if 0xDC80 <= code < 0xDD00:  # a byte that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return (
        f"\\x{code:02x}"
        if code < 0x80
        else f"\\u{code:04x}"
        if code < 0x10000
        else f"\\U{code:08x}"
    )


def _escape(escaped: str) -> bytes:
    kind, digits = escaped[1], escaped[2:]
    if kind == "x":
        return bytes([int(digits, 16)])
    return (_NAMED[kind] if kind in _NAMED else chr(int(digits, 16))).encode(
        "utf-8", "surrogatepass"
    )


KINDS = ("unused", "special", "byte", "white space", "digits", "CJK", "other")
_CJK = re.compile(
    r"[\u1100-\u11ff\u2e80-\u9fff\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\uff66-\uffdc\U00020000-\U0003ffff]"
)


def kind(content: bytes | None, spelled: str) -> str:
    """What sort of token it is, one of `KINDS`; `byte`: it holds bytes that are no whole
    characters.
    """
    if content is None:
        return "special" if spelled else "unused"
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return "byte"
    if not text.strip():
        return "white space"
    if all(c.isnumeric() for c in text.strip()):
        return "CJK" if _CJK.search(text) else "digits"
    return "CJK" if _CJK.search(text) else "other"


# --- what is inspected --------------------------------------------------------------------------


@dataclass(frozen=True)
class Vocabulary:
    """One side's tokens."""

    name: str
    spelled: Sequence[str]
    """As the tokenizer writes each; empty for an unused id."""
    contents: Sequence[bytes | None]
    """Canonical bytes; None for special tokens and unused ids."""
    counts: Int[np.ndarray, "V"] | None
    """How often the corpus has each; None where it is not known."""

    def show(self, index: int) -> Code:
        """The token for people; the mean of all rows where `index` is past the end (as in a
        `Mixture`).
        """
        if index >= len(self.contents):
            return Code("mean of all rows")
        content = self.contents[index]
        return Code(readable(self.spelled[index].encode() if content is None else content))

    def count(self, index: int) -> str:
        """Return how often the text has a token; empty where that is not known."""
        return "" if self.counts is None or index >= len(self.counts) else f"{self.counts[index]:,}"

    def kind(self, index: int) -> str:
        """Return what kind of token it is."""
        return kind(self.contents[index], self.spelled[index])


def vocabulary(
    tokenizer: PreTrainedTokenizerBase, name: str, counts: Int[np.ndarray, "V"] | None
) -> Vocabulary:
    """The tokens of `tokenizer`, with their counts if there are any."""
    return Vocabulary(name, canonical.spelled(tokenizer), canonical.token_bytes(tokenizer), counts)


def find(target: Vocabulary, text: str) -> list[int]:
    """Ids of the tokens that read `text`: by its bytes with escapes, else as the tokenizer spells
    them.

    Raises:
      UserError: there is none; it names those that are spelled nearly so.
    """
    content = unescape(text)
    ids = [i for i, c in enumerate(target.contents) if c == content and content]
    ids = ids or [i for i, spelled in enumerate(target.spelled) if spelled == text and text]
    if ids:
        return ids
    shown = {target.show(i).text: i for i, spelled in enumerate(target.spelled) if spelled}
    near = difflib.get_close_matches(readable(content), shown, n=5, cutoff=0.0)
    raise UserError(
        f"--token '{text}': '{target.name}' has no such token; the nearest are "
        + ", ".join(f"'{n}' (--id {shown[n]})" for n in near)
        + r". A leading space counts; write white space and bytes as \n, \t, \x0a, \u00e9"
    )


class Space(NamedTuple):
    """Both sides' token vectors where their products are cosines (`matching.common_space`)."""

    source_ids: Int[np.ndarray, "n"]
    target_ids: Int[np.ndarray, "m"]
    source: Float[Array, "n d"]
    target: Float[Array, "m d"]


def common_space(
    alignment: Alignment,
    source_ids: Int[np.ndarray, "n"],
    source_vectors: Float[np.ndarray, "n d"],
    target_ids: Int[np.ndarray, "m"],
    target_vectors: Float[np.ndarray, "m e"],
    seed: int,
) -> Space | None:
    """The space in which an alignment with these settings was matched; None where too few shared
    tokens have vectors.
    """
    row_of = {int(token): row for row, token in enumerate(source_ids)}
    exact, heaviest = alignment.rules == Rule.EXACT, alignment.heaviest()
    shared = [
        (row_of[source], row)
        for row, (source, same) in enumerate(zip(heaviest[target_ids].tolist(), exact[target_ids]))
        if same and source in row_of
    ]
    if len(shared) < FEWEST_SHARED:
        return None
    both = np.array(sorted(shared), np.int32)
    chosen, _ = matching.choose_pivots(both[:, 0], both[:, 1], len(both), seed)
    vectors = jnp.asarray(source_vectors, jnp.float32), jnp.asarray(target_vectors, jnp.float32)
    return Space(
        source_ids, target_ids, *matching.common_space(*vectors, jnp.asarray(both[chosen]))
    )


class Neighbour(NamedTuple):
    """A source token near to a target token."""

    source: int
    cosine: float
    csls: float


def neighbours(
    space: Space, target: int, count: int, around: int, also: Iterable[int] = ()
) -> list[Neighbour] | None:
    """The `count` source tokens with the largest CSLS, falling; None where the target token has no
    vector.

    Args:
      around: neighbours over which hubness is averaged, as for the alignment.
      also: source tokens that are listed wherever they come, if they have vectors.
    """
    found = np.flatnonzero(space.target_ids == target)
    if not len(found):
        return None
    query, n = space.target[found[:1]], len(space.source)
    cosines, nearest = matching.nearest(
        query, space.source, jnp.zeros(n), min(max(POOL, around, count), n)
    )
    kept = np.flatnonzero(np.isin(space.source_ids, list(also)))
    rows = np.union1d(np.asarray(nearest[0]), kept)
    keys = space.source[rows]
    around_keys = matching.hubness(keys, space.target, around)
    cosine = jnp.matmul(keys, query[0], precision="highest")
    csls = np.asarray(cosine - (around_keys + cosines[0, : min(around, n)].mean()) / 2)
    order = np.argsort(-csls, kind="stable")
    shown = [i for place, i in enumerate(order) if place < count or rows[i] in kept]
    return [
        Neighbour(int(space.source_ids[rows[i]]), float(cosine[i]), float(csls[i])) for i in shown
    ]


@dataclass(frozen=True)
class Subject:
    """An alignment and what is known of its two sides."""

    alignment: Alignment
    source: Vocabulary
    target: Vocabulary
    cut: Callable[[bytes], list[int]]
    """Bytes to source ids, as `canonical.PieceCutter`."""
    space: Space | None
    no_space: str = ""
    """Why there is no space."""
    method: str = "unknown"
    """`alignment.method`, or `file`."""
    around: int = 10
    """Neighbours for CSLS."""

    @property
    def uncertain(self) -> np.ndarray:
        """Which target tokens have no certain source token; bool [V_t]."""
        return ~np.isin(self.alignment.rules, CERTAIN)

    @property
    def counts(self) -> Int[np.ndarray, "V_t"]:
        """Of target tokens; zeros where they are not known."""
        known = self.target.counts
        return np.zeros(self.alignment.target_size, np.int64) if known is None else known


# --- one token ----------------------------------------------------------------------------------


class Part(NamedTuple):
    """A source token that has to do with a target token's rows."""

    source: int
    role: str
    embedding: float
    head: float


def row(mixture: Mixture, index: int) -> dict[int, float]:
    """Source tokens and weights of one target token; the key V_s stands for the mean."""
    entries = slice(mixture.indptr[index], mixture.indptr[index + 1])
    return dict(zip(mixture.ids[entries].tolist(), mixture.weights[entries].tolist()))


def parts(subject: Subject, index: int) -> list[Part]:
    """The pieces of the token's text in order, its match, and whatever else its rows are made of."""
    alignment, content = subject.alignment, subject.target.contents[index]
    spelled = subject.target.spelled[index].encode()
    embedding, head = row(alignment.embedding, index), row(alignment.head, index)
    roles: dict[int, list[str]] = {}
    for place, piece in enumerate(subject.cut(spelled if content is None else content), start=1):
        roles.setdefault(piece, []).append(f"piece {place}")
    match = int(alignment.matches[index])
    if match >= 0:
        roles.setdefault(match, []).append("match")
    for source in sorted(
        {**embedding, **head}, key=lambda i: -embedding.get(i, 0.0) - head.get(i, 0.0)
    ):
        roles.setdefault(source, [])
    return [
        Part(i, ", ".join(role), embedding.get(i, 0.0), head.get(i, 0.0))
        for i, role in roles.items()
    ]


def explain(subject: Subject, index: int, count: int = 10) -> list[Section]:
    """Why target token `index` has its rows.

    Raises:
      UserError: there is no such id.
    """
    alignment, source, target = subject.alignment, subject.source, subject.target
    if not 0 <= index < alignment.target_size:
        raise UserError(
            f"--id {index}: the target tokens of '{target.name}' are 0 to "
            f"{alignment.target_size - 1}"
        )
    rule, match = Rule(int(alignment.rules[index])), int(alignment.matches[index])
    shift = float(alignment.frequency_shift[index])
    facts: list[tuple[str, Cell]] = [
        ("rule", f"{rule.name.lower()}: {SAYS.get(rule.name, '')}"),
        (
            "score",
            f"{alignment.scores[index]:.3f}"
            + ("" if rule in CERTAIN or match >= 0 else " (it has no match)"),
        ),
        (
            "spelled",
            (
                Code(readable(target.spelled[index].encode("utf-8", "surrogateescape"))),
                f" ({target.kind(index)})",
            ),
        ),
        ("bytes", (target.contents[index] or b"").hex(" ") or "none"),
        ("corpus", _frequency(subject, index)),
        (
            "frequency shift",
            f"{shift:+.3f}: " + (_shift(shift) if shift else "the head row is not moved"),
        ),
    ]
    made = [
        (
            source.show(p.source),
            f"{p.source}",
            p.role,
            _weight(p.embedding),
            _weight(p.head),
            source.count(p.source),
        )
        for p in parts(subject, index)
    ]
    title = f"Target token {index}: “{target.show(index).text}”"
    return [
        Section(title, rows=facts),
        Section(
            "Source tokens",
            _after(subject, index),
            ("token", "id", "as", "in embedding", "in head", "in the corpus"),
            made,
        ),
        _neighbour_section(subject, index, match, count),
    ]


def _after(subject: Subject, index: int) -> str:
    """What initialization does to a row beyond its mixture."""
    rule = Rule(int(subject.alignment.rules[index]))
    if subject.method == "distilled" and rule in (Rule.EXACT, Rule.PIECES):
        rows = "; rows of shared tokens stay with initialization.trains=rows" * (rule == Rule.EXACT)
        return (
            "From this row initialization trains the start with the source model as teacher, "
            "unless "
            f"initialization.distillation_tokens is 0{rows}."
        )
    if subject.method != "composed" or rule not in (Rule.EXACT, Rule.SIMILAR, Rule.PIECES):
        return ""
    unless = "unless initialization.tokens or initialization.tuning is 0"
    if rule == Rule.EXACT:
        return (
            f"Initialization tunes the row together with all others, {unless} or the vocabulary is"
            " extended."
        )
    return (
        "From this mixture initialization draws the row to what the source model makes of the "
        "token in text, "
        f"and tunes it together with all others, {unless}."
    )


def _neighbour_section(subject: Subject, index: int, match: int, count: int) -> Section:
    title, source = "Nearest source tokens by co-occurrence", subject.source
    if subject.space is None:
        return Section(title, f"Not known: {subject.no_space}.")
    found = neighbours(subject.space, index, count, subject.around, [match])
    if found is None:
        return Section(title, "Not known: the token has no vector; it is too rare in the corpus.")
    rows = [
        (source.show(n.source), f"{n.source}", f"{n.csls:.3f}", f"{n.cosine:.3f}", source.count(n.source),
         "match" if n.source == match else "")
        for n in found
    ]  # fmt: skip
    text = (
        "In the space that both sides share; CSLS is the cosine less what either token has of it"
        " with everything."
    )
    if subject.method in OWN_SPACE:
        text += f" Method '{subject.method}' found its matches in another one."
    return Section(title, text, ("token", "id", "CSLS", "cosine", "in the corpus", ""), rows)


def _frequency(subject: Subject, index: int) -> str:
    if subject.target.counts is None:
        return "not known: no token counts"
    count, total = int(subject.counts[index]), max(int(subject.counts.sum()), 1)
    return f"{count:,} of {total:,} target tokens, {count / total:.4%}"


def _shift(shift: float) -> str:
    return f"the token is {np.exp(shift):.3g} times as frequent as what its head row is mixed from"


def _weight(weight: float) -> str:
    return f"{weight:.3f}" if weight else ""


# --- a whole alignment --------------------------------------------------------------------------


def report(subject: Subject, count: int = 12) -> list[Section]:
    """A page on an alignment: rules, scores, hubs, kinds of tokens, its weak rows and examples."""
    alignment = subject.alignment
    uncertain = np.flatnonzero(subject.uncertain)
    header = ("token", "id", "rule", "count", "score", "match", "embedding made of")
    listed = lambda ids: [_line(subject, i) for i in ids]  # noqa: E731
    return [
        Section(
            "What is aligned",
            f"{alignment.target_size:,} target tokens ({subject.target.name}) made of "
            f"{alignment.source_size:,} source tokens "
            f"({subject.source.name}) by method '{subject.method}'; {len(uncertain):,} rows are "
            f"uncertain"
            + (f", {_share(subject, subject.uncertain):.2%} of the corpus." if subject.target.counts is not None else "."),
        ),
        Section(
            "Rules",
            "; ".join(f"{r.name.lower()}: {SAYS.get(r.name, '')}" for r in Rule if (alignment.rules == r).any()) + ".",
            ("rule", "rows", "of rows", "of corpus", "mean score", ""),
            _rules(subject),
        ),
        Section(
            "Scores",
            "Uncertain rows by the score of their best match.",
            ("score", "rows", "of corpus", ""),
            _histogram(subject),
        ),
        *(
            Section(title, text, ("source token", "rows", "of these", "most frequent that point "
                                                                      "at it"), rows)
            for title, text, rows in (
                _hub_table(subject, "Hubs: heaviest source tokens", uncertain, alignment.heaviest()[uncertain]),
                _hub_table(subject, "Hubs: matches", *_matched(alignment)),
            )
            if rows
        ),
        Section("Kinds of tokens", "Rows by rule.", *_kinds(subject)),
        Section(
            "Most frequent uncertain rows", "", header, listed(most_frequent(subject.uncertain, subject.counts)[:count])
        ),
        Section(
            "Worst rows",
            f"The lowest scores among the most frequent uncertain rows, those that make up "
            f"{USED_TEXT:.0%} of the uncertain text.",
            header,
            listed(worst(subject.uncertain, subject.counts, alignment.scores)[:count]),
        ),
        Section(
            "Examples of each rule",
            "Spread evenly from the most frequent to the rarest.",
            header,
            listed(i for rule in Rule for i in examples(alignment.rules == rule, subject.counts, max(1, count // 3))),
        ),
    ]  # fmt: skip


def most_frequent(chosen: np.ndarray, counts: Int[np.ndarray, "V_t"]) -> Int[np.ndarray, "c"]:
    """Ids where bool `chosen` is true and the corpus has them (all where it has none of them),
    falling by count.
    """
    ids = np.flatnonzero(chosen)
    ids = ids[np.argsort(-counts[ids], kind="stable")]
    seen = ids[counts[ids] > 0]
    return seen if len(seen) else ids


def worst(
    uncertain: np.ndarray, counts: Int[np.ndarray, "V_t"], scores: Float[np.ndarray, "V_t"]
) -> Int[np.ndarray, "c"]:
    """Uncertain ids of the used text (`USED_TEXT`) by rising score, of equals the more frequent
    first.
    """
    ids = most_frequent(uncertain, counts)
    up_to, total = np.cumsum(counts[ids]), counts[ids].sum()
    if total:
        ids = ids[up_to - counts[ids] < USED_TEXT * total]
    return ids[np.argsort(scores[ids], kind="stable")]


def examples(chosen: np.ndarray, counts: Int[np.ndarray, "V_t"], count: int) -> list[int]:
    """`count` ids of `chosen` at even steps from the most frequent to the rarest."""
    ids = most_frequent(chosen, counts)
    places = np.linspace(0, len(ids) - 1, min(count, len(ids))).astype(int)
    return [int(ids[place]) for place in places]


class Hub(NamedTuple):
    """A source token that many rows point at."""

    source: int
    rows: int
    pointing: list[int]
    """Target tokens that do, falling by count."""


def hubs(
    targets: Int[np.ndarray, "n"], pointed_at: Int[np.ndarray, "n"], counts: Int[np.ndarray, "V_t"]
) -> list[Hub]:
    """The `HUBS` source tokens that most of `targets` point at, falling."""
    sources, rows = np.unique(pointed_at, return_counts=True)
    order = np.argsort(-rows, kind="stable")[:HUBS]
    by_count = np.argsort(-counts[targets], kind="stable")
    targets, pointed_at = targets[by_count], pointed_at[by_count]
    return [
        Hub(source, number, targets[pointed_at == source].tolist())
        for source, number in zip(sources[order].tolist(), rows[order].tolist())
    ]


def _hub_table(
    subject: Subject, title: str, targets, pointed_at
) -> tuple[str, str, list[Sequence[Cell]]]:
    share = scoring.hub_share(pointed_at, HUBS)
    rows: list[Sequence[Cell]] = [
        (subject.source.show(hub.source), f"{hub.rows:,}", f"{hub.rows / len(targets):.2%}",
         _joined([subject.target.show(i) for i in hub.pointing[:5]]))
        for hub in hubs(targets, pointed_at, subject.counts)
    ]  # fmt: skip
    return (
        title,
        f"{share:.1%} of {len(targets):,} rows point at {HUBS} source tokens (the hub share).",
        rows,
    )


def _matched(alignment: Alignment) -> tuple[np.ndarray, np.ndarray]:
    similar = np.flatnonzero((alignment.rules == Rule.SIMILAR) & (alignment.matches >= 0))
    return similar, alignment.matches[similar]


def _rules(subject: Subject) -> list[Sequence[Cell]]:
    alignment, rows = subject.alignment, []
    for rule in Rule:
        of = alignment.rules == rule
        if of.any():
            share = float(of.mean()) if subject.target.counts is None else _share(subject, of)
            corpus = "" if subject.target.counts is None else f"{share:.2%}"
            score = f"{alignment.scores[of].mean():.2f}"
            rows.append(
                (rule.name.lower(), f"{of.sum():,}", f"{of.mean():.1%}", corpus, score, Bar(share))
            )
    return rows


def histogram(scores: Float[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """The bin of each score: `BINS` of equal width over [0, 1], scores outside in the outermost."""
    return np.clip((scores * BINS).astype(int), 0, BINS - 1)


def _histogram(subject: Subject) -> list[Sequence[Cell]]:
    alignment = subject.alignment
    bins = np.where(alignment.matches >= 0, histogram(alignment.scores), -1)
    groups = [(f"{b / BINS:.1f} to {(b + 1) / BINS:.1f}", bins == b) for b in range(BINS)]
    groups = [(name, of & subject.uncertain) for name, of in [("no match", bins == -1), *groups]]
    known = subject.target.counts is not None
    sizes = [_share(subject, of) if known else float(of.mean()) for _, of in groups]
    return [
        (name, f"{of.sum():,}", f"{size:.2%}" if known else "", Bar(size / (max(sizes) or 1)))
        for (name, of), size in zip(groups, sizes)
    ]


def _kinds(subject: Subject) -> tuple[Sequence[str], list[Sequence[Cell]]]:
    """A table of kinds by rules, as header and rows."""
    alignment, target = subject.alignment, subject.target
    of_token = np.array([KINDS.index(target.kind(i)) for i in range(alignment.target_size)])
    rules = [rule for rule in Rule if (alignment.rules == rule).any()]
    rows = []
    for index, name in enumerate(KINDS):
        of = of_token == index
        if of.any():
            numbers = [f"{(of & (alignment.rules == rule)).sum():,}" for rule in rules]
            share = "" if target.counts is None else f"{_share(subject, of):.2%}"
            shown = [target.show(i) for i in examples(of, subject.counts, 4) if target.spelled[i]]
            rows.append((name, *numbers, share, _joined(shown)))
    return ("kind", *(rule.name.lower() for rule in rules), "of corpus", "such as"), rows


def _line(subject: Subject, index: int) -> Sequence[Cell]:
    """One target token in a table of rows."""
    alignment, index = subject.alignment, int(index)
    match = int(alignment.matches[index])
    weights = sorted(row(alignment.embedding, index).items(), key=lambda item: -item[1])
    made: list[str | Code] = []
    for source, weight in weights[:4]:
        made += [*([" "] if made else []), subject.source.show(source), f" {weight:.2f}"]
    return (
        subject.target.show(index),
        f"{index}",
        Rule(int(alignment.rules[index])).name.lower(),
        subject.target.count(index),
        f"{alignment.scores[index]:.2f}",
        subject.source.show(match) if match >= 0 else "",
        (*made, " …") if len(weights) > 4 else tuple(made),
    )


def _share(subject: Subject, of: np.ndarray) -> float:
    """The share of the corpus that the target tokens where `of` is true make up."""
    return float(subject.counts[of].sum() / max(int(subject.counts.sum()), 1))


def _joined(tokens: Iterable[Code]) -> tuple[str | Code, ...]:
    return tuple(part for token in tokens for part in (token, " "))[:-1]
