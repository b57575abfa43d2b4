"""Sweep over training tokens: retention and fit after 1M to 16M tokens.

    tokalign sweep --config configs/recipe_curves.py --workdir runs/curves \\
        --config.source_model=/models/smollm2 --config.target_tokenizer=/tokenizers/qwen3 \\
        --config.corpus='/data/mix.jsonl.xz=0.7,self=0.3' --config.text.language_field=lang \\
        --config.evaluation.abilities=/data/abilities \\
        --config.evaluation.other_text=/data/other.jsonl \\
        --config.evaluation.chat_questions=/data/chat.jsonl

Without a corpus, the training text is written by the source model (`corpus=self`).

The runs are objectives x trainable parameters x rates x with and without Stage 1 x tokens; every
number of tokens has a separate learning rate schedule. `mixture-full-3e-04-alone-16M-s0` trains in
full at 3e-4, without Stage 1, on 16M tokens; with `stage1`, the first quarter of the tokens trains
the rows alone. For comparison, runs named `pieces` start from the mean of the pieces and use the
next-token loss. All runs share corpus, alignment and initialisation.
`--only='mixture-full-*,next_token-full-*'` selects a subset. The comparison has a table of all
runs; `runs/curves/runs/NAME/report.json` has the results of each.
"""

from typing import Any

from tokalign_jax.config import default_config

SEQUENCES, LENGTH = 64, 1024
"""Batch of a step: 65,536 tokens."""
MILLIONS = (1, 2, 4, 8, 16)
OBJECTIVES = ("next_token", "mixture", "distillation")
RATES: dict[str, tuple[float, ...]] = {"full": (1e-4, 3e-4, 1e-3), "lora": (1e-3, 4e-3)}
ROWS = 6.4e-4
"""Peak rate of embedding and head in Stage 1, and beside LoRA."""


def get_config() -> Any:
    """Return the settings that all runs share."""
    config = default_config()
    config.corpus = "self"
    config.text.self_tokens = 8_000_000
    config.text.held_out_fraction = 0.01
    for stage in (config.stage1, config.stage2):
        stage.batch.size = SEQUENCES
        stage.batch.sequence_length = LENGTH
        stage.checkpoints.every = 100
        stage.checkpoints.keep = 1
    config.stage1.learning_rate = ROWS
    config.stage2.start_offset = "after_previous"
    config.evaluation.abilities = "embedded"
    config.evaluation.bytes_per_language = 100_000
    config.evaluation.random_baseline = False
    return config


def get_runs() -> dict[str, dict[str, Any]]:
    """Return the fields in which each run differs, by its name."""
    runs: dict[str, dict[str, Any]] = {"start": {"stage1.steps": 0, "stage2.steps": 0}}
    for millions in MILLIONS:
        for objective in OBJECTIVES:
            for method, rates in RATES.items():
                for rate in rates:
                    for with_stage1 in (False, True):
                        runs |= _run(objective, method, rate, with_stage1, millions)
        for rate in RATES["full"]:
            runs |= _run("next_token", "full", rate, False, millions, "pieces")
    # Variation over seeds.
    for seed in (1, 2):
        for objective in OBJECTIVES:
            for rate in RATES["full"]:
                runs |= _run(objective, "full", rate, False, 16, seed=seed)
    return runs


def _run(
    objective: str,
    method: str,
    rate: float,
    with_stage1: bool,
    millions: int,
    start: str = "",
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    steps = millions * 1_000_000 // (SEQUENCES * LENGTH) + 1
    stage1_steps = steps // 4 if with_stage1 else 0
    fields: dict[str, Any] = {
        "seed": seed,
        "stage1.steps": stage1_steps,
        "stage1.objective": objective,
        "stage2.steps": steps - stage1_steps,
        "stage2.objective": objective,
        "stage2.method": method,
        "stage2.learning_rate": rate,
    }
    if method == "lora":
        fields["stage2.embedding_learning_rate"] = ROWS
    if start:
        fields["alignment.method"] = start
    stages = "stage1" if with_stage1 else "alone"
    name = f"{start or objective}-{method}-{rate:.0e}-{stages}-{millions}M-s{seed}"
    return {name: fields}
