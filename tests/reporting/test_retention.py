"""Retention: accuracy with paired differences, tables and warnings."""

import copy
import json

import numpy as np
import pytest

from tests.reporting.test_report import NASTY, Reader, content
from tokalign_jax.evaluation import abilities
from tokalign_jax.evaluation.abilities import Question
from tokalign_jax.reporting import comparison, pages, retention, run_page

QUESTIONS = [
    Question(suite, f"{suite}{i}", ("x", "y"))
    for suite, count in (("a", 4), ("b", 12))
    for i in range(count)
]
SOURCE = np.array([True] * 16)
LATER = np.array([True, True, False, False] + [True] * 9 + [False] * 3)
KINDS = ["alike"] * 10 + ["composed"] * 6


def state(right, kinds=(), bits=1.0, other=2.0, agreement=0.75, source=SOURCE):
    """Content of a scores.json."""
    made = {
        "pooled": {"bits_per_byte": bits},
        "abilities": abilities.summary(QUESTIONS, right, 0),
        "samples": [],
    }
    texts = {"bits_per_byte": other, "bytes": 70}
    made["other_text"] = {"languages": {"de": texts}, "pooled": texts}
    if len(kinds):
        made["abilities"] |= abilities.difference(QUESTIONS, right, source, kinds, 0)
        value = {
            "divergence": {"value": 0.5, "interval": [0.25, 1]},
            "gap": {"value": 0.125},
            "chunks": 40,
        }
        value["agreement"] = {"value": agreement}
        made["fidelity"] = {"languages": {"de": value, "en": value}, "pooled": value}
    return json.loads(json.dumps(made))


@pytest.fixture
def states():
    return {
        "source": state(SOURCE),
        "init": state(LATER, KINDS, 1.5, 2.5),
        "stage1": state(LATER, KINDS, 1.25, 2.25),
    }


def test_suites_weigh_equally_and_differences_are_paired():
    found = state(LATER, KINDS)["abilities"]
    assert (
        found["mean"]["accuracy"] == pytest.approx((2 / 4 + 9 / 12) / 2) and found["chance"] == 0.5
    )
    assert found["suites"]["b"]["accuracy"] == 0.75 and found["suites"]["b"]["questions"] == 12
    low, high = found["mean"]["interval"]
    assert 0.2 < low < found["mean"]["accuracy"] < high < 1
    assert found["difference"]["mean"]["difference"] == pytest.approx(found["mean"]["accuracy"] - 1)
    assert found["difference"]["mean"]["interval"] == pytest.approx(
        [low - 1, high - 1]
    )  # the source has all right
    assert (
        found["by_cut"]["alike"]["accuracy"] == 0.8
        and found["by_cut"]["composed"]["accuracy"] == 0.5
    )
    assert (
        found["by_cut"]["composed"]["questions"] == 6 and found["by_cut"]["composed"]["source"] == 1
    )
    np.testing.assert_array_equal(abilities.right_answers(found), LATER)
    again = state(LATER, KINDS, source=LATER)["abilities"]["difference"]
    assert again["mean"] == {"difference": 0.0, "interval": [0.0, 0.0]}


def test_ties_and_nan_do_not_count_as_answers():
    rows = np.array(
        [
            [-1.0, -2.0],
            [-1.0, -1.0],
            [np.nan, np.nan],
            [np.nan, -1.0],
            [-3.0, -np.inf],
            [-2.0, -1.0],
        ]
    )
    assert abilities.is_right(rows).tolist() == [True, False, False, False, True, False]


