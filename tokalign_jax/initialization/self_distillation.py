"""A start that keeps what the source model knows: trained on little text, with the source as
teacher.

The mean of pieces (FVT) makes rows that are right one by one, but not together: composed tokens do
not get the probability of their pieces, and words that the new tokenizer splits in another way are
words that the body never learned to spell. So the new model reads text that the source wrote
(`self_text.py`), and a share of the corpus, and learns to find it as likely as the source does,
with the same states (`training/cross_tokenizer.py`).

The student's vocabulary is the tokens that this text holds, which makes a step as fast as its text
needs, and drives no others down. What the rest takes of the probability is settled at the end
(`unseen.py`).

What trains:

- rows: a table of changes, one for each token that the text holds, and a network that all composed
  tokens share, from features of a token (`row_features.py`) to the change of its row,
  row + table + deviation (x A + gelu(x B) C). So tokens change that the text does not hold.
- the body, at a small rate, unless `initialization.trains` is `rows`: then rows of tokens that the
  source has stay too.

Special tokens never change.

Letters: D model, V vocabulary, R rows in memory, F features, H hidden units, A micro-batches, B
sequences, T target tokens of a sequence.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from tokalign_jax.config import Config
from tokalign_jax.initialization import unseen
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.transformer import Params, forward
from tokalign_jax.parallel import sharding
from tokalign_jax.text import pairs as pairing
from tokalign_jax.training import cross_tokenizer
from tokalign_jax.training.cross_tokenizer import Batch, Models, Terms, Weights
from tokalign_jax.training.optimizer import Schedule, scale_by_damped_adam
from tokalign_jax.utils import compiling, paths
from tokalign_jax.utils.progress import Log, Progress

LENGTH = 256
"""T, where the model has that many positions."""
STEPS = 200
LEAST_SEQUENCES, MOST_SEQUENCES = 4, 64
"""B of a step: as many as give `STEPS`, between these."""
MOST_PASSES = 4
"""Over the text."""
BODY_RATE = 2e-4
"""Peak rate of the body for a model of the width `WIDTH`, and of narrower ones; of wider ones less,
by the root of the ratio.
"""
WIDTH = 576
ROW_RATE = 0.01
"""Peak rate of the table, in units of the deviation of the source's rows."""
NETWORK_RATE = 1e-3
ROW_DAMPING = 0.3
WARMUP = 0.05
HIDDEN = 1024
"""H, at most; and at most twice D"""
WRITTEN = (0.5, 1.0)
"""Weights of next-token loss and likelihood divergence on text of the source model."""
CORPUS = (1.0, 0.5)
"""The same on text of the corpus."""
HELD_OUT = 64
"""Sequences that are left out of training, on which the model is measured before and after it."""
MICRO_BATCH_TOKENS = {"cpu": 1024}
OTHER_MICRO_BATCH_TOKENS = 16_384
"""Target tokens that a device reads at once, by backend."""


class Rows(NamedTuple):
    """How the rows of one matrix of the vocabulary may change."""

    features: Float[np.ndarray, "V F"]
    """0 for tokens that are not composed."""
    free: np.ndarray
    """bool [V]: tokens that have a change of their own."""
    deviation: float
    """Of the source's rows."""


HostBatch = Any
"""A `Batch` of NumPy arrays."""


class Result(NamedTuple):
    """The model after training, and what was measured."""

    params: Params
    facts: Mapping[str, float]
    """`tokens` trained on; `loss_before`, `loss_after`, `distance_before`, `distance_after` on
    held-out sequences (`cross_tokenizer.Terms`); `unseen_shift`, nats (`unseen.shift`).
    """


class _State(NamedTuple):
    trainable: dict[str, Any]
    """`table` and `network` by the path of a matrix, and `body`, a tree of the rest of the model.
    """
    optimizer: optax.OptState
    step: Int[Array, ""]


