"""Comparison of runs: differing fields, groups of seeds, tables and pages."""

import copy
import json
import math
import statistics

import pytest

from tests.reporting.test_report import NASTY, Reader, content
from tokalign_jax.cli import compare
from tokalign_jax.reporting import comparison

SCALES = {2e-5: 1.5, 6.4e-4: 1.25}


def made(rate: float = 2e-5, method: str = "lora", seed: int = 0, **more):
    """A run whose bits per byte follow from its rate, its method and its seed."""
    report = copy.deepcopy(content(**more))
    report["config"]["stage1"]["learning_rate"] = rate
    report["config"]["stage2"]["method"] = method
    report["config"]["seed"] = seed
    scale = SCALES[rate] + (0.1 if method == "lora" else 0) + 0.01 * seed
    for language in report["languages"].values():
        language["bits_per_byte"] = {
            s: b if s in ("source", "random") else b * scale
            for s, b in language["bits_per_byte"].items()
        }
    return report


@pytest.fixture(scope="module")
def compared():
    reports = [
        made(rate, method, seed)
        for rate in SCALES
        for method in ("lora", "full")
        for seed in range(3)
    ]
    return comparison.compare(reports, [f"runs/{i}" for i in range(len(reports))])


def test_runs_are_named_by_differing_fields_and_grouped_by_seed(compared):
    assert compared["differs"] == ["stage1.learning_rate", "stage2.method"]
    assert [group["name"] for group in compared["groups"]] == [
        "stage1.learning_rate=0.00064, stage2.method=full",
        "stage1.learning_rate=0.00064, stage2.method=lora",
        "stage1.learning_rate=2e-05, stage2.method=full",
        "stage1.learning_rate=2e-05, stage2.method=lora",
    ]
    first = compared["groups"][0]
    assert first["seeds"] == [0, 1, 2] and first["runs"] == ["runs/9", "runs/10", "runs/11"]
    measured = first["bits_per_byte"]["stage3"]["all"]
    assert measured["values"] == pytest.approx([1.5 * scale for scale in (1.25, 1.26, 1.27)])
    assert measured["mean"] == pytest.approx(statistics.fmean(measured["values"]))
    assert measured["spread"] == pytest.approx(statistics.stdev(measured["values"]))
    assert compared["warnings"] == [] and json.loads(json.dumps(compared)) == compared


def test_runs_differing_only_in_seed_form_one_group():
    (group,) = comparison.compare([made(seed=0), made(seed=1)])["groups"]
    assert group["name"] == "the same settings" and group["runs"] == ["run 1", "run 2"]
    found = comparison.compare([made(seed=0)])
    assert (
        found["differs"] == []
        and found["groups"][0]["bits_per_byte"]["init"]["all"]["spread"] is None
    )
    assert "±" not in "".join(comparison.terminal(found))


def test_runs_with_other_stages_languages_and_versions_are_compared():
    short, old = made(6.4e-4, states=["source", "init", "stage1"]), made()
    del old["config"]["stage2"]["embedding_learning_rate"], short["languages"]["deword"]
    old["devices"], old["versions"] = ["gpu"], {"jax": "0.1"}
    found = comparison.compare([old, short])
    assert found["states"] == ["source", "random", "init", "stage1", "stage2", "stage3"]
    assert [*found["languages"]] == ["deword", "en", "all"]
    # A field that a version did not have yet is as it is by default.
    assert "stage2.embedding_learning_rate" not in found["differs"]
    assert (
        len(found["warnings"]) == 3
        and "held-out text" in found["warnings"][0]
        and "0.1" in found["warnings"][2]
    )
    assert (
        found["groups"][0]["values"]["stage1.learning_rate"] == 6.4e-4
    )  # 1.2 * 1.35 against 1.5 * 1.6
    lines = comparison.terminal(found)
    assert (
        len([line for line in lines if line.startswith("  1")]) == 2
    )  # overview and runs; it has no stage 3
    Reader(comparison.html(found))


def test_other_text_of_the_same_size_is_noticed():
    one, other = made(), made(seed=1)
    one["held_out"], other["held_out"] = "a", "b"
    assert "held-out text is not the same" in comparison.compare([one, other])["warnings"][0]
    del other["held_out"]  # an older one
    assert comparison.compare([one, other])["warnings"] == []


def test_copies_of_a_run_do_not_count_as_seeds():
    lines = comparison.terminal(comparison.compare([made(), made()]))
    header = next(line for line in lines if line.lstrip().startswith("#") and "seeds" in line)
    row = lines[lines.index(header) + 1]
    assert row[header.index("seeds") :].split()[0] == "1"


def test_run_that_diverged_comes_last():
    diverged, fine = made(6.4e-4), made()
    diverged["languages"]["all"]["bits_per_byte"]["stage3"] = math.nan
    diverged["training"]["stage3"]["loss"] = [None] * 30
    found = comparison.compare([diverged, fine])
    assert [group["runs"] for group in found["groups"]] == [["run 2"], ["run 1"]]
    Reader(comparison.html(found))


def test_curves_are_averaged_over_seeds():
    one, other = made(seed=0), made(seed=1)
    other["training"]["stage1"]["loss"] = [6.0 - 0.1 * i for i in range(30)]
    one["training"]["stage1"]["loss"] = [5.0 - 0.1 * i for i in range(30)]
    (group,) = comparison.compare([one, other])["groups"]
    curve = group["training"]["stage1"]
    assert curve["tokens"] == [8 * (i + 1) for i in range(30)]
    assert curve["loss"][0] == pytest.approx(5.5) and curve["loss"][-1] == pytest.approx(
        5.5 - 0.1 * 19.5
    )


