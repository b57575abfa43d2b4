"""Reports: report.json from the stages, and the pages rendered from it."""

import json
import math
import re
from html.parser import HTMLParser

import pytest

from tests.helpers import TEXTS, tiny_tokenizer
from tokalign_jax.config import Config, StageConfig, config_from_dict, config_to_dict
from tokalign_jax.reporting import charts, curves, pages, report, run_page, token_pieces
from tokalign_jax.reporting.model_card import special_section
from tokalign_jax.reporting.pages import Bar, Code, Section, Soft

NASTY = '<script>alert("&amp;")</script>|`x`\u202e'
STATES = ["source", "random", "init", "stage1", "stage2", "stage3"]


def content(nasty: str = "word", states=STATES, **changes):
    """Content of a report.json, with `nasty` wherever a text comes from outside."""
    bits = {state: 1.0 + 0.1 * i for i, state in enumerate(states)}
    stages = [state for state in states if state.startswith("stage")]
    languages = {
        language: {
            "bytes": 1000,
            "bytes_per_token": {"source": 2.0, "target": 4.0},
            "bits_per_byte": dict(bits),
            "interval": {"source": [0.9, 1.125]},
        }
        for language in (f"de{nasty}", "en", "all")
    }
    config = config_to_dict(Config()) | {
        stage: config_to_dict(StageConfig(method="full", steps=30)) for stage in stages
    }
    if "stage3" in stages:
        config["stage3"] |= {"teacher": f"/models/teacher{nasty}", "weight": 1.0}
    rules = {"exact": {"rows": 7, "frequency": 0.75}, "mean": {"rows": 0, "frequency": 0.0}}
    special = [
        {
            "token": f"<|im_end|>{nasty}",
            "id": 7,
            "source": "<|eot|>",
            "why": nasty,
            "in_chat_template": True,
        },
        {"token": "<think>", "id": 8, "source": "", "why": "its text", "in_chat_template": False},
    ]
    losses = [None if i == 3 else 5.0 - 0.1 * i for i in range(30)]
    training = {
        stage: {"tokens": [8 * (i + 1) for i in range(30)], "loss": losses, "steps": 30, "skipped": 1, "seconds": 3.0,
                "tokens_per_second": 80.0}
        for stage in stages
    }  # fmt: skip
    section = Section("Rules", f"a rule {nasty}", ("token",), [(Code(nasty),)])
    folded = Section("Worst rows", nasty, ("token", "share"), [((Code(nasty), nasty), Bar(0.5))])
    made = {
        "run": {"source_model": f"/models/{nasty}", "target_tokenizer": f"/models/{nasty}"},
        "states": list(states),
        "languages": languages,
        "overlap": {"window": 64, "languages": {nasty: {"share": 0.25}}, "warnings": [f"warning: 25% {nasty}"]},
        "loses": {"source": [], "target": ["capitals", nasty]},
        "alignment": {"method": nasty, "source_size": 300, "target_size": 400, "rules": rules, "special": special,
                      "hub_share": 0.125},
        "tuned": {},
        "training": training,
        "samples": [{"prompt": f"{nasty}\x00", "source": nasty, states[-1]: f"{nasty}\ud800"}],
        "passages": [{"language": f"de{nasty}", "source": [[nasty, 1], ["é", 2]], "target": [[f"{nasty}é", 1]]}],
        "inspection": [pages.to_json(section), pages.to_json(folded)],
        "seconds": {"corpus": 1.5, **{stage: 61.0 for stage in stages}},
        "config": config | {"source_model": f"/models/a{nasty}", "target_tokenizer": nasty, "corpus": [f"a{nasty}.jsonl", "b"]},
        "versions": {"jax": nasty},
        "devices": ["cpu", "cpu"],
        **changes,
    }  # fmt: skip
    return json.loads(json.dumps(made))


