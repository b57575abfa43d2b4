"""A decoder-only transformer, defined in Flax NNX and run as pure functions of a nested dict of
arrays.

Dimension letters, here and in the rest of the package: B batch, T length, D model, V vocabulary, N
heads, K key-value heads, H head size, L layers, F intermediate, E experts.

The modules declare the parameters (`abstract_params`) and the computation (`forward`); they hold
arrays only during a call. Leaves under `layers` are stacked over L, or for a mixer over the layers
that have it, and one compiled body is scanned over each run of layers whose mixers repeat
(`Segment`). Layers may differ in window and rotary embedding: the scan passes each layer the
indices of its own. Activations have the caller's `dtype`, to which each layer casts its weights;
norms, rotary embedding, softmax and routing are computed in float32.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from tokalign_jax.errors import UserError
from tokalign_jax.models import remat as rematerialization
from tokalign_jax.models.config import ModelConfig, QueryGrowth
from tokalign_jax.models.experts import MixtureOfExperts
from tokalign_jax.models.lora import LoraSpec
from tokalign_jax.models.mixers import Attention, Place, numbered
from tokalign_jax.models.modules import MLP, Norm, apply, param, plus, scaled, split
from tokalign_jax.models.recurrent import DeltaNet, ShortConvolution
from tokalign_jax.models.rotary import Length, rotation
from tokalign_jax.parallel import sharding
from tokalign_jax.utils import compiling, paths

Params = dict[str, Any]
"""A nested dict of arrays; docs/architecture.md lists the paths."""


UNROLLED = 48
"""Layers up to which the loop over them is unrolled by default, where that pays; deeper models loop
over turns of as even a number of layers. Compilation takes longer by as much, about a second a
layer.
"""


# --- The definition -----------------------------------------------------------------------------


MIXERS: dict[str, Any] = {
    "attention": Attention,
    "convolution": ShortConvolution,
    "delta": DeltaNet,
}
"""By `LayerKind.mixer`; also the name of its parameters in a layer."""

Cache = dict[str, Any]
"""Of each mixer: arrays with a leading axis for the layers that have it, or inside one without."""


class Block(nnx.Module):
    """One layer: mixer and feed-forward with their norms, one after the other or side by side."""

    def __init__(self, config: ModelConfig, mixer: str, lora: LoraSpec | None):
        self.config, self.mixer = config, mixer
        norm = functools.partial(Norm, config, config.hidden_size, bias=config.norm_bias)
        before, after = config.norm_placement != "after", config.norm_placement != "before"
        self.input_norm = norm() if before else None
        setattr(self, mixer, MIXERS[mixer](config, lora))
        self.attention_out_norm = norm() if after else None
        self.post_attention_norm = norm() if before and not config.shared_norm else None
        self.mlp = (
            MixtureOfExperts(config, config.experts, lora) if config.experts else MLP(config, lora)
        )
        self.mlp_out_norm = norm() if after else None

    def __call__(
        self, x: Float[Array, "B T D"], place: Place, key: jax.Array | None, cache: Any
    ) -> tuple[Float[Array, "B T D"], Any]:
        mixer_key, mlp_key = split(key, 2)
        normed = apply(self.input_norm, x)
        mixed, cache = getattr(self, self.mixer)(normed, place, mixer_key, cache)
        scale = self.config.residual_scale
        y = x + scaled(apply(self.attention_out_norm, mixed), scale)
        if not self.config.shared_norm:
            normed = apply(self.post_attention_norm, x if self.config.parallel_residual else y)
        # The product comes first, so that the compiler fuses the addition into its kernel.
        return scaled(apply(self.mlp_out_norm, self.mlp(normed, mlp_key)), scale) + y, cache


class Embed(nnx.Module):
    def __init__(self, config: ModelConfig):
        self.embedding = param(config.vocab_size, config.hidden_size)


class Positions(nnx.Module):
    def __init__(self, config: ModelConfig):
        self.embedding = param(config.max_positions, config.hidden_size)


class Head(nnx.Module):
    def __init__(self, config: ModelConfig):
        self.kernel = param(config.vocab_size, config.hidden_size)


class Ends(nnx.Module):
    """All but the layers. The head is only declared: the loss applies it, in chunks or at once."""

    def __init__(self, config: ModelConfig):
        norm = functools.partial(Norm, config, config.hidden_size, bias=config.norm_bias)
        self.embed_tokens = Embed(config)
        self.embed_positions = Positions(config) if config.learned_positions else None
        self.embed_norm = norm() if config.embedding_norm else None
        self.final_norm = norm(gain=config.output_scale)
        self.lm_head = None if config.tie_word_embeddings else Head(config)


class Segment(NamedTuple):
    """A run of layers whose mixers repeat: what one loop computes, `len(mixers)` layers a turn."""

    before: tuple[str, ...]
    """Mixers of the layers before it."""
    mixers: tuple[str, ...]
    """Of the layers of one turn."""
    repeats: int

    def take(self, stack: Any, mixer: str | None = None) -> Any:
        """The segment's part, turn by turn, of a stack over all layers or over those of a mixer."""
        first = len(self.before) if mixer is None else self.before.count(mixer)
        each = len(self.mixers) if mixer is None else self.mixers.count(mixer)
        count = each * self.repeats

        def part(x: Array) -> Array:
            x = x if count == len(x) else x[first : first + count]
            return x if self._of_one_layer else x.reshape(self.repeats, each, *x.shape[1:])

        return jax.tree.map(part, stack)

    def of_layer(self, turn: Any, number: int) -> Any:
        """A layer's slice of one turn, by its index among the layers that share the stack."""
        return turn if self._of_one_layer else jax.tree.map(lambda x: x[number], turn)

    def of_turn(self, layers: Sequence[Any]) -> Any:
        """The inverse of `of_layer`."""
        return layers[0] if self._of_one_layer else jax.tree.map(_stacked, *layers)

    def joined(self, turns: Any) -> Any:
        """The inverse of `take`."""
        if self._of_one_layer:
            return turns
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), turns)

    @property
    def _of_one_layer(self) -> bool:
        return len(self.mixers) == 1


