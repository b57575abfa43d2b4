"""Page of a run, made from report.json alone: report.html, report.md and the terminal's tables.

    python -m tokalign_jax.reporting.run_page runs/demo/report/report.json

writes report.html and report.md beside the file again.
"""

import itertools
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tokalign_jax.config import EMBEDDED, EXTEND, PRUNE, Config, config_to_dict
from tokalign_jax.reporting import charts, curves, pages, retention
from tokalign_jax.reporting.curves import EVERYTHING, titled
from tokalign_jax.reporting.model_card import rules_section, short_name, special_section
from tokalign_jax.reporting.pages import Bar, Section, Soft
from tokalign_jax.utils.progress import duration, quantity

Content = Mapping[str, Any]
"""Content of report.json (`report.gather`, with additions by `stages.report`)."""

OPEN = ("Most frequent uncertain rows", "Worst rows")
"""Sections of the inspected alignment that are not folded."""

Figure = str | tuple[str, Soft]
"""A number, with its interval if it has one."""

COMMAND = "tokalign run --config=config.py --workdir=runs/again"


def write(content: Content, folder: Path) -> None:
    """Write report.html and report.md into `folder`."""
    for name, text in (("report.html", html(content)), ("report.md", markdown(content))):
        (folder / name).write_text(text, encoding="utf-8", errors="replace")


def html(content: Content) -> str:
    """Render the report as an HTML page."""
    return pages.html(
        heading(content),
        [
            _summary(content),
            _warnings(content),
            _scores(content),
            _worth(content),
            *_kept(content),
            _overlap(content),
            _training(content),
            _passages(content),
            _continuations(content),
            *_alignment(content),
            _time(content),
            _reproduce(content),
        ],
        layout="one",
    )


def markdown(content: Content) -> str:
    """Render the report as Markdown, with the picture and without charts."""
    continuations = "\n".join(sample_lines(content))
    parts = [
        f"# {pages.literal(heading(content))}",
        "\n\n".join(map(pages.literal, sentences(content))),
        "\n\n".join(f"**{pages.literal(line)}**" for line in warning_lines(content)),
        "\n".join(pages.markdown_table(*score_table(content))),
        pages.markdown([_worth(content), *_kept(content), _overlap(content)]),
        "![Loss over tokens, and bits per byte by language and stage](report.png)",
        pages.markdown([_training(content), *_alignment(content)]),
        f"## Continuations\n\n```\n{continuations}\n```" if continuations else "",
        pages.markdown([_time(content)]),
        f"## Reproduction\n\n`{COMMAND}` with config.py:\n\n```python\n{config_file(content)}```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


# --- Summary ------------------------------------------------------------------------------------


def heading(content: Content) -> str:
    """Return the title: the model and its new vocabulary."""
    config = content["config"]
    source, tokenizer = config["source_model"], config["target_tokenizer"]
    name = "The embedded model" if source == EMBEDDED else short_name(source)
    vocabulary = {
        EXTEND: "an extended vocabulary",
        PRUNE: "a pruned vocabulary",
        EMBEDDED: "the embedded vocabulary",
    }.get(tokenizer, f"the vocabulary of {short_name(tokenizer)}")
    return f"{name} with {vocabulary}"


def sentences(content: Content) -> list[str]:
    """Summarise the run: one sentence on its steps, one on the result."""
    return [_steps_sentence(content), _result_sentence(content)]


def _steps_sentence(content: Content) -> str:
    config, alignment, tuned = content["config"], content["alignment"], content.get("tuned", {})
    text = (
        f"The vocabulary of {alignment['source_size']:,} tokens became "
        f"{alignment['target_size']:,}; their rows were initialised by method "
        f"“{alignment['method']}”"
    )
    # Rows that did not improve stayed as they were.
    if tuned.get("nats_after", 0) < tuned.get("nats_before", 0):
        text += f", tuned together on {quantity(tuned['tokens'])} tokens"
    if tuned.get("loss_after", 0) < tuned.get("loss_before", 0):
        text += f" and with the source model as teacher on {quantity(tuned['tokens'])} tokens"
    stages = [
        f"{titled(stage)} ({config[stage]['method']}, {entry['steps']:,} "
        f"steps{_teacher(config[stage])})"
        for stage, entry in content["training"].items()
    ]
    if not stages:
        return f"{text}."
    listed = " and ".join(filter(None, [", ".join(stages[:-1]), stages[-1]]))
    return f"{text} and trained on {quantity(_tokens(content))} tokens in {listed}."


def _result_sentence(content: Content) -> str:
    entry, last = content["languages"][EVERYTHING], content["states"][-1]
    bits, per_token = entry["bits_per_byte"], entry["bytes_per_token"]
    text = (
        f"On held-out text a token now has {per_token['target']:.2f} bytes instead of "
        f"{per_token['source']:.2f}, and the model takes {bits[last]:.3f} bits per byte where the "
        f"source model takes {bits['source']:.3f}"
    )
    others = [
        f"{bits[state]:.3f} {when}"
        for state, when in (("init", "after initialisation"), ("random", "with random rows"))
        if state in bits and state != last
    ]
    return f"{text} ({', '.join(others)})." if others else f"{text}."


def _summary(content: Content) -> Section:
    entry, states = content["languages"][EVERYTHING], content["states"]
    bits, per_token = entry["bits_per_byte"], entry["bytes_per_token"]
    figures = [
        (
            f"{per_token['source']:.2f} → {per_token['target']:.2f}",
            "bytes per token, source and new vocabulary",
        ),
        (
            f"{bits['source']:.3f} → {bits[states[-1]]:.3f}",
            f"bits per byte, source and {titled(states[-1])}",
        ),
        (f"{per_token['source'] / per_token['target'] - 1:+.0%}", "tokens for the same text"),
        (quantity(_tokens(content)), "tokens of training text"),
    ]
    items = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{escape(figure)}</dd></div>" for figure, label in figures
    )
    return Section("", " ".join(sentences(content)), markup=f'<dl class="figures">{items}</dl>')


