"""GPT-2: learned positions, projections stored as [in, out], fused queries, keys and values."""

from tokalign_jax.models.config import LayerKind, ModelConfig
from tokalign_jax.models.families import reading
from tokalign_jax.models.families.reading import Raw, required
from tokalign_jax.models.weights import Weight, direct, fused, norm

MODEL_TYPES = ("gpt2",)

BUFFERS = r"attn\.(bias|masked_bias)$"
"""Tensors of old checkpoints that are not parameters."""


def config_from_hf(raw: Raw) -> ModelConfig:
    """Reads the config of a GPT-2 model.

    `tie_word_embeddings` defaults to true, `n_inner` to 4 n_embd. `scale_attn_weights` is newer
    than the format and defaults to dividing attention logits by sqrt(H). `reorder_and_upcast_attn`
    requests float32 attention logits, which are always used.

    Raises:
      UserError: a constant is missing, or an option is not implemented.
    """
    reading.check_flags(raw)
    width, heads = required(raw, "n_embd"), required(raw, "n_head")
    return reading.decoder(
        raw,
        hidden_size=width,
        num_layers=required(raw, "n_layer"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        intermediate_size=raw.get("n_inner") or 4 * width,
        activation=reading.activation(raw, "activation_function"),
        gated_mlp=False,
        norm="layer",
        norm_bias=True,
        norm_epsilon=required(raw, "layer_norm_epsilon"),
        attention_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        tie_word_embeddings=raw.get("tie_word_embeddings", True),
        max_positions=required(raw, "n_positions"),
        learned_positions=True,
        attention_scale=None if raw.get("scale_attn_weights", True) else 1.0,
        layer_kinds=(LayerKind(rope=None),) * required(raw, "n_layer"),
    )


def weights(config: ModelConfig) -> list[Weight]:
    """Returns the weight table."""
    layer, width = "transformer.h.{layer}", config.hidden_size
    qkv = [f"layers/attention/{name}" for name in ("q_proj", "k_proj", "v_proj")]
    return [
        direct("transformer.wte.weight", "embed_tokens/embedding"),
        direct("transformer.wpe.weight", "embed_positions/embedding"),
        *norm(f"{layer}.ln_1", "layers/input_norm", bias=True),
        fused(
            f"{layer}.attn.c_attn.weight",
            [f"{path}/kernel" for path in qkv],
            [width] * 3,
            outputs=-1,
        ),
        fused(
            f"{layer}.attn.c_attn.bias", [f"{path}/bias" for path in qkv], [width] * 3, outputs=-1
        ),
        *_projection(f"{layer}.attn.c_proj", "layers/attention/o_proj"),
        *norm(f"{layer}.ln_2", "layers/post_attention_norm", bias=True),
        *_projection(f"{layer}.mlp.c_fc", "layers/mlp/up_proj"),
        *_projection(f"{layer}.mlp.c_proj", "layers/mlp/down_proj"),
        *norm("transformer.ln_f", "final_norm", bias=True),
        *([] if config.tie_word_embeddings else [HEAD]),
    ]


HEAD = direct("lm_head.weight", "lm_head/kernel")


def _projection(name: str, path: str) -> list[Weight]:
    return [direct(f"{name}.weight", f"{path}/kernel"), direct(f"{name}.bias", f"{path}/bias")]
