"""Mean final states of the source model before and after the tokens of both vocabularies.

The source model reads text in its own tokens. Where one of its tokens ends, tokens of the target
vocabulary may begin and end too (`text/boundaries.py`). Tokens of both vocabularies thus get mean
states in the same space, without an alignment: the state before a token predicts it and relates to
its head row; the state after it relates to its embedding row. States are final ones, after the
last norm; sums are float32.

Letters: D model, V vocabulary, N places, B batch, T length.
"""

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int
from transformers import PreTrainedTokenizerBase

from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.transformer import Params, forward
from tokalign_jax.parallel import sharding
from tokalign_jax.text.boundaries import Boundaries, shared_boundaries, token_boundaries
from tokalign_jax.text.canonical import plain_backend
from tokalign_jax.text.corpus import Document, in_groups
from tokalign_jax.text.special_tokens import end_of_text_id
from tokalign_jax.text.tokenizing import TokenShards
from tokalign_jax.utils.progress import Log, Progress

NONE = -1
"""Padding of labels: no token of the vocabulary begins or ends here."""
WINDOW = 512
"""Context length in tokens, if the model has that many positions."""
BATCH_TOKENS = {"cpu": 4096}
OTHER_BATCH_TOKENS = 32_768
"""Tokens per batch and device, by backend."""
FLUSHED = 32
"""Batches whose moments are summed in float32 on the devices before they are added to the host's
float64 sums, so that a [D, D] matrix is copied less often. The sum's rounding error, about 2e-7, is
that of the float32 product over one batch."""
LOWEST_SHOWN = 8
"""Languages listed in a log line."""
BY_COLUMN = P(None, (*sharding.BATCH, sharding.TENSOR))


class Places(NamedTuple):
    """Source tokens at N positions of concatenated documents, and the tokens around them.

    All arrays are int32; `NONE` stands for no token.
    """

    tokens: Int[np.ndarray, "N"]
    next_source: Int[np.ndarray, "N"]
    next_target: Int[np.ndarray, "N"]
    """The target token that begins where this source token ends."""
    last_target: Int[np.ndarray, "N"]
    """The target token that ends where this source token ends."""


class Contexts(NamedTuple):
    """Mean states of the tokens of one vocabulary; 0 for tokens that were not seen."""

    before: Float[np.ndarray, "V D"]
    """float32"""
    after: Float[np.ndarray, "V D"]
    """float32"""
    counts: Int[np.ndarray, "V"]
    """int64: occurrences with a state before, or with a state after, whichever are fewer."""


class Reading(NamedTuple):
    """Statistics of one pass of the source model over text."""

    source: Contexts
    target: Contexts
    mean: Float[np.ndarray, "D"]
    """Mean of the states at all places, float64."""
    covariance: Float[np.ndarray, "D D"]
    """Covariance of the states, float64."""


def empty_reading(source_size: int, target_size: int, width: int) -> Reading:
    """Return a reading in which no token was seen."""
    source, target = (
        Contexts(
            np.zeros((size, width), np.float32),
            np.zeros((size, width), np.float32),
            np.zeros(size, np.int64),
        )
        for size in (source_size, target_size)
    )
    return Reading(source, target, np.zeros(width), np.zeros((width, width)))