def test_table_has_a_row_per_state(states):
    first, *others = retention.sections(states)
    rows = {row[0]: dict(zip(first.header, row)) for row in first.rows}
    assert [*rows] == ["source", "init", "stage1"] and first.title == "What the model retains"
    assert rows["init"]["ability"] == "0.625" and rows["source"]["ability"] == "1.000"
    assert rows["init"]["minus source's"][0] == "-0.375" and rows["source"]["minus source's"] == ""
    assert (
        rows["init"]["split alike (10)"] == "0.800"
        and rows["source"]["split alike (10)"] == "1.000"
    )
    assert (rows["stage1"]["new tokens (6)"], rows["stage1"]["agreement"]) == ("0.500", "0.750")
    assert (rows["source"]["divergence"], rows["init"]["divergence"], rows["init"]["gap"]) == (
        "",
        "0.500",
        "0.125",
    )
    assert (rows["stage1"]["bits/byte"], rows["stage1"]["other text"]) == ("1.250", "2.250")
    assert [section.title for section in others] == [
        "Abilities by suite",
        "Fidelity by language",
        "Other text",
    ]
    assert all(
        section.fold and len(row) == len(section.header)
        for section in others
        for row in section.rows
    )
    assert retention.sections({"source": {"pooled": {"bits_per_byte": 1.0}}}) == []


def test_split_kinds_are_reported_per_tokenizer(states):
    states["stage1"]["abilities"] |= abilities.difference(
        QUESTIONS, LATER, SOURCE, ["alike"] * 16, 0
    )
    first = retention.sections(states)[0]
    rows = {row[0]: dict(zip(first.header, row)) for row in first.rows}
    assert rows["init"]["split alike (10/16)"] == "0.800" and rows["stage1"]["new tokens (6)"] == ""


def test_forgetting_is_warned_of(states):
    trained = ["init", "stage1"]
    assert retention.warning_lines(states, trained, 0) == []
    rising = copy.deepcopy(states) | {"stage1": state(LATER, KINDS, 1.25, 2.75)}
    (line,) = retention.warning_lines(rising, trained, 0)
    assert (
        "from init to stage1" in line
        and "fall from 1.500 to 1.250" in line
        and "rise from 2.500 to 2.750" in line
    )
    falling = states | {"init": state(SOURCE, KINDS, 1.5, 2.5)}
    (line,) = retention.warning_lines(falling, trained, 0)
    assert "abilities fall from 1.000 to 0.625" in line
    worse = states | {
        "stage1": state(LATER, KINDS, 1.75, 2.75)
    }  # both rise: nothing was gained at its cost
    assert retention.warning_lines(worse, trained, 0) == []
    del states["init"]["other_text"], states["stage1"]["other_text"], states["init"]["abilities"]
    assert retention.warning_lines(states, trained, 0) == []


def test_reports_and_comparisons_show_retention(states):
    warnings = [f"warning: it forgets {NASTY}"]
    made = content(
        states=[*states],
        numbers="warning: digits",
        kept={"states": retention.collect(states), "warnings": warnings},
    )
    read = Reader(run_page.html(made))
    for text in (
        "What the model retains",
        "0.625",
        "it forgets <script>",
        "warning: digits",
        "Fidelity by language",
    ):
        assert text in read.text
    assert "## What the model retains" in run_page.markdown(made) and "0.625" in run_page.markdown(
        made
    )
    shown = "\n".join(run_page.kept_lines(made))
    assert "What the model retains" in shown and "Fidelity by language" not in shown
    other = copy.deepcopy(made)
    other["config"]["seed"] = 1
    other["kept"]["states"]["stage1"]["fidelity"]["pooled"]["agreement"]["value"] = 0.25
    found = comparison.compare([made, other])
    assert found["groups"][0]["kept"]["stage1"]["agreement"]["values"] == [0.75, 0.25]
    assert (
        "0.500 ±0.354" in "\n".join(comparison.terminal(found))
        and "0.500 ±0.354" in Reader(comparison.html(found)).text
    )
    other["kept"]["states"]["stage1"]["abilities"]["digest"] = "others"
    assert any(
        "the questions are not the same" in line
        for line in comparison.compare([made, other])["warnings"]
    )
    old = content()
    assert run_page.kept_lines(old) == [] and comparison.compare([old])["groups"][0]["kept"] == {}
    assert "What the model retains" not in "\n".join(
        pages.terminal(comparison.sections(comparison.compare([old])))
    )
