"""An adapted model drafts for a larger one in transformers: the text is that of the larger one."""

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

import tokalign_jax as ta
from tests.helpers import TEXTS, tiny_model_folder, tiny_tokenizer

ROWS = 384
OPTIONS = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(330, TEXTS * 2)


@pytest.fixture(scope="module")
def larger(tokenizer, tmp_path_factory):
    """With more rows than tokens, as published models have."""
    folder = tmp_path_factory.mktemp("larger")
    tiny_model_folder(
        folder, "llama", ROWS, tokenizer=tokenizer, seed=3, hidden_size=64, num_hidden_layers=4
    )
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def draft(tokenizer, tmp_path_factory):
    """Returns the exported draft with rows as a multiple of a number."""
    folder = tmp_path_factory.mktemp("source")
    source = ta.load_model(str(tiny_model_folder(folder / "model", "llama")))
    alignment = ta.align(source.tokenizer, tokenizer)

    def exported(multiple: int):
        model = ta.initialize(source, tokenizer, alignment, rows_multiple_of=multiple)
        written = ta.save(model, folder / f"adapted-{multiple}")
        return AutoModelForCausalLM.from_pretrained(written).eval()

    return exported


def test_a_drafted_text_is_that_of_the_larger_model(larger, draft, tokenizer):
    assistant = draft(ROWS)
    assert assistant.config.vocab_size == ROWS > len(tokenizer)
    texts = set()
    for text in TEXTS:
        inputs = tokenizer(text, return_tensors="pt")
        alone = larger.generate(**inputs, **OPTIONS)
        together = larger.generate(**inputs, assistant_model=assistant, **OPTIONS)
        np.testing.assert_array_equal(together, alone)
        texts.add(tuple(alone[0, inputs["input_ids"].shape[1] :].tolist()))
    assert len(texts) == len(TEXTS)


def test_a_draft_of_other_rows_is_refused_by_transformers(larger, draft, tokenizer):
    """Refused by transformers; the warning at export names the setting that avoids it."""
    inputs = tokenizer(TEXTS[0], return_tensors="pt")
    with pytest.raises(ValueError, match=r"(different|same) tokenizer"):
        larger.generate(**inputs, assistant_model=draft(1), **OPTIONS)
