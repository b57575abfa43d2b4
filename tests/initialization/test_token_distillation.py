"""Token Distillation: snippets, the loss against PyTorch, and which rows may change."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.helpers import TEXTS, tiny_model_folder, tiny_tokenizer
from tests.models.parity_cases import cases_of, settings, tokens
from tests.pipeline.toy_runs import arguments, write_corpus
from tokalign_jax import main
from tokalign_jax.alignment import methods
from tokalign_jax.config import (
    AlignmentConfig,
    ComputeConfig,
    Config,
    InitializationConfig,
    TokenDistillationConfig,
)
from tokalign_jax.initialization import initialization, token_distillation
from tokalign_jax.initialization.initialization import Side
from tokalign_jax.initialization.token_distillation import NONE, Finder, Snippets
from tokalign_jax.models import families, hub, huggingface, transformer
from tokalign_jax.parallel import sharding
from tokalign_jax.text.canonical import token_bytes, vocabulary_size
from tokalign_jax.text.corpus import Document

SETTINGS = TokenDistillationConfig(snippets=6, snippet_length=24, learning_rate=3e-3, batch_size=4)
CONFIG = Config(
    alignment=AlignmentConfig(method="token_distillation"),
    initialization=InitializationConfig(token_distillation=SETTINGS),
    compute=ComputeConfig(dtype="float32"),
)
DOCUMENTS = [Document(text, "en", len(text)) for text in TEXTS * 6]


@pytest.fixture(scope="module")
def tokenizers():
    return tiny_tokenizer(300, TEXTS), tiny_tokenizer(340, TEXTS)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def sides(request, tmp_path_factory, tokenizers):
    folder = tiny_model_folder(
        tmp_path_factory.mktemp("source"), "llama", tied=request.param, tokenizer=tokenizers[0]
    )
    config, _ = hub.load_config(folder)
    params = huggingface.load_params(folder, config)
    aligned = methods.from_pieces(*tokenizers)
    new_config, new = initialization.initialize(config, params, aligned)
    source = Side(config, params, tokenizers[0], None)
    return source, Side(new_config, new, tokenizers[1], None), aligned, folder


def finder(tokenizers) -> Finder:
    source, target = tokenizers
    aligned = methods.from_pieces(source, target)
    ids = np.flatnonzero(np.isin(aligned.rules, initialization.COMPOSED))
    return Finder(source, target, ids, vocabulary_size(source), source.eos_token_id)


def test_snippets_spell_the_same_text_in_both_readings(tokenizers):
    search = finder(tokenizers)
    snippets, size = search.find(DOCUMENTS, SETTINGS), search.source_size
    source, target = (token_bytes(tokenizer) for tokenizer in tokenizers)
    met = np.zeros(len(search.ids), int)
    assert len(snippets.original) > len(search.ids)
    for original, merged, positions in zip(*snippets):
        real = merged != NONE
        assert original[0] == merged[0] == search.start and positions[0] == 0
        new = merged[real][merged[real] >= size] - size
        assert len(new)
        met[np.unique(new)] += 1
        spelled = [
            target[search.ids[token - size]] if token >= size else source[token]
            for token in merged[real][1:].tolist()
        ]
        ends = positions[real][1:]
        assert b"".join(spelled) == b"".join(source[i] for i in original[1 : ends[-1] + 1].tolist())
        for begin, end, text in zip(positions[real][:-1], ends, spelled):
            assert b"".join(source[i] for i in original[begin + 1 : end + 1].tolist()) == text
        assert (original[ends[-1] + 1 :] == 0).all() and (positions[~real] == NONE).all()
    assert (met > 0).mean() > 0.3  # of the others, text has none: they are parts of longer ones


def test_every_token_gets_one_snippet_before_any_gets_two(tokenizers):
    search = finder(tokenizers)
    once = search.find(DOCUMENTS, replace(SETTINGS, snippets=1))
    few = search.find(DOCUMENTS, replace(SETTINGS, most_snippets=len(once.original)))
    for one, other in zip(once, few):
        assert {tuple(row) for row in one.tolist()} == {tuple(row) for row in other.tolist()}


def test_loss_is_the_mean_squared_difference_of_final_states(sides):
    source, target, aligned, folder = sides
    search = finder((source.tokenizer, target.tokenizer))
    snippets = Snippets(*(values[:5] for values in search.find(DOCUMENTS, SETTINGS)))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    size = aligned.source_size
    table = np.asarray(source.params["embed_tokens"]["embedding"], np.float32)[:size]
    rows = np.asarray(target.params["embed_tokens"]["embedding"], np.float32)[search.ids]
    params = {**source.params, "embed_tokens": {"embedding": table}}
    settings = token_distillation._Settings(source.config, "float32", mesh)
    frozen, state = token_distillation._start(settings, params, rows)
    batch = token_distillation._put(snippets, mesh)
    found = token_distillation._jitted_loss(state.change, frozen, batch, settings=settings)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    whole = torch.cat([model.get_input_embeddings().weight[:size], torch.tensor(rows)])
    squares, count = 0.0, 0
    for original, merged, positions in zip(*snippets):
        real = merged != NONE
        states = [
            model(inputs_embeds=whole[torch.tensor(ids)][None], output_hidden_states=True)
            .hidden_states[-1][0]
            .detach()
            .numpy()
            for ids in (original.astype(int), merged[real].astype(int))
        ]
        squares += np.square(states[0][positions[real]] - states[1]).sum()
        count += states[1].size
    np.testing.assert_allclose(float(found), squares / count, rtol=1e-4)


def test_only_rows_of_new_tokens_change_and_the_loss_falls(sides):
    source, target, aligned, _ = sides
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    how = DOCUMENTS, mesh, lambda line: None
    result = initialization.distill_tokens(CONFIG, source, target, aligned, *how)
    assert result.facts["loss_after"] < 0.9 * result.facts["loss_before"]
    before = np.asarray(target.params["embed_tokens"]["embedding"])
    moved = (result.rows != before).any(axis=1)
    composed = np.isin(aligned.rules, initialization.COMPOSED)
    assert moved.any() and not moved[~composed].any()


def test_states_of_an_earlier_layer_need_fewer_layers(sides):
    source, target, aligned, _ = sides
    settings = replace(SETTINGS, layers=1)
    config = replace(CONFIG, initialization=InitializationConfig(token_distillation=settings))
    how = DOCUMENTS, sharding.make_mesh(devices=jax.devices()[:1]), lambda line: None
    result = initialization.distill_tokens(config, source, target, aligned, *how)
    whole = initialization.distill_tokens(CONFIG, source, target, aligned, *how)
    assert result.facts["loss_after"] < result.facts["loss_before"]
    assert result.facts["loss_before"] != whole.facts["loss_before"]


def test_text_without_new_tokens_leaves_the_mean_of_the_pieces(sides):
    source, target, aligned, _ = sides
    lines, mesh = [], sharding.make_mesh(devices=jax.devices()[:1])
    nothing = [Document("7", "en", 1)]
    result = initialization.distill_tokens(
        CONFIG, source, target, aligned, nothing, mesh, lines.append
    )
    np.testing.assert_array_equal(
        result.rows, np.asarray(target.params["embed_tokens"]["embedding"])
    )
    assert result.facts == {} and "no new token is in the text" in lines[0]


def test_run_initialises_with_token_distillation(tmp_path, tokenizers):
    source, target = tokenizers
    corpus = write_corpus(tmp_path)
    target.save_pretrained(tmp_path / "target")
    folder = tiny_model_folder(tmp_path / "source", "llama", tied=True, tokenizer=source)
    inputs = {"llama": folder, "target": tmp_path / "target", "corpus": corpus}
    group = "--config.initialization.token_distillation"
    chosen = "--config.alignment.method=token_distillation", f"{group}.snippets=2"
    run = arguments(inputs, "llama", tmp_path / "run", "starts", *chosen, "--stages=init")
    assert main.main(run) == 0
    record = json.loads((tmp_path / "run" / "stages.json").read_text())["stages"]["init"]
    facts = record["summary"]["tuned"]
    assert 0 < facts["snippets"] <= 2 * target.vocab_size
    before = huggingface.load_params(folder, hub.load_config(folder)[0])["embed_tokens"][
        "embedding"
    ]
    made = tmp_path / "run" / "init"
    after = huggingface.load_params(made, hub.load_config(made)[0])["embed_tokens"]["embedding"]
    known = {row.tobytes() for row in np.asarray(before, np.float32)}
    assert 0.5 < np.mean([row.tobytes() in known for row in np.asarray(after)]) < 1


def test_first_layers_of_a_hybrid_model_can_be_compared():
    case = cases_of("lfm2")[0]
    model = families.config_from_hf(AutoConfig.for_model("lfm2", **settings(case)).to_dict())
    params = transformer.init_params(model, jax.random.key(0), std=0.2)
    hidden = transformer.forward(*token_distillation._truncated(model, params, 1), tokens(8))
    expected = transformer.forward(*transformer.first_layers(model, params, 1), tokens(8))
    np.testing.assert_array_equal(hidden, expected)
