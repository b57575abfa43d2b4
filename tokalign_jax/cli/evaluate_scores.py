"""Measurements of `tokalign evaluate`: the content of `scores.json`."""

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tokalign_jax.alignment import alignment, scoring
from tokalign_jax.cli.evaluate_inputs import EvaluatedModel, Inputs, training_text
from tokalign_jax.evaluation import (
    bits_per_byte,
    downstream,
    drafting,
    measures,
    overlap,
    samples,
    similarity,
    speed,
)
from tokalign_jax.evaluation.fertility import fertility, words
from tokalign_jax.parallel import sharding
from tokalign_jax.reporting.report import PACKAGES, version
from tokalign_jax.text import canonical
from tokalign_jax.training.states import inference_dtype
from tokalign_jax.utils.progress import Log


def measure(inputs: Inputs, log: Log) -> dict[str, Any]:
    """Measure all models, one after the other; return the content of `scores.json`."""
    # First, and in a separate process, while the memory of a GPU is free.
    tasks = _run_tasks(inputs, log)
    content: dict[str, Any] = {"models": {}, "differences": {}}
    if inputs.teacher:
        content["teacher"] = {"name": inputs.teacher.name, "folder": str(inputs.teacher.folder)}
    training = training_text(inputs, log)
    if training:
        content["overlap"] = overlap.overlap(inputs.material.texts, training, log)
    mesh, dtype = _mesh(inputs), inference_dtype(inputs.dtype)
    teacher = _load(inputs.teacher, mesh, dtype) if inputs.teacher else None
    first: measures.Measured | None = None
    reference: measures.Reference | None = None
    for entry in inputs.models:
        model = _load(entry, mesh, dtype)
        measured = measures.measure(
            entry.name, model.config, model.params, entry.tokenizer, inputs.material, mesh, log
        )
        scores = {**_scores(inputs, entry, measured, reference), **tasks.get(entry.name, {})}
        scores["generation"] = _speed(inputs, entry, model, scores["pooled"]["tokens"], log)
        if teacher:
            scores["drafting"] = _drafting(inputs, entry, model, teacher, mesh, log)
        content["models"][entry.name] = scores
        if first is None:
            first, reference = measured, measured.reference
            if inputs.aligned is not None:
                content["alignment"] = _score_alignment(inputs, inputs.aligned, model, log)
        else:
            seed = inputs.args.seed
            content["differences"][entry.name] = _difference(measured.costs, first.costs, seed)
        del model  # its memory is free before the next one is loaded
    return {**content, **_conditions(inputs)}


def _conditions(inputs: Inputs) -> dict[str, Any]:
    """Return the settings, versions and devices of the measurements."""
    return {
        "settings": {
            **{k: str(v) if isinstance(v, Path) else v for k, v in vars(inputs.args).items()},
            "sequence_length": inputs.material.sequence_length,
            "dtype": inputs.dtype,
        },
        "versions": {**{p: version(p) for p in PACKAGES}, "python": platform.python_version()},
        "devices": [str(device.device_kind) for device in jax.devices()],
    }


def _mesh(inputs: Inputs) -> Mesh:
    """Return the run's mesh, or one over which the two largest models fit."""
    if inputs.context:
        return inputs.context.mesh
    models = [*inputs.models, *([inputs.teacher] if inputs.teacher else [])]
    return sharding.make_mesh(state_bytes=2 * max(map(_stored_bytes, models)))


def _stored_bytes(model: EvaluatedModel) -> int:
    files = model.folder.glob("*.safetensors") if model.folder else ()
    return sum(file.stat().st_size for file in files)


def _load(model: EvaluatedModel, mesh: Mesh, dtype: Any) -> drafting.Model:
    return drafting.Model(model.config, model.load(mesh, dtype))


def _run_tasks(inputs: Inputs, log: Log) -> dict[str, dict[str, Any]]:
    """Run downstream tasks on the models that have a folder; return results by model."""
    args = inputs.args
    folders = {model.name: model.folder for model in inputs.models if model.folder}
    if not args.tasks or not folders:
        return {}
    log(f"tasks: {', '.join(args.tasks)} on {', '.join(folders)}, by lm-eval")
    results = downstream.run_in_subprocess(
        [*folders.values()], args.tasks, args.task_folder, args.limit
    )
    return {name: {"tasks": result} for name, result in zip(folders, results)}


def _scores(
    inputs: Inputs,
    model: EvaluatedModel,
    measured: measures.Measured,
    reference: measures.Reference | None,
) -> dict[str, Any]:
    """Return the scores of a model that need its likelihoods and its tokenizer alone.

    Args:
      reference: measurements of the first model; None for that model itself.
    """
    return {
        "folder": str(model.folder or ""),
        "vocabulary": model.config.vocab_size,
        "loses": canonical.losses(model.tokenizer),
        **measures.summary(measured, reference, inputs.material),
        **_costs_by_language(inputs, measured.costs),
    }


