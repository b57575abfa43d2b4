"""Shared command-line arguments and the protection of existing files."""

import argparse
from pathlib import Path

import pytest

from tokalign_jax.cli import arguments, evaluate
from tokalign_jax.errors import UserError


def test_paths_may_begin_with_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    given = evaluate.parser().parse_args(["--workdir=~/run", "--output=out"])
    assert (given.workdir, given.output) == (Path("/home/me/run"), Path("out"))


@pytest.mark.parametrize(
    "wrong", ["--batch=0", "--repeats=0", "--bytes-per-language=-5", "--seed=-1", "--steps=many"]
)
def test_numbers_below_the_minimum_are_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        evaluate.parser().parse_args([wrong, "--output=out"])
    assert wrong.partition("=")[0] in (message := capsys.readouterr().err) and (
        "at least" in message or "invalid int" in message
    )


def test_existing_output_is_not_overwritten(tmp_path):
    parser = argparse.ArgumentParser()
    arguments.add_overwrite(parser, "--html")
    arguments.refuse_existing(
        "--html", tmp_path, parser.parse_args([]).overwrite
    )  # an empty folder
    (tmp_path / "page.html").touch()
    for place in (tmp_path, tmp_path / "page.html"):
        with pytest.raises(UserError, match=r"--html .* exists already.*--overwrite"):
            arguments.refuse_existing("--html", place, parser.parse_args([]).overwrite)
        arguments.refuse_existing("--html", place, parser.parse_args(["--overwrite"]).overwrite)
