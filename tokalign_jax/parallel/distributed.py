"""Multi-process runs: how processes join, agree on values and errors, and end together.

Processes communicate through the key-value store of JAX's coordination service, which process 0
hosts. Unlike a collective on the devices, it carries text, has no timeout that a long stage of
process 0 could exceed, and does not block signals while it waits.
"""

import importlib.util
import json
import math
import os
import re
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
from jax._src.distributed import global_state  # no public API has the key-value store's client

from tokalign_jax.errors import UserError
from tokalign_jax.utils import stopping
from tokalign_jax.utils.stopping import Stopped

POLL = 0.5
"""Seconds between polls of the key-value store."""
GRACE = 3.0
"""Seconds that a process has to end by itself after another one failed."""
PATIENCE = 60.0
"""Seconds that processes wait for each other when they stop or fail, and for a store that does not
answer."""
HEARTBEAT_TIMEOUT = 5.0
"""Seconds without a heartbeat, due every `POLL`, after which a process counts as lost."""
LOST = 134
"""Exit code if another process was lost: that of JAX's own abort (128 + SIGABRT)."""

T = TypeVar("T")


class ProcessFailed(RuntimeError):
    """Another process ended with an error that is no `UserError`."""


class ProcessLost(RuntimeError):
    """Another process was killed, or its machine was lost: the same command resumes."""


# --- Joining ------------------------------------------------------------------------------------


def index() -> int:
    """Return the index of this process, from 0; does not start a backend."""
    return global_state.process_id


def count() -> int:
    """Return the number of processes; does not start a backend."""
    return global_state.num_processes


def is_first() -> bool:
    """Return whether this is process 0, which decides for all."""
    return index() == 0


@contextmanager
def running(coordinator: str = "", processes: int = 0, process: int = -1) -> Iterator[None]:
    """Context in which the processes of a run are joined; no effect on a single process.

    Must be entered before JAX is used. Leaving it waits for the other processes; leaving it by an
    exception that is not shared by `agree` ends them with its message.

    Args:
      coordinator, processes, process: as for `start`.

    Raises:
      ProcessLost: a collective failed, because another process was lost.
    """
    start(coordinator, processes, process)
    if count() == 1:
        yield
        return
    # Printed in advance: when process 0 is lost, JAX aborts the others before they could print.
    print(
        f"process {index()} of {count()}: joined. If a process is lost, all of them end; the same "
        "command then resumes from the newest checkpoint",
        file=sys.stderr,
        flush=True,
    )
    watch = _Watch()
    stopping.join(watch.reached)
    watch.start()
    try:
        yield
        barrier("the end")
    except Exception as error:
        if _may_mean_lost_process(error):
            _look_for_lost_process(error)
        raise
    finally:
        stopping.join(None)
        watch.close()


def start(coordinator: str = "", processes: int = 0, process: int = -1) -> None:
    """Join the other processes of a multi-process run.

    The run has several processes if the arguments say so, or JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID, or if it is a Slurm step with several tasks or a Cloud TPU
    slice with several workers.

    Args:
      coordinator: HOST:PORT of process 0, as the others reach it.
      processes: number of processes.
      process: index of this process, from 0.

    Raises:
      UserError: some of the three are missing, or they contradict each other.
    """
    if jax.distributed.is_initialized():
        return
    options = (
        _explicit_cluster(coordinator, processes, process, os.environ)
        or _slurm_cluster(os.environ)
        or _tpu_cluster(os.environ)
    )
    if options is None:
        return
    # Collectives between processes on CPUs; other devices ignore it.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(**options)


