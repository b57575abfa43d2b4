"""Abilities: question suites, scores against PyTorch, and how two tokenizers split the
questions.
"""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers import SHARED, TEXTS, tiny_model_folder
from tokalign_jax.config import MeshConfig
from tokalign_jax.errors import UserError
from tokalign_jax.evaluation import abilities
from tokalign_jax.evaluation.abilities import Question
from tokalign_jax.models import hub, huggingface
from tokalign_jax.parallel.sharding import make_mesh

QUESTIONS = [
    Question("a", "The quick brown", (" fox", " dog jumps over", " lazy")),
    Question("a", "The", (" dog", " def add(a, b):\n    return a + b")),
    Question("b", "Größe, été, ", ("año", "день", "数学", "it sleeps")),
    Question("b", f"{TEXTS[0]} The", (" fox", " dog")),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny_model_folder(tmp_path_factory.mktemp("model"), "llama")
    config, _ = hub.load_config(folder)
    return folder, config, huggingface.load_params(folder, config)


def write(path, questions):
    rows = [{"task": q.suite, "question": q.text, "choices": q.choices} for q in questions]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def log_likelihoods(folder, question, begin):
    """By PyTorch, one text at a time, with whole logits in float64."""
    tokenizer, reference = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder).eval(),
    )
    for choice in question.choices:
        ids = torch.tensor(
            [[begin, *tokenizer(question.text + choice, add_special_tokens=False)["input_ids"]]]
        )
        with torch.no_grad():
            logits = reference(ids[:, :-1]).logits[0].double()
        yield -torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()


@pytest.mark.parametrize("tokens_at_once", [8192, 16])
def test_ability_scores_match_pytorch(model, monkeypatch, tokens_at_once):
    folder, config, params = model
    monkeypatch.setattr(abilities, "_TOKENS_PER_BATCH", tokens_at_once)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    begin = abilities.beginning_id(tokenizer)
    assert begin == tokenizer.eos_token_id
    found = abilities.score(
        config, params, tokenizer, QUESTIONS, begin, "float32", make_mesh(MeshConfig(1, 1, 1))
    )
    assert found.shape == (4, 4)
    for row, question in zip(found, QUESTIONS):
        expected = [*log_likelihoods(folder, question, begin)]
        np.testing.assert_allclose(row[: len(expected)], expected, rtol=0, atol=1e-4)
        assert np.isneginf(row[len(expected) :]).all()


