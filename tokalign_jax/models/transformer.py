"""Decoder-only transformer: Flax NNX modules, used as pure functions of a nested dict of arrays.

Dimensions, here and in the rest of the package: B batch, T length, D model, V vocabulary, N heads,
K key-value heads, H head size, L layers, F intermediate, E experts.

The modules declare the parameters (`abstract_params`) and the computation (`forward`); they hold
arrays only during a call. Leaves under `layers` are stacked over L, those of a mixer or
feed-forward over the layers that have it. Each run of layers with a repeating pattern of these
(`Segment`) is one scan with one compiled body. Layers may differ in window and rotary embedding,
which the scan passes as indices.
Activations have the caller's `dtype`, to which each layer casts its weights; norms, rotary
embedding, softmax and routing are computed in float32.
"""

import bisect
import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from tokalign_jax.errors import UserError
from tokalign_jax.models import remat as rematerialization
from tokalign_jax.models.config import ModelConfig, QueryGrowth
from tokalign_jax.models.experts import MixtureOfExperts
from tokalign_jax.models.float8 import Matmul
from tokalign_jax.models.lora import LoraSpec
from tokalign_jax.models.mixers import Attention, LayerContext, spans, unique_with_indices
from tokalign_jax.models.modules import (
    MLP,
    Linear,
    Norm,
    add_broadcast,
    apply_norm,
    param,
    scale_in_float32,
    split_keys,
)
from tokalign_jax.models.recurrent import DeltaNet, ShortConvolution
from tokalign_jax.models.rotary import Length, Rotation, rotation
from tokalign_jax.parallel import sharding
from tokalign_jax.utils import compiling, paths

Params = dict[str, Any]
"""A nested dict of arrays; docs/architecture.md lists the paths."""


MAX_UNROLLED = 48
"""Number of layers up to which the loop over them is fully unrolled by default, where that pays.

Deeper models loop over groups of layers of about equal size. Compilation takes about a second more
per unrolled layer.
"""


# --- Modules ------------------------------------------------------------------------------------


MIXERS: dict[str, Any] = {
    "attention": Attention,
    "convolution": ShortConvolution,
    "delta": DeltaNet,
}
"""Mixer classes by `LayerKind.mixer`, which is also the name of their parameters in a layer."""

VARIANTS = (*MIXERS, "mlp", "dense_mlp")
"""Names of the parts of a layer that not all layers of a model need have (`LayerKind.parts`)."""

Parts = tuple[str, str]
"""A layer's mixer and feed-forward."""

Cache = dict[str, Any]
"""Arrays of each mixer; the leading axis is that of its layers, absent within a layer."""


