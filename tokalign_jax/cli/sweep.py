"""Run many configs, sharing their common stages, and compare them.

    tokalign sweep --config configs/recipe.py --workdir runs/recipe
    tokalign sweep --config configs/recipe.py --workdir runs/recipe --only='own*' --config.seed=1

The config file has `get_config()`, the settings that all runs share, and `get_runs()`, which maps
the name of each run to the fields in which it differs: {"stage1.learning_rate": 2e-5, ...}.
Overrides on the command line apply to all runs.

The runs use one workdir, `WORKDIR/work`, one after the other, so that each common stage is run
once. No run is exported. The report of each is in `WORKDIR/runs/NAME`, the comparison of all in
`WORKDIR/comparison`. Repeating the command resumes after a stop and skips finished runs. Weights
that no further run needs are deleted, unless --keep is given.
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
"""File with the fingerprint of the report in a run's folder; written last."""


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
        help="run only those whose names match one of these patterns (separated by commas)",
    )
    flags.add_argument("--keep", action="store_true", help="keep the weights of all runs")
    arguments.add_processes(flags)
    args, values = arguments.parse_run(flags, argv)
    workdir = arguments.workdir_of(args)
    configs = build_configs(values, load_runs(args.config), args.only)
    return args, lambda log: run(configs, workdir, args.keep, log)


def load_runs(file: str) -> Mapping[str, Mapping[str, Any]]:
    """Call `get_runs()` of a config file.

    Raises:
      UserError: the file has no such function, or it fails or returns something else.
    """
    module = config_files.load_module(config_files.find(file.partition(":")[0]))
    if not hasattr(module, "get_runs"):
        raise UserError(
            f"config file '{file}' has no get_runs(), which returns the fields in which the runs "
            'of a sweep differ: {"name of a run": {"stage1.learning_rate": 2e-5}, ...}; see '
            "configs/recipe.py"
        )
    try:
        runs = module.get_runs()
        if not all(isinstance(x, Mapping) for x in (runs, *runs.values())):
            raise TypeError("it does not return a dict of dicts")
    except Exception as error:
        raise UserError(
            f"config file '{file}': get_runs() cannot be used ({type(error).__name__}: {error}): it"
            ' must return {"name of a run": {"stage1.learning_rate": 2e-5}, ...}'
        ) from error
    return runs


def build_configs(
    common: ConfigDict, runs: Mapping[str, Mapping[str, Any]], only: Sequence[str] = ()
) -> dict[str, Config]:
    """Build the config of each run.

    Args:
      common: the settings that all runs share.
      runs: fields in which each differs, by dotted name.
      only: patterns (`fnmatch`) of the names of runs to take; empty: all.

    Raises:
      UserError: an unknown field, a value of another type, a name that cannot be a folder's, or no
        run that matches `only`.
    """
    configs = {}
    for name, fields in runs.items():
        if not name or "/" in name or name.startswith("."):
            raise UserError(
                f"run name '{name}' cannot name a folder: it must not be empty, begin with a dot "
                "or contain '/'"
            )
        if only and not any(fnmatch.fnmatch(name, pattern) for pattern in only):
            continue
        values = common.to_dict()
        for field, value in fields.items():
            *groups, last = field.split(".")
            group = values
            for key in groups:
                group = group.setdefault(key, {})
                if not isinstance(group, dict):
                    raise UserError(
                        f"run '{name}': '{field}' is not a field, since '{key}' is not a group: "
                        "`tokalign help config` lists the fields"
                    )
            group[last] = value
        configs[name] = config_from_dict(values)
    if not configs:
        raise UserError(f"--only={','.join(only)} matches none of the runs: {', '.join(runs)}")
    return configs


def run(configs: Mapping[str, Config], workdir: Path, keep: bool, log: Log) -> None:
    """Run the unfinished runs, and compare all.

    Raises:
      UserError: bad input to any of the runs, before the first begins.
    """
    from tokalign_jax import pipeline
    from tokalign_jax.cli import compare
    from tokalign_jax.parallel import distributed
    from tokalign_jax.pipeline import checks, identities
    from tokalign_jax.pipeline.context import Context
    from tokalign_jax.utils import digests

    work = workdir / "work"
    distributed.on_first(lambda: _refuse_foreign(workdir, work))
    shared = digests.Digests(work, log)
    contexts = {name: Context(config, work, log, shared) for name, config in configs.items()}
    if len({str(identities.run_identity(context)) for context in contexts.values()}) > 1:
        raise UserError(
            "the runs of a sweep must have the same source model and target tokenizer: make a "
            "sweep for each pair"
        )
    for context in contexts.values():
        distributed.on_first(lambda context=context: checks.check(context))
    fingerprints = {name: pipeline.fingerprints_of(context) for name, context in contexts.items()}
    if distributed.is_first():
        shared.save()
    folders = {name: workdir / "runs" / name for name in configs}
    missing = [
        name for name in configs if _fingerprint(folders[name]) != fingerprints[name]["report"]
    ]
    for number, name in enumerate(missing, start=1):
        log(f"run {number} of {len(missing)}: {name}")
        pipeline.run(
            configs[name], work, ["report"], lambda line, name=name: log(f"{name}: {line}")
        )
        if distributed.is_first():
            fingerprint = fingerprints[name]["report"]
            _publish(work / "report", folders[name], fingerprint, workdir / "outdated")
            if not keep:
                needed = {f for other in missing[number:] for f in fingerprints[other].values()}
                pipeline.drop_outdated(work, needed)
    if distributed.is_first():
        reports = [folders[name] / "report.json" for name in configs]
        log(compare.run(reports, workdir / "comparison", list(configs)))


def _refuse_foreign(workdir: Path, work: Path) -> None:
    """Refuse a workdir that is neither empty nor a sweep's."""
    if not work.exists() and workdir.is_dir() and any(workdir.iterdir()):
        raise UserError(
            f"--workdir '{workdir}' is not empty and not the workdir of a sweep (it has no folder "
            "'work'): name an empty or a new folder"
        )


def _publish(report: Path, folder: Path, fingerprint: str, outdated: Path) -> None:
    """Copy a run's report to `folder`; move an older one of other settings to `outdated`."""
    if folder.exists():
        moved = outdated / f"{folder.name}-{_fingerprint(folder)[:12] or 'unfinished'}"
        shutil.rmtree(moved, ignore_errors=True)  # an older one of the same settings
        moved.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(moved)
    shutil.copytree(report, folder)
    (folder / DONE).write_text(fingerprint + "\n", encoding="utf-8")


def _fingerprint(folder: Path) -> str:
    file = folder / DONE
    return file.read_text(encoding="utf-8").strip() if file.is_file() else ""
