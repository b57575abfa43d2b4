"""Compare a user's alternatives: makes every start, judges all alike, writes one table.

    benchmarks/rivals/environments.sh /tmp/rivals
    python benchmarks/rivals/compare.py --source models/smollm2 --target tokenizers/neox \\
        --donor donors/neox --environments /tmp/rivals --text train.jsonl.xz \\
        --judge valid.jsonl.xz --other-text other.jsonl --abilities abilities --output runs/rivals
        \\ -- --config.text.budget_bytes=50000000

A start is a method's model before any training: this project's own methods by `alignment.method`,
and mergekit's `mergekit-tokensurgeon`, `deepfocus` and `wechsel` from their own packages. What
follows `--` goes to this project's commands. Each start gets a folder with its model (`model/`) and
`made.json`: seconds from text to model, the largest memory of a process, the exit code, the end of
the log. A start that is there is not made again, one that failed is listed with its error.

All starts are judged by `tokalign_jax.evaluate`: abilities, apart by how both tokenizers split the
question, fidelity, bits per byte of the corpus's kind of text and of another. `--budgets` also
trains each start on so many tokens in full (Stage 2 of this project) and judges the result.
Results: `rivals.md`, `rivals.json` and `rivals.png` (abilities against minutes).
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
    """Makes, judges and reports."""
    args, own = _arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    text = _plain_text(args, own)
    for start in _starts(args, own, text):
        _make(start, args.output)
    for name in [name for name in _made(args.output) if "+" not in name]:
        for budget in args.budgets:
            _make(_trained(args, own, name, budget), args.output)
    scores = _judge(args)
    rows = [_row(name, scores, args.output) for name in (SOURCE, *sorted(_attempted(args.output)))]
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
    parser.add_argument("--other-text", help="text of another kind")
    parser.add_argument("--abilities", required=True)
    parser.add_argument("--bytes-per-language", default="20000")
    parser.add_argument("--max-questions", default="0", help="of a suite; 0: all")
    parser.add_argument("--starts", default=",".join(names), help="comma-separated")
    parser.add_argument("--budgets", default="", help="tokens to train each start on: 1e6,4e6")
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


def _trained(args: argparse.Namespace, own: Sequence[str], start: str, budget: float) -> Start:
    """Stage 2 in full from a start, with its own cosine over so many tokens."""
    folder, model = args.output / f"{start}+{budget:.0f}", args.output / MODELS / start
    sequences, length = 32, 1024
    settings = {
        "source_model": model,
        "target_tokenizer": model,
        "alignment.method": "exact",
        "stage2.steps": max(1, round(budget / sequences / length)),
        "stage2.batch.size": sequences,
        "stage2.batch.sequence_length": length,
        "stage2.learning_rate": 1e-4,
    }
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    command = _run(args, own, folder / "run", *flags, "--stages=stage2,export")
    return Start(folder.name, command, folder / "run" / "export")


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


# --- Judging ------------------------------------------------------------------------------------


def _judge(args: argparse.Namespace) -> Mapping[str, Any]:
    """The scores of the source and of every model by name, all judged together."""
    names, file = _made(args.output), args.output / "judged" / "scores.json"
    if not file.exists() or len(json.loads(file.read_text())["models"]) != len(names) + 1:
        folders = [args.source, *(args.output / MODELS / name for name in names)]
        command = [
            sys.executable,
            "-m",
            "tokalign_jax.evaluate",
            f"--models={','.join(map(str, folders))}",
            f"--text={args.judge}",
            f"--language-field={args.language_field}",
            f"--bytes-per-language={args.bytes_per_language}",
            f"--abilities={args.abilities}",
            f"--max-questions={args.max_questions}",
            *([f"--other-text={args.other_text}"] if args.other_text else []),
            "--repeats=1",
            "--steps=4",
            f"--output={file.parent}",
            "--overwrite",
        ]
        print(f"judging {len(names)} starts", flush=True)
        subprocess.run(command, check=True, cwd=ROOT)
    models = json.loads(file.read_text(encoding="utf-8"))["models"]
    return dict(zip((SOURCE, *names), models.values(), strict=True))


def _row(name: str, scores: Mapping[str, Any], output: Path) -> dict[str, Any]:
    """The figures of a start; without scores why there is none."""
    made = output / name / MADE
    cost = json.loads(made.read_text(encoding="utf-8")) if made.exists() else {}
    row: dict[str, Any] = {"start": name}
    if cost:
        row |= {"minutes": cost["seconds"] / 60, "memory": cost["peak_bytes"]}
    if name not in scores:
        lines = cost.get("log", "").strip().splitlines() or ["not judged"]
        return row | {"failed": lines[-1][:300]}
    found = scores[name]
    cuts = found["abilities"].get("by_cut", {})
    fidelity = found.get("fidelity", {}).get("pooled", {})
    row["ability"] = found["abilities"]["mean"]["accuracy"]
    row |= {cut: cuts[cut]["accuracy"] for cut in cuts if cuts[cut]["questions"]}
    row |= {key: fidelity[key]["value"] for key in ("agreement", "divergence") if key in fidelity}
    languages = found["languages"]
    row |= {
        f"bits {key}": languages[key]["bits_per_byte"] for key in ("en", "code") if key in languages
    }
    row["bits all"] = found["pooled"]["bits_per_byte"]
    if "other_text" in found:
        row["bits other kind"] = found["other_text"]["pooled"]["bits_per_byte"]
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
    known = [row for row in rows if "ability" in row]
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
