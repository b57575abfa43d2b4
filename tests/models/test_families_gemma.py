"""Gemma, GPT-2 and Phi-3, against PyTorch."""

import pytest

from tests.models.parity_cases import Case, cases_of, check


@pytest.mark.parametrize(
    "case", cases_of("gemma", "gemma2", "gemma3_text", "gpt2", "phi3"), ids=str
)
def test_matches_pytorch_when_read_and_exported(case: Case, tmp_path):
    check(case, tmp_path)
