"""Compare this project's starts with those of their authors' packages, row by row.

    python benchmarks/rivals/alike.py --source models/smollm2 --starts runs/rivals/models

For each method with two implementations, prints the share of shared tokens' rows that are equal bit
for bit, and the median and 10% quantile of the cosine similarity of all other rows of the input
embedding.
"""

import argparse
from pathlib import Path

import numpy as np
from jaxtyping import Float

from tokalign_jax.models import hub, huggingface

PAIRS = (("pieces", "tokensurgeon-subword"), ("omp", "tokensurgeon-omp"), ("focus", "deepfocus"))


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", required=True, type=Path)
    parser.add_argument("--starts", required=True, type=Path, help="models/ of compare.py")
    args = parser.parse_args()
    known = {row.tobytes() for row in rows(args.source)}
    shared = np.array([row.tobytes() in known for row in rows(args.starts / "pieces")])
    print(f"{shared.sum():,} of {len(shared):,} rows are the source's\n")
    print("| starts | shared rows equal | median cosine of others | 10% quantile |")
    print("|---|---:|---:|---:|")
    for pair in PAIRS:
        ours, theirs = (rows(args.starts / name) for name in pair)
        equal = (ours == theirs).all(axis=1)[shared].mean()
        cosines = cosine(ours[~shared], theirs[~shared])
        low, median = np.quantile(cosines, (0.1, 0.5))
        print(f"| {' and '.join(pair)} | {equal:.1%} | {median:.3f} | {low:.3f} |")


def rows(folder: Path) -> Float[np.ndarray, "V D"]:
    """The input embedding of a model, float32."""
    config, _ = hub.load_config(folder)
    return np.asarray(
        huggingface.stored_reader(folder, config)("embed_tokens/embedding"), np.float32
    )


def cosine(
    one: Float[np.ndarray, "n D"], other: Float[np.ndarray, "n D"]
) -> Float[np.ndarray, "n"]:
    """Of each pair of rows; 0 where one of them is 0."""
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return (one * other).sum(axis=1) / np.maximum(norms, 1e-9)


if __name__ == "__main__":
    main()
