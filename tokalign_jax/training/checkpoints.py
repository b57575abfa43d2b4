"""Checkpoints of a stage, by Orbax: each is written aside and renamed when whole, so that a killed run leaves none in
parts.

A checkpoint `STEP/` has three items: `params` (what trains, float32), `optimizer` (all other arrays of the train state)
and `position` (JSON: state of the data stream, next sequence, global batch, fingerprint of what shaped the run).
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from tokalign_jax import paths
from tokalign_jax.errors import UserError
from tokalign_jax.training.step import TrainState


@dataclass(frozen=True)
class Position:
    """Where in the data a checkpoint was made, and by what kind of run."""

    stream: dict[str, Any]
    """State of the grain iterator."""
    next_sequence: int
    """Position in the shuffled stream of the first sequence not yet read."""
    global_batch: int
    """Sequences a step."""
    fingerprint: str
    """Of everything that changes what a step computes."""


class Checkpoints:
    """The checkpoints in one folder, the newest `keep` stay. Use as a context: leaving it waits for the writing."""

    def __init__(self, folder: Path, keep: int = 1):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(Path(folder).absolute(), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def newest(self) -> int | None:
        """Step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def path(self, step: int) -> Path:
        return Path(self._manager.directory) / str(step)

    def save(self, step: int, state: TrainState, position: Position) -> None:
        """Copies the arrays off the devices now, and writes them while training goes on."""
        params, optimizer = _items(state)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params),
                optimizer=ocp.args.StandardSave(optimizer),
                position=ocp.args.JsonSave(asdict(position)),
            ),
        )

    def position(self, step: int) -> Position:
        restored = self._manager.restore(step, args=ocp.args.Composite(position=ocp.args.JsonRestore()))
        return Position(**restored["position"])

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state of that step, bit for bit, with the structure and shardings of `like`."""
        params, optimizer = (ocp.args.StandardRestore(_abstract(item)) for item in _items(like))
        restored = self._manager.restore(step, args=ocp.args.Composite(params=params, optimizer=optimizer))
        arrays = paths.flatten({**restored["optimizer"], "params": restored["params"]})
        names, structure = _names(like)
        return jax.tree.unflatten(structure, [arrays[name] for name in names])

    def restore_params(self, step: int, like: Any) -> Any:
        """Only what trains: the tree of float32 arrays in that checkpoint, shaped like `like`."""
        args = ocp.args.Composite(params=ocp.args.StandardRestore(_abstract(like)))
        return self._manager.restore(step, args=args)["params"]


def check_resumable(position: Position, global_batch: int, fingerprint: str, folder: Path) -> None:
    """
    Raises:
      UserError: when going on from this checkpoint would not continue the run that wrote it.
    """
    if position.global_batch != global_batch:
        raise UserError(
            f"the checkpoint '{folder}' was made with {position.global_batch} sequences a step, this run has "
            f"{global_batch}: rate and data position would no longer fit; set batch_size={position.global_batch}, or use another workdir"
        )
    if position.fingerprint != fingerprint:
        raise UserError(
            f"the checkpoint '{folder}' is of a run with other settings (stage, seed, model or corpus): "
            f"continue with the settings that it began with, or remove '{folder.parent}' to train the stage anew"
        )


def _items(state: TrainState) -> tuple[Any, paths.Tree]:
    """The train state as two plain nested dicts: what trains, and the rest."""
    names, _ = _names(state)
    tree = paths.unflatten(dict(zip(names, jax.tree.leaves(state))))
    return tree.pop("params"), tree


def _names(state: TrainState) -> tuple[list[str], Any]:
    """A path string for each leaf, and the structure."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(state)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves], structure


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)
