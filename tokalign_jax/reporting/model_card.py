"""The model card of an exported folder: README.md with YAML front matter, from plain facts."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tokalign_jax.config import EXTEND, PRUNE, TRAINING
from tokalign_jax.reporting.pages import Bar, Code, Section, code, literal, markdown

CARD = "README.md"

_CARRIED = ("license", "license_name", "license_link")
"""Front matter of the base model's card that holds for the new one as well."""

_MAIN = (
    "alignment.method",
    "alignment.vectors",
    "alignment.file",
    "initialization.tokens",
    "initialization.learned",
    "initialization.calibration",
    "initialization.tuning",
    "compute.dtype",
    "seed",
)
"""What of a config says how a model was made, and of each training stage in it:"""

_OF_STAGE = ("method", "objective", "steps", "learning_rate", "batch_size", "sequence_length")
_OF_STAGE += ("divergence", "mixture", "temperature", "weight")


@dataclass(frozen=True)
class CardFacts:
    """What a card tells. Whatever is left empty is not mentioned."""

    base_model: str
    """Hub name (`name@revision`) or folder of the source model."""
    target_tokenizer: str
    """The same of the tokenizer; `extend`: the base model's own with more tokens."""
    teacher: str = ""
    """The same of the model that it learned from in a last stage."""
    name: str = "."
    """Where the model is loaded from, in the example."""
    base_card: str = ""
    """Text of the base model's README.md."""
    terms: Sequence[str] = ()
    """Names of the base model's licence files that lie beside the card."""
    model_type: str = ""
    source_tokens: int = 0
    """Tokens of the old vocabulary."""
    target_tokens: int = 0
    """Tokens of the new one."""
    rows: int = 0
    """Of the matrices: at least `target_tokens`."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Main config values by their names (`main_settings`)."""
    rules: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """By rule of the alignment: `rows`, and `frequency`, their share of the text."""
    corpus: Sequence[str] = ()
    """Names of what was read."""
    corpus_bytes: Mapping[str, int] = field(default_factory=dict)
    """UTF-8 bytes of training text by language."""
    bits_per_byte: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """By state of the model (`source`, `init`, ...): by language."""
    bytes_per_token: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """By side (`source`, `target`): by language."""
    loses: Sequence[str] = ()
    """What of a text the tokenizer does not keep (`canonical.losses`)."""
    special: Sequence[Mapping[str, Any]] = ()
    """Special tokens and where their rows came from (`methods.special_rows`)."""
    versions: Mapping[str, str] = field(default_factory=dict)


