"""Self-distillation: a start trained on little text, with the source model as teacher.

Rows that are the mean of their pieces (FVT) are right one by one, but not together: composed tokens
do not get the probability of their pieces, and words that the new tokenizer splits in another way
are spelled in a way that the body has never read. The new model therefore reads text that the
source wrote (`self_text.py`), a share of the corpus, and lists of words that are split differently
(`word_lists.py`), and learns to assign it the source's likelihoods, with the source's states
(`training/cross_tokenizer.py`).

The student's vocabulary is restricted to the tokens of this text, which makes a step faster and
lowers the logits of no other token. The probability of the other tokens is calibrated at the end
(`unseen.py`).

Two parts train:

- rows: a table with a change for each token of the text, and a network from a composed token's
  features (`row_features.py`) to the change of its row, shared by all composed tokens, so that
  tokens change that are not in the text: row + table + deviation (x A + gelu(x B) C).
- the body, at a small rate, or (`initialization.trains=lora`) low-rank adapters on its projections,
  which are merged into it at the end. With `rows` the body and the rows of tokens that the source
  has are frozen.

Special tokens never change.

Letters: D model, V vocabulary, R rows in memory, n composed tokens, F features, H hidden units, A
micro-batches, B sequences, T target tokens of a sequence.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

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
from tokalign_jax.models.lora import Adapter, LoraSpec, add_lora, merge_into
from tokalign_jax.models.transformer import Params, forward, head_path
from tokalign_jax.parallel import sharding
from tokalign_jax.text import pairs as pairing
from tokalign_jax.training import cross_tokenizer
from tokalign_jax.training.cross_tokenizer import Batch, Models, Terms, Weights
from tokalign_jax.training.optimizer import Schedule, scale_by_damped_adam
from tokalign_jax.utils import compiling, paths
from tokalign_jax.utils.progress import Log, Progress

LENGTH = 256
"""T, unless the model has fewer positions."""
STEPS = 200
LEAST_SEQUENCES, MOST_SEQUENCES = 4, 64
"""Bounds of B; the batch is as large as `STEPS` steps allow. Rates are those of the largest batch
and fall with the square root of its size (Malladi et al. 2022, arXiv 2205.10287): gradients of
fewer sequences have more noise, which Adam follows.
"""
MOST_PASSES = 4
"""Passes over the text, at most."""
BODY_RATE = 2e-4
"""Peak learning rate of the body at a width of up to `WIDTH`; beyond, it falls with the square root
of the width.
"""
ADAPTER_RATE = 1e-3
"""Peak learning rate of the adapters, with the same dependence on the width. At `WIDTH`, Adam's
first steps change an entry of A B about as much as `BODY_RATE` changes a weight.
"""
WIDTH = 576
ADAPTERS = LoraSpec(rank=64, alpha=64.0, dropout=0.0)
"""Adapters of `initialization.trains=lora`: their product is added unscaled."""
ROW_RATE = 0.01
"""Peak learning rate of the table, in units of the standard deviation of the source's rows."""
NETWORK_RATE = 1e-3
ROW_DAMPING = 0.3
WARMUP = 0.05
HIDDEN = 1024
"""H, at most; at most 2 D."""
WRITTEN = (0.5, 1.0)
"""Weights of next-token loss and likelihood divergence on text written by the source model."""
CORPUS = (1.0, 0.5)
"""The same weights on text of the corpus."""
LISTS = (0.0, 0.5)
"""The same weights on lists of words, whose order is random."""
LIST_SHARE = 0.23
"""Share of lists of words in the sequences; lower where few words are split differently."""
HELD_OUT = 64
"""Sequences on which the model is measured before and after training; not trained on."""
MICRO_BATCH_TOKENS = {"cpu": 1024}
OTHER_MICRO_BATCH_TOKENS = 16_384
"""Target tokens per device and micro-batch, by backend."""


