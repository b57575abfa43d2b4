"""Compare token vectors on the same token files: Stanford's GloVe in C, and this project's GloVe
and PPMI.

    python benchmarks/token_vectors.py --glove_c GloVe --source-tokenizer llama-en16k \\
        --target-tokenizer qwen3 \\
        --corpus mix-train.jsonl.xz --workdir runs/token_vectors

`--glove_c` is a checkout of https://github.com/stanfordnlp/GloVe (its `src` is compiled here with
gcc). Instead of `--corpus`, `--tokens-source` and `--tokens-target` can name existing folders of
token shards. Settings are the published ones: 300 dimensions, window 15, minimum count 5, x_max 10,
alpha 0.75, eta 0.05, 15 passes.

The C programs read a document as one line of ids. Their windows end at a newline, as ours do at the
end of a document, and both drop rare tokens before taking windows. So both have the same vocabulary
and the same counts.

Time is the wall time of each phase, without writing the ids as text for C; ours includes
compilation and device initialisation, but not the start of Python. With
`JAX_ENABLE_COMPILATION_CACHE=false` no compiled program is reused. Memory is the peak resident set
of each program, ours in a separate process. Alignment quality is the share of held-out validation
pairs (a tenth of the shared tokens) that CSLS matches with each other: with a map from 300 shared
tokens, with one from all others, and without a map if both sides share one space.
"""

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import cooccurrence as counting
import jax
import jax.numpy as jnp
import numpy as np

from tokalign_jax.alignment import cooccurrence, glove, matching, ppmi, vectors
from tokalign_jax.config import AlignmentConfig, Config, TextConfig
from tokalign_jax.models import hub
from tokalign_jax.text import canonical, corpus, tokenizing
from tokalign_jax.text.tokenizing import SIDES, TokenShards

