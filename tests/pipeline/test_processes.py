"""Runs as processes of their own: several at once, closed pipes, full disks, exit codes."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.pipeline.toy_runs import REPOSITORY, arguments
from tests.processes import free_port
from tokalign_jax import main


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(inputs, tmp_path, capsys):
    """Every stage, with parameters sharded over the devices of both processes."""
    flags = (
        "--config.compute.dtype=float32",
        "--config.evaluation.random_baseline=False",
        "--config.initialization.rows_multiple_of=64",
        "--config.evaluation.abilities=embedded",
        "--config.evaluation.max_questions=3",
    )
    mesh = ("--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    one, two = tmp_path / "one", tmp_path / "two"
    assert main.main(arguments(inputs, "llama", one, "optimal", *flags)) == 0
    environment = os.environ | {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_NUM_CPU_DEVICES": "2",
        "JAX_PLATFORMS": "cpu",
    }
    command = arguments(inputs, "llama", two, "optimal", *flags, *mesh)
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "tokalign_jax.main", *command[1:]],
            cwd=REPOSITORY,
            env=environment | {"JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    output = [process.communicate(timeout=400)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], "\n".join(output)
    assert "on 4 cpu devices" in output[0]
    assert "stage1" in output[0] and "stage1" not in output[1]  # only the first process logs

    expected, tensors = (
        load_file(folder / "export" / "model.safetensors") for folder in (one, two)
    )
    assert expected.keys() == tensors.keys()
    assert expected["model.embed_tokens.weight"].shape[0] % 64 == 0
    for name, tensor in expected.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-3, atol=1e-4)
    reports = [json.loads((folder / "report" / "report.json").read_text()) for folder in (one, two)]
    scores = [report["languages"]["all"]["bits_per_byte"] for report in reports]
    assert scores[1] == pytest.approx(scores[0], rel=1e-4)
    kept = [report["kept"]["states"]["stage2"] for report in reports]
    assert kept[0]["abilities"]["right"] == kept[1]["abilities"]["right"]
    gaps = [state["fidelity"]["pooled"]["gap"]["value"] for state in kept]
    assert gaps[1] == pytest.approx(gaps[0], rel=1e-2)

    # What two processes finished is finished for one, on a mesh of its own.
    capsys.readouterr()
    assert main.main(arguments(inputs, "llama", two, "optimal", *flags)) == 0
    repeated = capsys.readouterr().out
    stages = json.loads((two / "stages.json").read_text())["stages"]
    assert all(f"{stage}: finished, skipped" in repeated for stage in stages)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--help"], ["--plan"], ["--stages=corpus"]])
def test_run_outlives_the_reader_of_its_output(flags, inputs, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    command = arguments(inputs, "llama", tmp_path / "run", "ultra_quick_demo", *flags)
    run = subprocess.run(
        [sys.executable, "-m", "tokalign_jax.main", *command[1:]],
        cwd=REPOSITORY,
        stdout=writer,
        stderr=subprocess.PIPE,
        timeout=120,
    )
    os.close(writer)
    assert run.returncode == 0 and b"Error" not in run.stderr, run.stderr.decode()
    assert flags != ["--stages=corpus"] or (tmp_path / "run" / "corpus").is_dir()


STOPPED = """
import os, signal, sys
from tokalign_jax import errors
from tokalign_jax.cli import session
from tokalign_jax.utils import stopping
log = session.logger()
log("one")
with stopping.listening():
    os.kill(os.getpid(), signal.SIGTERM)
    assert stopping.requested()
    errors.complain("stopped")
    log("two")
sys.exit(75)
"""


@pytest.mark.parametrize("where", ["a closed pipe", "a full disk"])
def test_stop_request_is_followed_when_nothing_can_be_printed(where):
    """Ctrl-C reaches `tee` too, and a log may be on another disk than the run."""
    reader, writer = os.pipe()
    os.close(reader)
    if where == "a full disk":
        os.close(writer)
        writer = os.open("/dev/full", os.O_WRONLY)
    done = subprocess.run(
        [sys.executable, "-c", STOPPED], cwd=REPOSITORY, stdout=writer, stderr=writer, timeout=60
    )
    os.close(writer)
    assert done.returncode == 75


def test_exit_codes_of_help_and_wrong_flags(tmp_path):
    def code(*flags: str) -> int:
        command = [sys.executable, "-m", "tokalign_jax.main", *flags]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, timeout=120).returncode

    assert code("--help") == 0
    assert code("--config=configs/nothing.py", f"--workdir={tmp_path}/run") == 2
    assert code() == 2
