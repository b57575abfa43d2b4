"""Corpora: formats, duplicates, the budget, the held-out split, and errors."""

import bz2
import dataclasses
import errno
import gzip
import hashlib
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from tokalign_jax.config import Config, TextConfig, config_from_dict, config_to_dict
from tokalign_jax.errors import UserError
from tokalign_jax.pipeline import held_out
from tokalign_jax.pipeline.context import Context
from tokalign_jax.pipeline.identities import identities
from tokalign_jax.text import corpus, reading

TEXTS = [f"Document {i}: größer, 数学 and def f(x):\n    return {i}\n" for i in range(40)]


def config_for(path, **text) -> Config:
    return Config(corpus=str(path), text=TextConfig(**{"held_out_fraction": 0.2, **text}))


def run(config: Config, folder: Path) -> tuple[dict, list[corpus.Document], list[corpus.Document]]:
    summary = corpus.run(config, folder, lambda line: None)
    train = [document for batch in corpus.train_batches(folder) for document in batch]
    return summary, train, list(corpus.held_out(folder))


def json_lines(texts, **fields) -> str:
    return "".join(json.dumps({"text": text, **fields}) + "\n" for text in texts)


def write(path: Path, content: str) -> Path:
    compress = {
        ".gz": gzip.compress,
        ".xz": lzma.compress,
        ".bz2": bz2.compress,
        ".zst": zstandard.compress,
    }
    path.write_bytes(compress.get(path.suffix, bytes)(content.encode()))
    return path


@pytest.mark.parametrize(
    "name",
    [
        "a.jsonl",
        "a.json",
        "a.jsonl.gz",
        "a.jsonl.xz",
        "a.jsonl.zst",
        "a.json.bz2",
        "array.json",
        "a.parquet",
    ],
)
def test_every_format_gives_the_same_documents(tmp_path, name):
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(pa.table({"text": TEXTS, "other": list(range(len(TEXTS)))}), path)
    elif name == "array.json":
        write(path, json.dumps([{"text": text} for text in TEXTS], indent=2))
    else:
        write(path, json_lines(TEXTS))
    corpus.check(config_for(path))
    summary, train, held = run(config_for(path), tmp_path / "out")
    assert sorted(d.text for d in train + held) == sorted(TEXTS)
    assert all(d.bytes == len(d.text.encode()) and d.language == corpus.ALL for d in train + held)
    assert summary["train_documents"] == len(train)
    assert summary["held_out_bytes"] == sum(d.bytes for d in held)
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    assert not (tmp_path / "out" / "seen.sqlite").exists()


