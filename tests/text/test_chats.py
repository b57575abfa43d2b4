"""Chats: messages, templates, learned tokens, and templates kept from the source."""

import copy
import json
from typing import Literal

import numpy as np
import pytest

from tests.helpers import TEXTS, tiny_tokenizer
from tokalign_jax.config import Config, TextConfig
from tokalign_jax.errors import UserError
from tokalign_jax.text import chats, corpus, shared_boundaries, tokenizing
from tokalign_jax.text.boundaries import NONE
from tokalign_jax.text.special_tokens import end_of_text_id
from tokalign_jax.text.tokenizing import TokenShards
from tokalign_jax.training.batches import PairedSource, SourceText, TokenSource

Kind = Literal["byte_level", "metaspace"]
CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{'<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<s>[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' </s>' }}{% endif %}{% endfor %}"
)
# Thinks in the last turn alone, as Qwen 3 does.
THINKING = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n'}}{% if m['role'] == 'assistant' and "
    "loop.last %}{{'<think>\n\n</think>\n\n'}}{% endif %}{{m['content'] + '<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
)
CHAT = [
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "A dog."},
    {"role": "user", "content": "A dog."},
    {"role": "assistant", "content": "Yes, a dog."},
]


def with_chat(template, specials, vocabulary=300, kind: Kind = "byte_level", **roles):
    tokenizer = tiny_tokenizer(vocabulary, TEXTS * 2, kind=kind)
    tokenizer.add_tokens(list(specials), special_tokens=True)
    for role, token in roles.items():
        setattr(tokenizer, role, token)
    tokenizer.chat_template = template
    return tokenizer


def chatml(vocabulary=300, **how):
    return with_chat(
        CHATML, ["<|im_start|>", "<|im_end|>"], vocabulary, eos_token="<|im_end|>", **how
    )


def gemma(kind: Kind = "metaspace"):
    tokens = ["<bos>", "<start_of_turn>", "<end_of_turn>"]
    return with_chat(GEMMA, tokens, 420, kind, bos_token="<bos>")


def llama2():
    return with_chat(LLAMA2, ["<s>", "</s>"], 300, eos_token="</s>")


@pytest.mark.parametrize(
    ("tokenizer", "learned"),
    [
        (chatml(), ["A dog.<|im_end|>", "Yes, a dog.<|im_end|>"]),
        (gemma(), ["A dog.<end_of_turn>", "Yes, a dog.<end_of_turn>"]),
        (gemma("byte_level"), ["A dog.<end_of_turn>", "Yes, a dog.<end_of_turn>"]),
        (llama2(), [" A dog. </s>", " Yes, a dog. </s>"]),
        (
            with_chat(THINKING, ["<|im_start|>", "<|im_end|>"]),
            ["A dog.<|im_end|>", "<think>\n\n</think>\n\nYes, a dog.<|im_end|>"],
        ),
        (
            with_chat(
                "{% for m in messages %}{{m['role'] + ': ' + m['content'] + '\n'}}{% endfor %}", []
            ),
            ["assistant: A dog.", "assistant: Yes, a dog.\n"],
        ),
    ],
    ids=["chatml", "gemma", "gemma-bytes", "llama2", "thinking", "plain"],
)
def test_only_assistant_turns_are_learned(tokenizer, learned):
    written = chats.write(tokenizer, CHAT)
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert [text[begin:end] for begin, end in written.learned] == learned
    found = chats.Encoder(tokenizer).encode([written.pieces])[0]
    is_learned = chats.is_learned(found.ends, written.learned)
    stretches = np.flatnonzero(np.diff(np.concatenate([[0], is_learned.astype(int), [0]])))
    decoded = [
        tokenizer.decode(found.ids[a:b].tolist(), skip_special_tokens=False)
        for a, b in stretches.reshape(-1, 2)
    ]
    assert [text.strip() for text in decoded] == [text.strip() for text in learned]


