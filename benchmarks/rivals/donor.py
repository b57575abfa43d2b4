"""Create a small model with a given tokenizer, for methods that combine rows of a donor.

    python benchmarks/rivals/donor.py --tokenizer neox --corpus train.jsonl.xz --output donors/neox
    python benchmarks/rivals/donor.py --tokenizer qwen3 --output donors/qwen3   # random rows

It is pre-trained from random weights with the project's own training loop, on `--megabytes` of the
corpus for `--steps` steps; without a corpus its rows stay random, which is sufficient for methods
that use nothing but the donor's tokenizer.
"""

import argparse
from pathlib import Path

import jax

from tokalign_jax.config import (
    BatchConfig,
    CheckpointConfig,
    Config,
    OptimizerConfig,
    StageConfig,
    TextConfig,
)
from tokalign_jax.demo import build
from tokalign_jax.models import families, hub, huggingface, transformer
from tokalign_jax.text.canonical import vocabulary_size


def main() -> None:
    """Parses the flags and writes the donor."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", required=True, help="folder")
    parser.add_argument("--output", required=True, type=Path, help="new folder")
    parser.add_argument("--corpus", default="", help="as config.corpus; empty: random rows")
    parser.add_argument("--megabytes", type=float, default=50, help="of the corpus")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=64, help="sequences of 512 tokens a step")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()
    tokenizer = hub.load_tokenizer(args.tokenizer)
    raw = build.MODEL | {
        "hidden_size": args.width,
        "num_hidden_layers": args.layers,
        "intermediate_size": args.width * 8 // 3,
        "num_attention_heads": args.width // 64,
        "num_key_value_heads": args.width // 64,
        "vocab_size": vocabulary_size(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    args.output.mkdir(parents=True)
    if not args.corpus:
        model = families.config_from_hf(raw)
        params = transformer.init_params(model, jax.random.key(0))
        huggingface.save_checkpoint(args.output, params, model, raw, tokenizer, dtypes="bfloat16")
        return
    text = TextConfig(held_out_fraction=5e-4, budget_bytes=round(args.megabytes * 1e6))
    stage = StageConfig(
        method="full",
        steps=args.steps,
        learning_rate=2e-3,
        warmup_fraction=0.02,
        optimizer=OptimizerConfig(weight_decay=0.1),
        start_offset=0,
        checkpoints=CheckpointConfig(every=2000),
        batch=BatchConfig(size=args.batch, per_device=args.batch, sequence_length=512),
    )
    config = Config(corpus=args.corpus, text=text, stage1=stage)
    build.pretrain(raw, tokenizer, config, args.output)


if __name__ == "__main__":
    main()
