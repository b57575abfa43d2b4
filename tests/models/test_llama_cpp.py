"""Exports converted to GGUF: llama.cpp has the ids of AutoTokenizer and continues like transformers.

Needs llama-cpp-python, and a checkout of llama.cpp with the requirements of its converter:

    LLAMA_CPP=llama.cpp python -m pytest tests/models/test_llama_cpp.py
"""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tokalign_jax as ta
from tests.helpers import SHARED, TEXTS
from tests.models.parity_cases import TOKENIZER, Case, cases_of, model
from tests.text.test_kinds import CODE, LANGUAGES
from tokalign_jax.models import hub
from tokalign_jax.parallel import sharding
from tokalign_jax.utils import paths

CHECKOUT = os.environ.get("LLAMA_CPP", "")
STEPS = 24
GELU_MARGIN = 0.005
"""Difference of scores that llama.cpp's GELU, a table in float16, may make (seen: 0.002)."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHECKOUT, reason="LLAMA_CPP names no checkout of llama.cpp"),
]

TYPES = {
    "llama": cases_of("llama")[0],
    "qwen2": Case("qwen2", "plain"),
    "qwen3": cases_of("qwen3")[0],
    # llama.cpp takes the scale of attention from the size of a head, whatever the config says.
    "gemma3_text": Case(
        "gemma3_text",
        "windows",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 12},
    ),
}


def target_tokenizer():
    """Returns Qwen 3's tokenizer where it is at hand, which llama.cpp's converter recognizes."""
    folder = SHARED / "tokenizers/qwen3"
    return hub.load_tokenizer(folder) if folder.exists() else None


@pytest.fixture(scope="module", params=TYPES)
def served(request, tmp_path_factory):
    """Returns an exported folder, adapted to another vocabulary, and llama.cpp's model of it."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    tokenizer = target_tokenizer()
    if tokenizer is None:
        pytest.skip("the shared tokenizer is not at hand")
    folder = tmp_path_factory.mktemp(request.param)
    case = TYPES[request.param]
    model(case).save_pretrained(folder / "source")
    TOKENIZER.save_pretrained(folder / "source")
    source = ta.load_model(str(folder / "source"))
    adapted = ta.initialize(source, tokenizer, ta.align(source.tokenizer, tokenizer))
    # Tokens of the same bytes in another order start from equal rows, which would tie.
    random = np.random.default_rng(0)
    leaves = paths.flatten(adapted.params)
    for path in leaves:
        if sharding.is_vocabulary(path):
            leaves[path] += 0.05 * random.normal(size=leaves[path].shape).astype(np.float32)
    adapted = replace(adapted, params=paths.unflatten(leaves))
    written = ta.save(adapted, folder / "export", dtype="float32")
    command = [sys.executable, f"{CHECKOUT}/convert_hf_to_gguf.py", str(written)]
    command += ["--outtype", "f32", "--outfile", str(folder / "model.gguf")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    gguf = llama_cpp.Llama(
        str(folder / "model.gguf"), n_ctx=512, n_threads=1, logits_all=True, verbose=False
    )
    return written, gguf


def test_ids_are_those_of_autotokenizer(served):
    folder, gguf = served
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [*LANGUAGES.values(), CODE, *TEXTS]
    assert len(LANGUAGES) == 28
    different = [
        text
        for text in texts
        if gguf.tokenize(text.encode(), add_bos=False, special=False)
        != tokenizer(text, add_special_tokens=False)["input_ids"]
    ]
    assert not different


def test_greedy_continuations_are_those_of_transformers(served):
    """A token of almost the same score also counts where GELU makes scores inexact."""
    folder, gguf = served
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    margin = GELU_MARGIN if reference.config.model_type == "gemma3_text" else 0.0
    for text in [*list(LANGUAGES.values())[::3], CODE]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        gguf.reset()
        gguf.eval(ids)
        for _ in range(STEPS):
            chosen = int(np.argmax(gguf.scores[gguf.n_tokens - 1]))
            with torch.no_grad():
                scores = reference(torch.tensor([ids])).logits[0, -1]
            assert scores[chosen] >= scores.max() - margin, text
            ids.append(chosen)
            gguf.eval([chosen])
