"""XLA options of a process, set before JAX is used, and the precision of matrix products."""

import importlib.util
import os
import pkgutil
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

NO_TRITON_GEMM = "--xla_gpu_enable_triton_gemm=false"
"""Matrix products go to cuBLAS, with bias and sum in the same kernel. Autotuning against generated
kernels loses that fusion, and takes several times as long to compile."""

MEMORY = 0.92
"""Share of a GPU's memory that JAX preallocates. Its default of 0.75 leaves a quarter unused, while
a command has the GPU to itself and CUDA's context, libraries and NCCL need about 1 GB."""
_MEMORY_NAMES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
"""The environment variable of that share, and its old name; only one of them may be set."""


def prepare(alone: bool = True) -> None:
    """Set XLA options for GPUs and the compilation cache for accelerators; start JAX's backend.

    XLA_FLAGS and JAX's own environment variables take precedence. Programs for CPUs are not cached:
    they fit the machine that compiled them alone, and home folders are shared between machines.

    Args:
      alone: whether JAX has the GPU to itself; else its default share of the memory is left.
    """
    xla_flags = os.environ.get("XLA_FLAGS", "")
    if _has_cuda():
        if NO_TRITON_GEMM.split("=")[0] not in xla_flags:
            os.environ["XLA_FLAGS"] = f"{xla_flags} {NO_TRITON_GEMM}".strip()
        if alone and not any(name in os.environ for name in _MEMORY_NAMES):
            os.environ[_MEMORY_NAMES[0]] = str(MEMORY)
    # The backend is started whatever the variable says: with several processes, it must start in
    # all of them at once or in none.
    if jax.default_backend() != "cpu" and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(caches / "tokalign_jax" / "jax"))


def products(dtype: DTypeLike) -> AbstractContextManager[Any]:
    """Return a context in which float32 matrix products are computed in float32.

    By default accelerators use TensorFloat-32 or bfloat16 passes.

    Args:
      dtype: of activations. Below float32 the context has no effect, since kernels of narrower
        types may refuse a higher precision.
    """
    if jnp.dtype(dtype) == jnp.float32:
        return jax.default_matmul_precision("highest")
    return nullcontext()


def _has_cuda() -> bool:
    """Return whether JAX's CUDA plugin is installed, without starting it: that reads XLA_FLAGS."""
    plugins = importlib.util.find_spec("jax_plugins")
    folders = list(plugins.submodule_search_locations or ()) if plugins else []
    return any("cuda" in module.name for module in pkgutil.iter_modules(folders))
