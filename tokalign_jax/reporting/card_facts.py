"""Facts for the model card of an export, gathered from the run's finished stages."""

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokalign_jax.config import Config, config_to_dict
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.reporting.curves import titled
from tokalign_jax.reporting.model_card import CARD, CardFacts, main_settings
from tokalign_jax.reporting.report import PACKAGES, figures, version
from tokalign_jax.text import corpus


def facts(
    config: Config,
    workdir: Path,
    states: Sequence[str],
    model: ModelConfig,
    source_folder: Path,
    terms: Sequence[str],
) -> CardFacts:
    """Gather the facts of the run in `workdir`; facts of unfinished stages are left out.

    Args:
      states: states of the model, up to the exported one.
      model: config of the exported model.
      source_folder: folder of the source model, which may have a card of its own.
      terms: names of the copied licence files.
    """
    scores = {s: _read(workdir / "evaluate" / s / "scores.json") for s in ("source", *states)}
    sides = {"source": scores["source"], "target": scores[states[-1]]}
    aligned, tokens = _read(workdir / "align" / "summary.json"), workdir / "tokens"
    indices = {side: _read(tokens / side / "index.json") for side in ("source", "target")}
    languages = _read(workdir / "corpus" / "summary.json").get("languages", {})
    card = source_folder / CARD
    return CardFacts(
        base_model=config.source_model,
        target_tokenizer=config.target_tokenizer,
        teacher=config.stage3.teacher if "stage3" in states else "",
        name=config.export.push_to_hub or ".",
        base_card=card.read_text(encoding="utf-8") if card.is_file() else "",
        terms=terms,
        model_type=model.model_type,
        source_tokens=aligned.get("source_size", 0),
        target_tokens=aligned.get("target_size", 0),
        rows=model.vocab_size,
        settings=main_settings(config_to_dict(config)),
        rules=aligned.get("rules", {}),
        corpus=corpus.names(config),
        corpus_bytes={name: entry["train_bytes"] for name, entry in languages.items()},
        bits_per_byte={
            titled(s): _figures(entry, "bits_per_byte") for s, entry in scores.items() if entry
        },
        bytes_per_token={
            side: _figures(entry, "bytes_per_token") for side, entry in sides.items() if entry
        },
        loses=indices["target"].get("loses", ()),
        special=aligned.get("special", ()),
        versions={
            **{package: version(package) for package in PACKAGES},
            "python": platform.python_version(),
        },
    )


def _figures(scores: Mapping[str, Any], name: str) -> dict[str, float]:
    """Return a figure by language, and over all of them if there are several."""
    by_language = {language: entry[name] for language, entry in figures(scores).items()}
    if len(by_language) > 2:
        return by_language
    return {language: by_language[language] for language in scores["languages"]}


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
