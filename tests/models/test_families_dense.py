"""Dense families other than LLaMA, Qwen and Gemma against PyTorch."""

import pytest

from tests.models.parity_cases import Case, cases_of, check
from tokalign_jax.errors import UserError
from tokalign_jax.models import families

FAMILIES = (
    "apertus",
    "arcee",
    "cohere",
    "cohere2",
    "ernie4_5",
    "exaone4",
    "glm",
    "glm4",
    "granitemoehybrid",
    "helium",
    "lfm2",
    "qwen3_5_text",
    "hunyuan_v1_dense",
    "ministral",
    "ministral3",
    "nanochat",
    "nemotron",
    "olmo",
    "seed_oss",
    "starcoder2",
)


@pytest.mark.parametrize("case", cases_of(*FAMILIES), ids=str)
def test_matches_pytorch_when_read_and_exported(case: Case, tmp_path):
    check(case, tmp_path)


@pytest.mark.parametrize("model_type", families.REFUSED)
def test_similar_unsupported_families_are_refused_with_the_reason(model_type):
    with pytest.raises(UserError, match=rf"'{model_type}' is not supported: .*(start too|causal)"):
        families.family(model_type)