def test_plain_text_is_split_at_blank_lines(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt.gz", "one\ntwo\n\n \nthree\n\nfour\u2028still four")
    _, train, held = run(config_for(path), tmp_path / "out")
    assert sorted(d.text for d in train + held) == ["four\u2028still four", "one\ntwo\n", "three\n"]
    monkeypatch.setattr(reading, "PASSAGE_BYTES", 5)
    _, train, held = run(config_for(path), tmp_path / "out")
    assert sorted(d.text for d in train + held) == ["four\u2028still four", "one\ntwo\n", "three\n"]
    monkeypatch.setattr(reading, "PASSAGE_BYTES", 4)
    _, train, held = run(config_for(path), tmp_path / "out")
    assert sorted(d.text for d in train + held) == [
        "four\u2028still four",
        "one\n",
        "three\n",
        "two\n",
    ]


def test_files_are_named_by_glob_comma_folder_or_tuple(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(4):
        write(tmp_path / "in" / f"part[{i}].jsonl", json_lines(TEXTS[10 * i : 10 * i + 10]))
    (tmp_path / "in" / "README.md").write_text("not read")
    names = [str(tmp_path / "in" / f"part[{i}].jsonl") for i in range(4)]
    for given in (
        str(tmp_path / "in" / "part*.jsonl"),
        ",".join(names),
        str(tmp_path / "in"),
        tuple(names),
    ):
        config = dataclasses.replace(config_for(""), corpus=given)
        _, train, held = run(config, tmp_path / "out")
        assert sorted(d.text for d in train + held) == sorted(TEXTS)


def test_linked_folders_are_read_once(tmp_path):
    data, elsewhere = tmp_path / "data" / "en", tmp_path / "elsewhere"
    data.mkdir(parents=True)
    elsewhere.mkdir()
    write(data / "a.jsonl", json_lines(TEXTS[:20]))
    write(elsewhere / "b.jsonl", json_lines(TEXTS[20:]))
    (data.parent / "zh").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(data.parent)
    config = config_for(data.parent)
    assert [Path(name).name for name in corpus.names(config)] == ["a.jsonl", "b.jsonl"]
    _, train, held = run(config, tmp_path / "out")
    assert sorted(document.text for document in train + held) == sorted(TEXTS)


@pytest.mark.parametrize("name", ["", "*.jsonl"])
def test_link_to_a_missing_file_is_refused(tmp_path, name):
    write(tmp_path / "a.jsonl", json_lines(TEXTS))
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match=r"b\.jsonl' is a link to a file that does not exist"):
        corpus.check(config_for(tmp_path / name))


def test_files_of_a_folder_with_other_endings_are_reported(tmp_path):
    data, lines = tmp_path / "data", []
    data.mkdir()
    write(data / "a.jsonl", json_lines(TEXTS))
    corpus.run(config_for(data), tmp_path / "first", lines.append)
    assert not [line for line in lines if "were not read" in line]
    for name in ("b.csv", "c.jsonl.zip", "d", "e", ".hidden", "dataset_info.json"):
        (data / name).write_text("text")
    corpus.run(config_for(data), tmp_path / "second", lines.append)
    (line,) = [line for line in lines if "were not read" in line]
    assert line.endswith(f"not read: {data}/b.csv, {data}/c.jsonl.zip, {data}/d and 1 more")


def test_folder_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    (tmp_path / "zh").mkdir()
    write(tmp_path / "a.jsonl", json_lines(TEXTS))
    scan = os.scandir

    def scandir(path):
        if str(path).endswith("zh"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)  # root can read every folder
    with pytest.raises(UserError, match=r"folder '.*zh' cannot be read \(Permission denied\)"):
        corpus.check(config_for(tmp_path))


def test_saved_datasets_folder_is_read(tmp_path):
    rows = [{"text": text, "lang": "de", "id": i} for i, text in enumerate(TEXTS)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / ".cache").mkdir()
    write(tmp_path / "saved" / ".cache" / "other.jsonl", json_lines(["not meant"]))
    config = config_for(tmp_path / "saved", language_field="lang")
    corpus.check(config)
    _, train, held = run(config, tmp_path / "out")
    assert sorted(d.text for d in train + held) == sorted(TEXTS) and {
        d.language for d in train
    } == {"de"}
    with pytest.raises(UserError, match=r"no field 'body'; it has \['id', 'lang', 'text'\]"):
        corpus.check(config_for(tmp_path / "saved", text_field="body"))


def test_one_split_of_a_dataset_folder_is_read(tmp_path):
    splits = {"train": TEXTS[:30], "test": TEXTS[30:]}
    made = {
        name: datasets.Dataset.from_list([{"text": text} for text in texts])
        for name, texts in splits.items()
    }
    datasets.DatasetDict(made).save_to_disk(tmp_path / "saved")
    for name, texts in splits.items():
        _, train, held = run(config_for(tmp_path / "saved", hub_split=name), tmp_path / name)
        assert sorted(d.text for d in train + held) == sorted(texts)
    with pytest.raises(
        UserError, match=r"no split 'dev': name one of train, test with --config.text.hub_split"
    ):
        corpus.check(config_for(tmp_path / "saved", hub_split="dev"))


def test_other_fields_may_change_their_type_from_line_to_line(tmp_path):
    odd = [1, "two", None, [3], {"four": 4}, {"four": "4"}, 5.5, True]
    lines = [json.dumps({"meta": odd[i % len(odd)], "text": text}) for i, text in enumerate(TEXTS)]
    lines += [
        json.dumps({"text": None}),
        "",
        json.dumps({"text": "  \n"}),
        json.dumps({"text": "half \ud83d pair"}),
    ]
    path = write(tmp_path / "a.jsonl", "\n".join(lines))
    summary, train, held = run(config_for(path), tmp_path / "out")
    assert sorted(d.text for d in train + held) == sorted([*TEXTS, "half ? pair"])
    assert summary["without_text"] == 2


def test_duplicates_are_dropped_and_counted_by_language(tmp_path):
    first, again = json_lines(TEXTS, lang="de"), json_lines(TEXTS[:7], lang="fr")
    path = write(
        tmp_path / "a.jsonl", first + again + json_lines(["nur hier", "und hier"], lang=None)
    )
    summary, train, held = run(config_for(path, language_field="lang"), tmp_path / "out")
    texts = [d.text for d in train + held]
    assert len(texts) == len(set(texts)) == 42
    assert summary["duplicates"] == summary["languages"]["fr"]["duplicates"] == 7
    assert {d.language for d in train + held} == {"de", corpus.UNKNOWN}


def test_held_out_documents_are_chosen_by_hash_alone(tmp_path):
    texts = [f"text number {i}" for i in range(500)]
    expected = {
        t for t in texts if int(hashlib.sha256(t.encode()).hexdigest()[:16], 16) / 2**64 < 0.1
    }
    sides = []
    for order in (texts, texts[::-1]):
        path = write(tmp_path / "a.jsonl", json_lines(order))
        _, train, held = run(config_for(path, held_out_fraction=0.1), tmp_path / "out")
        assert not {d.text for d in train} & {d.text for d in held}
        sides.append({d.text for d in held})
    assert sides == [expected, expected]
    assert 20 < len(expected) < 80


def test_small_corpus_holds_out_the_smallest_hash_of_each_language(tmp_path):
    rows = [("de", t) for t in TEXTS[:10]] + [("fr", t) for t in TEXTS[10:20]] + [("it", TEXTS[20])]
    path = write(
        tmp_path / "a.jsonl", "".join(json_lines([text], lang=language) for language, text in rows)
    )
    _, train, held = run(
        config_for(path, held_out_fraction=1e-9, language_field="lang"), tmp_path / "out"
    )
    for language in ("de", "fr"):
        texts = [text for label, text in rows if label == language]
        smallest = min(texts, key=lambda t: hashlib.sha256(t.encode()).digest())
        assert [d.text for d in held if d.language == language] == [smallest]
    assert [d.text for d in train if d.language == "it"] == [
        TEXTS[20]
    ]  # its only document is worth more in training
    assert len(train) + len(held) == 21


def test_two_documents_of_two_languages_are_split(tmp_path):
    path = write(
        tmp_path / "a.jsonl", json_lines(["eins"], lang="de") + json_lines(["un"], lang="fr")
    )
    _, train, held = run(
        config_for(path, held_out_fraction=0.0, language_field="lang"), tmp_path / "out"
    )
    assert (len(train), len(held)) == (1, 1)


def test_reading_stops_at_the_budget(tmp_path):
    path = write(tmp_path / "a.jsonl", json_lines(TEXTS))
    budget = sum(len(t.encode()) for t in TEXTS[:9]) + 3
    summary, train, held = run(config_for(path, budget_bytes=budget), tmp_path / "out")
    assert sorted(d.text for d in train + held) == sorted(TEXTS[:9])
    assert summary["stopped_at_budget"]
    with pytest.raises(UserError, match=r"text\.budget_bytes=10"):
        corpus.run(config_for(path, budget_bytes=10), tmp_path / "out", print)


def test_long_corpora_are_written_in_several_files_and_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "FILE_BYTES", 600)
    monkeypatch.setattr(corpus, "GROUP_BYTES", 200)
    path = write(tmp_path / "a.jsonl", json_lines(TEXTS))
    summary, train, _ = run(config_for(path), tmp_path / "out")
    files = sorted((tmp_path / "out").glob("train-*.parquet"))
    assert [f.name for f in files] == [f"train-{i:05d}.parquet" for i in range(len(files))]
    assert len(files) >= summary["train_bytes"] // 850
    assert (
        max(sum(d.bytes for d in batch) for batch in corpus.train_batches(tmp_path / "out")) < 300
    )
    assert [d.text for d in train if d.text != train[-1].text] == [d.text for d in train[:-1]]
    shorter = write(tmp_path / "b.jsonl", json_lines(TEXTS[:8]))
    _, train, held = run(
        config_for(shorter), tmp_path / "out"
    )  # nothing of an earlier run stays behind
    assert len(train) + len(held) == 8


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "a.jsonl",
            json.dumps({"content": "x", "id": 3}) + "\n",
            ["no field 'text'", "'content', 'id'", "text_field"],
        ),
        ("a.jsonl", '{"text": "x"}\n{"text": \n', ["line 2", "not JSON"]),
        ("a.jsonl", "just words\n", ["line 1", "one object a line"]),
        ("a.jsonl", '"a string"\n', ["expected an object", "'a string'"]),
        ("a.jsonl", '{"text": 17}\n', ["17 instead of a string"]),
        ("a.jsonl", "", ["empty"]),
        ("a.jsonl", '{"text": " "}\n', ["empty"]),
        ("a.txt", "\n\n", ["empty"]),
        ("a.csv", "text\nx\n", ["a.csv", "unknown ending"]),
    ],
)
def test_errors_name_bad_files_before_long_work(tmp_path, name, content, expected):
    path = write(tmp_path / name, content)
    with pytest.raises(UserError) as error:
        corpus.check(config_for(path))
        corpus.run(config_for(path), tmp_path / "out", print)
    for part in (*expected, name):
        assert part in str(error.value)


