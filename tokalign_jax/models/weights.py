"""Weight tables: map the tensors of a Hugging Face checkpoint to parameter leaves and back.

A table is a list of `Weight`. Tensors of layers are listed once, with `{layer}` for the layer
number; they fill slice `layer` of leaves stacked over L. If a layer has several tensors of a kind
(experts, heads), `{index}` is their number, and they fill slice `layer, index`. Reading applies
`split`, writing its inverse `join`.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Weight:
    """A tensor of the checkpoint, or the same one of each layer (and index)."""

    name: str
    """Name in the checkpoint, such as `model.layers.{layer}.mlp.up_proj.weight`."""
    leaves: tuple[str, ...]
    """Paths of the leaves that it fills."""
    split: Callable[[np.ndarray], Sequence[np.ndarray]]
    """Tensor -> slices of the leaves."""
    join: Callable[[Sequence[np.ndarray]], np.ndarray]
    """Slices of the leaves -> tensor."""
    aliases: tuple[str, ...] = ()
    """Alternative names in checkpoints."""
    count: int = 1
    """Number of values of `{index}`."""
    layers: tuple[int, ...] | None = None
    """The layers that have it, in the order of the leaves' slices; None for all."""

    @property
    def stacked(self) -> int:
        """Number of leading axes indexed by the name: 0, 1 (layer) or 2 (layer, index)."""
        return ("{layer}" in self.name) + ("{index}" in self.name)

    def slices(self, num_layers: int) -> list[tuple[int, ...]]:
        """Returns the leaf slice that each of its tensors fills; () is the whole."""
        layers = num_layers if self.layers is None else len(self.layers)
        return list(itertools.product(*(range(n) for n in (layers, self.count)[: self.stacked])))

    def names(self, part: tuple[int, ...]) -> tuple[str, ...]:
        """Returns the possible names of the tensor of slice `part`, the default first."""
        numbers = dict(zip(("layer", "index"), part))
        if part and self.layers is not None:
            numbers["layer"] = self.layers[part[0]]
        return tuple(name.format(**numbers) for name in (self.name, *self.aliases))


Order = Sequence[int]
"""A permutation of a leaf's last axis: leaf element i is tensor element order[i]."""


def direct(
    name: str,
    leaf: str,
    aliases: tuple[str, ...] = (),
    count: int = 1,
    order: Order | None = None,
) -> Weight:
    """Maps a tensor to a leaf unchanged, or with its last axis permuted by `order`."""
    if order is None:
        return Weight(
            name, (leaf,), lambda tensor: (tensor,), lambda leaves: leaves[0], aliases, count
        )
    permutation, inverse = _indices(order)
    return Weight(
        name,
        (leaf,),
        lambda tensor: (tensor[..., permutation],),
        lambda leaves: leaves[0][..., inverse],
        aliases,
        count,
    )


def linear(
    name: str, path: str, bias: bool, count: int = 1, order: Order | None = None
) -> list[Weight]:
    """Maps a PyTorch linear layer: weight [out, in] to kernel [in, out], and optionally a bias.

    Args:
      name: name of the layer in the checkpoint.
      path: path of its parameters.
      bias: True if it has a bias.
      count: number of values of `{index}`.
      order: permutation of the outputs, if the checkpoint orders them differently.
    """
    permutation, inverse = _indices(order)
    kernel = Weight(
        f"{name}.weight",
        (f"{path}/kernel",),
        lambda tensor: (tensor[permutation].T,),
        lambda leaves: leaves[0].T[inverse],
        count=count,
    )
    if not bias:
        return [kernel]
    return [kernel, direct(f"{name}.bias", f"{path}/bias", count=count, order=order)]


def _indices(order: Order | None) -> tuple[Any, Any]:
    """Returns the index that permutes an axis, and its inverse."""
    if order is None:
        return slice(None), slice(None)
    return np.asarray(order), np.argsort(order)


def fused(name: str, leaves: Sequence[str], sizes: Sequence[int], outputs: int) -> Weight:
    """Maps one tensor to several projections, concatenated (`sizes`) on its axis `outputs`.

    The axis is -2 for PyTorch's matrices [..., out, in], and -1 for [..., in, out] and biases.
    """
    ends = np.cumsum(sizes)[:-1]

    def swap(matrix: np.ndarray) -> np.ndarray:
        return matrix if outputs == -1 else matrix.swapaxes(-1, -2)

    return Weight(
        name,
        tuple(leaves),
        lambda tensor: [swap(part) for part in np.split(tensor, ends, axis=outputs)],
        lambda parts: np.concatenate([swap(part) for part in parts], axis=outputs),
    )


def norm(
    name: str, path: str, bias: bool, scale: bool = True, order: Order | None = None
) -> list[Weight]:
    """Maps a norm's scale and bias, as far as it has them."""
    return [
        *([direct(f"{name}.weight", f"{path}/scale", order=order)] if scale else []),
        *([direct(f"{name}.bias", f"{path}/bias", order=order)] if bias else []),
    ]
