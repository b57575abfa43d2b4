"""Graceful stop on SIGTERM (preemption, `scancel`, `kill`) or Ctrl-C.

A signal is a request. Training checks for it between steps and writes a checkpoint first; other
stages check at their progress lines and start over when the command is repeated. If one of several
processes gets the signal all stop, in training at the same step (`distributed._Watch`).
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: the same command resumes."""

_NOTICE = b"\nstop requested: will save and exit; signal again to exit immediately\n"

SAME_REQUEST = 1.0
"""Seconds within which a second signal belongs to the same request: some senders signal a process
and its group, and so twice."""


class Stopped(Exception):
    """The run was asked to stop and can be resumed by the same command, which exits with 75."""


class _Request:
    """State of the request.

    Attributes:
      when: time of the request; None: there is none.
      agreed: returns whether several processes stop at this step; None for a single process.
      alone: whether no other process waits for this one.
    """

    when: float | None = None
    agreed: Callable[[], bool] | None = None
    alone = True


_request = _Request()


@contextmanager
def listening() -> Iterator[None]:
    """Turn the first SIGTERM or SIGINT into a request; a later one exits immediately."""
    owner, before = os.getpid(), {}
    _request.when = None

    def handle(number: int, _: FrameType | None) -> None:
        again = _request.when is not None and time.monotonic() - _request.when >= SAME_REQUEST
        if again or os.getpid() != owner:  # a forked worker has no request: it dies
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif _request.when is None:
            ask()
            with suppress(OSError):  # the reader of the pipe may have got the signal, too
                os.write(2, _NOTICE)

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, handle)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _request.when = None


def ask() -> None:
    """Request this process to stop."""
    _request.when = time.monotonic()


def asked() -> bool:
    """Return whether this process was asked to stop."""
    return _request.when is not None


def requested() -> bool:
    """Return whether to stop before the next step of a loop that all processes run.

    All processes get the same answer at the same step.
    """
    return _request.agreed() if _request.agreed else asked()


def check() -> None:
    """Raise Stopped if this process was asked to stop and no other one waits for it (`alone`)."""
    if asked() and _request.alone:
        raise Stopped("stop requested")


def join(agreed: Callable[[], bool] | None) -> None:
    """Let `agreed` answer `requested` for several processes; None: for this process alone."""
    _request.agreed, _request.alone = agreed, agreed is None


@contextmanager
def alone() -> Iterator[None]:
    """Context in which one process works and the others wait: it may stop at any `check`."""
    before, _request.alone = _request.alone, True
    try:
        yield
    finally:
        _request.alone = before
