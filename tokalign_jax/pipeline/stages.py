"""Stages of the pipeline: the I/O of each around the pure core."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerBase

from tokalign_jax.alignment import alignment, methods
from tokalign_jax.config import (
    AUTO,
    SELF,
    DistillationConfig,
    StageConfig,
    learns_from_source,
    teacher_of,
    training_stages,
)
from tokalign_jax.evaluation import measures, overlap, samples
from tokalign_jax.initialization import contexts, initialization, self_corpus, self_text
from tokalign_jax.initialization.start import make_start
from tokalign_jax.models import hub, huggingface, opening, peft, serving
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.families import qwen
from tokalign_jax.parallel import distributed
from tokalign_jax.pipeline import held_out, identities, resources
from tokalign_jax.pipeline.checks import can_chat, chat_check, exports_as_llama, warn_of_llama
from tokalign_jax.pipeline.context import Context
from tokalign_jax.pipeline.states import load_state, open_shards, state_of
from tokalign_jax.planning import disk, worth
from tokalign_jax.planning.machine import Machine
from tokalign_jax.reporting import card_facts, inspection, pages, token_pieces
from tokalign_jax.reporting import report as reporting
from tokalign_jax.reporting.model_card import CARD, model_card
from tokalign_jax.text import canonical, mining, numbers, pruning, shared_boundaries, tokenizing
from tokalign_jax.text import corpus as documents
from tokalign_jax.text.canonical import vocabulary_size
from tokalign_jax.training import distillation, loop, source_teacher
from tokalign_jax.training import states as training_states
from tokalign_jax.training.batches import SourceText
from tokalign_jax.training.step import NEXT_TOKEN, Objective

INSPECTION = "inspection.json"
"""File in the folder of an alignment, with its tables for the report."""


def corpus(context: Context) -> Mapping[str, Any]:
    """Read, de-duplicate and split the documents."""
    folder = context.folder("corpus")
    return documents.run(context.corpus_config, folder, context.log, chat_check(context))


def write_self(context: Context) -> Mapping[str, Any]:
    """Let the source model write the part of the corpus called `self`."""
    dtype = jnp.dtype(context.config.compute.dtype)
    config, params = load_state(context, (), training_states.inference_dtype(dtype))
    tokenizer = context.inputs.source_tokenizer
    writer = self_text.Writer(config, params, tokenizer, dtype, context.mesh, context.config.seed)
    tokens = context.config.text.self_tokens
    written = self_corpus.write(writer, tokens, can_chat(context), context.log)
    file = context.folder(SELF) / documents.SELF_TEXT
    return distributed.on_first(lambda: self_corpus.save(written, file))


def extend(context: Context) -> Mapping[str, Any]:
    """Make the target tokenizer by adding tokens of the text to the source's."""
    return mining.run(
        context.config,
        context.folder("corpus"),
        context.inputs.source_tokenizer,
        context.folder("extend"),
        context.log,
    )


def prune(context: Context) -> Mapping[str, Any]:
    """Make the target tokenizer by removing tokens of the source's that no text needs."""
    return pruning.run(
        context.config,
        context.folder("corpus"),
        context.inputs.source_tokenizer,
        context.folder("prune"),
        context.log,
    )


def tokens(context: Context) -> Mapping[str, Any]:
    """Tokenise the documents with both tokenizers."""
    return tokenizing.run(
        context.config,
        context.folder("corpus"),
        context.inputs.source_tokenizer,
        context.inputs.target_tokenizer,
        context.folder("tokens"),
        context.log,
    )


def boundaries(context: Context) -> Mapping[str, Any]:
    """Find the shared boundaries, at which both models have read the same text."""
    inputs = context.inputs
    return shared_boundaries.run(
        documents.train_batches(context.folder("corpus")),
        (inputs.source_tokenizer, open_shards(context, "source")),
        (inputs.target_tokenizer, open_shards(context, "target")),
        context.folder("boundaries"),
        context.log,
    )


def align(context: Context) -> Mapping[str, Any]:
    """Align target tokens to source tokens; write tables of the alignment."""
    summary = methods.run(
        context.config,
        context.folder("corpus"),
        context.folder("tokens"),
        context.inputs.source_tokenizer,
        context.inputs.target_tokenizer,
        context.folder("align"),
        context.log,
        _donor(context),
        np.load(context.inputs.target_folder / pruning.KEPT) if context.inputs.prunes else None,
    )
    content = json.dumps(_alignment_tables(context), ensure_ascii=False)
    (context.folder("align") / INSPECTION).write_text(content + "\n", encoding="utf-8")
    return summary