def _teacher(stage: Content) -> str:
    """Name the teacher of a stage; reports of earlier versions lack the field."""
    has_teacher = stage.get("teacher") and stage.get("weight")
    return f", distilled from {short_name(stage['teacher'])}" if has_teacher else ""


def _tokens(content: Content) -> int:
    """Return the number of training tokens of all stages."""
    return sum(entry["tokens"][-1] for entry in content["training"].values() if entry["tokens"])


def _devices(content: Content) -> str:
    kinds = content["devices"]
    return ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))


def warning_lines(content: Content) -> list[str]:
    """Return warnings: lost text, numbers, overlap, what states lose, and skipped steps."""
    states = {"source": "the source model", "target": "the model with the new vocabulary"}
    lost = [
        f"warning: the {side} tokenizer does not keep {', '.join(parts)} of a text: bits per byte "
        f"of {states[side]} are too low to be compared with those of another tokenizer"
        for side, parts in content["loses"].items()
        if parts
    ]
    skipped = [
        f"warning: {entry['skipped']} of {entry['steps']} steps of {titled(stage)} were not finite"
        " and were skipped"
        for stage, entry in content["training"].items()
        if entry["skipped"]
    ]
    others = [content.get(part, {}).get("warnings", ()) for part in ("overlap", "kept")]
    return [*lost, *filter(None, [content.get("numbers")]), *itertools.chain(*others), *skipped]


def _warnings(content: Content) -> Section:
    lines = "".join(f"<p>{escape(line)}</p>" for line in warning_lines(content))
    return Section("", markup=f'<div class="warning" role="note">{lines}</div>' if lines else "")


# --- Results ------------------------------------------------------------------------------------


def score_table(content: Content) -> tuple[list[str], list[list[Figure]]]:
    """Return header and rows of bytes per token and bits per byte with intervals, by language."""
    states = content["states"]
    columns = [f"bits/byte {titled(s)}" if s == "source" else titled(s) for s in states]
    rows: list[list[Figure]] = []
    for language, entry in content["languages"].items():
        per_token, intervals = entry["bytes_per_token"], entry.get("interval", {})
        bits = [_with_interval(entry["bits_per_byte"][s], intervals.get(s)) for s in states]
        rows.append([language, f"{per_token['source']:.2f}", f"{per_token['target']:.2f}", *bits])
    return ["language", "bytes/token source", "target", *columns], rows