def test_errors_on_compression_and_encoding_name_the_file(tmp_path):
    whole = lzma.compress(json_lines(TEXTS * 50).encode())
    (tmp_path / "cut.jsonl.xz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "no.jsonl.gz").write_bytes(b"this is no gzip")
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    (tmp_path / "no.parquet").write_bytes(b"PAR1 no more")
    for name in ("cut.jsonl.xz", "no.jsonl.gz", "latin.txt", "no.parquet"):
        with pytest.raises(UserError, match=name):
            corpus.check(config_for(tmp_path / name))
            corpus.run(config_for(tmp_path / name), tmp_path / "out", print)


def test_error_on_a_missing_corpus_lists_what_exists(tmp_path):
    write(tmp_path / "right.jsonl", json_lines(TEXTS))
    with pytest.raises(UserError, match=r"wrong\.jsonl' does not exist.*right\.jsonl"):
        corpus.check(config_for(tmp_path / "wrong.jsonl"))
    with pytest.raises(UserError, match="no file matches"):
        corpus.check(config_for(tmp_path / "*.txt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no file ending in"):
        corpus.check(config_for(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"no field .lang.*language_field"):
        corpus.check(config_for(tmp_path / "right.jsonl", language_field="lang"))
    with pytest.raises(UserError, match="point --config"):
        corpus.check(config_for("nobody/no-such-data-set"))


def test_error_on_a_missing_parquet_column_lists_the_columns(tmp_path):
    pq.write_table(pa.table({"body": TEXTS, "id": list(range(len(TEXTS)))}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"no field 'text'; it has \['body', 'id'\]"):
        corpus.check(config_for(tmp_path / "a.parquet"))
    _, train, held = run(config_for(tmp_path / "a.parquet", text_field="body"), tmp_path / "out")
    assert len(train) + len(held) == len(TEXTS)


def test_single_document_cannot_be_split(tmp_path):
    path = write(tmp_path / "a.jsonl", json_lines(["alone", "alone"]))
    with pytest.raises(UserError, match="1 documents to train on and 0 to hold out"):
        corpus.run(config_for(path), tmp_path / "out", print)


def test_parquet_file_may_have_no_rows(tmp_path):
    """As in folders written by Spark."""
    table = pa.table({"text": pa.array(TEXTS, pa.large_string())})
    pq.write_table(table, tmp_path / "part-1.parquet", row_group_size=7)
    pq.write_table(table.slice(0, 0), tmp_path / "part-2.parquet")
    _, train, held = run(config_for(tmp_path), tmp_path / "out")
    assert {document.text for document in train + held} == set(TEXTS)


def test_any_language_name_is_accepted(tmp_path):
    lines = [
        {"text": text, "lang": lang} for text, lang in zip(TEXTS, ["\ud800x", 0, None, ""] * 10)
    ]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    _, train, held = run(config_for(path, language_field="lang"), tmp_path / "out")
    assert {document.language for document in train + held} == {"?x", "0", corpus.UNKNOWN}


def test_documents_are_read_by_their_positions(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "GROUP_BYTES", 200)
    monkeypatch.setattr(corpus, "FILE_BYTES", 500)
    _, train, _ = run(config_for(write(tmp_path / "a.jsonl", json_lines(TEXTS))), tmp_path / "out")
    assert len([*(tmp_path / "out").glob("train-*.parquet")]) > 2
    for positions in ([], [0], [3, 4, 17, len(train) - 1], range(len(train))):
        assert [*corpus.at(tmp_path / "out", np.array(positions, np.int64))] == [
            train[i] for i in positions
        ]


# --- The budget ---------------------------------------------------------------------------------


def inputs(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def by_language(config: Config, folder: Path) -> dict[str, int]:
    languages = run(config, folder)[0]["languages"]
    return {
        name: counts["train_bytes"] + counts["held_out_bytes"] for name, counts in languages.items()
    }


def letters(language: str, documents: int, size: int = 100) -> str:
    return json_lines(
        [f"{i:05d} {language}".ljust(size, "x") for i in range(documents)], lang=language
    )


@pytest.mark.parametrize("budget", [3_000, 20_000, 77_777])
def test_budget_is_drawn_from_all_files_by_their_size(tmp_path, budget):
    folder = inputs(tmp_path)
    for name, documents in {"a": 100, "b": 300, "c": 600}.items():
        write(folder / f"{name}.jsonl", letters(name, documents))
    found = by_language(
        config_for(folder, language_field="lang", budget_bytes=budget), tmp_path / "out"
    )
    for name, share in {"a": 0.1, "b": 0.3, "c": 0.6}.items():
        assert found[name] == pytest.approx(share * budget, abs=250)
    assert budget - 100 < sum(found.values()) <= budget
    again = by_language(
        config_for(folder, language_field="lang", budget_bytes=budget), tmp_path / "again"
    )
    assert again == found


def test_budget_left_by_short_files_is_read_from_the_others(tmp_path, monkeypatch):
    folder = inputs(tmp_path)
    monkeypatch.setattr(corpus, "OPEN_FILES", 1)
    write(folder / "a.jsonl", json_lines(["short"], lang="a", other="o" * 50_000))
    write(folder / "b.jsonl.gz", letters("b", 400))  # compressed to a fraction of its text
    write(folder / "c.jsonl", letters("c", 400))
    config = config_for(folder, language_field="lang", budget_bytes=70_000)
    found = by_language(config, tmp_path / "out")
    assert sum(found.values()) > 69_800 and found["b"] + found["c"] > 69_800
    everything = dataclasses.replace(
        config, text=dataclasses.replace(config.text, budget_bytes=10**9)
    )
    summary, train, held = run(everything, tmp_path / "all")
    assert len(train) + len(held) == 801 and not summary["stopped_at_budget"]
    assert summary["not_read"]["files"] == summary["not_read"]["bytes"] == 0


def test_some_of_many_small_files_are_read_completely(tmp_path):
    folder = inputs(tmp_path)
    for i in range(100):
        write(folder / f"{i:03d}.txt", f"{i:05d}".ljust(100, "x"))
    config = config_for(folder, budget_bytes=5_000)
    _, train, held = run(config, tmp_path / "out")
    numbers = sorted(int(document.text[:5]) for document in train + held)
    assert (
        len(numbers) == 50 and np.diff(numbers).max() <= 3
    )  # from the whole folder, not its beginning


def test_unread_text_is_reported(tmp_path):
    folder = inputs(tmp_path)
    for name in "ab":
        write(folder / f"{name}.jsonl", letters(name, 2000))
    lines = []
    config = config_for(folder, budget_bytes=40_000)
    summary = corpus.run(config, tmp_path / "out", lines.append)
    size = 2 * (folder / "a.jsonl").stat().st_size
    assert summary["not_read"]["files"] == 2 and summary["not_read"]["of_bytes"] == size
    assert 0.5 * size < summary["not_read"]["bytes"] < 0.95 * size
    assert any(
        "in 2 of 2 files, were not read" in line and "budget_bytes=40,000" in line for line in lines
    )


# --- Broken records and files -------------------------------------------------------------------

BROKEN = {
    "not JSON": '{"text": "cut o',
    "no field": '{"other": 1}',
    "another type": '{"text": ["a", "list"]}',
    "no object": "[1, 2]",
    "another encoding": '{"text": "Gr\udcf6\udcdfe"}',  # Latin-1
    "nested too deep": '{"text": ' + "[" * 100_000,
    "a huge number": '{"text": "x", "n": ' + "9" * 5000 + "}",
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("place", [0, 7])
def test_broken_line_is_skipped_and_reported(tmp_path, kind, place):
    rows = json_lines(TEXTS).splitlines()
    rows.insert(place, BROKEN[kind])
    path = tmp_path / "a.jsonl"
    path.write_bytes("\n".join(rows).encode("utf-8", errors="surrogateescape"))
    lines = []
    corpus.check(config_for(path))
    summary = corpus.run(config_for(path), tmp_path / "out", lines.append)
    assert summary["train_documents"] + summary["held_out_documents"] == len(TEXTS)
    assert (
        summary["broken"]["records"] == 1
        and f"{path}, line {place + 1} " in summary["broken"]["first"]
    )
    assert any(f"line {place + 1} " in line and "1 of 41 records" in line for line in lines)
    with pytest.raises(UserError, match=rf"a\.jsonl, line {place + 1} "):
        corpus.run(config_for(path, max_broken_share=0.0), tmp_path / "strict", print)


def test_too_many_broken_lines_are_refused_naming_the_first(tmp_path):
    rows = json_lines(TEXTS * 100).splitlines()
    rows[50:60] = ["broken"] * 10
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(rows), encoding="utf-8")
    assert run(config_for(path), tmp_path / "out")[0]["broken"]["records"] == 10
    rows[200:203] = ["broken"] * 3
    path.write_text("\n".join(rows), encoding="utf-8")
    with pytest.raises(
        UserError, match=r"11 of the first 201 records.*max_broken_share=0.001.*line 51 is not JSON"
    ):
        run(config_for(path), tmp_path / "out")
    assert (
        run(config_for(path, max_broken_share=0.02), tmp_path / "out")[0]["broken"]["records"] == 13
    )


def test_file_whose_first_records_are_all_wrong_is_refused_at_once(tmp_path):
    write(tmp_path / "a.jsonl", json_lines(TEXTS))
    other = write(tmp_path / "b.jsonl", json_lines(TEXTS).replace('"text"', '"content"'))
    with pytest.raises(
        UserError,
        match=r"first 5 records.*b\.jsonl, line 1 has no field 'text'; it has \['content'\]",
    ):
        corpus.check(config_for(tmp_path))
    other.write_text('{"content": 1}\n{"content": 2}\n')
    with pytest.raises(UserError, match=r"b\.jsonl, line 1 has no field"):
        corpus.check(config_for(tmp_path))


@pytest.mark.parametrize("ending", [".gz", ".xz", ".bz2", ".zst"])
@pytest.mark.parametrize("name", ["a.jsonl", "array.json", "a.txt"])
@pytest.mark.parametrize("left", [0.0, 0.5, 0.999])
def test_truncated_compressed_file_is_refused(tmp_path, name, ending, left):
    random = np.random.default_rng(0)
    texts = ["".join(random.choice(list("abcdefgh \n"), 300)) for _ in range(200)]
    content = (
        json.dumps([{"text": text} for text in texts]) if "array" in name else json_lines(texts)
    )
    path = write(tmp_path / f"{name}{ending}", content)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(left * len(whole))])
    with pytest.raises(UserError, match=rf"{name}{ending}' is cut off"):
        corpus.check(config_for(path))
        corpus.run(config_for(path), tmp_path / "out", print)


@pytest.mark.parametrize("ending", [".gz", ".xz", ".bz2", ".zst"])
def test_compressed_file_may_have_several_parts(tmp_path, ending):
    paths = [
        write(tmp_path / f"{i}.jsonl{ending}", json_lines(TEXTS[10 * i : 10 * i + 10]))
        for i in range(4)
    ]
    (tmp_path / "in").mkdir()
    joined = tmp_path / "in" / f"all.jsonl{ending}"
    joined.write_bytes(b"".join(path.read_bytes() for path in paths))
    _, train, held = run(config_for(joined), tmp_path / "out")
    assert sorted(document.text for document in train + held) == sorted(TEXTS)


@pytest.mark.parametrize("ending", [".gz", ".xz", ".bz2", ".zst"])
def test_damage_after_the_first_part_of_a_compressed_file_is_refused(tmp_path, ending):
    """The readers of bz2 and xz take a part that they do not recognise for the end of the file."""
    first, second = (
        write(tmp_path / f"{i}.jsonl{ending}", json_lines(TEXTS[i::2])).read_bytes() for i in (0, 1)
    )
    joined = tmp_path / f"all.jsonl{ending}"
    for rest in (b"ZZZZ" + second[4:], json_lines(TEXTS[1::2]).encode()):
        joined.write_bytes(first + rest)
        with pytest.raises(UserError, match=rf"all\.jsonl{ending}' cannot be read"):
            corpus.run(config_for(joined), tmp_path / "out", print)
    joined.write_bytes(first + bytes(8) + second + bytes(8))  # padding is allowed
    assert sum(map(len, run(config_for(joined), tmp_path / "out")[1:])) == len(TEXTS)


@pytest.mark.parametrize("end", ["batch", "schema", "mark"])
def test_truncated_arrow_stream_is_refused(tmp_path, end):
    """Also where it ends between two messages, after which Arrow reports no error."""
    path = tmp_path / "a.arrow"
    table, ends = pa.table({"text": TEXTS}), []
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        ends.append(file.tell())
        for batch in table.to_batches(max_chunksize=10):
            writer.write_batch(batch)
            ends.append(file.tell())
    assert len(run(config_for(path), tmp_path / "whole")[1]) > 30
    size = {"batch": ends[2], "schema": ends[0], "mark": ends[-1]}[end]
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"a\.arrow' is cut off|a\.arrow' cannot be read"):
        corpus.run(config_for(path), tmp_path / "out", print)


def test_cache_files_in_a_dataset_folder_are_ignored(tmp_path):
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    loaded = datasets.load_from_disk(tmp_path / "saved")
    loaded.map(lambda row: {"text": row["text"].upper()})
    loaded.filter(lambda row: "1" in row["text"])
    assert [*(tmp_path / "saved").glob("cache-*.arrow")]
    for given in (tmp_path / "saved", tmp_path / "saved" / "*.arrow"):
        corpus.check(config_for(given))
        _, train, held = run(config_for(given), tmp_path / "out")
        assert sorted(document.text for document in train + held) == sorted(TEXTS)
    next((tmp_path / "saved").glob("data-*.arrow")).unlink()
    with pytest.raises(UserError, match=r"lacks 'data-00000.*state\.json"):
        corpus.check(config_for(tmp_path / "saved"))


def test_arrow_files_of_both_formats_are_read(tmp_path):
    table = pa.table({"text": TEXTS})
    with (
        pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file,
        pa.ipc.new_file(file, table.schema) as writer,
    ):
        writer.write_table(table, max_chunksize=7)
    _, train, held = run(config_for(tmp_path / "a.arrow"), tmp_path / "out")
    assert sorted(document.text for document in train + held) == sorted(TEXTS)


def write_table(folder: Path, table: pa.Table, ending: str, new_arrow: Any) -> Path:
    """Write a Parquet file, or one in Arrow's stream or file format by `new_arrow`."""
    path = folder / f"a.{ending}"
    if ending == "parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as file, new_arrow(file, table.schema) as writer:
            writer.write_table(table)
    return path


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.large_binary(),
        pa.binary_view(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.dictionary(pa.int8(), pa.large_string()),
    ],
    ids=str,
)
@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_text_of_any_string_or_binary_type_is_read(tmp_path, kind, ending):
    plain = pa.array(TEXTS)
    column = (
        plain.cast(kind.value_type).dictionary_encode()
        if pa.types.is_dictionary(kind)
        else plain.cast(kind)
    )
    table = pa.table({"text": column.cast(kind), "lang": column.cast(kind)})
    path = write_table(tmp_path, table, ending, pa.ipc.new_stream)
    config = config_for(path, language_field="lang")
    corpus.check(config)
    _, train, held = run(config, tmp_path / "out")
    assert sorted(document.text for document in train + held) == sorted(TEXTS)
    assert {document.language for document in train + held} == {
        " ".join(text.split()) for text in TEXTS
    }


def test_error_names_a_column_that_is_no_text_and_its_type(tmp_path):
    pq.write_table(pa.table({"text": [[1], [2]], "body": TEXTS[:2]}), tmp_path / "a.parquet")
    with pytest.raises(
        UserError, match=r"a\.parquet' has type list<.*int64> in its column 'text'.*body.*cast it"
    ):
        corpus.check(config_for(tmp_path / "a.parquet"))


def test_invalid_utf_8_counts_as_a_broken_record(tmp_path):
    rows = [text.encode() for text in TEXTS] + [b"Gr\xf6\xdfe"]
    pq.write_table(pa.table({"text": rows}), tmp_path / "a.parquet")
    summary, train, held = run(config_for(tmp_path / "a.parquet"), tmp_path / "out")
    assert len(train) + len(held) == len(TEXTS)
    assert "record 41 is not UTF-8 in its field 'text'" in summary["broken"]["first"]


def strings(values: list[bytes]) -> pa.Array:
    """A column of strings whose bytes are not checked, as some writers leave them."""
    column = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(column), column.buffers())


