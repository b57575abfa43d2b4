"""AdamW with a rate of its own for each kind of parameter that a stage trains."""

import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from tokalign_jax.config import OptimizerConfig, StageConfig
from tokalign_jax.training.rounding import stochastic_round
from tokalign_jax.utils import paths

FROZEN = "frozen"

_VOCABULARY_RULE = (r"^(embed_tokens|lm_head)/", "embedding")
_RULES: dict[str, tuple[tuple[str, str], ...]] = {
    "embedding": (_VOCABULARY_RULE, ("", FROZEN)),
    "lora": (_VOCABULARY_RULE, (r"/lora_[ab]$", "lora"), ("", FROZEN)),
    "full": (_VOCABULARY_RULE, ("", "body")),
}
_ROW_AXES: tuple[tuple[str, int | None], ...] = (
    (r"(^|/)(embed_tokens/embedding|lm_head/kernel)$", -1),
    (r"_proj/(kernel|lora_[ab])$", -2),
    ("", None),
)
"""Axis over which a second moment by row is the mean of squared gradients: the width of a token's
row, the inputs of an output; None: one for each parameter."""
_DECAY_RULES = ((r"(^|/)(kernel|embedding|lora_[ab])$", "decays"), ("", "keeps"))


def rules_for(method: str) -> tuple[tuple[str, str], ...]:
    """The path rules of a method: which parameters are `embedding` (and head), `lora`, `body` or
    `frozen`.
    """
    return _RULES[method]


class Schedule(NamedTuple):
    """Learning-rate schedule of a stage: linear warm-up to the peak, then cosine decay to 0.

    With W warm-up updates of S, update u (from 0) has the rate peak (u + 1) / (W + 1) before W,
    then peak (1 + cos(pi (u - W) / (S - W))) / 2: no update has rate 0.

    Its numbers are inputs of the compiled step, so that runs which differ only in rates or length
    share one program.
    """

    peaks: Mapping[str, float]
    """By label of what trains."""
    steps: float
    warmup: float

    def rates(self, update: Any) -> dict[str, Array]:
        """The rate of each label at an update."""
        update = jnp.asarray(update, jnp.float32)
        rise = (update + 1) / (self.warmup + 1)
        progress = jnp.clip(
            (update - self.warmup) / jnp.maximum(self.steps - self.warmup, 1), 0.0, 1.0
        )
        factor = jnp.where(update < self.warmup, rise, 0.5 * (1 + jnp.cos(jnp.pi * progress)))
        return {label: peak * factor for label, peak in self.peaks.items()}


def schedule_of(stage: StageConfig) -> Schedule:
    """The rates that a stage's config asks for."""
    embedding = (
        stage.learning_rate
        if stage.embedding_learning_rate is None
        else stage.embedding_learning_rate
    )
    peaks = {"embedding": embedding, "lora": stage.learning_rate, "body": stage.learning_rate}
    return Schedule(peaks, float(stage.steps), float(round(stage.warmup_fraction * stage.steps)))


def make_optimizer(
    stage: StageConfig, labels: Mapping[str, Any], vocabulary: int | None = None
) -> optax.GradientTransformationExtraArgs:
    """Global-norm clipping of all trainable gradients, then AdamW by label; `frozen` leaves get no
    update.

    Its `update` takes the rates of this update as `rates`, by label (`Schedule.rates`).

    Decay is decoupled, rate x weight_decay x parameter, on matrices (embedding and head among
    them), not on norms, biases, attention sinks and other vectors.

    Args:
      stage: decay, betas, epsilon, damping and clipping.
      labels: a tree like the parameters', of `embedding`, `lora`, `body` and `frozen`.
      vocabulary: rows of embedding and head that are not padding; None: all.
    """
    trains = jax.tree.map(lambda label: label != FROZEN, labels)
    return optax.chain(
        optax.masked(optax.clip_by_global_norm(stage.optimizer.clip_norm), trains),
        optax.multi_transform(
            {
                **{
                    label: _adamw(stage, label, vocabulary)
                    for label in ("embedding", "lora", "body")
                },
                FROZEN: optax.set_to_zero(),
            },
            labels,
        ),
    )


def _adamw(stage: StageConfig, label: str, vocabulary: int | None) -> optax.GradientTransformation:
    """The rate multiplies the decoupled decay too (arXiv 1711.05101, algorithm 2)."""

    def by_rate(updates: Any, state: Any, params: Any = None, **others: Any) -> tuple[Any, Any]:
        del params
        return jax.tree.map(lambda update: -others["rates"][label] * update, updates), state

    settings = stage.optimizer
    return optax.chain(
        scale_by_damped_adam(
            settings.beta1,
            settings.beta2,
            settings.epsilon,
            settings.row_damping if label == "embedding" else 0.0,
            vocabulary,
            moments_of(settings, label),
        ),
        optax.add_decayed_weights(stage.optimizer.weight_decay, mask=_decays),
        optax.GradientTransformationExtraArgs(optax.init_empty_state, by_rate),
    )


class Moments(NamedTuple):
    """Format of Adam's moments."""

    dtype: str = "float32"
    """Of the first moments; bfloat16 ones are rounded stochastically."""
    by_row: bool = False
    """One second moment a row (`_ROW_AXES`) instead of one a parameter."""


