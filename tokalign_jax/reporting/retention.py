"""What a model keeps of its source: abilities, fidelity and bits per byte of each state, as tables
and warnings.

A state (or a model) is described by what its scores.json holds of it (docs/evaluation.md):
`pooled`, and where they were measured `abilities`, `fidelity` and `other_text`. The first state is
the source that the others are compared with.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tokalign_jax.evaluation import abilities
from tokalign_jax.reporting.pages import Cell, Section, Soft

States = Mapping[str, Mapping[str, Any]]

TITLE = "What the model keeps"
_MEASURES = ("abilities", "chat", "fidelity", "other_text")
_FIDELITY = ("agreement", "divergence", "gap")
_NOTHING = ""
_EVERYTHING = "all"
_CUTS = {
    abilities.ALIKE: "cut alike",
    abilities.QUESTION_ONLY: "question",
    abilities.COMPOSED: "new tokens",
    abilities.RECUT: "recut",
}
"""Columns of the kinds of cut."""


def gathered(scores: States) -> dict[str, dict[str, Any]]:
    """What the tables are made of, from each state's scores.json."""
    return {
        state: {name: entry[name] for name in ("pooled", *_MEASURES) if entry.get(name)}
        for state, entry in scores.items()
    }


def figures(entry: Mapping[str, Any]) -> dict[str, float]:
    """What one state keeps in single figures, by the columns of the table."""
    answers, faithful = entry.get("abilities", {}), entry.get("fidelity", {}).get("pooled") or {}
    found = {"ability": answers["mean"]["accuracy"]} if answers else {}
    found |= {
        _CUTS[kind]: answers["by_cut"][kind]["accuracy"]
        for kind in _CUTS
        if kind in answers.get("by_cut", {})
    }
    found |= {
        name: faithful[name]["value"]
        for name in _FIDELITY
        if faithful and faithful[name]["value"] is not None
    }
    if chat := entry.get("chat"):
        found |= {"chat": chat["right"]["value"], "turns ended": chat["ended"]["value"]}
    return found | (
        {"other text": entry["other_text"]["pooled"]["bits_per_byte"]}
        if "other_text" in entry
        else {}
    )


def sections(states: States, titled: Callable[[str], str] = str) -> list[Section]:
    """One table of everything, then abilities by suite, fidelity and other text by language.

    Args:
      titled: what a state is called in tables.
    """
    if not any(name in entry for entry in states.values() for name in _MEASURES):
        return []
    return [
        _overview(states, titled),
        *_suites(states, titled),
        *_chat(states, titled),
        *_fidelity(states, titled),
        *_other_text(states, titled),
    ]


def warning_lines(
    states: States, trained: Sequence[str], seed: int, titled: Callable[[str], str] = str
) -> list[str]:
    """Where a state reads the corpus better than the one before it, but other text worse, or
    answers fewer questions.

    Args:
      trained: the states that a run goes through, in order.
      seed: of the intervals' draws.
    """
    lines = []
    for before, after in itertools.pairwise(trained):
        step = f"warning: from {titled(before)} to {titled(after)}"
        (bits, new_bits), (other, new_other) = (
            [round(entry, 3) for entry in pair]
            for pair in (_bits(states, before, after), _bits(states, before, after, "other_text"))
        )
        if new_bits < bits and new_other > other:
            lines.append(
                f"{step} bits per byte of held-out text fall from {bits:.3f} to {new_bits:.3f}, "
                f"but those of other text rise from "
                f"{other:.3f} to {new_other:.3f}: the model adapts to the corpus and forgets the "
                f"rest"
            )
        one, another = (states[state].get("abilities") for state in (before, after))
        if one and another and one["digest"] == another["digest"]:
            change = abilities.change(one, another, seed)
            if "interval" in change and change["interval"][1] < 0:
                low, high = change["interval"]
                lines.append(
                    f"{step} abilities fall from {one['mean']['accuracy']:.3f} to "
                    f"{another['mean']['accuracy']:.3f} "
                    f"(95% interval of the difference: {low:+.3f} to {high:+.3f})"
                )
    return lines