def main_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config (as a nested dict) that say how a model was made, by their dotted
    names.
    """
    found = {}
    # A stage for distillation is none without a teacher.
    given = {stage: config.get(stage, {}) for stage in TRAINING}
    stages = [
        stage for stage, entry in given.items() if entry.get("steps") and entry.get("teacher", True)
    ]
    for name in (*_MAIN, *(f"{stage}.{name}" for stage in stages for name in _OF_STAGE)):
        value: Any = config
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value not in (None, ""):
            found[name] = value
    return found


def front_matter(card: str) -> dict[str, Any]:
    """The metadata at the head of a card; {} where there is none that can be read."""
    match = re.match(r"\A\ufeff?---\s*\n(.*?)\n---\s*(\n|\Z)", card, re.DOTALL)
    try:
        found = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def model_card(facts: CardFacts) -> str:
    """README.md: metadata as the hub reads it, then how the model was made, from what, and what it
    measures.
    """
    settings = [(Code(name), Code(str(value))) for name, value in facts.settings.items()]
    sections = (
        _made(facts),
        _use(facts),
        markdown(
            [
                _data(facts),
                *_figures(facts),
                rules_section(facts.rules),
                special_section(facts.special),
            ]
        ),
        markdown([Section("Settings", "", ("setting", "value"), settings)] if settings else []),
        _terms(facts),
        markdown([Section("Versions", "", ("package", "version"), list(facts.versions.items()))]),
    )
    metadata = yaml.safe_dump(_metadata(facts), sort_keys=False, allow_unicode=True)
    return (
        f"---\n{metadata}---\n\n" + "\n\n".join(section for section in sections if section) + "\n"
    )


def rules_section(rules: Mapping[str, Mapping[str, float]]) -> Section:
    """How the rows of the new vocabulary were made, from `CardFacts.rules`."""
    rows = [
        (name, f"{int(entry['rows']):,}", f"{entry['frequency']:.2%}", Bar(entry["frequency"]))
        for name, entry in rules.items()
        if entry["rows"]
    ]
    return Section("Rows of the new vocabulary", "", ("rule", "rows", "of the text", ""), rows)


def special_section(special: Sequence[Mapping[str, Any]]) -> Section:
    """Special tokens and where their rows came from (`CardFacts.special`)."""
    rows = [
        (
            Code(entry["token"]),
            str(entry["id"]),
            Code(entry["source"]),
            entry["why"],
            "yes" if entry["in_chat_template"] else "",
        )
        for entry in special
    ]
    text = "Where their rows came from; the rest is made of the pieces of its text." if rows else ""
    return Section(
        "Special tokens", text, ("token", "id", "rows of", "because", "in the chat template"), rows
    )


def short_name(name: str) -> str:
    """Of a model or tokenizer for people: a folder's own name, since where it lies on somebody's
    disk is nobody's business.
    """
    return name.partition("@")[0] if _hub_name(name) else Path(name).name


# --- metadata -----------------------------------------------------------------------------------


def _metadata(facts: CardFacts) -> dict[str, Any]:
    base = front_matter(facts.base_card)
    languages = [
        name for name in facts.corpus_bytes if re.fullmatch(r"[a-z]{2,3}", name) and name != "all"
    ]
    values = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": _hub_name(facts.base_model),
        "base_model_relation": "finetune" if _hub_name(facts.base_model) else "",
        **{key: base.get(key) for key in _CARRIED},
        "language": languages,
        "tags": [
            "tokalign-jax",
            "vocabulary-transfer",
            *([facts.model_type] if facts.model_type else []),
        ],
    }
    return {key: value for key, value in values.items() if value}


def _hub_name(name: str) -> str:
    """The repository of a hub name, without its revision; "" for a folder, or what ships with the
    package.
    """
    repository = name.partition("@")[0]
    is_name = (
        re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repository)
        and not Path(name).expanduser().exists()
    )
    return repository if is_name else ""


# --- sections -----------------------------------------------------------------------------------


def _made(facts: CardFacts) -> str:
    base, name = _link(facts.base_model), short_name(facts.base_model)
    if facts.target_tokenizer == EXTEND:
        lines = [f"# {literal(name)} with an extended vocabulary", ""]
        lines += [
            f"The model {base} with more tokens in its own tokenizer: rows of its embedding and "
            f"its head"
        ]
        lines += ["were made for these, and trained by tokalign_jax."]
    elif facts.target_tokenizer == PRUNE:
        lines = [f"# {literal(name)} with a pruned vocabulary", ""]
        lines += [
            f"The model {base} without the tokens that a corpus does not need; the others keep "
            f"their rows."
        ]
    else:
        lines = [
            f"# {literal(name)} with the vocabulary of "
            f"{literal(short_name(facts.target_tokenizer))}",
            "",
        ]
        lines += [
            f"The model {base} with the tokenizer of {_link(facts.target_tokenizer)}: the rows of "
            f"its embedding"
        ]
        lines += ["and its head were made anew for that vocabulary and trained by tokalign_jax."]
    if facts.teacher:
        lines += [
            f"In a last stage it learned from {_link(facts.teacher)}, which has the same tokens."
        ]
    if facts.source_tokens and facts.target_tokens:
        lines += [
            f"The vocabulary went from {facts.source_tokens:,} to {facts.target_tokens:,} tokens."
        ]
    if facts.rows > facts.target_tokens > 0:
        lines += [
            f"The matrices have {facts.rows:,} rows; those past the vocabulary stand for no token."
        ]
    return "\n".join(lines)


def _use(facts: CardFacts) -> str:
    return f"""## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({facts.name!r}, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained({facts.name!r})
```"""


def _data(facts: CardFacts) -> Section:
    rows = [(language, _size(size)) for language, size in sorted(facts.corpus_bytes.items())]
    if len(rows) > 1:
        rows.append(("together", _size(sum(facts.corpus_bytes.values()))))
    read = f"Read from: {', '.join(map(code, facts.corpus))}." if facts.corpus else ""
    return Section("Data", read if rows else "", ("language", "training text"), rows)


def _figures(facts: CardFacts) -> list[Section]:
    def figures(title: str, values: Mapping[str, Mapping[str, float]], text: str) -> Section:
        languages = dict.fromkeys(language for column in values.values() for language in column)
        rows = [
            (
                language,
                *(
                    f"{column[language]:.3f}" if language in column else ""
                    for column in values.values()
                ),
            )
            for language in languages
        ]
        return Section(title, text if rows else "", ("language", *values), rows)

    kept = (
        f" The tokenizer does not keep {', '.join(facts.loses)} of a text; such figures are too "
        f"low."
        if facts.loses
        else ""
    )
    return [
        figures(
            "Bits per byte on held-out text",
            facts.bits_per_byte,
            f"`source` is the base model with its own tokenizer, on the same text; lower is "
            f"better.{kept}",
        ),
        figures(
            "Bytes per token",
            facts.bytes_per_token,
            "More bytes in a token are fewer tokens for a text.",
        ),
    ]


def _terms(facts: CardFacts) -> str:
    base = front_matter(facts.base_card)
    licence = base.get("license_name") or base.get("license")
    files = f" See {', '.join(f'[{name}]({name})' for name in facts.terms)}." if facts.terms else ""
    if licence or files:
        known = f"The licence of the base model, {licence}, holds for this one." if licence else ""
        return f"## Licence\n\n{known or 'The terms of the base model hold for this one.'}{files}"
    text = "The base model's folder says nothing of its licence; it holds for this model, too."
    return f"## Licence\n\n{text}"


# --- words --------------------------------------------------------------------------------------


def _link(name: str) -> str:
    repository, _, revision = name.partition("@")
    pinned = f" (revision `{revision}`)" if revision else ""
    return (
        f"[{repository}](https://huggingface.co/{repository}){pinned}"
        if _hub_name(name)
        else code(short_name(name))
    )


def _size(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
