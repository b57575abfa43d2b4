"""Tables and picture of `tokalign evaluate`: models side by side.

The content is that of its `scores.json` (docs/evaluation.md). The others are compared with the
first model.
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
"""Name of the row over the bytes of all languages."""
_NOTHING = "–"


def sections(content: Mapping[str, Any]) -> list[Section]:
    """Return a table for each kind of measurement."""
    return [
        _bits(content),
        *retention.sections(content["models"]),
        _tokens(content),
        _speed(content),
        *_drafting(content),
        *_alignment(content),
        *_tasks(content),
        *_overlap(content),
    ]


def warning_lines(content: Mapping[str, Any]) -> list[str]:
    """Return warnings of figures that are not comparable."""
    lost = [
        f"warning: the tokenizer of '{name}' does not keep {', '.join(entry['loses'])} of a text: "
        "its bits per byte are too low to be compared"
        for name, entry in content["models"].items()
        if entry["loses"]
    ]
    return [*lost, *(overlap.warning_lines(content["overlap"]) if "overlap" in content else [])]


def _rows(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return figures by language and, if there are several, over all of them."""
    return {
        **entry["languages"],
        **({EVERYTHING: entry["pooled"]} if len(entry["languages"]) > 1 else {}),
    }


def _bits(content: Mapping[str, Any]) -> Section:
    by_model = {name: _rows(entry) for name, entry in content["models"].items()}
    first, *others = by_model
    differences = {name: _rows(entry) for name, entry in content["differences"].items()}
    rows = []
    for language, entry in by_model[first].items():
        row: list[Cell] = [language, str(entry["documents"])]
        for model in by_model.values():
            row.append(_with_interval(f"{model[language]['bits_per_byte']:.3f}", model[language]))
        for name in others:
            difference = differences[name][language]
            row.append(_with_interval(f"{difference['difference']:+.3f}", difference, "+"))
        rows.append(row)
    text = (
        "Held-out text, lower is better. In brackets 95% intervals over documents; those of a "
        "difference are paired by document, and the difference is significant if they exclude 0. "
        "With few documents intervals are too narrow."
    )
    header = ["language", "documents", *by_model, *(f"{name} - {first}" for name in others)]
    return Section("Bits per byte", text, header, rows)


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
    text = (
        "Words are runs of letters, marks and digits; in scripts without spaces each character is "
        "a word."
    )
    header = ["language"]
    header += [f"bytes/token {name}" for name in models]
    header += [f"tokens/word {name}" for name in models]
    return Section("Tokens", text, header, rows)


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
        "Greedy decoding, one sequence at a time: median steps per second, in brackets the slowest "
        "and the fastest, times the characters (bytes) per token of the held-out text."
    )
    header = ["model", "steps/s", "characters/token", "characters/s", "bytes/s"]
    return Section("Speed", text, header, rows)


def _drafting(content: Mapping[str, Any]) -> Iterator[Section]:
    if "teacher" not in content:
        return
    for name, entry in content["models"].items():
        drafting = entry["drafting"]
        title = f"{name} as a draft model for {content['teacher']['name']}"
        if "not_comparable" in drafting:
            yield Section(title, f"Not comparable: {drafting['not_comparable']}.")
            continue
        rows: list[list[Cell]] = []
        for language, results in drafting["languages"].items():
            greedy, sampled = (results[mode] if results else {} for mode in ("greedy", "sampled"))
            parts = [
                _figure(entry.get(key), spec)
                for entry in (greedy, sampled)
                for key, spec in (("rate", ".1%"), ("tokens_per_call", ".2f"))
            ]
            rows.append([language, *parts])
        text = (
            f"Speculative decoding with {content['settings']['gamma']} drafted tokens per call. "
            "Greedy: acceptance rate on the teacher's own continuation, and tokens per call of the "
            f"teacher as counted. Sampled at temperature {content['settings']['temperature']:g}: "
            "expected acceptance rate on held-out text, and tokens per call if positions are "
            "independent."
        )
        header = ["language", "greedy", "tokens/call", "sampled", "tokens/call"]
        yield Section(title, text, header, rows)


