"""Names to folders, configs and tokenizers: what is found, and what is said where nothing is."""

import time

import pytest

from tokalign_jax.errors import UserError
from tokalign_jax.models import hub


def test_without_network_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    start = time.monotonic()
    with pytest.raises(
        UserError, match=r"source model 'EleutherAI/pythia-1b@main' .*local Hugging Face folder.*embedded"
    ):
        hub.resolve("EleutherAI/pythia-1b@main", what="source model")
    with pytest.raises(UserError, match=r"tokenizer 'Qwen/Qwen2-1\.5B'"):
        hub.load_tokenizer("Qwen/Qwen2-1.5B")
    with pytest.raises(UserError, match="there is no such folder"):
        hub.resolve("./nowhere", what="source model")
    assert time.monotonic() - start < 20
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"tokenizer .* cannot be read"):
        hub.load_tokenizer(tmp_path / "empty")


def test_a_local_folder_is_itself(tmp_path):
    assert hub.resolve(str(tmp_path), what="source model") == tmp_path
