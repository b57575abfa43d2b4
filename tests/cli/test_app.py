"""Command line: dispatch, help by topic, uniform flags, config files."""

import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from tokalign_jax import __version__, config_files, config_reference, main
from tokalign_jax.cli import app, arguments, plan, run, topics
from tokalign_jax.config import AlignmentConfig
from tokalign_jax.errors import UserError

REPOSITORY = Path(__file__).parents[2]


def test_version_and_help(capsys):
    assert app.main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out
    assert app.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {command} " in printed for command in app.COMMANDS)
    assert app.main([]) == 2 and app.main(["fly"]) == 2


@pytest.mark.parametrize("command", [name for name in app.COMMANDS if name != "help"])
def test_every_command_has_help_and_dashed_flags(command, capsys):
    assert app.main([command, "--help"]) == 0
    printed = capsys.readouterr().out
    flags = re.findall(r"--[\w.-]+", printed.partition("options:")[2])
    assert f"usage: tokalign {command}" in printed and len(flags) > 2
    assert not [flag for flag in flags if "_" in flag and not flag.startswith("--config.")]
    assert app.main(["help", command]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    "topic", ["", "config", "config.stage2", "config.stage2.lora", *topics.TEXTS]
)
def test_help_shows_each_topic(topic, capsys):
    assert app.main(["help", *topic.split()]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() and max(map(len, printed.splitlines())) <= 120


def test_help_on_a_field_gives_default_bounds_and_description():
    text = " ".join(topics.describe("stage1.steps"))
    assert "config.stage1.steps = 2500" in text and "0 to 1e+09" in text and "steps" in text


@pytest.mark.parametrize(
    ("topic", "near"), [("config.stage1.step", "stage1.steps"), ("rum", "run")]
)
def test_unknown_topic_suggests_the_nearest(topic, near, capsys):
    assert app.main(["help", topic]) == 2
    assert f"'{near}'" in capsys.readouterr().err


def test_methods_topic_names_every_method():
    for method in typing.get_args(typing.get_type_hints(AlignmentConfig)["method"]):
        assert f"\n  {method} " in topics.METHODS.replace("\n", " \n"), method


def test_every_field_is_described():
    fields = list(config_reference.fields())
    assert len(fields) > 90
    assert not [field.name for field in fields if not field.description]


@pytest.mark.parametrize(
    ("flag", "near"),
    [("--wrokdir=x", "--workdir"), ("--stage=init", "--stages"), ("--plan=maybe", "--")],
)
def test_unknown_flag_suggests_the_nearest(flag, near, capsys):
    assert run.main([flag, "--workdir=x"]) == 2
    assert f"the nearest is '{near}" in capsys.readouterr().err


def test_overrides_work_anywhere_with_or_without_an_equals_sign():
    flags = arguments.parser("run", None)
    arguments.add_run(flags)
    argv = ["--config.seed", "3", "--config", "configs/best.py", "--config.stage2.steps=7"]
    given, values = arguments.parse_run(flags, [*argv, "--noconfig.evaluation.random_baseline"])
    assert (values.seed, values.stage2.steps, values.stage2.learning_rate) == (3, 7, 5e-4)
    assert values.evaluation.random_baseline is False and given.config == "configs/best.py"


@pytest.mark.parametrize("argv", [["--config"], ["--config", "--workdir=x"], ["left"]])
def test_flag_without_a_value_and_stray_words_are_refused(argv, capsys):
    assert run.main([*argv]) == 2
    assert (
        "--config" in (output := capsys.readouterr().err) or "unexpected argument 'left'" in output
    )


def test_old_command_accepts_old_flag_names(monkeypatch):
    seen = []
    monkeypatch.setattr(plan, "main", lambda argv, prefix: seen.append(("plan", argv, prefix)) or 0)
    monkeypatch.setattr(run, "main", lambda argv: seen.append(("run", argv)) or 0)
    main.main(["main", "-config=c.py", "--plan", "--plan_devices=4"])
    main.main(["main", "--stages=init", "--workdir", "w"])
    assert seen == [
        ("plan", ["--config=c.py", "--plan_devices=4"], "plan_"),
        ("run", ["--stages=init", "--workdir", "w"]),
    ]


def test_user_config_file_can_import_its_base(tmp_path):
    (tmp_path / "base_of_mine.py").write_text("SEED = 5\n")
    (tmp_path / "mine.py").write_text(
        "import base_of_mine\nfrom tokalign_jax.configs import best\n\n"
        "def get_config(seed=base_of_mine.SEED):\n"
        "    config = best.get_config()\n    config.seed = int(seed)\n    return config\n"
    )
    file, path = tmp_path / "mine.py", [*sys.path]
    assert config_files.load(str(file)).seed == 5 and sys.path == path
    values = config_files.load(f"{file}:7", ["--config.stage2.steps=9"])
    assert (values.seed, values.stage2.steps, values.stage1.steps) == (7, 9, 0)


def test_recipe_is_found_by_name_from_anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    here = config_files.load("configs/optimal.py")
    assert here == config_files.load(str(REPOSITORY / "configs" / "optimal.py"))
    with pytest.raises(UserError, match=r"nothing.py' does not exist.*configs/best.py"):
        config_files.load("configs/nothing.py")


def test_package_runs_as_a_module():
    command = [sys.executable, "-m", "tokalign_jax", "--version"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and __version__ in done.stdout
