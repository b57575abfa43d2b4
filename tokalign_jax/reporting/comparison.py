"""Comparison of runs, from their report.json: the settings that differ, and the results.

Runs that differ only in the seed form a group, with mean and spread. `compare` makes a JSON-ready
dict; `terminal`, `html` and `picture` show it.
"""

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tokalign_jax.config import Config, config_to_dict
from tokalign_jax.reporting import charts, curves, pages, retention
from tokalign_jax.reporting.curves import EVERYTHING, titled
from tokalign_jax.reporting.pages import Cell, Section, Soft
from tokalign_jax.reporting.run_page import Content, flat
from tokalign_jax.utils.progress import duration, quantity

Comparison = Mapping[str, Any]
"""Result of `compare`."""

SEED = "seed"
POINTS = 200
"""Maximum points of a group's curve."""
FEW = 8
"""Maximum number of groups with colours of their own; more are coloured by their rank."""


def compare(reports: Sequence[Content], names: Sequence[str] = ()) -> dict[str, Any]:
    """Compare runs by their settings and results.

    Args:
      reports: contents of report.json.
      names: names of the runs, such as their folders.

    Returns:
      `differs`: config fields, other than the seed, in which the runs differ; `states` and
      `languages` of any run; `warnings`: reasons why the runs may not be comparable; `groups`, best
      first by the last state's bits per byte, each with
        `name`: the fields that differ, with their values; `values`: the same by field; `runs`,
        `seeds`; `bits_per_byte`: by state and language `mean`, `spread` (standard deviation; None
        for a single run) and `values`; `kept`: by state `mean`, `spread` and `values` of abilities,
        fidelity and other text, if measured; `bytes_per_token`: of the new vocabulary, by language;
        `seconds` of the whole run (None if not reported) and `tokens_per_second` by training stage,
        as means; `training`: by stage `tokens` and the mean smoothed `loss`.
    """
    settings = [_settings(report) for report in reports]
    differs = [
        field
        for field in dict.fromkeys(field for entry in settings for field in entry)
        if field != SEED and len({json.dumps(entry.get(field)) for entry in settings}) > 1
    ]
    members: dict[str, list[int]] = {}
    for i, entry in enumerate(settings):
        members.setdefault(json.dumps([entry.get(field) for field in differs]), []).append(i)
    states = _ordered(report["states"] for report in reports)
    languages = _ordered(report["languages"] for report in reports)
    groups = []
    for indices in members.values():
        values = {field: settings[indices[0]].get(field) for field in differs}
        name = ", ".join(f"{field}={_value(value)}" for field, value in values.items())
        groups.append(
            {
                "name": name or "the same settings",
                "values": values,
                "runs": [names[i] if i < len(names) else f"run {i + 1}" for i in indices],
                "seeds": [settings[i].get(SEED) for i in indices],
                **_results([reports[i] for i in indices], states, languages),
            }
        )
    return {
        "differs": differs,
        "states": states,
        "languages": languages,
        "warnings": _warnings(reports),
        "groups": sorted(groups, key=_score),
    }


def _settings(report: Content) -> dict[str, Any]:
    """Return the config fields of a run; fields that its version lacked have their defaults."""
    defaults = flat(json.loads(json.dumps(config_to_dict(Config()))))
    return {**defaults, **flat(json.loads(json.dumps(report["config"])))}


def _ordered(lists: Iterable[Iterable[str]]) -> list[str]:
    """Merge lists of names into one, in the order of each as far as they agree; "all" last."""
    result: list[str] = []
    for names in lists:
        position = 0
        for name in names:
            if name in result:
                position = result.index(name) + 1
            else:
                result.insert(position, name)
                position += 1
    return sorted(result, key=lambda name: name == EVERYTHING)


def _results(
    reports: Sequence[Content], states: Sequence[str], languages: Sequence[str]
) -> dict[str, Any]:
    """Return the mean results of runs with the same settings."""
    stages = _ordered(report["training"] for report in reports)
    training = {
        stage: [entry for report in reports if (entry := report["training"].get(stage))]
        for stage in stages
    }
    speeds = {
        stage: [entry["tokens_per_second"] for entry in runs if "tokens_per_second" in entry]
        for stage, runs in training.items()
    }
    per_token = [
        {
            name: entry["bytes_per_token"]["target"]
            for name, entry in report["languages"].items()
            if "bytes_per_token" in entry
        }
        for report in reports
    ]
    # Reports of other versions may lack fields such as times.
    times = [sum(report["seconds"].values()) for report in reports if report.get("seconds")]
    bits = {state: _bits_per_byte(reports, state, languages) for state in states}
    kept = {state: _kept(reports, state) for state in states}
    return {
        "bits_per_byte": {state: entry for state, entry in bits.items() if entry},
        "kept": {state: entry for state, entry in kept.items() if entry},
        "bytes_per_token": {
            name: statistics.fmean(entry[name] for entry in per_token if name in entry)
            for name in _ordered(per_token)
        },
        "seconds": statistics.fmean(times) if times else None,
        "tokens_per_second": {
            stage: statistics.fmean(entry) for stage, entry in speeds.items() if entry
        },
        "training": {stage: _mean_curve(runs) for stage, runs in training.items()},
    }


