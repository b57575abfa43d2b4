"""Compare kernels for causal self-attention: time, TFLOP/s and error, of the forward pass and with
the backward pass.

    python benchmarks/attention.py --batch 8 --length 2048 --heads 8 --head-size 256

Prints one table. A kernel that does not support this platform or shape is listed with the reason.

- project: what `models.attention.attend` chooses.
- cudnn: cuDNN's flash attention, through jax.nn.
- blocked: the project's fallback, einsum and softmax by blocks of queries.
- triton: the Pallas kernel that comes with jax (blocks of 64 in the forward pass, and of 32 in the
  backward pass if heads are larger than 128).
- mosaic: the Pallas kernel for Hopper that comes with jax; it has no causal backward pass.
- tokamax-mosaic, tokamax-triton: tokamax's kernels with the block sizes that it chooses itself, if
  it is installed.

TFLOP/s counts the pairs that a causal model needs, half of T x T: two matrix products in the
forward pass, 2 B N T^2 H, and five more in the backward pass (recomputed logits, and gradients of
weights, queries, keys and values), 7 B N T^2 H in total. The error, of the result and of the three
gradients, is the largest difference from a float32 reference divided by the reference's largest
value.
"""

import argparse
import functools
import re
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tokalign_jax.models import attention

Kernel = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
WARM = 0.3
"""Seconds of calls before the clock starts."""


