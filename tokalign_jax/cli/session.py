"""Frame of a long command, in one or several processes: log, signals, errors, exit code."""

import argparse
import time
import traceback
from collections.abc import Callable

from absl import flags

from tokalign_jax.cli.arguments import workdir_of
from tokalign_jax.errors import UserError, complain, discard_output, naming_long_paths
from tokalign_jax.parallel import distributed
from tokalign_jax.utils import compiling, stopping
from tokalign_jax.utils.progress import Log, duration


def session(args: argparse.Namespace, work: Callable[[Log], None]) -> int:
    """Call `work` with a log; return the exit code.

    A process that fails ends all others with its exit code.
    """
    start = time.monotonic()
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads absl's flags
    try:
        with (
            distributed.running(args.coordinator, args.processes, args.process),
            stopping.listening(),
            naming_long_paths(),
        ):
            compiling.prepare()
            work(logger() if distributed.is_first() else lambda line: None)
        if distributed.is_first():
            elapsed = duration(time.monotonic() - start)
            _print(f"finished in {elapsed}; everything is in {workdir_of(args)}")
        return 0
    except stopping.Stopped as stopped:
        complain(f"{_process()}{stopped}: the same command resumes from here")
        return stopping.EXIT_CODE
    except distributed.ProcessLost as lost:
        complain(f"{_process()}{lost}")
        return _end_all(str(lost), distributed.LOST)
    except UserError as error:
        complain(f"{_process()}error: {error}")
        return _end_all(str(error), 2)
    except Exception as error:
        if distributed.count() == 1:
            raise
        complain(f"{_process()}{traceback.format_exc()}")
        return _end_all(f"{type(error).__name__}: {error}", 1)


def logger() -> Log:
    """Return a log that prefixes each line with the time since this call."""
    start = time.monotonic()
    return lambda line: _print(f"[{duration(time.monotonic() - start):>6}] {line}")


def _process() -> str:
    return f"process {distributed.index()}: " if distributed.count() > 1 else ""


def _end_all(text: str, code: int) -> int:
    """Make all processes exit with `code`; return it."""
    if distributed.count() > 1:
        distributed.fail(text, code)
    return code


def _print(line: str) -> None:
    """Print a line, best-effort: a closed pipe or a full disk must not end the run."""
    try:
        print(line, flush=True)
    except OSError:
        discard_output()
