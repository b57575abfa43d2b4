"""Throughput benchmark: its formula, and a run of the smallest model."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import train_throughput as benchmark  # noqa: E402

H100 = "NVIDIA H100 80GB HBM3", 989e12


def row(method, tokens_per_second, **changes):
    settings = {
        "model": "pythia-1b",
        "vocabulary": 151_936,
        "batch": 8,
        "accumulation": 1,
        "length": 2048,
    }
    arguments = argparse.Namespace(**settings | {"method": method} | changes)
    return benchmark._row(arguments, {"seconds": 8 * 2048 / tokens_per_second}, 1, *H100)


def test_mfu_counts_required_operations():
    """By hand for Pythia 1B's shape: 16 layers of 12 x 2048^2 weights, a head of 151,936 x 2048."""
    layers, head, attention = 16 * 12 * 2048**2, 151_936 * 2048, 16 * 4 * 2048 * 2048
    frozen, trained = row("embedding", 77_823), row("full", 60_398)
    assert frozen["flops_per_token"] == 4 * layers + 6 * head + 3 * attention
    assert trained["flops_per_token"] == 6 * layers + 6 * head + 3 * attention
    assert frozen["mfu"] == pytest.approx(0.46, abs=0.005)
    assert trained["mfu"] == pytest.approx(0.46, abs=0.005)
    assert frozen["causal_mfu"] / frozen["mfu"] == pytest.approx(
        1 - 1.5 * attention / frozen["flops_per_token"]
    )


def test_table_has_a_line_for_what_ran_out_of_memory():
    names = {"implementation": "torch", "method": "full", "remat": "none"}
    good = names | row("full", 50_000) | {"peak_bytes": 2**31, "compile_seconds": 3.0}
    lines = benchmark.table([good, names | {"error": "out of memory"}]).splitlines()
    assert "| 50,000 | 327.7 | 0.379 |" in lines[2]
    assert "2.00 | 3.0 |" in lines[2]
    assert "out of memory" in lines[3]
    assert len({line.count("|") for line in lines}) == 1
    assert benchmark.OUT_OF_MEMORY.search(
        "jaxlib.xla_client.XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory"
    )
    assert benchmark.OUT_OF_MEMORY.search(
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB"
    )


@pytest.mark.parametrize(
    "name, kind",
    [
        ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_NNT", "matrix products"),
        (
            "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_3_64x128x256_4x1x1",
            "attention",
        ),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "between devices"),
        ("MemcpyD2D", "copies"),
        ("input_scatter_fusion", "gather and scatter"),
        ("loop_multiply_fusion_12", "the rest"),
    ],
)
def test_kernels_are_classified_by_name(name, kind):
    assert benchmark.kind_of(name) == kind


@pytest.mark.slow
def test_benchmark_runs_on_the_smallest_model(tmp_path):
    flags = "--model tiny --dtype float32 --batch 2 --length 16 --steps 2 --warmup 1 --method embedding --device cpu"
    command = [sys.executable, benchmark.__file__, *flags.split(), "--out", str(tmp_path)]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    (measured,) = json.loads((tmp_path / "throughput.json").read_text())
    assert measured["method"] == "embedding"
    assert measured["devices"] == 1
    assert measured["tokens_per_second"] > 0
    assert measured["fed_tokens_per_second"] > 0
    assert measured["peak_bytes"] > 64 * 1000 * 4 * 6  # embedding and head, each with two moments
    assert f"{measured['tokens_per_second']:,.0f}" in done.stdout
    assert (tmp_path / "throughput.png").stat().st_size > 1000
