"""Several runs side by side, from what their reports say (report.json): which settings differ, and
what came of it.

Runs that differ in nothing but the seed are one group, with mean and spread. `compare` makes a
JSON-ready dict; `terminal`, `html` and `picture` show it.
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
"""What `compare` returns."""

SEED = "seed"
POINTS = 200
"""Of a group's curve."""
FEW = 8
"""Groups that each have a colour of their own; more are coloured by their rank."""


def compare(reports: Sequence[Content], names: Sequence[str] = ()) -> dict[str, Any]:
    """What differs between runs, and what each of them measured.

    Args:
      reports: contents of report.json.
      names: of the runs, such as their folders.

    Returns:
      `differs`: names of the config's fields, other than the seed, that are not the same in all
      runs; `states` and `languages` of any run; `warnings`: why the runs may not be comparable;
      `groups`, best first by the last state's bits per byte, each with
        `name`: the fields that differ, with their values; `values`: the same by field; `runs`,
        `seeds`; `bits_per_byte`: by state and language `mean`, `spread` (standard deviation; None
        of a single run) and `values`; `kept`: by state `mean`, `spread` and `values` of abilities,
        fidelity and other text, where they were measured; `bytes_per_token`: of the new vocabulary,
        by language; `seconds`: of the whole run (None where no report has it), and
        `tokens_per_second` by training stage, as means; `training`: by stage `tokens` and smoothed
        `loss`, the mean of the runs that are that far.
    """
    settings = [_settings(report) for report in reports]
    differs = [
        field
        for field in dict.fromkeys(field for entry in settings for field in entry)
        if field != SEED and len({json.dumps(entry.get(field)) for entry in settings}) > 1
    ]
    grouped: dict[str, list[int]] = {}
    for i, entry in enumerate(settings):
        grouped.setdefault(json.dumps([entry.get(field) for field in differs]), []).append(i)
    states = _ordered(report["states"] for report in reports)
    languages = _ordered(report["languages"] for report in reports)
    groups = []
    for members in grouped.values():
        values = {field: settings[members[0]].get(field) for field in differs}
        made = _group([reports[i] for i in members], states, languages)
        runs = [names[i] if i < len(names) else f"run {i + 1}" for i in members]
        name = (
            ", ".join(f"{field}={_value(value)}" for field, value in values.items())
            or "the same settings"
        )
        seeds = [settings[i].get(SEED) for i in members]
        groups.append({"name": name, "values": values, "runs": runs, "seeds": seeds, **made})
    return {
        "differs": differs,
        "states": states,
        "languages": languages,
        "warnings": _unlike(reports),
        "groups": sorted(groups, key=_score),
    }


def _settings(report: Content) -> dict[str, Any]:
    """A run's fields; those that its version did not have yet are as they are by default."""
    defaults = flat(json.loads(json.dumps(config_to_dict(Config()))))
    return {**defaults, **flat(json.loads(json.dumps(report["config"])))}


def _ordered(lists: Iterable[Iterable[str]]) -> list[str]:
    """Every name once, in an order that each of the lists keeps where they agree; "all" last."""
    found: list[str] = []
    for names in lists:
        place = 0
        for name in names:
            if name in found:
                place = found.index(name) + 1
            else:
                found.insert(place, name)
                place += 1
    return sorted(found, key=lambda name: name == EVERYTHING)


