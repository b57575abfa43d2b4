"""Mistral: LLaMA in which every layer may have a window."""

from tokalign_jax.models.config import LayerKind, ModelConfig
from tokalign_jax.models.families import llama, reading
from tokalign_jax.models.families.reading import Raw

MODEL_TYPES = ("mistral",)

BUFFERS, HEAD, weights = llama.BUFFERS, llama.HEAD, llama.weights


def config_from_hf(raw: Raw) -> ModelConfig:
    """The constants of a Mistral model.

    Raises:
      UserError: a constant is missing, or a flag asks for what is not implemented.
    """
    reading.check_flags(raw, ("sliding_window",))
    kind = LayerKind(reading.rope(raw), reading.nullable(raw, "sliding_window"))
    return reading.decoder(raw, layer_kinds=reading.uniform(raw, kind))
