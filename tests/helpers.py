"""Tiny models and tokenizers in Hugging Face format, made by the reference libraries."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from tokalign_jax.models import lora
from tokalign_jax.utils import paths

SHARED = Path(__file__).parents[2] / "shared"
"""Larger models and tokenizers, where they are at hand; no test needs them."""

TEXTS = (
    "The quick brown fox jumps over the lazy dog, and then it sleeps.",
    "def add(a, b):\n    return a + b\n",
    "Größe, été, año, день, 数学, ここ.",
)

_LLAMA = {"num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5}
_GPT_NEOX = {
    "layer_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.25},
}
_FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, _LLAMA),
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM, _GPT_NEOX),
}


def tiny_model(
    family: str, vocab_size: int, tied: bool = False, seed: int = 0, **config: Any
) -> torch.nn.Module:
    """A random PyTorch model of `family` in eval mode; `config` adds to, or overrides, its Hugging
    Face config.
    """
    config_class, model_class, defaults = _FAMILIES[family]
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    settings = {
        **sizes,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        **defaults,
        **config,
    }
    torch.manual_seed(seed)
    model = model_class(config_class(vocab_size=vocab_size, **settings)).eval()
    with torch.no_grad():
        for (
            parameter
        ) in model.parameters():  # biases and norms too, which otherwise start at 0 and 1
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
    """`folder`, with a random model as `tiny_model` makes it, and a tokenizer (a byte-level one
    unless given).
    """
    tokenizer = tokenizer or tiny_tokenizer(vocab_size, TEXTS)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = tiny_model(family, vocab_size, tied, seed, **{**ids, **config}).to(
        getattr(torch, dtype)
    )
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def tiny_tokenizer(
    vocab_size: int, texts: Sequence[str], kind: Literal["byte_level", "metaspace"] = "byte_level"
) -> PreTrainedTokenizerFast:
    """A BPE tokenizer with at most `vocab_size` tokens, trained on `texts`.

    `byte_level` is made like GPT-NeoX's (needs 257 tokens), `metaspace` like LLaMA 2's with byte
    fallback (needs 259 and those of the characters in `texts`).
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
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )


def _metaspace(vocab_size: int, texts: Sequence[str]) -> PreTrainedTokenizerFast:
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()  # so that no merge crosses a space
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(first), show_progress=False)
    trained.train_from_iterator(texts, trainer)
    pieces = sorted(trained.get_vocab(), key=trained.token_to_id)
    ids = {piece: i for i, piece in enumerate([*first, *pieces])}
    merges = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab=ids, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def tokenizer_of_kind(
    kind: str, texts: Sequence[str], vocab_size: int = 1200
) -> PreTrainedTokenizerFast:
    """A tokenizer trained on `texts`, put together as those of the models that `KINDS` names are."""
    return KINDS[kind](texts, vocab_size)


LLAMA_3_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN_WORDS = LLAMA_3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")


def _split_byte_level(
    words: str, special: dict[str, str], normalizer: Any = None, **model: Any
) -> Any:
    """Byte-level BPE that cuts text by a regular expression of its own (tiktoken's, LLaMA 3's,
    Qwen's).
    """

    def make(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer(models.BPE(**model))
        if normalizer:
            tokenizer.normalizer = normalizer
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(words), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
        tokenizer.add_special_tokens(
            list(dict.fromkeys(special.values()))
        )  # past the vocabulary, as tiktoken has them
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)

    return make


def _sentence_piece_bpe(
    normalizer: Any, pre_tokenizer: Any, decoder: Any, byte_fallback: bool = True, **special: str
) -> Any:
    """SentencePiece's BPE as it is converted: `▁` for a space, special tokens and bytes first."""

    def make(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
        bytes_ = [f"<0x{byte:02X}>" for byte in range(256)] if byte_fallback else []
        first = [*dict.fromkeys(special.values()), *bytes_]
        trained = Tokenizer(models.BPE())
        trained.pre_tokenizer = pre_tokenizers.Metaspace()  # so that no merge crosses a space
        trained.train_from_iterator(
            texts, trainers.BpeTrainer(vocab_size=vocab_size - len(first), show_progress=False)
        )
        pieces = sorted(trained.get_vocab(), key=trained.token_to_id)
        merges = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
        vocabulary = {piece: i for i, piece in enumerate([*first, *pieces])}
        tokenizer = Tokenizer(
            models.BPE(
                vocabulary, merges, unk_token="<unk>", byte_fallback=byte_fallback, fuse_unk=True
            )
        )
        if normalizer:
            tokenizer.normalizer = normalizer
        if pre_tokenizer:
            tokenizer.pre_tokenizer = pre_tokenizer
        tokenizer.decoder = decoder
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)

    return make


