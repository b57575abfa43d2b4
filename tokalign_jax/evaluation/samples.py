"""Texts continued by a model, greedily, so that a person can see what the figures mean."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from transformers import PreTrainedTokenizerBase

from tokalign_jax.evaluation.bits_per_byte import first_context
from tokalign_jax.models import transformer
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.parallel import sharding


def passages(texts: Mapping[str, Sequence[str]], count: int = 4, length: int = 60) -> list[str]:
    """From the middle of the longest document of each of the first languages: up to `length`
    characters of whole words.
    """
    return [
        _passage(max(documents, key=len), length) for _, documents in sorted(texts.items())[:count]
    ]


def _passage(text: str, length: int) -> str:
    middle = text[len(text) // 2 :]
    _, _, after_line_end = middle.partition("\n")
    passage = (after_line_end.strip() or middle)[:length]
    words, space, _ = passage.rpartition(" ")
    return words if space and len(passage) == length else passage


def continuations(
    config: ModelConfig,
    params: dict,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    steps: int,
    dtype: str,
) -> list[dict[str, str]]:
    """Each prompt with `steps` tokens that the model adds, as {"prompt", "continuation"}."""
    start, steps = first_context(tokenizer), min(steps, config.max_positions - 1)
    found = []
    for prompt in prompts:
        ids = [start, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        ids = ids[-max(1, config.max_positions - steps) :]
        whole = sharding.to_host(
            transformer.generate(config, params, jnp.asarray([ids]), steps, jnp.dtype(dtype))
        )[0].tolist()
        # Decoded together: some decoders drop the space before the first token of what they are
        # given.
        before, text = (
            tokenizer.decode(tokens, skip_special_tokens=True) for tokens in (ids, whole)
        )
        found.append({"prompt": prompt, "continuation": text[len(before) :]})
    return found
