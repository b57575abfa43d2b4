"""Speed, similarity and downstream tasks on a tiny model, against known values or PyTorch."""

import concurrent.futures
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertModel

from tests.helpers import TEXTS, tiny_model_folder, tiny_tokenizer, tokenizer_of_kind
from tokalign_jax.errors import UserError
from tokalign_jax.evaluation import downstream, similarity, speed
from tokalign_jax.models import hub, huggingface


def is_there(module: str) -> bool:
    try:
        __import__(module)
    except ImportError:
        return False
    return True


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny_model_folder(tmp_path_factory.mktemp("model"), "llama")
    config, _ = hub.load_config(folder)
    return folder, config, huggingface.load_params(folder, config), hub.load_tokenizer(folder)


def test_speed_is_the_median_without_the_first_run(model):
    """The first run, which compiles, is not timed."""
    _, config, params, tokenizer = model
    ticks = [
        0.0,
        *(
            tick
            for begins, seconds in ((1000, 4), (2000, 1), (3000, 2))
            for tick in (begins, begins + seconds)
        ),
    ]
    clock = iter(ticks).__next__
    found = speed.measure(config, params, tokenizer, ["the quick"], steps=8, repeats=3, clock=clock)
    assert found == speed.Speed(median=4.0, slowest=2.0, fastest=8.0)
    message = found.summary(["größe", "ab"], tokens=2)
    assert message["characters_per_token"] == 3.5 and message["characters_per_second"] == 14.0
    assert message["bytes_per_second"] == 4.0 * 9 / 2 and message["slowest_and_fastest"] == [
        2.0,
        8.0,
    ]


def test_embeddings_match_pytorchs_mean_states(model, monkeypatch):
    folder, config, params, tokenizer = model
    monkeypatch.setattr(similarity, "MAX_TOKENS", 40)  # the longest text is cut
    texts = [TEXTS[0] * 2, "x", TEXTS[2]]
    found = similarity.mean_states(config, params, tokenizer)(texts)
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    for text, vector in zip(texts, found):
        ids = [tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]][:40]
        with torch.no_grad():
            states = reference.model(torch.tensor([ids])).last_hidden_state[0]
        np.testing.assert_allclose(vector, states.mean(0).numpy(), rtol=2e-4, atol=2e-5)


def letters(texts):
    """Embeds a text by how often each character is in it."""
    return np.array([[text.count(chr(c)) for c in range(32, 127)] for text in texts], float) + 1e-9


def test_similarity_of_an_alignment():
    source, target = tiny_tokenizer(300, TEXTS), tiny_tokenizer(280, TEXTS)
    lines = {"en": ["the quick brown fox", "lazy dog sleeps"], "one": ["abc"]}
    known = source.get_vocab()
    right = np.array(
        [known[str(target.convert_ids_to_tokens(i))] for i in range(280)]
    )  # the smaller vocabulary is in the larger
    found = similarity.compare(right, source, target, lines, letters)
    assert found["en"]["lines"] == 2 and found["en"]["similarity"] == pytest.approx(1.0)
    assert 0 < found["en"]["unrelated"] < 0.95 and found["one"]["unrelated"] is None
    wrong = np.full(280, known["q"])
    worse = similarity.compare(wrong, source, target, lines, letters)
    assert worse["en"]["similarity"] < 0.5


@pytest.mark.skipif(is_there("sentence_transformers"), reason="sentence-transformers is installed")
def test_missing_sentence_encoder_library_is_reported_with_the_remedy(tmp_path):
    with pytest.raises(UserError, match=r"pip install 'tokalign_jax\[encoder\]'"):
        similarity.sentence_encoder(str(tmp_path))