CONFIG = AlignmentConfig()
PROGRAMS = ("vocab_count", "cooccur", "shuffle", "glove")
FLAGS = "-Ofast -march=native -funroll-loops -w"
WAYS = {"c": "GloVe in C", "glove": "this project's GloVe", "ppmi": "this project's PPMI"}
SEED = 0
COMPILATION = "/jax/core/compile/backend_compile_duration"
"""JAX's name of the event that a program was compiled (or taken from the cache of compiled
programs)."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source-tokenizer", required=True)
    parser.add_argument("--target-tokenizer", required=True)
    parser.add_argument("--corpus", help="text to make token shards of")
    parser.add_argument("--budget-bytes", type=int, default=5_000_000_000, help="of the corpus")
    parser.add_argument(
        "--tokens-source", type=Path, help="finished token shards, instead of a corpus"
    )
    parser.add_argument("--tokens-target", type=Path)
    parser.add_argument(
        "--glove_c", type=Path, help="checkout of stanfordnlp/GloVe; needed for the way `c`"
    )
    parser.add_argument("--c-flags", default=FLAGS, help="for gcc")
    parser.add_argument(
        "--c-iterations",
        type=int,
        default=CONFIG.glove.iterations,
        help="fewer are extrapolated linearly",
    )
    parser.add_argument(
        "--c-memory", type=float, default=4.0, help="GB that cooccur and shuffle may fill"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the C program")
    parser.add_argument(
        "--tokens",
        type=float,
        help="of each side: documents are repeated, with a share of the tokens swapped",
    )
    parser.add_argument("--noise", type=float, default=0.2, help="that share")
    parser.add_argument(
        "--ways", default=",".join(WAYS), help="which to run, of " + ", ".join(WAYS)
    )
    parser.add_argument("--workdir", type=Path, required=True)
    arguments = parser.parse_args()
    if "c" in arguments.ways.split(",") and not arguments.glove_c:
        parser.error("--glove_c is needed for the way c")

    arguments.workdir.mkdir(parents=True, exist_ok=True)
    tokenizers = [
        hub.load_tokenizer(name)
        for name in (arguments.source_tokenizer, arguments.target_tokenizer)
    ]
    folders = token_folders(arguments, *tokenizers)
    if arguments.tokens:
        longer = [arguments.workdir / f"tokens-{int(arguments.tokens)}" / side for side in SIDES]
        for folder, made in zip(folders, longer):
            counting.write_repeated(folder, int(arguments.tokens), arguments.noise, made)
        folders = longer
    shared = _shared(*tokenizers)
    results: dict[str, Any] = {}
    for way in arguments.ways.split(","):
        if way == "c":
            results[way] = _run_c(arguments, folders)
        else:  # in a process of its own, so that its memory is its own; this one must not hold the accelerator meanwhile
            results[way] = _in_process(_run_own, way, folders, shared, arguments.workdir)
        print(f"{WAYS[way]}: done in {_total(results[way]):.0f} s", flush=True)
    for way, of_way in results.items():
        of_way["accuracy_at_1"] = _accuracy(arguments.workdir, way, folders, shared)
    report = {
        "arguments": {name: str(value) for name, value in vars(arguments).items()},
        "device": str(jax.devices()[0].device_kind),
        "cores": os.cpu_count(),
        "tokens": {side: len(TokenShards.open(folder)) for side, folder in zip(SIDES, folders)},
        "ways": results,
    }
    (arguments.workdir / "token_vectors.json").write_text(json.dumps(report, indent=1) + "\n")
    print(_table(report))


# --- what goes in -------------------------------------------------------------------------------


def token_folders(arguments: argparse.Namespace, source_tokenizer, target_tokenizer) -> list[Path]:
    """Folders of both sides' token shards, in `arguments.workdir` if they are not given; made if
    they are not there."""
    if getattr(arguments, "tokens_source", None):
        return [arguments.tokens_source, arguments.tokens_target]
    config = Config(
        source_model=arguments.source_tokenizer,
        target_tokenizer=arguments.target_tokenizer,
        corpus=arguments.corpus,
        text=TextConfig(budget_bytes=arguments.budget_bytes),
    )
    text, tokens = arguments.workdir / "corpus", arguments.workdir / "tokens"
    if not (tokens / SIDES[1] / "index.json").exists():
        corpus.run(config, text, print)
        tokenizing.run(config, text, source_tokenizer, target_tokenizer, tokens, print)
    return [tokens / side for side in SIDES]


def _shared(source_tokenizer, target_tokenizer) -> np.ndarray:
    """int32 [S, 2]: ids (source, target) of tokens of the same bytes."""
    source = canonical.index_by_bytes(source_tokenizer)
    target = canonical.token_bytes(target_tokenizer)
    return np.array(
        [(source[content], i) for i, content in enumerate(target) if content in source], np.int32
    )


def _write_lines(folder: Path, path: Path) -> None:
    """Ids separated by spaces, one document a line, without the end-of-text."""
    shards, start = TokenShards.open(folder), 0
    with path.open("w") as file:
        for end in shards.documents.tolist():
            if end - start > 1:
                file.write(" ".join(map(str, shards.tokens[start : end - 1].tolist())) + "\n")
            start = end


# --- the ways -----------------------------------------------------------------------------------


def _run_c(arguments: argparse.Namespace, folders: list[Path]) -> dict[str, Any]:
    work = arguments.workdir / "c"
    work.mkdir(exist_ok=True)
    for program in PROGRAMS:
        common = (
            [] if program == "glove" else [str(c) for c in arguments.glove_c.glob("src/common.c")]
        )
        sources = [
            str(arguments.glove_c / "src" / f"{program}.c"),
            *(common if _needs_common(arguments, program) else []),
        ]
        command = [
            "gcc",
            *sources,
            "-o",
            str(work / program),
            "-lm",
            "-pthread",
            *arguments.c_flags.split(),
        ]
        subprocess.run(command, check=True)
    sides = {}
    for side, folder in zip(SIDES, folders):
        _write_lines(folder, work / "corpus.txt")
        sides[side] = _run_c_side(arguments, work)
        (work / "vectors.txt").rename(arguments.workdir / f"c-{side}.txt")
        for leftover in ("corpus.txt", "cooccurrence.bin", "shuffled.bin"):
            (work / leftover).unlink()
    return {
        "sides": sides,
        "passes_run": arguments.c_iterations,
        "flags": arguments.c_flags,
        "threads": arguments.threads,
    }


def _needs_common(arguments: argparse.Namespace, program: str) -> bool:
    """Tells if this version of the program shares its helpers with the others."""
    return "common.h" in (arguments.glove_c / "src" / f"{program}.c").read_text()


def _run_c_side(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    memory = ["-memory", arguments.c_memory, "-verbose", 0]
    phases: dict[str, Any] = {}
    run = _Timed(work)
    phases["vocab_count"] = run(
        ["vocab_count", "-min-count", CONFIG.min_count, "-verbose", 0],
        "corpus.txt",
        "vocabulary.txt",
    )
    phases["cooccur"] = run(
        ["cooccur", "-vocab-file", "vocabulary.txt", "-window-size", CONFIG.window, *memory],
        "corpus.txt",
        "cooccurrence.bin",
    )
    phases["shuffle"] = run(["shuffle", *memory], "cooccurrence.bin", "shuffled.bin")
    settings = {
        "vector-size": CONFIG.vector_size,
        "iter": arguments.c_iterations,
        "threads": arguments.threads,
        "x-max": CONFIG.glove.x_max,
        "alpha": CONFIG.glove.alpha,
        "eta": CONFIG.glove.learning_rate,
        "binary": 0,
        "input-file": "shuffled.bin",
        "vocab-file": "vocabulary.txt",
        "save-file": "vectors",
    }
    phases["glove"] = run(
        ["glove", *(word for name, value in settings.items() for word in (f"-{name}", value))]
    )
    missing = CONFIG.glove.iterations - arguments.c_iterations
    if missing and len(run.passes) > 1:
        a_pass = (run.passes[-1][0] - run.passes[0][0]) / (len(run.passes) - 1)
        phases["glove"] += missing * a_pass
    elif missing:
        phases["glove"] *= CONFIG.glove.iterations / arguments.c_iterations
    pairs = (work / "shuffled.bin").stat().st_size // 16
    # The program's cost is half of the published loss, a pair.
    return {
        "phases": phases,
        "memory": run.memory,
        "pairs": pairs,
        "loss": [2 * cost for _, cost in run.passes],
    }


class _Timed:
    """Runs the programs in `folder`: seconds of each, the largest memory of any, and when a pass
    was done at what cost."""

    def __init__(self, folder: Path):
        self._folder, self.memory = folder, 0
        self.passes: list[tuple[float, float]] = []

    def __call__(self, command: list, stdin: str = os.devnull, stdout: str = os.devnull) -> float:
        words = [f"./{command[0]}", *map(str, command[1:])]
        start = time.perf_counter()
        with open(self._folder / stdin, "rb") as source, open(self._folder / stdout, "wb") as sink:
            process = subprocess.Popen(
                words, cwd=self._folder, stdin=source, stdout=sink, stderr=subprocess.PIPE
            )
            watcher = threading.Thread(target=self._watch, args=(process,))
            watcher.start()
            tail = b""
            assert process.stderr
            for line in process.stderr:
                tail = line
                found = re.search(rb"iter: \d+, cost: (\S+)", line)
                if found:
                    self.passes.append((time.perf_counter(), float(found[1])))
            process.wait()
        seconds = time.perf_counter() - start
        watcher.join()
        if process.returncode:
            sys.exit(
                f"{' '.join(words)} failed with {process.returncode}: "
                f"{tail.decode(errors='replace')}"
            )
        return seconds

    def _watch(self, process: subprocess.Popen) -> None:
        while process.poll() is None:
            self.memory = max(self.memory, _peak_memory(process.pid))
            time.sleep(0.1)


def _peak_memory(process: int | str = "self") -> int:
    """Bytes that a process has had resident at most (a child's rusage would start from its
    parent's); 0 when it is gone."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) * 1024 if found else 0


def _run_own(way: str, folders: list[Path], shared: np.ndarray, workdir: Path) -> dict[str, Any]:
    counts, sides, compiled = {}, {}, []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration_secs, **kwargs: (
            compiled.append(duration_secs) if event == COMPILATION else None
        )
    )
    start = time.perf_counter()
    jax.devices()
    started = time.perf_counter() - start
    for side, folder in zip(SIDES, folders):
        shards = TokenShards.open(folder)
        start = time.perf_counter()
        counts[side] = cooccurrence.count(
            shards, CONFIG.window, CONFIG.min_count, print, f"{side} co-occurrence"
        )
        sides[side] = {
            "phases": {"count": time.perf_counter() - start},
            "pairs": _entries(counts[side]),
        }
    start = time.perf_counter()
    if way == "ppmi":
        columns = vectors.contexts(CONFIG, counts["source"], counts["target"], shared, SEED)
        assert columns is not None, "too few shared tokens"
        made = ppmi.train(
            [*counts.values()], [columns[:, 0], columns[:, 1]], CONFIG.vector_size, SEED, print
        )
        # Both sides are factored at once; the time is put down to each by its pairs.
        seconds, total = (
            time.perf_counter() - start,
            sum(of_side["pairs"] for of_side in sides.values()),
        )
        for of_side in sides.values():
            of_side["phases"]["train"] = seconds * of_side["pairs"] / total
    else:
        made = []
        for offset, (side, of_side) in enumerate(counts.items()):
            start = time.perf_counter()
            found, sides[side]["loss"] = glove.train(
                of_side, CONFIG, SEED + offset, print, f"{side} GloVe"
            )
            sides[side]["phases"]["train"] = time.perf_counter() - start
            made.append(found)
    for (side, of_side), found in zip(counts.items(), made):
        np.savez(workdir / f"{way}-{side}.npz", ids=of_side.vocabulary, vectors=found)
        sides[side]["memory"] = _peak_memory()
    device = jax.local_devices()[0].memory_stats() or {}
    return {
        "sides": sides,
        "device_memory": device.get("peak_bytes_in_use"),
        "start": started,
        "programs": len(compiled),
        "compilation": sum(compiled),
        "processor": time.process_time(),
    }


