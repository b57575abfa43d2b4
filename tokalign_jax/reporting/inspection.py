"""Inspection of an alignment: why a target token got its rows, and which rows are weak.

A row is *certain* if both vocabularies name the same thing (rules EXACT, SPECIAL and GIVEN), else
*uncertain*.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
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
"""Source tokens with the largest cosines, among which neighbours by CSLS are searched."""
FEWEST_SHARED = 32
"""Minimum number of shared tokens with vectors for a common space of both sides."""
USED_TEXT = 0.5
"""Share of the uncertain text: the worst rows are those with the lowest scores among the most
frequent uncertain tokens that make it up. Rare tokens have no vector and so no score, and do little
harm."""
BINS = 10
"""Bins of the histogram of scores."""

OWN_SPACE = ("lexicon", "tokalign", "focus", "omp")
"""Methods that match in another space than `matching.common_space`."""

DESCRIPTIONS = {
    "EXACT": "the source token of the same bytes",
    "SPECIAL": "the source's special token of the same role, text or use, else its end-of-text",
    "SIMILAR": (
        "matched by co-occurrence (omp: in the donor model), by most methods mixed with the "
        "pieces of the text"
    ),
    "PIECES": "the source tokens of its text",
    "MEAN": "the mean of all source rows, since nothing is known",
    "GIVEN": "named by an alignment file",
    "RANDOM": "a source token drawn at random",
    "UNWRITTEN": (
        "never produced, since another token has the same bytes; its head row is the mean of all"
    ),
}


# --- Tokens as text -----------------------------------------------------------------------------


def readable(content: bytes) -> str:
    r"""Format bytes as printable UTF-8 with escapes `\n`, `\t`, `\x0a`, `\u00a0`.

    `unescape` is the inverse.
    """
    return "".join(map(_readable_character, content.decode("utf-8", "surrogateescape")))


def unescape(text: str) -> bytes:
    r"""Return the bytes of text with escapes.

    The escapes are `\n \r \t \\`, `\x0a` (a byte), `\u00e9` and `\U0001f600` (characters).
    """
    return b"".join(
        _unescape(part) if i % 2 else part.encode("utf-8", "surrogateescape")
        for i, part in enumerate(_ESCAPE.split(text))
    )


_ESCAPE = re.compile(
    r"(\\(?:[nrt\\]|x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U00(?:0[0-9A-Fa-f]|10)[0-9A-Fa-f]{4}))"
)


_NAMED = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}


def _readable_character(character: str) -> str:
    code = ord(character)
    named = next((f"\\{name}" for name, c in _NAMED.items() if c == character), None)
    if named or character.isprintable():
        return named or character
    if 0xDC80 <= code < 0xDD00:  # a byte that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x80:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _unescape(escape: str) -> bytes:
    kind, digits = escape[1], escape[2:]
    if kind == "x":
        return bytes([int(digits, 16)])
    character = _NAMED[kind] if kind in _NAMED else chr(int(digits, 16))
    return character.encode("utf-8", "surrogatepass")


KINDS = ("unused", "special", "byte", "white space", "digits", "CJK", "other")
_CJK = re.compile(
    r"[\u1100-\u11ff\u2e80-\u9fff\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\uff66-\uffdc"
    r"\U00020000-\U0003ffff]"
)


def kind(content: bytes | None, spelled: str) -> str:
    """Classify a token as one of `KINDS`; `byte`: its bytes are no whole characters."""
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


# --- Inputs -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vocabulary:
    """Tokens of one side.

    Attributes:
      spelled: as the tokenizer spells each; "" for an unused id.
      contents: canonical bytes; None for special tokens and unused ids.
      counts: frequency of each in the corpus; None if not known.
    """

    name: str
    spelled: Sequence[str]
    contents: Sequence[bytes | None]
    counts: Int[np.ndarray, "V"] | None

    def show(self, index: int) -> Code:
        """Format a token; an index past the end is the mean of all rows (as in a `Mixture`)."""
        if index >= len(self.contents):
            return Code("mean of all rows")
        content = self.contents[index]
        return Code(readable(self.spelled[index].encode() if content is None else content))

    def count(self, index: int) -> str:
        """Format the frequency of a token; "" if not known."""
        return "" if self.counts is None or index >= len(self.counts) else f"{self.counts[index]:,}"

    def kind(self, index: int) -> str:
        """Classify a token as one of `KINDS`."""
        return kind(self.contents[index], self.spelled[index])


def vocabulary(
    tokenizer: PreTrainedTokenizerBase, name: str, counts: Int[np.ndarray, "V"] | None
) -> Vocabulary:
    """Return the tokens of a tokenizer with their counts."""
    return Vocabulary(name, canonical.spelled(tokenizer), canonical.token_bytes(tokenizer), counts)


def find(target: Vocabulary, text: str) -> list[int]:
    """Find the ids of tokens by their bytes (text with escapes), else by their spelling.

    Raises:
      UserError: there is none; the message names the most similar tokens.
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
    """Token vectors of both sides whose products are cosines (`matching.common_space`)."""

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
    """Rebuild the space in which an alignment was matched.

    Returns:
      None if too few shared tokens have vectors.
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
    rows = np.array(sorted(shared), np.int32)
    pivots, _ = matching.choose_pivots(rows[:, 0], rows[:, 1], len(rows), seed)
    vectors = jnp.asarray(source_vectors, jnp.float32), jnp.asarray(target_vectors, jnp.float32)
    source, target = matching.common_space(*vectors, jnp.asarray(rows[pivots]))
    return Space(source_ids, target_ids, source, target)


class Neighbour(NamedTuple):
    """A source token in the neighbourhood of a target token."""

    source: int
    cosine: float
    csls: float


def neighbours(
    space: Space, target: int, count: int, around: int, also: Iterable[int] = ()
) -> list[Neighbour] | None:
    """Return the `count` source tokens with the largest CSLS, in descending order.

    Args:
      around: neighbours over which hubness is averaged, as for the alignment.
      also: source tokens to list in any case, if they have vectors.

    Returns:
      None if the target token has no vector.
    """
    targets = np.flatnonzero(space.target_ids == target)
    if not len(targets):
        return None
    query, n = space.target[targets[:1]], len(space.source)
    pool = min(max(POOL, around, count), n)
    cosines, nearest = matching.nearest(query, space.source, jnp.zeros(n), pool)
    extra = np.flatnonzero(np.isin(space.source_ids, list(also)))
    rows = np.union1d(np.asarray(nearest[0]), extra)
    keys = space.source[rows]
    around_keys = matching.hubness(keys, space.target, around)
    cosine = jnp.matmul(keys, query[0], precision="highest")
    csls = np.asarray(cosine - (around_keys + cosines[0, : min(around, n)].mean()) / 2)
    order = np.argsort(-csls, kind="stable")
    shown = [i for rank, i in enumerate(order) if rank < count or rows[i] in extra]
    return [
        Neighbour(int(space.source_ids[rows[i]]), float(cosine[i]), float(csls[i])) for i in shown
    ]


@dataclass(frozen=True)
class Subject:
    """An alignment with its two vocabularies and its space.

    Attributes:
      cut: bytes to source ids, as `canonical.PieceCutter`.
      no_space: the reason why there is no space.
      method: `alignment.method`, or `file`.
      around: neighbours for CSLS.
    """

    alignment: Alignment
    source: Vocabulary
    target: Vocabulary
    cut: Callable[[bytes], list[int]]
    space: Space | None
    no_space: str = ""
    method: str = "unknown"
    around: int = 10

    @property
    def uncertain(self) -> np.ndarray:
        """Target tokens whose rows are uncertain: bool [V_t]."""
        return ~np.isin(self.alignment.rules, CERTAIN)

    @property
    def has_counts(self) -> bool:
        """True if the frequencies of target tokens are known."""
        return self.target.counts is not None

    @property
    def counts(self) -> Int[np.ndarray, "V_t"]:
        """Frequencies of target tokens; zeros if not known."""
        counts = self.target.counts
        return np.zeros(self.alignment.target_size, np.int64) if counts is None else counts


# --- A single token -----------------------------------------------------------------------------


class Part(NamedTuple):
    """A source token in a target token's text, match or rows, with its weights."""

    source: int
    role: str
    embedding: float
    head: float


