"""A request to stop, by SIGTERM (a preemption, `scancel`, `kill`) or Ctrl-C: seen at the next good
moment, not at once.

Training looks between steps and writes a checkpoint first; other stages look at their next progress
line and start over when the same command runs again. Of several processes one may be asked and all
stop, training at the same step (`distributed` joins them).
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: nothing is wrong, and the same command goes on."""

SAME_REQUEST = 1.0
"""Seconds in which a second signal is the same request: some ask a process and its group, and so
twice."""


class Stopped(Exception):
    """The run was asked to stop and has left everything so that the same command goes on. `main`
    exits with 75.
    """


class _Request:
    """When this process was asked, and how several agree on the step after which they stop."""

    when: float | None = None
    agreed: Callable[[], bool] | None = None
    alone = True


_request = _Request()


@contextmanager
def listening() -> Iterator[None]:
    """Turns the first SIGTERM or SIGINT into a request; another one, a second later or more, kills
    at once.
    """
    owner, before = os.getpid(), {}
    _request.when = None

    def handle(number: int, _: FrameType | None) -> None:
        again = _request.when is not None and time.monotonic() - _request.when >= SAME_REQUEST
        if again or os.getpid() != owner:  # a forked worker process is to die of it as ever
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif _request.when is None:
            ask()
            with suppress(
                OSError
            ):  # the reader of what is said may have got the signal too, and be gone
                os.write(2, b"\nasked to stop: at the next good moment (once more kills at once)\n")

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, handle)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _request.when = None


def ask() -> None:
    """Asks this process to stop."""
    _request.when = time.monotonic()


def asked() -> bool:
    """Whether this process has been asked to stop."""
    return _request.when is not None


def requested() -> bool:
    """Between the steps of a loop that all processes run: whether to stop now, the same answer for
    all at the same step.
    """
    return _request.agreed() if _request.agreed else asked()


def check() -> None:
    """Raises:
    Stopped: this process was asked to stop, and nobody waits for what it does (`alone`).
    """
    if asked() and _request.alone:
        raise Stopped("asked to stop")


def join(agreed: Callable[[], bool] | None) -> None:
    """From now on `agreed` answers `requested` for several processes; with None this process is by
    itself again.
    """
    _request.agreed, _request.alone = agreed, agreed is None


@contextmanager
def alone() -> Iterator[None]:
    """What one of several processes does by itself, while the others wait for its end: it may stop
    in the middle.
    """
    before, _request.alone = _request.alone, True
    try:
        yield
    finally:
        _request.alone = before
