"""Differences of each model family from PyTorch: random tiny models, one for each set of features,
in float32 on the CPU.

    python benchmarks/parity.py             # prints the table and writes it into docs/models.md
    python benchmarks/parity.py gemma phi3  # only families with these words in their names

Rows of families that are not selected are left unchanged in the document.

The table has the largest differences of logits at two lengths; of the gradients of embedding and
head, relative to the largest element of each; and of the logits of the exported folder, loaded by
transformers. `effect` is the smallest change of the logits when one of the constants that the
family does not share with LLaMA 1 is removed: an error in such a constant would show at least this
much.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from transformers.utils import logging

from tests.models.parity_cases import (
    CASES,
    LENGTHS,
    Case,
    export,
    gradient_error,
    logit_error,
    our_logits,
    pair,
    reference,
    reference_logits,
    tokens,
)
from tokalign_jax.models.config import LayerKind, ModelConfig
from tokalign_jax.utils import paths

DOCUMENT = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- parity -->\n", "<!-- end of parity -->"

ABSENT = {
    "attention_scale": None,
    "attention_softcap": None,
    "logit_softcap": None,
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
    "output_scale": 1.0,
    "norm_plus_one": False,
    "embedding_norm": False,
    "rotate_before_norm": False,
    "qkv_clip": None,
}
"""Constants of some families, with the value that means that there is none."""

ABSENT_FROM_EXPERTS = {
    "clamped": None,
    "score": "softmax",
    "weight_scale": 1.0,
    "weighted_inputs": False,
}
"""The same, of mixtures."""

ABSENT_LEAVES = {"layers/attention/sinks": -1e9, "layers/mlp/selection_bias": 0.0}
"""Parameters of some families, with the value that means that there is none."""

STARTS = [f"| `{case.family}` | {case.features} |" for case in CASES]
"""Beginning of each case's row."""

HEADER = "| family | features | logits | gradients | exported | effect |\n|---|---|---|---|---|---|"


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    words = sys.argv[1:]
    print(HEADER)
    rows = []
    for case in CASES:
        if not words or any(word in case.family for word in words):
            rows.append(row(case))
            print(rows[-1], flush=True)
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    table, _, after = rest.partition(END)
    lines = "\n".join([HEADER, *merged(table.splitlines(), rows)])
    DOCUMENT.write_text(before + BEGIN + lines + "\n" + END + after, encoding="utf-8")


def merged(old: Sequence[str], new: Sequence[str]) -> list[str]:
    """The rows of all cases in their order, those of `new` instead of `old`."""
    by_start = {start: line for line in (*old, *new) for start in STARTS if line.startswith(start)}
    return [by_start[start] for start in STARTS if start in by_start]


def row(case: Case) -> str:
    with tempfile.TemporaryDirectory() as folder:
        both = pair(case, Path(folder) / "source")
        text = tokens(LENGTHS[1])
        before = reference_logits(both.reference, text)
        after = reference_logits(reference(export(both, Path(folder) / "written")), text)
        figures = (logit_error(both), gradient_error(both), float(np.abs(after - before).max()))
        ours = our_logits(both.config, both.params, text)
        effects = [
            np.abs(our_logits(less, both.params, text) - ours).max()
            for less in simpler(both.config)
        ]
        effects += [
            np.abs(our_logits(both.config, less, text) - ours).max()
            for less in without_leaves(both.params)
        ]
        figures = (*figures, *([float(min(effects))] if effects else []))
    return (
        f"{STARTS[CASES.index(case)]} "
        + " | ".join(f"{figure:.0e}" for figure in figures)
        + " |"
        + " |" * (not effects)
    )


def without_leaves(params: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """`params` with one of `ABSENT_LEAVES` set to the value that takes it away."""
    leaves = paths.flatten(params)
    for path, absent in ABSENT_LEAVES.items():
        if path in leaves:
            yield paths.unflatten({**leaves, path: np.full_like(leaves[path], absent)})


def simpler(config: ModelConfig) -> Iterator[ModelConfig]:
    """`config` without one of its constants, or with one a little off."""

    def layers(change: Callable[[LayerKind], LayerKind]) -> ModelConfig:
        return replace(config, layer_kinds=tuple(map(change, config.layer_kinds)))

    ropes = [kind.rope for kind in config.layer_kinds if kind.rope]
    if any(kind.window for kind in config.layer_kinds):
        yield layers(lambda kind: replace(kind, window=kind.window and kind.window + 1))
    if any(kind.chunk for kind in config.layer_kinds):
        yield layers(lambda kind: replace(kind, chunk=kind.chunk and kind.chunk + 1))
    if config.query_key_norm and not all(kind.query_key_norm for kind in config.layer_kinds):
        yield layers(lambda kind: replace(kind, query_key_norm=True))
    if any(rope.scaling for rope in ropes):
        yield layers(
            lambda kind: replace(kind, rope=kind.rope and replace(kind.rope, scaling=None))
        )
    if len({kind.rope for kind in config.layer_kinds}) > 1:
        yield layers(lambda kind: replace(kind, rope=ropes[0]))
    if any(kind.query_growth for kind in config.layer_kinds):
        yield layers(lambda kind: replace(kind, query_growth=None))
    for field, absent in ABSENT.items():
        if field == "rotate_before_norm" and (
            config.query_key_norm == "unscaled" or not config.norm_scale
        ):
            continue  # without a scale the order makes no difference
        if getattr(config, field) != absent:
            yield replace(config, **{field: absent})
    if config.experts:
        yield replace(
            config, experts=replace(config.experts, normalized=not config.experts.normalized)
        )
        for name, absent in ABSENT_FROM_EXPERTS.items():
            if getattr(config.experts, name) != absent:
                yield replace(config, experts=replace(config.experts, **{name: absent}))


if __name__ == "__main__":
    main()
