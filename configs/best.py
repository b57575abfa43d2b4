"""What recovered most in the measurements so far: a high Stage 1 rate, then everything, from this project's own alignment.

    python -m tokalign_jax.main --config configs/best.py --workdir runs/best \\
        --config.source_model=/models/my-llama --config.target_tokenizer=/models/my-tokenizer --config.corpus='/data/*.jsonl.xz'

Evidence (docs/results/recipe.md and docs/results/alignment.md; small models, up to 16M tokens): full training in Stage 2 at 5e-5 ends
well below LoRA at 5e-5, over three seeds; a Stage 1 rate of 6.4e-4 recovers several times what 2e-5 does in Stage 1, without one skipped
step, though full training makes up for most of that; this project's start ends below the mean of pieces and the published alignment. Not
yet measured with 2,500 steps or with models of a billion parameters; where memory does not allow full training, LoRA wants a rate
above 5e-5.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The paper's recipe with steps of a size that one host takes, Stage 2 reading on where Stage 1 stopped."""
    config = runpy.run_path(str(Path(__file__).with_name("research.py")))["get_config"]()
    config.data.epochs = 0
    for stage in (config.stage1, config.stage2):
        stage.batch_size = 64
    config.stage2.start_offset = "after_previous"
    return config
