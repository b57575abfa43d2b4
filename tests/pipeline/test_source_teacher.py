"""A whole run whose stages are distilled from the source model."""

import json
from dataclasses import replace

import pytest

from tests.helpers import tiny_model_folder, tiny_tokenizer
from tests.pipeline.toy_runs import write_corpus
from tokalign_jax import pipeline
from tokalign_jax.config import config_from_dict
from tokalign_jax.planning.machine import Machine, Speed
from tokalign_jax.planning.report import plan_run


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    corpus = write_corpus(folder)
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    tiny_tokenizer(420, texts, kind="metaspace").save_pretrained(folder / "target")
    tokenizer = tiny_tokenizer(300, texts[:10])
    tiny_model_folder(folder / "source", "llama", 320, tied=True, tokenizer=tokenizer)
    batch = {"size": 4, "sequence_length": 32}
    stage = {"batch": batch, "checkpoints": {"every": 1}, "log_every": 1}
    return config_from_dict(
        {
            "source_model": str(folder / "source"),
            "target_tokenizer": str(folder / "target"),
            "corpus": str(corpus),
            "text": {"held_out_fraction": 0.1},
            "alignment": {"method": "pieces"},
            "stage1": {**stage, "steps": 2, "objective": "mixture"},
            "stage2": {**stage, "steps": 1, "method": "lora", "objective": "distillation"},
            "compute": {"dtype": "float32", "remat": "dots"},
            "evaluation": {"sequence_length": 32},
        }
    )


def test_stages_learn_from_the_source_model(config, tmp_path):
    lines = []
    pipeline.run(config, tmp_path / "run", ["stage2"], lines.append)
    records = pipeline.read_records(tmp_path / "run")
    assert records["boundaries"]["finished"] and records["stage2"]["finished"]
    assert (
        "boundaries" in records["stage1"]["needs"] and "boundaries" not in records["init"]["needs"]
    )
    assert records["boundaries"]["summary"]["shared"] > 1000
    assert any("the source model is the teacher" in line for line in lines)
    # What is gone is made again; the stages that are finished stay so.
    positions = tmp_path / "run" / "boundaries" / "positions.bin"
    positions.write_bytes(positions.read_bytes()[:-4])
    lines.clear()
    pipeline.run(config, tmp_path / "run", ["stage2"], lines.append)
    assert any(line.startswith("boundaries: warning") for line in lines)
    assert "stage2: finished, skipped" in lines


def test_plan_includes_the_teacher(config):
    config = replace(config, corpus=f"{config.corpus}=0.7,self=0.3")
    table = plan_run(config, None, Machine.of(1, "1GB"), Speed(peak=1e12)).table()
    assert "stage1 (embedding, mixture with the source model)" in table
    assert "stage2 (lora, distillation with the source model)" in table
    assert "self: the source model writes 4M tokens for the corpus" in table
    assert table.count("teacher (float32)") == 2 and "boundaries" in table
