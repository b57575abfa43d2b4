"""Digests of outside files: every edit changes them, and unchanged files are not read again."""

import os
import shutil
import time

import numpy as np
import pytest

from tokalign_jax import demo
from tokalign_jax.config import AlignmentConfig, Config
from tokalign_jax.pipeline import identities
from tokalign_jax.pipeline.context import Context
from tokalign_jax.utils import digests
from tokalign_jax.utils.digests import Digests


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "BLOCK", 1000)
    monkeypatch.setattr(digests, "PIECE", 64)
    (tmp_path / "in").mkdir()
    for number, size in enumerate((0, 1, 999, 1000, 1001, 5500)):
        (tmp_path / "in" / f"{number}.bin").write_bytes(np.random.default_rng(number).bytes(size))
    return tmp_path


def files_of(folder):
    return sorted((folder / "in").iterdir())


def quiet(line):
    del line


@pytest.mark.parametrize("place", [0, 1, 63, 64, 999, 1000, 2750, 4999, 5000, 5499])
def test_digest_changes_with_any_byte(folder, place):
    before = Digests(folder, quiet).of(files_of(folder))
    with files_of(folder)[-1].open("r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 1]))
    assert Digests(folder, quiet).of(files_of(folder)) != before


def test_digest_covers_names_and_boundaries_and_equals_that_of_a_copy(folder):
    found = Digests(folder, quiet)
    before = found.of(files_of(folder))
    shutil.copytree(folder / "in", folder / "copy")
    assert found.of(sorted((folder / "copy").iterdir())) == before
    (folder / "copy" / "5.bin").rename(folder / "copy" / "6.bin")
    assert found.of(sorted((folder / "copy").iterdir())) != before
    (folder / "in" / "5.bin").write_bytes((folder / "in" / "5.bin").read_bytes()[:-1])
    assert found.of(files_of(folder)) != before
    assert found.each([folder / "nowhere", folder / "in"]) == ["", ""]


def test_unchanged_files_are_not_read_again(folder, monkeypatch):
    monkeypatch.setattr(digests, "SETTLED", 0.05)
    time.sleep(0.1)
    first = Digests(folder, quiet)
    before = first.each(files_of(folder))
    assert not (folder / digests.CACHE).exists()
    first.save()
    hashed = []
    block = digests._block
    monkeypatch.setattr(
        digests, "_block", lambda path, start: hashed.append(path) or block(path, start)
    )
    assert Digests(folder, quiet).each(files_of(folder)) == before and not hashed
    changed = files_of(folder)[2]
    stat = changed.stat()
    changed.write_bytes(b"x" * stat.st_size)
    os.utime(changed, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as rsync and cp -p do
    assert Digests(folder, quiet).each(files_of(folder))[2] != before[2] and hashed == [changed]


def test_recently_written_file_is_hashed_again(folder):
    first = Digests(folder, quiet)
    first.each(files_of(folder))
    assert not first._entries


def test_everything_is_hashed_without_a_cache(folder):
    (folder / digests.CACHE).mkdir()
    first, second = Digests(folder, quiet), Digests(folder / "none", quiet)
    assert first.of(files_of(folder)) == second.of(files_of(folder))
    first.save()
    second.save()
    (folder / "none" / digests.CACHE).write_text('{"a": 3, "b": []}')
    Digests(folder / "none", quiet).of(files_of(folder))


def test_change_in_the_middle_of_a_file_changes_the_fingerprint(tmp_path):
    texts = [f"document number {i} ".ljust(400, "x") for i in range(10_000)]
    path, model = tmp_path / "a.txt", tmp_path / "model"
    path.write_text("\n\n".join(texts))
    shutil.copytree(demo.SOURCE_MODEL, model)
    weights = model / "model.safetensors"

    text, vectors = model / "pretraining.jsonl", tmp_path / "vectors.npz"
    vectors.write_bytes(bytes(1000))
    alignment = AlignmentConfig(source_vectors=str(vectors), target_vectors=str(path))
    config = Config(corpus=f"{path},{text}", source_model=str(model), alignment=alignment)

    def of_run():
        found = identities.identities(Context(config, tmp_path / "run", quiet))
        return {**found, **found["vectors"], "vectors": None}

    before = of_run()
    for changed, keys in (
        (text, ["corpus"]),
        (weights, ["source_model"]),
        (vectors, ["source_vectors"]),
        (path, ["corpus", "target_vectors"]),
    ):
        with changed.open("r+b") as file:
            file.seek(changed.stat().st_size // 2)
            file.write(b"0")
        after = of_run()
        assert [name for name in after if after[name] != before[name]] == keys
        before = after
