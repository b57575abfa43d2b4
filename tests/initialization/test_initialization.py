"""Initial rows of the new vocabulary: mixtures, composition, calibration, tuning."""

import dataclasses
import itertools
import re
from itertools import cycle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoTokenizer

from tests.alignment.test_methods import donor, renumbered
from tests.helpers import KINDS, TEXTS, tiny_model_folder, tiny_tokenizer, tokenizer_of_kind
from tokalign_jax.alignment import alignment, methods
from tokalign_jax.alignment.alignment import Rule
from tokalign_jax.config import AlignmentConfig, ComputeConfig, Config, InitializationConfig
from tokalign_jax.initialization import calibration, composition, contexts, initialization, tuning
from tokalign_jax.models import hub, huggingface
from tokalign_jax.models.transformer import forward
from tokalign_jax.parallel import sharding
from tokalign_jax.text import canonical
from tokalign_jax.text.corpus import Document
from tokalign_jax.text.tokenizing import TokenShards, end_of_text_id
from tokalign_jax.utils import paths

OTHER = [*TEXTS, "Completely other words of another text, completely."]
DOCUMENTS = [text * times for times in (1, 2, 3) for text in TEXTS]
MESH = sharding.make_mesh()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny_model_folder(tmp_path_factory.mktemp("model"), "llama", vocab_size=320)
    config, _ = hub.load_config(folder)
    return AutoTokenizer.from_pretrained(folder), config, huggingface.load_params(folder, config)


def shards_of(tokenizer, documents) -> TokenShards:
    end = end_of_text_id(tokenizer)
    ids = [[*tokenizer(text, add_special_tokens=False)["input_ids"], end] for text in documents]
    flat = np.concatenate([np.array(document) for document in ids])
    counts = np.bincount(flat, minlength=canonical.vocabulary_size(tokenizer))
    return TokenShards(
        flat, np.cumsum([len(document) for document in ids]), counts, {"end_of_text": end}
    )


def spelled(tokenizer) -> list[bytes]:
    return [content or b"" for content in canonical.token_bytes(tokenizer)]


def as_documents(texts, language="all") -> list[Document]:
    return [Document(text, language, len(text.encode())) for text in texts]


def places_of(source, target, budget=10**9, texts=DOCUMENTS, log=lambda line: None):
    return contexts.find_places(as_documents(texts), source, target, budget, log)


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_shared_places_are_where_both_vocabularies_end_tokens(model, kind):
    source = model[0]
    target = tiny_tokenizer(400, TEXTS, kind)
    places = places_of(source, target)
    assert len(places.tokens) == len(
        shards_of(source, DOCUMENTS).tokens
    )  # no document was passed over
    of_source, of_target = spelled(source), spelled(target)
    ends = np.flatnonzero(places.tokens == source.eos_token_id)
    seen = 0
    for start, end in itertools.pairwise([-1, *ends]):
        text = b"".join(of_source[i] for i in places.tokens[start + 1 : end])
        at = 0
        for k in range(start + 1, end - 1):
            at += len(of_source[places.tokens[k]])
            following, ended = places.next_target[k], places.last_target[k]
            if following not in (contexts.NONE, end_of_text_id(target)):
                assert text[at:].startswith(of_target[following])
                seen += 1
            if ended not in (contexts.NONE, end_of_text_id(target)):
                assert (b" " + text[:at]).endswith(
                    of_target[ended]
                )  # the first one may begin with a space of its own
                seen += 1
        assert places.next_target[end] == places.next_source[end] == contexts.NONE
    assert seen > 100


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tokenizer_has_shared_places(model, kind):
    places = places_of(model[0], tokenizer_of_kind(kind, DOCUMENTS, 600))
    assert len(places.tokens) == len(shards_of(model[0], DOCUMENTS).tokens)
    for labels in (places.next_target, places.last_target):
        assert (labels != contexts.NONE).mean() > 0.2


@pytest.mark.parametrize(
    "character", ["\u095c", "e\u0301", "\ua66e"]
)  # decomposed by NFC, composed by NFC, unknown
@pytest.mark.parametrize("kind", ["qwen", "bpe_without_bytes"])
def test_differing_character_loses_only_its_own_place(model, kind, character):
    target = tokenizer_of_kind(kind, DOCUMENTS, 600)
    before, after = TEXTS[0] * 20, " " + TEXTS[0] * 20
    whole, first, second = (
        np.count_nonzero(places_of(model[0], target, texts=[text]).last_target != contexts.NONE)
        for text in (before + character + after, before, after)
    )
    assert whole >= first + second - 3


