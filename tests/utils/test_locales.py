"""Locales other than UTF-8: files are UTF-8 nevertheless, and the log degrades."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "tokalign_jax"


def lacks_encoding(call: ast.Call) -> bool:
    """Return whether a call reads or writes text in the locale's encoding."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    given = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
    if any(keyword.arg == "encoding" for keyword in call.keywords) or "utf-8" in given:
        return False
    if name in ("read_text", "write_text"):
        return True
    modes = [value for value in given if isinstance(value, str)]
    return name == "open" and (not call.args or any(set(mode) <= set("rwax+t") for mode in modes))


def test_every_text_file_is_opened_as_utf_8():
    found = []
    for path in PACKAGE.rglob("*.py"):
        calls = (
            node
            for node in ast.walk(ast.parse(path.read_text("utf-8")))
            if isinstance(node, ast.Call)
        )
        found += [
            f"{path.relative_to(PACKAGE)}:{call.lineno}" for call in calls if lacks_encoding(call)
        ]
    assert not found


COMMAND = """
import sys
from pathlib import Path
from tokalign_jax import errors
from tokalign_jax.config import Config, TextConfig
from tokalign_jax.text import corpus

def command():
    config = Config(corpus=sys.argv[1], text=TextConfig(language_field="lang", held_out_fraction=0.3))
    corpus.run(config, Path(sys.argv[2]), print)
    print("größer, 中文")
    raise errors.UserError("größer, 中文")

sys.exit(errors.exit_code(command))
"""


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=["ascii output", "latin-1 output", "a locale that is not UTF-8"],
)
def test_command_works_in_a_non_utf_8_locale(environment, tmp_path):
    lines = [
        json.dumps({"text": f"text {i} größer", "lang": "中文" if i % 2 else "de"})
        for i in range(40)
    ]
    path = tmp_path / "größe.jsonl"
    path.write_text("\n".join([*lines, "broken"]) + "\n", "utf-8")
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("LC_", "PYTHON"))
    } | environment
    script = tmp_path / "command.py"
    script.write_text(COMMAND, "utf-8")
    done = subprocess.run(
        [sys.executable, str(script), str(path), str(tmp_path / "out")],
        capture_output=True,
        env=environment | {"PYTHONPATH": str(PACKAGE.parent)},
    )
    assert done.returncode == 2 and b"Traceback" not in done.stderr, done.stderr
    assert b"er, " in done.stdout and b"er, " in done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text("utf-8"))
    assert [*summary["languages"]] == ["de", "中文"]
    assert "line 41 is not JSON" in summary["broken"]["first"]
