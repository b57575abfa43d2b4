"""A family's weight table: which tensor of a Hugging Face checkpoint fills which leaves of the
parameters, and back.

A table is a list of `Weight`. Layer tensors are named once, with `{layer}` for the number; they
fill slice `layer` of leaves that are stacked over L. Where a layer has several of one kind
(experts, heads), `{index}` is their number, and they fill slice `layer, index`. Reading applies
`split`, and writing its inverse `join`.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Weight:
    """One tensor (of each layer, and there of each index)."""

    name: str
    """In the checkpoint, such as `model.layers.{layer}.mlp.up_proj.weight`."""
    leaves: tuple[str, ...]
    """Paths of the leaves it fills."""
    split: Callable[[np.ndarray], Sequence[np.ndarray]]
    """The tensor -> the leaves' slices."""
    join: Callable[[Sequence[np.ndarray]], np.ndarray]
    """The leaves' slices -> the tensor."""
    aliases: tuple[str, ...] = ()
    """Other names that checkpoints use for it."""
    count: int = 1
    """How many there are of `{index}`."""
    layers: tuple[int, ...] | None = None
    """The layers that have it, in the order of the leaves' slices; None: all."""

    @property
    def stacked(self) -> int:
        """Leading axes of the leaves that the name numbers: 0, 1 (layer) or 2 (layer, index)."""
        return ("{layer}" in self.name) + ("{index}" in self.name)

    def slices(self, num_layers: int) -> list[tuple[int, ...]]:
        """The slice of the leaves that each of its tensors fills; () is the whole."""
        layers = num_layers if self.layers is None else len(self.layers)
        return list(itertools.product(*(range(n) for n in (layers, self.count)[: self.stacked])))

    def names(self, part: tuple[int, ...]) -> tuple[str, ...]:
        """All names that the tensor of the slice `part` may have, the usual one first."""
        numbers = dict(zip(("layer", "index"), part))
        if part and self.layers is not None:
            numbers["layer"] = self.layers[part[0]]
        return tuple(name.format(**numbers) for name in (self.name, *self.aliases))


Order = Sequence[int]
"""A permutation of a leaf's last axis: element i of ours is element order[i] of theirs."""


def same(
    name: str,
    leaf: str,
    aliases: tuple[str, ...] = (),
    count: int = 1,
    order: Order | None = None,
) -> Weight:
    """The tensor is the leaf, or has its last axis in another order."""
    if order is None:
        return Weight(
            name, (leaf,), lambda tensor: (tensor,), lambda leaves: leaves[0], aliases, count
        )
    there, back = _indices(order)
    return Weight(
        name,
        (leaf,),
        lambda tensor: (tensor[..., there],),
        lambda leaves: leaves[0][..., back],
        aliases,
        count,
    )


def linear(
    name: str, path: str, bias: bool, count: int = 1, order: Order | None = None
) -> list[Weight]:
    """A PyTorch linear layer: weight [out, in] to kernel [in, out], and perhaps a bias.

    Args:
      order: of the outputs, where theirs are in another order than ours.
    """
    there, back = _indices(order)
    kernel = Weight(
        f"{name}.weight",
        (f"{path}/kernel",),
        lambda tensor: (tensor[there].T,),
        lambda leaves: leaves[0].T[back],
        count=count,
    )
    if not bias:
        return [kernel]
    return [kernel, same(f"{name}.bias", f"{path}/bias", count=count, order=order)]


def _indices(order: Order | None) -> tuple[Any, Any]:
    """The index that reorders an axis, and the one that undoes it."""
    if order is None:
        return slice(None), slice(None)
    return np.asarray(order), np.argsort(order)


def fused(name: str, leaves: Sequence[str], sizes: Sequence[int], outputs: int) -> Weight:
    """One tensor for several projections, whose outputs (`sizes`) follow each other on its axis
    `outputs`.

    That is -2 for PyTorch's matrices [..., out, in], and -1 for [..., in, out] as ours are, and for
    biases.
    """
    ends = np.cumsum(sizes)[:-1]

    def turn(matrix: np.ndarray) -> np.ndarray:
        return matrix if outputs == -1 else matrix.swapaxes(-1, -2)

    return Weight(
        name,
        tuple(leaves),
        lambda tensor: [turn(part) for part in np.split(tensor, ends, axis=outputs)],
        lambda parts: np.concatenate([turn(part) for part in parts], axis=outputs),
    )


def norm(
    name: str, path: str, bias: bool, scale: bool = True, order: Order | None = None
) -> list[Weight]:
    """A norm's scale and bias, as far as it has them."""
    return [
        *([same(f"{name}.weight", f"{path}/scale", order=order)] if scale else []),
        *([same(f"{name}.bias", f"{path}/bias", order=order)] if bias else []),
    ]
