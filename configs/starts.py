"""Sweep of initialisations: alignment methods, without any training stage.

    tokalign sweep --config configs/starts.py --workdir runs/starts \\
        --config.source_model=/models/smollm2 --config.target_tokenizer=/tokenizers/qwen3 \\
        --config.corpus=/data/mix.jsonl.xz --config.text.language_field=lang \\
        --config.evaluation.abilities=/data/abilities \\
        --config.evaluation.other_text=/data/other.jsonl

`--only='distilled*'` selects a subset. The table "What the model retains" compares abilities,
fidelity and bits per byte of both kinds of text; docs/results/start.md has results.
"""

from typing import Any

from tokalign_jax.config import default_config


def get_config() -> Any:
    """Return the settings that all runs share."""
    config = default_config()
    config.stage1.steps = 0
    config.stage2.steps = 0
    config.evaluation.random_baseline = False
    return config


def get_runs() -> dict[str, dict[str, Any]]:
    """Return the fields in which each run differs, by its name."""
    runs: dict[str, dict[str, Any]] = {
        "pieces": {"alignment.method": "pieces"},
        "tokalign": {"alignment.method": "tokalign"},
        "composed": {"alignment.method": "composed"},
        "distilled-lora": {"initialization.trains": "lora"},
        "distilled-rows": {"initialization.trains": "rows"},
        "distilled-own-text": {"initialization.corpus_share": 0.0},
        "distilled-corpus": {"initialization.corpus_share": 1.0},
    }
    return runs | {f"distilled-s{seed}": {"seed": seed} for seed in range(3)}