class Rows(NamedTuple):
    """Trainable rows of one matrix of the vocabulary.

    Only composed tokens have features: for all V tokens they would take gigabytes of host memory.
    """

    composed: Int[np.ndarray, "n"]
    """Tokens whose rows the shared network changes, ascending."""
    features: Float[np.ndarray, "n F"]
    """Features of the composed tokens, in the compute type."""
    free: Bool[np.ndarray, "V"]
    """Tokens that have a change of their own in the table."""
    deviation: float
    """Standard deviation of the source's rows."""

    def restricted(self, tokens: Int[np.ndarray, "p"]) -> "Rows":
        """Restrict the vocabulary to `tokens` (ascending), which get the ids 0 .. p - 1."""
        chosen = np.isin(self.composed, tokens)
        composed = np.searchsorted(tokens, self.composed[chosen])
        return Rows(composed, self.features[chosen], self.free[tokens], self.deviation)


class Texts(NamedTuple):
    """Text in the tokens of both models."""

    written: Sequence[pairing.Pair]
    """Written by the source model."""
    corpus: Sequence[pairing.Pair]
    lists: Sequence[pairing.Pair]
    """Lists of words."""


HostBatch = Any
"""A `Batch` of NumPy arrays."""


class Result(NamedTuple):
    """Parameters after training, and measurements."""

    params: Params
    facts: Mapping[str, float]
    """`tokens` trained on; `loss_before`, `loss_after`, `distance_before`, `distance_after` on
    held-out sequences (`cross_tokenizer.Terms`); `unseen_shift` in nats (`unseen.shift`).
    """


class _State(NamedTuple):
    trainable: dict[str, Any]
    """`table` and `network` by the path of a matrix, and `body` by path: the rest of the model, its
    adapters, or nothing.
    """
    optimizer: optax.OptState
    step: Int[Array, ""]


class _Counts(NamedTuple):
    """Occurrences of each token. A sequence that is read several times counts once."""

    all: Int[np.ndarray, "V"]
    text: Int[np.ndarray, "V"]
    """Without the lists of words, which have no next-token loss; `all` if nothing has one."""


def distill(
    config: Config,
    models: Models,
    params: Params,
    teacher: Params,
    rows: Mapping[str, Rows],
    texts: Texts,
    budget: int,
    trains: Literal["all", "lora", "rows"],
    mesh: Mesh,
    log: Log,
) -> Result:
    """Train `params` towards `teacher`; return them unchanged if the held-out loss does not fall.

    Args:
      config: the run's configuration.
      models: the new model as student, the source model as teacher.
      params: the new model's parameters, its vocabulary matrices in float32.
      teacher: the source model's parameters.
      rows: trainable rows by the path of their matrix in `params`.
      texts: text to train on.
      budget: target tokens to train on; shorter text is repeated, up to `MOST_PASSES` times.
      trains: beside the rows, `all` trains the body, `lora` adapters on it, `rows` nothing.
      mesh: devices that train.
      log: receives progress.
    """
    steps, held_out = _batches(config, texts, budget, models, mesh)
    present, counts = _tokens_in_text((*steps, held_out), len(rows[head_path(rows)].free))
    steps, held_out = [_renumbered(x, present) for x in steps], _renumbered(held_out, present)
    student = dataclasses.replace(models.student, vocab_size=len(present))
    models = models._replace(student=student, lora=ADAPTERS if trains == "lora" else None)
    dtype = jnp.dtype(config.compute.dtype)
    frozen, body = _place(params, teacher, rows, present, trains == "all", dtype, mesh)
    if models.lora:
        body = _new_adapters(frozen["body"], models.lora, config.seed, mesh)
    state = _start(body, rows, frozen["base"], mesh, student.vocab_size, config.seed)
    static = {"models": models, "mesh": mesh}

    before = _evaluate(state.trainable, frozen, held_out, **static)
    sequences = int((steps[0].target[..., 0] != pairing.NONE).sum())
    schedule = _schedule(len(steps), sequences, rows, models)
    state, tokens, progress = _train(state, frozen, steps, schedule, models, mesh, log)
    after = _evaluate(state.trainable, frozen, held_out, **static)
    gained = float(after.loss) < float(before.loss)
    progress.done(
        f"loss {before.loss:.3f} to {after.loss:.3f}, distance to the source {before.distance:.3f}"
        f" to {after.distance:.3f} nats a chunk on held-out text"
    )
    facts = _facts(tokens, before, after)
    if not gained:
        log(
            f"self-distillation: warning: the loss has not fallen in {len(steps)} steps of"
            f" {tokens:,} tokens in all, so the model stays as it was before: raise"
            " initialization.distillation_tokens and initialization.generated_tokens"
        )
        return Result(params, facts)
    trained = _all_rows(state.trainable, frozen, params, rows, present, mesh)
    states = _final_states(state.trainable, frozen, _put(held_out, mesh), **static)
    states = sharding.to_host(states)[held_out.target[..., 1:] >= 0][:STATES]
    facts["unseen_shift"] = _calibrate_unseen(
        trained, student, states, counts, rows[head_path(rows)].composed, log
    )
    body = state.trainable["body"]
    del state, frozen  # The merged body takes their memory.
    if models.lora:
        body = _merged(params, body, models.lora, mesh)
    return Result(paths.unflatten(paths.flatten(params) | trained | body), facts)


