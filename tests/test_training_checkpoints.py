"""Checkpoints: every bit comes back, the newest stay, and what a killed run left in parts is no checkpoint."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_toys import STAGE, assert_same, quick_compilation, toy_params  # noqa: F401 (the fixture applies to every test here)

from tokalign_jax import paths
from tokalign_jax.errors import UserError
from tokalign_jax.sharding import make_mesh, place
from tokalign_jax.training.checkpoints import Checkpoints, Position, check_resumable
from tokalign_jax.training.optimizer import make_optimizer, rules_for
from tokalign_jax.training.step import init_state

POSITION = Position(stream={"next_index": 3}, next_sequence=12, global_batch=4, fingerprint="abc")


def state_of(params):
    optimizer = make_optimizer(STAGE, paths.label_tree(rules_for("full"), params))
    return init_state(place(params, make_mesh()), optimizer)


@pytest.fixture
def state():
    params = toy_params()
    odd = params["final_norm"]["scale"].at[:4].set(jnp.array([jnp.nan, -0.0, jnp.inf, 1e-45]))
    filled = jax.tree.map(
        lambda leaf: leaf + jnp.ones((), leaf.dtype), state_of(params | {"final_norm": {"scale": odd}})
    )
    return filled


def bits(tree):
    return [(leaf.dtype, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


def test_every_bit_of_the_state_comes_back(tmp_path, state):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.newest() is None
        checkpoints.save(3, state, POSITION)
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(3, state_of(toy_params(seed=1)))
        assert jax.tree.structure(restored) == jax.tree.structure(state)
        assert bits(restored) == bits(state)
        assert_same(checkpoints.restore_params(3, state_of(toy_params(seed=1)).params), state.params)
        assert checkpoints.position(3) == POSITION


def test_the_newest_are_kept_and_parts_are_no_checkpoint(tmp_path, state):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state, POSITION)
    (tmp_path / "4.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.newest() == 3
        assert checkpoints.path(3) == tmp_path / "3"
        checkpoints.save(4, state, POSITION)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]


def test_another_run_does_not_go_on(tmp_path):
    check_resumable(POSITION, 4, "abc", tmp_path / "3")
    with pytest.raises(UserError, match="4 sequences a step, this run has 8"):
        check_resumable(POSITION, 8, "abc", tmp_path / "3")
    with pytest.raises(UserError, match="other settings"):
        check_resumable(POSITION, 4, "def", tmp_path / "3")
