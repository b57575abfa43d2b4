"""Token vectors by GloVe (Pennington et al. 2014), as a jitted program over dense blocks of the co-occurrence matrix.

The published loss is the sum over X_ij > 0 of f(X_ij) (w_i . c_j + b_i + c_j - log X_ij)^2 (eq. 8) with
f(x) = min(1, (x / x_max)^alpha) (eq. 9). The C program takes one AdaGrad step a pair; scattered vectors are what an
accelerator (and a vectorised CPU) is worst at. Here the vocabulary is sorted by frequency and cut into blocks, and a step
is one AdaGrad step for the rows and columns of one block: three matrix products. Two things let the summed gradients of
few steps do the work of the C program's many small ones (after 8 passes: loss 0.089 against 0.091 on 2M tokens, 64
dimensions): biases start at their own least-squares fit, so that the first gradients do not fill the accumulators with
what is only frequency; and the rate is `RATE_SCALE` times as large.

Biases travel as columns: word rows are (w, b, 1), context rows (c, 1, b'), so that one product gives w . c + b + b'.
Letters: n tokens, B tokens of a block, E pairs, d dimensions, S stored pairs of a block (padded).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tokalign_jax.alignment.cooccurrence import Cooccurrence
from tokalign_jax.config import AlignmentConfig
from tokalign_jax.progress import Log, Progress

RATE_SCALE = 4.0
"""A step here stands for a block of pairs, not for one: AdaGrad's rate is this much larger than the configured one."""
MAX_BLOCK = 512
"""Tokens of a block. Larger blocks compute faster and learn less a pass: 1024 lags by about one pass in eight."""
MIN_BLOCKS = 16
"""A small vocabulary has smaller blocks, so that every row still takes this many steps a pass."""
DENSE_SHARE = 1 / 64
"""On a CPU, a block with fewer of its cells filled is computed pair by pair; elsewhere all blocks are dense."""
BIAS_ROUNDS = 8
"""Damped fixed-point rounds that fit the starting biases."""


class Block(NamedTuple):
    """The parameters of B neighbouring tokens and AdaGrad's sums of squares; all float32 [B, d+2]."""

    words: Float[Array, "B d+2"]
    contexts: Float[Array, "B d+2"]
    word_squares: Float[Array, "B d+2"]
    context_squares: Float[Array, "B d+2"]


class Objective(NamedTuple):
    """What a step needs to know beside parameters and pairs."""

    rate: float
    x_max: float
    power: float


def train(
    cooccurrence: Cooccurrence, config: AlignmentConfig, seed: int, log: Log, what: str = "GloVe"
) -> tuple[Float[np.ndarray, "n d"], list[float]]:
    """Vectors (word + context) of `cooccurrence.vocabulary`, and the published loss over the pairs, after each pass."""
    rng = np.random.default_rng(seed)
    objective = Objective(config.glove_learning_rate * RATE_SCALE, config.x_max, config.weight_power)
    size = block_size(len(cooccurrence.vocabulary))
    blocks = _start(cooccurrence, objective, config.vector_size, size, rng)
    pairs = _Pairs(cooccurrence, size)
    _compile(blocks, pairs, objective)
    progress = Progress(log, what, config.iterations * pairs.entries, "pairs")
    losses = []
    for _ in range(config.iterations):
        parts = []
        for k in rng.permutation(len(pairs)):
            i, j = pairs.place(k)
            own, other, loss = _step(
                blocks[i], None if i == j else blocks[j], *pairs.of(k), objective, **pairs.shape(k)
            )
            blocks[i] = own
            if other is not None:
                blocks[j] = other
            parts.append(loss)
            if len(parts) % 64 == 0:  # so that the count shown is of work done, not of work queued
                jax.block_until_ready(loss)
            progress.update(int(pairs.counts[k]) * (1 if i == j else 2), f"loss {losses[-1]:.4f}" if losses else "")
        losses.append(float(np.sum(np.array(jax.device_get(parts), np.float64))) / max(pairs.entries, 1))
    progress.done(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}" if losses else "")
    vectors = [np.asarray(block.words + block.contexts)[:, : config.vector_size] for block in blocks]
    return np.concatenate(vectors)[: len(cooccurrence.vocabulary)], losses


def _compile(blocks: list[Block], pairs: "_Pairs", objective: Objective) -> None:
    """Runs every program once, on no pairs, which leaves the blocks as they are: so that time left is told right."""
    programs = {(len(set(pairs.place(k))) == 1, *pairs.shape(k).values()): k for k in range(len(pairs))}
    for k in programs.values():
        i, j = pairs.place(k)
        cells, logs, start, _ = pairs.of(k)
        blocks[i], other, _ = _step(
            blocks[i], None if i == j else blocks[j], cells, logs, start, 0, objective, **pairs.shape(k)
        )
        if other is not None:
            blocks[j] = other


