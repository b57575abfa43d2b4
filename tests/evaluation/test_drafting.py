"""Draft acceptance: against float64, and against speculative decoding."""

import functools
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from tests.helpers import TEXTS, tiny_model_folder, tiny_tokenizer
from tokalign_jax.evaluation import drafting
from tokalign_jax.models import hub, huggingface

VOCABULARY = 9


def side(random, width: int, rows: int, cap: float):
    """States, head and the adjustment of logits of a model."""
    states, head = random.normal(size=(2, 5, width)), random.normal(size=(rows, width))
    return states, head, cap


@pytest.mark.parametrize("chunk", [3, 1024])
def test_agreement_equals_that_of_full_distributions(monkeypatch, chunk):
    """The two heads have different widths and paddings; padding rows would win if they counted."""
    monkeypatch.setattr(drafting, "CHUNK", chunk)
    random = np.random.default_rng(0)
    sides = [side(random, 4, 12, 2.0), side(random, 6, 16, 3.0)]
    for _, head, _ in sides:
        head[VOCABULARY:] *= 10
    given = [
        (
            jnp.asarray(s, jnp.float32),
            jnp.asarray(h, jnp.float32),
            functools.partial(lambda cap, x: cap * jnp.tanh(x), cap),
        )
        for s, h, cap in sides
    ]
    found = drafting.agreement(*given, vocabulary=VOCABULARY, temperature=0.7)
    logits = [cap * np.tanh(np.einsum("btd,vd->btv", s, h[:VOCABULARY])) for s, h, cap in sides]
    q, p = (softmax(values / 0.7, axis=-1) for values in logits)
    np.testing.assert_allclose(found.shared, np.minimum(p, q).sum(-1), rtol=1e-5)
    np.testing.assert_array_equal(found.draft, logits[0].argmax(-1))
    np.testing.assert_array_equal(found.teacher, logits[1].argmax(-1))


def next_token(salt: str, text: tuple[int, ...]) -> int:
    """Next token of a made-up model, a function of the whole text before."""
    return zlib.crc32(repr((salt, text)).encode()) % 2


def decode_speculatively(prompt: int, steps: int, gamma: int) -> tuple[list[int], int]:
    """Greedy continuation by speculative decoding, and the number of calls of the teacher."""
    text, calls = (prompt,), 0
    while len(text) <= steps:
        drafts: tuple[int, ...] = ()
        for _ in range(gamma):
            drafts += (next_token("draft", text + drafts),)
        calls += 1
        for token in (*drafts, None):
            own = next_token("teacher", text)
            text += (own,)
            if token != own:
                break
    return list(text[1 : steps + 1]), calls


@pytest.mark.parametrize("gamma", [1, 4])
def test_call_counts_match_speculative_decoding(gamma):
    kept, calls = [], 0
    for prompt in range(20):
        continuation, needed = decode_speculatively(prompt, 31, gamma)
        before = [(prompt, *continuation[:i]) for i in range(31)]
        assert continuation == [next_token("teacher", text) for text in before]
        kept.append(
            [next_token("draft", text) == token for text, token in zip(before, continuation)]
        )
        calls += needed
    assert drafting.calls(np.array(kept), gamma) == calls


def test_expected_tokens_per_call_follow_the_formula():
    assert drafting.tokens_per_call(1.0, 4) == 5 and drafting.tokens_per_call(0.0, 4) == 1
    assert drafting.tokens_per_call(0.8, 3) == pytest.approx((1 - 0.8**4) / (1 - 0.8))


def test_model_is_the_best_draft_for_itself_and_another_is_not(tmp_path):
    models = []
    for seed in (0, 1):
        folder = tiny_model_folder(tmp_path / str(seed), "llama", seed=seed)
        config, _ = hub.load_config(folder)
        models.append(drafting.Model(config, huggingface.load_params(folder, config)))
    tokenizer = hub.load_tokenizer(tmp_path / "0")
    accept = functools.partial(
        drafting.acceptance, tokenizer=tokenizer, prompts=3, length=16, steps=12
    )
    texts = {"a": list(TEXTS) * 2, "short": ["x"]}
    same, other = (
        accept(models[0], models[0], texts=texts),
        accept(models[1], models[0], texts=texts),
    )
    assert same["short"] is None and same["a"] is not None and other["a"] is not None
    assert same["a"]["prompts"] == 3
    # 12 tokens take three calls of 4 drafts and the teacher's own.
    assert (
        same["a"]["greedy"] == {"rate": 1.0, "tokens_per_call": 4.0}
        and same["a"]["agreement"] == 1.0
    )
    assert same["a"]["sampled"]["rate"] == pytest.approx(1.0) and same["a"]["sampled"][
        "tokens_per_call"
    ] == pytest.approx(5.0)
    assert other["a"]["sampled"]["rate"] < 0.9 and other["a"]["greedy"]["rate"] < 1


def test_different_vocabularies_are_not_comparable():
    one, other = tiny_tokenizer(300, TEXTS), tiny_tokenizer(290, TEXTS)
    assert drafting.vocabulary_difference(one, tiny_tokenizer(300, TEXTS)) == ""
    message = drafting.vocabulary_difference(one, other)
    assert (
        "300 tokens" in message
        and "290" in message
        and "10 ids differ, the first is 290" in message
    )
