"""Eight simulated devices give what one gives, however they are arranged (`eight_devices` has the checks), and refusals."""

import json
import os
import subprocess
import sys
from pathlib import Path

import eight_devices
import numpy as np
import pytest
from training_toys import unpadded

from tokalign_jax import sharding
from tokalign_jax.config import MeshConfig
from tokalign_jax.errors import UserError


@pytest.fixture(scope="module")
def results():
    """Error by check: one program for all, since starting JAX and compiling is most of the work."""
    flags = {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, str(root / "tests" / "eight_devices.py")],
        env=os.environ | flags | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    found = dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    return found | {"": f"exit code {done.returncode}\n{done.stderr[-3000:]}"}


@pytest.mark.slow
@pytest.mark.parametrize("check", eight_devices.CHECKS)
def test_eight_devices_give_what_one_gives(results, check):
    error = results.get(check, results[""])
    assert not error, error


def test_axes_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="do not fit 8 devices"):
        sharding.axis_sizes(MeshConfig(data=3), 8, 0, 1)
    with pytest.raises(UserError, match="do not fit 8 devices"):
        sharding.axis_sizes(MeshConfig(data=2, fsdp=2), 8, 0, 1)
    for config in (MeshConfig(tensor=3), MeshConfig(fsdp=3), MeshConfig(data=2)):
        with pytest.raises(UserError, match="is 3, which does not divide 256"):
            sharding.axis_sizes(config, 6, 0, 1)
    with pytest.raises(UserError, match="do not fit 1 devices"):
        sharding.make_mesh(MeshConfig(data=2))


def test_only_a_vocabulary_is_padded():
    assert sharding.padded_shape("embed_tokens/embedding", (61, 8)) == (256, 8)
    assert sharding.padded_shape("params/lm_head/kernel", (512, 8)) == (512, 8)
    assert sharding.padded_shape("layers/mlp/up_proj/kernel", (2, 61, 8)) == (2, 61, 8)
    placed = sharding.place({"embed_tokens": {"embedding": np.ones((61, 8))}}, sharding.make_mesh())
    assert unpadded(placed, 61)["embed_tokens"]["embedding"].shape == (61, 8)
