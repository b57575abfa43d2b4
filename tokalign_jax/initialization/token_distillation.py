"""Token Distillation: input rows of new tokens, learned from the source model's hidden states.

Dobler, Elliott & de Melo 2025 (arXiv 2505.20133). The source model reads a snippet of text twice:
as its own tokenizer splits it (teacher), and with one new token in place of each group of pieces
that it stands for (student). Only the rows of the new tokens train, from the mean of their pieces,
to minimise the mean squared difference between both readings' hidden states, at every token that
is the same in both and at the last piece of each replaced group.

Head rows are not learned: they stay the mean of the pieces (the paper leaves them to other
methods). A tied model has one matrix, so the learned row is used at both ends.

Differences from the published code: groups of pieces are located where the target tokenizer writes
the new token in the text and both of its ends are ends of source tokens, not by searching for the
pieces of the token alone; and a token with fewer snippets than configured is trained on those that
exist instead of being skipped.

Letters: m new tokens, V source tokens, n snippets, S their length, B batch, D model.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int
from transformers import PreTrainedTokenizerBase

from tokalign_jax.config import ComputeConfig, TokenDistillationConfig
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.transformer import Params, first_layers, forward
from tokalign_jax.parallel import sharding
from tokalign_jax.text.boundaries import NONE, Boundaries, token_boundaries
from tokalign_jax.text.canonical import plain_backend
from tokalign_jax.text.corpus import Document, in_groups
from tokalign_jax.utils.progress import Log, Progress

TABLE = "embed_tokens/embedding"
WARMUP = 0.5
"""Share of the steps over which the learning rate rises; it then falls linearly to 0."""
HELD_OUT = 256
"""Snippets held out to measure the rows before and after training; at most a tenth."""


class Snippets(NamedTuple):
    """Text in source tokens, and with new tokens in place of their pieces; int32."""

    original: Int[np.ndarray, "n S"]
    """Padded with 0."""
    merged: Int[np.ndarray, "n S"]
    """Token V + k is the k-th new token; padded with `NONE`."""
    positions: Int[np.ndarray, "n S"]
    """Position in `original` at which the same text has been read; padded with `NONE`."""


class Result(NamedTuple):
    """Rows of the new tokens, and measurements."""

    rows: Float[np.ndarray, "m D"]
    facts: Mapping[str, float]
    """`snippets` trained on, their `tokens`, `loss_before` and `loss_after` on held-out ones."""


# --- Finding snippets ---------------------------------------------------------------------------


class Finder(NamedTuple):
    """A search for text around new tokens."""

    source: PreTrainedTokenizerBase
    target: PreTrainedTokenizerBase
    ids: Int[np.ndarray, "m"]
    """The new tokens, as target ids."""
    source_size: int
    """V"""
    start: int
    """The source token before every snippet."""

    def find(self, documents: Iterable[Document], config: TokenDistillationConfig) -> Snippets:
        """Return up to `config.snippets` snippets for each new token.

        If these are more than `config.most_snippets`, every token keeps its first snippet before
        any token keeps a second one.
        """
        number = np.full(1 + self.ids.max(initial=0), NONE, np.int64)
        number[self.ids] = np.arange(len(self.ids))
        counts, snippets = np.zeros(len(self.ids), np.int64), []
        backends = [plain_backend(tokenizer) for tokenizer in (self.source, self.target)]
        for group in in_groups(documents):
            texts = [document.text for document in group]
            sides = [token_boundaries(backend, texts) for backend in backends]
            for text, source, target in zip(texts, *sides):
                merged = _merge(source, target, len(text), number, self.source_size)
                snippets += self._around(merged, source.ids, counts, config)
            if (counts >= config.snippets).all():
                break
        snippets.sort(key=lambda item: item[0])
        return self._arrays([item[1:] for item in snippets[: config.most_snippets]], config)

    def _around(
        self,
        merged: "_Merged",
        source: Int[np.ndarray, "n"],
        counts: Int[np.ndarray, "m"],
        config: TokenDistillationConfig,
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
        """Yield (earlier snippets of the token, original, merged, positions); update `counts`."""
        ends = merged.last + 1
        starts = np.append(0, ends[:-1])
        for place in np.flatnonzero(merged.tokens >= self.source_size).tolist():
            new = merged.tokens[place] - self.source_size
            room = config.snippet_length - int(ends[place] - starts[place])
            if counts[new] >= config.snippets or room < 0:
                continue
            first = int(np.searchsorted(starts, starts[place] - room // 2))
            begin = int(starts[first])
            stop = int(np.searchsorted(ends, begin + config.snippet_length, side="right"))
            tokens, last = merged.tokens[first:stop], merged.last[first:stop] - begin
            yield int(counts[new]), source[begin : begin + last[-1] + 1], tokens, last
            counts[new] += 1

    def _arrays(
        self,
        parts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
        config: TokenDistillationConfig,
    ) -> Snippets:
        shape = len(parts), config.snippet_length + 1
        snippets = Snippets(*(np.full(shape, fill, np.int32) for fill in (0, NONE, NONE)))
        snippets.original[:, 0] = snippets.merged[:, 0] = self.start
        snippets.positions[:, 0] = 0
        for row, (original, merged, positions) in enumerate(parts):
            snippets.original[row, 1 : 1 + len(original)] = original
            snippets.merged[row, 1 : 1 + len(merged)] = merged
            snippets.positions[row, 1 : 1 + len(merged)] = positions + 1
        return snippets


class _Merged(NamedTuple):
    """A document in source tokens, with new tokens in place of their pieces."""

    tokens: Int[np.ndarray, "k"]
    last: Int[np.ndarray, "k"]
    """Index of the last source token of each."""


def _merge(
    source: Boundaries,
    target: Boundaries,
    length: int,
    number: Int[np.ndarray, "V_t"],
    source_size: int,
) -> _Merged:
    """Replace groups of source tokens by the new tokens of the same text.

    Args:
      source: the document in source tokens.
      target: the document in target tokens.
      length: characters of the document.
      number: index of each target token among the new ones, or `NONE`; later ids are not new.
      source_size: V.
    """
    token_at = np.full(length + 1, NONE, np.int64)
    aligned = np.flatnonzero(source.ends != NONE)
    token_at[source.ends[aligned]] = aligned
    begins = np.append(0, target.ends[:-1])
    new = target.ids < len(number)
    new[new] = number[target.ids[new]] != NONE
    new &= (begins != NONE) & (target.ends != NONE)
    begins_shared = (begins[new] == 0) | (token_at[begins[new]] != NONE)
    new[new] = (token_at[target.ends[new]] != NONE) & begins_shared
    # token_at[0] is NONE (-1), so that the first token of the document is 0.
    first, last = token_at[begins[new]] + 1, token_at[target.ends[new]]
    tokens, change = source.ids.copy(), np.zeros(len(source.ids) + 1, np.int64)
    tokens[last] = source_size + number[target.ids[new]]
    np.add.at(change, first, 1)
    np.add.at(change, last, -1)
    remaining = np.flatnonzero(np.cumsum(change)[:-1] == 0)
    return _Merged(tokens[remaining], remaining)


# --- Training -----------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Snippets on the devices."""

    original: Int[Array, "B S"]
    merged: Int[Array, "B S"]
    positions: Int[Array, "B S"]


