"""Texts continued by a model, greedily, so that a person can see what the figures mean."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from transformers import PreTrainedTokenizerBase

from tokalign_jax.models import transformer
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.text.tokenizing import end_of_text_id


def openings(texts: Mapping[str, Sequence[str]], count: int = 4, length: int = 60) -> list[str]:
    """The first `length` characters of one document of each of the first `count` languages, cut at a word's end."""
    return [_opening(documents[0], length) for _, documents in sorted(texts.items())[:count] if documents]


def _opening(text: str, length: int) -> str:
    if len(text) <= length:
        return text
    words, space, _ = text[:length].rpartition(" ")
    return words if space else text[:length]


def continuations(
    config: ModelConfig,
    params: dict,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    steps: int,
    dtype: str,
) -> list[dict[str, str]]:
    """Each prompt with `steps` tokens that the model adds, as {"prompt", "continuation"}."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else end_of_text_id(tokenizer)
    found = []
    for prompt in prompts:
        ids = [start, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        ids = ids[-max(1, config.max_positions - steps) :]
        new = transformer.generate(config, params, jnp.asarray([ids]), steps, jnp.dtype(dtype))[0, len(ids) :]
        found.append({"prompt": prompt, "continuation": tokenizer.decode(new.tolist(), skip_special_tokens=True)})
    return found
