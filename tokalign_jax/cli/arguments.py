"""Arguments that several commands share: parsers of values, and flags of configs and workdirs."""

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
    """Parse a path and expand `~`, which shells do not do in `--workdir=~/run`."""
    if not text:  # as of an unset variable; it would be the current folder
        raise argparse.ArgumentTypeError("it is empty: name a file or folder")
    return Path(text).expanduser()


def at_least(low: int) -> Callable[[str], int]:
    """Return a parser of integers that are at least `low`."""

    def number(text: str) -> int:
        if (value := int(text)) < low:
            raise argparse.ArgumentTypeError(f"{value} is too small: it must be at least {low}")
        return value

    number.__name__ = "int"  # for argparse's message "invalid int value"
    return number


def between(low: float, high: float) -> Callable[[str], float]:
    """Return a parser of numbers between `low` and `high`, inclusive."""

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
    """Return an empty parser of a command's flags.

    Args:
      description: text at the beginning of its help.
    """
    return argparse.ArgumentParser(
        prog=f"tokalign {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_run(flags: argparse.ArgumentParser, default: str = DEFAULT_CONFIG) -> None:
    """Add the flags of a run: its config file, overrides and workdir."""
    flags.add_argument(
        "--config", default=default, metavar="FILE", help=f"config file (default: {default})"
    )
    flags.add_argument(
        "--config.FIELD",
        dest="override",
        metavar="VALUE",
        help="override a field: --config.stage1.steps=7; `tokalign help config` lists them",
    )
    flags.add_argument("--workdir", type=path, help="folder for everything the run writes")


def add_processes(flags: argparse.ArgumentParser) -> None:
    """Add the flags of a multi-process run."""
    group = flags.add_argument_group(
        "several processes", "not needed under Slurm or on a TPU slice"
    )
    group.add_argument(
        "--coordinator", default="", metavar="HOST:PORT", help="address of process 0"
    )
    group.add_argument("--processes", type=int, default=0, metavar="N", help="number of processes")
    group.add_argument(
        "--process", type=int, default=-1, metavar="I", help="index of this process, from 0"
    )


def parse_run(
    flags: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, config_dict.ConfigDict]:
    """Parse the flags of a command, `add_run`'s among them.

    Returns:
      The flags, and the config with its overrides.

    Raises:
      UserError: an unknown flag, a config file that cannot be loaded, or a bad override.
    """
    if any(flag == "--config" and not _has_value(argv, i) for i, flag in enumerate(argv)):
        raise UserError(
            f"--config has no value; name a config file, such as --config {DEFAULT_CONFIG}"
        )
    args, overrides = flags.parse_known_args(argv)
    options = [name for action in flags._actions for name in action.option_strings]
    for flag in overrides:
        if flag.startswith("-") and not flag.startswith(("--config.", "--noconfig.")):
            refuse_flag(flag, options)
    return args, config_files.load(args.config, overrides)


def _has_value(argv: Sequence[str], index: int) -> bool:
    return index + 1 < len(argv) and not argv[index + 1].startswith("--")


def refuse_flag(flag: str, options: Sequence[str]) -> NoReturn:
    """Raise a UserError that names an unknown flag and the most similar option."""
    name = flag.partition("=")[0]
    nearest = difflib.get_close_matches(name, options, n=1, cutoff=0.0)[0]
    raise UserError(f"unknown flag '{name}'; the nearest is '{nearest}'")


def workdir_of(args: argparse.Namespace) -> Path:
    """Return the folder that --workdir names.

    Raises:
      UserError: it is missing.
    """
    if not args.workdir:
        raise UserError(
            "--workdir is missing: name a folder for everything the run writes, such as "
            "--workdir runs/demo"
        )
    return args.workdir


def add_overwrite(flags: argparse.ArgumentParser, flag: str) -> None:
    """Add the flag that allows a command to overwrite the path of `flag`."""
    flags.add_argument(OVERWRITE, action="store_true", help=f"overwrite an existing {flag}")


def refuse_existing(flag: str, path: Path, overwrite: bool) -> None:
    """Refuse to write over a file, or into a folder that is not empty.

    Raises:
      UserError: `path` exists and `overwrite` is not set.
    """
    if overwrite or not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    raise UserError(
        f"{flag} '{path}' exists already; name a new one, or replace it with {OVERWRITE}"
    )
