"""Attention with sinks on a GPU: error and time of cuDNN's kernels and of the einsum by blocks.

    python benchmarks/attention_sinks.py

Prints two tables for bfloat16, forward and backward pass. Errors: the root mean square of the
difference from a float32 einsum, divided by that of its result, for the result and the gradients of
queries, keys, values and sinks. Times: 16,384 tokens with gpt-oss's heads (64 of size 64, and 8
key-value heads).
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tokalign_jax.models import attention

SHAPES = ((300, None), (300, 128), (2048, None), (2048, 128))
"""Length and window of the texts whose errors are measured."""
LENGTHS = (2048, 8192)
TOKENS = 16384
CALLS = 20


def main() -> None:
    print(jax.devices()[0].device_kind, "jax", jax.__version__)
    print(
        "| length | window | kernel's errors: result, q, k, v, sinks | einsum's |\n|---|---|---|---|"
    )
    for length, window in SHAPES:
        inputs = arrays(2, length, 16, 4)
        exact = exact_results(inputs, window)
        errors = [
            ", ".join(f"{error(*pair):.1e}" for pair in zip(both(attend)(*inputs), exact))
            for attend in (kernel(window), whole(window))
        ]
        print(f"| {length} | {window} | {' | '.join(errors)} |", flush=True)
    print("| length | window | with sinks, ms | without | in blocks |\n|---|---|---|---|---|")
    for length in LENGTHS:
        inputs = arrays(TOKENS // length, length, 64, 8)
        for window in (None, 128):
            ways = kernel(window), kernel(window, with_sinks=False), blocks(window)
            times = " | ".join(f"{milliseconds(attend, inputs):.2f}" for attend in ways)
            print(f"| {length} | {window} | {times} |", flush=True)


def arrays(batch: int, length: int, heads: int, kv_heads: int, size: int = 64) -> list[jax.Array]:
    """Queries, keys, values, sinks and the gradient of the result."""
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v, upstream = (
        2 * jax.random.normal(key, (batch, length, count, size)).astype(jnp.bfloat16)
        for key, count in zip(keys, (heads, kv_heads, kv_heads, heads))
    )
    return [q, k, v, 2 * jax.random.normal(keys[4], (heads,)), upstream]


def kernel(window: int | None, with_sinks: bool = True) -> Callable:
    def attend(q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array) -> jax.Array:
        scale = q.shape[-1] ** -0.5
        return attention.attend(
            q, k, v, scale=scale, window=window, sinks=sinks if with_sinks else None
        )

    return attend


def whole(window: int | None) -> Callable:
    def attend(q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array) -> jax.Array:
        positions = jnp.arange(q.shape[1])
        mask = attention._causal_mask(positions, positions, window)
        return attention._dense_attention(q, k, v, mask, q.shape[-1] ** -0.5, None, sinks)

    return attend


def blocks(window: int | None) -> Callable:
    def attend(q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array) -> jax.Array:
        scale = q.shape[-1] ** -0.5
        return attention._blocked_attention(
            q, k, v, scale, window, None, attention.QUERY_BLOCK, sinks
        )

    return attend


def both(attend: Callable) -> Callable:
    """Returns the result and all gradients."""

    @jax.jit
    def run(*inputs: jax.Array) -> tuple[Any, ...]:
        y, pull = jax.vjp(attend, *inputs[:4])
        return y, *pull(inputs[4])

    return run


def exact_results(inputs: list[jax.Array], window: int | None) -> tuple[Any, ...]:
    with jax.default_matmul_precision("highest"):
        return both(whole(window))(*(x.astype(jnp.float32) for x in inputs))


@jax.jit
def error(got: jax.Array, exact: jax.Array) -> jax.Array:
    difference = got.astype(jnp.float32) - exact
    return jnp.sqrt(jnp.square(difference).mean() / jnp.square(exact).mean())


def milliseconds(attend: Callable, inputs: list[jax.Array]) -> float:
    run = functools.partial(both(attend), *inputs)
    jax.block_until_ready(run())
    began = time.perf_counter()
    jax.block_until_ready([run() for _ in range(CALLS)][-1])
    return 1e3 * (time.perf_counter() - began) / CALLS


if __name__ == "__main__":
    main()
