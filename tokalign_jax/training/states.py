"""The model after a training stage: stored weights, what the stages since have trained, adapters.

Never more in memory than asked for: `assemble` puts a state on the devices in the types that the
caller computes with, `reader` reads one tensor at a time for an export.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from tokalign_jax.config import StageConfig
from tokalign_jax.models import huggingface, lora, quantized
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.huggingface import DtypeOf
from tokalign_jax.models.transformer import Params, abstract_params
from tokalign_jax.parallel import sharding
from tokalign_jax.training import loop
from tokalign_jax.utils import paths


class Changes(NamedTuple):
    """Differences of a state from the stored weights."""

    leaves: dict[str, jax.Array]
    """float32 by path; of several stages that trained a parameter, the last one's."""
    adapters: dict[str, list[lora.Adapter]]
    """By path of the kernel, in the order of the stages."""


def load_changes(
    model: ModelConfig, stages: Sequence[tuple[Path, StageConfig]], mesh: Mesh
) -> Changes:
    """Load what finished stages have trained, from their checkpoints.

    A stage all of whose parameters were trained again later is not read.

    Args:
      stages: their folders and settings, in order.

    Raises:
      UserError, Stopped: as `loop.load_trained`.
    """
    leaves: dict[str, jax.Array] = {}
    adapters: dict[str, list[lora.Adapter]] = defaultdict(list)
    for number, stage, trained in surviving(model, [stage for _, stage in stages]):
        loaded = loop.load_trained(stages[number][0], stage, model, mesh)
        spec = loop.lora_spec(stage)
        leaves |= {path: loaded[path] for path in trained if path == _parameter(path)}
        for path in (path for path in trained if path.endswith("/lora_a")):
            assert spec, path
            adapter = lora.Adapter(spec, loaded[path], loaded[path.removesuffix("a") + "b"])
            adapters[_parameter(path)].append(adapter)
    return Changes(leaves, dict(adapters))


def surviving(
    model: ModelConfig, stages: Sequence[StageConfig]
) -> list[tuple[int, StageConfig, list[str]]]:
    """Stages with parameters that no later stage replaces: number, settings, and their paths.

    A parameter that is trained again replaces its earlier values and their adapters.
    """
    result: list[tuple[int, StageConfig, list[str]]] = []
    replaced: set[str] = set()
    for number, stage in reversed(list(enumerate(stages))):
        shapes = paths.flatten(abstract_params(model, loop.lora_spec(stage)))
        trained = [path for path in shapes if loop.trains(stage, path)] if stage.steps else []
        if remaining := [path for path in trained if _parameter(path) not in replaced]:
            result.append((number, stage, remaining))
        replaced |= {path for path in trained if path == _parameter(path)}
    return result[::-1]


def _parameter(path: str) -> str:
    """The path of the parameter that a leaf belongs to: an adapter's is its kernel."""
    return re.sub(r"/lora_[ab]$", "/kernel", path)


def assemble(
    folder: Path,
    model: ModelConfig,
    changes: Changes,
    dtype: DtypeOf,
    mesh: Mesh,
    kind: quantized.Kind | None = None,
) -> Params:
    """A state on the mesh, adapters merged in float32 one layer at a time.

    `changes` are consumed: each array is freed once it is cast or merged.

    Args:
      folder: of the stored weights.
      dtype: None for a path: as stored, float32 if a stage has trained it.
      kind: the format of quantized projections, with adapters merged before; they are loaded one by
        one, so that no other copy of the model is in memory. None: nothing is quantized.
    """
    if kind is None:
        return _assemble(folder, model, changes, dtype, mesh, ())
    shapes = paths.flatten(abstract_params(model))
    leaves: dict[str, Any] = {}
    for path in [p for p, leaf in shapes.items() if quantized.is_quantized(p, leaf.shape)]:
        own = Changes(
            {path: changes.leaves.pop(path)} if path in changes.leaves else {},
            {path: changes.adapters.pop(path)} if path in changes.adapters else {},
        )
        one = _assemble(folder, model, own, dtype, mesh, shapes.keys() - {path})
        leaves[path] = quantized.quantize_leaf(path, paths.flatten(one)[path], kind, mesh)
        del one, own  # free the kernel before the next is loaded
    rest = _assemble(folder, model, changes, dtype, mesh, leaves)
    return paths.merge(rest, paths.unflatten(leaves))


def _assemble(
    folder: Path,
    model: ModelConfig,
    changes: Changes,
    dtype: DtypeOf,
    mesh: Mesh,
    skip: Collection[str],
) -> Params:
    """The parameters of `assemble` but those of `skip`, unquantized."""
    leaves: dict[str, Any] = {}
    for path in list(changes.leaves):
        leaves[path] = changes.leaves.pop(path).astype(dtype(path) or jnp.float32)
    skip = leaves.keys() | set(skip)
    leaves |= paths.flatten(huggingface.load_params(folder, model, dtype, mesh, skip=skip))
    for path in list(changes.adapters):
        leaves[path] = lora.merge_into(leaves.pop(path), changes.adapters.pop(path))
    return paths.unflatten(leaves)


def reader(folder: Path, model: ModelConfig, changes: Changes) -> huggingface.Reader:
    """Reads a state tensor by tensor, in float32 where a stage has changed it, else as stored.

    Of several processes all must read the same in the same order.

    Args:
      folder: of the stored weights.
    """
    stored = huggingface.stored_reader(folder, model)

    def read(path: str, *index: Any) -> np.ndarray:
        if path in changes.leaves:
            value = sharding.to_host(changes.leaves[path], *index)
        else:
            value = stored(path, *index)
        if path not in changes.adapters:
            return value
        own = [
            lora.Adapter(
                spec, *(jnp.asarray(sharding.to_host(factor, *index)) for factor in factors)
            )
            for spec, *factors in changes.adapters[path]
        ]
        return np.asarray(lora.merged(value, own, ()))

    return read


def inference_dtype(dtype: DTypeLike) -> DtypeOf:
    """Types for forward passes in `dtype`.

    Matrices and biases have `dtype`, to which each layer casts them anyway, so that results are
    the same. Norms and routers compute in float32 and stay as stored; they are small.
    """
    return lambda path: None if re.search(r"norm/|/router/", path) else dtype


def training_dtype(stage: StageConfig, dtype: DTypeLike) -> DtypeOf:
    """Types of what a stage begins with: float32 for what trains, `dtype` for what is frozen."""
    return lambda path: jnp.float32 if loop.trains(stage, path) else dtype
