"""Alignment methods, one function each, and the steps that they share.

All methods except `tokalign` and `random`, which follow the published ones, first match tokens of
the same bytes, and special tokens of the same role. They differ in all other tokens.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping, Sequence, Set
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from transformers import PreTrainedTokenizerBase

from tokalign_jax.alignment import alignment, combinations, matching, published, scoring, vectors
from tokalign_jax.alignment import lexicon as induction
from tokalign_jax.alignment.alignment import SURE, Alignment, Mixture, Rule
from tokalign_jax.alignment.vectors import Vectors
from tokalign_jax.config import AlignmentConfig, Config
from tokalign_jax.text import canonical, special_tokens
from tokalign_jax.text.special_tokens import Counterpart
from tokalign_jax.text.tokenizing import TokenShards, end_of_text_id
from tokalign_jax.utils.progress import Log

SUMMARY_FILE = "summary.json"
NEED_VECTORS = frozenset({"composed", "tokalign", "lexicon", "topk", "focus"})
"""Methods that read token vectors; none are computed for the others."""
NO_VECTORS = Vectors(np.zeros(0, np.int32), np.zeros((0, 1), np.float32))
ROLES = ("eos", "bos", "pad", "unk", "sep", "cls", "mask")
"""Roles of special tokens; a token with several roles counts for the first."""
FEWEST_SHARED = 32
"""Fewest shared tokens with vectors that matching by co-occurrence needs."""

# Weights in the mixture of a co-occurrence match and the pieces of the token. A match alone is
# worse than the pieces alone (docs/results/alignment.md).
MATCH_WEIGHT_EMBEDDING = 0.25
"""Weight of the match in the embedding row, times its similarity."""
MATCH_WEIGHT_HEAD = 0.25
"""Weight of the match in the head row, times its similarity."""
PIECE_DECAY = 0.5
"""Weight of a piece in the embedding row, relative to the next piece: the last piece predicts best
what follows."""
LEAST_SHARE = 1e-4
"""Smallest weight in the mixtures of `topk`."""


class Donor(NamedTuple):
    """Rows of a model with the target vocabulary, for method `omp`; some tokens may have none."""

    embedding: Float[np.ndarray, "R D"]
    head: Float[np.ndarray, "R D"]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Input of an alignment method."""

    config: AlignmentConfig
    source_tokenizer: PreTrainedTokenizerBase
    target_tokenizer: PreTrainedTokenizerBase
    source_counts: Int[np.ndarray, "V_s"]
    target_counts: Int[np.ndarray, "V_t"]
    """Occurrences of each token in the corpus."""
    seed: int
    log: Log
    source: Vectors = NO_VECTORS
    target: Vectors = NO_VECTORS
    """Token vectors; empty for methods that need none."""
    known_spelling: "Spelled | None" = None
    """The result of `spell`, if it was computed before."""
    donor: Donor | None = None

    @cached_property
    def spelled(self) -> "Spelled":
        """Spelling of the target tokens with source tokens."""
        return self.known_spelling or spell(self.source_tokenizer, self.target_tokenizer)

    @cached_property
    def source_size(self) -> int:
        """V_s: tokens of the source tokenizer; the model's matrices may have more rows."""
        return canonical.vocabulary_size(self.source_tokenizer)

    @cached_property
    def target_size(self) -> int:
        """V_t: tokens of the target tokenizer."""
        return canonical.vocabulary_size(self.target_tokenizer)


class CooccurrenceMatches(NamedTuple):
    """The best source token of each target token by co-occurrence."""

    matches: Int[np.ndarray, "V_t"]
    """int32: the best source token; -1 for tokens without a vector."""
    scores: Float[np.ndarray, "V_t"]
    """float32: its calibrated similarity, from 0 to 1."""
    measured: dict[str, float]
    """`accuracy_at_1`: share of validation pairs matched correctly; empty without matches."""


class Spelled(NamedTuple):
    """Spelling of target tokens with source tokens, from bytes and roles alone."""

    parts: list[list[int]]
    """Source tokens that spell each target token, in order: one if it is exact or special, none if
    no source tokens spell it.
    """
    rules: UInt8[np.ndarray, "V_t"]
    """EXACT, SPECIAL, UNWRITTEN, PIECES or MEAN."""

    @property
    def exact(self) -> dict[int, int]:
        """Source id by target id for tokens of the same bytes."""
        return {i: self.parts[i][0] for i in np.flatnonzero(self.rules == Rule.EXACT).tolist()}


# --- The stage ----------------------------------------------------------------------------------


