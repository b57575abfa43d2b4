"""Rebuild the embedded demo: the text sample, both tokenizers and the source model.

    python -m tokalign_jax.demo.build --corpus mix-train.jsonl.xz --steps text,tokenizers
    python -m tokalign_jax.demo.build --corpus mix-train.jsonl.xz --steps model  # one GPU, minutes

The corpus is JSON lines with `text`, `lang` and `source`. The source tokenizer is trained on
English and code alone, the source model on all languages, so that its vocabulary suits most of them
badly. Documents of the sample that the demo holds out train neither the tokenizers nor the model.
"""

import argparse
import dataclasses
import json
import lzma
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tokalign_jax import demo
from tokalign_jax.config import (
    BatchConfig,
    CheckpointConfig,
    Config,
    OptimizerConfig,
    StageConfig,
    TextConfig,
)
from tokalign_jax.models import families, hub, huggingface, transformer
from tokalign_jax.text import corpus, tokenizing
from tokalign_jax.training import loop

SHIPPED_SOURCES = ("debian-handbook", "python3.11-doc", "postgresql-doc-15")
LANGUAGES = {
    "en": 1_900_000,
    "de": 800_000,
    "fr": 800_000,
    "es": 800_000,
    "ru": 900_000,
    "ar": 900_000,
    "zh": 800_000,
    "ja": 800_000,
}
"""UTF-8 bytes of text per language in the sample."""
HELD_OUT_FRACTION = 0.04
END_OF_TEXT = "<|endoftext|>"
SOURCE_VOCABULARY, TARGET_VOCABULARY = 8192, 10240

MODEL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 688,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 1024,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "vocab_size": SOURCE_VOCABULARY,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "dtype": "bfloat16",
}


def main() -> None:
    """Run the steps that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", required=True, help="JSON lines (.xz) with text, lang, source")
    parser.add_argument("--out", type=Path, default=Path(demo.__file__).parent)
    parser.add_argument("--steps", default="text,tokenizers,model")
    parser.add_argument("--train-steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=128)
    arguments = parser.parse_args()
    steps = arguments.steps.split(",")
    if "text" in steps:
        write_sample(arguments.corpus, arguments.out / "text" / "sample.jsonl.xz")
    held_out = _held_out(arguments.out / "text" / "sample.jsonl.xz")
    if "tokenizers" in steps:
        texts: dict[str, list[str]] = {lang: [] for lang in (*LANGUAGES, "code")}
        for document in documents(arguments.corpus):
            if document["lang"] in texts and document["text"] not in held_out:
                texts[document["lang"]].append(document["text"])
        english = texts["en"] + texts["code"]
        _save_tokenizer(_train_bpe(english, SOURCE_VOCABULARY), arguments.out / "source_model")
        everything = [t for lang in texts for t in _up_to(texts[lang], 6_000_000)]
        _save_tokenizer(
            _train_bpe(everything, TARGET_VOCABULARY), arguments.out / "target_tokenizer"
        )
    if "model" in steps:
        train_model(
            arguments.corpus, arguments.out, held_out, arguments.train_steps, arguments.batch
        )


def documents(path: str) -> Iterator[dict[str, str]]:
    """Yield the objects of a file of JSON lines (.xz)."""
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def _held_out(sample: Path) -> set[str]:
    """Return the texts that a run on the sample holds out."""
    config = Config(
        corpus=str(sample),
        text=TextConfig(language_field="language", held_out_fraction=HELD_OUT_FRACTION),
    )
    with tempfile.TemporaryDirectory() as folder:
        corpus.run(config, Path(folder), lambda line: None)
        return {document.text for document in corpus.held_out(Path(folder))}


def _up_to(texts: list[str], size: int) -> Iterator[str]:
    for text in texts:
        if size <= 0:
            return
        size -= len(text.encode())
        yield text


def write_sample(corpus_path: str, out: Path) -> None:
    """Write the sample: whole documents of the sources that may be shipped, per language."""
    budget = dict(LANGUAGES)
    out.parent.mkdir(parents=True, exist_ok=True)
    with lzma.open(out, "wt", encoding="utf-8", preset=9 | lzma.PRESET_EXTREME) as lines:
        for document in documents(corpus_path):
            size = len(document["text"].encode())
            if document["source"] in SHIPPED_SOURCES and size <= min(
                budget.get(document["lang"], 0), 60_000
            ):
                budget[document["lang"]] -= size
                row = {
                    "text": document["text"],
                    "language": document["lang"],
                    "source": document["source"],
                }
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    print({lang: LANGUAGES[lang] - unused for lang, unused in budget.items()})


def _train_bpe(texts: list[str], vocabulary: int) -> Tokenizer:
    """Train a byte-level BPE on words, single digits, punctuation and runs of white space."""
    tokenizer = Tokenizer(models.BPE())
    words = (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT
    ).save_pretrained(folder)


def train_model(corpus_path: str, out: Path, held_out: set[str], steps: int, batch: int) -> None:
    """Pre-train the source model with the project's training loop; write it in bfloat16."""
    stage = StageConfig(
        method="full",
        steps=steps,
        learning_rate=2e-3,
        warmup_fraction=0.02,
        optimizer=OptimizerConfig(weight_decay=0.1),
        batch=BatchConfig(batch, 512, batch),
        start_offset=0,
        checkpoints=CheckpointConfig(every=2000),
        log_every=200,
    )
    with tempfile.TemporaryDirectory(prefix="demo_build_") as folder:
        training, model = Path(folder) / "corpus.jsonl", Path(folder) / "model"
        with training.open("w", encoding="utf-8") as lines:
            for document in documents(corpus_path):
                if document["text"] not in held_out:
                    lines.write(json.dumps({"text": document["text"]}, ensure_ascii=False) + "\n")
        # The split holds out one document in 2,000, which is not used.
        text = TextConfig(held_out_fraction=5e-4)
        config = Config(corpus=str(training), text=text, stage1=stage)
        pretrain(MODEL, hub.load_tokenizer(str(out / "source_model")), config, model)
        shutil.copytree(model, out / "source_model", dirs_exist_ok=True)


def pretrain(
    raw: dict[str, Any], tokenizer: PreTrainedTokenizerBase, config: Config, out: Path
) -> None:
    """Pre-train a model from random weights; write it as a Hugging Face folder in bfloat16.

    Args:
      raw: config.json of the model.
      config: its `corpus` and `text` are the training text, `stage1` the settings of training,
        `seed` that of the weights and of the order of the text.
      out: a new folder; every 50th line of the metrics is written beside the weights.
    """
    config = dataclasses.replace(
        config, compute=dataclasses.replace(config.compute, remat="dots", loss_chunk=16384)
    )
    with tempfile.TemporaryDirectory(prefix="pretrain_") as folder:
        work = Path(folder)
        corpus.run(config, work / "corpus", print)
        tokenizing.run(config, work / "corpus", tokenizer, tokenizer, work / "tokens", print)
        shards = tokenizing.TokenShards.open(work / "tokens" / "target")
        model = families.config_from_hf(raw)
        params = transformer.init_params(model, jax.random.key(config.seed))
        result = loop.run_stage(
            "pretrain", config.stage1, config, model, params, shards, work / "pretrain", 0, print
        )
        huggingface.save_checkpoint(out, result.params, model, raw, tokenizer, dtypes="bfloat16")
        metrics = (work / "pretrain" / "metrics.jsonl").read_text(encoding="utf-8")
        lines = metrics.splitlines(keepends=True)
        (out / "pretraining.jsonl").write_text("".join(lines[49::50]), encoding="utf-8")


if __name__ == "__main__":
    main()