class Reader(HTMLParser):
    """Checks that tags are closed in order, and collects tags, what they fetch, and text."""

    VOID = ("meta", "br")

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.fetched, self.text = [], {}, [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.setdefault(tag, []).append(dict(attrs))
        self.fetched += [
            value
            for name, value in attrs
            if name in ("href", "src", "srcset", "data", "xlink:href")
        ]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


# --- The page -----------------------------------------------------------------------------------


def test_report_page_is_complete_and_self_contained():
    read = Reader(run_page.html(content()))
    assert not read.fetched and not {"script", "link", "img", "iframe", "object"} & {*read.tags}
    style = read.text
    assert "url(" not in style and "@import" not in style and "://" not in style
    assert (
        read.tags["html"] == [{"lang": "en"}] and len(read.tags["h1"]) == 1 and read.tags["title"]
    )
    for state in ("source", "random rows", "initialised", "stage 1", "stage 2", "stage 3"):
        assert state in read.text
    for language in ("deword", "en", "all"):
        assert language in read.text
    for text in (
        "1.500",
        "[0.900, 1.125]",
        "-50%",
        "warning: 1 of 30 steps of stage 3",
        "2 x cpu",
        "Worst rows",
        "distilled from teacherword",
    ):
        assert text in read.text, text
    pictures = [image for image in read.tags["svg"] if image.get("role") == "img"]
    assert len(pictures) == 1 + 3 and all(
        image["aria-label"] for image in pictures
    )  # the loss, and a row for each language
    assert all(
        len(x.split()) == 1
        for tag in ("th", "td")
        for attributes in read.tags[tag]
        for x in attributes.values()
        if x
    )


@pytest.mark.parametrize("states", [["source", "init"], ["source", "init", "stage1"], STATES])
def test_report_works_with_any_number_of_stages(states):
    made = content(states=states)
    read = Reader(run_page.html(made))
    assert [f"stage {i}" in read.text for i in (1, 2, 3)] == [
        f"stage{i}" in states for i in (1, 2, 3)
    ]
    assert "nan" not in read.text.lower().split() and ("Training" in read.text) == (len(states) > 2)
    header, *_ = run_page.table(made)
    assert header.count("|") == len(states) + 4 and "[0.900" not in "".join(run_page.table(made))
    assert "1.000 [0.900, 1.125] " in run_page.markdown(made)
    assert run_page.markdown(made).startswith("# a")
    made["alignment"]["special"] = []
    assert "Special tokens" not in run_page.html(made) + run_page.markdown(made)


def test_external_text_is_escaped():
    read = Reader(run_page.html(content(NASTY)))
    assert "script" not in read.tags
    assert read.text.count("<script>") > 15
    assert "\x00" not in read.text and "␀" in read.text
    assert any(
        attributes.get("aria-label", "").startswith(f"de{NASTY}") for attributes in read.tags["svg"]
    )
    for line in run_page.markdown(content(NASTY)).encode("utf-8", "replace").decode().splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) > 1


def test_pages_are_rendered_from_the_json_only(tmp_path, capsys):
    made = content(samples=[])
    (tmp_path / "report.json").write_text(json.dumps(made))
    assert run_page.main([str(tmp_path / "report.json")]) == 0
    assert (tmp_path / "report.html").read_text() == run_page.html(json.loads(json.dumps(made)))
    assert "![Loss" in (tmp_path / "report.md").read_text()
    # One of a version before that had no passages, intervals or speeds.
    for key in ("passages", "inspection", "overlap"):
        del made[key]
    for language in made["languages"].values():
        del language["interval"]
    for stage in made["training"].values():
        del stage["tokens_per_second"]
    read = Reader(run_page.html(made))
    assert (
        "stage 3" in read.text
        and "The same text in tokens" not in read.text
        and "95%" not in read.text
    )


def test_config_in_the_report_reproduces_the_config():
    values = {"corpus": ("a.jsonl", "b"), "seed": 3, "stage2": {"steps": 7, "start_offset": 0.5, "lora": {"rank": 8}},
              "evaluation": {"prompts": ("it's",)}}  # fmt: skip
    config = config_from_dict(values)
    text = run_page.config_file({"config": json.loads(json.dumps(config_to_dict(config)))})
    made: dict = {}
    exec(text, made)
    assert config_from_dict(made["get_config"]()) == config
    assert "stage1" not in text and "stage2.lora.rank = 8" in text


def test_report_warns_of_lossy_tokenizers_and_skipped_steps():
    assert run_page.warning_lines({"loses": {"source": [], "target": []}, "training": {}}) == []
    (line,) = run_page.warning_lines(
        {"loses": {"source": [], "target": ["capitals", "tabs"]}, "training": {}}
    )
    assert "the target tokenizer does not keep capitals, tabs" in line and "too low" in line