def _alignment(content: Mapping[str, Any]) -> Iterator[Section]:
    if "alignment" not in content:
        return
    entry = content["alignment"]
    rows = [
        [
            language,
            str(scores["lines"]),
            f"{scores['bleu_1']:.3f}",
            f"{scores['similarity']:.3f}",
            _figure(scores["unrelated"], ".3f"),
        ]
        for language, scores in entry["languages"].items()
    ]
    text = (
        "Each token of a line by the target tokenizer is replaced by the source token of the "
        "alignment, and the result is compared with the line: BLEU-1 of the tokens "
        f"({entry['bleu_1']:.3f} over all), and the mean cosine of embeddings by "
        f"{entry['embedded_by']}, beside that of unrelated lines."
    )
    header = ["language", "lines", "BLEU-1", "similarity", "unrelated"]
    yield Section("Alignment", text, header, rows)


def _tasks(content: Mapping[str, Any]) -> Iterator[Section]:
    models = {name: entry["tasks"] for name, entry in content["models"].items() if "tasks" in entry}
    if not models:
        return
    names = dict.fromkeys(
        (task, metric)
        for tasks in models.values()
        for task, metrics in tasks.items()
        for metric in metrics
    )
    rows = []
    for task, metric in names:
        values = [tasks.get(task, {}).get(metric) for tasks in models.values()]
        cells = [_with_error(value) if value else _NOTHING for value in values]
        rows.append([task, metric, *cells])
    yield Section(
        "Tasks", "By lm-eval with PyTorch; ± standard error.", ["task", "metric", *models], rows
    )


def _overlap(content: Mapping[str, Any]) -> Iterator[Section]:
    if "overlap" not in content:
        return
    result = content["overlap"]
    rows = [
        [language, f"{entry['characters']:,}", f"{entry['share']:.1%}"]
        for language, entry in result["languages"].items()
    ]
    text = (
        f"Held-out characters in passages of at least {result['window']} characters that are in "
        "the training text, too."
    )
    yield Section("Overlap", text, ["language", "characters", "share"], rows)


def _with_interval(figure: str, entry: Mapping[str, Any], sign: str = "") -> Cell:
    if "interval" not in entry:
        return figure
    low, high = entry["interval"]
    return figure, Soft(f" [{low:{sign}.3f}, {high:{sign}.3f}]")


def _with_error(entry: Mapping[str, float]) -> Cell:
    error = entry["standard_error"]
    return f"{entry['value']:.3f}" + ("" if error is None else f" ±{error:.3f}")


def _figure(value: float | None, spec: str) -> str:
    return _NOTHING if value is None else f"{value:{spec}}"


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
        positions = [x + (i - (len(models) - 1) / 2) * width for x in range(len(languages))]
        heights = [row["bits_per_byte"] for row in rows]
        bars = {"yerr": _whiskers(rows), "error_kw": {"elinewidth": 1, "capsize": 2}}
        left.bar(positions, heights, width, label=name, **bars)
        right.bar(positions, [row["bytes_per_token"] for row in rows], width, label=name)
    left.set(title="Held-out text, 95% intervals", ylabel="bits per byte")
    right.set(title="Held-out text", ylabel="bytes per token")
    for axes in (left, right):
        axes.set(xticks=range(len(languages)), xticklabels=languages)
        axes.grid(axis="y", alpha=0.3)
    left.legend(ncols=len(models), loc="upper center", bbox_to_anchor=(0.5, -0.08), frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _whiskers(rows: Sequence[Mapping[str, Any]]) -> Float[np.ndarray, "2 N"]:
    """Return the lengths of intervals below and above their figures; NaN if there is none."""
    intervals = [row.get("interval", [math.nan, math.nan]) for row in rows]
    lengths = [
        (row["bits_per_byte"] - low, high - row["bits_per_byte"])
        for row, (low, high) in zip(rows, intervals)
    ]
    return np.maximum(np.transpose(lengths), 0.0)
