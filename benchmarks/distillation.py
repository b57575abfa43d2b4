"""Stage 3 with and without a teacher, at an equal number of tokens: bits per byte before and after,
tokens per second, seconds per step.

    PYTHONPATH=. python benchmarks/distillation.py --teacher llama-en16k --corpus mix-train.jsonl.xz \\
        --language-field lang \\
        --workdir runs/distillation --steps 40 --sequences 4 --sequence-length 256 --dtype float32

The source model is adapted to the teacher's tokenizer in Stage 1 and Stage 2 once. From there,
every variant (WAYS) trains on the same sequences in the same order at the same learning rates;
`next token` is a Stage 3 without the teacher. The pipeline runs everything in one workdir, so that
an interrupted benchmark resumes where it stopped. Writes `distillation.json` and prints a table.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from tokalign_jax import pipeline
from tokalign_jax.config import (
    AlignmentConfig,
    BatchConfig,
    CheckpointConfig,
    ComputeConfig,
    Config,
    DistillationConfig,
    EvaluationConfig,
    InitializationConfig,
    OptimizerConfig,
    StageConfig,
    TextConfig,
)
from tokalign_jax.evaluation import bits_per_byte
from tokalign_jax.evaluation.bits_per_byte import Score
from tokalign_jax.models import huggingface
from tokalign_jax.pipeline.context import Context
from tokalign_jax.text import corpus
from tokalign_jax.training import metrics

WAYS: dict[str, dict[str, Any]] = {
    "next token": {"weight": 0.0},
    "forward": {"divergence": "forward"},
    "reverse": {"divergence": "reverse"},
    "mixed": {"divergence": "mixed"},
    "forward, T = 2": {"divergence": "forward", "temperature": 2.0},
    "half forward, half next token": {"divergence": "forward", "weight": 0.5},
}
"""Fields of Stage 3 that each way sets."""
GROUPS = ("en", "code", "math")
"""Languages reported by themselves; the others are pooled."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--source", default="embedded", help="the model that gets the teacher's tokenizer"
    )
    parser.add_argument("--teacher", required=True, help="a model folder")
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--language-field", default="")
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument(
        "--ways", default=";".join(list(WAYS)[:4]), help=f"separated by ';', of: {'; '.join(WAYS)}"
    )
    parser.add_argument(
        "--adapting-steps", type=int, default=0, help="of Stage 1 and of Stage 2; 0: as --steps"
    )
    parser.add_argument("--steps", type=int, default=200, help="of Stage 3")
    parser.add_argument("--sequences", type=int, default=64, help="a step, over all devices")
    parser.add_argument(
        "--at-once", type=int, default=64, help="sequences that a device holds at once"
    )
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="of Stage 3")
    parser.add_argument(
        "--tokens", type=int, default=500_000, help="that the source model reads for its new rows"
    )
    parser.add_argument("--budget-bytes", type=int, default=5_000_000_000)
    parser.add_argument("--bytes-per-language", type=int, default=20_000)
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()

    config = config_of(arguments)
    rows: dict[str, dict[str, Any]] = {}
    for way in arguments.ways.split(";"):
        taught = dataclasses.replace(config.stage3, **WAYS[way])
        taught_config = dataclasses.replace(config, stage3=taught)
        if not rows:
            rows = start(taught_config, arguments.workdir)
        pipeline.run(taught_config, arguments.workdir, ["evaluate/stage3"], print)
        rows[way] = {
            "bits_per_byte": scored(arguments.workdir, "stage3"),
            **speed(arguments.workdir / "stage3"),
        }
        content = {
            "arguments": vars(arguments),
            "device": str(jax.devices()[0].device_kind),
            "rows": rows,
        }
        (arguments.workdir / "distillation.json").write_text(
            json.dumps(content, indent=1, default=str)
        )
    show(rows)


