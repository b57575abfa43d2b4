"""Compare initialisations by this project and others: create, measure and tabulate every start.

    benchmarks/rivals/environments.sh /tmp/rivals
    python benchmarks/rivals/compare.py --source models/smollm2 --target tokenizers/neox \\
        --donor donors/neox --environments /tmp/rivals --text train.jsonl.xz \\
        --judge valid.jsonl.xz --other-text other.jsonl --abilities abilities --output runs/rivals
        \\ -- --config.text.budget_bytes=50000000

A start is a method's model before any training: this project's own methods by `alignment.method`,
and mergekit's `mergekit-tokensurgeon`, `deepfocus` and `wechsel` from their own packages. Arguments
after `--` are passed to this project's commands. Each start gets a folder with its model (`model/`)
and `made.json`: seconds from text to model, peak memory of a process, exit code, end of the log. An
existing start is not created again; one that failed is listed with its error.

All starts are measured by `benchmarks/retention.py`: abilities, also grouped by how the tokenizers
split the question, distance to the source's likelihoods, bits per byte in domain and out of domain.
`--budgets` also trains each start in full on these numbers of tokens of the corpus, with the
next-token loss, and measures the result. Results: `rivals.md`, `rivals.json` and `rivals.png`
(abilities against minutes).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from tokalign_jax.evaluation.abilities import SEGMENTATION_KINDS
from tokalign_jax.text import corpus as documents

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
OWN = ("pieces", "exact", "tokalign", "focus", "omp", "token_distillation", "composed", "distilled")
SURGEON = (
    "omp",
    "common_interpolation",
    "landmark_pca",
    "subword",
    "mean",
    "john_hewitt",
    "randn",
    "zero",
)
"""Values of `--approximation-method`."""
OTHERS = ("deepfocus", "wechsel")
MADE, MODELS = "made.json", "models"
TAIL = 2000
"""Characters of a log that are kept."""
SOURCE = "source"


class Start(NamedTuple):
    """A command that makes a model."""

    name: str
    command: list[str]
    result: Path
    """Folder in which the command leaves the model."""


def main() -> None:
    """Make, measure and report."""
    args, own = _arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    text = _plain_text(args, own)
    for start in _starts(args, own, text):
        _make(start, args.output)
    if args.only_make:
        return
    costs = {name: _cost(name, args.output) for name in _attempted(args.output)}
    rows = [costs.pop(row["name"], {}) | _row(row) for row in _measure(args)]
    rows += costs.values()
    content = {"rows": rows, "settings": vars(args) | {"own": own}}
    dumped = json.dumps(content, indent=1, default=str, ensure_ascii=False)
    (args.output / "rivals.json").write_text(dumped + "\n", encoding="utf-8")
    table = _table(rows)
    (args.output / "rivals.md").write_text(table, encoding="utf-8")
    _picture(rows, args.output / "rivals.png")
    print(table)


def _arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = (*OWN, *(f"tokensurgeon-{method}" for method in SURGEON), *OTHERS)
    parser.add_argument("--source", required=True, type=Path, help="model folder")
    parser.add_argument("--target", required=True, type=Path, help="tokenizer folder")
    parser.add_argument("--donor", type=Path, help="model folder with the target tokenizer")
    parser.add_argument("--environments", required=True, type=Path, help="of environments.sh")
    parser.add_argument("--text", required=True, help="training text, as config.corpus")
    parser.add_argument("--language-field", default="lang")
    parser.add_argument("--judge", required=True, help="held-out text")
    parser.add_argument("--other-text", default="", help="out-of-domain text")
    parser.add_argument("--abilities", required=True)
    parser.add_argument("--text-bytes", type=int, default=600_000, help="to measure, at most")
    parser.add_argument("--corpus-bytes", type=int, default=24_000_000, help="to train on, at most")
    parser.add_argument("--questions", default="0", help="per suite; 0: all")
    parser.add_argument("--starts", default=",".join(names), help="comma-separated")
    parser.add_argument("--budgets", default="", help="tokens to train each start on: 1e6,4e6")
    parser.add_argument("--batch", type=int, default=64, help="sequences of a training step")
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--only-make", action="store_true", help="without measurements")
    parser.add_argument("--output", required=True, type=Path)
    ours, own = sys.argv[1:], []
    if "--" in ours:
        ours, own = ours[: ours.index("--")], ours[ours.index("--") + 1 :]
    args = parser.parse_args(ours)
    args.starts = [name for name in args.starts.split(",") if name]
    args.budgets = [float(budget) for budget in args.budgets.split(",") if budget]
    if unknown := set(args.starts) - set(names):
        parser.error(
            f"--starts: unknown {', '.join(sorted(unknown))}; there are {', '.join(names)}"
        )
    return args, own


# --- Making starts ------------------------------------------------------------------------------


def _run(args: argparse.Namespace, own: Sequence[str], folder: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "tokalign_jax.main",
        f"--config={ROOT / 'tokalign_jax' / 'configs' / 'starts.py'}",
        f"--workdir={folder}",
        f"--config.source_model={args.source}",
        f"--config.target_tokenizer={args.target}",
        f"--config.corpus={args.text}",
        f"--config.text.language_field={args.language_field}",
        *own,
        *more,
    ]


def _plain_text(args: argparse.Namespace, own: Sequence[str]) -> Path:
    """The training documents that this project's own starts read, for the rivals."""
    file, folder = args.output / "text.jsonl", args.output / "text"
    if not file.exists():
        subprocess.run(_run(args, own, folder, "--stages=corpus"), check=True, cwd=ROOT)
        part = file.with_suffix(".part")
        with part.open("w", encoding="utf-8") as lines:
            for batch in documents.train_batches(folder / "corpus"):
                for document in batch:
                    lines.write(json.dumps({"text": document.text}, ensure_ascii=False) + "\n")
        part.rename(file)
    return file