def _donor(context: Context) -> methods.Donor | None:
    if context.inputs.donor_folder is None:
        return None
    config, _ = hub.load_config(context.inputs.donor_folder)
    read = huggingface.stored_reader(context.inputs.donor_folder, config)
    embedding = read("embed_tokens/embedding")
    return methods.Donor(
        embedding, embedding if config.tie_word_embeddings else read("lm_head/kernel")
    )


def _alignment_tables(context: Context) -> list[dict[str, Any]]:
    """Return the tables of the alignment, without the first, which names its inputs."""
    source, target = context.inputs.source_tokenizer, context.inputs.target_tokenizer
    aligned = alignment.load(context.folder("align") / "alignment.npz", source, target)
    old, new = (
        inspection.vocabulary(
            tokenizer, side, np.load(context.folder("tokens") / side / "counts.npy")
        )
        for side, tokenizer in (("source", source), ("target", target))
    )
    subject = inspection.Subject(aligned, old, new, canonical.PieceCutter(source), space=None)
    return [pages.to_json(section) for section in inspection.report(subject)[1:]]


def init(context: Context) -> Mapping[str, Any]:
    """Initialise the rows of the new vocabulary; write the model as a Hugging Face folder."""
    inputs, config = context.inputs, context.config
    model, raw = inputs.source_model
    source_shards, target_shards = (
        tokenizing.TokenShards.open(context.folder("tokens") / side) for side in tokenizing.SIDES
    )
    aligned = alignment.load(
        context.folder("align") / "alignment.npz", inputs.source_tokenizer, inputs.target_tokenizer
    )

    def draw(tokens: int) -> Iterator[documents.Document]:
        chosen = contexts.draw(source_shards, tokens, config.seed)
        return documents.at(context.folder("corpus"), chosen)

    start = make_start(
        config,
        initialization.Side(
            model,
            huggingface.load_params(inputs.source_folder, model, mesh=context.mesh),
            inputs.source_tokenizer,
            source_shards,
        ),
        inputs.target_tokenizer,
        target_shards,
        aligned,
        draw,
        context.mesh,
        context.log,
        inputs.kept,
    )
    _write(context, "init", start.config, start.params, raw, "float32")
    return {"tuned": dict(start.facts)}


MANY_PASSES = 4
"""Epochs beyond which repeated text helps little (Muennighoff et al. 2023, arXiv 2305.16264)."""


def stream_starts(context: Context, shards: tokenizing.TokenShards) -> dict[str, int]:
    """Return the offset in tokens of each training stage in the shuffled stream.

    Raises:
      UserError: the text is too short for a stage (`loop.plan_stage`).
    """
    end, starts = 0, {}
    for name, stage in training_stages(context.config).items():
        starts[name] = end
        _, end = loop.plan_stage(name, stage, context.config, context.inputs.new_model, shards, end)
    return starts


def check_stream(context: Context) -> None:
    """Check that the text is long enough for the training stages; warn of many epochs.

    Raises:
      UserError: the text is too short for a stage.
    """
    shards = open_shards(context, "target")
    stream_starts(context, shards)
    size = len(shards.tokens)
    for name, stage in training_stages(context.config).items():
        passes = stage.steps * stage.batch.size * stage.batch.sequence_length / size
        if passes > MANY_PASSES:
            context.log(
                f"warning: {name} reads the {size:,} tokens of the text {passes:.0f} times: "
                "lower its steps, or give more text"
            )


def train(context: Context, name: str, before: Sequence[str]) -> Mapping[str, Any]:
    """Train one stage, from the states before it."""
    setup = resources.setups(context)[name]
    stage, compute = setup.stage, setup.compute
    if getattr(context.config, name).batch.per_device == AUTO:
        context.log(
            f"{name}: batch.per_device=auto: {stage.batch.per_device} sequences per device at "
            f"once, remat={compute.remat}"
        )
    dtype = training_states.training_dtype(stage, jnp.dtype(context.config.compute.dtype))
    config, *initial = load_state(context, before, dtype, loop.frozen_kind(stage))
    shards = open_shards(context, "target")
    starts = stream_starts(context, shards)
    settings = dataclasses.replace(context.config, compute=compute)
    objective = _objective(context, stage, config)
    validation_text = held_out.validation_shards(context, name)
    result = loop.run_stage(
        name,
        stage,
        settings,
        config,
        initial.pop(),  # no reference stays here: training copies the trainable leaves
        shards,
        context.folder(name),
        starts[name],
        context.log,
        context.mesh,
        objective,
        validation_text,
    )
    return {"stream_end": result.stream_end, "tokens": result.tokens}


