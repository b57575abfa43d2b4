"""Time and host memory of initialising the rows of a new vocabulary, by step, on random data.

    PYTHONPATH=. python benchmarks/initialization.py --width 2048 --source 50304 --target 151669

The model has only one layer, since its forward passes are not measured here, only what follows
them. `mixtures`: rows mixed from the source's by an alignment, for embedding and head. `learned
rows`: the regression for one of the two and its predictions for the composed tokens. `frequencies`:
calibration of head rows, three rounds over 32,768 positions. `tuning`: the linear map shared by all
rows, for as many steps as in a run, of 2,048 tokens each. Each step is run twice, the first time
including compilation. Memory is the peak resident set of the process so far, including the source's
rows and the contexts of both vocabularies.
"""

import argparse
import re
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tokalign_jax.alignment import alignment
from tokalign_jax.config import ComputeConfig
from tokalign_jax.initialization import calibration, composition, contexts, initialization, tuning
from tokalign_jax.models import families
from tokalign_jax.models.transformer import init_params
from tokalign_jax.parallel import sharding
from tokalign_jax.text.tokenizing import TokenShards

RNG = np.random.default_rng(0)
LEARNED = 2 / 3
"""The share of target tokens whose rows are learned."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=2048, help="of the model, D")
    parser.add_argument("--source", type=int, default=50_304, help="source tokens")
    parser.add_argument("--target", type=int, default=151_669, help="target tokens")
    parser.add_argument("--steps", default="mixtures,learned rows,frequencies,tuning")
    parser.add_argument("--once", action="store_true", help="the first run of each step alone")
    arguments = parser.parse_args()
    width, sizes = arguments.width, (arguments.source, arguments.target)
    print(
        f"{jax.devices()[0].device_kind}: {sizes[0]:,} source rows to {sizes[1]:,}, {width} wide",
        flush=True,
    )
    print("| step | first run, s | second run, s | host memory at most, GB |\n|---|---:|---:|---:|")
    for name in arguments.steps.split(","):
        step = STEPS[name](width, *sizes)
        seconds = [_seconds(step) for _ in range(1 if arguments.once else 2)]
        print(
            f"| {name} | {seconds[0]:.1f} | {seconds[-1]:.1f} | {_peak() / 1e9:.2f} |", flush=True
        )


def mixtures(width: int, source: int, target: int) -> Callable[[], object]:
    rows = {
        "embed_tokens": {"embedding": _rows(source, width)},
        "lm_head": {"kernel": _rows(source, width)},
    }
    parts = RNG.integers(1, 5, target)
    indptr = np.concatenate([[0], np.cumsum(parts)])
    weights = np.repeat(1 / parts, parts).astype(np.float32)
    mixture = alignment.Mixture(
        indptr, RNG.integers(source, size=indptr[-1]).astype(np.int32), weights, source
    )
    nothing = np.zeros(target)
    aligned = alignment.Alignment(
        embedding=mixture,
        head=mixture,
        rules=nothing.astype(np.uint8),
        scores=nothing,
        matches=nothing,
        frequency_shift=RNG.random(target, np.float32),
        source_log_frequency=RNG.random(source, np.float32),
        source_fingerprint="",
        target_fingerprint="",
    )
    return lambda: initialization.initialize(_config(width, source), rows, aligned)


def learned_rows(width: int, source: int, target: int) -> Callable[[], object]:
    composed = np.sort(RNG.permutation(target)[: int(target * LEARNED)])
    reading = contexts.Reading(
        _contexts(source, width),
        _contexts(target, width),
        np.zeros(width),
        np.eye(width, dtype=np.float64),
    )
    known = _tokens(np.arange(source), 2, source, reading.source)
    wanted = _tokens(composed, 3, source, reading.target)
    rows, made = _rows(source, width), _rows(target, width)

    def learn() -> None:
        for block, learned in composition.learned_rows(rows, known, wanted, reading):
            made[composed[block]] += 0.5 * (learned - made[composed[block]])

    return learn


def frequencies(width: int, source: int, target: int) -> Callable[[], object]:
    config = _config(width, target)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    params = jax.device_get(init_params(config, jax.random.key(0)))
    tokens = RNG.integers(target, size=2 * calibration.PLACES).astype(np.uint32)
    shards = TokenShards(
        tokens, np.array([len(tokens)]), np.bincount(tokens, minlength=target), {"end_of_text": 0}
    )
    return lambda: calibration.head_moves(config, params, shards, jnp.bfloat16, mesh, seed=0)


def tuned_rows(width: int, source: int, target: int) -> Callable[[], object]:
    config, budget = _config(width, target), 2048 * tuning.STEPS
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    params = jax.device_get(init_params(config, jax.random.key(0)))
    rows = {"embed_tokens/embedding": _rows(source, width), "lm_head/kernel": _rows(source, width)}
    tokens = _tokens(np.arange(target), 3, source, _contexts(target, width))
    composed = RNG.random(target) < LEARNED
    text = RNG.integers(target, size=2 * budget).astype(np.uint32)
    shards = TokenShards(
        text, np.array([len(text)]), np.bincount(text, minlength=target), {"end_of_text": 0}
    )
    compute = ComputeConfig(dtype="bfloat16")
    return lambda: tuning.tune(
        config,
        params,
        rows,
        tokens,
        composed,
        shards,
        budget,
        compute,
        mesh,
        lambda line: None,
        seed=0,
    )


STEPS = {
    "mixtures": mixtures,
    "learned rows": learned_rows,
    "frequencies": frequencies,
    "tuning": tuned_rows,
}


def _rows(count: int, width: int) -> np.ndarray:
    return 0.1 * (RNG.random((count, width), np.float32) - np.float32(0.5))


def _contexts(size: int, width: int) -> contexts.Contexts:
    counts = np.exp(RNG.uniform(0, 10, size)).astype(np.int64)
    return contexts.Contexts(_rows(size, width), _rows(size, width), counts)


def _tokens(
    ids: np.ndarray, pieces: int, source: int, read: contexts.Contexts
) -> composition.Tokens:
    indptr = np.arange(0, pieces * len(ids) + 1, pieces)
    spelled = composition.Pieces(indptr, RNG.integers(source, size=indptr[-1]))
    return composition.Tokens(ids, spelled, RNG.random(len(read.counts), np.float32), read)


def _config(width: int, vocabulary: int):
    return families.config_from_hf(
        {
            "model_type": "gpt_neox",
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": 1,
            "num_attention_heads": max(1, width // 128),
            "max_position_embeddings": 2048,
            "hidden_act": "gelu",
            "rotary_pct": 0.25,
            "rotary_emb_base": 10000,
            "layer_norm_eps": 1e-5,
            "use_parallel_residual": True,
            "tie_word_embeddings": False,
            "attention_bias": True,
        }
    )


def _seconds(step: Callable[[], object]) -> float:
    began = time.monotonic()
    jax.block_until_ready(step())
    return time.monotonic() - began


def _peak() -> int:
    """Bytes that this process has had resident at most."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


if __name__ == "__main__":
    main()
