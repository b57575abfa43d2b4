"""States of the model after stages of a run."""

from collections.abc import Sequence
from pathlib import Path

from tokalign_jax.errors import UserError
from tokalign_jax.initialization import initialization
from tokalign_jax.models import hub, huggingface, quantized
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.pipeline.context import Context
from tokalign_jax.text import shared_boundaries, tokenizing
from tokalign_jax.text.canonical import vocabulary_size
from tokalign_jax.training import loop
from tokalign_jax.training import states as training_states


def load_state(
    context: Context,
    states: Sequence[str],
    dtype: huggingface.DtypeOf = lambda path: None,
    kind: quantized.Kind | None = None,
) -> tuple[ModelConfig, dict]:
    """Load the model after the last of `states`, on the mesh, with adapters merged.

    Args:
      states: `init` and the training stages up to the state; empty: the source model, with rows
        that are not finite replaced (`initialization.usable`).
      dtype: returns the dtype of a parameter by its path; None: as stored.
      kind: the format of quantized projections; None: nothing is quantized.
    """
    folder, config, changes = state_of(context, states)
    params = training_states.assemble(folder, config, changes, dtype, context.mesh, kind)
    if not states:
        params, _ = initialization.usable(params, vocabulary_size(context.inputs.source_tokenizer))
    return config, params


def state_of(
    context: Context, states: Sequence[str]
) -> tuple[Path, ModelConfig, training_states.Changes]:
    """Return the folder of a state's stored weights, its config, and the changes by training."""
    folder = context.folder("init") if states else context.inputs.source_folder
    config, _ = hub.load_config(folder)
    trained = [(context.folder(name), getattr(context.config, name)) for name in states[1:]]
    return folder, config, training_states.load_changes(config, trained, context.mesh)


def has_tokens(context: Context) -> bool:
    """Return whether the token shards of both sides are complete."""
    try:
        for side in tokenizing.SIDES:
            open_shards(context, side)
    except UserError:
        return False
    return True


def open_shards(context: Context, side: str) -> tokenizing.TokenShards:
    """Open the token shards of a side, `source` or `target`."""
    return tokenizing.TokenShards.open(context.folder("tokens") / side)


def has_boundaries(context: Context) -> bool:
    """Return whether the shared boundaries are complete."""
    try:
        shared_boundaries.open_positions(context.folder("boundaries"))
    except UserError:
        return False
    return True


def has_model(context: Context, name: str) -> bool:
    """Return whether a stage's folder holds a complete model, judged by file sizes."""
    try:
        config, _ = hub.load_config(context.folder(name))
        huggingface.check_weights(context.folder(name), config)
    except UserError:
        return False
    return True


def is_trained(context: Context, name: str) -> bool:
    """Return whether the last checkpoint of a training stage exists."""
    return loop.is_finished(context.folder(name), getattr(context.config, name))