def _facts(tokens: int, before: Terms, after: Terms) -> dict[str, float]:
    return {
        "tokens": tokens,
        "loss_before": float(before.loss),
        "loss_after": float(after.loss),
        "distance_before": float(before.distance),
        "distance_after": float(after.distance),
    }


def _train(
    state: _State,
    frozen: dict[str, Any],
    steps: Sequence[HostBatch],
    schedule: Schedule,
    models: Models,
    mesh: Mesh,
    log: Log,
) -> tuple[_State, int, Progress]:
    """Take all steps; return the state, the number of tokens read, and the unfinished progress."""
    tokens = sum(int((batch.target >= 0).sum()) for batch in steps)
    progress = Progress(log, "self-distillation", tokens, "tokens")
    for batch in steps:
        state = _step(state, frozen, _put(batch, mesh), schedule, models=models, mesh=mesh)
        state.step.block_until_ready()  # Otherwise the logged rate would run ahead of the device.
        progress.update(tokens / len(steps))
    return state, tokens, progress


def _place(
    params: Params,
    teacher: Params,
    rows: Mapping[str, Rows],
    present: Int[np.ndarray, "p"],
    trains_body: bool,
    dtype: Any,
    mesh: Mesh,
) -> tuple[dict[str, Any], dict[str, Array]]:
    """Place trainable and frozen arrays on the mesh, with the rows of `present` tokens alone.

    Matrices are restricted and placed one after the other, so that the host has one copy at a time.

    Returns:
      The frozen arrays, in `dtype` where they are only read, and float32 copies of the body if it
      trains, without the vocabulary's matrices.
    """
    frozen: dict[str, Any] = {
        "teacher": jax.tree.map(lambda x: x.astype(dtype), sharding.place(teacher, mesh))
    }
    frozen["rows"] = {
        path: _on_mesh(path, part.restricted(present), len(present), dtype, mesh)
        for path, part in rows.items()
    }
    leaves = paths.flatten(params)
    frozen["base"] = {}
    for path in rows:
        table = np.asarray(leaves.pop(path))[present]
        frozen["base"] |= paths.flatten(sharding.place({path: table}, mesh))
    leaves = paths.flatten(sharding.place(paths.unflatten(leaves), mesh))
    if trains_body:
        frozen["body"] = {}
        return frozen, jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), leaves)
    frozen["body"] = {path: x.astype(dtype) for path, x in leaves.items()}
    return frozen, {}


def _new_adapters(
    body: Mapping[str, Array], spec: LoraSpec, seed: int, mesh: Mesh
) -> dict[str, Array]:
    """Return adapters of the body's projections by path, placed on the mesh, that change nothing.

    They are the same on any mesh.
    """
    # The networks' keys are split from the seed's key itself (`_start`).
    key = jax.random.fold_in(jax.random.key(seed), 1)
    adapted = paths.flatten(add_lora(paths.unflatten(body), spec, key))
    adapters = {path: leaf for path, leaf in adapted.items() if path not in body}
    return paths.flatten(sharding.place(paths.unflatten(adapters), mesh))


