"""Fixtures of the tests of whole runs."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.pipeline.toy_runs import toy_inputs
from tokalign_jax.text import reopening


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> dict[str, Path]:
    """A tiny source model of each family, a target tokenizer of another kind, and a corpus."""
    return toy_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module", autouse=True)
def exports_read_in_this_process():
    """Open exports in this process, which spares an import of transformers per run.

    tests/models/test_opening.py and tests/pipeline/test_runs.py open them in a new process.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            reopening,
            "read_afresh",
            lambda folder: reopening.read(AutoTokenizer.from_pretrained(folder)),
        )
        yield
