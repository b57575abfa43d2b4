"""Checkpoints of a stage, by Orbax: each is written aside and renamed when complete, so that a
killed run leaves none in parts.

A checkpoint `STEP/` has three items: `params` (what trains, float32), `optimizer` (all other arrays
of the train state) and `position` (JSON: state of the data stream, next sequence, global batch,
fingerprint of what shaped the run, validation losses so far, format of the optimizer's state; a
checksum of each array, and a digest of all this). Orbax detects missing and truncated files when it
reads them; the checksums detect other damage.
"""

import errno
import hashlib
import json
import math
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import Array, UInt32

from tokalign_jax.config import OptimizerConfig
from tokalign_jax.errors import UserError
from tokalign_jax.parallel import distributed
from tokalign_jax.training.step import TrainState
from tokalign_jax.training.validation import Validations
from tokalign_jax.utils import paths
from tokalign_jax.utils.files import unused
from tokalign_jax.utils.stopping import Stopped

T = TypeVar("T")


class Damaged(Exception):
    """A checkpoint cannot be read back as it was written."""


@dataclass(frozen=True)
class Position:
    """Position in the data at which a checkpoint was made, and the run that made it."""

    stream: dict[str, Any]
    """State of the grain iterator."""
    next_sequence: int
    """Position in the shuffled stream of the first sequence not yet read."""
    global_batch: int
    """Sequences a step."""
    fingerprint: str
    """Of everything that changes what a step computes."""
    validations: Validations | None = None
    """The validations up to this step; None where there are none."""
    state_format: dict[str, Any] = field(default_factory=dict)
    """Format of the optimizer's state (`optimizer.state_format`)."""


class _NewestAndBest:
    """Preservation policy of Orbax: the newest `keep` checkpoints, and the best one."""

    def __init__(self, keep: int):
        self.keep = keep
        self.best: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        newest = sorted(info.step for info in checkpoints)[-self.keep :]
        return [info.step in newest or info.step == self.best for info in checkpoints]