def _entries(counts: cooccurrence.Cooccurrence) -> int:
    return 2 * len(counts) - int(np.sum(np.asarray(counts.rows) == np.asarray(counts.cols)))


def _in_process(function, *arguments) -> dict[str, Any]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


# --- what comes out -----------------------------------------------------------------------------


def _accuracy(workdir: Path, way: str, folders: list[Path], shared: np.ndarray) -> dict[str, float]:
    """Share of the validation whose token is matched right, by how the two sides are brought
    together."""
    source, target = (_read(workdir, way, side, folder) for side, folder in zip(SIDES, folders))
    rows = vectors.shared_rows(source.ids, target.ids, shared)
    few, validation = matching.choose_pivots(rows[:, 0], rows[:, 1], CONFIG.pivots, SEED)
    others = np.setdiff1d(np.arange(len(rows)), validation)
    found = {}
    for name, pivots in (
        (f"map from {len(few)}", few),
        (f"map from all {len(others):,} others", others),
    ):
        result = matching.match(
            source.vectors, target.vectors, rows[pivots], rows[validation], CONFIG.neighbours
        )
        found[name] = result.accuracy
    if way == "ppmi":
        keys, queries = (matching.centred(jnp.asarray(side.vectors)) for side in (source, target))
        best, _ = matching.csls(queries, keys, CONFIG.neighbours)
        found["no map"] = float(
            np.mean(np.asarray(best)[rows[validation, 1], 0] == rows[validation, 0])
        )
    return found


