"""AdamW with a rate of its own for each kind of parameter that a stage trains."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from tokalign_jax import paths
from tokalign_jax.config import StageConfig

FROZEN = "frozen"

_VOCABULARY_RULE = (r"^(embed_tokens|lm_head)/", "embedding")
_RULES: dict[str, tuple[tuple[str, str], ...]] = {
    "embedding": (_VOCABULARY_RULE, ("", FROZEN)),
    "lora": (_VOCABULARY_RULE, (r"/lora_[ab]$", "lora"), ("", FROZEN)),
    "full": (_VOCABULARY_RULE, ("", "body")),
}
_DECAY_RULES = ((r"(^|/)(scale|bias)$", "keeps"), ("", "decays"))


def rules_for(method: str) -> tuple[tuple[str, str], ...]:
    """The path rules of a stage: which parameters are `embedding` (and head), `lora`, `body` or `frozen`."""
    return _RULES[method]


def make_schedule(peak: float, steps: int, warmup_fraction: float) -> Callable[[Any], Array]:
    """Update number (from 0) -> learning rate: a line up to `peak` over the warm-up, then a cosine to 0.

    With W warm-up updates of S, update u takes peak (u + 1) / (W + 1) before W, then peak (1 + cos(pi (u - W) / (S -
    W))) / 2: it is 0 just before the first update and just after the last, and no update is spent at rate 0.
    """
    warmup = round(warmup_fraction * steps)

    def rate(update: Any) -> Array:
        update = jnp.asarray(update, jnp.float32)
        rise = (update + 1) / (warmup + 1)
        progress = jnp.clip((update - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        return peak * jnp.where(update < warmup, rise, 0.5 * (1 + jnp.cos(jnp.pi * progress)))

    return rate


def make_optimizer(stage: StageConfig, labels: Mapping[str, Any]) -> optax.GradientTransformation:
    """Clips the gradient of all that trains by its global norm, then AdamW by label; `frozen` leaves get no update.

    Decay is decoupled, rate x weight_decay x parameter, on matrices (embedding and head among them), not on norms and
    biases.

    Args:
      stage: rates, decay, betas, clipping and the length of the schedule.
      labels: a tree like the parameters', of `embedding`, `lora`, `body` and `frozen`.
    """
    embedding_rate = stage.learning_rate if stage.embedding_learning_rate is None else stage.embedding_learning_rate
    trains = jax.tree.map(lambda label: label != FROZEN, labels)
    return optax.chain(
        optax.masked(optax.clip_by_global_norm(stage.clip_norm), trains),
        optax.multi_transform(
            {
                "embedding": _adamw(stage, embedding_rate),
                "lora": _adamw(stage, stage.learning_rate),
                "body": _adamw(stage, stage.learning_rate),
                FROZEN: optax.set_to_zero(),
            },
            labels,
        ),
    )


def _adamw(stage: StageConfig, peak: float) -> optax.GradientTransformation:
    schedule = make_schedule(peak, stage.steps, stage.warmup_fraction)
    return optax.adamw(schedule, stage.beta1, stage.beta2, weight_decay=stage.weight_decay, mask=_decays)


def _decays(tree: Any) -> Any:
    """True where a leaf is a matrix. By name: norm scales are stacked over the layers, so their rank says nothing."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: paths.label(_DECAY_RULES, jax.tree_util.keystr(path, simple=True, separator="/")) == "decays",
        tree,
    )