def _bits(states: States, before: str, after: str, kind: str = "") -> list[float]:
    """Bits per byte of two states; 0 where they were not measured."""
    found = [states[state].get(kind, {}) if kind else states[state] for state in (before, after)]
    return [entry["pooled"]["bits_per_byte"] if entry else 0.0 for entry in found]


# --- tables -------------------------------------------------------------------------------------


def _overview(states: States, titled: Callable[[str], str]) -> Section:
    has = {name: any(name in entry for entry in states.values()) for name in _MEASURES}
    source, *_ = states
    questions = _questions_by_cut(states)
    header = ["state"]
    if has["abilities"]:
        header += ["ability", f"less {titled(source)}'s"]
        header += [f"{_CUTS[kind]} ({count})" for kind, count in questions.items()]
    header += _FIDELITY if has["fidelity"] else []
    header += ["bits/byte", *(["other text"] if has["other_text"] else [])]
    rows: list[list[Cell]] = []
    for state, entry in states.items():
        row: list[Cell] = [titled(state)]
        if has["abilities"]:
            row += [*_mean(entry), *(_by_cut(states, state, kind) for kind in questions)]
        if has["fidelity"]:
            row += _fidelity_cells(entry.get("fidelity", {}).get("pooled"))
        row.append(f"{entry['pooled']['bits_per_byte']:.3f}")
        if has["other_text"]:
            row.append(_figure(entry.get("other_text", {}).get("pooled", {}).get("bits_per_byte")))
        rows.append(row)
    return Section(TITLE, _explanation(states, has), header, rows)


def _explanation(states: States, has: Mapping[str, bool]) -> str:
    parts = []
    if has["abilities"]:
        chance = next(
            entry["abilities"]["chance"] for entry in states.values() if "abilities" in entry
        )
        parts.append(
            f"Ability: share of multiple-choice questions answered right, mean over suites (by "
            f"chance {chance:.3f}), and the "
            "difference on the same questions; then by how the two tokenizers cut question and "
            "right answer (number of questions): alike, "
            "only the question otherwise, the answer with tokens that the source lacks, or the "
            "answer of shared tokens cut otherwise."
        )
    if has["fidelity"]:
        parts.append(
            "Agreement: at how many shared boundaries of tokens the likeliest continuation is the "
            "source's. Divergence (nats a chunk) and "
            "gap (bits a byte) between both models' likelihoods of the text between such "
            "boundaries: lower is better."
        )
    parts.append("In brackets 95% intervals.")
    return " ".join(parts)


def _mean(entry: Mapping[str, Any]) -> list[Cell]:
    found = entry.get("abilities")
    if not found:
        return [_NOTHING, _NOTHING]
    less = found.get("difference", {}).get("mean")
    return [f"{found['mean']['accuracy']:.3f}", _signed(less) if less else _NOTHING]


def _questions_by_cut(states: States) -> dict[str, int | str]:
    """Questions of each kind; of models with different tokenizers all numbers."""
    found: dict[str, list[int]] = {}
    for entry in states.values():
        for kind, by in entry.get("abilities", {}).get("by_cut", {}).items():
            found.setdefault(kind, []).append(by["questions"])
    counts = {kind: list(dict.fromkeys(found[kind])) for kind in _CUTS if kind in found}
    return {
        kind: entry[0] if len(entry) == 1 else "/".join(map(str, entry))
        for kind, entry in counts.items()
    }


def _by_cut(states: States, state: str, kind: str) -> Cell:
    """Accuracy on questions of a kind; the source's where all others were cut alike."""
    own = states[state].get("abilities", {})
    if "by_cut" in own:
        return _figure(own["by_cut"].get(kind, {}).get("accuracy"))
    others = {
        entry["abilities"]["by_cut"].get(kind, {}).get("source") for entry in _compared(states)
    }
    return _figure(others.pop()) if own and len(others) == 1 else _NOTHING


def _compared(states: States) -> Iterator[Mapping[str, Any]]:
    return (entry for entry in states.values() if "by_cut" in entry.get("abilities", {}))


def _fidelity_cells(entry: Mapping[str, Any] | None) -> list[Cell]:
    return [_figure(entry[name]["value"]) if entry else _NOTHING for name in _FIDELITY]


