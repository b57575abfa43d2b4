"""Worth of a vocabulary: costs against sums over the model's own matrices."""

from dataclasses import replace

import pytest

from tokalign_jax.models import families
from tokalign_jax.planning import worth
from tokalign_jax.planning.machine import Machine, bandwidth

RAW = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "vocab_size": 1000,
    "tie_word_embeddings": False,
}
LAYER = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96
"""Parameters of the matrices of a layer."""
ROWS = {"source": 1000, "target": 3000}


def model(tied: bool = False):
    return families.config_from_hf(RAW | {"tie_word_embeddings": tied})


def report(ratio: float, tied: bool = False, kind: str = ""):
    per_token = {"source": 3.0, "target": 3.0 * ratio}
    return worth.worth(model(tied), ROWS, per_token, 2, 128, Machine(1, 1e9, kind))


@pytest.mark.parametrize("tied", [False, True])
def test_costs_match_the_models_matrices(tied):
    costs = worth.costs(model(tied), 2, 128)
    assert costs["generation"].of(1000) == 2 * (3 * LAYER + 1000 * 64)
    attention = 3 * 4 * 3 * 4 * 16 * 128
    assert costs["training"].of(1000) == 6 * (3 * LAYER + 1000 * 64) + attention
    larger = worth.costs(replace(model(tied), vocab_size=3000), 2, 128)
    for name, cost in costs.items():
        assert larger[name].of(3000) == pytest.approx(cost.of(3000))


def test_larger_vocabulary_costs_speed_and_longer_tokens_gain_it():
    assert report(1.0)["generation"]["change"] < 0 > report(1.0)["training"]["change"]
    assert report(4.0)["generation"]["change"] > 0 < report(4.0)["training"]["change"]
    for name in ("generation", "training"):
        assert report(1.0)[name]["largest_vocabulary"] == pytest.approx(1000, abs=1)


def test_gain_ends_at_the_break_even_vocabulary():
    for name, cost in worth.costs(model(), 2, 128).items():
        end = report(1.5)[name]["largest_vocabulary"]
        assert worth.break_even(cost, 1000, end) == pytest.approx(1.5, rel=1e-3)
        assert (end > 3000) == (report(1.5)[name]["change"] > 0)
    assert report(0.01)["training"]["largest_vocabulary"] == 0


def test_sizes_count_both_matrices_unless_tied():
    more = 2000 * 64
    for tied, matrices in ((False, 2), (True, 1)):
        sizes = report(1.0, tied)["parameters"]
        assert sizes["target"] - sizes["source"] == matrices * more
        assert report(1.0, tied)["bytes"]["source"] == 2 * sizes["source"]


def test_speeds_are_absolute_on_known_devices():
    assert "characters_per_second" not in report(1.0)["generation"]
    found = report(2.0, kind="NVIDIA H100 80GB HBM3")["generation"]["characters_per_second"]
    assert found["source"] == pytest.approx(3 * 3350e9 / (2 * (3 * LAYER + 64_000)))
    assert bandwidth("NVIDIA H200") == 4800e9 and bandwidth("cpu") is None
