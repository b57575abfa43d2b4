"""Questions through the chat template: accepted answers, ends of turns, and a tiny model."""

import itertools
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import TEXTS, tiny_tokenizer
from tests.text.test_chats import chatml, llama2
from tests.training.toys import LLAMA
from tokalign_jax.errors import UserError
from tokalign_jax.evaluation import chat_questions
from tokalign_jax.evaluation.chat_questions import ChatQuestion, Replies
from tokalign_jax.models.config import LayerKind
from tokalign_jax.models.rotary import Rope
from tokalign_jax.models.transformer import init_params
from tokalign_jax.parallel import sharding
from tokalign_jax.reporting import retention
from tokalign_jax.utils import paths

QUESTIONS = [
    ChatQuestion("Capital of Peru?", ("Lima",)),
    ChatQuestion("Capital of Chile?", ("Santiago", "Santiago de Chile")),
    ChatQuestion("Say it.", ("nothing", "a dog, lima")),
]


def chain(tokenizer, text, then):
    """A model that says `text` after the line end of a prompt, and `then` goes on with that token
    for
    ever: the next token depends on the last one alone.
    """
    size = len(tokenizer)
    model = replace(
        LLAMA,
        vocab_size=size,
        hidden_size=512,
        num_heads=2,
        num_kv_heads=2,
        head_dim=4,
        max_positions=96,
        layer_kinds=(LayerKind(Rope(4, 10000.0, None)),) * 2,
    )
    leaves = paths.flatten(init_params(model, jax.random.key(0)))
    leaves = {p: jnp.zeros_like(x) if "_proj" in p else x for p, x in leaves.items()}
    table = np.eye(size, 512, dtype=np.float32)
    head = np.zeros_like(table)
    output = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = [tokenizer("\n", add_special_tokens=False)["input_ids"][-1], *output, then, then]
    for now, following in itertools.pairwise(ids):
        head[following] += table[now]
    leaves["embed_tokens/embedding"], leaves["lm_head/kernel"] = jnp.array(table), jnp.array(head)
    return model, paths.unflatten(leaves)


def asked(text, then):
    tokenizer = chatml()
    model, params = chain(tokenizer, text, tokenizer.convert_tokens_to_ids(then))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    lines = []
    found = chat_questions.ask(
        model, sharding.place(params, mesh), tokenizer, QUESTIONS, 8, "float32", mesh, lines.append
    )
    assert "right" in lines[0]
    return found


def test_tiny_model_answers_and_ends_its_turn():
    found = asked("Lima", "<|im_end|>")
    assert found.texts == ["Lima"] * 3
    assert found.right.tolist() == [True, False, False] and found.ended.all()
    # One that stops at the end of a document stops too; one that babbles does not.
    assert asked("Lima", "<|endoftext|>").ended.all()
    endless = asked("Lim", "a")
    assert endless.texts[0].startswith("Lima") and not endless.ended.any()


@pytest.mark.parametrize(
    ("reply", "answers", "right"),
    [
        ("The capital of Peru is Lima.", ["Lima"], True),
        ("LIMA", ["Lima"], True),
        ("Limassol", ["Lima"], False),
        ("Kilima", ["Lima"], False),
        ("", ["Lima"], False),
        ("It is 12.", ["12"], True),
        ("It is 120.", ["12"], False),
        ("São Paulo!", ["são paulo"], True),
        ("The answer: Port\n-au-Prince", ["Port-au-Prince"], True),
        ("答案是东京。", ["东京"], True),
        ("答案是京都。", ["东京"], False),
        ("Rome or Lima", ["Paris", "Lima"], True),
    ],
)
def test_reply_is_right_if_it_contains_an_accepted_answer_in_whole_words(reply, answers, right):
    assert chat_questions.is_right(reply, answers) == right


def test_scores_are_compared_with_the_source_on_the_same_questions():
    source = Replies(["a"] * 3, np.array([True, True, False]), np.array([True] * 3))
    model = Replies(["b"] * 3, np.array([True, False, False]), np.array([True, False, False]))
    own = chat_questions.summary(QUESTIONS, source, None, 0)
    found = chat_questions.summary(QUESTIONS, model, own, 0)
    assert own["right"]["value"] == pytest.approx(2 / 3) and "difference" not in own
    assert found["right"]["value"] == pytest.approx(1 / 3) == found["ended"]["value"]
    assert found["difference"]["value"] == pytest.approx(-1 / 3)
    assert found["kept"]["value"] == 0.5 and len(found["kept"]["interval"]) == 2
    json.dumps(found)
    # Of other questions nothing is compared.
    other = chat_questions.summary(QUESTIONS[:2], model, own, 0)
    assert "difference" not in other and "kept" not in other

    states = {
        name: {"pooled": {"bits_per_byte": 1.0}, "chat": answers}
        for name, answers in (("source", own), ("init", found))
    }
    (section,) = [s for s in retention.sections(states) if s.title == "Chat"]
    assert [row[0] for row in section.rows] == ["source", "init"]
    assert retention.figures(states["init"])["chat"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{", "line 2 is not valid JSON"),
        ("[1]", "line 2 is not a JSON object"),
        ('{"question": "a"}', "has no 'answers'"),
        ('{"question": " ", "answers": ["a"]}', "'question' is"),
        ('{"question": "a", "answers": []}', "'answers' is"),
        ('{"question": "a", "answers": "b"}', "'answers' is"),
        ('{"question": "a", "answers": ["?!"]}', "'answers' is"),
    ],
)
def test_broken_files_are_refused(tmp_path, line, what):
    file = tmp_path / "chat.jsonl"
    file.write_text('{"question": "a", "answers": ["b"]}\n' + line + "\n")
    with pytest.raises(UserError, match=what):
        chat_questions.read(str(file))
    file.write_text("\n")
    with pytest.raises(UserError, match="is empty"):
        chat_questions.read(str(file))
    with pytest.raises(UserError, match="cannot be read"):
        chat_questions.read(str(tmp_path / "none.jsonl"))
    file.write_text('{"question": "a", "answers": ["b"]}\n' * 3)
    assert len(chat_questions.read(str(file), 2)) == 2


def test_questions_that_cannot_be_asked_are_refused_before_any_work():
    with pytest.raises(UserError, match="no chat template"):
        chat_questions.check(tiny_tokenizer(300, TEXTS), "'a'", QUESTIONS, 8, 100)
    with pytest.raises(UserError, match="lower reply_tokens"):
        chat_questions.check(chatml(), "'a'", QUESTIONS, 80, 100)
    chat_questions.check(llama2(), "'a'", QUESTIONS, 8, 100)
    chat_questions.check(tiny_tokenizer(300, TEXTS), "'a'", [], 8, 100)
