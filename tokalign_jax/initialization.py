"""Alignment + source parameters -> parameters for the new vocabulary. Everything but the vocabulary's rows is left as it is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tokalign_jax.alignment import alignment
from tokalign_jax.alignment.alignment import Alignment
from tokalign_jax.models.config import ModelConfig


def initialize(config: ModelConfig, params: dict, aligned: Alignment) -> tuple[ModelConfig, dict]:
    """Rows of the new vocabulary as mixtures of source rows (TokAlign, step 4; the published one has one source row each).

    Args:
      params: the source model's, `embed_tokens/embedding` and (untied) `lm_head/kernel` of shape [V_source, D].
      aligned: mixtures of V_target rows over V_source tokens.

    Returns:
      The config with the new vocabulary size, and parameters whose vocabulary matrices are [V_target, D], float32.
    """
    rows = np.asarray(params["embed_tokens"]["embedding"])
    # A tied matrix is made by the head's rule: a row that is wrong there costs more than one that is wrong at the input.
    mixture = aligned.embedding if "lm_head" in params else aligned.head
    new = dict(params)
    new["embed_tokens"] = {"embedding": alignment.apply(mixture, rows)}
    if "lm_head" in params:
        head = np.asarray(params["lm_head"]["kernel"])
        new["lm_head"] = {"kernel": alignment.apply(aligned.head, head)}
    return dataclasses.replace(config, vocab_size=aligned.target_size), new


def random_rows(config: ModelConfig, params: dict, size: int, key: jax.Array) -> tuple[ModelConfig, dict]:
    """The baseline: `size` rows drawn from a normal distribution with each source column's mean and deviation."""

    def draw(rows: np.ndarray, key: jax.Array) -> np.ndarray:
        rows = np.asarray(rows, np.float32)
        noise = np.asarray(jax.random.normal(key, (size, rows.shape[1]), jnp.float32))
        return rows.mean(axis=0) + rows.std(axis=0) * noise

    embed_key, head_key = jax.random.split(key)
    new = dict(params)
    new["embed_tokens"] = {"embedding": draw(params["embed_tokens"]["embedding"], embed_key)}
    if "lm_head" in params:
        new["lm_head"] = {"kernel": draw(params["lm_head"]["kernel"], head_key)}
    return dataclasses.replace(config, vocab_size=size), new
