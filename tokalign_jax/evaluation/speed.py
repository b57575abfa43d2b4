"""Decoding speed in characters per second, which is comparable across tokenizers.

    characters per second = decoding steps per second x characters per token of the same text

A step yields one token; the text it represents depends on the text, and greedy continuations of two
models differ. Steps are therefore timed on greedy decoding with a key-value cache, one sequence at
a time, and converted to characters (or bytes) by the number of tokens that each tokenizer needs for
the same held-out text. Times include the prompt of up to 64 tokens but not compilation: the first
run is discarded. The result is the median of the others, with the slowest and fastest.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from transformers import PreTrainedTokenizerBase

from tokalign_jax.evaluation.bits_per_byte import first_context
from tokalign_jax.models import transformer
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.text.canonical import plain_backend

MAX_PROMPT_TOKENS = 64
"""Maximum number of tokens of a prompt."""


class Speed(NamedTuple):
    """Decoding steps per second."""

    median: float
    slowest: float
    fastest: float

    def summary(self, text: Sequence[str], tokens: int) -> dict[str, Any]:
        """Returns the figures for `text`, which the tokenizer encodes as `tokens`, for JSON."""
        characters = sum(map(len, text))
        size = sum(len(document.encode()) for document in text)
        return {
            "steps_per_second": self.median,
            "slowest_and_fastest": [self.slowest, self.fastest],
            "characters_per_token": characters / tokens,
            "characters_per_second": self.median * characters / tokens,
            "bytes_per_second": self.median * size / tokens,
        }


def measure(
    config: ModelConfig,
    params: dict,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    steps: int = 64,
    repeats: int = 5,
    dtype: str = "float32",
    clock: Callable[[], float] = time.perf_counter,
) -> Speed:
    """Times greedy decoding of `steps` tokens after each of `prompts`.

    Args:
      config: the model's config.
      params: its parameters, in the dtype to run in; others are cast in each step.
      tokenizer: its tokenizer.
      prompts: the prompts.
      steps: number of tokens per continuation.
      repeats: number of timed continuations of each prompt, after the first, which compiles.
      dtype: dtype of the activations.
      clock: returns the time in seconds.
    """
    start, backend = first_context(tokenizer), plain_backend(tokenizer)
    max_prompt = min(MAX_PROMPT_TOKENS, config.max_positions // 2)
    steps = min(steps, config.max_positions - max_prompt)
    rates = []
    for repeat in range(1 + repeats):
        for prompt in prompts:
            ids = [start, *backend.encode(prompt, add_special_tokens=False).ids][:max_prompt]
            tokens = jnp.asarray([ids], jnp.int32)
            began = clock()
            jax.block_until_ready(
                transformer.generate(config, params, tokens, steps, jnp.dtype(dtype))
            )
            if repeat:
                rates.append(steps / (clock() - began))
    return Speed(statistics.median(rates), min(rates), max(rates))
