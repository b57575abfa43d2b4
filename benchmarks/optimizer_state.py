"""Loss curves of training in less memory or time, compared with the default.

    python benchmarks/optimizer_state.py --model /models/SmolLM2-135M --target /models/Qwen3-0.6B \
        --corpus /data/train.jsonl --steps 500 --seeds 3 --out runs/state.json

The model gets the target tokenizer with the mean of each token's pieces, then trains in each format
of the optimizer's state (`stageN.optimizer`), on the same sequences in an order that depends only
on the seed. The validation loss is on held-out documents of the corpus. `--out` is a JSON file of
the curves; the table has the final validation losses and their differences from `float32` with the
same seed.

The format `float8` has the default state and projections in float8 (`compute.matmul`). Validation
losses are always computed in `--dtype`. The format `halves` is `float32` with micro-batches of half
the size: only rounding differs, so its difference is a measure of noise:

    python benchmarks/optimizer_state.py --model /models/SmolLM2-135M --target /models/Qwen3-0.6B \
        --corpus /data/train.jsonl --dtype bfloat16 --length 512 --steps 500 \
        --formats 'float32;halves;float8' --out runs/float8.json

The formats `int8` and `nf4` quantize LoRA's frozen projections (`stageN.lora.frozen`); their
validation losses are those of the quantized model:

    python benchmarks/optimizer_state.py --model /models/SmolLM2-135M --target /models/Qwen3-0.6B \
        --corpus /data/train.jsonl --method lora --dtype bfloat16 --length 512 --steps 500 \
        --formats 'float32;int8;nf4' --out runs/frozen.json
"""

import argparse
import json
import lzma
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

import tokalign_jax as ta
from tokalign_jax.config import (
    BatchConfig,
    CheckpointConfig,
    ComputeConfig,
    Config,
    LoraConfig,
    OptimizerConfig,
    StageConfig,
)
from tokalign_jax.text import tokenizing
from tokalign_jax.text.corpus import Document
from tokalign_jax.training import loop

FORMATS = {
    "float32": {},
    "bfloat16": {"moment_dtype": "bfloat16"},
    "rows": {"row_second_moment": True},
    "bfloat16, rows": {"moment_dtype": "bfloat16", "row_second_moment": True},
    "bfloat16, rows, body too": {
        "moment_dtype": "bfloat16",
        "row_second_moment": True,
        "body_moment_dtype": "bfloat16",
        "body_row_second_moment": True,
    },
    "float8": {},
    "halves": {},
    "int8": {},
    "nf4": {},
}
COMPUTE: dict[str, dict[str, Any]] = {"float8": {"matmul": "float8"}}
"""By format: fields of `ComputeConfig`."""
FROZEN: dict[str, dict[str, Any]] = {"int8": {"frozen": "int8"}, "nf4": {"frozen": "nf4"}}
"""By format: fields of `LoraConfig`, for `--method lora`."""
HALVES = "halves"
STATES = [name for name in FORMATS if name not in {*COMPUTE, *FROZEN, HALVES}]
HELD_OUT = 50
"""One document of so many is measured on."""


def main() -> None:
    arguments = _arguments()
    flags.FLAGS.mark_as_parsed()  # grain reads absl's flags
    train, held_out = documents(arguments.corpus, arguments.documents)
    source, target = ta.load_model(arguments.model), ta.load_tokenizer(arguments.target)
    alignment = ta.align(source.tokenizer, target, method="pieces")
    model = ta.initialize(source, target, alignment)
    shards = [tokenizing.tokenize(target, part) for part in (train, held_out)]
    print(f"{len(shards[0].tokens):,} tokens to train on, {model.config.vocab_size:,} rows")
    rows = []
    for seed in range(arguments.seeds):
        for name in arguments.formats.split(";") if arguments.formats else STATES:
            rows.append(
                {"format": name, "seed": seed, **trained(name, seed, model, shards, arguments)}
            )
            print(
                f"seed {seed}, {name}: {rows[-1]['final']:.4f} ({rows[-1]['seconds']:.0f} s)",
                flush=True,
            )
            if arguments.out:
                arguments.out.parent.mkdir(parents=True, exist_ok=True)
                settings = {k: str(v) for k, v in vars(arguments).items()}
                arguments.out.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1))
    print(table(rows))


