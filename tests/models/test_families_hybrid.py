"""Mixtures with a gated delta rule against PyTorch, and families that the decoder lacks a part of."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.parity_cases import Case, cases_of, check, export, pair, stored
from tokalign_jax.errors import UserError
from tokalign_jax.models import families, huggingface
from tokalign_jax.utils import paths


@pytest.mark.parametrize("case", cases_of("qwen3_5_moe_text", "qwen3_next"), ids=str)
def test_is_the_model_of_pytorch_in_and_out(case: Case, tmp_path):
    check(case, tmp_path)


@pytest.mark.parametrize(
    "family, prefix",
    [("qwen3_5_text", "mtp"), ("qwen3_next", "mtp"), ("glm4_moe", "model.layers.46")],
)
def test_layers_for_multi_token_prediction_are_left_out(family, prefix, tmp_path):
    both = pair(cases_of(family)[0], tmp_path / "source")
    file = both.folder / huggingface.WEIGHTS_FILE
    extra = {
        f"{prefix}.mlp.up_proj.weight": torch.ones(3, 3),
        f"{prefix}.norm.weight": torch.ones(3),
    }
    save_file(load_file(file) | extra, file, metadata={"format": "pt"})
    params = huggingface.load_params(both.folder, both.config, jnp.float32)
    for path, leaf in paths.flatten(params).items():
        np.testing.assert_array_equal(leaf, paths.flatten(both.params)[path])
    written = stored(export(both, tmp_path / "written"))
    assert not [name for name in written if name.startswith(prefix)]


@pytest.mark.parametrize("family", ["qwen3_5_moe_text", "qwen3_next"])
@pytest.mark.parametrize("key, value", [("decoder_sparse_step", 2), ("mlp_only_layers", [0])])
def test_layers_without_experts_are_refused(family, key, value, tmp_path):
    raw = pair(cases_of(family)[0], tmp_path).raw
    with pytest.raises(UserError, match=f"'{key}'"):
        families.config_from_hf({**raw, key: value})


@pytest.mark.parametrize("model_type", families.UNIMPLEMENTED)
def test_families_that_the_decoder_lacks_a_part_of_are_refused_with_it(model_type):
    part = families.UNIMPLEMENTED[model_type].split(",")[0].replace("(", r"\(")
    with pytest.raises(UserError, match=rf"'{model_type}' is not supported: it has {part}"):
        families.config_from_hf({"model_type": model_type})
    assert model_type not in families.FAMILIES and model_type not in families.REFUSED
