"""Splitting of numbers by tokenizers, and the warning where two differ."""

import pytest

from tests.helpers import SHARED, TEXTS, tokenizer_of_kind
from tokalign_jax.models import hub
from tokalign_jax.text import numbers

DIGITS = [*TEXTS, *(f"in {year} there were {12000 + year} of them" for year in range(1990, 2030))]


def test_single_digits_and_groups_of_three_differ():
    llama3, qwen = (tokenizer_of_kind(kind, DIGITS) for kind in ("llama3", "qwen"))
    assert numbers.number_pieces(qwen, "2023") == [*"2023"]
    assert numbers.number_pieces(llama3, "12345") != [*"12345"]
    line = numbers.warning_line(llama3, qwen)
    assert line.startswith("warning: ") and "2|0|2|3 for the target" in line
    assert numbers.warning_line(qwen, qwen) == numbers.warning_line(llama3, llama3) == ""


@pytest.mark.parametrize(
    "kind", ["gpt2", "llama2", "gemma", "mistral", "t5", "bert", "gpt1", "unigram_first"]
)
def test_pieces_join_to_the_number(kind):
    for number in numbers.PROBES:
        assert "".join(numbers.number_pieces(tokenizer_of_kind(kind, DIGITS), number)) == number


def test_number_splits_of_published_tokenizers():
    folder = SHARED / "tokenizers"
    if not folder.exists():
        pytest.skip("the tokenizers are not at hand")
    neox, qwen = (hub.load_tokenizer(folder / name) for name in ("neox", "qwen3"))
    assert numbers.number_pieces(neox, "2023") == ["20", "23"] and numbers.number_pieces(
        qwen, "2023"
    ) == [*"2023"]
    assert "2023 is 20|23 for the source and 2|0|2|3 for the target" in numbers.warning_line(
        neox, qwen
    )