def _read(workdir: Path, way: str, side: str, folder: Path) -> vectors.Vectors:
    """By falling frequency, ties by id, as C has them in another order: so that all ways have the
    same validation pairs."""
    counts = TokenShards.open(folder).counts
    found = vectors.read(
        workdir / f"{way}-{side}.{'txt' if way == 'c' else 'npz'}", len(counts), f"{way}-{side}"
    )
    order = np.lexsort((found.ids, -counts[found.ids]))
    return vectors.Vectors(found.ids[order], found.vectors[order])


def _total(of_way: dict[str, Any]) -> float:
    return of_way.get("start", 0.0) + sum(
        sum(side["phases"].values()) for side in of_way["sides"].values()
    )


def _table(report: dict[str, Any]) -> str:
    tokens = ", ".join(f"{side} {count:,} tokens" for side, count in report["tokens"].items())
    lines = [f"{tokens}; {report['cores']} cores; ours on {report['device']}", ""]
    lines += [
        "| | seconds | by phase (source + target) | memory, GB | loss | accuracy@1 of validation "
        "pairs |",
        "|---|---|---|---|---|---|",
    ]
    for way, of_way in report["ways"].items():
        sides = list(of_way["sides"].values())
        phases = ", ".join(
            f"{name} " + " + ".join(f"{s['phases'][name]:.1f}" for s in sides)
            for name in sides[0]["phases"]
        )
        memory = f"{max(side['memory'] for side in sides) / 1e9:.2f}"
        if of_way.get("device_memory"):
            memory += f", device {of_way['device_memory'] / 1e9:.2f}"
        if "programs" in of_way:
            phases += f", start {of_way['start']:.1f} ({of_way['programs']} programs compiled in {of_way['compilation']:.1f}"
            phases += f", processors busy for {of_way['processor']:.0f})"
        loss = ", ".join(f"{side['loss'][-1]:.4f}" for side in sides if "loss" in side)
        accuracy = ", ".join(
            f"{name} {share:.3f}" for name, share in of_way["accuracy_at_1"].items()
        )
        name, run = WAYS[way], of_way.get("passes_run", CONFIG.glove.iterations)
        if run != CONFIG.glove.iterations:
            name += f" ({run} passes run; time of {CONFIG.glove.iterations} extrapolated, loss and accuracy not)"
        lines.append(
            f"| {name} | {_total(of_way):.1f} | {phases} | {memory} | {loss} | {accuracy} |"
        )
    if "c" in report["ways"]:
        for way in report["ways"]:
            if way != "c":
                factor = _total(report["ways"]["c"]) / _total(report["ways"][way])
                lines.append(f"\n{WAYS[way]}: {factor:.1f} times as fast as C")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
