"""A decoder-only transformer: defined in Flax NNX, run as pure functions of a plain nested dict of arrays.

Dimension letters, here and in the rest of the package: B batch, T length, D model, V vocabulary, N heads, K key-value
heads, H head size, L layers, F intermediate.

The modules declare which parameters exist (`abstract_params`) and what is computed from them (`forward`); arrays are in
them for the length of a call. All leaves under `layers` are stacked over L, and one compiled layer body is scanned over
them. Activations have the `dtype` of the caller, to which each layer casts its own weights; norms, rotary embedding and
softmax are computed in float32.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from tokalign_jax import paths, sharding
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.lora import LoraSpec
from tokalign_jax.models.rotary import Rotation, rotate, rotation

Params = dict[str, Any]
"""A nested dict of arrays; docs/architecture.md lists the paths."""

Cache = tuple[Float[Array, "*L B S K H"], Float[Array, "*L B S K H"]]
"""Keys and values of S positions, filled from the left; of all layers, or inside one without L."""

_ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


# --- The definition ---------------------------------------------------------------------------------------------------


class Linear(nnx.Module):
    """y = x W + b, and with adapters + (alpha / rank) dropout(x) A B."""

    def __init__(self, inputs: int, outputs: int, bias: bool, lora: LoraSpec | None):
        self.kernel = _param(inputs, outputs)
        self.bias = _param(outputs) if bias else None
        self.lora = lora
        if lora:
            self.lora_a = _param(inputs, lora.rank)
            self.lora_b = _param(lora.rank, outputs)

    def __call__(self, x: Float[Array, "B T in"], key: jax.Array | None) -> Float[Array, "B T out"]:
        y = x @ self.kernel.astype(x.dtype)
        if self.bias is not None:
            y += self.bias.astype(x.dtype)
        if self.lora:
            x = _dropout(x, self.lora.dropout, key)
            y += self.lora.scale * (x @ self.lora_a.astype(x.dtype) @ self.lora_b.astype(x.dtype))
        return y


class Norm(nnx.Module):
    """Layer norm (mean removed, with a bias) or RMS norm (neither)."""

    def __init__(self, config: ModelConfig):
        self.epsilon = config.norm_epsilon
        self.scale = _param(config.hidden_size)
        self.bias = _param(config.hidden_size) if config.norm == "layer" else None

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        y = x.astype(jnp.float32)
        if self.bias is not None:
            y -= y.mean(-1, keepdims=True)
        y *= jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        y *= self.scale.astype(jnp.float32)
        if self.bias is not None:
            y += self.bias.astype(jnp.float32)
        return y.astype(x.dtype)


class Attention(nnx.Module):
    """Causal attention, in which N / K query heads share a key-value head."""

    def __init__(self, config: ModelConfig, lora: LoraSpec | None):
        self.head_dim = config.head_dim
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, queries, config.attention_bias, lora)
        self.k_proj = Linear(config.hidden_size, keys, config.attention_bias, lora)
        self.v_proj = Linear(config.hidden_size, keys, config.attention_bias, lora)
        self.o_proj = Linear(queries, config.hidden_size, config.attention_out_bias, lora)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        by: Rotation,
        key: jax.Array | None,
        cache: Cache | None,
        start: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        q_key, k_key, v_key, o_key = _split(key, 4)
        heads = (*x.shape[:2], -1, self.head_dim)
        q = rotate(self.q_proj(x, q_key).reshape(heads), by)
        k = rotate(self.k_proj(x, k_key).reshape(heads), by)
        v = self.v_proj(x, v_key).reshape(heads)
        if cache is None:
            y = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=_attention_implementation(q))
        else:
            k = jax.lax.dynamic_update_slice_in_dim(cache[0], k, start, axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(cache[1], v, start, axis=1)
            cache = k, v
            visible = jnp.arange(k.shape[1]) <= start + jnp.arange(x.shape[1])[:, None]
            y = jax.nn.dot_product_attention(q, k, v, mask=visible[None, None])
        return self.o_proj(y.reshape(*x.shape[:2], -1), o_key), cache


class MLP(nnx.Module):
    """down(activation(up(x))), or gated: down(activation(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, lora: LoraSpec | None):
        self.activation = config.activation
        self.gate_proj = (
            Linear(config.hidden_size, config.intermediate_size, config.mlp_bias, lora) if config.gated_mlp else None
        )
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, config.mlp_bias, lora)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, config.mlp_bias, lora)

    def __call__(self, x: Float[Array, "B T D"], key: jax.Array | None) -> Float[Array, "B T D"]:
        gate_key, up_key, down_key = _split(key, 3)
        activation = _ACTIVATIONS[self.activation]
        y = self.up_proj(x, up_key)
        y = activation(y) if self.gate_proj is None else activation(self.gate_proj(x, gate_key)) * y
        return self.down_proj(y, down_key)


