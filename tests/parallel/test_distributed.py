"""Several processes on loopback: agreement, joint exit, stopping at the same step. Run as a program,
this file is one of the processes.
"""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from tests.processes import free_port
from tokalign_jax.errors import UserError
from tokalign_jax.parallel import distributed, sharding
from tokalign_jax.utils import stopping

CODES = {
    UserError: 2,
    stopping.Stopped: 75,
    distributed.ProcessFailed: 1,
    distributed.ProcessLost: distributed.LOST,
}


def start_processes(
    program: str, folder: Path, count: int = 2, devices: int = 1
) -> list[subprocess.Popen]:
    port = free_port()
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
    }
    return [
        subprocess.Popen(
            [sys.executable, __file__, program, str(folder)],
            env=environment | {"JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


def finish(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Return exit code, last line of output and stderr of each process; none may hang."""
    try:
        ended = [(process, *process.communicate(timeout=60)) for process in processes]
    finally:
        for process in processes:
            process.kill()
    # The line before the last is gloo's own.
    return [
        (process.returncode, "".join(output.splitlines()[-1:]), errors)
        for process, output, errors in ended
    ]


# --- Programs, each run by every process --------------------------------------------------------


def agreeing(folder: Path) -> None:
    """Values and errors from either side, one after the other in the same processes."""
    message = [distributed.on_first(lambda: {"from": distributed.index(), "pair": (1, 2)})]
    attempts = [
        lambda: distributed.on_first(fails(UserError("bad corpus"))),
        lambda: distributed.on_first(fails(KeyError("bug"))),
        lambda: distributed.agree(UserError("only here") if distributed.index() == 1 else None),
        lambda: distributed.agree("text" if distributed.is_first() else None),
        lambda: distributed.agree(ValueError("odd") if distributed.index() == 1 else None),
        lambda: distributed.agree(stopping.Stopped("asked") if distributed.index() == 1 else None),
        lambda: distributed.barrier("here" if distributed.is_first() else "there"),
        lambda: distributed.agree(None),
    ]
    for attempt in attempts:
        try:
            message.append(attempt())
        except Exception as error:
            message.append([type(error).__name__, str(error)])
    # The devices of both are joined, too.
    total = jax.experimental.multihost_utils.process_allgather(
        jax.numpy.full(1, distributed.index() + 1)
    ).sum()
    print(json.dumps([*message, int(total)]))


def first_is_slow(folder: Path) -> None:
    print(json.dumps(distributed.on_first(lambda: time.sleep(1.2) or "worth waiting for")))


def second_fails_alone(folder: Path) -> None:
    """The first process waits in a collective that would never end."""
    if distributed.index() == 1:
        raise UserError("the second cannot read its part")
    jax.experimental.multihost_utils.sync_global_devices("forever")


def first_fails_alone(folder: Path) -> None:
    if distributed.is_first():
        raise UserError("the first cannot read its part")
    jax.experimental.multihost_utils.sync_global_devices("forever")


def first_is_lost(folder: Path) -> None:
    collectives_until(0, lambda: os.kill(os.getpid(), signal.SIGKILL))


def second_is_lost(folder: Path) -> None:
    collectives_until(1, lambda: os.kill(os.getpid(), signal.SIGKILL))


def second_has_a_bug(folder: Path) -> None:
    """Its connections break before its error is published."""
    collectives_until(1, lambda: (close_connections(), time.sleep(1.5), fails(KeyError("bug"))()))


def second_has_bad_input(folder: Path) -> None:
    collectives_until(
        1, lambda: (close_connections(), time.sleep(1.5), fails(UserError("bad part"))())
    )


def second_stops_alone(folder: Path) -> None:
    collectives_until(1, lambda: distributed._leave(stopping.EXIT_CODE))


def collectives_until(who: int, fault) -> None:
    """Connect all processes by a collective; then call `fault` in one, and wait for it in others."""
    jax.experimental.multihost_utils.process_allgather(jax.numpy.ones(1))
    if distributed.index() == who:
        time.sleep(0.3)  # the others are in the collective
        fault()
    jax.experimental.multihost_utils.process_allgather(jax.numpy.ones(1))


def close_connections() -> None:
    """Shut down the connections of this process to other devices, but not that to the store."""
    store = int(os.environ["JAX_COORDINATOR_ADDRESS"].rpartition(":")[2])
    for link in Path("/proc/self/fd").iterdir():
        try:
            with socket.socket(fileno=os.dup(int(link.name))) as connection:
                if store not in (connection.getpeername()[1], connection.getsockname()[1]):
                    connection.shutdown(socket.SHUT_RDWR)
        except (OSError, IndexError, TypeError):
            continue  # no connection


def steps(folder: Path) -> None:
    """A loop like that of training, in which one process is faster than the other."""
    (folder / str(distributed.index())).write_text(str(os.getpid()))
    for step in range(10_000):
        if stopping.requested():
            print(json.dumps(step))
            raise stopping.Stopped("asked to stop")
        time.sleep(0.01 * (1 + distributed.index()))


def first_works_alone(folder: Path) -> None:
    def work() -> None:
        (folder / str(distributed.index())).write_text(str(os.getpid()))
        while True:
            time.sleep(0.01)
            stopping.check()

    if not distributed.is_first():
        (folder / str(distributed.index())).write_text(str(os.getpid()))
    distributed.on_first(work)


def batches(folder: Path) -> None:
    """Global batches on a mesh whose tensor groups are of one process each, and on one where they
    are not.
    """
    devices = np.array(jax.devices())
    local = (100 * distributed.index() + np.arange(2))[None, :, None].repeat(3, 2)
    message = []
    for order in ([0, 1, 2, 3], [0, 2, 1, 3]):
        try:
            batch = sharding.global_batch(
                local, Mesh(devices[order].reshape(2, 1, 2), sharding.AXES)
            )
            message.append(
                [batch.shape[1], np.asarray(batch.addressable_shards[0].data)[0, :, 0].tolist()]
            )
        except ValueError as error:
            message.append(type(error).__name__)
    print(json.dumps(message))


def fails(error: Exception):
    def function():
        raise error

    return function


# --- Tests of these programs --------------------------------------------------------------------


def test_values_and_errors_reach_both_processes(tmp_path):
    (code0, output0, errors), (code1, output1, _) = finish(start_processes("agreeing", tmp_path))
    assert (code0, code1) == (0, 0), errors
    first, second = json.loads(output0), json.loads(output1)
    assert first[0] == second[0] == {"from": 0, "pair": [1, 2]}
    assert first[1] == second[1] == ["UserError", "bad corpus"]
    assert first[2][0] == "KeyError" and second[2] == ["ProcessFailed", "process 0 failed: 'bug'"]
    assert first[3] == second[3] == ["UserError", "only here"]
    assert first[4] == second[4] == ["UserError", "text"]
    assert first[5] == ["ProcessFailed", "process 1 failed: odd"] and second[5] == [
        "ValueError",
        "odd",
    ]
    assert first[6] == second[6] == ["Stopped", "asked"]
    assert first[7] == second[7] and "it is at 'there' where process 0 is at 'here'" in first[7][1]
    assert first[8] is second[8] is None
    assert first[9] == second[9] == 3


def test_three_processes_wait_for_the_first(tmp_path):
    ended = finish(start_processes("first_is_slow", tmp_path, count=3))
    assert [(code, output) for code, output, _ in ended] == [(0, '"worth waiting for"')] * 3


def test_global_batch_covers_all_processes_or_is_refused(tmp_path):
    ended = finish(start_processes("batches", tmp_path, devices=2))
    assert [output for _, output, _ in ended] == [
        f'[[4, {part}], "ValueError"]' for part in ("[0, 1]", "[100, 101]")
    ], ended


@pytest.mark.parametrize(("program", "who"), [("second_fails_alone", 1), ("first_fails_alone", 0)])
def test_error_in_one_process_ends_both_with_its_message_and_code(tmp_path, program, who):
    ended = finish(start_processes(program, tmp_path))
    assert [code for code, _, _ in ended] == [2, 2], ended
    assert (
        f"process {who} failed: the {('first', 'second')[who]} cannot read its part"
        in ended[1 - who][2]
    )


@pytest.mark.parametrize(
    ("program", "who", "count"), [("first_is_lost", 0, 2), ("second_is_lost", 1, 3)]
)
def test_loss_of_a_process_ends_the_others_soon_with_its_own_code(tmp_path, program, who, count):
    processes = start_processes(program, tmp_path, count)
    processes[who].wait(timeout=60)
    lost_at = time.monotonic()
    ended = finish(processes)
    assert time.monotonic() - lost_at < 3 * distributed.HEARTBEAT_TIMEOUT
    assert ended.pop(who)[0] == -signal.SIGKILL
    for code, _, errors in ended:
        # If the first is lost, JAX may abort the others before they find out.
        assert code == 134 or (who == 0 and code == -signal.SIGABRT), ended
        if code == 134:
            assert f"process {who} of {count} was lost (" in errors, ended
            assert "the same command resumes from the newest checkpoint" in errors, ended


@pytest.mark.parametrize(
    ("program", "code", "text"),
    [
        ("second_has_a_bug", 1, "process 1 failed: 'bug'"),
        ("second_has_bad_input", 2, "process 1 failed: bad part"),
        ("second_stops_alone", 75, "another process was stopped"),
    ],
)
def test_process_that_fails_is_not_lost(tmp_path, program, code, text):
    ended = finish(start_processes(program, tmp_path))
    assert [code for code, _, _ in ended] == [code, code], ended
    assert "looking for the cause" in ended[0][2] and text in ended[0][2], ended


@pytest.mark.parametrize(
    ("program", "asked"), [("steps", 0), ("steps", 1), ("first_works_alone", 1)]
)
def test_signal_to_one_process_stops_both(tmp_path, program, asked):
    processes = start_processes(program, tmp_path)
    pids = [tmp_path / "0", tmp_path / "1"]
    while not all(pid.exists() and pid.read_text() for pid in pids) and all(
        p.poll() is None for p in processes
    ):
        time.sleep(0.05)
    processes[asked].send_signal(signal.SIGTERM)
    ended = finish(processes)
    assert [code for code, _, _ in ended] == [75, 75], ended
    if program == "steps":
        assert ended[0][1] == ended[1][1] != "", "at the same step"


# --- A failing key-value store ------------------------------------------------------------------


class Store:
    """A key-value store in memory; `failing` calls fail first."""

    def __init__(self, failing: float = 0):
        self.values, self.failing = {}, failing

    def _answer(self):
        if self.failing > 0:
            self.failing -= 1
            raise jax.errors.JaxRuntimeError("UNAVAILABLE: Socket closed")

    def key_value_set(self, key, value, allow_overwrite=False):
        self._answer()
        if key in self.values and not allow_overwrite:
            raise jax.errors.JaxRuntimeError("ALREADY_EXISTS")
        self.values[key] = value
        self._answer()

    def key_value_dir_get(self, folder):
        self._answer()
        return [
            (key, value) for key, value in list(self.values.items()) if key.startswith(f"{folder}/")
        ]

    def blocking_key_value_get(self, key, milliseconds):
        self._answer()
        time.sleep(milliseconds / 1000)
        if key not in self.values:
            raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
        return self.values[key]


class Watch(distributed._Watch):
    """The watch of process `number`, in a thread of this process; it sees requests `late` seconds
    late.
    """

    def __init__(self, number, late=0.0):
        super().__init__()
        self.number, self.late = number, late

    def _agree_to_stop(self):
        time.sleep(self.late)
        super()._agree_to_stop()


@pytest.fixture
def watches(monkeypatch):
    """Return a function that starts watches over a store, with short intervals and timeouts."""
    started = []

    def start(store, *all_of_them):
        monkeypatch.setattr(distributed, "_store", lambda: store)
        monkeypatch.setattr(distributed, "count", lambda: len(all_of_them))
        monkeypatch.setattr(
            distributed, "index", lambda: getattr(threading.current_thread(), "number", 0)
        )
        monkeypatch.setattr(distributed, "POLL", 0.01)
        monkeypatch.setattr(distributed, "PATIENCE", 0.3)
        started.extend(all_of_them)
        for watch in all_of_them:
            watch.start()

    yield start
    for watch in started:
        watch.close()
    stopping._request.when = None


def stops_of(watches):
    """The step at which each watch stops, in threads of different speeds."""
    found = [0] * len(watches)

    def steps(number, pause):
        while not watches[number].reached() and found[number] < 1000:
            found[number] += 1
            time.sleep(pause)

    threads = [
        threading.Thread(target=steps, args=(i, 0.002 * (i + 1))) for i in range(len(watches))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    return found


@pytest.mark.parametrize(("failing", "late"), [(0, 0.0), (0, 0.6), (7, 0.0)])
def test_all_stop_at_the_same_step_despite_delays_and_store_failures(
    watches, capsys, failing, late
):
    store = Store()
    both = Watch(0), Watch(1, late)
    watches(store, *both)
    asking = threading.Timer(0.1, lambda: (setattr(store, "failing", failing), stopping.ask()))
    asking.start()
    first, second = stops_of(both)
    assert first == second and 0 < first < 1000
    assert ("does not answer, retrying" in capsys.readouterr().err) == bool(failing)


def test_store_is_retried_after_a_long_failure(watches):
    store = Store(failing=math.inf)
    both = Watch(0), Watch(1)
    watches(store, *both)
    time.sleep(0.5)
    assert all(watch.is_alive() for watch in both)
    store.failing = 0
    stopping.ask()
    first, second = stops_of(both)
    assert first == second


def test_process_that_cannot_read_the_stop_step_exits(watches, monkeypatch, capsys):
    left = []
    monkeypatch.setattr(distributed, "_leave", lambda code: left.append(code))
    store = Store()
    watch = Watch(0)
    watches(store, watch, Watch(1, late=0.1))
    monkeypatch.setattr(
        watch,
        "_wait",
        lambda key: (setattr(store, "failing", math.inf), super(Watch, watch)._wait(key)),
    )
    stopping.ask()
    until = time.monotonic() + 10
    while not left and time.monotonic() < until:
        time.sleep(0.01)
    assert left[0] == 75
    assert (
        "ended without a checkpoint: the key-value store of process 0 has not answered"
        in capsys.readouterr().err
    )


# --- Lost processes -----------------------------------------------------------------------------

BROKEN = jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")


@pytest.fixture
def join(monkeypatch):
    """Return a function that makes this process number `index` of two, with short intervals."""

    def join(store, index):
        monkeypatch.setattr(distributed, "_store", lambda: store)
        monkeypatch.setattr(distributed, "count", lambda: 2)
        monkeypatch.setattr(distributed, "index", lambda: index)
        monkeypatch.setattr(distributed, "POLL", 0.01)
        monkeypatch.setattr(distributed, "HEARTBEAT_TIMEOUT", 0.2)
        monkeypatch.setattr(distributed, "PATIENCE", 1.0)
        monkeypatch.setattr(distributed, "_heartbeats", distributed._Heartbeats())

    yield join


class Left(BaseException):
    """Stands for the end of this process; its argument is the exit code."""


def leave(code):
    raise Left(code)


class Alive(Store):
    """A store in which process 1 gives a sign at each look."""

    def key_value_dir_get(self, folder):
        self.values["tokalign_jax/heartbeats/1"] = str(time.monotonic())
        return super().key_value_dir_get(folder)


def test_silent_process_is_lost(join):
    store = Store()
    store.key_value_set("tokalign_jax/heartbeats/1", "7")
    join(store, 0)
    with pytest.raises(distributed.ProcessLost, match=r"process 1 of 2 was lost \(UNKNOWN: Gloo"):
        distributed._look_for_lost_process(BROKEN)


def test_first_process_is_lost_with_its_store(join):
    join(Store(failing=math.inf), 1)
    with pytest.raises(distributed.ProcessLost, match="process 0 of 2 was lost"):
        distributed._look_for_lost_process(BROKEN)


def test_error_is_the_process_own_if_all_others_run(join):
    join(Alive(), 0)
    error = jax.errors.JaxRuntimeError("INTERNAL: Autotuning failed")
    distributed._look_for_lost_process(error)
    assert error.__notes__ == ["process 0: no other process was lost"]


def test_failed_and_stopped_processes_are_not_lost(join, monkeypatch):
    monkeypatch.setattr(distributed, "_leave", leave)
    store = Store()
    store.key_value_set("tokalign_jax/left/1", "75")
    join(store, 0)
    with pytest.raises(Left, match="75"):
        distributed._look_for_lost_process(BROKEN)
    store.key_value_set("tokalign_jax/failed/1", "{}")
    start = time.monotonic()
    distributed._look_for_lost_process(BROKEN)  # the watch would end this process meanwhile
    assert time.monotonic() - start >= distributed.PATIENCE


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (BROKEN, True),
        (ValueError(str(BROKEN)), True),  # raised by a collective's dispatch
        (jax.errors.JaxRuntimeError("INTERNAL: NCCL operation ncclAllReduce() failed"), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), False),
        (jax.errors.JaxRuntimeError("INVALID_ARGUMENT: shapes"), False),
        (ValueError("shapes differ"), False),
        (RuntimeError(str(BROKEN)), False),
    ],
)
def test_errors_of_the_runtime_may_mean_lost_process(error, expected):
    assert distributed._may_mean_lost_process(error) == expected


def test_error_that_was_shared_is_no_loss(join, monkeypatch):
    """Its process must report it, not wait for the others, which end because of it."""
    monkeypatch.setattr(distributed, "_shared_error", None)
    monkeypatch.setattr(distributed, "_num_exchanges", 0)
    store = Store()
    store.key_value_set("tokalign_jax/exchange/1/1", json.dumps({"process": 1, "call": "on_first"}))
    join(store, 0)
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        distributed.on_first(fails(BROKEN))
    assert not distributed._may_mean_lost_process(caught.value)


@pytest.mark.parametrize(
    ("store", "code", "waits"), [(Store(), 134, False), (Alive(), 134, True), (Store(), 1, True)]
)
def test_first_process_waits_for_all_but_the_lost(join, monkeypatch, store, code, waits):
    monkeypatch.setattr(os, "_exit", leave)
    join(store, 0)
    start = time.monotonic()
    with pytest.raises(Left, match=str(code)):
        distributed._leave(code)
    assert (time.monotonic() - start >= distributed.PATIENCE) == waits


# --- Detection of several processes -------------------------------------------------------------


def test_single_process_needs_no_coordination():
    with distributed.running():
        assert not jax.distributed.is_initialized()
    assert (distributed.count(), distributed.index(), distributed.is_first()) == (1, 0, True)
    assert distributed.on_first(lambda: {1}) == {1}
    distributed.barrier("anywhere")
    with pytest.raises(UserError, match="as given"):
        distributed.agree("as given")


ALL_THREE = {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}


def test_flags_take_precedence_over_the_environment():
    found = distributed._explicit_cluster("", 0, -1, ALL_THREE)
    assert found and (
        found["coordinator_address"],
        found["num_processes"],
        found["process_id"],
    ) == ("host:1", 4, 3)
    found = distributed._explicit_cluster("other:2", 2, 0, ALL_THREE)
    assert found and (
        found["coordinator_address"],
        found["num_processes"],
        found["process_id"],
    ) == ("other:2", 2, 0)
    assert distributed._explicit_cluster("", 0, -1, {}) is None
    assert distributed._explicit_cluster("host:1", 1, 0, {}) is None


@pytest.mark.parametrize(
    ("flags", "environment", "words"),
    [
        (("host:1", 2, -1), {}, "--process"),
        (("host", 2, 0), {}, "HOST:PORT"),
        (("host:1", 2, 2), {}, "process 2"),
        (("", 0, -1), {**ALL_THREE, "JAX_PROCESS_ID": ""}, "JAX_PROCESS_ID=''"),
        (("", 0, -1), {**ALL_THREE, "JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES='two'"),
    ],
)
def test_incomplete_cluster_settings_are_refused(flags, environment, words):
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        distributed._explicit_cluster(*flags, environment)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (
            {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
            None,
        ),  # a batch script itself
        ({"SLURM_STEP_NUM_TASKS": "1", "CUDA_VISIBLE_DEVICES": "0,1"}, None),
        # One task a node has all GPUs of it; one task a GPU has the one it sees, or else that of
        # its number.
        (
            {
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
                "CUDA_VISIBLE_DEVICES": "0,1,2,3",
            },
            {"local_device_ids": [0, 1, 2, 3]},
        ),
        (
            {
                "SLURM_STEP_NUM_TASKS": "8",
                "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
                "CUDA_VISIBLE_DEVICES": "3",
            },
            {"local_device_ids": [0]},
        ),
        (
            {
                "SLURM_STEP_NUM_TASKS": "8",
                "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
                "CUDA_VISIBLE_DEVICES": "0,1,2,3",
            },
            {},
        ),
    ],
)
def test_slurm_environment_is_read(environment, expected):
    assert distributed._slurm_cluster(environment) == expected


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NODEID"])
def test_empty_variables_are_unset_and_odd_ones_named(monkeypatch, name):
    monkeypatch.setattr(distributed, "_visible_gpus", lambda: 8)
    environment = slurm("2(x4)", SLURM_LOCALID="0", SLURM_NODEID="0")
    expected = distributed._slurm_cluster({**environment, name: "1" if "NUM" in name else "0"})
    assert distributed._slurm_cluster({**environment, name: ""}) == expected
    with pytest.raises(UserError, match=f"{name} is 'gpu:4', no number"):
        distributed._slurm_cluster({**environment, name: "gpu:4"})


def slurm(tasks_per_node, **others):
    return {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": tasks_per_node, **others}


@pytest.mark.parametrize(
    ("gpus", "environment", "expected"),
    [
        # Whole nodes without --gpus: nothing is set, and a task sees all.
        (8, slurm("1(x8)"), list(range(8))),
        (8, slurm("2(x4)", SLURM_LOCALID="1"), [4, 5, 6, 7]),
        (8, slurm("8", SLURM_LOCALID="3"), None),  # the one of its number, as JAX has it
        (6, slurm("2(x2),4", SLURM_LOCALID="1", SLURM_NODEID="1"), [3, 4, 5]),
        (6, slurm("2(x2),1(x4)", SLURM_LOCALID="0", SLURM_NODEID="3"), list(range(6))),
        (0, slurm("2(x4)", SLURM_LOCALID="1"), None),
        (8, slurm("2(x4)", SLURM_LOCALID="1", CUDA_VISIBLE_DEVICES=""), None),  # CPUs on purpose
        # Several tasks that see the same GPUs, or each its own.
        (9, slurm("2(x4)", SLURM_LOCALID="1", CUDA_VISIBLE_DEVICES="0,1,2,3"), [2, 3]),
        (
            9,
            slurm(
                "2(x4)", SLURM_LOCALID="1", CUDA_VISIBLE_DEVICES="0,1,2,3", SLURM_GPUS_ON_NODE="4"
            ),
            [2, 3],
        ),
        (
            9,
            slurm("2(x4)", SLURM_LOCALID="1", CUDA_VISIBLE_DEVICES="2,3", SLURM_GPUS_ON_NODE="4"),
            [0, 1],
        ),
    ],
)
def test_slurm_tasks_of_a_node_share_all_its_gpus(monkeypatch, gpus, environment, expected):
    monkeypatch.setattr(distributed, "_visible_gpus", lambda: gpus)
    assert (distributed._slurm_cluster(environment) or {}).get("local_device_ids") == expected


def test_slurm_tasks_that_cannot_share_the_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(distributed, "_visible_gpus", lambda: 8)
    with pytest.raises(
        UserError, match=r"8 GPUs of a node do not divide among its 3 .*--ntasks-per-node=1"
    ):
        distributed._slurm_cluster(slurm("3(x2)"))


def test_single_worker_tpus_and_other_machines_are_one_process(monkeypatch):
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: name)
    asked = []
    monkeypatch.setattr(
        distributed, "_metadata", lambda name: asked.append(name) or "a:1:10.0.0.1,b:2:10.0.0.2"
    )
    assert distributed._tpu_cluster({"TPU_SKIP_MDS_QUERY": "1"}) is None and not asked
    for one in ({"TPU_WORKER_HOSTNAMES": "one"}, {"TPU_WORKER_HOSTNAMES": "one,"}):
        assert distributed._tpu_cluster({**one, "MEGASCALE_NUM_SLICES": ""}) is None and not asked
    assert distributed._tpu_cluster({"TPU_WORKER_HOSTNAMES": "one,two"}) == {}
    assert (
        distributed._tpu_cluster({"TPU_WORKER_HOSTNAMES": "one", "MEGASCALE_NUM_SLICES": "2"}) == {}
    )
    assert distributed._tpu_cluster({}) == {} and asked == ["worker-network-endpoints"]


if __name__ == "__main__":
    import jax.experimental.multihost_utils

    distributed.HEARTBEAT_TIMEOUT = 3.0
    try:
        with distributed.running(), stopping.listening():
            globals()[sys.argv[1]](Path(sys.argv[2]))
    except stopping.Stopped:
        sys.exit(75)
    except Exception as caught:
        print(caught, file=sys.stderr)
        distributed.fail(str(caught), CODES.get(type(caught), 1))
