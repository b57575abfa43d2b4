"""A whole run on chats: the source's template, chats in the corpus, questions through the
template.
"""

import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from tests.helpers import tiny_model_folder, tiny_tokenizer
from tests.pipeline.toy_runs import write_corpus
from tests.text.test_chats import CHAT, chatml
from tokalign_jax import pipeline
from tokalign_jax.config import config_from_dict
from tokalign_jax.errors import UserError
from tokalign_jax.models import hub, huggingface
from tokalign_jax.pipeline import checks
from tokalign_jax.pipeline.context import Context
from tokalign_jax.text.tokenizing import TokenShards


def test_run_keeps_the_sources_chat_template(tmp_path):
    text = write_corpus(tmp_path)
    texts = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    chats = [{"messages": [*CHAT, *CHAT[: 2 * i]]} for i in range(8)]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    (tmp_path / "ask.jsonl").write_text('{"question": "What is it?", "answers": ["dog"]}\n' * 2)
    source, target = chatml(), tiny_tokenizer(420, texts)
    tiny_model_folder(tmp_path / "source", "llama", 320, tied=True, tokenizer=source)
    target.save_pretrained(tmp_path / "target")
    values = {
        "source_model": str(tmp_path / "source"),
        "target_tokenizer": str(tmp_path / "target"),
        "corpus": f"{text},{tmp_path / 'chats.jsonl'}",
        "text": {"held_out_fraction": 0.1},
        "alignment": {"method": "pieces"},
        "compute": {"dtype": "float32"},
        "stage1": {"steps": 0},
        "stage2": {"steps": 0},
        "evaluation": {
            "sequence_length": 32,
            "sample_tokens": 2,
            "random_baseline": False,
            "chat_questions": str(tmp_path / "ask.jsonl"),
            "reply_tokens": 4,
        },
    }
    with pytest.raises(UserError, match=r"config\.chat=source"):
        pipeline.run(config_from_dict(values), tmp_path / "refused", None, print)
    run = pipeline.run(
        config_from_dict({**values, "chat": "source"}), tmp_path / "run", None, print
    )

    exported = AutoTokenizer.from_pretrained(run / "export")
    assert exported.chat_template == source.chat_template and exported.eos_token == "<|im_end|>"
    rows = {}
    for name, tokenizer in (("source", source), ("export", exported)):
        folder = tmp_path / "source" if name == "source" else run / "export"
        read = huggingface.stored_reader(folder, hub.load_config(folder)[0])
        ids = [tokenizer.get_vocab()[token] for token in ("<|im_start|>", "<|im_end|>")]
        rows[name] = np.asarray(read("embed_tokens/embedding"))[ids]
    np.testing.assert_array_equal(rows["export"], rows["source"])

    shards = TokenShards.open(run / "tokens" / "target")
    assert len(shards.unlearned) > 5
    scores = [
        json.loads((run / f"evaluate/{s}/scores.json").read_text()) for s in ("source", "init")
    ]
    assert (
        all(state["chat"]["questions"] == 2 for state in scores)
        and "difference" in scores[1]["chat"]
    )
    assert "ended its turn" in (run / "report" / "report.md").read_text()


def test_training_a_chat_model_without_chats_is_warned_of(tmp_path):
    text = write_corpus(tmp_path)
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": CHAT}))
    tiny_model_folder(tmp_path / "source", "llama", 320, tied=True, tokenizer=chatml())
    warned = {}
    for corpus in (str(text), f"{text}=0.8,self=0.2", f"{text},{tmp_path / 'chats.jsonl'}"):
        for steps in (0, 1):
            values = {
                "source_model": str(tmp_path / "source"),
                "target_tokenizer": str(tmp_path / "source"),
                "corpus": corpus,
                "stage1": {"steps": 0},
                "stage2": {"steps": steps, "batch": {"sequence_length": 32}},
                "evaluation": {"sequence_length": 32},
            }
            lines: list[str] = []
            checks.check(Context(config_from_dict(values), tmp_path / "run", lines.append))
            warned[corpus, steps] = any("no longer end its turns" in line for line in lines)
    assert warned == {key: key == (str(text), 1) for key in warned}
