"""Stage records of a workdir, and their state after a crash at any moment."""

import errno
import itertools
import os
import time
from pathlib import Path

import pytest

from tokalign_jax.errors import UserError
from tokalign_jax.pipeline import graph, records, runner
from tokalign_jax.training import metrics

IDENTITY = {"source_model": "a", "target_tokenizer": "b"}


class Context:
    """The part of a run's context that the stage records need."""

    def __init__(self, workdir: Path):
        self.workdir, self.logged = workdir, []
        self.log = self.logged.append

    def folder(self, name: str) -> Path:
        return self.workdir / name


def bring_up(workdir: Path, rate: float, **more) -> Context:
    """Run one stage, which writes its rate, as a new process that knows only the workdir."""

    def work(context):
        (context.folder("train") / "rate").write_text(str(rate))

    context, stage = (
        Context(workdir),
        graph.Stage("train", "train", (), {"rate": rate}, work, **more),
    )
    state = records.StageRecords(workdir)
    runner._refuse_foreign(workdir, state, IDENTITY)
    state.set_identity(IDENTITY)
    runner._bring_up(stage, graph.fingerprints([stage])["train"], context, state)  # type: ignore[arg-type]
    assert (context.folder("train") / "rate").read_text() == str(rate)
    return context


class Killed(Exception):
    pass


def ending_at(moment: int, monkeypatch) -> None:
    """Make the process end before its `moment`-th change of a name on disk."""
    calls = itertools.count()

    def guarded(change):
        def changed(*args, **kwargs):
            if next(calls) >= moment:
                raise Killed
            return change(*args, **kwargs)

        return changed

    for owner, name in (
        (os, "replace"),
        (os, "rename"),
        (Path, "mkdir"),
        (runner.shutil, "rmtree"),
    ):
        monkeypatch.setattr(owner, name, guarded(getattr(owner, name)))


@pytest.mark.parametrize("again", [1.0, 2.0], ids=["as before", "as when it ended"])
@pytest.mark.parametrize(
    "before", [[1.0], [1.0, 2.0]], ids=["put aside", "put aside and brought back"]
)
def test_finished_stages_survive_a_crash_at_any_moment(before, again, tmp_path):
    for moment in range(30):
        workdir = tmp_path / str(moment)
        for rate in before:
            bring_up(workdir, rate)
        wanted = 2.0 if before == [1.0] else 1.0
        with pytest.MonkeyPatch.context() as patch:
            ending_at(moment, patch)
            try:
                bring_up(workdir, wanted)
            except Killed:
                ended = True
            else:
                ended = False
        output = bring_up(workdir, again).logged
        finished = {*before, *(() if ended else (wanted,))}
        assert again not in finished or "train: train" not in output, (moment, output)
        for rate in finished:  # and all others are there still
            assert "train: train" not in bring_up(workdir, rate).logged, (moment, rate)
        if not ended:
            break
    assert 3 < moment < 29  # there were moments to end at, and all of them were met


def test_outdated_results_are_not_deleted(tmp_path):
    bring_up(tmp_path, 1.0)
    bring_up(tmp_path, 2.0)
    (aside,) = (tmp_path / "outdated").iterdir()
    state = records.StageRecords(tmp_path)
    record = {**state.current["train"], "fingerprint": state._outdated[aside.name]["fingerprint"]}
    state.put("train", record)
    state.set_aside("train", tmp_path / "train")
    assert sorted(place.name for place in (tmp_path / "outdated").iterdir()) == [
        aside.name,
        f"{aside.name}.before",
    ]
    assert (tmp_path / "outdated" / f"{aside.name}.before" / "rate").read_text() == "1.0"


def test_incomplete_results_are_kept_aside_and_made_again(tmp_path):
    def is_whole(context):
        return (context.folder("train") / "rate").stat().st_size > 0

    bring_up(tmp_path, 1.0, is_whole=is_whole)
    assert bring_up(tmp_path, 1.0, is_whole=is_whole).logged == ["train: finished, skipped"]
    (tmp_path / "train" / "rate").write_text("")
    output = bring_up(tmp_path, 1.0, is_whole=is_whole).logged
    assert (
        "files are missing" in output[0]
        and "train.damaged" in output[0]
        and output[1] == "train: train"
    )
    assert (tmp_path / "train.damaged" / "rate").exists()


