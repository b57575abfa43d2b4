"""The Python API: functions on arrays, refused input, and the examples."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tokalign_jax as ta
from tests.helpers import TEXTS, tiny_model_folder, tiny_tokenizer
from tokalign_jax.utils import paths

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> ta.Model:
    return ta.load_model(str(tiny_model_folder(tmp_path_factory.mktemp("source"), "llama")))


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(330, TEXTS * 2)


@pytest.fixture(scope="module")
def adapted(source, tokenizer) -> ta.Model:
    return ta.initialize(source, tokenizer, ta.align(source.tokenizer, tokenizer))


def rows(model: ta.Model) -> np.ndarray:
    return np.asarray(model.params["embed_tokens"]["embedding"])


def test_import_loads_nothing_large_and_dir_lists_the_api():
    code = (
        "import sys, tokalign_jax as ta\n"
        "assert not {'jax', 'transformers', 'numpy'} & set(sys.modules), 'too much'\n"
        "assert dir(ta) == sorted([*ta.__all__, '__version__']), dir(ta)\n"
        "assert all(getattr(ta, name).__doc__ for name in ta.__all__)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=EXAMPLES.parent)
    with pytest.raises(AttributeError, match="no attribute 'algin'"):
        _ = ta.algin


def test_new_rows_are_means_of_pieces_and_shared_tokens_keep_theirs(source, tokenizer, adapted):
    alignment = ta.align(source.tokenizer, tokenizer)
    assert rows(adapted).shape == (adapted.config.vocab_size, rows(source).shape[1])
    names = {token: i for token, i in source.tokenizer.get_vocab().items()}
    for i, rule in enumerate(alignment.rules):
        if rule == ta.Rule.EXACT:
            same = names[tokenizer.convert_ids_to_tokens(i)]
            np.testing.assert_array_equal(rows(adapted)[i], rows(source)[same])
    news = np.flatnonzero(alignment.rules == ta.Rule.PIECES).tolist()
    new = next(i for i in news if tokenizer.decode([i]).isascii())
    explanation = ta.explain(alignment, source.tokenizer, tokenizer, new)
    text = tokenizer.decode([new])
    pieces = source.tokenizer(text)["input_ids"]
    assert explanation["rule"] == "pieces" and explanation["token"] == text
    assert set(explanation["embedding"]) == {source.tokenizer.decode([piece]) for piece in pieces}
    np.testing.assert_allclose(rows(adapted)[new], rows(source)[pieces].mean(0), rtol=1e-5)


def test_own_tokenizer_leaves_the_model_unchanged(source):
    same = ta.initialize(source, source.tokenizer, ta.align(source.tokenizer, source.tokenizer))
    np.testing.assert_array_equal(rows(same), rows(source))
    before, after = ta.evaluate(source, TEXTS), ta.evaluate(same, TEXTS)
    assert before == pytest.approx(after)


@pytest.mark.parametrize("method", ["full", "embedding", "lora"])
def test_training_returns_a_copy_in_which_only_trained_parameters_change(adapted, method):
    before = {path: np.array(leaf) for path, leaf in paths.flatten(adapted.params).items()}
    options = {"learning_rate": 1e-2, "batch_size": 2, "sequence_length": 16}
    trained = ta.train(adapted, TEXTS * 8, method=method, steps=3, **options)
    for path, leaf in paths.flatten(adapted.params).items():
        np.testing.assert_array_equal(leaf, before[path], err_msg=path)
    after = paths.flatten(trained.params)
    assert after.keys() == before.keys() and len(trained.losses) == 3
    changed = {path for path, leaf in after.items() if not np.array_equal(leaf, before[path])}
    vocabulary = {"embed_tokens/embedding", "lm_head/kernel"}
    if method == "embedding":
        assert changed == vocabulary
    assert changed >= vocabulary and (method == "embedding" or any("q_proj" in p for p in changed))
    assert jax.tree.map(np.shape, trained.params) == jax.tree.map(np.shape, adapted.params)


def test_saved_model_opens_in_transformers_and_generates_the_same(adapted, tmp_path):
    folder = ta.save(adapted, tmp_path / "adapted")
    model = AutoModelForCausalLM.from_pretrained(folder)
    opened = AutoTokenizer.from_pretrained(folder)
    assert opened.get_vocab() == adapted.tokenizer.get_vocab()
    again = ta.load_model(str(folder))
    np.testing.assert_array_equal(rows(again), rows(adapted))
    start = adapted.tokenizer.bos_token_id
    with torch.no_grad():
        ids = torch.tensor([[start, *opened("The quick")["input_ids"]]])
        expected = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=-1)
    added = opened.decode(expected[0], skip_special_tokens=True).removeprefix("The quick")
    assert ta.generate(adapted, "The quick", 5) == added
    with pytest.raises(ta.UserError, match="not empty"):
        ta.save(adapted, folder)


def test_initialisation_with_text_is_distilled_from_the_source(source, tokenizer):
    alignment = ta.align(source.tokenizer, tokenizer)
    lines = []
    budgets = {"distillation_tokens": 400, "generated_tokens": 200}
    model = ta.initialize(source, tokenizer, alignment, TEXTS * 20, log=lines.append, **budgets)
    assert model.config.vocab_size == len(rows(model)) and any("distillation" in n for n in lines)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, t: ta.align(s.tokenizer, t, method="best"), "alignment.method"),
        (lambda s, t: ta.align(s.tokenizer, t, method="focus"), "texts="),
        (lambda s, t: ta.align(s.tokenizer, t, method="omp"), "donor"),
        (lambda s, t: ta.align(s.tokenizer, t, pivot=3), "nearest is 'alignment.pivots'"),
        (lambda s, t: ta.align(s.tokenizer, t, texts="one text"), "single string"),
        (lambda s, t: ta.train(s, ["short"], steps=1, sequence_length=64), "fewer than"),
        (lambda s, t: ta.train(s, TEXTS, steps=1, learning_rat=1.0), "learning_rate"),
        (lambda s, t: ta.train(s, TEXTS, steps=-1), "stage1.steps"),
        (lambda s, t: ta.train(s, TEXTS, objective="mixture"), "needs the source model"),
        (lambda s, t: ta.evaluate(s, "one text"), "single string"),
        (lambda s, t: ta.evaluate(s, {"en": "one text"}), "single string"),
        (lambda s, t: ta.evaluate(s, [5]), "not a string: 5"),
        (lambda s, t: ta.evaluate(s, []), "no text to measure"),
        (lambda s, t: ta.evaluate(s, {"en": TEXTS, "de": [""]}), "no text to measure of 'de'"),
        (lambda s, t: ta.save(s, __file__), "is a file: name a new folder"),
        (
            lambda s, t: ta.initialize(s, s.tokenizer, ta.align(s.tokenizer, t)),
            "another target tokenizer",
        ),
        (
            lambda s, t: ta.explain(ta.align(s.tokenizer, t), t, s.tokenizer, 5),
            "another source tokenizer",
        ),
        (lambda s, t: ta.load_model("/nowhere/at/all"), "no such folder"),
        (lambda s, t: ta.load_texts("/nowhere/at/all"), "/nowhere/at/all"),
        (
            lambda s, t: ta.explain(ta.align(s.tokenizer, t), s.tokenizer, t, "two words"),
            "a single token",
        ),
        (
            lambda s, t: ta.explain(ta.align(s.tokenizer, t), s.tokenizer, t, 10**6),
            "a single token",
        ),
    ],
)
def test_bad_input_is_a_user_error(call, message, source, tokenizer):
    with pytest.raises(ta.UserError, match=message):
        call(source, tokenizer)


def test_unpaired_surrogates_are_measured_as_question_marks(source):
    assert ta.evaluate(source, ["a \ud800 b"]) == ta.evaluate(source, ["a ? b"])


def test_texts_stop_at_the_byte_budget(tmp_path):
    for name, size in (("small", 40), ("large", 120)):
        lines = [
            json.dumps({"text": f"{name} {i:03} " + "x" * 90, "lang": name}) for i in range(size)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    texts = ta.load_texts(str(tmp_path), language_field="lang", budget_bytes=4_000)
    sizes = {name: sum(map(len, group)) for name, group in texts.items()}
    assert 3_800 < sum(sizes.values()) <= 4_000
    assert 2 < sizes["large"] / sizes["small"] < 4
    everything = ta.load_texts(str(tmp_path), language_field="lang")
    assert {name: len(group) for name, group in everything.items()} == {"small": 40, "large": 120}


@pytest.mark.slow
def test_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    """With a quarter of the text to start from."""
    monkeypatch.chdir(tmp_path)
    cells = json.loads((EXAMPLES / "adapt.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    budgets = {"distillation_tokens=4_000": "distillation_tokens=1_000"}
    budgets |= {"generated_tokens=2_000": "generated_tokens=500"}
    names: dict = {}
    for cell in code:
        for budget, smaller in budgets.items():
            cell = cell.replace(budget, smaller)
        exec(cell, names)
    assert all(budget in "".join(code) for budget in budgets)
    assert names["scores"]["trained"]["all"] < names["scores"]["mixed"]["all"]
    assert "model.safetensors" in capsys.readouterr().out


@pytest.mark.slow
def test_script_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    script = EXAMPLES / "zero_shot.py"
    assert len(script.read_text().splitlines()) <= 40
    runpy.run_path(str(script), run_name="__main__")
    assert (tmp_path / "adapted" / "model.safetensors").is_file()
    assert "bits per byte" in capsys.readouterr().out
