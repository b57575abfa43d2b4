"""Questions in files of JSON lines."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tokalign_jax.errors import UserError

T = TypeVar("T")


def read_questions(what: str, path: Path, remedy: str, parse: Callable[[str, str], T]) -> list[T]:
    """Read one question a line, blank lines left out.

    Args:
      what: names the file in messages, such as `abilities`.
      remedy: what to do about a file that cannot be read.
      parse: makes a question of a line and of where it stands.

    Raises:
      UserError: the file cannot be read; or what `parse` raises.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what} '{path}' cannot be read ({error}): {remedy}") from error
    return [
        parse(line, f"{what} '{path}', line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
