"""Checkpoints: bit-exact restoring, retention, partial and damaged ones."""

import errno
import os
import shutil
import sqlite3

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.toys import STAGE, assert_same, toy_params
from tokalign_jax.errors import UserError
from tokalign_jax.parallel.sharding import make_mesh, place
from tokalign_jax.training.checkpoints import (
    Checkpoints,
    Damaged,
    Position,
    check_resumable,
    checksums,
    naming_a_full_disk,
)
from tokalign_jax.training.optimizer import make_optimizer, rules_for
from tokalign_jax.training.step import init_state
from tokalign_jax.utils import paths
from tokalign_jax.utils.stopping import Stopped

POSITION = Position(stream={"next_index": 3}, next_sequence=12, global_batch=4, fingerprint="abc")


def state_of(params):
    optimizer = make_optimizer(STAGE, paths.label_tree(rules_for("full"), params))
    return init_state(place(params, make_mesh()), optimizer)


@pytest.fixture
def state():
    params = toy_params()
    odd = params["final_norm"]["scale"].at[:4].set(jnp.array([jnp.nan, -0.0, jnp.inf, 1e-45]))
    filled = jax.tree.map(
        lambda leaf: leaf + jnp.ones((), leaf.dtype),
        state_of(params | {"final_norm": {"scale": odd}}),
    )
    return filled