def block_size(tokens: int) -> int:
    """A power of two that cuts `tokens` into `MIN_BLOCKS` or more, between 8 and `MAX_BLOCK`."""
    return min(MAX_BLOCK, max(8, 1 << (max(tokens, 1) // MIN_BLOCKS).bit_length() >> 1))


def gradients(
    words: Float[Array, "B d+2"],
    contexts: Float[Array, "B d+2"],
    cells: Int[Array, "S"],
    logs: Float[Array, "S"],
    objective: Objective,
    dense: bool,
) -> tuple[Float[Array, ""], Float[Array, "B d+2"], Float[Array, "B d+2"]]:
    """The published loss of a block, and half its gradient (as in the C program) for words and contexts.

    Args:
      cells: the place of each pair in the block, row * B + column; B * B for padding.
      logs: log X of each pair.
      dense: by matrix products over the whole block, or pair by pair; the results are the same.
    """
    side = words.shape[0]
    weights = jnp.where(cells < side * side, _weight(logs, objective), 0.0)
    if dense:
        target = _scattered(cells, logs, side)
        error = jnp.matmul(words, contexts.T, precision="high") - target
        pull = _scattered(cells, weights, side) * error
        for_words, for_contexts = pull @ contexts, pull.T @ words
    else:
        row, column = jnp.minimum(cells // side, side - 1), cells % side
        word, context = words[row], contexts[column]
        error = jnp.sum(word * context, axis=1) - logs
        pull = weights * error
        for_words = jnp.zeros_like(words).at[row].add(pull[:, None] * context, indices_are_sorted=True)
        for_contexts = jnp.zeros_like(contexts).at[column].add(pull[:, None] * word)
    return jnp.sum(pull * error), for_words.at[:, -1].set(0.0), for_contexts.at[:, -2].set(0.0)


@functools.partial(jax.jit, static_argnames=("length", "dense"), donate_argnums=(0, 1))
def _step(
    own: Block, other: Block | None, cells, logs, start, count, objective: Objective, *, length: int, dense: bool
):
    """One AdaGrad step on block (i, j) and, off the diagonal (`other` is given), on its mirror image (j, i)."""
    cells = jax.lax.dynamic_slice(cells, (start,), (length,))
    logs = jax.lax.dynamic_slice(logs, (start,), (length,))
    side = own.words.shape[0]
    cells = jnp.where(jnp.arange(length) < count, cells, side * side)
    column = own if other is None else other

    def descend(words, contexts, word_squares, context_squares, cells):
        loss, for_words, for_contexts = gradients(words, contexts, cells, logs, objective, dense)
        words, word_squares = _adagrad(words, word_squares, for_words, objective.rate)
        contexts, context_squares = _adagrad(contexts, context_squares, for_contexts, objective.rate)
        return words, contexts, word_squares, context_squares, loss

    words, contexts, word_squares, context_squares, loss = descend(
        own.words, column.contexts, own.word_squares, column.context_squares, cells
    )
    if other is None:
        return Block(words, contexts, word_squares, context_squares), None, loss
    mirrored = jnp.where(cells < side * side, cells % side * side + cells // side, side * side)
    other_words, own_contexts, other_word_squares, own_context_squares, mirror_loss = descend(
        other.words, own.contexts, other.word_squares, own.context_squares, mirrored
    )
    own = Block(words, own_contexts, word_squares, own_context_squares)
    return own, Block(other_words, contexts, other_word_squares, context_squares), loss + mirror_loss


def _adagrad(values, squares, gradient, rate):
    squares = squares + gradient * gradient
    return values - rate * gradient * jax.lax.rsqrt(squares), squares


def _weight(logs, objective: Objective):
    """f(X) of eq. 9, from log X."""
    return jnp.exp(jnp.minimum(objective.power * (logs - jnp.log(objective.x_max)), 0.0))


def _scattered(cells, values, side: int):
    """The block that holds `values` at `cells` and zero elsewhere."""
    flat = jnp.zeros(side * side, values.dtype).at[cells].set(values, mode="drop", unique_indices=True)
    return flat.reshape(side, side)


def _start(
    cooccurrence: Cooccurrence, objective: Objective, dimensions: int, size: int, rng: np.random.Generator
) -> list[Block]:
    """Vectors uniform in (-0.5, 0.5) / d as in the C program, fitted biases, sums of squares 1."""
    n = len(cooccurrence.vocabulary)
    padded = -(-n // size) * size
    biases = np.zeros(padded)
    biases[:n] = _biases(cooccurrence, objective)

    def rows(one: int, bias: int) -> np.ndarray:
        values = np.ones((padded, dimensions + 2), np.float32)
        values[:, :dimensions] = (rng.random((padded, dimensions)) - 0.5) / dimensions
        values[:, bias] = biases
        return values.reshape(-1, size, dimensions + 2)

    words, contexts = rows(one=-1, bias=-2), rows(one=-2, bias=-1)
    return [
        Block(jnp.asarray(w), jnp.asarray(c), jnp.ones(w.shape, w.dtype), jnp.ones(c.shape, c.dtype))
        for w, c in zip(words, contexts)
    ]


def _biases(cooccurrence: Cooccurrence, objective: Objective) -> np.ndarray:
    """float64 [n]: b that nearly minimises the loss with all vectors zero, log X_ij ~ b_i + b_j."""
    rows, cols, n = cooccurrence.rows, cooccurrence.cols, len(cooccurrence.vocabulary)
    logs = np.log(cooccurrence.counts)
    weights = np.exp(np.minimum(objective.power * (logs - np.log(objective.x_max)), 0.0))
    mirror = np.where(rows == cols, 0.0, weights)

    def row_sums(values: np.ndarray) -> np.ndarray:
        return np.bincount(rows, weights * values[cols], n) + np.bincount(cols, mirror * values[rows], n)

    total = row_sums(np.ones(n))
    pull = np.bincount(rows, weights * logs, n) + np.bincount(cols, mirror * logs, n)
    biases = np.zeros(n)
    for _ in range(BIAS_ROUNDS):
        biases = 0.5 * biases + 0.5 * (pull - row_sums(biases)) / np.maximum(total, 1e-9)
    return biases


class _Pairs:
    """The pairs sorted by block, on the device where they fit.

    A block's pairs are read as a slice padded to a power of two or four, so that only a few programs are compiled. Blocks
    on the diagonal hold both triangles, others stand for their mirror image too.
    """

    def __init__(self, cooccurrence: Cooccurrence, size: int):
        rows, cols = cooccurrence.rows, cooccurrence.cols
        self._blocks = -(-len(cooccurrence.vocabulary) // size)
        self.entries = 2 * len(rows) - int(np.sum(rows == cols))
        lower = np.flatnonzero((rows // size == cols // size) & (rows != cols))
        rows, cols = np.concatenate([rows, cols[lower]]), np.concatenate([cols, rows[lower]])
        logs = np.log(cooccurrence.counts).astype(np.float32)
        logs = np.concatenate([logs, logs[lower]])
        block = (rows // size).astype(np.int64) * self._blocks + cols // size
        cells = rows % size * size + cols % size
        order = np.argsort(block * (size * size) + cells, kind="stable")
        self._names, self._starts, self.counts = np.unique(block[order], return_index=True, return_counts=True)
        padding = (0, 4 * int(self.counts.max(initial=64)))
        self._cells, self._logs = np.pad(cells[order], padding), np.pad(logs[order], padding)
        self._cells_in_block = size * size
        self._resident = _fits_device(2 * self._cells.nbytes)
        if self._resident:
            self._cells, self._logs = jnp.asarray(self._cells), jnp.asarray(self._logs)
        self._always_dense = jax.default_backend() != "cpu"

    def __len__(self) -> int:
        return len(self._names)

    def place(self, k: int) -> tuple[int, int]:
        """Row and column, in blocks, of the k-th block that is not empty."""
        row, column = divmod(int(self._names[k]), self._blocks)
        return row, column

    def of(self, k: int) -> tuple:
        """(cells, logs, where the block's pairs start in them, how many there are)."""
        start, count = int(self._starts[k]), int(self.counts[k])
        if self._resident:
            return self._cells, self._logs, start, count
        here = slice(start, start + self.shape(k)["length"])
        return self._cells[here], self._logs[here], 0, count

    def shape(self, k: int) -> dict:
        """The static arguments of the k-th block's step."""
        count = int(self.counts[k])
        dense = self._always_dense or count >= DENSE_SHARE * self._cells_in_block
        # Padding costs a pair-by-pair step as much as pairs do, a dense one next to nothing; a program costs a second.
        step = 2 if dense else 1
        return {"length": max(256, 1 << -(-(count - 1).bit_length() // step) * step), "dense": dense}


def _fits_device(size: int) -> bool:
    """Whether `size` bytes leave most of the accelerator's memory free; a CPU's memory is the host's."""
    statistics = jax.devices()[0].memory_stats() or {}
    return size < statistics.get("bytes_limit", 4 * size + 4) / 4