def _group(
    reports: Sequence[Content], states: Sequence[str], languages: Sequence[str]
) -> dict[str, Any]:
    """What runs of the same settings measured."""

    def measured(state: str) -> dict[str, dict[str, Any]]:
        found = {}
        for language in languages:
            bits = [
                report["languages"].get(language, {}).get("bits_per_byte", {}).get(state)
                for report in reports
            ]
            if values := [entry for entry in bits if entry is not None]:
                found[language] = _statistics(values)
        return found

    stages = _ordered(report["training"] for report in reports)
    trained = {
        stage: [entry for report in reports if (entry := report["training"].get(stage))]
        for stage in stages
    }
    speeds = {
        stage: [entry["tokens_per_second"] for entry in runs if "tokens_per_second" in entry]
        for stage, runs in trained.items()
    }
    per_token = [
        {
            name: entry["bytes_per_token"]["target"]
            for name, entry in report["languages"].items()
            if "bytes_per_token" in entry
        }
        for report in reports
    ]
    # Reports of other versions, or made by other tools, may lack what is only told beside the
    # figures.
    times = [sum(report["seconds"].values()) for report in reports if report.get("seconds")]
    return {
        "bits_per_byte": {state: found for state in states if (found := measured(state))},
        "kept": {state: found for state in states if (found := _kept(reports, state))},
        "bytes_per_token": {
            name: statistics.fmean(entry[name] for entry in per_token if name in entry)
            for name in _ordered(per_token)
        },
        "seconds": statistics.fmean(times) if times else None,
        "tokens_per_second": {
            stage: statistics.fmean(entry) for stage, entry in speeds.items() if entry
        },
        "training": {stage: _mean_curve(runs) for stage, runs in trained.items()},
    }


def _kept(reports: Sequence[Content], state: str) -> dict[str, dict[str, Any]]:
    """What a state keeps, by the columns of the reports' tables; reports of a version before do not
    have it.
    """
    found = [
        retention.figures(report.get("kept", {}).get("states", {}).get(state, {}))
        for report in reports
    ]
    names = _ordered(found)
    return {name: _statistics([entry[name] for entry in found if name in entry]) for name in names}


def _statistics(values: Sequence[float]) -> dict[str, Any]:
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "spread": spread, "values": list(values)}


def _mean_curve(runs: Sequence[Content]) -> dict[str, list[float]]:
    """The mean of the runs' smoothed losses, at the tokens of the longest."""
    smoothed = [curves.joined({"": entry}, points=POINTS)[""] for entry in runs]
    longest = max(smoothed, key=lambda curve: curve.tokens[-1] if curve.tokens else 0)
    means = []
    for tokens in longest.tokens:
        known = [loss for curve in smoothed if math.isfinite(loss := curves.at(curve, tokens))]
        means.append(statistics.fmean(known) if known else None)
    return {"tokens": longest.tokens, "loss": means}


def last_state(group: Mapping[str, Any]) -> str:
    """The last state that was measured."""
    return [*group["bits_per_byte"]][-1]


def _score(group: Mapping[str, Any]) -> float:
    """What groups are sorted by; not a number comes last."""
    mean = group["bits_per_byte"][last_state(group)].get(EVERYTHING, {}).get("mean", math.nan)
    return mean if math.isfinite(mean) else math.inf


def _states(report: Content) -> Iterable[Mapping[str, Any]]:
    return report.get("kept", {}).get("states", {}).values()


def _unlike(reports: Sequence[Content]) -> list[str]:
    """Why figures of these runs may not be comparable."""
    text = {
        json.dumps({name: entry.get("bytes") for name, entry in report["languages"].items()})
        for report in reports
    }
    # Texts are cut at the same bytes of a language, so that their sizes do not tell them apart.
    # Older reports do not have it.
    digests = {digest for report in reports if (digest := report.get("held_out"))}
    answers = [
        entry["abilities"]["digest"]
        for report in reports
        for entry in _states(report)
        if "abilities" in entry
    ]
    devices = {", ".join(report["devices"]) for report in reports if report.get("devices")}
    known = [report["versions"] for report in reports if report.get("versions")]
    versions = {
        name: {entry.get(name) for entry in known}
        for name in dict.fromkeys(name for entry in known for name in entry)
    }
    several = [
        f"{name} ({', '.join(sorted(map(str, entry)))})"
        for name, entry in versions.items()
        if len(entry) > 1
    ]
    return [
        *(
            ["the held-out text is not the same: bits per byte are not comparable"]
            if max(len(text), len(digests)) > 1
            else []
        ),
        *(
            ["the questions are not the same: abilities are not comparable"]
            if len(set(answers)) > 1
            else []
        ),
        *(
            [f"devices differ ({'; '.join(sorted(devices))}): so may times and rounding"]
            if len(devices) > 1
            else []
        ),
        *([f"versions differ: {', '.join(several)}"] if several else []),
    ]