def bits(tree):
    return [(leaf.dtype, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


def test_state_is_restored_bit_for_bit(tmp_path, state):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.newest() is None
        checkpoints.save(3, state, POSITION)
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(3, state_of(toy_params(seed=1)))
        assert jax.tree.structure(restored) == jax.tree.structure(state)
        assert bits(restored) == bits(state)
        assert_same(
            checkpoints.restore_params(3, state_of(toy_params(seed=1)).params), state.params
        )
        assert checkpoints.position(3) == POSITION


def test_newest_checkpoints_are_kept_and_partial_ones_ignored(tmp_path, state):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state, POSITION)
    (tmp_path / "4.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.newest() == 3
        assert checkpoints.path(3) == tmp_path / "3"
        checkpoints.save(4, state, POSITION)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]


# --- Damage -------------------------------------------------------------------------------------


def largest(folder):
    return max(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )


def cut(folder):
    os.truncate(largest(folder / "params"), 100)


def lose(folder):
    largest(folder / "params").unlink()


def change_a_bit(folder):
    file = largest(folder / "params")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def take_those_of_another(folder):
    """Replace the parameters by those of another step, which Orbax reads without an error."""
    shutil.rmtree(folder / "params")
    shutil.copytree(folder.parent / "2" / "params", folder / "params")


def change_the_position(folder):
    file = folder / "position" / "metadata"
    file.write_text(file.read_text().replace('"next_index": 3', '"next_index": 4'))


def lose_the_optimizer(folder):
    shutil.rmtree(folder / "optimizer")


DAMAGES = {
    cut: "OUT_OF_RANGE|Encountered error",
    lose: "NOT_FOUND|Encountered error",
    change_a_bit: "DATA_LOSS|Encountered error|checksum",
    take_those_of_another: "the checksum of params/.* and [0-9]+ more does not fit",
    change_the_position: "the digest of position does not fit",
    lose_the_optimizer: "optimizer",
}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with checkpoints 1 and 2, and their states."""
    folder, states = (
        tmp_path_factory.mktemp("two"),
        {step: state_of(toy_params(seed=step)) for step in (1, 2)},
    )
    with Checkpoints(folder, keep=2) as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, state, POSITION)
    return folder, states


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_checkpoints_are_detected_and_renamed(tmp_path, two, damage):
    folder, states = shutil.copytree(two[0], tmp_path / "copy"), two[1]
    damage(folder / "1")
    with Checkpoints(folder, keep=2) as checkpoints:
        with pytest.raises(
            Damaged, match=rf"(?s)'{folder / '1'}' is damaged \(.*({DAMAGES[damage]})"
        ):
            checkpoints.restore(1, states[2])
        assert bits(checkpoints.restore(2, states[1])) == bits(states[2])
        assert checkpoints.set_aside(2) == folder / "2.damaged"
        assert checkpoints.newest() == 1
        checkpoints.save(2, states[2], POSITION)
        checkpoints.wait()
        assert checkpoints.set_aside(2) == folder / "2.damaged1"
    with Checkpoints(folder, keep=2) as checkpoints:
        assert checkpoints.newest() == 1


def test_errors_of_the_caller_do_not_rename_checkpoints(two, monkeypatch):
    def out_of_memory(*_, **__):
        raise MemoryError

    monkeypatch.setattr("orbax.checkpoint.StandardCheckpointHandler.restore", out_of_memory)
    folder, states = two
    with Checkpoints(folder, keep=2) as checkpoints, pytest.raises(MemoryError):
        checkpoints.restore(1, states[1])


@pytest.mark.parametrize(
    "error, end",
    [
        (OSError(errno.ESTALE, "Stale file handle"), Stopped),
        (OSError(errno.EMFILE, "Too many open files"), Stopped),
        (ValueError("UNAVAILABLE: Failed to read [os_error_code='110']"), Stopped),
        (PermissionError(errno.EACCES, "Permission denied"), UserError),
    ],
)
def test_unavailable_storage_does_not_count_as_damage(error, end, two, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("orbax.checkpoint.StandardCheckpointHandler.restore", fail)
    folder, states = two
    with (
        Checkpoints(folder, keep=2) as checkpoints,
        pytest.raises(end, match=r"checkpoint '.*1' could not be read"),
    ):
        checkpoints.restore(1, states[1])


def test_checksum_depends_on_every_word_and_their_order():
    rng = np.random.default_rng(0)
    array = rng.integers(0, 2**32, (3, 5), dtype=np.uint32)
    place = 2 * np.arange(15, dtype=np.uint64).reshape(3, 5) + 1
    expected = int((array.astype(np.uint64) * place % 2**32).sum() % 2**32)
    assert checksums({"a": jnp.asarray(array), "b": {"c": jnp.asarray(7)}}) == {
        "a": expected,
        "b/c": 7,
    }
    for index in np.ndindex(3, 5):
        for bit in (0, 13, 31):
            other = array.copy()
            other[index] ^= np.uint32(1 << bit)
            assert checksums({"a": jnp.asarray(other)})["a"] != expected
    assert checksums({"a": jnp.asarray(array[::-1])})["a"] != expected
    # A zero and the other zero, a number that is none and another: bits count, not values.
    values = checksums({str(x): jnp.asarray(x) for x in (0.0, -0.0)})
    assert values["0.0"] != values["-0.0"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        Exception("No space left on device (os error 28)"),  # of the tokenizers library
        sqlite3.OperationalError("database or disk is full"),
        ValueError(
            'RESOURCE_EXHAUSTED: Failed to write 5 bytes: No space left on device [os_error_code="28"]'.replace(
                '"', "'"
            )
        ),
    ],
)
def test_full_disk_is_reported(tmp_path, error):
    message = rf"disk of '{tmp_path}' is full.* a checkpoint takes up to 7.000 GB"
    inner = naming_a_full_disk(tmp_path, 7 * 10**9)
    with pytest.raises(UserError, match=message), naming_a_full_disk(tmp_path), inner:
        try:
            raise error
        except Exception as cause:
            raise RuntimeError("could not save") from cause
    for other in (
        OSError(errno.EIO, "bad disk"),
        ValueError("[os_error_code='5']"),
        UserError("else"),
    ):
        with pytest.raises(type(other)) as raised, naming_a_full_disk(tmp_path, 1):
            raise other
        assert raised.value is other


def test_checkpoint_of_another_run_is_refused(tmp_path):
    check_resumable(POSITION, 4, "abc", tmp_path / "3")
    with pytest.raises(UserError, match="4 sequences a step, this run has 8"):
        check_resumable(POSITION, 8, "abc", tmp_path / "3")
    with pytest.raises(UserError, match="other settings"):
        check_resumable(POSITION, 4, "def", tmp_path / "3")
