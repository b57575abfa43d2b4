r"""Why a target token got its rows, and a one-page report of an alignment.

    tokalign inspect --workdir runs/demo                               # the report
    tokalign inspect --workdir runs/demo --token " Haus" --id 1234     # these tokens
    tokalign inspect --workdir runs/demo --token "\n\t" --html page.html # both, as a page
    tokalign inspect --alignment align --source-model /models/pythia-1b \
        --target-tokenizer /models/qwen3

Tokens are named by their text, with \n, \t, \x0a (a byte) and \u00e9 for what is hard to type, or
as the tokenizer spells them.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokalign_jax import demo
from tokalign_jax.alignment import alignment, vectors
from tokalign_jax.cli import arguments
from tokalign_jax.config import DERIVED, AlignmentConfig
from tokalign_jax.errors import UserError, exit_code
from tokalign_jax.models import hub
from tokalign_jax.reporting import inspection, pages
from tokalign_jax.text import canonical
from tokalign_jax.text.editing import within_rows

STATE_FILE = "stages.json"


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    args = _parser().parse_args(argv)

    def command() -> None:
        if args.html:
            arguments.refuse_existing("--html", args.html, args.overwrite)
        show(args, subject(args))

    return exit_code(command)


def _parser() -> argparse.ArgumentParser:
    parser = arguments.parser("inspect", __doc__)
    parser.add_argument(
        "--workdir", type=arguments.path, help="of a run whose align stage is finished"
    )
    parser.add_argument(
        "--alignment",
        type=arguments.path,
        help="folder or file of an alignment, instead of a workdir",
    )
    parser.add_argument(
        "--source-model",
        help="folder or hub name; with --alignment, or where the workdir's has moved",
    )
    parser.add_argument("--target-tokenizer", help="the same of the target tokenizer")
    parser.add_argument(
        "--token", action="append", default=[], help="a target token's text (may be repeated)"
    )
    parser.add_argument(
        "--id", action="append", default=[], type=int, help="a target token's id (may be repeated)"
    )
    parser.add_argument(
        "--html", type=arguments.path, help="write the report and the named tokens to this page"
    )
    parser.add_argument(
        "--neighbours",
        type=arguments.at_least(1),
        default=10,
        help="source tokens to list by co-occurrence",
    )
    arguments.add_overwrite(parser, "--html")
    return parser


def show(args: argparse.Namespace, subject: inspection.Subject) -> None:
    """The named tokens, or the report where none is, on the terminal; both in the page."""
    ids = [i for text in args.token for i in inspection.find(subject.target, text)] + args.id
    tokens = [
        section
        for i in dict.fromkeys(ids)
        for section in inspection.explain(subject, i, args.neighbours)
    ]
    report = inspection.report(subject) if args.html or not tokens else []
    if args.html:
        title = f"Alignment of {subject.target.name} to {subject.source.name}"
        try:
            args.html.write_text(pages.html(title, [*tokens, *report]), encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"--html '{args.html}' cannot be written ({error}); name a file in a folder that "
                f"exists"
            ) from error
    print(
        "\n".join(pages.terminal(tokens or report)),
        *([f"\nwritten to {args.html}"] if args.html else []),
        sep="\n",
    )


def subject(args: argparse.Namespace) -> inspection.Subject:
    """What is inspected, from a workdir or from an alignment and two tokenizers.

    Raises:
      UserError: neither is named, or it holds no finished alignment.
    """
    settings: dict[str, Any] = {}
    end_of_text = ""
    names = {"source_model": args.source_model, "target_tokenizer": args.target_tokenizer}
    if args.workdir:
        run, settings = _workdir(args.workdir)
        names = {role: name or run[role] for role, name in names.items()}
        if (file := args.workdir / "config.json").is_file():
            end_of_text = json.loads(file.read_text(encoding="utf-8")).get("end_of_text", "")
        if names["target_tokenizer"] in DERIVED:
            names["target_tokenizer"] = str(args.workdir / names["target_tokenizer"])
    elif not (args.alignment and all(names.values())):
        raise UserError(
            "nothing to inspect: give --workdir of a run, or --alignment with --source-model and "
            "--target-tokenizer"
        )
    folders = {
        "source": hub.resolve(
            demo.source_model(names["source_model"]), what="source_model", weights=False
        ),
        "target": hub.resolve(
            demo.target_tokenizer(names["target_tokenizer"]), what="target_tokenizer", weights=False
        ),
    }
    ends = {"source": "", "target": end_of_text}
    tokenizers = {side: hub.load_tokenizer(folder, ends[side]) for side, folder in folders.items()}
    if (folders["source"] / "config.json").is_file():
        rows = hub.load_config(folders["source"])[0].vocab_size
        tokenizers["source"] = within_rows(tokenizers["source"], rows, names["source_model"])
    path = args.alignment or args.workdir / "align"
    found = alignment.load(path, tokenizers["source"], tokenizers["target"])
    sides = {
        side: inspection.vocabulary(
            tokenizer, "/".join(folders[side].parts[-2:]), _counts(args.workdir, side)
        )
        for side, tokenizer in tokenizers.items()
    }
    of_alignment = settings.get("alignment", {})
    around = of_alignment.get("neighbours", AlignmentConfig.neighbours)
    method = _method(path)
    space, reason = _space(found, path, settings.get("seed", 0), method)
    cut = canonical.PieceCutter(tokenizers["source"])
    return inspection.Subject(
        found, sides["source"], sides["target"], cut, space, reason, method, around
    )


def _workdir(workdir: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Where a run's model and tokenizer are, and the settings of its align stage."""
    try:
        state = json.loads((workdir / STATE_FILE).read_text(encoding="utf-8"))
        run, record = state["run"], state["stages"].get("align", {})
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"--workdir '{workdir}' is no workdir of a run (no readable {STATE_FILE}); for an "
            f"alignment by itself give "
            "--alignment with --source-model and --target-tokenizer"
        ) from error
    if not record.get("finished"):
        raise UserError(
            f"--workdir '{workdir}': its align stage is not finished; run it first: tokalign run "
            f"--config ... "
            f"--workdir {workdir} --stages=align"
        )
    return run, record["settings"]


def _counts(workdir: Path | None, side: str) -> np.ndarray | None:
    path = workdir / "tokens" / side / "counts.npy" if workdir else None
    return np.load(path) if path and path.exists() else None


def _beside(path: Path, name: str) -> Path:
    """A file in the folder of an alignment."""
    return (path if path.is_dir() else path.parent) / name


def _method(path: Path) -> str:
    """How an alignment was made, where its summary says so."""
    file = _beside(path, "summary.json")
    return (
        json.loads(file.read_text(encoding="utf-8")).get("method", "unknown")
        if file.exists()
        else "unknown"
    )


def _space(
    found: alignment.Alignment, path: Path, seed: int, method: str
) -> tuple[inspection.Space | None, str]:
    """The token vectors beside an alignment in one space, or why there is none."""
    file = _beside(path, vectors.FILE)
    if not file.exists():
        return (
            None,
            f"there are no token vectors beside the alignment ('{file}' is missing; its method is "
            f"'{method}')",
        )
    with np.load(file) as arrays:
        source, target = (
            (arrays[f"{side}_ids"], arrays[f"{side}_vectors"]) for side in ("source", "target")
        )
    space = inspection.common_space(found, *source, *target, seed)
    return space, "" if space else "too few tokens with an exact match have vectors"