@pytest.mark.parametrize("field", ["text", "lang"])
@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_invalid_utf_8_in_a_string_column_loses_that_record_only(tmp_path, field, ending):
    columns = {"text": [text.encode() for text in TEXTS], "lang": [b"en"] * len(TEXTS)}
    columns[field][3] = b"Gr\xf6\xdfe"
    table = pa.table({name: strings(values) for name, values in columns.items()})
    path = write_table(tmp_path, table, ending, pa.ipc.new_file)
    config = config_for(path, language_field="lang")
    corpus.check(config)
    summary, train, held = run(config, tmp_path / "out")
    assert {document.text for document in train + held} == {*TEXTS} - {TEXTS[3]}
    assert f"record 4 is not UTF-8 in its field '{field}'" in summary["broken"]["first"]


def documents_of(tmp_path: Path, content: bytes, name: str = "a.txt") -> list[str]:
    (tmp_path / name).write_bytes(content)
    return [document.text for document in corpus.read(config_for(tmp_path / name))]


def test_plain_text_is_unchanged(tmp_path):
    mark = "\ufeff".encode()
    assert documents_of(tmp_path, mark + b"a\rb\r\rc\n\nd") == ["a\rb\r\rc\n", "d"]
    assert documents_of(tmp_path, b"a\r\nb\r\n\r\nc\r\n") == ["a\r\nb\r\n", "c\r\n"]
    assert documents_of(tmp_path, mark + b"\n\na\n") == ["a\n"]
    assert documents_of(tmp_path, mark) == []
    assert documents_of(tmp_path, b"\n\n" + mark + b"a\n") == ["\ufeffa\n"]  # no mark of the file's
    assert documents_of(tmp_path, mark + json_lines(TEXTS[:2]).encode(), "a.jsonl") == TEXTS[:2]
    assert documents_of(tmp_path, mark + json.dumps([{"text": "x"}]).encode(), "a.json") == ["x"]
    for encoding in ("utf-16", "utf-16-be"):
        with pytest.raises(UserError, match=r"a\.txt' is in UTF-16"):
            documents_of(tmp_path, "\ufeffone\n".encode(encoding))
    for encoding in ("utf-16-le", "utf-16-be", "utf-32-le"):  # without a mark
        with pytest.raises(UserError, match=r"a\.txt' is in UTF-16 or UTF-32"):
            documents_of(tmp_path, "one\n\ntwo\n\n".encode(encoding))
    assert documents_of(tmp_path, b"an odd \0 character\n") == ["an odd \0 character\n"]