class Block(nnx.Module):
    """One layer: attention and feed-forward, each behind a norm, one after the other or side by side."""

    def __init__(self, config: ModelConfig, lora: LoraSpec | None):
        self.parallel_residual = config.parallel_residual
        self.input_norm = Norm(config)
        self.attention = Attention(config, lora)
        self.post_attention_norm = Norm(config)
        self.mlp = MLP(config, lora)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        by: Rotation,
        key: jax.Array | None,
        cache: Cache | None,
        start: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        attention_key, mlp_key = _split(key, 2)
        attended, cache = self.attention(self.input_norm(x), by, attention_key, cache, start)
        if self.parallel_residual:
            return x + attended + self.mlp(self.post_attention_norm(x), mlp_key), cache
        x += attended
        return x + self.mlp(self.post_attention_norm(x), mlp_key), cache


class Embed(nnx.Module):
    def __init__(self, config: ModelConfig):
        self.embedding = _param(config.vocab_size, config.hidden_size)


class Head(nnx.Module):
    def __init__(self, config: ModelConfig):
        self.kernel = _param(config.vocab_size, config.hidden_size)


class Transformer(nnx.Module):
    """Tokens to hidden states. The head is only declared here: who needs logits applies it, in chunks or at once."""

    def __init__(self, config: ModelConfig, lora: LoraSpec | None):
        self.config = config
        self.embed_tokens = Embed(config)
        self.layers = nnx.vmap(lambda: Block(config, lora), axis_size=config.num_layers)()
        self.final_norm = Norm(config)
        self.lm_head = None if config.tie_word_embeddings else Head(config)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        key: jax.Array | None,
        dtype: DTypeLike,
        remat: bool,
        cache: Cache | None = None,
        start: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        config = self.config
        by = rotation(start + jnp.arange(tokens.shape[1]), config.rope_theta, config.rotary_dim, config.rope_scaling)
        definition, weights = nnx.split(self.layers)

        def layer(x, scanned):
            weights, key, cache = scanned
            x, cache = nnx.merge(definition, weights)(x, by, key, cache, start)
            return sharding.by_sequence(x), cache

        # Inside a scan XLA cannot undo the recomputation, so nothing needs to be held against that.
        body = jax.checkpoint(layer, prevent_cse=False) if remat else layer
        keys = None if key is None else jax.random.split(key, config.num_layers)
        x = sharding.by_sequence(sharding.look_up(self.embed_tokens.embedding[...], tokens, dtype))
        x, cache = jax.lax.scan(body, x, (weights, keys, cache))
        return self.final_norm(x), cache


# --- Pure functions ---------------------------------------------------------------------------------------------------


def forward(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    *,
    lora: LoraSpec | None = None,
    dropout_key: jax.Array | None = None,
    dtype: DTypeLike = jnp.float32,
    remat: bool = False,
) -> Float[Array, "B T D"]:
    """Hidden states after the final norm, in `dtype`.

    Args:
      lora: says that `params` hold adapters, and of which kind.
      dropout_key: draws the adapters' dropout; None: no dropout.
      remat: recompute each layer in the backward pass instead of storing its activations.

    Raises:
      ValueError: `params` are not those of `config` and `lora`.
    """
    return _bind(config, lora, params)(tokens, dropout_key, dtype, remat)[0]


def head_matrix(params: Params) -> Float[Array, "V D"]:
    """The matrix that turns hidden states into logits: the head, or when tied the input embedding."""
    return params["lm_head"]["kernel"] if "lm_head" in params else params["embed_tokens"]["embedding"]


def logits(config: ModelConfig, params: Params, tokens: Int[Array, "B T"], **options) -> Float[Array, "B T V"]:
    """All logits in float32, for short inputs; `options` are those of `forward`."""
    return _project(config, forward(config, params, tokens, **options), params)


