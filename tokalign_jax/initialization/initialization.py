"""Parameters for the new vocabulary from an alignment and the source's parameters.

Only rows of the vocabulary change, except in the learned starts that train the body.

The mean of pieces is as likely as its pieces, while most tokens of a large vocabulary are rare, and
their rows compete with those of frequent tokens. So head rows are moved by how much rarer their
token is than its mixture, along the slope of the source's own rows with log frequency. Measured
(llama-en16k -> Qwen3's vocabulary, exact matches and mean of pieces, counts of 5.4M tokens; bits
per byte at the start, en / code / math / other): without 2.167 / 1.955 / 2.081 / 4.427, with 1.916
/ 1.670 / 1.826 / 4.008.
"""

import dataclasses
from collections.abc import Iterable
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
    self_distillation,
    self_text,
    token_distillation,
    tuning,
)
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.transformer import Params
from tokalign_jax.parallel import sharding
from tokalign_jax.text import canonical, pairs
from tokalign_jax.text.corpus import Document
from tokalign_jax.text.special_tokens import counterpart
from tokalign_jax.text.tokenizing import TokenShards
from tokalign_jax.training.cross_tokenizer import Models
from tokalign_jax.utils.progress import Log

MATRICES = (("embed_tokens", "embedding"), ("lm_head", "kernel"))
"""Paths of the vocabulary's matrices; a tied model has only the first."""
BLOCK = 4096
"""Rows that are changed at once, to bound temporary memory."""
COMPOSED = (Rule.PIECES, Rule.SIMILAR)
"""Rules of tokens whose rows can be learned: spelled with source tokens, but not one of them."""


