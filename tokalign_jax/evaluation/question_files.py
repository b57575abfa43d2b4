"""Reading JSON Lines files of questions."""

import json
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any, TypeVar

from tokalign_jax.errors import UserError

T = TypeVar("T")


def read_questions(what: str, path: Path, remedy: str, parse: Callable[[str, str], T]) -> list[T]:
    """Reads one question per line, skipping blank lines.

    Args:
      what: the kind of file for error messages, such as `abilities`.
      path: the file.
      remedy: advice if the file cannot be read.
      parse: parses a question from a line and a description of its location.

    Raises:
      UserError: the file cannot be read, or as for `parse`.
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


def parse_object(line: str, where: str, keys: Set[str], example: str) -> dict[str, Any]:
    """Parses a line that is a JSON object with these keys.

    Raises:
      UserError: it is not; names the place `where` and shows the example.
    """
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where} is not valid JSON ({error}); a line looks like {example}"
        ) from error
    if not isinstance(record, dict) or (missing := keys - record.keys()):
        problem = f"has no '{min(missing)}'" if isinstance(record, dict) else "is not a JSON object"
        raise UserError(f"{where} {problem}; a line looks like {example}")
    return record
