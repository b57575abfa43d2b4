"""Arcee (AFM) and Nemotron: LLaMA with a feed-forward of two matrices and the square of ReLU.

Nemotron has layer norms that multiply with 1 + w, and rotates a part of each head.
"""

from tokalign_jax.models.config import LayerKind, ModelConfig
from tokalign_jax.models.families import llama, reading
from tokalign_jax.models.families.reading import Raw, required

MODEL_TYPES = ("arcee", "nemotron")

BUFFERS, HEAD, weights = llama.BUFFERS, llama.HEAD, llama.weights


def config_from_hf(raw: Raw) -> ModelConfig:
    """The constants of an Arcee or Nemotron model.

    `attention_bias` and `mlp_bias` are off where the file leaves them out, and
    `partial_rotary_factor` (Nemotron) is then 0.5, as in their classes.

    Raises:
      UserError: a constant is missing, or a flag asks for what is not implemented.
    """
    nemotron = raw["model_type"] == "nemotron"
    known = ("attention_bias", "mlp_bias")
    reading.check_flags(raw, (*known, "partial_rotary_factor") if nemotron else known)
    bias = raw.get("attention_bias", False)
    own = (
        {
            "norm": "layer",
            "norm_bias": True,
            "norm_plus_one": True,
            "norm_epsilon": required(raw, "norm_eps"),
        }
        if nemotron
        else {}
    )
    rope = reading.rope(raw, fraction=0.5 if nemotron else None)
    return reading.decoder(
        raw,
        attention_bias=bias,
        attention_out_bias=bias,
        mlp_bias=raw.get("mlp_bias", False),
        gated_mlp=False,
        layer_kinds=reading.uniform(raw, LayerKind(rope)),
        **own,
    )