class Checkpoints:
    """The checkpoints in one folder: the newest `keep`, and the one with the lowest validation loss
    according to the newest. A context manager: leaving it waits for writes.

    Of several processes all call each method together.
    """

    def __init__(self, folder: Path, keep: int = 1):
        self._policy = _NewestAndBest(keep)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._policy, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(Path(folder).absolute(), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Where one of several processes failed the writing may wait for it in vain.
        if kind is None or issubclass(kind, UserError | Stopped) or distributed.count() == 1:
            self._manager.close()

    def newest(self) -> int | None:
        """Step of the newest checkpoint; it may still be being written."""
        return self._manager.latest_step()

    def path(self, step: int) -> Path:
        """Return the folder of a step's checkpoint."""
        return Path(self._manager.directory) / str(step)

    def save(self, step: int, state: TrainState, position: Position) -> None:
        """Copy the arrays off the devices now, and write them while training goes on.

        Crash-safe: checkpoints that are no longer kept are deleted once the new one is complete.
        """
        params, optimizer = _items(state)
        self._policy.best = position.validations.best if position.validations else None
        content = {**asdict(position), "checksums": checksums({"params": params, **optimizer})}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params),
                optimizer=ocp.args.StandardSave(optimizer),
                position=ocp.args.JsonSave({**content, "digest": _digest(content)}),
            ),
        )

    def wait(self) -> None:
        """Wait until saved checkpoints are complete on disk."""
        self._manager.wait_until_finished()

    def position(self, step: int) -> Position:
        """Return the data position of a step's checkpoint.

        Raises:
          Damaged: it is not what was written.
        """
        position, _ = self._position(step)
        return position

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The exact state of a step, with the structure and shardings of `like` (arrays or their
        shapes).

        Raises:
          Damaged: it is not what was written.
        """
        params, optimizer = _items(like)
        restored = {
            "params": self._arrays(step, "params", params),
            **self._arrays(step, "optimizer", optimizer),
        }
        self._verify(step, restored)
        arrays = paths.flatten(restored)
        names, structure = _names(like)
        return jax.tree.unflatten(structure, [arrays[name] for name in names])

    def restore_params(self, step: int, like: Any) -> Any:
        """Only what trains: the tree of float32 arrays in that checkpoint, shaped like `like`.

        Raises:
          Damaged: it is not what was written.
        """
        params = self._arrays(step, "params", like)
        self._verify(step, {"params": params})
        return params

    def set_aside(self, step: int) -> Path:
        """Renames a damaged checkpoint, so that it is ignored but can be inspected; returns its new
        path.
        """

        def rename() -> str:
            aside = unused(self.path(step).with_name(f"{step}.damaged"))
            self.path(step).rename(aside)
            return str(aside)

        aside = distributed.on_first(rename)
        self._manager.reload()
        return Path(aside)

    def _position(self, step: int) -> tuple[Position, dict[str, int]]:
        """And the checksums of the arrays."""
        return self._read(step, lambda: _read_position(self.path(step)))

    def _arrays(self, step: int, item: str, like: Any) -> Any:
        # Not through the manager, which waits for the other processes after reading: one may have
        # failed. Not strict, since the number of padding rows (zeros) of vocabulary matrices
        # depends on the mesh.
        args = ocp.args.StandardRestore(_abstract(like), strict=False)
        place = self._manager.directory / str(step) / item
        return self._read(step, lambda: ocp.StandardCheckpointHandler().restore(place, args=args))

    def _verify(self, step: int, tree: paths.Tree) -> None:
        _, written = self._position(step)
        wrong = [name for name, value in checksums(tree).items() if written.get(name) != value]
        if wrong:
            more = f" and {len(wrong) - 1} more" if wrong[1:] else ""
            raise Damaged(self._damage(step, f"the checksum of {wrong[0]}{more} does not fit"))

    def _read(self, step: int, read: Callable[[], T]) -> T:
        """Return the result of `read`, or raise in all processes if it failed in one."""
        result, failure = None, None
        try:
            result = read()
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise  # nothing is wrong with the files
        except Exception as error:
            if (code := _system_code(error)) in _OF_THE_STORAGE:
                message = (
                    f"the checkpoint '{self.path(step)}' could not be read"
                    f" ({' '.join(str(error).split())[:200]})"
                )
                if code in (errno.EPERM, errno.EACCES):
                    raise UserError(
                        f"{message}: see that this user may read it, and run the same command again"
                    ) from error
                raise Stopped(f"{message}, which is no fault of the checkpoint's") from error
            failure = Damaged(self._damage(step, f"{type(error).__name__}: {error}"))
            failure.__cause__ = error
        try:
            distributed.agree(failure)
        except distributed.ProcessFailed as error:
            raise Damaged(str(error)) from error
        return result  # type: ignore[return-value]

    def _damage(self, step: int, what: str) -> str:
        what = " ".join(what.split())
        return (
            f"the checkpoint '{self.path(step)}' is damaged"
            f" ({what[:200]}{'...' if len(what) > 200 else ''})"
        )


def position_of(folder: Path) -> Position | None:
    """Return the position of a checkpoint by its folder; None if it cannot be read.

    Any process can call it alone.
    """
    try:
        return _read_position(folder)[0]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read_position(folder: Path) -> tuple[Position, dict[str, int]]:
    """(position, checksums of the arrays) of a checkpoint.

    Raises:
      ValueError: it is not what was written.
    """
    place: Any = folder / "position"  # Orbax takes any path, but declares one of its own
    content = dict(ocp.JsonCheckpointHandler().restore(place))
    if content.pop("digest") != _digest(content):
        raise ValueError("the digest of position does not fit")
    written = content.pop("checksums")
    validations = Validations.from_json(content.pop("validations", None))
    return Position(**content, validations=validations), written


def checksums(tree: paths.Tree) -> dict[str, int]:
    """A checksum of each array, by path; the same however it is split over devices.

    The sum modulo 2^32 of its words, each times an odd number that goes with its place: no change
    of one word leaves it as it was, and a change of many does once in 2^32 times.
    """
    leaves = paths.flatten(tree)
    return {path: int(value) for path, value in jax.device_get(_checksums(leaves)).items()}


@jax.jit
def _checksums(leaves: dict[str, Array]) -> dict[str, UInt32[Array, ""]]:
    return {path: _checksum(leaf) for path, leaf in leaves.items()}


def _checksum(leaf: Array) -> UInt32[Array, ""]:
    words = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")).astype(
        jnp.uint32
    )
    place = jnp.zeros(leaf.shape, jnp.uint32)
    for axis in range(leaf.ndim):
        stride = math.prod(leaf.shape[axis + 1 :]) % 2**32
        place += jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * jnp.uint32(stride)
    return jnp.sum(words * (2 * place + 1), dtype=jnp.uint32)


@contextmanager
def naming_a_full_disk(folder: Path, needed: int = 0) -> Iterator[None]:
    """Turn errors about a full disk or quota into one that names the disk and the remedy.

    Args:
      folder: where the body writes.
      needed: bytes of a checkpoint, if it writes any.

    Raises:
      UserError: a write found no room.
    """
    try:
        yield
    except UserError:  # also that of an inner context
        raise
    except Exception as error:
        if not _found_no_room(error):
            raise
        free = shutil.disk_usage(folder).free
        message = (
            f"the disk of '{folder}' is full, or its quota is used up: {free / 1e9:.3f} GB are free"
        )
        if not needed:
            raise UserError(
                f"{message}. What was finished before is whole: free some room and run the same"
                " command again"
            ) from error
        raise UserError(
            f"{message}, and a checkpoint takes up to {needed / 1e9:.3f} GB. What was saved before"
            " is whole: free some room (or lower checkpoints.keep) and run the same command again,"
            " which goes on from the newest checkpoint"
        ) from error


def _found_no_room(error: BaseException | None) -> bool:
    """Check for the system's error for a full disk, quota or file limit, in its causes too."""
    if error is None:
        return False
    if _system_code(error) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    return _found_no_room(error.__cause__ or error.__context__)


