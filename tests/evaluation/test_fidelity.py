"""Fidelity: against sums over PyTorch's likelihoods, for identical models, and in parts."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers import TEXTS, tiny_model_folder, tiny_tokenizer
from tokalign_jax.evaluation import bits_per_byte, fidelity
from tokalign_jax.evaluation.token_costs import TokenCosts
from tokalign_jax.models import hub, huggingface
from tokalign_jax.text.canonical import token_bytes

LENGTH = 24
DOCUMENTS = {"a": [TEXTS[0] * 2, TEXTS[1], "x"], "b": [f"{TEXTS[2]} {TEXTS[0]}", TEXTS[2]]}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models with byte-level tokenizers of different sizes."""
    folders = []
    for seed, size in enumerate((300, 280)):
        folder, tokenizer = tmp_path_factory.mktemp(f"model{size}"), tiny_tokenizer(size, TEXTS)
        folders.append(
            tiny_model_folder(folder, "llama", vocab_size=size, tokenizer=tokenizer, seed=seed)
        )
    return folders


def read(folder, texts=DOCUMENTS, length=LENGTH):
    config, _ = hub.load_config(folder)
    params, tokenizer = (
        huggingface.load_params(folder, config),
        AutoTokenizer.from_pretrained(folder),
    )
    costs = bits_per_byte.evaluate_documents(
        config, params, tokenizer, texts, sequence_length=length, batch=2, beginnings=True
    )
    return tokenizer, {group: cost.beginnings for group, cost in costs.items()}


def prefixes(folder, text):
    """By PyTorch: by how many bytes have been read, the log-likelihood so far and the likeliest
    next token's bytes.
    """
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder).eval(),
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:LENGTH]
    with torch.no_grad():
        log_p = (
            model(torch.tensor([[tokenizer.eos_token_id, *ids]])).logits[0].double().log_softmax(-1)
        )
    content, size, total, found = token_bytes(tokenizer), 0, 0.0, {}
    for place, token in enumerate(ids):
        size, total = size + len(content[token]), total + log_p[place, token].item()
        likeliest = content[int(log_p[place + 1].argmax())] if place + 1 < len(ids) else "nothing"
        found[size] = (total, likeliest)
    return found


def is_whole(text, size):
    """Return whether the first `size` bytes are complete characters."""
    return text.encode()[:size].decode(errors="ignore").encode() == text.encode()[:size]


def test_fidelity_matches_pytorchs_likelihoods(models):
    (source_tokenizer, source), (target_tokenizer, target) = map(read, models)
    found = fidelity.compare(source_tokenizer, target_tokenizer, DOCUMENTS, source, target)
    for group, documents in DOCUMENTS.items():
        measured = found[group]
        for i, text in enumerate(documents):
            one, other = (prefixes(folder, text) for folder in models)
            shared = [size for size in one if size in other and is_whole(text, size)]
            assert measured.chunks[i] == len(shared) > 0 and measured.bytes[i] == shared[-1]
            steps = [
                [now - before for now, before in zip(sums, [0.0, *sums])]
                for sums in ([side[size][0] for size in shared] for side in (one, other))
            ]
            divergence = 0.0
            for p, q in zip(*(np.exp(step) for step in steps)):
                divergence += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
            assert measured.divergence[i] == pytest.approx(divergence, rel=1e-3, abs=1e-6)
            gap = sum(abs(p - q) for p, q in zip(*steps)) / math.log(2)
            assert measured.gap[i] == pytest.approx(gap, rel=1e-4)
            pairs = [(one[size][1], other[size][1]) for size in shared]
            pairs = [pair for pair in pairs if "nothing" not in pair]
            assert measured.boundaries[i] == len(pairs)
            alike = [
                a is b if None in (a, b) else a.startswith(b) or b.startswith(a) for a, b in pairs
            ]
            assert measured.agreed[i] == sum(alike)


def test_model_is_faithful_to_itself(models):
    tokenizer, readings = read(models[0])
    found = fidelity.compare(tokenizer, tokenizer, DOCUMENTS, readings, readings)
    summary = fidelity.summaries(found, seed=0)
    pooled = summary["pooled"]
    assert [pooled[name]["value"] for name in ("divergence", "gap", "agreement")] == [0.0, 0.0, 1.0]
    assert pooled["agreement"]["interval"] == [1.0, 1.0] and [*summary["languages"]] == ["a", "b"]
    assert pooled["documents"] == 5 and pooled["chunks"] == sum(
        group_fidelity.chunks.sum() for group_fidelity in found.values()
    )


def test_reference_likelihoods_are_saved_and_loaded(models, tmp_path):
    _, readings = read(models[0])
    fidelity.save(tmp_path / "readings.npz", readings)
    back = fidelity.load(tmp_path / "readings.npz", DOCUMENTS)
    assert [*back] == [*readings]
    for group, reading in readings.items():
        for one, other in zip(reading, back[group], strict=True):
            np.testing.assert_array_equal(one.nats, other.nats)
            np.testing.assert_array_equal(one.likeliest, other.likeliest)


def test_divergence_of_two_way_outcomes():
    p, q = np.array([0.3, 1e-9, 1 - 1e-12, 0.5]), np.array([0.1, 0.2, 1.0, 0.5])
    found = fidelity.binary_divergence(np.log(p), np.log(q))
    assert found[0] == pytest.approx(0.3 * math.log(3) + 0.7 * math.log(0.7 / 0.9))
    assert found[1] == pytest.approx(-math.log(0.8), rel=1e-5)
    assert (
        found[2] == found[3] == 0
        and np.isfinite(fidelity.binary_divergence(np.zeros(1), np.array([-900.0]))).all()
    )


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [(b"ab", b"a", True), (b"a", b"ab", True), (b"a", b"a", True), (b"a", b"b", False), (None, None, True),
     (None, b"a", False), (b"", b"a", False)],
)  # fmt: skip
def test_continuations_agree_where_one_is_a_prefix_of_the_other(one, other, alike):
    assert fidelity._is_prefix_pair(one, other) == alike


def test_text_without_tokens_has_no_chunks(models):
    tokenizer, _ = read(models[0])
    nothing = TokenCosts(np.zeros(0, np.float32), np.zeros(0, np.int32))
    found = fidelity.compare(tokenizer, tokenizer, {"a": [""]}, {"a": [nothing]}, {"a": [nothing]})
    assert fidelity.summaries(found, seed=0) == {"languages": {}, "pooled": None}
