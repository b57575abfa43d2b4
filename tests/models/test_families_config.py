"""config.json by family: old and new spellings, defaults, and what is refused."""

import pytest
from safetensors.numpy import save_file

from tests.models.parity_cases import CASES, TOKENIZER, Case, cases_of, model, pair, stored
from tokalign_jax.errors import UserError
from tokalign_jax.models import families, hub, huggingface
from tokalign_jax.models.families.reading import FULL, SLIDING
from tokalign_jax.models.rotary import DynamicScaling, LinearScaling, LongRopeScaling, YarnScaling

LAYERS = 8
BASE = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "rope_theta": 5000.0,
    "tie_word_embeddings": False,
}
_GRANITE_MOE = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.015,
    "logits_scaling": 8.0,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}
_SHARED_EXPERT = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}
RAW = {
    "llama": {},
    "qwen2": {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 4},
    "qwen3": {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 4},
    "mistral": {"sliding_window": 4096},
    "gemma": {"hidden_act": "gelu"},
    "gemma2": {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 64,
        "sliding_window": 512,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 64,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "rope_local_base_freq": 10.0,
    },
    "phi3": {"sliding_window": None, "original_max_position_embeddings": 4096},
    "smollm3": {"no_rope_layer_interval": 4},
    "olmo2": {},
    "olmo3": {"sliding_window": 512},
    "stablelm": {"layer_norm_eps": 1e-5, "partial_rotary_factor": 0.25},
    "granite": {
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.015,
        "logits_scaling": 8.0,
    },
    "granitemoehybrid": {
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.015,
        "logits_scaling": 8.0,
        "layer_types": ["attention"] * LAYERS,
        "shared_intermediate_size": 48,
        "position_embedding_type": "rope",
        "num_local_experts": 0,
    },
    "lfm2": {
        "norm_eps": 1e-5,
        "conv_L_cache": 3,
        "conv_bias": False,
        "block_auto_adjust_ff_dim": True,
        "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0,
        "full_attn_idxs": [2, 5],
    },
    "lfm2_moe": {
        "norm_eps": 1e-5,
        "conv_L_cache": 3,
        "conv_bias": False,
        "layer_types": ["conv", FULL] * (LAYERS // 2),
        "num_dense_layers": 2,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "use_expert_bias": True,
        "routed_scaling_factor": 1.0,
    },
    "llama4_text": {
        "head_dim": 8,
        "intermediate_size_mlp": 96,
        "num_local_experts": 8,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "no_rope_layers": [],
        "no_rope_layer_interval": 4,
        "attention_chunk_size": 64,
        "use_qk_norm": True,
        "attn_temperature_tuning": True,
        "attn_scale": 0.1,
        "floor_scale": 8192,
    },
    "glm4_moe": {
        "head_dim": 8,
        "moe_intermediate_size": 24,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "use_qk_norm": False,
        "partial_rotary_factor": 0.5,
    },
    "qwen3_5_text": _DELTA,
    "qwen3_5_moe_text": {**_DELTA, **_SHARED_EXPERT},
    "qwen3_next": {**_DELTA, **_SHARED_EXPERT, "norm_topk_prob": True},
    "ministral": {"sliding_window": 512},
    "ministral3": {"sliding_window": None},
    "olmo": {},
    "exaone4": {"sliding_window": 512, "sliding_window_pattern": 4},
    "seed_oss": {"attention_bias": True, "attention_out_bias": False},
    "arcee": {"hidden_act": "relu2"},
    "nemotron": {"hidden_act": "relu2", "norm_eps": 1e-5, "partial_rotary_factor": 0.5},
    "hunyuan_v1_dense": {"use_qk_norm": True},
    "starcoder2": {"norm_epsilon": 1e-5, "use_bias": True, "sliding_window": 4096},
    "cohere": {"layer_norm_eps": 1e-5, "logit_scale": 0.0625},
    "cohere2": {
        "layer_norm_eps": 1e-5,
        "logit_scale": 0.25,
        "sliding_window": 512,
        "sliding_window_pattern": 4,
    },
    "glm": {"attention_bias": True, "partial_rotary_factor": 0.5},
    "glm4": {"attention_bias": True, "partial_rotary_factor": 0.5},
    "ernie4_5": {"use_bias": False},
    "helium": {},
    "apertus": {"hidden_act": "xielu"},
    "nanochat": {"hidden_act": "relu2", "final_logit_softcapping": 15.0},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None},
    "granitemoe": _GRANITE_MOE,
    "granitemoeshared": {**_GRANITE_MOE, "shared_intermediate_size": 24},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": False},
    "qwen2_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "norm_topk_prob": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
    },
    "gpt_oss": {
        "head_dim": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": 128,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    },
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "use_sliding_window": False,
        "sliding_window": None,
    },
    "gpt2": {
        "n_embd": 32,
        "n_layer": LAYERS,
        "n_head": 4,
        "n_positions": 64,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
    },
    "gpt_neox": {
        "layer_norm_eps": 1e-5,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000,
        "hidden_act": "gelu",
    },
}


