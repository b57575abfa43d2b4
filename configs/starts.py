"""What starts keep and fit, side by side: methods of alignment without any training stage.

    tokalign sweep --config configs/starts.py --workdir runs/starts \\
        --config.source_model=/models/smollm2 --config.target_tokenizer=/tokenizers/qwen3 \\
        --config.corpus=/data/mix.jsonl.xz --config.text.language_field=lang \\
        --config.evaluation.abilities=/data/abilities \\
        --config.evaluation.other_text=/data/other.jsonl

`--only='distilled*'` takes some of them. The table "What the model keeps" compares them by
abilities, fidelity and bits per byte of both kinds of text; docs/results/start.md says what came of
it.
"""

from typing import Any

from ml_collections import ConfigDict

from tokalign_jax.config import default_config


def get_config() -> ConfigDict:
    """What all starts have in common."""
    config = default_config()
    config.stage1.steps = 0
    config.stage2.steps = 0
    config.evaluation.random_baseline = False
    return config


def get_runs() -> dict[str, dict[str, Any]]:
    """By name: the fields in which a start differs."""
    runs: dict[str, dict[str, Any]] = {
        "pieces": {"alignment.method": "pieces"},
        "tokalign": {"alignment.method": "tokalign"},
        "composed": {"alignment.method": "composed"},
        "distilled-rows": {"initialization.trains": "rows"},
        "distilled-own-text": {"initialization.corpus_share": 0.0},
        "distilled-corpus": {"initialization.corpus_share": 1.0},
    }
    return runs | {f"distilled-s{seed}": {"seed": seed} for seed in range(3)}
