"""The stages of a run in order, what each depends on, and their fingerprints."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokalign_jax.config import (
    EXTEND,
    PRUNE,
    SELF,
    Config,
    config_to_dict,
    learns_from_source,
    selection_of,
    settings_of,
    training_stages,
)
from tokalign_jax.pipeline import checks, identities, stages, states
from tokalign_jax.pipeline.context import Context
from tokalign_jax.text import corpus as documents

FORMAT = 5
"""Version of the artifacts: a workdir of another version is redone."""


@dataclass(frozen=True)
class Stage:
    """One step of the run.

    Attributes:
      name: also its folder under the workdir.
      description: what it does, for the log.
      needs: names of the stages whose artefacts it reads.
      settings: the part of the config (and the identity of outside files) that its result depends
        on.
      run: writes the artefact into `context.folder(name)` and returns a summary for the record.
      resumes: whether an interrupted run continues from what is in its folder.
      on_all_processes: whether all processes run it, each on its own devices; else the first.
      is_whole: whether all that it left when it finished is still there; if not it goes on with
        what is.
    """

    name: str
    description: str
    needs: tuple[str, ...]
    settings: Mapping[str, Any]
    run: Callable[[Context], Mapping[str, Any] | None]
    resumes: bool = False
    on_all_processes: bool = False
    is_whole: Callable[[Context], bool] = lambda context: True


def graph(context: Context, exported: str) -> list[Stage]:
    """All stages of a run in order.

    Args:
      exported: the model state (`init` or a training stage) that is exported and reported as the
        last one.
    """
    config, outside = context.config, identities.identities(context)
    models = model_states(config)
    seed = {"seed": config.seed}
    # The rest of `compute`, and the mesh, change nothing but speed and rounding.
    compute = {"compute": {"dtype": config.compute.dtype}}
    vocabularies = {name: outside[name] for name in ("source_tokenizer", "target_tokenizer")}
    vocabularies |= {"end_of_text": config.end_of_text} if config.end_of_text else {}
    vocabularies |= {"chat": config.chat} if config.chat != Config.chat else {}
    derivation = [_derivation(context)] if context.inputs.derives else []
    target = tuple(stage.name for stage in derivation)  # what the target tokenizer comes from
    text = config_to_dict(config.text)
    tokens = text.pop("self_tokens")  # the stage `self` depends on it
    writes = documents.has_self(config)
    writing = [_writing(context, tokens, {**compute, **seed})] if writes else []
    taught = [n for n, stage in training_stages(config).items() if learns_from_source(stage)]

    def training(name: str) -> Stage:
        before = tuple(models[: models.index(name)])
        stage = settings_of(getattr(config, name))
        stage |= {"teacher": outside["teacher"]} if "teacher" in stage else {}
        text = ("tokens", "boundaries") if name in taught else ("tokens",)
        return Stage(
            name,
            f"train ({getattr(config, name).method})",
            (*text, *before),
            {
                name: stage,
                "data": config_to_dict(config.data),
                **compute,
                **seed,
                **_results(config, before),
            },
            lambda c: stages.train(c, name, before),
            resumes=True,
            on_all_processes=True,
            is_whole=lambda c: states.is_trained(c, name),
        )

    def evaluation(state: str) -> Stage:
        reached = tuple(models[: models.index(state) + 1]) if state in models else ()
        return Stage(
            f"evaluate/{state}",
            f"measure {state}",
            ("corpus", *(() if state == "source" else (*target, "evaluate/source")), *reached),
            {
                "evaluation": config_to_dict(config.evaluation)
                | {
                    "abilities": outside["questions"],
                    "chat_questions": outside["chat_questions"],
                    "other_text": outside["other_text"],
                },
                "source_model": outside["source_model"],
                **vocabularies,
                **compute,
                **seed,
                **_results(config, reached),
            },
            lambda c: stages.evaluate(c, state, reached),
            on_all_processes=True,
        )

    reached = models[: models.index(exported) + 1]
    baselines = ["source", *(["random"] if config.evaluation.random_baseline else [])]
    reported = [*baselines, *reached]
    return [
        *writing,
        Stage(
            "corpus",
            "read, de-duplicate and split the documents",
            tuple(stage.name for stage in writing),
            {"corpus": outside["corpus"], "text": text},
            stages.corpus,
        ),
        *derivation,
        Stage(
            "tokens",
            "cut the documents with both tokenizers",
            ("corpus", *target),
            vocabularies,
            stages.tokens,
            is_whole=states.has_tokens,
        ),
        *([_boundaries(target)] if taught else []),
        Stage(
            "align",
            "align target tokens to source tokens",
            ("corpus", *target, "tokens"),
            {
                "alignment": {
                    **config_to_dict(config.alignment),
                    "file": outside["alignment"],
                    **outside["vectors"],
                    "donor": outside["donor"],
                },
                **seed,
            },
            stages.align,
        ),
        Stage(
            "init",
            "re-arrange the vocabulary's rows",
            ("tokens", "align"),
            {
                "source_model": outside["source_model"],
                "initialization": config_to_dict(config.initialization),
                **compute,
                **seed,
            },
            stages.init,
            on_all_processes=True,
            is_whole=lambda c: states.has_model(c, "init"),
        ),
        *(training(name) for name in models[1:]),
        *(evaluation(state) for state in [*baselines, *models]),
        Stage(
            "export",
            f"write the Hugging Face folder of {exported}",
            tuple(reached),
            {"export": config_to_dict(config.export), **_results(config, reached)},
            lambda c: stages.export(c, reached),
            on_all_processes=True,
            is_whole=lambda c: states.has_model(c, "export"),
        ),
        Stage(
            "report",
            "a page, tables, JSON and a picture",
            ("corpus", "tokens", "align", *reached, *(f"evaluate/{state}" for state in reported)),
            {},
            lambda c: stages.report(c, reported),
        ),
    ]


def _results(config: Config, states: Sequence[str]) -> dict[str, Any]:
    """Settings of a stage that reads these states: which checkpoint is the result of each.

    Empty where all are the last ones.
    """
    stages = training_stages(config)
    chosen = {name: selection_of(stages[name]) for name in states if name in stages}
    chosen = {name: settings for name, settings in chosen.items() if settings}
    return {"results": chosen} if chosen else {}


def _writing(context: Context, tokens: int, settings: Mapping[str, Any]) -> Stage:
    """The stage in which the source model writes a part of the corpus."""
    outside = identities.identities(context)
    sources = {name: outside[name] for name in ("source_model", "source_tokenizer")}
    return Stage(
        SELF,
        "let the source model write text",
        (),
        {"self_tokens": tokens, "chats": checks.can_chat(context), **sources, **settings},
        stages.write_self,
        on_all_processes=True,
        is_whole=lambda c: (c.folder(SELF) / documents.SELF_TEXT).is_file(),
    )


def _boundaries(target: tuple[str, ...]) -> Stage:
    """The stage that training stages with the source model as their teacher need."""
    return Stage(
        "boundaries",
        "find where tokens of both tokenizers end together",
        ("corpus", *target, "tokens"),
        {},
        stages.boundaries,
        is_whole=states.has_boundaries,
    )


def _derivation(context: Context) -> Stage:
    """The stage that makes the target tokenizer of the source's."""
    name = context.config.target_tokenizer
    says, work = {
        EXTEND: ("add tokens of the text to the source tokenizer", stages.extend),
        PRUNE: ("leave out tokens that the text does not need", stages.prune),
    }[name]
    settings = {
        name: config_to_dict(getattr(context.config, name)),
        "source_tokenizer": identities.identities(context)["source_tokenizer"],
        "seed": context.config.seed,
    }
    return Stage(name, says, ("corpus",), settings, work)


def model_states(config: Config) -> list[str]:
    """The states that the model goes through."""
    return ["init", *training_stages(config)]


def fingerprints(stages_in_order: Sequence[Stage]) -> dict[str, str]:
    """Return, by stage, the SHA-256 of its settings and of the fingerprints of what it needs."""
    result: dict[str, str] = {}
    for stage in stages_in_order:
        content = {
            "settings": stage.settings,
            "needs": {n: result[n] for n in stage.needs},
            "format": FORMAT,
        }
        result[stage.name] = hashlib.sha256(
            json.dumps(content, sort_keys=True, default=str).encode()
        ).hexdigest()
    return result


def fingerprints_of(context: Context, exported: str = "") -> dict[str, str]:
    """Return the fingerprints of the stages of a run that exports this state, or the last one."""
    return fingerprints(graph(context, exported or model_states(context.config)[-1]))
