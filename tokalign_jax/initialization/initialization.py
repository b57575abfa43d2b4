"""Parameters for the new vocabulary from an alignment and the source's parameters.

Only the rows of embedding and head change, except in learned starts that also train the body.

The mean of a token's pieces predicts it as often as its pieces, while most tokens of a large
vocabulary are rare and compete with frequent ones. Head rows are therefore shifted along the slope
of the source's own rows with log frequency, by how much rarer the token is than its mixture.
Measured (llama-en16k -> Qwen3's vocabulary, exact matches and mean of pieces, counts of 5.4M
tokens; bits per byte of the start, en / code / math / other): 2.167 / 1.955 / 2.081 / 4.427
without, 1.916 / 1.670 / 1.826 / 4.008 with the shift.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int
from transformers import PreTrainedTokenizerBase

from tokalign_jax.alignment import alignment, methods
from tokalign_jax.alignment.alignment import Alignment, Rule
from tokalign_jax.config import Config, distillation_budget
from tokalign_jax.evaluation.bits_per_byte import first_context
from tokalign_jax.initialization import (
    calibration,
    composition,
    contexts,
    row_features,
    self_corpus,
    self_distillation,
    self_text,
    token_distillation,
    tuning,
    word_lists,
)
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.transformer import Params
from tokalign_jax.parallel import sharding
from tokalign_jax.text import canonical, pairs
from tokalign_jax.text.corpus import Document
from tokalign_jax.text.special_tokens import counterparts
from tokalign_jax.text.tokenizing import TokenShards
from tokalign_jax.training.cross_tokenizer import Models
from tokalign_jax.utils.progress import Log

MATRICES = (("embed_tokens", "embedding"), ("lm_head", "kernel"))
"""Paths of the vocabulary's matrices; a tied model has only the first."""
BLOCK = 4096
"""Rows changed at once, which bounds temporary memory."""
COMPOSED = (Rule.PIECES, Rule.SIMILAR)
"""Rules of composed tokens, which are spelled with source tokens but are not source tokens; their
rows can be learned."""


