"""Documents: formats, duplicates, the budget, the held-out split, and errors that say what is wrong."""

import bz2
import dataclasses
import gzip
import hashlib
import json
import lzma
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from tokalign_jax.config import Config, TextConfig
from tokalign_jax.errors import UserError
from tokalign_jax.text import corpus

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
    compress = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": zstandard.compress}
    path.write_bytes(compress.get(path.suffix, bytes)(content.encode()))
    return path


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst", "a.json.bz2", "array.json", "a.parquet"]
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


def test_plain_text_is_parted_by_blank_lines(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt.gz", "one\ntwo\n\n \nthree\n\nfour\u2028still four")
    _, train, held = run(config_for(path), tmp_path / "out")
    assert sorted(d.text for d in train + held) == ["four\u2028still four", "one\ntwo\n", "three\n"]
    monkeypatch.setattr(corpus, "PASSAGE_BYTES", 5)
    _, train, held = run(config_for(path), tmp_path / "out")
    assert sorted(d.text for d in train + held) == ["four\u2028still four", "one\ntwo\n", "three\n"]
    monkeypatch.setattr(corpus, "PASSAGE_BYTES", 4)
    _, train, held = run(config_for(path), tmp_path / "out")
    assert sorted(d.text for d in train + held) == ["four\u2028still four", "one\n", "three\n", "two\n"]


def test_files_by_glob_comma_folder_and_tuple(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(4):
        write(tmp_path / "in" / f"part[{i}].jsonl", json_lines(TEXTS[10 * i : 10 * i + 10]))
    (tmp_path / "in" / "README.md").write_text("not read")
    names = [str(tmp_path / "in" / f"part[{i}].jsonl") for i in range(4)]
    for given in (str(tmp_path / "in" / "part*.jsonl"), ",".join(names), str(tmp_path / "in"), tuple(names)):
        config = dataclasses.replace(config_for(""), corpus=given)
        _, train, held = run(config, tmp_path / "out")
        assert sorted(d.text for d in train + held) == sorted(TEXTS)


def test_a_folder_of_the_library_datasets(tmp_path):
    rows = [{"text": text, "lang": "de", "id": i} for i, text in enumerate(TEXTS)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / ".cache").mkdir()
    write(tmp_path / "saved" / ".cache" / "other.jsonl", json_lines(["not meant"]))
    config = config_for(tmp_path / "saved", language_field="lang")
    corpus.check(config)
    _, train, held = run(config, tmp_path / "out")
    assert sorted(d.text for d in train + held) == sorted(TEXTS) and {d.language for d in train} == {"de"}
    with pytest.raises(UserError, match=r"no field 'body'; it has \['id', 'lang', 'text'\]"):
        corpus.check(config_for(tmp_path / "saved", text_field="body"))


def test_of_a_folder_of_several_splits_one_is_read(tmp_path):
    splits = {"train": TEXTS[:30], "test": TEXTS[30:]}
    made = {name: datasets.Dataset.from_list([{"text": text} for text in texts]) for name, texts in splits.items()}
    datasets.DatasetDict(made).save_to_disk(tmp_path / "saved")
    for name, texts in splits.items():
        _, train, held = run(config_for(tmp_path / "saved", hub_split=name), tmp_path / name)
        assert sorted(d.text for d in train + held) == sorted(texts)
    with pytest.raises(UserError, match=r"no split 'dev': name one of train, test with --config.text.hub_split"):
        corpus.check(config_for(tmp_path / "saved", hub_split="dev"))


def test_other_fields_may_change_their_type_from_line_to_line(tmp_path):
    odd = [1, "two", None, [3], {"four": 4}, {"four": "4"}, 5.5, True]
    lines = [json.dumps({"meta": odd[i % len(odd)], "text": text}) for i, text in enumerate(TEXTS)]
    lines += [json.dumps({"text": None}), "", json.dumps({"text": "  \n"}), json.dumps({"text": "half \ud83d pair"})]
    path = write(tmp_path / "a.jsonl", "\n".join(lines))
    summary, train, held = run(config_for(path), tmp_path / "out")
    assert sorted(d.text for d in train + held) == sorted([*TEXTS, "half ? pair"])
    assert summary["without_text"] == 2


def test_duplicates_are_dropped_and_counted_by_language(tmp_path):
    first, again = json_lines(TEXTS, lang="de"), json_lines(TEXTS[:7], lang="fr")
    path = write(tmp_path / "a.jsonl", first + again + json_lines(["nur hier", "und hier"], lang=None))
    summary, train, held = run(config_for(path, language_field="lang"), tmp_path / "out")
    texts = [d.text for d in train + held]
    assert len(texts) == len(set(texts)) == 42
    assert summary["duplicates"] == summary["languages"]["fr"]["duplicates"] == 7
    assert {d.language for d in train + held} == {"de", corpus.UNKNOWN}


def test_held_out_documents_are_chosen_by_hash_alone(tmp_path):
    texts = [f"text number {i}" for i in range(500)]
    expected = {t for t in texts if int(hashlib.sha256(t.encode()).hexdigest()[:16], 16) / 2**64 < 0.1}
    sides = []
    for order in (texts, texts[::-1]):
        path = write(tmp_path / "a.jsonl", json_lines(order))
        _, train, held = run(config_for(path, held_out_fraction=0.1), tmp_path / "out")
        assert not {d.text for d in train} & {d.text for d in held}
        sides.append({d.text for d in held})
    assert sides == [expected, expected]
    assert 20 < len(expected) < 80


def test_a_small_corpus_holds_out_the_smallest_hash_of_each_language(tmp_path):
    rows = [("de", t) for t in TEXTS[:10]] + [("fr", t) for t in TEXTS[10:20]] + [("it", TEXTS[20])]
    path = write(tmp_path / "a.jsonl", "".join(json_lines([text], lang=language) for language, text in rows))
    _, train, held = run(config_for(path, held_out_fraction=1e-9, language_field="lang"), tmp_path / "out")
    for language in ("de", "fr"):
        texts = [text for of, text in rows if of == language]
        smallest = min(texts, key=lambda t: hashlib.sha256(t.encode()).digest())
        assert [d.text for d in held if d.language == language] == [smallest]
    assert [d.text for d in train if d.language == "it"] == [TEXTS[20]]  # its only document is worth more in training
    assert len(train) + len(held) == 21


def test_two_documents_of_two_languages_still_split(tmp_path):
    path = write(tmp_path / "a.jsonl", json_lines(["eins"], lang="de") + json_lines(["un"], lang="fr"))
    _, train, held = run(config_for(path, held_out_fraction=0.0, language_field="lang"), tmp_path / "out")
    assert (len(train), len(held)) == (1, 1)


def test_reading_stops_at_the_budget(tmp_path):
    path = write(tmp_path / "a.jsonl", json_lines(TEXTS))
    budget = sum(len(t.encode()) for t in TEXTS[:9]) + 3
    summary, train, held = run(config_for(path, budget_bytes=budget), tmp_path / "out")
    assert sorted(d.text for d in train + held) == sorted(TEXTS[:9])
    assert summary["stopped_at_budget"]
    with pytest.raises(UserError, match=r"text\.budget_bytes=10"):
        corpus.run(config_for(path, budget_bytes=10), tmp_path / "out", print)


def test_long_corpora_are_cut_into_files_and_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "FILE_BYTES", 600)
    monkeypatch.setattr(corpus, "GROUP_BYTES", 200)
    path = write(tmp_path / "a.jsonl", json_lines(TEXTS))
    summary, train, _ = run(config_for(path), tmp_path / "out")
    files = sorted((tmp_path / "out").glob("train-*.parquet"))
    assert [f.name for f in files] == [f"train-{i:05d}.parquet" for i in range(len(files))]
    assert len(files) >= summary["train_bytes"] // 850
    assert max(sum(d.bytes for d in batch) for batch in corpus.train_batches(tmp_path / "out")) < 300
    assert [d.text for d in train if d.text != train[-1].text] == [d.text for d in train[:-1]]
    shorter = write(tmp_path / "b.jsonl", json_lines(TEXTS[:8]))
    _, train, held = run(config_for(shorter), tmp_path / "out")  # nothing of an earlier run stays behind
    assert len(train) + len(held) == 8


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", json.dumps({"content": "x", "id": 3}) + "\n", ["no field 'text'", "'content', 'id'", "text_field"]),
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
def test_bad_files_are_named_before_long_work(tmp_path, name, content, expected):
    path = write(tmp_path / name, content)
    with pytest.raises(UserError) as error:
        corpus.check(config_for(path))
        corpus.run(config_for(path), tmp_path / "out", print)
    for part in (*expected, name):
        assert part in str(error.value)


def test_broken_compression_and_encoding_name_the_file(tmp_path):
    whole = lzma.compress(json_lines(TEXTS * 50).encode())
    (tmp_path / "cut.jsonl.xz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "no.jsonl.gz").write_bytes(b"this is no gzip")
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    (tmp_path / "no.parquet").write_bytes(b"PAR1 no more")
    for name in ("cut.jsonl.xz", "no.jsonl.gz", "latin.txt", "no.parquet"):
        with pytest.raises(UserError, match=name):
            corpus.check(config_for(tmp_path / name))
            corpus.run(config_for(tmp_path / name), tmp_path / "out", print)


def test_missing_corpora_say_what_is_there(tmp_path):
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


def test_a_missing_parquet_column_says_what_is_there(tmp_path):
    pq.write_table(pa.table({"body": TEXTS, "id": list(range(len(TEXTS)))}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"no field 'text'; it has \['body', 'id'\]"):
        corpus.check(config_for(tmp_path / "a.parquet"))
    _, train, held = run(config_for(tmp_path / "a.parquet", text_field="body"), tmp_path / "out")
    assert len(train) + len(held) == len(TEXTS)


def test_a_single_document_cannot_be_split(tmp_path):
    path = write(tmp_path / "a.jsonl", json_lines(["alone", "alone"]))
    with pytest.raises(UserError, match="1 documents to train on and 0 to hold out"):
        corpus.run(config_for(path), tmp_path / "out", print)


def test_a_parquet_file_may_have_no_rows(tmp_path):
    """Of a folder that Spark wrote, say."""
    table = pa.table({"text": pa.array(TEXTS, pa.large_string())})
    pq.write_table(table, tmp_path / "part-1.parquet", row_group_size=7)
    pq.write_table(table.slice(0, 0), tmp_path / "part-2.parquet")
    _, train, held = run(config_for(tmp_path), tmp_path / "out")
    assert {document.text for document in train + held} == set(TEXTS)


def test_any_language_is_a_name(tmp_path):
    lines = [{"text": text, "lang": lang} for text, lang in zip(TEXTS, ["\ud800x", 0, None, ""] * 10)]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    _, train, held = run(config_for(path, language_field="lang"), tmp_path / "out")
    assert {document.language for document in train + held} == {"?x", "0", corpus.UNKNOWN}


def test_documents_are_read_by_their_positions(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "GROUP_BYTES", 200)
    monkeypatch.setattr(corpus, "FILE_BYTES", 500)
    _, train, _ = run(config_for(write(tmp_path / "a.jsonl", json_lines(TEXTS))), tmp_path / "out")
    assert len([*(tmp_path / "out").glob("train-*.parquet")]) > 2
    for positions in ([], [0], [3, 4, 17, len(train) - 1], range(len(train))):
        assert [*corpus.at(tmp_path / "out", np.array(positions, np.int64))] == [train[i] for i in positions]
