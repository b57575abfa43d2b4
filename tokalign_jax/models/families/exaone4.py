"""EXAONE 4: norms after attention and feed-forward only, and on queries and keys of each head.

If some layers have a window, the others have no rotary embedding.
"""

from tokalign_jax.models.config import LayerKind, ModelConfig
from tokalign_jax.models.families import llama, reading
from tokalign_jax.models.families.reading import FULL, SLIDING, Raw, nullable, required

MODEL_TYPES = ("exaone4",)

BUFFERS, HEAD, weights = llama.BUFFERS, llama.HEAD, llama.weights


def config_from_hf(raw: Raw) -> ModelConfig:
    """Reads the config of an EXAONE 4 model.

    Without `layer_types`, every `sliding_window_pattern`th layer has no window.

    Raises:
      UserError: a constant is missing, or an option is not implemented.
    """
    reading.check_flags(raw, ("layer_types", "sliding_window"))
    return reading.decoder(
        raw, layer_kinds=_layer_kinds(raw), norm_placement="after", query_key_norm="head"
    )


def _layer_kinds(raw: Raw) -> tuple[LayerKind, ...]:
    rope, window = reading.rope(raw), nullable(raw, "sliding_window")
    if window is None:
        if SLIDING in (raw.get("layer_types") or ()):
            raise reading.refuse(raw, "layer_types", f"only '{FULL}' without sliding_window")
        return reading.uniform_layers(raw, LayerKind(rope))

    def default(layer: int) -> str:
        return SLIDING if (layer + 1) % required(raw, "sliding_window_pattern") else FULL

    kinds = {SLIDING: LayerKind(rope, window), FULL: LayerKind(None)}
    return tuple(kinds[kind] for kind in reading.layer_types(raw, default))
