r"""Compare finished runs: the settings in which they differ, and their results.

    tokalign compare runs/a runs/b runs/c --output=runs/compared

A run is named by its workdir or by its report.json. The tables are printed; with --output,
compare.json, compare.html and compare.png are written to that folder. Runs that differ only in the
seed are shown as one, with mean and standard deviation.
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokalign_jax.cli import arguments
from tokalign_jax.errors import UserError, exit_code
from tokalign_jax.reporting import comparison


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit code."""
    parser = arguments.parser("compare", __doc__)
    parser.add_argument(
        "runs",
        nargs="+",
        type=arguments.path,
        metavar="RUN",
        help="workdir or report.json of a run",
    )
    parser.add_argument(
        "--output",
        type=arguments.path,
        help="folder for compare.json, compare.html and compare.png",
    )
    arguments.add_overwrite(parser, "--output")
    args = parser.parse_args(argv)

    def command() -> None:
        if args.output:
            arguments.refuse_existing("--output", args.output, args.overwrite)
        print(run(args.runs, args.output))

    return exit_code(command)


def run(runs: Sequence[Path], output: Path | None = None, names: Sequence[str] = ()) -> str:
    """Compare runs, and write compare.json, compare.html and compare.png.

    Args:
      runs: workdirs, or files report.json.
      output: folder for the files; None: none are written.
      names: names of the runs; by default their paths.

    Returns:
      The tables for the terminal.

    Raises:
      UserError: one of the runs has no report or is named twice, or the folder cannot be written.
    """
    reports = [_report_file(path).resolve() for path in runs]
    for i, path in enumerate(runs):
        if reports[i] in reports[:i]:
            raise UserError(f"run '{path}' is named twice: name each run once")
    compared = comparison.compare(
        [load(path) for path in runs], names or [str(path) for path in runs]
    )
    lines = comparison.terminal(compared)
    if output:
        write(compared, output)
        lines += ["", f"written to {output}: compare.html, compare.json, compare.png"]
    return "\n".join(lines)


def load(run: Path) -> dict[str, Any]:
    """Load the report of a run.

    Args:
      run: the workdir, the folder of the report, or report.json itself.

    Raises:
      UserError: the report is missing or damaged.
    """
    file = _report_file(run)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        missing = {"config", "states", "languages", "training"} - set(content)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"'{file}' is not the report.json of a run ({error}); name a workdir or its report.json"
        ) from error
    if missing:
        raise UserError(
            f"'{file}' is not the report.json of a run (it has no {', '.join(sorted(missing))}); "
            "name a workdir or its report.json"
        )
    try:  # each report alone, so that the error names the damaged one
        comparison.html(comparison.compare([content]))
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
        statistics.StatisticsError,
    ) as error:
        raise UserError(
            f"'{file}' is damaged ({type(error).__name__}: {error}); write it again: "
            "tokalign run --config ... --workdir ... --stages=report"
        ) from error
    return content


def _report_file(run: Path) -> Path:
    if not run.exists():
        raise UserError(f"run '{run}' does not exist: name a workdir or its report.json")
    candidates = [run / "report" / "report.json", run / "report.json"] if run.is_dir() else [run]
    for path in candidates:
        if path.is_file():
            return path
    raise UserError(
        f"run '{run}' has no report ('{candidates[0]}' is missing); write it first: "
        f"tokalign run --config ... --workdir {run} --stages=report"
    )


def write(compared: comparison.Comparison, folder: Path) -> None:
    """Write compare.json, compare.html and compare.png.

    Raises:
      UserError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "compare.json").write_text(
            json.dumps(compared, indent=1, ensure_ascii=False) + "\n",
            encoding="utf-8",
            errors="replace",
        )
        (folder / "compare.html").write_text(
            comparison.html(compared), encoding="utf-8", errors="replace"
        )
        comparison.picture(compared, folder / "compare.png")
    except OSError as error:
        raise UserError(
            f"--output '{folder}' cannot be written ({error}); name another folder"
        ) from error