def _explicit_cluster(
    coordinator: str, processes: int, process: int, environment: Mapping[str, str]
) -> dict[str, Any] | None:
    """Return arguments of `jax.distributed.initialize` by flags, or else by the environment.

    Here and in the functions below, None stands for a single process.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    if not coordinator and processes == 0 and process < 0:
        values = [environment.get(name, "") for name in names]
        if not any(values[1:]):
            return None  # an address alone is one for the cluster detection below
        if not all(values) or not (values[1].isdigit() and values[2].isdigit()):
            raise UserError(
                f"{', '.join(f'{n}={v!r}' for n, v in zip(names, values))}: each process needs "
                "all three, the last two as numbers; set or unset all of them"
            )
        coordinator, processes, process = values[0], int(values[1]), int(values[2])
    if ":" not in coordinator or not 0 <= process < processes:
        raise UserError(
            f"coordinator '{coordinator}', processes {processes}, process {process}: each process "
            "needs all three flags: --coordinator=HOST:PORT of process 0, --processes=N, and "
            "--process from 0 to N - 1"
        )
    if processes == 1:
        return None
    return {
        "coordinator_address": coordinator,
        "num_processes": processes,
        "process_id": process,
        "cluster_detection_method": "deactivate",
    }


def _slurm_cluster(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Divide the GPUs of a node among the tasks of a Slurm step (`srun`).

    JAX detects the tasks, but gives each of them the single GPU of its local index.

    Raises:
      UserError: the GPUs do not divide among the tasks.
    """
    if _number(environment, "SLURM_STEP_NUM_TASKS", 1) <= 1:
        return None  # also a batch script outside of srun, whose SLURM_NTASKS are not running
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    bound = [gpu for gpu in (visible or "").split(",") if gpu]
    gpus = _visible_gpus() if visible is None else len(bound)
    tasks = _tasks_on_node(environment)
    if not gpus or not tasks:
        return {}
    # Slurm has bound GPUs to this task: fewer than the job has on the node, or a single one.
    if tasks == 1 or len(bound) == 1 or gpus < _number(environment, "SLURM_GPUS_ON_NODE", 0):
        return {"local_device_ids": list(range(gpus))}
    if gpus % tasks:
        raise UserError(
            f"the {gpus} GPUs of a node do not divide among its {tasks} Slurm tasks: use "
            f"--ntasks-per-node=1, or {gpus}"
        )
    per_task = gpus // tasks
    first = per_task * _number(environment, "SLURM_LOCALID", 0)
    return {"local_device_ids": list(range(first, first + per_task))} if per_task > 1 else {}


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    """Return the number in an environment variable, `default` if it is not set or empty."""
    value = environment.get(name) or str(default)
    if not value.isdigit():
        raise UserError(f"the environment variable {name} is {value!r}, no number: unset it")
    return int(value)


def _tasks_on_node(environment: Mapping[str, str]) -> int:
    """Return the number of the Slurm step's tasks on this node; 0 if not known."""
    # `4(x2),3` stands for two nodes with four tasks and one with three.
    groups = re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    nodes = [int(tasks) for tasks, times in groups for _ in range(int(times or 1))]
    node = _number(environment, "SLURM_NODEID", 0)
    return nodes[node] if node < len(nodes) else 0


def _visible_gpus() -> int:
    """Count the NVIDIA GPUs of this machine without starting a backend."""
    return sum(bool(re.fullmatch(r"nvidia\d+", path.name)) for path in Path("/dev").iterdir())