def distill(
    config: Config,
    models: Models,
    params: Params,
    teacher: Params,
    rows: Mapping[str, Rows],
    written: Sequence[pairing.Pair],
    corpus: Sequence[pairing.Pair],
    budget: int,
    trains_body: bool,
    mesh: Mesh,
    log: Log,
) -> Result:
    """Trains `params` towards `teacher`; returns them as they are where text left out gains
    nothing.

    Args: params: the new model's; its matrices of the vocabulary in float32. teacher: the source
      model's. rows: by path of the matrix in `params`. written, corpus: the source model's own
      text, and the corpus's. budget: target tokens to train on; text is met again where there is
      less, `MOST_PASSES` times at
        most.
    """
    steps, held_out = _batches(config, written, corpus, budget, models.student, mesh)
    size = len(next(iter(rows.values())).features)
    present, counts = _tokens_in_text((*steps, held_out), size)
    steps, held_out = (
        [_renumbered(batch, present) for batch in steps],
        _renumbered(held_out, present),
    )
    few, few_rows, models = _restrict_vocabulary(params, rows, models, present)
    dtype = jnp.dtype(config.compute.dtype)
    frozen, body = _place(few, teacher, few_rows, trains_body, dtype, mesh)
    state = _start(body, few_rows, frozen["base"], mesh, models.student.vocab_size, config.seed)
    static = {"models": models, "mesh": mesh}

    before = _evaluate(state.trainable, frozen, held_out, **static)
    schedule = _schedule(len(steps), rows, models.student.hidden_size)
    tokens = sum(int((batch.target >= 0).sum()) for batch in steps)
    progress = Progress(log, "self-distillation", tokens, "tokens")
    for batch in steps:
        state = _step(state, frozen, _put(batch, mesh), schedule, **static)
        state.step.block_until_ready()  # so that the rate printed is that of steps done
        progress.update(tokens / len(steps))
    after = _evaluate(state.trainable, frozen, held_out, **static)
    gained = float(after.loss) < float(before.loss)
    progress.done(
        f"loss {before.loss:.3f} to {after.loss:.3f}, distance to the source {before.distance:.3f}"
        f" to {after.distance:.3f} nats a chunk on text left out"
        + ("" if gained else ": left as it was")
    )
    facts = {
        "tokens": tokens,
        "loss_before": float(before.loss),
        "loss_after": float(after.loss),
        "distance_before": float(before.distance),
        "distance_after": float(after.distance),
    }
    if not gained:
        return Result(params, facts)
    trained = _merged(state.trainable, frozen, params, rows, present, mesh)
    states = sharding.to_host(
        _final_states(state.trainable, frozen, _put(held_out, mesh), **static)
    )
    states = states[held_out.target[..., 1:] >= 0][:STATES]
    composed = np.asarray(rows[_head(rows)].features.any(axis=1))
    facts["unseen_shift"] = _calibrate_unseen(
        trained, models.student, states, counts, composed, log
    )
    return Result(trained, facts)


def _place(
    params: Params,
    teacher: Params,
    rows: Mapping[str, Rows],
    trains_body: bool,
    dtype: Any,
    mesh: Mesh,
) -> tuple[dict[str, Any], dict[str, Array]]:
    """(frozen, body): what does not train, in `dtype` where it is only read, and float32 copies of
    what does, but for the vocabulary's matrices."""
    frozen: dict[str, Any] = {
        "teacher": jax.tree.map(lambda x: x.astype(dtype), sharding.place(teacher, mesh))
    }
    sizes = {path: len(leaf) for path, leaf in paths.flatten(params).items() if path in rows}
    frozen["rows"] = {
        path: _on_mesh(path, of, sizes[path], dtype, mesh) for path, of in rows.items()
    }
    leaves = paths.flatten(sharding.place(params, mesh))
    frozen["base"] = {path: leaves.pop(path) for path in rows}
    if trains_body:
        return frozen, jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), leaves)
    frozen["body"] = {path: x.astype(dtype) for path, x in leaves.items()}
    return frozen, {}


