"""AdamW with a rate of its own for each kind of parameter that a stage trains."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from tokalign_jax.config import StageConfig
from tokalign_jax.utils import paths

FROZEN = "frozen"

_VOCABULARY_RULE = (r"^(embed_tokens|lm_head)/", "embedding")
_RULES: dict[str, tuple[tuple[str, str], ...]] = {
    "embedding": (_VOCABULARY_RULE, ("", FROZEN)),
    "lora": (_VOCABULARY_RULE, (r"/lora_[ab]$", "lora"), ("", FROZEN)),
    "full": (_VOCABULARY_RULE, ("", "body")),
}
_DECAY_RULES = ((r"(^|/)(scale|bias)$", "keeps"), ("", "decays"))


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
    them), not on norms and biases.

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

    return optax.chain(
        scale_by_damped_adam(
            stage.optimizer.beta1,
            stage.optimizer.beta2,
            stage.optimizer.epsilon,
            stage.optimizer.row_damping if label == "embedding" else 0.0,
            vocabulary,
        ),
        optax.add_decayed_weights(stage.optimizer.weight_decay, mask=_decays),
        optax.GradientTransformationExtraArgs(optax.init_empty_state, by_rate),
    )


def scale_by_damped_adam(
    beta1: float, beta2: float, epsilon: float, damping: float, vocabulary: int | None = None
) -> optax.GradientTransformation:
    """Adam, with `damping * sqrt(mean second moment of the leaf)` added to the denominator.

    Rows of rare tokens, whose few gradients say little, then move less than others; 0: Adam. The
    mean is over the `vocabulary` rows: how many rows of padding there are depends on the mesh.
    """
    adam = optax.scale_by_adam(beta1, beta2, epsilon)
    if not damping:
        return adam

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        _, state = adam.update(updates, state, params)
        count = state.count.astype(jnp.float32)
        first, second = 1 - beta1**count, 1 - beta2**count

        def scaled(mu: Array, nu: Array) -> Array:
            mean = nu.sum() / nu[:vocabulary].size
            floor = damping * jnp.sqrt(mean / second) + epsilon
            return mu / first / (jnp.sqrt(nu / second) + floor)

        return jax.tree.map(scaled, state.mu, state.nu), state

    return optax.GradientTransformation(adam.init, update)


def _decays(tree: Any) -> Any:
    """True for matrices, by name: norm scales are stacked over layers, so their rank does not
    tell.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: (
            paths.label(_DECAY_RULES, jax.tree_util.keystr(path, simple=True, separator="/"))
            == "decays"
        ),
        tree,
    )
