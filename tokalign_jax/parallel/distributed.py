"""One of several processes: how they find each other, and how an end of one is an end of all.

Processes talk through the key-value store of JAX's coordination service, which lives in the first
one. Unlike a collective on the devices it carries text, has no timeout that a long stage of the
first process could run into, and lets signals in while it waits.
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
from jax._src.distributed import global_state  # the client of the key-value store is nowhere public

from tokalign_jax.errors import UserError
from tokalign_jax.utils import stopping
from tokalign_jax.utils.stopping import Stopped

POLL = 0.5
"""Seconds between looks at what the other processes have to say."""
GRACE = 3.0
"""Seconds that a process gets to end by itself after another one failed."""
PATIENCE = 60.0
"""Seconds that processes wait for each other in order to stop or to fail, and for a key-value store
that fails."""

T = TypeVar("T")


class ProcessFailed(RuntimeError):
    """Another process ended with an error that is not the user's."""


# --- Who and how many ---------------------------------------------------------------------------


def index() -> int:
    """This process's number, from 0; does not start a backend."""
    return global_state.process_id


def count() -> int:
    """Processes of the run."""
    return global_state.num_processes


def is_first() -> bool:
    """Whether this is the first process, which decides for all."""
    return index() == 0


@contextmanager
def running(coordinator: str = "", processes: int = 0, process: int = -1) -> Iterator[None]:
    """The part of a program in which its processes are joined; nothing at all where there is only
    one.

    Before JAX is used for anything. Leaving it waits for the others; leaving it by an exception
    that is not theirs too ends them with its message.

    Args: as for `start`.
    """
    start(coordinator, processes, process)
    if count() == 1:
        yield
        return
    # Said beforehand: when the first process is lost, JAX aborts the others without a word of ours.
    print(
        f"process {index()} of {count()}: joined. If one is lost, JAX ends all; the same command "
        f"then goes on from the "
        "newest checkpoint",
        file=sys.stderr,
        flush=True,
    )
    watch = _Watch()
    stopping.join(watch.reached)
    watch.start()
    try:
        yield
        barrier("the end")
    finally:
        stopping.join(None)
        watch.close()


def start(coordinator: str = "", processes: int = 0, process: int = -1) -> None:
    """Joins the other processes, if this one is of several.

    Several are: given by the arguments, or by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID; the tasks of a Slurm step; the workers of a Cloud TPU slice.

    Args:
      coordinator: HOST:PORT of the first process, as the others reach it.
      processes: how many there are.
      process: which of them this is, from 0.

    Raises:
      UserError: only some of the three are given, or they contradict each other.
    """
    if jax.distributed.is_initialized():
        return
    several = (
        _given(coordinator, processes, process, os.environ)
        or _slurm(os.environ)
        or _tpu(os.environ)
    )
    if several is None:
        return
    # What collectives on the CPU are made of; a device of another kind takes no notice.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(**several)


def _given(
    coordinator: str, processes: int, process: int, environment: Mapping[str, str]
) -> dict[str, Any] | None:
    """What flags, or else the environment, say."""
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    if not coordinator and processes == 0 and process < 0:
        given = [environment.get(name, "") for name in names]
        if not any(given[1:]):
            return None  # an address alone is only where the others' cluster detection is to meet
        if not all(given) or not (given[1].isdigit() and given[2].isdigit()):
            raise UserError(
                f"{', '.join(f'{n}={v!r}' for n, v in zip(names, given))}: of several processes "
                f"each needs all three, the "
                "last two as numbers; set or unset all of them"
            )
        coordinator, processes, process = given[0], int(given[1]), int(given[2])
    if ":" not in coordinator or not 0 <= process < processes:
        raise UserError(
            f"coordinator '{coordinator}', processes {processes}, process {process}: of several "
            f"processes each needs all "
            "three: --coordinator=HOST:PORT of the first, --processes=N, and --process from 0 to "
            "N - 1"
        )
    if processes == 1:
        return None
    return {
        "coordinator_address": coordinator,
        "num_processes": processes,
        "process_id": process,
        "cluster_detection_method": "deactivate",
    }


