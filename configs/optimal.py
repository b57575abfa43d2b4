"""Conservative: low Stage 1 learning rate, LoRA in Stage 2, higher threshold, relative offset.

    tokalign run --config configs/optimal.py --workdir runs/optimal
    tokalign run --config configs/optimal.py --workdir runs/mine \\
        --config.source_model=/models/my-llama --config.target_tokenizer=/models/my-tokenizer \\
        --config.corpus='/data/*.jsonl.xz'

Expected: the body of the model changes little. For the measured budgets (a few hundred steps,
docs/results/recipe.md) the evidence is against it: a Stage 1 learning rate of 2e-5 recovers only a
fraction of what 6.4e-4 does, LoRA at 5e-5 ends far behind full training at the same rate, and a run
without Stage 1 is better than both; `configs/best.py` is the best recipe for these budgets. This
one is meant for the full 2,500 steps, which have not been measured yet.
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
    config.text.budget_bytes = 5_000_000_000

    config.alignment.vector_size = 300
    config.alignment.glove.iterations = 15
    config.alignment.window = 15
    config.alignment.similarity_threshold = 0.4

    for stage in (config.stage1, config.stage2):
        stage.steps = 2500
        stage.batch.size = 64
        stage.batch.per_device = 4
        stage.batch.sequence_length = 2048
        stage.optimizer.weight_decay = 0.01
        stage.optimizer.row_damping = 0.0  # AdamW
        stage.warmup_fraction = 0.03
    config.stage1.method = "embedding"
    config.stage1.learning_rate = 2e-5
    config.stage1.start_offset = 0
    config.stage2.method = "lora"
    config.stage2.learning_rate = 5e-5
    config.stage2.lora.rank = 64
    config.stage2.lora.alpha = 16.0
    config.stage2.lora.dropout = 0.1
    config.stage2.start_offset = 0.2  # 1M of 5M records

    config.compute.dtype = "bfloat16"
    return config