def _bits_per_byte(
    reports: Sequence[Content], state: str, languages: Sequence[str]
) -> dict[str, dict[str, Any]]:
    result = {}
    for language in languages:
        entries = [report["languages"].get(language, {}) for report in reports]
        values = [entry.get("bits_per_byte", {}).get(state) for entry in entries]
        if measured := [value for value in values if value is not None]:
            result[language] = _statistics(measured)
    return result


def _kept(reports: Sequence[Content], state: str) -> dict[str, dict[str, Any]]:
    """Return abilities, fidelity and other text of a state, by the columns of their table."""
    # Reports of earlier versions lack them.
    entries = [report.get("kept", {}).get("states", {}).get(state, {}) for report in reports]
    figures = [retention.figures(entry) for entry in entries]
    return {
        name: _statistics([entry[name] for entry in figures if name in entry])
        for name in _ordered(figures)
    }


def _statistics(values: Sequence[float]) -> dict[str, Any]:
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "spread": spread, "values": list(values)}


def _mean_curve(runs: Sequence[Content]) -> dict[str, list[float]]:
    """Average the smoothed losses of runs, at the points of the longest curve."""
    smoothed = [curves.joined({"": entry}, points=POINTS)[""] for entry in runs]
    longest = max(smoothed, key=lambda curve: curve.tokens[-1] if curve.tokens else 0)
    means = []
    for tokens in longest.tokens:
        losses = [curves.at(curve, tokens) for curve in smoothed]
        finite = [loss for loss in losses if math.isfinite(loss)]
        means.append(statistics.fmean(finite) if finite else None)
    return {"tokens": longest.tokens, "loss": means}


def last_state(group: Mapping[str, Any]) -> str:
    """Return the last state that was measured."""
    return [*group["bits_per_byte"]][-1]


def _score(group: Mapping[str, Any]) -> float:
    """Return the sort key of a group; NaN comes last."""
    mean = group["bits_per_byte"][last_state(group)].get(EVERYTHING, {}).get("mean", math.nan)
    return mean if math.isfinite(mean) else math.inf


def _states(report: Content) -> Iterable[Mapping[str, Any]]:
    return report.get("kept", {}).get("states", {}).values()


def _warnings(reports: Sequence[Content]) -> list[str]:
    """Return reasons why results of these runs may not be comparable."""
    sizes = {
        json.dumps({name: entry.get("bytes") for name, entry in report["languages"].items()})
        for report in reports
    }
    # Different texts may have the same size; reports of earlier versions lack the digest.
    texts = {digest for report in reports if (digest := report.get("held_out"))}
    questions = {
        entry["abilities"]["digest"]
        for report in reports
        for entry in _states(report)
        if "abilities" in entry
    }
    devices = {", ".join(report["devices"]) for report in reports if report.get("devices")}
    warnings = []
    if max(len(sizes), len(texts)) > 1:
        warnings.append("the held-out text is not the same: bits per byte are not comparable")
    if len(questions) > 1:
        warnings.append("the questions are not the same: abilities are not comparable")
    if len(devices) > 1:
        kinds = "; ".join(sorted(devices))
        warnings.append(f"devices differ ({kinds}): so may times and rounding")
    if versions := _differing_versions(reports):
        warnings.append(f"versions differ: {', '.join(versions)}")
    return warnings


def _differing_versions(reports: Sequence[Content]) -> list[str]:
    entries = [report["versions"] for report in reports if report.get("versions")]
    by_package = {
        name: {entry.get(name) for entry in entries}
        for name in dict.fromkeys(name for entry in entries for name in entry)
    }
    return [
        f"{name} ({', '.join(sorted(map(str, versions)))})"
        for name, versions in by_package.items()
        if len(versions) > 1
    ]


# --- tables -------------------------------------------------------------------------------------


def sections(comparison: Comparison) -> list[Section]:
    """Return the tables: settings with results, retention, and results by language."""
    states = comparison["states"]
    languages = [name for name in comparison["languages"] if name != EVERYTHING]
    by_language = [
        _by_language(comparison, state, [*languages, EVERYTHING])
        for state in reversed(states if languages else [])
    ]
    return [_overview(comparison), *_kept_section(comparison), *by_language]


