"""What the source model makes of tokens in text: its mean final state before and after each.

The source model reads text in its own tokens. Each of its states stands at a place in the bytes of a document, and there tokens of
the target vocabulary begin and end too. So the tokens of both vocabularies get mean states in one and the same space, with nothing
to align: the state before a token is what it is predicted from (its head row has to do with that), the state after it is what the
model makes of having read it (its embedding row has). Final states after the last norm, float32 sums.

Letters: D model, V vocabulary, N places, B batch, T length.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from tokalign_jax import sharding
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.transformer import Params, forward
from tokalign_jax.progress import Log, Progress
from tokalign_jax.text.tokenizing import TokenShards

NONE = -1
"""Label of a place where no token of the vocabulary begins or ends."""
WINDOW = 512
"""Tokens that the model sees at once, where it has that many positions."""
BATCH_TOKENS = {"cpu": 4096}
OTHER_BATCH_TOKENS = 32_768
"""Tokens of a batch on a device, by backend."""
FLUSHED = 32
"""Batches whose moments are added up in float32 on the devices before they join the host's float64 sums: a [D, D] matrix goes there that
much less often. Each addition rounds by 6e-8 of the sum at most, all of them by 2e-6, and by some 2e-7 as they fall: no more than the
float32 product over the places of one batch rounds anyway."""
BY_COLUMN = P(None, (*sharding.BATCH, sharding.TENSOR))


class Places(NamedTuple):
    """Source tokens of N places, one document behind the other, and what ends and begins there; int32 [N], `NONE` where nothing."""

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
    """int64: how often each was seen, before or after, whichever is less."""


class Reading(NamedTuple):
    """What one pass of the source model over text gives."""

    source: Contexts
    target: Contexts
    mean: Float[np.ndarray, "D"]
    """float64: of the states at all places."""
    covariance: Float[np.ndarray, "D D"]
    """float64"""


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
    """Runs the source model over `places` and averages its states by token.

    Args:
      params: the source model's, on `mesh`.
      source_size, target_size: V of each tokenizer.
      dtype: of weights and activations; sums are float32. The result does not depend on the order in which threads finish.
      opening: the token that the model has met before every text, if there is one: it takes the first place of each window, which then
        is no token's.
    """
    length = min(WINDOW, config.max_positions, len(places.tokens))
    batch = max(1, BATCH_TOKENS.get(jax.default_backend(), OTHER_BATCH_TOKENS) // length)
    batch *= sharding.sequences_at_once(mesh)
    rows = -(-len(places.tokens) // (length * batch)) * batch

    def windows(values: Int[np.ndarray, "N"], padding: int) -> Int[np.ndarray, "steps B T"]:
        padded = np.full(rows * length, padding, np.int32)
        padded[: len(values)] = values
        return padded.reshape(-1, batch, length)

    tokens, labels = places.tokens, (places.next_source, places.tokens, places.next_target, places.last_target)
    if opening is not None:
        first = np.arange(len(tokens)) % length == 0
        tokens, labels = np.where(first, opening, tokens), [np.where(first, NONE, of) for of in labels]
    sizes = (source_size, source_size, target_size, target_size)
    streams = [windows(tokens, 0), *(windows(of, NONE) for of in labels)]
    width, everywhere = config.hidden_size, NamedSharding(mesh, sharding.REPLICATED)
    by_column = sharding.fitting(BY_COLUMN, (1, width), mesh)
    sums = jax.jit(lambda: [jnp.zeros((size, width)) for size in sizes], out_shardings=by_column)()
    none = jax.jit(lambda: (jnp.zeros(width), jnp.zeros((width, width))), out_shardings=everywhere)
    progress = Progress(log, "contexts", len(places.tokens), "tokens")
    total, left = (np.zeros(width), np.zeros((width, width))), len(places.tokens)
    for start in range(0, len(streams[0]), FLUSHED):
        moments = none()
        for tokens, *of in zip(*(stream[start : start + FLUSHED] for stream in streams)):
            tokens = sharding.put(tokens, NamedSharding(mesh, P(sharding.BATCH)))
            sums, moments = _add(
                sums, moments, params, tokens, of, left, config=config, dtype=jnp.dtype(dtype), mesh=mesh
            )
            progress.update(min(tokens.size, left))
            left -= tokens.size
        total = tuple(of + np.asarray(more, np.float64) for of, more in zip(total, moments))
    progress.done(f"{len(places.tokens):,} tokens")
    mean, second = (of / len(places.tokens) for of in total)
    counts = [np.bincount(of[of != NONE], minlength=size) for of, size in zip(labels, sizes)]
    means = [sharding.to_host(of) / np.maximum(n, 1)[:, None].astype(np.float32) for of, n in zip(sums, counts)]
    return Reading(
        Contexts(means[0], means[1], np.minimum(counts[0], counts[1])),
        Contexts(means[2], means[3], np.minimum(counts[2], counts[3])),
        mean,
        second - np.outer(mean, mean),
    )


def find_places(
    source: TokenShards,
    target: TokenShards,
    source_bytes: Sequence[bytes | None],
    target_bytes: Sequence[bytes | None],
    budget: int,
    seed: int,
) -> Places:
    """Places of documents drawn at random until they have `budget` source tokens.

    Args:
      source_bytes, target_bytes: what each token stands for, as `canonical.token_bytes` has it.

    Both sides are counted from the end of a document, since a tokenizer may put a space before its beginning. A document whose
    text does not come out alike on both sides (a normaliser changes it) is passed over.
    """
    contents = [[content or b"" for content in side] for side in (source_bytes, target_bytes)]
    source_lengths, target_lengths = (np.array([len(content) for content in side]) for side in contents)
    chosen: list[tuple[np.ndarray, ...]] = []
    taken = 0
    for document in np.random.default_rng(seed).permutation(len(source.documents)):
        if taken >= budget:
            break
        tokens, ends = _ends(source, document, source_lengths)
        target_tokens, target_ends = _ends(target, document, target_lengths)
        if not _alike(
            _text(tokens[:-1], contents[0]), _text(target_tokens[:-1], contents[1])
        ):  # both end with end-of-text
            continue
        target_starts = target_ends - _lengths(target, target_tokens, target_lengths)
        chosen.append(
            (
                tokens,
                np.append(tokens[1:], NONE),
                _found(target_starts, target_tokens, ends),
                _found(target_ends, target_tokens, ends),
            )
        )
        taken += len(tokens)
    if not chosen:
        return Places._make(np.zeros((4, 0), np.int32))
    return Places._make(np.concatenate(column).astype(np.int32) for column in zip(*chosen))


_ONE_OF_A_KIND = bytes.maketrans(b"\t\n\v\f\r" + bytes(range(65, 91)), b" " * 5 + bytes(range(97, 123)))
"""Capitals as small letters and all white space as spaces: what normalisers do that leaves every place where it was."""


def _text(tokens: Int[np.ndarray, "n"], contents: Sequence[bytes]) -> bytes:
    return b"".join([contents[i] for i in tokens.tolist()]).translate(_ONE_OF_A_KIND)


def _alike(one: bytes, other: bytes) -> bool:
    """Whether two texts are the same, but for a space that a tokenizer puts before them."""
    return one == other or one == b" " + other or b" " + one == other


def _ends(shards: TokenShards, document: int, lengths: Int[np.ndarray, "V"]) -> tuple[np.ndarray, np.ndarray]:
    """A document's tokens, and where each ends, in bytes from the end of the document (so 0 is the last)."""
    start = shards.documents[document - 1] if document else 0
    tokens = np.asarray(shards.tokens[start : shards.documents[document]]).astype(np.int64)
    ends = np.cumsum(_lengths(shards, tokens, lengths))
    return tokens, ends - ends[-1]