def test_text_without_line_breaks_is_split_between_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "LINE_BYTES", 16)
    monkeypatch.setattr(reading, "PASSAGE_BYTES", 16)
    text = "größer 数学 \U0001f642 день " * 20
    found = documents_of(tmp_path, text.encode())
    assert (
        "".join(found) == text
        and max(len(part.encode()) for part in found) < 20
        and len(found) > 20
    )


def test_passage_of_another_encoding_is_skipped(tmp_path):
    (tmp_path / "a.txt").write_bytes("\n\n".join(TEXTS).encode() + b"\n\nGr\xf6\xdfe\nmore\n\nlast")
    summary, train, held = run(config_for(tmp_path / "a.txt"), tmp_path / "out")
    assert summary["broken"]["records"] == 1 and "not UTF-8" in summary["broken"]["first"]
    assert "last" in {document.text for document in train + held}


def test_comma_separated_list_may_be_longer_than_a_file_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [f"part-{i:03d}-of-the-corpus.jsonl" for i in range(40)]
    for name, text in zip(names, TEXTS):
        write(tmp_path / name, json_lines([text]))
    _, train, held = run(config_for(",".join(names)), tmp_path / "out")
    assert sorted(document.text for document in train + held) == sorted(TEXTS)
    with pytest.raises(UserError, match="does not exist"):
        corpus.check(config_for("x" * 300 + ".jsonl"))


