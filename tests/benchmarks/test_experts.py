"""The benchmark of mixtures of experts: its formula, its weights, failing sides, and a tiny run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import experts as benchmark  # noqa: E402

from tokalign_jax.config import BatchConfig, StageConfig  # noqa: E402
from tokalign_jax.models import families  # noqa: E402
from tokalign_jax.planning.flops import flops_per_token  # noqa: E402


@pytest.mark.parametrize("shape", [benchmark.Shape(), benchmark.TINY], ids=["whole", "tiny"])
def test_flops_are_those_of_the_planner(shape):
    model = families.config_from_hf(shape.config())
    stage = StageConfig(method="full", batch=BatchConfig(sequence_length=shape.length))
    assert shape.flops_per_token() == pytest.approx(flops_per_token(model, stage), rel=1e-12)


def test_weights_are_the_same_for_every_type_of_index():
    seed = benchmark.seed_of("lm_head.weight")
    wide = benchmark.hashed(np.arange(10_000), seed)
    narrow = benchmark.hashed(np.arange(10_000, dtype=np.uint32), np.uint32(seed), np.uint32)
    np.testing.assert_array_equal(wide, narrow)
    assert wide.min() >= 0 and wide.max() < 2**32 and len(set(wide)) == 10_000
    values = benchmark.scaled(wide, "lm_head.weight", np.float32)
    assert abs(values.mean()) < 1e-3 and values.std() == pytest.approx(0.02, rel=0.02)
    assert benchmark.scaled(wide, "model.norm.weight", np.float32).mean() == pytest.approx(
        1, abs=1e-3
    )


@pytest.mark.parametrize(
    "end, problem",
    [
        ("raise MemoryError('RESOURCE_EXHAUSTED')", "RESOURCE_EXHAUSTED"),
        ("time.sleep(60)", "within 2 s"),
    ],
)
def test_a_side_that_fails_keeps_the_rows_before(tmp_path, monkeypatch, end, problem):
    script = tmp_path / "side.py"
    script.write_text(
        f'import time\nprint(\'{{"side": "dense", "seconds": 1}}\', flush=True)\n{end}'
    )
    monkeypatch.setattr(benchmark, "__file__", str(script))
    first, failed = benchmark.run("dense", benchmark.TINY, 1, tmp_path / "losses.npy", 2)
    assert first == {"side": "dense", "seconds": 1}
    assert failed["side"] == "dense" and problem in failed["error"]
    assert problem.split()[0] in benchmark.table([failed])


def test_losses_of_another_model_do_not_agree(tmp_path):
    files = {side: tmp_path / f"{side}.npy" for side in ("sparse", "transformers")}
    losses = np.random.default_rng(0).normal(6, 1, size=(1, 64))
    rows = [
        {"side": "transformers", "seconds": 2, "first_loss": 6.5},
        {"side": "transformers", "seconds": 1, "first_loss": 6.0},
        {"side": "sparse", "seconds": 1, "first_loss": 6.00001},
    ]
    for file in files.values():
        np.save(file, losses)
    agreement = benchmark.agreement("sparse", benchmark.TINY, rows, files)
    assert agreement["agrees"] and "sparse agrees" in benchmark.sentence(agreement)
    np.save(files["sparse"], losses[:, ::-1])  # the same mean
    agreement = benchmark.agreement("sparse", benchmark.TINY, rows, files)
    assert agreement["agrees"] is False and "DOES NOT AGREE" in benchmark.sentence(agreement)
    files["sparse"].unlink()
    unknown = benchmark.agreement("sparse", benchmark.TINY, rows[:2], files)
    assert unknown["agrees"] is None and "not compared" in benchmark.sentence(unknown)


@pytest.mark.slow
def test_tiny_run(tmp_path):
    command = [
        sys.executable,
        benchmark.__file__,
        "--tiny",
        "--steps=1",
        f"--out={tmp_path}/r.json",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    results = json.loads((tmp_path / "r.json").read_text())
    assert [row["side"] for row in results["rows"]] == ["sparse", "transformers", "dense"]
    assert all(row["tokens_per_second"] > 0 for row in results["rows"])
    assert [found["agrees"] for found in results["agreement"]] == [True, True]
    assert done.stdout.count("agrees with transformers") == 2
