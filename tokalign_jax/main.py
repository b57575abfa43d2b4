"""The command: flags -> Config -> pipeline.

    python -m tokalign_jax.main --config configs/ultra_quick_demo.py --workdir runs/demo
    python -m tokalign_jax.main --config configs/optimal.py --workdir runs/mine --config.source_model=/models/pythia-1b
    python -m tokalign_jax.main --config configs/optimal.py --workdir runs/mine --stages=align,init,export

Exit codes: 0 success, 1 a bug (with its traceback), 2 bad input (with a paragraph that says what to do).
"""

import difflib
import os
import runpy
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_dict, config_flags

from tokalign_jax.config import config_from_dict
from tokalign_jax.errors import UserError
from tokalign_jax.progress import Log, duration

DEFAULT_CONFIG = "configs/ultra_quick_demo.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the pipeline; returns the exit code."""
    try:
        given = _parse(list(sys.argv if argv is None else argv))
        if given.help:
            print(__doc__, given.get_help(), sep="\n")
            return 0
        if not given.workdir:
            raise UserError(
                "--workdir is missing: name a folder for everything the run leaves, such as --workdir runs/demo"
            )
        config, workdir = config_from_dict(given.config), Path(given.workdir)
        start = time.monotonic()
        # transformers would say that PyTorch is missing, which nothing here needs.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        # The parts that load JAX come after the flags, so that a mistyped flag is answered at once.
        from tokalign_jax import pipeline

        pipeline.run(config, workdir, given.stages, _logger())
        print(f"finished in {duration(time.monotonic() - start)}; everything is in {workdir}")
        return 0
    except UserError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 2


def _parse(argv: list[str]) -> flags.FlagValues:
    """The flags, `config` among them with its overrides."""
    argv = _with_known_config_path(argv)
    given = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, f"Config file (without: {DEFAULT_CONFIG}).", flag_values=given, sys_argv=argv
    )
    flags.DEFINE_string("workdir", None, "Folder for everything the run leaves.", flag_values=given)
    flags.DEFINE_list("stages", None, "Only these stages, and unfinished ones that they need.", flag_values=given)
    flags.DEFINE_bool("help", False, "Show this help.", short_name="h", flag_values=given)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # absl's own; grain reads some
    try:
        rest = given(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(_about_flags(argv, error)) from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument '{rest[1]}': flags are written --name=value")
    return given


def _with_known_config_path(argv: list[str]) -> list[str]:
    """Resolves `--config` to a file here or, under the same name, to one of those that ship with the package."""
    argv = list(argv)
    place = next((i for i, a in enumerate(argv) if a in ("--config", "-config") or a.startswith("--config=")), None)
    if place is None:
        given, where = DEFAULT_CONFIG, len(argv)
        argv.append("")
    elif "=" in argv[place]:
        given, where = argv[place].partition("=")[2], place
    elif place + 1 < len(argv):
        given, where = argv[place + 1], place
        del argv[place + 1]
    else:
        raise UserError("--config is given without a file; name one, such as --config configs/ultra_quick_demo.py")
    file, _, argument = given.partition(":")
    package = Path(__file__).parent
    candidates = [Path(file), package / "configs" / Path(file).name, package.parent / "configs" / Path(file).name]
    found = next((c for c in candidates if c.is_file()), None)
    if found is None:
        shipped = sorted({p.name for c in candidates[1:] for p in c.parent.glob("*.py")})
        raise UserError(
            f"config file '{file}' does not exist; those that ship with the package: {', '.join(f'configs/{n}' for n in shipped)}"
        )
    argv[where] = f"--config={found}" + (f":{argument}" if argument else "")
    return argv


def _about_flags(argv: Sequence[str], error: Exception) -> str:
    """One sentence on the first override that names no field, or the parser's own words."""
    file = next(a.partition("=")[2] for a in argv if a.startswith("--config="))
    known = _flat_keys(_load(file))
    for argument in argv:
        name = argument.removeprefix("--").partition("=")[0]
        if name.startswith("config.") and name.removeprefix("config.") not in known:
            near = difflib.get_close_matches(name.removeprefix("config."), known, n=1, cutoff=0.0)
            return f"unknown config key '{name.removeprefix('config.')}'; the nearest is '{near[0]}' (--config.{near[0]}=...)"
    return str(error)


def _load(path: str) -> config_dict.ConfigDict:
    """The ConfigDict that a config file returns."""
    return runpy.run_path(path.partition(":")[0])["get_config"]()


def _flat_keys(config: config_dict.ConfigDict, prefix: str = "") -> list[str]:
    keys = []
    for key, value in config.items():
        keys.append(prefix + key)
        if isinstance(value, config_dict.ConfigDict):
            keys += _flat_keys(value, f"{prefix}{key}.")
    return keys


def _logger() -> Log:
    start = time.monotonic()

    def log(line: str) -> None:
        print(f"[{duration(time.monotonic() - start):>6}] {line}", flush=True)

    return log


if __name__ == "__main__":
    sys.exit(main())