def initialize(
    config: ModelConfig,
    params: dict,
    aligned: Alignment,
    multiple_of: int = 1,
    num_frozen_rows: int = 0,
) -> tuple[ModelConfig, dict]:
    """Make rows of the new vocabulary as mixtures of source rows (TokAlign, step 4).

    Args:
      config: the source model's architecture.
      params: the source model's parameters, `embed_tokens/embedding` and (untied) `lm_head/kernel`
        of shape [V_source, D].
      aligned: mixtures of V_target rows over V_source tokens.
      multiple_of: the number of rows is padded to a multiple of it, with the mean of all rows.
      num_frozen_rows: leading rows that are copied from the source where they are finite: all
        V_source rows if the vocabulary is extended.

    Returns:
      The config with the new number of rows R, and parameters whose vocabulary matrices are [R, D],
      float32.
    """
    rows = sharding.to_host(params["embed_tokens"]["embedding"])
    new = dict(params)
    if "lm_head" in params:
        new["embed_tokens"] = {"embedding": alignment.apply(aligned.embedding, rows)}
        new["lm_head"] = {
            "kernel": head_rows(sharding.to_host(params["lm_head"]["kernel"]), aligned)
        }
    else:  # As the head: a wrong row costs more there than at the input.
        new["embed_tokens"] = {"embedding": head_rows(rows, aligned)}
    size = -(-aligned.target_size // multiple_of) * multiple_of
    for group, leaf in MATRICES:
        if group in new:
            table, old = (
                new[group][leaf],
                sharding.to_host(params[group][leaf], slice(num_frozen_rows)),
            )
            usable = np.flatnonzero(alignment.finite_rows(old))
            table[usable] = old[usable]
            if size > len(table):
                padding = np.repeat(table.mean(axis=0, keepdims=True), size - len(table), axis=0)
                new[group] = {leaf: np.concatenate([table, padding])}
    return dataclasses.replace(config, vocab_size=size), new


def head_rows(rows: Float[np.ndarray, "R D"], aligned: Alignment) -> Float[np.ndarray, "V_t D"]:
    """Mix the rows of the source's head (R >= V_source) and correct them for frequency, float32."""
    slope = frequency_slope(rows[: aligned.source_size], aligned.source_log_frequency)
    table = alignment.apply(aligned.head, rows)
    move(table, aligned.frequency_shift, slope)
    return table


def move(
    rows: Float[np.ndarray, "V D"], by: Float[np.ndarray, "V"], direction: Float[np.ndarray, "D"]
) -> None:
    """Add `by` times `direction` to the rows in place; rows with `by` = 0 are untouched."""
    moving = np.flatnonzero(by)
    for block in (moving[start : start + BLOCK] for start in range(0, len(moving), BLOCK)):
        rows[block] += by[block, None] * direction


def frequency_slope(
    rows: Float[np.ndarray, "V D"], log_frequency: Float[np.ndarray, "V"]
) -> Float[np.ndarray, "D"]:
    """Return the least-squares slope of rows with log frequency, float32.

    It is 0 if all tokens are equally frequent. Rows with NaN or infinity are ignored.
    """
    finite = alignment.finite_rows(rows)
    if not finite.all():
        rows, log_frequency = rows[finite], log_frequency[finite]
    centred = log_frequency.astype(np.float64) - log_frequency.mean(dtype=np.float64)
    blocks = [slice(start, start + BLOCK) for start in range(0, len(rows), BLOCK)]
    product = sum(centred[block] @ rows[block].astype(np.float64) for block in blocks)
    return (product / max(centred @ centred, 1e-9)).astype(np.float32)


class Side(NamedTuple):
    """A model, its parameters, its tokenizer and the text in its tokens."""

    config: ModelConfig
    params: Params
    tokenizer: PreTrainedTokenizerBase
    shards: TokenShards
    unusable: frozenset[int] = frozenset()
    """Tokens whose rows were not finite (`usable`); nothing is learned from them."""


def usable(params: Params, size: int) -> tuple[Params, frozenset[int]]:
    """Replace non-finite rows by the mean of the others.

    Some checkpoints have NaN in the rows of tokens that no text contains.

    Args:
      params: the model's parameters.
      size: tokens of the model's tokenizer; padding rows do not count for the mean.

    Returns:
      The parameters, and the tokens whose rows were replaced.
    """
    new, unusable = dict(params), frozenset()
    for group, leaf in MATRICES:
        if group in params:
            rows = jnp.asarray(params[group][leaf])
            finite = sharding.to_host(jax.jit(_finite)(rows))
            if not finite.all():
                new[group] = {leaf: jax.jit(_with_mean, static_argnames="size")(rows, size=size)}
                unusable |= frozenset(np.flatnonzero(~finite[:size]).tolist())
    return new, unusable


def _finite(rows: Float[Array, "R D"]) -> Bool[Array, "R"]:
    return jnp.isfinite(rows).all(axis=1)


def _with_mean(rows: Float[Array, "R D"], size: int) -> Float[Array, "R D"]:
    """Replace rows that are not finite by the mean of the finite ones among the first `size`."""
    finite = _finite(rows)
    counted = (finite & (jnp.arange(len(rows)) < size))[:, None]
    total = jnp.where(counted, rows, 0).sum(axis=0, dtype=jnp.float32)
    return jnp.where(finite[:, None], rows, (total / counted.sum()).astype(rows.dtype))


def read(
    config: Config, source: Side, target: Side, documents: Iterable[Document], mesh: Mesh, log: Log
) -> contexts.Reading:
    """Read text with the source model: mean states around the tokens of both vocabularies.

    Args:
      config: `initialization.tokens` source tokens are read.
      source: the source model.
      target: the model with the new vocabulary.
      documents: training documents, as `contexts.draw` chooses them.
      mesh: devices that read.
      log: receives progress and warnings.
    """
    places = contexts.find_places(
        documents, source.tokenizer, target.tokenizer, config.initialization.tokens, log
    )
    sizes = len(source.shards.counts), len(target.shards.counts)
    if not (places.last_target != contexts.NONE).any():
        log(
            "contexts: warning: no token of the target ends where one of the source ends, so that "
            "no row is learned from the source model's states"
        )
        return contexts.empty_reading(*sizes, source.config.hidden_size)
    params = sharding.place(source.params, mesh)
    dtype, opening = jnp.dtype(config.compute.dtype), source.shards.opening
    return contexts.read(source.config, params, places, *sizes, dtype, mesh, log, opening)


def learn(
    config: Config,
    source: Side,
    target: Side,
    aligned: Alignment,
    reading: contexts.Reading,
    log: Log,
    num_frozen_rows: int = 0,
) -> Params:
    """Move rows of composed tokens towards the regression fitted on the source's tokens.

    Rows of tokens that were not seen in context are unchanged: from pieces alone the regression
    predicts rows better than mixtures do, but gives more bits per byte.

    Args:
      config: `initialization.learned` is the step towards the regression, from 0 to 1.
      source: the source model.
      target: the model that `initialize` made of `source` by `aligned`.
      aligned: the alignment.
      reading: the result of `read`.
      log: receives progress.
      num_frozen_rows: leading rows that stay as they are.
    """
    composed = np.isin(aligned.rules, COMPOSED)
    composed[:num_frozen_rows] = False
    ids = np.flatnonzero(composed & (reading.target.counts > 0))
    parts = methods.cut(source.tokenizer, target.tokenizer, ids.tolist(), source.unusable)
    ids, parts = _spelled(ids, parts)
    fitted, fitted_parts = composition.binary_splits(
        source.tokenizer, source.shards.counts, source.unusable
    )
    new = dict(target.params)
    if len(ids) and len(fitted):
        frequency = [methods.log_frequency(side.shards.counts) for side in (source, target)]
        splits, pieces = (composition.Pieces.of(spelling) for spelling in (fitted_parts, parts))
        fitted_tokens = composition.Tokens(fitted, splits, frequency[0], reading.source)
        tokens = composition.Tokens(ids, pieces, frequency[1], reading.target)
        for path, rows in _source_rows(source, aligned):
            group, leaf = path.split("/")
            table = np.array(new[group][leaf], np.float32)
            for block, learned in composition.learned_rows(rows, fitted_tokens, tokens, reading):
                chosen = ids[block]
                table[chosen] += config.initialization.learned * (learned - table[chosen])
            new[group] = {leaf: table}
        log(
            f"composition: {len(ids):,} of {composed.sum():,} rows learned from {len(fitted):,} "
            "tokens"
        )
    return new


def _spelled(
    ids: Int[np.ndarray, "n"], parts: list[list[int]]
) -> tuple[Int[np.ndarray, "m"], list[list[int]]]:
    """Return the tokens that have pieces, and their pieces."""
    return ids[[bool(pieces) for pieces in parts]], [pieces for pieces in parts if pieces]


def _source_rows(
    source: Side, aligned: Alignment
) -> Iterator[tuple[str, Float[np.ndarray, "V_s D"]]]:
    """Yield the path and the float32 rows of each of the source's vocabulary matrices."""
    for group, leaf in MATRICES:
        if group in source.params:
            rows = sharding.to_host(source.params[group][leaf])[: aligned.source_size]
            yield f"{group}/{leaf}", rows.astype(np.float32)


def movable(
    source: PreTrainedTokenizerBase,
    target: PreTrainedTokenizerBase,
    aligned: Alignment,
    counts: Int[np.ndarray, "V_t"],
    num_frozen_rows: int = 0,
) -> Bool[np.ndarray, "V_t"]:
    """Return which rows a learned start may change: composed, and exact ones that occur in text.

    Frozen are special tokens, tokens that never occur in text, and the first `num_frozen_rows`.
    Exact tokens are frozen too if one vocabulary contains the other, since their use is the same.

    Args:
      source: the source tokenizer.
      target: the target tokenizer.
      aligned: the alignment.
      counts: how often each target token occurs in the text.
      num_frozen_rows: leading rows that stay as they are.
    """
    exact = (aligned.rules == Rule.EXACT) & (counts > 0) & (not _contains(source, target))
    moving = exact | np.isin(aligned.rules, (*COMPOSED, Rule.MEAN))
    moving[:num_frozen_rows] = False
    return moving


def _contains(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Return whether one of the vocabularies contains the other, special tokens aside."""
    texts, others = canonical.index_by_bytes(one).keys(), canonical.index_by_bytes(other).keys()
    return texts <= others or others <= texts


def calibrate(
    config: Config,
    source: Side,
    target: Side,
    aligned: Alignment,
    mesh: Mesh,
    num_frozen_rows: int = 0,
) -> Params:
    """Calibrate head rows to the frequencies of their tokens (`calibration.py`).

    Args:
      config: `initialization.calibration` scales the change; 0 is none.
      source: the source model.
      target: the model to calibrate.
      aligned: the alignment.
      mesh: devices that measure probabilities.
      num_frozen_rows: leading rows that stay as they are.
    """
    moving = movable(
        source.tokenizer, target.tokenizer, aligned, target.shards.counts, num_frozen_rows
    )
    if not config.initialization.calibration or not moving.any():
        return target.params
    dtype = jnp.dtype(config.compute.dtype)
    moves, direction = calibration.head_moves(
        target.config, target.params, target.shards, dtype, mesh, config.seed, ~moving
    )
    group, leaf = next(
        (group, leaf) for group, leaf in reversed(MATRICES) if group in target.params
    )
    moved = np.array(target.params[group][leaf], np.float32)
    move(moved[: len(moves)], config.initialization.calibration * moves, direction)
    return {**target.params, group: {leaf: moved}}


def tune(
    config: Config,
    source: Side,
    target: Side,
    aligned: Alignment,
    reading: contexts.Reading,
    mesh: Mesh,
    log: Log,
    num_frozen_rows: int = 0,
) -> tuning.Tuned:
    """Tune the `movable` rows by a linear map that they share (`tuning.py`).

    Nothing is tuned without composed tokens.

    Args:
      config: `initialization.tuning` is the number of tokens to train on, 0 for none.
      source: the source model.
      target: the result of `learn`.
      aligned: the alignment.
      reading: the result of `read`.
      mesh: devices that train.
      log: receives progress.
      num_frozen_rows: leading rows that stay as they are.
    """
    if (
        not config.initialization.tuning
        or not np.isin(aligned.rules[num_frozen_rows:], COMPOSED).any()
    ):
        return tuning.Tuned(target.params, {})
    moving = movable(
        source.tokenizer, target.tokenizer, aligned, target.shards.counts, num_frozen_rows
    )
    ids = np.flatnonzero(moving & (aligned.rules != Rule.MEAN))
    parts = methods.cut(source.tokenizer, target.tokenizer, ids.tolist(), source.unusable)
    ids, parts = _spelled(ids, parts)
    frequency = methods.log_frequency(target.shards.counts)
    tokens = composition.Tokens(ids, composition.Pieces.of(parts), frequency, reading.target)
    composed = np.isin(aligned.rules[ids], COMPOSED)
    budget, compute = config.initialization.tuning, config.compute
    return tuning.tune(
        target.config,
        target.params,
        dict(_source_rows(source, aligned)),
        tokens,
        composed,
        target.shards,
        budget,
        compute,
        mesh,
        log,
        config.seed,
    )


def distill(
    config: Config,
    source: Side,
    target: Side,
    aligned: Alignment,
    documents: Iterable[Document],
    mesh: Mesh,
    log: Log,
    num_frozen_rows: int = 0,
) -> self_distillation.Result:
    """Train `target` with the source model as teacher (`self_distillation.py`).

    Nothing changes where the source has every token. With frozen rows, as in an extension, the
    body is frozen too.

    Args:
      config: the run's configuration.
      source: the source model.
      target: the model that `initialize` made of `source` by `aligned`.
      aligned: the alignment.
      documents: training documents, as `contexts.draw` chooses them.
      mesh: devices that train.
      log: receives progress.
      num_frozen_rows: leading rows that stay as they are.
    """
    if not np.isin(aligned.rules[num_frozen_rows:], COMPOSED).any():
        return self_distillation.Result(target.params, {})
    budget, tokens = distillation_budget(config, aligned.source_size, aligned.target_size)
    source = source._replace(params=sharding.place(source.params, mesh))
    texts = _paired_texts(config, source, target, documents, budget, tokens, mesh, log)
    if not texts.written and not texts.corpus:
        log(
            "self-distillation: warning: there is no text to train on, so the model stays as it was"
            " before: raise initialization.generated_tokens or initialization.corpus_share"
        )
        return self_distillation.Result(target.params, {})

    tokens_seen = np.concatenate([pair.target for part in texts for pair in part])
    seen = np.bincount(tokens_seen, minlength=aligned.target_size)
    trains = "rows" if num_frozen_rows else config.initialization.trains
    moving = movable(source.tokenizer, target.tokenizer, aligned, seen, num_frozen_rows)
    composed = moving & np.isin(aligned.rules, COMPOSED)
    free = (composed if trains == "rows" else moving) & (seen > 0)
    rows = _trainable_rows(config, source, target, aligned, composed, free, mesh)
    models = Models(target.config, source.config, config.compute)
    return self_distillation.distill(
        config,
        models,
        target.params,
        source.params,
        rows,
        texts,
        tokens,
        trains,
        mesh,
        log,
    )


def _paired_texts(
    config: Config,
    source: Side,
    target: Side,
    documents: Iterable[Document],
    budget: int,
    tokens: int,
    mesh: Mesh,
    log: Log,
) -> self_distillation.Texts:
    """Return the texts of a distilled start for both models.

    The source writes them here even if the corpus has a part called `self`: that one has another
    size, and is split into training and held-out documents.

    Args:
      config: the run's configuration.
      source: the source model, its parameters on `mesh`.
      target: the model with the new vocabulary.
      documents: training documents.
      budget: tokens for the source model to write.
      tokens: target tokens to train on.
      mesh: devices that write.
      log: receives progress.
    """
    usable = canonical.special_ids(source.tokenizer) - source.unusable
    matches = counterparts(usable, source.tokenizer, target.tokenizer)
    special = {i: match.token for i, match in matches.items()}
    starts = first_context(source.tokenizer), first_context(target.tokenizer)
    pairing = pairs.Pairing(source.tokenizer, target.tokenizer, starts, special)
    dtype = jnp.dtype(config.compute.dtype)
    writer = self_text.Writer(
        source.config, source.params, source.tokenizer, dtype, mesh, config.seed
    )
    tokenizers = source.tokenizer, target.tokenizer
    passages = [*self_corpus.in_template(writer.write(budget, log, special), *tokenizers, special)]
    parts = [((piece, None),) for document in documents for piece in pairs.passages(document.text)]
    own = ("".join(segment.text for segment in passage) for passage in passages)
    words = word_lists.split_differently(*tokenizers, own)
    listed = round(self_distillation.LIST_SHARE * tokens)
    random = np.random.default_rng([config.seed, 9])
    lists = word_lists.draw(words, listed, pairing, random)
    log(
        f"word lists: {sum(len(pair.target) for pair in lists):,} tokens, of {len(words):,} words"
        " that the tokenizers split differently"
    )
    corpus = pairing.pair(parts) if config.initialization.corpus_share else []
    return self_distillation.Texts(pairing.pair(passages), corpus, lists)


def _trainable_rows(
    config: Config,
    source: Side,
    target: Side,
    aligned: Alignment,
    composed: Bool[np.ndarray, "V_t"],
    free: Bool[np.ndarray, "V_t"],
    mesh: Mesh,
) -> dict[str, self_distillation.Rows]:
    """Return the trainable rows of a distilled start by the path of their matrix.

    Args:
      config: the run's configuration.
      source: the source model, its parameters on `mesh`.
      target: the model with the new vocabulary.
      aligned: the alignment.
      composed: tokens whose rows the shared network changes.
      free: tokens whose rows have a change of their own.
      mesh: devices that read the tokens' pieces.
    """
    ids = np.flatnonzero(composed)
    parts = methods.cut(source.tokenizer, target.tokenizer, ids.tolist(), source.unusable)
    ids, parts = _spelled(ids, parts)
    dtype, start = jnp.dtype(config.compute.dtype), first_context(source.tokenizer)
    states = row_features.last_piece_states(source.config, source.params, parts, start, dtype, mesh)
    contents = canonical.token_bytes(target.tokenizer)
    sizes = np.array([len(content or b"") for content in contents])[ids]
    rows = {}
    for path, table in _source_rows(source, aligned):
        features = row_features.features(table, parts, sizes, states, config.seed, dtype)
        deviation = float(np.sqrt(np.var(table, axis=0).mean()))
        rows[path] = self_distillation.Rows(ids, features, free, deviation)
    return rows


def distill_tokens(
    config: Config,
    source: Side,
    target: Side,
    aligned: Alignment,
    documents: Iterable[Document],
    mesh: Mesh,
    log: Log,
    num_frozen_rows: int = 0,
) -> token_distillation.Result:
    """Learn input rows of composed tokens by Token Distillation (`token_distillation.py`).

    Args:
      config: the run's configuration.
      source: the source model.
      target: the model that `initialize` made of `source` by `aligned`.
      aligned: the alignment.
      documents: training documents, as `contexts.draw` chooses them.
      mesh: devices that train.
      log: receives progress.
      num_frozen_rows: leading rows that stay as they are.

    Returns:
      All rows of the target's input embedding.
    """
    settings = config.initialization.token_distillation
    rows = np.array(target.params["embed_tokens"]["embedding"], np.float32)
    composed = np.isin(aligned.rules, COMPOSED)
    composed[:num_frozen_rows] = False
    finder = token_distillation.Finder(
        source.tokenizer,
        target.tokenizer,
        np.flatnonzero(composed),
        aligned.source_size,
        first_context(source.tokenizer),
    )
    snippets = finder.find(documents, settings)
    if not len(snippets.original):
        log("token distillation: no new token is in the text; rows stay the mean of their pieces")
        return token_distillation.Result(rows, {})
    table = sharding.to_host(source.params["embed_tokens"]["embedding"], slice(aligned.source_size))
    result = token_distillation.train(
        source.config,
        {**source.params, "embed_tokens": {"embedding": table}},
        rows[finder.ids],
        snippets,
        settings,
        config.compute,
        mesh,
        log,
        config.seed,
    )
    rows[finder.ids] = result.rows
    return result._replace(rows=rows)


def random_rows(
    config: ModelConfig, params: dict, size: int, key: jax.Array, num_frozen_rows: int = 0
) -> tuple[ModelConfig, dict]:
    """Make a baseline of `size` rows from a normal distribution.

    Each column has the mean and the deviation of the source's; the first `num_frozen_rows` are
    copied from the source where they are finite.
    """

    def draw(rows: np.ndarray, key: jax.Array) -> np.ndarray:
        rows = sharding.to_host(rows)[: config.vocab_size].astype(np.float32)
        old, rows = rows[:num_frozen_rows], rows[alignment.finite_rows(rows)]
        noise = np.asarray(jax.random.normal(key, (size, rows.shape[1]), jnp.float32))
        drawn = rows.mean(axis=0) + rows.std(axis=0) * noise
        kept_rows = np.flatnonzero(alignment.finite_rows(old))
        drawn[kept_rows] = old[kept_rows]
        return drawn

    embed_key, head_key = jax.random.split(key)
    new = dict(params)
    new["embed_tokens"] = {"embedding": draw(params["embed_tokens"]["embedding"], embed_key)}
    if "lm_head" in params:
        new["lm_head"] = {"kernel": draw(params["lm_head"]["kernel"], head_key)}
    return dataclasses.replace(config, vocab_size=size), new
