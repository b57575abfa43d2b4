"""Report of a run: report.json, the pages made from it, report.png, and the terminal's tables."""

import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from tokalign_jax.config import Config, config_to_dict
from tokalign_jax.evaluation import overlap
from tokalign_jax.reporting import curves, retention, run_page
from tokalign_jax.reporting.curves import EVERYTHING, titled
from tokalign_jax.text.tokenizing import SIDES
from tokalign_jax.utils.progress import Log

PACKAGES = (
    "tokalign_jax",
    "jax",
    "flax",
    "optax",
    "orbax-checkpoint",
    "transformers",
    "grain",
    "datasets",
    "numpy",
)


def run(
    config: Config,
    workdir: Path,
    states: Sequence[str],
    identity: Mapping[str, str],
    folder: Path,
    log: Log,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the report of the run in `workdir` into `folder`, and log its tables.

    Args:
      extra: further content, such as `passages` (`token_pieces.of_passages`) and `inspection`
        (sections by `pages.to_json`).
    """
    content = gather(config, workdir, states, identity) | dict(extra or {})
    text = json.dumps(content, indent=1, ensure_ascii=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8", errors="replace")
    run_page.write(json.loads(text), folder)
    picture(content, folder / "report.png")
    lines = [
        *run_page.table(content),
        "",
        *([run_page.worth_line(content), ""] if "worth" in content else []),
        *run_page.kept_lines(content),
        *run_page.warning_lines(content),
    ]
    for line in ("", *lines, "", *run_page.sample_lines(content), ""):
        log(line)
    return {
        "bits_per_byte": content["languages"][EVERYTHING]["bits_per_byte"],
        "folder": str(folder),
    }


def gather(
    config: Config, workdir: Path, states: Sequence[str], identity: Mapping[str, str]
) -> dict[str, Any]:
    """Gather the results of the stages as a JSON-ready dict."""
    scores = {state: _read(workdir / "evaluate" / state / "scores.json") for state in states}
    overlaps = scores["source"]["overlap"]
    records = _read(workdir / "stages.json")["stages"]
    kept = retention.collect(scores)
    models = [state for state in states if state not in ("source", "random")]
    trained = [state for state in states if (workdir / state / "metrics.jsonl").exists()]
    return {
        "run": dict(identity),
        "states": list(states),
        "languages": _languages(scores),
        "kept": {
            "states": kept,
            "warnings": retention.warning_lines(kept, models, config.seed, titled),
        },
        "overlap": {**overlaps, "warnings": overlap.warning_lines(overlaps)},
        "loses": {side: _read(workdir / "tokens" / side / "index.json")["loses"] for side in SIDES},
        "alignment": _read(workdir / "align" / "summary.json"),
        "tuned": records["init"].get("summary", {}).get("tuned", {}),
        "training": {s: _curve(workdir / s / "metrics.jsonl") for s in trained},
        "samples": _side_by_side(scores),
        "seconds": {
            name: record["seconds"] for name, record in records.items() if "seconds" in record
        },
        "config": config_to_dict(config),
        "versions": {**{p: version(p) for p in PACKAGES}, "python": platform.python_version()},
        "devices": [str(d.device_kind) for d in jax.devices()],
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def version(package: str) -> str:
    """Return the version of a package, or that it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed as a package"


def _languages(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the figures of all states, by language and over all languages."""
    target = next(state for state in scores if state != "source")
    result = {}
    for language in figures(scores["source"]):
        entry = {state: figures(content)[language] for state, content in scores.items()}
        result[language] = {
            "bytes": entry["source"]["bytes"],
            "bytes_per_token": {
                "source": entry["source"]["bytes_per_token"],
                "target": entry[target]["bytes_per_token"],
            },
            "bits_per_byte": {state: entry[state]["bits_per_byte"] for state in scores},
            "interval": {
                state: entry[state]["interval"] for state in scores if "interval" in entry[state]
            },
        }
    return {EVERYTHING: result[EVERYTHING]} if len(result) == 2 else result


def figures(scores: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return a state's figures (from its scores.json) by language, and over all languages."""
    return {**scores["languages"], EVERYTHING: scores["pooled"]}


def _curve(path: Path) -> dict[str, Any]:
    """Read loss over tokens and totals from a metrics file; the throughput is the median step's."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {
        "tokens": [row["tokens"] for row in rows],
        "loss": [row["loss"] for row in rows],
        "validation": {
            key: [row[key] for row in rows if "validation_loss" in row]
            for key in ("step", "tokens", "validation_loss")
        },
        "steps": len(rows),
        "skipped": rows[-1]["skipped"] if rows else 0,
        "seconds": sum(row["seconds"] for row in rows),
        "tokens_per_second": statistics.median(row["tokens_per_second"] for row in rows)
        if rows
        else 0.0,
    }


def _side_by_side(scores: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return each prompt with its continuation by the source model and by the last state."""
    last = [state for state in scores if scores[state]["samples"]][-1]
    samples = zip(scores["source"]["samples"], scores[last]["samples"], strict=True)
    return [
        {"prompt": first["prompt"], "source": first["continuation"], last: second["continuation"]}
        for first, second in samples
    ]


def picture(content: Mapping[str, Any], path: Path) -> None:
    """Draw loss over tokens (left) and bits per byte by language and state (right)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(14, 5), layout="constrained")
    raw = curves.joined(content["training"], smoothed=False)
    for stage, smooth in curves.joined(content["training"]).items():
        (line,) = left.plot(*raw[stage], linewidth=0.8, alpha=0.35)
        left.plot(*smooth, label=titled(stage), color=line.get_color(), linewidth=1.8)
    for stage, validated in curves.validations(content["training"]).items():
        left.plot(*validated, "o--", markersize=3, label=f"{titled(stage)}, held-out text")
    left.set(title="Training loss", xlabel="tokens", ylabel="nats per token")
    if content["training"]:
        left.legend()
    left.grid(alpha=0.3)

    states, languages = content["states"], content["languages"]
    width = 0.8 / len(states)
    for i, state in enumerate(states):
        heights = [entry["bits_per_byte"][state] for entry in languages.values()]
        positions = [x + (i - (len(states) - 1) / 2) * width for x in range(len(languages))]
        right.bar(positions, heights, width, label=titled(state))
    right.set(
        title="Held-out text",
        ylabel="bits per byte",
        xticks=range(len(languages)),
        xticklabels=list(languages),
    )
    right.legend(ncols=len(states), loc="upper center", bbox_to_anchor=(0.5, -0.08), frameon=False)
    right.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
