"""The model as the stages so far have left it."""

from collections.abc import Sequence
from pathlib import Path

from tokalign_jax.errors import UserError
from tokalign_jax.initialization import initialization
from tokalign_jax.models import hub, huggingface
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.pipeline.context import Context
from tokalign_jax.text import shared_boundaries, tokenizing
from tokalign_jax.text.canonical import vocabulary_size
from tokalign_jax.training import loop
from tokalign_jax.training import states as training_states


def load_state(
    context: Context, states: Sequence[str], dtype: huggingface.DtypeOf = lambda path: None
) -> tuple[ModelConfig, dict]:
    """The model after the last of `states` (`init` and training stages), on the mesh, adapters
    merged.

    No states: the source model, its rows that are not finite replaced (`initialization.usable`).

    Args:
      dtype: of each parameter by its path.
    """
    folder, config, changes = state_of(context, states)
    params = training_states.assemble(folder, config, changes, dtype, context.mesh)
    if not states:
        params, _ = initialization.usable(params, vocabulary_size(context.inputs.source_tokenizer))
    return config, params


def state_of(
    context: Context, states: Sequence[str]
) -> tuple[Path, ModelConfig, training_states.Changes]:
    """Return the folder of a state's stored weights, its model, and what training has changed."""
    folder = context.folder("init") if states else context.inputs.source_folder
    config, _ = hub.load_config(folder)
    trained = [(context.folder(name), getattr(context.config, name)) for name in states[1:]]
    return folder, config, training_states.load_changes(config, trained, context.mesh)


def has_tokens(context: Context) -> bool:
    """Whether the shards of both sides are whole."""
    try:
        for side in tokenizing.SIDES:
            open_shards(context, side)
    except UserError:
        return False
    return True


def open_shards(context: Context, side: str) -> tokenizing.TokenShards:
    """The token shards of one side, `source` or `target`."""
    return tokenizing.TokenShards.open(context.folder("tokens") / side)


def has_boundaries(context: Context) -> bool:
    """Whether the shared boundaries are whole."""
    try:
        shared_boundaries.open_positions(context.folder("boundaries"))
    except UserError:
        return False
    return True


def has_model(context: Context, name: str) -> bool:
    """Whether the folder holds a whole model, as far as sizes tell."""
    try:
        config, _ = hub.load_config(context.folder(name))
        huggingface.check_weights(context.folder(name), config)
    except UserError:
        return False
    return True


def is_trained(context: Context, name: str) -> bool:
    """Whether the stage's last checkpoint is there."""
    return loop.is_finished(context.folder(name), getattr(context.config, name))
