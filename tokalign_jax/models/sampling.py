"""Batched random sampling of continuations, with a key-value cache."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.transformer import Params, bind, empty_cache, logits_from_hidden
from tokalign_jax.parallel import sharding

BATCH_SIZE = {"cpu": 64}
DEFAULT_BATCH_SIZE = 1024
"""Sequences per device in a batch, at most, by backend."""
CACHE_BYTES = 8 << 30
"""Bytes of a batch's key-value cache, at most. The scan over the layers holds it twice."""


def sample(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    length: int,
    temperature: float,
    seed: int,
    dtype: DTypeLike,
    mesh: Mesh,
) -> list[list[int]]:
    """Samples continuations of prompts to `length` tokens in all; returns prompt and continuation.

    Apart from rounding, a sample depends only on the seed and on the index of its prompt.

    Args:
      config: the model's config.
      params: its parameters.
      prompts: token ids, at least one and at most `length` each.
      length: number of tokens of each result.
      temperature: divides the logits before the softmax; 0 for greedy decoding.
      seed: random seed.
      dtype: dtype of the activations.
      mesh: the mesh over which sequences are distributed.
    """
    devices = sharding.sequences_at_once(mesh)
    batch = batch_size(config, length, dtype, jax.default_backend()) * devices
    batch = min(batch, -(-len(prompts) // devices) * devices)
    by_sequence = NamedSharding(mesh, P(sharding.BATCH))
    samples: list[list[int]] = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        padded = np.zeros((batch, length), np.int32)
        for row, prompt in zip(padded, part):
            row[: len(prompt)] = prompt
        lengths = np.ones(batch, np.int32)
        lengths[: len(part)] = [len(prompt) for prompt in part]
        keys = jax.vmap(jax.random.fold_in, (None, 0))(
            jax.random.key(seed), start + jnp.arange(batch)
        )
        inputs = (
            sharding.put(padded, by_sequence),
            sharding.put(lengths, by_sequence),
            keys,
            jnp.float32(temperature),
        )
        tokens = _extend(config, params, *inputs, dtype=jnp.dtype(dtype), mesh=mesh)
        samples += sharding.to_host(tokens)[: len(part)].tolist()
    return samples


def batch_size(config: ModelConfig, length: int, dtype: DTypeLike, backend: str) -> int:
    """Returns how many sequences of `length` tokens a device of the backend samples at once."""
    most = BATCH_SIZE.get(backend, DEFAULT_BATCH_SIZE)
    return max(1, min(most, CACHE_BYTES // cache_bytes(config, 1, length, dtype)))


def cache_bytes(config: ModelConfig, batch: int, length: int, dtype: DTypeLike) -> int:
    """Returns the bytes of the key-value cache of `batch` sequences of `length` tokens."""
    cache = jax.eval_shape(functools.partial(empty_cache, config, batch, length, dtype))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


@functools.partial(jax.jit, static_argnames=("config", "dtype", "mesh"))
def _extend(
    config: ModelConfig,
    params: Params,
    prompts: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    keys: Array,
    temperature: Float[Array, ""],
    *,
    dtype: DTypeLike,
    mesh: Mesh,
) -> Int[Array, "B T"]:
    """Replaces all tokens of `prompts` from `lengths` on by samples from the model."""
    with sharding.within(mesh):
        model, (batch, length) = bind(config, params), prompts.shape
        cache = empty_cache(config, batch, length, dtype)

        def step(carry, position):
            token, cache = carry
            hidden, cache, _ = model(
                token[:, None], None, dtype, "layer", 1, cache, position, length
            )
            logits = logits_from_hidden(config, hidden[:, 0], params)
            scores = logits / jnp.where(temperature > 0, temperature, 1.0)
            step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, position)
            sampled = jax.vmap(jax.random.categorical)(step_keys, scores)
            token = jnp.where(temperature > 0, sampled, logits.argmax(-1)).astype(prompts.dtype)
            token = jnp.where(position + 1 < lengths, prompts[:, position + 1], token)
            return (token, cache), token

        _, tokens = jax.lax.scan(step, (prompts[:, 0], cache), jnp.arange(length - 1))
        return jnp.concatenate([prompts[:, :1], tokens.T], axis=1)