def _suites(states: States, titled: Callable[[str], str]) -> Iterator[Section]:
    answered = {
        state: entry["abilities"] for state, entry in states.items() if "abilities" in entry
    }
    if not answered:
        return
    last, final = [*answered.items()][-1]
    first = next(iter(answered.values()))
    rows: list[list[Cell]] = []
    for suite, entry in first["suites"].items():
        row: list[Cell] = [suite, f"{entry['questions']:,}"]
        row += [f"{found['suites'][suite]['accuracy']:.3f}" for found in answered.values()]
        rows.append(
            [
                *row,
                *([_signed(final["difference"]["suites"][suite])] if "difference" in final else []),
            ]
        )
    header = ["suite", "questions", *map(titled, answered)]
    header += [f"{titled(last)} - {titled(next(iter(answered)))}"] if "difference" in final else []
    yield Section(
        "Abilities by suite", "Share of questions answered right.", header, rows, fold=True
    )


def _chat(states: States, titled: Callable[[str], str]) -> Iterator[Section]:
    measured = {state: entry["chat"] for state, entry in states.items() if "chat" in entry}
    if not measured:
        return
    count = next(iter(measured.values()))["questions"]
    rows: list[list[Cell]] = []
    for state, entry in measured.items():
        further = (entry.get(name) for name in ("difference", "kept"))
        difference, kept = (found or {"value": None} for found in further)
        row: list[Cell] = [titled(state), _with_interval(entry["right"])]
        row += [
            _with_interval(difference, "+"),
            _with_interval(kept),
            _with_interval(entry["ended"]),
        ]
        rows.append(row)
    text = (
        f"{count:,} questions asked through the chat template, answered greedily: the share "
        f"answered "
        "right, the difference on the same questions, the share right of those that the first "
        "model "
        "answers right, and the share of replies that ended their turn. In brackets 95% intervals."
    )
    first = titled(next(iter(measured)))
    header = ["state", "right", f"less {first}'s", f"of {first}'s right", "ended its turn"]
    yield Section("Chat", text, header, rows)


def _fidelity(states: States, titled: Callable[[str], str]) -> Iterator[Section]:
    measured = {
        state: entry["fidelity"]["languages"]
        for state, entry in states.items()
        if "fidelity" in entry
    }
    if not measured or len(next(iter(measured.values()))) < 2:
        return
    last, final = [*measured.items()][-1]
    rows: list[list[Cell]] = []
    for language, entry in final.items():
        row: list[Cell] = [language, f"{entry['chunks']:,}"]
        row += [
            _figure(found.get(language, {}).get("agreement", {}).get("value"))
            for found in measured.values()
        ]
        rows.append([*row, *(_with_interval(entry[name]) for name in ("divergence", "gap"))])
    header = ["language", "chunks", *(f"agreement {titled(state)}" for state in measured)]
    header += [f"{name} {titled(last)}" for name in ("divergence", "gap")]
    yield Section("Fidelity by language", "On held-out text.", header, rows, fold=True)


def _other_text(states: States, titled: Callable[[str], str]) -> Iterator[Section]:
    measured = {
        state: entry["other_text"] for state, entry in states.items() if "other_text" in entry
    }
    if not measured:
        return
    by_state = {
        state: {**entry["languages"], _EVERYTHING: entry["pooled"]}
        for state, entry in measured.items()
    }
    rows: list[list[Cell]] = [
        [
            language,
            f"{entry['bytes']:,}",
            *(f"{found[language]['bits_per_byte']:.3f}" for found in by_state.values()),
        ]
        for language, entry in next(iter(by_state.values())).items()
    ]
    text = "Bits per byte of text of another kind, which nothing was trained on."
    yield Section(
        "Other text", text, ["language", "bytes", *map(titled, by_state)], rows, fold=True
    )


def _signed(entry: Mapping[str, Any]) -> Cell:
    return _with_interval({**entry, "value": entry["difference"]}, "+")


def _with_interval(entry: Mapping[str, Any], sign: str = "") -> Cell:
    figure = _figure(entry["value"], sign)
    if "interval" not in entry:
        return figure
    low, high = entry["interval"]
    return figure, Soft(f" [{low:{sign}.3f}, {high:{sign}.3f}]")


def _figure(value: float | None, sign: str = "") -> str:
    return _NOTHING if value is None else f"{value:{sign}.3f}"