def config_of(arguments: argparse.Namespace) -> Config:
    stage = StageConfig(
        steps=arguments.adapting_steps or arguments.steps,
        learning_rate=1e-3,
        optimizer=OptimizerConfig(row_damping=0.0),
        start_offset=0,
        log_every=50,
        checkpoints=CheckpointConfig(every=100_000),
        batch=BatchConfig(
            size=arguments.sequences,
            per_device=arguments.at_once,
            sequence_length=arguments.sequence_length,
        ),
    )
    after = {
        **vars(stage),
        "method": "full",
        "start_offset": "after_previous",
        "learning_rate": arguments.learning_rate,
    }
    return Config(
        source_model=arguments.source,
        target_tokenizer=arguments.teacher,
        corpus=arguments.corpus,
        text=TextConfig(
            language_field=arguments.language_field,
            budget_bytes=arguments.budget_bytes,
            held_out_fraction=0.02,
        ),
        alignment=AlignmentConfig(),
        initialization=InitializationConfig(tokens=arguments.tokens, tuning=0),  # as docs/ has it
        stage1=stage,
        stage2=StageConfig(**after),
        stage3=DistillationConfig(**{**after, "steps": arguments.steps}, teacher=arguments.teacher),
        compute=ComputeConfig(dtype=arguments.dtype, remat="dots"),
        evaluation=EvaluationConfig(
            bytes_per_language=arguments.bytes_per_language,
            sequence_length=arguments.sequence_length,
            random_baseline=False,
            sample_tokens=1,
        ),
    )


def start(config: Config, workdir: Path) -> dict[str, dict[str, Any]]:
    """Models that the ways are compared with: the source, the teacher, and the student that all
    begin with."""
    pipeline.run(config, workdir, ["evaluate/source", "evaluate/stage2"], print)
    context = Context(config, workdir, print)
    model, folder = context.inputs.teacher_model, context.inputs.teacher_folder
    assert model and folder
    texts = bits_per_byte.choose_texts(
        corpus.held_out(workdir / "corpus"), config.evaluation.bytes_per_language
    )
    scores = bits_per_byte.evaluate(
        model,
        huggingface.load_params(folder, model, jnp.dtype(config.compute.dtype), context.mesh),
        context.inputs.target_tokenizer,
        texts,
        sequence_length=config.evaluation.sequence_length,
        batch=config.evaluation.batch,
        compute=config.compute,
        mesh=context.mesh,
    )
    return {
        "source": {"bits_per_byte": scored(workdir, "source")},
        "teacher": {
            "bits_per_byte": grouped({name: score.summary() for name, score in scores.items()})
        },
        "before": {"bits_per_byte": scored(workdir, "stage2"), **speed(workdir / "stage2")},
    }


def scored(workdir: Path, state: str) -> dict[str, float]:
    """Bits per byte of a state by group."""
    return grouped(
        json.loads((workdir / "evaluate" / state / "scores.json").read_text())["languages"]
    )


def grouped(languages: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Bits per byte of each of GROUPS, of all other languages together, and of everything."""
    found: dict[str, Score] = {}
    for language, scores in languages.items():
        for group in ({language} & {*GROUPS} or {"other"}) | {"all"}:
            score = Score(scores["nats"], int(scores["tokens"]), int(scores["bytes"]))
            found[group] = found[group] + score if group in found else score
    return {group: score.bits_per_byte for group, score in found.items()}


def speed(folder: Path) -> dict[str, float]:
    """Median seconds of a stage's steps without the first ones, and tokens per second."""
    records = metrics.read(folder / "metrics.jsonl")
    seconds = statistics.median(record["seconds"] for record in records[min(5, len(records) - 1) :])
    return {"seconds": seconds, "tokens_per_second": records[0]["tokens"] / seconds}


def show(rows: Mapping[str, Mapping[str, Any]]) -> None:
    names = [*GROUPS, "other", "all"]
    print(
        "| state | "
        + " | ".join(names)
        + " | tokens/s | ms a step |\n|---|"
        + "---:|" * (len(names) + 2)
    )
    for state, row in rows.items():
        bits = [
            f"{row['bits_per_byte'][n]:.3f}" if n in row["bits_per_byte"] else "" for n in names
        ]
        pace = (
            [f"{row['tokens_per_second']:,.0f}", f"{1000 * row['seconds']:.1f}"]
            if "seconds" in row
            else ["", ""]
        )
        print(f"| {state} | " + " | ".join([*bits, *pace]) + " |")


if __name__ == "__main__":
    main()