def test_last_document_is_cut_at_the_budget(model):
    assert len(places_of(model[0], model[0], budget=100, texts=[TEXTS[0] * 50]).tokens) == 100
    shards = shards_of(model[0], DOCUMENTS)
    drawn = contexts.draw(shards, 150, seed=0)
    lengths = np.diff(shards.documents, prepend=0)
    assert (
        lengths[drawn].sum() >= 150 and len(drawn) < len(DOCUMENTS) and (np.diff(drawn) > 0).all()
    )
    assert contexts.draw(shards, 10**9, seed=0).tolist() == [*range(len(DOCUMENTS))]


def test_log_says_in_which_languages_places_are_shared(model):
    lines = []
    documents = as_documents(TEXTS[:1], "en") + as_documents(["\ua66e\ua66e\ua66e"], "xx")
    target = tokenizer_of_kind("bpe_without_bytes", TEXTS[:1], 300)
    contexts.find_places(documents, model[0], target, 10**6, lines.append)
    assert len(lines) == 1 and re.search(r"xx \d+%, en \d+%", lines[0])


@pytest.mark.parametrize("batch, flushed, opening", [(64, 5, None), (4096, 32, 3)])
def test_contexts_are_means_of_final_states(model, batch, flushed, opening, monkeypatch):
    tokenizer, config, params = model
    monkeypatch.setitem(contexts.BATCH_TOKENS, "cpu", batch)
    monkeypatch.setattr(contexts, "FLUSHED", flushed)
    monkeypatch.setattr(contexts, "WINDOW", 32)
    target = tiny_tokenizer(400, TEXTS)
    places = places_of(tokenizer, target)
    sizes = (canonical.vocabulary_size(tokenizer), canonical.vocabulary_size(target))
    reading = contexts.read(
        config, params, places, *sizes, jnp.float32, MESH, lambda line: None, opening
    )

    read = places.tokens.copy()
    if opening is not None:  # in the first place of every window, which is no token's then
        places = contexts.Places._make(
            np.where(np.arange(len(read)) % 32, place, contexts.NONE) for place in places
        )
        read[::32] = opening
    states = []
    for start in range(0, len(places.tokens), 32):
        window = jnp.asarray(read[start : start + 32])[None]
        states.append(np.asarray(forward(config, params, window)[0], np.float64))
    states = np.concatenate(states)
    np.testing.assert_allclose(reading.mean, states.mean(axis=0), atol=2e-6)
    np.testing.assert_allclose(reading.covariance, np.cov(states.T, bias=True), atol=1e-5)
    for side, before, after in (
        (reading.source, places.next_source, places.tokens),
        (reading.target, places.next_target, places.last_target),
    ):
        for means, labels in ((side.before, before), (side.after, after)):
            for token in np.unique(labels[labels != contexts.NONE]):
                np.testing.assert_allclose(
                    means[token], states[labels == token].mean(axis=0), atol=1e-5
                )
    assert (
        reading.target.counts.sum() > 0
        and not reading.target.before[reading.target.counts == 0].any(axis=1).all()
    )


def test_binary_splits_are_two_tokens_that_join_to_the_token():
    for kind in ("byte_level", "metaspace"):
        tokenizer = tiny_tokenizer(400, TEXTS, kind)
        spelling = spelled(tokenizer)
        ids, parts = composition.binary_splits(tokenizer, np.arange(len(spelling)))
        assert len(ids) > 30
        assert all(
            spelling[whole] == spelling[left] + spelling[right]
            for whole, (left, right) in zip(ids, parts)
        )


