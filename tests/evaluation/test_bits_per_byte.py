"""Bits per byte and continuations against PyTorch."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers import TEXTS, tiny_model_folder
from tokalign_jax.config import ComputeConfig
from tokalign_jax.evaluation import bits_per_byte, samples
from tokalign_jax.models import hub, huggingface, rotary, transformer
from tokalign_jax.models.config import LayerKind
from tokalign_jax.models.transformer import logits
from tokalign_jax.text.canonical import plain_backend
from tokalign_jax.text.corpus import Document


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny_model_folder(tmp_path_factory.mktemp("model"), "llama")
    config, _ = hub.load_config(folder)
    return folder, config, huggingface.load_params(folder, config)


@pytest.mark.parametrize(("batch", "chunk"), [(1, 7), (3, 1024)])
def test_bits_per_byte_equals_pytorch(model, batch, chunk):
    folder, config, params = model
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    texts = {"a": [TEXTS[0] * 3, "short"], "b": [TEXTS[2]]}
    compute = ComputeConfig(dtype="float32", loss_chunk=chunk)
    length = 50  # the first document is longer: it is cut into windows
    scores = bits_per_byte.evaluate(
        config, params, tokenizer, texts, sequence_length=length, batch=batch, compute=compute
    )
    for language, documents in texts.items():
        nats, count = 0.0, 0
        for document in documents:
            tokens = tokenizer(document, add_special_tokens=False)["input_ids"]
            whole = [tokenizer.eos_token_id, *tokens]
            count += len(tokens)
            for i in range(0, len(tokens), length):
                window = torch.tensor([whole[i : i + length + 1]])
                with torch.no_grad():
                    logits = reference(window[:, :-1]).logits[0].double()
                nats += torch.nn.functional.cross_entropy(
                    logits, window[0, 1:], reduction="sum"
                ).item()
        size = sum(len(d.encode()) for d in documents)
        assert scores[language].tokens == count and scores[language].bytes == size
        assert scores[language].bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_short_texts_are_not_padded_to_the_longest(model):
    """LongRoPE takes other factors past its first length, which padding is not to reach."""
    folder, config, _ = model
    scaling = rotary.LongRopeScaling((1.0,) * 4, (3.0, 5.0, 7.0, 9.0), 1.2, 32)
    rope = rotary.Rope(8, 500.0, scaling)
    config = dataclasses.replace(
        config, layer_kinds=tuple(LayerKind(rope) for _ in config.layer_kinds)
    )
    assert config.head_dim == 8
    params, tokenizer = (
        transformer.init_params(config, jax.random.key(0), 0.3),
        AutoTokenizer.from_pretrained(folder),
    )
    long, short = TEXTS[0] * 3, tokenizer.decode(tokenizer(TEXTS[0])["input_ids"][:28])

    def nats(length, *documents):
        scores = bits_per_byte.evaluate_documents(
            config, params, tokenizer, {"a": [*documents]}, sequence_length=length, batch=4
        )
        return scores["a"].nats

    alone = nats(32, short)[0]
    assert nats(40, short)[0] == pytest.approx(alone, rel=1e-5) == nats(40, long, short, long)[1]
    whole = logits(
        config, params, jnp.asarray([[tokenizer.eos_token_id, *tokenizer(short)["input_ids"]]])
    )[0]
    own = -jax.nn.log_softmax(whole[:-1])[
        jnp.arange(len(whole) - 1), jnp.asarray(tokenizer(short)["input_ids"])
    ]
    assert float(own.sum()) == pytest.approx(alone, rel=1e-4)


def test_text_is_tokenized_as_for_training(model):
    """The name of a special token in a document is those characters, not the token."""
    folder, config, params = model
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = f"the quick{tokenizer.eos_token} brown"
    scores = bits_per_byte.evaluate(
        config, params, tokenizer, {"a": [text]}, sequence_length=32, batch=1
    )
    assert scores["a"].tokens == len(
        plain_backend(tokenizer).encode(text, add_special_tokens=False).ids
    )
    assert scores["a"].tokens > len(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_every_token_is_a_label_once():
    tokens = list(range(100, 123))
    for length in (1, 5, 23, 50):
        windows = bits_per_byte.split_windows(tokens, 7, length)
        assert [t for _, labels in windows for t in labels] == tokens
        assert [t for inputs, _ in windows for t in inputs] == [7, *tokens[:-1]]
        assert max(len(labels) for _, labels in windows) <= length


def test_opening_tokens_begin_every_window():
    tokens = list(range(100, 112))
    windows = bits_per_byte.split_windows(tokens, 7, 5, starts_every_window=True)
    assert [inputs for inputs, _ in windows] == [
        [7, *tokens[:4]],
        [7, *tokens[5:9]],
        [7, tokens[10]],
    ]
    assert [t for _, labels in windows for t in labels] == tokens


def test_texts_are_cut_to_the_budget_at_whole_characters():
    documents = [
        Document("é" * 10, "fr", 20),
        Document("ab", "en", 2),
        Document("é" * 10, "fr", 20),
        Document("x", "fr", 1),
    ]
    chosen = bits_per_byte.choose_texts(documents, 27)
    assert chosen == {"fr": ["é" * 10, "é" * 3], "en": ["ab"]}


def test_texts_are_drawn_from_all_of_several_files():
    documents = [Document(f"{file} {i:02}", "all", 4) for file in "ab" for i in range(50)]
    first = bits_per_byte.choose_texts(documents, 41)["all"]
    drawn = bits_per_byte.choose_texts(documents, 41, files=2)["all"]
    assert {text[0] for text in first} == {"a"} and {text[0] for text in drawn} == {"a", "b"}
    assert [len(text) for text in drawn] == [4] * 10 + [1]
    # In whatever order they are read, and all of them where there are no more.
    assert bits_per_byte.choose_texts(documents[::-1], 41, files=2)["all"] == drawn
    assert sorted(bits_per_byte.choose_texts(documents, 400, files=2)["all"]) == sorted(
        document.text for document in documents
    )


def test_continuations_match_pytorch(model):
    folder, config, params = model
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    (sample,) = samples.continuations(config, params, tokenizer, ["the quick"], 6, "float32")
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer("the quick")["input_ids"]]])
    expected = reference.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
    )
    assert sample["continuation"] == tokenizer.decode(
        expected[0, ids.shape[1] :], skip_special_tokens=True
    )


def test_continuation_stays_within_the_models_positions(model):
    folder, config, params = model
    few = dataclasses.replace(config, max_positions=8)
    (sample,) = samples.continuations(
        few, params, AutoTokenizer.from_pretrained(folder), ["the quick"], 40, "float32"
    )
    assert sample["continuation"]


def test_passages_come_from_the_middle_of_the_longest_document():
    text = (
        "heading\n"
        + "word " * 40
        + "\nthe second half begins here and goes on for a while, longer than sixty characters"
    )
    (passage,) = samples.passages({"en": ["x", text]})
    assert passage == "the second half begins here and goes on for a while, longer"
