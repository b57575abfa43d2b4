"""Reference of config fields: type, default, bounds and description, read from the source."""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

from tokalign_jax.config import Config


@dataclasses.dataclass(frozen=True)
class Field:
    """A config field, or a group of fields.

    Attributes:
      name: dotted name, as in `--config.NAME`.
      type: as declared.
      default: default value; for a group, its dataclass.
      bounds: minimum and maximum of a number; None if it has none.
      description: its documentation.
    """

    name: str
    type: str
    default: Any
    bounds: tuple[float, float] | None
    description: str

    @property
    def is_group(self) -> bool:
        """True for a group of fields."""
        return dataclasses.is_dataclass(self.default)


def fields(group: Any = None, prefix: str = "") -> Iterator[Field]:
    """Yield the fields of a config dataclass, each group before its fields.

    Args:
      group: an instance, whose values are the defaults; None: the whole config.
      prefix: prefix of the names, such as `stage1.`.
    """
    group = Config() if group is None else group
    described = descriptions(type(group))
    for declared in dataclasses.fields(group):
        name, default = prefix + declared.name, getattr(group, declared.name)
        if dataclasses.is_dataclass(default):
            text = inspect.cleandoc(type(default).__doc__ or "")
            yield Field(name, type(default).__name__, default, None, text)
            yield from fields(default, f"{name}.")
        else:
            kind = inspect.formatannotation(declared.type)
            bounds = declared.metadata.get("within")
            yield Field(name, kind, default, bounds, described.get(declared.name, ""))


def descriptions(kind: type) -> dict[str, str]:
    """Return the docstring below each field of a dataclass and its bases."""
    result: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if dataclasses.is_dataclass(base):
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
            result |= _docstrings(tree.body[0])
    return result


def _docstrings(node: ast.AST) -> dict[str, str]:
    assert isinstance(node, ast.ClassDef)
    result = {}
    for field, below in zip(node.body, node.body[1:]):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            result[field.target.id] = inspect.cleandoc(str(below.value.value))
    return result
