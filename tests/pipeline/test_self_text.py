"""Corpora that the source model writes, alone and mixed with others."""

import json

import pytest

from tests.helpers import tiny_model_folder, tiny_tokenizer
from tests.pipeline.toy_runs import write_corpus
from tests.text.test_chats import CHATML, chatml, gemma
from tokalign_jax import pipeline
from tokalign_jax.config import Config, TextConfig, config_from_dict
from tokalign_jax.errors import UserError
from tokalign_jax.initialization import self_corpus
from tokalign_jax.initialization.self_text import Segment, Writer
from tokalign_jax.planning import disk
from tokalign_jax.text import chats, corpus, tokenizing


def chat_passage(tokenizer):
    start, end = (tokenizer.get_vocab()[f"<|im_{name}|>"] for name in ("start", "end"))
    return (
        Segment("", start),
        Segment("user\nWhat is it?", end),
        Segment("\n", start),
        Segment("assistant\nA dog.", end),
    )


def test_passages_become_documents_and_chats():
    tokenizer = chatml()
    chat = chat_passage(tokenizer)
    unfinished = (*chat[:3], Segment("assistant\nA do"))
    found = list(self_corpus.records([(Segment("a text"),), chat, unfinished], tokenizer))
    messages = [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "A dog."},
    ]
    assert found == [
        {"text": "a text", "language": "self"},
        {"messages": messages, "language": "self"},
    ]


def test_chats_of_a_start_are_written_in_the_template_of_the_target():
    source, target = chatml(), gemma()
    plain, chat = (Segment("a text"),), chat_passage(source)
    start, end = (source.get_vocab()[f"<|im_{name}|>"] for name in ("start", "end"))
    ids = {name: target.get_vocab()[f"<{name}_of_turn>"] for name in ("start", "end")}
    special = {start: ids["start"], end: ids["end"], 0: target.get_vocab()["<bos>"]}
    found = list(self_corpus.in_template([plain, chat], source, target, special))
    assert found == [
        plain,
        (
            Segment("", 0),
            Segment("", start),
            Segment("user\nWhat is it?", end),
            Segment("\n", start),
            Segment("model\nA dog.", end),
        ),
    ]


def test_chats_of_a_start_keep_a_template_that_the_target_cannot_replace():
    """The target has no template, or one with special tokens that the source lacks."""
    source, bare, target = chatml(), tiny_tokenizer(300, ["a text"]), gemma()
    chat = chat_passage(source)
    unknown = {target.get_vocab()["<start_of_turn>"]: 1}
    for other in (bare, target):
        assert list(self_corpus.in_template([chat], source, other, unknown)) == [chat]


def test_answers_that_are_cut_off_are_dropped(monkeypatch):
    tokenizer = chatml()
    end = tokenizer.get_vocab()["<|im_end|>"]
    question = tokenizer("What is it and why?", add_special_tokens=False)["input_ids"]
    answer = tokenizer("A dog.", add_special_tokens=False)["input_ids"]
    answers = iter([[*answer, end], answer, [end]])

    def sampled(self, prompts, length, stream):
        tails = [[*question, end]] * 3 if stream == 3 else list(answers)
        return [[*prompt, *tail] for prompt, tail in zip(prompts, tails, strict=True)]

    monkeypatch.setattr(Writer, "_draw", sampled)
    writer = Writer(None, None, tokenizer, None, None, 0)
    before, after = chats.around_question(tokenizer)
    parts = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after)]
    (passage,) = writer._chats(3, *parts)
    assert passage[-1] == Segment("assistant\nA dog.", end)


def test_self_can_be_mixed_with_other_text(tmp_path):
    config = Config(corpus=("/data/a=0.7,self=0.3",))
    assert corpus.has_self(config) and not corpus.has_self(Config(corpus="/data/self"))
    named = corpus.with_self(config, tmp_path / corpus.SELF_TEXT)
    assert named.corpus == ("/data/a=0.7", f"{tmp_path / corpus.SELF_TEXT}=0.3")
    rest = corpus.without_self(config)
    assert rest is not None and rest.corpus == ("/data/a=0.7",)
    assert corpus.without_self(Config(corpus="self")) is None
    assert corpus.names(Config(corpus="self")) == ["self"]
    assert disk.text_bytes(Config(corpus="self")) == 4 * Config().text.self_tokens
    with pytest.raises(UserError, match="weight"):
        corpus.names(Config(corpus="self,/data/a=0.7"))


