"""Random continuations of many prompts at once, with a cache of keys and values."""

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
from tokalign_jax.models.transformer import Params, bind, empty_cache, last_logits
from tokalign_jax.parallel import sharding

BATCH = {"cpu": 64}
OTHER_BATCH = 1024
"""Sequences that a device extends at once, by backend."""


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
    """Each prompt with the tokens that the model draws after it, `length` tokens in all.

    What is drawn for a prompt depends on the seed, on its place in `prompts` and on nothing else
    but rounding.

    Args:
      prompts: token ids, at least one each and at most `length`.
      temperature: divides the logits before the softmax; 0: the likeliest token each time.
    """
    at_once = BATCH.get(jax.default_backend(), OTHER_BATCH) * sharding.sequences_at_once(mesh)
    at_once = min(at_once, -(-len(prompts) // (n := sharding.sequences_at_once(mesh))) * n)
    split = NamedSharding(mesh, P(sharding.BATCH))
    drawn: list[list[int]] = []
    for start in range(0, len(prompts), at_once):
        part = prompts[start : start + at_once]
        forced = np.zeros((at_once, length), np.int32)
        for row, prompt in zip(forced, part):
            row[: len(prompt)] = prompt
        lengths = np.ones(at_once, np.int32)
        lengths[: len(part)] = [len(prompt) for prompt in part]
        keys = jax.vmap(jax.random.fold_in, (None, 0))(
            jax.random.key(seed), start + jnp.arange(at_once)
        )
        inputs = (
            sharding.put(forced, split),
            sharding.put(lengths, split),
            keys,
            jnp.float32(temperature),
        )
        tokens = _extend(config, params, *inputs, dtype=jnp.dtype(dtype), mesh=mesh)
        drawn += sharding.to_host(tokens)[: len(part)].tolist()
    return drawn


@functools.partial(jax.jit, static_argnames=("config", "dtype", "mesh"))
def _extend(
    config: ModelConfig,
    params: Params,
    forced: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    keys: Array,
    temperature: Float[Array, ""],
    *,
    dtype: DTypeLike,
    mesh: Mesh,
) -> Int[Array, "B T"]:
    """`forced` with all tokens from `lengths` on drawn from the model."""
    with sharding.within(mesh):
        model, (batch, length) = bind(config, params), forced.shape
        cache = empty_cache(config, batch, length, dtype)

        def step(carry, position):
            token, cache = carry
            hidden, cache = model(token[:, None], None, dtype, "layer", 1, cache, position, length)
            logits = last_logits(config, hidden[:, 0], params)
            scores = logits / jnp.where(temperature > 0, temperature, 1.0)
            draws = jax.vmap(jax.random.fold_in, (0, None))(keys, position)
            drawn = jax.vmap(jax.random.categorical)(draws, scores)
            token = jnp.where(temperature > 0, drawn, logits.argmax(-1)).astype(forced.dtype)
            token = jnp.where(position + 1 < lengths, forced[:, position + 1], token)
            return (token, cache), token

        _, tokens = jax.lax.scan(step, (forced[:, 0], cache), jnp.arange(length - 1))
        return jnp.concatenate([forced[:, :1], tokens.T], axis=1)
