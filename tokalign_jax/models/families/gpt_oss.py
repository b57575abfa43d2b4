"""gpt-oss: mixtures of experts with biases, attention sinks, windows in every other layer."""

import numpy as np

from tokalign_jax.errors import UserError
from tokalign_jax.models.config import ClampedSwiGLU, Experts, LayerKind, ModelConfig
from tokalign_jax.models.families import llama, reading
from tokalign_jax.models.families.llama import LAYER
from tokalign_jax.models.families.reading import FULL, SLIDING, Raw, required
from tokalign_jax.models.weights import Weight, direct, linear

MODEL_TYPES = ("gpt_oss",)

BUFFERS, HEAD = llama.BUFFERS, llama.HEAD


def config_from_hf(raw: Raw) -> ModelConfig:
    """Reads the config of a gpt-oss model.

    Keys that are newer than the format, with their defaults: `attention_bias` (true),
    `swiglu_alpha` (1.702), `swiglu_limit` (7), and `layer_types` (a window in layers 0, 2, ...).

    Raises:
      UserError: the weights are quantized, a constant is missing, or an option is not implemented.
    """
    _check_not_quantized(raw)
    reading.check_flags(
        raw, ("attention_bias", "layer_types", "num_local_experts", "sliding_window")
    )
    if reading.activation(raw) != "silu":
        raise reading.refuse(raw, "hidden_act", "silu, of which the experts use a clamped variant")
    if not raw.get("rope_scaling"):  # Without any, transformers assumes YaRN.
        required(raw, "rope_parameters")
    rope = reading.rope(raw)
    windows = {SLIDING: raw.get("sliding_window"), FULL: None}
    types = reading.layer_types(raw, lambda layer: FULL if layer % 2 else SLIDING)
    if SLIDING in types:
        required(raw, "sliding_window")
    bias = raw.get("attention_bias", True)
    return reading.decoder(
        raw,
        attention_bias=bias,
        attention_out_bias=bias,
        attention_sinks=True,
        layer_kinds=tuple(LayerKind(rope, windows[kind]) for kind in types),
        experts=Experts(
            required(raw, "num_local_experts"),
            required(raw, "num_experts_per_tok"),
            # The softmax over the chosen experts is that over all, normalized.
            normalized=True,
            bias=True,
            clamped=ClampedSwiGLU(
                alpha=required({"swiglu_alpha": 1.702, **raw}, "swiglu_alpha"),
                limit=required({"swiglu_limit": 7.0, **raw}, "swiglu_limit"),
            ),
        ),
    )


def _check_not_quantized(raw: Raw) -> None:
    quantization = raw.get("quantization_config") or {}
    if quantization.get("quant_method") == "mxfp4":
        raise UserError(
            "the weights of this gpt_oss model are quantized in MXFP4, which is not read: convert"
            " them to bfloat16 once, with transformers' from_pretrained(folder, dtype='bfloat16',"
            " quantization_config=Mxfp4Config(dequantize=True)) and save_pretrained, save the"
            " tokenizer beside them, and give that folder (docs/models.md has the commands)"
        )


def weights(config: ModelConfig) -> list[Weight]:
    """Returns the weight table; all experts of a layer share tensors [E, in, out]."""
    theirs, ours = f"{LAYER}.mlp.experts", "layers/mlp/experts"
    gate_up = [f"{ours}/{name}" for name in ("gate_proj", "up_proj")]
    return [
        *llama.outer_weights(config),
        *llama.norms(config),
        *llama.attention(config),
        direct(f"{LAYER}.self_attn.sinks", "layers/attention/sinks"),
        *linear(f"{LAYER}.mlp.router", "layers/mlp/router", bias=True),
        _interleaved(f"{theirs}.gate_up_proj", [f"{path}/kernel" for path in gate_up]),
        _interleaved(f"{theirs}.gate_up_proj_bias", [f"{path}/bias" for path in gate_up]),
        direct(f"{theirs}.down_proj", f"{ours}/down_proj/kernel"),
        direct(f"{theirs}.down_proj_bias", f"{ours}/down_proj/bias"),
    ]


packed_weights = weights


def _interleaved(name: str, leaves: list[str]) -> Weight:
    """Maps one tensor to leaves of the same shape, whose outputs alternate in it."""
    return Weight(
        name,
        tuple(leaves),
        lambda tensor: [tensor[..., i :: len(leaves)] for i in range(len(leaves))],
        lambda parts: np.stack(parts, axis=-1).reshape(*parts[0].shape[:-1], -1),
    )
