"""Stages of a run in order, their dependencies and fingerprints."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokalign_jax.config import (
    EXTEND,
    PRUNE,
    REMOVED,
    SELF,
    AlignmentConfig,
    Config,
    ExportConfig,
    config_to_dict,
    learns_from_source,
    products_of,
    selection_of,
    settings_of,
    training_stages,
)
from tokalign_jax.pipeline import checks, identities, stages, states
from tokalign_jax.pipeline.context import Context
from tokalign_jax.text import corpus as documents

FORMAT = 5
"""Version of the artifacts: stages of a workdir of another version are redone."""


@dataclass(frozen=True)
class Stage:
    """A stage of a run.

    Attributes:
      name: also its folder under the workdir.
      description: what it does, for the log.
      needs: names of the stages whose artifacts it reads.
      settings: the config fields and digests of outside files that its result depends on.
      run: writes the artifact into `context.folder(name)` and returns a summary for the record.
      resumes: whether an interrupted run continues from the content of its folder.
      on_all_processes: whether all processes run it, each on its own devices; else process 0 does.
      is_whole: returns whether the finished artifact is still complete; if not, the stage resumes
        or is redone.
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
    """Return all stages of a run in order.

    Args:
      exported: the model state (`init` or a training stage) that is exported and reported as the
        last one.
    """
    return _Graph(context).stages(exported)


def model_states(config: Config) -> list[str]:
    """Return the states of the model in order: `init` and the training stages."""
    return ["init", *training_stages(config)]


def fingerprints(stages_in_order: Sequence[Stage]) -> dict[str, str]:
    """Return, by stage, the SHA-256 of its settings and of the fingerprints of its needs."""
    result: dict[str, str] = {}
    for stage in stages_in_order:
        content = {
            "settings": stage.settings,
            "needs": {name: result[name] for name in stage.needs},
            "format": FORMAT,
        }
        encoded = json.dumps(content, sort_keys=True, default=str).encode()
        result[stage.name] = hashlib.sha256(encoded).hexdigest()
    return result


def fingerprints_of(context: Context, exported: str = "") -> dict[str, str]:
    """Return the fingerprints of a run's stages.

    Args:
      exported: the state that the run exports; "": the last one.
    """
    return fingerprints(graph(context, exported or model_states(context.config)[-1]))


