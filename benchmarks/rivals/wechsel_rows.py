"""WECHSEL as published by its authors (PyPI `wechsel`): wechsel_rows.py SOURCE TARGET TEXT.jsonl
OUTPUT

Run in the environment that `environments.sh` creates for it. WECHSEL needs word vectors of the
source's and of the target's language, aligned by a dictionary. If both tokenizers are used for the
same text, one set of vectors serves both and needs no alignment. It is trained on the text with the
package's own function; words are separated by white space and punctuation.
"""

import re
import sys
from pathlib import Path

import rows
import torch
from wechsel import WECHSEL, train_embeddings

WORD = re.compile(r"\w+|[^\w\s]")


def main() -> None:
    """Takes its arguments from the command line."""
    source, target, text, output = sys.argv[1:]
    vectors = train_embeddings(text, tokenize_fn=WORD.findall, epochs=5)
    method = WECHSEL(vectors, vectors, align_strategy=None)

    def make(old_tokenizer, new_tokenizer, old: torch.Tensor) -> torch.Tensor:
        made, _ = method.apply(old_tokenizer, new_tokenizer, old.numpy())
        return torch.tensor(made)

    rows.replace(source, target, Path(output), make)


if __name__ == "__main__":
    main()