def learning_problem(seen: int, noise: float = 0.0):
    """Source and target tokens whose rows are one linear function of their features."""
    rng = np.random.default_rng(0)
    width, size = 4, 3000
    rows = rng.normal(size=(size, width)).astype(np.float32)
    parts = [[int(a), int(b)] for a, b in rng.integers(size, size=(size, 2))]
    before, after = rng.normal(size=(2, size, width))
    frequency = rng.normal(size=size)
    first, last = rows[[p[0] for p in parts]], rows[[p[1] for p in parts]]
    truth = 0.7 * before - 0.2 * after + 0.3 * first + 0.1 * last + frequency[:, None] * 0.5 + 1.0
    observed = [
        values + noise / np.sqrt(seen) * rng.normal(size=values.shape) for values in (before, after)
    ]
    counts = np.full(size, seen)
    exact = contexts.Contexts(
        before.astype(np.float32), after.astype(np.float32), np.full(size, 10**6)
    )
    noisy = contexts.Contexts(
        observed[0].astype(np.float32), observed[1].astype(np.float32), counts
    )
    known = np.arange(size // 2)
    wanted = np.arange(size // 2, size)
    source_rows = rows.copy()
    reading = contexts.Reading(exact, noisy, np.zeros(width), np.eye(width) * noise**2)

    def tokens(ids, rows):
        return composition.Tokens(
            ids, composition.Pieces.of([parts[i] for i in ids]), frequency, rows
        )

    # The pieces' rows must stay what the features say, so whole tokens have rows of their own
    # behind them.
    source_rows = np.concatenate([rows, truth.astype(np.float32)])
    whole = tokens(known, exact)
    whole = whole._replace(ids=known + size, log_frequency=np.tile(frequency, 2))
    whole = whole._replace(contexts=contexts.Contexts(*(np.concatenate([v, v]) for v in exact)))
    return source_rows, whole, tokens(wanted, noisy), reading, truth[wanted]


def all_rows(rows, known, wanted, reading) -> np.ndarray:
    result = np.full((len(wanted.ids), rows.shape[1]), np.nan, np.float32)
    for block, learned in composition.learned_rows(rows, known, wanted, reading):
        result[block] = learned
    return result


def test_ridge_regression_recovers_a_linear_rule(monkeypatch):
    monkeypatch.setattr(composition, "RIDGE", 1e-6)
    rows, known, wanted, reading, truth = learning_problem(seen=100)
    np.testing.assert_allclose(all_rows(rows, known, wanted, reading), truth, atol=2e-3)


def test_rarer_tokens_stay_closer_to_their_pieces():
    """Under noise the rule for its size does better than the rule for exact contexts, and better
    than no contexts.
    """
    errors = {}
    for seen in (2, 300):
        rows, known, wanted, reading, truth = learning_problem(seen=seen, noise=1.5)
        made = all_rows(rows, known, wanted, reading)
        certain = reading._replace(covariance=np.zeros((4, 4)))
        blind = reading._replace(covariance=np.eye(4) * 1e6)  # contexts that are all noise
        others = [
            all_rows(rows, known, wanted, certain),
            all_rows(rows, known, wanted, blind),
        ]
        errors[seen] = [float(np.mean((other - truth) ** 2)) for other in (made, *others)]
    assert errors[2][0] < 0.98 * min(errors[2][1:]) and errors[300][0] < 0.1 * errors[300][2]
    assert errors[300][0] < 1.05 * errors[300][1]


def test_moved_head_rows_give_tokens_their_frequency(model, monkeypatch):
    tokenizer, config, params = model
    shards = shards_of(tokenizer, DOCUMENTS * 20)
    monkeypatch.setattr(calibration, "ROUNDS", 12)
    moves, direction = calibration.head_moves(config, params, shards, jnp.float32, MESH, seed=0)
    head = np.asarray(params["lm_head"]["kernel"])
    assert moves.shape == (len(shards.counts),) and direction.shape == (config.hidden_size,)
    length = 128
    windows = shards.tokens[: len(shards.tokens) // length * length].reshape(-1, length)
    states = np.asarray(forward(config, params, jnp.asarray(windows)), np.float64).reshape(
        -1, config.hidden_size
    )
    frequency = calibration.estimated_frequencies(shards.counts)

    def distance(rows):
        logits = states @ rows[: len(frequency)].T
        probability = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)).mean(
            axis=0
        )
        return float((frequency * np.log(frequency / probability)).sum())

    # exact only as far as one direction is a bias; here it is one of 32 dimensions of a random
    # model
    assert distance(head[: len(frequency)] + moves[:, None] * direction) < 0.6 * distance(head)
    chunks = jnp.asarray(
        states[: len(states) // 8 * 8].reshape(8, -1, config.hidden_size), jnp.float32
    )
    rows = jnp.asarray(head[: len(frequency)])
    given = calibration.mean_probability(chunks, rows, jnp.asarray(moves), config=config, mesh=MESH)
    assert (
        0.99 < float(given.sum()) < 1.01
        and abs(np.log(np.asarray(given)) - np.log(frequency)).mean() < 0.2
    )


@pytest.mark.parametrize("tied", [False, True])
def test_composition_changes_composed_rows_only(tmp_path, tied):
    folder = tiny_model_folder(tmp_path, "llama", vocab_size=320, tied=tied)
    config, _ = hub.load_config(folder)
    params, source = huggingface.load_params(folder, config), AutoTokenizer.from_pretrained(folder)
    target = tiny_tokenizer(420, [*TEXTS, "Completely other words of another text, completely."])
    shards = [shards_of(t, DOCUMENTS) for t in (source, target)]
    aligned = methods.from_pieces(source, target)
    new_config, new = initialization.initialize(config, params, aligned)
    settings = Config(
        compute=ComputeConfig(dtype="float32"),
        initialization=InitializationConfig(tokens=10**6, calibration=0.0),
    )

    def learn(settings):
        sides = (
            initialization.Side(config, params, source, shards[0]),
            initialization.Side(new_config, new, target, shards[1]),
        )
        reading = initialization.read(settings, *sides, as_documents(DOCUMENTS), MESH, print)
        return initialization.learn(settings, *sides, aligned, reading, print)

    learned, again = learn(settings), learn(settings)
    places = places_of(source, target)
    ids = np.arange(aligned.target_size)
    composed = np.isin(aligned.rules, initialization.COMPOSED)
    composed &= np.isin(ids, places.next_target) & np.isin(
        ids, places.last_target
    )  # those seen in context
    assert composed.any() and not composed.all()
    for group, leaf in (("embed_tokens", "embedding"), ("lm_head", "kernel"))[: 1 if tied else 2]:
        before, after = np.asarray(new[group][leaf]), np.asarray(learned[group][leaf])
        np.testing.assert_array_equal(after, again[group][leaf])
        np.testing.assert_array_equal(after[~composed], before[~composed])
        assert (after[composed] != before[composed]).any(axis=1).all() and np.isfinite(after).all()
    assert learned["layers"] is new["layers"]


# --- Rows that initialisation changes -----------------------------------------------------------


def start(
    model,
    source,
    target,
    documents=DOCUMENTS,
    method="composed",
    kept=0,
    unusable=frozenset(),
    **settings,
):
    """A new vocabulary's start, as the stage `init` makes it: alignment, parameters mixed and at
    the end, counts.
    """
    config, params = model
    shards = [shards_of(tokenizer, documents) for tokenizer in (source, target)]
    given = AlignmentConfig(method=method), source, target, *(side.counts for side in shards)
    aligned, _ = methods.make(methods.Inputs(*given, seed=0, log=print, donor=donor(target)))
    if unusable:
        aligned = methods.without(aligned, unusable, source, target, shards[1].counts)
    new_config, mixed = initialization.initialize(config, params, aligned, num_frozen_rows=kept)
    if method != "composed":
        return aligned, mixed, mixed, shards[1].counts
    run = Config(
        compute=ComputeConfig(dtype="float32"),
        initialization=InitializationConfig(**{"tokens": 10**6, "tuning": 10_000, **settings}),
    )
    one = initialization.Side(config, params, source, shards[0], unusable)
    other = initialization.Side(new_config, mixed, target, shards[1])
    reading = initialization.read(run, one, other, as_documents(documents), MESH, print)
    learned = initialization.learn(run, one, other, aligned, reading, print, kept)
    other = other._replace(params=learned)
    calibrated = initialization.calibrate(run, one, other, aligned, MESH, kept)
    other = other._replace(params=calibrated)
    return (
        aligned,
        mixed,
        initialization.tune(run, one, other, aligned, reading, MESH, print, kept).params,
        shards[1].counts,
    )


def matrices(params) -> dict[str, np.ndarray]:
    return {
        path: np.asarray(rows)
        for path, rows in paths.flatten(params).items()
        if sharding.is_vocabulary(path)
    }


def loaded(folder, tied=False, tokenizer=None, **settings):
    folder = tiny_model_folder(folder, "llama", 320, tied, tokenizer, **settings)
    config, _ = hub.load_config(folder)
    return (config, huggingface.load_params(folder, config)), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("calibrated", [0.5, 1.0])
def test_special_and_unseen_source_tokens_keep_their_rows(tmp_path, tied, calibrated):
    """Neither the tokens of a chat nor an added token that plain text never has may become less
    likely.
    """
    roles = ["<|im_start|>", "<|im_end|>", "<|pad|>"]
    source, target = tiny_tokenizer(300, TEXTS), tiny_tokenizer(420, OTHER)
    for tokenizer in (source, target):
        tokenizer.add_special_tokens({"additional_special_tokens": roles})
        tokenizer.add_tokens(["</think>"])
    model, source = loaded(tmp_path, tied, source)
    aligned, before, after, counts = start(model, source, target, calibration=calibrated)
    thought = target.convert_tokens_to_ids("</think>")
    assert aligned.rules[thought] == Rule.EXACT and counts[thought] == 0
    still = (aligned.rules == Rule.SPECIAL) | ((aligned.rules == Rule.EXACT) & (counts == 0))
    assert still.sum() > len(roles) + 50 and counts[target.eos_token_id]
    for path, rows in matrices(after).items():
        np.testing.assert_array_equal(rows[still], matrices(before)[path][still])
        assert (rows != matrices(before)[path]).any(axis=1).sum() > 50


@pytest.mark.parametrize("method", sorted(methods.METHODS.keys() - {"random"}))
@pytest.mark.parametrize("target", ["itself", "renumbered", "fewer", "more", "other roles"])
def test_shared_tokens_get_the_source_rows(tmp_path, method, target):
    """One vocabulary within the other: every shared row is the source's, bit for bit, whatever the
    method.
    """
    source = tiny_tokenizer(300 if target == "more" else 320, TEXTS, "metaspace")
    made = {
        "itself": lambda: source,
        "renumbered": lambda: renumbered(source, np.random.default_rng(0).permutation(len(source))),
        "fewer": lambda: tiny_tokenizer(300, TEXTS, "metaspace"),
        "more": lambda: tiny_tokenizer(420, TEXTS, "metaspace"),
        "other roles": lambda: tiny_tokenizer(320, TEXTS, "metaspace"),
    }[target]()
    if target == "other roles":
        made.pad_token, made.eos_token = "</s>", "<s>"
    (config, params), source = loaded(tmp_path, False, source)
    _, _, after, _ = start((config, params), source, made, method=method)
    theirs = {name: i for name, i in made.get_vocab().items() if name in source.get_vocab()}
    assert len(theirs) >= 300
    ids = np.array([(i, source.get_vocab()[name]) for name, i in theirs.items()])
    for path, rows in matrices(after).items():
        np.testing.assert_array_equal(rows[ids[:, 0]], matrices(params)[path][ids[:, 1]])


def test_without_shared_places_only_learned_rows_are_skipped(tmp_path, monkeypatch):
    model, source = loaded(tmp_path)
    target = tiny_tokenizer(420, OTHER)
    find_places = contexts.find_places

    def nowhere(*args):
        places = find_places(*args)
        none = np.full_like(places.tokens, contexts.NONE)
        return places._replace(next_target=none, last_target=none)

    monkeypatch.setattr(contexts, "find_places", nowhere)
    _, mixed, calibrated, _ = start(model, source, target, tuning=0)
    _, _, tuned, _ = start(model, source, target)
    mixed, calibrated, tuned = map(matrices, (mixed, calibrated, tuned))
    assert (calibrated["lm_head/kernel"] != mixed["lm_head/kernel"]).any()
    for path, rows in tuned.items():
        assert (rows != calibrated[path]).any() and np.isfinite(rows).all()


def test_unseen_tokens_get_the_good_turing_probability():
    counts = np.array([0] * 1000 + [1] * 20 + [2] * 30 + [500, 1000])
    estimated = calibration.estimated_frequencies(counts)
    assert estimated.sum() == pytest.approx(1)
    assert estimated[counts == 0].sum() == pytest.approx(20 / counts.sum(), rel=0.05)
    np.testing.assert_allclose(estimated[counts > 0] / estimated[-1], counts[counts > 0] / 1000)
    for few in (np.array([0, 0, 1, 1, 1, 1, 1, 1]), np.array([0, 5, 7]), np.array([3, 4])):
        estimated = calibration.estimated_frequencies(few)
        assert (estimated > 0).all() and (
            np.argsort(estimated, kind="stable") == np.arange(len(few))
        ).all()


# --- Tuning -------------------------------------------------------------------------------------


def tuned(folder, tied, kept=0, budget=40_000, target=None):
    """A tiny model with a new vocabulary, and its parameters before and after tuning on the text of
    these tests.
    """
    folder = tiny_model_folder(folder, "llama", vocab_size=320, tied=tied)
    model, _ = hub.load_config(folder)
    params, source = huggingface.load_params(folder, model), AutoTokenizer.from_pretrained(folder)
    target = target or source
    documents = DOCUMENTS * 20
    shards = [shards_of(tokenizer, documents) for tokenizer in (source, target)]
    aligned = methods.from_pieces(source, target)
    new_config, new = initialization.initialize(model, params, aligned)
    made = InitializationConfig(tokens=10**6, tuning=budget)
    config = Config(compute=ComputeConfig(dtype="float32"), initialization=made)
    sides = (
        initialization.Side(model, params, source, shards[0]),
        initialization.Side(new_config, new, target, shards[1]),
    )
    reading = initialization.read(config, *sides, as_documents(documents), MESH, print)
    lines = []
    after, facts = initialization.tune(config, *sides, aligned, reading, MESH, lines.append, kept)
    assert bool(facts) == bool(lines)
    return aligned, sides[1], after, lines


@pytest.mark.parametrize("tied", [False, True])
def test_tuning_lowers_the_loss_on_the_text(tmp_path, tied):
    aligned, side, after, lines = tuned(tmp_path, tied, target=tiny_tokenizer(420, OTHER))
    before, again = (
        side.params,
        tuned(tmp_path / "again", tied, target=tiny_tokenizer(420, OTHER))[2],
    )
    tokens = np.asarray(side.shards.tokens[:4096]).reshape(-1, 64)

    def nats(params):
        states = np.asarray(forward(side.config, params, jnp.asarray(tokens)), np.float64)[:, :-1]
        head = (
            params["lm_head"]["kernel"]
            if "lm_head" in params
            else params["embed_tokens"]["embedding"]
        )
        logits = states @ np.asarray(head, np.float64)[: side.config.vocab_size].T
        logits -= np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        return -np.take_along_axis(logits, tokens[:, 1:, None], axis=-1).mean()

    assert nats(after) < nats(before) - 0.03  # a model of random weights has little to gain
    assert "nats a token on held-out text" in lines[-1]
    seen = (aligned.rules == Rule.EXACT) & (side.shards.counts > 0)
    moves = seen | np.isin(aligned.rules, initialization.COMPOSED)
    for path, rows in paths.flatten(after).items():
        old = paths.flatten(before)[path]
        if not sharding.is_vocabulary(path):
            assert rows is old
            continue
        np.testing.assert_array_equal(rows, paths.flatten(again)[path])
        changed = (np.asarray(rows) != np.asarray(old)).any(axis=1)
        np.testing.assert_array_equal(changed, moves)  # special tokens have no part in it


def test_frozen_rows_are_not_tuned(tmp_path):
    _, side, after, _ = tuned(tmp_path, True, kept=300, target=tiny_tokenizer(420, OTHER))
    changed = (
        np.asarray(after["embed_tokens"]["embedding"]) != side.params["embed_tokens"]["embedding"]
    ).any(axis=1)
    assert not changed[:300].any() and changed[300:].any()


def test_same_vocabulary_is_not_tuned(tmp_path):
    _, side, after, lines = tuned(tmp_path, False)
    assert after is side.params and not lines


def test_rows_stay_when_tuning_gains_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "RATE", 50.0)
    _, side, after, lines = tuned(tmp_path, True, target=tiny_tokenizer(420, OTHER))
    assert after is side.params and "left as they were" in lines[-1]


def test_tuning_step_follows_adam_and_its_size(tmp_path, monkeypatch):
    """One step at the peak rate: B against the formula in NumPy float64, and how far rows moved."""
    monkeypatch.setattr(tuning, "STEPS", 1)
    monkeypatch.setattr(tuning, "COMPONENTS", 5)
    kept = {}
    of_features = tuning._features
    monkeypatch.setattr(
        tuning,
        "_features",
        lambda *args: kept.setdefault("features", of_features(*args)).astype(np.float32),
    )
    _, side, after, _ = tuned(tmp_path, True, budget=1, target=tiny_tokenizer(420, OTHER))
    features = kept["features"].astype(np.float64)
    moved = (features != 0).any(axis=1)
    size = len(features)
    (batch, *_), _ = tuning._batches(side.shards, side.config, 1, MESH, seed=0)
    assert (batch != tuning.NONE).all()

    def loss(table):
        params = {**side.params, "embed_tokens": {"embedding": table}}
        total = 0.0
        for tokens in batch:
            logits = forward(side.config, params, jnp.asarray(tokens[:, :-1])) @ table[:size].T
            nll = (
                jax.nn.logsumexp(logits, -1)
                - jnp.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
            )
            total += nll.mean()
        return total

    before = np.asarray(side.params["embed_tokens"]["embedding"], np.float64)
    gradient = (
        features.T @ np.asarray(jax.grad(loss)(jnp.asarray(before, jnp.float32)), np.float64)[:size]
    )
    gradient /= max(1.0, np.linalg.norm(gradient))
    direction = gradient / (np.abs(gradient) + 1e-8)  # Adam's first
    step = features @ direction
    source = np.asarray(
        huggingface.load_params(tmp_path, hub.load_config(tmp_path)[0])["embed_tokens"]["embedding"]
    )
    deviation = np.sqrt(source[:320].astype(np.float64).var(axis=0).mean())
    step *= tuning.RATE * deviation / np.sqrt((step[moved] ** 2).mean())
    found = np.asarray(after["embed_tokens"]["embedding"], np.float64) - before
    np.testing.assert_allclose(found[:size], -step, atol=2e-4 * deviation)


def test_components_are_the_principal_ones():
    rng = np.random.default_rng(0)
    known = (
        rng.normal(size=(500, 12))
        * np.r_[8, 4, 2, 1, np.full(8, 0.05)]
        @ np.linalg.qr(rng.normal(size=(12, 12)))[0]
        + 3.0
    )
    centre, basis = tuning._principal(jnp.asarray(known, jnp.float32), jax.random.key(0), 4)
    found = (known - np.asarray(centre)) @ np.asarray(basis, np.float64)
    left, sizes, _ = np.linalg.svd(known - known.mean(axis=0), full_matrices=False)
    expected = left[:, :4] * sizes[:4]
    expected /= np.sqrt((expected**2).mean())
    order = np.argsort(-np.abs(found).std(axis=0))
    np.testing.assert_allclose(np.abs(found[:, order]), np.abs(expected), atol=0.02)


def test_initialisation_changes_vocabulary_rows_only(model):
    _, config, params = model
    new_config, new = initialization.random_rows(config, params, 77, jax.random.key(0))
    assert new_config.vocab_size == 77
    for side in (("embed_tokens", "embedding"), ("lm_head", "kernel")):
        rows, drawn = (np.asarray(p[side[0]][side[1]]) for p in (params, new))
        assert drawn.shape == (77, rows.shape[1])
        assert abs(drawn.std() / rows.std() - 1) < 0.1
    assert new["layers"] is params["layers"] and new["final_norm"] is params["final_norm"]


def test_frequency_moves_head_rows_along_the_slope_of_the_source(model):
    tokenizer, config, params = model
    rng = np.random.default_rng(0)
    log_frequency = rng.normal(size=len(tokenizer)).astype(np.float32)
    direction = rng.normal(size=config.hidden_size)
    rows = np.outer(log_frequency, direction) + 3.0  # exactly linear: the slope is the direction
    np.testing.assert_allclose(
        initialization.frequency_slope(rows, log_frequency), direction, rtol=1e-5
    )
    assert not initialization.frequency_slope(rows, np.ones_like(log_frequency)).any()

    aligned = dataclasses.replace(
        methods.from_pieces(tokenizer, tokenizer),
        frequency_shift=np.arange(len(tokenizer), dtype=np.float32),
        source_log_frequency=log_frequency,
    )
    _, new = initialization.initialize(config, params, aligned)
    embedding, head = params["embed_tokens"]["embedding"], params["lm_head"]["kernel"]
    np.testing.assert_array_equal(new["embed_tokens"]["embedding"], embedding[: len(tokenizer)])
    fitted = np.polynomial.polynomial.polyfit(
        log_frequency.astype(np.float64), head[: len(tokenizer)], 1
    )[1]
    expected = head[: len(tokenizer)] + np.arange(len(tokenizer))[:, None] * fitted
    np.testing.assert_allclose(new["lm_head"]["kernel"], expected, rtol=1e-4, atol=1e-4)


# --- Non-finite rows ----------------------------------------------------------------------------


def broken(params, ids, value=np.nan, groups=("embed_tokens", "lm_head"), columns=slice(None)):
    """`params` with `value` in these rows."""
    new = dict(params)
    for group in set(groups) & set(params):
        (leaf,) = params[group]
        rows = np.array(params[group][leaf], np.float32)
        rows[np.array(ids)[:, None], np.arange(rows.shape[1])[columns]] = value
        new[group] = {leaf: jnp.asarray(rows)}
    return new


MATRICES = [(True, "embed_tokens"), (False, "lm_head"), (False, "embed_tokens")]
"""Tied or not, and the matrix that has broken rows."""


@pytest.mark.parametrize(
    ("method", "tied", "group"),
    dict.fromkeys(
        [(method, *which) for method, which in zip(sorted(methods.METHODS), cycle(MATRICES))]
        + [("composed", *which) for which in MATRICES]
    ),
)
def test_rows_with_nan_or_infinity_change_no_other_row(tmp_path, method, tied, group):
    """Rows of unused tokens, whether special, text or padding rows."""
    source, target = tiny_tokenizer(300, TEXTS), tiny_tokenizer(420, OTHER)
    for tokenizer in (source, target):
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|unused|>"]})
    (config, params), source = loaded(tmp_path, tied, source)
    unseen = np.flatnonzero(shards_of(source, DOCUMENTS).counts == 0)
    unused = [
        source.convert_tokens_to_ids("<|unused|>"),
        int(unseen[5]),
        310,
    ]  # special, a byte, padding
    assert len(unseen) > 20 and len(source) < 310
    found = []
    for value, columns in ((np.nan, slice(3, 4)), (np.inf, slice(None)), (-np.inf, slice(2))):
        bad = broken(params, unused, value, (group,), columns)
        whole, unusable = initialization.usable(bad, len(source))
        assert unusable == set(unused[:2])
        aligned, *_, after, _ = start(
            (config, whole), source, target, method=method, unusable=unusable
        )
        mixtures = (aligned.embedding.ids, aligned.head.ids)
        assert not any(np.isin(ids, unused).any() for ids in mixtures)
        direct = initialization.initialize(config, bad, aligned)[1]
        drawn = initialization.random_rows(config, bad, 50, jax.random.key(0), num_frozen_rows=3)[1]
        found.append(matrices(after) | {f"direct {k}": v for k, v in matrices(direct).items()})
        found[-1] |= {f"drawn {k}": v for k, v in matrices(drawn).items()}
    for path, rows in found[0].items():
        assert np.isfinite(rows).all(), path
        for other in found[1:]:
            np.testing.assert_array_equal(rows, other[path])


def test_tokens_with_a_non_finite_source_row_follow_the_next_rule():
    source, target = tiny_tokenizer(320, TEXTS), tiny_tokenizer(420, OTHER)
    for tokenizer in (source, target):
        tokenizer.add_special_tokens(
            {"pad_token": "<|pad|>", "additional_special_tokens": ["<|unused|>"]}
        )
    counts = np.full(len(target), 10)
    before = methods.from_pieces(source, target)
    of_target = canonical.token_bytes(target)
    word = next(
        i for i, c in enumerate(of_target) if before.rules[i] == Rule.EXACT and c and len(c) > 3
    )
    pad, unused = target.convert_tokens_to_ids(["<|pad|>", "<|unused|>"])
    byte = next(
        i for i, c in enumerate(of_target) if before.rules[i] == Rule.EXACT and c and len(c) == 1
    )
    bad = {int(before.heaviest()[i]) for i in (word, pad, unused, byte)}
    after = methods.without(before, bad, source, target, counts)
    assert (
        not np.isin(after.embedding.ids, list(bad)).any()
        and not np.isin(after.head.ids, list(bad)).any()
    )
    of_source = canonical.token_bytes(source)
    assert after.rules[word] == Rule.PIECES
    assert b"".join(of_source[i] for i in row_ids(after.embedding, word)) == of_target[word]
    assert after.rules[pad] == Rule.SPECIAL and row_ids(after.head, pad) == [source.eos_token_id]
    assert after.rules[unused] == Rule.PIECES and after.scores[unused] == 0
    assert after.rules[byte] == Rule.MEAN and row_ids(after.head, byte) == [after.source_size]
    untouched = np.setdiff1d(np.arange(len(target)), [word, pad, unused, byte])
    used = np.array([not set(row_ids(before.head, i)) & bad for i in untouched])
    np.testing.assert_array_equal(before.rules[untouched[used]], after.rules[untouched[used]])


def row_ids(mixture, i):
    return mixture.ids[mixture.indptr[i] : mixture.indptr[i + 1]].tolist()


def test_non_finite_frozen_rows_are_initialised(tmp_path):
    (config, params), source = loaded(tmp_path, False)
    aligned = methods.without(
        methods.from_pieces(source, source), {7, 280}, source, source, np.ones(len(source))
    )
    _, made = initialization.initialize(
        config, broken(params, [7, 280]), aligned, num_frozen_rows=len(source)
    )
    for path, rows in matrices(made).items():
        assert np.isfinite(rows).all()
        still = np.setdiff1d(np.arange(len(source)), [7, 280])
        np.testing.assert_array_equal(rows[still], matrices(params)[path][still])


def test_source_rows_are_kept_bit_for_bit():
    """-0.0 too, which a product with a weight of 1 would lose."""
    rows = np.array([[-0.0, 1.5], [2.0, -0.0], [-0.0, -0.0]], np.float32)
    one = alignment.one_to_one(np.array([2, 0, 1, 0]), 3)
    np.testing.assert_array_equal(
        alignment.apply(one, rows).view(np.uint32), rows[[2, 0, 1, 0]].view(np.uint32)
    )
    moved = rows.copy()
    initialization.move(moved, np.array([0.0, 2.0, 0.0]), np.array([np.float32(-0.5), 0.25]))
    np.testing.assert_array_equal(moved[[0, 2]].view(np.uint32), rows[[0, 2]].view(np.uint32))
    np.testing.assert_array_equal(moved[1], [1.0, 0.5])
