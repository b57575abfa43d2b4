"""Retention of the source model: abilities, fidelity and bits per byte, as tables and warnings.

A state (or model) has the entries of its scores.json (docs/evaluation.md): `pooled`, and if
measured `abilities`, `chat`, `fidelity` and `other_text`. The first state is the source, which the
others are compared with.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tokalign_jax.evaluation import abilities
from tokalign_jax.reporting.pages import Cell, Section, Soft

States = Mapping[str, Mapping[str, Any]]

TITLE = "What the model retains"
_MEASURES = ("abilities", "chat", "fidelity", "other_text")
_FIDELITY = ("agreement", "divergence", "gap")
_NOTHING = ""
_EVERYTHING = "all"
_CUTS = {
    abilities.ALIKE: "split alike",
    abilities.QUESTION_ONLY: "question",
    abilities.COMPOSED: "new tokens",
    abilities.RECUT: "recut",
}
"""Titles of columns, by how both tokenizers split question and answer."""


def collect(scores: States) -> dict[str, dict[str, Any]]:
    """Return the entries of each state's scores.json that the tables show."""
    return {
        state: {name: entry[name] for name in ("pooled", *_MEASURES) if entry.get(name)}
        for state, entry in scores.items()
    }


def figures(entry: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of a state, by the columns of the table."""
    answers, fidelity = entry.get("abilities", {}), entry.get("fidelity", {}).get("pooled") or {}
    result = {"ability": answers["mean"]["accuracy"]} if answers else {}
    result |= {
        _CUTS[kind]: answers["by_cut"][kind]["accuracy"]
        for kind in _CUTS
        if kind in answers.get("by_cut", {})
    }
    result |= {
        name: fidelity[name]["value"]
        for name in _FIDELITY
        if fidelity and fidelity[name]["value"] is not None
    }
    if chat := entry.get("chat"):
        result |= {"chat": chat["right"]["value"], "turns ended": chat["ended"]["value"]}
    if "other_text" in entry:
        result["other text"] = entry["other_text"]["pooled"]["bits_per_byte"]
    return result


def sections(states: States, titled: Callable[[str], str] = str) -> list[Section]:
    """Return the overview, abilities by suite, fidelity and other text by language.

    Args:
      titled: returns the title of a state.
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
    """Warn of states that gain on the corpus but lose on other text, or lose abilities.

    Args:
      trained: the states of a run in order; each is compared with the one before.
      seed: of the bootstrap.
    """
    lines = []
    for before, after in itertools.pairwise(trained):
        step = f"warning: from {titled(before)} to {titled(after)}"
        old, new = states[before], states[after]
        bits, new_bits = _bits(old), _bits(new)
        other, new_other = _bits(old.get("other_text")), _bits(new.get("other_text"))
        if new_bits < bits and new_other > other:
            lines.append(
                f"{step} bits per byte of held-out text fall from {bits:.3f} to {new_bits:.3f}, "
                f"but those of other text rise from {other:.3f} to {new_other:.3f}: the model "
                "adapts to the corpus and forgets the rest"
            )
        lines += [f"{step} {loss}" for loss in _ability_losses(old, new, seed)]
    return lines


def _ability_losses(old: Mapping[str, Any], new: Mapping[str, Any], seed: int) -> Iterator[str]:
    """Yield a line if abilities fall significantly from one state to the next."""
    first, second = old.get("abilities"), new.get("abilities")
    if not (first and second and first["digest"] == second["digest"]):
        return
    change = abilities.change(first, second, seed)
    if "interval" in change and change["interval"][1] < 0:
        low, high = change["interval"]
        yield (
            f"abilities fall from {first['mean']['accuracy']:.3f} to "
            f"{second['mean']['accuracy']:.3f} "
            f"(95% interval of the difference: {low:+.3f} to {high:+.3f})"
        )


def _bits(entry: Mapping[str, Any] | None) -> float:
    """Return rounded bits per byte; 0 if not measured."""
    return round(entry["pooled"]["bits_per_byte"], 3) if entry else 0.0


# --- tables -------------------------------------------------------------------------------------


def _overview(states: States, titled: Callable[[str], str]) -> Section:
    has = {name: any(name in entry for entry in states.values()) for name in _MEASURES}
    source, *_ = states
    questions = _questions_by_cut(states)
    header = ["state"]
    if has["abilities"]:
        header += ["ability", f"minus {titled(source)}'s"]
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
            "Ability: accuracy on multiple-choice questions, mean over suites (by chance "
            f"{chance:.3f}), and the difference to the source on the same questions; then by how "
            "the two tokenizers split question and right answer (number of questions): alike, "
            "only the question differently, the answer with tokens that the source lacks, or the "
            "answer of shared tokens differently."
        )
    if has["fidelity"]:
        parts.append(
            "Agreement: share of shared token boundaries at which the likeliest continuation is "
            "the source's. Divergence (nats per chunk) and gap (bits per byte) between both "
            "models' likelihoods of the text between such boundaries: lower is better."
        )
    parts.append("In brackets 95% intervals.")
    return " ".join(parts)


def _mean(entry: Mapping[str, Any]) -> list[Cell]:
    answers = entry.get("abilities")
    if not answers:
        return [_NOTHING, _NOTHING]
    difference = answers.get("difference", {}).get("mean")
    accuracy = f"{answers['mean']['accuracy']:.3f}"
    return [accuracy, _signed(difference) if difference else _NOTHING]


def _questions_by_cut(states: States) -> dict[str, int | str]:
    """Return the number of questions of each kind; several numbers if tokenizers differ."""
    counts: dict[str, list[int]] = {}
    for entry in states.values():
        for kind, results in entry.get("abilities", {}).get("by_cut", {}).items():
            counts.setdefault(kind, []).append(results["questions"])
    distinct = {kind: list(dict.fromkeys(counts[kind])) for kind in _CUTS if kind in counts}
    return {
        kind: numbers[0] if len(numbers) == 1 else "/".join(map(str, numbers))
        for kind, numbers in distinct.items()
    }


def _by_cut(states: States, state: str, kind: str) -> Cell:
    """Return the accuracy on questions of a kind; the source's if the others agree on it."""
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
        row += [f"{answers['suites'][suite]['accuracy']:.3f}" for answers in answered.values()]
        if "difference" in final:
            row.append(_signed(final["difference"]["suites"][suite]))
        rows.append(row)
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
        difference, kept = (entry.get(name) or {"value": None} for name in ("difference", "kept"))
        rows.append(
            [
                titled(state),
                _with_interval(entry["right"]),
                _with_interval(difference, "+"),
                _with_interval(kept),
                _with_interval(entry["ended"]),
            ]
        )
    text = (
        f"{count:,} questions asked through the chat template, answered greedily: accuracy, the "
        "difference on the same questions, accuracy on those that the first model answers right, "
        "and the share of replies that ended their turn. In brackets 95% intervals."
    )
    first = titled(next(iter(measured)))
    header = ["state", "right", f"minus {first}'s", f"of {first}'s right", "ended its turn"]
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
            _figure(by_language.get(language, {}).get("agreement", {}).get("value"))
            for by_language in measured.values()
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
            *(f"{results[language]['bits_per_byte']:.3f}" for results in by_state.values()),
        ]
        for language, entry in next(iter(by_state.values())).items()
    ]
    text = "Bits per byte of out-of-domain text."
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