def row(mixture: Mixture, index: int) -> dict[int, float]:
    """Return the weights of a target token by source token; the key V_s is the mean of all."""
    entries = slice(mixture.indptr[index], mixture.indptr[index + 1])
    return dict(zip(mixture.ids[entries].tolist(), mixture.weights[entries].tolist()))


def parts(subject: Subject, index: int) -> list[Part]:
    """Return the pieces of a token's text in order, its match, and further tokens of its rows."""
    alignment, content = subject.alignment, subject.target.contents[index]
    spelled = subject.target.spelled[index].encode()
    embedding, head = row(alignment.embedding, index), row(alignment.head, index)
    roles: dict[int, list[str]] = {}
    pieces = subject.cut(spelled if content is None else content)
    for number, piece in enumerate(pieces, start=1):
        roles.setdefault(piece, []).append(f"piece {number}")
    match = int(alignment.matches[index])
    if match >= 0:
        roles.setdefault(match, []).append("match")
    by_weight = lambda i: -embedding.get(i, 0.0) - head.get(i, 0.0)  # noqa: E731
    for source in sorted({**embedding, **head}, key=by_weight):
        roles.setdefault(source, [])
    return [
        Part(i, ", ".join(role), embedding.get(i, 0.0), head.get(i, 0.0))
        for i, role in roles.items()
    ]


