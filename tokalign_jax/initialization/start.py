"""The start: the parameters that training begins with, from an alignment and a source model.

Rows are mixed by the alignment. Then method `distilled` trains the model with the source as its
teacher; method `composed` learns rows from the source's states, calibrates and tunes them.
"""

from collections.abc import Callable, Iterator, Mapping, Set
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from tokalign_jax.alignment import methods
from tokalign_jax.alignment.alignment import Alignment
from tokalign_jax.config import Config, distillation_budget, distills, distills_tokens, reads_source
from tokalign_jax.initialization import initialization
from tokalign_jax.initialization.initialization import COMPOSED, Side
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.transformer import Params
from tokalign_jax.text import canonical
from tokalign_jax.text.corpus import Document
from tokalign_jax.text.tokenizing import TokenShards
from tokalign_jax.utils.progress import Log

Draw = Callable[[int], Iterator[Document]]
"""Yields training documents of about so many source tokens, drawn at random."""


class Start(NamedTuple):
    """A model with the new vocabulary before its training stages.

    Attributes:
      config: the source's, with the new number of rows.
      params: its parameters.
      facts: measurements by name.
    """

    config: ModelConfig
    params: Params
    facts: Mapping[str, float]


def make_start(
    config: Config,
    source: Side,
    target_tokenizer: PreTrainedTokenizerBase,
    target_shards: TokenShards,
    aligned: Alignment,
    draw: Draw,
    mesh: Mesh,
    log: Log,
    num_frozen_rows: int = 0,
) -> Start:
    """Make the start by `config.alignment.method` and `config.initialization`.

    Args:
      config: the run's configuration.
      source: the source model as loaded.
      target_tokenizer: the target tokenizer.
      target_shards: the training text in target tokens.
      aligned: the alignment of the two tokenizers.
      draw: draws training documents.
      mesh: devices that train.
      log: receives progress and warnings.
      num_frozen_rows: leading rows that stay the source's; all source rows if its vocabulary is
        extended.
    """
    params, unusable = initialization.usable(source.params, aligned.source_size)
    source = source._replace(params=params, unusable=unusable)
    if unusable:
        log(f"init: warning: {not_finite(unusable, source.tokenizer)}; they are not used")
        aligned = methods.without(
            aligned, unusable, source.tokenizer, target_tokenizer, target_shards.counts
        )
    rows_multiple_of = config.initialization.rows_multiple_of
    model, new = initialization.initialize(
        source.config, params, aligned, rows_multiple_of, num_frozen_rows
    )
    # Without a composed row of text there is nothing to learn, calibrate, tune or distil: special
    # tokens occur in no text.
    composed = np.isin(aligned.rules, COMPOSED)
    composed[[*canonical.special_ids(target_tokenizer)]] = False
    if not composed[num_frozen_rows:].any():
        return Start(model, new, {})
    make = _learned_start(config)
    if make is None:
        return Start(model, new, {})
    target = Side(model, new, target_tokenizer, target_shards)
    return Start(model, *make(config, source, target, aligned, draw, mesh, log, num_frozen_rows))


Learned = tuple[Params, Mapping[str, float]]
"""Parameters, and measurements by name."""


def _learned_start(config: Config) -> Callable[..., Learned] | None:
    """Return the function that learns from the source model, or None if mixtures are the start."""
    if distills(config):
        return _distill
    if distills_tokens(config):
        return _distill_tokens
    return _compose if reads_source(config) else None


def _distill(
    config: Config,
    source: Side,
    target: Side,
    aligned: Alignment,
    draw: Draw,
    mesh: Mesh,
    log: Log,
    num_frozen_rows: int,
) -> Learned:
    """Make a start by method `distilled`."""
    _, budget = distillation_budget(config, aligned.source_size, aligned.target_size)
    # The budget counts target tokens, and documents are drawn by source tokens.
    tokens = [side.shards.counts.sum() for side in (source, target)]
    ratio = float(tokens[0] / tokens[1]) if tokens[1] else 1.0
    texts = draw(round(config.initialization.corpus_share * budget * ratio))
    return initialization.distill(
        config, source, target, aligned, texts, mesh, log, num_frozen_rows
    )


def _distill_tokens(
    config: Config,
    source: Side,
    target: Side,
    aligned: Alignment,
    draw: Draw,
    mesh: Mesh,
    log: Log,
    num_frozen_rows: int,
) -> Learned:
    """Make a start by method `token_distillation`."""
    texts = draw(config.initialization.token_distillation.tokens)
    rows, facts = initialization.distill_tokens(
        config, source, target, aligned, texts, mesh, log, num_frozen_rows
    )
    return {**target.params, "embed_tokens": {"embedding": rows}}, facts


def _compose(
    config: Config,
    source: Side,
    target: Side,
    aligned: Alignment,
    draw: Draw,
    mesh: Mesh,
    log: Log,
    num_frozen_rows: int,
) -> Learned:
    """Make a start by method `composed`."""
    texts = draw(config.initialization.tokens)
    reading = initialization.read(config, source, target, texts, mesh, log)
    learned = initialization.learn(config, source, target, aligned, reading, log, num_frozen_rows)
    target = target._replace(params=learned)
    calibrated = initialization.calibrate(config, source, target, aligned, mesh, num_frozen_rows)
    target = target._replace(params=calibrated)
    return initialization.tune(config, source, target, aligned, reading, mesh, log, num_frozen_rows)


def not_finite(tokens: Set[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Describe the tokens whose rows in the source model are not finite, naming the first ones."""
    names = ", ".join(repr(tokenizer.convert_ids_to_tokens(i)) for i in sorted(tokens)[:10])
    more = f" and {len(tokens) - 10:,} more" if len(tokens) > 10 else ""
    count = f"{len(tokens):,} token{'s' if len(tokens) > 1 else ''}"
    return f"the source model's rows of {count} hold NaN or infinity ({names}{more})"
