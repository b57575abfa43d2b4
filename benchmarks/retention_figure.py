"""Table and figure of retention over training tokens, from results of benchmarks/retention.py.

    python benchmarks/retention_figure.py 'Qwen3=runs/qwen3/retention.jsonl' \\
        'GPT-NeoX=runs/neox/retention.jsonl' --out docs/results/retention

Each argument is a label and a file; the figure has a row of panels for each. Training runs that
differ only in their number of tokens form a curve, which begins at their start. Writes OUT.md and
OUT.png.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

Row = Mapping[str, Any]
PANELS = (
    ("overall", "questions answered right, of the source's"),
    ("composed", "answers with new tokens, of the source's"),
    ("text", "in-domain bits per byte, of the source's"),
    ("other", "out-of-domain bits per byte, of the source's"),
    ("gap", "distance to the source, bits per byte"),
)
"""Column and title; means and bits per byte are divided by the source's."""
TITLES = {
    "mean": "mean",
    "overall": "all questions",
    "alike": "split alike",
    "question": "question",
    "composed": "new tokens",
    "recut": "split differently",
    "text": "bits/byte",
    "other": "out of domain",
    "gap": "distance",
}
"""Titles of the table by column, those of `retention.COLUMNS`. That module would import JAX."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", help="LABEL=FILE")
    parser.add_argument("--out", required=True, type=Path)
    arguments = parser.parse_args()
    measured = {}
    for label, _, name in (file.partition("=") for file in arguments.files):
        lines = Path(name).read_text(encoding="utf-8").splitlines()
        measured[label] = [json.loads(line) for line in lines]
    text = "\n\n".join(f"{label}\n\n{table(rows)}" for label, rows in measured.items())
    arguments.out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    figure(measured).savefig(arguments.out.with_suffix(".png"), dpi=120)
    print(text)


def table(rows: Sequence[Row]) -> str:
    """Format the rows as Markdown."""
    lines = [
        "| | tokens | " + " | ".join(TITLES.values()) + " |",
        "|---|" + "---:|" * (len(TITLES) + 1),
    ]
    for row in rows:
        tokens = f"{row['tokens'] / 1e6:.1f}M" if "training" in row else ""
        values = ["" if row.get(column) is None else f"{row[column]:.3f}" for column in TITLES]
        lines.append(f"| {' | '.join([row['name'], tokens, *values])} |")
    return "\n".join(lines)


def figure(measured: Mapping[str, Sequence[Row]]) -> Any:
    """Draw a row of panels for each label."""
    shape = len(measured), len(PANELS)
    result, axes = pyplot.subplots(
        *shape, figsize=(3.6 * shape[1], 3.2 * shape[0]), squeeze=False, layout="constrained"
    )
    colors: dict[str, Any] = {}
    for line, (label, rows) in zip(axes, measured.items()):
        source = rows[0]
        for place, (column, title) in zip(line, PANELS):
            unit = source.get(column) or 1.0
            for name, points in curves(rows).items():
                color = colors.setdefault(name, f"C{len(colors) % 10}")
                known = [(x, y[column] / unit) for x, y in points if y.get(column) is not None]
                place.plot(*zip(*known), marker="o", markersize=4, label=name, color=color)
            if column not in ("composed", "gap"):
                place.axhline(1.0, color="0.6", linestyle="--", linewidth=1)
            place.set_xscale("symlog", linthresh=1)
            place.set_xlim(-0.1)
            place.set_xticks([0, 1, 4, 16, 64], ["0", "1M", "4M", "16M", "64M"])
            place.set_title(title, fontsize=9)
            place.set_xlabel("tokens of training after the start", fontsize=8)
        line[0].set_ylabel(label)
    handles = {
        text: handle
        for place in axes.flat
        for handle, text in zip(*place.get_legend_handles_labels())
    }
    result.legend(handles.values(), handles, loc="outside lower center", ncols=4, fontsize=8)
    return result


def curves(rows: Sequence[Row]) -> dict[str, list[tuple[float, Row]]]:
    """Return (millions of tokens, row) of trainings that differ in tokens only, by their name."""
    starts = {row["name"]: row for row in rows if "training" not in row}
    found: dict[str, list[tuple[float, Row]]] = {}
    for row in rows:
        if row.get("start") not in starts:
            continue
        fields = {k: v for k, v in row["training"].items() if k not in ("steps", "seed")}
        name = f"{row['start']}, " + ", ".join(f"{k} {v}" for k, v in sorted(fields.items()))
        found.setdefault(name, [(0.0, starts[row["start"]])]).append((row["tokens"] / 1e6, row))
    return {name: sorted(points, key=lambda point: point[0]) for name, points in found.items()}


if __name__ == "__main__":
    main()
