"""The plan's device data: speed by name, and the share of a model that a mesh splits."""

from dataclasses import replace

import pytest

from tests.training.toys import LLAMA
from tokalign_jax.planning import advice, memory
from tokalign_jax.planning.machine import peak_flops


@pytest.mark.parametrize(
    ("device_kind", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA L400", None),
        ("Tesla A100", None),
        ("cpu", None),
        ("", None),
    ],
)
def test_peak_speed_is_matched_by_whole_words(device_kind, tera):
    assert peak_flops(device_kind) == (tera and tera * 1e12)


def test_model_that_the_mesh_hardly_splits_is_warned_of():
    model = replace(LLAMA, vocab_size=768, hidden_size=64, head_dim=16, intermediate_size=128)
    assert advice.not_split(model, (1, 2, 1)) == advice.not_split(model, (3, 1, 1)) == []
    (warning,) = advice.not_split(model, (1, 3, 1))
    share = memory.share(model, (1, 3, 1))
    assert (
        0.5 < share < 1
        and f"each device holds {share:.0%} of them" in warning
        and "(64 and 128)" in warning
    )
    assert not advice.not_split(
        replace(model, intermediate_size=192, num_heads=3, num_kv_heads=3), (1, 3, 1)
    )
