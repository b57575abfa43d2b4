"""Several models side by side, as `evaluate.py` measures them: tables for the terminal and a
picture.

The content is that of its `scores.json` (docs/evaluation.md); the first model is the one that
others are compared with.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from tokalign_jax.evaluation import overlap
from tokalign_jax.reporting import retention
from tokalign_jax.reporting.pages import Cell, Section, Soft

EVERYTHING = "all"
"""The row that pools the bytes of every language."""
_NOTHING = "–"


def sections(content: Mapping[str, Any]) -> list[Section]:
    """All that was measured, one table each."""
    made = [
        _bits(content),
        *retention.sections(content["models"]),
        _tokens(content),
        _speed(content),
        *_drafting(content),
        *_alignment(content),
        *_tasks(content),
    ]
    return [*made, *_overlap(content)]


def warning_lines(content: Mapping[str, Any]) -> list[str]:
    """What a reader must know before comparing."""
    lost = [
        f"warning: the tokenizer of '{name}' does not keep {', '.join(entry['loses'])} of a text: "
        f"its bits per byte are too low to be compared"
        for name, entry in content["models"].items()
        if entry["loses"]
    ]
    return [*lost, *(overlap.warning_lines(content["overlap"]) if "overlap" in content else [])]


def _rows(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Languages and, behind them, all together where there are several."""
    return {
        **entry["languages"],
        **({EVERYTHING: entry["pooled"]} if len(entry["languages"]) > 1 else {}),
    }


def _bits(content: Mapping[str, Any]) -> Section:
    by_model = {name: _rows(entry) for name, entry in content["models"].items()}
    first, *others = by_model
    less = {name: _rows(entry) for name, entry in content["differences"].items()}
    rows = []
    for language, entry in by_model[first].items():
        figures = [
            _with_interval(
                f"{by_model[name][language]['bits_per_byte']:.3f}", by_model[name][language]
            )
            for name in by_model
        ]
        differences = [
            _with_interval(f"{less[name][language]['difference']:+.3f}", less[name][language], "+")
            for name in others
        ]
        rows.append([language, str(entry["documents"]), *figures, *differences])
    text = (
        "Held-out text, lower is better. In brackets 95% intervals over documents; that of a "
        "difference is of the same documents for both, "
        "and without 0 in it tells the two apart. Of few documents intervals are too narrow."
    )
    return Section(
        "Bits per byte",
        text,
        ["language", "documents", *by_model, *(f"{name} - {first}" for name in others)],
        rows,
    )


def _tokens(content: Mapping[str, Any]) -> Section:
    models = content["models"]
    rows = [
        [
            language,
            *(f"{_rows(entry)[language]['bytes_per_token']:.2f}" for entry in models.values()),
        ]
        + [_figure(_rows(entry)[language]["fertility"], ".2f") for entry in models.values()]
        for language in _rows(next(iter(models.values())))
    ]
    text = "Words are runs of letters, marks and digits; in scripts without spaces each character "
    text += "is one."
    return Section(
        "Tokens",
        text,
        ["language", *(f"bytes/token {n}" for n in models), *(f"tokens/word {n}" for n in models)],
        rows,
    )


def _speed(content: Mapping[str, Any]) -> Section:
    rows = []
    for name, entry in content["models"].items():
        speed = entry["generation"]
        spread = Soft(" [{:.1f}, {:.1f}]".format(*speed["slowest_and_fastest"]))
        rows.append(
            [
                name,
                (f"{speed['steps_per_second']:.1f}", spread),
                f"{speed['characters_per_token']:.2f}",
                f"{speed['characters_per_second']:.0f}",
                f"{speed['bytes_per_second']:.0f}",
            ]
        )
    text = (
        "Greedy decoding, one sequence at a time: the median of steps per second, in brackets the "
        "slowest and the fastest, times the "
        "characters (bytes) that a token has in the held-out text."
    )
    return Section(
        "Speed", text, ["model", "steps/s", "characters/token", "characters/s", "bytes/s"], rows
    )


def _drafting(content: Mapping[str, Any]) -> Iterator[Section]:
    if "teacher" not in content:
        return
    for name, entry in content["models"].items():
        title, found = f"{name} as a draft for {content['teacher']['name']}", entry["drafting"]
        if "not_comparable" in found:
            yield Section(title, f"Not comparable: {found['not_comparable']}.")
            continue
        rows: list[list[Cell]] = []
        for language, by in found["languages"].items():
            greedy, sampled = (by[how] if by else {} for how in ("greedy", "sampled"))
            parts = [
                _figure(entry.get(key), form)
                for entry in (greedy, sampled)
                for key, form in (("rate", ".1%"), ("tokens_per_call", ".2f"))
            ]
            rows.append([language, *parts])
        text = (
            f"Blocks of {content['settings']['gamma']} drafts. Greedy: how much of the teacher's "
            f"own continuation is accepted, "
            "and tokens a call of the teacher, counted out; sampled at temperature "
            f"{content['settings']['temperature']:g}: the expected acceptance on held-out text, "
            f"and tokens a call if positions are "
            "independent."
        )
        yield Section(
            title, text, ["language", "greedy", "tokens/call", "sampled", "tokens/call"], rows
        )


