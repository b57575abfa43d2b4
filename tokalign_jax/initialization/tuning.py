"""Tuning of all rows together by a linear map from features of tokens.

Rows that are good one by one need not be good together: they compete for probability, and the model
reads them in sequences that it never met. A few steps of training would adapt them, but only rows
of tokens in the text of these steps. So a linear map is trained that all rows share:

    row_v <- row_v + x_v B

x_v are the K principal components of the features of token v (`composition.py`: mean states before
and after it, mean, first and last of its pieces' rows, log frequency), and a one. Only B, [K + 1,
D], trains, one for composed tokens and one for tokens of the source. It is so small that ten
thousand tokens of text suffice. The layers are frozen.

Adam's update of B is scaled so that the rows of a step move by a share of their standard deviation,
whatever the width of the model, the size of its rows, or the loss.

Letters: D model, V vocabulary, R rows in memory, n tokens that move, F features, K components, A
micro-batches, B sequences, T length.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from tokalign_jax.config import ComputeConfig
from tokalign_jax.initialization import composition
from tokalign_jax.initialization.composition import Columns, Tokens
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.transformer import Params, forward, head_matrix
from tokalign_jax.parallel import sharding
from tokalign_jax.text.tokenizing import TokenShards
from tokalign_jax.training.batches import TokenSource
from tokalign_jax.training.losses import cross_entropy, head_of
from tokalign_jax.training.optimizer import Schedule
from tokalign_jax.utils import paths
from tokalign_jax.utils.progress import Log, Progress

COMPONENTS = 640
"""K, at most"""
SAMPLE = 8192
"""Tokens that the principal components are computed from."""
STEPS = 120
LEAST_TOKENS = 1024
"""Tokens of a step, at least: shorter text gets fewer steps, longer text larger ones."""
RATE = 0.014
"""RMS change of rows in a step at the peak, in units of the standard deviation of the source's
rows."""
WARMUP = 0.05
LENGTH = 512
"""T, if the model has that many positions."""
MICRO_BATCH_TOKENS = {"cpu": 1024}
OTHER_MICRO_BATCH_TOKENS = 8192
"""Tokens that a device reads at once, by backend."""
JUDGED = 8
"""Held-out sequences that decide whether the tuned rows are kept."""
NONE = -1
"""Padding of sequences."""


class Scales(NamedTuple):
    """Offsets and factors that standardize features, one factor for each of `Columns`; float32."""

    offsets: Columns
    factors: Columns


class Tuned(NamedTuple):
    params: Params
    facts: Mapping[str, float]
    """`tokens` read, `nats_before` and `nats_after` a held-out token; empty if nothing was
    tuned."""


class _State(NamedTuple):
    rule: dict[str, Float[Array, "G D"]]
    """B of both kinds of tokens, stacked (G = 2 (K + 1)), by path of the matrix."""
    moments: optax.OptState
    step: Int[Array, ""]


def tune(
    config: ModelConfig,
    params: Params,
    rows: Mapping[str, Float[np.ndarray, "V_s D"]],
    tokens: Tokens,
    composed: Bool[np.ndarray, "n"],
    shards: TokenShards,
    budget: int,
    compute: ComputeConfig,
    mesh: Mesh,
    log: Log,
    seed: int,
) -> Tuned:
    """Move the rows of `tokens` by the linear map that predicts the text best; keep it only if it
    gains.

    Args:
      config, params: the model with the new vocabulary.
      rows: float32, the source model's matrices by their paths in `params`.
      tokens: target tokens whose rows move, with their pieces in the source.
      composed: which of them are composed.
      shards: text in the new vocabulary's tokens.
      budget: tokens that are read, at most; at least one sequence is.
      compute: type of activations, and tokens whose logits exist at once.
    """
    size = len(shards.counts)
    features = {path: _features(of, tokens, composed, size, seed) for path, of in rows.items()}
    deviations = {path: np.float32(np.sqrt(np.var(of, axis=0).mean())) for path, of in rows.items()}
    leaves = paths.flatten(params)
    features = {path: _on_rows(path, of, len(leaves[path]), mesh) for path, of in features.items()}
    whole = NamedSharding(mesh, sharding.REPLICATED)
    second = jax.jit(_second, out_shardings=whole)(features, len(tokens.ids))
    shapes = {path: (of.shape[1], config.hidden_size) for path, of in features.items()}
    state = jax.jit(lambda: _start(shapes), out_shardings=whole)()
    batches, judged = _batches(shards, config, budget, mesh, seed)
    placed = sharding.place(params, mesh)
    how = {"config": config, "compute": compute, "mesh": mesh}
    split = NamedSharding(mesh, P(None, sharding.BATCH))

    def judge(rule: dict[str, Array]) -> float:
        return float(_judge(rule, placed, features, sharding.put(judged, split), **how))

    before = judge(state.rule)
    schedule = Schedule({"rule": RATE}, float(len(batches)), float(round(WARMUP * len(batches))))
    tokens_read = int((batches[..., 1:] != NONE).sum())
    progress = Progress(log, "tuning", tokens_read, "tokens")
    for batch in batches:
        state = _step(
            state, placed, features, second, deviations, sharding.put(batch, split), schedule, **how
        )
        state.step.block_until_ready()  # or what is printed runs ahead
        progress.update(tokens_read / len(batches))
    after = judge(state.rule)
    progress.done(
        f"{before:.3f} to {after:.3f} nats a token on text left out"
        + ("" if after < before else ": left as it was")
    )
    facts = {"tokens": tokens_read, "nats_before": before, "nats_after": after}
    if not after < before:
        return Tuned(params, facts)
    made = jax.jit(_tables)(state.rule, placed, features)
    for path, table in made.items():
        moved = np.array(leaves[path], np.float32)
        moved[:size] = sharding.to_host(table, slice(size))
        leaves[path] = moved
    return Tuned(paths.unflatten(leaves), facts)


def _second(
    features: dict[str, Float[Array, "R G"]], count: Int[Array, ""]
) -> dict[str, Float[Array, "G G"]]:
    """Return the mean outer product of the features of tokens that move."""
    return {
        path: jnp.matmul(of.T, of, precision="highest") / count for path, of in features.items()
    }


_ADAM = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(0.9, 0.95))


def _start(shapes: Mapping[str, tuple[int, int]]) -> _State:
    rule = {path: jnp.zeros(shape) for path, shape in shapes.items()}
    return _State(rule, _ADAM.init(rule), jnp.zeros((), jnp.int32))


@functools.partial(jax.jit, static_argnames=("config", "compute", "mesh"), donate_argnums=0)
def _step(
    state: _State,
    params: Params,
    features: dict[str, Array],
    second: dict[str, Array],
    deviations: dict[str, Array],
    batch: Int[Array, "A B T+1"],
    schedule: Schedule,
    *,
    config: ModelConfig,
    compute: ComputeConfig,
    mesh: Mesh,
) -> _State:
    with sharding.within(mesh):
        tables = _tables(state.rule, params, features)

        def add(sums: Any, tokens: Array) -> tuple[Any, None]:
            gradients = jax.grad(lambda *of: _loss(*of)[0])(tables, params, tokens, config, compute)
            return jax.tree.map(jnp.add, sums, gradients), None

        sums, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, tables), batch)
        count = jnp.sum(batch[..., 1:] != NONE)
        gradients = {
            path: jnp.matmul(of.T, sums[path] / count, precision="highest")
            for path, of in features.items()
        }
        directions, moments = _ADAM.update(gradients, state.moments)
        rate = schedule.rates(state.step)["rule"]

        def moved(rule: Array, along: Array, second: Array, deviation: Array) -> Array:
            size = jnp.sqrt(jnp.sum(along * (second @ along)) / along.shape[1])
            return rule - rate * deviation / jnp.maximum(size, 1e-30) * along

        rule = jax.tree.map(moved, state.rule, directions, second, deviations)
        return _State(rule, moments, state.step + 1)


@functools.partial(jax.jit, static_argnames=("config", "compute", "mesh"))
def _judge(
    rule, params, features, batch: Int[Array, "A B T+1"], *, config, compute, mesh
) -> Float[Array, ""]:
    """Return the mean negative log-likelihood of a token, nats."""
    with sharding.within(mesh):
        tables = _tables(rule, params, features)
        totals, counts = jax.lax.map(
            lambda tokens: _loss(tables, params, tokens, config, compute), batch
        )
        return totals.sum() / counts.sum()


def _tables(
    rule: dict[str, Array], params: Params, features: dict[str, Array]
) -> dict[str, Float[Array, "R D"]]:
    """Return the vocabulary's matrices with their rows moved."""
    leaves = paths.flatten(params)
    return {
        path: leaves[path] + jnp.matmul(of, rule[path], precision="highest")
        for path, of in features.items()
    }