@pytest.mark.parametrize("tokenizer", [chatml(), llama2(), gemma("byte_level")])
def test_tokens_equal_those_of_apply_chat_template(tokenizer):
    written = chats.write(tokenizer, CHAT)
    expected = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    assert chats.Encoder(tokenizer).encode([written.pieces])[0].ids.tolist() == expected
    message = [{"role": "user", "content": "What is it?"}]
    expected = tokenizer.apply_chat_template(
        message, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert chats.prompt_ids(tokenizer, ["What is it?"]) == [expected]


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ([], "no list of messages"),
        ("hello", "no list of messages"),
        (["hello"], "message 1 is no object"),
        ([{"role": "user"}], "message 1 lacks 'content'"),
        ([{"content": "a"}], "message 1 lacks 'role'"),
        ([{"role": "human", "content": "a"}], "role 'human'"),
        ([{"role": ["user"], "content": "a"}], "role"),
        ([{"role": "user", "content": None}], "message 1 has a content that is no text"),
        ([{"role": "user", "content": [{"type": "image"}]}], "no text"),
        ([{"role": "user", "content": "a"}], "no message of the role 'assistant'"),
        ([{"role": "assistant", "content": " "}], "no message of the role 'assistant'"),
    ],
)
def test_errors_on_broken_chats_state_the_problem(messages, what):
    with pytest.raises(chats.Unusable, match=what):
        chats.messages_of(messages)


def test_multi_part_contents_are_joined():
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    assert chats.messages_of([{"role": "assistant", "content": parts}])[0]["content"] == "a b"


def test_chat_refused_by_the_template_states_the_reason():
    chat = [{"role": "system", "content": "Be kind."}, *CHAT]
    with pytest.raises(chats.Unusable, match="no system role"):
        chats.write(gemma(), chat)
    silent = chatml()
    silent.chat_template = "{{ 'nothing' }}"
    with pytest.raises(chats.Unusable, match="message 2"):
        chats.write(silent, CHAT)
    assert "no chat template" in chats.template_problem(tiny_tokenizer(300, TEXTS))
    assert "fails" in chats.template_problem(silent) and not chats.template_problem(gemma())


# --- In a corpus --------------------------------------------------------------------------------


def corpus_of(folder, records, check=lambda messages: None, **text):
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    config = Config(
        corpus=str(folder / "data.jsonl"), text=TextConfig(held_out_fraction=0.0, **text)
    )
    corpus.check(config, check)
    return config, corpus.run(config, folder / "corpus", lambda line: None, check)