def explain(subject: Subject, index: int, count: int = 10) -> list[Section]:
    """Explain the rows of a target token: its facts, source tokens and neighbours.

    Args:
      count: number of neighbours.

    Raises:
      UserError: there is no such id.
    """
    size, target = subject.alignment.target_size, subject.target
    if not 0 <= index < size:
        raise UserError(f"--id {index}: the target tokens of '{target.name}' are 0 to {size - 1}")
    title = f"Target token {index}: “{target.show(index).text}”"
    return [
        Section(title, rows=_facts(subject, index)),
        _source_section(subject, index),
        _neighbour_section(subject, index, count),
    ]


def _facts(subject: Subject, index: int) -> list[tuple[str, Cell]]:
    alignment, target = subject.alignment, subject.target
    rule = Rule(int(alignment.rules[index]))
    has_match = rule in CERTAIN or alignment.matches[index] >= 0
    shift = float(alignment.frequency_shift[index])
    spelled = Code(readable(target.spelled[index].encode("utf-8", "surrogateescape")))
    return [
        ("rule", f"{rule.name.lower()}: {DESCRIPTIONS.get(rule.name, '')}"),
        ("score", f"{alignment.scores[index]:.3f}" + ("" if has_match else " (it has no match)")),
        ("spelled", (spelled, f" ({target.kind(index)})")),
        ("bytes", (target.contents[index] or b"").hex(" ") or "none"),
        ("corpus", _frequency(subject, index)),
        ("frequency shift", f"{shift:+.3f}: {_shift(shift)}"),
    ]


def _source_section(subject: Subject, index: int) -> Section:
    source = subject.source
    rows = [
        (
            source.show(part.source),
            f"{part.source}",
            part.role,
            _weight(part.embedding),
            _weight(part.head),
            source.count(part.source),
        )
        for part in parts(subject, index)
    ]
    header = ("token", "id", "as", "in embedding", "in head", "in the corpus")
    return Section("Source tokens", _later_changes(subject, index), header, rows)


