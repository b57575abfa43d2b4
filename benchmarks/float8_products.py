"""Time of matrix products in float8 (models/float8.py) and bfloat16, forward and backward.

    python benchmarks/float8_products.py           # one GPU, half a minute
    python benchmarks/float8_products.py --tiny    # any device, a check of the script

The shapes are those of a model with Pythia-1B's width and 16,384 tokens. `kernels` counts
cuBLASLt's float8 products in the compiled program: 3 if XLA uses them for the product and both of
its gradients. Errors are relative norms against bfloat16.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tokalign_jax.models import float8
from tokalign_jax.utils import compiling

KERNEL = '"__cublas$lt$matmul$f8"'
SHAPES = ((2048, 8192), (8192, 2048), (2048, 6144))
"""Inputs and outputs of kernels."""
SEQUENCES, LENGTH = 8, 2048


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    compiling.prepare()
    shapes, length = (((32, 64),), 16) if arguments.tiny else (SHAPES, LENGTH)
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}\n")
    print("| tokens x in x out | | kernels | forward, ms | with gradients, ms | errors |")
    print("|---|---|---:|---:|---:|---|")
    for inputs, outputs in shapes:
        keys = jax.random.split(jax.random.key(0), 3)
        x = jax.random.normal(keys[0], (SEQUENCES, length, inputs), jnp.bfloat16)
        kernel = jax.random.normal(keys[1], (inputs, outputs), jnp.bfloat16) * 0.02
        gradient = jax.random.normal(keys[2], (SEQUENCES, length, outputs), jnp.bfloat16)
        exact: Any = None
        for name, product in (("bfloat16", jnp.matmul), ("float8", float8.product)):
            forward = jax.jit(product).lower(x, kernel).compile()
            whole = jax.jit(with_gradients(product)).lower(x, kernel, gradient).compile()
            results = whole(x, kernel, gradient)
            exact = exact or results
            errors = " ".join(f"{relative(a, b):.3f}" for a, b in zip(results, exact))
            times = [
                milliseconds(f, arguments.repeats, *operands)
                for f, operands in ((forward, (x, kernel)), (whole, (x, kernel, gradient)))
            ]
            print(
                f"| {SEQUENCES * length} x {inputs} x {outputs} | {name}"
                f" | {whole.as_text().count(KERNEL)} | {times[0]:.3f} | {times[1]:.3f} | {errors} |",
                flush=True,
            )


def with_gradients(product: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of (x, kernel, output gradient) to the result and both gradients."""

    def both(x: Any, kernel: Any, gradient: Any) -> tuple[Any, ...]:
        y, pull = jax.vjp(product, x, kernel)
        return y, *pull(gradient)

    return both


def relative(value: Any, exact: Any) -> float:
    """Return the norm of the difference over that of the exact array."""
    value, exact = (array.astype(jnp.float32) for array in (value, exact))
    return float(jnp.linalg.norm(value - exact) / jnp.linalg.norm(exact))


def milliseconds(compiled: Any, repeats: int, *operands: Any) -> float:
    """Return the mean time of a call, after two that are not timed."""
    for _ in range(2):
        jax.block_until_ready(compiled(*operands))
    began = time.perf_counter()
    for _ in range(repeats):
        result = compiled(*operands)
    jax.block_until_ready(result)
    return 1e3 * (time.perf_counter() - began) / repeats


if __name__ == "__main__":
    main()
