"""Batched sampling of continuations."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.training.toys import LLAMA, toy_params
from tokalign_jax.models import sampling, transformer
from tokalign_jax.models.sampling import sample
from tokalign_jax.parallel import sharding

PROMPTS = [[3], [5, 6, 7], [1, 2]]


def draw(prompts, temperature, seed=0, length=12):
    params = jax.tree.map(lambda x: 4 * x, toy_params())
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return params, sample(LLAMA, params, prompts, length, temperature, seed, jnp.float32, mesh)


def test_low_temperature_is_greedy():
    params, drawn = draw(PROMPTS, 1e-4)
    for prompt, tokens in zip(PROMPTS, drawn):
        greedy = transformer.generate(LLAMA, params, jnp.array([prompt]), 12 - len(prompt))
        assert tokens == greedy[0].tolist()


def test_model_of_one_layer_writes_its_likeliest_tokens():
    model, params = transformer.first_layers(LLAMA, toy_params(), 1)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    (drawn,) = sample(model, params, [[3]], 6, 1e-4, 0, jnp.float32, mesh)
    likeliest = transformer.logits(model, params, jnp.array([drawn]))[0].argmax(-1).tolist()
    assert drawn[1:] == likeliest[:-1]


def test_samples_depend_on_the_seed_only():
    (_, one), (_, again), (_, other) = (
        draw(PROMPTS, 1.0),
        draw(PROMPTS[:2], 1.0),
        draw(PROMPTS, 1.0, seed=1),
    )
    assert one[:2] == again and one != other
    assert all(
        tokens[: len(prompt)] == prompt and len(tokens) == 12
        for prompt, tokens in zip(PROMPTS, one)
    )


def test_fewer_sequences_are_sampled_at_once_where_their_cache_is_large(monkeypatch):
    _, drawn = draw(PROMPTS, 1.0)
    each = sampling.cache_bytes(LLAMA, 1, 12, jnp.float32)
    assert sampling.cache_bytes(LLAMA, 3, 12, jnp.float32) == 3 * each
    assert sampling.batch_size(LLAMA, 12, jnp.float32, "gpu") == 1024
    monkeypatch.setattr(sampling, "CACHE_BYTES", 2 * each + 1)
    assert sampling.batch_size(LLAMA, 12, jnp.float32, "gpu") == 2
    assert draw(PROMPTS, 1.0)[1] == drawn


def test_sampled_tokens_follow_the_models_probabilities():
    params, drawn = draw([[3]] * 4000, 1.0, length=2)
    logits = transformer.logits(LLAMA, params, jnp.array([[3]]))[0, 0]
    expected = np.asarray(jax.nn.softmax(logits))
    found = np.bincount([tokens[1] for tokens in drawn], minlength=len(expected)) / len(drawn)
    assert np.abs(found - expected).max() < 5 * np.sqrt(expected.max() / len(drawn))
