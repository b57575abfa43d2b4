"""The result of a run: report.json, from which report.html and report.md are made, report.png, and
the table on the terminal.
"""

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
    shown: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Gathers what the stages left under `workdir`, writes the report into `folder` and prints its
    tables.

    Args:
      shown: what else the page shows: `passages` (`pieces.of_passages`), `inspection` (sections by
        `pages.to_json`).
    """
    content = gather(config, workdir, states, identity) | dict(shown or {})
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
    """Everything the report says of the stages, as one JSON-ready dict."""
    scores = {state: _read(workdir / "evaluate" / state / "scores.json") for state in states}
    copied = scores["source"]["overlap"]
    records = _read(workdir / "stages.json")["stages"]
    found, models = retention.gathered(scores), [s for s in states if s not in ("source", "random")]
    trained = [s for s in states if (workdir / s / "metrics.jsonl").exists()]
    return {
        "run": dict(identity),
        "states": list(states),
        "languages": _languages(scores),
        "kept": {
            "states": found,
            "warnings": retention.warning_lines(found, models, config.seed, titled),
        },
        "overlap": {**copied, "warnings": overlap.warning_lines(copied)},
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
    """Return a package's version, or say that it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed as a package"


def _languages(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What was measured of each state, by language and over all of them; intervals where a state
    has them.
    """
    after = next(s for s in scores if s != "source")
    found = {}
    for language in figures(scores["source"]):
        entry = {state: figures(content)[language] for state, content in scores.items()}
        found[language] = {
            "bytes": entry["source"]["bytes"],
            "bytes_per_token": {
                "source": entry["source"]["bytes_per_token"],
                "target": entry[after]["bytes_per_token"],
            },
            "bits_per_byte": {state: entry[state]["bits_per_byte"] for state in scores},
            "interval": {
                state: entry[state]["interval"] for state in scores if "interval" in entry[state]
            },
        }
    return {EVERYTHING: found[EVERYTHING]} if len(found) == 2 else found


def figures(scores: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What was measured of a state (its scores.json) by language, and over all of them."""
    return {**scores["languages"], EVERYTHING: scores["pooled"]}


def _curve(path: Path) -> dict[str, Any]:
    """Loss over tokens from a metrics file, and its totals; tokens per second are the median
    step's.
    """
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
    """Each prompt with its continuation by the source model and by the last state."""
    last = [s for s in scores if scores[s]["samples"]][-1]
    return [
        {"prompt": before["prompt"], "source": before["continuation"], last: after["continuation"]}
        for before, after in zip(scores["source"]["samples"], scores[last]["samples"], strict=True)
    ]


def picture(content: Mapping[str, Any], path: Path) -> None:
    """Loss over tokens (left) and bits per byte by language and state (right)."""
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