class _State(NamedTuple):
    change: Float[Array, "R D"]
    """Change of the table's rows."""
    optimizer: optax.OptState


class _Frozen(NamedTuple):
    model: Params
    """The source model; the rows of the new tokens follow its own in its table."""
    free: Bool[Array, "R 1"]
    """Trainable rows."""


class _Settings(NamedTuple):
    model: ModelConfig
    dtype: str
    mesh: Mesh


def train(
    model: ModelConfig,
    params: Params,
    rows: Float[np.ndarray, "m D"],
    snippets: Snippets,
    config: TokenDistillationConfig,
    compute: ComputeConfig,
    mesh: Mesh,
    log: Log,
    seed: int,
) -> Result:
    """Train the rows of the new tokens; return them unchanged if the held-out loss does not fall.

    Args:
      model: the source model's architecture.
      params: the source model's parameters, its table without padding: V rows.
      rows: initial rows of the new tokens.
      snippets: text to train and to measure on.
      config: settings of the method.
      compute: type of activations.
      mesh: devices that train.
      log: receives progress.
      seed: of the order of snippets.
    """
    order = np.random.default_rng([seed, 7]).permutation(len(snippets.original))
    held_out = min(HELD_OUT, len(order) // 10)
    held_out_batches, trained = (
        list(_batches(snippets, chosen, config.batch_size, mesh))
        for chosen in (order[:held_out], order[held_out:])
    )
    part, body = _truncated(model, params, config.layers)
    settings = _Settings(part, compute.dtype, mesh)
    frozen, state = _start(settings, body, rows)
    before = _mean_loss(state, frozen, held_out_batches, settings)
    tokens = int((snippets.merged[order[held_out:]] != NONE).sum())
    progress = Progress(log, "token distillation", tokens, "tokens")
    warmup = max(1, round(WARMUP * len(trained)))
    for step, batch in enumerate(trained):
        rate = config.learning_rate * min(
            (step + 1) / warmup, (len(trained) - step) / max(1, len(trained) - warmup)
        )
        state = _step(state, frozen, _put(batch, mesh), jnp.float32(rate), settings=settings)
        jax.block_until_ready(state.change)  # Otherwise the logged rate would run ahead.
        progress.update(tokens / len(trained))
    after = _mean_loss(state, frozen, held_out_batches, settings)
    gained = not held_out_batches or after < before
    change = (
        f"; mean squared difference {before:.4g} to {after:.4g} on held-out text"
        if held_out_batches
        else ""
    )
    progress.done(
        f"{len(rows):,} rows{change}" + ("" if gained else ": the rows are left as they were")
    )
    if gained:
        size = len(params["embed_tokens"]["embedding"])
        rows = rows + sharding.to_host(state.change, slice(size, size + len(rows)))
    facts = {"snippets": float(len(order) - held_out), "tokens": float(tokens)}
    losses = {"loss_before": before, "loss_after": after} if held_out_batches else {}
    return Result(rows, facts | losses)


def _truncated(model: ModelConfig, params: Params, layers: int) -> tuple[ModelConfig, Params]:
    """Return the model with its first `layers` layers; 0 means all."""
    if not layers or layers >= model.num_layers:
        return model, params
    return first_layers(model, params, layers)


def _start(
    settings: _Settings, params: Params, rows: Float[np.ndarray, "m D"]
) -> tuple[_Frozen, _State]:
    source = sharding.to_host(params["embed_tokens"]["embedding"]).astype(np.float32)
    table = {"embed_tokens": {"embedding": np.concatenate([source, rows])}}
    placed = sharding.place({**params, **table}, settings.mesh)
    for part in placed.keys() - table.keys():
        placed[part] = jax.tree.map(lambda x: x.astype(settings.dtype), placed[part])
    rows_in_memory = len(placed["embed_tokens"]["embedding"])
    numbers = np.arange(rows_in_memory)[:, None]
    free = (numbers >= len(source)) & (numbers < len(source) + len(rows))
    split = NamedSharding(settings.mesh, sharding.REPLICATED)
    change = jnp.zeros_like(placed["embed_tokens"]["embedding"])
    return _Frozen(placed, sharding.put(free, split)), _State(change, _ADAM.init(change))


_ADAM = optax.scale_by_adam(0.9, 0.999, 1e-8)


@functools.partial(jax.jit, static_argnames="settings", donate_argnums=0)
def _step(
    state: _State, frozen: _Frozen, batch: Batch, rate: Float[Array, ""], *, settings: _Settings
) -> _State:
    with sharding.within(settings.mesh):
        gradient = jax.grad(_loss)(state.change, frozen, batch, settings)
        direction: Any
        direction, optimizer = _ADAM.update(gradient, state.optimizer)
        split = sharding.sharding_of(TABLE, state.change.shape, settings.mesh)
        change = jax.lax.with_sharding_constraint(state.change - rate * direction, split)
        return _State(change, optimizer)


def _mean_loss(
    state: _State, frozen: _Frozen, batches: Sequence[Snippets], settings: _Settings
) -> float:
    losses = [
        float(_jitted_loss(state.change, frozen, _put(batch, settings.mesh), settings=settings))
        for batch in batches
    ]
    return float(np.mean(losses)) if losses else float("nan")


@functools.partial(jax.jit, static_argnames="settings")
def _jitted_loss(
    change: Float[Array, "R D"], frozen: _Frozen, batch: Batch, *, settings: _Settings
) -> Float[Array, ""]:
    with sharding.within(settings.mesh):
        return _loss(change, frozen, batch, settings)


def _loss(
    change: Float[Array, "R D"], frozen: _Frozen, batch: Batch, settings: _Settings
) -> Float[Array, ""]:
    """Return the mean squared difference of hidden states over all tokens of `merged` and D."""
    table = frozen.model["embed_tokens"]["embedding"] + frozen.free * change
    student = {**frozen.model, "embed_tokens": {"embedding": table}}
    read = functools.partial(
        forward, settings.model, dtype=jnp.dtype(settings.dtype), remat="layer", unroll=1
    )
    real = batch.merged != NONE
    states = read(student, jnp.maximum(batch.merged, 0)).astype(jnp.float32)
    teacher = jax.lax.stop_gradient(read(frozen.model, batch.original)).astype(jnp.float32)
    positions = jnp.maximum(batch.positions, 0)[..., None]
    squares = jnp.square(states - jnp.take_along_axis(teacher, positions, axis=1))
    count = jnp.maximum(real.sum(), 1) * states.shape[-1]
    return jnp.where(real[..., None], squares, 0.0).sum() / count


def _batches(
    snippets: Snippets, chosen: Int[np.ndarray, "n"], size: int, mesh: Mesh
) -> Iterator[Snippets]:
    """Yield batches of `size` chosen snippets, padded with empty ones.

    All have the same shape, which the devices divide. Results do not depend on their number.
    """
    devices = sharding.sequences_at_once(mesh)
    padded_size = -(-size // devices) * devices
    for begin in range(0, len(chosen), size):
        rows = chosen[begin : begin + size]
        missing = ((0, padded_size - len(rows)), (0, 0))
        yield Snippets(
            *(
                np.pad(values[rows], missing, constant_values=fill)
                for values, fill in zip(snippets, (0, NONE, NONE))
            )
        )


def _put(batch: Snippets, mesh: Mesh) -> Batch:
    split = NamedSharding(mesh, P(sharding.BATCH))
    return Batch(*(sharding.put(values, split) for values in batch))
