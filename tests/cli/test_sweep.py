"""Sweeps: shared stages run once, finished ones are skipped, and each run gives what it gives
alone.
"""

import json

import pytest
from ml_collections import ConfigDict

from tests.pipeline.toy_runs import arguments, toy_inputs
from tokalign_jax import main
from tokalign_jax.cli import sweep
from tokalign_jax.config import config_to_dict, default_config
from tokalign_jax.configs import recipe_curves
from tokalign_jax.errors import UserError

CONFIG = """
from tokalign_jax.config import default_config

def get_config():
    config = default_config()
    config.stage1.learning_rate = 0.01
    return config

def get_runs():
    return {
        "slow": {"stage1.learning_rate": 1e-4},
        "fast": {},
        "fast-lora": {"stage2.method": "lora", "stage2.lora.rank": 2},
    }
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return toy_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.slow
def test_sweep_shares_stages_and_resumes(inputs, tmp_path, capsys):
    file = tmp_path / "sweep.py"
    file.write_text(CONFIG)

    def command(*more: str) -> list[str]:
        one = arguments(
            inputs,
            "llama",
            tmp_path / "sweep",
            "optimal",
            "--config.evaluation.random_baseline=False",
            *more,
        )
        return [f"--config={file}", *one[2:]]

    assert sweep.main(command("--only=slow,fast")) == 0
    printed = capsys.readouterr().out
    begun = {
        says: printed.count(f": {says}")
        for says in ("corpus: read", "init: initialise the rows", "stage1: train", "stage2: train")
    }
    assert begun == {
        "corpus: read": 1,
        "init: initialise the rows": 1,
        "stage1: train": 2,
        "stage2: train": 2,
    }
    assert not list(
        (tmp_path / "sweep" / "work" / "outdated").glob("stage*")
    )  # no run needs them any more

    assert sweep.main(command()) == 0
    printed = capsys.readouterr().out
    assert "run 1 of 1: fast-lora" in printed and printed.count(": stage1: train") == 0
    reports = {
        name: json.loads((tmp_path / "sweep" / "runs" / name / "report.json").read_text())
        for name in ("slow", "fast", "fast-lora")
    }
    assert [report["config"]["stage1"]["learning_rate"] for report in reports.values()] == [
        1e-4,
        0.01,
        0.01,
    ]
    assert [report["config"]["stage2"]["method"] for report in reports.values()] == [
        "full",
        "full",
        "lora",
    ]
    assert all(name in printed for name in reports)
    assert (tmp_path / "sweep" / "comparison" / "compare.json").is_file()

    alone = arguments(
        inputs, "llama", tmp_path / "alone", "optimal", "--config.evaluation.random_baseline=False"
    )
    alone[1] = f"--config={file}"
    assert main.main(alone) == 0
    report = json.loads((tmp_path / "alone" / "report" / "report.json").read_text())
    assert report["languages"] == reports["fast"]["languages"]


def test_sweep_runs_override_the_common_config():
    common = default_config()
    common.stage2.steps = 7
    runs = {"a": {"stage1.learning_rate": 1, "seed": 3}, "b": {"corpus": ("x", "y")}}
    found = sweep.build_configs(common, runs)
    assert (found["a"].stage1.learning_rate, found["a"].seed, found["a"].stage2.steps) == (
        1.0,
        3,
        7,
    )
    assert (
        found["b"].corpus == ("x", "y")
        and found["b"].stage1 == sweep.build_configs(common, {"c": {}})["c"].stage1
    )
    assert [*sweep.build_configs(common, runs, ["b*"])] == ["b"]
    assert config_to_dict(found["b"])["stage2"]["steps"] == 7


@pytest.mark.parametrize(
    ("runs", "only", "says"),
    [
        ({"a": {"stage1.learning_rat": 1.0}}, (), "nearest is 'stage1.learning_rate'"),
        ({"a": {"stage1.steps": "many"}}, (), "stage1.steps"),
        ({"a/b": {}}, (), "'a/b'"),
        ({"a": {"seed.x": 1}}, (), "'seed' is not a group"),
        ({"a": {}, "b": {}}, ("c",), "a, b"),
    ],
)
def test_bad_sweep_is_refused_before_anything_runs(runs, only, says):
    with pytest.raises(UserError, match=says):
        sweep.build_configs(ConfigDict(default_config()), runs, only)


def test_config_without_runs_is_refused(tmp_path, capsys):
    assert sweep.main(["--config=configs/optimal.py", f"--workdir={tmp_path}"]) == 2
    assert "get_runs()" in capsys.readouterr().err


@pytest.mark.parametrize("returned", ["None", "{'a': 5}", "1 / 0"])
def test_runs_that_are_none_are_refused(returned, tmp_path):
    file = tmp_path / "sweep.py"
    file.write_text(f"def get_runs():\n    return {returned}\n")
    with pytest.raises(UserError, match=r"get_runs\(\) cannot be used"):
        sweep.load_runs(str(file))


def test_folder_of_something_else_is_refused(inputs, tmp_path, capsys):
    """Its folder `runs/fast` would have been moved away, as if a sweep had written it."""
    (tmp_path / "sweep.py").write_text(CONFIG)
    (tmp_path / "runs" / "fast").mkdir(parents=True)
    flags = arguments(inputs, "llama", tmp_path, "optimal")[2:]
    assert sweep.main([f"--config={tmp_path}/sweep.py", *flags]) == 2
    assert "is not empty and not the workdir of a sweep" in capsys.readouterr().err


def test_recipe_curves_train_on_the_tokens_that_they_name():
    runs = recipe_curves.get_runs()
    configs = sweep.build_configs(recipe_curves.get_config(), runs)
    assert len(configs) == len(runs) > 100
    for name, config in configs.items():
        if name == "start":
            continue
        millions = int(name.split("-")[-2].removesuffix("M"))
        stages = config.stage1, config.stage2
        tokens = sum(
            stage.steps * stage.batch.size * stage.batch.sequence_length for stage in stages
        )
        assert 0 <= tokens - millions * 1e6 <= 65_536
        assert (config.stage1.steps > 0) == ("stage1" in name)
        objective = "next_token" if name.startswith("pieces") else name.split("-")[0]
        assert config.stage2.objective == objective
    assert "mixture-full-3e-04-alone-16M-s0" in configs
