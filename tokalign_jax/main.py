"""The command: flags -> Config -> pipeline.

    python -m tokalign_jax.main --config configs/ultra_quick_demo.py --workdir runs/demo
    python -m tokalign_jax.main --config configs/optimal.py --workdir runs/mine --config.source_model=/models/pythia-1b
    python -m tokalign_jax.main --config configs/optimal.py --workdir runs/mine --stages=align,init,export
    python -m tokalign_jax.main --config configs/optimal.py --plan --plan_devices=8 --plan_device_memory=80GB

Exit codes:
    0   success
    1   a bug (with its traceback)
    2   bad input (with a paragraph that says what to do)
    75  asked to stop by SIGTERM or Ctrl-C; what was done is kept, and the same command goes on
    134 by JAX: another process was lost without a word
"""

import difflib
import runpy
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_dict, config_flags

from tokalign_jax.config import Config, config_from_dict
from tokalign_jax.errors import UserError, complain, degrade_output, naming_long_paths, unread
from tokalign_jax.utils import stopping
from tokalign_jax.utils.progress import Log, duration

DEFAULT_CONFIG = "configs/ultra_quick_demo.py"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the pipeline; returns the exit code. Of several processes, one that fails ends all with its code."""
    return command(argv, __doc__, _work, define=_flags)


def command(
    argv: Sequence[str] | None,
    says: str | None,
    prepare: Callable[[flags.FlagValues], Callable[[Log], None] | None],
    default: str = DEFAULT_CONFIG,
    define: Callable[[flags.FlagValues], None] = lambda given: None,
) -> int:
    """A command that takes a config and a workdir; its exit code.

    Args:
      argv: its name and arguments; None: those of this process.
      says: what `--help` says before the flags.
      prepare: looks at the flags, and returns what is to be done in the workdir, or None if that is all.
      default: config file where none is given.
      define: adds the command's own flags to those that all have.
    """
    degrade_output()
    try:
        given = parse(list(sys.argv if argv is None else argv), default, define)
        if given.help:
            print(says, given.get_help(), sep="\n", flush=True)
            return 0
        with naming_long_paths():
            work = prepare(given)
        sys.stdout.flush()
    except BrokenPipeError:
        unread()
        return 0
    except UserError as error:
        complain(f"error: {error}")
        return 2
    return session(given, work) if work else 0


def _work(given: flags.FlagValues) -> Callable[[Log], None] | None:
    """The run that the flags ask for; None when they ask for its plan, which is printed."""
    config = config_from_dict(given.config)
    if given.plan:
        return _plan(config, given)
    workdir = workdir_of(given)

    def work(log: Log) -> None:
        from tokalign_jax import pipeline

        pipeline.run(config, workdir, given.stages, log)

    return work


def workdir_of(given: flags.FlagValues) -> Path:
    """The folder that --workdir names.

    Raises:
      UserError: it is not given.
    """
    if not given.workdir:
        raise UserError(
            "--workdir is missing: name a folder for everything the run leaves, such as --workdir runs/demo"
        )
    return Path(given.workdir).expanduser()


def session(given: flags.FlagValues, work: Callable[[Log], None]) -> int:
    """`work` in this process, which may be one of several; the exit code."""
    start = time.monotonic()
    # The parts that load JAX come after the flags, so that a mistyped flag is answered at once.
    from tokalign_jax.parallel import distributed
    from tokalign_jax.utils import compiling

    who = lambda: f"process {distributed.index()}: " if distributed.count() > 1 else ""  # noqa: E731
    try:
        with (
            distributed.running(given.coordinator, given.processes, given.process),
            stopping.listening(),
            naming_long_paths(),
        ):
            compiling.prepare()
            work(_logger() if distributed.is_first() else lambda line: None)
        if distributed.is_first():
            _print(
                f"finished in {duration(time.monotonic() - start)}; everything is in {workdir_of(given)}"
            )
        return 0
    except stopping.Stopped as stopped:
        complain(f"{who()}{stopped}: the same command goes on from here")
        return stopping.EXIT_CODE
    except UserError as error:
        complain(f"{who()}error: {error}")
        return _end_all(str(error), 2)
    except Exception as error:
        if distributed.count() == 1:
            raise
        complain(f"{who()}{traceback.format_exc()}")
        return _end_all(f"{type(error).__name__}: {error}", 1)


def _end_all(text: str, code: int) -> int:
    """`code`, after which the other processes end with it too."""
    from tokalign_jax.parallel import distributed

    if distributed.count() > 1:
        distributed.fail(text, code)
    return code


def _plan(config: Config, given: flags.FlagValues) -> None:
    """Prints what a run would need; reads configs and tokenizers, no weights and no text."""
    from tokalign_jax.planning.machine import Machine, Speed
    from tokalign_jax.planning.report import plan_run
    from tokalign_jax.utils import compiling

    if not given.plan_devices:
        compiling.prepare()  # of the devices here the run gets as much memory
    machine = Machine.of(given.plan_devices, given.plan_device_memory, given.plan_host_memory)
    speed = Speed.of(
        given.plan_tokens_per_second, given.plan_throughput, given.plan_mfu, given.plan_peak
    )
    print(plan_run(config, workdir_of(given) if given.workdir else None, machine, speed).table())


def _flags(given: flags.FlagValues) -> None:
    flags.DEFINE_list(
        "stages", None, "Only these stages, and unfinished ones that they need.", flag_values=given
    )
    flags.DEFINE_bool(
        "plan",
        False,
        "Only print memory, disk and time that the run would take.",
        flag_values=given,
    )
    flags.DEFINE_integer(
        "plan_devices", 0, "Plan for so many devices, not those here.", 0, flag_values=given
    )
    flags.DEFINE_string(
        "plan_device_memory", "", "Plan for devices with so much memory: 80GB.", flag_values=given
    )
    flags.DEFINE_string(
        "plan_host_memory", "", "Plan for a host with so much memory: 256GB.", flag_values=given
    )
    flags.DEFINE_float(
        "plan_tokens_per_second",
        0,
        "Speed to reckon with, all devices together.",
        0,
        flag_values=given,
    )
    flags.DEFINE_string(
        "plan_throughput",
        "",
        "JSON of benchmarks/train_throughput.py to reckon with.",
        flag_values=given,
    )
    flags.DEFINE_float(
        "plan_mfu",
        0.4,
        "Share of the peak to reckon with, where no speed is known.",
        0.001,
        1,
        flag_values=given,
    )
    flags.DEFINE_string(
        "plan_peak",
        "",
        "Peak of a device: 989TFLOPS; by default that of its name.",
        flag_values=given,
    )


def parse(
    argv: list[str], default: str, define: Callable[[flags.FlagValues], None]
) -> flags.FlagValues:
    """The flags, `config` among them with its overrides.

    Raises:
      UserError: an unknown flag, a value that it cannot have, or a config file that is none.
    """
    argv = _with_known_config_path(argv, default)
    given = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, f"Config file (without: {default}).", flag_values=given, sys_argv=argv
    )
    flags.DEFINE_string("workdir", None, "Folder for everything the run leaves.", flag_values=given)
    several = "Of several processes, where neither Slurm nor a TPU slice says so"
    flags.DEFINE_string("coordinator", "", f"{several}: HOST:PORT of the first.", flag_values=given)
    flags.DEFINE_integer("processes", 0, f"{several}: how many.", flag_values=given)
    flags.DEFINE_integer("process", -1, f"{several}: which this is, from 0.", flag_values=given)
    flags.DEFINE_bool("help", False, "Show this help.", short_name="h", flag_values=given)
    define(given)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # absl's own; grain reads some
    try:
        rest = given(argv)
    except Exception as error:  # of the flags, or whatever the config file does
        raise UserError(_about_flags(argv, error)) from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument '{rest[1]}': flags are written --name=value")
    return given


def _with_known_config_path(argv: list[str], default: str) -> list[str]:
    """Resolves `--config` to a file here or, under the same name, to one of those that ship with the package."""
    argv = list(argv)
    place = next(
        (
            i
            for i, a in enumerate(argv)
            if a in ("--config", "-config") or a.startswith("--config=")
        ),
        None,
    )
    if place is None:
        given, where = default, 1  # before overrides of it
        argv.insert(where, "")
    elif "=" in argv[place]:
        given, where = argv[place].partition("=")[2], place
    elif place + 1 < len(argv):
        given, where = argv[place + 1], place
        del argv[place + 1]
    else:
        raise UserError(
            "--config is given without a file; name one, such as --config configs/ultra_quick_demo.py"
        )
    file, _, argument = given.partition(":")
    package = Path(__file__).parent
    candidates = [
        Path(file),
        package / "configs" / Path(file).name,
        package.parent / "configs" / Path(file).name,
    ]
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
    """The ConfigDict that a config file returns.

    Raises:
      UserError: the file is no such thing, or fails.
    """
    file = path.partition(":")[0]
    try:
        return runpy.run_path(file)["get_config"]()
    except Exception as error:
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == file
        ]
        where = f"line {lines[-1]}: " if lines else ""
        raise UserError(
            f"config file '{file}' cannot be used ({where}{type(error).__name__}: {error}): it must be Python with a function get_config() "
            "that returns a ConfigDict, as configs/optimal.py has"
        ) from error


def _flat_keys(config: config_dict.ConfigDict, prefix: str = "") -> list[str]:
    keys = []
    for key, value in config.items():
        keys.append(prefix + key)
        if isinstance(value, config_dict.ConfigDict):
            keys += _flat_keys(value, f"{prefix}{key}.")
    return keys


def _logger() -> Log:
    start = time.monotonic()

    return lambda line: _print(f"[{duration(time.monotonic() - start):>6}] {line}")


def _print(line: str) -> None:
    """A run does not end with the reader of its log, nor with the disk that its log is on: what it finds is in its workdir."""
    try:
        print(line, flush=True)
    except OSError:
        unread()


if __name__ == "__main__":
    sys.exit(main())
