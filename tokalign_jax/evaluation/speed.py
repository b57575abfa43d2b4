"""How fast a model writes, in characters, which two tokenizers can be compared by.

    characters per second for equal text = decoding steps per second x characters per token of that text

A step gives one token, whichever it is; how much text that is depends on the text, and greedy
continuations of two models are different texts. So steps are timed on greedy decoding with the
cache of keys and values, one sequence at a time, and turned into characters (or bytes) by the
tokens which each tokenizer needs for the same held-out text. The time of a prompt of up to 64
tokens is in it; compiling is not: the first run does not count. The median of the others is told,
with the fastest and the slowest.
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

PROMPT = 64
"""Tokens of a prompt, at most."""


class Speed(NamedTuple):
    """Decoding steps a second."""

    median: float
    slowest: float
    fastest: float

    def summary(self, text: Sequence[str], tokens: int) -> dict[str, Any]:
        """For JSON, with what it means for `text`, which the tokenizer cuts into `tokens`."""
        characters, size = sum(map(len, text)), sum(len(of.encode()) for of in text)
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
      params: in the type that the model is to run in; other types are cast in each step.
      repeats: how often each prompt is continued, beside the first time, which compiles.
      clock: seconds.
    """
    start, backend = first_context(tokenizer), plain_backend(tokenizer)
    most = min(PROMPT, config.max_positions // 2)
    steps = min(steps, config.max_positions - most)
    rates = []
    for repeat in range(1 + repeats):
        for prompt in prompts:
            ids = [start, *backend.encode(prompt, add_special_tokens=False).ids][:most]
            given = jnp.asarray([ids], jnp.int32)
            began = clock()
            jax.block_until_ready(
                transformer.generate(config, params, given, steps, jnp.dtype(dtype))
            )
            if repeat:
                rates.append(steps / (clock() - began))
    return Speed(statistics.median(rates), min(rates), max(rates))
