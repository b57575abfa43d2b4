"""Create the pairs for measuring alignments that are not available for download: a
SentencePiece-style tokenizer and a small GPT-NeoX language model.

    python benchmarks/pairs.py tokenizer --corpus mix-train.jsonl.xz --out pairs/sp24k
    python benchmarks/pairs.py check --tokenizer pairs/sp24k --other llama-en16k \\
        --corpus mix-valid.jsonl.xz
    python benchmarks/pairs.py model --corpus mix-train.jsonl.xz --tokenizer neox \\
        --out pairs/neox-30m    # one GPU, minutes
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tokalign_jax.config import (
    BatchConfig,
    CheckpointConfig,
    Config,
    OptimizerConfig,
    StageConfig,
    TextConfig,
)
from tokalign_jax.demo import build
from tokalign_jax.errors import UserError
from tokalign_jax.models import hub
from tokalign_jax.text import canonical

SPACE = "▁"
SPECIAL = ("<unk>", "<s>", "</s>")
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
COVERAGE = 0.9995
"""Share of the characters of the text that get a token of their own; the others are spelled in
bytes."""
WORDS = rf"{SPACE}+(?={SPACE})|{SPACE}?[\p{{L}}\p{{M}}]+|{SPACE}?[^{SPACE}\p{{L}}\p{{M}}\p{{N}}]+|\p{{N}}|{SPACE}+"
"""No merge crosses the border of a word, a single digit, a run of punctuation or one of spaces."""

GPT_NEOX = {
    "model_type": "gpt_neox",
    "architectures": ["GPTNeoXForCausalLM"],
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "intermediate_size": 1024,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 1024,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
    },
    "use_parallel_residual": True,
    "attention_bias": True,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "tie_word_embeddings": False,
    "vocab_size": 50304,
    "dtype": "bfloat16",
}
"""Pythia's make in small; its matrices are padded to more rows than the tokenizer has tokens."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    tokenizer, check, model = (
        commands.add_parser(name) for name in ("tokenizer", "check", "model")
    )
    for command in (tokenizer, check, model):
        command.add_argument("--corpus", required=True, help="JSON lines (.xz) with a field `text`")
    for command in (tokenizer, model):
        command.add_argument("--out", type=Path, required=True, help="a new folder")
    check.add_argument("--tokenizer", required=True)
    check.add_argument("--other", required=True, help="the tokenizer to compare with")
    tokenizer.add_argument("--vocabulary", type=int, default=24_576)
    tokenizer.add_argument(
        "--bytes", type=int, default=30_000_000, help="of text, evenly over the corpus"
    )
    model.add_argument("--tokenizer", required=True)
    model.add_argument("--train-steps", type=int, default=1500)
    model.add_argument("--batch", type=int, default=128, help="sequences a step, over all devices")
    model.add_argument("--sequence-length", type=int, default=512)
    model.add_argument("--learning-rate", type=float, default=2e-3)
    model.add_argument("--layers", type=int, default=GPT_NEOX["num_hidden_layers"])
    arguments = parser.parse_args()
    try:
        if arguments.command == "check":
            own, other = (
                hub.load_tokenizer(name) for name in (arguments.tokenizer, arguments.other)
            )
            check_pair(own, other, arguments.corpus)
            return
        if arguments.out.exists() and any(arguments.out.iterdir()):
            raise UserError(f"--out '{arguments.out}' is not empty: name a new folder")
        if arguments.command == "tokenizer":
            made = sentencepiece_style(
                sample(arguments.corpus, arguments.bytes), arguments.vocabulary
            )
            made.save_pretrained(arguments.out)
            print(f"{len(made):,} tokens in '{arguments.out}'")
        else:
            train_gpt_neox(
                arguments.corpus,
                arguments.tokenizer,
                arguments.out,
                steps=arguments.train_steps,
                batch=arguments.batch,
                sequence_length=arguments.sequence_length,
                learning_rate=arguments.learning_rate,
                layers=arguments.layers,
            )
    except UserError as error:
        raise SystemExit(f"error: {error}") from error


