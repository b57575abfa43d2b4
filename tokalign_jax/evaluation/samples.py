"""Sample continuations by a model, for human inspection."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from transformers import PreTrainedTokenizerBase

from tokalign_jax.evaluation.bits_per_byte import first_context
from tokalign_jax.models import transformer
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.parallel import sharding


def passages(texts: Mapping[str, Sequence[str]], count: int = 4, length: int = 60) -> list[str]:
    """Returns a passage of each of the first languages, as prompts.

    A passage is up to `length` characters of whole words, from the middle of the longest document.
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
    """Continues each prompt by `steps` tokens; returns {"prompt", "continuation"} for each."""
    start, steps = first_context(tokenizer), min(steps, config.max_positions - 1)
    results = []
    for prompt in prompts:
        ids = [start, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        ids = ids[-max(1, config.max_positions - steps) :]
        extended = sharding.to_host(
            transformer.generate(config, params, jnp.asarray([ids]), steps, jnp.dtype(dtype))
        )[0].tolist()
        # Decoded together with the prompt, since some decoders drop a leading space.
        prompt_text, text = (
            tokenizer.decode(tokens, skip_special_tokens=True) for tokens in (ids, extended)
        )
        results.append({"prompt": prompt, "continuation": text[len(prompt_text) :]})
    return results
