"""Export of adapters as PEFT folders, against PEFT itself."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.helpers import merge_adapters
from tests.models.parity_cases import (
    cases_of,
    export,
    our_logits,
    pair,
    reference,
    reference_logits,
    tokens,
)
from tokalign_jax.errors import UserError
from tokalign_jax.models import huggingface, lora, peft
from tokalign_jax.utils import paths

CASES = [
    cases_of("llama")[2],  # tied
    cases_of("phi3")[0],  # fused projections
    cases_of("gpt_neox")[0],  # fused by heads
    cases_of("gpt2")[0],  # [in, out]
    cases_of("cohere")[1],  # queries and keys in another order
    cases_of("qwen3_5_text")[0],  # not in all layers
]


def adapters_of(params, *specs):
    """Random adapters, and all parameters with each of them merged."""
    adapters, merged = {}, params
    for number, spec in enumerate(specs):
        leaves = paths.flatten(lora.add_lora(merged, spec, jax.random.key(number)))
        for i, path in enumerate(sorted(p for p in leaves if p.endswith("lora_b"))):
            key = jax.random.fold_in(jax.random.key(7 + number), i)
            leaves[path] = 0.1 * jax.random.normal(key, leaves[path].shape)
            kernel = path.removesuffix("lora_b") + "kernel"
            pair_ = leaves[path.removesuffix("b") + "a"], leaves[path]
            adapters.setdefault(kernel, []).append(lora.Adapter(spec, *pair_))
        merged = merge_adapters(paths.unflatten(leaves), spec)
    return adapters, merged


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.family)
def test_exported_factors_multiply_to_the_merged_update(case, tmp_path):
    both = pair(case, tmp_path / "source")
    specs = lora.LoraSpec(2, 6.0, 0.0), lora.LoraSpec(3, 3.0, 0.0)
    adapters, merged = adapters_of(both.params, *specs)
    names = huggingface.stored_dtypes(both.folder)
    peft.save_adapters(tmp_path / "adapter", both.config, adapters, names)
    huggingface.write_weights(tmp_path, merged, both.config, "float32", names, 10**12)
    huggingface.write_weights(both.folder, both.params, both.config, "float32", names, 10**12)
    after, before = (
        load_file(tmp_path / huggingface.WEIGHTS_FILE),
        load_file(both.folder / "model.safetensors"),
    )
    factors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    changed = {name for name in after if not np.array_equal(after[name], before[name])}
    found = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in factors}
    assert changed == {f"{name}.weight" for name in found}
    for name in found:
        a, b = (factors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        update = (b @ a).T if case.family == "gpt2" else b @ a
        np.testing.assert_allclose(
            after[f"{name}.weight"] - before[f"{name}.weight"], update, atol=1e-5
        )
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    ranks = {name: len(factors[f"base_model.model.{name}.lora_A.weight"]) for name in found}
    assert ranks == {name: settings["rank_pattern"].get(name, settings["r"]) for name in found}
    assert settings["rank_pattern"] == settings["alpha_pattern"]
    assert settings["lora_alpha"] == settings["r"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.family)
def test_peft_loads_exported_adapters(case, tmp_path):
    library = pytest.importorskip("peft", reason="peft is not installed")
    both = pair(case, tmp_path / "source")
    adapters, merged = adapters_of(both.params, lora.LoraSpec(2, 6.0, 0.0))
    written = export(both, tmp_path / "written")
    names = huggingface.stored_dtypes(both.folder)
    peft.save_adapters(written / peft.FOLDER, both.config, adapters, names)
    start = reference(written)
    adapted = library.PeftModel.from_pretrained(start, written / peft.FOLDER)
    np.testing.assert_allclose(
        reference_logits(adapted, tokens(20)),
        our_logits(both.config, merged, tokens(20)),
        atol=1e-4,
    )


def test_adapters_of_experts_are_refused(tmp_path):
    config = pair(cases_of("qwen3_moe")[0], tmp_path).config
    with pytest.raises(UserError, match=r"export\.adapters=merged"):
        peft.check(config)