def sample(corpus: str, size: int) -> list[str]:
    """Documents, spread evenly over the corpus, of about `size` UTF-8 bytes in all."""
    total = sum(len(document["text"].encode()) for document in build.documents(corpus))
    share, taken, kept = min(1.0, size / max(total, 1)), 0.0, []
    for document in build.documents(corpus):
        taken += share
        if taken >= 1:
            taken -= 1
            kept.append(document["text"])
    return kept


def sentencepiece_style(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A BPE tokenizer made like LLaMA 2's: `▁` for a space and before the first word, characters
    without a token in bytes (line ends and tabs among them), single digits, `<unk>`, `<s>` and
    `</s>`.

    Args:
      vocabulary: tokens in all, those and the 256 bytes included.
    """
    first = [*SPECIAL, *BYTES]
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    )
    trained.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    characters = _characters(
        texts
    )  # named one by one: of equally frequent ones the trainer keeps any
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(first),
        initial_alphabet=characters,
        limit_alphabet=len(characters),
        show_progress=False,
    )
    trained.train_from_iterator(_lines(texts), trainer)
    learned = trained.get_vocab()
    pieces = sorted(learned, key=learned.__getitem__)
    ids = {piece: i for i, piece in enumerate([*first, *pieces])}
    merges = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab=ids, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=SPACE, prepend_scheme="first", split=False
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def _lines(texts: Sequence[str]) -> Iterator[str]:
    """Lines without what is left to the bytes: line ends and tabs."""
    return (line.replace("\t", " ") for text in texts for line in text.splitlines() if line)


def _characters(texts: Sequence[str]) -> list[str]:
    """The most frequent characters, `COVERAGE` of the text, and the space; of equally frequent
    ones the first in Unicode."""
    counts = Counter()
    for line in _lines(texts):
        counts.update(line)
    room, kept = COVERAGE * counts.total(), [SPACE]
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if room <= 0:
            break
        room -= count
        if character not in (" ", SPACE):
            kept.append(character)
    return kept


def train_gpt_neox(
    corpus: str,
    tokenizer: str,
    out: Path,
    *,
    steps: int,
    batch: int,
    sequence_length: int,
    learning_rate: float,
    layers: int,
) -> None:
    """Pre-trains a GPT-NeoX model with `tokenizer` from random rows, and writes it to `out` in
    bf16."""
    stage = StageConfig(
        method="full",
        steps=steps,
        learning_rate=learning_rate,
        warmup_fraction=0.02,
        optimizer=OptimizerConfig(weight_decay=0.1, row_damping=0.0),
        start_offset=0,
        checkpoints=CheckpointConfig(every=max(steps, 1), keep=1),
        log_every=50,
        batch=BatchConfig(size=batch, per_device=batch, sequence_length=sequence_length),
    )
    config = Config(corpus=corpus, text=TextConfig(held_out_fraction=5e-4), stage1=stage)
    raw = GPT_NEOX | {"num_hidden_layers": layers}
    build.pretrain(raw, hub.load_tokenizer(tokenizer), config, out)


def check_pair(
    tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, corpus: str
) -> None:
    """Prints how many of the documents come back from their tokens, and how many tokens both
    vocabularies have."""
    contents, texts = (
        canonical.token_bytes(tokenizer),
        [document["text"].encode() for document in build.documents(corpus)],
    )
    cut = canonical.PieceCutter(tokenizer).cut_all(texts)
    whole = sum(b"".join(contents[i] or b"" for i in ids) == text for ids, text in zip(cut, texts))
    known = canonical.index_by_bytes(other)
    shared = sum(content in known for content in contents if content)
    print(
        f"{whole:,} of {len(texts):,} documents come back from their tokens, "
        f"{sum(map(len, cut)):,} in all"
    )
    print(
        f"{shared:,} of {len(contents):,} tokens have one of {len(known):,} of the other with the "
        "same bytes"
    )


if __name__ == "__main__":
    main()
