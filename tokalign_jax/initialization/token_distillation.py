"""Token Distillation: input rows of new tokens, learned from the source model's hidden states.

Dobler, Elliott & de Melo 2025 (arXiv 2505.20133). The source model reads a snippet of text twice:
as its own tokenizer splits it (teacher), and with one new token in place of each group of pieces
that it stands for (student). Only the rows of the new tokens train, from the mean of their pieces,
to minimise the mean squared difference between both readings' hidden states, at every token that
is the same in both and at the last piece of each replaced group.

Rows of the head are not learned: they stay the mean of the pieces (the paper leaves them to other
methods). A tied model has one matrix, so the learned row is used at both ends.

What differs from the published code: groups of pieces are found where the target tokenizer writes
the new token in the text and both of its ends are ends of source tokens, not by searching for the
pieces of the token alone; and a token with fewer than the wanted number of snippets is trained on
those that there are, not left out.

Letters: m new tokens, V source tokens, n snippets, S their length, B batch, D model.
"""

import dataclasses
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
from tokalign_jax.models.transformer import Params, forward
from tokalign_jax.parallel import sharding
from tokalign_jax.text.boundaries import NONE, Boundaries, token_boundaries
from tokalign_jax.text.canonical import plain_backend
from tokalign_jax.text.corpus import Document, in_groups
from tokalign_jax.utils.progress import Log, Progress

TABLE = "embed_tokens/embedding"
WARMUP = 0.5
"""Share of the steps over which the rate rises; it then falls linearly to 0."""
HELD_OUT = 256
"""Snippets that are left out of training, to judge the rows before and after it; at most a
tenth."""


class Snippets(NamedTuple):
    """Text in source tokens, and with new tokens in place of their pieces; int32."""

    original: Int[np.ndarray, "n S"]
    """0 behind the last token."""
    merged: Int[np.ndarray, "n S"]
    """V + k is the k-th new token; `NONE` behind the last token."""
    positions: Int[np.ndarray, "n S"]
    """The position in `original` that has read what this one of `merged` has; `NONE` behind it."""


class Result(NamedTuple):
    rows: Float[np.ndarray, "m D"]
    facts: Mapping[str, float]
    """`snippets` trained on, `tokens` in them, `loss_before` and `loss_after` on those left out."""


# --- Finding snippets ---------------------------------------------------------------------------


class Finder(NamedTuple):
    """The tokenizers and the new tokens for which snippets are wanted."""

    source: PreTrainedTokenizerBase
    target: PreTrainedTokenizerBase
    ids: Int[np.ndarray, "m"]
    """The new tokens, as target ids."""
    source_size: int
    """V"""
    start: int
    """The source token before every snippet."""

    def find(self, documents: Iterable[Document], config: TokenDistillationConfig) -> Snippets:
        """Up to `config.snippets` snippets around each new token, `config.most_snippets` in all.

        Where there are more, every token keeps its first before any keeps a second.
        """
        number = np.full(1 + self.ids.max(initial=0), NONE, np.int64)
        number[self.ids] = np.arange(len(self.ids))
        counts, found = np.zeros(len(self.ids), np.int64), []
        backends = [plain_backend(tokenizer) for tokenizer in (self.source, self.target)]
        for group in in_groups(documents):
            texts = [document.text for document in group]
            sides = [token_boundaries(backend, texts) for backend in backends]
            for text, source, target in zip(texts, *sides):
                merged = _merge(source, target, len(text), number, self.source_size)
                found += self._around(merged, source.ids, counts, config)
            if (counts >= config.snippets).all():
                break
        found.sort(key=lambda item: item[0])
        return self._arrays([item[1:] for item in found[: config.most_snippets]], config)

    def _around(
        self,
        merged: "_Merged",
        source: Int[np.ndarray, "n"],
        counts: Int[np.ndarray, "m"],
        config: TokenDistillationConfig,
    ) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
        """(how many the token had before, original, merged, positions); adds to `counts`."""
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
        found: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
        config: TokenDistillationConfig,
    ) -> Snippets:
        shape = len(found), config.snippet_length + 1
        snippets = Snippets(*(np.full(shape, fill, np.int32) for fill in (0, NONE, NONE)))
        snippets.original[:, 0] = snippets.merged[:, 0] = self.start
        snippets.positions[:, 0] = 0
        for row, (original, merged, positions) in enumerate(found):
            snippets.original[row, 1 : 1 + len(original)] = original
            snippets.merged[row, 1 : 1 + len(merged)] = merged
            snippets.positions[row, 1 : 1 + len(merged)] = positions + 1
        return snippets


class _Merged(NamedTuple):
    """A document in source tokens, with new tokens in place of their pieces."""

    tokens: Int[np.ndarray, "k"]
    last: Int[np.ndarray, "k"]
    """The index of each one's last source token."""


def _merge(
    source: Boundaries,
    target: Boundaries,
    length: int,
    number: Int[np.ndarray, "V_t"],
    source_size: int,
) -> _Merged:
    """
    Args:
      length: of the text, in characters.
      number: of each target token among the new ones, or `NONE`; later ids are not new.
    """
    at = np.full(length + 1, NONE, np.int64)
    known = np.flatnonzero(source.ends != NONE)
    at[source.ends[known]] = known
    begins = np.append(0, target.ends[:-1])
    new = target.ids < len(number)
    new[new] = number[target.ids[new]] != NONE
    new &= (begins != NONE) & (target.ends != NONE)
    new[new] = (at[target.ends[new]] != NONE) & ((begins[new] == 0) | (at[begins[new]] != NONE))
    first, last = at[begins[new]] + 1, at[target.ends[new]]  # at[0] is NONE, so 0 is the first
    tokens, change = source.ids.copy(), np.zeros(len(source.ids) + 1, np.int64)
    tokens[last] = source_size + number[target.ids[new]]
    np.add.at(change, first, 1)
    np.add.at(change, last, -1)
    kept = np.flatnonzero(np.cumsum(change)[:-1] == 0)
    return _Merged(tokens[kept], kept)