def _lengths(shards: TokenShards, tokens: Int[np.ndarray, "n"], lengths: Int[np.ndarray, "V"]) -> np.ndarray:
    """Bytes of each token. The end-of-text, which has none, counts one: its place is not that of the token before it."""
    return np.where(tokens == shards.index["end_of_text"], 1, lengths[tokens])


def _found(positions: Int[np.ndarray, "m"], tokens: Int[np.ndarray, "m"], wanted: Int[np.ndarray, "n"]) -> np.ndarray:
    """The token at each of the `wanted` positions; `NONE` where there is none."""
    at = np.minimum(np.searchsorted(positions, wanted), len(positions) - 1)
    return np.where(positions[at] == wanted, tokens[at], NONE)


@functools.partial(jax.jit, static_argnames=("config", "dtype", "mesh"), donate_argnums=(0, 1))
def _add(
    sums, moments, params, tokens: Int[Array, "B T"], labels, left, *, config: ModelConfig, dtype: DTypeLike, mesh: Mesh
):
    """The sums by token, and the moments, with those of one batch added.

    Args:
      moments: sum of states [D] and of their outer products [D, D].
      left: places that are real; those behind are padding.
    """
    with sharding.within(mesh):
        states = forward(config, params, tokens, dtype=dtype).astype(jnp.float32).reshape(-1, config.hidden_size)
        states = jnp.where((jnp.arange(len(states)) < left)[:, None], states, 0.0)
        first, second = moments
        moments = first + states.sum(axis=0), second + jnp.matmul(states.T, states, precision="highest")
        # Sorting and adding up go along the places: each device has some columns of all of them.
        states = sharding.constrain(states, *sharding.fitting(BY_COLUMN, states.shape, mesh).spec)
        sums = [_add_by_label(of, states, label.reshape(-1)) for of, label in zip(sums, labels)]
        return sums, tuple(sharding.constrain(of) for of in moments)


def _add_by_label(
    sums: Float[Array, "V D"], states: Float[Array, "N D"], labels: Int[Array, "N"]
) -> Float[Array, "V D"]:
    """Adds each state to the row of its label, in an order that is always the same (a plain scatter's is not on a GPU)."""
    order = jnp.argsort(labels, stable=True)
    labels = labels[order]
    starts = jnp.concatenate([jnp.ones(1, bool), labels[1:] != labels[:-1]])[:, None]

    def join(left, right):
        return jnp.where(right[1], right[0], left[0] + right[0]), left[1] | right[1]

    running, _ = jax.lax.associative_scan(join, (states[order], starts))
    last = jnp.concatenate([starts[1:, 0], jnp.ones(1, bool)])
    rows = jnp.where(last & (labels != NONE), labels, len(sums))  # one place a label; the others fall off the end
    return sums.at[rows].add(running, mode="drop")
