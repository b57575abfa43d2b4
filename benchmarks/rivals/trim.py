"""Trim the vocabulary of a model with vocabtrimmer: trim.py MODEL TEXT.jsonl OUTPUT [MIN_FREQUENCY]

Run in the environment that `environments.sh` creates for it. Runs the whole program first, as its
command does. If that refuses the model, runs its parts: the miner, for the tokens to keep for the
same text, and the steps that build a tokenizer from these tokens.
"""

import json
import sys
from pathlib import Path

import tokenizers
from transformers import AutoTokenizer
from vocabtrimmer import VocabTrimmer, vocab_miner


def main() -> None:
    """Takes its arguments from the command line; prints what happened."""
    model, text, output = sys.argv[1:4]
    min_frequency = int(sys.argv[4]) if len(sys.argv) > 4 else 2
    Path(output).mkdir(parents=True, exist_ok=True)
    mined = {
        "language": "text",
        "dataset": "json",
        "dataset_column": "text",
        "dataset_split": "train",
        "min_frequency": min_frequency,
        "cache_file_frequency": f"{output}/frequency.json",
        "cache_file_vocab": f"{output}/vocabulary.json",
    }
    try:
        VocabTrimmer(model).trim_vocab(path_to_save=output, **mined)
        print(f"vocabtrimmer wrote {output}")
        return
    except Exception as error:
        print(f"the program: {type(error).__name__}: {error}")
    tokenizer = AutoTokenizer.from_pretrained(model)
    frequencies = Path(mined["cache_file_frequency"])
    if not frequencies.exists():  # its miner reads hub datasets by name alone
        counts: dict[int, int] = {}
        with Path(text).open(encoding="utf-8") as lines:
            for line in lines:
                for token in tokenizer(json.loads(line)["text"])["input_ids"]:
                    counts[token] = counts.get(token, 0) + 1
        frequencies.write_text(json.dumps(counts), encoding="utf-8")
    kept = vocab_miner(model=model, **mined)
    print(f"its miner keeps {len(kept):,} of {len(tokenizer):,} tokens")
    state = json.loads(tokenizer.backend_tokenizer.model.__getstate__())
    state["vocab"] = {token: i for token, i in state["vocab"].items() if token in kept}
    try:
        getattr(tokenizers.models, state.pop("type"))(**state)
        print("its tokenizer was built")
    except Exception as error:
        print(f"its tokenizer: {type(error).__name__}: {str(error)[:200]}")


if __name__ == "__main__":
    main()