_OF_THE_STORAGE = {
    getattr(errno, name)
    for name in (
        "EPERM EACCES EIO EREMOTEIO ESTALE ETIMEDOUT EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH "
        "ECONNRESET ECONNABORTED ECONNREFUSED ENOTCONN EMFILE ENFILE ENOMEM EAGAIN"
    ).split()
    if hasattr(errno, name)
}
"""System errors caused by storage, network or limits, not by the contents of a file."""


def _system_code(error: BaseException) -> int | None:
    """Return the errno of an error; TensorStore, Rust and SQLite have it in the text."""
    if isinstance(error, OSError):
        return error.errno
    if isinstance(error, sqlite3.OperationalError) and "disk is full" in str(error):
        return errno.ENOSPC
    code = re.search(r"os_error_code='(\d+)'|\(os error (\d+)\)", str(error))
    return int(code[1] or code[2]) if code else None


def check_resumable(position: Position, global_batch: int, fingerprint: str, folder: Path) -> None:
    """Check that going on from a checkpoint continues the run that wrote it.

    Raises:
      UserError: the batch or another setting differs.
    """
    if position.global_batch != global_batch:
        raise UserError(
            f"the checkpoint '{folder}' was made with {position.global_batch} sequences a step,"
            f" this run has {global_batch}: rate and data position would no longer fit; set"
            f" batch.size={position.global_batch}, or use another workdir"
        )
    if position.fingerprint != fingerprint:
        raise UserError(
            f"the checkpoint '{folder}' is of a run with other settings (stage, seed, model or"
            f" corpus): continue with the settings that it began with, or remove '{folder.parent}'"
            " to train the stage anew"
        )


def check_state_format(
    position: Position, name: str, state_format: Mapping[str, Any], folder: Path
) -> None:
    """Check that a checkpoint has the optimizer's state in a stage's format.

    Args:
      name: of the stage.
      state_format: of the stage's optimizer.

    Raises:
      UserError: it has another one; the message names the first field that differs.
    """
    for key in sorted({*position.state_format, *state_format}):
        written, wanted = (
            found.get(key, getattr(OptimizerConfig, key, None))
            for found in (position.state_format, state_format)
        )
        if written != wanted:
            raise UserError(
                f"the checkpoint '{folder}' has the optimizer's state in another format: it was"
                f" written with {name}.optimizer.{key}={written}, this run has {wanted}; set"
                f" --config.{name}.optimizer.{key}={written} to go on, or remove '{folder.parent}'"
                " to train the stage anew"
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
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
