"""The embedded default with its vocabulary extended: the English/code tokenizer of a small real model gets 6,000 tokens of eight
languages, in minutes on two CPU cores. Its old tokens keep their ids and, at the start, their rows.

python -m tokalign_jax.main --config configs/extend_demo.py --workdir runs/extend

Expected, on held-out text of eight languages: less than half as many tokens (1.8 -> 3.9 bytes a token); bits per byte 1.35 of the source
model, 3.10 with random new rows, 2.13 initialised, 1.93 after Stage 1, 1.79 after Stage 2 (replacing the vocabulary: 1.91, see
ultra_quick_demo.py); 12 minutes on two CPU cores that others kept busy.
"""

from ml_collections import ConfigDict

from tokalign_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.source_model = "embedded"
    config.target_tokenizer = "extend"
    config.corpus = "embedded"
    config.seed = 0
    config.text.language_field = "language"
    config.text.budget_bytes = 50_000_000  # all of it
    config.text.held_out_fraction = 0.04
    config.extend.new_tokens = 6_000
    config.extend.min_count = 10

    config.alignment.vector_size = 300
    config.alignment.window = 15
    config.alignment.similarity_threshold = 0.3
    config.initialization.tokens = 500_000

    for stage in (config.stage1, config.stage2):
        stage.batch_size = 4
        stage.per_device_batch = 4
        stage.sequence_length = 256
        stage.weight_decay = 0.01
        stage.warmup_fraction = 0.03
        stage.checkpoint_every = 40
    config.stage1.method = "embedding"
    config.stage1.steps = 160
    config.stage1.learning_rate = 5e-4
    config.stage1.start_offset = 0
    config.stage2.method = "lora"
    config.stage2.steps = 140
    config.stage2.learning_rate = 1e-3
    config.stage2.embedding_learning_rate = 5e-4
    config.stage2.lora.rank = 16
    config.stage2.lora.alpha = 16.0
    config.stage2.lora.dropout = 0.0
    config.stage2.start_offset = "after_previous"

    config.compute.dtype = "float32"
    config.compute.remat = "dots"
    config.evaluation.bytes_per_language = 20_000
    config.evaluation.sequence_length = 256
    return config