def test_local_files_need_no_hub_cache(tmp_path):
    """HF_HOME cannot be created."""
    (tmp_path / "file").write_text("")
    path = write(tmp_path / "a.jsonl.zst", json_lines(TEXTS))
    code = (
        "import sys; from tokalign_jax.config import Config; from tokalign_jax.text import corpus\n"
        "print(len([*corpus.read(Config(corpus=sys.argv[1]))]))"
    )
    env = {
        **os.environ,
        "HF_HOME": str(tmp_path / "file" / "cache"),
        "HF_DATASETS_CACHE": str(tmp_path / "file" / "x"),
    }
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, env=env
    )
    assert done.stdout.strip() == str(len(TEXTS)), done.stderr


def test_languages_beyond_the_maximum_are_pooled_with_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "MOST_LANGUAGES", 5)
    rows = "".join(
        json_lines([text], url=f"https://example.org/{i}") for i, text in enumerate(TEXTS)
    )
    lines = []
    config = config_for(write(tmp_path / "a.jsonl", rows), language_field="url")
    summary = corpus.run(config, tmp_path / "out", lines.append)
    assert len(summary["languages"]) == 6
    other = summary["languages"][corpus.OTHER]
    assert other["train_documents"] + other["held_out_documents"] == 35
    warnings = [line for line in lines if "warning" in line]
    assert len(warnings) == 1 and "language_field 'url' has more than 5 values" in warnings[0]


