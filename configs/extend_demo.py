"""Demo of an extension: 6,000 tokens from eight languages are added to an English/code tokenizer.

    tokalign run --config configs/extend_demo.py --workdir runs/extend

Existing tokens keep their ids and, initially, their rows. Expected on held-out text of eight
languages: less than half as many tokens (1.8 -> 3.9 bytes per token); bits per byte 1.35 for the
source model, 3.10 with random new rows, 1.82 initialised, 1.78 after Stage 1, 1.58 after Stage 2
(replacing the vocabulary: 1.67, see ultra_quick_demo.py). It takes five to ten minutes on two CPU
cores.
"""

from typing import Any

from tokalign_jax.configs import ultra_quick_demo


def get_config() -> Any:
    """Return the recipe."""
    config = ultra_quick_demo.get_config()
    config.target_tokenizer = "extend"
    config.extend.new_tokens = 6_000
    config.extend.min_count = 10
    config.alignment.method = "composed"  # as docs/results/extend.md measured it
    # Rows of the source need smaller steps than new ones.
    config.stage1.learning_rate = 1e-3
    config.stage2.learning_rate = 3e-4
    config.stage2.embedding_learning_rate = 1e-3
    return config