def _later_changes(subject: Subject, index: int) -> str:
    """Describe what initialization changes in a row after it was mixed."""
    rule = Rule(int(subject.alignment.rules[index]))
    if subject.method == "distilled" and rule in (Rule.EXACT, Rule.PIECES):
        rows = "; rows of shared tokens stay with initialization.trains=rows" * (rule == Rule.EXACT)
        return (
            "The row is then trained with the source model as teacher, unless "
            f"initialization.distillation_tokens is 0{rows}."
        )
    if subject.method != "composed" or rule not in (Rule.EXACT, Rule.SIMILAR, Rule.PIECES):
        return ""
    unless = "unless initialization.tokens or initialization.tuning is 0"
    if rule == Rule.EXACT:
        return (
            f"The row is then tuned together with all others, {unless} or the vocabulary is "
            "extended."
        )
    return (
        "The row is then moved towards one predicted from the source model's hidden states around "
        f"the token, and tuned together with all others, {unless}."
    )


def _neighbour_section(subject: Subject, index: int, count: int) -> Section:
    title, source = "Nearest source tokens by co-occurrence", subject.source
    if subject.space is None:
        return Section(title, f"Not known: {subject.no_space}.")
    match = int(subject.alignment.matches[index])
    nearest = neighbours(subject.space, index, count, subject.around, [match])
    if nearest is None:
        return Section(title, "Not known: the token has no vector; it is too rare in the corpus.")
    rows = [
        (
            source.show(neighbour.source),
            f"{neighbour.source}",
            f"{neighbour.csls:.3f}",
            f"{neighbour.cosine:.3f}",
            source.count(neighbour.source),
            "match" if neighbour.source == match else "",
        )
        for neighbour in nearest
    ]
    text = (
        "In the common space of both sides; CSLS is the cosine less the mean cosine of either "
        "token to its neighbours."
    )
    if subject.method in OWN_SPACE:
        text += f" Method '{subject.method}' matches in another space."
    return Section(title, text, ("token", "id", "CSLS", "cosine", "in the corpus", ""), rows)


def _frequency(subject: Subject, index: int) -> str:
    if subject.target.counts is None:
        return "not known: no token counts"
    count, total = int(subject.counts[index]), max(int(subject.counts.sum()), 1)
    return f"{count:,} of {total:,} target tokens, {count / total:.4%}"


def _shift(shift: float) -> str:
    if not shift:
        return "the head row is not moved"
    return f"the token is {np.exp(shift):.3g} times as frequent as the tokens of its head row"


def _weight(weight: float) -> str:
    return f"{weight:.3f}" if weight else ""


# --- A whole alignment --------------------------------------------------------------------------