def _objective(context: Context, stage: StageConfig, model: ModelConfig) -> Objective:
    """Return the objective of a training stage, with its teacher loaded."""
    if learns_from_source(stage):
        return _source_objective(context, stage)
    folder, config = context.inputs.teacher_folder, context.inputs.teacher_model
    if not (isinstance(stage, DistillationConfig) and teacher_of(stage) and folder and config):
        return NEXT_TOKEN
    context.log(f"stage3: loading the teacher '{stage.teacher}'")
    params = huggingface.load_params(
        folder, config, jnp.dtype(context.config.compute.dtype), context.mesh
    )
    params = distillation.with_rows(params, model.vocab_size, context.mesh)
    # The teacher may lack rows for special tokens that no text has (Gemma 3 1B).
    shared_rows = min(config.vocab_size, context.inputs.target_size)
    identity = identities.identities(context)["teacher"]
    teacher = distillation.Teacher(config, params, shared_rows, identity)
    return distillation.objective(stage, teacher)


def _source_objective(context: Context, stage: StageConfig) -> Objective:
    """Return the objective of a stage whose teacher is the source model, loaded here."""
    dtype = jnp.dtype(context.config.compute.dtype)
    config, params = load_state(context, (), lambda path: dtype)
    identity = identities.identities(context)["source_model"]
    teacher = source_teacher.Teacher(config, params, identity)
    positions = shared_boundaries.open_positions(context.folder("boundaries"))
    text = SourceText(open_shards(context, "source"), positions)
    width = source_teacher.source_length(stage.batch.sequence_length, config)
    context.log(
        f"the source model is the teacher; it reads {width:,} source tokens for "
        f"{stage.batch.sequence_length:,} target tokens"
    )
    return source_teacher.objective(stage, teacher, text)


def export(context: Context, states: Sequence[str]) -> Mapping[str, Any]:
    """Write the Hugging Face folder of the last state."""
    base, config, changes = state_of(context, states)
    _, raw = context.inputs.source_model
    folder = context.folder("export")
    apart = changes.adapters if context.config.export.adapters == "apart" else {}
    if apart:
        changes = changes._replace(adapters={})
    read = training_states.reader(base, config, changes)
    if exports_as_llama(context):
        if context.inputs.derives:  # the tokenizer exists only since its stage is done
            warn_of_llama(context)
        config, read, raw = qwen.as_llama(config, read, raw)
    _write(context, "export", config, read, raw, context.config.export.dtype)
    if apart:
        names = huggingface.stored_dtypes(context.inputs.source_folder)
        peft.save_adapters(folder / peft.FOLDER, config, apart, names, distributed.is_first())
    return distributed.on_first(lambda: _publish(context, states, config, folder))


def _publish(
    context: Context, states: Sequence[str], model: ModelConfig, folder: Path
) -> Mapping[str, Any]:
    """Check that transformers opens the export, add model card and licence, push it to the hub.

    Raises:
      UserError: AutoTokenizer does not open it as the tokenizer that the model was trained with.
    """
    opening.check_export(folder, context.inputs.target_tokenizer)
    target = None if context.inputs.derives else context.inputs.target_folder
    raw = hub.read_json(folder / "config.json") or {}
    for warning in serving.warnings(raw, context.inputs.target_tokenizer, target):
        context.log(f"warning: {warning}")
    terms = hub.copy_license_files(context.inputs.source_folder, folder)
    facts = card_facts.facts(
        context.config, context.workdir, states, model, context.inputs.source_folder, terms
    )
    (folder / CARD).write_text(model_card(facts), encoding="utf-8", errors="replace")
    size = sum(file.stat().st_size for file in folder.rglob("*"))
    summary = {"folder": str(folder), "bytes": size}
    if repository := context.config.export.push_to_hub:
        summary["pushed_to"] = hub.push_to_hub(folder, repository)
        context.log(f"export: pushed to {summary['pushed_to']}")
    return summary


