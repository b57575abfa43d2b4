"""The exception for bad input, and the exit codes of commands that raise it."""

import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

T = TypeVar("T")


class UserError(Exception):
    """Bad input. The message names the offender, what was expected and the remedy.

    Commands print the message without a traceback and exit with code 2. Any other exception is a
    bug and keeps its traceback.
    """


def degrade_output() -> None:
    """Print characters that the terminal's encoding lacks as escapes (`\\u4e2d`) from now on."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def discard_output() -> None:
    """Discard further output: its reader, such as `head`, has closed the pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def complain(text: str) -> None:
    """Print a message to stderr, best-effort."""
    with suppress(OSError):
        print(f"\n{text}", file=sys.stderr, flush=True)


@contextmanager
def naming_long_paths() -> Iterator[None]:
    """Raise a UserError for any path that is longer than file systems allow."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        path = str(error.filename)
        longest = max(len(os.fsencode(name)) for name in path.split(os.sep))
        raise UserError(
            f"the path '{path[:80]}...' is too long: its longest name has {longest:,} bytes, the "
            f"whole path {len(os.fsencode(path)):,}; file systems allow 255 and about 4,000: "
            "choose a shorter one"
        ) from error


def exit_code(command: Callable[[], object]) -> int:
    """Run a command; return 0, or 2 for bad input, which is printed to stderr."""
    _, code = prepared(command)
    return code


def prepared(work: Callable[[], T]) -> tuple[T | None, int]:
    """Call `work`; return its result and 0, or None and the exit code of the command."""
    degrade_output()
    try:
        with naming_long_paths():
            result = work()
        sys.stdout.flush()
        return result, 0
    except BrokenPipeError:
        discard_output()
        return None, 0
    except UserError as error:
        complain(f"error: {error}")
        return None, 2
    except SystemExit as ended:  # argparse: --help, or a bad flag
        return None, int(ended.code or 0)
