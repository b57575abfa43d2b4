"""Mixtures of experts: Mixtral, which is Mistral, and Qwen 3 MoE, which is Qwen 3, with experts in the place of the MLP."""

from typing import Any

from tokalign_jax.models.config import Experts, LayerKind, ModelConfig
from tokalign_jax.models.families import llama, reading
from tokalign_jax.models.families.llama import LAYER
from tokalign_jax.models.families.reading import Raw, required
from tokalign_jax.models.weights import Weight, fused, linear

MODEL_TYPES = ("mixtral", "qwen3_moe")

BUFFERS, HEAD = llama.BUFFERS, llama.HEAD


def config_from_hf(raw: Raw) -> ModelConfig:
    """The constants of a mixture of experts. What concerns training alone (auxiliary loss, jitter) is left aside.

    `attention_bias` (Qwen 3) is younger than the format: without it there are no biases.

    Raises:
      UserError: a constant is missing, or a flag asks for what is not implemented.
    """
    return reading.decoder(
        raw, **(_mixtral(raw) if raw["model_type"] == "mixtral" else _qwen3(raw))
    )


def weights(config: ModelConfig) -> list[Weight]:
    """The weight table, with a tensor for each expert, as on the hub."""
    mixtral = config.model_type == "mixtral"
    block = f"{LAYER}.block_sparse_moe" if mixtral else f"{LAYER}.mlp"
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"} if mixtral else {}
    return [
        *_all_but_experts(config, f"{block}.gate"),
        *(
            weight
            for ours in ("gate_proj", "up_proj", "down_proj")
            for weight in linear(
                f"{block}.experts.{{index}}.{names.get(ours, ours)}",
                f"layers/mlp/experts/{ours}",
                bias=False,
                count=_experts(config).count,
            )
        ),
    ]


def packed_weights(config: ModelConfig) -> list[Weight]:
    """The weight table of checkpoints that transformers 5 writes as its modules are: the experts of a layer in one tensor."""
    path, width = "layers/mlp/experts", config.intermediate_size
    gate_up = [f"{path}/{name}/kernel" for name in ("gate_proj", "up_proj")]
    return [
        *_all_but_experts(config, f"{LAYER}.mlp.gate"),
        fused(f"{LAYER}.mlp.experts.gate_up_proj", gate_up, (width, width), outputs=-2),
        fused(
            f"{LAYER}.mlp.experts.down_proj",
            [f"{path}/down_proj/kernel"],
            (config.hidden_size,),
            outputs=-2,
        ),
    ]


def _all_but_experts(config: ModelConfig, router: str) -> list[Weight]:
    return [
        *llama.ends(config),
        *llama.norms(config),
        *llama.attention(config),
        *linear(router, "layers/mlp/router", bias=False),
    ]


def _experts(config: ModelConfig) -> Experts:
    assert config.experts is not None, "a mixture without experts"
    return config.experts


def _mixtral(raw: Raw) -> dict[str, Any]:
    reading.check_flags(raw, ("num_local_experts", "sliding_window"))
    kind = LayerKind(reading.rope(raw), raw.get("sliding_window"))
    return {
        "layer_kinds": reading.uniform(raw, kind),
        "experts": Experts(
            required(raw, "num_local_experts"),
            required(raw, "num_experts_per_tok"),
            normalized=True,
        ),
    }


def _qwen3(raw: Raw) -> dict[str, Any]:
    count = "num_experts" if "num_experts" in raw else "num_local_experts"
    known = ("attention_bias", "sliding_window", "use_sliding_window", count)
    same = raw.get("num_local_experts") == required(raw, count)  # some files have both
    reading.check_flags(raw, (*known, "num_local_experts") if same else known)
    if raw.get("decoder_sparse_step", 1) != 1:
        raise reading.refuse(raw, "decoder_sparse_step", "1: experts in every layer")
    window = required(raw, "sliding_window") if raw.get("use_sliding_window") else None
    bias = raw.get("attention_bias", False)
    return {
        "head_dim": required(raw, "head_dim"),
        "intermediate_size": required(raw, "moe_intermediate_size"),
        "layer_kinds": reading.uniform(raw, LayerKind(reading.rope(raw), window)),
        "attention_bias": bias,
        "attention_out_bias": bias,
        "query_key_norm": "head",
        "experts": Experts(
            required(raw, count),
            required(raw, "num_experts_per_tok"),
            reading.nullable(raw, "norm_topk_prob"),
        ),
    }
