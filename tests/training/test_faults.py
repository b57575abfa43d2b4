"""Faults of a long run: kills, requests to stop, lost processes, another mesh, damaged checkpoints,
full disks.
"""

import random
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest

from tests.processes import why_not_hosts
from tests.training.toys import (
    STAGE,
    Program,
    assert_same,
    final_of,
    final_params,
    finish,
    run_programs,
    together,
    toy_params,
    train,
)
from tokalign_jax.config import CheckpointConfig
from tokalign_jax.errors import UserError
from tokalign_jax.parallel import distributed
from tokalign_jax.training.loop import is_finished
from tokalign_jax.training.metrics import read
from tokalign_jax.utils.stopping import Stopped


def batch(per_device):
    return replace(STAGE.batch, size=8, per_device=per_device)


LORA = dict(method="lora", steps=40, checkpoints=CheckpointConfig(every=7))
FULL = dict(steps=16, batch=batch(2), checkpoints=CheckpointConfig(every=100))


def losses(folder):
    return [record["loss"] for record in read(folder / "metrics.jsonl")]


def newest(folder):
    return max(
        (int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit()),
        default=0,
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Runs without a fault: of adapters with dropout, and of all parameters."""
    programs = [
        Program(tmp_path_factory.mktemp(name), changes)
        for name, changes in (("lora", LORA), ("full", FULL))
    ]
    finish(*programs)
    return programs


# --- Killed, stopped and lost processes ---------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_run_ended_at_a_random_step_resumes_to_the_same_bits(tmp_path, uninterrupted, seed):
    chance = random.Random(seed)
    broken = [
        Program(tmp_path / fault, LORA, fault=fault, fault_step=chance.randrange(1, 30))
        for fault in ("kill", "terminate")
    ]
    (code, output), (asked_code, asked_output) = run_programs(*broken)
    saved = [newest(program.folder) for program in broken]
    assert code == -signal.SIGKILL, output
    assert asked_code == 75, asked_output
    assert broken[1].fault_step <= saved[1] <= broken[1].fault_step + 3
    assert f"stopped at step {saved[1]} of 40" in asked_output

    again = [replace(program, fault="") for program in broken]
    for program, step, (code, output) in zip(again, saved, run_programs(*again)):
        assert code == 0, output
        assert not step or f"resumed at step {step} of 40" in output
        assert_same(final_of(program), final_of(uninterrupted[0]))
        assert losses(program.folder) == losses(uninterrupted[0].folder)
    assert np.any(final_of(uninterrupted[0])["layers/attention/q_proj/lora_b"])


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "who"), [("kill", 0), ("kill", 1), ("terminate", 1)])
def test_two_processes_end_together_and_resume(tmp_path, uninterrupted, fault, who):
    """Each reads its half of every batch; both save the checkpoints, the first writes the metrics."""
    program = Program(
        tmp_path / "both", FULL | dict(batch=batch(1), checkpoints=CheckpointConfig(every=3))
    )
    both = together(program)
    # A request reaches the other process within half a second; training must not end before.
    step = 3 if fault == "terminate" else 7
    both[who] = replace(both[who], fault=fault, fault_step=step)
    ended = run_programs(*both)
    saved = newest(program.folder)
    if fault == "terminate":
        assert [code for code, _ in ended] == [75, 75], ended
        assert all(f"stopped at step {saved} of 16" in output for _, output in ended)
    else:
        assert ended[who][0] == -signal.SIGKILL, ended
        code, output = ended[1 - who]
        # JAX aborts first if process 0 is lost, with the store, or if the other process waits for a
        # checkpoint instead of a collective: then at the end of the heartbeat.
        assert code in (distributed.LOST, -signal.SIGABRT), ended
        if code == distributed.LOST:
            assert f"process {who} of 2 was lost (" in output, output
            assert "the same command resumes from the newest checkpoint" in output
        assert f"process {1 - who} of 2: joined. If a process is lost" in output
        if who == 0:
            return  # resumed as after the loss of the other
    output = finish(*together(program))
    assert "on 2 cpu devices" in output and f"resumed at step {saved} of 16" in output
    np.testing.assert_allclose(losses(program.folder), losses(uninterrupted[1].folder), rtol=1e-5)
    for path, leaf in final_of(uninterrupted[1]).items():
        np.testing.assert_allclose(final_of(program)[path], leaf, atol=2e-5, err_msg=path)


@pytest.mark.slow
def test_two_hosts_resume_after_one_is_lost(tmp_path, uninterrupted):
    if reason := why_not_hosts(tmp_path):
        pytest.skip(reason)
    changes = FULL | dict(batch=batch(1), checkpoints=CheckpointConfig(every=3))
    program = Program(tmp_path / "both", changes, devices=2, mesh=(2, 2, 1), own_host=True)
    both = together(program)
    # The first host is lost, which JAX notices at once: by its heartbeat only after 99 seconds.
    ended = run_programs(replace(both[0], fault="kill", fault_step=7), both[1])
    assert ended[0][0] == -signal.SIGKILL, ended
    assert ended[1][0] in (distributed.LOST, -signal.SIGABRT), ended
    saved = newest(program.folder)
    assert saved >= 3
    output = finish(*together(program))
    assert "on 4 cpu devices" in output and f"resumed at step {saved} of 16" in output
    np.testing.assert_allclose(losses(program.folder), losses(uninterrupted[1].folder), rtol=1e-5)
    for path, leaf in final_of(uninterrupted[1]).items():
        np.testing.assert_allclose(final_of(program)[path], leaf, atol=2e-5, err_msg=path)


@pytest.mark.slow
def test_run_resumes_on_another_mesh(tmp_path, uninterrupted):
    program = Program(tmp_path / "one", FULL)
    [(code, output)] = run_programs(replace(program, fault="terminate", fault_step=5))
    assert code == 75, output
    others = []
    for name, devices, mesh in (
        ("eight", 8, (2, 2, 2)),
        ("six", 6, (2, 1, 3)),
    ):
        shutil.copytree(program.folder, tmp_path / name)
        others.append(replace(program, folder=tmp_path / name, devices=devices, mesh=mesh))
    for other, (code, output) in zip(others, run_programs(*others)):
        assert code == 0 and f"on {other.devices} cpu devices" in output, output
        assert f"resumed at step {newest(program.folder)} of 16" in output
        np.testing.assert_allclose(losses(other.folder), losses(uninterrupted[1].folder), rtol=1e-5)
        for path, leaf in final_of(uninterrupted[1]).items():
            np.testing.assert_allclose(final_of(other)[path], leaf, atol=2e-5, err_msg=path)


# --- Full disks and damaged checkpoints ---------------------------------------------------------


@pytest.mark.slow
def test_full_disk_is_reported_and_the_run_resumes_from_the_last_checkpoint(
    tmp_path, uninterrupted
):
    program = Program(tmp_path / "full", LORA)
    [(code, output)] = run_programs(replace(program, fault="full", fault_step=16))
    assert (
        code == 2
        and "UserError: the disk of" in output
        and "GB are free, and a checkpoint takes up to" in output
    )
    saved = newest(program.folder)
    assert saved in (
        7,
        14,
    )  # that of 7 is whole when that of 14 begins, which may come before or after
    assert f"resumed at step {saved} of 40" in finish(program)
    assert_same(final_of(program), final_of(uninterrupted[0]))


def damage(checkpoint):
    """Changes one bit of the largest file of parameters."""
    files = [path for path in (checkpoint / "params").rglob("*") if path.is_file()]
    file = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def test_newest_intact_checkpoint_is_resumed_from(tmp_path):
    stage, checkpoints = (
        replace(STAGE, checkpoints=replace(STAGE.checkpoints, keep=3)),
        tmp_path / "checkpoints",
    )
    whole = train(tmp_path, stage)
    assert newest(tmp_path) == 8
    damage(checkpoints / "8")
    shutil.rmtree(checkpoints / "6" / "position")

    lines = []
    again = train(tmp_path, stage, log=lines.append)
    for line, step in zip(lines, (8, 6)):
        assert line.startswith(
            f"stage: warning: the checkpoint '{checkpoints / str(step)}' is damaged ("
        )
        assert line.endswith(f"it was renamed to '{step}.damaged'")
    assert "resumed at step 3 of 8" in lines[2]
    assert_same(again.params, whole.params)
    assert [record["loss"] for record in again.history] == [
        record["loss"] for record in whole.history
    ]
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "3",
        "6",
        "6.damaged",
        "8",
        "8.damaged",
    ]

    for step in (3, 6, 8):
        damage(checkpoints / str(step))
    lines.clear()
    again = train(tmp_path, stage, log=lines.append)
    assert lines[3] == "stage: warning: no intact checkpoint is left; the stage starts over"
    assert_same(again.params, whole.params)
    assert (checkpoints / "8.damaged1").is_dir()


def test_stage_with_a_damaged_last_checkpoint_is_unfinished(tmp_path):
    whole = train(tmp_path)
    damage(tmp_path / "checkpoints" / "8")

    def final():
        return final_params(tmp_path, STAGE, toy_params())

    assert is_finished(tmp_path, STAGE)
    with pytest.raises(
        Stopped,
        match=r"8' is damaged .* renamed to '8.damaged'; run the command again to repeat",
    ):
        final()
    assert not is_finished(tmp_path, STAGE)
    with pytest.raises(UserError, match="no checkpoint of step 8"):
        final()
    train(tmp_path)
    assert_same(final(), whole.params)