def test_tables_state_each_difference_once(compared):
    lines = comparison.terminal(compared)
    text = "\n".join(lines)
    header = next(line for line in lines if line.split()[:1] == ["#"])
    assert header.split()[1:4] == ["stage1.learning_rate", "stage2.method", "seeds"]
    assert "stage2.learning_rate" not in text and "±0.015" in text
    # The same in all runs: said once, not in a column.
    assert (
        "In all of them: source 1.000, random rows 1.100" in " ".join(text.split())
        and "random" not in header
    )


@pytest.mark.parametrize("count", [4, 40])
def test_page_and_picture_are_written(count, tmp_path):
    reports = [made(seed=0, versions={"jax": "1"}) for _ in range(count)]
    for i, report in enumerate(reports):
        report["config"]["alignment"]["file"] = f"{NASTY}{i}"
    found = comparison.compare(reports, [f"{NASTY}-{i}" for i in range(count)])
    assert len(found["groups"]) == count and found["differs"] == ["alignment.file"]
    read = Reader(comparison.html(found))
    assert not read.fetched and "script" not in read.tags and "://" not in read.text
    for i in range(count):
        assert f"{NASTY}{i}" in read.text and f"{NASTY}-{i}" in read.text
    for state in ("stage 1", "stage 2", "stage 3"):
        assert f"Bits per byte by language: {state}" in read.text
    if count == 4:
        compare.write(found, tmp_path / "made" / "here")
        assert (tmp_path / "made" / "here" / "compare.png").stat().st_size > 10_000


# --- The command --------------------------------------------------------------------------------


def test_compare_command_writes_its_files(tmp_path, capsys):
    for i, rate in enumerate(SCALES):
        (tmp_path / f"{i}" / "report").mkdir(parents=True)
        (tmp_path / f"{i}" / "report" / "report.json").write_text(json.dumps(made(rate)))
    runs = [str(tmp_path / "0"), str(tmp_path / "1" / "report" / "report.json")]
    assert compare.main([*runs, f"--output={tmp_path / 'out'}"]) == 0
    printed = capsys.readouterr().out
    assert "stage1.learning_rate" in printed and "compare.html" in printed
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "compare.html",
        "compare.json",
        "compare.png",
    ]
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["groups"][0]["runs"] == [
        runs[1]
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "has no report"),
        ("{", "is not the report.json"),
        ("{}", "it has no config"),
        ("[]", "is not the report.json"),
    ],
)
def test_user_errors_name_a_remedy(text, says, tmp_path, capsys):
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    assert compare.main([str(tmp_path)]) == 2
    assert says in capsys.readouterr().err
    (tmp_path / "report.json").write_text(json.dumps(content()))
    assert compare.main([str(tmp_path), f"--output={tmp_path / 'report.json'}", "--overwrite"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_comparing_a_run_with_itself_is_refused(tmp_path, capsys):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text(json.dumps(content()))
    assert compare.main([str(tmp_path), str(tmp_path / "report" / "report.json")]) == 2
    assert "is named twice" in capsys.readouterr().err


def test_existing_comparison_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "report.json").write_text(json.dumps(content()))
    assert compare.main([str(tmp_path), f"--output={tmp_path}"]) == 2
    assert "exists already" in capsys.readouterr().err and not (tmp_path / "compare.json").exists()
    assert compare.main([str(tmp_path), f"--output={tmp_path}", "--overwrite"]) == 0
    assert (tmp_path / "compare.json").is_file()


@pytest.mark.parametrize(
    "lacking", [["devices"], ["seconds"], ["versions"], ["devices", "seconds", "versions"]]
)
def test_reports_without_optional_parts_are_compared(lacking, tmp_path, capsys):
    whole, bare = made(), made(6.4e-4)
    for key in lacking:
        del bare[key]
    for name, report in (("whole", whole), ("bare", bare)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(report))
    assert (
        compare.main(
            [str(tmp_path / "whole"), str(tmp_path / "bare"), f"--output={tmp_path / 'out'}"]
        )
        == 0
    )
    assert "differ" not in capsys.readouterr().out


def broken(change) -> str:
    report = made()
    change(report)
    return json.dumps(report)


@pytest.mark.parametrize(
    "text",
    [
        broken(lambda report: report.update(states=[], languages={})),
        broken(lambda report: report.update(languages=[])),
        broken(lambda report: report["languages"].update(en=3)),
        broken(lambda report: report["training"]["stage1"].pop("loss")),
        broken(lambda report: report.update(seconds=[1, 2])),
        broken(lambda report: report.update(config=None)),
    ],
)
def test_error_names_an_incomplete_report(text, tmp_path, capsys):
    (tmp_path / "a.json").write_text(text)
    (tmp_path / "b.json").write_text(json.dumps(made()))
    assert compare.main([str(tmp_path / "b.json"), str(tmp_path / "a.json")]) == 2
    assert "a.json' is damaged" in capsys.readouterr().err


def test_too_long_a_file_name_is_reported(tmp_path, capsys):
    assert compare.main([str(tmp_path / ("x" * 300))]) == 2
    assert "its longest name has 300 bytes" in capsys.readouterr().err
