"""Mistral and Ministral: LLaMA with windows; Ministral 3's queries grow with their position."""

from tokalign_jax.models.config import LayerKind, ModelConfig, QueryGrowth
from tokalign_jax.models.families import llama, reading
from tokalign_jax.models.families.reading import FULL, SLIDING, Raw, nullable, required

MODEL_TYPES = ("mistral", "ministral", "ministral3")

BUFFERS, HEAD, weights = llama.BUFFERS, llama.HEAD, llama.weights


def config_from_hf(raw: Raw) -> ModelConfig:
    """Reads the config of a Mistral model.

    Ministral without `layer_types` has the window in all layers. Ministral 3's rotary settings
    include `llama_4_scaling_beta`, the growth of its queries.

    Raises:
      UserError: a constant is missing, or an option is not implemented.
    """
    if raw["model_type"] == "ministral":
        return _ministral(raw)
    reading.check_flags(raw, ("sliding_window",))
    growth, rotary = None, raw
    if raw["model_type"] == "ministral3":
        settings = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
        beta = settings.pop("llama_4_scaling_beta", None)
        if beta:
            growth = QueryGrowth(
                float(beta), int(required(settings, "original_max_position_embeddings"))
            )
        rotary = {**raw, "rope_parameters": settings, "rope_scaling": None}
    kind = LayerKind(reading.rope(rotary), nullable(raw, "sliding_window"), growth)
    return reading.decoder(raw, layer_kinds=reading.uniform_layers(raw, kind))


def _ministral(raw: Raw) -> ModelConfig:
    reading.check_flags(raw, ("sliding_window", "layer_types"))
    rope, window = reading.rope(raw), nullable(raw, "sliding_window")
    types = reading.layer_types(raw, lambda layer: FULL if window is None else SLIDING)
    if SLIDING in types and window is None:
        raise reading.refuse(raw, "layer_types", f"'{SLIDING}' only with sliding_window")
    kinds = tuple(LayerKind(rope, window if kind == SLIDING else None) for kind in types)
    return reading.decoder(raw, layer_kinds=kinds)
