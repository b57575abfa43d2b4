"""Mixtures of experts, and text models of multimodal families, against PyTorch."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mxfp4Config

from tests.helpers import merge_adapters
from tests.models.parity_cases import (
    TOKENIZER,
    Case,
    Pair,
    cases_of,
    check,
    export,
    logit_error,
    model,
    our_logits,
    pair,
    parameter_gradient_error,
    reference,
    stored,
    tokens,
)
from tokalign_jax.errors import UserError
from tokalign_jax.models import families, hub, huggingface
from tokalign_jax.models.lora import LoraSpec, add_lora
from tokalign_jax.utils import paths

MIXTURES = pytest.mark.parametrize(
    "case",
    [
        cases_of("mixtral")[0],
        cases_of("qwen3_moe")[1],
        cases_of("lfm2_moe")[0],
        cases_of("glm4_moe")[0],
    ],
    ids=lambda case: case.family,
)


@pytest.mark.parametrize(
    "case",
    cases_of(
        *families.mixture.MODEL_TYPES,
        "gpt_oss",
        "lfm2_moe",
        "llama4_text",
        *families.multimodal.MODEL_TYPES,
    ),
    ids=str,
)
def test_matches_pytorch_when_read_and_exported(case: Case, tmp_path):
    check(case, tmp_path)


@pytest.mark.parametrize(
    "case", cases_of("qwen3_moe", "glm4_moe", "gpt_oss", "lfm2_moe", "llama4_text"), ids=str
)
def test_gradient_of_every_parameter_is_that_of_pytorch(case: Case, tmp_path):
    assert parameter_gradient_error(pair(case, tmp_path)) < 1e-4


@MIXTURES
def test_experts_stored_in_one_tensor_are_read_and_written(case, tmp_path):
    both = pair(case, tmp_path / "apart")
    model(case).save_pretrained(tmp_path / "packed", save_original_format=False)
    TOKENIZER.save_pretrained(tmp_path / "packed")
    packed = stored(tmp_path / "packed")
    assert any(name.endswith("experts.gate_up_proj") for name in packed)
    params = huggingface.load_params(tmp_path / "packed", both.config, jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, params, both.params)
    both.folder.rename(tmp_path / "other")
    (tmp_path / "packed").rename(both.folder)
    written = stored(export(both, tmp_path / "written"))
    assert set(written) == set(packed)
    for name, tensor in packed.items():
        np.testing.assert_array_equal(written[name], tensor)


def test_mxfp4_weights_are_refused_until_transformers_has_converted_them(tmp_path):
    """By the commands of docs/models.md."""
    settings = {"head_dim": 16, "hidden_size": 64, "intermediate_size": 32, "num_local_experts": 4}
    model(Case("gpt_oss", "", settings)).save_pretrained(tmp_path)
    file = tmp_path / huggingface.WEIGHTS_FILE
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(256, (*blocks, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(120, 124, blocks, dtype=torch.uint8)
    save_file(tensors, file, metadata={"format": "pt"})
    raw = json.loads((tmp_path / "config.json").read_text())
    quantized = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    _write(tmp_path, raw | {"quantization_config": quantized})
    with pytest.raises(UserError, match=r"MXFP4.*dequantize=True"):
        hub.load_config(tmp_path)

    converted = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    )
    folder = tmp_path / "bf16"
    converted.save_pretrained(folder)
    config, raw = hub.load_config(folder)
    params = huggingface.load_params(folder, config, jnp.float32)
    assert logit_error(Pair(folder, config, raw, params, reference(folder)), [20]) < 1e-4


def test_adapters_cover_every_expert_and_merge(tmp_path):
    both = pair(cases_of("qwen3_moe")[0], tmp_path)
    spec = LoraSpec(rank=2, alpha=4.0, dropout=0.0)
    leaves = paths.flatten(add_lora(both.params, spec, jax.random.key(0)))
    adapted = {path.rpartition("/")[0] for path in leaves if "lora_a" in path}
    attention = {f"layers/attention/{name}_proj" for name in "qkvo"}
    experts = {f"layers/mlp/experts/{name}_proj" for name in ("gate", "up", "down")}
    assert adapted == attention | experts
    generator = np.random.default_rng(0)
    for path in leaves:
        if path.endswith("lora_b"):
            leaves[path] = 0.1 * generator.normal(size=leaves[path].shape).astype(np.float32)
    params, text = paths.unflatten(leaves), tokens(12)
    ours = our_logits(both.config, params, text, lora=spec)
    assert np.abs(ours - our_logits(both.config, both.params, text)).max() > 0.01
    np.testing.assert_allclose(
        our_logits(both.config, merge_adapters(params, spec), text), ours, atol=1e-4
    )


def test_text_model_with_newer_tensor_names_is_read_and_exported(tmp_path):
    case = cases_of("gemma3")[0]
    both = pair(case, tmp_path / "source")
    file = both.folder / huggingface.WEIGHTS_FILE
    renamed = {
        name.replace("language_model.model.", "model.language_model."): torch.tensor(
            tensor.astype(np.float32)
        )
        for name, tensor in stored(both.folder).items()
    }
    assert any(name.startswith("vision_tower") for name in renamed)
    save_file(renamed, file, metadata={"format": "pt"})
    params = huggingface.load_params(both.folder, both.config, jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, params, both.params)

    written = export(both, tmp_path / "written")
    assert not [name for name in stored(written) if not name.startswith("model.")]
    raw = json.loads((written / "config.json").read_text())
    assert (raw["model_type"], raw["architectures"]) == ("gemma3_text", ["Gemma3ForCausalLM"])
    assert "vision_config" not in raw
    assert type(AutoModelForCausalLM.from_pretrained(written)).__name__ == "Gemma3ForCausalLM"


def test_nested_config_defaults_come_from_its_class(tmp_path):
    # As google/gemma-3-4b-it has it: transformers writes nested configs without the defaults of
    # their class.
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    _write(
        tmp_path,
        {
            "model_type": "gemma3",
            "text_config": text,
            "vision_config": {"model_type": "siglip_vision_model"},
        },
    )
    config, raw = hub.load_config(tmp_path)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size) == (
        8,
        4,
        256,
        262208,
    )
    assert config.tie_word_embeddings and config.attention_scale == 256**-0.5
    kinds = config.layer_kinds
    assert [layer for layer, kind in enumerate(kinds) if kind.window is None] == [5, 11, 17, 23, 29]
    assert (kinds[0].window, kinds[0].rope.theta, kinds[0].rope.scaling) == (1024, 10000.0, None)
    assert (kinds[5].rope.theta, kinds[5].rope.scaling.factor) == (1e6, 8.0)
    assert raw["num_attention_heads"] == 8
    _write(
        tmp_path,
        {"model_type": "llava", "torch_dtype": "float16", "text_config": {"model_type": "llama"}},
    )
    raw = hub.text_config(hub.read_json(tmp_path / "config.json") or {})
    assert (
        raw["torch_dtype"] == "float16" and "dtype" not in raw
    )  # one type, not the text model's default beside it
    _write(tmp_path, {"model_type": "llava", "text_config": {"model_type": "mamba"}})
    with pytest.raises(
        UserError, match=r"text model of this 'llava' model is of model_type 'mamba'.*qwen3"
    ):
        hub.load_config(tmp_path)


def _write(folder: Path, raw: dict) -> None:
    (folder / "config.json").write_text(json.dumps(raw))
