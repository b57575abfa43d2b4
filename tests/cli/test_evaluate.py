"""The evaluate command: a whole evaluation of tiny models, a workdir, and refused input."""

import argparse
import json

import pytest

from tests.helpers import TEXTS, tiny_model_folder, tiny_tokenizer
from tokalign_jax.cli import evaluate, evaluate_inputs
from tokalign_jax.config import Config, TextConfig, config_to_dict
from tokalign_jax.errors import UserError
from tokalign_jax.evaluation import abilities, bits_per_byte
from tokalign_jax.models import hub, huggingface
from tokalign_jax.reporting import side_by_side
from tokalign_jax.reporting.pages import terminal
from tokalign_jax.text import corpus

LANGUAGES = {
    "en": [TEXTS[0], " ".join(reversed(TEXTS[0].split()))],
    "xx": [f"{TEXTS[2]} {i}" for i in range(2)],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models whose tokenizers differ, a second one with the tokenizer of the latter, and text
    in two languages.
    """
    folder = tmp_path_factory.mktemp("models")
    small = tiny_tokenizer(280, TEXTS)
    for seed, (name, tokenizer) in enumerate(
        [("large", None), ("small", small), ("teacher", small)]
    ):
        size = len(tokenizer) if tokenizer else 300
        tiny_model_folder(folder / name, "llama", vocab_size=size, tokenizer=tokenizer, seed=seed)
    known = hub.load_tokenizer(folder / "large").get_vocab()
    alignment = {small.convert_tokens_to_ids(token): known[token] for token in small.get_vocab()}
    (folder / "align_matrix.json").write_text(json.dumps(alignment))
    records = [{"text": text, "lang": lang} for lang, texts in LANGUAGES.items() for text in texts]
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, records)))
    questions = [{"task": "words", "question": "The quick brown", "choices": [" fox", " dog"]}] * 3
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (folder / "bad.jsonl").write_text(json.dumps({**questions[0], "choices": [" fox"]}))
    (folder / "other.jsonl").write_text(json.dumps({"text": TEXTS[1], "lang": "code"}))
    (folder / "train.jsonl").write_text(json.dumps({"text": f"before {TEXTS[0]} and behind"}))
    return folder


def arguments(*given: str, **named: object) -> argparse.Namespace:
    quick = [
        "--steps=4",
        "--repeats=1",
        "--prompts=1",
        "--prompt-tokens=16",
        "--sequence-length=32",
        "--batch=4",
        "--language-field=lang",
    ]
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in named.items()]
    return evaluate.parser().parse_args([*quick, *flags, *given])


def silent(line: str) -> None:
    """No progress lines."""


def test_evaluate_compares_models_in_every_measure(folders, tmp_path, capsys):
    out = tmp_path / "out"
    given = arguments(
        models=f"{folders}/large,{folders}/small",
        text=folders / "text.jsonl",
        training_text=folders / "train.jsonl",
        alignment=folders / "align_matrix.json",
        teacher=folders / "teacher",
        abilities=folders / "questions.jsonl",
        max_questions=2,
        other_text=folders / "other.jsonl",
        output=out,
    )
    content = evaluate.run(given, silent)
    assert json.loads((out / "scores.json").read_text()) == json.loads(json.dumps(content))
    assert (out / "scores.png").stat().st_size > 10_000
    large, small = content["models"]["large"], content["models"]["small"]

    config, _ = hub.load_config(folders / "small")
    params, tokenizer = (
        huggingface.load_params(folders / "small", config),
        hub.load_tokenizer(folders / "small"),
    )
    expected = bits_per_byte.evaluate(
        config, params, tokenizer, LANGUAGES, sequence_length=32, batch=4
    )
    assert {k: scores["bits_per_byte"] for k, scores in small["languages"].items()} == {
        k: pytest.approx(scores.bits_per_byte) for k, scores in expected.items()
    }
    # What is kept of the first model.
    questions = abilities.read(str(folders / "questions.jsonl"), 2)
    answers = abilities.score(config, params, tokenizer, questions, tokenizer.eos_token_id)
    right = "".join("01"[correct] for correct in abilities.is_right(answers).tolist())
    assert (
        "".join(small["abilities"]["right"].values()) == right and len(right) == 2 + 2
    )  # with the sums
    assert sum(cut["questions"] for cut in small["abilities"]["by_cut"].values()) == 4
    assert "by_cut" not in large["abilities"] and "fidelity" not in large
    assert [*small["fidelity"]["languages"]] == ["en", "xx"] and small["fidelity"]["pooled"][
        "divergence"
    ]["value"] > 0
    other = bits_per_byte.evaluate(
        config, params, tokenizer, {"code": [TEXTS[1]]}, sequence_length=32, batch=4
    )
    assert small["other_text"]["pooled"]["bits_per_byte"] == pytest.approx(
        other["code"].bits_per_byte
    )
    assert small["other_text"]["fidelity"]["pooled"]["chunks"] > 0
    for language, difference in content["differences"]["small"]["languages"].items():
        less = (
            small["languages"][language]["bits_per_byte"]
            - large["languages"][language]["bits_per_byte"]
        )
        assert (
            difference["difference"] == pytest.approx(less)
            and difference["interval"][0] <= less <= difference["interval"][1]
        )
    assert (
        small["languages"]["en"]["words"] == 26
        and small["languages"]["en"]["fertility"] == expected["en"].tokens / 26
    )
    speed = small["generation"]
    assert speed["characters_per_second"] == pytest.approx(
        speed["steps_per_second"] * speed["characters_per_token"]
    )
    assert "280" in large["drafting"]["not_comparable"]  # another vocabulary than the teacher's
    assert 0 < small["drafting"]["languages"]["en"]["sampled"]["rate"] < 1
    assert content["alignment"]["languages"]["en"]["similarity"] == pytest.approx(
        1.0, abs=1e-5
    )  # it keeps the text
    # One of two documents was copied, whole.
    assert (
        content["overlap"]["languages"]["en"]["seen"] == len(TEXTS[0])
        and content["overlap"]["languages"]["xx"]["seen"] == 0
    )

    shown = capsys.readouterr().out
    assert "What the model retains" in shown and "Abilities by suite" in shown
    assert (
        shown.count("Not comparable") == 1
        and "warning: 50.0% of the held-out text of 'en'" in shown
    )
    with pytest.raises(UserError, match="exists already"):
        evaluate_inputs.check(given, silent)


def test_workdir_is_evaluated_on_its_held_out_text_and_alignment(folders, tmp_path):
    """A workdir with the files that evaluation reads."""
    text = TextConfig(language_field="lang", held_out_fraction=0.5)
    config = Config(
        source_model=str(folders / "large"), corpus=str(folders / "text.jsonl"), text=text
    )
    corpus.run(config, tmp_path / "corpus", silent)
    (tmp_path / "config.json").write_text(json.dumps(config_to_dict(config)))
    (tmp_path / "stages.json").write_text("{}")
    (tmp_path / "align").mkdir()
    (tmp_path / "align" / "align_matrix.json").write_text(
        (folders / "align_matrix.json").read_text()
    )
    with pytest.raises(UserError, match="has no export yet"):
        evaluate_inputs.check(arguments(workdir=tmp_path, output=tmp_path / "out"), silent)
    (tmp_path / "export").symlink_to(folders / "small")
    inputs = evaluate_inputs.check(arguments(workdir=tmp_path, output=tmp_path / "out"), silent)
    assert [s.name for s in inputs.models] == ["source", "export"] and inputs.aligned is not None
    held_out = [document.text for document in corpus.held_out(tmp_path / "corpus")]
    assert sorted(text for texts in inputs.material.texts.values() for text in texts) == sorted(
        held_out
    )
    training = [
        document
        for group in evaluate_inputs.training_text(inputs, silent) or ()
        for document in group
    ]
    assert len(training) + len(held_out) == 4
    with pytest.raises(
        UserError, match=r"'stage1', which the run .* does not have; it has source, export"
    ):
        evaluate_inputs.check(
            arguments(workdir=tmp_path, states="source,stage1", output=tmp_path / "out"), silent
        )
    # What a later command with other settings left behind, or has not finished, is not judged
    # beside the rest.
    for record, message in (
        ({"fingerprint": "of before", "finished": True}, "export was made with other settings"),
        ({"fingerprint": "of before", "finished": False}, "export is not finished"),
    ):
        (tmp_path / "stages.json").write_text(json.dumps({"stages": {"export": record}}))
        with pytest.raises(UserError, match=message):
            evaluate_inputs.check(arguments(workdir=tmp_path, output=tmp_path / "out"), silent)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({}, "give --models=FOLDER,FOLDER, or --workdir"),
        ({"models": "large"}, "--text is missing"),
        ({"models": "small,small", "text": "text.jsonl"}, "two models are called 'models.*/small'"),
        ({"models": "nowhere", "text": "text.jsonl"}, "there is no such folder"),
        ({"models": "small", "text": "nowhere.jsonl"}, "does not exist"),
        (
            {"models": "small", "text": "text.jsonl", "language_field": "tongue"},
            "has no field 'tongue'",
        ),
        (
            {"models": "large", "text": "text.jsonl", "teacher": "teacher"},
            "300 tokens and the teacher's 280.*first is 280",
        ),
        (
            {"models": "small", "text": "text.jsonl", "alignment": "align_matrix.json"},
            "--alignment needs two models",
        ),
        (
            {"models": "small,large", "text": "text.jsonl", "alignment": "align_matrix.json"},
            "align_matrix.json",
        ),
        ({"workdir": "large"}, "is not the workdir of a run"),
        (
            {"models": "small", "text": "text.jsonl", "encoder": "large"},
            "--encoder needs an alignment to score",
        ),
        (
            {"models": "small", "text": "text.jsonl", "training_text": "nowhere.jsonl"},
            "does not exist",
        ),
        (
            {"models": "small", "text": "text.jsonl", "abilities": "nowhere.jsonl"},
            "nowhere.jsonl' matches no file",
        ),
        (
            {"models": "small", "text": "text.jsonl", "abilities": "bad.jsonl"},
            r"bad.jsonl', line 1: 'choices' is \[' fox'\]",
        ),
        (
            {"models": "small", "text": "text.jsonl", "other_text": "nowhere.jsonl"},
            "does not exist",
        ),
    ],
)
def test_bad_input_is_refused_before_any_work(folders, tmp_path, named, message):
    paths = {
        name: ",".join(str(folders / part) for part in value.split(","))
        if name != "language_field"
        else value
        for name, value in named.items()
    }
    with pytest.raises(UserError, match=message):
        evaluate_inputs.check(arguments(**paths, output=tmp_path / "out"), silent)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("beside", [[], ["--tasks=some"], ["--encoder=some"]])
def test_gpu_memory_is_left_for_pytorch_when_it_is_used(tmp_path, monkeypatch, beside):
    prepared = []
    monkeypatch.setattr(evaluate.compiling, "prepare", lambda alone: prepared.append(alone))
    assert (
        evaluate.main([f"--models={tmp_path / 'none'}", f"--output={tmp_path / 'out'}", *beside])
        == 2
    )
    assert prepared == [not beside]


def test_table_of_one_model_and_one_language_has_no_pooled_row():
    """No pooled row, no differences, no intervals of a single document."""
    row = {"bits_per_byte": 1.25, "bytes_per_token": 4.0, "documents": 1, "fertility": None}
    speed = {
        "steps_per_second": 10.0,
        "slowest_and_fastest": [9.0, 11.0],
        "characters_per_token": 3.0,
    }
    speed |= {"characters_per_second": 30.0, "bytes_per_second": 31.0}
    model = {"languages": {"all": row}, "pooled": row, "loses": ["tabs"], "generation": speed}
    content = {"models": {"m": model}, "differences": {}, "settings": {}}
    lines = terminal(side_by_side.sections(content))
    assert sum(line.split()[:1] == ["all"] for line in lines) == 2  # bits per byte, tokens
    assert "  all               1  1.250" in lines and "10.0 [9.0, 11.0]" in "\n".join(lines)
    (line,) = side_by_side.warning_lines(content)
    assert "does not keep tabs" in line