def _schedule(steps: int, rows: Mapping[str, Rows], width: int) -> Schedule:
    """Peak learning rates by part, warm-up and decay."""
    peaks = {
        "body": BODY_RATE * min(1.0, (WIDTH / width) ** 0.5),
        "network": NETWORK_RATE,
        **{path: ROW_RATE * of.deviation for path, of in rows.items()},
    }
    return Schedule(peaks, float(steps), float(round(WARMUP * steps)))


def _head(vocabulary: Iterable[str]) -> str:
    """The path of the head among those of the vocabulary's matrices."""
    return "lm_head/kernel" if "lm_head/kernel" in vocabulary else "embed_tokens/embedding"


def _calibrate_unseen(
    params: Params,
    config: ModelConfig,
    states: Float[np.ndarray, "N D"],
    counts: Int[np.ndarray, "V"],
    composed: Bool[np.ndarray, "V"],
    log: Log,
) -> float:
    """Lowers the logits of composed tokens that the text does not hold, in place; by how many nats.

    Args:
      params: with rows on the host.
      counts: of tokens in the text.
    """
    absent = np.flatnonzero(composed & (counts == 0))
    if not len(absent):
        return 0.0
    group, leaf = _head([*paths.flatten(params)]).split("/")
    rows = params[group][leaf]
    probability = unseen.good_turing(counts, composed)
    nats, change = unseen.shift(config, states, rows[: len(counts)], absent, probability)
    rows[absent] += change
    log(
        f"self-distillation: {len(absent):,} composed tokens are not in the text: their logits are "
        f"lowered by {nats:.1f} nats, to a probability of {probability:.2g} together"
    )
    return nats


STATES = 2048
"""States on which the probability of tokens that the text does not hold is measured."""


def _tokens_in_text(
    batches: Sequence[HostBatch], vocabulary: int
) -> tuple[Int[np.ndarray, "p"], Int[np.ndarray, "V"]]:
    """The tokens that the text holds, and how often it holds each of V."""
    counts = np.zeros(vocabulary, np.int64)
    for batch in batches:
        counts += np.bincount(batch.target[batch.target >= 0], minlength=vocabulary)
    return np.flatnonzero(counts), counts


def _renumbered(batch: HostBatch, present: Int[np.ndarray, "p"]) -> HostBatch:
    known = batch.target >= 0
    target = np.where(known, np.searchsorted(present, np.maximum(batch.target, 0)), batch.target)
    return batch._replace(target=target.astype(np.int32))


def _restrict_vocabulary(
    params: Params, rows: Mapping[str, Rows], models: Models, present: Int[np.ndarray, "p"]
) -> tuple[Params, dict[str, Rows], Models]:
    """The new model with the rows of these tokens alone."""
    leaves = paths.flatten(params)
    for path in rows:
        leaves[path] = np.asarray(leaves[path])[present]
    part = {
        path: of._replace(features=of.features[present], free=of.free[present])
        for path, of in rows.items()
    }
    student = dataclasses.replace(models.student, vocab_size=len(present))
    return paths.unflatten(leaves), part, models._replace(student=student)


def _merged(
    trainable: dict[str, Any],
    frozen: dict[str, Any],
    params: Params,
    rows: Mapping[str, Rows],
    present: Int[np.ndarray, "p"],
    mesh: Mesh,
) -> Params:
    """The new model's parameters: all its rows, on the host, and the body.

    Args:
      trainable, frozen: of the rows of `present` tokens.
      params, rows: of all.
    """
    tables = jax.jit(_tables)(trainable, frozen)
    leaves = paths.flatten(params)
    for path, table in tables.items():
        found = np.array(leaves[path], np.float32)
        composed = np.flatnonzero(rows[path].features.any(axis=1))
        for begin in range(0, len(composed), BLOCK):
            ids = composed[begin : begin + BLOCK]
            features = np.zeros((BLOCK, rows[path].features.shape[1]), np.float32)
            features[: len(ids)] = rows[path].features[ids]
            dtype = frozen["rows"][path]["features"].dtype
            inputs = sharding.put(features.astype(dtype), NamedSharding(mesh, sharding.REPLICATED))
            change = _changes(trainable["network"][path], inputs)
            found[ids] += rows[path].deviation * sharding.to_host(change)[: len(ids)]
        found[present] = sharding.to_host(table, slice(len(present)))
        leaves[path] = found
    return paths.unflatten(leaves | trainable["body"])