def _by_language(comparison: Comparison, state: str, languages: Sequence[str]) -> Section:
    rows = []
    for rank, group in enumerate(comparison["groups"], 1):
        if entries := group["bits_per_byte"].get(state):
            rows.append([f"{rank}", *(_figure(entries.get(name)) for name in languages)])
    title = f"Bits per byte by language: {titled(state)}"
    fold = state != comparison["states"][-1]
    return Section(title, "", ["#", *languages], rows, fold=fold)


def _overview(comparison: Comparison) -> Section:
    groups, differs = comparison["groups"], comparison["differs"]
    common = _common(comparison)
    states = [state for state in comparison["states"] if state not in common]
    stages = [s for s in states if any(s in group["tokens_per_second"] for group in groups)]
    has_seeds = any(len(group["runs"]) > 1 for group in groups)
    header = ["#", *differs, *(["seeds"] if has_seeds else []), *map(titled, states)]
    header += ["bytes/token", *(f"tokens/s {titled(s)}" for s in stages), "time"]
    rows: list[list[Cell]] = []
    for rank, group in enumerate(groups, 1):
        per_token, speeds = group["bytes_per_token"], group["tokens_per_second"]
        row: list[Cell] = [f"{rank}", *(_value(group["values"][field]) for field in differs)]
        row += [f"{len(set(group['seeds']))}"] if has_seeds else []
        row += [_figure(group["bits_per_byte"].get(s, {}).get(EVERYTHING)) for s in states]
        row.append(f"{per_token[EVERYTHING]:.2f}" if EVERYTHING in per_token else "")
        row += [quantity(speeds[s]) if s in speeds else "" for s in stages]
        rows.append([*row, "" if group["seconds"] is None else duration(group["seconds"])])
    count = sum(len(group["runs"]) for group in groups)
    text = [
        f"{count} runs, best first by the last state; bits per byte of all held-out text, lower "
        "is better."
    ]
    if has_seeds:
        text.append("Over several seeds: mean ± standard deviation.")
    if common:
        figures = ", ".join(f"{titled(state)} {bits:.3f}" for state, bits in common.items())
        text.append(f"In all of them: {figures}.")
    text += [f"Warning: {line}." for line in comparison["warnings"]]
    return Section("Settings and results", " ".join(text), header, rows)


def _kept_section(comparison: Comparison) -> Iterator[Section]:
    """Yield the table of abilities, fidelity and other text of each group's last state."""
    entries = [group["kept"].get(last_state(group), {}) for group in comparison["groups"]]
    columns = _ordered(entries)
    if columns:
        rows = [
            [f"{rank}", *(_figure(entry.get(name)) for name in columns)]
            for rank, entry in enumerate(entries, 1)
        ]
        text = (
            "The last state, as in the runs' reports. Abilities and agreement: higher is better; "
            "all others: lower is better."
        )
        yield Section(retention.TITLE, text, ["#", *columns], rows)


def _common(comparison: Comparison) -> dict[str, float]:
    """Return bits per byte of the source and random rows, if they are the same in all runs."""
    result = {}
    for state in [s for s in comparison["states"] if s in ("source", "random")]:
        values = {
            f"{value:.4f}"
            for group in comparison["groups"]
            for value in group["bits_per_byte"]
            .get(state, {})
            .get(EVERYTHING, {})
            .get("values", [math.nan])
        }
        if len(values) == 1:
            result[state] = float(*values)
    return result


def _figure(entry: Mapping[str, Any] | None) -> Cell:
    if not entry:
        return ""
    mean = f"{entry['mean']:.3f}"
    return mean if entry["spread"] is None else (mean, Soft(f" ±{entry['spread']:.3f}"))


