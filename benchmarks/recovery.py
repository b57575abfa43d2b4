"""What a start is worth: bits per byte after initialisation, Stage 1 and Stage 2, by start, in one run.

    python benchmarks/recovery.py --source-model llama-en16k --target-tokenizer qwen3 --corpus mix-train.jsonl.xz \\
        --held-out mix-valid.jsonl.xz --language-field lang --workdir runs/recovery

Starts: `own` (what the pipeline makes at its defaults), every method of `alignment.method` by its name (`tokalign`, as
published; `pieces`, exact matches by bytes, else the mean of the source pieces; `lexicon`, `topk`, `exact`, and `random`, every
token a random source token's rows) and `random-rows` (every row drawn from a normal distribution). All start from one
alignment's vectors, read the same sequences in the same order and are measured on the same text. Writes `recovery.json` and
prints a table.
"""

import argparse
import dataclasses
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from tokalign_jax import pipeline, stages
from tokalign_jax.alignment import methods, vectors
from tokalign_jax.config import AlignmentConfig, ComputeConfig, Config, EvaluationConfig, StageConfig, TextConfig
from tokalign_jax.evaluation import bits_per_byte
from tokalign_jax.initialization import initialization
from tokalign_jax.models import huggingface
from tokalign_jax.text import corpus, tokenizing
from tokalign_jax.training import loop

GROUPS = ("en", "code", "math")
"""Languages reported by themselves; the others are pooled."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source-model", required=True)
    parser.add_argument("--target-tokenizer", required=True)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--held-out", required=True, help="text that nothing is aligned or trained on")
    parser.add_argument("--language-field", default="")
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--starts", default="own,pieces,tokalign,random-rows")
    parser.add_argument("--trained", default="own,pieces,random-rows", help="the starts that are also trained")
    parser.add_argument("--steps", type=int, default=150, help="of each stage")
    parser.add_argument("--sequences", type=int, default=64, help="a step, over all devices")
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--bytes-per-language", type=int, default=100_000)
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()

    stage = StageConfig(
        steps=arguments.steps,
        learning_rate=6.4e-4,
        per_device_batch=arguments.sequences // jax.device_count(),
        accumulation=1,
        sequence_length=arguments.sequence_length,
        start_offset=0,
        log_every=50,
        checkpoint_every=100_000,
    )
    config = Config(
        source_model=arguments.source_model,
        target_tokenizer=arguments.target_tokenizer,
        corpus=arguments.corpus,
        text=TextConfig(language_field=arguments.language_field, held_out_fraction=0.002),
        alignment=AlignmentConfig(),
        stage1=stage,
        stage2=dataclasses.replace(stage, method="full", learning_rate=5e-5, start_offset="after_previous"),
        compute=ComputeConfig(dtype=arguments.dtype, remat=False, loss_chunk=8192),
        evaluation=EvaluationConfig(bytes_per_language=arguments.bytes_per_language),
    )
    pipeline.run(config, arguments.workdir, ["align", "init"], print)
    context = stages.Context(config, arguments.workdir, print)
    texts = held_out(config, arguments.held_out, arguments.workdir, arguments.bytes_per_language)
    rows = {"source": {"start": measure(context, *stages.load_state(context, ()), context.source_tokenizer, texts)}}
    for start in arguments.starts.split(","):
        trained = ("stage1", "stage2") if start in arguments.trained.split(",") else ()
        rows[start] = follow(context, start, initialised(context, start), trained, texts)
        show(rows)
    (arguments.workdir / "recovery.json").write_text(
        json.dumps({"arguments": vars(arguments), "rows": rows}, indent=1, default=str)
    )


def held_out(config: Config, path: str, workdir: Path, budget: int) -> dict[str, list[str]]:
    """Every document of the held-out file, up to a budget of bytes per language."""
    text = dataclasses.replace(config.text, held_out_fraction=0.5)
    folder = workdir / "held_out"
    shutil.rmtree(folder, ignore_errors=True)
    corpus.run(dataclasses.replace(config, corpus=path, text=text), folder, print)
    documents = [d for batch in corpus.train_batches(folder) for d in batch] + list(corpus.held_out(folder))
    return bits_per_byte.choose(documents, budget)


def measure(context, model_config, params, tokenizer, texts) -> dict[str, float]:
    scores = bits_per_byte.evaluate(
        model_config,
        params,
        tokenizer,
        texts,
        sequence_length=context.config.evaluation.sequence_length,
        batch=16,
        dtype=context.config.compute.dtype,
        loss_chunk=context.config.compute.loss_chunk,
        log=print,
    )
    groups: dict[str, bits_per_byte.Score] = {}
    for language, score in scores.items():
        name = language if language in GROUPS else "other"
        groups[name] = groups[name] + score if name in groups else score
    return {name: score.bits_per_byte for name, score in groups.items()}


def follow(context: stages.Context, start: str, model, trained: Sequence[str], texts) -> dict[str, dict[str, float]]:
    """A start, measured before and after each of the training stages `trained`.

    Args:
      model: its config and parameters.
    """
    config, tokenizer = context.config, context.target_tokenizer
    model_config, params = model
    rows = {"start": measure(context, model_config, params, tokenizer, texts)}
    shards = tokenizing.TokenShards.open(context.folder("tokens") / "target")
    end = 0
    for name in trained:
        folder = context.workdir / "starts" / start / name
        shutil.rmtree(folder, ignore_errors=True)
        began = time.monotonic()
        result = loop.run_stage(name, getattr(config, name), config, model_config, params, shards, folder, end, print)
        print(f"{start} {name}: {time.monotonic() - began:.0f} s")
        params, end = result.params, result.next_sequence
        rows[name] = measure(context, model_config, params, tokenizer, texts)
        shutil.rmtree(folder)
    return rows


def initialised(context: stages.Context, start: str):
    """The source model with the target vocabulary, by one of the starts."""
    if start == "own":
        return stages.load_state(context, ("init",))
    model_config, _ = context.source_model
    params = huggingface.load_params(context.source_folder, model_config)
    if start == "random-rows":
        return initialization.random_rows(model_config, params, len(context.target_tokenizer), jax.random.key(0))
    found, _ = methods.make(_inputs(context, start))
    return initialization.initialize(model_config, params, found)


def _inputs(context: stages.Context, method: str) -> methods.Inputs:
    """What another method has to make an alignment from: the vectors and counts of this run."""
    with np.load(context.folder("align") / vectors.FILE) as file:
        sides = [
            vectors.Vectors(file[f"{side}_ids"], file[f"{side}_vectors"].astype(np.float32))
            for side in ("source", "target")
        ]
    counts = [tokenizing.TokenShards.open(context.folder("tokens") / side).counts for side in ("source", "target")]
    return methods.Inputs(
        config=dataclasses.replace(context.config.alignment, method=method),
        source_tokenizer=context.source_tokenizer,
        target_tokenizer=context.target_tokenizer,
        source_counts=counts[0],
        target_counts=counts[1],
        seed=context.config.seed,
        log=print,
        source=sides[0],
        target=sides[1],
    )


def show(rows: dict[str, dict[str, dict[str, float]]]) -> None:
    names = [*GROUPS, "other"]
    print("| start | measured | " + " | ".join(names) + " |\n|---|---|" + "---:|" * len(names))
    for start, states in rows.items():
        for state, groups in states.items():
            print(f"| {start} | {state} | " + " | ".join(f"{groups.get(n, np.nan):.3f}" for n in names) + " |")


if __name__ == "__main__":
    main()
