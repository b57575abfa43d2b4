"""Meshes and sharding: eight simulated devices give the results of one (`eight_devices` has the
checks), arrangement on real machines, and refused meshes.
"""

import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.parallel import eight_devices
from tests.training.toys import unpadded
from tokalign_jax.config import MeshConfig
from tokalign_jax.errors import UserError
from tokalign_jax.parallel import sharding


@pytest.fixture(scope="module")
def results():
    """Error by check, from one program: starting JAX and compiling is most of the work."""
    flags = {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "tests.parallel.eight_devices"],
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


# --- Meshes of mock TPUs and GPUs ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Device:
    """Attributes of a device by which meshes are arranged."""

    id: int
    platform: str
    device_kind: str
    process_index: int
    slice_index: int = 0
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0


def tpus(kind, size, host, slices=1, cores=1):
    """Slices of `size` chips (x, y, z), each host with a block of `host` of them."""
    places = itertools.product(range(slices), *(range(0, n, m) for n, m in zip(size, host)))
    devices = []
    for process, (number, *corner) in enumerate(places):
        for *step, core in itertools.product(*map(range, host), range(cores)):
            place = tuple(a + b for a, b in zip(corner, step))
            devices.append(Device(len(devices), "tpu", kind, process, number, place, core))
    return devices


def gpus(*counts):
    """Hosts with these numbers of GPUs, one process per host."""
    processes = [process for process, count in enumerate(counts) for _ in range(count)]
    return [
        Device(i, "gpu", "NVIDIA H100 80GB HBM3", process, process)
        for i, process in enumerate(processes)
    ]


MACHINES = {
    "v4-64": tpus("TPU v4", (2, 4, 4), (2, 2, 1)),
    "v5e-16": tpus("TPU v5 lite", (4, 4, 1), (2, 2, 1)),
    "v5e-64": tpus("TPU v5 lite", (8, 8, 1), (2, 4, 1)),
    "v6e-16": tpus("TPU v6 lite", (4, 4, 1), (2, 2, 1)),
    "v6e-64": tpus("TPU v6 lite", (8, 8, 1), (2, 2, 1)),
    "v5p-32": tpus("TPU v5p", (2, 2, 4), (2, 2, 1)),
    "v3-8": tpus("TPU v3", (2, 2, 1), (2, 2, 1), cores=2),
    "TPU7x": tpus("TPU7x", (2, 2, 2), (2, 2, 1), cores=2),
    "two slices": tpus("TPU v6 lite", (4, 4, 1), (2, 2, 1), slices=2),
    "three slices": tpus("TPU v5 lite", (2, 4, 1), (2, 4, 1), slices=3),
    "seven of eight TPUs": tpus("TPU v6 lite", (2, 4, 1), (2, 4, 1))[:7],
    "two hosts of GPUs": gpus(8, 8),
    "three hosts of GPUs": gpus(6, 6, 6),
    "cyclic processes": [
        dataclasses.replace(gpu, slice_index=gpu.process_index % 2) for gpu in gpus(2, 2, 2, 2)
    ],
}


