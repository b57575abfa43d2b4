r"""Explain how the rows of target tokens were made, or summarise an alignment.

    tokalign inspect --workdir runs/demo                               # the report
    tokalign inspect --workdir runs/demo --token " Haus" --id 1234     # two tokens
    tokalign inspect --workdir runs/demo --token "\n\t" --html page.html # both, as a page
    tokalign inspect --alignment align --source-model /models/pythia-1b \
        --target-tokenizer /models/qwen3

Tokens are named by their text, with the escapes \n, \t, \x0a (a byte) and \u00e9, or as the
tokenizer spells them.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

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
    """Run the command; return the exit code."""
    args = _parser().parse_args(argv)

    def command() -> None:
        if args.html:
            arguments.refuse_existing("--html", args.html, args.overwrite)
        show(args, subject(args))

    return exit_code(command)


def _parser() -> argparse.ArgumentParser:
    parser = arguments.parser("inspect", __doc__)
    parser.add_argument(
        "--workdir", type=arguments.path, help="workdir of a run whose align stage is finished"
    )
    parser.add_argument(
        "--alignment",
        type=arguments.path,
        help="alignment (folder or file), instead of a workdir",
    )
    parser.add_argument(
        "--source-model",
        help="source model, a folder or hub name; needed with --alignment, or if it was moved",
    )
    parser.add_argument("--target-tokenizer", help="target tokenizer, likewise")
    parser.add_argument(
        "--token", action="append", default=[], help="text of a target token (repeatable)"
    )
    parser.add_argument(
        "--id", action="append", default=[], type=int, help="id of a target token (repeatable)"
    )
    parser.add_argument(
        "--html", type=arguments.path, help="write the report and the named tokens to this page"
    )
    parser.add_argument(
        "--neighbours",
        type=arguments.at_least(1),
        default=10,
        help="nearest source tokens to list (10)",
    )
    arguments.add_overwrite(parser, "--html")
    return parser


def show(args: argparse.Namespace, subject: inspection.Subject) -> None:
    """Print the named tokens, or the report if none is named; write both to the page."""
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
    """Open the alignment to inspect, from a workdir or by its flags.

    Raises:
      UserError: neither is named, or there is no finished alignment.
    """
    names = {"source_model": args.source_model, "target_tokenizer": args.target_tokenizer}
    settings: dict[str, Any] = {}
    end_of_text = ""
    if args.workdir:
        run, settings = _read_run(args.workdir)
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
    folders = _folders(names)
    tokenizers = _open_tokenizers(folders, names["source_model"], end_of_text)
    path = args.alignment or args.workdir / "align"
    aligned = alignment.load(path, tokenizers["source"], tokenizers["target"])
    sides = {
        side: inspection.vocabulary(
            tokenizer, "/".join(folders[side].parts[-2:]), _counts(args.workdir, side)
        )
        for side, tokenizer in tokenizers.items()
    }
    neighbours = settings.get("alignment", {}).get("neighbours", AlignmentConfig.neighbours)
    method = _method(path)
    space, reason = _space(aligned, path, settings.get("seed", 0), method)
    cut = canonical.PieceCutter(tokenizers["source"])
    return inspection.Subject(
        aligned, sides["source"], sides["target"], cut, space, reason, method, neighbours
    )


def _folders(names: Mapping[str, str]) -> dict[str, Path]:
    source = demo.source_model(names["source_model"])
    target = demo.target_tokenizer(names["target_tokenizer"])
    return {
        "source": hub.resolve(source, what="source_model", weights=False),
        "target": hub.resolve(target, what="target_tokenizer", weights=False),
    }


def _open_tokenizers(
    folders: Mapping[str, Path], source_model: str, end_of_text: str
) -> dict[str, PreTrainedTokenizerBase]:
    source = hub.load_tokenizer(folders["source"])
    if (folders["source"] / "config.json").is_file():
        rows = hub.load_config(folders["source"])[0].vocab_size
        source = within_rows(source, rows, source_model)
    return {"source": source, "target": hub.load_tokenizer(folders["target"], end_of_text)}


def _read_run(workdir: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the names of a run's model and tokenizer, and the settings of its align stage."""
    try:
        state = json.loads((workdir / STATE_FILE).read_text(encoding="utf-8"))
        run, record = state["run"], state["stages"].get("align", {})
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"--workdir '{workdir}' is not the workdir of a run (no readable {STATE_FILE}); for an "
            "alignment without a run give --alignment with --source-model and --target-tokenizer"
        ) from error
    if not record.get("finished"):
        raise UserError(
            f"--workdir '{workdir}': its align stage is not finished; run it first: "
            f"tokalign run --config ... --workdir {workdir} --stages=align"
        )
    return run, record["settings"]


def _counts(workdir: Path | None, side: str) -> np.ndarray | None:
    path = workdir / "tokens" / side / "counts.npy" if workdir else None
    return np.load(path) if path and path.exists() else None


def _beside(path: Path, name: str) -> Path:
    """Return the path of a file in the folder of an alignment."""
    return (path if path.is_dir() else path.parent) / name


def _method(path: Path) -> str:
    """Return the method of an alignment, by its summary."""
    file = _beside(path, "summary.json")
    return (
        json.loads(file.read_text(encoding="utf-8")).get("method", "unknown")
        if file.exists()
        else "unknown"
    )


def _space(
    aligned: alignment.Alignment, path: Path, seed: int, method: str
) -> tuple[inspection.Space | None, str]:
    """Return the token vectors beside an alignment in one space, or the reason for None."""
    file = _beside(path, vectors.FILE)
    if not file.exists():
        reason = (
            f"there are no token vectors beside the alignment ('{file}' is missing; its method is "
            f"'{method}')"
        )
        return None, reason
    with np.load(file) as arrays:
        source, target = (
            (arrays[f"{side}_ids"], arrays[f"{side}_vectors"]) for side in ("source", "target")
        )
    space = inspection.common_space(aligned, *source, *target, seed)
    return space, "" if space else "too few tokens with an exact match have vectors"