def _write(
    context: Context,
    name: str,
    config: ModelConfig,
    params: dict | huggingface.Reader,
    raw: dict[str, Any],
    dtypes: str,
) -> None:
    """Write a Hugging Face folder with the target tokenizer."""
    folder = context.folder(name)
    huggingface.save_checkpoint(
        folder,
        params,
        config,
        raw,
        context.inputs.target_tokenizer,
        dtypes=dtypes,
        source_folder=context.inputs.source_folder,
        writes=distributed.is_first(),
    )
    distributed.barrier(f"{name} is written")


def evaluate(context: Context, name: str, states: Sequence[str]) -> Mapping[str, Any]:
    """Measure a state of the model and let it continue the prompts; write `scores.json`.

    For the source model, the likelihood of each token is also written: the fidelity of later states
    is measured against it.
    """
    settings = context.config.evaluation
    compute = context.config.compute
    config, params = load_state(
        context, states, training_states.inference_dtype(jnp.dtype(compute.dtype))
    )
    tokenizer = (
        context.inputs.source_tokenizer if name == "source" else context.inputs.target_tokenizer
    )
    if name == "random":
        size, key = vocabulary_size(tokenizer), jax.random.key(context.config.seed)
        config, params = initialization.random_rows(config, params, size, key, context.inputs.kept)
        params = jax.tree.map(
            lambda x: x.astype(compute.dtype) if isinstance(x, np.ndarray) else x, params
        )
    material, folder = held_out.material(context), context.folder("evaluate/source")
    generates = name != "random"
    measured = measures.measure(
        name, config, params, tokenizer, material, context.mesh, context.log, generates
    )
    continuations = []
    if generates:
        prompts = settings.prompts or samples.passages(material.texts)
        continuations = samples.continuations(
            config, params, tokenizer, prompts, settings.sample_tokens, compute.dtype
        )
    if distributed.is_first():
        if name == "source":  # the text is the same in all states
            measured.reference.save(folder)
            content = measures.summary(measured, None, material)
            content["overlap"] = _overlap(context, material.texts)
        else:
            reference = measures.Reference.load(folder, context.inputs.source_tokenizer, material)
            content = measures.summary(measured, reference, material)
        path = context.folder(f"evaluate/{name}") / measures.SCORES
        text = json.dumps({**content, "samples": continuations}, indent=1, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")
    return {}


def _overlap(context: Context, texts: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Measure how much of the held-out text is in the training text; warn of much."""
    folder = context.folder("corpus")
    total = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["train_bytes"]
    result = overlap.overlap(texts, documents.train_batches(folder), context.log, total)
    for line in overlap.warning_lines(result):
        context.log(line)
    return result


def _worth(
    context: Context,
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
    texts: Mapping[str, Sequence[str]],
) -> Mapping[str, Any]:
    """Estimate how the new vocabulary changes speed and size on these texts."""
    model, raw = context.inputs.source_model
    flat_texts = [document for group in texts.values() for document in group]
    characters = sum(map(len, flat_texts))
    per_token = {
        side: characters / max(int(pruning.count(tokenizer, flat_texts).sum()), 1)
        for side, tokenizer in tokenizers.items()
    }
    multiple = context.config.initialization.rows_multiple_of
    new_rows = -(-vocabulary_size(tokenizers["target"]) // multiple) * multiple
    rows = {"source": model.vocab_size, "target": new_rows}
    length = min(context.config.stage2.batch.sequence_length, model.max_positions)
    itemsize = disk.exported_bytes(context.config, raw)
    return worth.worth(model, rows, per_token, itemsize, length, Machine.of())


def report(context: Context, states: Sequence[str]) -> Mapping[str, Any]:
    """Write the report: the page, tables, JSON and picture."""
    tokenizers = {
        "source": context.inputs.source_tokenizer,
        "target": context.inputs.target_tokenizer,
    }
    texts = held_out.material(context).texts
    inspected = json.loads((context.folder("align") / INSPECTION).read_text(encoding="utf-8"))
    extra = {
        "passages": token_pieces.of_passages(tokenizers, texts),
        "inspection": inspected,
        "held_out": hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest(),
        "numbers": numbers.warning_line(*tokenizers.values()),
        "worth": _worth(context, tokenizers, texts),
    }
    return reporting.run(
        context.config,
        context.workdir,
        states,
        identities.run_identity(context),
        context.folder("report"),
        context.log,
        extra,
    )
