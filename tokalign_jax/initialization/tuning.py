"""Tuning of all rows together by a linear map from features of tokens.

Rows that are good one by one need not be good together: they compete for probability, and the model
reads them in new sequences. A few training steps would adapt them, but only rows of tokens in the
text of these steps. Therefore all rows share one trainable linear map:

    row_v <- row_v + x_v B

x_v are the K principal components of the features of token v (`composition.py`: mean states before
and after it, mean, first and last of its pieces' rows, log frequency), and a one. Only B, [K + 1,
D], trains, one for composed tokens and one for tokens of the source. It is so small that ten
thousand tokens of text suffice. The layers are frozen.

Adam's update of B is scaled so that the rows of a step move by a share of their standard deviation,
whatever the width of the model, the size of its rows, or the loss.
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
"""Tokens per step, at least: shorter text gets fewer steps, longer text larger ones."""
RATE = 0.014
"""RMS change of rows per step at the peak, in units of the standard deviation of the source's rows.
"""
WARMUP = 0.05
LENGTH = 512
"""T, unless the model has fewer positions."""
MICRO_BATCH_TOKENS = {"cpu": 1024}
OTHER_MICRO_BATCH_TOKENS = 8192
"""Tokens per device and micro-batch, by backend."""
HELD_OUT = 8
"""Held-out sequences that decide whether the tuned rows are kept."""
NONE = -1
"""Padding of sequences."""


class Scales(NamedTuple):
    """Offsets and factors that standardize features, one factor for each of `Columns`; float32."""

    offsets: Columns
    factors: Columns


class Tuned(NamedTuple):
    """Parameters after tuning, and measurements."""

    params: Params
    facts: Mapping[str, float]
    """`tokens` read, `nats_before` and `nats_after` per held-out token; empty if not tuned."""


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
    """Move the rows of `tokens` by the linear map that best predicts the text.

    The rows are returned unchanged if the held-out loss does not fall.

    Args:
      config: the new model's architecture.
      params: the new model's parameters.
      rows: float32, the source model's matrices by their paths in `params`.
      tokens: target tokens whose rows move, with their pieces in the source.
      composed: which of them are composed.
      shards: text in the new vocabulary's tokens.
      budget: tokens to read, at most; at least one sequence is read.
      compute: type of activations, and tokens whose logits exist at once.
      mesh: devices that train.
      log: receives progress.
      seed: of the choice of text, and of the principal components.
    """
    size = len(shards.counts)
    features = _placed_features(params, rows, tokens, composed, size, mesh, seed)
    deviations = {path: np.float32(np.sqrt(np.var(x, axis=0).mean())) for path, x in rows.items()}
    replicated = NamedSharding(mesh, sharding.REPLICATED)
    second = jax.jit(_second, out_shardings=replicated)(features, len(tokens.ids))
    shapes = {path: (x.shape[1], config.hidden_size) for path, x in features.items()}
    state = jax.jit(lambda: _start(shapes), out_shardings=replicated)()
    batches, held_out = _batches(shards, config, budget, mesh, seed)
    split = NamedSharding(mesh, P(None, sharding.BATCH))
    held_out, placed = sharding.put(held_out, split), sharding.place(params, mesh)
    static = {"config": config, "compute": compute, "mesh": mesh}

    before = float(_mean_loss(state.rule, placed, features, held_out, **static))
    schedule = Schedule({"rule": RATE}, float(len(batches)), float(round(WARMUP * len(batches))))
    tokens_read = int((batches[..., 1:] != NONE).sum())
    progress = Progress(log, "tuning", tokens_read, "tokens")
    for batch in batches:
        inputs = placed, features, second, deviations, sharding.put(batch, split), schedule
        state = _step(state, *inputs, **static)
        state.step.block_until_ready()  # Otherwise the logged rate would run ahead.
        progress.update(tokens_read / len(batches))
    after = float(_mean_loss(state.rule, placed, features, held_out, **static))
    progress.done(
        f"{before:.3f} to {after:.3f} nats a token on held-out text"
        + ("" if after < before else ": the rows are left as they were")
    )
    facts = {"tokens": tokens_read, "nats_before": before, "nats_after": after}
    if not after < before:
        return Tuned(params, facts)
    return Tuned(_merged(params, jax.jit(_tables)(state.rule, placed, features), size), facts)


def _placed_features(
    params: Params,
    rows: Mapping[str, Float[np.ndarray, "V_s D"]],
    tokens: Tokens,
    composed: Bool[np.ndarray, "n"],
    size: int,
    mesh: Mesh,
    seed: int,
) -> dict[str, Float[Array, "R G"]]:
    """Return features by the path of a matrix, sharded like its rows."""
    leaves = paths.flatten(params)
    features = {path: _features(x, tokens, composed, size, seed) for path, x in rows.items()}
    return {path: _on_rows(path, x, len(leaves[path]), mesh) for path, x in features.items()}


def _merged(params: Params, tables: Mapping[str, Float[Array, "R D"]], size: int) -> Params:
    """Return the parameters with the first `size` rows of these tables, on the host."""
    leaves = paths.flatten(params)
    for path, table in tables.items():
        moved = np.array(leaves[path], np.float32)
        moved[:size] = sharding.to_host(table, slice(size))
        leaves[path] = moved
    return paths.unflatten(leaves)


def _second(
    features: dict[str, Float[Array, "R G"]], count: Int[Array, ""]
) -> dict[str, Float[Array, "G G"]]:
    """Return the mean outer product of the features of tokens that move."""
    return {path: jnp.matmul(x.T, x, precision="highest") / count for path, x in features.items()}


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
    """Take one step; gradients of the rows are summed over the micro-batches."""
    with sharding.within(mesh):
        tables = _tables(state.rule, params, features)

        def add(sums: Any, tokens: Array) -> tuple[Any, None]:
            gradients = jax.grad(lambda *args: _loss(*args)[0])(
                tables, params, tokens, config, compute
            )
            return jax.tree.map(jnp.add, sums, gradients), None

        sums, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, tables), batch)
        count = jnp.sum(batch[..., 1:] != NONE)
        gradients = {
            path: jnp.matmul(x.T, sums[path] / count, precision="highest")
            for path, x in features.items()
        }
        directions, moments = _ADAM.update(gradients, state.moments)
        rate = schedule.rates(state.step)["rule"]

        def moved(rule: Array, along: Array, second: Array, deviation: Array) -> Array:
            size = jnp.sqrt(
                jnp.sum(along * jnp.matmul(second, along, precision="highest")) / along.shape[1]
            )
            return rule - rate * deviation / jnp.maximum(size, 1e-30) * along

        rule = jax.tree.map(moved, state.rule, directions, second, deviations)
        return _State(rule, moments, state.step + 1)


@functools.partial(jax.jit, static_argnames=("config", "compute", "mesh"))
def _mean_loss(
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
        path: leaves[path] + jnp.matmul(x, rule[path], precision="highest")
        for path, x in features.items()
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
    # No sequence is read twice. Text that is too short for that is used for both training and
    # evaluation.
    budget = min(budget // length, len(source) - HELD_OUT)
    steps = min(STEPS, max(1, budget // max(1, LEAST_TOKENS // length)))
    per_step = max(1, budget // steps)
    order = np.random.default_rng(seed).permutation(len(source))
    chosen = np.resize(order, steps * per_step + HELD_OUT)
    sequences = np.stack([source[i] for i in chosen.tolist()])
    batches = [_rounds(step, mesh) for step in np.split(sequences[HELD_OUT:], steps)]
    return np.stack(batches), _rounds(sequences[:HELD_OUT], mesh)


def _rounds(sequences: Int[np.ndarray, "n T+1"], mesh: Mesh) -> Int[np.ndarray, "A B T+1"]:
    """Group sequences into micro-batches of as many as the devices read at once, padded."""
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
    """Return features and a 1 in the columns of a token's kind, float32.

    Other columns are 0, and so are all columns of frozen tokens.
    """
    random = np.random.default_rng(seed)
    parts = []
    for kind in (composed, ~composed):
        if not kind.any():
            continue
        chosen = np.flatnonzero(kind)
        sample = np.sort(random.permutation(chosen)[:SAMPLE])
        sampled = Columns(*map(np.concatenate, zip(*_blocks(rows, tokens, sample))))
        scales = _scales(sampled)
        described = _described(sampled, scales)
        centre, basis = _principal(
            described, jax.random.key(seed), min(COMPONENTS, *described.shape)
        )
        part = np.zeros((size, basis.shape[1] + 1), np.float32)
        start = 0
        for block in _blocks(rows, tokens, chosen):
            components = np.asarray((_described(block, scales) - centre) @ basis)
            ids = tokens.ids[chosen[start : start + len(components)]]
            part[ids, :-1], part[ids, -1] = components, 1.0
            start += len(components)
        parts.append(part)
    return np.concatenate(parts, axis=1)


def _blocks(rows: Float[np.ndarray, "V_s D"], tokens: Tokens, chosen: Int[np.ndarray, "m"]):
    """Yield the features of the tokens `chosen` in blocks."""
    for block, columns in composition.column_blocks(rows, tokens, chosen):
        yield Columns(*(column[: len(block)] for column in columns))


def _scales(columns: Columns) -> Scales:
    offsets, factors = [], []
    for values in columns:
        seen = values[_seen(values)] if values.ndim > 1 else values
        offset = seen.mean(axis=0) if len(seen) else np.zeros(values.shape[1:], np.float32)
        offsets.append(offset)
        # One factor for each block of columns, after centring: final states of large models have
        # columns that are large and nearly the same for every token.
        factors.append(np.float32(1 / ((seen - offset).std() + 1e-6) if len(seen) else 0.0))
    return Scales(Columns(*offsets), Columns(*factors))


def _seen(values: Any) -> Any:
    """Return which of the mean states [n, D] belong to tokens that were seen in text."""
    return (values != 0).any(axis=1)


@jax.jit
def _described(columns: Columns, scales: Scales) -> Float[Array, "n F"]:
    blocks = []
    for values, offset, factor in zip(columns, *scales):
        scaled = (values - offset) * factor
        blocks.append(
            jnp.where(_seen(values)[:, None], scaled, 0.0) if values.ndim > 1 else scaled[:, None]
        )
    return jnp.concatenate(blocks, axis=1)


@functools.partial(jax.jit, static_argnames="count")
def _principal(
    values: Float[Array, "n F"], key: Array, count: int
) -> tuple[Float[Array, "F"], Float[Array, "F K"]]:
    """Compute the first `count` principal components by subspace iteration.

    Algorithm 4.4 of arXiv 0909.4061. The basis is scaled so that the components have a mean square
    of 1 on average; their relative sizes stay.

    Returns:
      The mean, and the basis.
    """
    centre = values.mean(axis=0)
    values = values - centre
    product = functools.partial(jnp.matmul, precision="highest")
    basis = jax.random.normal(key, (values.shape[1], count))
    for _ in range(3):
        basis, _ = jnp.linalg.qr(product(values.T, product(values, basis)))
    projected = product(values, basis)
    eigenvalues, vectors = jnp.linalg.eigh(product(projected.T, projected) / len(values))
    scale = jnp.sqrt(count / jnp.maximum(eigenvalues.sum(), 1e-3))
    return centre, product(basis, vectors) * scale


def _on_rows(
    path: str, features: Float[np.ndarray, "V G"], rows: int, mesh: Mesh
) -> Float[Array, "R G"]:
    """Shard features like the rows that they belong to."""
    shape = sharding.padded_shape(path, (rows, features.shape[1]), mesh)
    padded = np.pad(features, ((0, shape[0] - len(features)), (0, 0)))
    return sharding.put(padded, sharding.sharding_of(path, shape, mesh))
