"""Mixers with a state of fixed size: gated delta rule and short convolution.

Dimensions, besides those of `transformer`: W kernel size of a convolution, N value heads, K key
heads, H key size, U value size, C chunk length.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.lora import LoraSpec
from tokalign_jax.models.mixers import LayerContext
from tokalign_jax.models.modules import Linear, lora_down, param, split_keys

CHUNK = 64
"""Chunk length, within which the delta rule is computed by a few matrix products."""

NumValid = Int[Array, ""] | int | None
"""Number of tokens that are not padding; None for all."""


class CausalConvolution(nnx.Module):
    """Depthwise causal convolution over time with kernel size W."""

    def __init__(self, channels: int, kernel_size: int, bias: bool = False):
        self.kernel = param(kernel_size, channels)
        self.bias = param(channels) if bias else None

    def __call__(
        self, x: Float[Array, "B T D"], state: Float[Array, "B W-1 D"] | None, num_valid: NumValid
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B W-1 D"] | None]:
        """Convolves `x` after `state`, the W - 1 inputs before it; without a state returns None."""
        kernel = self.kernel.astype(jnp.float32)
        history, length = kernel.shape[0] - 1, x.shape[1]
        if state is None:
            padded = jnp.pad(x, ((0, 0), (history, 0), (0, 0)))
        else:
            padded = jnp.concatenate([state.astype(x.dtype), x], axis=1)
            end = length if num_valid is None else num_valid
            state = jax.lax.dynamic_slice_in_dim(padded, end, history, axis=1).astype(state.dtype)
        parts = [
            padded[:, i : i + length].astype(jnp.float32) * kernel[i] for i in range(history + 1)
        ]
        y = functools.reduce(jnp.add, parts)
        y = y if self.bias is None else y + self.bias.astype(jnp.float32)
        return y.astype(x.dtype), state


class ShortConvolution(nnx.Module):
    """LFM2's double-gated convolution: o_proj(b * convolution(a * v)), a, b, v projections of x."""

    def __init__(self, config: ModelConfig, lora: LoraSpec | None):
        assert config.convolution is not None, "the config has no convolution"
        width, bias = config.hidden_size, config.convolution.bias
        self.gate_proj = Linear(width, width, bias, lora)
        self.output_gate_proj = Linear(width, width, bias, lora)
        self.v_proj = Linear(width, width, bias, lora)
        self.convolution = CausalConvolution(width, config.convolution.kernel_size, bias)
        self.o_proj = Linear(width, width, bias, lora)

    def __call__(
        self, x: Float[Array, "B T D"], context: LayerContext, key: jax.Array | None, cache: Any
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Applies the gated convolution over time; returns the result and the updated cache."""
        in_key, out_key = split_keys(key, 2)
        readers = [self.gate_proj, self.v_proj, self.output_gate_proj]
        gate, v, output_gate = (
            project(x, in_key, low) for project, low in zip(readers, lora_down(readers, x, in_key))
        )
        gated = gate * v
        state = None if cache is None else cache[0]
        y, state = self.convolution(gated, state, context.num_valid)
        y = output_gate * y
        return self.o_proj(y, out_key), None if cache is None else (state,)

    @staticmethod
    def empty_cache(config: ModelConfig, batch: int, length: int) -> Any:
        """Returns the shapes of a layer's cache."""
        assert config.convolution is not None, "the config has no convolution"
        return ((batch, config.convolution.kernel_size - 1, config.hidden_size),)


class DeltaNet(nnx.Module):
    """Qwen 3.5's gated delta rule (arXiv 2412.06464).

    Queries, keys and values go through a short convolution and SiLU. Each head's state [H, U] is
    decayed, corrected towards the value at the key, and read at the query. The result is normed and
    gated.
    """

    def __init__(self, config: ModelConfig, lora: LoraSpec | None):
        assert config.delta is not None, "the config has no delta rule"
        self.settings = delta = config.delta
        self.epsilon = config.norm_epsilon
        width = config.hidden_size
        keys = delta.num_key_heads * delta.key_dim
        values = delta.num_value_heads * delta.value_dim

        def project(outputs: int) -> Linear:
            return Linear(width, outputs, bias=False, lora=lora)

        self.q_proj, self.k_proj, self.v_proj = project(keys), project(keys), project(values)
        self.gate_proj = project(values)
        self.beta_proj, self.decay_proj = (project(delta.num_value_heads) for _ in range(2))
        self.q_convolution = CausalConvolution(keys, delta.kernel_size)
        self.k_convolution = CausalConvolution(keys, delta.kernel_size)
        self.v_convolution = CausalConvolution(values, delta.kernel_size)
        self.log_decay, self.decay_bias = (param(delta.num_value_heads) for _ in range(2))
        self.out_scale = param(delta.value_dim)
        self.o_proj = Linear(values, width, bias=False, lora=lora)

    def __call__(
        self, x: Float[Array, "B T D"], context: LayerContext, key: jax.Array | None, cache: Any
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Applies the delta rule over time; returns the result and the updated cache."""
        in_key, out_key = split_keys(key, 2)
        states: list[Any] = [None] * 4 if cache is None else list(cache)
        names = ("q", "k", "v", "gate", "beta", "decay")
        readers = [getattr(self, f"{name}_proj") for name in names]
        *qkv, gate, beta, decay = (
            project(x, in_key, low) for project, low in zip(readers, lora_down(readers, x, in_key))
        )
        projected = []
        for i, (name, y) in enumerate(zip(names, qkv)):
            y, states[i] = getattr(self, f"{name}_convolution")(y, states[i], context.num_valid)
            size = self.settings.value_dim if name == "v" else self.settings.key_dim
            projected.append(jax.nn.silu(y).reshape(*x.shape[:2], -1, size).astype(jnp.float32))
        beta = jax.nn.sigmoid(beta.astype(jnp.float32))
        step = decay.astype(jnp.float32) + self.decay_bias.astype(jnp.float32)
        decay = -jnp.exp(self.log_decay.astype(jnp.float32)) * jax.nn.softplus(step)
        if context.num_valid is not None:  # Padding neither decays the state nor writes to it.
            is_valid = (jnp.arange(x.shape[1]) < context.num_valid)[:, None]
            beta, decay = beta * is_valid, decay * is_valid
        q, k, v = projected
        y, states[3] = delta_rule(q, k, v, decay, beta, states[3])
        y = self._gated(y, gate).astype(x.dtype)
        return self.o_proj(y, out_key), None if cache is None else tuple(states)

    def _gated(
        self, y: Float[Array, "B T N U"], gate: Float[Array, "B T NU"]
    ) -> Float[Array, "B T NU"]:
        scale = self.out_scale.astype(jnp.float32)
        normed = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon) * scale
        return normed.reshape(gate.shape) * jax.nn.silu(gate.astype(jnp.float32))

    @staticmethod
    def empty_cache(config: ModelConfig, batch: int, length: int) -> Any:
        """Returns the shapes of a layer's cache: inputs of the convolutions, and the state."""
        delta = config.delta
        assert delta is not None, "the config has no delta rule"
        keys = delta.num_key_heads * delta.key_dim
        values = delta.num_value_heads * delta.value_dim
        history = delta.kernel_size - 1
        return (
            *((batch, history, channels) for channels in (keys, keys, values)),
            (batch, delta.num_value_heads, delta.key_dim, delta.value_dim),
        )


def delta_rule(
    q: Float[Array, "B T K H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T N U"],
    decay: Float[Array, "B T N"],
    beta: Float[Array, "B T N"],
    state: Float[Array, "B N H U"] | None,
) -> tuple[Float[Array, "B T N U"], Float[Array, "B N H U"] | None]:
    """Computes S = exp(decay) S, S += beta k (v - S k)^T and S q / sqrt(H) for each token.

    q and k are normalized. Everything is in float32 and in chunks: within a chunk the corrections
    of all tokens solve a triangular system, so that only the state is passed sequentially from
    chunk to chunk.

    Args:
      q: queries.
      k: keys.
      v: values.
      decay: logarithm of the state's decay factor.
      beta: strength of the correction.
      state: the state before the first token; None for zero, and to return None.
    """
    initial = state
    _, length, key_heads, size = q.shape
    heads = v.shape[2]
    chunk = min(CHUNK, length)
    q, k = (jnp.repeat(_unit(x), heads // key_heads, axis=2) for x in (q, k))
    q = q * size**-0.5

    def chunked(x: Array) -> Array:
        """[B, T, N, ...] -> [chunks, B, N, C, ...]."""
        x = jnp.pad(x, ((0, 0), (0, -length % chunk), *((0, 0),) * (x.ndim - 2)))
        x = x.reshape(x.shape[0], -1, chunk, *x.shape[2:])
        return jnp.moveaxis(x, (1, 3), (0, 2))

    q, k, v, decay, beta = map(chunked, (q, k, v, decay, beta))
    chunks = _chunk_inputs(q, k, v, decay, beta)
    if state is None:
        state = jnp.zeros((*v.shape[1:3], size, v.shape[-1]), jnp.float32)

    def step(state: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, state_decay, values, keys, within = inputs
        new = values - keys @ state
        return state * state_decay + jnp.swapaxes(k, -1, -2) @ new, q @ state + within @ new

    state, y = jax.lax.scan(step, state.astype(jnp.float32), chunks)
    y = jnp.moveaxis(y, (0, 2), (1, 3))
    y = y.reshape(y.shape[0], -1, *y.shape[3:])[:, :length]
    return y, None if initial is None else state.astype(initial.dtype)


def _chunk_inputs(q: Array, k: Array, v: Array, decay: Array, beta: Array) -> tuple[Array, ...]:
    """Computes the terms of each chunk that do not depend on the state, all [chunks, B, N, ...]."""
    log_decay = jnp.cumsum(decay, axis=-1)
    causal = jnp.tril(jnp.ones((q.shape[-2], q.shape[-2]), bool))
    difference = jnp.where(causal, log_decay[..., :, None] - log_decay[..., None, :], -jnp.inf)
    decay_matrix = jnp.exp(difference)
    k_beta = k * beta[..., None]
    system = jnp.where(
        jnp.tril(causal, -1), jnp.einsum("cbnih,cbnjh->cbnij", k_beta, k) * decay_matrix, 0
    )
    right_sides = jnp.concatenate(
        [v * beta[..., None], k_beta * jnp.exp(log_decay)[..., None]], axis=-1
    )
    solution = jax.lax.linalg.triangular_solve(
        system + jnp.eye(q.shape[-2]), right_sides, left_side=True, lower=True, unit_diagonal=True
    )
    values, keys = solution[..., : v.shape[-1]], solution[..., v.shape[-1] :]
    within = jnp.einsum("cbnih,cbnjh->cbnij", q, k) * decay_matrix
    last = log_decay[..., -1:]
    return (
        q * jnp.exp(log_decay)[..., None],
        k * jnp.exp(last - log_decay)[..., None],
        jnp.exp(last)[..., None],
        values,
        keys,
        within,
    )


def _unit(x: Float[Array, "... H"]) -> Float[Array, "... H"]:
    """Normalizes `x` to unit length."""
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-6)