def test_stage_folder_may_be_a_link_to_another_disk(tmp_path):
    workdir, disk = tmp_path / "run", tmp_path / "disk"
    for place in (workdir, disk / "train", disk / "outdated"):
        place.mkdir(parents=True)
    bring_up(workdir, 1.0)
    (workdir / "train" / "rate").rename(disk / "train" / "rate")
    (workdir / "train").rmdir()
    (workdir / "train").symlink_to(disk / "train")
    (workdir / "outdated").symlink_to(disk / "outdated")
    assert bring_up(workdir, 1.0).logged == ["train: finished, skipped"]
    state = records.StageRecords(workdir)
    state.put("train", {**state.current["train"], "finished": False})
    assert "train: train" in bring_up(workdir, 1.0).logged and (workdir / "train").is_symlink()
    assert "train: train" in bring_up(workdir, 2.0).logged
    assert "restored" in bring_up(workdir, 1.0).logged[-1]


def test_damaged_records_are_reported_and_unfinished_ones_accepted(tmp_path):
    (tmp_path / "stages.json.partial").write_text("{")
    bring_up(tmp_path, 1.0)
    for damaged in ("", "[]", "null", '{"run": 5}', '{"stages": []}', '{"stages": {"train": 5}}'):
        (tmp_path / "stages.json").write_text(damaged)
        with pytest.raises(UserError, match=r"stages\.json' is damaged"):
            bring_up(tmp_path, 1.0)


@pytest.mark.parametrize("resumes", [False, True])
def test_stage_on_a_full_disk_reports_it(resumes, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def work(context):
        monkeypatch.setattr(records, "write_whole", full)  # the books find none either
        full()

    stage, context = (
        graph.Stage("train", "train", (), {}, work, resumes=resumes),
        Context(tmp_path),
    )
    with pytest.raises(UserError, match=r"is full.* free some room and run the same command again"):
        runner._bring_up(stage, "f", context, records.StageRecords(tmp_path))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["lr[1e-4]", "what?", "all*", "back\\slash"])
def test_workdir_path_that_checkpoints_cannot_use_is_refused(name, tmp_path):
    with pytest.raises(UserError, match=r"none of \[ \] \* \? "):
        bring_up(tmp_path / name / "run", 1.0)


def test_workdir_path_that_is_not_utf_8_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"caf\\udce9' is not UTF-8"):
        bring_up(tmp_path / os.fsdecode(b"caf\xe9"), 1.0)


@pytest.mark.parametrize(
    "code, output", [(errno.EAGAIN, "another process uses"), (errno.ENOSYS, "cannot lock files")]
)
def test_failed_lock_states_the_reason(code, output, tmp_path, monkeypatch):
    def flock(file, how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(records.fcntl, "flock", flock)
    with pytest.raises(UserError, match=output), records.lock(tmp_path):
        pass


def test_damaged_metrics_line_is_skipped(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"step": 1}\n\x00\x00\x00\n\xff\n{"step": 2}\n{"step":'
    )
    assert [record["step"] for record in metrics.read(tmp_path / "metrics.jsonl")] == [1, 2]


def test_stage_time_sums_over_all_runs(tmp_path):
    def work(context):
        if not (context.folder("train") / "begun").exists():
            (context.folder("train") / "begun").touch()
            time.sleep(0.3)
            raise Killed
        (context.folder("train") / "done").touch()

    stage, context = graph.Stage("train", "train", (), {}, work, resumes=True), Context(tmp_path)
    with pytest.raises(Killed):
        runner._bring_up(stage, "f", context, records.StageRecords(tmp_path))  # type: ignore[arg-type]
    runner._bring_up(stage, "f", context, records.StageRecords(tmp_path))  # type: ignore[arg-type]
    record = records.StageRecords(tmp_path).current["train"]
    assert record["finished"] and record["seconds"] >= 0.3
