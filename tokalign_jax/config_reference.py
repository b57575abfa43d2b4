"""Every config field with its type, default, bounds and description, read from where it is
declared.
"""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

from tokalign_jax.config import Config


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a config, or a group of them.

    Attributes:
      name: dotted, as in `--config.NAME`.
      type: as declared.
      default: its value where a config file does not set it; a dataclass for a group.
      bounds: lowest and highest number that it may be; None where it has none.
      description: what it is.
    """

    name: str
    type: str
    default: Any
    bounds: tuple[float, float] | None
    description: str

    @property
    def is_group(self) -> bool:
        """Whether it holds fields of its own."""
        return dataclasses.is_dataclass(self.default)


def fields(group: Any = None, prefix: str = "") -> Iterator[Field]:
    """Yield the fields of a config dataclass, each group before its own fields.

    Args:
      group: an instance, whose values are the defaults; None: the whole config.
      prefix: of the names, such as `stage1.`.
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
    """Return the string below each field of a dataclass, those of its bases included."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if dataclasses.is_dataclass(base):
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
            found |= _below_fields(tree.body[0])
    return found


def _below_fields(node: ast.AST) -> dict[str, str]:
    assert isinstance(node, ast.ClassDef)
    found = {}
    for field, below in zip(node.body, node.body[1:]):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            found[field.target.id] = inspect.cleandoc(str(below.value.value))
    return found