BLOCK = 16_384
"""Rows that the shared network changes at once."""


# --- A step -------------------------------------------------------------------------------------


def _start(
    body: dict[str, Array],
    rows: Mapping[str, Rows],
    base: Mapping[str, Array],
    mesh: Mesh,
    vocabulary: int,
    seed: int,
) -> _State:
    def network(of: Rows, width: int, key: Array) -> dict[str, Array]:
        count, hidden = of.features.shape[1], min(HIDDEN, 2 * width)
        return {
            "linear": jnp.zeros((count, width)),
            "inner": jax.random.normal(key, (count, hidden)) * count**-0.5,
            "outer": jnp.zeros((hidden, width)),
        }

    keys = dict(zip(sorted(rows), jax.random.split(jax.random.key(seed), len(rows))))
    trainable = {
        "table": {path: jnp.zeros(of.shape, jnp.float32) for path, of in base.items()},
        "network": {
            path: network(of, base[path].shape[1], keys[path]) for path, of in rows.items()
        },
        "body": body,
    }
    trainable["table"] = jax.device_put(
        trainable["table"], sharding.shardings(trainable["table"], mesh)
    )
    whole = NamedSharding(mesh, sharding.REPLICATED)
    trainable["network"] = jax.device_put(trainable["network"], whole)
    return _State(
        trainable,
        _optimizer(vocabulary).init(trainable),
        jax.device_put(jnp.zeros((), jnp.int32), whole),
    )


def _optimizer(vocabulary: int) -> optax.GradientTransformation:
    """The direction of a step, to be multiplied by the rates."""

    def labels(tree: dict[str, Any]) -> dict[str, Any]:
        return {kind: jax.tree.map(lambda _, kind=kind: kind, part) for kind, part in tree.items()}

    return optax.multi_transform(
        {
            "table": scale_by_damped_adam(0.9, 0.95, 1e-8, ROW_DAMPING, vocabulary),
            "network": optax.scale_by_adam(0.9, 0.95),
            "body": optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(0.9, 0.95)),
        },
        labels,
    )


@functools.partial(jax.jit, static_argnames=("models", "mesh"), donate_argnums=0)
def _step(
    state: _State,
    frozen: dict[str, Any],
    batch: Batch,
    schedule: Schedule,
    *,
    models: Models,
    mesh: Mesh,
) -> _State:
    with sharding.within(mesh):
        vocabulary = {kind: state.trainable[kind] for kind in ("table", "network")}
        tables, pull = jax.vjp(lambda trainable: _tables(trainable, frozen), vocabulary)

        def add(sums: Any, of: tuple[Batch, Array]) -> tuple[Any, None]:
            part, weight = of
            gradients, _ = jax.grad(_loss, argnums=(0, 1), has_aux=True)(
                tables, state.trainable["body"], frozen, part, models
            )
            return jax.tree.map(lambda x, gradient: x + weight * gradient, sums, gradients), None

        zeros = jax.tree.map(jnp.zeros_like, (tables, state.trainable["body"]))
        (of_tables, of_body), _ = jax.lax.scan(add, zeros, (batch, _micro_batch_weights(batch)))
        gradients = {**pull(of_tables)[0], "body": of_body}
        directions: Any
        directions, optimizer = _optimizer(models.student.vocab_size).update(
            gradients, state.optimizer
        )
        rates = schedule.rates(state.step)

        def moved(kind: str, rate: Any) -> Any:
            return jax.tree.map(
                lambda x, along: x - rate * along, state.trainable[kind], directions[kind]
            )

        tables_moved = {
            path: table - rates[path] * directions["table"][path]
            for path, table in state.trainable["table"].items()
        }
        large = {"table": tables_moved, "body": moved("body", rates["body"])}
        # Split as the parameters are, so that the buffers of the state before are used again.
        large = jax.lax.with_sharding_constraint(large, sharding.shardings(large, mesh))
        trainable = {**large, "network": moved("network", rates["network"])}
        return _State(trainable, optimizer, state.step + 1)