def _tpu_cluster(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Detect a Cloud TPU slice with several workers; JAX finds out the rest."""
    # JAX sets this variable on import if the machine has no TPU chips.
    if "TPU_SKIP_MDS_QUERY" in environment or importlib.util.find_spec("libtpu") is None:
        return None
    names = environment.get("TPU_WORKER_HOSTNAMES") or _metadata("worker-network-endpoints")
    workers = [name for name in names.split(",") if name.strip()]
    slices = _number(environment, "MEGASCALE_NUM_SLICES", 1)
    return {} if max(len(workers), 1) * slices > 1 else None


def _metadata(name: str) -> str:
    """Return a metadata attribute of this Google Cloud VM; "" elsewhere."""
    url = f"http://metadata.google.internal/computeMetadata/v1/instance/attributes/{name}"
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers={"Metadata-Flavor": "Google"}), timeout=5
        ) as f:
            return f.read().decode()
    except OSError:
        return ""


# --- Agreeing -----------------------------------------------------------------------------------


def barrier(name: str) -> None:
    """Wait until every process has called this.

    Raises:
      ProcessFailed: another process called another `barrier`, or `agree` or `on_first`.
    """
    _exchange(name, None, None)


def agree(error: BaseException | str | None) -> None:
    """Raise in all processes if any of them has an error. All must call this.

    Args:
      error: the error of this process, or the text of a UserError; None: there is none.

    Raises:
      UserError: a process had a UserError; with the same text in all processes.
      Stopped: a process was asked to stop.
      ProcessFailed: a process, which is named, had another exception; it raises that itself.
    """
    _exchange("agree", UserError(error) if isinstance(error, str) else error, None)


def on_first(function: Callable[[], T]) -> T:
    """Call `function` in process 0 alone; return its result, or raise its error, in all processes.

    The others wait without a timeout.

    Args:
      function: returns a value that JSON can represent, if there are several processes.

    Raises:
      UserError, Stopped, ProcessFailed: as `agree`.
    """
    if count() == 1:
        return function()
    result, error = None, None
    if is_first():
        try:
            with stopping.alone():
                stopping.check()
                result = function()
        except Exception as caught:
            error = caught
    return _exchange("on_first", error, result)


@dataclass(frozen=True)
class _Outcome:
    """Value or error of one process in an exchange.

    Attributes:
      call: name of the call: `agree`, `on_first`, or that of the barrier.
      kind: kind of the error: `user`, `stopped`, `other`; empty: there is none.
      text: message of the error.
    """

    process: int
    call: str
    kind: str = ""
    text: str = ""
    value: Any = None


_num_exchanges = 0
"""Calls of `_exchange` so far: the same in all processes, since they make the same calls."""
_shared_error: BaseException | None = None
"""Error of this process that `_exchange` has sent to the others."""


def _exchange(call: str, error: BaseException | None, value: Any) -> Any:
    """Return the value of process 0 in all processes, or raise the error of any of them.

    Every process sends its outcome to process 0, which publishes the common one.
    """
    global _num_exchanges, _shared_error
    if count() == 1:
        if error is not None:
            raise error
        return value
    _num_exchanges += 1
    folder = f"tokalign_jax/exchange/{_num_exchanges}"
    mine = _Outcome(index(), call, _kind(error), str(error) if error else "", value)
    if is_first():
        others = [_Outcome(**json.loads(_wait(f"{folder}/{other}"))) for other in range(1, count())]
        message = json.dumps(asdict(_combine([mine, *others])))
        _retry(lambda: _set(f"{folder}/all", message))
    else:
        _retry(lambda: _set(f"{folder}/{index()}", json.dumps(asdict(mine))))
        message = _wait(f"{folder}/all")
    common = _Outcome(**json.loads(message))
    if not common.kind:
        return common.value
    if error is not None and common.process == index():
        _shared_error = error
        raise error
    if common.kind == "user":
        raise UserError(common.text)
    if common.kind == "stopped":
        raise Stopped(common.text)
    raise ProcessFailed(f"process {common.process} failed: {common.text}")


def _combine(outcomes: list[_Outcome]) -> _Outcome:
    """Return the outcome of process 0, or the first with an error."""
    for kind in ("other", "user", "stopped"):
        for outcome in outcomes:
            if outcome.kind == kind:
                return outcome
    first = outcomes[0]
    for outcome in outcomes:
        if outcome.call != first.call:
            text = f"it is at '{outcome.call}' where process 0 is at '{first.call}'"
            return _Outcome(outcome.process, outcome.call, "other", text)
    return first


def _kind(error: BaseException | None) -> str:
    if error is None:
        return ""
    if isinstance(error, UserError):
        return "user"
    return "stopped" if isinstance(error, Stopped) else "other"


def _store() -> Any:
    return global_state.client


def _set(key: str, value: str) -> None:
    try:
        _store().key_value_set(key, value)
    except jax.errors.JaxRuntimeError as error:
        if "ALREADY_EXISTS" not in str(error):  # set by an earlier attempt whose reply was lost
            raise


def _values(folder: str) -> list[str]:
    """Return the values in a folder of the store, in the order of their keys."""
    return [value for _, value in sorted(_store().key_value_dir_get(folder))]


def _by_process(folder: str) -> dict[int, str]:
    """Return the values in a folder of the store by the process that set them."""
    values = _store().key_value_dir_get(folder)
    return {int(key.rpartition("/")[2]): value for key, value in values}


def _get(key: str) -> str | None:
    """Return the value of a key once a process sets it; None after `POLL` seconds."""
    try:
        return _store().blocking_key_value_get(key, int(1000 * POLL))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" in str(error):
            return None
        raise


def _retry(
    call: Callable[[], T], patience: float | None = None, sleep: Callable[[float], Any] = time.sleep
) -> T:
    """Call the store, again every `POLL` seconds while it fails; warn of the first failure.

    Args:
      patience: seconds before it gives up; None: `PATIENCE`.

    Raises:
      ProcessFailed: the store failed for longer than that.
    """
    store = "the key-value store of process 0"
    start, has_warned = time.monotonic(), False
    while True:
        try:
            return call()
        except jax.errors.JaxRuntimeError as error:
            waited = time.monotonic() - start
            if waited > (PATIENCE if patience is None else patience):
                text = f"{store} has not answered for {waited:.0f} seconds: {error}"
                raise ProcessFailed(text) from error
            if not has_warned:
                has_warned = True
                text = f"warning: {store} does not answer, retrying: {error}"
                print(f"\nprocess {index()}: {text}", file=sys.stderr, flush=True)
            sleep(POLL)


def _wait(key: str) -> str:
    """Wait for a process to set a key; return its value."""
    while (value := _retry(lambda: _get(key))) is None:
        pass
    return value


# --- Lost processes -----------------------------------------------------------------------------

_HEARTBEATS, _FAILED, _STOP, _LEFT = (
    f"tokalign_jax/{name}" for name in ("heartbeats", "failed", "stop", "left")
)
"""Folders of the key-value store."""

_STATUS = re.compile(
    "(ABORTED|CANCELLED|DATA_LOSS|DEADLINE_EXCEEDED|FAILED_PRECONDITION|INTERNAL|UNAVAILABLE"
    "|UNKNOWN): "
)
"""Beginnings of the runtime's messages after a failed collective; not those of full memory."""


class _Heartbeats:
    """Which processes run, by the counters that their watches publish.

    A time in the store would need clocks that agree; a counter needs to be seen twice.
    """

    def __init__(self):
        self._seen: dict[int, tuple[str | None, float]] = {}

    def missing(self) -> list[int]:
        """Return the other processes whose counter has not changed for `HEARTBEAT_TIMEOUT`.

        Needs to be called repeatedly: the time counts from the first call that sees the value.
        """
        counters, now = _by_process(_HEARTBEATS), time.monotonic()
        others = [process for process in range(count()) if process != index()]
        for process in others:
            counter = counters.get(process)
            if process not in self._seen or self._seen[process][0] != counter:
                self._seen[process] = counter, now
        return [process for process in others if now - self._seen[process][1] >= HEARTBEAT_TIMEOUT]


_heartbeats = _Heartbeats()


def _may_mean_lost_process(error: Exception) -> bool:
    """Return whether an error is of the kind that a collective raises when a process is lost.

    Neither gloo nor NCCL names the process, and a kernel or a compilation that fails, or NCCL's own
    lack of memory, has the same status as a broken connection: `_look_for_lost_process` tells them
    apart.
    """
    # A collective that fails while it is dispatched raises its status as a plain ValueError.
    is_from_runtime = isinstance(error, jax.errors.JaxRuntimeError | ValueError)
    return is_from_runtime and error is not _shared_error and bool(_STATUS.match(str(error)))


def _look_for_lost_process(error: Exception) -> None:
    """Wait until it is known whether an error of the runtime comes from another process.

    One that failed by itself breaks its connections, too, before or after it publishes its error:
    the watch then ends this process. One that was stopped without waiting for this one ends it with
    its exit code. Returns if all others run, since the error is this process's own then.

    Raises:
      ProcessLost: another process sends no heartbeat, or the store of process 0 is gone.
    """
    reason = str(error).splitlines()[0][:200]
    text = f"the devices failed ({reason}); looking for the cause in the other processes"
    print(f"\nprocess {index()}: {text}", file=sys.stderr, flush=True)
    start = answered = time.monotonic()
    limit = 2 * HEARTBEAT_TIMEOUT
    while (now := time.monotonic()) - start < limit:
        lost = []
        try:
            left = _by_process(_LEFT)
            if _by_process(_FAILED).keys() - {index()}:
                limit = PATIENCE
            elif str(stopping.EXIT_CODE) in left.values():
                text = "stopped without a checkpoint, because another process was stopped"
                print(f"\nprocess {index()}: {text}", file=sys.stderr)
                _leave(stopping.EXIT_CODE)
            else:
                lost = [process for process in _heartbeats.missing() if process not in left]
            answered = now
        except jax.errors.JaxRuntimeError:  # JAX aborts this process, if process 0 is lost
            lost = [0] if now - answered >= HEARTBEAT_TIMEOUT else []
        if lost:
            names = f"process{'es' if lost[1:] else ''} {', '.join(map(str, lost))}"
            raise ProcessLost(
                f"{names} of {count()} {'were' if lost[1:] else 'was'} lost ({reason}): the same "
                "command resumes from the newest checkpoint"
            ) from error
        time.sleep(POLL)
    error.add_note(f"process {index()}: no other process was lost")


# --- Ending together ----------------------------------------------------------------------------


def fail(text: str, code: int) -> NoReturn:
    """End this process, and all others with the same message and exit code. Never returns."""
    if count() > 1 and _store():
        with suppress(jax.errors.JaxRuntimeError):
            failure = {"process": index(), "text": text, "code": code}
            _set(f"{_FAILED}/{index()}", json.dumps(failure))
    _leave(code)


class _Closed(Exception):
    """The watch was closed while it waited."""


class _Watch(threading.Thread):
    """Thread that listens to other processes while this one may be busy or blocked.

    It publishes a counter, by which the others see that this process runs (`_Heartbeats`). When
    another process fails, this one is ended: it would wait in a collective forever. On a request to
    stop, the processes agree on a step: each pauses before its next step and publishes the number
    of steps it has begun; process 0 publishes the maximum plus one, and all stop there.

    A store that does not answer is polled without a limit. Only a process that has paused its steps
    for `PATIENCE` ends itself: it cannot know at which step the others stop.
    """

    def __init__(self):
        super().__init__(daemon=True, name="watch of other processes")
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._steps, self._last, self._is_paused = 0, None, False
        self._num_heartbeats = 0

    def reached(self) -> bool:
        """Count a step that begins; return whether all processes stop at it.

        All processes must count the same steps. Blocks while they agree.
        """
        with self._lock:
            self._steps += 1
            return self._last is not None and self._steps >= self._last

    def close(self) -> None:
        self._closed.set()
        self.join()

    def run(self) -> None:
        with suppress(_Closed):
            while True:
                self._send_heartbeat()
                self._sleep(POLL)
                self._follow_failures()
                if self._last is None and self._stop_is_requested():
                    self._agree_to_stop()

    def _sleep(self, seconds: float) -> None:
        if self._closed.wait(seconds):
            raise _Closed

    def _send_heartbeat(self) -> None:
        """Tell the other processes that this one runs; best-effort."""
        self._num_heartbeats += 1
        with suppress(jax.errors.JaxRuntimeError):
            key = f"{_HEARTBEATS}/{index()}"
            _store().key_value_set(key, str(self._num_heartbeats), allow_overwrite=True)

    def _stop_is_requested(self) -> bool:
        """Return whether any process was asked to stop; forward the request to all."""
        folder = f"{_STOP}/asked"
        if not stopping.asked():
            if not self._retry(lambda: _values(folder)):
                return False
            stopping.ask()
        self._retry(lambda: _set(f"{folder}/{index()}", ""))
        return True

    def _agree_to_stop(self) -> None:
        with self._lock:
            self._is_paused = True
            try:
                self._retry(lambda: _set(f"{_STOP}/steps/{index()}", str(self._steps)))
                if is_first():
                    steps = [int(self._wait(f"{_STOP}/steps/{i}")) for i in range(count())]
                    self._retry(lambda: _set(f"{_STOP}/last", str(max(steps) + 1)))
                self._last = int(self._wait(f"{_STOP}/last"))
            except ProcessFailed as error:
                print(
                    f"\nprocess {index()}: stop requested, but ended without a checkpoint: {error}",
                    file=sys.stderr,
                )
                _leave(stopping.EXIT_CODE)
            self._is_paused = False

    def _wait(self, key: str) -> str:
        """Wait for a process to set a key; return its value."""
        while (value := self._retry(lambda: _get(key))) is None:
            self._follow_failures()
            self._send_heartbeat()
            self._sleep(0)
        return value

    def _retry(self, call: Callable[[], T]) -> T:
        """Call the store, without a limit of time unless steps are paused."""
        return _retry(call, PATIENCE if self._is_paused else math.inf, self._sleep)

    def _follow_failures(self) -> None:
        """End this process if another one failed and this one does not end by itself."""
        failures = self._retry(lambda: _values(_FAILED))
        if not failures or (failure := json.loads(failures[0]))["process"] == index():
            return
        for _ in range(math.ceil(GRACE / POLL)):
            self._send_heartbeat()
            self._sleep(POLL)
        print(
            f"\nprocess {index()}: ended, because process {failure['process']} failed: "
            f"{failure['text']}",
            file=sys.stderr,
        )
        _leave(failure["code"])


def _leave(code: int) -> NoReturn:
    """Exit without JAX's shutdown, in which processes wait for each other.

    Process 0, which hosts the store, exits last.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if count() > 1 and _store():
        with suppress(jax.errors.JaxRuntimeError):
            _set(f"{_LEFT}/{index()}", str(code))
            deadline = time.monotonic() + PATIENCE
            while is_first() and time.monotonic() < deadline:
                gone = {index(), *_by_process(_LEFT)}
                if code == LOST:  # else one that is silent may be busy, and would be aborted
                    gone.update(_heartbeats.missing())
                if len(gone) == count():
                    break
                time.sleep(POLL)
    os._exit(code)