def _raw(family: str, **changes) -> dict:
    return {**BASE, "model_type": family, **RAW[family], **changes}


def _read(family: str, **changes):
    return families.config_from_hf(_raw(family, **changes))


def test_every_family_has_cases_and_a_config_here():
    assert set(RAW) == set(families.FAMILIES)
    cases = {case.family for case in CASES} | {"llava_next"}  # which is as llava
    assert cases == set(families.FAMILIES) | set(families.multimodal.MODEL_TYPES)
    for family in RAW:
        config = _read(family)
        assert config.model_type == family
        assert len(config.layer_kinds) == config.num_layers == LAYERS


# --- Spellings ----------------------------------------------------------------------------------

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
LONG = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
        {"rope_type": "llama3", **LLAMA3},
        {"rope_type": "longrope", **LONG, "original_max_position_embeddings": 1024},
    ],
    ids=lambda settings: settings["rope_type"],
)
def test_old_and_new_rotary_settings_are_equivalent(settings):
    old = {"type" if key == "rope_type" else key: value for key, value in settings.items()}
    without = {key: value for key, value in _raw("llama").items() if key != "rope_theta"}
    new = families.config_from_hf(
        {**without, "rope_parameters": {"rope_theta": 5000.0, **settings}}
    )
    assert new.layer_kinds[0].rope.scaling is not None
    assert _read("llama", rope_scaling=old) == new
    assert _read("llama", rope_scaling=settings) == new
    both = {
        "rope_parameters": {"rope_theta": 5000.0, **settings},
        "rope_scaling": {**settings, "factor": 16.0},
    }
    with pytest.raises(UserError, match=r"both 'rope_parameters'.*and 'rope_scaling'.*differ"):
        _read("llama", **both)


def test_rotary_scaling_constants():
    def scaling(family: str = "llama", **settings):
        return _read(family, rope_scaling=settings).layer_kinds[0].rope.scaling

    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    assert scaling(**yarn) == YarnScaling(
        4.0, pytest.approx(0.1 * 1.3862943611 + 1), 32.0, 1.0, 1024, True
    )
    assert scaling(**yarn, attention_factor=1.5).magnitude == 1.5
    assert scaling(**yarn, mscale=1.0, mscale_all_dim=1.0).magnitude == 1.0
    # Without a factor it is how much longer the model has become.
    assert scaling(**{**yarn, "factor": None}).factor == 4.0
    assert scaling(rope_type="dynamic", factor=2.0) == DynamicScaling(2.0, 4096)
    long = {"type": "su", **LONG, "original_max_position_embeddings": 1024}
    expected = LongRopeScaling((1.0,) * 8, (2.0,) * 8, pytest.approx((1 + 1 / 5) ** 0.5), 1024)
    assert (
        _read("phi3", rope_scaling=long, original_max_position_embeddings=1024)
        .layer_kinds[0]
        .rope.scaling
        == expected
    )
    # The key of the whole model comes before that of the scaling, as in transformers.
    assert _read("phi3", rope_scaling=long).layer_kinds[0].rope.scaling.original_positions == 4096


def _windows(config) -> list[int | None]:
    return [kind.window for kind in config.layer_kinds]