def test_fields_of_messages_that_are_not_read_are_reported(tmp_path):
    """A weight of 0 would mean not to train on a message, and tool calls are part of an answer."""
    answer = {"role": "assistant", "content": "y", "weight": 0, "tool_calls": [{"name": "f"}]}
    chats = [
        {"messages": [{"role": "user", "content": f"x {i}", "name": None}, answer]}
        for i in range(20)
    ]
    lines = []
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(chat) + "\n" for chat in chats))
    corpus.run(config_for(path), tmp_path / "out", lines.append)
    (line,) = [line for line in lines if "warning" in line]
    assert line.endswith("only role and content are read, not tool_calls, weight")


def test_language_named_all_is_distinct_from_the_total(tmp_path):
    path = write(
        tmp_path / "a.jsonl", json_lines(TEXTS[:20], lang="all") + json_lines(TEXTS[20:], lang="en")
    )
    summary, _, _ = run(config_for(path, language_field="lang"), tmp_path / "out")
    assert [*summary["languages"]] == ["'all'", "en"]


@pytest.mark.parametrize(
    "name, shown",
    [("all", "'all'"), ("a\nb", "a b"), ("a\x1bb", "a?b")],
    ids=["all", "line", "escape"],
)
def test_source_names_are_cleaned_like_languages(tmp_path, name, shown):
    for folder, texts in ((name, TEXTS[:20]), ("other", TEXTS[20:])):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "a.jsonl", json_lines(texts))
    paths = (tmp_path / name, tmp_path / "other")
    summary, _, _ = run(config_for(",".join(map(str, paths)), group_by="source"), tmp_path / "out")
    assert {*summary["languages"]} == {*summary["sources"]} == {shown, "other"}


# --- Weighted mixtures --------------------------------------------------------------------------


