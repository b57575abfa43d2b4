"""Inputs and flags of small whole runs."""

import json
from pathlib import Path

import numpy as np

from tests.helpers import tiny_model_folder, tiny_tokenizer

REPOSITORY = Path(__file__).parents[2]
WORDS = "the a model token row text of and in is new old head layer step rate corpus align vector count 数学 день été".split()
LICENSE = "the licence of the source model"


def write_corpus(folder: Path, documents: int = 120) -> Path:
    """Write `corpus.jsonl`: documents of 60 random words, in two languages."""
    random = np.random.default_rng(0)
    path = folder / "corpus.jsonl"
    rows = [
        {
            "text": f"{i} " + " ".join(random.choice(WORDS, 60)) + ".",
            "lang": "en" if i % 2 else "fr",
        }
        for i in range(documents)
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def toy_inputs(folder: Path) -> dict[str, Path]:
    """A tiny source model of two families, a target tokenizer of another kind, and a corpus."""
    corpus = write_corpus(folder)
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    source = tiny_tokenizer(300, texts[:10])
    target = tiny_tokenizer(420, texts, kind="metaspace")
    target.save_pretrained(folder / "target")
    llama = tiny_model_folder(folder / "llama", "llama", 320, tied=True, tokenizer=source)
    (llama / "README.md").write_text("---\nlicense: apache-2.0\n---\nA small model.\n")
    (llama / "LICENSE").write_text(LICENSE)
    return {
        "corpus": corpus,
        "target": folder / "target",
        "llama": llama,
        "gpt_neox": tiny_model_folder(folder / "gpt_neox", "gpt_neox", 320, tokenizer=source),
    }


def arguments(
    inputs: dict[str, Path], family: str, workdir: Path, config: str, *more: str
) -> list[str]:
    """The command line of a run with a few small steps; everything else is the config file's."""
    small = {
        "source_model": inputs[family],
        "target_tokenizer": inputs["target"],
        "corpus": inputs["corpus"],
        "text.held_out_fraction": 0.1,
        "text.language_field": "lang",
        "alignment.vector_size": 16,
        "alignment.glove.iterations": 2,
        "alignment.pivots": 20,
        "alignment.min_count": 2,
        "initialization.distillation_tokens": 2000,
        "initialization.generated_tokens": 400,
        "initialization.tuning": 4000,
        "evaluation.sequence_length": 64,
        "evaluation.sample_tokens": 4,
        "evaluation.prompts": "('the model',)",
    }
    for stage in ("stage1", "stage2"):
        small |= {
            f"{stage}.steps": 3,
            f"{stage}.batch.per_device": 2,
            f"{stage}.batch.size": 4,
            f"{stage}.batch.sequence_length": 32,
            f"{stage}.checkpoints.every": 2,
        }
    flags = [f"--config.{name}={value}" for name, value in small.items()]
    return ["main", f"--config=configs/{config}.py", f"--workdir={workdir}", *flags, *more]