def _starts(args: argparse.Namespace, own: Sequence[str], text: Path) -> list[Start]:
    python = {name: str(args.environments / name / "bin" / "python") for name in OTHERS}
    scripts = {"deepfocus": HERE / "focus.py", "wechsel": HERE / "wechsel_rows.py"}
    starts = []
    for name in args.starts:
        folder = args.output / name
        result = folder / "made"
        if name in OWN:
            donor = [f"--config.alignment.donor={args.donor}"] if name == "omp" else []
            method = f"--config.alignment.method={name}"
            stages = "--stages=align,init,export"
            command = _run(args, own, folder / "run", method, *donor, stages)
            result = folder / "run" / "export"
        elif name in OTHERS:
            command = [python[name], str(scripts[name]), *map(str, (args.source, args.target))]
            command += [str(text), str(result)]
        else:
            surgeon = args.environments / "mergekit" / "bin" / "mergekit-tokensurgeon"
            command = [*map(str, (surgeon, args.source, args.donor, result))]
            command += ["--approximation-method", name.removeprefix("tokensurgeon-")]
        if args.donor or name not in ("omp", *(f"tokensurgeon-{method}" for method in SURGEON)):
            starts.append(Start(name, command, result))
    return starts


def _make(start: Start, output: Path) -> None:
    """Runs the command unless it succeeded before; keeps the model and what it cost."""
    folder, model = output / start.name, output / MODELS / start.name
    if model.exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    print(f"making {start.name}", flush=True)
    begin = time.time()
    log = folder / "log.txt"
    with log.open("w", encoding="utf-8") as lines:
        environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
        process = subprocess.Popen(
            start.command, stdout=lines, stderr=subprocess.STDOUT, cwd=ROOT, env=environment
        )
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    made = {
        "command": start.command,
        "seconds": round(time.time() - begin, 1),
        "peak_bytes": used.ru_maxrss * 1024,
        "exit_code": process.returncode,
        "log": log.read_text(encoding="utf-8", errors="replace")[-TAIL:],
    }
    (folder / MADE).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    if process.returncode == 0:
        model.parent.mkdir(exist_ok=True)
        start.result.rename(model)
    for left in ("run", "cache"):
        shutil.rmtree(folder / left, ignore_errors=True)
    print(f"  exit code {process.returncode} after {made['seconds']:.0f} s", flush=True)