class Block(nnx.Module):
    """A layer: mixer and feed-forward with their norms, sequential or parallel."""

    def __init__(self, config: ModelConfig, parts: Parts, lora: LoraSpec | None):
        self.config = config
        self.mixer, self.feed_forward = mixer, feed_forward = parts
        norm = functools.partial(Norm, config, config.hidden_size, bias=config.norm_bias)
        before, after = config.norm_placement != "after", config.norm_placement != "before"
        self.input_norm = norm() if before else None
        setattr(self, mixer, MIXERS[mixer](config, lora))
        self.attention_out_norm = norm() if after else None
        self.post_attention_norm = norm() if before and not config.shared_norm else None
        if feed_forward == "dense_mlp":
            self.dense_mlp = MLP(config, lora, config.dense_size)
        else:
            experts = config.experts
            self.mlp = MixtureOfExperts(config, experts, lora) if experts else MLP(config, lora)
        self.mlp_out_norm = norm() if after else None

    def __call__(
        self, x: Float[Array, "B T D"], context: LayerContext, key: jax.Array | None, cache: Any
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Computes the layer; returns its result and the updated cache."""
        mixer_key, mlp_key = split_keys(key, 2)
        normed = apply_norm(self.input_norm, x)
        mixed, cache = getattr(self, self.mixer)(normed, context, mixer_key, cache)
        scale = self.config.residual_scale
        y = x + scale_in_float32(apply_norm(self.attention_out_norm, mixed), scale)
        if not self.config.shared_norm:
            normed = apply_norm(self.post_attention_norm, x if self.config.parallel_residual else y)
        # The product is the first operand so that the compiler fuses the addition into its kernel.
        update = apply_norm(self.mlp_out_norm, getattr(self, self.feed_forward)(normed, mlp_key))
        return scale_in_float32(update, scale) + y, cache


class Embed(nnx.Module):
    """Input embedding."""

    def __init__(self, config: ModelConfig):
        self.embedding = param(config.vocab_size, config.hidden_size)


class Positions(nnx.Module):
    """Learned position embeddings."""

    def __init__(self, config: ModelConfig):
        self.embedding = param(config.max_positions, config.hidden_size)


class Head(nnx.Module):
    """Output matrix."""

    def __init__(self, config: ModelConfig):
        self.kernel = param(config.vocab_size, config.hidden_size)


class OuterModules(nnx.Module):
    """Modules outside the layers; the head is only declared, as the loss applies it in chunks."""

    def __init__(self, config: ModelConfig):
        norm = functools.partial(Norm, config, config.hidden_size, bias=config.norm_bias)
        self.embed_tokens = Embed(config)
        self.embed_positions = Positions(config) if config.learned_positions else None
        self.embed_norm = norm() if config.embedding_norm else None
        self.final_norm = norm(gain=config.output_scale)
        self.lm_head = None if config.tie_word_embeddings else Head(config)


class Segment(NamedTuple):
    """A run of layers with a repeating pattern of parts, computed by one scan.

    An iteration of the scan computes `len(layers)` layers.
    """

    before: tuple[Parts, ...]
    """Parts of the preceding layers."""
    layers: tuple[Parts, ...]
    """Parts of the layers of one iteration."""
    repeats: int
    """Number of iterations."""

    @property
    def parts(self) -> list[str]:
        """Names of the parts that its layers have."""
        return list(dict.fromkeys(part for layer in self.layers for part in layer))

    def slice_stack(self, stack: Any, part: str | None = None) -> Any:
        """Returns the segment's share, by iteration, of a stack over all layers or a part's."""
        first, per_iteration = (
            len(layers) if part is None else sum(part in layer for layer in layers)
            for layers in (self.before, self.layers)
        )
        count = per_iteration * self.repeats

        def share(x: Array) -> Array:
            x = x if count == len(x) else x[first : first + count]
            return (
                x if self._has_one_layer else x.reshape(self.repeats, per_iteration, *x.shape[1:])
            )

        return jax.tree.map(share, stack)

    def select_layer(self, iteration: Any, number: int) -> Any:
        """Returns a layer's slice of an iteration, by its index in the stack of the iteration."""
        return iteration if self._has_one_layer else jax.tree.map(lambda x: x[number], iteration)

    def stack_layers(self, layers: Sequence[Any]) -> Any:
        """Inverts `select_layer`."""
        return layers[0] if self._has_one_layer else jax.tree.map(_stack_arrays, *layers)

    def flatten(self, iterations: Any) -> Any:
        """Inverts `slice_stack`."""
        if self._has_one_layer:
            return iterations
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), iterations)

    @property
    def _has_one_layer(self) -> bool:
        return len(self.layers) == 1


