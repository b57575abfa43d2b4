"""Time and memory from a corpus of any number of tokens to an alignment: seconds per step, peak
memory of host and device, and the floor.

    PYTHONPATH=. python benchmarks/corpus_to_alignment.py --source-tokenizer neox \\
        --target-tokenizer qwen3 \\
        --corpus mix-train.jsonl.xz --tokens 1e9 --workdir runs/scale

Times the stage `align` in a separate process, after imports and tokenizers are loaded but including
all compilation: counting both sides, vectors, matching, mixtures, files, BLEU-1. Tokenisation is
not included. A side with fewer than `--tokens` is extended by repeating its documents: in each
repetition a share of the tokens (`--noise`) is replaced by others of the corpus with a new seed, so
that new pairs keep appearing. The two sides are changed independently, so time and memory are those
of a corpus of that length, but the alignment's quality is not.

The floor is the minimum cost of handling the pairs: sorting `window` keys per token on an
accelerator, adding them to cells in the cache on a CPU. Host memory is the process's anonymous
memory; the total with memory-mapped files, which the system may evict, is also reported.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import cooccurrence as counting
import jax
import token_vectors

from tokalign_jax.alignment import methods
from tokalign_jax.config import Config
from tokalign_jax.models import hub
from tokalign_jax.text.tokenizing import SIDES, TokenShards

GOAL_TOKENS, GOAL_SECONDS = 1_000_000_000, 900
GOAL_MEMORY = {"host": 8 << 30, "device": 60 << 30}
STEPS = {
    "source co-occurrence, merged": "count source, and spell tokens",
    "target co-occurrence, merged": "count target",
    "PPMI": "PPMI",
    "matching": "matching",
    "alignment by": "mixtures, files, BLEU-1",
}
"""Beginning of the last log line of a step."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source-tokenizer", required=True)
    parser.add_argument("--target-tokenizer", required=True)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--budget-bytes", type=int, default=5_000_000_000, help="of the corpus")
    parser.add_argument("--tokens", type=float, default=GOAL_TOKENS, help="of each side")
    parser.add_argument(
        "--noise", type=float, default=0.2, help="share of the tokens swapped in a repetition"
    )
    parser.add_argument("--workdir", type=Path, required=True)
    arguments = parser.parse_args()
    began = time.monotonic()
    tokenizers = [
        hub.load_tokenizer(name)
        for name in (arguments.source_tokenizer, arguments.target_tokenizer)
    ]
    real = token_vectors.token_folders(arguments, *tokenizers)
    tokens = arguments.workdir / f"tokens-{int(arguments.tokens)}"
    spawn = multiprocessing.get_context(
        "spawn"
    )  # this process must not hold the accelerator, nor share what it has
    with ProcessPoolExecutor(len(SIDES), spawn) as pool:
        made = [
            pool.submit(
                counting.write_repeated,
                folder,
                int(arguments.tokens),
                arguments.noise,
                tokens / side,
            )
            for side, folder in zip(SIDES, real)
        ]
        print(
            f"tokens: {[len(TokenShards.open(folder)) for folder in real]} real, "
            f"{[shards.result() for shards in made]} to be read"
        )
    prepared = time.monotonic() - began
    with ProcessPoolExecutor(1, spawn) as pool:
        report = pool.submit(
            measure,
            arguments.source_tokenizer,
            arguments.target_tokenizer,
            arguments.workdir,
            tokens,
        ).result()
    report |= {"real": [len(TokenShards.open(folder)) for folder in real], "prepared": prepared}
    (arguments.workdir / "corpus_to_alignment.json").write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))


def measure(source: str, target: str, workdir: Path, tokens: Path) -> dict[str, Any]:
    """Aligns and says how it went."""
    config = Config(source_model=source, target_tokenizer=target)
    tokenizers = hub.load_tokenizer(source), hub.load_tokenizer(target)
    ends, peaks, began = {"": 0.0}, {}, time.monotonic()

    def log(line: str) -> None:
        seconds = time.monotonic() - began
        print(f"{seconds:8.1f} s  {line}", flush=True)
        ends.update({step: seconds for start, step in STEPS.items() if line.startswith(start)})

    with counting.sampled(peaks):
        summary = methods.run(
            config, workdir / "corpus", tokens, *tokenizers, workdir / "align", log
        )
        seconds = time.monotonic() - began
    ends[STEPS["alignment by"]] = seconds
    sides = [TokenShards.open(tokens / side) for side in SIDES]
    device, window = jax.local_devices()[0], config.alignment.window
    rate = counting.sorting_rate(window) if device.platform != "cpu" else counting.adding_rate(None)
    return {
        "device": f"{device.device_kind}, {os.cpu_count()} cores",
        "tokens": [len(side) for side in sides],
        "vocabulary": [len(side.counts) for side in sides],
        "seen_often": [int((side.counts >= config.alignment.min_count).sum()) for side in sides],
        "seconds": seconds,
        "steps": {
            step: end - before for (_, before), (step, end) in itertools.pairwise(ends.items())
        },
        "floor": sum(map(len, sides)) * window / rate,
        "host": peaks["RssAnon"],
        "host_with_files": peaks["VmRSS"],
        "device_memory": (device.memory_stats() or {}).get("peak_bytes_in_use", 0),
        "summary": summary,
    }


def table(report: dict[str, Any]) -> str:
    tokens, seconds, steps = report["tokens"], report["seconds"], report["steps"]
    counted = sum(duration for step, duration in steps.items() if step.startswith("count"))
    each = lambda name: " + ".join(f"{n:,}" for n in report[name])  # noqa: E731
    rows = {
        "on": report["device"],
        "tokens, source + target": f"{each('tokens')} (real: {each('real')})",
        "vocabulary": f"{each('vocabulary')} (seen often: {each('seen_often')})",
        "corpus to alignment": f"{seconds:.1f} s, {sum(tokens) / seconds / 1e6:.2f}M tokens/s",
        **{f"  {step}": f"{duration:.1f} s" for step, duration in steps.items()},
        "floor of counting": f"{report['floor']:.2f} s, a {counted / report['floor']:.0f}th of what it took",
        "host memory at most": f"{_gib(report['host'])} ({_gib(report['host_with_files'])} with mapped files)",
        "device memory at most": _gib(report["device_memory"])
        if report["device_memory"]
        else "not known",
        "tokenised and repeated before": f"{report['prepared']:.1f} s",
    }
    if min(tokens) >= GOAL_TOKENS:
        rows[f"in {GOAL_SECONDS} s"] = "yes" if seconds <= GOAL_SECONDS else "no"
        for where, key in (("host", "host"), ("device", "device_memory")):
            rows[f"in {_gib(GOAL_MEMORY[where])} of the {where}"] = (
                "yes" if 0 < report[key] < GOAL_MEMORY[where] else "no"
            )
    else:
        rows[f"extrapolated to {GOAL_TOKENS:,} a side"] = (
            f"{seconds * GOAL_TOKENS / min(tokens):.0f} s, linear in tokens"
        )
    return "\n".join(
        ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


if __name__ == "__main__":
    main()
