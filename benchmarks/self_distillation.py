"""What the source model, reading with its own tokenizer, can teach the adapted one in Stages 1 and 2, beside the next token of the text.

    PYTHONPATH=. python benchmarks/self_distillation.py --source llama-en16k --target qwen3 --corpus mix-train.jsonl.xz \\
        --held-out mix-valid.jsonl.xz --language-field lang --workdir runs/self_distillation

A variant is `none` (next-token loss alone) or what is taught and its weight (`states:0.5`, `states:0.5+readout:1`: the kinds of
`teaching`); with `*1.25` behind it takes that many times the steps, to be compared at equal time; `A>B` is A in
Stage 1 and B in Stage 2. All start with the same model, read the same sequences in the same order, and are measured on the same text.
Prints a row as soon as it is there: bits per byte, milliseconds a step (compilation left out); writes `self_distillation.json`.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import alignment
import jax
import jax.numpy as jnp
import meetings
import numpy as np
import teaching

from tokalign_jax import pipeline
from tokalign_jax.config import ComputeConfig, Config, EvaluationConfig, StageConfig, TextConfig
from tokalign_jax.evaluation import bits_per_byte
from tokalign_jax.models import huggingface
from tokalign_jax.parallel import sharding
from tokalign_jax.pipeline import states
from tokalign_jax.pipeline.context import Context
from tokalign_jax.text import canonical, corpus
from tokalign_jax.text.tokenizing import SIDES, TokenShards
from tokalign_jax.training import batches, loop
from tokalign_jax.training.optimizer import make_optimizer, rules_for, schedule_of
from tokalign_jax.training.step import init_state, make_train_step
from tokalign_jax.utils import paths

STAGES = ("stage1", "stage2")
GROUPS = ("en", "code", "other")
VARIANTS = "none,none*1.25,states:1,readout:1,likelihood:1,common:1"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", default="embedded")
    parser.add_argument("--target", default="embedded")
    parser.add_argument("--corpus", default="embedded")
    parser.add_argument(
        "--held-out",
        default="",
        help="text that nothing is trained on; empty: documents held out of the corpus",
    )
    parser.add_argument("--language-field", default="language")
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--variants", default=VARIANTS)
    parser.add_argument("--steps", type=int, default=60, help="of each stage")
    parser.add_argument("--sequences", type=int, default=64, help="a step")
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--rates", default="6.4e-4,5e-5", help="peak learning rates of both stages")
    parser.add_argument("--method", default="composed", help="`alignment.method` of the start")
    parser.add_argument(
        "--tokens", type=int, default=2_000_000, help="that the source model reads for the new rows"
    )
    parser.add_argument("--budget-bytes", type=int, default=50_000_000)
    parser.add_argument("--bytes-per-language", type=int, default=100_000)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="no variant is begun after so long"
    )
    arguments = parser.parse_args()
    began = time.monotonic()
    trial = Trial(_config(arguments), arguments)
    print(f"start made in {time.monotonic() - began:.0f} s; {trial.facts}", flush=True)
    rows: dict[str, Any] = {"start": trial.start_scores}
    _show(
        "| variant | state | "
        + " | ".join(GROUPS)
        + " | ms a step |\n|---|---|"
        + "---:|" * (len(GROUPS) + 1)
    )
    _show(_line("start", "", trial.start_scores, None))
    variants = arguments.variants.split(",")
    trial.compile(variants)
    print(f"compiled at {time.monotonic() - began:.0f} s", flush=True)
    for variant in variants:
        if time.monotonic() - began > arguments.seconds:
            break
        rows[variant] = trial.run(variant)
        content = {
            "arguments": vars(arguments),
            "device": str(jax.devices()[0]),
            "facts": trial.facts,
            "rows": rows,
        }
        (arguments.workdir / "self_distillation.json").write_text(
            json.dumps(content, indent=1, default=str)
        )
        print(f"{time.monotonic() - began:.0f} s", flush=True)


def _config(arguments: argparse.Namespace) -> Config:
    rates = [float(rate) for rate in arguments.rates.split(",")]
    stage = StageConfig(
        steps=arguments.steps,
        learning_rate=rates[0],
        row_damping=0.0,  # AdamW, as the figures in docs/ were measured
        batch_size=arguments.sequences,
        per_device_batch=arguments.sequences,
        sequence_length=arguments.sequence_length,
        start_offset=0,
    )
    config = Config(
        source_model=arguments.source,
        target_tokenizer=arguments.target,
        corpus=arguments.corpus,
        text=TextConfig(
            language_field=arguments.language_field,
            held_out_fraction=0.002 if arguments.held_out else 0.04,
            budget_bytes=arguments.budget_bytes,
        ),
        stage1=stage,
        stage2=dataclasses.replace(
            stage, method="full", learning_rate=rates[1], start_offset="after_previous"
        ),
        compute=ComputeConfig(dtype=arguments.dtype, remat="dots", loss_chunk=8192),
        evaluation=EvaluationConfig(bytes_per_language=arguments.bytes_per_language),
    )
    return dataclasses.replace(
        config,
        alignment=dataclasses.replace(config.alignment, method=arguments.method),
        initialization=dataclasses.replace(
            config.initialization, tokens=arguments.tokens, tuning=0
        ),
    )


class Trial:
    """A start, and what all variants of its training share."""

    def __init__(self, config: Config, arguments: argparse.Namespace):
        pipeline.run(config, arguments.workdir, ["init"], print)
        self.config, self.context = config, Context(config, arguments.workdir, print)
        self.shards = [TokenShards.open(self.context.folder("tokens") / side) for side in SIDES]
        self.tokenizers = self.context.inputs.source_tokenizer, self.context.inputs.target_tokenizer
        self.mesh = sharding.make_mesh(devices=jax.devices()[:1])
        source_bytes, target_bytes = (
            canonical.token_bytes(tokenizer) for tokenizer in self.tokenizers
        )
        began = time.monotonic()
        met = meetings.find(self.shards[0], self.shards[1], source_bytes, target_bytes)
        seconds = time.monotonic() - began
        length = arguments.sequence_length
        self.source_config, _ = self.context.inputs.source_model
        source = huggingface.load_params(
            self.context.inputs.source_folder, self.source_config, mesh=self.mesh
        )
        window = teaching.window_length(
            self.shards[0], self.shards[1], length, self.source_config.max_positions
        )
        self.sequences = teaching.MetSource(self.shards[1], self.shards[0], met, length, window)
        packed = np.stack(
            [
                self.sequences[i]
                for i in range(0, len(self.sequences), max(1, len(self.sequences) // 500))
            ]
        )
        in_window = float(np.mean(packed[:, -length:] != meetings.NONE))
        self.facts = {
            "source_tokens": len(self.shards[0]),
            "target_tokens": len(self.shards[1]),
            "meetings": float(np.mean(met != meetings.NONE)),
            "meetings_in_window": in_window,
            "window": window,
            "seconds_to_find": seconds,
        }
        common = [
            (index, row)
            for row, index in _same_bytes(*self.tokenizers)
            if index < self.source_config.vocab_size
        ]
        rows = np.array(common, np.int32)
        self.taught = {
            "teacher": jax.tree.map(lambda x: x.astype(config.compute.dtype), source),
            "source_rows": jnp.asarray(rows[:, 0]),
            "target_rows": jnp.asarray(rows[:, 1]),
        }
        size = arguments.bytes_per_language
        if arguments.held_out:
            self.texts = alignment.held_out(config, arguments.held_out, arguments.workdir, size)
        else:
            self.texts = bits_per_byte.choose(corpus.held_out(self.context.folder("corpus")), size)
        self.model_config, self.start = states.load_state(self.context, ("init",))
        self.start_scores = self._measure(self.model_config, self.start, self.tokenizers[1])

    def run(self, variant: str) -> dict[str, Any]:
        """Scores and milliseconds a step of both stages."""
        params, end, rows = self.start, 0, {}
        times = float(variant.partition("*")[2] or 1)
        for stage, way in zip(STAGES, ways_of(variant)):
            params, end, seconds = self._train(stage, way, times, params, end)
            scores = self._measure(self.model_config, params, self.tokenizers[1])
            rows[stage] = {"scores": scores, "milliseconds": 1000 * seconds}
            _show(_line(variant, stage, scores, 1000 * seconds))
        return rows

    def _train(
        self, name: str, way: str, times: float, params: Any, end: int
    ) -> tuple[Any, int, float]:
        """Parameters after a stage, where it ended in the stream, and seconds a step."""
        stage = getattr(self.config, name)
        stage = dataclasses.replace(stage, steps=round(stage.steps * times))
        weights = weights_of(way)
        start = batches.resolve_offset(stage.start_offset, len(self.sequences), 0, end)
        stream = batches.make_stream(
            self.sequences,
            seed=self.config.seed,
            epochs=0,
            offset=start,
            accumulation=1,
            micro_batch=stage.batch_size,
        )
        step = self.steps[name, tuple(weights)]
        state, frozen = self._inputs(name, weights, params)
        schedule, key = schedule_of(stage), jax.random.key(0)
        began, metrics = 0.0, {}
        for number in range(stage.steps):
            state, metrics = step(state, frozen, self._batch(next(stream), weights), key, schedule)
            if (
                number == 0
            ):  # what the first step waits for (memory, transfers) is no part of a step
                jax.block_until_ready(state)
                began = time.monotonic()
        loss = float(jax.block_until_ready(metrics["loss"]))
        seconds = (time.monotonic() - began) / max(stage.steps - 1, 1)
        print(f"{name} {way}: loss {loss:.3f}, {int(state.skipped)} steps skipped", flush=True)
        return (
            paths.merge(state.params, loop.split(stage, params)[1]),
            start + stage.steps * stage.batch_size,
            seconds,
        )

    def compile(self, variants: Iterable[str]) -> None:
        """All programs that the variants need, at the same time: one for each stage and kinds taught, for all weights and lengths."""
        wanted = {
            (name, tuple(weights_of(way)))
            for v in variants
            for name, way in zip(STAGES, ways_of(v))
        }
        lowered = {}
        for name, kinds in sorted(wanted):
            stage, weights = getattr(self.config, name), dict.fromkeys(kinds, 1.0)
            loss = teaching.make_loss(
                self.model_config,
                self.source_config,
                self.config.compute,
                None,
                stage.sequence_length,
                kinds,
            )
            step = make_train_step(
                loss, self._optimizer(name), jnp.dtype(self.config.compute.dtype), self.mesh
            )
            sequences = np.stack([self.sequences[0]] * stage.batch_size)[None]
            inputs = *self._inputs(name, weights, self.start), self._batch(sequences, weights)
            lowered[name, kinds] = step.lower(*inputs, jax.random.key(0), schedule_of(stage))
        with ThreadPoolExecutor() as pool:
            self.steps = dict(zip(lowered, pool.map(lambda of: of.compile(), lowered.values())))

    def _inputs(
        self, name: str, weights: dict[str, float], params: Any
    ) -> tuple[Any, dict[str, Any]]:
        """The state before the first step, and what is frozen."""
        stage = getattr(self.config, name)
        trainable, fixed = loop.split(stage, sharding.place(params, self.mesh))
        copies = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), trainable)
        state = init_state(copies, self._optimizer(name))
        frozen = {
            "student": jax.tree.map(lambda x: x.astype(self.config.compute.dtype), fixed),
            "weights": {kind: jnp.float32(weight) for kind, weight in weights.items()},
        }
        return jax.device_put(state, sharding.shardings(state, self.mesh)), frozen | (
            self.taught if weights else {}
        )

    def _optimizer(self, name: str) -> Any:
        stage = getattr(self.config, name)
        trainable, _ = loop.split(stage, self.start)
        return make_optimizer(stage, paths.label_tree(rules_for(stage.method), trainable))

    def _batch(self, packed: np.ndarray, weights: dict[str, float]) -> jax.Array:
        """A step's batch on the device: without what only a teacher needs, where there is none."""
        length = self.config.stage1.sequence_length
        return sharding.global_batch(
            packed if weights else np.ascontiguousarray(packed[..., : length + 1]), self.mesh
        )

    def _measure(self, model_config: Any, params: Any, tokenizer: Any) -> dict[str, float]:
        return alignment.measure(self.context, model_config, params, tokenizer, self.texts)


def ways_of(variant: str) -> list[str]:
    """What is taught in either stage."""
    return (variant.partition("*")[0].split(">") * 2)[:2]


def weights_of(way: str) -> dict[str, float]:
    """The weight of each kind that is taught."""
    return (
        {}
        if way == "none"
        else {kind: float(w) for kind, w in (part.split(":") for part in way.split("+"))}
    )


def _same_bytes(source: Any, target: Any) -> list[tuple[int, int]]:
    """(target id, source id) of tokens with the same bytes."""
    own = canonical.index_by_bytes(source)
    return [
        (row, own[content])
        for content, row in canonical.index_by_bytes(target).items()
        if content in own
    ]


def _line(name: str, state: str, scores: dict[str, float], milliseconds: float | None) -> str:
    figures = " | ".join(f"{scores.get(group, np.nan):.4f}" for group in GROUPS)
    return f"| {name} | {state} | {figures} | {'' if milliseconds is None else f'{milliseconds:.1f}'} |"


def _show(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