def test_self_text_uses_its_own_fields(tmp_path):
    """The fields of the other text do not matter; results are grouped by source or language."""
    records = [{"text": f"text {i}", "language": "self"} for i in range(5)]
    self_corpus.save(records, tmp_path / corpus.SELF_TEXT)
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(json.dumps({"body": f"b {i}", "lang": "en"}) for i in range(5)))
    names = f"{tmp_path / corpus.SELF_TEXT},{other}"
    for text, groups in (
        (TextConfig(text_field="body", language_field="lang"), {"self", "en"}),
        (TextConfig(text_field="body", group_by="source"), {"self", "other.jsonl"}),
        (TextConfig(text_field="body"), {"all"}),
    ):
        config = Config(corpus=names, text=text)
        corpus.check(config)
        found = list(corpus.read(config))
        assert len(found) == 10 and {d.language for d in found} == groups
        assert {d.source for d in found} == {"self", "other.jsonl"}


def test_only_generated_text_is_called_self(tmp_path, monkeypatch):
    """Neither a folder of that name is, nor do several files of generated text lose the name."""
    monkeypatch.chdir(tmp_path)
    for folder in ("self", "data/self", "one", "two"):
        (tmp_path / folder).mkdir(parents=True)
    for folder in ("one", "two"):
        records = [{"text": f"text {i} of {folder}", "language": "self"} for i in range(5)]
        self_corpus.save(records, tmp_path / folder / corpus.SELF_TEXT)
    for folder in ("self", "data/self"):
        (tmp_path / folder / "a.jsonl").write_text(json.dumps({"text": f"text in {folder}"}))
    generated = ("one/self_text.jsonl", "two/self_text.jsonl")
    for names, sources in (
        (("./self",), {"'self'"}),
        (("data/self", *generated), {"'self'", "self"}),
        (("./self", "data/self", generated[0]), {"./self", "data/self", "self"}),
        (generated, {"self"}),
        (tuple(f"{name}=0.5" for name in generated), {"self"}),
    ):
        for text in (TextConfig(), TextConfig(group_by="source")):
            found = list(corpus.read(Config(corpus=names, text=text)))
            assert {d.source for d in found} == sources
            assert all((d.source == "self") == (d.text[:6] != "text i") for d in found)
            assert text.group_by != "source" or {d.language for d in found} == sources


@pytest.mark.parametrize("names", ["self", "{corpus}=0.6,self=0.4"])
def test_run_reads_the_text_written_by_the_source_model(tmp_path, names):
    text = write_corpus(tmp_path)
    texts = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    source = tiny_tokenizer(300, texts[:10])
    source.chat_template = CHATML.replace("<|im_end|>", "<|endoftext|>")
    tiny_model_folder(tmp_path / "source", "llama", 320, tied=True, tokenizer=source)
    tiny_tokenizer(420, texts).save_pretrained(tmp_path / "target")
    config = config_from_dict(
        {
            "source_model": str(tmp_path / "source"),
            "target_tokenizer": str(tmp_path / "target"),
            "corpus": names.format(corpus=text),
            "text": {"self_tokens": 6000, "held_out_fraction": 0.1, "group_by": "source"},
            "compute": {"dtype": "float32"},
            "stage1": {"steps": 0},
            "stage2": {"steps": 0},
            "evaluation": {"sequence_length": 32},
        }
    )
    lines = []
    pipeline.run(config, tmp_path / "run", ["tokens"], lines.append)
    found = pipeline.read_records(tmp_path / "run")
    assert found["self"]["summary"]["documents"] > 10 and found["corpus"]["needs"] == ["self"]
    summary = json.loads((tmp_path / "run" / "corpus" / "summary.json").read_text())
    assert "self" in summary["languages"] and summary["sources"]["self"] > 1000
    shards = tokenizing.TokenShards.open(tmp_path / "run" / "tokens" / "target")
    assert shards.index["languages"]["self"]["documents"] > 5
    # The same command writes nothing anew.
    lines.clear()
    pipeline.run(config, tmp_path / "run", ["tokens"], lines.append)
    assert "self: finished, skipped" in lines and "corpus: finished, skipped" in lines
