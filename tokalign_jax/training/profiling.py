"""JAX traces of some steps of a training stage."""

from pathlib import Path

import jax

from tokalign_jax.parallel import distributed


class Profiler:
    """Traces the steps `first` to `last` of a stage. A context manager: leaving it ends the trace.

    Each process writes its own devices and threads, to `folder/processN`. A part of a run that
    begins within these steps traces the rest of them; one that begins after them traces nothing.
    """

    def __init__(self, folder: Path, steps: tuple[int, ...]):
        """Trace nothing yet.

        Args:
          folder: receives the traces.
          steps: (first, last), from 1; empty: no trace.
        """
        self.folder = folder / f"process{distributed.index()}"
        self._steps = range(steps[0], steps[1] + 1) if steps else range(0)
        self._running = False

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: object) -> None:
        if self._running:
            self.stop()

    def starts(self, step: int) -> bool:
        """Return True if the trace starts before this step."""
        return step in self._steps and not self._running

    def ends(self, step: int) -> bool:
        """Return True if the trace ends after this step."""
        return self._running and step == self._steps[-1]

    def start(self) -> None:
        """Start the trace; earlier steps should have finished."""
        jax.profiler.start_trace(self.folder)
        self._running = True

    def stop(self) -> None:
        """End the trace and write it; the traced steps should have finished."""
        self._running = False
        jax.profiler.stop_trace()