def trained(name: str, seed: int, model: Any, shards: Any, arguments: argparse.Namespace) -> Any:
    """The training and validation losses of a format."""
    stage = StageConfig(
        method=arguments.method,
        steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        embedding_learning_rate=arguments.embedding_learning_rate,
        start_offset=0,
        checkpoints=CheckpointConfig(every=10**9),
        log_every=10**9,
        validation_every=max(1, arguments.steps // arguments.validations),
        validation_sequences=arguments.validation_sequences,
        optimizer=OptimizerConfig(row_damping=arguments.row_damping, **FORMATS[name]),
        lora=LoraConfig(**FROZEN.get(name, {})),
        batch=BatchConfig(
            size=arguments.batch,
            per_device=(arguments.micro_batch or arguments.batch) // (2 if name == HALVES else 1),
            sequence_length=arguments.length,
        ),
    )
    compute = ComputeConfig(
        dtype=arguments.dtype, remat="dots", loss_chunk=1024, **COMPUTE.get(name, {})
    )
    config = Config(seed=seed, stage1=stage, compute=compute)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = loop.run_stage(
            "stage1",
            stage,
            config,
            model.config,
            model.params,
            shards[0],
            Path(folder),
            0,
            lambda line: None,
            held_out=shards[1],
        )
    validated = {r["step"]: r["validation_loss"] for r in result.history if "validation_loss" in r}
    return {
        "optimizer": asdict(stage.optimizer),
        "losses": [record["loss"] for record in result.history],
        "validation": validated,
        "final": validated[arguments.steps],
        "seconds": time.monotonic() - began,
    }


def documents(corpus: Path, most: int) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents of a file of JSON lines."""
    with lzma.open(corpus, "rt") if corpus.suffix == ".xz" else corpus.open() as file:
        texts = [json.loads(line)["text"] for line, _ in zip(file, range(most))]
    parts: tuple[list[Document], list[Document]] = ([], [])
    for i, text in enumerate(texts):
        parts[i % HELD_OUT == 0].append(Document(text, "all", len(text.encode())))
    return parts


def table(rows: list[Any]) -> str:
    """Markdown: means over seeds, with the standard deviation of the differences."""
    finals = {(row["format"], row["seed"]): row["final"] for row in rows}
    seeds = sorted({seed for _, seed in finals})
    lines = ["| format | validation loss | difference to float32 |", "|---|---:|---:|"]
    for name in dict.fromkeys(row["format"] for row in rows):
        losses = np.array([finals[name, seed] for seed in seeds])
        cell = ""
        if name != "float32" and all(("float32", seed) in finals for seed in seeds):
            differences = losses - [finals["float32", seed] for seed in seeds]
            cell = f"{differences.mean():+.4f}"
            if len(seeds) > 1:
                cell += f" ± {differences.std(ddof=1):.4f}"
        lines.append(f"| {name} | {losses.mean():.4f} | {cell} |")
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="embedded", help="folder of the source model")
    parser.add_argument("--target", default="embedded", help="folder of the target tokenizer")
    parser.add_argument("--corpus", type=Path, required=True, help="JSON lines, also .xz")
    parser.add_argument("--documents", type=int, default=2000, help="of the corpus, the first ones")
    parser.add_argument("--method", default="full", help="of embedding, lora, full")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8, help="sequences of a step")
    parser.add_argument("--micro-batch", type=int, default=0, help="sequences at once; 0: all")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--embedding-learning-rate", type=float, help="if it is another one")
    parser.add_argument("--row-damping", type=float, default=OptimizerConfig().row_damping)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--validations", type=int, default=10, help="over the steps")
    parser.add_argument("--validation-sequences", type=int, default=128)
    parser.add_argument(
        "--formats",
        default="",
        help=f"of {'; '.join(FORMATS)}, with ; between; empty: those of the state",
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file of all curves")
    return parser.parse_args()


if __name__ == "__main__":
    main()