def test_layer_kinds_are_derived_without_layer_types():
    assert _windows(_read("qwen2")) == [None] * 8
    assert _windows(_read("qwen2", use_sliding_window=True)) == [None] * 4 + [4096] * 4
    assert (
        _windows(_read("qwen3", use_sliding_window=True, sliding_window=9)) == [None] * 4 + [9] * 4
    )
    assert _windows(_read("mistral")) == [4096] * 8
    assert _windows(_read("gemma2")) == [512, None] * 4
    assert _windows(_read("olmo3")) == [512, 512, 512, None] * 2
    assert _windows(_read("qwen3_moe", use_sliding_window=True, sliding_window=9)) == [9] * 8
    gemma = _read("gemma3_text", rope_scaling={"rope_type": "linear", "factor": 8.0})
    assert _windows(gemma) == [512] * 5 + [None] + [512] * 2
    assert (gemma.layer_kinds[0].rope.theta, gemma.layer_kinds[0].rope.scaling) == (10.0, None)
    assert (gemma.layer_kinds[5].rope.theta, gemma.layer_kinds[5].rope.scaling) == (
        5000.0,
        LinearScaling(8.0),
    )
    assert [kind.rope is None for kind in _read("smollm3").layer_kinds] == [
        False,
        False,
        False,
        True,
    ] * 2
    windowed = _read("smollm3", use_sliding_window=True, sliding_window=9)
    assert _windows(windowed) == [None, None, None, 9] * 2


def test_layer_lists_are_followed():
    types = [FULL, SLIDING, *[FULL] * 6]
    for family in ("gemma2", "gemma3_text", "olmo3"):
        assert _windows(_read(family, layer_types=types)) == [None, 512, *[None] * 6]
    assert _windows(_read("qwen2", use_sliding_window=True, layer_types=types)) == [
        None,
        4096,
        *[None] * 6,
    ]
    turns = [1, 0, *[1] * 6]
    assert [
        kind.rope is not None for kind in _read("smollm3", no_rope_layers=turns).layer_kinds
    ] == list(map(bool, turns))


def test_missing_and_renamed_keys_are_read():
    assert _read("gemma").activation == "gelu_tanh"
    assert _read("gemma", hidden_act="silu").activation == "silu"
    assert _read("gpt2").intermediate_size == 4 * 32
    for family in ("gpt2", "gemma", "gemma2", "gemma3_text", "smollm3"):
        raw = {key: value for key, value in _raw(family).items() if key != "tie_word_embeddings"}
        assert families.config_from_hf(raw).tie_word_embeddings
    renamed = {
        ("num_local_experts" if key == "num_experts" else key): v
        for key, v in _raw("qwen3_moe").items()
    }
    assert (
        families.config_from_hf(renamed)
        == _read("qwen3_moe", num_local_experts=8)
        == _read("qwen3_moe")
    )
    assert _read("gpt2", activation_function="gelu_python").activation == "gelu"
    assert _read("phi3", partial_rotary_factor=0.5).layer_kinds[0].rope.size == 8
    old = {"hidden_activation": None, "hidden_act": "gelu_pytorch_tanh"}
    assert _read("gemma2", **old) == _read("gemma2")


@pytest.mark.parametrize("family", RAW)
def test_irrelevant_keys_are_accepted(family):
    keys = {
        "attention_dropout": 0.1,
        "auto_map": {"AutoModelForCausalLM": "modeling.Model"},
        "cache_implementation": "hybrid",
        "initializer_range": 0.02,
        "pretraining_tp": 2,
        "rope_interleaved": False,
        "router_aux_loss_coef": 0.001,
        "task_specific_params": {},
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_mrope": False,
    }
    absent = {
        "attention_bias": family in ("gpt_neox", "gpt_oss"),
        "clip_qkv": None,
        "final_logit_softcapping": None,
        "layer_types": None,
        "logit_scale": None,
        "mlp_only_layers": [],
        "rope_scaling": None,
        "use_sliding_window": False,
    }
    assert _read(family, **keys, **(absent | RAW[family])) == _read(family)


def test_old_gpt2_checkpoints_lack_the_prefix_and_hold_masks(tmp_path):
    both = pair(cases_of("gpt2")[0], tmp_path)
    bare = {
        name.removeprefix("transformer."): tensor for name, tensor in stored(both.folder).items()
    }
    masks = {
        "h.0.attn.bias": bare["wte.weight"][:1],
        "h.1.attn.masked_bias": bare["wte.weight"][:1],
    }
    save_file({**bare, **masks}, both.folder / huggingface.WEIGHTS_FILE)
    params = huggingface.load_params(both.folder, both.config, "float32")
    assert (
        params["embed_positions"]["embedding"] == both.params["embed_positions"]["embedding"]
    ).all()
    huggingface.save_checkpoint(
        tmp_path / "out", params, both.config, both.raw, TOKENIZER, source_folder=both.folder
    )
    assert set(stored(tmp_path / "out")) == set(bare)


