"""Rows grouped by expert: both groupings are the product of each row with its expert's matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokalign_jax.models import experts
from tokalign_jax.models.config import Experts

EXPERTS, TOKENS, CHOICES, WIDTH, OUTPUTS = 5, 37, 2, 6, 4
ROUTINGS = {
    "even": np.arange(TOKENS * CHOICES) % EXPERTS,
    "all to the last expert": np.full(TOKENS * CHOICES, EXPERTS - 1),
    "some experts without tokens": np.where(np.arange(TOKENS * CHOICES) % 3, 1, 3),
    "random": np.random.default_rng(0).integers(EXPERTS, size=TOKENS * CHOICES),
}


@pytest.mark.parametrize("group", [experts._blocks, experts._sorted_rows])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_pair_meets_its_experts_matrix(group, routing):
    random = np.random.default_rng(1)
    tokens = jnp.asarray(random.normal(size=(TOKENS, WIDTH)), jnp.float32)
    kernel = jnp.asarray(random.normal(size=(EXPERTS, WIDTH, OUTPUTS)), jnp.float32)
    chosen = jnp.asarray(ROUTINGS[routing], jnp.int32)

    def grouped(tokens, kernel):
        rows = group(chosen, EXPERTS)
        x = experts._token_rows(tokens, rows.pair, rows.row, CHOICES)
        return experts._take(rows.multiply(x, kernel), rows.row, rows.pair)

    def direct(tokens, kernel):
        return jnp.einsum("pi,pio->po", jnp.repeat(tokens, CHOICES, axis=0), kernel[chosen])

    def gradients(function):
        return jax.grad(lambda *x: jnp.sin(function(*x)).sum(), (0, 1))(tokens, kernel)

    np.testing.assert_allclose(grouped(tokens, kernel), direct(tokens, kernel), atol=1e-5)
    for ours, theirs in zip(gradients(grouped), gradients(direct)):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_blocks_hold_each_pair_once_and_rows_of_one_expert(routing):
    chosen = ROUTINGS[routing]
    rows = experts._blocks(jnp.asarray(chosen), EXPERTS)
    size = experts.block_size(len(chosen), EXPERTS)
    pair = np.asarray(rows.pair)
    assert sorted(pair[pair < len(chosen)]) == list(range(len(chosen)))
    np.testing.assert_array_equal(pair[np.asarray(rows.row)], np.arange(len(chosen)))
    assert len(pair) <= len(chosen) + EXPERTS * size
    for block in pair.reshape(-1, size):
        assert len(set(chosen[block[block < len(chosen)]])) <= 1


def test_blocks_grow_with_the_rows_of_an_expert():
    sizes = [experts.block_size(pairs, 128) for pairs in (8, 8 * 2048, 8 * 8192, 8 * 65536)]
    assert sizes == [8, 64, 256, experts.MAX_BLOCK]


def test_gpus_take_blocks_and_tpus_grouped_products(monkeypatch):
    def implementations(backend):
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        ways = ("auto", "sparse", "dense", "ragged", "blocks")
        return [experts.implementation(Experts(4, 2, True, computed=way)) for way in ways]

    assert implementations("gpu") == ["blocks", "blocks", "dense", "ragged", "blocks"]
    assert implementations("tpu") == ["ragged", "ragged", "dense", "ragged", "blocks"]
    assert implementations("cpu") == ["dense", "blocks", "dense", "ragged", "blocks"]
