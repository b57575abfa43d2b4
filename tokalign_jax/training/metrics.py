"""Metrics of a training stage: `metrics.jsonl` (a line a step), TensorBoard, progress lines, loss
spikes.
"""

import json
import math
import os
import statistics
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokalign_jax.utils.files import write_whole
from tokalign_jax.utils.progress import Log, duration, quantity

Record = dict[str, Any]
"""One step: step (from 1), loss (nats a token), learning_rate, gradient_norm, tokens (of the stage
so far), tokens_per_second, seconds (of this step), skipped (steps so far); after a validation also
validation_loss (nats a token). A loss or norm that is not finite is None."""

_WINDOW, _ENOUGH = 100, 20
_SPIKE_SIGMAS, _SPIKE_RATIO = 6.0, 1.2
_SIGMA_PER_MAD = 1.4826  # of a normal distribution


def is_spike(loss: float, recent: Sequence[float]) -> bool:
    """Detect a loss of more than 6 robust sigmas above the recent median and 1.2 times it."""
    if len(recent) < _ENOUGH:
        return False
    median = statistics.median(recent)
    sigma = _SIGMA_PER_MAD * statistics.median(abs(other - median) for other in recent)
    return loss > median + _SPIKE_SIGMAS * sigma and loss > _SPIKE_RATIO * median


def read(path: Path) -> list[Record]:
    """The whole lines of a metrics file; what a killed run left of its last line is not one."""
    if not path.exists():
        return []
    lines = path.read_text(errors="replace", encoding="utf-8").split("\n")[
        :-1
    ]  # a whole line ends in a newline
    return [record for line in lines if (record := _record(line))]


def _record(line: str) -> Record | None:
    """None of a line that a power cut, say, left full of zeros."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


class Validation(NamedTuple):
    """A validation after a step."""

    loss: float
    """Mean next-token loss (nats a token)."""
    seconds: float
    sequences: int
    best: int | None
    """The step with the lowest loss so far."""


class Recorder:
    """Records each step's metrics in order; writes them if `writes` is set (in one process of
    several).
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        steps: int,
        done: int,
        log_every: int,
        log: Log,
        writes: bool = True,
    ):
        """Goes on after step `done`: later lines, of a run that was killed, are dropped."""
        self._name, self._steps, self._every, self._log = name, steps, log_every, log
        self._path = folder / "metrics.jsonl"
        self.history = [record for record in read(self._path) if record["step"] <= done]
        self.step, self._tokens = done, self.history[-1]["tokens"] if self.history else 0
        losses = (record["loss"] for record in self.history)
        self._recent: deque[float] = deque((loss for loss in losses if loss is not None), _WINDOW)
        self._file = self._board = None
        if writes:
            write_whole(self._path, "".join(json.dumps(record) + "\n" for record in self.history))
            self._file = self._path.open("a", encoding="utf-8")
            self._board = _Board(folder / "tensorboard", done)
        self.start_clock()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file and self._board:
            self._file.close()
            self._board.close()

    def start_clock(self) -> None:
        """Time from here on is training."""
        self._last = self._line_time = time.monotonic()
        self._line_tokens, self._line_step = self._tokens, self.step

    def add(self, metrics: dict[str, Any], validation: Validation | None = None) -> None:
        """Record a step, from what the train step returned (fetched) and the validation after it.

        Time that the validation took is not counted as training.
        """
        now = time.monotonic()
        aside = validation.seconds if validation else 0.0
        seconds, self._last = now - self._last - aside, now
        self._line_time += aside
        tokens = int(metrics["tokens"])
        self._tokens += tokens
        self.step += 1
        record = {
            "step": self.step,
            "loss": _finite(metrics["loss"]),
            "learning_rate": float(metrics["learning_rate"]),
            "gradient_norm": _finite(metrics["gradient_norm"]),
            "tokens": self._tokens,
            "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
            "seconds": round(seconds, 6),
            "skipped": int(metrics["skipped"]),
        }
        if validation:
            record["validation_loss"] = _finite(validation.loss)
        self.history.append(record)
        self._write(record)
        self._report(record, finite=bool(metrics["finite"]))
        if validation:
            self._report_validation(validation)

    def flush(self) -> None:
        """Syncs all lines to disk, so that a checkpoint may follow."""
        if self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        if self._board:
            self._board.flush()

    def _write(self, record: Record) -> None:
        if not (self._file and self._board):
            return
        self._file.write(json.dumps(record) + "\n")
        keys = ("loss", "learning_rate", "gradient_norm", "tokens_per_second", "validation_loss")
        self._board.add(
            {f"{self._name}/{key}": record[key] for key in keys if record.get(key) is not None},
            record["step"],
        )

    def _report(self, record: Record, finite: bool) -> None:
        step, loss = record["step"], record["loss"]
        if not finite:
            self._log(
                f"{self._name}: step {step} is not finite and was skipped ({record['skipped']} so"
                " far)"
            )
        if loss is not None:
            if is_spike(loss, self._recent):
                self._log(
                    f"{self._name}: the loss spikes at step {step}: {loss:.3f}, where the"
                    f" {len(self._recent)} before have a median of"
                    f" {statistics.median(self._recent):.3f}"
                )
            self._recent.append(loss)
        if step % self._every == 0 or step == self._steps:
            elapsed = max(self._last - self._line_time, 1e-9)
            left = (self._steps - step) * elapsed / (step - self._line_step)
            rate = (self._tokens - self._line_tokens) / elapsed
            self._line_time, self._line_tokens, self._line_step = self._last, self._tokens, step
            self._log(
                f"{self._name}: step {step} of {self._steps}, loss"
                f" {'not finite' if loss is None else f'{loss:.3f}'}, {quantity(rate)} tokens/s"
                + (f", {duration(left)} left" if step < self._steps else "")
            )

    def _report_validation(self, validation: Validation) -> None:
        loss = f"{validation.loss:.4f}" if math.isfinite(validation.loss) else "not finite"
        rank = ""
        if validation.best:
            first = validation.best == self.step
            rank = ", the lowest so far" if first else f"; the lowest is step {validation.best}'s"
        self._log(
            f"{self._name}: step {self.step}, validation loss {loss} on"
            f" {validation.sequences} held-out sequences{rank}"
        )


class _Board:
    """A file of scalars for TensorBoard.

    Written at once: the usual writer of tensorboardX hands what it gets to a thread, which a full
    disk ends, and then waits for it forever.
    """

    def __init__(self, folder: Path, done: int):
        """Later steps than `done`, in files of a run that was killed, are no longer shown."""
        # Slow to import where torch is installed: it looks for it.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]
        from tensorboardX.proto.summary_pb2 import Summary  # type: ignore[attr-defined]

        self._event, self._summary = Event, Summary
        folder.mkdir(parents=True, exist_ok=True)
        self._file = EventsWriter(str(folder / "events"), f".{done}")
        start = SessionLog(status=SessionLog.START)
        self._file.write_event(Event(wall_time=time.time(), step=done + 1, session_log=start))

    def add(self, values: dict[str, float], step: int) -> None:
        scalars = [
            self._summary.Value(tag=name, simple_value=value) for name, value in values.items()
        ]
        self._file.write_event(
            self._event(wall_time=time.time(), step=step, summary=self._summary(value=scalars))
        )

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None