# --- Refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, changes, message",
    [
        (
            "llama",
            {"model_type": "rwkv"},
            "model_type 'rwkv' is not supported.*gpt2.*qwen3_moe.*text model alone",
        ),
        ("llama", {"final_logit_softcapping": 30.0}, "'final_logit_softcapping' to 30.0"),
        ("llama", {"layer_types": [SLIDING] * LAYERS}, "'layer_types'"),
        ("llama", {"sliding_window": 512}, "'sliding_window' to 512"),
        ("llama", {"clip_qkv": 8.0}, "'clip_qkv' to 8.0"),
        ("llama", {"num_local_experts": 8}, "'num_local_experts' to 8"),
        ("llama", {"logits_scaling": 8.0}, "'logits_scaling'"),
        ("llama", {"is_causal": False}, "'is_causal' to False"),
        (
            "gemma3_text",
            {"rope_parameters": {"rope_theta": 1e6}},
            "'rope_parameters'.*by layer type",
        ),
        (
            "olmo3",
            {"rope_parameters": {"rope_theta": 1e6}},
            "'rope_parameters'.*by layer type",
        ),
        ("qwen3_moe", {"num_local_experts": 4}, "'num_local_experts' to 4"),
        ("llama", {"partial_rotary_factor": 0.5}, "'partial_rotary_factor' to 0.5"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "proportional"}},
            "'rope_scaling'.*rope_type default, linear.*longrope",
        ),
        ("llama", {"rope_scaling": {"rope_type": "longrope"}}, "no 'short_factor'"),
        ("qwen2", {"rope_scaling": {"type": "mrope"}}, "'rope_scaling'.*mrope"),
        ("qwen2", {"use_mrope": True}, "'use_mrope'"),
        ("qwen2", {"attention_bias": True}, "'attention_bias'"),
        ("qwen2", {"layer_types": [SLIDING] * LAYERS}, "'layer_types'.*without use_sliding_window"),
        (
            "qwen2",
            {"use_sliding_window": True, "layer_types": [FULL]},
            "'layer_types'.*each of the 8 layers",
        ),
        (
            "qwen2",
            {"use_sliding_window": True, "max_window_layers": None},
            "no 'max_window_layers'",
        ),
        ("qwen3", {"head_dim": None}, "no 'head_dim'"),
        ("mistral", {"layer_types": [SLIDING] * LAYERS}, "'layer_types'"),
        ("gemma", {"use_bidirectional_attention": True}, "'use_bidirectional_attention'"),
        ("gemma2", {"query_pre_attn_scalar": None}, "no 'query_pre_attn_scalar'"),
        (
            "gemma2",
            {"layer_types": ["chunked_attention"] * LAYERS},
            "'layer_types'.*chunked_attention",
        ),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "'attn_logit_softcapping' to 50.0"),
        ("gemma3_text", {"sliding_window_pattern": None}, "no 'sliding_window_pattern'"),
        ("gemma3_text", {"rope_local_base_freq": None}, "no 'rope_local_base_freq'"),
        ("phi3", {"lm_head_bias": True}, "'lm_head_bias'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "'scale_attn_by_inverse_layer_idx'"),
        ("gpt2", {"add_cross_attention": True}, "'add_cross_attention'"),
        ("gpt2", {"activation_function": "tanh"}, "'activation_function' to 'tanh'"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "'no_rope_layers'.*8 layers"),
        ("smollm3", {"layer_types": [SLIDING] * LAYERS}, "'layer_types'.*use_sliding_window"),
        ("olmo2", {"clip_qkv": 8.0}, "'clip_qkv'"),
        ("stablelm", {"partial_rotary_factor": None}, "no 'partial_rotary_factor'"),
        ("granite", {"logits_scaling": None}, "no 'logits_scaling'"),
        ("granite", {"num_local_experts": 8}, "'num_local_experts'"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "'mlp_only_layers'"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "'decoder_sparse_step' to 2"),
        ("gpt_neox", {"sliding_window": 5}, "'sliding_window'"),
        ("lfm2_moe", {"num_dense_layers": None}, "no 'num_dense_layers'"),
        ("lfm2_moe", {"layer_types": None}, "no 'layer_types'"),
        ("lfm2_moe", {"layer_types": [SLIDING] * LAYERS}, "'layer_types'.*'conv' or"),
        ("glm4_moe", {"n_group": 2}, "'n_group' to 2"),
        ("glm4_moe", {"n_routed_experts": None}, "no 'n_routed_experts'"),
        ("llama4_text", {"no_rope_layers": [1, 0]}, "'no_rope_layers'.*8 layers"),
        ("llama4_text", {"layer_types": [SLIDING] * LAYERS}, "'layer_types'.*chunked_attention"),
        (
            "llama4_text",
            {"layer_types": ["chunked_attention"] * LAYERS, "attention_chunk_size": None},
            "no 'attention_chunk_size'",
        ),
        ("llama4_text", {"floor_scale": None}, "no 'floor_scale'"),
        ("gpt_oss", {"sliding_window": None}, "no 'sliding_window'"),
        ("gpt_oss", {"rope_parameters": None}, "no 'rope_parameters'"),
        ("gpt_oss", {"hidden_act": "gelu"}, "'hidden_act' to 'gelu'.*silu"),
        ("gpt_oss", {"swiglu_limit": None}, "no 'swiglu_limit'"),
        (
            "gpt_oss",
            {"quantization_config": {"quant_method": "mxfp4"}},
            r"MXFP4.*Mxfp4Config\(dequantize=True\)",
        ),
    ],
)
def test_errors_name_what_is_not_implemented(family, changes, message):
    with pytest.raises(UserError, match=message):
        _read(family, **changes)