def test_scores_match_an_independent_scorer(model, tmp_path):
    judge = SHARED / "tools" / "judge.py"
    if not judge.exists():
        pytest.skip("the program that judges in PyTorch is not at hand")
    folder, config, params = model
    (tmp_path / "suites").mkdir()
    suites = {"words": QUESTIONS, "sums": abilities.sums(20)}
    for name, questions in suites.items():
        write(tmp_path / "suites" / f"{name}.jsonl", questions)
    command = [
        sys.executable,
        judge,
        "--abilities",
        tmp_path / "suites",
        "--out",
        tmp_path / "out",
        f"x={folder}",
    ]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    judged = json.loads((tmp_path / "out").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name, questions in suites.items():
        found = abilities.score(
            config, params, tokenizer, questions, abilities.beginning_id(tokenizer)
        )
        assert judged[name] == round(float(np.mean(found.argmax(1) == 0)), 3)


def test_error_names_a_question_too_long_for_the_model(model):
    folder, config, params = model
    long = Question("a", "0123456789" * 20, ("x", "y"))
    with pytest.raises(
        UserError, match=r"'012345.* has 201 tokens, but the model reads at most 128"
    ):
        abilities.score(
            config, params, AutoTokenizer.from_pretrained(folder), [*QUESTIONS, long], 0
        )


def test_questions_are_classified_by_how_tokenizers_split_them():
    """Letters are tokens of both; only the target has `ab` and only the source `fg`, while both
    have `cd`, `de` and ` x`.
    """

    def tokenizer(*merges):
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {
            t: i
            for i, t in enumerate([*alphabet, "ab", "cd", "de", "fg", "Ġx"])
            if len(t) < 2 or t in "".join(merges)
        }
        ids = {t: i for i, t in enumerate(vocabulary)}
        backend = Tokenizer(models.BPE(ids, [tuple(m) for m in merges if len(m) == 2]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="!")

    source, target = tokenizer("cd", "fg", "Ġx", "de"), tokenizer("ab", "Ġx", "de", "cd")
    kinds = {
        "alike": Question("s", "x", (" x", " y")),
        "question": Question("s", "fg", (" x", " y")),
        "composed": Question("s", "x", (" ab", " y")),
        "recut": Question("s", "x", ("cde", " y")),
    }
    assert dict(zip(kinds, abilities.segmentation_kinds(source, target, [*kinds.values()]))) == {
        k: k for k in kinds
    }
    # A token of question and answer together is the answer's.
    assert abilities.segmentation_kinds(source, target, [Question("s", "xa", ("b", "y"))]) == [
        "composed"
    ]
    assert {*kinds} == {*abilities.SEGMENTATION_KINDS}


def test_suites_are_read_from_files_folders_and_globs(tmp_path):
    write(tmp_path / "one.jsonl", QUESTIONS[:2])
    write(tmp_path / "two.jsonl", QUESTIONS[2:])
    everything = [*QUESTIONS, *abilities.sums()]
    assert abilities.read(str(tmp_path)) == abilities.read(f"{tmp_path}/*.jsonl") == everything
    assert abilities.read(f"{tmp_path}/one.jsonl, {tmp_path}/two.jsonl") == everything
    few = abilities.read(str(tmp_path), max_questions=1)
    assert [(q.suite, q.text) for q in few] == [
        ("a", "The quick brown"),
        ("b", "Größe, été, "),
        ("sums", "10 + 10 ="),
    ]


GOOD = {"task": "a", "question": "b", "choices": ["c", "d"]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "is not a JSON object"),
        *((json.dumps({k: v for k, v in GOOD.items() if k != key}), f"has no '{key}'") for key in GOOD),
        *((json.dumps({**GOOD, "choices": choices}), "two or more non-empty") for choices in (["c"], [], "cd", ["c", ""], [1, 2], None)),
        *((json.dumps({**GOOD, key: value}), f"'{key}' is") for key in ("task", "question") for value in ("", " ", 3, "\ud800")),
        (json.dumps({**GOOD, "choices": ["c", "d", "c"]}), "the correct choice 'c' appears twice"),
        ("[" * 100_000, "is not valid JSON"),
        # As in MMLU, ARC and HellaSwag.
        *((json.dumps({**GOOD, key: value}), f"must be the first, but '{key}' is") for key, value in (("answer", 1), ("answerKey", "B"), ("label", "1"), ("gold", "d"), ("answer", -1))),
    ],
)  # fmt: skip
def test_error_names_the_bad_line(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{line}\n")
    with pytest.raises(UserError, match=rf"bad\.jsonl', line 3.*{message}"):
        abilities.read(str(path))


@pytest.mark.parametrize("answer", [0, "A", "c"])
def test_answer_may_be_named_if_it_is_the_first_choice(tmp_path, answer):
    (tmp_path / "a.jsonl").write_text(json.dumps({**GOOD, "answer": answer}))
    assert abilities.read(str(tmp_path))[0].choices == ("c", "d")


def test_duplicate_wrong_choice_counts_once(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({**GOOD, "choices": ["c", "d", "e", "d"]}))
    assert abilities.read(str(tmp_path))[0].choices == ("c", "d", "e")


def test_errors_name_bad_files(tmp_path):
    for name, content, message in (
        ("empty.jsonl", b"\n", "has no questions"),
        ("latin.jsonl", b"\xe9", "cannot be read"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}' {message}"):
            abilities.read(str(tmp_path / name))
    with pytest.raises(UserError, match="nowhere' matches no file"):
        abilities.read(str(tmp_path / "nowhere"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"folder' has no \*\.jsonl files"):
        abilities.read(str(tmp_path / "folder"))


def test_sums_are_correct_and_deterministic():
    for question in abilities.sums():
        a, b = question.text.removesuffix(" =").split(" + ")
        assert int(question.choices[0]) == int(a) + int(b) and len(set(question.choices)) == 5
        assert 10 <= int(a) < 100 and 10 <= int(b) < 100
    assert len(set(abilities.sums())) == 60 and abilities.sums(2)[1] == abilities.sums()[1]
    assert len({question.choices[0] for question in abilities.sums()}) > 40
    ranks = [sorted(map(int, q.choices)).index(int(q.choices[0])) for q in abilities.sums()]
    assert sorted(ranks) == sorted([*range(5)] * 12)  # preferring small or large numbers is no use
    assert [q.text for q in abilities.sums(2)] == ["10 + 10 =", "47 + 71 ="]