class Transformer:
    """Tokens to hidden states."""

    def __init__(self, config: ModelConfig, lora: LoraSpec | None, params: Params):
        self.config = config
        self.layers = params["layers"]
        ends = {name: part for name, part in params.items() if name != "layers"}
        self.ends = nnx.merge(_ends(config)[0], ends)
        mixers = dict.fromkeys(kind.mixer for kind in config.layer_kinds)
        self._blocks = {mixer: _block(config, mixer, lora)[0] for mixer in mixers}

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
        used: Int[Array, ""] | int | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Final hidden states, and the filled cache.

        Args:
          length: of the whole text, for rotary embeddings which look at it; None: T.
          used: tokens that count where the cache is filled, the rest being padding; None: all.
        """
        config, ends = self.config, self.ends
        positions = start + jnp.arange(tokens.shape[1])
        ropes, rope_of = numbered([kind.rope for kind in config.layer_kinds])
        _, window_of = numbered([kind.window for kind in config.layer_kinds])
        size = max((rope.size for rope in ropes if rope), default=0)
        turns = [
            rotation(positions, rope, size, tokens.shape[1] if length is None else length)
            for rope in ropes
        ]
        growing, growth_of = numbered([kind.query_growth for kind in config.layer_kinds])
        growths = [_query_factor(growth, positions) for growth in growing]
        if growing == [None]:
            growths = [None]

        def layer(x, weights, mixer, by, window, growth, key, cache):
            place = Place(positions, by, window, growth, used)
            x, cache = nnx.merge(self._blocks[mixer], weights)(x, place, key, cache)
            return sharding.by_sequence(x), cache

        def numbered_layer(mixer, x, weights, rope, window, growth, key, cache):
            by, growth = _nth(turns, rope), _nth(growths, growth)
            return layer(x, weights, mixer, by, window, growth, key, cache)

        keys = None if key is None else split(key, config.num_layers)
        x = sharding.look_up(ends.embed_tokens.embedding[...], tokens, dtype)
        x = self._placed(sharding.by_sequence(x), positions)
        unroll = _at_once(unroll, config.num_layers, remat)
        if unroll < config.num_layers:
            numbers = tuple(map(jnp.array, (rope_of, window_of, growth_of)))
            x, cache = self._looped(numbered_layer, x, numbers, keys, cache, remat, unroll)
            return ends.final_norm(x), cache
        still: Any = jax.lax.stop_gradient(self.layers)
        slots: Any = {part: _unstacked(stack, _depth(stack)) for part, stack in self.layers.items()}
        for i, (kind, parts) in enumerate(zip(config.layer_kinds, _parts(config, self.layers))):

            def own(x: Any, slot: Any, key: Any, i=i, kind=kind, parts=parts):
                weights = {
                    part: _taken(slot[part], still[part], number) for part, number in parts.items()
                }
                place = turns[rope_of[i]], window_of[i], growths[growth_of[i]]
                return layer(x, weights, kind.mixer, *place, key, None)

            slot = {part: slots[part][number] for part, number in parts.items()}
            x, _ = rematerialization.wrap(own, remat, in_loop=False)(
                x, slot, None if keys is None else keys[i]
            )
        return ends.final_norm(x), None

    def _looped(
        self,
        layer: Callable,
        x: Float[Array, "B T D"],
        numbers: tuple[Array, ...],
        keys: Any,
        cache: Cache | None,
        remat: rematerialization.Policy,
        unroll: int,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """All layers by loops, one over each segment.

        Args:
          layer: (mixer, x, weights, *numbers, key, cache) -> x, cache.
          numbers: of each layer.
        """
        filled: dict[str, list[Any]] = {mixer: [] for mixer in cache or ()}
        for segment in segments([kind.mixer for kind in self.config.layer_kinds]):
            mixers = dict.fromkeys(segment.mixers)
            weights = {
                part: segment.take(stack, part if part in MIXERS else None)
                for part, stack in self.layers.items()
                if part in mixers or part not in MIXERS
            }
            states = cache and {mixer: segment.take(cache[mixer], mixer) for mixer in mixers}
            turn = functools.partial(_turn, layer=layer, segment=segment, remat=remat)
            x, states = jax.lax.scan(
                turn,
                x,
                (weights, segment.take(keys), states, segment.take(numbers)),
                unroll=min(max(1, unroll // len(segment.mixers)), segment.repeats),
            )
            for mixer, state in states.items():
                filled[mixer].append(segment.joined(state))
        if cache is None:
            return x, None
        return x, {mixer: jax.tree.map(_concatenated, *parts) for mixer, parts in filled.items()}

    def _placed(
        self, x: Float[Array, "B T D"], positions: Int[Array, "T"]
    ) -> Float[Array, "B T D"]:
        """The embedding as the first layer reads it."""
        if self.config.embedding_scale != 1:
            x *= jnp.asarray(self.config.embedding_scale, x.dtype)
        if self.ends.embed_positions is not None:
            x = plus(x, self.ends.embed_positions.embedding[positions])
        return apply(self.ends.embed_norm, x)


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
) -> Float[Array, "B T D"]:
    """Hidden states after the final norm, in `dtype`.

    Args:
      lora: says that `params` hold adapters, and of which kind.
      dropout_key: of the adapters' dropout, one key or one per sequence [B] (the masks then do not
        depend on which sequences are batched together); None: no dropout.
      remat: what each layer keeps for the backward pass; of no effect without one.
      unroll: layers per iteration of the compiled loop. With all of them there is no loop, and
        residuals are not copied into a stack: faster, but compilation time grows with depth. 0: on
        GPUs, where layers keep more than their input, all of up to `UNROLLED`; else 1.

    Raises:
      ValueError: `params` are not those of `config` and `lora`.
      UserError: the model has no positions for so long a text.
    """
    _check_length(config, tokens.shape[1])
    if dropout_key is not None and not dropout_key.shape:
        dropout_key = jax.random.split(dropout_key, len(tokens))
    with compiling.products(dtype):
        return _bind(config, lora, params)(tokens, dropout_key, dtype, remat, unroll)[0]


def head_matrix(params: Params) -> Float[Array, "V D"]:
    """The output matrix: the head, or when tied the input embedding."""
    return (
        params["lm_head"]["kernel"] if "lm_head" in params else params["embed_tokens"]["embedding"]
    )


def adjust_logits(config: ModelConfig, logits: Float[Array, "..."]) -> Float[Array, "..."]:
    """Apply the logit soft-cap, for the families that have one."""
    if config.logit_softcap is None:
        return logits
    return config.logit_softcap * jnp.tanh(logits / config.logit_softcap)


def logits(
    config: ModelConfig, params: Params, tokens: Int[Array, "B T"], **options
) -> Float[Array, "B T V"]:
    """All logits in float32, for short inputs; `options` are those of `forward`."""
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
    """`prompt` and its greedy continuation by `steps` tokens.

    Length-dependent rotary embeddings use the length of prompt and continuation together, for every
    token.

    Raises:
      UserError: the model has no positions for so long a text.
    """
    length = prompt.shape[1]
    _check_length(config, length + steps)
    # Padded, so that prompts of all lengths run through a few programs.
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
    """The greedy continuation of the first `length` tokens, with a cache of keys and values.

    The cache is filled from the padded prompt; padding is masked until it is overwritten.
    """
    model = _bind(config, None, params)
    batch, padded_length = prompt.shape
    empty = empty_cache(config, batch, padded_length + steps, dtype)

    def advance(tokens, last, cache, start, used=None):
        with compiling.products(dtype):
            hidden, cache = model(
                tokens, None, dtype, "layer", 1, cache, start, length + steps, used
            )
        scores = adjust_logits(config, _project(config, hidden[:, last], params))
        return scores.argmax(-1).astype(prompt.dtype), cache

    def step(carry, position):
        token, cache = carry
        return advance(token[:, None], 0, cache, position), token

    first = advance(prompt, length - 1, empty, 0, length)
    return jax.lax.scan(step, first, length + jnp.arange(steps))[1].T


def empty_cache(config: ModelConfig, batch: int, length: int, dtype: DTypeLike) -> Cache:
    """The cache of a text of up to `length` tokens before its first."""
    counts = Counter(kind.mixer for kind in config.layer_kinds)
    return {
        mixer: tuple(
            jnp.zeros((count, *shape), jnp.float32 if mixer == "delta" else dtype)
            for shape in MIXERS[mixer].empty_cache(config, batch, length)
        )
        for mixer, count in counts.items()
    }


def abstract_params(config: ModelConfig, lora: LoraSpec | None = None) -> Params:
    """All parameters as float32 ShapeDtypeStructs; with `lora`, adapters included."""
    counts = Counter(kind.mixer for kind in config.layer_kinds)
    layers = {}
    for mixer, count in counts.items():
        for part, tree in nnx.to_pure_dict(_block(config, mixer, lora)[1]).items():
            depth = count if part == mixer else config.num_layers
            layers[part] = jax.tree.map(
                lambda leaf, depth=depth: jax.ShapeDtypeStruct((depth, *leaf.shape), leaf.dtype),
                tree,
            )
    return {**nnx.to_pure_dict(_ends(config)[1]), "layers": layers}


def first_layers(config: ModelConfig, params: Params, count: int) -> tuple[ModelConfig, Params]:
    """The model of the first `count` layers."""
    kinds = config.layer_kinds[:count]
    mixers = Counter(kind.mixer for kind in kinds)
    layers = {
        part: jax.tree.map(lambda x, n=mixers[part] if part in MIXERS else count: x[:n], stack)
        for part, stack in params["layers"].items()
        if part not in MIXERS or mixers[part]
    }
    part = dataclasses.replace(config, num_layers=count, layer_kinds=kinds)
    return part, {**params, "layers": layers}


def init_params(config: ModelConfig, key: jax.Array, std: float = 0.02) -> Params:
    """Random float32 parameters: matrices normal with deviation `std`, norms neutral, biases zero."""

    def init(path: str, shape: tuple[int, ...], key: jax.Array) -> jax.Array:
        match path.rpartition("/")[2]:
            case "scale":
                return jnp.zeros(shape) if config.norm_plus_one else jnp.ones(shape)
            case "bias":
                return jnp.zeros(shape)
            case _:
                return std * jax.random.normal(key, shape)

    leaves = paths.flatten(abstract_params(config))
    keys = jax.random.split(key, len(leaves))
    return paths.unflatten(
        {path: init(path, leaf.shape, k) for (path, leaf), k in zip(leaves.items(), keys)}
    )


# --- Small things -------------------------------------------------------------------------------


@functools.cache
def _ends(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: Ends(config)))


@functools.cache
def _block(
    config: ModelConfig, mixer: str, lora: LoraSpec | None
) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: Block(config, mixer, lora)))


def _bind(config: ModelConfig, lora: LoraSpec | None, params: Params) -> Transformer:
    """The model that `params` belong to."""
    expected, given = (set(paths.flatten(tree)) for tree in (abstract_params(config, lora), params))
    if expected != given:
        raise ValueError(
            f"parameters do not fit the model: missing {sorted(expected - given)}, "
            f"left over {sorted(given - expected)}"
            f" ({config}, {lora})"
        )
    return Transformer(config, lora, params)


def _turn(
    x: Float[Array, "B T D"],
    scanned: tuple[Any, ...],
    *,
    layer: Callable,
    segment: Segment,
    remat: rematerialization.Policy,
) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
    """One turn of a segment's loop; gives the filled cache of each mixer."""
    weights, keys, cache, numbers = scanned
    seen: Counter[str] = Counter()
    states: dict[str, list[Any]] = {}
    for place, mixer in enumerate(segment.mixers):
        own = {
            part: segment.of_layer(stack, seen[mixer] if part == mixer else place)
            for part, stack in weights.items()
            if part == mixer or part not in MIXERS
        }
        state = cache and segment.of_layer(cache[mixer], seen[mixer])
        body = rematerialization.wrap(functools.partial(layer, mixer), remat)
        x, state = body(
            x, own, *segment.of_layer(numbers, place), segment.of_layer(keys, place), state
        )
        if cache:
            states.setdefault(mixer, []).append(state)
        seen[mixer] += 1
    return x, {mixer: segment.of_turn(parts) for mixer, parts in states.items()}