@pytest.mark.parametrize("name", MACHINES)
def test_every_mesh_keeps_tensor_groups_on_a_host(name):
    devices = MACHINES[name]
    slices = len({device.slice_index for device in devices})
    local = sum(device.process_index == 0 for device in devices)
    for tensor in (n for n in range(1, local + 1) if local % n == 0):
        groups = len(devices) // tensor
        for fsdp in (n for n in range(1, groups + 1) if groups % n == 0):
            shape = (groups // fsdp, fsdp, tensor)
            mesh = sharding.arrange(devices, shape)
            assert mesh.shape == shape
            assert {device.id for device in mesh.flat} == {device.id for device in devices}
            for group in mesh.reshape(-1, tensor):
                assert len({device.process_index for device in group}) == 1, shape
            if shape[0] % slices == 0:
                for copy in mesh:
                    assert len({device.slice_index for device in copy.flat}) == 1, shape


def test_automatic_mesh_of_every_machine_can_be_arranged():
    for name, devices in MACHINES.items():
        sizes = [
            sharding.axis_sizes(MeshConfig(), len(devices), state, 100)
            for state in (10, 150, 10**6)
        ]
        assert all(sharding.arrange(devices, shape).shape == shape for shape in sizes), name


def test_impossible_mesh_on_several_hosts_is_refused_with_a_remedy():
    with pytest.raises(
        UserError, match=r"mesh.tensor=8 does not divide the 4 devices of a process.*mesh.fsdp"
    ):
        sharding.arrange(MACHINES["v6e-16"], (2, 1, 8))
    with pytest.raises(
        UserError, match=r"unequal numbers of devices \(4, 8\).*CUDA_VISIBLE_DEVICES"
    ):
        sharding.arrange(gpus(4, 8), (12, 1, 1))


def test_processes_read_the_batch_in_mesh_order(monkeypatch):
    made = sharding.arrange(MACHINES["cyclic processes"], (8, 1, 1))
    mesh = type("Mesh", (), {"devices": made})
    found = []
    for process in range(4):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        found.append(sharding.reader(mesh))
    assert found == [(0, 4), (2, 4), (1, 4), (3, 4)]


def test_axes_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="do not fit 8 devices"):
        sharding.axis_sizes(MeshConfig(data=3), 8, 0, 1)
    with pytest.raises(UserError, match="do not fit 8 devices"):
        sharding.axis_sizes(MeshConfig(data=2, fsdp=2), 8, 0, 1)
    with pytest.raises(UserError, match="do not fit 1 devices"):
        sharding.make_mesh(MeshConfig(data=2))


def abstract(*sizes):
    return jax.sharding.AbstractMesh(sizes, sharding.AXES)


def test_axes_need_not_be_powers_of_two():
    for devices in (3, 5, 6, 7, 12):
        for config in (MeshConfig(fsdp=devices), MeshConfig(tensor=devices), MeshConfig(data=1)):
            assert math.prod(sharding.axis_sizes(config, devices, 0, 1)) == devices
        assert sharding.axis_sizes(MeshConfig(), devices, 10**6, 1) == (1, devices, 1)


def test_automatic_mesh_uses_only_splits_that_save_memory():
    def share(sizes):
        return 1 / sizes[1] if sizes[1] <= 2 else 0.7  # what six parts split is little

    assert sharding.axis_sizes(MeshConfig(), 6, 10, 100, share) == (6, 1, 1)
    assert sharding.axis_sizes(MeshConfig(), 6, 90, 100, share) == (3, 2, 1)
    assert sharding.axis_sizes(MeshConfig(), 6, 10**6, 100, share) == (3, 2, 1)


def test_axis_that_does_not_divide_a_dimension_splits_another():
    spec = P(None, "fsdp", "tensor")
    for sizes, shape, expected in (
        ((1, 2, 2), (3, 4, 6), P(None, "fsdp", "tensor")),
        ((1, 3, 1), (3, 4, 6), P(None, None, ("tensor", "fsdp"))),
        ((1, 3, 2), (3, 4, 6), P(None, None, ("tensor", "fsdp"))),
        ((1, 2, 3), (3, 12, 4), P(None, ("fsdp", "tensor"), None)),
        ((1, 5, 3), (3, 4, 6), P(None, None, "tensor")),
        ((1, 5, 7), (35, 4, 6), P(None, None, None)),
    ):
        assert sharding.fitting(spec, shape, abstract(*sizes)).spec == expected, (sizes, shape)


def test_only_a_vocabulary_is_padded():
    assert sharding.padded_shape("embed_tokens/embedding", (61, 8)) == (256, 8)
    assert sharding.padded_shape("params/lm_head/kernel", (512, 8)) == (512, 8)
    assert sharding.padded_shape("layers/mlp/up_proj/kernel", (2, 61, 8)) == (2, 61, 8)
    for parts, rows in ((3, 768), (5, 1280), (6, 768), (7, 1792), (8, 256), (12, 768)):
        assert sharding.padded_shape("lm_head/kernel", (61, 8), abstract(1, parts, 1)) == (rows, 8)
        assert sharding.padded_shape("lm_head/kernel", (61, 8), abstract(2, 1, parts)) == (rows, 8)
    placed = sharding.place({"embed_tokens": {"embedding": np.ones((61, 8))}}, sharding.make_mesh())
    assert unpadded(placed, 61)["embed_tokens"]["embedding"].shape == (61, 8)
