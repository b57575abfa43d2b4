"""Tiny models and tokenizers in Hugging Face format, made by the reference libraries."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SHARED = Path(__file__).parents[2] / "shared"
"""Larger models and tokenizers, where they are at hand; no test needs them."""

TEXTS = (
    "The quick brown fox jumps over the lazy dog, and then it sleeps.",
    "def add(a, b):\n    return a + b\n",
    "Größe, été, año, день, 数学, ここ.",
)

_LLAMA = {"num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5}
_GPT_NEOX = {"layer_norm_eps": 1e-5, "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.25}}
_FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, _LLAMA),
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM, _GPT_NEOX),
}


def tiny_model(family: str, vocab_size: int, tied: bool = False, seed: int = 0, **config: Any) -> torch.nn.Module:
    """A random PyTorch model of `family` in eval mode; `config` adds to, or overrides, its Hugging Face config."""
    config_class, model_class, defaults = _FAMILIES[family]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings = {**sizes, "max_position_embeddings": 128, "tie_word_embeddings": tied, **defaults, **config}
    torch.manual_seed(seed)
    model = model_class(config_class(vocab_size=vocab_size, **settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, which otherwise start at 0 and 1
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def tiny_model_folder(
    folder: Path,
    family: str,
    vocab_size: int = 300,
    tied: bool = False,
    tokenizer: PreTrainedTokenizerFast | None = None,
    dtype: str = "float32",
    max_shard_size: str = "5GB",
    seed: int = 0,
    **config: Any,
) -> Path:
    """`folder`, with a random model as `tiny_model` makes it, and a tokenizer (a byte-level one unless given)."""
    tokenizer = tokenizer or tiny_tokenizer(vocab_size, TEXTS)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = tiny_model(family, vocab_size, tied, seed, **{**ids, **config}).to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def tiny_tokenizer(
    vocab_size: int, texts: Sequence[str], kind: Literal["byte_level", "metaspace"] = "byte_level"
) -> PreTrainedTokenizerFast:
    """A BPE tokenizer with at most `vocab_size` tokens, trained on `texts`.

    `byte_level` is made like GPT-NeoX's (needs 257 tokens), `metaspace` like LLaMA 2's with byte fallback (needs 259 and
    those of the characters in `texts`).
    """
    return _byte_level(vocab_size, texts) if kind == "byte_level" else _metaspace(vocab_size, texts)


def _byte_level(vocab_size: int, texts: Sequence[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def _metaspace(vocab_size: int, texts: Sequence[str]) -> PreTrainedTokenizerFast:
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()  # so that no merge crosses a space
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(first), show_progress=False)
    trained.train_from_iterator(texts, trainer)
    pieces = sorted(trained.get_vocab(), key=trained.token_to_id)
    ids = {piece: i for i, piece in enumerate([*first, *pieces])}
    merges = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
