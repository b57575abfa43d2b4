"""Compare initialisations of a new vocabulary: bits per byte after initialisation, after a short
probe of Stage 1 and after both stages.

    PYTHONPATH=. python benchmarks/alignment.py --pair llama-en16k,qwen3 --pair neox-30m,qwen3 \\
        --corpus mix-train.jsonl.xz \\
        --held-out held-out.jsonl.xz --language-field lang --workdir runs/alignment

A pair is a model folder and a tokenizer folder. Starts are the methods of `alignment.method` and
ablations of `composed` (WAYS). All starts of a pair use the same text, token vectors and contexts,
train on the same sequences in the same order, and are measured on the same held-out text. Writes
`alignment.json` and prints a table for each pair.
"""

import argparse
import dataclasses
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tokalign_jax import pipeline
from tokalign_jax.alignment import methods, vectors
from tokalign_jax.config import (
    BatchConfig,
    CheckpointConfig,
    ComputeConfig,
    Config,
    EvaluationConfig,
    OptimizerConfig,
    StageConfig,
    TextConfig,
    reads_source,
)
from tokalign_jax.evaluation import bits_per_byte
from tokalign_jax.initialization import contexts, initialization
from tokalign_jax.models import huggingface
from tokalign_jax.pipeline import states
from tokalign_jax.pipeline.context import Context
from tokalign_jax.text import canonical, corpus
from tokalign_jax.text.tokenizing import SIDES, TokenShards
from tokalign_jax.training import loop

WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "random": ({"method": "random"}, {}),
    "exact": ({"method": "exact"}, {}),
    "pieces": ({"method": "pieces"}, {}),
    "tokalign": ({"method": "tokalign", "vectors": "glove"}, {}),
    "lexicon": ({"method": "lexicon"}, {}),
    "topk": ({"method": "topk"}, {}),
    "composed": ({}, {}),
    "composed: GloVe vectors": ({"vectors": "glove"}, {}),
    "composed: no matches": ({"similarity_threshold": 2.0}, {}),
    "composed: mixtures alone": ({}, {"tokens": 0}),
    "composed: pieces alone": ({"similarity_threshold": 2.0}, {"tokens": 0}),
    "composed: learned rows alone": ({}, {"learned": 1.0}),
    "composed: 0.7 learned": ({}, {"learned": 0.7}),
    "composed: not calibrated": ({}, {"calibration": 0.0}),
    "composed: fully calibrated": ({}, {"calibration": 1.0}),
    "composed: not tuned": ({}, {"tuning": 0}),
}
"""Fields of alignment and initialisation that each start sets."""
RANDOM_ROWS = "random rows"
"""The start whose rows are drawn from a normal distribution with each source column's mean and
deviation."""
GROUPS = ("en", "code", "math")
"""Languages reported by themselves; the others are pooled."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pair", action="append", required=True, help="SOURCE_MODEL,TARGET_TOKENIZER"
    )
    parser.add_argument("--corpus", required=True)
    parser.add_argument(
        "--held-out", required=True, help="text that nothing is aligned or trained on"
    )
    parser.add_argument("--language-field", default="")
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--ways", default=",".join([*WAYS, RANDOM_ROWS]))
    parser.add_argument(
        "--probed", default="pieces,composed", help="the starts that get a probe of Stage 1"
    )
    parser.add_argument(
        "--trained", default="pieces,composed", help="the starts that get both stages"
    )
    parser.add_argument("--probe-steps", type=int, default=50)
    parser.add_argument("--steps", type=int, default=120, help="of each stage")
    parser.add_argument("--sequences", type=int, default=64, help="a step, over all devices")
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument(
        "--tokens", type=int, default=20_000_000, help="that the source model reads"
    )
    parser.add_argument(
        "--tuning", type=int, default=4_000_000, help="tokens that rows are tuned on"
    )
    parser.add_argument("--budget-bytes", type=int, default=5_000_000_000)
    parser.add_argument("--bytes-per-language", type=int, default=100_000)
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    results = {}
    for pair in arguments.pair:
        for rows in _measured(pair, arguments):
            results[pair] = rows
            content = {
                "arguments": vars(arguments),
                "device": str(jax.devices()[0]),
                "pairs": results,
            }
            (arguments.workdir / "alignment.json").write_text(
                json.dumps(content, indent=1, default=str)
            )
        show(results[pair])


def _measured(
    pair: str, arguments: argparse.Namespace
) -> Iterator[dict[str, dict[str, dict[str, float]]]]:
    """Bits per byte by start, state and group, with each start that was measured."""
    source, target = pair.split(",")
    stage = StageConfig(
        steps=arguments.steps,
        learning_rate=6.4e-4,
        optimizer=OptimizerConfig(row_damping=0.0),
        start_offset=0,
        log_every=50,
        checkpoints=CheckpointConfig(every=100_000),
        batch=BatchConfig(
            size=arguments.sequences,
            per_device=arguments.sequences,
            sequence_length=arguments.sequence_length,
        ),
    )
    text = TextConfig(
        language_field=arguments.language_field,
        held_out_fraction=0.002,
        budget_bytes=arguments.budget_bytes,
    )
    config = Config(
        source_model=source,
        target_tokenizer=target,
        corpus=arguments.corpus,
        text=text,
        stage1=stage,
        stage2=dataclasses.replace(
            stage, method="full", learning_rate=5e-5, start_offset="after_previous"
        ),
        compute=ComputeConfig(dtype=arguments.dtype, remat="dots", loss_chunk=8192),
        evaluation=EvaluationConfig(bytes_per_language=arguments.bytes_per_language),
    )
    config = dataclasses.replace(
        config,
        initialization=dataclasses.replace(
            config.initialization, tokens=arguments.tokens, tuning=arguments.tuning
        ),
    )
    workdir = arguments.workdir / f"{Path(source).name}-{Path(target).name}"
    pipeline.run(config, workdir, ["tokens"], print)
    starts = _Starts(Context(config, workdir, print))
    context = starts.context
    texts = held_out(config, arguments.held_out, workdir, arguments.bytes_per_language)
    of_source = measure(
        context, *states.load_state(context, ()), context.inputs.source_tokenizer, texts
    )
    rows = {"source": {"start": of_source}}
    short = dataclasses.replace(
        config, stage1=dataclasses.replace(stage, steps=arguments.probe_steps)
    )
    probe = Context(short, workdir, print)
    for way in arguments.ways.split(","):
        model = starts.model(way)
        rows[way] = {"start": measure(context, *model, context.inputs.target_tokenizer, texts)}
        if way in arguments.probed.split(","):
            rows[way]["probe"] = follow(probe, way, model, ("stage1",), texts)["stage1"]
        if way in arguments.trained.split(","):
            rows[way] |= follow(context, way, model, ("stage1", "stage2"), texts)
        print(way, rows[way], flush=True)
        yield rows


class _Starts:
    """Models with the new vocabulary of one pair; what several of them need is made once."""

    def __init__(self, context: Context):
        self.context = context
        self._vectors: dict[str, tuple[vectors.Vectors, vectors.Vectors]] = {}

    def model(self, way: str):
        """Config and parameters of the start of this name."""
        if way == RANDOM_ROWS:
            size = canonical.vocabulary_size(self.context.inputs.target_tokenizer)
            return initialization.random_rows(*self._source_model, size, jax.random.key(0))
        changed_alignment, changed_initialization = WAYS[way]
        config = dataclasses.replace(
            self.context.config,
            alignment=dataclasses.replace(self.context.config.alignment, **changed_alignment),
            initialization=dataclasses.replace(
                self.context.config.initialization, **changed_initialization
            ),
        )
        inputs = dataclasses.replace(
            self._inputs, config=config.alignment, known=self._inputs.spelled
        )
        if config.alignment.method in methods.NEED_VECTORS:
            source, target = self._of(config)
            inputs = dataclasses.replace(inputs, source=source, target=target)
        began = time.monotonic()
        aligned, measured = methods.make(inputs)
        model_config, params = initialization.initialize(*self._source_model, aligned)
        if reads_source(config):
            target = initialization.Side(
                model_config, params, self.context.inputs.target_tokenizer, self._shards[1]
            )
            reading, mesh = self._reading, self.context.mesh
            learned = initialization.learn(config, self._source, target, aligned, reading, print)
            target = target._replace(params=learned)
            calibrated = initialization.calibrate(config, self._source, target, aligned, mesh)
            target = target._replace(params=calibrated)
            params, _ = initialization.tune(
                config, self._source, target, aligned, reading, mesh, print
            )
        print(f"{way}: made in {time.monotonic() - began:.0f} s {measured}", flush=True)
        return model_config, params

    def _of(self, config: Config) -> tuple[vectors.Vectors, vectors.Vectors]:
        kind = config.alignment.vectors
        if kind not in self._vectors:
            shared = methods.pairs(self._inputs.spelled.exact)
            began = time.monotonic()
            source, target = self._shards
            *made, measured = vectors.make(
                config.alignment, source, target, config.seed, print, shared
            )
            self._vectors[kind] = (made[0], made[1])
            print(f"{kind}: {time.monotonic() - began:.0f} s {measured}", flush=True)
        return self._vectors[kind]

    @cached_property
    def _shards(self) -> list[TokenShards]:
        return [TokenShards.open(self.context.folder("tokens") / side) for side in SIDES]

    @cached_property
    def _source_model(self):
        model_config, _ = self.context.inputs.source_model
        return model_config, huggingface.load_params(
            self.context.inputs.source_folder, model_config, mesh=self.context.mesh
        )

    @cached_property
    def _source(self) -> initialization.Side:
        return initialization.Side(
            *self._source_model, self.context.inputs.source_tokenizer, self._shards[0]
        )

    @cached_property
    def _reading(self):
        target = initialization.Side(
            *self._source_model, self.context.inputs.target_tokenizer, self._shards[1]
        )
        config = self.context.config
        drawn = contexts.draw(self._shards[0], config.initialization.tokens, config.seed)
        texts = corpus.at(self.context.folder("corpus"), drawn)
        return initialization.read(config, self._source, target, texts, self.context.mesh, print)

    @cached_property
    def _inputs(self) -> methods.Inputs:
        source, target = self._shards
        return methods.Inputs(
            config=self.context.config.alignment,
            source_tokenizer=self.context.inputs.source_tokenizer,
            target_tokenizer=self.context.inputs.target_tokenizer,
            source_counts=source.counts,
            target_counts=target.counts,
            seed=self.context.config.seed,
            log=print,
        )


def held_out(config: Config, path: str, workdir: Path, budget: int) -> dict[str, list[str]]:
    """Every document of the held-out file, up to a budget of bytes per language."""
    text = dataclasses.replace(config.text, held_out_fraction=0.5)
    folder = workdir / "held_out"
    shutil.rmtree(folder, ignore_errors=True)
    corpus.run(dataclasses.replace(config, corpus=path, text=text), folder, print)
    documents = [d for batch in corpus.train_batches(folder) for d in batch] + list(
        corpus.held_out(folder)
    )
    return bits_per_byte.choose_texts(documents, budget)


def measure(context, model_config, params, tokenizer, texts) -> dict[str, float]:
    scores = bits_per_byte.evaluate(
        model_config,
        params,
        tokenizer,
        texts,
        sequence_length=context.config.evaluation.sequence_length,
        batch=16,
        compute=context.config.compute,
        mesh=context.mesh,
        log=print,
    )
    groups: dict[str, bits_per_byte.Score] = {}
    for language, score in scores.items():
        name = language if language in GROUPS else "other"
        groups[name] = groups[name] + score if name in groups else score
    return {name: score.bits_per_byte for name, score in groups.items()}


def follow(
    context: Context, start: str, model, trained: Sequence[str], texts
) -> dict[str, dict[str, float]]:
    """A start, measured after each of the training stages `trained`.

    Args:
      model: its config and parameters.
    """
    config, tokenizer = context.config, context.inputs.target_tokenizer
    model_config, params = model
    rows = {}
    shards = TokenShards.open(context.folder("tokens") / "target")
    end = 0
    for name in trained:
        folder = context.workdir / "starts" / start / name
        shutil.rmtree(folder, ignore_errors=True)
        began = time.monotonic()
        result = loop.run_stage(
            name,
            getattr(config, name),
            config,
            model_config,
            params,
            shards,
            folder,
            end,
            print,
            mesh=context.mesh,
        )
        print(f"{start} {name}: {time.monotonic() - began:.0f} s")
        params, end = result.params, result.stream_end
        rows[name] = measure(context, model_config, params, tokenizer, texts)
        shutil.rmtree(folder)
    return rows


def show(rows: dict[str, dict[str, dict[str, float]]]) -> None:
    names = [*GROUPS, "other"]
    print("| start | measured | " + " | ".join(names) + " |\n|---|---|" + "---:|" * len(names))
    for start, by_state in rows.items():
        for state, groups in by_state.items():
            print(
                f"| {start} | {state} | "
                + " | ".join(f"{groups.get(n, np.nan):.3f}" for n in names)
                + " |"
            )


if __name__ == "__main__":
    main()
