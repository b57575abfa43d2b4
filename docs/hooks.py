"""MkDocs hooks: make the reference pages from the code; unlink files outside docs/."""

import contextlib
import inspect
import io
import re
from typing import Any

import tokalign_jax as ta
from tokalign_jax import config_reference
from tokalign_jax.cli import app

OUTSIDE = re.compile(
    r"\[([^\]]+)\]\((?:\.\./)+(?:configs|tpu|tests|benchmarks|examples|tokalign_jax|README)[^)]*\)"
)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill the reference pages, and drop links that leave docs/."""
    made = {
        "reference/config.md": config_fields,
        "reference/api.md": api,
        "reference/cli.md": command_line,
    }
    if page.file.src_uri in made:
        markdown += "\n" + made[page.file.src_uri]()
    return OUTSIDE.sub(r"\1", markdown)


def config_fields() -> str:
    """Return a list of the fields of every group."""
    lines: list[str] = []
    rows: dict[str, list[config_reference.Field]] = {"": []}
    groups: dict[str, config_reference.Field] = {}
    for field in config_reference.fields():
        if field.is_group:
            groups[field.name] = field
            rows[field.name] = []
        else:
            rows[field.name.rpartition(".")[0]].append(field)
    for name, fields in rows.items():
        title = f"`config.{name}`" if name else "`config`"
        lines += [f"## {title}", ""]
        if name:
            lines += [" ".join(groups[name].description.split()), ""]
        lines += [_entry(field) for field in fields] + [""]
    return "\n".join(lines)


def _entry(field: config_reference.Field) -> str:
    bounds = "" if field.bounds is None else f", {field.bounds[0]:g} to {field.bounds[1]:g}"
    name, text = field.name.rpartition(".")[2], " ".join(field.description.split())
    return f"- **`{name}`** = `{field.default!r}` (`{field.type}`{bounds})<br>{text}"


def api() -> str:
    """Return the signature and docstring of every name of the API."""
    lines: list[str] = []
    for name in ta.__all__:
        value = getattr(ta, name)
        lines += [f"## `{name}`", ""]
        if inspect.isfunction(value):
            lines += ["```python", f"ta.{name}{inspect.signature(value)}", "```", ""]
        lines += ["```text", inspect.cleandoc(value.__doc__ or ""), "```", ""]
    return "\n".join(lines)


def command_line() -> str:
    """Return the help of every command."""
    lines: list[str] = []
    for command in app.COMMANDS:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            app.main([command] if command == "help" else [command, "--help"])
        lines += [f"## tokalign {command}", "", "```text", printed.getvalue().strip(), "```", ""]
    return "\n".join(lines)