def parts(folder: Path, **documents: int) -> dict[str, Path]:
    found = {}
    for name, count in documents.items():
        (folder / name).mkdir(parents=True)
        for half in range(2):  # of each part two files
            rows = [f"{name}{half} {i:05d}".ljust(100, "x") for i in range(count // 2)]
            write(folder / name / f"{half}.jsonl", json_lines(rows, lang=f"l{half}"))
        found[name] = folder / name
    return found


@pytest.mark.parametrize("budget", [10**9, 30_000])
@pytest.mark.parametrize("form", ["text", "tuple", "mapping"])
def test_sources_are_sampled_by_weight(tmp_path, budget, form, monkeypatch):
    given = parts(tmp_path / "in", a=1000, b=1000, c=400)
    weights = dict(zip(given.values(), (6, 3, 1)))
    names = [f"{path}={weight}" for path, weight in weights.items()]
    value = {
        "text": ",".join(names),
        "tuple": names,
        "mapping": {str(p): w for p, w in weights.items()},
    }[form]
    config = config_from_dict(
        {"corpus": value, "text": {"budget_bytes": budget, "held_out_fraction": 0.2}}
    )
    summary, train, held = run(config, tmp_path / "out")
    total = sum(document.bytes for document in train + held)
    assert total > min(budget, 100 * 1000 / 0.6) - 1000
    for name, weight in zip("abc", (0.6, 0.3, 0.1)):
        found = [document for document in train + held if document.source == name]
        assert sum(document.bytes for document in found) == pytest.approx(weight * total, abs=250)
        assert summary["sources"][name] == sum(document.bytes for document in found)
        halves = [
            sum(document.text.startswith(f"{name}{half}") for document in found)
            for half in range(2)
        ]
        assert min(halves) > 0.8 * max(halves)  # of all files of the part
    again = config_from_dict(json.loads(json.dumps(config_to_dict(config))))
    monkeypatch.setattr(corpus, "OPEN_FILES", 1)
    assert run(again, tmp_path / "again")[1:] == (train, held)


def test_results_may_be_grouped_by_source(tmp_path):
    given = parts(tmp_path / "in", a=100, b=100)
    config = config_for(
        ",".join(map(str, given.values())), group_by="source", language_field="none"
    )
    corpus.check(config)
    summary, _, held = run(config, tmp_path / "out")
    assert (
        {document.language for document in held}
        == {document.source for document in held}
        == {"a", "b"}
    )
    assert [*summary["languages"]] == ["a", "b"]


def test_held_out_text_is_drawn_from_all_files(tmp_path):
    (tmp_path / "in").mkdir()
    for name in "az":
        texts = [f"{name} {i:03d} ".ljust(100, name) for i in range(200)]
        write(tmp_path / "in" / f"{name}.jsonl", json_lines(texts))
    context = Context(config_for(tmp_path / "in"), tmp_path / "run", lambda line: None)
    corpus.run(context.config, context.folder("corpus"), context.log)
    (chosen,) = held_out.texts(context, 1000).values()
    assert {text[0] for text in chosen} == {"a", "z"} and sum(map(len, chosen)) == 1000


def test_exhausted_source_is_reported(tmp_path):
    given = parts(tmp_path / "in", a=100, b=1000)
    lines = []
    config = config_for(f"{given['a']}=1,{given['b']}=1")
    summary = corpus.run(config, tmp_path / "out", lines.append)
    assert (
        sum(summary["sources"].values()) == pytest.approx(20_000, abs=300)
        and summary["not_read"]["files"] == 2
    )
    assert any(
        "'a' has no more text, and without it the weights would not hold" in line for line in lines
    )
    assert any("a 50.0%, b 50.0% of the text" in line for line in lines)


def test_sources_exhausted_together_leave_nothing_unread(tmp_path):
    given = parts(tmp_path / "in", a=100, b=100)
    summary = corpus.run(config_for(f"{given['a']}=1,{given['b']}=1"), tmp_path / "out", print)
    assert summary["not_read"]["files"] == 0 and summary["sources"] == {"a": 10_000, "b": 10_000}


@pytest.mark.parametrize("ending", ["=0", "=-1", "=0.0"])
def test_weights_are_positive_and_given_for_all_or_none(tmp_path, ending):
    given = parts(tmp_path / "in", a=10, b=10)
    with pytest.raises(UserError, match=r"a' has the weight .* must be above 0"):
        corpus.check(config_for(f"{given['a']}{ending},{given['b']}=1"))
    with pytest.raises(UserError, match="b' has no weight, but others have"):
        corpus.check(config_for(f"{given['a']}=1,{given['b']}"))


def test_file_name_may_look_like_a_weight(tmp_path):
    (tmp_path / "a=0.5").mkdir()
    write(tmp_path / "a=0.5" / "x.jsonl", json_lines(TEXTS))
    assert len([*corpus.read(config_for(tmp_path / "a=0.5"))]) == len(TEXTS)


def test_fingerprint_covers_the_mixture(tmp_path):
    given = parts(tmp_path / "in", a=10, b=10)
    one, other = (config_for(f"{given['a']}={weight},{given['b']}=1") for weight in (1, 2))
    assert (
        corpus.mixture(one) != corpus.mixture(other)
        and corpus.mixture(config_for(given["a"])) == []
    )


def test_fingerprint_covers_how_files_are_read(tmp_path):
    """Neither of these changes alters the files' contents or their order."""

    def corpus_digests(config: Config) -> list[str]:
        return identities(Context(config, tmp_path / "run", print))["corpus"]

    path = write(tmp_path / "a.txt", json_lines(TEXTS))
    before = corpus_digests(config_for(path))
    assert before != corpus_digests(config_for(path.rename(path.with_suffix(".jsonl"))))

    one, two = tmp_path / "one", tmp_path / "two"
    for name in ("one/a", "one/b", "two/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / f"{name}.jsonl", json_lines([name]))
    config = config_for(f"{one}=1,{two}=2")
    before = corpus_digests(config)
    (one / "b.jsonl").rename(two / "b.jsonl")
    assert before != corpus_digests(config)