def segments(mixers: Sequence[str]) -> list[Segment]:
    """The layers in segments: from the first on, always the one that covers most layers."""
    found: list[Segment] = []
    start = 0
    while start < len(mixers):
        before, rest = tuple(mixers[:start]), tuple(mixers[start:])
        best = Segment(before, rest[:1], 1)
        for period in range(1, len(rest) // 2 + 1):
            repeats = 1
            while rest[repeats * period : (repeats + 1) * period] == rest[:period]:
                repeats += 1
            if repeats > 1 and repeats * period > best.repeats * len(best.mixers):
                best = Segment(before, rest[:period], repeats)
        found.append(best)
        start += best.repeats * len(best.mixers)
    return found


def _stacked(*parts: Array) -> Array:
    return jnp.stack(parts)


def _concatenated(*parts: Array) -> Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def _parts(config: ModelConfig, layers: Params) -> Iterator[dict[str, int]]:
    """Of each layer, its slice in the stack of each of its parts."""
    seen: Counter[str] = Counter()
    for i, kind in enumerate(config.layer_kinds):
        yield {
            part: seen[kind.mixer] if part == kind.mixer else i
            for part in layers
            if part == kind.mixer or part not in MIXERS
        }
        seen[kind.mixer] += 1


def _depth(stack: Any) -> int:
    return len(jax.tree.leaves(stack)[0])


def bind(config: ModelConfig, params: Params) -> Transformer:
    """The model that `params` belong to, to be called with a cache; `forward` calls it without one.

    Raises:
      ValueError: `params` are not those of `config`.
    """
    return _bind(config, None, params)


def last_logits(
    config: ModelConfig, hidden: Float[Array, "... D"], params: Params
) -> Float[Array, "... V"]:
    """The logits of final states, float32, as the model adjusts them (soft-cap)."""
    return adjust_logits(config, _project(config, hidden, params))


def _project(
    config: ModelConfig, hidden: Float[Array, "... D"], params: Params
) -> Float[Array, "... V"]:
    head = head_matrix(params).astype(hidden.dtype)
    with compiling.products(hidden.dtype):
        every = jnp.einsum("...d,vd->...v", hidden, head, preferred_element_type=jnp.float32)
    return every[..., : config.vocab_size]  # without rows that only fill the matrix up


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _unstacked(stack: Any, layers: int) -> list[Any]:
    """Slice a stack into layers; gradients are stacked once, not again for each reader."""
    return [_layer_of(stack, i) for i in range(layers)]


def _unstacked_forward(stack: Any, layers: int):
    return _unstacked(stack, layers), None


def _unstacked_backward(layers: int, _: None, gradients: list[Any]):
    return (
        jax.lax.optimization_barrier(jax.tree.map(lambda *parts: jnp.stack(parts), *gradients)),
    )


_unstacked.defvjp(_unstacked_forward, _unstacked_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _taken(slot: Any, stack: Any, layer: int) -> Any:
    """A layer's slice of the stack; its gradient goes to `slot`.

    A layer that is recomputed then slices the stack again, instead of keeping a copy from the
    forward to the backward pass; a product that is the only reader of its slice reads it in place.
    """
    return _layer_of(stack, layer)


_taken.defvjp(
    lambda slot, stack, layer: (_taken(slot, stack, layer), None),
    lambda layer, _, gradient: (gradient, None),
)


def _layer_of(stack: Any, layer: int) -> Any:
    return jax.tree.map(lambda x: x[layer], stack)


def _at_once(unroll: int, layers: int, remat: rematerialization.Policy) -> int:
    """Layers in one turn of the loop over them."""
    if unroll:
        return min(unroll, layers)
    # A loop copies residuals into a stack and out of it: 8% of a step with `dots` on two GPUs;
    # `layer` keeps next to nothing.
    pays = jax.default_backend() == "gpu" and remat != "layer"
    if not pays:
        return 1
    turns = -(-layers // UNROLLED)
    return -(-layers // turns)


def _nth(items: Sequence[Any], number: Int[Array, ""]) -> Any:
    """The item of this number, among trees of arrays of the same shapes."""
    if len(items) == 1:
        return items[0]
    return jax.tree.map(lambda *parts: jnp.stack(parts)[number], *items)


def _query_factor(growth: QueryGrowth | None, positions: Int[Array, "T"]) -> Float[Array, "T"]:
    if growth is None:
        return jnp.ones(len(positions))
    return 1 + growth.beta * jnp.log1p((positions // growth.original_positions).astype(jnp.float32))


def _check_length(config: ModelConfig, length: int) -> None:
    if config.learned_positions and length > config.max_positions:
        raise UserError(
            f"a text of {length:,} tokens is too long for this model: it has learned"
            f" {config.max_positions:,} positions and no others; use sequences of at most"
            f" {config.max_positions:,} tokens"
        )