def read(
    config: ModelConfig,
    params: Params,
    places: Places,
    source_size: int,
    target_size: int,
    dtype: DTypeLike,
    mesh: Mesh,
    log: Log,
    opening: int | None = None,
) -> Reading:
    """Run the source model over `places` and average its states by token.

    Args:
      config: the source model's architecture.
      params: the source model's parameters, on `mesh`.
      places: the text, in the order in which it is read.
      source_size: V of the source tokenizer.
      target_size: V of the target tokenizer.
      dtype: of weights and activations; sums are float32. The result does not depend on the order
        in which threads finish.
      mesh: devices that read.
      log: receives progress.
      opening: token that the model expects before every text, if any; it replaces the first token
        of each window.
    """
    length = min(WINDOW, config.max_positions, len(places.tokens))
    batch = max(1, BATCH_TOKENS.get(jax.default_backend(), OTHER_BATCH_TOKENS) // length)
    batch *= sharding.sequences_at_once(mesh)
    tokens, labels = _with_opening(places, length, opening)
    streams = [_windows(tokens, batch, length, 0)]
    streams += [_windows(label, batch, length, NONE) for label in labels]
    sizes = (source_size, source_size, target_size, target_size)
    static = {"config": config, "dtype": jnp.dtype(dtype), "mesh": mesh}
    progress = Progress(log, "contexts", len(places.tokens), "tokens")
    sums, total = _accumulate(params, streams, sizes, len(places.tokens), progress, **static)
    progress.done(f"{len(places.tokens):,} tokens")
    mean, second = (moment / len(places.tokens) for moment in total)
    counts = [
        np.bincount(label[label != NONE], minlength=size) for label, size in zip(labels, sizes)
    ]
    means = [
        sharding.to_host(by_label) / np.maximum(count, 1)[:, None].astype(np.float32)
        for by_label, count in zip(sums, counts)
    ]
    return Reading(
        Contexts(means[0], means[1], np.minimum(counts[0], counts[1])),
        Contexts(means[2], means[3], np.minimum(counts[2], counts[3])),
        mean,
        second - np.outer(mean, mean),
    )


def _accumulate(
    params: Params,
    streams: Sequence[Int[np.ndarray, "steps B T"]],
    sizes: Sequence[int],
    unread: int,
    progress: Progress,
    *,
    config: ModelConfig,
    dtype: DTypeLike,
    mesh: Mesh,
) -> tuple[list[Float[Array, "V D"]], tuple[np.ndarray, ...]]:
    """Run the model over all batches; return sums by label and the moments of the states.

    Args:
      params: the source model's parameters.
      streams: tokens, and four kinds of labels.
      sizes: number of labels of each kind.
      unread: places before the padding.
      progress: updated after each batch.
      config: the source model's architecture.
      dtype: of activations.
      mesh: devices that read.
    """
    width, everywhere = config.hidden_size, NamedSharding(mesh, sharding.REPLICATED)
    by_column = sharding.fitting(BY_COLUMN, (1, width), mesh)
    sums = jax.jit(lambda: [jnp.zeros((size, width)) for size in sizes], out_shardings=by_column)()
    none = jax.jit(lambda: (jnp.zeros(width), jnp.zeros((width, width))), out_shardings=everywhere)
    total: tuple[np.ndarray, ...] = np.zeros(width), np.zeros((width, width))
    for start in range(0, len(streams[0]), FLUSHED):
        moments = none()
        for tokens, *labels in zip(*(stream[start : start + FLUSHED] for stream in streams)):
            tokens = sharding.put(tokens, NamedSharding(mesh, P(sharding.BATCH)))
            sums, moments = _add(
                sums, moments, params, tokens, labels, unread, config=config, dtype=dtype, mesh=mesh
            )
            progress.update(min(tokens.size, unread))
            unread -= tokens.size
        total = tuple(old + np.asarray(new, np.float64) for old, new in zip(total, moments))
    return sums, total


def _with_opening(
    places: Places, length: int, opening: int | None
) -> tuple[Int[np.ndarray, "N"], list[Int[np.ndarray, "N"]]]:
    """Return tokens and their four labels, with `opening` as the first token of each window."""
    labels = [places.next_source, places.tokens, places.next_target, places.last_target]
    if opening is None:
        return places.tokens, labels
    first = np.arange(len(places.tokens)) % length == 0
    return np.where(first, opening, places.tokens), [np.where(first, NONE, x) for x in labels]


def _windows(
    values: Int[np.ndarray, "N"], batch: int, length: int, padding: int
) -> Int[np.ndarray, "steps B T"]:
    """Reshape to batches of windows, padded at the end."""
    steps = -(-len(values) // (length * batch))
    padded = np.full(steps * batch * length, padding, np.int32)
    padded[: len(values)] = values
    return padded.reshape(-1, batch, length)


def draw(shards: TokenShards, budget: int, seed: int) -> Int[np.ndarray, "d"]:
    """Draw documents of `budget` tokens in total, or all if there are fewer.

    Returns:
      Indices of documents, sorted.
    """
    lengths = np.diff(shards.documents, prepend=0)
    order = np.random.default_rng(seed).permutation(len(lengths))
    needed = np.searchsorted(np.cumsum(lengths[order]), budget) + 1
    return np.sort(order[:needed])


def find_places(
    documents: Iterable[Document],
    source: PreTrainedTokenizerBase,
    target: PreTrainedTokenizerBase,
    budget: int,
    log: Log = lambda line: None,
) -> Places:
    """List source tokens of the documents, with the target tokens that begin and end at their end.

    A place where only the source side ends a token has no target tokens. That includes stretches
    in which both sides stand for different text (a normaliser changed it, or a token is unknown):
    the places before and after them are valid.

    Args:
      documents: the text.
      source: the source tokenizer.
      target: the target tokenizer.
      budget: places, at most.
      log: receives the share of shared places by language.
    """
    backends = [plain_backend(tokenizer) for tokenizer in (source, target)]
    ends_of_text = [end_of_text_id(tokenizer) for tokenizer in (source, target)]
    chosen: list[tuple[np.ndarray, ...]] = []
    taken, coverage = 0, _Coverage()
    for group in in_groups(documents):
        texts = [document.text for document in group]
        sides = [token_boundaries(backend, texts) for backend in backends]
        for document, source_side, target_side in zip(group, *sides):
            places = _document_places(source_side, target_side, len(document.text), ends_of_text)
            chosen.append(tuple(column[: budget - taken] for column in places))
            coverage.add(document.language, chosen[-1])
            taken += len(chosen[-1][0])
            if taken >= budget:
                break
        if taken >= budget:
            break
    coverage.report(log)
    if not chosen:
        return Places._make(np.zeros((4, 0), np.int32))
    return Places._make(np.concatenate(column).astype(np.int32) for column in zip(*chosen))


def _document_places(
    source: Boundaries, target: Boundaries, length: int, ends_of_text: Sequence[int]
) -> Places:
    """Return the places of one document.

    Each side is followed by its end-of-text, which ends at a place of its own.
    """
    (tokens, ends), (target_tokens, target_ends) = (
        (np.append(side.ids, end_of_text), np.append(side.ends, length + 1))
        for side, end_of_text in zip((source, target), ends_of_text)
    )
    source_places, target_places = shared_boundaries(ends, target_ends)
    next_target, last_target = np.full((2, len(tokens)), NONE)
    last_target[source_places] = target_tokens[target_places]
    next_target[source_places] = np.append(target_tokens[1:], NONE)[target_places]
    return Places(tokens, np.append(tokens[1:], NONE), next_target, last_target)


class _Coverage:
    """Shares of places that have a target token, by language."""

    def __init__(self):
        self._counts: Counter[tuple[str, str]] = Counter()

    def add(self, language: str, places: Sequence[np.ndarray]) -> None:
        self._counts[language, "places"] += len(places[0])
        self._counts[language, "shared"] += int(np.count_nonzero(places[3] != NONE))

    def report(self, log: Log) -> None:
        """Log one line with the languages of the lowest shares."""
        shares = {
            language: self._counts[language, "shared"] / max(count, 1)
            for (language, kind), count in self._counts.items()
            if kind == "places"
        }
        lowest = sorted(shares, key=lambda language: shares[language])[:LOWEST_SHOWN]
        if shares:
            log(
                "contexts: share of source tokens that end where a target token ends: "
                + ", ".join(f"{language} {shares[language]:.0%}" for language in lowest)
                + (f" (the lowest of {len(shares)} languages)" if len(shares) > len(lowest) else "")
            )


@functools.partial(jax.jit, static_argnames=("config", "dtype", "mesh"), donate_argnums=(0, 1))
def _add(
    sums,
    moments,
    params,
    tokens: Int[Array, "B T"],
    labels,
    unread,
    *,
    config: ModelConfig,
    dtype: DTypeLike,
    mesh: Mesh,
):
    """Add one batch to the sums by token and to the moments.

    Args:
      moments: sum of states [D] and of their outer products [D, D].
      unread: places before the end of the text; later positions are padding.
    """
    with sharding.within(mesh):
        states = (
            forward(config, params, tokens, dtype=dtype)
            .astype(jnp.float32)
            .reshape(-1, config.hidden_size)
        )
        states = jnp.where((jnp.arange(len(states)) < unread)[:, None], states, 0.0)
        first, second = moments
        moments = (
            first + states.sum(axis=0),
            second + jnp.matmul(states.T, states, precision="highest"),
        )
        # Sorting and summing run along the places, so each device takes some columns of all.
        states = sharding.constrain(states, *sharding.fitting(BY_COLUMN, states.shape, mesh).spec)
        sums = [
            _add_by_label(by_label, states, label.reshape(-1))
            for by_label, label in zip(sums, labels)
        ]
        return sums, tuple(sharding.constrain(moment) for moment in moments)


def _add_by_label(
    sums: Float[Array, "V D"], states: Float[Array, "N D"], labels: Int[Array, "N"]
) -> Float[Array, "V D"]:
    """Add each state to the row of its label, in a deterministic order.

    A plain scatter-add is not deterministic on a GPU.
    """
    order = jnp.argsort(labels, stable=True)
    labels = labels[order]
    starts = jnp.concatenate([jnp.ones(1, bool), labels[1:] != labels[:-1]])[:, None]

    def join(left, right):
        return jnp.where(right[1], right[0], left[0] + right[0]), left[1] | right[1]

    running, _ = jax.lax.associative_scan(join, (states[order], starts))
    last = jnp.concatenate([starts[1:, 0], jnp.ones(1, bool)])
    # One position for each label; the others are out of bounds and dropped.
    rows = jnp.where(last & (labels != NONE), labels, len(sums))
    return sums.at[rows].add(running, mode="drop")