def main() -> None:
    arguments = _arguments()
    shape = arguments.batch, arguments.length, arguments.heads, arguments.head_size
    q, k, v, towards = _inputs(
        shape, arguments.kv_heads or arguments.heads, jnp.dtype(arguments.dtype)
    )
    kernels = _kernels(arguments.head_size)
    expected = _reference(q, k, v, towards)
    pairs = arguments.batch * arguments.heads * arguments.length**2 * arguments.head_size
    device = jax.devices()[0]
    version = ", cuDNN " + str(_cudnn_version()) if device.platform == "gpu" else ""
    print(
        f"{device.device_kind}{version}, jax {jax.__version__}; B, T, N, H = {shape}, K = "
        f"{k.shape[2]}, {q.dtype}"
    )
    print(
        "| kernel | forward, ms | TFLOP/s | error | with backward, ms | TFLOP/s | error of dq, "
        "dk, dv |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in arguments.kinds.split(",") if arguments.kinds else kernels:
        forward = _measured(kernels[name], (q, k, v), expected[:1], 2 * pairs, arguments.steps)
        both = _measured(
            _with_gradients(kernels[name]),
            (q, k, v, towards),
            expected[1:],
            7 * pairs,
            arguments.steps,
        )
        print(f"| {name} | {forward} | {both} |", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=0, help="0: as many as heads")
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--kinds", default="", help=f"of {', '.join(_kernels(64))}; empty: all")
    parser.add_argument("--steps", type=int, default=100, help="calls that are timed")
    return parser.parse_args()


def _inputs(shape: tuple[int, int, int, int], kv_heads: int, dtype: Any) -> list[jax.Array]:
    """Queries, keys, values and the gradient of the result."""
    batch, length, heads, size = shape
    keys = jax.random.split(jax.random.key(0), 4)
    return [
        jax.random.normal(key, (batch, length, count, size), dtype)
        for key, count in zip(keys, (heads, kv_heads, kv_heads, heads))
    ]


def _measured(run: Callable, inputs: tuple, expected: tuple, flops: float, steps: int) -> str:
    """Three cells: milliseconds, TFLOP/s, error."""
    try:
        compiled = jax.jit(run).lower(*inputs).compile()
        results = jax.block_until_ready(compiled(*inputs))
        errors = [_error(*pair) for pair in zip(jax.tree.leaves(results), expected)]
        began = time.perf_counter()
        while time.perf_counter() - began < WARM:  # clocks fall while a program is compiled
            jax.block_until_ready(compiled(*inputs))
        began = time.perf_counter()
        jax.block_until_ready([compiled(*inputs) for _ in range(steps)][-1])
        seconds = (time.perf_counter() - began) / steps
    except Exception as error:  # whatever a kernel says of itself
        return f"{type(error).__name__} {_first_line(str(error))}".strip() + " | | "
    return f"{1e3 * seconds:.3f} | {flops / seconds / 1e12:.3g} | {', '.join(f'{error:.1e}' for error in errors)}"


def _first_line(text: str) -> str:
    return next((line for line in text.splitlines() if line.strip()), "")[:120].replace("|", "/")


@jax.jit
def _error(got: jax.Array, expected: jax.Array) -> jax.Array:
    return jnp.abs(got.astype(jnp.float32) - expected).max() / jnp.abs(expected).max()


def _with_gradients(kernel: Kernel) -> Callable:
    def run(q: jax.Array, k: jax.Array, v: jax.Array, towards: jax.Array) -> tuple[jax.Array, ...]:
        return jax.vjp(kernel, q, k, v)[1](towards)

    return run


def _reference(*inputs: jax.Array) -> tuple[jax.Array, ...]:
    """Result and gradients, in float32, a sequence at a time."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        k, v = (jnp.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
        logits = jnp.einsum("tnh,snh->nts", q, k) * q.shape[-1] ** -0.5
        seen = jnp.tril(jnp.ones(logits.shape[1:], bool))
        return jnp.einsum("nts,snh->tnh", jax.nn.softmax(jnp.where(seen, logits, -jnp.inf)), v)

    def one(sequence: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        y, pull = jax.vjp(attend, *sequence[:3])
        return y, *pull(sequence[3])

    with jax.default_matmul_precision("highest"):
        return jax.jit(lambda *arrays: jax.lax.map(one, arrays))(
            *(x.astype(jnp.float32) for x in inputs)
        )


# --- Kernels ------------------------------------------------------------------------------------


def _kernels(size: int) -> dict[str, Kernel]:
    """By name. What each needs is imported when it is called."""
    scale = size**-0.5
    return {
        "project": functools.partial(attention.attend, scale=scale),
        "cudnn": functools.partial(
            jax.nn.dot_product_attention, scale=scale, is_causal=True, implementation="cudnn"
        ),
        "blocked": lambda q, k, v: attention._blocked_attention(
            q, k, v, scale, None, None, attention.QUERY_BLOCK
        ),
        "triton": functools.partial(_triton, scale=scale),
        "mosaic": functools.partial(_mosaic, scale=scale),
        "tokamax-mosaic": functools.partial(_tokamax, scale=scale, implementation="mosaic"),
        "tokamax-triton": functools.partial(_tokamax, scale=scale, implementation="triton"),
    }


def _triton(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> jax.Array:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu import attention as kernel
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    back = 32 if q.shape[-1] > 128 else 64
    sizes = kernel.BlockSizes(64, 64, back, back, back, back)
    return kernel.mha(q, k, v, None, sm_scale=scale, causal=True, block_sizes=sizes)


def _mosaic(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> jax.Array:
    """It has no factor of the logits: queries are multiplied first."""
    from jax.experimental.pallas.ops.gpu import attention_mgpu as kernel

    config = kernel.TuningConfig(
        64, 64 if q.shape[-1] > 128 else 128, max_concurrent_steps=2, causal=True
    )
    return kernel.attention((q * scale).astype(q.dtype), k, v, config)


def _tokamax(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float, implementation: Any
) -> jax.Array:
    import tokamax  # pyright: ignore[reportMissingImports]

    return tokamax.dot_product_attention(
        q, k, v, scale=scale, is_causal=True, implementation=implementation
    )


def _cudnn_version() -> Any:
    from jax._src.lib import cuda_versions

    return (
        re.sub(r"(\d)(\d\d)(\d\d)$", r"\1.\2.\3", str(cuda_versions.cudnn_get_version()))
        if cuda_versions
        else None
    )


if __name__ == "__main__":
    main()
