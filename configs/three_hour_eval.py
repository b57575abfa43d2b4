"""Recipe to compare choices in about three hours on one GPU: 600 + 1,400 steps on 1 GB of text.

    tokalign run --config configs/three_hour_eval.py --workdir runs/three_hours

Enough to compare two options (an alignment, a learning rate, a threshold) on the same model. Not
yet measured with Pythia-1B.
"""

from typing import Any

from tokalign_jax.config import default_config


def get_config() -> Any:
    """Return the recipe."""
    config = default_config()
    config.source_model = "EleutherAI/pythia-1b"
    config.target_tokenizer = "Qwen/Qwen2-1.5B"
    config.corpus = "monology/pile-uncopyrighted"
    config.seed = 0
    config.text.budget_bytes = 1_000_000_000

    config.alignment.vector_size = 300
    config.alignment.glove.iterations = 15
    config.alignment.window = 15
    config.alignment.similarity_threshold = 0.3

    for stage in (config.stage1, config.stage2):
        stage.batch.size = 32
        stage.batch.per_device = 2
        stage.batch.sequence_length = 1024
        stage.optimizer.weight_decay = 0.01
        stage.warmup_fraction = 0.03
        stage.start_offset = 0
    config.stage1.method = "embedding"
    config.stage1.steps = 600
    config.stage1.learning_rate = 5e-4
    config.stage2.method = "lora"
    config.stage2.steps = 1400
    config.stage2.learning_rate = 5e-5
    config.stage2.lora.rank = 64
    config.stage2.lora.alpha = 16.0
    config.stage2.lora.dropout = 0.1

    config.compute.dtype = "bfloat16"
    return config
