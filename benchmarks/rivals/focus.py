"""FOCUS as published by its authors (PyPI `deepfocus`): focus.py SOURCE TARGET TEXT.jsonl OUTPUT

Run in the environment that `environments.sh` creates for it. The fastText vectors are trained on
the text (field `text`), split by the target tokenizer, with the package's own settings.
"""

import sys
from pathlib import Path

import rows
import torch
from deepfocus import FOCUS


def main() -> None:
    """Takes its arguments from the command line."""
    source, target, text, output = sys.argv[1:]

    def make(old_tokenizer, new_tokenizer, old: torch.Tensor) -> torch.Tensor:
        return FOCUS(
            target_tokenizer=new_tokenizer,
            source_tokenizer=old_tokenizer,
            source_embeddings=old,
            auxiliary_embedding_mode="fasttext-tokenlevel",
            target_training_data_path=text,
            processes=1,
        )

    rows.replace(source, target, Path(output), make)


if __name__ == "__main__":
    main()