def _costs_by_language(inputs: Inputs, costs: Mapping[str, bits_per_byte.Costs]) -> dict[str, Any]:
    """Return bits per byte, bytes per token and fertility, by language and pooled."""
    seed, texts = inputs.args.seed, inputs.material.texts
    num_words = {language: int(words(documents).sum()) for language, documents in texts.items()}

    def with_words(entry: dict[str, Any], count: int) -> dict[str, Any]:
        return {**entry, "words": count, "fertility": fertility(entry["tokens"], count)}

    by_language = bits_per_byte.summaries(costs, seed)
    pooled = bits_per_byte.summary([*costs.values()], seed)
    return {
        "languages": {
            language: with_words(entry, num_words[language])
            for language, entry in by_language.items()
        },
        "pooled": with_words(pooled, sum(num_words.values())),
    }


def _difference(
    costs: Mapping[str, bits_per_byte.Costs], first: Mapping[str, bits_per_byte.Costs], seed: int
) -> dict[str, Any]:
    by_language = {
        language: bits_per_byte.difference([entry], [first[language]], seed)
        for language, entry in costs.items()
    }
    pooled = bits_per_byte.difference([*costs.values()], [*first.values()], seed)
    return {"languages": by_language, "pooled": pooled}


def _speed(
    inputs: Inputs, entry: EvaluatedModel, model: drafting.Model, num_tokens: int, log: Log
) -> dict[str, Any]:
    """Time greedy decoding.

    Args:
      num_tokens: tokens of the held-out text with the model's tokenizer.
    """
    texts = inputs.material.texts
    measured = speed.measure(
        model.config,
        jax.tree.map(lambda x: x.astype(inputs.dtype), model.params),
        entry.tokenizer,
        samples.passages(texts, 2),
        steps=inputs.args.steps,
        repeats=inputs.args.repeats,
        dtype=inputs.dtype,
    )
    documents = [document for group in texts.values() for document in group]
    summary = measured.summary(documents, num_tokens)
    log(
        f"{entry.name}: {measured.median:.1f} steps/s, "
        f"{summary['characters_per_second']:.0f} characters/s"
    )
    return summary


def _drafting(
    inputs: Inputs,
    entry: EvaluatedModel,
    model: drafting.Model,
    teacher: drafting.Model,
    mesh: Mesh,
    log: Log,
) -> dict[str, Any]:
    """Measure the acceptance rate of the model's drafts in speculative decoding."""
    args = inputs.args
    assert inputs.teacher
    tokenizer = inputs.teacher.tokenizer
    if difference := drafting.vocabulary_difference(entry.tokenizer, tokenizer):
        return {"not_comparable": difference}
    return {
        "languages": drafting.acceptance(
            model,
            teacher,
            tokenizer,
            inputs.material.texts,
            gamma=args.gamma,
            temperature=args.temperature,
            prompts=args.prompts,
            length=args.prompt_tokens,
            steps=args.steps,
            dtype=inputs.dtype,
            mesh=mesh,
            log=log,
            what=f"{entry.name} drafts",
        )
    }


def _score_alignment(
    inputs: Inputs, aligned: alignment.Alignment, model: drafting.Model, log: Log
) -> dict[str, Any]:
    """Score an alignment by BLEU-1 and sentence similarity on lines drawn at random.

    Args:
      model: the first model, whose mean hidden states embed a line unless an encoder is given.
    """
    source, target = (entry.tokenizer for entry in inputs.models[:2])
    lines = _draw_lines(inputs)
    log(f"alignment: {sum(map(len, lines.values()))} lines")
    mapping = aligned.heaviest()
    encode = inputs.encoder or similarity.mean_states(
        model.config, model.params, source, inputs.dtype
    )
    encoder = Path(inputs.args.encoder).name if inputs.encoder else ""
    by_language = similarity.compare(mapping, source, target, lines, encode)
    for language, entry in by_language.items():
        entry["bleu_1"] = scoring.score(mapping, source, target, lines[language])
    every_line = [line for group in lines.values() for line in group]
    return {
        "bleu_1": scoring.score(mapping, source, target, every_line),
        "embedded_by": encoder or "the mean final states of the first model",
        "languages": by_language,
    }


def _draw_lines(inputs: Inputs) -> dict[str, list[str]]:
    """Draw `--lines` lines of the held-out text; return them by language, in their order."""
    candidates = [
        (language, line)
        for language, group in inputs.material.texts.items()
        for document in group
        for line in document.splitlines()
        if line.strip()
    ]
    rng = np.random.default_rng(inputs.args.seed)
    lines: dict[str, list[str]] = {}
    for i in np.sort(rng.permutation(len(candidates))[: inputs.args.lines]):
        language, line = candidates[i]
        lines.setdefault(language, []).append(line)
    return lines