def _value(value: Any) -> str:
    """Format the value of a setting."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    return "none" if value is None else str(value)


def terminal(comparison: Comparison) -> list[str]:
    """Render the comparison as lines of plain text, without the folded tables."""
    shown = [section for section in sections(comparison) if not section.fold]
    return pages.terminal([*shown, _runs(comparison)])


def _runs(comparison: Comparison) -> Section:
    """Return the table of seeds and runs of each group."""
    rows: list[Sequence[Cell]] = [
        (f"{rank}", ", ".join(map(_value, group["seeds"])), ", ".join(group["runs"]))
        for rank, group in enumerate(comparison["groups"], 1)
    ]
    return Section("Runs", "", ("#", "seed", "run"), rows)


# --- page and picture ---------------------------------------------------------------------------


def html(comparison: Comparison) -> str:
    """Render the comparison as an HTML page."""
    overview, *others = sections(comparison)
    chart = loss_chart(comparison)
    text = f"Mean of {curves.WINDOW} steps; the label of a curve is its rank in the table."
    if "target_tokenizer" in comparison["differs"]:
        text += " The tokenizers differ: their nats per token are not comparable."
    page = [
        overview,
        Section("Bits per byte by state", markup=_states_chart(comparison)),
        Section("Training loss", text if chart else "", markup=chart),
        *others,
        _runs(comparison),
    ]
    return pages.html("Comparison of runs", page, layout="broad")


def _states_chart(comparison: Comparison) -> str:
    """Draw a row per group, with the spread of the last state around its mean."""

    def dot(state: str, entry: Mapping[str, Any]) -> charts.Dot:
        spread = entry["spread"] if state == comparison["states"][-1] else None
        return charts.Dot(
            titled(state),
            entry["mean"],
            spread and (entry["mean"] - spread, entry["mean"] + spread),
        )

    rows = {
        _label(rank, group): [
            dot(state, entry[EVERYTHING])
            for state, entry in group["bits_per_byte"].items()
            if EVERYTHING in entry and state != "random"
        ]
        for rank, group in enumerate(comparison["groups"], 1)
    }
    return charts.dots(rows, description="Bits per byte by run and state")


def loss_chart(comparison: Comparison) -> str:
    """Draw the loss of each group over the tokens of all stages; "" if nothing was trained."""
    groups = comparison["groups"]
    drawn, keys, marks = [], [], []
    for rank, group in enumerate(groups, 1):
        name, colour = _label(rank, group), _colour(rank, len(groups))
        joined = curves.joined(group["training"], smoothed=False)
        marks += [mark for mark in curves.starts(joined) if mark not in marks]
        for stage, curve in joined.items():
            last = stage == [*joined][-1]
            style = f"stroke: {colour}; stroke-width: 1.75"
            drawn.append(charts.Curve(name, *curve, style=style, label=f"{rank}" if last else ""))
        line = f'<line x2="16" y1="5" y2="5" style="stroke: {colour}"/>'
        swatch = f'<svg width="16" height="10" aria-hidden="true">{line}</svg>'
        keys.append(f"<span>{swatch} {escape(name)}</span>")
    chart = charts.lines(
        drawn[::-1],
        description="Training loss of each run",
        x_label="tokens",
        y_label="nats per token",
        marks=marks,
        height=340,
    )
    legend = f'<figcaption class="keys">{"".join(keys)}</figcaption>' if len(groups) <= FEW else ""
    return f"<figure>{legend}{chart}</figure>" if chart else ""


def _label(rank: int, group: Mapping[str, Any]) -> str:
    """Return the label of a group in a chart: its rank and values, as in the table."""
    return f"{rank}  {' · '.join(map(_value, group['values'].values())) or group['name']}"


def _colour(rank: int, count: int) -> str:
    """Return the CSS colour of a group; of many groups, the lower the rank the paler."""
    if count <= FEW:
        return f"var(--colour{rank})"
    return (
        f"color-mix(in srgb, var(--accent) {100 - 80 * (rank - 1) / (count - 1):.0f}%, var(--line))"
    )


def picture(comparison: Comparison, path: Path) -> None:
    """Draw loss over tokens (left), and bits per byte by group and state (right)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = comparison["groups"]
    height = max(5.0, 1.5 + 0.32 * len(groups))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(16, height), layout="constrained")
    shades = pyplot.get_cmap("tab10" if len(groups) <= FEW else "viridis")
    states = [state for state in comparison["states"] if state != "random"]
    for y, group in enumerate(groups):
        colour = shades(y if len(groups) <= FEW else y / len(groups))
        for curve in curves.joined(group["training"], smoothed=False).values():
            left.plot(*curve, color=colour, linewidth=1.4)
        entry = {
            s: group["bits_per_byte"][s][EVERYTHING] for s in states if s in group["bits_per_byte"]
        }
        for i, (state, figures) in enumerate(entry.items()):
            style: dict[str, Any] = {"fmt": "o", "color": colour, "alpha": (i + 1) / len(entry)}
            if state == "source":
                style = {"fmt": "k|"}
            right.errorbar(figures["mean"], y, xerr=figures["spread"], markersize=8, **style)
    left.set(title="Training loss", xlabel="tokens", ylabel="nats per token")
    labels = [_label(rank, group) for rank, group in enumerate(groups, 1)]
    right.set(
        title=f"Bits per byte: {', '.join(map(titled, states))}",
        yticks=range(len(groups)),
        yticklabels=labels,
    )
    right.invert_yaxis()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