class _Graph:
    """Builder of a run's stages: a method each, and the settings that several share."""

    def __init__(self, context: Context):
        config = context.config
        self.context, self.config = context, config
        self.digests = identities.identities(context)
        self.models = model_states(config)
        self.seed = {"seed": config.seed}
        # The mesh and the other fields of `compute` change speed and rounding alone.
        self.compute = {"compute": {"dtype": config.compute.dtype}}
        # The stage that makes the target tokenizer, if it is derived.
        self.derivation = [config.target_tokenizer] if context.inputs.derives else []
        # Training stages whose teacher is the source model.
        self.taught = [
            name for name, stage in training_stages(config).items() if learns_from_source(stage)
        ]

    def stages(self, exported: str) -> list[Stage]:
        reached = self.models[: self.models.index(exported) + 1]
        baselines = ["source", *(["random"] if self.config.evaluation.random_baseline else [])]
        return [
            *([self._self_text()] if documents.has_self(self.config) else []),
            self._corpus(),
            *([self._derive()] if self.derivation else []),
            self._tokens(),
            *([self._boundaries()] if self.taught else []),
            self._align(),
            self._init(),
            *(self._train(name) for name in self.models[1:]),
            *(self._evaluate(state) for state in [*baselines, *self.models]),
            self._export(reached),
            self._report([*baselines, *reached], reached),
        ]

    @property
    def vocabularies(self) -> dict[str, Any]:
        """Settings that determine both tokenizers."""
        settings = {name: self.digests[name] for name in ("source_tokenizer", "target_tokenizer")}
        if self.config.end_of_text:
            settings["end_of_text"] = self.config.end_of_text
        if self.config.chat != Config.chat:
            settings["chat"] = self.config.chat
        return settings

    def _selections(self, states: Sequence[str]) -> dict[str, Any]:
        """Return the settings that select the checkpoint of each state, for a stage that reads it.

        Empty if all are the last checkpoints.
        """
        stages = training_stages(self.config)
        results = {name: selection_of(stages[name]) for name in states if name in stages}
        results = {name: settings for name, settings in results.items() if settings}
        return {"results": results} if results else {}

    def _self_text(self) -> Stage:
        sources = {name: self.digests[name] for name in ("source_model", "source_tokenizer")}
        return Stage(
            SELF,
            "let the source model write text",
            (),
            {
                "self_tokens": self.config.text.self_tokens,
                "chats": checks.can_chat(self.context),
                **sources,
                **self.compute,
                **self.seed,
            },
            stages.write_self,
            on_all_processes=True,
            is_whole=lambda c: (c.folder(SELF) / documents.SELF_TEXT).is_file(),
        )

    def _corpus(self) -> Stage:
        text = config_to_dict(self.config.text)
        del text["self_tokens"]  # a setting of the stage `self`
        return Stage(
            "corpus",
            "read, de-duplicate and split the documents",
            (SELF,) if documents.has_self(self.config) else (),
            {"corpus": self.digests["corpus"], "text": text},
            stages.corpus,
        )

    def _derive(self) -> Stage:
        """Build the stage that makes the target tokenizer from the source's."""
        name = self.config.target_tokenizer
        description, run = {
            EXTEND: ("add tokens of the text to the source tokenizer", stages.extend),
            PRUNE: ("remove tokens that the text does not need", stages.prune),
        }[name]
        settings = {
            name: config_to_dict(getattr(self.config, name)),
            "source_tokenizer": self.digests["source_tokenizer"],
            **self.seed,
        }
        return Stage(name, description, ("corpus",), settings, run)

    def _tokens(self) -> Stage:
        return Stage(
            "tokens",
            "tokenise the documents with both tokenizers",
            ("corpus", *self.derivation),
            self.vocabularies,
            stages.tokens,
            is_whole=states.has_tokens,
        )

    def _boundaries(self) -> Stage:
        return Stage(
            "boundaries",
            "find positions where tokens of both tokenizers end",
            ("corpus", *self.derivation, "tokens"),
            {},
            stages.boundaries,
            is_whole=states.has_boundaries,
        )

    def _align(self) -> Stage:
        settings = {
            **config_to_dict(self.config.alignment),
            **REMOVED[AlignmentConfig],
            "file": self.digests["alignment"],
            **self.digests["vectors"],
            "donor": self.digests["donor"],
        }
        return Stage(
            "align",
            "align target tokens to source tokens",
            ("corpus", *self.derivation, "tokens"),
            {"alignment": settings, **self.seed},
            stages.align,
        )

    def _init(self) -> Stage:
        return Stage(
            "init",
            "initialise the rows of the new vocabulary",
            ("tokens", "align"),
            {
                "source_model": self.digests["source_model"],
                "initialization": config_to_dict(self.config.initialization),
                **self.compute,
                **self.seed,
            },
            stages.init,
            on_all_processes=True,
            is_whole=lambda c: states.has_model(c, "init"),
        )

    def _train(self, name: str) -> Stage:
        before = tuple(self.models[: self.models.index(name)])
        settings = settings_of(getattr(self.config, name))
        if "teacher" in settings:
            settings["teacher"] = self.digests["teacher"]
        data = {"data": config_to_dict(self.config.data)}
        compute = {"compute": products_of(self.config.compute)}
        return Stage(
            name,
            f"train ({getattr(self.config, name).method})",
            ("tokens", *(["boundaries"] if name in self.taught else []), *before),
            {name: settings, **data, **compute, **self.seed, **self._selections(before)},
            lambda c: stages.train(c, name, before),
            resumes=True,
            on_all_processes=True,
            is_whole=lambda c: states.is_trained(c, name),
        )

    def _evaluate(self, state: str) -> Stage:
        is_model = state in self.models
        reached = tuple(self.models[: self.models.index(state) + 1]) if is_model else ()
        reference = () if state == "source" else (*self.derivation, "evaluate/source")
        evaluation = config_to_dict(self.config.evaluation) | {
            "abilities": self.digests["questions"],
            "chat_questions": self.digests["chat_questions"],
            "other_text": self.digests["other_text"],
        }
        return Stage(
            f"evaluate/{state}",
            f"measure {state}",
            ("corpus", *reference, *reached),
            {
                "evaluation": evaluation,
                "source_model": self.digests["source_model"],
                **self.vocabularies,
                **self.compute,
                **self.seed,
                **self._selections(reached),
            },
            lambda c: stages.evaluate(c, state, reached),
            on_all_processes=True,
        )

    def _export(self, reached: Sequence[str]) -> Stage:
        export = {**config_to_dict(self.config.export), **REMOVED[ExportConfig]}
        return Stage(
            "export",
            f"write the Hugging Face folder of {reached[-1]}",
            tuple(reached),
            {"export": export, **self._selections(reached)},
            lambda c: stages.export(c, reached),
            on_all_processes=True,
            is_whole=lambda c: states.has_model(c, "export"),
        )

    def _report(self, reported: Sequence[str], reached: Sequence[str]) -> Stage:
        evaluations = [f"evaluate/{state}" for state in reported]
        return Stage(
            "report",
            "write the page, tables, JSON and picture",
            ("corpus", "tokens", "align", *reached, *evaluations),
            {},
            lambda c: stages.report(c, reported),
        )
