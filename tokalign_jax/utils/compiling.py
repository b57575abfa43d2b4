"""How XLA compiles: options of a command's process, set before JAX is used for anything, and the
precision of products.
"""

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
"""Products go to cuBLAS at once, with bias and sum in the same kernel; timed against generated
kernels first, they lose these, and the compilation takes several times as long."""

MEMORY = 0.92
"""Share of a GPU's memory that JAX takes when it starts. Its own is 0.75, and a quarter of the card
would lie idle: a command has it to itself, and what is outside (CUDA's context, libraries, NCCL)
needs a GB or so."""
_MEMORY_NAMES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
"""The variable that says so, and its old name, which must not be set beside it."""


def prepare(alone: bool = True) -> None:
    """Products by cuBLAS and most of the memory on a GPU, and compiled programs kept from run to
    run on accelerators.

    What XLA_FLAGS and JAX's own variables say of these stays as it is. Programs for a CPU are not
    kept: they fit the very machine that compiled them, and home folders travel. Starts JAX's
    backend.

    Args:
      alone: nothing but JAX uses the GPU during the command; else it takes the share that is its
        own default.
    """
    given = os.environ.get("XLA_FLAGS", "")
    if _has_cuda():
        if NO_TRITON_GEMM.split("=")[0] not in given:
            os.environ["XLA_FLAGS"] = f"{given} {NO_TRITON_GEMM}".strip()
        if alone and not any(name in os.environ for name in _MEMORY_NAMES):
            os.environ[_MEMORY_NAMES[0]] = str(MEMORY)
    # The backend first, whatever the variable says: where there are several processes, it starts in
    # all of them at once or in none.
    if jax.default_backend() != "cpu" and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = (
            Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
            / "tokalign_jax"
            / "jax"
        )
        jax.config.update(
            "jax_compilation_cache_dir", str(cache)
        )  # JAX makes it when it first writes


def products(dtype: DTypeLike) -> AbstractContextManager[Any]:
    """Within it, products of float32 arrays are float32 ones if `dtype`, that of activations, is
    float32. By themselves accelerators take TensorFloat-32 or a pass in bfloat16 for them.

    Products of narrower types are as they ever are: kernels may refuse to be asked for more.
    """
    return (
        jax.default_matmul_precision("highest")
        if jnp.dtype(dtype) == jnp.float32
        else nullcontext()
    )


def _has_cuda() -> bool:
    """Whether JAX's plugin for CUDA is installed: known without starting it, and XLA reads its
    flags when that starts.
    """
    plugins = importlib.util.find_spec("jax_plugins")
    places = list(plugins.submodule_search_locations or ()) if plugins else []
    return any("cuda" in module.name for module in pkgutil.iter_modules(places))
