"""LLaMA and close relatives against PyTorch."""

import pytest

from tests.models.parity_cases import Case, cases_of, check


@pytest.mark.parametrize(
    "case", cases_of("llama", "gpt_neox", "mistral", "granite", "stablelm"), ids=str
)
def test_matches_pytorch_when_read_and_exported(case: Case, tmp_path):
    check(case, tmp_path)
