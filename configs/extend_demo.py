"""The embedded default with its vocabulary extended: the English/code tokenizer of a small real
model gets 6,000 tokens of eight languages, in minutes on two CPU cores. Its old tokens keep their
ids and, at the start, their rows.

tokalign run --config configs/extend_demo.py --workdir runs/extend

Expected, on held-out text of eight languages: less than half as many tokens (1.8 -> 3.9 bytes a
token); bits per byte 1.35 of the source model, 3.10 with random new rows, 1.82 initialised, 1.78
after Stage 1, 1.58 after Stage 2 (replacing the vocabulary: 1.67, see ultra_quick_demo.py); five to
ten minutes on two CPU cores.
"""

from ml_collections import ConfigDict

from tokalign_jax.configs import ultra_quick_demo


def get_config() -> ConfigDict:
    """Return the recipe."""
    config = ultra_quick_demo.get_config()
    config.target_tokenizer = "extend"
    config.extend.new_tokens = 6_000
    config.extend.min_count = 10
    config.alignment.method = "composed"  # as docs/results/extend.md measured it
    # Rows that are the source's own want smaller steps than rows that are new.
    config.stage1.learning_rate = 1e-3
    config.stage2.learning_rate = 3e-4
    config.stage2.embedding_learning_rate = 1e-3
    return config