def generate(
    config: ModelConfig, params: Params, prompt: Int[Array, "B T"], steps: int, dtype: DTypeLike = jnp.float32
) -> Int[Array, "B T+steps"]:
    """`prompt` and its greedy continuation by `steps` tokens."""
    length = prompt.shape[1]
    # Padded, so that prompts of all lengths run through a few programs.
    padded = jnp.pad(prompt, ((0, 0), (0, -length % 64)))
    return jnp.concatenate([prompt, _continue(config, params, padded, length, steps, jnp.dtype(dtype))], axis=1)


@functools.partial(jax.jit, static_argnames=("config", "steps", "dtype"))
def _continue(
    config: ModelConfig, params: Params, prompt: Int[Array, "B T"], length: Int[Array, ""], steps: int, dtype: DTypeLike
) -> Int[Array, "B steps"]:
    """The greedy continuation of the first `length` tokens, with a cache of keys and values.

    The cache is filled from the whole prompt; what is after `length` is out of sight until it is overwritten.
    """
    model = _bind(config, None, params)
    batch, padded_length = prompt.shape
    empty = jnp.zeros((config.num_layers, batch, padded_length + steps, config.num_kv_heads, config.head_dim), dtype)

    def advance(tokens, last, cache, start):
        hidden, cache = model(tokens, None, dtype, False, cache, start)
        return _project(config, hidden[:, last], params).argmax(-1).astype(prompt.dtype), cache

    def step(carry, position):
        token, cache = carry
        return advance(token[:, None], 0, cache, position), token

    first = advance(prompt, length - 1, (empty, empty), 0)
    return jax.lax.scan(step, first, length + jnp.arange(steps))[1].T


def abstract_params(config: ModelConfig, lora: LoraSpec | None = None) -> Params:
    """Shapes of all parameters, as a tree of float32 ShapeDtypeStruct; with `lora` those of the adapters too."""
    return nnx.to_pure_dict(_definition(config, lora)[1])


def init_params(config: ModelConfig, key: jax.Array, std: float = 0.02) -> Params:
    """Float32 parameters to pre-train from: matrices normal with deviation `std`, norms one, biases zero."""

    def init(path: str, shape: tuple[int, ...], key: jax.Array) -> jax.Array:
        match path.rpartition("/")[2]:
            case "scale":
                return jnp.ones(shape)
            case "bias":
                return jnp.zeros(shape)
            case _:
                return std * jax.random.normal(key, shape)

    leaves = paths.flatten(abstract_params(config))
    keys = jax.random.split(key, len(leaves))
    return paths.unflatten({path: init(path, leaf.shape, k) for (path, leaf), k in zip(leaves.items(), keys)})


# --- Small things -----------------------------------------------------------------------------------------------------


@functools.cache
def _definition(config: ModelConfig, lora: LoraSpec | None) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: Transformer(config, lora)))


def _bind(config: ModelConfig, lora: LoraSpec | None, params: Params) -> Transformer:
    """The model that `params` belong to."""
    definition, _ = _definition(config, lora)
    expected, given = (set(paths.flatten(tree)) for tree in (abstract_params(config, lora), params))
    if expected != given:
        raise ValueError(
            f"parameters do not fit the model: missing {sorted(expected - given)}, left over {sorted(given - expected)}"
            f" ({config}, {lora})"
        )
    return nnx.merge(definition, params)


def _param(*shape: int) -> nnx.Param:
    """Declares a parameter; only its shape is ever looked at."""
    return nnx.Param(jnp.zeros(shape, jnp.float32))


def _project(config: ModelConfig, hidden: Float[Array, "... D"], params: Params) -> Float[Array, "... V"]:
    head = head_matrix(params).astype(hidden.dtype)
    every = jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)
    return every[..., : config.vocab_size]  # without rows that only fill the matrix up


def _split(key: jax.Array | None, count: int):
    return [None] * count if key is None else jax.random.split(key, count)


def _dropout(x: Float[Array, "..."], rate: float, key: jax.Array | None) -> Float[Array, "..."]:
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def _attention_implementation(q: Float[Array, "B T N H"]) -> Literal["cudnn"] | None:
    """cuDNN's flash attention for half precision on the NVIDIA devices that have it for this head size, else XLA's."""
    capability = getattr(jax.devices()[0], "compute_capability", "")
    if not capability.replace(".", "").isdigit() or q.dtype not in (jnp.bfloat16, jnp.float16):
        return None
    largest = 256 if float(capability) >= 9 else 128
    return "cudnn" if q.shape[-1] % 8 == 0 and q.shape[-1] <= largest else None
