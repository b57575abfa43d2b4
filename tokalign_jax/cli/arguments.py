"""Arguments that several commands have: their kinds, and the flags of a config and a workdir."""

import argparse
import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from ml_collections import config_dict

from tokalign_jax import config_files
from tokalign_jax.errors import UserError

OVERWRITE = "--overwrite"
DEFAULT_CONFIG = "configs/ultra_quick_demo.py"


def path(text: str) -> Path:
    """Parse a path, `~` for the home folder: shells leave it alone in `--workdir=~/run`."""
    return Path(text).expanduser()


def at_least(low: int) -> Callable[[str], int]:
    """Return a parser of whole numbers from `low` on."""

    def number(text: str) -> int:
        if (value := int(text)) < low:
            raise argparse.ArgumentTypeError(f"{value} is too small: it must be at least {low}")
        return value

    number.__name__ = "int"  # how argparse names it in "invalid int value"
    return number


def between(low: float, high: float) -> Callable[[str], float]:
    """Return a parser of numbers from `low` to `high`."""

    def number(text: str) -> float:
        if not low <= (value := float(text)) <= high:
            raise argparse.ArgumentTypeError(f"{value} must be at least {low} and at most {high}")
        return value

    number.__name__ = "float"
    return number


def names(text: str) -> list[str]:
    """Parse names separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def parser(command: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the flags of a command, whose help begins with `description`."""
    return argparse.ArgumentParser(
        prog=f"tokalign {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_run(flags: argparse.ArgumentParser, default: str = DEFAULT_CONFIG) -> None:
    """Add the flags that say what a run is: its config file, and its workdir."""
    flags.add_argument("--config", default=default, metavar="FILE", help=f"config file ({default})")
    flags.add_argument(
        "--config.FIELD",
        dest="override",
        metavar="VALUE",
        help="override a field: --config.stage1.steps=7; `tokalign help config` lists them",
    )
    flags.add_argument("--workdir", type=path, help="folder for everything that the run leaves")


def add_processes(flags: argparse.ArgumentParser) -> None:
    """Add the flags of one of several processes."""
    group = flags.add_argument_group(
        "several processes", "where neither Slurm nor a TPU slice says which this is"
    )
    group.add_argument("--coordinator", default="", metavar="HOST:PORT", help="of the first")
    group.add_argument("--processes", type=int, default=0, metavar="N", help="how many there are")
    group.add_argument("--process", type=int, default=-1, metavar="I", help="which, from 0")


def parse_run(
    flags: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, config_dict.ConfigDict]:
    """Parse the flags of a command that `add_run` was called for.

    Returns:
      (the flags, the config with its overrides).

    Raises:
      UserError: an unknown flag, a config file that cannot be used, or a field that cannot have its
        value.
    """
    if any(flag == "--config" and not _has_value(argv, i) for i, flag in enumerate(argv)):
        raise UserError(
            f"--config is given without a file; name one, such as --config {DEFAULT_CONFIG}"
        )
    args, overrides = flags.parse_known_args(argv)
    known = [name for action in flags._actions for name in action.option_strings]
    for flag in overrides:
        if flag.startswith("-") and not flag.startswith(("--config.", "--noconfig.")):
            refuse_flag(flag, known)
    return args, config_files.load(args.config, overrides)


def _has_value(argv: Sequence[str], place: int) -> bool:
    return place + 1 < len(argv) and not argv[place + 1].startswith("--")


def refuse_flag(flag: str, known: Sequence[str]) -> NoReturn:
    """Raise a UserError that names an unknown flag, and the nearest that is known."""
    name = flag.partition("=")[0]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    raise UserError(f"unknown flag '{name}'; the nearest is '{near[0]}'")


def workdir_of(args: argparse.Namespace) -> Path:
    """Return the folder that --workdir names.

    Raises:
      UserError: it is missing.
    """
    if not args.workdir:
        raise UserError(
            "--workdir is missing: name a folder for everything the run leaves, such as --workdir "
            "runs/demo"
        )
    return args.workdir


def add_overwrite(flags: argparse.ArgumentParser, flag: str) -> None:
    """Add the flag that lets a command replace what `flag` names."""
    flags.add_argument(
        OVERWRITE, action="store_true", help=f"replace what is in {flag} from before"
    )


def refuse_existing(flag: str, place: Path, overwrite: bool) -> None:
    """Refuse to write over a file, or a folder that is not empty, unless told to.

    Raises:
      UserError: `place` is there already.
    """
    if overwrite or not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return
    raise UserError(
        f"{flag} '{place}' is there already; name a new one, or give {OVERWRITE} to replace what "
        f"an earlier one left"
    )