def _slurm(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """The tasks of a Slurm step (`srun`). JAX finds them by itself, but gives each task one GPU,
    the one of its local number; here the tasks of a node share all GPUs of it.

    Raises:
      UserError: they cannot each have as many.
    """
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
        return None  # also a batch script outside of srun, whose SLURM_NTASKS are not running
    bound = [gpu for gpu in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    gpus, tasks = len(bound) or _gpus_here(), _tasks_on_node(environment)
    if not gpus or not tasks:
        return {}
    # Bound to this task by Slurm: fewer than the job has here, or one alone.
    if tasks == 1 or len(bound) == 1 or gpus < int(environment.get("SLURM_GPUS_ON_NODE") or 0):
        return {"local_device_ids": list(range(gpus))}
    if gpus % tasks:
        raise UserError(
            f"the {gpus} GPUs of a node do not divide among its {tasks} Slurm tasks: use "
            f"--ntasks-per-node=1, or {gpus}"
        )
    each = gpus // tasks
    first = each * int(environment.get("SLURM_LOCALID", 0))
    return {"local_device_ids": list(range(first, first + each))} if each > 1 else {}


def _tasks_on_node(environment: Mapping[str, str]) -> int:
    """Tasks of the Slurm step on this task's node; 0 if it does not say."""
    # As in `4(x2),3`: two nodes with four, and one with three.
    groups = re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    nodes = [int(tasks) for tasks, times in groups for _ in range(int(times or 1))]
    node = int(environment.get("SLURM_NODEID", 0))
    return nodes[node] if node < len(nodes) else 0


def _gpus_here() -> int:
    """NVIDIA GPUs that this process may open, counted without starting a backend."""
    return sum(bool(re.fullmatch(r"nvidia\d+", path.name)) for path in Path("/dev").iterdir())


def _tpu(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """The workers of a Cloud TPU slice, which JAX finds by itself."""
    # JAX sets the variable when it is imported where there are no TPU chips.
    if "TPU_SKIP_MDS_QUERY" in environment or importlib.util.find_spec("libtpu") is None:
        return None
    workers = environment.get("TPU_WORKER_HOSTNAMES") or _metadata("worker-network-endpoints")
    slices = int(environment.get("MEGASCALE_NUM_SLICES", 1))
    return {} if len(workers.split(",")) * slices > 1 else None


def _metadata(name: str) -> str:
    """An attribute that Google Cloud gives this VM; empty elsewhere."""
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
    """Waits until every process is here.

    Raises:
      ProcessFailed: another one is at another `barrier`, `agree` or `on_first`.
    """
    _exchange(name, None, None)


def agree(error: BaseException | str | None) -> None:
    """Every process calls this, with what went wrong in it, or None; if anything did in any, all
    raise that.

    Raises:
      UserError: one of them had a UserError, or gave text: with the same text in all processes.
      Stopped: one of them was asked to stop.
      ProcessFailed: any other exception, naming the process; the process itself raises its own.
    """
    _exchange("agree", UserError(error) if isinstance(error, str) else error, None)


def on_first(function: Callable[[], T]) -> T:
    """What `function` returns, called by the first process only, in all processes; the others wait,
    however long it takes.

    Args:
      function: returns what JSON can hold (of several processes; alone it may return anything).

    Raises: as `agree`.
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
    """What became of one process at a meeting."""

    process: int
    where: str
    kind: str = ""
    """The error's: `user`, `stopped`, `other`, or empty."""
    text: str = ""
    value: Any = None


_meetings = 0
"""Calls of `_exchange` so far: the same in all processes, since they all make the same calls."""


def _exchange(where: str, error: BaseException | None, value: Any) -> Any:
    """The first process's value, unless any had an error: everyone tells the first, which tells
    everyone.
    """
    global _meetings
    if count() == 1:
        if error is not None:
            raise error
        return value
    _meetings += 1
    place = f"tokalign_jax/meeting/{_meetings}"
    mine = _Outcome(index(), where, _kind(error), str(error) if error else "", value)
    if is_first():
        others = [_Outcome(**json.loads(_wait(f"{place}/{other}"))) for other in range(1, count())]
        told = json.dumps(asdict(_verdict([mine, *others])))
        _retried(lambda: _tell(f"{place}/all", told))
    else:
        _retried(lambda: _tell(f"{place}/{index()}", json.dumps(asdict(mine))))
        told = _wait(f"{place}/all")
    verdict = _Outcome(**json.loads(told))
    if not verdict.kind:
        return verdict.value
    if error is not None and verdict.process == index():
        raise error
    if verdict.kind == "user":
        raise UserError(verdict.text)
    if verdict.kind == "stopped":
        raise Stopped(verdict.text)
    raise ProcessFailed(f"process {verdict.process} failed: {verdict.text}")


def _verdict(outcomes: list[_Outcome]) -> _Outcome:
    """The first process's outcome, or that of the first of those that failed."""
    for kind in ("other", "user", "stopped"):
        for outcome in outcomes:
            if outcome.kind == kind:
                return outcome
    first = outcomes[0]
    for outcome in outcomes:
        if outcome.where != first.where:
            text = f"it is at '{outcome.where}' where process 0 is at '{first.where}'"
            return _Outcome(outcome.process, outcome.where, "other", text)
    return first


def _kind(error: BaseException | None) -> str:
    if error is None:
        return ""
    return (
        "user"
        if isinstance(error, UserError)
        else "stopped"
        if isinstance(error, Stopped)
        else "other"
    )


def _store() -> Any:
    return global_state.client


def _tell(key: str, value: str) -> None:
    try:
        _store().key_value_set(key, value)
    except jax.errors.JaxRuntimeError as error:
        if "ALREADY_EXISTS" not in str(error):  # by an earlier attempt whose answer was lost
            raise


def _told(folder: str) -> list[str]:
    """The values of all keys in a folder, by key."""
    return [value for _, value in sorted(_store().key_value_dir_get(folder))]


def _get(key: str) -> str | None:
    """The value of a key as soon as some process sets it; None after `POLL` seconds."""
    try:
        return _store().blocking_key_value_get(key, int(1000 * POLL))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" in str(error):
            return None
        raise


def _retried(
    call: Callable[[], T], patience: float | None = None, sleep: Callable[[float], Any] = time.sleep
) -> T:
    """What `call` returns, called again every `POLL` seconds while the store fails; the first
    failure is a warning.

    Args:
      patience: seconds after which it gives up; None: `PATIENCE`.

    Raises:
      ProcessFailed: the store failed for longer than that.
    """
    start, failed = time.monotonic(), False
    while True:
        try:
            return call()
        except jax.errors.JaxRuntimeError as error:
            waited = time.monotonic() - start
            if waited > (PATIENCE if patience is None else patience):
                store = "the key-value store of process 0"
                text = f"{store} has not answered for {waited:.0f} seconds: {error}"
                raise ProcessFailed(text) from error
            if not failed:
                failed = True
                store = "the key-value store of process 0"
                text = f"warning: {store} does not answer, trying again: {error}"
                print(f"\nprocess {index()}: {text}", file=sys.stderr, flush=True)
            sleep(POLL)


def _wait(key: str) -> str:
    """The value of a key, as soon as some process sets it."""
    while (value := _retried(lambda: _get(key))) is None:
        pass
    return value


# --- Ending together ----------------------------------------------------------------------------

_FAILED, _STOP, _LEFT = "tokalign_jax/failed", "tokalign_jax/stop", "tokalign_jax/left"
"""Folders of the store."""


def fail(text: str, code: int) -> NoReturn:
    """Ends this process, and all others with the same message and exit code, wherever they are.
    Never returns.
    """
    if count() > 1 and _store():
        with suppress(jax.errors.JaxRuntimeError):
            _tell(
                f"{_FAILED}/{index()}", json.dumps({"process": index(), "text": text, "code": code})
            )
    _leave(code)


class _Closed(Exception):
    """The watch was closed while it waited."""


class _Watch(threading.Thread):
    """Listens to other processes while this one may be busy or stuck.

    A failure elsewhere ends this process: it would wait in a collective forever. A request to
    stop is agreed on: every process holds its next step back and tells how many it has begun; the
    first publishes the largest of these numbers and one more, and all stop at that step.

    A store that does not answer is asked again for as long as that takes. Only a process that has
    held its steps back for `PATIENCE` ends itself: it cannot know at which step the others stop.
    """

    def __init__(self):
        super().__init__(daemon=True, name="watch of other processes")
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._steps, self._last, self._holding = 0, None, False

    def reached(self) -> bool:
        """Counts a step begun, the same ones in all processes; whether all stop here. Blocks while
        they agree.
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
                self._sleep(POLL)
                self._follow_failures()
                if self._last is None and self._is_asked():
                    self._agree_to_stop()

    def _sleep(self, seconds: float) -> None:
        if self._closed.wait(seconds):
            raise _Closed

    def _is_asked(self) -> bool:
        """Whether any process was asked to stop; then all are."""
        folder = f"{_STOP}/asked"
        if not stopping.asked():
            if not self._ask(lambda: _told(folder)):
                return False
            stopping.ask()
        self._ask(lambda: _tell(f"{folder}/{index()}", ""))
        return True

    def _agree_to_stop(self) -> None:
        with self._lock:
            self._holding = True
            try:
                self._ask(lambda: _tell(f"{_STOP}/steps/{index()}", str(self._steps)))
                if is_first():
                    steps = [int(self._wait(f"{_STOP}/steps/{i}")) for i in range(count())]
                    self._ask(lambda: _tell(f"{_STOP}/last", str(max(steps) + 1)))
                self._last = int(self._wait(f"{_STOP}/last"))
            except ProcessFailed as error:
                print(
                    f"\nprocess {index()}: asked to stop, and ended without a checkpoint: {error}",
                    file=sys.stderr,
                )
                _leave(stopping.EXIT_CODE)
            self._holding = False

    def _wait(self, key: str) -> str:
        """The value of a key, as soon as some process sets it."""
        while (value := self._ask(lambda: _get(key))) is None:
            self._follow_failures()
            self._sleep(0)
        return value

    def _ask(self, call: Callable[[], T]) -> T:
        """What the store answers, however long it takes, unless steps wait for it."""
        return _retried(call, PATIENCE if self._holding else math.inf, self._sleep)

    def _follow_failures(self) -> None:
        """Ends this process if another one failed and this one does not end by itself."""
        failures = self._ask(lambda: _told(_FAILED))
        if not failures or (failure := json.loads(failures[0]))["process"] == index():
            return
        self._sleep(GRACE)
        print(
            f"\nprocess {index()}: ended, since process {failure['process']} failed: "
            f"{failure['text']}",
            file=sys.stderr,
        )
        _leave(failure["code"])


def _leave(code: int) -> NoReturn:
    """Exits without the farewell of JAX, in which each waits for all. The first, which carries the
    store, goes last.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if count() > 1 and _store():
        with suppress(jax.errors.JaxRuntimeError):
            _tell(f"{_LEFT}/{index()}", "")
            start = time.monotonic()
            while (
                is_first() and len(_told(_LEFT)) < count() and time.monotonic() - start < PATIENCE
            ):
                time.sleep(POLL)
    os._exit(code)