# --- Parts of the page --------------------------------------------------------------------------


def test_report_states_the_text_read_for_tuning():
    made = content()
    assert "tuned together" not in run_page.html(made)
    made["tuned"] = {"tokens": 61_440, "nats_before": 3.8, "nats_after": 3.4}
    assert "tuned together on 61.4k tokens and trained on" in run_page.html(made)
    made["tuned"]["nats_after"] = 3.9  # nothing was gained, so rows stayed as they were
    assert "tuned together" not in run_page.html(made)


def test_report_states_a_different_embedding_learning_rate():
    made = content()
    assert "rows 0.003" not in run_page.html(made)
    made["config"]["stage2"]["embedding_learning_rate"] = 3e-3
    assert "0.00064, rows 0.003" in run_page.html(made)


def test_markdown_tables_are_aligned():
    rows = [
        ("de", "1.000", Code("a|b"), Bar(0.5)),
        ("all", ("10.5", Soft(" [9, 12]")), Code("`"), Bar(1)),
    ]
    lines = pages.markdown_table(["language", "x", "token", ""], rows)
    assert (
        len({len(line) for line in lines}) == 1
        and lines[1] == "|:---------|-------------:|:--------|"
    )
    assert r"`a\|b`" in lines[2] and "10.5 [9, 12] | `` ` ``" in lines[3]
    assert pages.markdown([Section("empty"), Section("T", "words")], level=3) == "### T\n\nwords"


def test_report_names_the_sources_of_special_tokens():
    made = content()["alignment"]["special"]
    _, first, second = pages.markdown([special_section(made)]).splitlines()[-3:]
    assert (
        r"`<\|im_end\|>word`" in first
        and "yes" in first
        and "its text" in second
        and "yes" not in second
    )
    assert pages.markdown([special_section([])]) == ""


def test_sections_survive_a_json_round_trip():
    section = Section(
        "T", "text", ("a", "b"), [("1", (Code("x"), " ", Soft("y"))), (Bar(0.25), Code("z"))]
    )
    assert pages.from_json(json.loads(json.dumps(pages.to_json(section)))) == Section(
        section.title, section.text, list(section.header), [list(row) for row in section.rows]
    )


def test_curves_are_smoothed_joined_and_thinned():
    assert curves.smooth([1.0, 3.0, None, 5.0], window=2) == [1.0, 2.0, 3.0, 5.0]
    assert math.isnan(curves.smooth([None])[0])
    training = {
        "stage1": {"tokens": [10, 20], "loss": [4.0, 2.0]},
        "stage2": {"tokens": [5], "loss": [1.0]},
    }
    assert curves.joined(training, smoothed=False) == {
        "stage1": ([10, 20], [4.0, 2.0]),
        "stage2": ([25], [1.0]),
    }
    assert curves.thinned(5, 9) == [0, 1, 2, 3, 4] and curves.thinned(1000, 3) == [0, 500, 999]
    curve = curves.Curve([10, 20], [4.0, 2.0])
    assert [curves.at(curve, x) for x in (10, 15, 20)] == [4.0, 3.0, 2.0] and math.isnan(
        curves.at(curve, 21)
    )


def test_validation_losses_are_plotted_and_the_lowest_is_stated():
    made = content()
    made["training"]["stage2"]["validation"] = {
        "step": [10, 20, 30],
        "tokens": [80, 160, 240],
        "validation_loss": [4.5, None, 4.75],
    }
    drawn = curves.validations(made["training"])
    assert list(drawn) == ["stage2"] and drawn["stage2"].tokens == [320, 400, 480]
    assert math.isnan(drawn["stage2"].loss[1])
    html = run_page.loss_chart(made["training"])
    assert "stage 2 on held-out text: 4.750" in html and "stroke-dasharray" in html
    table = run_page._training(made)
    assert [row[6] for row in table.rows] == ["", "4.500 (step 10)", ""]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (1.32, 1.38, [1.32, 1.34, 1.36, 1.38]), (0, 307200, [0, 1e5, 2e5, 3e5]),
     (2, 2, [2]), (math.nan, 1, [])],
)  # fmt: skip
def test_ticks_are_round(low, high, expected):
    assert charts.ticks(low, high) == expected


