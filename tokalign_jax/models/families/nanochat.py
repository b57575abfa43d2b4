"""nanochat: norms without parameters, also on the embedding; rotary embedding of opposite sign."""

from collections.abc import Sequence

from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.families import llama, reading
from tokalign_jax.models.families.reading import Raw
from tokalign_jax.models.weights import Weight

MODEL_TYPES = ("nanochat",)

BUFFERS, HEAD = llama.BUFFERS, llama.HEAD


def config_from_hf(raw: Raw) -> ModelConfig:
    """Reads the config of a nanochat model.

    Raises:
      UserError: a constant is missing, or an option is not implemented.
    """
    reading.check_flags(raw, ("attention_bias", "final_logit_softcapping"))
    bias = raw.get("attention_bias", False)
    return reading.decoder(
        raw,
        attention_bias=bias,
        attention_out_bias=bias,
        gated_mlp=False,
        embedding_norm=True,
        norm_scale=False,
        query_key_norm="head",
        rotate_before_norm=True,
        logit_softcap=reading.nullable(raw, "final_logit_softcapping"),
    )


def weights(config: ModelConfig) -> list[Weight]:
    """Returns the weight table."""
    names = {"mlp/up_proj": "mlp.fc1", "mlp/down_proj": "mlp.fc2"}
    return llama.weights(config, names, order=_swapped_order(config))


def _swapped_order(config: ModelConfig) -> Sequence[int]:
    """Returns the permutation that swaps the elements of each pair, which negates the angle."""
    half = config.head_dim // 2
    return [*range(half, 2 * half), *range(half)]
