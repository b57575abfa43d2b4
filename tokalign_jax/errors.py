"""The one exception for what a user can mend, and how a command ends with it."""

import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

T = TypeVar("T")


class UserError(Exception):
    """Bad input, told in one paragraph: what offends, what was expected, and what to do about it.

    Commands print the message without a traceback and exit with code 2. Everything else is a bug
    and keeps its traceback.
    """


def degrade_output() -> None:
    """Has characters that the terminal's encoding lacks printed as escapes (`\\u4e2d`) from now on,
    instead of failing.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def unread() -> None:
    """Send what is still printed nowhere: its reader, such as `head`, is gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def complain(text: str) -> None:
    """Says it on the error output, if anybody listens there."""
    with suppress(OSError):
        print(f"\n{text}", file=sys.stderr, flush=True)


@contextmanager
def naming_long_paths() -> Iterator[None]:
    """Raises:
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
            f"the path '{path[:80]}...' is too long: its longest name has {longest:,} bytes, the "
            f"whole {len(os.fsencode(path)):,}; "
            "file systems take 255 and about 4,000: choose a shorter one"
        ) from error


def exit_code(command: Callable[[], object]) -> int:
    """Run a command that prints; return 0, or 2 for bad input, which goes to the error output."""
    _, code = prepared(command)
    return code


def prepared(work: Callable[[], T]) -> tuple[T | None, int]:
    """Return (what `work` returns, 0), or (None, the exit code) where it ended the command."""
    degrade_output()
    try:
        with naming_long_paths():
            result = work()
        sys.stdout.flush()
        return result, 0
    except BrokenPipeError:
        unread()
        return None, 0
    except UserError as error:
        complain(f"error: {error}")
        return None, 2
    except SystemExit as ended:  # of argparse: --help, or a flag that does not fit
        return None, int(ended.code or 0)