def _with_interval(value: float, interval: Sequence[float] | None) -> Figure:
    if not interval:
        return f"{value:.3f}"
    low, high = interval
    return (f"{value:.3f}", Soft(f" [{low:.3f}, {high:.3f}]"))


def table(content: Content) -> list[str]:
    """Return the main table for a terminal, without intervals."""
    header, rows = score_table(content)
    return pages.markdown_table(
        header, [[cell if isinstance(cell, str) else cell[0] for cell in row] for row in rows]
    )


def _scores(content: Content) -> Section:
    text = (
        "Held-out text; lower is better. Comparable across vocabularies, because every one spells "
        "the same bytes."
    )
    if any(entry.get("interval") for entry in content["languages"].values()):
        text += " In brackets: 95% intervals."
    if "random" in content["states"]:
        text += " Random rows are in the table only."
    # Intervals of the states between these would overlap.
    ends = (content["states"][0], content["states"][-1])
    rows = {
        language: [
            charts.Dot(titled(s), bits, entry.get("interval", {}).get(s) if s in ends else None)
            for s, bits in entry["bits_per_byte"].items()
            if s != "random"  # its scale would hide the differences of the others
        ]
        for language, entry in content["languages"].items()
    }
    chart = charts.dots(rows, description="Bits per byte by language and state")
    return Section("Bits per byte", text, *score_table(content), markup=chart)


def _worth(content: Content) -> Section:
    """Return the estimate of speed and size; reports of earlier versions lack it."""
    worth = content.get("worth")
    if not worth:
        return Section("")
    sides = "source", "target"
    per_token, sizes, rows = worth["characters_per_token"], worth["bytes"], worth["rows"]
    lines = [
        ("rows of the vocabulary", *(f"{rows[side]:,}" for side in sides), _change(rows)),
        ("characters/token", *(f"{per_token[side]:.2f}" for side in sides), _change(per_token)),
        ("size of the model", *(f"{quantity(sizes[side])}B" for side in sides), _change(sizes)),
    ]
    for name in ("generation", "training"):
        rates = worth[name].get("characters_per_second")
        cells = [f"{quantity(rates[side])}" if rates else "" for side in sides]
        lines.append((f"characters/s, {name}", *cells, f"{worth[name]['change']:+.0%}"))
    limits = {name: worth[name]["largest_vocabulary"] for name in ("generation", "training")}
    text = (
        "Estimated, not measured: generation of a single sequence by the bytes of weights read per "
        "token (without the KV cache), full training by the FLOPs per token. For text that is "
        "split as this vocabulary splits it, generation is faster than with the source's up to "
        f"{limits['generation']:,} rows, training up to {limits['training']:,}."
    )
    header = ("", "source", "new vocabulary", "change")
    return Section("Is it worth it?", text, header, lines)


def worth_line(content: Content) -> str:
    """Return the estimate as a line for a terminal; "" if it is missing."""
    worth = content.get("worth")
    if not worth:
        return ""
    changes = {name: f"{worth[name]['change']:+.0%}" for name in ("generation", "training")}
    return (
        f"characters/s (estimated): generation {changes['generation']}, training "
        f"{changes['training']}; size of the model {_change(worth['bytes'])}"
    )


def _change(values: Mapping[str, float]) -> str:
    return f"{values['target'] / values['source'] - 1:+.0%}"


def _kept(content: Content) -> list[Section]:
    """Return the tables of retention; reports of earlier versions lack them."""
    return retention.sections(content["kept"]["states"], titled) if "kept" in content else []


def kept_lines(content: Content) -> list[str]:
    """Return the tables of retention for a terminal, without the folded ones."""
    shown = [section for section in _kept(content) if not section.fold]
    return [*pages.terminal(shown), ""] if shown else []


def _overlap(content: Content) -> Section:
    overlap = content.get("overlap")
    if not overlap:
        return Section("")
    text = f"In passages of {overlap['window']} characters or more."
    rows = [
        (language, f"{entry['share']:.2%}", Bar(entry["share"]))
        for language, entry in overlap["languages"].items()
    ]
    title = "Held-out text that is in the training text"
    return Section(title, text, ("language", "share", ""), rows, fold=True)


