"""A whole run whose LoRA stage holds the frozen projections in 4 bits."""

import json

import jax
import numpy as np
import pytest

from tests.pipeline.toy_runs import arguments, toy_inputs
from tokalign_jax import main
from tokalign_jax.models import hub, huggingface, lora
from tokalign_jax.parallel import sharding
from tokalign_jax.training import loop, states
from tokalign_jax.utils import paths


@pytest.mark.slow
def test_the_export_is_the_unquantized_model_and_its_adapters(tmp_path, capsys, monkeypatch):
    inputs, run = toy_inputs(tmp_path), tmp_path / "run"
    settings = []
    train = loop.run_stage

    def recorded(name, stage, *rest, **options):
        settings.append((name, stage))
        return train(name, stage, *rest, **options)

    monkeypatch.setattr(loop, "run_stage", recorded)
    more = "--config.stage2.lora.frozen=nf4", "--config.compute.matmul=float8"
    command = arguments(inputs, "gpt_neox", run, "optimal", *more)
    assert main.main(command) == 0
    assert "of them in nf4" in capsys.readouterr().out

    model, _ = hub.load_config(run / "init")
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    folders = [(run / name, stage) for name, stage in settings]
    adapters = states.load_changes(model, folders, mesh).adapters
    before, after = (
        paths.flatten(huggingface.load_params(run / name, model)) for name in ("init", "export")
    )
    assert len(adapters) == 6
    for path, added in adapters.items():
        for layer in range(model.num_layers):
            merged = lora.merged(before[path][layer], added, (layer,))
            np.testing.assert_array_equal(after[path][layer], merged.astype(after[path].dtype))
        assert np.abs(np.asarray(added[0].b)).max() > 0
    scores = json.loads((run / "evaluate/stage2/scores.json").read_text())
    assert scores and "NaN" not in json.dumps(scores)

    # Only what depends on the format is redone.
    settings.clear()
    assert main.main([flag.replace("nf4", "int8") for flag in command]) == 0
    assert [name for name, _ in settings] == ["stage2"]
