"""Apertus: norms on queries and keys, ungated feed-forward, activation with parameters."""

from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.families import llama, reading
from tokalign_jax.models.families.reading import Raw
from tokalign_jax.models.weights import Weight, direct

MODEL_TYPES = ("apertus",)

BUFFERS, HEAD = llama.BUFFERS, llama.HEAD


def config_from_hf(raw: Raw) -> ModelConfig:
    """Reads the config of an Apertus model.

    Raises:
      UserError: a constant is missing, or an option is not implemented.
    """
    reading.check_flags(raw, ("attention_bias",))
    bias = raw.get("attention_bias", False)
    is_xielu = raw.get("hidden_act") == "xielu"
    return reading.decoder(
        raw,
        activation="xielu" if is_xielu else reading.activation(raw),
        attention_bias=bias,
        attention_out_bias=bias,
        gated_mlp=False,
        query_key_norm="head",
    )


def weights(config: ModelConfig) -> list[Weight]:
    """Returns the weight table."""
    names = {"input_norm": "attention_layernorm", "post_attention_norm": "feedforward_layernorm"}
    xielu = {
        "alpha_p": "alpha_positive",
        "alpha_n": "alpha_negative",
        "beta": "beta",
        "eps": "epsilon",
    }
    return [
        *llama.weights(config, names),
        *(
            direct(f"{llama.LAYER}.mlp.act_fn.{theirs}", f"layers/mlp/xielu/{ours}")
            for theirs, ours in xielu.items()
            if config.activation == "xielu"
        ),
    ]
