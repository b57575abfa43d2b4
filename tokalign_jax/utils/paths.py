"""Parameters by path: the keys of nested dicts joined by "/", as `layers/attention/q_proj/kernel`.

Ordered rules (regular expression, label) select what trains, what decays and how arrays are
sharded; the first match applies.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

Tree = dict[str, Any]
"""A nested dict; its leaves are no dicts."""
Label = TypeVar("Label")


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the leaves by path, in the order of the tree."""
    return dict(_walk(tree, ""))


def unflatten(leaves: Mapping[str, Any]) -> Tree:
    """Return the nested dict with these leaves; the inverse of `flatten`.

    Raises:
      ValueError: a path is both a leaf and a branch.
    """
    tree: Tree = {}
    for path, leaf in leaves.items():
        *branches, name = path.split("/")
        node = tree
        for key in branches:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ValueError(f"'{path}' goes through a leaf")
        if name in node:
            raise ValueError(f"'{path}' is both a leaf and a branch")
        node[name] = leaf
    return tree


def label(rules: Sequence[tuple[str, Label]], path: str) -> Label:
    """Return the label of the first rule whose expression matches a part of the path.

    Raises:
      ValueError: no rule matches.
    """
    for pattern, label in rules:
        if re.search(pattern, path):
            return label
    raise ValueError(
        f"no rule matches parameter '{path}' (rules: "
        f"{', '.join(repr(pattern) for pattern, _ in rules)})"
    )


def label_tree(rules: Sequence[tuple[str, Any]], tree: Mapping[str, Any]) -> Tree:
    """Return the tree with each leaf replaced by the label of its path.

    Raises:
      ValueError: no rule matches a path.
    """
    return unflatten({path: label(rules, path) for path in flatten(tree)})


def split(tree: Mapping[str, Any], keep: Callable[[str], bool]) -> tuple[Tree, Tree]:
    """Split a tree into the leaves whose paths `keep` accepts and all others."""
    leaves = flatten(tree)
    kept = {path: leaf for path, leaf in leaves.items() if keep(path)}
    others = {path: leaf for path, leaf in leaves.items() if path not in kept}
    return unflatten(kept), unflatten(others)


def merge(*trees: Mapping[str, Any]) -> Tree:
    """Merge trees with different paths; the inverse of `split`.

    Raises:
      ValueError: a path is in two of the trees.
    """
    leaves: dict[str, Any] = {}
    for tree in trees:
        for path, leaf in flatten(tree).items():
            if path in leaves:
                raise ValueError(f"'{path}' is in two of the trees to merge")
            leaves[path] = leaf
    return unflatten(leaves)


def _walk(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _walk(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value
