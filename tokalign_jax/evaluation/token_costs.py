"""Negative log-likelihoods of tokens: the forward pass of all likelihood-based measures.

Windows of similar length are batched and padded to one of few lengths to limit compilation; logits
[B, T, V] are never materialized (`training/losses.py`). B windows per batch, T tokens per window.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from tokalign_jax.config import ComputeConfig
from tokalign_jax.models import transformer
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.rotary import LongRopeScaling
from tokalign_jax.parallel import sharding
from tokalign_jax.training.losses import IGNORED, head_of, token_nll, token_nll_and_likeliest
from tokalign_jax.utils.progress import Progress

_MIN_LENGTH = 16
"""Minimum length that windows are padded to."""


class Window(NamedTuple):
    """Input tokens, and the label to predict after each of them."""

    inputs: Sequence[int]
    labels: Sequence[int]


class TokenCosts(NamedTuple):
    """Costs of a window's labels."""

    nats: Float[np.ndarray, "T"]
    """float32: negative log-likelihood of each label."""
    likeliest: Int[np.ndarray, "T"] | None
    """int32: the most likely token instead of each label; None unless requested."""


def token_costs(
    config: ModelConfig,
    params: dict,
    windows: Sequence[Window],
    *,
    longest: int,
    batch: int,
    compute: ComputeConfig,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
    likeliest: bool = False,
) -> list[TokenCosts]:
    """Returns the costs of each window's labels, in the order of `windows`.

    Args:
      config: the model's config.
      params: its parameters.
      windows: the windows.
      longest: maximum number of tokens per window.
      batch: number of windows of that length per device and batch; shorter ones are more.
      compute: dtype and chunk size of the computation.
      mesh: mesh of the devices to run on; None for all devices.
      progress: counts tokens.
      likeliest: also return the most likely token at each position.
    """
    mesh = mesh or sharding.make_mesh()
    params = sharding.place(params, mesh)
    by_sequence = NamedSharding(mesh, P(sharding.BATCH))
    costs: list[TokenCosts | None] = [None] * len(windows)
    for group, (rows, length) in _batches(
        windows, batch, longest, config, sharding.sequences_at_once(mesh)
    ):
        inputs = np.zeros((rows, length), np.int32)
        labels = np.full((rows, length), IGNORED, np.int32)
        for row, index in enumerate(group):
            size = len(windows[index].labels)
            inputs[row, :size], labels[row, :size] = windows[index]
        arrays = (sharding.put(array, by_sequence) for array in (inputs, labels))
        nats, best = _batch_costs(
            params, *arrays, config=config, compute=compute, mesh=mesh, likeliest=likeliest
        )
        nats, best = np.asarray(nats), None if best is None else np.asarray(best)
        for row, index in enumerate(group):
            size = len(windows[index].labels)
            costs[index] = TokenCosts(nats[row, :size], None if best is None else best[row, :size])
        if progress:
            progress.update(sum(len(windows[index].labels) for index in group))
    return costs  # type: ignore[return-value]  (every window is in one group)


@functools.partial(jax.jit, static_argnames=("config", "compute", "mesh", "likeliest"))
def _batch_costs(
    params,
    inputs,
    labels,
    *,
    config: ModelConfig,
    compute: ComputeConfig,
    mesh: Mesh,
    likeliest: bool,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns the `TokenCosts` of a batch as arrays [B, T], replicated on every device."""
    with sharding.within(mesh):
        hidden = transformer.forward(config, params, inputs, dtype=jnp.dtype(compute.dtype))
        arguments = hidden, transformer.head_matrix(params), labels, head_of(config, compute)
        costs = token_nll_and_likeliest(*arguments) if likeliest else (token_nll(*arguments), None)
        replicated = jax.tree.map(lambda x: sharding.constrain(x, None), costs)
        return replicated  # type: ignore[return-value]


def _batches(
    windows: Sequence[Window], batch: int, longest: int, config: ModelConfig, devices: int
) -> Iterator[tuple[list[int], tuple[int, int]]]:
    """Yields indices of windows that form a batch, with their padded shape [rows, length]."""
    by_length: dict[int, list[int]] = {}
    bound = min(_unscaled_positions(config), longest)
    for index, (_, labels) in enumerate(windows):
        limit = bound if len(labels) <= bound else longest
        by_length.setdefault(_padded_length(len(labels), limit), []).append(index)
    for length, indices in sorted(by_length.items()):
        needed = 1 << (-(-len(indices) // devices) - 1).bit_length()
        rows = min(batch * longest // length, needed) * devices
        for first in range(0, len(indices), rows):
            yield indices[first : first + rows], (rows, length)


def _unscaled_positions(config: ModelConfig) -> int:
    """Returns the length up to which windows may be padded without changing results.

    LongRoPE uses other factors for texts beyond a model's original length, so shorter windows must
    not be padded past it.
    """
    scalings = [kind.rope.scaling for kind in config.layer_kinds if kind.rope]
    return min(
        (s.original_positions for s in scalings if isinstance(s, LongRopeScaling)),
        default=config.max_positions,
    )


def _padded_length(length: int, longest: int) -> int:
    """Returns `longest` halved as often as `length` allows, to limit the number of programs."""
    size = longest
    while size // 2 >= max(length, _MIN_LENGTH):
        size //= 2
    return size