def _schedule(steps: int, sequences: int, rows: Mapping[str, Rows], models: Models) -> Schedule:
    """Return peak learning rates by part, with warm-up and decay, for batches of `sequences`."""
    body = ADAPTER_RATE if models.lora else BODY_RATE
    factor = (sequences / MOST_SEQUENCES) ** 0.5
    peaks = {
        "body": body * min(1.0, (WIDTH / models.student.hidden_size) ** 0.5),
        "network": NETWORK_RATE,
        **{path: ROW_RATE * part.deviation for path, part in rows.items()},
    }
    peaks = {part: factor * peak for part, peak in peaks.items()}
    return Schedule(peaks, float(steps), float(round(WARMUP * steps)))


def _calibrate_unseen(
    rows: Mapping[str, Float[np.ndarray, "V D"]],
    config: ModelConfig,
    states: Float[np.ndarray, "N D"],
    counts: _Counts,
    composed: Int[np.ndarray, "n"],
    log: Log,
) -> float:
    """Lower the logits of composed tokens that are not in the text, in place.

    Args:
      rows: the new model's rows by the path of their matrix.
      config: the new model's architecture.
      states: final states, on which probabilities are measured.
      counts: occurrences of each token in the text.
      composed: composed tokens.
      log: receives the result.

    Returns:
      The decrease in nats.
    """
    absent = composed[counts.all[composed] == 0]
    if not len(absent):
        return 0.0
    head, size = rows[head_path(rows)], len(counts.all)
    # What is in a list is there on purpose, however rare it is in text.
    once = np.isin(np.arange(size), composed) & (counts.all == 1)
    probability = unseen.good_turing(counts.text, once)
    nats, change = unseen.shift(config, states, head[:size], absent, probability)
    head[absent] += change
    log(
        f"self-distillation: {len(absent):,} composed tokens are not in the text: their logits are "
        f"lowered by {nats:.1f} nats, to a probability of {probability:.2g} together"
    )
    return nats


STATES = 2048
"""States on which the probability of tokens that are not in the text is measured."""


def _tokens_in_text(
    batches: Sequence[HostBatch], vocabulary: int
) -> tuple[Int[np.ndarray, "p"], _Counts]:
    """Return the tokens that occur in the sequences, and the occurrences of each of V."""
    rows = np.concatenate([x.target.reshape(-1, x.target.shape[-1]) for x in batches])
    is_text = np.concatenate([x.next_token.reshape(-1) > 0 for x in batches])
    rows, first = np.unique(rows, axis=0, return_index=True)
    is_text = is_text[first]

    def counts(rows: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "V"]:
        return np.bincount(rows[rows >= 0], minlength=vocabulary)

    found = _Counts(counts(rows), counts(rows[is_text] if is_text.any() else rows))
    return np.flatnonzero(found.all), found


def _renumbered(batch: HostBatch, present: Int[np.ndarray, "p"]) -> HostBatch:
    real = batch.target >= 0
    target = np.where(real, np.searchsorted(present, np.maximum(batch.target, 0)), batch.target)
    return batch._replace(target=target.astype(np.int32))


def _merged(
    params: Params, adapters: dict[str, Array], spec: LoraSpec, mesh: Mesh
) -> dict[str, Array]:
    """Return the adapted kernels by path, in float32 on the mesh; `params` stay as they are."""
    leaves, kernels = paths.flatten(params), {}
    for name in [path.removesuffix("/lora_a") for path in adapters if path.endswith("/lora_a")]:
        path = f"{name}/kernel"
        placed = paths.flatten(sharding.place({path: leaves[path]}, mesh))[path]
        adapter = Adapter(spec, adapters[f"{name}/lora_a"], adapters[f"{name}/lora_b"])
        kernels[path] = merge_into(jnp.array(placed, jnp.float32, copy=True), [adapter])
    return kernels


