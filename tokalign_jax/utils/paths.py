"""Parameters by path: `layers/attention/q_proj/kernel` is the keys of the nested dict joined by
"/".

One mechanism says what trains, what decays and how something is placed: an ordered list of (regular
expression, label), the first match wins.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

Tree = dict[str, Any]
"""A nested dict whose leaves are anything but dicts."""
Label = TypeVar("Label")


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves by path string, in the order of the tree."""
    return dict(_walk(tree, ""))


def unflatten(leaves: Mapping[str, Any]) -> Tree:
    """The nested dict with these leaves; the inverse of `flatten`.

    Raises:
      ValueError: when a path is both a leaf and a branch.
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
            raise ValueError(f"'{path}' is already there")
        node[name] = leaf
    return tree


def label(rules: Sequence[tuple[str, Label]], path: str) -> Label:
    """The label of the first rule whose expression is found in the path.

    Raises:
      ValueError: when there is none, naming the path.
    """
    for pattern, label in rules:
        if re.search(pattern, path):
            return label
    raise ValueError(
        f"no rule matches parameter '{path}' (rules: "
        f"{', '.join(repr(pattern) for pattern, _ in rules)})"
    )


def label_tree(rules: Sequence[tuple[str, Any]], tree: Mapping[str, Any]) -> Tree:
    """The tree with each leaf replaced by the label of the first rule whose expression is found in
    its path.

    Raises:
      ValueError: for a path that no rule matches, naming it.
    """
    return unflatten({path: label(rules, path) for path in flatten(tree)})


def split(tree: Mapping[str, Any], keep: Callable[[str], bool]) -> tuple[Tree, Tree]:
    """The tree of the leaves whose path `keep` accepts, and the tree of all others."""
    leaves = flatten(tree)
    kept = {path: leaf for path, leaf in leaves.items() if keep(path)}
    return unflatten(kept), unflatten(
        {path: leaf for path, leaf in leaves.items() if path not in kept}
    )


def merge(*trees: Mapping[str, Any]) -> Tree:
    """One tree with the leaves of all; the inverse of `split`. A path may be in one tree only."""
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
