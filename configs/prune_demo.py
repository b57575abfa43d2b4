"""Demo of pruning: tokens that the corpus does not need are removed; the others keep their rows.

    tokalign run --config configs/prune_demo.py --workdir runs/prune

Nothing is trained; it takes a minute on two CPU cores.
"""

from typing import Any

from tokalign_jax.configs import ultra_quick_demo


def get_config() -> Any:
    """Return the recipe."""
    config = ultra_quick_demo.get_config()
    config.target_tokenizer = "prune"
    config.prune.min_count = 2
    config.stage1.steps = 0
    config.stage2.steps = 0
    config.evaluation.random_baseline = False
    return config