def _all_rows(
    trainable: dict[str, Any],
    frozen: dict[str, Any],
    params: Params,
    rows: Mapping[str, Rows],
    present: Int[np.ndarray, "p"],
    mesh: Mesh,
) -> dict[str, Float[np.ndarray, "V D"]]:
    """Return all rows of the new model by the path of their matrix, in float32 on the host.

    Args:
      trainable: trainable arrays, restricted to the rows of `present` tokens.
      frozen: frozen arrays, restricted likewise.
      params: the new model's before training.
      rows: trainable rows of the whole vocabulary.
      present: tokens that occur in the text.
      mesh: devices of the arrays.
    """
    tables = jax.jit(_tables)(trainable, frozen)
    leaves, result = paths.flatten(params), {}
    for path, table in tables.items():
        moved, part = np.array(leaves[path], np.float32), rows[path]
        for begin in range(0, len(part.composed), BLOCK):
            ids = part.composed[begin : begin + BLOCK]
            features = np.zeros((BLOCK, part.features.shape[1]), part.features.dtype)
            features[: len(ids)] = part.features[begin : begin + BLOCK]
            inputs = sharding.put(features, NamedSharding(mesh, sharding.REPLICATED))
            change = _changes(trainable["network"][path], inputs)
            moved[ids] += part.deviation * sharding.to_host(change)[: len(ids)]
        for begin in range(0, len(present), BLOCK):
            ids = present[begin : begin + BLOCK]
            moved[ids] = sharding.to_host(table, slice(begin, begin + len(ids)))
        result[path] = moved
    return result


BLOCK = 16_384
"""Rows that the shared network changes, or that the host reads, at once."""


# --- A step -------------------------------------------------------------------------------------


def _start(
    body: dict[str, Array],
    rows: Mapping[str, Rows],
    base: Mapping[str, Array],
    mesh: Mesh,
    vocabulary: int,
    seed: int,
) -> _State:
    """Initialize the trainable arrays, such that the model does not change, and the optimizer."""

    def network(part: Rows, width: int, key: Array) -> dict[str, Array]:
        count, hidden = part.features.shape[1], min(HIDDEN, 2 * width)
        return {
            "linear": jnp.zeros((count, width)),
            "inner": jax.random.normal(key, (count, hidden)) * count**-0.5,
            "outer": jnp.zeros((hidden, width)),
        }

    keys = dict(zip(sorted(rows), jax.random.split(jax.random.key(seed), len(rows))))
    trainable = {
        "table": {path: jnp.zeros(rows.shape, jnp.float32) for path, rows in base.items()},
        "network": {
            path: network(part, base[path].shape[1], keys[path]) for path, part in rows.items()
        },
        "body": body,
    }
    trainable["table"] = jax.device_put(
        trainable["table"], sharding.shardings(trainable["table"], mesh)
    )
    replicated = NamedSharding(mesh, sharding.REPLICATED)
    trainable["network"] = jax.device_put(trainable["network"], replicated)
    return _State(
        trainable,
        _optimizer(vocabulary).init(trainable),
        jax.device_put(jnp.zeros((), jnp.int32), replicated),
    )


