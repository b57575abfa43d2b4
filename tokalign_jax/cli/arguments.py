"""What the command lines of `evaluate`, `compare` and `inspect` have in common."""

import argparse
from collections.abc import Callable
from pathlib import Path

from tokalign_jax.errors import UserError

OVERWRITE = "--overwrite"


def path(text: str) -> Path:
    """A path, `~` for the home folder: shells leave it alone in `--workdir=~/run`."""
    return Path(text).expanduser()


def at_least(low: int) -> Callable[[str], int]:
    """A whole number from `low` on."""

    def number(text: str) -> int:
        if (value := int(text)) < low:
            raise argparse.ArgumentTypeError(f"{value} is too small: it must be at least {low}")
        return value

    number.__name__ = "int"  # how argparse names it in "invalid int value"
    return number


def add_overwrite(parser: argparse.ArgumentParser, flag: str) -> None:
    parser.add_argument(
        OVERWRITE, action="store_true", help=f"replace what is in {flag} from before"
    )


def refuse_existing(flag: str, place: Path, overwrite: bool) -> None:
    """
    Raises:
      UserError: a command would write over what is at `place`, a file or a folder that is not empty, without having been told to.
    """
    if overwrite or not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return
    raise UserError(
        f"{flag} '{place}' is there already; name a new one, or give {OVERWRITE} to replace what an earlier one left"
    )