# --- Training -----------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Snippets on the devices."""

    original: Int[Array, "B S"]
    merged: Int[Array, "B S"]
    positions: Int[Array, "B S"]


class _State(NamedTuple):
    change: Float[Array, "R D"]
    """What is added to the table."""
    optimizer: optax.OptState


class _Frozen(NamedTuple):
    model: Params
    """The source model; its table holds the rows of the new tokens behind those of the source's."""
    free: Bool[Array, "R 1"]
    """Rows that train."""


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
    """The rows of the new tokens, trained on the snippets; as they are if that gains nothing.

    Args:
      model, params: the source model, without padding in its table: V rows.
      rows: of the new tokens, to begin with.
    """
    order = np.random.default_rng([seed, 7]).permutation(len(snippets.original))
    held_out = min(HELD_OUT, len(order) // 10)
    judged, trained = (
        list(_batches(snippets, chosen, config.batch_size, mesh))
        for chosen in (order[:held_out], order[held_out:])
    )
    part, body = _truncated(model, params, config.layers)
    settings = _Settings(part, compute.dtype, mesh)
    frozen, state = _start(settings, body, rows)
    before = _mean_loss(state, frozen, judged, settings)
    tokens = int((snippets.merged[order[held_out:]] != NONE).sum())
    progress = Progress(log, "token distillation", tokens, "tokens")
    warmup = max(1, round(WARMUP * len(trained)))
    for step, batch in enumerate(trained):
        rate = config.learning_rate * min(
            (step + 1) / warmup, (len(trained) - step) / max(1, len(trained) - warmup)
        )
        state = _step(state, frozen, _put(batch, mesh), jnp.float32(rate), settings=settings)
        jax.block_until_ready(state.change)  # or what is printed runs ahead
        progress.update(tokens / len(trained))
    after = _mean_loss(state, frozen, judged, settings)
    gained = not judged or after < before
    told = (
        f"; mean squared difference {before:.4g} to {after:.4g} on text left out" if judged else ""
    )
    progress.done(f"{len(rows):,} rows{told}" + ("" if gained else ": left as they were"))
    if gained:
        size = len(params["embed_tokens"]["embedding"])
        rows = rows + sharding.to_host(state.change, slice(size, size + len(rows)))
    facts = {"snippets": float(len(order) - held_out), "tokens": float(tokens)}
    losses = {"loss_before": before, "loss_after": after} if judged else {}
    return Result(rows, facts | losses)


def _truncated(model: ModelConfig, params: Params, layers: int) -> tuple[ModelConfig, Params]:
    """The model with this many of its layers; 0: all."""
    if not layers or layers >= model.num_layers:
        return model, params
    part = dataclasses.replace(model, num_layers=layers, layer_kinds=model.layer_kinds[:layers])
    return part, {**params, "layers": jax.tree.map(lambda x: x[:layers], params["layers"])}


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
        float(_loss_of(state.change, frozen, _put(batch, settings.mesh), settings=settings))
        for batch in batches
    ]
    return float(np.mean(losses)) if losses else float("nan")


@functools.partial(jax.jit, static_argnames="settings")
def _loss_of(
    change: Float[Array, "R D"], frozen: _Frozen, batch: Batch, *, settings: _Settings
) -> Float[Array, ""]:
    with sharding.within(settings.mesh):
        return _loss(change, frozen, batch, settings)


def _loss(
    change: Float[Array, "R D"], frozen: _Frozen, batch: Batch, settings: _Settings
) -> Float[Array, ""]:
    """The mean squared difference of hidden states over all tokens of `merged` and all of D."""
    table = frozen.model["embed_tokens"]["embedding"] + frozen.free * change
    student = {**frozen.model, "embed_tokens": {"embedding": table}}
    read = functools.partial(
        forward, settings.model, dtype=jnp.dtype(settings.dtype), remat="layer", unroll=1
    )
    real = batch.merged != NONE
    states = read(student, jnp.maximum(batch.merged, 0)).astype(jnp.float32)
    teacher = jax.lax.stop_gradient(read(frozen.model, batch.original)).astype(jnp.float32)
    at = jnp.maximum(batch.positions, 0)[..., None]
    squares = jnp.square(states - jnp.take_along_axis(teacher, at, axis=1))
    count = jnp.maximum(real.sum(), 1) * states.shape[-1]
    return jnp.where(real[..., None], squares, 0.0).sum() / count


def _batches(
    snippets: Snippets, chosen: Int[np.ndarray, "n"], size: int, mesh: Mesh
) -> Iterator[Snippets]:
    """The chosen snippets; the last batch is filled up with empty ones."""
    devices = sharding.sequences_at_once(mesh)
    size = -(-size // devices) * devices
    for begin in range(0, len(chosen), size):
        rows = chosen[begin : begin + size]
        missing = ((0, size - len(rows)), (0, 0))
        yield Snippets(
            *(
                np.pad(values[rows], missing, constant_values=fill)
                for values, fill in zip(snippets, (0, NONE, NONE))
            )
        )


def _put(batch: Snippets, mesh: Mesh) -> Batch:
    split = NamedSharding(mesh, P(sharding.BATCH))
    return Batch(*(sharding.put(values, split) for values in batch))