def _optimizer(vocabulary: int) -> optax.GradientTransformation:
    """Return the optimizer, without learning rates, which multiply its updates."""

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
    """Take one optimizer step; gradients are summed over the micro-batches."""
    with sharding.within(mesh):
        vocabulary = {kind: state.trainable[kind] for kind in ("table", "network")}
        tables, pull = jax.vjp(lambda trainable: _tables(trainable, frozen), vocabulary)

        def add(sums: Any, weighted: tuple[Batch, Array]) -> tuple[Any, None]:
            part, weight = weighted
            gradients, _ = jax.grad(_loss, argnums=(0, 1), has_aux=True)(
                tables, state.trainable["body"], frozen, part, models
            )
            return jax.tree.map(lambda x, gradient: x + weight * gradient, sums, gradients), None

        zeros = jax.tree.map(jnp.zeros_like, (tables, state.trainable["body"]))
        (table_gradients, body_gradients), _ = jax.lax.scan(
            add, zeros, (batch, _micro_batch_weights(batch))
        )
        gradients = {**pull(table_gradients)[0], "body": body_gradients}
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
        # Constrain the update to the parameters' sharding, so that donated buffers are reused.
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
    """Return the student's final states on the held-out batch."""
    with sharding.within(mesh):
        params = _params(trainable["body"], frozen, _tables(trainable, frozen))
        dtype = jnp.dtype(models.compute.dtype)

        def states(target: Array) -> Array:
            read = jnp.maximum(target[:, :-1], 0)
            hidden = forward(
                models.student, params, read, lora=models.lora, dtype=dtype, remat="layer", unroll=1
            )
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
    """Return the share of tokens in each micro-batch, whose loss is a mean over its own tokens."""
    tokens = jnp.sum(batch.target[..., 1:] >= 0, axis=(1, 2)).astype(jnp.float32)
    return tokens / jnp.maximum(tokens.sum(), 1.0)


def _loss(
    tables: dict[str, Array],
    body: dict[str, Array],
    frozen: dict[str, Any],
    batch: Batch,
    models: Models,
) -> tuple[Float[Array, ""], Terms]:
    params = _params(body, frozen, tables)
    return cross_tokenizer.loss(models, params, frozen["teacher"], batch, Weights())


def _params(body: dict[str, Array], frozen: dict[str, Any], tables: dict[str, Array]) -> Params:
    """Return the student's parameters, with its adapters where it has some."""
    return paths.unflatten({**frozen["body"], **body, **tables})


def _tables(trainable: dict[str, Any], frozen: dict[str, Any]) -> dict[str, Float[Array, "R D"]]:
    """Return the vocabulary's matrices with changed rows."""
    tables: dict[str, Array] = {}
    for path, base in frozen["base"].items():
        inputs, network = frozen["rows"][path], trainable["network"][path]
        change = _changes(network, inputs["features"])
        own_change = inputs["free"] * trainable["table"][path]
        tables[path] = base + own_change + inputs["deviation"] * change
    return tables


@jax.jit
def _changes(network: dict[str, Array], x: Float[Array, "R F"]) -> Float[Array, "R D"]:
    """Return the shared network's change of rows, in units of the source rows' deviation."""
    linear, inner, outer = (network[name].astype(x.dtype) for name in ("linear", "inner", "outer"))
    with compiling.products(x.dtype):
        return (x @ linear + jax.nn.gelu(x @ inner) @ outer).astype(jnp.float32)


# --- Inputs -------------------------------------------------------------------------------------


def _on_mesh(path: str, part: Rows, size: int, dtype: Any, mesh: Mesh) -> dict[str, Array]:
    """Place features and masks on the mesh, sharded like the `size` rows that they belong to.

    Rows of tokens that are not composed have features of 0, for which the network gives 0.
    """

    def put(ids: np.ndarray, values: np.ndarray, kind: Any) -> Array:
        shape = sharding.padded_shape(path, (size, values.shape[1]), mesh)
        filled = np.zeros(shape, kind)
        filled[ids] = values
        return sharding.put(filled, sharding.sharding_of(path, shape, mesh))

    return {
        "features": put(part.composed, part.features, dtype),
        "free": put(np.arange(len(part.free)), part.free[:, None], jnp.float32),
        "deviation": jnp.float32(part.deviation),
    }