def moments_of(settings: OptimizerConfig, label: str) -> Moments:
    """The format of the moments of parameters with a label."""
    if label == "embedding":
        return Moments(settings.moment_dtype, settings.row_second_moment)
    return Moments(settings.body_moment_dtype, settings.body_row_second_moment)


def moment_shapes(stage: StageConfig, params: paths.Tree) -> tuple[paths.Tree, paths.Tree]:
    """Shapes and types of a stage's first and second moments, for trees of trainable parameters."""
    first, second = {}, {}
    for path, leaf in paths.flatten(params).items():
        moments = moments_of(stage.optimizer, paths.label(rules_for(stage.method), path))
        shape = _row_shape(path, leaf.shape) if moments.by_row else leaf.shape
        first[path] = jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(moments.dtype))
        second[path] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return paths.unflatten(first), paths.unflatten(second)


def state_format(settings: OptimizerConfig) -> dict[str, Any]:
    """The settings that decide the format of the optimizer's state, other than the defaults."""
    default = OptimizerConfig()
    names = ("moment_dtype", "row_second_moment", "body_moment_dtype", "body_row_second_moment")
    values = {name: getattr(settings, name) for name in names}
    return {name: value for name, value in values.items() if value != getattr(default, name)}


def scale_by_damped_adam(
    beta1: float,
    beta2: float,
    epsilon: float,
    damping: float,
    vocabulary: int | None = None,
    moments: Moments = Moments(),  # noqa: B008 (immutable)
) -> optax.GradientTransformation:
    """Adam, with `damping * sqrt(mean second moment of the leaf)` added to the denominator.

    Rows of rare tokens, whose few gradients say little, then move less than others; 0: Adam. The
    mean is over the `vocabulary` rows: how many rows of padding there are depends on the mesh.

    An update uses its first moments before they are rounded to the format of `moments`.
    """
    if moments != Moments():
        return _compact_adam(beta1, beta2, epsilon, damping, vocabulary, moments)
    adam = optax.scale_by_adam(beta1, beta2, epsilon)
    if not damping:
        return adam

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        _, state = adam.update(updates, state, params)
        count = state.count.astype(jnp.float32)
        first, second = 1 - beta1**count, 1 - beta2**count

        def scaled(mu: Array, nu: Array) -> Array:
            floor = _damping_floor(nu, second, damping, vocabulary) + epsilon
            return mu / first / (jnp.sqrt(nu / second) + floor)

        return jax.tree.map(scaled, state.mu, state.nu), state

    return optax.GradientTransformation(adam.init, update)


def _damping_floor(nu: Array, correction: Array, damping: float, vocabulary: int | None) -> Array:
    return damping * jnp.sqrt(nu.sum() / nu[:vocabulary].size / correction)


def _compact_adam(
    beta1: float,
    beta2: float,
    epsilon: float,
    damping: float,
    vocabulary: int | None,
    form: Moments,
) -> optax.GradientTransformation:
    """`scale_by_damped_adam` with moments in another format than float32 ones a parameter."""

    def init(params: Any) -> optax.ScaleByAdamState:
        def second(path: Any, leaf: Array) -> Array:
            shape = _row_shape(_name(path), leaf.shape) if form.by_row else leaf.shape
            return jnp.zeros(shape, jnp.float32)

        mu = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, form.dtype), params)
        nu = jax.tree_util.tree_map_with_path(second, params)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), mu, nu)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        count = jnp.asarray(optax.safe_increment(state.count))
        steps = count.astype(jnp.float32)
        first, second = jnp.asarray(1 - beta1**steps), jnp.asarray(1 - beta2**steps)

        def of_leaf(path: str, gradient: Array, mu: Array, nu: Array) -> tuple[Array, Array, Array]:
            square = jnp.square(gradient)
            if nu.shape != square.shape:
                square = square.mean(_row_axis(path), keepdims=True)
            mu = beta1 * mu.astype(jnp.float32) + (1 - beta1) * gradient
            nu = beta2 * nu + (1 - beta2) * square
            floor = _damping_floor(nu, second, damping, vocabulary) if damping else 0.0
            scaled = mu / first / (jnp.sqrt(nu / second) + (floor + epsilon))
            if form.dtype == "bfloat16":
                mu = stochastic_round(mu, zlib.crc32(path.encode()), count)
            return scaled, mu, nu

        leaves, tree = jax.tree_util.tree_flatten_with_path(updates)
        moments = zip(jax.tree.leaves(state.mu), jax.tree.leaves(state.nu))
        results = [
            of_leaf(_name(path), gradient, mu, nu)
            for (path, gradient), (mu, nu) in zip(leaves, moments)
        ]
        scaled, mu, nu = (
            jax.tree.unflatten(tree, [result[i] for result in results]) for i in range(3)
        )
        return scaled, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _row_axis(path: str) -> int | None:
    return paths.label(_ROW_AXES, path)


def _row_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a second moment by row."""
    if (axis := _row_axis(path)) is None:
        return shape
    axis %= len(shape)
    return (*shape[:axis], 1, *shape[axis + 1 :])


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _decays(tree: Any) -> Any:
    """True for matrices, by name: norm scales are stacked over layers, so their rank does not
    tell.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: paths.label(_DECAY_RULES, _name(path)) == "decays",
        tree,
    )
