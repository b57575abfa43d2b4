"""The one exception for what a user can mend, and how a command ends with it."""

import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


class UserError(Exception):
    """Bad input, told in one paragraph: what offends, what was expected, and what to do about it.

    Commands print the message without a traceback and exit with code 2. Everything else is a bug and keeps its traceback.
    """


def degrade_output() -> None:
    """Has characters that the terminal's encoding lacks printed as escapes (`\\u4e2d`) from now on, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def unread() -> None:
    """Sends what is still printed nowhere: its reader, such as `head`, has seen enough or is gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def complain(text: str) -> None:
    """Says it on the error output, if anybody listens there."""
    with suppress(OSError):
        print(f"\n{text}", file=sys.stderr, flush=True)


@contextmanager
def naming_long_paths() -> Iterator[None]:
    """
    Raises:
      UserError: a path, from wherever it was given, is longer than a file system takes.
    """
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        path = str(error.filename)
        longest = max(len(os.fsencode(name)) for name in path.split(os.sep))
        raise UserError(
            f"the path '{path[:80]}...' is too long: its longest name has {longest:,} bytes, the whole {len(os.fsencode(path)):,}; "
            "file systems take 255 and about 4,000: choose a shorter one"
        ) from error


def exit_code(command: Callable[[], object]) -> int:
    """Runs a command that prints: 0 at its end, 2 for bad input, which is told on the error output."""
    degrade_output()
    try:
        with naming_long_paths():
            command()
        sys.stdout.flush()
        return 0
    except BrokenPipeError:
        unread()
        return 0
    except UserError as error:
        complain(f"error: {error}")
        return 2
