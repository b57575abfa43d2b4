"""The result of a run: report.json, report.md and report.png, and the table on the terminal."""

import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from tokalign_jax.config import EXTEND, Config, config_to_dict
from tokalign_jax.evaluation.bits_per_byte import Score
from tokalign_jax.progress import Log, duration, quantity
from tokalign_jax.text.tokenizing import SIDES

TITLES = {
    "source": "source",
    "random": "random rows",
    "init": "initialised",
    "stage1": "stage 1",
    "stage2": "stage 2",
}
PACKAGES = ("tokalign_jax", "jax", "flax", "optax", "orbax-checkpoint", "transformers", "grain", "datasets", "numpy")
EVERYTHING = "all"
"""The row that pools the bytes of every language."""


def run(
    config: Config, workdir: Path, states: Sequence[str], identity: Mapping[str, str], folder: Path, log: Log
) -> dict[str, Any]:
    """Gathers what the stages left under `workdir`, writes the report into `folder` and prints its tables."""
    content = gather(config, workdir, states, identity)
    (folder / "report.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    (folder / "report.md").write_text(markdown(content))
    picture(content, folder / "report.png")
    for line in ("", *table(content), *warning_lines(content), "", *sample_lines(content), ""):
        log(line)
    return {"bits_per_byte": content["languages"][EVERYTHING]["bits_per_byte"], "folder": str(folder)}


def gather(config: Config, workdir: Path, states: Sequence[str], identity: Mapping[str, str]) -> dict[str, Any]:
    """Everything the report says, as one JSON-ready dict."""
    scores = {state: _read(workdir / "evaluate" / state / "scores.json") for state in states}
    after = next(s for s in states if s != "source")
    languages = {}
    for language in [*scores["source"]["languages"], EVERYTHING]:
        of = {state: pooled(scores[state]["languages"], language) for state in states}
        languages[language] = {
            "bytes": of["source"]["bytes"],
            "bytes_per_token": {
                "source": of["source"]["bytes_per_token"],
                "target": of[after]["bytes_per_token"],
            },
            "bits_per_byte": {state: of[state]["bits_per_byte"] for state in states},
        }
    if len(languages) == 2:
        languages = {EVERYTHING: languages[EVERYTHING]}
    records = _read(workdir / "stages.json")["stages"]
    trained = [s for s in states if (workdir / s / "metrics.jsonl").exists()]
    return {
        "run": dict(identity),
        "states": list(states),
        "languages": languages,
        "loses": {side: _read(workdir / "tokens" / side / "index.json")["loses"] for side in SIDES},
        "alignment": _read(workdir / "align" / "summary.json"),
        "training": {s: _curve(workdir / s / "metrics.jsonl") for s in trained},
        "samples": _side_by_side(scores),
        "seconds": {name: record["seconds"] for name, record in records.items() if "seconds" in record},
        "config": config_to_dict(config),
        "versions": {**{p: version(p) for p in PACKAGES}, "python": platform.python_version()},
        "devices": [str(d.device_kind) for d in jax.devices()],
    }


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed as a package"


def pooled(languages: Mapping[str, Mapping[str, float]], language: str) -> dict[str, float]:
    """Sums over one language, or over all of them."""
    chosen = (of for name, of in languages.items() if language in (name, EVERYTHING))
    scores = (Score(of["nats"], int(of["tokens"]), int(of["bytes"])) for of in chosen)
    return sum(scores, Score(0.0, 0, 0)).summary()


def _curve(path: Path) -> dict[str, Any]:
    """Loss over tokens from a metrics file, and its totals."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {
        "tokens": [row["tokens"] for row in rows],
        "loss": [row["loss"] for row in rows],
        "steps": len(rows),
        "skipped": rows[-1]["skipped"] if rows else 0,
    }


def _side_by_side(scores: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """Each prompt with its continuation by the source model and by the last state."""
    last = [s for s in scores if scores[s]["samples"]][-1]
    return [
        {"prompt": before["prompt"], "source": before["continuation"], last: after["continuation"]}
        for before, after in zip(scores["source"]["samples"], scores[last]["samples"], strict=True)
    ]


def table(content: Mapping[str, Any]) -> list[str]:
    """The main table: bytes per token and bits per byte, by language, as Markdown that is also readable on a terminal."""
    states = content["states"]
    header = [
        "language",
        "bytes/token source",
        "target",
        *(f"bits/byte {TITLES[s]}" if s == "source" else TITLES[s] for s in states),
    ]
    rows = []
    for language, of in content["languages"].items():
        per_token = of["bytes_per_token"]
        bits = [f"{of['bits_per_byte'][s]:.3f}" for s in states]
        rows.append([language, f"{per_token['source']:.2f}", f"{per_token['target']:.2f}", *bits])
    return _aligned(header, rows)


def _aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths)))
        return "| " + " | ".join([first, *others]) + " |"

    rule = "|" + "|".join([":" + "-" * (widths[0] + 1), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
    return [line(header), rule, *(line(row) for row in rows)]


def warning_lines(content: Mapping[str, Any]) -> list[str]:
    """A warning for each side whose tokenizer does not keep all of a text."""
    states = {"source": "the source model", "target": "the model with the new vocabulary"}
    return [
        f"warning: the {side} tokenizer does not keep {', '.join(lost)} of a text: bits per byte of {states[side]} are too low "
        f"to be compared with those of another tokenizer"
        for side, lost in content["loses"].items()
        if lost
    ]


def special_lines(special: Sequence[Mapping[str, Any]]) -> list[str]:
    """Special tokens and what their rows come from, as a Markdown table; nothing where the alignment does not say."""
    rows = [
        [_code(of["token"]), str(of["id"]), _code(of["source"]), of["why"], "yes" if of["in_chat_template"] else ""]
        for of in special
    ]
    return _aligned(["token", "id", "rows of", "because", "in the chat template"], rows) if rows else []


def _code(text: str) -> str:
    return f"`{text}`".replace("|", r"\|") if text else ""


def sample_lines(content: Mapping[str, Any]) -> list[str]:
    """The continued texts, one line each."""
    lines = []
    for sample in content["samples"]:
        last = next(s for s in reversed(list(sample)) if s not in ("prompt", "source"))
        lines.append(f"prompt        {_one_line(sample['prompt'])}")
        lines.append(f"  source      {_one_line(sample['source'])}")
        lines.append(f"  {TITLES[last]:<12}{_one_line(sample[last])}")
    return lines


def _one_line(text: str) -> str:
    return " ".join(text.split())


def markdown(content: Mapping[str, Any]) -> str:
    """The report for people."""
    run_of, alignment = content["run"], content["alignment"]
    rules = [
        [rule, f"{of['rows']:,}", f"{of['frequency']:.1%}"] for rule, of in alignment["rules"].items() if of["rows"]
    ]
    extends = run_of["target_tokenizer"] == EXTEND
    vocabulary = "an extended vocabulary" if extends else f"the vocabulary of {Path(run_of['target_tokenizer']).name}"
    special = special_lines(alignment.get("special", ()))
    parts = [
        f"# {Path(run_of['source_model']).name} with {vocabulary}",
        "Held-out text; bits per byte, lower is better, comparable across vocabularies because every one spells the same bytes.",
        "\n".join(table(content)),
        "\n\n".join(f"**{line}**" for line in warning_lines(content)),
        "![Loss over tokens, and bits per byte by language and stage](report.png)",
        "## Alignment",
        "\n".join(_aligned(["rule", "rows", "corpus frequency"], rules)),
        "\n".join(
            f"- {key.replace('_', ' ')}: {f'{value:,}' if isinstance(value, int) else f'{value:.3f}'}"
            for key, value in alignment.items()
            if isinstance(value, int | float)
        ),
        "\n".join(["### Special tokens", "", *special]) if special else "",
        "## Training",
        "\n".join(
            f"- {TITLES[s]}: {of['steps']} steps, {quantity(of['tokens'][-1] if of['tokens'] else 0)} tokens, "
            f"loss {_smooth(of['loss'])[-1]:.3f} (mean of the last 20 steps), {of['skipped']} steps skipped"
            for s, of in content["training"].items()
        ),
        "## Continued text",
        "```\n" + "\n".join(sample_lines(content)) + "\n```",
        "## Time and versions",
        "\n".join(f"- {name}: {duration(seconds)}" for name, seconds in content["seconds"].items()),
        ", ".join(f"{name} {version}" for name, version in content["versions"].items())
        + f"; on {', '.join(content['devices'])}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _smooth(losses: Sequence[float | None], window: int = 20) -> list[float]:
    """Mean of the last `window` losses; skipped steps have none."""
    finite = [math.nan if loss is None else loss for loss in losses]
    means = []
    for end in range(1, len(finite) + 1):
        recent = [loss for loss in finite[max(0, end - window) : end] if not math.isnan(loss)]
        means.append(sum(recent) / len(recent) if recent else math.nan)
    return means


def picture(content: Mapping[str, Any], path: Path) -> None:
    """Loss over tokens (left) and bits per byte by language and state (right)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(14, 5), layout="constrained")
    start = 0
    for state, curve in content["training"].items():
        tokens = [start + t for t in curve["tokens"]]
        (line,) = left.plot(tokens, curve["loss"], linewidth=0.8, alpha=0.35)
        left.plot(tokens, _smooth(curve["loss"]), label=TITLES[state], color=line.get_color(), linewidth=1.8)
        start += curve["tokens"][-1] if curve["tokens"] else 0
    left.set(title="Training loss", xlabel="tokens", ylabel="nats per token")
    if content["training"]:
        left.legend()
    left.grid(alpha=0.3)

    states, languages = content["states"], content["languages"]
    width = 0.8 / len(states)
    for i, state in enumerate(states):
        heights = [of["bits_per_byte"][state] for of in languages.values()]
        positions = [x + (i - (len(states) - 1) / 2) * width for x in range(len(languages))]
        right.bar(positions, heights, width, label=TITLES[state])
    right.set(title="Held-out text", ylabel="bits per byte", xticks=range(len(languages)), xticklabels=list(languages))
    right.legend(ncols=len(states), loc="upper center", bbox_to_anchor=(0.5, -0.08), frameon=False)
    right.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
