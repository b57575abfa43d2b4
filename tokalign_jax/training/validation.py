"""Next-token loss on held-out sequences while a stage trains, and the record of these losses.

The loss is the mean over all predicted tokens, without dropout, whatever the stage itself
minimises. Each checkpoint stores the record of the validations up to its step, so that a resumed
run goes on with exactly the record of an uninterrupted one.

N batches, B sequences of a batch over all devices, T tokens of a sequence.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int32

from tokalign_jax.config import ComputeConfig, StageConfig
from tokalign_jax.errors import UserError
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.lora import LoraSpec
from tokalign_jax.models.transformer import forward, head_matrix
from tokalign_jax.parallel import sharding
from tokalign_jax.training.batches import Shards, TokenSource, read_and_predicted
from tokalign_jax.training.losses import head_of, token_nll
from tokalign_jax.training.metrics import Validation
from tokalign_jax.training.step import cast_projections
from tokalign_jax.utils import paths


@dataclass(frozen=True)
class Validations:
    """The validation losses of a stage up to some step."""

    every: int
    """Steps between validations."""
    sequences: int
    """Most sequences that each of them reads."""
    losses: tuple[tuple[int, float | None], ...] = ()
    """(step, nats a token) in increasing order of steps; None: not finite."""

    @classmethod
    def of_stage(cls, stage: StageConfig) -> "Validations":
        """Return the empty record of a stage."""
        return cls(stage.validation_every, stage.validation_sequences)

    @classmethod
    def from_json(cls, content: Mapping[str, Any] | None) -> "Validations | None":
        """Return the record that `dataclasses.asdict` turned into JSON."""
        if content is None:
            return None
        return cls(**{**content, "losses": tuple((step, loss) for step, loss in content["losses"])})

    def adding(self, step: int, loss: float) -> "Validations":
        """Return the record with the validation of a further step."""
        finite = loss if math.isfinite(loss) else None
        return dataclasses.replace(self, losses=(*self.losses, (step, finite)))

    @property
    def best(self) -> int | None:
        """The step with the lowest loss, the earliest of equal ones; None: there is no loss."""
        finite = [(loss, step) for step, loss in self.losses if loss is not None]
        return min(finite)[1] if finite else None

    def covers(self, stage: StageConfig, done: int) -> bool:
        """Check that these are all validations of the stage in its first `done` steps."""
        due = [step for step in range(1, done + 1) if is_due(stage, step)]
        return self == dataclasses.replace(self.of_stage(stage), losses=self.losses) and due == [
            step for step, _ in self.losses
        ]


def is_due(stage: StageConfig, step: int) -> bool:
    """Return True if a stage validates after this step (from 1)."""
    if not stage.validation_every:
        return False
    return step % stage.validation_every == 0 or step == stage.steps


def count(stage: StageConfig) -> int:
    """Number of validations of a whole stage."""
    return -(-stage.steps // stage.validation_every) if stage.validation_every else 0


def held_out_sequences(shards: Shards, length: int, most: int) -> Int32[np.ndarray, "S T+1"]:
    """The first sequences of held-out text, at most `most`; the last is filled with ignored tokens.

    Raises:
      UserError: the text has no token to predict.
    """
    tokens = np.asarray(shards.tokens[: most * length + 1])
    rows = max(0, -(-(len(tokens) - 1) // length))
    padded = np.zeros(rows * length + 1, tokens.dtype)
    padded[: len(tokens)] = tokens[: len(padded)]
    filling = np.array([[len(tokens), len(padded)]], np.int64)
    unlearned = shards.unlearned[shards.unlearned[:, 0] < len(tokens)]
    unlearned = np.concatenate([np.minimum(unlearned, len(tokens)), filling])
    source = TokenSource(_Padded(padded, shards.opening, unlearned), length)
    sequences = [source[index] for index in range(len(source))]
    if not any((sequence[1:] >= 0).any() for sequence in sequences):
        raise UserError(
            f"the held-out text has no token to validate on ({len(shards.tokens):,} tokens): set"
            " validation_every=0, or hold out more text (text.held_out_fraction)"
        )
    return np.stack(sequences)


@dataclass(frozen=True)
class _Padded:
    """Shards in memory."""

    tokens: np.ndarray
    opening: int | None
    unlearned: np.ndarray


def batched(
    sequences: Int32[np.ndarray, "S T+1"], micro_batch: int, mesh: Mesh
) -> Int32[Array, "N B T+1"]:
    """Sequences in batches of at most `micro_batch` on the mesh, filled up with ignored ones."""
    devices = sharding.sequences_at_once(mesh)
    size = min(micro_batch, -(-len(sequences) // devices) * devices)
    missing = -len(sequences) % size
    ignored = np.full((missing, sequences.shape[1]), ~0, sequences.dtype)
    batches = np.concatenate([sequences, ignored]).reshape(-1, size, sequences.shape[1])
    return sharding.put(batches, NamedSharding(mesh, P(None, sharding.BATCH)))


class Measure(Protocol):
    """Mean next-token loss (nats) of parameters on held-out batches."""

    def __call__(self, trained: Any, *, frozen: Any, batches: Array) -> float:
        """Measure a model whose parameters are split in `trained` and `frozen`."""
        ...


class Validator:
    """Validates the states of a stage and keeps the record."""

    def __init__(self, measure: Callable[[Any], float], sequences: int, record: Validations):
        """Go on with a record.

        Args:
          measure: trained parameters -> loss.
          sequences: held-out sequences that it reads.
          record: the validations so far.
        """
        self._measure, self._sequences, self.record = measure, sequences, record

    def __call__(self, step: int, trained: Any) -> Validation:
        """Validate the trained parameters after a step and add it to the record."""
        begun = time.monotonic()
        loss = self._measure(trained)
        self.record = self.record.adding(step, loss)
        return Validation(loss, time.monotonic() - begun, self._sequences, self.record.best)


def make_measure(
    model: ModelConfig, compute: ComputeConfig, lora: LoraSpec | None, mesh: Mesh
) -> Measure:
    """Make the function that measures a model on held-out batches (`batched`).

    Of several processes all call it together, and all get the same bits.
    """
    dtype = jnp.dtype(compute.dtype)
    head = head_of(model, compute)

    @jax.jit
    def totals(
        trainable: Any, frozen: Any, batches: Int32[Array, "N B T+1"]
    ) -> tuple[Float[Array, "N B"], Int32[Array, "N B"]]:
        params = paths.merge(cast_projections(trainable, dtype), frozen)

        def of_batch(tokens: Int32[Array, "B T+1"]) -> tuple[Array, Array]:
            inputs, labels = read_and_predicted(tokens)
            hidden = forward(model, params, inputs, lora=lora, dtype=dtype, unroll=compute.unroll)
            nll = token_nll(hidden, head_matrix(params), labels, head)
            return nll.sum(axis=1), jnp.sum(labels >= 0, axis=1, dtype=jnp.int32)

        with sharding.within(mesh):
            sums = jax.lax.map(of_batch, batches)
            return jax.tree.map(lambda x: sharding.constrain(x, None, None), sums)

    def measure(trained: Any, *, frozen: Any, batches: Array) -> float:
        # Summed in float64 on the host, so that it does not depend on how sequences are batched.
        nats, tokens = jax.device_get(totals(trained, frozen, batches))
        return float(nats.sum(dtype=np.float64) / tokens.sum())

    return measure