@pytest.mark.parametrize("family", RAW)
def test_quantized_models_are_refused_with_a_remedy(family):
    for method in ("gptq", "awq", "fp8", "bitsandbytes"):
        with pytest.raises(
            UserError, match=rf"quantization_config.*{method}.*give the original model"
        ):
            _read(family, quantization_config={"quant_method": method, "bits": 4})
    text = {
        "model_type": "gemma3",
        "text_config": {"model_type": "gemma3_text"},
        "quantization_config": {"bits": 4},
    }
    with pytest.raises(UserError, match="quantization_config"):
        families.config_from_hf(families.text_config(text))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tie_word_embeddings", "false"),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", "2"),
        ("hidden_size", 32.0),
        ("num_attention_heads", -4),
        ("head_dim", "8"),
        ("max_position_embeddings", True),
        ("rms_norm_eps", "1e-5"),
        ("rms_norm_eps", float("nan")),
        ("hidden_act", ["silu"]),
        ("rope_parameters", [1]),
        ("model_type", ["llama"]),
    ],
)
def test_values_of_wrong_types_are_refused(key, value):
    """Some ended in tracebacks; "false" was taken for true."""
    raw = {**model(Case("llama", "", {"head_dim": 8})).config.to_dict(), "rms_norm_eps": 1e-5}
    families.config_from_hf(raw)
    with pytest.raises(UserError, match=rf"config\.json has .*('{key}'|\(TypeError)"):
        families.config_from_hf({**raw, key: value})


def test_stop_tokens_of_a_multimodal_model_are_kept():
    raw = {
        "model_type": "gemma3",
        "text_config": {"model_type": "gemma3_text", "eos_token_id": 1},
        "eos_token_id": [1, 106],
    }
    assert families.text_config(raw)["eos_token_id"] == [1, 106]
    assert families.text_config({**raw, "eos_token_id": None})["eos_token_id"] == 1


def test_error_names_weights_of_an_unknown_part(tmp_path):
    case = Case("qwen3", "", {"head_dim": 8})
    model(case).save_pretrained(tmp_path)
    config, raw = hub.load_config(tmp_path)
    plain = families.config_from_hf({**raw, "model_type": "llama"})
    with pytest.raises(
        UserError, match=r"does not have: model\.layers\.0\.self_attn\.k_norm\.weight"
    ):
        huggingface.check_weights(tmp_path, plain)
    tensors = {
        name: tensor
        for name, tensor in stored(tmp_path).items()
        if "layers.1.self_attn.q_norm" not in name
    }
    save_file(tensors, tmp_path / huggingface.WEIGHTS_FILE)
    with pytest.raises(UserError, match=r"no weight 'model\.layers\.1\.self_attn\.q_norm\.weight'"):
        huggingface.check_weights(tmp_path, config)
