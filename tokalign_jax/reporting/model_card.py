"""Model card of an export: README.md with YAML front matter."""

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
"""Fields of the base model's front matter that are copied."""

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
"""Config fields that a card lists, besides those of each training stage."""

_OF_STAGE = ("method", "objective", "steps", "learning_rate", "batch.size")
_OF_STAGE += ("batch.sequence_length",)
_OF_STAGE += ("divergence", "mixture", "temperature", "weight")


@dataclass(frozen=True)
class CardFacts:
    """Content of a model card; empty fields are not mentioned.

    Attributes:
      base_model: hub name (`name@revision`) or folder of the source model.
      target_tokenizer: likewise of the tokenizer; or `extend`, `prune`.
      teacher: likewise of the teacher of Stage 3.
      name: the name that the example loads the model by.
      base_card: text of the base model's README.md.
      terms: names of the base model's licence files beside the card.
      source_tokens, target_tokens: sizes of the vocabularies.
      rows: rows of embedding and head, at least `target_tokens`.
      settings: main config values by their names (`main_settings`).
      rules: by rule of the alignment `rows`, and `frequency`, their share of the text.
      corpus: names of the files or data sets of the corpus.
      corpus_bytes: UTF-8 bytes of training text by language.
      bits_per_byte: by state of the model (`source`, `init`, ...) and language.
      bytes_per_token: by side (`source`, `target`) and language.
      loses: parts of a text that the tokenizer does not keep (`canonical.losses`).
      special: special tokens and the sources of their rows (`methods.special_rows`).
    """

    base_model: str
    target_tokenizer: str
    teacher: str = ""
    name: str = "."
    base_card: str = ""
    terms: Sequence[str] = ()
    model_type: str = ""
    source_tokens: int = 0
    target_tokens: int = 0
    rows: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    rules: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    corpus: Sequence[str] = ()
    corpus_bytes: Mapping[str, int] = field(default_factory=dict)
    bits_per_byte: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    bytes_per_token: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    loses: Sequence[str] = ()
    special: Sequence[Mapping[str, Any]] = ()
    versions: Mapping[str, str] = field(default_factory=dict)


