"""Every key of a family's config class in transformers is read, refused, or known to be
irrelevant.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from transformers import AutoConfig

from tests.models.parity_cases import Case, cases_of, settings
from tokalign_jax.errors import UserError
from tokalign_jax.models import families

WITHOUT_EFFECT = {
    # About how a model is held, called or trained, not about its function.
    "_name_or_path",
    "architectures",
    "chunk_size_feed_forward",
    "dtype",
    "id2label",
    "initializer_range",
    "is_decoder",
    "is_encoder_decoder",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pretraining_tp",
    "problem_type",
    "reorder_and_upcast_attn",  # attention logits are float32 anyway
    "return_dict",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "transformers_version",
    "use_cache",
    "num_nextn_predict_layers",  # for multi-token prediction, which is not read
    # Dropout, which pre-training had.
    "attention_dropout",
    "attn_pdrop",
    "classifier_dropout",
    "embd_pdrop",
    "embedding_dropout",
    "hidden_dropout",
    "resid_pdrop",
    "residual_dropout",
    # Of a pooled classifier on top (GPT-2).
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
    # Of token ids, which the new tokenizer brings.
    "bos_token_id",
    "eod_token_id",
    "eos_token_id",
    "pad_token_id",
}
ONLY_WITH = {
    # Read where another key switches them on.
    "interleave_moe_layer_step": "moe_layers",
    "max_window_layers": "use_sliding_window",
    "no_rope_layer_interval": "no_rope_layers",
    "sliding_window": "use_sliding_window",
    "sliding_window_pattern": "layer_types",
    "_sliding_window_pattern": "layer_types",
    "layer_types": "use_sliding_window",
    "full_attn_idxs": "layer_types",
    "original_max_position_embeddings": "rope_parameters",
    "intermediate_size": "moe_intermediate_size",
    "use_sliding_window": "layer_types",
}
OF_MAMBA = ("mamba_", "time_step_limit", "num_experts_per_tok", "intermediate_size")
"""Keys of layers and experts that the supported Granite 4 models lack."""


def _others(value: Any) -> Iterator[Any]:
    """Values of the same type that mean something else."""
    match value:
        case bool():
            yield not value
        case int() | float():
            yield value * 2 or 2
            yield value + 1
        case str():
            yield "another"
        case None:
            yield 3
            yield True
        case list():
            yield value[::-1] or [0]
            yield ["another"] * len(value)
        case dict():
            yield value | {"rope_theta": 77.0}
            yield {
                key: inner | {"rope_theta": 77.0} if isinstance(inner, dict) else inner
                for key, inner in value.items()
            }


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_every_config_key_is_read_refused_or_known_to_be_irrelevant(family):
    case: Case = cases_of(family)[0]
    raw = AutoConfig.for_model(family, **settings(case)).to_dict()
    known = families.config_from_hf(raw)

    def counts(key: str) -> bool:
        for other in _others(raw[key]):
            try:
                if families.config_from_hf({**raw, key: other}) != known:
                    return True
            except UserError:
                return True
        return False

    keys = AutoConfig.for_model(family).to_dict()
    idle = {key for key in keys if key not in WITHOUT_EFFECT and not counts(key)}
    explained = {
        key
        for key in idle
        if ONLY_WITH.get(key) in raw or (family == "granitemoehybrid" and key.startswith(OF_MAMBA))
    }
    assert idle == explained