def _batches(
    config: Config,
    texts: Texts,
    budget: int,
    models: Models,
    mesh: Mesh,
) -> tuple[list[HostBatch], HostBatch]:
    """Return the batches of all steps and the held-out one, which has no lists, on the host.

    Their sequences do not depend on the devices.
    """
    random = np.random.default_rng([config.seed, 5])
    length = min(LENGTH, models.student.max_positions - 1)
    written, corpus, lists = texts
    share = config.initialization.corpus_share if written and corpus else float(not written)
    count = max(1, budget // length)
    listed = min(round(LIST_SHARE * count), sum(len(pair.target) for pair in lists) // length)
    count -= listed
    lengths = length, min(pairing.source_length(length), models.teacher.max_positions)
    from_corpus, left_out = round(share * count), round(share * HELD_OUT)
    sampled = [
        _draw(corpus, from_corpus, left_out, lengths, CORPUS, random),
        _draw(written, count - from_corpus, HELD_OUT - left_out, lengths, WRITTEN, random),
    ]
    drawn, held_out = (list(batches) for batches in zip(*sampled))
    # Lists keep their share if the text is too short even when it is repeated.
    read = sum(len(batch.target) for batch in drawn)
    listed = min(listed, math.ceil(LIST_SHARE / (1 - LIST_SHARE) * read))
    drawn.append(_draw(lists, listed, 0, lengths, LISTS, random)[0])
    trained, held_out = (_batch(map(np.concatenate, zip(*parts))) for parts in (drawn, held_out))
    count = len(trained.target)
    size = min(count, MOST_SEQUENCES, max(LEAST_SEQUENCES, count // STEPS))
    # Steps of one size share a compiled program; sequences left over are not read.
    order = random.permutation(count)[: count - count % size].reshape(-1, size)
    steps = [_micro_batches(_take(trained, chosen), mesh) for chosen in order]
    return steps, _micro_batches(held_out, mesh)


def _draw(
    pairs: Sequence[pairing.Pair],
    count: int,
    left_out: int,
    lengths: tuple[int, int],
    weights: tuple[float, float],
    random: np.random.Generator,
) -> tuple[HostBatch, HostBatch]:
    """Draw `count` training sequences and about `left_out` held-out ones.

    Too few training sequences are repeated, in another order each time. `lengths` are T and S of
    `text/pairs.py`.
    """
    length, width = lengths
    if not count or not pairs:
        none = (
            np.zeros((0, length + 1), np.int32),
            np.zeros((0, width), np.int32),
        )
        empty = _batch((*none, np.zeros((0, length), np.int32), *np.zeros((2, 0), np.float32)))
        return empty, empty
    packed = pairing.pack(pairs, random.permutation(len(pairs)), length, width)
    size = len(packed.target)
    factors = (np.full(size, weight, np.float32) for weight in weights)
    sequences = _batch((*packed, *factors))
    held_out = min(left_out, size // 10) if size > 1 else 0
    count = min(count, MOST_PASSES * (size - held_out))
    passes = -(-count // (size - held_out))
    orders = [held_out + random.permutation(size - held_out) for _ in range(passes)]
    trained = _take(sequences, np.concatenate(orders)[:count])
    return trained, _take(sequences, np.arange(max(1, held_out)))


def _batch(values: Iterable[Any]) -> HostBatch:
    return Batch(*values)


def _take(batch: HostBatch, chosen: Int[np.ndarray, "n"]) -> HostBatch:
    return _batch(values[chosen] for values in batch)


def _micro_batches(batch: HostBatch, mesh: Mesh) -> HostBatch:
    """Reshape to [A, B, ...], B sequences at once on all devices, padded with empty ones."""
    devices, (count, size) = sharding.sequences_at_once(mesh), batch.target.shape
    micro = MICRO_BATCH_TOKENS.get(jax.default_backend(), OTHER_MICRO_BATCH_TOKENS) // (size - 1)
    per_device = -(-count // devices)
    micro_batches = -(-per_device // max(1, micro))
    at_once = devices * -(-per_device // micro_batches)  # Micro-batches of nearly one size.
    empty = pairing.NONE, 0, pairing.NONE, 0, 0

    def filled(values: np.ndarray, filling: int) -> np.ndarray:
        widths = ((0, -count % at_once), *((0, 0),) * (values.ndim - 1))
        values = np.pad(values, widths, constant_values=filling)
        return values.reshape(-1, at_once, *values.shape[1:])

    return _batch(map(filled, batch, empty))


def _put(batch: HostBatch, mesh: Mesh) -> Batch:
    split = NamedSharding(mesh, P(None, sharding.BATCH))
    return Batch(*(sharding.put(values, split) for values in batch))