def _training(content: Content) -> Section:
    training, config = content["training"], content["config"]
    rows = [
        (
            titled(stage),
            config[stage]["method"],
            f"{entry['steps']:,}",
            quantity(entry["tokens"][-1] if entry["tokens"] else 0),
            _rate(config[stage]),
            f"{curves.smooth(entry['loss'])[-1]:.3f}" if entry["loss"] else "",
            _lowest_validation(entry),
            f"{entry['skipped']}",
            quantity(entry["tokens_per_second"]) if "tokens_per_second" in entry else "",
            duration(content["seconds"].get(stage, 0)),
        )
        for stage, entry in training.items()
    ]
    header = (
        "stage",
        "trains",
        "steps",
        "tokens",
        "rate",
        "last loss",
        "lowest validation loss",
        "skipped",
        "tokens/s",
        "time",
    )
    text = (
        f"Loss in nats per token, each step's and the mean of {curves.WINDOW} steps; dashed:"
        " next-token loss on held-out text."
        if rows
        else ""
    )
    return Section("Training", text, header, rows, markup=loss_chart(training))


def _lowest_validation(entry: Content) -> str:
    """Format the lowest validation loss of a stage and its step."""
    measured = entry.get("validation", {})
    losses = zip(measured.get("validation_loss", ()), measured.get("step", ()))
    lowest = min(((loss, step) for loss, step in losses if loss is not None), default=None)
    return f"{lowest[0]:.3f} (step {lowest[1]:,})" if lowest else ""


def _rate(stage: Content) -> str:
    """Format the peak rate, and that of embedding and head if it is another one."""
    rows = stage["embedding_learning_rate"]
    return f"{stage['learning_rate']:g}" + ("" if rows is None else f", rows {rows:g}")


def loss_chart(training: Content) -> str:
    """Draw the loss over the tokens of all stages; "" if nothing was trained."""
    raw, smooth = curves.joined(training, smoothed=False), curves.joined(training)
    faint = "stroke: var(--accent); stroke-width: 1; stroke-opacity: .3"
    drawn = [charts.Curve(titled(s), *curve) for s, curve in smooth.items()]
    drawn += [
        charts.Curve(titled(s), *curve, style=faint, sets_axes=False) for s, curve in raw.items()
    ]
    dashed = "stroke: var(--accent); stroke-width: 2; stroke-dasharray: 5 4"
    validated = {
        f"{titled(s)} on held-out text": curve for s, curve in curves.validations(training).items()
    }
    drawn += [charts.Curve(name, *curve, style=dashed) for name, curve in validated.items()]
    last = {titled(s): curve.loss[-1] for s, curve in smooth.items() if curve.loss}
    last |= {name: curve.loss[-1] for name, curve in validated.items()}
    ends = ", ".join(f"{name}: {loss:.3f}" for name, loss in last.items())
    return charts.lines(
        drawn,
        description=f"Training loss over tokens. At the end of {ends}",
        x_label="tokens",
        y_label="nats per token",
        marks=curves.starts(smooth),
    )


# --- Texts --------------------------------------------------------------------------------------


def _passages(content: Content) -> Section:
    """Show the same text, tokenised by both tokenizers."""
    markup = "\n".join(
        f'<div class="sides">{_tokenized(entry, "source")}\n{_tokenized(entry, "target")}</div>'
        for entry in content.get("passages", ())
        if entry["source"]
    )
    text = (
        "Held-out passages; colours alternate by token. A small figure is the number of tokens "
        "that share a character."
    )
    return Section("The same text in tokens", text if markup else "", markup=markup)


def _tokenized(entry: Content, side: str) -> str:
    count = sum(tokens for _, tokens in entry[side])
    starts = [text[:1] for text, _ in entry[side][1:]] + [""]
    spans = "".join(
        f"<span>{_text(text, start)}{f'<sup>{tokens}</sup>' if tokens > 1 else ''}</span>"
        for (text, tokens), start in zip(entry[side], starts)
    )
    name = {"source": "source tokenizer", "target": "new tokenizer"}[side]
    return (
        f"<div><h3>{escape(entry['language'])} <small>{name}: {count} tokens</small></h3>"
        f'<p class="pieces" dir="auto"{_language(entry["language"])}>{spans}</p></div>'
    )


def _language(name: str) -> str:
    """Return the attribute `lang` of an HTML element, if `name` looks like a language code."""
    is_code = name.isascii() and name.islower() and name.isalpha() and len(name) == 2
    return f' lang="{name}"' if is_code else ""