def test_chats_and_texts_of_one_file_become_shards(tmp_path):
    records = [{"messages": CHAT[i:]} for i in (0, 1, 2)]
    records += [{"text": text} for text in TEXTS]
    config, summary = corpus_of(tmp_path, records)
    source, target = chatml(), gemma()
    tokenizing.run(
        config, tmp_path / "corpus", source, target, tmp_path / "tokens", lambda line: None
    )
    shards = [TokenShards.open(tmp_path / "tokens" / side) for side in tokenizing.SIDES]
    documents = [d for group in corpus.train_batches(tmp_path / "corpus") for d in group]
    count = sum(bool(d.chat) for d in documents)
    assert count >= 2 and summary["train_documents"] == len(documents) > count
    answers = [
        m["content"]
        for d in documents
        if d.chat
        for m in json.loads(d.chat)
        if m["role"] == "assistant"
    ]

    # What is learned of chats, in the sequences of training, is the answers.
    target_shards = shards[1]
    end = end_of_text_id(target)
    tokens = np.concatenate(
        [TokenSource(target_shards, 8)[i][1:] for i in range((len(target_shards.tokens) - 1) // 8)]
    )
    read = np.where(tokens < 0, ~tokens, tokens)
    np.testing.assert_array_equal(read, target_shards.tokens[1 : len(read) + 1])
    chat_ends = [target_shards.documents[i] for i, d in enumerate(documents) if d.chat]
    for number, document in enumerate(documents):
        begin = target_shards.documents[number - 1] if number else 1
        ids = tokens[begin - 1 : target_shards.documents[number] - 1]
        if not document.chat:
            assert (ids >= 0).all()
        elif target_shards.documents[number] <= len(read):
            output = str(target.decode(ids[ids >= 0].tolist(), skip_special_tokens=True))
            own = [m["content"] for m in json.loads(document.chat) if m["role"] == "assistant"]
            assert output.replace(" ", "") == "".join(own).replace(" ", "")
            assert ~ids[-1] == end
    assert answers and chat_ends

    # The source reads the same chats with its own special tokens.
    sides = (source, shards[0]), (target, target_shards)
    groups = corpus.train_batches(tmp_path / "corpus")
    shared_boundaries.run(groups, *sides, tmp_path / "boundaries", lambda line: None)
    positions = shared_boundaries.open_positions(tmp_path / "boundaries")
    ids = {
        name: (source.convert_tokens_to_ids(one), target.convert_tokens_to_ids(other))
        for name, one, other in (
            ("start", "<|im_start|>", "<start_of_turn>"),
            ("end", "<|im_end|>", "<end_of_turn>"),
        )
    }
    for one, other in ids.values():
        places = np.flatnonzero(target_shards.tokens == other)
        assert len(places) and (positions[places] != NONE).all()
        assert (shards[0].tokens[positions[places]] == one).all()
    item = PairedSource(target_shards, 8, SourceText(shards[0], positions), 16)[0]
    assert set(item) == {"tokens", "source", "positions"}


def test_broken_and_refused_chats_are_skipped_and_reported(tmp_path):
    def check(messages):
        chats.write(gemma(), messages)

    good = [{"messages": [*CHAT, *CHAT[: 2 * i]]} for i in range(4)]
    bad = [
        {"messages": [{"role": "gpt", "content": "a"}]},
        {"messages": [{"role": "system", "content": "a"}, *CHAT]},
    ]
    _, summary = corpus_of(tmp_path, [*good, *bad], check)
    assert summary["broken"]["records"] == 2 and "line 5" in summary["broken"]["first"]
    with pytest.raises(UserError, match=r"line 1 message 1 has the role 'gpt'"):
        corpus_of(tmp_path, [bad[0]] * 6, check)


def test_messages_field_may_be_renamed_or_absent(tmp_path):
    records = [{"dialogue": [*CHAT, *CHAT[: 2 * i]], "text": "a text"} for i in range(4)]
    corpus_of(tmp_path, records, messages_field="dialogue")
    assert next(corpus.train_batches(tmp_path / "corpus"))[0].chat
    with pytest.raises(UserError, match="holds"):
        corpus_of(tmp_path, [{"text": CHAT}] * 6, messages_field="")


# --- Templates kept from the source -------------------------------------------------------------


def test_source_template_and_special_tokens_are_kept():
    source, target = chatml(), tiny_tokenizer(420, TEXTS * 5)
    before = copy.deepcopy(target).get_vocab()
    found = chats.with_template(target, source, "source")
    assert found is not target and target.get_vocab() == before
    new = set(found.get_vocab()) - set(before)
    assert new == {"<|im_start|>", "<|im_end|>"} and len(found) == len(before) + 2
    assert found.eos_token == "<|im_end|>" and end_of_text_id(found) == end_of_text_id(target)
    assert not chats.template_problem(found)
    text = found.apply_chat_template(CHAT, tokenize=False)
    assert text == source.apply_chat_template(CHAT, tokenize=False)
    # Another template is replaced.
    other = chats.with_template(gemma(), source, "source")
    assert other.chat_template == CHATML and "<|im_end|>" in other.get_vocab()


def test_target_without_template_gets_the_sources_if_it_has_its_tokens():
    source, target = chatml(), tiny_tokenizer(420, TEXTS * 5)
    assert chats.with_template(target, source, "target") is target
    target.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    found = chats.with_template(target, source, "target")
    assert found.chat_template == CHATML and len(found) == len(target)
    own = gemma()
    assert chats.with_template(own, source, "target") is own
    with pytest.raises(UserError, match="has none"):
        chats.with_template(own, tiny_tokenizer(300, TEXTS), "source")
