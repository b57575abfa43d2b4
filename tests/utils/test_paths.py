"""Parameter paths, labels, and splitting trees."""

import numpy as np
import pytest

from tokalign_jax.utils import paths

TREE = {
    "embed_tokens": {"embedding": 1},
    "layers": {"attention": {"q_proj": {"kernel": 2, "lora_a": 3}}},
}


def test_flatten_names_every_leaf_and_unflatten_inverts_it():
    leaves = paths.flatten(TREE)
    assert leaves == {
        "embed_tokens/embedding": 1,
        "layers/attention/q_proj/kernel": 2,
        "layers/attention/q_proj/lora_a": 3,
    }
    assert paths.unflatten(leaves) == TREE


def test_first_matching_rule_decides_the_label():
    labels = paths.label_tree([("lora_", "lora"), ("^layers/", "body"), ("", "rest")], TREE)
    assert paths.flatten(labels) == dict(zip(paths.flatten(TREE), ["rest", "body", "lora"]))


def test_error_names_an_unmatched_path():
    with pytest.raises(ValueError, match="embed_tokens/embedding"):
        paths.label_tree([("^layers/", "body")], TREE)


def test_split_and_merge_are_inverse():
    adapters, rest = paths.split(TREE, lambda path: "lora" in path)
    assert paths.flatten(adapters) == {"layers/attention/q_proj/lora_a": 3}
    assert paths.merge(rest, adapters) == TREE
    assert paths.split(TREE, lambda path: False) == ({}, TREE)
    with pytest.raises(ValueError, match="lora_a"):
        paths.merge(TREE, adapters)


def test_leaves_may_be_arrays():
    array = np.ones((2, 3))
    assert paths.flatten({"a": {"b": array}})["a/b"] is array


def test_path_is_a_leaf_or_a_branch():
    with pytest.raises(ValueError, match="a/b"):
        paths.unflatten({"a": 1, "a/b": 2})
    with pytest.raises(ValueError, match="'a'"):
        paths.unflatten({"a/b": 2, "a": 1})
