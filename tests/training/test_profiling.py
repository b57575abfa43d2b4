"""Traces of a stage's steps."""

import gzip
import json
from dataclasses import replace

import jax
import pytest

from tests.training.toys import STAGE, assert_same, train
from tokalign_jax.config import StageConfig, config_from_dict, default_config, settings_of
from tokalign_jax.config_files import override
from tokalign_jax.errors import UserError


@pytest.fixture
def traced(monkeypatch):
    """Recorded calls of the profiler and ends of steps, in order."""
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    return calls


def logged(calls):
    return lambda line: (
        calls.append(int(line.split("step ")[1].split()[0])) if "loss" in line else None
    )


def test_only_the_given_steps_are_traced(tmp_path, traced):
    stage = replace(
        STAGE, log_every=1, profile_steps=(3, 4), checkpoints=replace(STAGE.checkpoints, every=2)
    )
    train(tmp_path / "plain", replace(stage, profile_steps=()), log=logged(traced))
    assert "start" not in traced
    traced.clear()
    train(tmp_path / "whole", stage, log=logged(traced))
    # Earlier steps have ended when the trace starts, and later ones begin after it.
    assert traced.index("start") == 2 and traced[:2] == [1, 2]
    assert traced.count("stop") == 1 and 5 not in traced[: traced.index("stop")]


class Killed(Exception):
    pass


@pytest.mark.parametrize("at, again", [(3, True), (6, False)])
def test_resumed_run_traces_only_its_own_steps(tmp_path, traced, at, again):
    stage = replace(
        STAGE, log_every=1, profile_steps=(3, 4), checkpoints=replace(STAGE.checkpoints, every=4)
    )
    stage = replace(stage, checkpoints=replace(stage.checkpoints, every=2 if again else 4))

    def kill(line):
        if f"step {at} of" in line:
            raise Killed

    with pytest.raises(Killed):
        train(tmp_path, stage, log=kill)
    assert traced == ["start", "stop"]  # also where it ends within them
    traced.clear()
    train(tmp_path, stage)
    assert traced == ["start", "stop"] * again


@pytest.mark.slow
def test_tracing_writes_a_readable_trace_and_changes_nothing(tmp_path):
    lines = []
    traced = train(tmp_path / "traced", replace(STAGE, profile_steps=(2, 3)), log=lines.append)
    assert_same(traced.params, train(tmp_path / "plain", STAGE).params)
    folder = tmp_path / "traced" / "profile" / "process0"
    assert any(f"trace written to '{folder}'" in line for line in lines)
    (trace,) = folder.rglob("*.trace.json.gz")
    names = {
        event.get("name")
        for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    }
    assert any("train_step" in str(name) for name in names)
    assert list(folder.rglob("*.xplane.pb"))


def test_invalid_settings_are_refused():
    config = override(default_config(), ["--config.stage2.profile_steps=(20,22)"])
    assert config_from_dict(config).stage2.profile_steps == (20, 22)
    assert settings_of(replace(StageConfig(), profile_steps=(1, 2))) == settings_of(StageConfig())
    with pytest.raises(UserError, match=r"stage1\.profile_steps.*at least 1"):
        config_from_dict({"stage1": {"profile_steps": (0, 2)}})
    for wrong in ((3,), (5, 4), (1, 2, 3)):
        with pytest.raises(UserError, match=r"stage1\.profile_steps.*first and the last step"):
            config_from_dict({"stage1": {"profile_steps": wrong}})
    for wrong in (("1", "2"), (1.5, 2), (True, 2)):
        with pytest.raises(UserError, match="must be a whole number"):
            config_from_dict({"stage1": {"profile_steps": wrong}})
