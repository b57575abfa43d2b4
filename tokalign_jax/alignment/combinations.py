"""Linear combinations of shared tokens for target tokens: FOCUS and OMP.

FOCUS (Dobler & de Melo 2023, arXiv 2305.14481) weights shared tokens by the sparsemax of their
cosines to the target token in a space of token vectors. OMP (Goddard & Fernandes Neto 2025, arXiv
2506.06607; mergekit-tokensurgeon) approximates the target token's row in a donor model, which has
the target vocabulary, by orthogonal matching pursuit over the shared tokens' rows there. The
weights are then applied to the rows of these tokens in the source model.

Letters: m target tokens, S shared tokens, d dimensions, k atoms, b block.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tokalign_jax.alignment.matching import unit

SCORES = 2**25
"""Elements that exist at once, at most, of products of target and shared tokens, and of bases (128
MiB).
"""
INDEPENDENT = 1e-5
"""Share of an atom's norm outside of the span of earlier atoms above which it counts as
independent.
"""


class Combinations(NamedTuple):
    """Linear combinations of shared tokens for m target tokens, as sparse entries."""

    rows: Int[np.ndarray, "E"]
    """The target token of each entry, non-decreasing."""
    shared: Int[np.ndarray, "E"]
    weights: Float[np.ndarray, "E"]
    scores: Float[np.ndarray, "m"]
    """Quality from 0 to 1: FOCUS's largest cosine, OMP's explained share of the squared norm."""


def focus(targets: Float[np.ndarray, "m d"], shared: Float[np.ndarray, "S d"]) -> Combinations:
    """Weight shared tokens (S >= 1) by the sparsemax of their cosines to each target token."""
    parts, table = [], unit(jnp.asarray(shared, jnp.float32))
    for block in _blocks(targets, len(shared)):
        cosines = jnp.matmul(unit(jnp.asarray(block)), table.T, precision="highest")
        weights = np.asarray(sparsemax(cosines), np.float64)
        weights /= weights.sum(axis=1, keepdims=True)  # They sum to 1 up to rounding.
        rows, places = np.nonzero(weights)
        parts.append((rows, places, weights[rows, places], np.asarray(cosines.max(axis=1))))
    return _joined(parts)


def omp(
    targets: Float[np.ndarray, "m d"], shared: Float[np.ndarray, "S d"], atoms: int
) -> Combinations:
    """Approximate each target token by `atoms` shared tokens, or by all S if there are fewer."""
    parts, table = [], jnp.asarray(shared, jnp.float32)
    atoms = min(atoms, len(shared))
    for block in _blocks(targets, max(len(shared), atoms * targets.shape[1])):
        chosen, weights, residual = map(np.asarray, matching_pursuit(block, table, atoms))
        rows, places = np.nonzero(weights)
        length = np.maximum(np.square(block).sum(axis=1), 1e-30)
        explained = 1 - np.square(residual).sum(axis=1) / length
        parts.append((rows, chosen[rows, places], weights[rows, places], explained))
    return _joined(parts)


@jax.jit
def sparsemax(scores: Float[Array, "b S"]) -> Float[Array, "b S"]:
    """Project each row onto the probability simplex (Martins & Astudillo 2016, eq. 2).

    The projection is max(score - t, 0) with the threshold t at which it sums to 1. Michelot's
    iteration finds t without sorting: from below, t is set to the value at which the scores above
    it sum to 1, until it no longer changes.
    """

    def raised(threshold: Float[Array, "b 1"]) -> Float[Array, "b 1"]:
        above = scores > threshold
        return (jnp.where(above, scores, 0).sum(axis=1, keepdims=True) - 1) / above.sum(
            axis=1, keepdims=True
        )

    def step(state):
        return raised(state[0]), state[0]

    first = scores.max(axis=1, keepdims=True) - 1
    threshold, _ = jax.lax.while_loop(
        lambda state: (state[0] > state[1]).any(), step, (raised(first), first)
    )
    return jnp.maximum(scores - threshold, 0)


@functools.partial(jax.jit, static_argnames="atoms")
def matching_pursuit(
    targets: Float[Array, "b d"], table: Float[Array, "S d"], atoms: int
) -> tuple[Int[Array, "b k"], Float[Array, "b k"], Float[Array, "b d"]]:
    """Run orthogonal matching pursuit.

    Each step chooses the row with the largest absolute product with the residual, and subtracts the
    projection on all rows chosen so far. Coefficients are the least-squares fit on k = `atoms` <= S
    rows.

    Returns:
      Chosen rows, coefficients, and residuals.
    """
    product = functools.partial(jnp.einsum, precision="highest")
    batch = jnp.arange(len(targets))

    def step(i, state):
        residual, basis, chosen = state
        scores = jnp.abs(product("bd,sd->bs", residual, table))
        scores = scores.at[batch[:, None], chosen].set(-jnp.inf, mode="drop")
        new = scores.argmax(axis=1)
        atom = direction = table[new]
        for _ in range(2):  # The second pass reorthogonalizes, against rounding.
            direction -= product("bk,bkd->bd", product("bkd,bd->bk", basis, direction), basis)
        size, length = (jnp.linalg.norm(x, axis=1, keepdims=True) for x in (direction, atom))
        direction = jnp.where(
            size > INDEPENDENT * length, direction / jnp.maximum(size, 1e-30), 0.0
        )
        residual -= product("bd,bd->b", residual, direction)[:, None] * direction
        return residual, basis.at[:, i].set(direction), chosen.at[:, i].set(new)

    start = (
        targets,
        jnp.zeros((len(targets), atoms, targets.shape[1])),
        jnp.full((len(targets), atoms), len(table)),
    )
    residual, basis, chosen = jax.lax.fori_loop(0, atoms, step, start)
    triangle = jnp.triu(product("bkd,bjd->bkj", basis, table[chosen]))
    # A dependent atom has an empty row: its coefficient becomes 0.
    triangle += jax.vmap(jnp.diag)((jnp.abs(basis).sum(axis=2) == 0).astype(jnp.float32))
    projections = product("bkd,bd->bk", basis, targets)[..., None]
    return chosen, jax.scipy.linalg.solve_triangular(triangle, projections)[..., 0], residual


def _blocks(targets: Float[np.ndarray, "m d"], numbers: int) -> Iterator[Float[np.ndarray, "b d"]]:
    """Yield blocks of targets that each take `numbers` elements of memory."""
    size = max(1, SCORES // max(numbers, 1))
    for start in range(0, len(targets), size):
        yield np.asarray(targets[start : start + size], np.float32)


def _joined(parts: list[tuple[np.ndarray, ...]]) -> Combinations:
    if not parts:
        return Combinations(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), np.zeros(0))
    starts = np.cumsum([0, *(len(scores) for *_, scores in parts)])
    columns = [(rows + start, *others) for start, (rows, *others) in zip(starts, parts)]
    rows, shared, weights, scores = (np.concatenate(column) for column in zip(*columns))
    return Combinations(rows, shared, weights, np.clip(scores, 0.0, 1.0))