def _unigram(normalizer: Any, prepend_scheme: str, byte_fallback: bool, **special: str) -> Any:
    """SentencePiece's Unigram as it is converted: Metaspace, with or without bytes for what is
    unknown.
    """

    def make(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
        trained = Tokenizer(models.Unigram())
        trained.normalizer = normalizer
        trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
        first = list(dict.fromkeys(special.values()))
        trainer = trainers.UnigramTrainer(
            vocab_size=vocab_size, special_tokens=first, unk_token="<unk>", show_progress=False
        )
        trained.train_from_iterator(texts, trainer)
        state = json.loads(trained.to_str())["model"]
        pieces = [(piece, score) for piece, score in state["vocab"]]
        pieces += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)] if byte_fallback else []
        tokenizer = Tokenizer(models.Unigram(pieces, first.index("<unk>"), byte_fallback))
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, trained.pre_tokenizer
        spaces = decoders.Metaspace(prepend_scheme=prepend_scheme)
        with_bytes = _GEMMA_DECODER if prepend_scheme == "never" else _LLAMA_2_DECODER
        tokenizer.decoder = with_bytes if byte_fallback else spaces
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)

    return make


def _word_piece(lowercase: bool) -> Any:
    def make(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
        special = {
            "pad_token": "[PAD]",
            "unk_token": "[UNK]",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
        }
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size, special_tokens=list(special.values()), show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", **special)

    return make


def _word_ends(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", "<eos>"],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")


_ROLES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
_GEMMA_DECODER = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
)
_LLAMA_2_DECODER = decoders.Sequence(
    [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
)
_NMT = normalizers.Sequence(
    [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
)

KINDS: dict[str, Any] = {
    "gpt2": lambda texts, vocab_size: _byte_level(vocab_size, texts),
    "llama3": _split_byte_level(
        LLAMA_3_WORDS,
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
        ignore_merges=True,
    ),
    "qwen": _split_byte_level(
        QWEN_WORDS, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, normalizers.NFC()
    ),
    "llama2": _sentence_piece_bpe(
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        None,
        _LLAMA_2_DECODER,
        **_ROLES,
    ),
    "gemma": _sentence_piece_bpe(
        normalizers.Replace(" ", "▁"),
        pre_tokenizers.Split(" ", "merged_with_previous"),
        _GEMMA_DECODER,
        **_ROLES,
    ),
    "mistral": _sentence_piece_bpe(
        None,
        pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
        _LLAMA_2_DECODER,
        **_ROLES,
    ),
    "bpe_without_bytes": _sentence_piece_bpe(
        None, pre_tokenizers.Metaspace(), decoders.Metaspace(), byte_fallback=False, **_ROLES
    ),
    "t5": _unigram(_NMT, "always", False, unk_token="<unk>", pad_token="<pad>", eos_token="</s>"),
    "unigram_with_bytes": _unigram(normalizers.NFKC(), "never", True, **_ROLES),
    "unigram_first": _unigram(normalizers.NFC(), "first", True, **_ROLES),
    "bert": _word_piece(lowercase=True),
    "bert_cased": _word_piece(lowercase=False),
    "gpt1": _word_ends,
}
"""Kinds of tokenizers, by a model that has such a one."""


def merge_adapters(params: dict[str, Any], spec: lora.LoraSpec) -> dict[str, Any]:
    """`params` with all adapters merged into their kernels."""
    leaves = paths.flatten(params)
    for name in [path.removesuffix("/lora_a") for path in leaves if path.endswith("/lora_a")]:
        adapter = lora.Adapter(spec, leaves.pop(f"{name}/lora_a"), leaves.pop(f"{name}/lora_b"))
        leaves[f"{name}/kernel"] = lora.merge_into(jnp.array(leaves[f"{name}/kernel"]), [adapter])
    return paths.unflatten(leaves)