_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}


def _text(text: str, following: str = "") -> str:
    """Escape text for HTML, with visible line ends and control characters."""
    shown = escape(text.translate(_PICTURES).encode("utf-8", "replace").decode())
    broken = re.sub(r"\n+", lambda ends: "↵" * len(ends[0]) + "<br>", shown)
    return broken.removesuffix("<br>") if following == "\n" else broken


def _continuations(content: Content) -> Section:
    """Show each prompt with its continuation by the source model and the last state."""
    blocks = []
    for sample in content["samples"]:
        sides = "\n".join(
            f'<div><h3><small>{escape(titled(state))}</small></h3><p class="text" dir="auto">'
            f"<q>{_text(sample['prompt'])}</q>{_text(text)}</p></div>"
            for state, text in sample.items()
            if state != "prompt"
        )
        blocks.append(f'<div class="sides">{sides}</div>')
    text = "The models continue the marked text greedily."
    return Section("Continuations", text if blocks else "", markup="\n".join(blocks))


def sample_lines(content: Content) -> list[str]:
    """Return prompts and continuations, a line each."""
    lines = []
    for sample in content["samples"]:
        lines.append(f"prompt        {_one_line(sample['prompt'])}")
        lines += [
            f"  {titled(s):<12}{_one_line(text)}" for s, text in sample.items() if s != "prompt"
        ]
    return lines


def _one_line(text: str) -> str:
    return " ".join(text.split())


# --- Alignment ----------------------------------------------------------------------------------


def _alignment(content: Content) -> Iterator[Section]:
    """Yield tables of the alignment: its rules and figures, then those of the inspection."""
    alignment = content["alignment"]
    figures = [
        (key.replace("_", " "), f"{value:,}" if isinstance(value, int) else f"{value:.3f}")
        for key, value in alignment.items()
        if isinstance(value, int | float)
    ]
    inspected = [pages.from_json(section) for section in content.get("inspection", ())]
    rules = next((section for section in inspected if section.title == "Rules"), None)
    rows = rules_section(alignment["rules"])
    yield Section(rows.title, rules.text if rules else "", rows.header, rows.rows)
    yield Section("Figures of the alignment", rows=figures)
    yield special_section(alignment.get("special", ()))
    for section in inspected:
        if section is not rules:
            fold = section.title not in OPEN
            yield Section(section.title, section.text, section.header, section.rows, fold=fold)


# --- Reproduction -------------------------------------------------------------------------------


def _time(content: Content) -> Section:
    seconds, versions = content["seconds"], content["versions"]
    longest = max(seconds.values(), default=0) or 1
    rows = [(name, duration(entry), Bar(entry / longest)) for name, entry in seconds.items()]
    date = f", {content['date']}" if "date" in content else ""
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    text = f"{duration(sum(seconds.values()))} on {_devices(content)}{date}; {packages}."
    return Section("Time and versions", text, ("stage", "time", ""), rows)


def _reproduce(content: Content) -> Section:
    text = "Save this as config.py. All other fields have the defaults of the version named above."
    markup = f"<pre>{escape(COMMAND)}</pre>\n<pre>{escape(config_file(content))}</pre>"
    return Section("Reproduction", text, markup=markup)


def config_file(content: Content) -> str:
    """Return a config file with the fields that differ from the defaults."""
    defaults = flat(json.loads(json.dumps(config_to_dict(Config()))))
    changed = [
        f"    config.{name} = {tuple(value) if isinstance(value, list) else value!r}\n"
        for name, value in flat(content["config"]).items()
        if value != defaults.get(name, ...)
    ]
    return (
        "from tokalign_jax.config import default_config\n\n\ndef get_config():\n    config = "
        "default_config()\n" + "".join(changed) + "    return config\n"
    )


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the fields of a config by their dotted names."""
    fields = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            fields |= flat(value, f"{prefix}{name}.")
        else:
            fields[f"{prefix}{name}"] = value
    return fields


def main(argv: Sequence[str]) -> int:
    """Write the pages of each named report.json again."""
    for path in map(Path, argv):
        write(json.loads(path.read_text(encoding="utf-8")), path.parent)
        print(f"written: {path.parent / 'report.html'}, {path.parent / 'report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
