"""WECHSEL as its authors publish it (PyPI `wechsel`): wechsel_rows.py SOURCE TARGET TEXT.jsonl
OUTPUT

Run in the environment that `environments.sh` makes for it. WECHSEL asks for word vectors of the
source's and of the target's language, aligned by a dictionary. Where both tokenizers serve the same
text one set of vectors stands for both and needs no alignment: it is trained on the text with the
package's own function, words being what white space and punctuation set apart.
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