def _alignment(content: Mapping[str, Any]) -> Iterator[Section]:
    if "alignment" not in content:
        return
    entry = content["alignment"]
    rows = [
        [
            language,
            str(by["lines"]),
            f"{by['bleu_1']:.3f}",
            f"{by['similarity']:.3f}",
            _figure(by["unrelated"], ".3f"),
        ]
        for language, by in entry["languages"].items()
    ]
    text = (
        f"Lines cut by the target tokenizer, each token replaced by the source token that the "
        f"alignment names, against the line: BLEU-1 of "
        f"the tokens ({entry['bleu_1']:.3f} in all), and the mean cosine of embeddings by "
        f"{entry['embedded_by']}, beside that of unrelated lines."
    )
    yield Section(
        "Alignment", text, ["language", "lines", "BLEU-1", "similarity", "unrelated"], rows
    )


def _tasks(content: Mapping[str, Any]) -> Iterator[Section]:
    models = {name: entry["tasks"] for name, entry in content["models"].items() if "tasks" in entry}
    if not models:
        return
    known = {
        (task, metric): None
        for tasks in models.values()
        for task, metrics in tasks.items()
        for metric in metrics
    }
    rows = []
    for task, metric in known:
        found = [tasks.get(task, {}).get(metric) for tasks in models.values()]
        rows.append([task, metric, *(_with_error(entry) if entry else _NOTHING for entry in found)])
    yield Section(
        "Tasks", "By lm-eval with PyTorch; ± standard error.", ["task", "metric", *models], rows
    )


def _overlap(content: Mapping[str, Any]) -> Iterator[Section]:
    if "overlap" not in content:
        return
    found = content["overlap"]
    rows = [
        [language, f"{entry['characters']:,}", f"{entry['share']:.1%}"]
        for language, entry in found["languages"].items()
    ]
    text = f"Held-out characters in passages of {found['window']} or more that also stand in the "
    text += "training text."
    yield Section("Overlap", text, ["language", "characters", "share"], rows)


def _with_interval(figure: str, entry: Mapping[str, Any], sign: str = "") -> Cell:
    if "interval" not in entry:
        return figure
    low, high = entry["interval"]
    return figure, Soft(f" [{low:{sign}.3f}, {high:{sign}.3f}]")


def _with_error(entry: Mapping[str, float]) -> Cell:
    error = entry["standard_error"]
    return f"{entry['value']:.3f}" + ("" if error is None else f" ±{error:.3f}")


def _figure(value: float | None, form: str) -> str:
    return _NOTHING if value is None else f"{value:{form}}"


def picture(content: Mapping[str, Any], path: Path) -> None:
    """Draw bits per byte with intervals, and bytes per token, by language and model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = content["models"]
    languages = list(_rows(next(iter(models.values()))))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(14, 5), layout="constrained")
    width = 0.8 / len(models)
    for i, (name, entry) in enumerate(models.items()):
        rows = [_rows(entry)[language] for language in languages]
        places = [x + (i - (len(models) - 1) / 2) * width for x in range(len(languages))]
        heights = [row["bits_per_byte"] for row in rows]
        left.bar(
            places,
            heights,
            width,
            label=name,
            yerr=_whiskers(rows),
            error_kw={"elinewidth": 1, "capsize": 2},
        )
        right.bar(places, [row["bytes_per_token"] for row in rows], width, label=name)
    left.set(title="Held-out text, 95% intervals", ylabel="bits per byte")
    right.set(title="Held-out text", ylabel="bytes per token")
    for axes in (left, right):
        axes.set(xticks=range(len(languages)), xticklabels=languages)
        axes.grid(axis="y", alpha=0.3)
    left.legend(ncols=len(models), loc="upper center", bbox_to_anchor=(0.5, -0.08), frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _whiskers(rows: Sequence[Mapping[str, Any]]) -> Float[np.ndarray, "2 N"]:
    """How far intervals reach below and above; NaN where there is none."""
    ends = [row.get("interval", [math.nan, math.nan]) for row in rows]
    reach = [
        (row["bits_per_byte"] - low, high - row["bits_per_byte"])
        for row, (low, high) in zip(rows, ends)
    ]
    return np.maximum(np.transpose(reach), 0.0)