def _evaluate(
    trainable: dict[str, Any],
    frozen: dict[str, Any],
    held_out: HostBatch,
    *,
    models: Models,
    mesh: Mesh,
) -> Terms:
    return jax.tree.map(
        np.asarray, _terms(trainable, frozen, _put(held_out, mesh), models=models, mesh=mesh)
    )


@functools.partial(jax.jit, static_argnames=("models", "mesh"))
def _final_states(
    trainable: dict[str, Any],
    frozen: dict[str, Any],
    held_out: Batch,
    *,
    models: Models,
    mesh: Mesh,
) -> Float[Array, "A B T D"]:
    with sharding.within(mesh):
        body = trainable["body"] or frozen["body"]
        params = paths.unflatten({**body, **_tables(trainable, frozen)})
        dtype = jnp.dtype(models.compute.dtype)

        def states(target: Array) -> Array:
            read = jnp.maximum(target[:, :-1], 0)
            hidden = forward(models.student, params, read, dtype=dtype, remat="layer", unroll=1)
            return sharding.constrain(hidden, None)

        return jax.lax.map(states, held_out.target)


@functools.partial(jax.jit, static_argnames=("models", "mesh"))
def _terms(
    trainable: dict[str, Any],
    frozen: dict[str, Any],
    held_out: Batch,
    *,
    models: Models,
    mesh: Mesh,
) -> Terms:
    with sharding.within(mesh):
        tables = _tables(trainable, frozen)
        terms = jax.lax.map(
            lambda part: _loss(tables, trainable["body"], frozen, part, models)[1], held_out
        )
        return jax.tree.map(lambda values: values @ _micro_batch_weights(held_out), terms)


def _micro_batch_weights(batch: Batch) -> Float[Array, "A"]:
    """Each micro-batch's share of the tokens: its loss is a mean over its own."""
    tokens = jnp.sum(batch.target[..., 1:] >= 0, axis=(1, 2)).astype(jnp.float32)
    return tokens / jnp.maximum(tokens.sum(), 1.0)


def _loss(
    tables: dict[str, Array],
    body: dict[str, Array],
    frozen: dict[str, Any],
    batch: Batch,
    models: Models,
) -> tuple[Float[Array, ""], Terms]:
    params = paths.unflatten({**(body or frozen["body"]), **tables})
    return cross_tokenizer.loss(models, params, frozen["teacher"], batch, Weights())


def _tables(trainable: dict[str, Any], frozen: dict[str, Any]) -> dict[str, Float[Array, "R D"]]:
    """The vocabulary's matrices, with their rows changed."""
    tables: dict[str, Array] = {}
    for path, base in frozen["base"].items():
        known, network = frozen["rows"][path], trainable["network"][path]
        change = _changes(network, known["features"])
        tables[path] = base + known["free"] * trainable["table"][path] + known["deviation"] * change
    return tables


@jax.jit
def _changes(network: dict[str, Array], x: Float[Array, "R F"]) -> Float[Array, "R D"]:
    """What the shared network adds to rows, in units of the deviation of the source's rows."""
    linear, inner, outer = (network[name].astype(x.dtype) for name in ("linear", "inner", "outer"))
    with compiling.products(x.dtype):
        return (x @ linear + jax.nn.gelu(x @ inner) @ outer).astype(jnp.float32)


# --- Inputs -------------------------------------------------------------------------------------


def _on_mesh(path: str, of: Rows, rows: int, dtype: Any, mesh: Mesh) -> dict[str, Array]:
    """Features and what may change, split over the mesh as the rows that they belong to."""

    def put(values: np.ndarray, kind: Any) -> Array:
        shape = sharding.padded_shape(path, (rows, values.shape[1]), mesh)
        filled = np.zeros(shape, np.float32)
        filled[: len(values)] = values
        return sharding.put(filled.astype(kind), sharding.sharding_of(path, shape, mesh))

    return {
        "features": put(of.features, dtype),
        "free": put(of.free[:, None], jnp.float32),
        "deviation": jnp.float32(of.deviation),
    }


