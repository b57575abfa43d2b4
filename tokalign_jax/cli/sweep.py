"""Many runs that differ in some settings, sharing all stages that they have in common, laid side by
side.

    tokalign sweep --config configs/recipe.py --workdir runs/recipe
    tokalign sweep --config configs/recipe.py --workdir runs/recipe --only='own*' --config.seed=1

The config file has `get_config()`, what all runs have in common, and `get_runs()`: by the name of
each run the fields in which it differs, as {"stage1.learning_rate": 2e-5, ...}. Overrides on the
command line are of the common part.

All go through one workdir, `WORKDIR/work`, in turn: what a run shares with another is kept there
and taken from there. No run is exported. What each leaves, its report, is in `WORKDIR/runs/NAME`,
and the comparison of all in `WORKDIR/comparison`. The same command goes on after a stop, and does
not repeat runs that are finished. Weights that no further run needs are removed, unless --keep.
"""

import argparse
import fnmatch
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from tokalign_jax import config_files
from tokalign_jax.cli import arguments
from tokalign_jax.config import Config, config_from_dict
from tokalign_jax.errors import UserError, prepared
from tokalign_jax.utils.progress import Log

DEFAULT_CONFIG = "configs/recipe.py"
DONE = "fingerprint.txt"
"""In a run's folder: the fingerprint of the report that is there. Written last."""


def main(argv: Sequence[str]) -> int:
    """Run the sweep; return the exit code."""
    work, code = prepared(lambda: _work(argv))
    if work is None:
        return code
    from tokalign_jax.cli.session import session

    return session(*work)


def _work(argv: Sequence[str]) -> tuple[argparse.Namespace, Callable[[Log], None]]:
    flags = arguments.parser("sweep", __doc__)
    arguments.add_run(flags, DEFAULT_CONFIG)
    flags.add_argument(
        "--only",
        type=arguments.names,
        default=[],
        help="runs whose names fit one of these patterns",
    )
    flags.add_argument("--keep", action="store_true", help="keep the weights of all runs")
    arguments.add_processes(flags)
    args, values = arguments.parse_run(flags, argv)
    workdir = arguments.workdir_of(args)
    configs = configs_of(values, runs_of(args.config), args.only)
    return args, lambda log: run(configs, workdir, args.keep, log)


def runs_of(file: str) -> Mapping[str, Mapping[str, Any]]:
    """What `get_runs()` of a config file returns.

    Raises:
      UserError: it has none.
    """
    module = config_files.load_module(config_files.find(file.partition(":")[0]))
    if not hasattr(module, "get_runs"):
        raise UserError(
            f"config file '{file}' has no get_runs(), which says in what the runs of a sweep "
            f"differ: "
            '{"name of a run": {"stage1.learning_rate": 2e-5}, ...}; configs/recipe.py has one'
        )
    return module.get_runs()


def configs_of(
    common: ConfigDict, runs: Mapping[str, Mapping[str, Any]], only: Sequence[str] = ()
) -> dict[str, Config]:
    """The config of each run.

    Args:
      common: what runs have in common.
      runs: fields in which each differs, by dotted name.
      only: patterns of names (`fnmatch`) of the runs to take; none: all.

    Raises:
      UserError: an unknown field, a value of another type, a name that cannot be a folder's, or no
        run that fits `only`.
    """
    configs = {}
    for name, fields in runs.items():
        if not name or "/" in name or name.startswith("."):
            raise UserError(
                f"'{name}' names a run, and so a folder: it must not be empty, begin with a dot, "
                f"or contain '/'"
            )
        if only and not any(fnmatch.fnmatch(name, pattern) for pattern in only):
            continue
        values = common.to_dict()
        for field, value in fields.items():
            *groups, last = field.split(".")
            group = values
            for key in groups:
                group = group.setdefault(key, {})
            group[last] = value
        configs[name] = config_from_dict(values)
    if not configs:
        raise UserError(f"--only={','.join(only)} fits none of the runs: {', '.join(runs)}")
    return configs


def run(configs: Mapping[str, Config], workdir: Path, keep: bool, log: Log) -> None:
    """Does the runs that are not done yet, and compares all that are.

    Raises:
      UserError: bad input of any of the runs, before the first begins.
    """
    from tokalign_jax import pipeline
    from tokalign_jax.cli import compare
    from tokalign_jax.parallel import distributed
    from tokalign_jax.pipeline import checks, identities
    from tokalign_jax.pipeline.context import Context
    from tokalign_jax.utils import digests

    work = workdir / "work"
    known = digests.Digests(work, log)
    contexts = {name: Context(config, work, log, known) for name, config in configs.items()}
    if len({str(identities.run_identity(context)) for context in contexts.values()}) > 1:
        raise UserError(
            "the runs of a sweep have one source model and one target tokenizer: make a sweep of "
            "each pair"
        )
    for context in contexts.values():
        distributed.on_first(lambda context=context: checks.check(context))
    wanted = {name: pipeline.fingerprints_of(context) for name, context in contexts.items()}
    if distributed.is_first():
        known.save()
    places = {name: workdir / "runs" / name for name in configs}
    missing = [name for name in configs if _fingerprint(places[name]) != wanted[name]["report"]]
    for number, name in enumerate(missing, start=1):
        log(f"run {number} of {len(missing)}: {name}")
        pipeline.run(
            configs[name], work, ["report"], lambda line, name=name: log(f"{name}: {line}")
        )
        if distributed.is_first():
            _publish(work / "report", places[name], wanted[name]["report"], workdir / "outdated")
            if not keep:
                pipeline.drop_outdated(
                    work, {stage for other in missing[number:] for stage in wanted[other].values()}
                )
    if distributed.is_first():
        log(
            compare.run(
                [places[name] / "report.json" for name in configs],
                workdir / "comparison",
                list(configs),
            )
        )


def _publish(report: Path, place: Path, fingerprint: str, outdated: Path) -> None:
    """A copy of a run's report; one of the same name with other settings is put aside."""
    if place.exists():
        aside = outdated / f"{place.name}-{_fingerprint(place)[:12] or 'unfinished'}"
        shutil.rmtree(aside, ignore_errors=True)  # the same, aside since before
        aside.parent.mkdir(parents=True, exist_ok=True)
        place.rename(aside)
    shutil.copytree(report, place)
    (place / DONE).write_text(fingerprint + "\n", encoding="utf-8")


def _fingerprint(place: Path) -> str:
    return (place / DONE).read_text(encoding="utf-8").strip() if (place / DONE).is_file() else ""