def initialize(
    config: ModelConfig, params: dict, aligned: Alignment, multiple_of: int = 1, kept: int = 0
) -> tuple[ModelConfig, dict]:
    """Make rows of the new vocabulary as mixtures of source rows (TokAlign, step 4).

    Args:
      params: the source model's, `embed_tokens/embedding` and (untied) `lm_head/kernel` of shape
        [V_source, D].
      aligned: mixtures of V_target rows over V_source tokens.
      multiple_of: the number of rows is padded to a multiple of it, with the mean of all rows.
      kept: number of first rows that are not changed if they are finite: all V_source rows if the
        vocabulary is extended.

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
    else:  # the head's rule: a row that is wrong there costs more than one that is wrong at the input
        new["embed_tokens"] = {"embedding": head_rows(rows, aligned)}
    size = -(-aligned.target_size // multiple_of) * multiple_of
    for group, leaf in MATRICES:
        if group in new:
            made, old = new[group][leaf], sharding.to_host(params[group][leaf], slice(kept))
            usable = np.flatnonzero(alignment.finite_rows(old))
            made[usable] = old[usable]
            if size > len(made):
                more = np.repeat(made.mean(axis=0, keepdims=True), size - len(made), axis=0)
                new[group] = {leaf: np.concatenate([made, more])}
    return dataclasses.replace(config, vocab_size=size), new


def head_rows(rows: Float[np.ndarray, "R D"], aligned: Alignment) -> Float[np.ndarray, "V_t D"]:
    """Mix the rows of the source's head (R >= V_source) and correct them for frequency, float32."""
    slope = frequency_slope(rows[: aligned.source_size], aligned.source_log_frequency)
    made = alignment.apply(aligned.head, rows)
    move(made, aligned.frequency_shift, slope)
    return made


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
    """Return the least-squares slope of rows with log frequency, float32; 0 if all are equally
    frequent.

    Rows with NaN or infinity are left out.
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
    """Replace rows that are not finite by the mean of the others; return parameters and their
    tokens.

    Some checkpoints have NaN in the rows of tokens that no text has.

    Args:
      size: tokens of the model's tokenizer; padding rows do not count for the mean.
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
      documents: as `contexts.draw` chooses them of the training text; `initialization.tokens`
        source tokens are read of them.
    """
    places = contexts.find_places(
        documents, source.tokenizer, target.tokenizer, config.initialization.tokens, log
    )
    sizes = len(source.shards.counts), len(target.shards.counts)
    if not (places.last_target != contexts.NONE).any():
        log(
            "contexts: warning: no token of the target ends where one of the source ends, so that "
            "no row is learned from "
            "the source model's states"
        )
        return contexts.nothing(*sizes, source.config.hidden_size)
    params = sharding.place(source.params, mesh)
    dtype, opening = jnp.dtype(config.compute.dtype), source.shards.opening
    return contexts.read(source.config, params, places, *sizes, dtype, mesh, log, opening)


def learn(
    config: Config,
    source: Side,
    target: Side,
    aligned: Alignment,
    reading: contexts.Reading,
    mesh: Mesh,
    log: Log,
    kept: int = 0,
) -> Params:
    """Move rows of composed tokens towards the regression fitted on the source's tokens
    (`composition.py`).

    Rows of tokens that were not seen in context are unchanged: from pieces alone the regression
    predicts rows better than mixtures do, but gives more bits per byte.

    Args:
      target: as `initialize` made it of the source by `aligned`.
      reading: what `read` gave.
      kept: the first rows, which stay what they are.
    """
    composed = np.isin(aligned.rules, COMPOSED)
    composed[:kept] = False
    wanted = np.flatnonzero(composed & (reading.target.counts > 0))
    parts = methods.cut(source.tokenizer, target.tokenizer, wanted.tolist(), source.unusable)
    wanted, parts = wanted[[bool(of) for of in parts]], [of for of in parts if of]
    known, known_parts = composition.binary_splits(
        source.tokenizer, source.shards.counts, source.unusable
    )
    new = dict(target.params)
    if len(wanted) and len(known):
        frequency = [methods.log_frequency(side.shards.counts) for side in (source, target)]
        pieces = [composition.Pieces.of(of) for of in (known_parts, parts)]
        of_known = composition.Tokens(known, pieces[0], frequency[0], reading.source)
        of_wanted = composition.Tokens(wanted, pieces[1], frequency[1], reading.target)
        for group, leaf in MATRICES:
            if group in new:
                rows = sharding.to_host(source.params[group][leaf])[: aligned.source_size].astype(
                    np.float32
                )
                made = np.array(new[group][leaf], np.float32)
                for block, learned in composition.learned_rows(rows, of_known, of_wanted, reading):
                    ids = wanted[block]
                    made[ids] += config.initialization.learned * (learned - made[ids])
                new[group] = {leaf: made}
        log(
            f"composition: {len(wanted):,} of {composed.sum():,} rows learned from {len(known):,} "
            "tokens"
        )
    return new


def movable(
    source: PreTrainedTokenizerBase,
    target: PreTrainedTokenizerBase,
    aligned: Alignment,
    counts: Int[np.ndarray, "V_t"],
    kept: int = 0,
) -> Bool[np.ndarray, "V_t"]:
    """Return which rows a learned start may change: composed ones, and exact ones that occur in
    text.

    Special tokens, tokens that text never has, and the first `kept` rows are not changed, nor are
    exact ones if one vocabulary contains the other: their use has not changed then.

    Args:
      counts: of each target token in the text.
    """
    exact = (aligned.rules == Rule.EXACT) & (counts > 0) & (not _contains(source, target))
    moving = exact | np.isin(aligned.rules, (*COMPOSED, Rule.MEAN))
    moving[:kept] = False
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
    log: Log,
    kept: int = 0,
) -> Params:
    """Calibrate head rows to the frequencies of their tokens (`calibration.py`).

    Args:
      kept: the first rows, which stay what they are.
    """
    moving = movable(source.tokenizer, target.tokenizer, aligned, target.shards.counts, kept)
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
    kept: int = 0,
) -> tuning.Tuned:
    """Tune the `movable` rows by a linear map that they share (`tuning.py`).

    Without composed tokens nothing is tuned.

    Args:
      target: as `learn` made it.
      kept: the first rows, which stay what they are.
    """
    if not config.initialization.tuning or not np.isin(aligned.rules[kept:], COMPOSED).any():
        return tuning.Tuned(target.params, {})
    moving = movable(source.tokenizer, target.tokenizer, aligned, target.shards.counts, kept)
    ids = np.flatnonzero(moving & (aligned.rules != Rule.MEAN))
    parts = methods.cut(source.tokenizer, target.tokenizer, ids.tolist(), source.unusable)
    ids, parts = ids[[bool(of) for of in parts]], [of for of in parts if of]
    frequency = methods.log_frequency(target.shards.counts)
    tokens = composition.Tokens(ids, composition.Pieces.of(parts), frequency, reading.target)
    rows = {
        f"{group}/{leaf}": (
            sharding.to_host(source.params[group][leaf])[: aligned.source_size].astype(np.float32)
        )
        for group, leaf in MATRICES
        if group in source.params
    }
    composed = np.isin(aligned.rules[ids], COMPOSED)
    budget, compute = config.initialization.tuning, config.compute
    return tuning.tune(
        target.config,
        target.params,
        rows,
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
    kept: int = 0,
) -> self_distillation.Result:
    """`target`'s parameters trained to keep what the source model knows (`self_distillation.py`).

    Where the source has every token there is nothing to do, and all stays the source's. With `kept`
    rows, which an extension leaves as they are, the body stays too.

    Args:
      target: as `initialize` made it of the source by `aligned`.
      documents: of the training text, as `contexts.draw` chooses them.
    """
    settings = config.initialization
    if not np.isin(aligned.rules[kept:], COMPOSED).any():
        return self_distillation.Result(target.params, {})
    budget, tokens = distillation_budget(config, aligned.source_size, aligned.target_size)
    params, starts = (
        sharding.place(source.params, mesh),
        (first_context(source.tokenizer), first_context(target.tokenizer)),
    )
    dtype = jnp.dtype(config.compute.dtype)
    special = {
        i: match.token
        for i in canonical.special_ids(source.tokenizer) - source.unusable
        if (match := counterpart(i, source.tokenizer, target.tokenizer)) is not None
    }
    pairing = pairs.Pairing(source.tokenizer, target.tokenizer, starts, special)
    writer = self_text.Writer(source.config, params, source.tokenizer, dtype, mesh, config.seed)
    written = pairing.pair(writer.write(budget, log, special))
    passages = [
        ((piece, None),) for document in documents for piece in pairs.passages(document.text)
    ]
    corpus = pairing.pair(passages) if settings.corpus_share else []
    if not written and not corpus:
        return self_distillation.Result(target.params, {})

    tokens_seen = np.concatenate([pair.target for pair in (*written, *corpus)])
    seen = np.bincount(tokens_seen, minlength=aligned.target_size)
    trains_body = settings.trains == "all" and not kept
    moving = movable(source.tokenizer, target.tokenizer, aligned, seen, kept)
    composed = moving & np.isin(aligned.rules, COMPOSED)
    ids = np.flatnonzero(composed)
    parts = methods.cut(source.tokenizer, target.tokenizer, ids.tolist(), source.unusable)
    ids, parts = ids[[bool(pieces) for pieces in parts]], [pieces for pieces in parts if pieces]
    states = row_features.last_piece_states(source.config, params, parts, starts[0], dtype, mesh)
    sizes = np.array([len(content or b"") for content in canonical.token_bytes(target.tokenizer)])[
        ids
    ]
    rows = {}
    for group, leaf in MATRICES:
        if group in source.params:
            known = sharding.to_host(source.params[group][leaf])[: aligned.source_size].astype(
                np.float32
            )
            of_ids = row_features.features(known, parts, sizes, states, config.seed)
            features = np.zeros((aligned.target_size, of_ids.shape[1]), np.float32)
            features[ids] = of_ids
            free = (moving if trains_body else composed) & (seen > 0)
            deviation = float(np.sqrt(np.var(known, axis=0).mean()))
            rows[f"{group}/{leaf}"] = self_distillation.Rows(features, free, deviation)
    models = Models(target.config, source.config, config.compute)
    return self_distillation.distill(
        config,
        models,
        target.params,
        source.params,
        rows,
        written,
        corpus,
        tokens,
        trains_body,
        mesh,
        log,
    )


def distill_tokens(
    config: Config,
    source: Side,
    target: Side,
    aligned: Alignment,
    documents: Iterable[Document],
    mesh: Mesh,
    log: Log,
    kept: int = 0,
) -> token_distillation.Result:
    """Input rows of composed tokens by Token Distillation (`token_distillation.py`).

    Args:
      target: as `initialize` made it of the source by `aligned`.
      documents: of the training text, as `contexts.draw` chooses them.

    Returns:
      All rows of the target's input embedding.
    """
    settings = config.initialization.token_distillation
    rows = np.array(target.params["embed_tokens"]["embedding"], np.float32)
    composed = np.isin(aligned.rules, COMPOSED)
    composed[:kept] = False
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
    config: ModelConfig, params: dict, size: int, key: jax.Array, kept: int = 0
) -> tuple[ModelConfig, dict]:
    """The baseline: `size` rows drawn from a normal distribution with each source column's mean and
    deviation, but for the first `kept`, which stay what they are."""

    def draw(rows: np.ndarray, key: jax.Array) -> np.ndarray:
        rows = sharding.to_host(rows)[: config.vocab_size].astype(np.float32)
        old, rows = rows[:kept], rows[alignment.finite_rows(rows)]
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
