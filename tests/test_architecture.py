"""Imports follow the layers: a package imports only packages below it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tokalign_jax"
ORDER = (
    "errors",
    "config",
    "config_files config_reference demo",
    "utils",
    "parallel",
    "text",
    "models",
    "training alignment",
    "evaluation",
    "initialization",
    "planning reporting",
    "pipeline",
    "api",
    "cli",
    "main evaluate inspect compare sweep __main__",
)
"""From the bottom; packages of one line do not import each other."""
LEVEL = {name: level for level, line in enumerate(ORDER) for name in line.split()}


def imported(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tokalign_jax"):
            for alias in node.names:
                yield f"{node.module}.{alias.name}".split(".")[1]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_imports_follow_the_layers(path):
    name = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if name in ("__init__", "configs") or path.name == "build.py":  # build.py made the demo
        return
    for other in imported(path):
        if other in LEVEL and other != name:
            assert LEVEL[other] < LEVEL[name], f"{path.name} imports {other}, which is above"
