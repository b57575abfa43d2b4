"""Metrics, progress lines and loss spikes."""

import json

import numpy as np

from tokalign_jax.training.metrics import Recorder, is_spike, read


def values(loss=2.0, finite=True, skipped=0):
    return {
        "loss": np.float32(loss),
        "gradient_norm": np.float32(loss / 2),
        "learning_rate": np.float32(0.5),
        "finite": np.bool_(finite),
        "tokens": np.int32(64),
        "skipped": np.int32(skipped),
        "skipped_in_a_row": np.int32(skipped),
    }


def record(folder, done, losses, lines=None, every=100):
    with Recorder(
        "stage1", folder, 1000, done, every, (lines if lines is not None else []).append
    ) as recorder:
        for loss in losses:
            recorder.add(values(loss))
    return recorder.history


def test_metrics_have_one_line_per_step(tmp_path):
    history = record(tmp_path, 0, [3.0, 2.0])
    assert read(tmp_path / "metrics.jsonl") == history
    expected = "step loss learning_rate gradient_norm tokens tokens_per_second seconds skipped"
    assert [list(line) for line in history] == [expected.split()] * 2
    assert [(line["step"], line["loss"], line["tokens"]) for line in history] == [
        (1, 3.0, 64),
        (2, 2.0, 128),
    ]
    assert list((tmp_path / "tensorboard").iterdir())


def test_resumed_run_drops_later_and_partial_lines(tmp_path):
    record(tmp_path, 0, [5.0, 4.0, 3.0, 2.0])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    assert len(read(tmp_path / "metrics.jsonl")) == 4
    history = record(tmp_path, 2, [7.0, 6.0, 5.0])
    assert [line["loss"] for line in history] == [5.0, 4.0, 7.0, 6.0, 5.0]
    assert [line["step"] for line in history] == [1, 2, 3, 4, 5]
    assert history[-1]["tokens"] == 5 * 64
    assert read(tmp_path / "metrics.jsonl") == history


def test_non_finite_metrics_are_null_and_reported(tmp_path):
    lines = []
    with Recorder("stage1", tmp_path, 10, 0, 5, lines.append) as recorder:
        recorder.add(values(float("nan"), finite=False, skipped=1))
    assert '"loss": null' in (tmp_path / "metrics.jsonl").read_text()
    json.loads((tmp_path / "metrics.jsonl").read_text())
    assert lines == ["stage1: step 1 is not finite and was skipped (1 so far)"]


def test_only_the_first_process_writes_metrics(tmp_path):
    with Recorder("stage1", tmp_path, 10, 0, 5, lambda line: None, writes=False) as recorder:
        recorder.add(values())
        recorder.flush()
    assert len(recorder.history) == 1
    assert not list(tmp_path.iterdir())


def test_progress_lines_state_loss_and_speed(tmp_path):
    lines = []
    record(tmp_path, 0, np.linspace(5, 4, 25), lines, every=10)
    assert [line.split(",")[0] for line in lines] == [
        "stage1: step 10 of 1000",
        "stage1: step 20 of 1000",
    ]
    assert all("loss 4." in line and "tokens/s" in line and "left" in line for line in lines)


def test_loss_spikes_are_detected():
    calm = list(2 + 0.01 * np.sin(np.arange(50)))
    assert is_spike(3.0, calm)
    assert not is_spike(2.3, calm)  # 6 sigmas, but not 1.2 times the median
    wild = list(2 + np.sin(np.arange(50)))
    assert not is_spike(4.0, wild)  # 1.2 times the median, but ordinary here
    assert not is_spike(9.0, calm[:10])  # too early to say
    assert is_spike(9.0, [2.0] * 30)


def test_spikes_are_reported(tmp_path):
    lines = []
    record(tmp_path, 0, [*([2.0, 2.01] * 20), 3.5, 2.0], lines)
    assert len(lines) == 1
    assert (
        lines[0].startswith("stage1: the loss spikes at step 41: 3.500")
        and "median of 2.005" in lines[0]
    )


def test_resumed_run_remembers_recent_losses(tmp_path):
    record(tmp_path, 0, [2.0] * 60)
    lines = []
    record(tmp_path, 60, [4.0], lines)
    assert "spikes at step 61" in lines[0]