def _batches(
    config: Config,
    written: Sequence[pairing.Pair],
    corpus: Sequence[pairing.Pair],
    budget: int,
    model: ModelConfig,
    mesh: Mesh,
) -> tuple[list[HostBatch], HostBatch]:
    """Make the batches of all steps and the held-out one, on the host.

    They do not depend on the devices.
    """
    random = np.random.default_rng([config.seed, 5])
    length = min(LENGTH, model.max_positions - 1)
    share = config.initialization.corpus_share if written and corpus else float(not written)
    count = max(1, budget // length)
    drawn = [
        _draw(of, round(part * count), round(part * HELD_OUT), length, weights, random)
        for of, part, weights in zip((corpus, written), (share, 1 - share), (CORPUS, WRITTEN))
    ]
    trained, left_out = (_batch(map(np.concatenate, zip(*of))) for of in zip(*drawn))
    count = len(trained.target)
    size = min(count, MOST_SEQUENCES, max(LEAST_SEQUENCES, count // STEPS))
    # Steps of one size, so that one program is compiled; what is left over is not read.
    order = random.permutation(count)[: count - count % size].reshape(-1, size)
    return [_micro_batches(_take(trained, chosen), mesh) for chosen in order], _micro_batches(
        left_out, mesh
    )


def _draw(
    pairs: Sequence[pairing.Pair],
    count: int,
    left_out: int,
    length: int,
    weights: tuple[float, float],
    random: np.random.Generator,
) -> tuple[HostBatch, HostBatch]:
    """`count` sequences to train on, again and again in other orders where there are too few, and
    about `left_out` others.
    """
    if not count or not pairs:
        none = (
            np.zeros((0, length + 1), np.int32),
            np.zeros((0, pairing.source_length(length)), np.int32),
        )
        empty = _batch((*none, np.zeros((0, length), np.int32), *np.zeros((2, 0), np.float32)))
        return empty, empty
    packed = pairing.pack(pairs, random.permutation(len(pairs)), length)
    size = len(packed.target)
    factors = (np.full(size, weight, np.float32) for weight in weights)
    every = _batch((*packed, *factors))
    kept = min(left_out, size // 10) if size > 1 else 0
    count = min(count, MOST_PASSES * (size - kept))
    orders = [kept + random.permutation(size - kept) for _ in range(-(-count // (size - kept)))]
    return _take(every, np.concatenate(orders)[:count]), _take(every, np.arange(max(1, kept)))


def _batch(values: Iterable[Any]) -> HostBatch:
    return Batch(*values)


def _take(batch: HostBatch, chosen: Int[np.ndarray, "n"]) -> HostBatch:
    return _batch(values[chosen] for values in batch)


def _micro_batches(batch: HostBatch, mesh: Mesh) -> HostBatch:
    """[A, B, ...]: as many sequences at once as the devices read, filled up with empty ones."""
    devices, (count, size) = sharding.sequences_at_once(mesh), batch.target.shape
    micro = MICRO_BATCH_TOKENS.get(jax.default_backend(), OTHER_MICRO_BATCH_TOKENS) // (size - 1)
    each = -(-count // devices)  # rows of a device
    at_once = devices * -(-each // -(-each // max(1, micro)))  # as even as they divide
    empty = pairing.NONE, 0, pairing.NONE, 0, 0

    def filled(values: np.ndarray, filling: int) -> np.ndarray:
        widths = ((0, -count % at_once), *((0, 0),) * (values.ndim - 1))
        values = np.pad(values, widths, constant_values=filling)
        return values.reshape(-1, at_once, *values.shape[1:])

    return _batch(map(filled, batch, empty))


def _put(batch: HostBatch, mesh: Mesh) -> Batch:
    split = NamedSharding(mesh, P(None, sharding.BATCH))
    return Batch(*(sharding.put(values, split) for values in batch))
