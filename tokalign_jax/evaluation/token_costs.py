"""Negative log-likelihoods of tokens: the forward pass behind all likelihood measures.

Windows of like length are read together, padded to one of few lengths, so that few programs are
compiled; logits [B, T, V] never exist (`training/losses.py`). B windows of a batch, T tokens of
one.
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

_SHORTEST = 16
"""Windows are padded to no fewer tokens than this."""


class Window(NamedTuple):
    """Tokens that a model reads, and what it is to predict after each of them."""

    inputs: Sequence[int]
    labels: Sequence[int]


class TokenCosts(NamedTuple):
    """What a model makes of one window's labels."""

    nats: Float[np.ndarray, "T"]
    """float32: negative log-likelihood of each label."""
    likeliest: Int[np.ndarray, "T"] | None
    """int32: the likeliest id in the place of each label; None unless asked for."""


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
    """The costs of each window's labels, in the order of `windows`.

    Args:
      longest: tokens of the longest window allowed.
      batch: windows of that length that a device reads at once; of shorter ones as many more.
      mesh: of the devices to run on, where `params` are or go; None: all devices.
      progress: counts tokens.
      likeliest: also find the likeliest token at each position.
    """
    mesh = mesh or sharding.make_mesh()
    params = sharding.place(params, mesh)
    split = NamedSharding(mesh, P(sharding.BATCH))
    found: list[TokenCosts | None] = [None] * len(windows)
    for group, (rows, length) in _batches(
        windows, batch, longest, config, sharding.sequences_at_once(mesh)
    ):
        inputs = np.zeros((rows, length), np.int32)
        labels = np.full((rows, length), IGNORED, np.int32)
        for row, index in enumerate(group):
            size = len(windows[index].labels)
            inputs[row, :size], labels[row, :size] = windows[index]
        arrays = (sharding.put(array, split) for array in (inputs, labels))
        nats, best = _batch_costs(
            params, *arrays, config=config, compute=compute, mesh=mesh, likeliest=likeliest
        )
        nats, best = np.asarray(nats), None if best is None else np.asarray(best)
        for row, index in enumerate(group):
            size = len(windows[index].labels)
            found[index] = TokenCosts(nats[row, :size], None if best is None else best[row, :size])
        if progress:
            progress.update(sum(len(windows[index].labels) for index in group))
    return found  # type: ignore[return-value]  (every window was in one group)


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
    """`TokenCosts` of a batch as arrays [B, T], on every device."""
    with sharding.within(mesh):
        hidden = transformer.forward(config, params, inputs, dtype=jnp.dtype(compute.dtype))
        arguments = hidden, transformer.head_matrix(params), labels, head_of(config, compute)
        found = token_nll_and_likeliest(*arguments) if likeliest else (token_nll(*arguments), None)
        return jax.tree.map(lambda x: sharding.constrain(x, None), found)  # type: ignore[return-value]


def _batches(
    windows: Sequence[Window], batch: int, longest: int, config: ModelConfig, devices: int
) -> Iterator[tuple[list[int], tuple[int, int]]]:
    """Indices of windows that are read together, and their padded shape [rows, length]."""
    by_length: dict[int, list[int]] = {}
    bound = min(_unscaled_positions(config), longest)
    for index, (_, labels) in enumerate(windows):
        fits = bound if len(labels) <= bound else longest
        by_length.setdefault(_padded_length(len(labels), fits), []).append(index)
    for length, indices in sorted(by_length.items()):
        fewest = 1 << (-(-len(indices) // devices) - 1).bit_length()
        rows = min(batch * longest // length, fewest) * devices
        for first in range(0, len(indices), rows):
            yield indices[first : first + rows], (rows, length)


def _unscaled_positions(config: ModelConfig) -> int:
    """How many tokens may be read as if no longer text existed.

    LongRoPE takes other factors in texts longer than a model's first length: what is no longer than
    that is not to be padded past it.
    """
    scalings = [kind.rope.scaling for kind in config.layer_kinds if kind.rope]
    return min(
        (s.original_positions for s in scalings if isinstance(s, LongRopeScaling)),
        default=config.max_positions,
    )


def _padded_length(length: int, longest: int) -> int:
    """`longest` halved as often as `length` allows, so that few programs are compiled."""
    size = longest
    while size // 2 >= max(length, _SHORTEST):
        size //= 2
    return size