def _loss(
    tables: dict[str, Array],
    params: Params,
    tokens: Int[Array, "B T+1"],
    config: ModelConfig,
    compute: ComputeConfig,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return the summed negative log-likelihood of the tokens in nats, and their number."""
    params = paths.unflatten(paths.flatten(params) | tables)
    inputs = jnp.maximum(tokens[:, :-1], 0)
    hidden = forward(
        config, params, inputs, dtype=jnp.dtype(compute.dtype), remat="layer", unroll=1
    )
    return cross_entropy(hidden, head_matrix(params), tokens[:, 1:], head_of(config, compute))


def _batches(
    shards: TokenShards, config: ModelConfig, budget: int, mesh: Mesh, seed: int
) -> tuple[Int[np.ndarray, "S A B T+1"], Int[np.ndarray, "j B T+1"]]:
    """Draw disjoint sequences for all steps, and held-out ones; independent of the devices."""
    length = min(LENGTH, config.max_positions, len(shards) - 1)
    source = TokenSource(shards, length)
    # None is read twice, but where the text has too few: then they are judged on what they were
    # tuned on.
    budget = min(budget // length, len(source) - JUDGED)
    steps = min(STEPS, max(1, budget // max(1, LEAST_TOKENS // length)))
    each = max(1, budget // steps)
    order = np.random.default_rng(seed).permutation(len(source))
    found = np.stack([source[i] for i in np.resize(order, steps * each + JUDGED).tolist()])
    batches = [_rounds(of, mesh) for of in np.split(found[JUDGED:], steps)]
    return np.stack(batches), _rounds(found[:JUDGED], mesh)


def _rounds(sequences: Int[np.ndarray, "n T+1"], mesh: Mesh) -> Int[np.ndarray, "A B T+1"]:
    """Group sequences into rounds of as many as the devices read at once, padded with empty
    ones."""
    devices, size = sharding.sequences_at_once(mesh), sequences.shape[1]
    micro = MICRO_BATCH_TOKENS.get(jax.default_backend(), OTHER_MICRO_BATCH_TOKENS) // (size - 1)
    at_once = devices * min(max(1, micro), -(-len(sequences) // devices))
    filling = -len(sequences) % at_once
    return np.pad(sequences, ((0, filling), (0, 0)), constant_values=NONE).reshape(
        -1, at_once, size
    )


# --- Features of tokens -------------------------------------------------------------------------


def _features(
    rows: Float[np.ndarray, "V_s D"],
    tokens: Tokens,
    composed: Bool[np.ndarray, "n"],
    size: int,
    seed: int,
) -> Float[np.ndarray, "V G"]:
    """Return features and a 1 in the columns of a token's kind, 0 elsewhere and for fixed tokens;
    float32."""
    random = np.random.default_rng(seed)
    parts = []
    for kind in (composed, ~composed):
        if not kind.any():
            continue
        chosen = np.flatnonzero(kind)
        sample = np.sort(random.permutation(chosen)[:SAMPLE])
        sampled = Columns(*map(np.concatenate, zip(*_blocks(rows, tokens, sample))))
        scales = _scales(sampled)
        known = _described(sampled, scales)
        centre, basis = _principal(known, jax.random.key(seed), min(COMPONENTS, *known.shape))
        part = np.zeros((size, basis.shape[1] + 1), np.float32)
        start = 0
        for of in _blocks(rows, tokens, chosen):
            found = np.asarray((_described(of, scales) - centre) @ basis)
            ids = tokens.ids[chosen[start : start + len(found)]]
            part[ids, :-1], part[ids, -1] = found, 1.0
            start += len(found)
        parts.append(part)
    return np.concatenate(parts, axis=1)


def _blocks(rows: Float[np.ndarray, "V_s D"], tokens: Tokens, chosen: Int[np.ndarray, "m"]):
    """Yield the features of the `chosen` tokens in blocks."""
    for block, columns in composition.column_blocks(rows, tokens, chosen):
        yield Columns(*(of[: len(block)] for of in columns))


def _scales(columns: Columns) -> Scales:
    offsets, factors = [], []
    for values in columns:
        known = values[_seen(values)] if values.ndim > 1 else values
        offset = known.mean(axis=0) if len(known) else np.zeros(values.shape[1:], np.float32)
        offsets.append(offset)
        # Of what is left: final states of large models have columns that are large and nearly the
        # same for every token.
        factors.append(np.float32(1 / ((known - offset).std() + 1e-6) if len(known) else 0.0))
    return Scales(Columns(*offsets), Columns(*factors))


def _seen(values: Any) -> Any:
    """Return which of the mean states [n, D] belong to tokens that were seen in text."""
    return (values != 0).any(axis=1)


@jax.jit
def _described(columns: Columns, scales: Scales) -> Float[Array, "n F"]:
    found = []
    for values, offset, factor in zip(columns, *scales):
        scaled = (values - offset) * factor
        found.append(
            jnp.where(_seen(values)[:, None], scaled, 0.0) if values.ndim > 1 else scaled[:, None]
        )
    return jnp.concatenate(found, axis=1)


@functools.partial(jax.jit, static_argnames="count")
def _principal(
    known: Float[Array, "n F"], key: Array, count: int
) -> tuple[Float[Array, "F"], Float[Array, "F K"]]:
    """(mean, basis) of the first `count` principal components by subspace iteration (arXiv
    0909.4061, algorithm 4.4).

    The basis is scaled so that a component has a mean square of 1, on average over them; among
    themselves they keep their sizes.
    """
    centre = known.mean(axis=0)
    known = known - centre
    product = functools.partial(jnp.matmul, precision="highest")
    basis = jax.random.normal(key, (known.shape[1], count))
    for _ in range(3):
        basis, _ = jnp.linalg.qr(product(known.T, product(known, basis)))
    seen = product(known, basis)
    values, vectors = jnp.linalg.eigh(product(seen.T, seen) / len(known))
    return centre, product(basis, vectors) * jnp.sqrt(count / jnp.maximum(values.sum(), 1e-3))


def _on_rows(path: str, of: Float[np.ndarray, "V G"], rows: int, mesh: Mesh) -> Float[Array, "R G"]:
    """Shard features as the rows that they belong to."""
    shape = sharding.padded_shape(path, (rows, of.shape[1]), mesh)
    return sharding.put(
        np.pad(of, ((0, shape[0] - len(of)), (0, 0))), sharding.sharding_of(path, shape, mesh)
    )
