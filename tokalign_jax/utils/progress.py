"""Progress lines for logs: share done, rate and time left, at most one every few seconds."""

import time
from collections.abc import Callable

from tokalign_jax.utils import stopping

Log = Callable[[str], None]


def duration(seconds: float) -> str:
    """Format a duration: 42s, 3m05s, 2h07m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole // 60 % 60:02d}m"


def quantity(number: float) -> str:
    """Format a number with three or four digits: 950, 12.3k, 4.56M, 1.20G."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(number) >= size:
            scaled = number / (1e3 if letter == "k" else size)
            return f"{scaled:.3g}{letter}" if scaled < 100 else f"{scaled:.0f}{letter}"
    return f"{number:.0f}"


class Progress:
    """Counts work done and logs lines: `tokens: 1.20M of 4.80M (25%), 310k/s, 12s left`."""

    def __init__(self, log: Log, what: str, total: float, unit: str = "", every: float = 5.0):
        self._log, self._what, self._total, self._unit, self._every = log, what, total, unit, every
        self._count = 0.0
        self._start = self._last = time.monotonic()

    def update(self, amount: float = 1, note: str = "") -> None:
        """Add `amount`; log a line if the last one is older than `every` seconds.

        Raises:
          Stopped: the process was asked to stop.
        """
        stopping.check()
        self._count += amount
        now = time.monotonic()
        if now - self._last >= self._every:
            self._last = now
            self._log(self._line(now) + (f", {note}" if note else ""))

    def done(self, note: str = "") -> None:
        """Log the last line: the amount and its time."""
        elapsed = time.monotonic() - self._start
        rate = f", {quantity(self._count / elapsed)}/s" if elapsed > 0 else ""
        amount = f"{quantity(self._count)} {self._unit}".strip()
        self._log(
            f"{self._what}: {amount} in {duration(elapsed)}{rate}" + (f", {note}" if note else "")
        )

    def _line(self, now: float) -> str:
        elapsed = now - self._start
        rate = self._count / elapsed if elapsed else 0.0
        if not self._total:
            return (
                f"{self._what}: {quantity(self._count)} {self._unit}".rstrip()
                + f", {quantity(rate)}/s"
            )
        share = 100 * self._count / self._total
        seconds = (self._total - self._count) / rate if rate else 0.0
        remaining = f", {duration(seconds)} left" if rate else ""
        return (
            f"{self._what}: {quantity(self._count)} of "
            f"{quantity(self._total)} {self._unit}".rstrip()
            + f" ({share:.0f}%), {quantity(rate)}/s{remaining}"
        )
