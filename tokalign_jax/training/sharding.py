"""Where arrays live: one mesh axis, `data`, over all devices; batches are split over it, parameters copied."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

DATA = "data"
BATCH = PartitionSpec(None, DATA)
"""A step's batch [accumulation, sequences, T + 1]: sequences are split over the devices."""
REPLICATED = PartitionSpec()


def make_mesh() -> Mesh:
    """All devices of all processes along `data`."""
    return Mesh(np.array(jax.devices()), (DATA,))


def place(tree: Any, mesh: Mesh) -> Any:
    """Every leaf on every device; one that is there already is not copied."""
    return jax.device_put(tree, NamedSharding(mesh, REPLICATED))


def copy_to(tree: Any, mesh: Mesh) -> Any:
    """A copy of every leaf on every device, never the caller's own buffers: it may be donated."""
    return jax.device_put(tree, NamedSharding(mesh, REPLICATED), may_alias=False)


def global_batch(local: np.ndarray, mesh: Mesh) -> jax.Array:
    """The global array of a step from this process's part of it, [accumulation, sequences of this process, T + 1]."""
    return jax.make_array_from_process_local_data(NamedSharding(mesh, BATCH), local)
