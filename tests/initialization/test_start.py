"""What a start asks of its corpus."""

from types import SimpleNamespace

import numpy as np
import pytest

from tokalign_jax.config import Config, InitializationConfig
from tokalign_jax.initialization import initialization, start


@pytest.mark.parametrize("target_tokens, drawn", [(1000, 300), (500, 600), (0, 300)])
def test_documents_are_drawn_for_a_budget_of_target_tokens(monkeypatch, target_tokens, drawn):
    """Documents are drawn by source tokens: twice as many where these say half as much."""
    settings = InitializationConfig(distillation_tokens=600, corpus_share=0.5)
    source, target = (
        SimpleNamespace(shards=SimpleNamespace(counts=np.array([0, count])))
        for count in (1000, target_tokens)
    )
    aligned = SimpleNamespace(source_size=100, target_size=100)
    asked: list[int] = []
    monkeypatch.setattr(initialization, "distill", lambda *rest: rest)
    config = Config(initialization=settings)
    start._distill(config, source, target, aligned, asked.append, None, print, 0)  # type: ignore[arg-type]
    assert asked == [drawn]