def report(subject: Subject, count: int = 12) -> list[Section]:
    """Summarise an alignment: rules, scores, hubs, kinds of tokens, weak rows and examples."""
    alignment = subject.alignment
    frequent = most_frequent(subject.uncertain, subject.counts)
    weak = worst(subject.uncertain, subject.counts, alignment.scores)
    per_rule = max(1, count // 3)
    of_each_rule = [
        index
        for rule in Rule
        for index in examples(alignment.rules == rule, subject.counts, per_rule)
    ]
    return [
        _summary_section(subject),
        _rule_section(subject),
        Section(
            "Scores",
            "Uncertain rows by the score of their best match.",
            ("score", "rows", "of corpus", ""),
            _histogram(subject),
        ),
        *_hub_sections(subject),
        Section("Kinds of tokens", "Rows by rule.", *_kinds(subject)),
        _row_section(subject, "Most frequent uncertain rows", "", frequent[:count]),
        _row_section(
            subject,
            "Worst rows",
            "The lowest scores among the most frequent uncertain rows that make up "
            f"{USED_TEXT:.0%} of the uncertain text.",
            weak[:count],
        ),
        _row_section(
            subject,
            "Examples of each rule",
            "At even steps from the most frequent to the rarest.",
            of_each_rule,
        ),
    ]


def _summary_section(subject: Subject) -> Section:
    alignment, uncertain = subject.alignment, subject.uncertain
    text = (
        f"{alignment.target_size:,} target tokens ({subject.target.name}) made of "
        f"{alignment.source_size:,} source tokens ({subject.source.name}) by method "
        f"'{subject.method}'; {uncertain.sum():,} rows are uncertain"
    )
    if subject.has_counts:
        text += f", {_share(subject, uncertain):.2%} of the corpus"
    return Section("What is aligned", f"{text}.")


def _rule_section(subject: Subject) -> Section:
    used = [rule for rule in Rule if (subject.alignment.rules == rule).any()]
    text = "; ".join(f"{rule.name.lower()}: {DESCRIPTIONS.get(rule.name, '')}" for rule in used)
    header = ("rule", "rows", "of rows", "of corpus", "mean score", "")
    return Section("Rules", f"{text}.", header, _rules(subject))


def _hub_sections(subject: Subject) -> Iterator[Section]:
    alignment = subject.alignment
    uncertain = np.flatnonzero(subject.uncertain)
    heaviest = alignment.heaviest()[uncertain]
    yield from _hub_section(subject, "Hubs: heaviest source tokens", uncertain, heaviest)
    matched = np.flatnonzero((alignment.rules == Rule.SIMILAR) & (alignment.matches >= 0))
    yield from _hub_section(subject, "Hubs: matches", matched, alignment.matches[matched])


def _row_section(subject: Subject, title: str, text: str, ids: Iterable[int]) -> Section:
    header = ("token", "id", "rule", "count", "score", "match", "embedding made of")
    return Section(title, text, header, [_line(subject, index) for index in ids])


def most_frequent(chosen: np.ndarray, counts: Int[np.ndarray, "V_t"]) -> Int[np.ndarray, "c"]:
    """Return the ids of chosen tokens that are in the corpus (all if none is), by falling count."""
    ids = np.flatnonzero(chosen)
    ids = ids[np.argsort(-counts[ids], kind="stable")]
    seen = ids[counts[ids] > 0]
    return seen if len(seen) else ids


def worst(
    uncertain: np.ndarray, counts: Int[np.ndarray, "V_t"], scores: Float[np.ndarray, "V_t"]
) -> Int[np.ndarray, "c"]:
    """Return the uncertain ids that make up `USED_TEXT` of the text, by rising score."""
    ids = most_frequent(uncertain, counts)
    up_to, total = np.cumsum(counts[ids]), counts[ids].sum()
    if total:
        ids = ids[up_to - counts[ids] < USED_TEXT * total]
    return ids[np.argsort(scores[ids], kind="stable")]


def examples(chosen: np.ndarray, counts: Int[np.ndarray, "V_t"], count: int) -> list[int]:
    """Return `count` chosen ids at even steps from the most frequent to the rarest."""
    ids = most_frequent(chosen, counts)
    steps = np.linspace(0, len(ids) - 1, min(count, len(ids))).astype(int)
    return ids[steps].tolist()


class Hub(NamedTuple):
    """A source token that many rows point at.

    Attributes:
      rows: number of these rows.
      pointing: their target tokens, by falling count.
    """

    source: int
    rows: int
    pointing: list[int]


def hubs(
    targets: Int[np.ndarray, "n"], pointed_at: Int[np.ndarray, "n"], counts: Int[np.ndarray, "V_t"]
) -> list[Hub]:
    """Return the `HUBS` source tokens that most target tokens point at, in descending order."""
    sources, rows = np.unique(pointed_at, return_counts=True)
    order = np.argsort(-rows, kind="stable")[:HUBS]
    by_count = np.argsort(-counts[targets], kind="stable")
    targets, pointed_at = targets[by_count], pointed_at[by_count]
    return [
        Hub(source, number, targets[pointed_at == source].tolist())
        for source, number in zip(sources[order].tolist(), rows[order].tolist())
    ]


def _hub_section(
    subject: Subject, title: str, targets: np.ndarray, pointed_at: np.ndarray
) -> Iterator[Section]:
    """Yield a table of hubs, if there are any."""
    rows: list[Sequence[Cell]] = [
        (
            subject.source.show(hub.source),
            f"{hub.rows:,}",
            f"{hub.rows / len(targets):.2%}",
            _joined([subject.target.show(i) for i in hub.pointing[:5]]),
        )
        for hub in hubs(targets, pointed_at, subject.counts)
    ]
    if rows:
        share = scoring.hub_share(pointed_at, HUBS)
        text = f"{share:.1%} of {len(targets):,} rows point at {HUBS} source tokens (hub share)."
        header = ("source token", "rows", "of these", "most frequent that point at it")
        yield Section(title, text, header, rows)


def _rules(subject: Subject) -> list[Sequence[Cell]]:
    alignment, rows = subject.alignment, []
    for rule in Rule:
        chosen = alignment.rules == rule
        if chosen.any():
            share = _share(subject, chosen) if subject.has_counts else float(chosen.mean())
            rows.append(
                (
                    rule.name.lower(),
                    f"{chosen.sum():,}",
                    f"{chosen.mean():.1%}",
                    f"{share:.2%}" if subject.has_counts else "",
                    f"{alignment.scores[chosen].mean():.2f}",
                    Bar(share),
                )
            )
    return rows


def histogram(scores: Float[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """Return the bin of each score: `BINS` of equal width over [0, 1], clipped."""
    return np.clip((scores * BINS).astype(int), 0, BINS - 1)


def _histogram(subject: Subject) -> list[Sequence[Cell]]:
    alignment, uncertain, rows = subject.alignment, subject.uncertain, []
    bins = np.where(alignment.matches >= 0, histogram(alignment.scores), -1)
    for index in range(-1, BINS):
        chosen = (bins == index) & uncertain
        name = "no match" if index < 0 else f"{index / BINS:.1f} to {(index + 1) / BINS:.1f}"
        share = _share(subject, chosen) if subject.has_counts else float(chosen.mean())
        rows.append((name, f"{chosen.sum():,}", share))
    largest = max(share for *_, share in rows) or 1
    return [
        (name, count, f"{share:.2%}" if subject.has_counts else "", Bar(share / largest))
        for name, count, share in rows
    ]


def _kinds(subject: Subject) -> tuple[Sequence[str], list[Sequence[Cell]]]:
    """Return header and rows of a table of kinds by rules."""
    alignment, target = subject.alignment, subject.target
    kinds = np.array([KINDS.index(target.kind(i)) for i in range(alignment.target_size)])
    rules = [rule for rule in Rule if (alignment.rules == rule).any()]
    rows = []
    for index, name in enumerate(KINDS):
        chosen = kinds == index
        if chosen.any():
            numbers = [f"{(chosen & (alignment.rules == rule)).sum():,}" for rule in rules]
            share = f"{_share(subject, chosen):.2%}" if subject.has_counts else ""
            ids = [i for i in examples(chosen, subject.counts, 4) if target.spelled[i]]
            rows.append((name, *numbers, share, _joined(map(target.show, ids))))
    return ("kind", *(rule.name.lower() for rule in rules), "of corpus", "such as"), rows


def _line(subject: Subject, index: int) -> Sequence[Cell]:
    """Return a target token's line in a table of rows."""
    alignment, index = subject.alignment, int(index)
    match = int(alignment.matches[index])
    weights = sorted(row(alignment.embedding, index).items(), key=lambda item: -item[1])
    mixture: list[str | Code] = []
    for source, weight in weights[:4]:
        mixture += [*([" "] if mixture else []), subject.source.show(source), f" {weight:.2f}"]
    return (
        subject.target.show(index),
        f"{index}",
        Rule(int(alignment.rules[index])).name.lower(),
        subject.target.count(index),
        f"{alignment.scores[index]:.2f}",
        subject.source.show(match) if match >= 0 else "",
        (*mixture, " …") if len(weights) > 4 else tuple(mixture),
    )


def _share(subject: Subject, chosen: np.ndarray) -> float:
    """Return the share of the corpus that the chosen target tokens make up."""
    return float(subject.counts[chosen].sum() / max(int(subject.counts.sum()), 1))


def _joined(tokens: Iterable[Code]) -> tuple[str | Code, ...]:
    return tuple(part for token in tokens for part in (token, " "))[:-1]
