"""The report for people, made of report.json alone: report.html, report.md and the tables of the
terminal.

python -m tokalign_jax.reporting.run_page runs/demo/report/report.json     # writes the first two
beside it, anew
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
"""What report.json holds (`report.gather`, and what `stages.report` adds)."""

OPEN = ("Most frequent uncertain rows", "Worst rows")
"""Of the inspected alignment, what is shown without being asked for."""

Figure = str | tuple[str, Soft]
"""A number, and its interval if it has one."""

COMMAND = "tokalign run --config=config.py --workdir=runs/again"


def write(content: Content, folder: Path) -> None:
    """Writes report.html and report.md into `folder`."""
    for name, text in (("report.html", html(content)), ("report.md", markdown(content))):
        (folder / name).write_text(text, encoding="utf-8", errors="replace")


def html(content: Content) -> str:
    """The whole page."""
    return pages.html(
        heading(content),
        [
            _opening(content),
            _warnings(content),
            _scores(content),
            _worth(content),
            *_kept(content),
            _overlap(content),
            _training(content),
            _passages(content),
            _continued(content),
            *_alignment(content),
            _time(content),
            _again(content),
        ],
        layout="one",
    )


def markdown(content: Content) -> str:
    """The same for places that show Markdown, with the picture beside it and without what needs a
    page.
    """
    continued = "\n".join(sample_lines(content))
    parts = [
        f"# {pages.literal(heading(content))}",
        "\n\n".join(map(pages.literal, sentences(content))),
        "\n\n".join(f"**{pages.literal(line)}**" for line in warning_lines(content)),
        "\n".join(pages.markdown_table(*score_table(content))),
        pages.markdown([_worth(content), *_kept(content), _overlap(content)]),
        "![Loss over tokens, and bits per byte by language and stage](report.png)",
        pages.markdown([_training(content), *_alignment(content)]),
        f"## Continued text\n\n```\n{continued}\n```" if continued else "",
        pages.markdown([_time(content)]),
        (
            f"## To make it again\n\n`{COMMAND}` with "
            f"config.py:\n\n```python\n{config_file(content)}```"
        ),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


# --- what was done ------------------------------------------------------------------------------


def heading(content: Content) -> str:
    """Which model got which vocabulary."""
    config = content["config"]
    name = (
        "The embedded model"
        if config["source_model"] == EMBEDDED
        else short_name(config["source_model"])
    )
    return f"{name} with {_vocabulary(config)}"


def _vocabulary(config: Content) -> str:
    named = {
        EXTEND: "an extended vocabulary",
        PRUNE: "a pruned vocabulary",
        EMBEDDED: "the embedded vocabulary",
    }
    tokenizer = config["target_tokenizer"]
    return named.get(tokenizer) or f"the vocabulary of {short_name(tokenizer)}"


def sentences(content: Content) -> list[str]:
    """What was done, and what came of it."""
    config, alignment, entry = (
        content["config"],
        content["alignment"],
        content["languages"][EVERYTHING],
    )
    trained = [
        f"{titled(stage)} ({config[stage]['method']}, {of_stage['steps']:,} "
        f"steps{_teacher(config[stage])})"
        for stage, of_stage in content["training"].items()
    ]
    sizes = f"{alignment['source_size']:,} tokens became {alignment['target_size']:,}"
    done = f"The vocabulary of {sizes}; their rows were made by method “{alignment['method']}”"
    tuned = content.get("tuned", {})
    if tuned.get("nats_after", 0) < tuned.get("nats_before", 0):  # else they stayed as they were
        done += f", tuned together on {quantity(tuned['tokens'])} tokens"
    if tuned.get("loss_after", 0) < tuned.get("loss_before", 0):
        done += f" and with the source model as teacher on {quantity(tuned['tokens'])} tokens"
    listed = " and ".join(filter(None, [", ".join(trained[:-1]), *trained[-1:]]))
    done += f" and trained on {quantity(_tokens(content))} tokens in {listed}." if trained else "."
    bits, last = entry["bits_per_byte"], content["states"][-1]
    others = [
        f"{bits[state]:.3f} {when}"
        for state, when in (("init", "right after initialisation"), ("random", "with random rows"))
        if state in bits and state != last
    ]
    per_token = entry["bytes_per_token"]
    gained = (
        f"On held-out text a token now holds {per_token['target']:.2f} bytes instead of "
        f"{per_token['source']:.2f}, and a byte "
        f"costs {bits[last]:.3f} bits where it cost the source model {bits['source']:.3f}"
    )
    return [done, gained + (f" ({', '.join(others)})." if others else ".")]


def _opening(content: Content) -> Section:
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
        f"<div><dt>{escape(says)}</dt><dd>{escape(figure)}</dd></div>" for figure, says in figures
    )
    return Section("", " ".join(sentences(content)), markup=f'<dl class="figures">{items}</dl>')


def _teacher(stage: Content) -> str:
    """Who teaches in a stage; stages of a version before have no such field."""
    taught = stage.get("teacher") and stage.get("weight")
    return f", taught by {short_name(stage['teacher'])}" if taught else ""


def _tokens(content: Content) -> int:
    """That were trained on, in all stages."""
    return sum(entry["tokens"][-1] for entry in content["training"].values() if entry["tokens"])


def _devices(content: Content) -> str:
    kinds = content["devices"]
    return ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))


def warning_lines(content: Content) -> list[str]:
    """What a reader must know: of lost text, numbers, text that was trained on, what states lose,
    and skipped steps.
    """
    states = {"source": "the source model", "target": "the model with the new vocabulary"}
    lost = [
        f"warning: the {side} tokenizer does not keep {', '.join(lost)} of a text: bits per byte "
        f"of {states[side]} are too low "
        "to be compared with those of another tokenizer"
        for side, lost in content["loses"].items()
        if lost
    ]
    skipped = [
        f"warning: {entry['skipped']} of {entry['steps']} steps of {titled(stage)} were not finite"
        " and were skipped"
        for stage, entry in content["training"].items()
        if entry["skipped"]
    ]
    found = [content.get(part, {}).get("warnings", ()) for part in ("overlap", "kept")]
    return [*lost, *filter(None, [content.get("numbers")]), *itertools.chain(*found), *skipped]


def _warnings(content: Content) -> Section:
    lines = "".join(f"<p>{escape(line)}</p>" for line in warning_lines(content))
    return Section("", markup=f'<div class="warning" role="note">{lines}</div>' if lines else "")


# --- figures ------------------------------------------------------------------------------------


def score_table(content: Content) -> tuple[list[str], list[list[Figure]]]:
    """Bytes per token and bits per byte, by language, as header and rows; intervals stand behind
    their figures.
    """
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
    """The main table for a terminal: without intervals, for which that is too narrow."""
    header, rows = score_table(content)
    return pages.markdown_table(
        header, [[cell if isinstance(cell, str) else cell[0] for cell in row] for row in rows]
    )


def _scores(content: Content) -> Section:
    text = (
        "Held-out text; lower is better. Comparable across vocabularies, because every one spells "
        "the same bytes."
        + (
            " In brackets: 95% intervals."
            if any(entry.get("interval") for entry in content["languages"].values())
            else ""
        )
        + (" Random rows are in the table only." if "random" in content["states"] else "")
    )
    ends = (
        content["states"][0],
        content["states"][-1],
    )  # between them intervals would lie on one another
    rows = {
        language: [
            charts.Dot(titled(s), bits, entry.get("interval", {}).get(s) if s in ends else None)
            for s, bits in entry["bits_per_byte"].items()
            if s != "random"  # so far from the others that these could not be told apart
        ]
        for language, entry in content["languages"].items()
    }
    chart = charts.dots(rows, says="Bits per byte by language and state")
    return Section("Bits per byte", text, *score_table(content), markup=chart)


def _worth(content: Content) -> Section:
    """Whether the new vocabulary pays; reports of a version before do not have it."""
    found = content.get("worth")
    if not found:
        return Section("")
    sides = "source", "target"
    per_token, sizes, rows = found["characters_per_token"], found["bytes"], found["rows"]
    lines = [
        ("rows of the vocabulary", *(f"{rows[side]:,}" for side in sides), _change(rows)),
        ("characters a token", *(f"{per_token[side]:.2f}" for side in sides), _change(per_token)),
        ("size of the model", *(f"{quantity(sizes[side])}B" for side in sides), _change(sizes)),
    ]
    for name in ("generation", "training"):
        rates = found[name].get("characters_per_second")
        shown = [f"{quantity(rates[side])}" if rates else "" for side in sides]
        lines.append((f"characters a second, {name}", *shown, f"{found[name]['change']:+.0%}"))
    last = {name: found[name]["largest_vocabulary"] for name in ("generation", "training")}
    text = (
        "Estimated, not measured: generation of one sequence from the bytes of weights that a "
        "token "
        "reads (without the cache of keys and values), training in full from the FLOPs of a "
        "token. "
        "For text that is split as this vocabulary splits it, generation is faster than with the "
        f"source's up to {last['generation']:,} rows, training up to {last['training']:,}."
    )
    header = ("", "source", "new vocabulary", "change")
    return Section("Is it worth it?", text, header, lines)


def worth_line(content: Content) -> str:
    """The same in a line for a terminal; "" if it is not known."""
    found = content.get("worth")
    if not found:
        return ""
    changes = {name: f"{found[name]['change']:+.0%}" for name in ("generation", "training")}
    return (
        f"characters a second (estimated): generation {changes['generation']}, training "
        f"{changes['training']}; size of the model {_change(found['bytes'])}"
    )


def _change(values: Mapping[str, float]) -> str:
    return f"{values['target'] / values['source'] - 1:+.0%}"


def _kept(content: Content) -> list[Section]:
    """What each state keeps of its source; reports of a version before do not have it."""
    return retention.sections(content["kept"]["states"], titled) if "kept" in content else []


def kept_lines(content: Content) -> list[str]:
    """The same for a terminal, without what a page folds."""
    shown = [section for section in _kept(content) if not section.fold]
    return [*pages.terminal(shown), ""] if shown else []


def _overlap(content: Content) -> Section:
    """How much of the held-out text stands in the training text."""
    found = content.get("overlap")
    if not found:
        return Section("")
    text = f"In passages of {found['window']} characters or more."
    rows = [
        (language, f"{entry['share']:.2%}", Bar(entry["share"]))
        for language, entry in found["languages"].items()
    ]
    return Section(
        "Held-out text that also stands in the training text",
        text,
        ("language", "share", ""),
        rows,
        fold=True,
    )


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
    """The lowest validation loss of a stage and the step after which it was measured."""
    measured = entry.get("validation", {})
    losses = zip(measured.get("validation_loss", ()), measured.get("step", ()))
    lowest = min(((loss, step) for loss, step in losses if loss is not None), default=None)
    return f"{lowest[0]:.3f} (step {lowest[1]:,})" if lowest else ""


def _rate(stage: Content) -> str:
    """The peak rate, and that of embedding and head where it is another one."""
    rows = stage["embedding_learning_rate"]
    return f"{stage['learning_rate']:g}" + ("" if rows is None else f", rows {rows:g}")


def loss_chart(training: Content) -> str:
    """Loss over the tokens of all stages; "" where nothing was trained."""
    raw, smooth = curves.joined(training, smoothed=False), curves.joined(training)
    faint = "stroke: var(--accent); stroke-width: 1; stroke-opacity: .3"
    drawn = [charts.Curve(titled(s), *curve) for s, curve in smooth.items()]
    drawn += [
        charts.Curve(titled(s), *curve, style=faint, counts=False) for s, curve in raw.items()
    ]
    dashed = "stroke: var(--accent); stroke-width: 2; stroke-dasharray: 5 4"
    validated = {
        f"{titled(s)} on held-out text": curve for s, curve in curves.validations(training).items()
    }
    drawn += [charts.Curve(name, *curve, style=dashed) for name, curve in validated.items()]
    last = {titled(s): curve.loss[-1] for s, curve in smooth.items() if curve.loss}
    last |= {name: curve.loss[-1] for name, curve in validated.items()}
    says = "Training loss over tokens. At the end of " + ", ".join(
        f"{s}: {loss:.3f}" for s, loss in last.items()
    )
    return charts.lines(
        drawn, says=says, x_label="tokens", y_label="nats per token", marks=curves.starts(smooth)
    )


# --- texts --------------------------------------------------------------------------------------


def _passages(content: Content) -> Section:
    """The same text cut by either tokenizer."""
    found = content.get("passages", ())
    markup = "\n".join(
        f'<div class="sides">{_cut(entry, "source")}\n{_cut(entry, "target")}</div>'
        for entry in found
        if entry["source"]
    )
    text = "Held-out passages; a colour ends where a token does. A small figure counts the tokens "
    text += "that share a character."
    return Section("The same text in tokens", text if markup else "", markup=markup)


def _cut(entry: Content, side: str) -> str:
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
    """The attribute that tells a browser which letters and hyphens to use, where `name` may be a
    language.
    """
    known = name.isascii() and name.islower() and name.isalpha() and len(name) == 2
    return f' lang="{name}"' if known else ""


_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}


def _text(text: str, following: str = "") -> str:
    """`text` with its line ends shown, several as one, and without characters that a page may not
    hold.
    """
    shown = escape(text.translate(_PICTURES).encode("utf-8", "replace").decode())
    broken = re.sub(r"\n+", lambda ends: "↵" * len(ends[0]) + "<br>", shown)
    return broken.removesuffix("<br>") if following == "\n" else broken


def _continued(content: Content) -> Section:
    """Each prompt, and how the source model and the last state go on."""
    blocks = []
    for sample in content["samples"]:
        sides = "\n".join(
            f'<div><h3><small>{escape(titled(state))}</small></h3><p class="text" dir="auto">'
            f"<q>{_text(sample['prompt'])}</q>{_text(text)}</p></div>"
            for state, text in sample.items()
            if state != "prompt"
        )
        blocks.append(f'<div class="sides">{sides}</div>')
    text = "The model goes on from the marked text, each time with the likeliest token."
    return Section("Continued text", text if blocks else "", markup="\n".join(blocks))


def sample_lines(content: Content) -> list[str]:
    """The continued texts, one line each."""
    lines = []
    for sample in content["samples"]:
        lines.append(f"prompt        {_one_line(sample['prompt'])}")
        lines += [
            f"  {titled(s):<12}{_one_line(text)}" for s, text in sample.items() if s != "prompt"
        ]
    return lines


def _one_line(text: str) -> str:
    return " ".join(text.split())


# --- the alignment ------------------------------------------------------------------------------


def _alignment(content: Content) -> Iterator[Section]:
    """What the rows of the new vocabulary are made of, first in short, then as it was inspected."""
    alignment = content["alignment"]
    measured = [
        (key.replace("_", " "), f"{value:,}" if isinstance(value, int) else f"{value:.3f}")
        for key, value in alignment.items()
        if isinstance(value, int | float)
    ]
    inspected = [pages.from_json(section) for section in content.get("inspection", ())]
    rules = next((section for section in inspected if section.title == "Rules"), None)
    made = rules_section(alignment["rules"])
    yield Section(made.title, rules.text if rules else "", made.header, made.rows)
    yield Section("Measured on the alignment", rows=measured)
    yield special_section(alignment.get("special", ()))
    for section in inspected:
        if section is not rules:
            fold = section.title not in OPEN
            yield Section(section.title, section.text, section.header, section.rows, fold=fold)


# --- to make it again ---------------------------------------------------------------------------


def _time(content: Content) -> Section:
    seconds, versions = content["seconds"], content["versions"]
    longest = max(seconds.values(), default=0) or 1
    rows = [(name, duration(entry), Bar(entry / longest)) for name, entry in seconds.items()]
    text = f"{duration(sum(seconds.values()))} on {_devices(content)}"
    text += (
        f", {content['date']}" if "date" in content else ""
    ) + f"; {', '.join(f'{name} {version}' for name, version in versions.items())}."
    return Section("Time and versions", text, ("stage", "time", ""), rows)


def _again(content: Content) -> Section:
    text = "Save this as config.py. Every field that is not in it has the default of the version "
    text += "named above."
    markup = f"<pre>{escape(COMMAND)}</pre>\n<pre>{escape(config_file(content))}</pre>"
    return Section("To make it again", text, markup=markup)


def config_file(content: Content) -> str:
    """A config file with all that differs from the defaults."""
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
    """The fields of a config by their dotted names."""
    found = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def main(argv: Sequence[str]) -> int:
    """Makes the pages of each named report.json anew."""
    for path in map(Path, argv):
        write(json.loads(path.read_text(encoding="utf-8")), path.parent)
        print(f"written: {path.parent / 'report.html'}, {path.parent / 'report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