@pytest.mark.skipif(
    not is_there("sentence_transformers"),
    reason="sentence-transformers is not installed (pip install 'tokalign_jax[encoder]')",
)
def test_sentence_encoder_embeds(tmp_path):
    """A tiny BERT, whose texts sentence-transformers embeds by their mean states."""
    tokenizer = tokenizer_of_kind("bert", TEXTS, 200)
    size = len(tokenizer)
    config = BertConfig(
        vocab_size=size,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    BertModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    vectors = similarity.sentence_encoder(str(tmp_path))([TEXTS[0], TEXTS[0], TEXTS[2]])
    assert (
        vectors.shape == (3, 16)
        and np.array_equal(vectors[0], vectors[1])
        and not np.allclose(vectors[0], vectors[2])
    )
    with pytest.raises(UserError, match="no such folder"):
        similarity.sentence_encoder(str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be used as a sentence encoder"):
        similarity.sentence_encoder(str(tmp_path))


TASK = """
task: copied_word
dataset_path: json
dataset_kwargs:
  data_files:
    test: examples.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - metric: acc
"""


@pytest.fixture
def task_folder(tmp_path):
    (tmp_path / "copied_word.yaml").write_text(TASK)
    examples = [
        {"question": "the quick brown", "choices": ["fox", "lazy"], "answer": i % 2}
        for i in range(4)
    ]  # whatever the model prefers, it is right in half of them
    (tmp_path / "examples.jsonl").write_text("\n".join(map(json.dumps, examples)))
    return tmp_path


@pytest.mark.skipif(is_there("lm_eval"), reason="lm-eval is installed")
def test_missing_lm_eval_is_reported_with_the_remedy(task_folder):
    with pytest.raises(
        UserError, match=r"--tasks needs lm-eval.*pip install 'tokalign_jax\[lm-eval\]'"
    ):
        downstream.check(["copied_word"], task_folder)


@pytest.mark.skipif(
    not is_there("lm_eval"), reason="lm-eval is not installed (pip install 'tokalign_jax[lm-eval]')"
)
def test_local_task_runs_offline(model, task_folder, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    downstream.check(["copied_word"], task_folder)
    with pytest.raises(UserError, match=r"'other'.*are copied_word"):
        downstream.check(["other"], task_folder)
    found = downstream.run(model[0], ["copied_word"], task_folder)
    assert (
        found["copied_word"]["acc"]["value"] == 0.5
        and found["copied_word"]["acc"]["standard_error"] > 0
    )


def test_missing_data_of_a_task_is_reported(task_folder, monkeypatch):
    class Pool:
        def __init__(self, *args, **options):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *args):
            pass

        def submit(self, *args):
            found = concurrent.futures.Future()
            found.set_exception(FileNotFoundError("Unable to find 'examples.jsonl'"))
            return found

    monkeypatch.setattr(downstream, "ProcessPoolExecutor", Pool)
    with pytest.raises(UserError, match=r"--tasks x: Unable.*'examples.jsonl'.*--task-folder"):
        downstream.run_in_subprocess([task_folder], ["x"], task_folder, 0)


def test_folder_of_a_model_may_be_relative(task_folder, monkeypatch, tmp_path):
    """Tasks are run in their own folder, since paths of their data are relative to it."""
    seen = []

    def simple_evaluate(model_args, tasks, **others):
        seen.append((model_args["pretrained"], Path.cwd()))
        return {"results": {task: {"acc,none": 0.5} for task in tasks}}

    monkeypatch.setitem(
        sys.modules, "lm_eval", types.SimpleNamespace(simple_evaluate=simple_evaluate)
    )
    monkeypatch.setattr(downstream, "_task_manager", lambda tasks, folder: None)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    found = downstream.run(Path("runs/export"), ["x"], task_folder)
    assert seen == [(str(elsewhere / "runs" / "export"), task_folder)] and Path.cwd() == elsewhere
    assert found == {"x": {"acc": {"value": 0.5, "standard_error": None}}}


def test_missing_task_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no such folder"):
        downstream.check(["x"], tmp_path / "nowhere")


def test_metrics_are_reported_with_standard_errors():
    result = {
        "alias": "x",
        "acc,none": 0.5,
        "acc_stderr,none": 0.1,
        "f1,strict": 1,
        "f1_stderr,strict": "N/A",
        "sample_len": 4,
    }
    assert downstream._metrics(result) == {
        "acc": {"value": 0.5, "standard_error": 0.1},
        "f1 (strict)": {"value": 1.0, "standard_error": None},
    }
