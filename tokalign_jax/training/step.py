"""One optimizer step, pure: (state, frozen parameters, batch, key) -> (state, metrics).

A accumulation (micro-batches), B sequences of a micro-batch over all devices, T tokens of a sequence.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int32

from tokalign_jax import paths
from tokalign_jax.config import ComputeConfig, StageConfig
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.lora import LoraSpec
from tokalign_jax.models.transformer import forward, head_matrix
from tokalign_jax.training.losses import cross_entropy
from tokalign_jax.training.optimizer import make_schedule
from tokalign_jax.training.sharding import BATCH, DATA, REPLICATED

Loss = Callable[[Any, Any, Array, Array], Float[Array, ""]]
"""(trainable, frozen, tokens [B, T + 1], key) -> mean negative log-likelihood, nats a token."""
Metrics = dict[str, Array]
Step = Callable[["TrainState", Any, Array, Array], tuple["TrainState", Metrics]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a step changes."""

    step: Int32[Array, ""]
    """Steps done, skipped ones included: batches read."""
    params: Any
    """What trains, in float32."""
    opt_state: Any
    skipped: Int32[Array, ""]
    """Steps whose loss or gradient was not finite; they changed nothing but these counters."""
    skipped_in_a_row: Int32[Array, ""]


def init_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step. Three zeros, not one thrice: each buffer is donated."""
    counters = {name: jnp.zeros((), jnp.int32) for name in ("step", "skipped", "skipped_in_a_row")}
    return TrainState(params=params, opt_state=optimizer.init(params), **counters)


def make_loss(model_config: ModelConfig, compute: ComputeConfig, lora: LoraSpec | None) -> Loss:
    """The language-model loss over parameters that are split in a trainable and a frozen tree."""
    dtype = jnp.dtype(compute.dtype)

    def loss(trainable: Any, frozen: Any, tokens: Int32[Array, "B T+1"], key: Array) -> Float[Array, ""]:
        params = paths.merge(trainable, frozen)
        hidden = forward(
            model_config, params, tokens[:, :-1], lora=lora, dropout_key=key, dtype=dtype, remat=compute.remat
        )
        total, count = cross_entropy(hidden, head_matrix(params), tokens[:, 1:], compute.loss_chunk, dtype)
        return total / count

    return loss


def make_train_step(loss: Loss, optimizer: optax.GradientTransformation, stage: StageConfig, mesh: Mesh) -> Step:
    """The jitted step; it donates the state it is given.

    Gradients are accumulated over the A micro-batches on each device by itself and averaged over the devices once. A
    step whose loss or gradient norm is not finite leaves everything but the counters as it was, the optimizer's own
    count included, so the learning rate goes by the steps that did count.

    Metrics (scalars): loss (nats a token), gradient_norm (before clipping), learning_rate (of `stage.learning_rate`'s
    parameters), finite, tokens (of the step), skipped, skipped_in_a_row.
    """
    schedule = make_schedule(stage.learning_rate, stage.steps, stage.warmup_fraction)

    def local_gradients(params: Any, frozen: Any, batch: Array, key: Array) -> tuple[Array, Any]:
        """Mean loss and gradients over all devices; what is in here is one device's."""
        key = jax.random.fold_in(key, jax.lax.axis_index(DATA))

        def micro_batch(sums: Any, item: tuple[Array, Array]) -> tuple[Any, None]:
            index, tokens = item
            new = jax.value_and_grad(loss)(params, frozen, tokens, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, sums, new), None

        zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        sums, _ = jax.lax.scan(micro_batch, zeros, (jnp.arange(len(batch)), batch))
        return jax.tree.map(lambda x: jax.lax.pmean(x / len(batch), DATA), sums)

    gradients_of = jax.shard_map(
        local_gradients,
        mesh=mesh,
        in_specs=(REPLICATED, REPLICATED, BATCH, REPLICATED),
        out_specs=REPLICATED,
        check_vma=False,  # otherwise every micro-batch would be averaged over the devices on its own
    )

    def train_step(
        state: TrainState, frozen: Any, batch: Int32[Array, "A B T+1"], key: Array
    ) -> tuple[TrainState, Metrics]:
        value, gradients = gradients_of(state.params, frozen, batch, jax.random.fold_in(key, state.step))
        norm = optax.global_norm(gradients)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        changed = optax.apply_updates(state.params, updates), opt_state
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), changed, (state.params, state.opt_state)
        )
        after = TrainState(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            skipped=state.skipped + ~finite,
            skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
        )
        sequences, length = batch.shape[0] * batch.shape[1], batch.shape[2] - 1
        metrics = {
            "loss": value,
            "gradient_norm": norm,
            "learning_rate": schedule(state.step - state.skipped),
            "finite": finite,
            "tokens": jnp.asarray(sequences * length, jnp.int32),
            "skipped": after.skipped,
            "skipped_in_a_row": after.skipped_in_a_row,
        }
        return after, metrics

    replicated, split = NamedSharding(mesh, REPLICATED), NamedSharding(mesh, BATCH)
    return jax.jit(
        train_step,
        in_shardings=(replicated, replicated, split, replicated),
        out_shardings=(replicated, replicated),
        donate_argnums=0,
    )
