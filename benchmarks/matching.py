"""Time of matching by vocabulary size, on random vectors.

    python benchmarks/matching.py --source 50000 --target 262000 --dimensions 300

Prints the seconds of each step (of its second run, since the first one compiles). CSLS takes one
pass over all dot products of vectors, 2 x source x target x dimensions FLOP, and one over those of
the most frequent target tokens. The floor is the time for this work at the FLOP/s measured on one
block. The work does not depend on the values of the vectors, and grows with the number of target
tokens.
"""

import argparse
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from tokalign_jax.alignment import matching, published


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=int, default=50_000, help="source tokens with a vector")
    parser.add_argument("--target", type=int, default=26_200, help="target tokens with a vector")
    parser.add_argument("--dimensions", type=int, default=300)
    parser.add_argument("--pivots", type=int, default=300)
    parser.add_argument("--neighbours", type=int, default=10)
    parser.add_argument(
        "--cold", action="store_true", help="time the first run too, not only the second"
    )
    arguments = parser.parse_args()
    size = arguments.source, arguments.target
    rng = np.random.default_rng(0)
    source, target = (rng.standard_normal((n, arguments.dimensions), np.float32) for n in size)
    shared = np.stack([rng.permutation(n)[: arguments.pivots * 2] for n in size], axis=1)
    pivots, validation = shared[: arguments.pivots], shared[arguments.pivots :]
    keys, queries = matching.common_space(
        jnp.asarray(source), jnp.asarray(target), jnp.asarray(pivots)
    )
    block = queries[: matching.QUERY_BLOCK]
    product = jax.jit(lambda a, b: jnp.matmul(a, b.T, precision="highest"))
    steps: dict[str, Callable[[], object]] = {
        "one block of products": lambda: product(block, keys),
        "common space": lambda: matching.common_space(
            jnp.asarray(source), jnp.asarray(target), jnp.asarray(pivots)
        ),
        "pass 1: around each source": lambda: matching.hubness(keys, queries, arguments.neighbours),
        "pass 2: best of each target": lambda: matching.nearest(
            queries, keys, jnp.zeros(size[0]), arguments.neighbours
        ),
        "match, in all": lambda: matching.match(
            source, target, pivots, validation, arguments.neighbours
        ),
        "match as published": lambda: published.match(source, target, pivots),
    }
    products = 2 * arguments.dimensions * size[0]
    print(
        f"{jax.devices()[0].device_kind}: {size[1]:,} target x {size[0]:,} source tokens, "
        f"{arguments.dimensions} dimensions"
    )
    for name, step in steps.items():
        seconds = [_seconds(step) for _ in range(2)]
        line = f"{name:28} {seconds[1]:9.3f} s" + (
            f"  (first run {seconds[0]:.2f} s)" if arguments.cold else ""
        )
        if "block" in name:
            rate = products * len(block) / seconds[1]
            floor = products * (size[1] + min(size[1], matching.AROUND)) / rate
            line += f"  {rate / 1e9:,.0f} GFLOP/s: both passes take {floor:.2f} s at least"
        print(line)


def _seconds(step: Callable[[], object]) -> float:
    began = time.monotonic()
    jax.block_until_ready(step())
    return time.monotonic() - began


if __name__ == "__main__":
    main()
