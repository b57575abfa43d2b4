"""Time and memory of co-occurrence counting, for any number of tokens.

    python benchmarks/cooccurrence.py --shards tokens/target --tokens 1000000000 --scratch /data \\
        --json counts.json

A corpus longer than the shards is simulated by repeating them: in every repetition after the first,
a share (`--noise`) of the tokens is replaced by tokens sampled from the corpus with a new seed, so
that new pairs keep appearing. `--growth` reports how fast they appear in the shards themselves:
pairs ~ tokens^growth, estimated from the second half of the shards against the first. The table has
the same figure for the simulated corpus, between the shards and the whole.

The floor is the minimum cost of handling the pairs: on an accelerator, sorting `window` keys per
token; on a CPU, adding them to a table that fits into the cache, with all threads. Both are
measured here.
"""

import argparse
import itertools
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokalign_jax.alignment import cooccurrence
from tokalign_jax.alignment.cooccurrence import Resources
from tokalign_jax.text.tokenizing import TokenShards
from tokalign_jax.utils.progress import duration, quantity


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shards", type=Path, required=True, help="tokens/source or tokens/target of a workdir"
    )
    parser.add_argument(
        "--tokens",
        type=float,
        nargs="+",
        default=[0],
        help="sizes to count; 0: the shards as they are",
    )
    parser.add_argument("--window", type=int, default=15)
    parser.add_argument("--min-count", type=int, default=5)
    parser.add_argument(
        "--noise", type=float, default=0.2, help="share of the tokens swapped in a repetition"
    )
    parser.add_argument(
        "--growth", action="store_true", help="count the first half of the shards, too"
    )
    parser.add_argument(
        "--scratch", type=Path, help="folder for the corpus and for what is spilled"
    )
    parser.add_argument("--memory", type=float, default=Resources.memory, help="bytes")
    parser.add_argument(
        "--device-memory", type=float, default=Resources.device_memory, help="bytes"
    )
    parser.add_argument("--workers", type=int)
    parser.add_argument(
        "--device", choices=["yes", "no"], help="by default, when there is an accelerator"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="writes the table there, too")
    arguments = parser.parse_args()
    device = None if arguments.device is None else arguments.device == "yes"
    memory, device_memory = int(arguments.memory), int(arguments.device_memory)
    resources = Resources(memory, device_memory, arguments.scratch, arguments.workers, device)
    shards = TokenShards.open(arguments.shards)
    rows = []
    if arguments.growth:
        half = int(shards.documents[np.searchsorted(shards.documents, len(shards) // 2)])
        documents = shards.documents[shards.documents <= half]
        for part in (
            TokenShards(shards.tokens[:half], documents, shards.counts, shards.index),
            shards,
        ):
            rows.append(measure(part, arguments, resources))
    for tokens in arguments.tokens:
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
            corpus = repeated(
                shards, int(tokens) or len(shards), arguments.noise, arguments.seed, Path(folder)
            )
            rows.append(measure(corpus, arguments, resources))
    for earlier, row in itertools.pairwise(rows):
        if row["tokens"] > earlier["tokens"]:
            exponent = np.log(row["pairs"] / earlier["pairs"]) / np.log(
                row["tokens"] / earlier["tokens"]
            )
            row["growth"] = round(float(exponent), 3)
    print_table(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


def repeated(
    shards: TokenShards, tokens: int, noise: float, seed: int, folder: Path
) -> TokenShards:
    """The shards as they are, then again and again with a share of the tokens swapped, until there
    are `tokens`."""
    end, length = shards.index["end_of_text"], len(shards)
    block, pool = 1 << 20, np.asarray(shards.tokens[:: max(length >> 22, 1)])
    pool = pool[pool != end]
    counts = np.zeros_like(shards.counts)
    with (folder / "tokens.bin").open("wb") as file:
        for place in range(0, tokens, block):
            part = shards.tokens[np.arange(place, min(place + block, tokens)) % length]
            if place + block > length:
                rng = np.random.default_rng((seed, place))
                swapped = np.flatnonzero(
                    (rng.random(len(part), np.float32) < noise) & (part != end)
                )
                swapped = swapped[place + swapped >= length]
                part[swapped] = rng.choice(pool, len(swapped))
            counts += np.bincount(part, minlength=len(counts))
            file.write(part.tobytes())
    documents = np.concatenate([shards.documents + k * length for k in range(-(-tokens // length))])
    documents = np.append(documents[documents < tokens], tokens)
    return TokenShards(
        np.memmap(folder / "tokens.bin", shards.tokens.dtype, "r"), documents, counts, shards.index
    )


def write_repeated(source: Path, tokens: int, noise: float, folder: Path, seed: int = 0) -> int:
    """Makes `folder` one of token shards, those of `source` repeated; returns how many tokens it
    has."""
    folder.mkdir(parents=True, exist_ok=True)
    made = repeated(TokenShards.open(source), tokens, noise, seed, folder)
    np.save(folder / "documents.npy", made.documents)
    np.save(folder / "unlearned.npy", np.zeros((0, 2), np.int64))
    np.save(folder / "counts.npy", made.counts)
    (folder / "index.json").write_text(json.dumps({**made.index, "tokens": len(made)}))
    return len(made)


def measure(
    shards: TokenShards, arguments: argparse.Namespace, resources: Resources
) -> dict[str, Any]:
    """Counts once and says how it went."""
    peaks: dict[str, int] = {}
    with sampled(peaks):
        began, processor = time.monotonic(), time.process_time()
        found = cooccurrence.count(
            shards, arguments.window, arguments.min_count, print, "count", resources
        )
        seconds, processor = time.monotonic() - began, time.process_time() - processor
    on_device = jax.default_backend() != "cpu" if resources.device is None else resources.device
    pairs = len(shards) * arguments.window
    rate = sorting_rate(arguments.window) if on_device else adding_rate(resources.workers)
    statistics = jax.local_devices()[0].memory_stats() or {}
    return {
        "device": jax.local_devices()[0].device_kind
        if on_device
        else f"cpu, {os.cpu_count()} cores",
        "tokens": len(shards),
        "vocabulary": len(found.vocabulary),
        "pairs": len(found),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(processor, 2),
        "tokens_per_second": round(len(shards) / seconds),
        "floor_seconds": round(pairs / rate, 2),
        "times_the_floor": round(seconds * rate / pairs, 2),
        "host_anonymous_bytes": peaks["RssAnon"],
        "host_resident_bytes": peaks["VmRSS"],
        "device_bytes": statistics.get("peak_bytes_in_use", 0) if on_device else 0,
        "load": os.getloadavg()[0],
    }


def sorting_rate(window: int) -> float:
    """Keys a second, over all devices, of the plain sort of a chunk's keys."""
    size = cooccurrence.DEVICE_CHUNK * window
    with jax.enable_x64(True):
        keys = jax.random.randint(jax.random.key(0), (size,), 0, 1 << 50, jnp.int64)
        sort = jax.jit(lambda keys: jax.lax.sort(keys, is_stable=False))
        seconds = []
        for _ in range(4):
            began = time.monotonic()
            jax.block_until_ready(sort(keys))
            seconds.append(time.monotonic() - began)
    return len(jax.local_devices()) * size / min(seconds)


def adding_rate(workers: int | None) -> float:
    """Additions a second of one thread to 4,096 cells, times the threads that count."""
    cells, table, seconds = (
        np.random.default_rng(0).integers(0, 1 << 12, 1 << 20),
        np.zeros(1 << 12, np.int64),
        [],
    )
    for _ in range(4):
        began = time.monotonic()
        np.add.at(table, cells, 1)
        seconds.append(time.monotonic() - began)
    return (
        min(os.cpu_count() or 1, workers or cooccurrence.HOST_THREADS) * len(cells) / min(seconds)
    )


@contextmanager
def sampled(peaks: dict[str, int]) -> Iterator[None]:
    """Puts into `peaks` how much memory there was at most, in bytes, looking five times a second.

    `RssAnon` is the process's own, `VmRSS` includes files (tokens, spilled runs) that the system
    keeps while there is room.
    """
    stop = threading.Event()

    def look() -> None:
        lines = Path("/proc/self/status").read_text().splitlines()
        now = {
            line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.endswith("kB")
        }
        for name in ("RssAnon", "VmRSS"):
            peaks[name] = max(peaks.get(name, 0), now.get(name, 0))

    def watch() -> None:
        while not stop.wait(0.2):
            look()

    look()
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def print_table(rows: list[dict[str, Any]]) -> None:
    head = (
        "tokens",
        "vocabulary",
        "pairs",
        "growth",
        "time",
        "tokens/s",
        "floor",
        "times",
        "host",
        "resident",
        "device",
    )
    print("".join(f"{name:>11}" for name in head))
    for row in rows:
        cells = (
            quantity(row["tokens"]),
            quantity(row["vocabulary"]),
            quantity(row["pairs"]),
            row.get("growth", ""),
            duration(row["seconds"]),
            quantity(row["tokens_per_second"]),
            f"{row['floor_seconds']:.1f}s",
            row["times_the_floor"],
            *(
                f"{row[name] / 2**30:.2f}GiB"
                for name in ("host_anonymous_bytes", "host_resident_bytes", "device_bytes")
            ),
        )
        print("".join(f"{cell!s:>11}" for cell in cells))
    print(f"on {rows[-1]['device']}")


if __name__ == "__main__":
    main()