def _attempted(output: Path) -> list[str]:
    return [file.parent.name for file in sorted(output.glob(f"*/{MADE}"))]


def _made(output: Path) -> list[str]:
    return [name for name in _attempted(output) if (output / MODELS / name).exists()]


# --- Measuring ----------------------------------------------------------------------------------


def _measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the source and all starts, before and after training, in one process."""
    file = args.output / "measured" / "retention.jsonl"
    file.unlink(missing_ok=True)
    command = [
        *(sys.executable, str(HERE.parent / "retention.py")),
        *(f"--source={args.source}", f"--target={args.target}"),
        *(f"--corpus={args.text}", f"--language_field={args.language_field}"),
        *(f"--text={args.judge}", f"--other_text={args.other_text}"),
        *(f"--text_bytes={args.text_bytes}", f"--corpus_bytes={args.corpus_bytes}"),
        *(f"--abilities={args.abilities}", f"--questions={args.questions}", "--self_share=0"),
        f"--out={file.parent}",
    ]
    sequences, length = args.batch, args.sequence_length
    for name in _made(args.output):
        command.append(f"--start={name}:model={args.output / MODELS / name}")
        for budget in args.budgets:
            fields = {
                "start": name,
                "steps": max(1, round(budget / sequences / length)),
                "batch.size": sequences,
                "batch.sequence_length": length,
                "learning_rate": args.learning_rate,
            }
            values = ",".join(f"{key}={value}" for key, value in fields.items())
            command.append(f"--train={name}+{budget / 1e6:g}M:{values}")
    subprocess.run(command, check=True, cwd=ROOT)
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _row(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of a model; shares of what the source answers right by group."""
    row = {"start": measured["name"], "ability": measured["mean"]}
    row |= {kind: measured[kind] for kind in SEGMENTATION_KINDS if kind in measured}
    row |= {"distance": measured["gap"]} if "gap" in measured else {}
    languages = measured["scores"]["languages"]
    row |= {
        f"bits {key}": languages[key]["bits_per_byte"] for key in ("en", "code") if key in languages
    }
    row["bits all"] = measured["text"]
    return row | ({"bits other kind": measured["other"]} if "other" in measured else {})


def _cost(name: str, output: Path) -> dict[str, Any]:
    """Return what making a start took; if it failed, why."""
    cost = json.loads((output / name / MADE).read_text(encoding="utf-8"))
    row = {"start": name, "minutes": cost["seconds"] / 60, "memory": cost["peak_bytes"]}
    if cost["exit_code"]:
        lines = cost["log"].strip().splitlines() or [f"exit code {cost['exit_code']}"]
        row["failed"] = lines[-1][:300]
    return row


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row if key != "failed"))
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    ordered = sorted(rows, key=lambda row: (row["start"] != SOURCE, -row.get("ability", -1.0)))
    lines += ["| " + " | ".join(_cell(column, row) for column in columns) + " |" for row in ordered]
    failed = [f"- {row['start']} failed: `{row['failed']}`" for row in ordered if "failed" in row]
    return "\n".join([*lines, *([""] if failed else []), *failed]) + "\n"


def _cell(column: str, row: Mapping[str, Any]) -> str:
    if column not in row:
        return "–"
    value = row[column]
    if column == "memory":
        return f"{value / 1e9:.1f} GB"
    if column == "minutes":
        return f"{value:.1f}"
    return value if isinstance(value, str) else f"{value:.3f}"


def _picture(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Mean ability against the minutes that a start takes."""
    known = [
        row for row in rows if "ability" in row and (row["start"] == SOURCE or "minutes" in row)
    ]
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for row in known:
        if row["start"] == SOURCE:
            axes.axhline(row["ability"], linestyle="--", color="0.5", label="source model")
            continue
        axes.scatter(row["minutes"], row["ability"], color="C0" if row["start"] in OWN else "C1")
        axes.annotate(
            row["start"],
            (row["minutes"], row["ability"]),
            fontsize=8,
            xytext=(4, 3),
            textcoords="offset points",
        )
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.set_xlabel("minutes from text to model")
    axes.set_ylabel("mean ability")
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
