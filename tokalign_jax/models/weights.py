"""A family's weight table: which tensor of a Hugging Face checkpoint fills which leaves of the parameters, and back.

A table is a list of `Weight`. Layer tensors are named once, with `{layer}` for the number; they fill slice `layer` of
leaves that are stacked over L. Reading applies `split`, and writing its inverse `join`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Weight:
    """One tensor (of each layer)."""

    name: str
    """In the checkpoint, such as `model.layers.{layer}.mlp.up_proj.weight`."""
    leaves: tuple[str, ...]
    """Paths of the leaves it fills."""
    split: Callable[[np.ndarray], Sequence[np.ndarray]]
    """The tensor -> the leaves."""
    join: Callable[[Sequence[np.ndarray]], np.ndarray]
    """The leaves -> the tensor."""
    aliases: tuple[str, ...] = ()
    """Other names that checkpoints use for it."""

    @property
    def layered(self) -> bool:
        return "{layer}" in self.name


def same(name: str, leaf: str, aliases: tuple[str, ...] = ()) -> Weight:
    """The tensor is the leaf."""
    return Weight(name, (leaf,), lambda tensor: (tensor,), lambda leaves: leaves[0], aliases)


def linear(name: str, path: str, bias: bool) -> list[Weight]:
    """A PyTorch linear layer: weight [out, in] to kernel [in, out], and perhaps a bias."""
    kernel = Weight(f"{name}.weight", (f"{path}/kernel",), lambda tensor: (tensor.T,), lambda leaves: leaves[0].T)
    return [kernel, same(f"{name}.bias", f"{path}/bias")] if bias else [kernel]


def norm(name: str, path: str, bias: bool) -> list[Weight]:
    """A norm's scale, and perhaps its bias."""
    scale = same(f"{name}.weight", f"{path}/scale")
    return [scale, same(f"{name}.bias", f"{path}/bias")] if bias else [scale]