def test_charts_work_with_no_or_one_point():
    assert (
        charts.lines([], description="", x_label="", y_label="")
        == ""
        == charts.dots({}, description="")
    )
    assert (
        charts.lines([charts.Curve("a", [1], [math.nan])], description="", x_label="", y_label="")
        == ""
    )
    for made in (
        charts.lines(
            [charts.Curve("a", [1], [2.0], label="x")], description="s", x_label="x", y_label="y"
        ),
        charts.dots({"a": [charts.Dot("d", 2.0)]}, description="s"),
    ):
        assert "nan" not in made and "inf" not in made
        Reader(made)


# --- Files of the stages ------------------------------------------------------------------------


def test_table_lists_all_states_by_language_with_intervals():
    def score(nats, tokens, size, **more):
        return {
            "bytes": size,
            "bits_per_byte": nats / size,
            "bytes_per_token": size / tokens,
            **more,
        }

    source = {"languages": {"de": score(2, 4, 1), "en": score(3, 1, 3)}}
    source |= {"pooled": score(5, 5, 4)}
    init = {"languages": {"de": score(4, 2, 1, interval=[3, 5]), "en": score(4, 1, 3)}}
    init |= {"pooled": score(8, 3, 4, interval=[1, 3])}
    found = report._languages({"source": source, "init": init})
    assert [*found] == ["de", "en", "all"] and found["all"]["bytes"] == 4
    assert found["all"]["bits_per_byte"] == pytest.approx({"source": 5 / 4, "init": 2.0})
    assert found["all"]["bytes_per_token"] == pytest.approx({"source": 4 / 5, "target": 4 / 3})
    assert [row["interval"] for row in found.values()] == [{"init": [3, 5]}, {}, {"init": [1, 3]}]
    alone = {"languages": {"de": score(4, 2, 1)}, "pooled": score(4, 2, 1, interval=[3, 5])}
    found = report._languages({"source": alone, "init": alone})
    assert [*found] == ["all"] and found["all"]["interval"]["init"] == [3, 5]


TEXT = "The quick brown fox, été 数学 ここ 😀!\n\n  def add(a):\n\treturn a"


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_coloured_pieces_cover_the_text_and_count_its_tokens(kind):
    tokenizer = tiny_tokenizer(300 if kind == "byte_level" else 330, TEXTS, kind)
    found, nothing = token_pieces.pieces(tokenizer, [TEXT, ""])
    assert "".join(text for text, _ in found) == TEXT
    assert sum(count for _, count in found) == len(
        tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    )
    assert ("😀", 4) in found or (" 😀", 4) in found or (" 😀", 5) in found
    assert nothing == []


def test_passages_are_grouped_by_language_and_side():
    tokenizer = tiny_tokenizer(300, TEXTS)
    texts = {f"l{i}": [TEXT * 20] for i in range(12)}
    found = token_pieces.of_passages({"source": tokenizer, "target": tokenizer}, texts)
    assert len(found) == token_pieces.PASSAGES and [*found[0]] == ["language", "source", "target"]
    assert 0 < len("".join(text for text, _ in found[0]["source"])) <= token_pieces.LENGTH


def test_names_are_escaped_in_markdown():
    """Against a reader of CommonMark: of what a name may hold nothing becomes a tag, link, emphasis
    or another column.
    """
    markdown_it = pytest.importorskip("markdown_it")
    names = [
        NASTY,
        "a*b*c",
        "_x_",
        "zh_Hant",
        "[l](http://x)",
        "~~s~~",
        "``",
        "a\\|b",
        "&lt;b&gt;",
        "![i](j)",
        "C:\\d",
    ]
    reader = markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"])
    for name in names:
        rows = [(name, Code(name), "1.0"), ("en", Code("x"), "2.0")]
        lines = pages.markdown_table([name, "token", "bits"], rows)
        read = Reader(reader.render("\n".join(lines)))
        assert {*read.tags} <= {"table", "thead", "tbody", "tr", "th", "td", "code"}, name
        assert len(read.tags["td"]) == 6 and len(read.tags["th"]) == 3
        assert read.text.count(name) == 3, (name, read.text)
    assert "zh_Hant" in pages.markdown_table(["language"], [("zh_Hant",)])[2]
