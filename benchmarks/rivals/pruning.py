"""Savings and costs of pruning: tokenizers pruned for one language, measured on it and on others.

    python benchmarks/rivals/pruning.py --tokenizers smollm2,qwen3 --text train.jsonl.xz \\
        --held-out valid.jsonl.xz --language de --min-counts 1,2,10
"""

import argparse
import json
import lzma
from collections.abc import Iterator

from tokalign_jax.models import hub
from tokalign_jax.text import pruning
from tokalign_jax.text.canonical import vocabulary_size


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizers", required=True, help="folders, comma-separated")
    parser.add_argument("--text", required=True, help=".jsonl.xz with text and lang")
    parser.add_argument("--held-out", required=True, help="the same")
    parser.add_argument("--language", default="de")
    parser.add_argument("--min-counts", default="1,2,10")
    args = parser.parse_args()
    needed = list(texts(args.text, args.language))
    judged = {
        language: list(texts(args.held_out, language)) for language in (args.language, "en", "code")
    }
    print("| tokenizer | min count | tokens before | after | " + " | ".join(judged) + " |")
    print("|---|---:|---:|---:|" + "---:|" * len(judged))
    for folder in args.tokenizers.split(","):
        whole = hub.load_tokenizer(folder)
        counts = pruning.count(whole, needed)
        before = {language: pruning.count(whole, texts).sum() for language, texts in judged.items()}
        for min_count in map(int, args.min_counts.split(",")):
            made, kept = pruning.prune(whole, counts, min_count)
            cells = [
                f"{pruning.count(made, texts).sum() / before[language] - 1:+.2%}"
                for language, texts in judged.items()
            ]
            sizes = f"{vocabulary_size(whole):,} | {len(kept):,}"
            print(f"| {folder} | {min_count} | {sizes} | {' | '.join(cells)} |", flush=True)


def texts(file: str, language: str) -> Iterator[str]:
    """The texts of one language."""
    with lzma.open(file, "rt") as lines:
        for row in map(json.loads, lines):
            if row["lang"] == language:
                yield row["text"]


if __name__ == "__main__":
    main()