def run(
    config: Config,
    corpus_folder: Path,
    tokens_folder: Path,
    source_tokenizer: PreTrainedTokenizerBase,
    target_tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    log: Log,
    donor: Donor | None = None,
    subset_ids: Int[np.ndarray, "V_t"] | None = None,
) -> dict[str, Any]:
    """Make the alignment, or read `config.alignment.file`, and write it to `folder`.

    Args:
      config: the run's configuration.
      corpus_folder: written by `text.corpus.run`; its held-out lines are scored.
      tokens_folder: written by `text.tokenizing.run`.
      source_tokenizer: the source tokenizer.
      target_tokenizer: the target tokenizer.
      folder: receives the alignment.
      log: receives progress and a summary.
      donor: a model with the target vocabulary, for method `omp`.
      subset_ids: source token of each target token, if the target vocabulary is a subset of the
        source's; `config.alignment.method` then has no effect.

    Returns:
      The summary of the alignment.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source, target = (TokenShards.open(tokens_folder / side) for side in ("source", "target"))
    measured: dict[str, Any] = {}
    method = "file" if config.alignment.file else config.alignment.method
    if subset_ids is not None:
        method, aligned = "prune", subset(source_tokenizer, target_tokenizer, subset_ids)
    elif method == "file":
        aligned = alignment.load(Path(config.alignment.file), source_tokenizer, target_tokenizer)
        log(f"alignment: taken from {config.alignment.file}")
    else:
        inputs = Inputs(
            config.alignment,
            source_tokenizer,
            target_tokenizer,
            source.counts,
            target.counts,
            config.seed,
            log,
            donor=donor,
        )
        aligned, measured = _make_with_vectors(inputs, source, target, folder)
    alignment.save(aligned, folder)
    result = {"method": method, **alignment.summary(aligned, target.counts), **measured}
    # The others do not match special tokens by role, or come from a file that may match otherwise.
    if method not in ("file", "prune", "tokalign", "random"):
        result["special"] = special_rows(source_tokenizer, target_tokenizer)
    lines = scoring.held_out_lines(corpus_folder, scoring.BLEU_LINES, config.seed)
    result["bleu_1"] = scoring.score(aligned.heaviest(), source_tokenizer, target_tokenizer, lines)
    (folder / SUMMARY_FILE).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for line in alignment.describe(result):
        log(line)
    return result


def _make_with_vectors(
    inputs: Inputs, source: TokenShards, target: TokenShards, folder: Path
) -> tuple[Alignment, dict[str, Any]]:
    """Return the alignment and its measurements; compute and save token vectors if needed."""
    config = inputs.config
    if config.method not in NEED_VECTORS:
        return make(inputs)
    if config.method == "tokalign":
        config = dataclasses.replace(config, vectors="glove")
    shared = pairs(inputs.spelled.exact)
    source_vectors, target_vectors, measured = vectors.make(
        config, source, target, inputs.seed, inputs.log, shared, folder
    )
    vectors.save(folder, source_vectors, target_vectors)
    inputs = dataclasses.replace(
        inputs, source=source_vectors, target=target_vectors, known_spelling=inputs.spelled
    )
    aligned, method_measured = make(inputs)
    return aligned, method_measured | measured


def make(inputs: Inputs) -> tuple[Alignment, dict[str, float]]:
    """Return the alignment by `inputs.config.method`, and its measurements by name."""
    return METHODS[inputs.config.method](inputs)


# --- Methods ------------------------------------------------------------------------------------


def composed(inputs: Inputs) -> tuple[Alignment, dict[str, float]]:
    """Mix the pieces of each token with its match by co-occurrence.

    Head rows are corrected for frequency.
    """
    parts, rules = inputs.spelled
    nearest = similar_matches(inputs)
    similar = (
        ~np.isin(rules, SURE)
        & (nearest.matches >= 0)
        & (nearest.scores >= inputs.config.similarity_threshold)
    )
    embedding, head = mix(
        parts, np.where(similar, nearest.matches, -1), nearest.scores, inputs.source_size
    )
    aligned = _assembled(
        inputs, embedding, head, np.where(similar, np.uint8(Rule.SIMILAR), rules), nearest
    )
    return shifted(inputs, aligned), nearest.measured


def tokalign(inputs: Inputs) -> tuple[Alignment, dict[str, float]]:
    """Match as TokAlign does as published (`published.py`), the baseline for the other methods.

    Tokens of the same string, special ones included, are matched; all others with a vector go to
    the argmax of the relative vectors; tokens without a vector get a random source token. Two
    differences: draws are seeded, and they are over the V_s tokens, without the padding of the
    matrix.
    """
    rng = np.random.default_rng(inputs.seed)
    same = published.same_string(inputs.source_tokenizer, inputs.target_tokenizer)
    shared = vectors.shared_rows(inputs.source.ids, inputs.target.ids, pairs(same))
    pivots = shared[rng.permutation(len(shared))[: inputs.config.pivots]]
    ids, rules = (
        rng.integers(inputs.source_size, size=inputs.target_size),
        np.full(inputs.target_size, Rule.RANDOM),
    )
    nearest = _no_matches(inputs)
    if len(pivots):
        best, cosines = published.match(inputs.source.vectors, inputs.target.vectors, pivots)
        nearest.matches[inputs.target.ids], nearest.scores[inputs.target.ids] = (
            inputs.source.ids[best],
            cosines,
        )
        ids = np.where(nearest.matches >= 0, nearest.matches, ids)
        rules[inputs.target.ids] = Rule.SIMILAR
    else:
        inputs.log(
            "matching: no shared tokens have vectors; tokens without an equal string get random "
            "source tokens"
        )
    special = canonical.special_ids(inputs.target_tokenizer)
    for target, source in same.items():
        ids[target], rules[target] = source, Rule.SPECIAL if target in special else Rule.EXACT
    return _one_to_one(inputs, ids, rules, nearest), {}


def lexicon(inputs: Inputs) -> tuple[Alignment, dict[str, float]]:
    """Match every token that has a vector to one source token by a self-learned orthogonal map.

    The method is that of `lexicon.py`; tokens without a vector are the mean of their pieces.
    """
    nearest = _no_matches(inputs)
    if split := split_shared(inputs):
        seeds, validation = split
        neighbours = inputs.config.neighbours
        keys, queries, joined = induction.common_space(
            inputs.source.vectors, inputs.target.vectors, seeds, neighbours
        )
        best = matching.retrieve(keys, queries, validation, neighbours)
        nearest = token_matches(inputs, best)
        inputs.log(
            f"lexicon: {len(seeds):,} shared tokens and {len(joined):,} other pairs; "
            f"{_accuracy(best, validation)}"
        )
    similar = ~np.isin(inputs.spelled.rules, SURE) & (nearest.matches >= 0)
    matched = np.flatnonzero(similar)
    mixture = else_pieces(inputs, matched, nearest.matches[matched], np.ones(len(matched)))
    rules = np.where(similar, Rule.SIMILAR, inputs.spelled.rules)
    return _assembled(inputs, mixture, mixture, rules, nearest), nearest.measured


def topk(inputs: Inputs) -> tuple[Alignment, dict[str, float]]:
    """Mix the `top_k` nearest source tokens by CSLS with softmax weights.

    The temperature is chosen on the validation pairs. Below the similarity threshold a token is the
    mean of its pieces. Head rows are corrected for frequency.
    """
    nearest, near, shares = _no_matches(inputs), np.zeros((0, 1), np.int32), np.zeros((0, 1))
    if split := split_shared(inputs):
        pivots, validation = split
        config, k = inputs.config, min(inputs.config.top_k, len(inputs.source.ids))
        best = matching.match(
            inputs.source.vectors, inputs.target.vectors, pivots, validation, config.neighbours, k
        )
        temperature = matching.temperature(best, validation)
        near, shares = (
            inputs.source.ids[best.source],
            matching.softmax_weights(best.scores, temperature),
        )
        nearest = token_matches(inputs, best)
        nearest.measured["temperature"] = temperature
        inputs.log(f"top {k}: temperature {temperature:.3g}; {_accuracy(best, validation)}")
    similar = ~np.isin(inputs.spelled.rules, SURE) & (nearest.matches >= 0)
    similar &= nearest.scores >= inputs.config.similarity_threshold
    row, place = np.nonzero(similar[inputs.target.ids[: len(near)], None] & (shares > LEAST_SHARE))
    mixture = else_pieces(inputs, inputs.target.ids[row], near[row, place], shares[row, place])
    rules = np.where(similar, Rule.SIMILAR, inputs.spelled.rules)
    return shifted(inputs, _assembled(inputs, mixture, mixture, rules, nearest)), nearest.measured


def focus(inputs: Inputs) -> tuple[Alignment, dict[str, float]]:
    """Mix shared tokens as FOCUS does: by the sparsemax of their cosines to the token.

    Dobler & de Melo 2023 (arXiv 2305.14481), with two deviations: cosines are those of this
    project's vectors of the target tokens, or of `alignment.target_vectors`, instead of fastText
    vectors trained on the tokenized text; and a token without a vector is the mean of its pieces
    instead of a random draw.
    """
    vector_rows = dict(zip(inputs.target.ids.tolist(), range(len(inputs.target.ids))))
    shared = [
        (source, vector_rows[target])
        for target, source in inputs.spelled.exact.items()
        if target in vector_rows
    ]
    unmatched = inputs.target.ids[~np.isin(inputs.spelled.rules[inputs.target.ids], SURE)]
    if not shared:
        inputs.log(
            "focus: no shared tokens have vectors; tokens without an exact match are the mean of "
            "their pieces"
        )
        unmatched = unmatched[:0]
    rows = inputs.target.vectors[[vector_rows[i] for i in unmatched.tolist()]]
    sources = np.array([source for source, _ in shared], np.int64)
    mixed = combinations.focus(rows, inputs.target.vectors[[place for _, place in shared]])
    return _combined(inputs, unmatched, sources, {"embedding": mixed, "head": mixed}), {}


def omp(inputs: Inputs) -> tuple[Alignment, dict[str, float]]:
    """Combine shared tokens as in a donor model, by orthogonal matching pursuit.

    Goddard & Fernandes Neto 2025; mergekit-tokensurgeon. The donor's embedding gives the weights
    for the source's embedding, its head those for the head. Weights may be negative.
    """
    assert inputs.donor is not None
    size = min(map(len, inputs.donor))
    usable = alignment.finite_rows(inputs.donor.embedding[:size]) & alignment.finite_rows(
        inputs.donor.head[:size]
    )
    exact = [
        (target, source)
        for target, source in inputs.spelled.exact.items()
        if target < size and usable[target]
    ]
    targets, sources = np.array(exact, np.int64).reshape(-1, 2).T
    unmatched = (
        np.flatnonzero(usable & ~np.isin(inputs.spelled.rules[:size], SURE))
        if exact
        else np.zeros(0, np.int64)
    )
    combined = {}
    for side, rows in inputs.donor._asdict().items():
        inputs.log(
            f"omp: {len(unmatched):,} target tokens as combinations of {inputs.config.atoms} of "
            f"{len(exact):,} shared ones ({side})"
        )
        combined[side] = combinations.omp(rows[unmatched], rows[targets], inputs.config.atoms)
    return _combined(inputs, unmatched, sources, combined), {}


def pieces(inputs: Inputs) -> tuple[Alignment, dict[str, float]]:
    """Take exact matches, and otherwise the mean of the pieces for both matrices (FVT).

    Gee et al. 2022, Fast Vocabulary Transfer (arXiv 2402.09977). Beyond the paper, special tokens
    follow their roles. It needs no corpus.
    """
    none = np.zeros(0, np.int64)
    mixture = else_pieces(inputs, none, none, np.zeros(0))
    return _assembled(inputs, mixture, mixture, inputs.spelled.rules, _no_matches(inputs)), {}


def exact(inputs: Inputs) -> tuple[Alignment, dict[str, float]]:
    """Take exact matches and roles, and otherwise a random source token: a baseline."""
    ids = np.random.default_rng(inputs.seed).integers(inputs.source_size, size=inputs.target_size)
    drawn = np.flatnonzero(~np.isin(inputs.spelled.rules, SURE))
    mixture = else_pieces(inputs, drawn, ids[drawn], np.ones(len(drawn)))
    rules = inputs.spelled.rules.copy()
    rules[drawn] = Rule.RANDOM
    return _assembled(inputs, mixture, mixture, rules, _no_matches(inputs)), {}


def random(inputs: Inputs) -> tuple[Alignment, dict[str, float]]:
    """Match every target token to a random source token: the lowest baseline."""
    ids = np.random.default_rng(inputs.seed).integers(inputs.source_size, size=inputs.target_size)
    rules = np.full(inputs.target_size, Rule.RANDOM)
    return _one_to_one(inputs, ids, rules, _no_matches(inputs)), {}


METHODS: Mapping[str, Callable[[Inputs], tuple[Alignment, dict[str, float]]]] = {
    "distilled": pieces,
    "composed": composed,
    "tokalign": tokalign,
    "lexicon": lexicon,
    "topk": topk,
    "focus": focus,
    "omp": omp,
    "token_distillation": pieces,
    "pieces": pieces,
    "exact": exact,
    "random": random,
}
"""Methods by their names in `AlignmentConfig.method`."""


# --- Exact matches and pieces -------------------------------------------------------------------


def spell(
    source_tokenizer: PreTrainedTokenizerBase,
    target_tokenizer: PreTrainedTokenizerBase,
    avoid: Set[int] = frozenset(),
) -> Spelled:
    """Match tokens by bytes and by role, and spell all others with source tokens.

    Args:
      source_tokenizer: the source tokenizer.
      target_tokenizer: the target tokenizer.
      avoid: source tokens that must not be used.
    """
    exact = exact_matches(source_tokenizer, target_tokenizer, avoid)
    special = special_matches(source_tokenizer, target_tokenizer, avoid)
    sure = exact | {i: match.token for i, match in special.items()}
    size = canonical.vocabulary_size(target_tokenizer)
    parts = [[sure[i]] if i in sure else [] for i in range(size)]
    others = [i for i in range(size) if i not in sure]
    for i, pieces in zip(others, cut(source_tokenizer, target_tokenizer, others, avoid)):
        parts[i] = pieces
    rules = np.array([Rule.PIECES if pieces else Rule.MEAN for pieces in parts], np.uint8)
    unwritten = canonical.unwritten_ids(target_tokenizer) - set(sure)
    for rule, ids in ((Rule.EXACT, exact), (Rule.SPECIAL, special), (Rule.UNWRITTEN, unwritten)):
        rules[list(ids)] = rule
    return Spelled(parts, rules)


def cut(
    source_tokenizer: PreTrainedTokenizerBase,
    target_tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    avoid: Set[int] = frozenset(),
) -> list[list[int]]:
    """Spell each of these target tokens with source tokens, none of them in `avoid`."""
    contents = canonical.token_bytes(target_tokenizer)
    cutter = canonical.PieceCutter(source_tokenizer, avoid)
    return cutter.cut_all([_text_bytes(target_tokenizer, contents, i) for i in ids])


def exact_matches(
    source_tokenizer: PreTrainedTokenizerBase,
    target_tokenizer: PreTrainedTokenizerBase,
    avoid: Set[int] = frozenset(),
) -> dict[int, int]:
    """Match tokens whose canonical bytes are equal.

    Of several tokens of the same bytes, those that the tokenizers write are matched with each
    other, as are those that they never write (`canonical.unwritten_ids`); a token of the same name
    is preferred.

    Returns:
      Source id by target id.
    """
    sources = {
        c: [j for j in ids if j not in avoid]
        for c, ids in canonical.ids_by_bytes(source_tokenizer).items()
    }
    unwritten_sources = canonical.unwritten_ids(source_tokenizer)
    unwritten_targets = canonical.unwritten_ids(target_tokenizer)
    source_names, target_names = (
        canonical.spelled(source_tokenizer),
        canonical.spelled(target_tokenizer),
    )
    matches = {}
    for i, content in enumerate(canonical.token_bytes(target_tokenizer)):
        alike = [
            j
            for j in sources.get(content or b"", ())
            if (j in unwritten_sources) == (i in unwritten_targets)
        ]
        if alike:
            matches[i] = min(alike, key=lambda j: source_names[j] != target_names[i])
    return matches


def pairs(matches: Mapping[int, int]) -> Int[np.ndarray, "S 2"]:
    """Convert matches (source id by target id) to rows (source, target), int32."""
    return np.array([(source, target) for target, source in matches.items()], np.int32).reshape(
        -1, 2
    )


def special_matches(
    source_tokenizer: PreTrainedTokenizerBase,
    target_tokenizer: PreTrainedTokenizerBase,
    avoid: Set[int] = frozenset(),
) -> dict[int, Counterpart]:
    """Match special tokens of the target that have a counterpart in the source.

    First by name (`special_tokens.counterparts`), so that `<|endoftext|>` takes the rows of
    `<|endoftext|>` whatever roles both have; then by role. A role whose token is also text (`!` as
    pad) makes nothing special, in the source or in the target. An added token that only the source
    flags as special takes the rows of the special token.

    Returns:
      Source token by target id.
    """
    matches = {}
    names = {
        str(source_tokenizer.convert_ids_to_tokens(i))
        for i in canonical.special_ids(source_tokenizer)
    }
    added = {
        i for i, token in target_tokenizer.added_tokens_decoder.items() if token.content in names
    }
    ids = sorted(canonical.special_ids(target_tokenizer) | added)
    by_name = special_tokens.counterparts(ids, target_tokenizer, source_tokenizer)
    for i in ids:
        for match in (by_name.get(i), *_same_role(i, source_tokenizer, target_tokenizer)):
            if match is not None and match.token not in avoid:
                matches.setdefault(i, match)
    return matches


def _same_role(
    index: int, source_tokenizer: PreTrainedTokenizerBase, target_tokenizer: PreTrainedTokenizerBase
) -> list[Counterpart]:
    """List the source token of the target token's first role, then the source's end of text.

    A source token that starts or ends turns stands for eos alone (SmolLM2's bos is `<|im_start|>`).
    The list is empty if the target token has no role.
    """
    role = next(
        (role for role in ROLES if getattr(target_tokenizer, f"{role}_token_id", None) == index),
        None,
    )
    if role is None:
        return []
    source = getattr(source_tokenizer, f"{role}_token_id", None)
    end = Counterpart(end_of_text_id(source_tokenizer), f"end of text, as the source has no {role}")
    in_chat = role != "eos" and special_tokens.is_of_chat(source_tokenizer, source)
    if in_chat or source not in canonical.special_ids(source_tokenizer):
        return [end]
    return [Counterpart(int(source), f"{role} of the source"), end]


def special_rows(
    source_tokenizer: PreTrainedTokenizerBase, target_tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """Describe every special target token and the source token of its rows.

    Keys: `token`, `id`, `source` ("" if the rows are made of pieces), `why`, and `in_chat_template`
    (whether the chat template writes it).
    """
    matches = special_matches(source_tokenizer, target_tokenizer)
    rows = []
    for i in sorted(canonical.special_ids(target_tokenizer) | set(matches)):
        token = str(target_tokenizer.convert_ids_to_tokens(i))
        source, why = matches.get(i, (None, "its text"))
        shown = "" if source is None else str(source_tokenizer.convert_ids_to_tokens(source))
        rows.append(
            {
                "token": token,
                "id": i,
                "source": shown,
                "why": why,
                "in_chat_template": special_tokens.in_chat_template(target_tokenizer, token),
            }
        )
    return rows


def _text_bytes(
    tokenizer: PreTrainedTokenizerBase, contents: Sequence[bytes | None], index: int
) -> bytes:
    """Return a token's bytes: for a special token its text, for an unused id nothing."""
    content = contents[index]
    if content is None and index in tokenizer.added_tokens_decoder:
        return str(tokenizer.added_tokens_decoder[index]).encode()
    return content or b""


# --- Matches by co-occurrence -------------------------------------------------------------------


def split_shared(inputs: Inputs) -> tuple[Int[np.ndarray, "P 2"], Int[np.ndarray, "J 2"]] | None:
    """Split rows (source, target) of shared tokens into pivots and validation pairs.

    Returns None if too few tokens are shared.
    """
    shared = vectors.shared_rows(inputs.source.ids, inputs.target.ids, pairs(inputs.spelled.exact))
    if len(shared) < FEWEST_SHARED:
        inputs.log(
            f"matching: only {len(shared)} shared tokens have vectors; tokens without an exact "
            "match are the mean of their pieces"
        )
        return None
    chosen, validation = matching.choose_pivots(
        shared[:, 0], shared[:, 1], len(shared), inputs.seed
    )
    return shared[chosen], shared[validation]


def similar_matches(inputs: Inputs) -> CooccurrenceMatches:
    """Match every target token with a vector by whitened relative vectors."""
    split = split_shared(inputs)
    if split is None:
        return _no_matches(inputs)
    best = matching.match(
        inputs.source.vectors, inputs.target.vectors, *split, inputs.config.neighbours
    )
    inputs.log(
        f"matching: {len(inputs.target.ids):,} target tokens, {len(split[0]):,} pivots; "
        f"{_accuracy(best, split[1])}"
    )
    return token_matches(inputs, best)


def token_matches(inputs: Inputs, best: matching.Matches) -> CooccurrenceMatches:
    """Convert matches of vector rows to matches of tokens."""
    nearest = _no_matches(inputs)
    nearest.matches[inputs.target.ids] = inputs.source.ids[best.source[:, 0]]
    nearest.scores[inputs.target.ids] = best.similarity
    return nearest._replace(measured={"accuracy_at_1": best.accuracy})


def _accuracy(best: matching.Matches, validation: Int[np.ndarray, "J 2"]) -> str:
    return f"of {len(validation):,} validation pairs {best.accuracy:.1%} are matched correctly"


def _no_matches(inputs: Inputs) -> CooccurrenceMatches:
    return CooccurrenceMatches(
        np.full(inputs.target_size, -1, np.int32), np.zeros(inputs.target_size, np.float32), {}
    )


# --- Mixtures -----------------------------------------------------------------------------------


def mix(
    parts: Sequence[Sequence[int]],
    matches: Int[np.ndarray, "V_t"],
    similarity: Float[np.ndarray, "V_t"],
    source_size: int,
) -> tuple[Mixture, Mixture]:
    """Return the mixtures of embedding rows and of head rows.

    Args:
      parts: source tokens that spell each target token; empty if none do.
      matches: source token matched by co-occurrence; -1 for none.
      similarity: calibrated similarity of the matches.
      source_size: V_s.
    """
    (rows, ids, following), size = _pieces(parts, source_size), len(parts)
    matched, unknown = matches >= 0, np.array([not pieces for pieces in parts])
    targets, sources = (
        np.append(rows, np.arange(size)),
        np.append(ids, np.where(matched, matches, source_size)),
    )
    mixtures = []
    for decay, match_weight in ((PIECE_DECAY, MATCH_WEIGHT_EMBEDDING), (1.0, MATCH_WEIGHT_HEAD)):
        share = np.where(
            matched, np.where(unknown, 1.0, match_weight * similarity.astype(np.float64)), 0.0
        )
        weights = decay**following
        weights = (1.0 - share)[rows] * weights / np.bincount(rows, weights)[rows]
        mixtures.append(
            alignment.mixture_of(targets, sources, np.append(weights, share), size, source_size)
        )
    return mixtures[0], mixtures[1]


def else_pieces(
    inputs: Inputs,
    targets: Int[np.ndarray, "E"],
    sources: Int[np.ndarray, "E"],
    weights: Float[np.ndarray, "E"],
) -> Mixture:
    """Make a mixture of these entries; a target token without entries is the mean of its pieces."""
    rows, ids, _ = _pieces(inputs.spelled.parts, inputs.source_size)
    spelled = ~np.isin(rows, targets)
    entries = (
        np.append(targets, rows[spelled]),
        np.append(sources, ids[spelled]),
        np.append(weights, np.ones(spelled.sum())),
    )
    return alignment.mixture_of(*entries, inputs.target_size, inputs.source_size)


def _pieces(
    parts: Sequence[Sequence[int]], source_size: int
) -> tuple[Int[np.ndarray, "P"], Int[np.ndarray, "P"], Int[np.ndarray, "P"]]:
    """List the pieces of all target tokens as (target token, source token, pieces after it).

    The source token is V_s, the mean of all rows, if no source tokens spell the target token.
    """
    spellings = [pieces or (source_size,) for pieces in parts]
    sizes = np.fromiter(map(len, spellings), np.int64, len(spellings))
    ids = np.fromiter(itertools.chain.from_iterable(spellings), np.int64, int(sizes.sum()))
    return (
        np.repeat(np.arange(len(spellings)), sizes),
        ids,
        np.repeat(np.cumsum(sizes), sizes) - np.arange(len(ids)) - 1,
    )


def shifted(inputs: Inputs, aligned: Alignment) -> Alignment:
    """Return the alignment with the frequencies that correct its head rows."""
    source, target = log_frequency(inputs.source_counts), log_frequency(inputs.target_counts)
    shift = frequency_shift(aligned, source, target)
    return dataclasses.replace(aligned, frequency_shift=shift, source_log_frequency=source)


def frequency_shift(
    aligned: Alignment, source: Float[np.ndarray, "V_s"], target: Float[np.ndarray, "V_t"]
) -> Float[np.ndarray, "V_t"]:
    """Return log frequency of each target token minus that of its head mixture, float32.

    It is 0 for exact and special tokens.
    """
    mixed = alignment.apply(aligned.head, source[:, None])[:, 0]
    exact = np.isin(aligned.rules, (Rule.EXACT, Rule.SPECIAL))
    return np.where(exact, 0.0, target - mixed).astype(np.float32)


def log_frequency(counts: Int[np.ndarray, "V"]) -> Float[np.ndarray, "V"]:
    """Return the log of each token's share of the corpus, float32; counts are smoothed by 0.5."""
    return np.log((counts + 0.5) / max(int(counts.sum()), 1)).astype(np.float32)


def _combined(
    inputs: Inputs,
    targets: Int[np.ndarray, "m"],
    sources: Int[np.ndarray, "S"],
    combined: Mapping[str, combinations.Combinations],
) -> Alignment:
    """Make the alignment in which `targets` are combinations of these source tokens."""
    none = np.zeros(0, np.int64)
    rest = else_pieces(inputs, none, none, np.zeros(0))
    embedding, head = (
        alignment.replaced(rest, targets[one.rows], sources[one.shared], one.weights)
        for one in (combined["embedding"], combined["head"])
    )
    nearest, rules = _no_matches(inputs), inputs.spelled.rules.copy()
    rules[targets] = Rule.SIMILAR
    nearest.scores[targets] = combined["embedding"].scores
    aligned = _assembled(inputs, embedding, head, rules, nearest)
    aligned.matches[targets] = aligned.heaviest()[targets]
    return aligned


def _one_to_one(
    inputs: Inputs,
    ids: Int[np.ndarray, "V_t"],
    rules: Int[np.ndarray, "V_t"],
    nearest: CooccurrenceMatches,
) -> Alignment:
    mixture = alignment.one_to_one(ids, inputs.source_size)
    return _assembled(inputs, mixture, mixture, rules, nearest)


def _assembled(
    inputs: Inputs,
    embedding: Mixture,
    head: Mixture,
    rules: Int[np.ndarray, "V_t"],
    nearest: CooccurrenceMatches,
) -> Alignment:
    """Make an alignment of these mixtures, without a frequency correction."""
    sure, unwritten = np.isin(rules, SURE), np.flatnonzero(rules == Rule.UNWRITTEN)
    if len(unwritten):
        head = alignment.with_mean(head, unwritten)
    return Alignment(
        embedding=embedding,
        head=head,
        rules=rules.astype(np.uint8),
        scores=np.where(sure, 1.0, nearest.scores).astype(np.float32),
        matches=np.where(sure, -1, nearest.matches).astype(np.int32),
        frequency_shift=np.zeros(inputs.target_size, np.float32),
        source_log_frequency=np.zeros(inputs.source_size, np.float32),
        source_fingerprint=canonical.fingerprint(inputs.source_tokenizer),
        target_fingerprint=canonical.fingerprint(inputs.target_tokenizer),
    )


def without(
    aligned: Alignment,
    unusable: Set[int],
    source_tokenizer: PreTrainedTokenizerBase,
    target_tokenizer: PreTrainedTokenizerBase,
    target_counts: Int[np.ndarray, "V_t"],
) -> Alignment:
    """Return the alignment with the source tokens `unusable` removed.

    If a mixture becomes empty, or its match is one of these tokens, the next rule applies: another
    exact or special match, the pieces without them, else the mean of all rows.
    """
    avoided, size = np.array(sorted(unusable), np.int64), aligned.target_size
    parts, rules = spell(source_tokenizer, target_tokenizer, unusable)
    lost = (aligned.rules == Rule.SIMILAR) & np.isin(aligned.matches, avoided)
    entries = {}
    for side in ("embedding", "head"):
        mixture: Mixture = getattr(aligned, side)
        rows, removed = (
            np.repeat(np.arange(size), np.diff(mixture.indptr)),
            np.isin(mixture.ids, avoided),
        )
        affected = np.bincount(rows[removed], minlength=size) > 0
        remaining = affected[rows] & ~removed & (mixture.weights > 0)
        lost |= affected & (np.bincount(rows[remaining], minlength=size) == 0)
        entries[side] = rows[remaining], mixture.ids[remaining], mixture.weights[remaining]
    spelled_rows, spelled_ids, _ = _pieces(parts, aligned.source_size)
    again, mixtures = lost[spelled_rows], {}
    for side, (rows, ids, weights) in entries.items():
        remaining = ~lost[rows]
        rows, ids = (
            np.append(rows[remaining], spelled_rows[again]),
            np.append(ids[remaining], spelled_ids[again]),
        )
        weights = np.append(weights[remaining].astype(np.float64), np.ones(again.sum()))
        weights /= np.bincount(rows, weights, minlength=size)[rows]
        mixtures[side] = alignment.replaced(getattr(aligned, side), rows, ids, weights)
    mixtures["head"] = alignment.with_mean(
        mixtures["head"], np.flatnonzero(lost & (rules == Rule.UNWRITTEN))
    )
    changed = dataclasses.replace(
        aligned,
        **mixtures,
        rules=np.where(lost, rules, aligned.rules).astype(np.uint8),
        scores=np.where(lost, np.isin(rules, SURE), aligned.scores).astype(np.float32),
        matches=np.where(np.isin(aligned.matches, avoided), -1, aligned.matches).astype(np.int32),
    )
    if not aligned.frequency_shift.any():
        return changed
    shift = frequency_shift(changed, aligned.source_log_frequency, log_frequency(target_counts))
    return dataclasses.replace(
        changed, frequency_shift=np.where(lost, shift, aligned.frequency_shift)
    )


def subset(
    source_tokenizer: PreTrainedTokenizerBase,
    target_tokenizer: PreTrainedTokenizerBase,
    source_ids: Int[np.ndarray, "V_t"],
) -> Alignment:
    """Make the alignment of a target vocabulary that is a subset of the source's."""
    none = np.zeros(0, np.int64)
    inputs = Inputs(
        AlignmentConfig(), source_tokenizer, target_tokenizer, none, none, 0, lambda line: None
    )
    rules = np.full(len(source_ids), Rule.EXACT)
    rules[sorted(canonical.special_ids(target_tokenizer))] = Rule.SPECIAL
    return _one_to_one(inputs, source_ids, rules, _no_matches(inputs))


def from_pieces(
    source_tokenizer: PreTrainedTokenizerBase, target_tokenizer: PreTrainedTokenizerBase
) -> Alignment:
    """Make the alignment by method `pieces`, which needs only the tokenizers."""
    none = np.zeros(0, np.int64)
    config = AlignmentConfig(method="pieces")
    return pieces(
        Inputs(config, source_tokenizer, target_tokenizer, none, none, 0, lambda line: None)
    )[0]