# --- tables -------------------------------------------------------------------------------------


def sections(comparison: Comparison) -> list[Section]:
    """The tables: what differs with the bits per byte of every state, then by language, the last
    state first.
    """
    groups, states = comparison["groups"], comparison["states"]
    languages = [name for name in comparison["languages"] if name != EVERYTHING]
    warnings = " ".join(f"Warning: {line}." for line in comparison["warnings"])
    made = [_overview(comparison, warnings), *_kept_section(comparison)]
    for state in reversed(states if languages else []):
        of_state = [
            (rank, group) for rank, group in enumerate(groups, 1) if state in group["bits_per_byte"]
        ]
        rows = [
            [
                f"{rank}",
                *(
                    _figure(group["bits_per_byte"][state].get(name))
                    for name in [*languages, EVERYTHING]
                ),
            ]
            for rank, group in of_state
        ]
        header = ["#", *languages, EVERYTHING]
        made.append(
            Section(
                f"Bits per byte by language: {titled(state)}",
                "",
                header,
                rows,
                fold=state != states[-1],
            )
        )
    return made


def _overview(comparison: Comparison, warnings: str) -> Section:
    groups, differs = comparison["groups"], comparison["differs"]
    same = _same(comparison)
    states = [state for state in comparison["states"] if state not in same]
    stages = [s for s in states if any(s in group["tokens_per_second"] for group in groups)]
    several = any(len(group["runs"]) > 1 for group in groups)
    header = ["#", *differs, *(["seeds"] if several else []), *map(titled, states)]
    header += ["bytes/token", *(f"tokens/s {titled(s)}" for s in stages), "time"]
    rows: list[list[Cell]] = []
    for rank, group in enumerate(groups, 1):
        row: list[Cell] = [f"{rank}", *(_value(group["values"][field]) for field in differs)]
        row += [f"{len(set(group['seeds']))}"] if several else []
        row += [_figure(group["bits_per_byte"].get(s, {}).get(EVERYTHING)) for s in states]
        row.append(
            f"{group['bytes_per_token'][EVERYTHING]:.2f}"
            if EVERYTHING in group["bytes_per_token"]
            else ""
        )
        row += [
            quantity(group["tokens_per_second"][s]) if s in group["tokens_per_second"] else ""
            for s in stages
        ]
        rows.append([*row, "" if group["seconds"] is None else duration(group["seconds"])])
    count = sum(len(group["runs"]) for group in groups)
    text = f"{count} runs, best first by the last state; bits per byte of all held-out text, lower "
    text += "is better."
    text += " Of several seeds: mean ± standard deviation." if several else ""
    text += (
        f" In all of them: {', '.join(f'{titled(s)} {bits:.3f}' for s, bits in same.items())}."
        if same
        else ""
    )
    return Section("What differs, and what came of it", f"{text} {warnings}".strip(), header, rows)


def _kept_section(comparison: Comparison) -> Iterator[Section]:
    """What the last state of each group keeps of its source."""
    found = [group["kept"].get(last_state(group), {}) for group in comparison["groups"]]
    columns = _ordered(found)
    if columns:
        rows = [
            [f"{rank}", *(_figure(entry.get(name)) for name in columns)]
            for rank, entry in enumerate(found, 1)
        ]
        text = "Of the last state, as in the runs' reports: abilities and agreement higher is "
        text += "better, all else lower is better."
        yield Section(retention.TITLE, text, ["#", *columns], rows)


def _same(comparison: Comparison) -> dict[str, float]:
    """Bits per byte of the states that were there before anything could differ, where they are the
    same in all runs.
    """
    found = {}
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
            found[state] = float(*values)
    return found