def main_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config values that a card lists, by their dotted names.

    Args:
      config: as a nested dict.
    """
    settings = {}
    entries = {stage: config.get(stage, {}) for stage in TRAINING}
    # Without a teacher there is no Stage 3.
    stages = [
        s for s, entry in entries.items() if entry.get("steps") and entry.get("teacher", True)
    ]
    for name in (*_MAIN, *(f"{stage}.{name}" for stage in stages for name in _OF_STAGE)):
        value: Any = config
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value not in (None, ""):
            settings[name] = value
    return settings


def front_matter(card: str) -> dict[str, Any]:
    """Return the metadata at the head of a card; {} if missing or not readable."""
    match = re.match(r"\A\ufeff?---\s*\n(.*?)\n---\s*(\n|\Z)", card, re.DOTALL)
    try:
        content = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}
    return content if isinstance(content, dict) else {}


def model_card(facts: CardFacts) -> str:
    """Return the text of README.md: metadata for the hub, description, data and results."""
    settings = [(Code(name), Code(str(value))) for name, value in facts.settings.items()]
    tables = [_data(facts), *_results(facts)]
    tables += [rules_section(facts.rules), special_section(facts.special)]
    sections = (
        _description(facts),
        _use(facts),
        markdown(tables),
        markdown([Section("Settings", "", ("setting", "value"), settings)] if settings else []),
        _terms(facts),
        markdown([Section("Versions", "", ("package", "version"), list(facts.versions.items()))]),
    )
    metadata = yaml.safe_dump(_metadata(facts), sort_keys=False, allow_unicode=True)
    return (
        f"---\n{metadata}---\n\n" + "\n\n".join(section for section in sections if section) + "\n"
    )


def rules_section(rules: Mapping[str, Mapping[str, float]]) -> Section:
    """Return the table of `CardFacts.rules`."""
    rows = [
        (name, f"{int(entry['rows']):,}", f"{entry['frequency']:.2%}", Bar(entry["frequency"]))
        for name, entry in rules.items()
        if entry["rows"]
    ]
    return Section("Rows of the new vocabulary", "", ("rule", "rows", "of the text", ""), rows)


def special_section(special: Sequence[Mapping[str, Any]]) -> Section:
    """Return the table of `CardFacts.special`."""
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
    text = "Sources of their rows; all others are made from the pieces of their texts."
    header = ("token", "id", "rows of", "because", "in the chat template")
    return Section("Special tokens", text if rows else "", header, rows)


def short_name(name: str) -> str:
    """Return a model's or tokenizer's hub name; of a folder its last part, to hide local paths."""
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
    """Return the repository of a hub name, without its revision; "" for a folder."""
    repository = name.partition("@")[0]
    is_name = (
        re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repository)
        and not Path(name).expanduser().exists()
    )
    return repository if is_name else ""


# --- sections -----------------------------------------------------------------------------------


def _description(facts: CardFacts) -> str:
    base, name = _link(facts.base_model), literal(short_name(facts.base_model))
    if facts.target_tokenizer == EXTEND:
        title = f"{name} with an extended vocabulary"
        lines = [
            f"The model {base} with tokens added to its tokenizer: their rows of embedding and",
            "head were initialised and trained by tokalign_jax.",
        ]
    elif facts.target_tokenizer == PRUNE:
        title = f"{name} with a pruned vocabulary"
        lines = [
            f"The model {base} without tokens that a corpus does not need; all others keep their",
            "rows.",
        ]
    else:
        title = f"{name} with the vocabulary of {literal(short_name(facts.target_tokenizer))}"
        lines = [
            f"The model {base} with the tokenizer of {_link(facts.target_tokenizer)}: the rows of",
            "embedding and head were initialised for that vocabulary and trained by tokalign_jax.",
        ]
    if facts.teacher:
        lines.append(
            f"In a last stage it was distilled from {_link(facts.teacher)}, which has the same "
            "tokens."
        )
    if facts.source_tokens and facts.target_tokens:
        lines.append(
            f"The vocabulary went from {facts.source_tokens:,} to {facts.target_tokens:,} tokens."
        )
    if facts.rows > facts.target_tokens > 0:
        lines.append(
            f"Embedding and head have {facts.rows:,} rows; those past the vocabulary are unused."
        )
    return "\n".join([f"# {title}", "", *lines])


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
        rows.append(("total", _size(sum(facts.corpus_bytes.values()))))
    text = f"Read from: {', '.join(map(code, facts.corpus))}." if facts.corpus else ""
    return Section("Data", text if rows else "", ("language", "training text"), rows)


def _results(facts: CardFacts) -> list[Section]:
    bits = "`source` is the base model with its own tokenizer, on the same text; lower is better."
    if facts.loses:
        bits += (
            f" The tokenizer does not keep {', '.join(facts.loses)} of a text; its figures "
            "are too low."
        )
    per_token = "The more bytes per token, the fewer tokens for a text."
    return [
        _by_language("Bits per byte on held-out text", facts.bits_per_byte, bits),
        _by_language("Bytes per token", facts.bytes_per_token, per_token),
    ]


def _by_language(title: str, columns: Mapping[str, Mapping[str, float]], text: str) -> Section:
    languages = dict.fromkeys(language for column in columns.values() for language in column)
    rows = [
        (
            language,
            *(
                f"{column[language]:.3f}" if language in column else ""
                for column in columns.values()
            ),
        )
        for language in languages
    ]
    return Section(title, text if rows else "", ("language", *columns), rows)


def _terms(facts: CardFacts) -> str:
    base = front_matter(facts.base_card)
    licence = base.get("license_name") or base.get("license")
    files = f" See {', '.join(f'[{name}]({name})' for name in facts.terms)}." if facts.terms else ""
    if licence or files:
        text = "The terms of the base model apply to this one."
        if licence:
            text = f"The licence of the base model, {licence}, applies to this one."
        return f"## Licence\n\n{text}{files}"
    text = "The base model's folder states no licence; the base model's applies to this one, too."
    return f"## Licence\n\n{text}"


# --- formats ------------------------------------------------------------------------------------


def _link(name: str) -> str:
    repository, _, revision = name.partition("@")
    pinned = f" (revision `{revision}`)" if revision else ""
    if not _hub_name(name):
        return code(short_name(name))
    return f"[{repository}](https://huggingface.co/{repository}){pinned}"


def _size(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
