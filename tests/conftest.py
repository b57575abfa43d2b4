"""Settings of all tests: CPU, no network, deterministic results, short compile times.

Most of the time of tests is compilation, for programs that run on next to no data. So XLA compiles
without LLVM's optimizations and without MLIR fusion emitters, and all processes share one
compilation cache. Environment variables carry these settings to processes that tests start.
"""

import atexit
import gc
import importlib.util
import itertools
import mmap
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import pytest

XLA_FLAGS = {
    "xla_cpu_use_fusion_emitters": "false",  # no MLIR
    # A program of a tiny model is not worth 32 parts: a fifth of the time for compiling.
    "xla_cpu_parallel_codegen_split_count": "1",
}


def _known(flag: str) -> bool:
    """Return whether the installed XLA has this flag; an unknown one would abort the process.

    The name must be a whole string of the library: descriptions still mention removed flags.
    """
    found = importlib.util.find_spec("jaxlib")
    libraries = Path(found.origin).parent.rglob("*.so*") if found and found.origin else ()
    for library in libraries:
        with (
            library.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            if content.find(b"\0" + flag.encode() + b"\0") >= 0:
                return True
    return False


os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
# Idle threads of PyTorch and NumPy spin: on two cores they took half of the time of a comparison
# with PyTorch.
for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(threads, "1")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
os.environ.setdefault(
    "XLA_FLAGS", " ".join(f"--{flag}={value}" for flag, value in XLA_FLAGS.items() if _known(flag))
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="tokalign_jax-test-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

# Tracing creates millions of objects and hardly any garbage: collections took a tenth of the time.
gc.set_threshold(50_000, 20, 100)


TESTS = Path(__file__).parent

WHOLE = (
    "benchmarks/",
    "cli/test_evaluate.py",
    "cli/test_sweep.py",
    "evaluation/test_abilities.py",
    "initialization/test_initialization.py",
    "initialization/test_self_distillation.py",
    "initialization/test_token_distillation.py",
    "models/test_experts.py",
    "models/test_families_dense.py",
    "models/test_families_gemma.py",
    "models/test_families_llama.py",
    "models/test_families_mixture.py",
    "models/test_families_qwen.py",
    "models/test_opening.py",
    "models/test_parity.py",
    "models/test_peft.py",
    "models/test_recurrent.py",
    "models/test_remat.py",
    "models/test_sampling.py",
    "parallel/",
    "pipeline/",
    "test_api.py",
    "tpu/",
    "training/test_faults.py",
    "training/test_loop.py",
    "training/test_precision.py",
    "training/test_profiling.py",
    "training/test_source_teacher.py",
    "training/test_states.py",
    "training/test_validation.py",
    "utils/test_locales.py",
)
"""Files and folders that `tests/check quick` skips: several processes or devices, runs of the
pipeline, every model family.
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests of whole programs, and put files with slow tests first.

    Otherwise workers would wait for one of these at the end; xdist keeps this order with
    `--no-loadscope-reorder`.
    """
    for item in items:
        if item.path.relative_to(TESTS).as_posix().startswith(WHOLE):
            item.add_marker(pytest.mark.whole)
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


MOST_MAPS = 20_000
"""Memory maps of a test process beyond which its compiled programs are dropped.

Linux allows 65,530, past which XLA crashes. A compiled program has about twelve, and a module of
tests up to ten thousand.
"""
_finished = itertools.count(1)


def pytest_runtest_teardown() -> None:
    """Drop compiled programs before there are too many of them for one process."""
    maps = Path("/proc/self/maps")
    if next(_finished) % 8 or not maps.exists() or maps.read_bytes().count(b"\n") < MOST_MAPS:
        return
    import jax  # not before the variables above are set

    jax.clear_caches()
    gc.collect()
