"""Sweep of recipes: Stage 1 learning rate x Stage 2 method x alignment, over seeds and budgets.

    tokalign sweep --config configs/recipe.py --workdir runs/recipe \\
        --config.source_model=/models/llama --config.target_tokenizer=/tokenizers/qwen3 \\
        --config.corpus=/data/mix.jsonl.xz --config.text.language_field=lang

Names of runs: `own-6.4e-04-full-60-s0` starts from this project's alignment and trains 60 steps per
stage, Stage 1 at 6.4e-4, Stage 2 in full, with seed 0. `--only='*-s0'` selects a subset.
docs/results/recipe.md has the results on an H100.
"""

from typing import Any

from tokalign_jax.config import default_config

RATES = (2e-5, 5e-5, 1.6e-4, 6.4e-4)
STARTS: dict[str, dict[str, Any]] = {
    "own": {},
    "pieces": {"alignment.method": "pieces"},
    "published": {"alignment.method": "tokalign"},
}
LORA = {"stage2.method": "lora"}
STAGE2: dict[str, dict[str, Any]] = {"full": {}, "lora": LORA}


def get_config() -> Any:
    """Return the settings that all runs share."""
    config = default_config()
    config.source_model = "embedded"
    config.target_tokenizer = "embedded"
    config.corpus = "embedded"
    config.text.language_field = "language"
    config.text.budget_bytes = 5_000_000_000
    config.text.held_out_fraction = 0.01
    config.alignment.method = "composed"  # without tuning, as in the measurements of docs/
    config.initialization.tuning = 0
    for stage in (config.stage1, config.stage2):
        stage.batch.size = 32
        stage.batch.per_device = 32
        stage.batch.sequence_length = 1024
        stage.checkpoints.every = 1000
        stage.checkpoints.keep = 1
        stage.log_every = 60
        stage.optimizer.row_damping = 0.0  # AdamW, where a run's name does not say otherwise
    config.stage1.method = "embedding"
    config.stage2.method = "full"
    config.stage2.learning_rate = 5e-5
    config.stage2.lora.rank = 64
    config.stage2.lora.alpha = 16.0
    config.stage2.lora.dropout = 0.1
    config.evaluation.bytes_per_language = 20_000
    config.evaluation.random_baseline = False
    config.evaluation.sample_tokens = 8
    return config


def get_runs() -> dict[str, dict[str, Any]]:
    """Return the fields in which each run differs, by its name."""
    return _grid() | _without_stage1() | _rare_rows() | _large_budgets() | _single_changes()


def _grid() -> dict[str, dict[str, Any]]:
    """Return the grid over initialisations, Stage 1 rates and Stage 2 methods."""
    runs = {}
    for seed in range(3):
        for start, alignment in STARTS.items():
            for rate in RATES:
                for trains, stage2 in STAGE2.items():
                    runs |= _run(start, rate, trains, 60, seed, alignment | stage2)
    # Rates over budgets, with one above the others.
    for steps in (60, 240, 960):
        for rate in (*RATES, 2.56e-3):
            runs |= _run("own", rate, "full", steps, 0, {})
    return runs


def _without_stage1() -> dict[str, dict[str, Any]]:
    """Return runs at higher rates of Stage 2, with and without Stage 1 at the same tokens."""
    runs = {}
    for seed in range(3):
        for rate in (1.6e-4, 5e-4, 1e-3):
            stage2 = {"stage2.learning_rate": rate}
            runs |= _run("own", 6.4e-4, f"full@{rate:.1e}", 60, seed, stage2)
            runs |= _alone(f"full@{rate:.1e}", 120, seed, stage2)
        for start in ("pieces", "published"):
            runs |= _alone(
                "full@5.0e-04", 120, seed, {"stage2.learning_rate": 5e-4} | STARTS[start], start
            )
        rows = {"stage2.learning_rate": 5e-4, "stage2.embedding_learning_rate": 1.6e-4}
        runs |= _alone("full@5.0e-04-rows@1.6e-04", 120, seed, rows)
        for rate in (1.6e-4, 5e-4, 1e-3):
            damped = {"stage2.learning_rate": rate, "stage2.optimizer.row_damping": 0.3}
            runs |= _alone(f"full@{rate:.1e}-damped0.3", 120, seed, damped)
    return runs


def _rare_rows() -> dict[str, dict[str, Any]]:
    """Return runs with other denominators of Adam, which matter for rows of rare tokens."""
    runs = {}
    for field, values in {
        "epsilon": (1e-7, 1e-6, 1e-5, 1e-4, 1e-3),
        "row_damping": (0.1, 1.0),
    }.items():
        for value in values:
            fields = {"stage2.learning_rate": 5e-4, f"stage2.optimizer.{field}": value}
            runs |= _alone(f"full@5.0e-04-{field}{value:g}", 120, 0, fields)
    for name, fields in {
        "": {},
        "-epsilon1e-05": {"stage2.optimizer.epsilon": 1e-5},
        "-damped0.3": {"stage2.optimizer.row_damping": 0.3},
    }.items():
        runs |= _alone(f"full@5.0e-04{name}", 480, 0, {"stage2.learning_rate": 5e-4} | fields)
    return runs


def _large_budgets() -> dict[str, dict[str, Any]]:
    """Return runs with and without Stage 1 at larger budgets."""
    runs = {}
    for steps in (240, 960):
        stage2 = {"stage2.learning_rate": 1.6e-4}
        runs |= _run("own", 6.4e-4, "full@1.6e-04", steps, 0, stage2)
        runs |= _alone("full@1.6e-04", 2 * steps, 0, stage2)
    return runs


def _single_changes() -> dict[str, dict[str, Any]]:
    """Return runs with a single change each to Stage 1 at 6.4e-4 and Stage 2 at 5e-4."""
    runs = {}
    for name, fields in {
        "offset0": {"stage2.start_offset": 0},
        "offset0.2": {"stage2.start_offset": 0.2},
        "decay0.1": {"stage1.optimizer.weight_decay": 0.1, "stage2.optimizer.weight_decay": 0.1},
        "rows@1.6e-04": {"stage2.embedding_learning_rate": 1.6e-4},
        "lora@5.0e-04": LORA,
        "lora@4.0e-03-rows@6.4e-04": LORA
        | {"stage2.learning_rate": 4e-3, "stage2.embedding_learning_rate": 6.4e-4},
        "threshold0": {"alignment.similarity_threshold": 0.0},
        "threshold0.6": {"alignment.similarity_threshold": 0.6},
        "nomatches": {"alignment.similarity_threshold": 1.0},
    }.items():
        for seed in range(3):
            runs |= _run("own", 6.4e-4, name, 60, seed, {"stage2.learning_rate": 5e-4} | fields)
    return runs


def _run(
    start: str, rate: float, rest: str, steps: int, seed: int, fields: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    common = {
        "seed": seed,
        "stage1.learning_rate": rate,
        "stage1.steps": steps,
        "stage2.steps": steps,
    }
    return {f"{start}-{rate:.1e}-{rest}-{steps}-s{seed}": common | fields}


def _alone(
    rest: str, steps: int, seed: int, fields: dict[str, Any], start: str = "own"
) -> dict[str, dict[str, Any]]:
    """Return a run of Stage 2 without Stage 1."""
    common = {"seed": seed, "stage1.steps": 0, "stage2.steps": steps}
    return {f"{start}-none-{rest}-{steps}-s{seed}": common | fields}