def _figure(entry: Mapping[str, Any] | None) -> Cell:
    if not entry:
        return ""
    mean = f"{entry['mean']:.3f}"
    return mean if entry["spread"] is None else (mean, Soft(f" ±{entry['spread']:.3f}"))


def _value(value: Any) -> str:
    """A setting as a person writes it."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    return "none" if value is None else str(value)


def terminal(comparison: Comparison) -> list[str]:
    """Lines of plain text: what differs, and the last state by language."""
    shown = [section for section in sections(comparison) if not section.fold]
    return pages.terminal([*shown, _runs(comparison)])


def _runs(comparison: Comparison) -> Section:
    """Where each group's figures come from."""
    rows: list[Sequence[Cell]] = [
        (f"{rank}", ", ".join(map(_value, group["seeds"])), ", ".join(group["runs"]))
        for rank, group in enumerate(comparison["groups"], 1)
    ]
    return Section("Runs", "", ("#", "seed", "from"), rows)


# --- page and picture ---------------------------------------------------------------------------


def html(comparison: Comparison) -> str:
    """A page by itself, as a report's."""
    overview, *others = sections(comparison)
    chart = loss_chart(comparison)
    text = f"Mean of {curves.WINDOW} steps, at the end of a curve its place in the table."
    if "target_tokenizer" in comparison["differs"]:
        text += " The tokenizers differ: their nats per token are not comparable."
    found = [
        overview,
        Section("Bits per byte by state", markup=_states_chart(comparison)),
        Section("Training loss", text if chart else "", markup=chart),
        *others,
        _runs(comparison),
    ]
    return pages.html("Runs side by side", found, layout="broad")


def _states_chart(comparison: Comparison) -> str:
    """A row for each group; the last state's spread is drawn to either side of its mean."""

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
    return charts.dots(rows, says="Bits per byte by run and state")


def loss_chart(comparison: Comparison) -> str:
    """Everybody's loss over the tokens of all stages; "" where nothing was trained."""
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
        says="Training loss of each run",
        x_label="tokens",
        y_label="nats per token",
        marks=marks,
        height=340,
    )
    legend = f'<figcaption class="keys">{"".join(keys)}</figcaption>' if len(groups) <= FEW else ""
    return f"<figure>{legend}{chart}</figure>" if chart else ""


def _label(rank: int, group: Mapping[str, Any]) -> str:
    """A group in a chart: its place in the table, and its values in the order of the table's
    columns.
    """
    return f"{rank}  {' · '.join(map(_value, group['values'].values())) or group['name']}"


def _colour(rank: int, count: int) -> str:
    """CSS of a group's colour: one of its own, or of many the paler the farther behind."""
    if count <= FEW:
        return f"var(--colour{rank})"
    return (
        f"color-mix(in srgb, var(--accent) {100 - 80 * (rank - 1) / (count - 1):.0f}%, var(--line))"
    )


def picture(comparison: Comparison, path: Path) -> None:
    """Loss over tokens (left), and bits per byte by group and state (right)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = comparison["groups"]
    height = max(5.0, 1.5 + 0.32 * len(groups))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(16, height), layout="constrained")
    shades = pyplot.get_cmap("tab10" if len(groups) <= FEW else "viridis")
    states = [state for state in comparison["states"] if state != "random"]
    for place, group in enumerate(groups):
        colour = shades(place if len(groups) <= FEW else place / len(groups))
        for curve in curves.joined(group["training"], smoothed=False).values():
            left.plot(*curve, color=colour, linewidth=1.4)
        entry = {
            s: group["bits_per_byte"][s][EVERYTHING] for s in states if s in group["bits_per_byte"]
        }
        for i, (state, figures) in enumerate(entry.items()):
            look = (
                {"fmt": "k|"}
                if state == "source"
                else {"fmt": "o", "color": colour, "alpha": (i + 1) / len(entry)}
            )
            right.errorbar(figures["mean"], place, xerr=figures["spread"], markersize=8, **look)
    left.set(title="Training loss", xlabel="tokens", ylabel="nats per token")
    labels = [_label(place + 1, group) for place, group in enumerate(groups)]
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