class Transformer:
    """A model bound to its parameters; maps tokens to hidden states."""

    def __init__(
        self,
        config: ModelConfig,
        lora: LoraSpec | None,
        params: Params,
        matmul: Matmul = "dtype",
    ):
        self.config = config
        self.layers = params["layers"]
        outer = {name: part for name, part in params.items() if name != "layers"}
        self.outer = nnx.merge(_outer_modules(config)[0], outer)
        kinds = dict.fromkeys(kind.parts for kind in config.layer_kinds)
        self._blocks = {parts: _block(config, parts, lora, matmul)[0] for parts in kinds}

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        key: jax.Array | None,
        dtype: DTypeLike,
        remat: rematerialization.Policy,
        unroll: int = 1,
        cache: Cache | None = None,
        start: Int[Array, ""] | int = 0,
        length: Length | None = None,
        num_valid: Int[Array, ""] | int | None = None,
        after: Collection[int] = (),
    ) -> tuple[Float[Array, "B T D"], Cache | None, list[Float[Array, "B T D"]]]:
        """Returns the final hidden states, the updated cache, and the residual stream after layers.

        Args:
          tokens: token ids.
          key: dropout keys, one per sequence; None for no dropout.
          dtype: dtype of the activations.
          remat: rematerialization policy.
          unroll: layers per iteration, as for `forward`.
          cache: cache of the preceding tokens; None for none.
          start: position of the first token.
          length: number of tokens of the whole text, for length-dependent rotary embeddings; None
            for T.
          num_valid: number of tokens that are not padding when the cache is filled; None for all.
          after: numbers of layers, 1 for the first one; the residual stream is returned after each
            of them, in ascending order.
        """
        config, outer = self.config, self.outer
        positions = start + jnp.arange(tokens.shape[1])
        inputs = _layer_inputs(config, positions, tokens.shape[1] if length is None else length)

        def layer(x, weights, parts, cos_sin, span, query_factor, normed, key, cache):
            context = LayerContext(positions, cos_sin, span, query_factor, normed, num_valid)
            x, cache = nnx.merge(self._blocks[parts], weights)(x, context, key, cache)
            return sharding.by_sequence(x), cache

        def indexed_layer(parts, x, weights, rope, span, growth, normed, key, cache):
            cos_sin = _select(inputs.angles, rope)
            query_factor = _select(inputs.query_factors, growth)
            normed = all(inputs.normed) or normed
            return layer(x, weights, parts, cos_sin, span, query_factor, normed, key, cache)

        keys = None if key is None else split_keys(key, config.num_layers)
        x = sharding.look_up(outer.embed_tokens.embedding[...], tokens, dtype)
        x = self._embedded(sharding.by_sequence(x), positions)
        unroll = _layers_per_iteration(unroll, config.num_layers, remat)
        if cache or unroll < config.num_layers:  # Also a single layer, if it has a cache.
            indices = inputs.rope_index, inputs.span_index, inputs.growth_index, inputs.normed
            arrays = tuple(map(jnp.array, indices))
            options = cache, remat, unroll, after
            x, cache, inner = self._loop(indexed_layer, x, arrays, keys, *options)
            return outer.final_norm(x), cache, inner
        x, inner = self._unrolled(layer, x, inputs, keys, remat, after)
        return outer.final_norm(x), None, inner

    def _unrolled(
        self,
        layer: Callable,
        x: Float[Array, "B T D"],
        inputs: "_LayerInputs",
        keys: Any,
        remat: rematerialization.Policy,
        after: Collection[int],
    ) -> tuple[Float[Array, "B T D"], list[Float[Array, "B T D"]]]:
        """Computes all layers without a loop or a cache; also returns the states after some.

        Args:
          layer: (x, weights, parts, cos_sin, span, query_factor, normed, key, cache) -> x, cache.
          x: embedded tokens.
          inputs: position-dependent inputs of the layers.
          keys: dropout keys of each layer.
          remat: rematerialization policy.
          after: numbers of layers after which states are returned.
        """
        frozen: Any = jax.lax.stop_gradient(self.layers)
        slots: Any = {part: _unstack(stack, _depth(stack)) for part, stack in self.layers.items()}
        indices = _stack_indices(self.config, self.layers)
        inner = []
        for i, (kind, numbers) in enumerate(zip(self.config.layer_kinds, indices)):

            def body(x: Any, slot: Any, key: Any, i=i, kind=kind, numbers=numbers):
                weights = {
                    part: _slice_for_remat(slot[part], frozen[part], number)
                    for part, number in numbers.items()
                }
                return layer(x, weights, kind.parts, *inputs.of_layer(i), key, None)

            slot = {part: slots[part][number] for part, number in numbers.items()}
            x, _ = rematerialization.wrap(body, remat, in_loop=False)(
                x, slot, None if keys is None else keys[i]
            )
            if i + 1 in after:
                inner.append(x)
        return x, inner

    def _loop(
        self,
        layer: Callable,
        x: Float[Array, "B T D"],
        indices: tuple[Array, ...],
        keys: Any,
        cache: Cache | None,
        remat: rematerialization.Policy,
        unroll: int,
        after: Collection[int],
    ) -> tuple[Float[Array, "B T D"], Cache | None, list[Float[Array, "B T D"]]]:
        """Computes all layers by one scan over each segment; also returns the states after some.

        They are collected in the loop, since a scan that ends after each of these layers needs
        slices of the stacked weights, which are copies, as are those of their gradients.

        Args:
          layer: (parts, x, weights, *indices, key, cache) -> x, cache.
          x: embedded tokens.
          indices: each layer's rope, span and query growth, by number, and whether it has norms
            of queries and keys.
          keys: dropout keys of each layer.
          cache: the cache, or None.
          remat: rematerialization policy.
          unroll: layers per iteration.
          after: numbers of layers after which states are returned.
        """
        updated: dict[str, list[Any]] = {mixer: [] for mixer in cache or ()}
        order = sorted(set(after))
        slots = inner = None
        if order:
            # Every layer writes, and a slot's own layer is the last that writes to it.
            slots = jnp.array([bisect.bisect_left(order, i + 1) for i in range(len(indices[0]))])
            shape = len(x), len(order) + 1, *x.shape[1:]
            inner = sharding.by_sequence(jnp.zeros(shape, x.dtype))
        for segment in segments([kind.parts for kind in self.config.layer_kinds]):
            weights = {
                part: segment.slice_stack(stack, part if part in VARIANTS else None)
                for part, stack in self.layers.items()
                if part in segment.parts or part not in VARIANTS
            }
            states = cache and {
                mixer: segment.slice_stack(state, mixer)
                for mixer, state in cache.items()
                if mixer in segment.parts
            }
            step = functools.partial(_segment_step, layer=layer, segment=segment, remat=remat)
            per_layer = keys, indices, slots
            (x, inner), states = jax.lax.scan(
                step,
                (x, inner),
                (weights, states, *map(segment.slice_stack, per_layer)),
                unroll=min(max(1, unroll // len(segment.layers)), segment.repeats),
            )
            for mixer, state in states.items():
                updated[mixer].append(segment.flatten(state))
        collected = [] if inner is None else [inner[:, i] for i in range(len(order))]
        if cache is None:
            return x, None, collected
        cache = {mixer: jax.tree.map(_concatenate, *parts) for mixer, parts in updated.items()}
        return x, cache, collected

    def _embedded(
        self, x: Float[Array, "B T D"], positions: Int[Array, "T"]
    ) -> Float[Array, "B T D"]:
        """Scales, positions and norms the embedded tokens for the first layer."""
        if self.config.embedding_scale != 1:
            x *= jnp.asarray(self.config.embedding_scale, x.dtype)
        if self.outer.embed_positions is not None:
            x = add_broadcast(x, self.outer.embed_positions.embedding[positions])
        return apply_norm(self.outer.embed_norm, x)


# --- Pure functions -----------------------------------------------------------------------------


def forward(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    *,
    lora: LoraSpec | None = None,
    dropout_key: jax.Array | None = None,
    dtype: DTypeLike = jnp.float32,
    remat: rematerialization.Policy = "dots",
    unroll: int = 1,
    matmul: Matmul = "dtype",
) -> Float[Array, "B T D"]:
    """Returns the hidden states after the final norm, in `dtype`.

    Args:
      config: the model's config.
      params: its parameters.
      tokens: token ids.
      lora: the adapters in `params`; None for none.
      dropout_key: for the adapters' dropout: one key, or one per sequence [B], whose masks are
        then independent of how sequences are batched. None for no dropout.
      dtype: dtype of the activations.
      remat: rematerialization policy for the backward pass.
      unroll: layers per iteration of the compiled loop. With all layers there is no loop, and
        residuals are not copied into a stack: faster, but compilation time grows with depth. 0
        unrolls up to `MAX_UNROLLED` layers on GPU if layers save more than their input, else 1.
      matmul: how the projections of the layers are computed.

    Raises:
      ValueError: `params` do not match `config` and `lora`.
      UserError: the text is longer than the model's learned positions.
    """
    _check_length(config, tokens.shape[1])
    if dropout_key is not None and not dropout_key.shape:
        dropout_key = jax.random.split(dropout_key, len(tokens))
    with compiling.products(dtype):
        model = _bind(config, lora, params, matmul)
        return model(tokens, dropout_key, dtype, remat, unroll)[0]


def forward_with_inner_states(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    after: Collection[int],
    *,
    lora: LoraSpec | None = None,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Float[Array, "B T D"], list[Float[Array, "B T D"]]]:
    """Returns the hidden states after the final norm, and the residual stream after some layers.

    The backward pass recomputes each layer (`remat="layer"`).

    Args:
      config: the model's config.
      params: its parameters.
      tokens: token ids.
      after: numbers of layers, 1 for the first one; the residual stream is returned after each of
        them, in ascending order.
      lora: the adapters in `params`; None for none.
      dtype: dtype of the activations.

    Raises:
      ValueError: `params` do not match `config` and `lora`.
      UserError: the text is longer than the model's learned positions.
    """
    _check_length(config, tokens.shape[1])
    with compiling.products(dtype):
        model = _bind(config, lora, params)
        hidden, _, inner = model(tokens, None, dtype, "layer", after=after)
    return hidden, inner


def head_matrix(params: Params) -> Float[Array, "V D"]:
    """Returns the output matrix: the head, or the input embedding if tied."""
    return (
        params["lm_head"]["kernel"] if "lm_head" in params else params["embed_tokens"]["embedding"]
    )


def head_path(vocabulary: Container[str]) -> str:
    """Returns the path of the output matrix among the paths of a vocabulary's matrices."""
    return "lm_head/kernel" if "lm_head/kernel" in vocabulary else "embed_tokens/embedding"


def adjust_logits(config: ModelConfig, logits: Float[Array, "..."]) -> Float[Array, "..."]:
    """Applies the logit soft-cap of the families that have one."""
    if config.logit_softcap is None:
        return logits
    return config.logit_softcap * jnp.tanh(logits / config.logit_softcap)


def logits(
    config: ModelConfig, params: Params, tokens: Int[Array, "B T"], **options
) -> Float[Array, "B T V"]:
    """Returns all logits in float32, for short inputs; `options` as for `forward`."""
    return adjust_logits(
        config, _project(config, forward(config, params, tokens, **options), params)
    )


def generate(
    config: ModelConfig,
    params: Params,
    prompt: Int[Array, "B T"],
    steps: int,
    dtype: DTypeLike = jnp.float32,
) -> Int[Array, "B T+steps"]:
    """Returns `prompt` and its greedy continuation by `steps` tokens.

    Length-dependent rotary embeddings use the total length for every token.

    Raises:
      UserError: the text is longer than the model's learned positions.
    """
    length = prompt.shape[1]
    _check_length(config, length + steps)
    # Padded so that few programs serve prompts of all lengths.
    padded = jnp.pad(prompt, ((0, 0), (0, -length % 64)))
    return jnp.concatenate(
        [prompt, _continue(config, params, padded, length, steps, jnp.dtype(dtype))], axis=1
    )


@functools.partial(jax.jit, static_argnames=("config", "steps", "dtype"))
def _continue(
    config: ModelConfig,
    params: Params,
    prompt: Int[Array, "B T"],
    length: Int[Array, ""],
    steps: int,
    dtype: DTypeLike,
) -> Int[Array, "B steps"]:
    """Greedily continues the first `length` tokens, with a key-value cache.

    The cache is filled from the padded prompt; padding is masked until it is overwritten.
    """
    model = _bind(config, None, params)
    batch, padded_length = prompt.shape
    empty = empty_cache(config, batch, padded_length + steps, dtype)

    def advance(tokens, last, cache, start, num_valid=None):
        with compiling.products(dtype):
            hidden, cache, _ = model(
                tokens, None, dtype, "layer", 1, cache, start, length + steps, num_valid
            )
        scores = adjust_logits(config, _project(config, hidden[:, last], params))
        return scores.argmax(-1).astype(prompt.dtype), cache

    def step(carry, position):
        token, cache = carry
        return advance(token[:, None], 0, cache, position), token

    first = advance(prompt, length - 1, empty, 0, length)
    return jax.lax.scan(step, first, length + jnp.arange(steps))[1].T


def empty_cache(config: ModelConfig, batch: int, length: int, dtype: DTypeLike) -> Cache:
    """Returns an empty cache for texts of up to `length` tokens."""
    counts = Counter(kind.mixer for kind in config.layer_kinds)
    return {
        mixer: tuple(
            jnp.zeros((count, *shape), jnp.float32 if mixer == "delta" else dtype)
            for shape in MIXERS[mixer].empty_cache(config, batch, length)
        )
        for mixer, count in counts.items()
    }


def abstract_params(config: ModelConfig, lora: LoraSpec | None = None) -> Params:
    """Returns all parameters as float32 ShapeDtypeStructs, with adapters if `lora` is given."""
    counts = _layers_by_part(config)
    layers = {}
    for parts in dict.fromkeys(kind.parts for kind in config.layer_kinds):
        for part, tree in nnx.to_pure_dict(_block(config, parts, lora)[1]).items():
            depth = counts[part] if part in VARIANTS else config.num_layers
            layers[part] = jax.tree.map(
                lambda leaf, depth=depth: jax.ShapeDtypeStruct((depth, *leaf.shape), leaf.dtype),
                tree,
            )
    return {**nnx.to_pure_dict(_outer_modules(config)[1]), "layers": layers}


def first_layers(config: ModelConfig, params: Params, count: int) -> tuple[ModelConfig, Params]:
    """Returns the config and parameters of a model of the first `count` layers."""
    shallow = dataclasses.replace(config, num_layers=count, layer_kinds=config.layer_kinds[:count])
    depths = _layers_by_part(shallow)
    layers = {
        part: jax.tree.map(lambda x, n=depths[part] if part in VARIANTS else count: x[:n], stack)
        for part, stack in params["layers"].items()
        if part not in VARIANTS or depths[part]
    }
    return shallow, {**params, "layers": layers}


def init_params(config: ModelConfig, key: jax.Array, std: float = 0.02) -> Params:
    """Returns random float32 parameters: normal matrices, neutral norms, zero biases."""

    def init(path: str, shape: tuple[int, ...], key: jax.Array) -> jax.Array:
        match path.rpartition("/")[2]:
            case "scale":
                return jnp.zeros(shape) if config.norm_plus_one else jnp.ones(shape)
            case "bias" | "selection_bias":
                return jnp.zeros(shape)
            case _:
                return std * jax.random.normal(key, shape)

    leaves = paths.flatten(abstract_params(config))
    keys = jax.random.split(key, len(leaves))
    return paths.unflatten(
        {path: init(path, leaf.shape, k) for (path, leaf), k in zip(leaves.items(), keys)}
    )


# --- Helpers ------------------------------------------------------------------------------------


class _LayerInputs(NamedTuple):
    """Distinct position-dependent inputs of the layers, and each layer's indices into them."""

    angles: list[Rotation]
    """Cosine and sine of each distinct rotary embedding."""
    query_factors: list[Float[Array, "T"] | None]
    """Factors of the queries for each distinct growth."""
    rope_index: list[int]
    span_index: list[int]
    growth_index: list[int]
    normed: list[bool]
    """The layers that have norms of queries and keys, if the model has."""

    def of_layer(self, i: int) -> tuple[Rotation, int, Float[Array, "T"] | None, bool]:
        """Returns the rotation, span index, query factor and norms of layer `i`."""
        query_factor = self.query_factors[self.growth_index[i]]
        return self.angles[self.rope_index[i]], self.span_index[i], query_factor, self.normed[i]


def _layer_inputs(config: ModelConfig, positions: Int[Array, "T"], length: Length) -> _LayerInputs:
    """Computes the inputs that layers select by index."""
    kinds = config.layer_kinds
    ropes, rope_index = unique_with_indices([kind.rope for kind in kinds])
    growths, growth_index = unique_with_indices([kind.query_growth for kind in kinds])
    size = max((rope.size for rope in ropes if rope), default=0)
    angles = [rotation(positions, rope, size, length) for rope in ropes]
    query_factors: list[Any] = [None]
    if growths != [None]:
        query_factors = [_query_factor(growth, positions) for growth in growths]
    normed = [kind.query_key_norm for kind in kinds]
    return _LayerInputs(angles, query_factors, rope_index, spans(config)[1], growth_index, normed)


@functools.cache
def _outer_modules(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: OuterModules(config)))


@functools.cache
def _block(
    config: ModelConfig, parts: Parts, lora: LoraSpec | None, matmul: Matmul = "dtype"
) -> tuple[nnx.GraphDef, nnx.State]:
    block = nnx.eval_shape(lambda: Block(config, parts, lora))
    for path, module in nnx.iter_graph(block):
        # Other maps (routers and gates) keep their precision.
        if isinstance(module, Linear) and str(path[-1]).endswith("_proj"):
            module.matmul = matmul
    return nnx.split(block)


def _layers_by_part(config: ModelConfig) -> Counter[str]:
    """Counts the layers that have each mixer and feed-forward."""
    return Counter(part for kind in config.layer_kinds for part in kind.parts)


def _bind(
    config: ModelConfig, lora: LoraSpec | None, params: Params, matmul: Matmul = "dtype"
) -> Transformer:
    expected, actual = (
        set(paths.flatten(tree)) for tree in (abstract_params(config, lora), params)
    )
    if expected != actual:
        raise ValueError(
            f"parameters do not fit the model: missing {sorted(expected - actual)}, "
            f"unexpected {sorted(actual - expected)}"
            f" ({config}, {lora})"
        )
    return Transformer(config, lora, params, matmul)


def _segment_step(
    carry: tuple[Float[Array, "B T D"], Float[Array, "B N T D"] | None],
    scanned: tuple[Any, ...],
    *,
    layer: Callable,
    segment: Segment,
    remat: rematerialization.Policy,
) -> tuple[tuple[Float[Array, "B T D"], Float[Array, "B N T D"] | None], dict[str, Any]]:
    """Computes one iteration of a segment's scan; returns the updated cache of each mixer.

    The carry is the residual stream, and the states after layers that were collected so far, each
    layer's in a slot of N.
    """
    x, inner = carry
    weights, cache, keys, indices, slots = scanned
    numbers: Counter[str] = Counter()
    states: dict[str, list[Any]] = {}
    for position, parts in enumerate(segment.layers):
        layer_weights = {
            part: segment.select_layer(stack, numbers[part] if part in parts else position)
            for part, stack in weights.items()
            if part in parts or part not in VARIANTS
        }
        mixer, _ = parts
        state = cache and segment.select_layer(cache[mixer], numbers[mixer])
        body = rematerialization.wrap(functools.partial(layer, parts), remat)
        x, state = body(
            x,
            layer_weights,
            *segment.select_layer(indices, position),
            segment.select_layer(keys, position),
            state,
        )
        if inner is not None:
            slot = segment.select_layer(slots, position)
            inner = jax.lax.dynamic_update_index_in_dim(inner, x, slot, 1)
        if cache:
            states.setdefault(mixer, []).append(state)
        numbers.update(parts)
    return (x, inner), {mixer: segment.stack_layers(layers) for mixer, layers in states.items()}


def segments(layers: Sequence[Parts]) -> list[Segment]:
    """Splits layers into segments, greedily from the first, each covering the most layers."""
    result: list[Segment] = []
    start = 0
    while start < len(layers):
        before, rest = tuple(layers[:start]), tuple(layers[start:])
        best = Segment(before, rest[:1], 1)
        for period in range(1, len(rest) // 2 + 1):
            repeats = 1
            while rest[repeats * period : (repeats + 1) * period] == rest[:period]:
                repeats += 1
            if repeats > 1 and repeats * period > best.repeats * len(best.layers):
                best = Segment(before, rest[:period], repeats)
        result.append(best)
        start += best.repeats * len(best.layers)
    return result


def _stack_arrays(*parts: Array) -> Array:
    return jnp.stack(parts)


def _concatenate(*parts: Array) -> Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def _stack_indices(config: ModelConfig, layers: Params) -> Iterator[dict[str, int]]:
    """Yields each layer's index in the stack of each of its parts."""
    numbers: Counter[str] = Counter()
    for i, kind in enumerate(config.layer_kinds):
        yield {
            part: numbers[part] if part in kind.parts else i
            for part in layers
            if part in kind.parts or part not in VARIANTS
        }
        numbers.update(kind.parts)


def _depth(stack: Any) -> int:
    return len(jax.tree.leaves(stack)[0])


def bind(config: ModelConfig, params: Params) -> Transformer:
    """Binds parameters to a model that can be called with a cache (`forward` uses none).

    Raises:
      ValueError: `params` do not match `config`.
    """
    return _bind(config, None, params)


def logits_from_hidden(
    config: ModelConfig, hidden: Float[Array, "... D"], params: Params
) -> Float[Array, "... V"]:
    """Returns the float32 logits of final hidden states, with soft-cap."""
    return adjust_logits(config, _project(config, hidden, params))


def _project(
    config: ModelConfig, hidden: Float[Array, "... D"], params: Params
) -> Float[Array, "... V"]:
    head = head_matrix(params).astype(hidden.dtype)
    with compiling.products(hidden.dtype):
        padded = jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)
    return padded[..., : config.vocab_size]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _unstack(stack: Any, layers: int) -> list[Any]:
    """Slices a stack into layers; their gradients are stacked once instead of for each reader."""
    return [_layer_slice(stack, i) for i in range(layers)]


def _unstack_forward(stack: Any, layers: int):
    return _unstack(stack, layers), None


def _unstack_backward(layers: int, _: None, gradients: list[Any]):
    leaves, structure = jax.tree.flatten(jax.tree.map(_stack_gradients, *gradients))
    # Codes of quantized kernels are integers, which have no gradient.
    real = [i for i, leaf in enumerate(leaves) if leaf.dtype != jax.dtypes.float0]
    for i, leaf in zip(real, jax.lax.optimization_barrier([leaves[i] for i in real])):
        leaves[i] = leaf
    return (structure.unflatten(leaves),)


def _stack_gradients(*parts: Any) -> Any:
    if parts[0].dtype == jax.dtypes.float0:
        return np.zeros((len(parts), *parts[0].shape), jax.dtypes.float0)
    return jnp.stack(parts)


_unstack.defvjp(_unstack_forward, _unstack_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _slice_for_remat(slot: Any, stack: Any, layer: int) -> Any:
    """Returns a layer's slice of the stack; its gradient goes to `slot`.

    A recomputed layer then slices the stack again instead of keeping a copy until the backward
    pass; a product that is the only reader of its slice reads it in place.
    """
    return _layer_slice(stack, layer)


_slice_for_remat.defvjp(
    lambda slot, stack, layer: (_slice_for_remat(slot, stack, layer), None),
    lambda layer, _, gradient: (gradient, None),
)


def _layer_slice(stack: Any, layer: int) -> Any:
    return jax.tree.map(lambda x: x[layer], stack)


def _layers_per_iteration(unroll: int, layers: int, remat: rematerialization.Policy) -> int:
    """Returns the number of layers per iteration of the loop."""
    if unroll:
        return min(unroll, layers)
    # A loop copies residuals into a stack and out of it, which takes 8% of a step with `dots` on
    # two GPUs; `layer` saves next to nothing.
    pays = jax.default_backend() == "gpu" and remat != "layer"
    if not pays:
        return 1
    iterations = -(-layers // MAX_UNROLLED)
    return -(-layers // iterations)


def num_iterations(unroll: int, layers: int, remat: rematerialization.Policy) -> int:
    """Returns the number of iterations of the loop over layers; 1: all are unrolled.

    Args:
      unroll: as for `forward`.
      layers: the number of layers.
      remat: the rematerialization policy.
    """
    return -(-layers // _layers_per_iteration(unroll, layers, remat))


def _select(items: Sequence[Any], number: Int[Array, ""]) -> Any:
    """Selects an item by a traced index, from trees of arrays of equal shapes."""
    if len(items) == 1:
        return items[0]
    return jax.tree.map(lambda *parts: jnp.stack(parts)[number], *items)


def _query_factor(growth: QueryGrowth | None, positions: Int[Array, "T"]) -> Float[Array, "T"]:
    if growth is None:
        return jnp.ones(len(positions))
    periods = (positions + growth.offset) // growth.original_positions
    return 1 + growth.beta * jnp.log1p(periods.astype(jnp.float32))


def _check_length(config: ModelConfig, length: int) -> None:
    if config.learned_positions and length > config.max_positions:
        raise UserError(
            f"a text of {length:,} tokens is too long for this model, which has learned"
            f" {config.max_positions:,} positions: use sequences of at most"
            f" {config.max_positions:,} tokens"
        )
