"""Initialisation by distillation from the source model on its own text."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import TEXTS, tiny_model_folder, tiny_tokenizer
from tokalign_jax.alignment import methods
from tokalign_jax.config import (
    AlignmentConfig,
    ComputeConfig,
    Config,
    InitializationConfig,
    config_from_dict,
)
from tokalign_jax.errors import UserError
from tokalign_jax.initialization import (
    initialization,
    row_features,
    self_distillation,
    self_text,
    word_lists,
)
from tokalign_jax.initialization.initialization import Side
from tokalign_jax.models import hub, huggingface
from tokalign_jax.parallel import sharding
from tokalign_jax.text import pairs
from tokalign_jax.text.canonical import token_bytes
from tokalign_jax.text.corpus import Document
from tokalign_jax.utils import paths

SETTINGS = InitializationConfig(distillation_tokens=3000, generated_tokens=600, corpus_share=0.5)
CONFIG = Config(
    alignment=AlignmentConfig(method="distilled"),
    initialization=SETTINGS,
    compute=ComputeConfig(dtype="float32", loss_chunk=64),
)
DOCUMENTS = [Document(text, "en", len(text)) for text in TEXTS * 6]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def sides(request, tmp_path_factory):
    tokenizers = tiny_tokenizer(300, TEXTS), tiny_tokenizer(340, TEXTS)
    folder = tiny_model_folder(
        tmp_path_factory.mktemp("source"), "llama", tied=request.param, tokenizer=tokenizers[0]
    )
    config, _ = hub.load_config(folder)
    params = huggingface.load_params(folder, config)
    aligned = methods.from_pieces(*tokenizers)
    new_config, new = initialization.initialize(config, params, aligned)
    return (
        Side(config, params, tokenizers[0], None),
        Side(new_config, new, tokenizers[1], None),
        aligned,
    )


def distilled(sides, config=CONFIG, kept=0, devices=1):
    source, target, aligned = sides
    mesh, lines = sharding.make_mesh(devices=jax.devices()[:devices]), []
    how = DOCUMENTS, mesh, lines.append, kept
    result = initialization.distill(config, source, target, aligned, *how)
    return paths.flatten(target.params), paths.flatten(result.params), result.facts, lines


def test_training_lowers_the_loss_and_leaves_special_tokens(sides):
    before, after, facts, lines = distilled(sides)
    assert facts["loss_after"] < facts["loss_before"]
    assert before.keys() == after.keys()
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert "layers/mlp/up_proj/kernel" in moved and "embed_tokens/embedding" in moved
    _, _, aligned = sides
    special = np.flatnonzero(aligned.rules == methods.Rule.SPECIAL)
    assert len(special)
    for path in before:
        if sharding.is_vocabulary(path):
            assert after[path].shape == before[path].shape
            np.testing.assert_array_equal(after[path][special], before[path][special])
    assert any("self-distillation" in line for line in lines)


def test_start_stays_as_it_was_where_training_does_not_help(sides, monkeypatch):
    for rate in ("BODY_RATE", "ROW_RATE", "NETWORK_RATE"):
        monkeypatch.setattr(self_distillation, rate, 3.0)
    before, after, facts, lines = distilled(sides)
    assert not facts["loss_after"] < facts["loss_before"]
    assert all(np.array_equal(before[path], after[path]) for path in before)
    assert any("raise initialization.distillation_tokens" in line for line in lines)


def test_rates_fall_with_the_square_root_of_the_batch(sides):
    _, target, _ = sides
    models = self_distillation.Models(target.config, target.config, None)
    rows = {"head": self_distillation.Rows(np.arange(2), np.zeros((2, 3)), np.ones(4, bool), 0.5)}
    most, few = (self_distillation._schedule(10, n, rows, models).peaks for n in (64, 4))
    assert most["body"] == self_distillation.BODY_RATE and most.keys() == few.keys()
    assert most["head"] == self_distillation.ROW_RATE * 0.5
    assert all(few[part] == pytest.approx(most[part] / 4) for part in most)


def test_training_rows_only_keeps_the_body_and_source_rows(sides):
    config = replace(CONFIG, initialization=replace(SETTINGS, trains="rows"))
    before, after, facts, _ = distilled(sides, config)
    _, _, aligned = sides
    composed = np.isin(aligned.rules, initialization.COMPOSED)
    assert facts["loss_after"] < facts["loss_before"]
    for path, rows in before.items():
        if sharding.is_vocabulary(path):
            np.testing.assert_array_equal(
                np.asarray(after[path])[~composed], np.asarray(rows)[~composed]
            )
            assert (np.asarray(after[path])[composed] != np.asarray(rows)[composed]).any()
        else:
            assert after[path] is rows


def test_extension_keeps_its_first_rows(sides):
    before, after, _, _ = distilled(sides, kept=310)
    for path, rows in before.items():
        old, new = np.asarray(rows), np.asarray(after[path])
        np.testing.assert_array_equal(
            new[:310] if sharding.is_vocabulary(path) else new,
            old[: len(new)][:310] if sharding.is_vocabulary(path) else old,
        )


def test_nothing_is_trained_without_composed_tokens(sides):
    source, _, _ = sides
    aligned = methods.from_pieces(source.tokenizer, source.tokenizer)
    config, params = initialization.initialize(source.config, source.params, aligned)
    target = Side(config, params, source.tokenizer, None)
    result = initialization.distill(
        CONFIG, source, target, aligned, DOCUMENTS, sharding.make_mesh(), print
    )
    assert result.params is params and not result.facts


def test_start_without_text_says_so(sides):
    settings = replace(SETTINGS, generated_tokens=0, corpus_share=0.0)
    before, after, facts, lines = distilled(sides, replace(CONFIG, initialization=settings))
    assert not facts and all(after[path] is leaf for path, leaf in before.items())
    assert "no text to train on" in lines[-1]


def test_source_model_samples_text(sides):
    source, _, _ = sides
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    writer = self_text.Writer(source.config, source.params, source.tokenizer, np.float32, mesh, 0)
    passages = writer.write(2000, lambda line: None)
    assert len(passages) > 10 and all(segment.text for passage in passages for segment in passage)
    assert passages == writer.write(2000, lambda line: None)
    assert passages != writer._replace(seed=1).write(2000, lambda line: None)


def test_sampled_words_follow_a_space():
    tokenizer = tiny_tokenizer(400, TEXTS * 3)
    ids, sizes = self_text.word_beginnings(tokenizer)
    contents = [token_bytes(tokenizer)[i] for i in ids]
    assert b" the" in contents and [len(content) for content in contents] == sizes.tolist()
    assert all(content[:1] == b" " and content[1:].decode().isalpha() for content in contents)


def test_states_at_the_last_piece_match_the_model(sides):
    source, _, _ = sides
    parts, mesh = [[5, 9], [7], [20, 30, 40]], sharding.make_mesh(devices=jax.devices()[:1])
    from tokalign_jax.models.transformer import forward

    found = row_features.last_piece_states(source.config, source.params, parts, 1, np.float32, mesh)
    for row, pieces in enumerate(parts):
        whole = forward(source.config, source.params, np.array([[1, *pieces]]))
        np.testing.assert_allclose(found[-1][row], whole[0, -1], atol=1e-5)


@pytest.mark.parametrize(("count", "at_once"), [(64, 63), (65, 64), (7, 3), (5, 8), (1, 4)])
def test_micro_batches_are_as_even_as_they_divide(count, at_once, monkeypatch):
    size = 17
    monkeypatch.setitem(self_distillation.MICRO_BATCH_TOKENS, "cpu", at_once * (size - 1))
    random = np.random.default_rng(0)
    rows = random.integers(0, 9, (count, size)), random.integers(0, 9, (count, 20))
    positions, weights = np.zeros((count, size - 1), int), np.ones((2, count))
    batch = self_distillation.Batch(*rows, positions, *weights)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    rounds = self_distillation._micro_batches(batch, mesh)
    real = (rounds.target >= 0).any(axis=-1).sum(axis=-1)
    assert real.sum() == count and rounds.target.shape[1] <= at_once
    assert len(real) == -(-count // at_once) and real.min() >= real.max() - len(real)
    np.testing.assert_allclose(
        self_distillation._micro_batch_weights(rounds), real / count, rtol=1e-6
    )


def test_logits_of_tokens_absent_from_the_text_are_not_lowered(sides):
    before, after, facts, lines = distilled(sides)
    _, _, aligned = sides
    composed = np.flatnonzero(np.isin(aligned.rules, initialization.COMPOSED))
    path = "lm_head/kernel" if "lm_head/kernel" in before else "embed_tokens/embedding"
    assert facts["unseen_shift"] >= 0
    moved = np.asarray(after[path])[composed] - np.asarray(before[path])[composed]
    assert np.isfinite(moved).all() and np.abs(moved).max(axis=-1).min() > 0
    assert any("are not in the text" in line for line in lines) == (facts["unseen_shift"] > 0)


def test_features_are_stored_for_composed_tokens_only(sides, monkeypatch):
    passed = {}

    def distill(config, models, params, teacher, rows, *args):
        passed.update(rows)
        return self_distillation.Result(params, {})

    monkeypatch.setattr(self_distillation, "distill", distill)
    distilled(sides)
    source, _, aligned = sides
    composed = np.flatnonzero(np.isin(aligned.rules, initialization.COMPOSED))
    assert len(passed) == sum(sharding.is_vocabulary(path) for path in paths.flatten(source.params))
    for rows in passed.values():
        assert set(rows.composed) <= set(composed) and len(rows.free) == aligned.target_size
        assert len(rows.features) == len(rows.composed) < aligned.target_size


def test_rows_restricted_to_the_text_equal_a_dense_table():
    random = np.random.default_rng(0)
    composed, tokens = np.array([2, 3, 5, 8]), np.array([0, 3, 4, 8, 9])
    features, free = random.normal(size=(4, 6)), random.random(10) < 0.5
    rows = self_distillation.Rows(composed, features, free, 1.0).restricted(tokens)
    dense, few = np.zeros((10, 6)), np.zeros((5, 6))
    dense[composed], few[rows.composed] = features, rows.features
    np.testing.assert_array_equal(few, dense[tokens])
    np.testing.assert_array_equal(rows.free, free[tokens])


def test_the_teacher_reads_no_more_than_its_positions(sides):
    source, target, _ = sides
    short = replace(source.config, max_positions=48)
    models = self_distillation.Models(replace(target.config, max_positions=48), short, None)
    starts = source.tokenizer.eos_token_id, target.tokenizer.eos_token_id
    texts = pairs.Pairing(source.tokenizer, target.tokenizer, starts, {}).pair(
        [((" ".join(TEXTS * 3), None),)] * 9
    )
    steps, held_out = self_distillation._batches(
        CONFIG, self_distillation.Texts([], texts, []), 3000, models, sharding.make_mesh()
    )
    assert {batch.source.shape[-1] for batch in (*steps, held_out)} == {48}
    assert {batch.target.shape[-1] for batch in (*steps, held_out)} == {48}


def test_lists_of_words_have_their_share_and_weights(sides, monkeypatch):
    monkeypatch.setattr(self_distillation, "LENGTH", 40)
    source, target, _ = sides
    models = self_distillation.Models(target.config, source.config, None)
    starts = source.tokenizer.eos_token_id, target.tokenizer.eos_token_id
    pairing = pairs.Pairing(source.tokenizer, target.tokenizer, starts, {})
    texts = pairing.pair([((" ".join(TEXTS * 3), None),)] * 9)
    words = word_lists.split_differently(source.tokenizer, target.tokenizer, TEXTS)
    lists = word_lists.draw(words, 4000, pairing, np.random.default_rng(0))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])

    def next_token_weights(lists):
        given = self_distillation.Texts(texts, texts, lists)
        steps, held_out = self_distillation._batches(CONFIG, given, 4000, models, mesh)
        assert 0 not in held_out.next_token[(held_out.target >= 0).any(-1)]
        weights = [x.next_token[(x.target >= 0).any(-1)] for x in steps]
        return np.concatenate([x.reshape(-1) for x in weights])

    share = np.mean(next_token_weights(lists) == self_distillation.LISTS[0])
    assert share == pytest.approx(self_distillation.LIST_SHARE, abs=0.05)
    assert 0 not in next_token_weights([])
    few = next_token_weights(lists[:1])
    assert 0 < np.sum(few == 0) <= len(lists[0].target) // 40 < self_distillation.LIST_SHARE * 100
    # Text that is too short is read four times, where lists would otherwise be most of the text.
    texts = texts[:1]
    share = np.mean(next_token_weights(lists) == self_distillation.LISTS[0])
    assert share == pytest.approx(self_distillation.LIST_SHARE, abs=0.05)


@pytest.mark.parametrize("budget", [1, 100])
def test_the_smallest_budgets_train_on_a_sequence(sides, budget):
    source, target, _ = sides
    models = self_distillation.Models(target.config, source.config, None)
    starts = source.tokenizer.eos_token_id, target.tokenizer.eos_token_id
    pairing = pairs.Pairing(source.tokenizer, target.tokenizer, starts, {})
    texts = pairing.pair([((" ".join(TEXTS * 3), None),)] * 9)
    given, mesh = self_distillation.Texts(texts, texts, []), sharding.make_mesh()
    steps, _ = self_distillation._batches(CONFIG, given, budget, models, mesh)
    assert [int((x.target[..., 0] >= 0).sum()) for x in steps] == [1]


def test_repeated_sequences_count_once_and_lists_are_no_text():
    target = np.array([[[1, 2, 3, -1], [1, 2, 3, -1]], [[4, 4, 2, 5], [1, 2, 3, -1]]])
    weights = np.array([[0.5, 1.0], [0.0, 0.5]])
    batch = self_distillation.Batch(target, *[np.zeros(0)] * 2, weights, np.zeros(0))
    present, counts = self_distillation._tokens_in_text((batch, batch), 7)
    assert present.tolist() == [1, 2, 3, 4, 5]
    assert counts.all.tolist() == [0, 1, 2, 1, 2, 1, 0]
    assert counts.text.tolist() == [0, 1, 1, 1, 0, 0, 0]
    # Nothing has a next-token loss, as where a benchmark sets its weights to 0.
    _, counts = self_distillation._tokens_in_text((batch._replace(next_token=0 * weights),), 7)
    assert counts.text.tolist() == counts.all.tolist() == [0, 1, 2, 1, 2, 1, 0]


LORA = replace(CONFIG, initialization=replace(SETTINGS, trains="lora"))


def with_body(side, dtype):
    """The model with its body in another type."""
    leaves = paths.flatten(side.params).items()
    cast = {
        path: leaf if sharding.is_vocabulary(path) else jnp.asarray(leaf, dtype)
        for path, leaf in leaves
    }
    return side._replace(params=paths.unflatten(cast))


def test_adapters_change_projections_by_a_matrix_of_their_rank(sides, monkeypatch):
    """Also of a body in bfloat16, whose rounding would have full rank."""
    spec = replace(self_distillation.ADAPTERS, rank=3)
    monkeypatch.setattr(self_distillation, "ADAPTERS", spec)
    source, target = (with_body(side, jnp.bfloat16) for side in sides[:2])
    stored = jax.tree.map(np.array, source.params)
    before, after, facts, _ = distilled((source, target, sides[2]), LORA)
    assert facts["loss_after"] < facts["loss_before"]
    assert before.keys() == after.keys()
    for path, leaf in before.items():
        if path.endswith("_proj/kernel"):
            assert after[path].dtype == np.float32
            change = np.asarray(after[path], np.float64) - np.asarray(leaf, np.float64)
            for layer in change:
                sizes = np.linalg.svd(layer, compute_uv=False)
                assert sizes[2] > 1e-5 and sizes[3] < 1e-3 * sizes[2], (path, sizes[:5])
        elif not sharding.is_vocabulary(path):
            assert after[path] is leaf, path
    # The source model, which may share the body's arrays, is as it was.
    jax.tree.map(np.testing.assert_array_equal, stored, jax.tree.map(np.asarray, source.params))


def test_merged_model_has_the_loss_of_its_adapters(sides):
    _, after, facts, _ = distilled(sides, LORA)
    source, target, aligned = sides
    merged = source, target._replace(params=paths.unflatten(after)), aligned
    _, _, facts_of_merged, _ = distilled(merged, LORA)
    assert facts["loss_after"] < facts["loss_before"] - 0.02
    assert facts_of_merged["loss_before"] == pytest.approx(facts["loss_after"], abs=1e-4)


def test_rows_of_shared_tokens_train_beside_adapters(sides, monkeypatch):
    _, _, aligned = sides
    # They do not where one vocabulary contains the other, as here.
    monkeypatch.setattr(initialization, "_contains", lambda one, other: False)
    before, after, _, _ = distilled(sides, LORA)
    exact, special = (aligned.rules == rule for rule in (methods.Rule.EXACT, methods.Rule.SPECIAL))
    rows = [np.asarray(leaves["embed_tokens/embedding"]) for leaves in (before, after)]
    assert (rows[0][exact] != rows[1][exact]).any()
    np.testing.assert_array_equal(rows[0][special], rows[1][special])


def test_unknown_part_to_train_is_refused():
    with pytest.raises(
        UserError, match=r"initialization\.trains' is 'body'.*'all', 'lora', 'rows'"
    ):
        config_from_dict({"initialization": {"trains": "body"}})
