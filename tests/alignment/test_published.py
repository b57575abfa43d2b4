"""TokAlign as published against an independent NumPy float64 reference, written from the paper's
formula.
"""

import numpy as np

from tests.alignment.test_methods import inputs
from tests.helpers import tiny_tokenizer
from tokalign_jax.alignment import matching, methods, published
from tokalign_jax.alignment.alignment import Rule


def reference(source, target, pivots):
    """argmax_s sum_p cos(t, a_p) cos(s, a_p), without blocks."""

    def cosine(x, y):
        x, y = x.astype(np.float64), y.astype(np.float64)
        return (x @ y.T) / np.outer(np.sqrt((x**2).sum(1)), np.sqrt((y**2).sum(1)))

    relative_source = cosine(source, source[pivots[:, 0]])
    relative_target = cosine(target, target[pivots[:, 1]])
    return (relative_target @ relative_source.T).argmax(axis=1)


def test_matching_follows_the_papers_formula():
    rng = np.random.default_rng(0)
    source = rng.normal(size=(700, 20)) * np.linspace(3, 0.2, 20) + 0.5
    target = rng.normal(size=(900, 16)) + 0.3  # each side has its own dimensions
    pivots = np.stack([rng.permutation(700)[:60], rng.permutation(900)[:60]], axis=1)
    found, cosines = published.match(source.astype(np.float32), target.astype(np.float32), pivots)
    np.testing.assert_array_equal(
        found, reference(source.astype(np.float32), target.astype(np.float32), pivots)
    )
    assert cosines.min() >= 0 and cosines.max() <= 1


def test_source_token_near_all_pivots_becomes_a_hub():
    """The published method does not normalise relative vectors, so their lengths decide."""
    rng = np.random.default_rng(1)
    source = rng.normal(size=(300, 12)) + 0.6
    source[7] = source.mean(axis=0)  # in the middle of all
    pivots = np.stack([np.arange(8, 108), np.arange(100)], axis=1)
    target = rng.normal(size=(250, 12)) + 0.6
    found, _ = published.match(source.astype(np.float32), target.astype(np.float32), pivots)
    assert np.mean(found == 7) > 0.5
    keys, queries = matching.common_space(source, target, pivots)
    assert np.mean(np.asarray(matching.csls(queries, keys, 10)[0])[:, 0] == 7) < 0.05


def test_each_step_follows_the_published_method():
    texts = ["aa bb ab ba abba <unk>", "abab baba aabb"]
    source = tiny_tokenizer(290, texts)
    target = tiny_tokenizer(330, [*texts, "cab bac cc"], kind="metaspace")
    target.add_special_tokens({"pad_token": "<|endoftext|>"})
    given = inputs(source, target, "tokalign", pivots=30)
    unseen = 12  # the rarest have no vector
    given = methods.dataclasses.replace(
        given, target=methods.Vectors(given.target.ids[:-unseen], given.target.vectors[:-unseen])
    )
    made, _ = methods.make(given)
    found = made.heaviest()

    by_string = source.get_vocab()
    shared = {i: by_string[t] for t, i in target.get_vocab().items() if t in by_string}
    rows_s = {int(i): r for r, i in enumerate(given.source.ids)}
    rows_t = {int(i): r for r, i in enumerate(given.target.ids)}
    both = sorted((rows_s[s], rows_t[t]) for t, s in shared.items() if s in rows_s and t in rows_t)
    pivots = np.array(both)[np.random.default_rng(0).permutation(len(both))[:30]]
    best = reference(given.source.vectors, given.target.vectors, pivots)
    random = 0
    for i in range(made.target_size):
        if i in shared:
            assert found[i] == shared[i] and made.rules[i] in (Rule.EXACT, Rule.SPECIAL)
        elif i in rows_t:
            assert found[i] == given.source.ids[best[rows_t[i]]] and made.rules[i] == Rule.SIMILAR
        else:
            random += 1
            assert 0 <= found[i] < made.source_size and made.rules[i] == Rule.RANDOM
    assert random >= unseen
    assert (
        made.rules[target.convert_tokens_to_ids("<|endoftext|>")] == Rule.SPECIAL
    )  # by its string, whatever its role
    assert (
        made.rules[target.eos_token_id] == Rule.RANDOM
    )  # `</s>` has another string than the source's
    for mixture in (made.embedding, made.head):
        assert np.all(np.diff(mixture.indptr) == 1) and np.all(mixture.weights == 1)
    assert not made.frequency_shift.any()
