"""The decoder against PyTorch transformers: random tiny models of every family and flag, and one that was trained."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import SHARED, tiny_model, tiny_model_folder, tiny_tokenizer
from transformers import AutoModelForCausalLM

from tokalign_jax import paths
from tokalign_jax.models import families, hub, huggingface
from tokalign_jax.models.config import ModelConfig
from tokalign_jax.models.transformer import abstract_params, forward, generate, head_matrix, init_params, logits

VOCABULARY = 90
TOKENIZER = tiny_tokenizer(257, [])
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tied": True}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama-all-kv-heads": ("llama", {"num_key_value_heads": 4}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("llama", {"head_dim": 16, "hidden_act": "gelu_pytorch_tanh"}),
    "llama-linear-rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}},
    ),
    "llama-llama3-rope": ("llama", {"rope_parameters": LLAMA3}),
    "neox": ("gpt_neox", {}),
    "neox-tied": ("gpt_neox", {"tied": True}),
    "neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "neox-no-attention-bias": ("gpt_neox", {"attention_bias": False, "hidden_act": "relu"}),
    "neox-full-rotary": (
        "gpt_neox",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}},
    ),
    "neox-linear-rope": (
        "gpt_neox",
        {
            "rope_parameters": {
                "rope_type": "linear",
                "rope_theta": 500.0,
                "partial_rotary_factor": 0.5,
                "factor": 2.0,
            },
            "hidden_act": "gelu_new",
        },
    ),
}


CONFIG = families.config_from_hf(tiny_model("llama", VOCABULARY).config.to_dict())
BOTH = pytest.mark.parametrize("name", ["llama", "neox"])
run_logits = jax.jit(logits, static_argnums=0)


def _tiny(name: str, tmp_path: Path) -> tuple[ModelConfig, dict, torch.nn.Module]:
    """A random model as ours (config, params) and as PyTorch's, both read from one folder."""
    family, settings = MODELS[name]
    return _pair(tiny_model_folder(tmp_path / "model", family, VOCABULARY, tokenizer=TOKENIZER, **settings))


def _pair(folder: Path) -> tuple[ModelConfig, dict, torch.nn.Module]:
    config, _ = hub.load_config(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return config, huggingface.load_params(folder, config, jnp.float32), reference


def _tokens(config: ModelConfig, batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(0, config.vocab_size, (batch, length), dtype=np.int32)


def _reference_logits(reference: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return reference(torch.tensor(tokens).long()).logits.numpy()


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_pytorch(name, tmp_path):
    config, params, reference = _tiny(name, tmp_path)
    expected_leaves = {path: (leaf.shape, leaf.dtype) for path, leaf in paths.flatten(abstract_params(config)).items()}
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in paths.flatten(params).items()} == expected_leaves
    for batch, length in ((3, 1), (1, 128)):
        tokens = _tokens(config, batch, length)
        expected = _reference_logits(reference, tokens)
        assert np.abs(expected).max() > 0.5
        np.testing.assert_allclose(run_logits(config, params, tokens), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "neox", "neox-tied"])
def test_gradients_of_embedding_and_head_are_those_of_pytorch(name, tmp_path):
    config, params, reference = _tiny(name, tmp_path)
    tokens = _tokens(config, 2, 17)

    @jax.jit
    @jax.grad
    def gradients(params):
        probabilities = jax.nn.log_softmax(logits(config, params, tokens[:, :-1]))
        return -jnp.take_along_axis(probabilities, tokens[:, 1:, None], -1).mean()

    ours = gradients(params)
    output = reference(torch.tensor(tokens[:, :-1]).long()).logits
    torch.nn.functional.cross_entropy(output.flatten(0, 1), torch.tensor(tokens[:, 1:]).long().flatten()).backward()
    embedding, head = reference.get_input_embeddings().weight.grad, reference.get_output_embeddings().weight.grad
    assert embedding.abs().max() > 1e-3
    np.testing.assert_allclose(ours["embed_tokens"]["embedding"], embedding.numpy(), atol=1e-6, rtol=1e-4)
    np.testing.assert_allclose(head_matrix(ours), head.numpy(), atol=1e-6, rtol=1e-4)


@BOTH
def test_greedy_continuation_is_that_of_pytorch(name, tmp_path):
    config, params, reference = _tiny(name, tmp_path)
    for length in (1, 20):
        prompt = expected = _tokens(config, 2, length)
        for _ in range(12):
            expected = np.append(expected, _reference_logits(reference, expected)[:, -1:].argmax(-1), axis=1)
        np.testing.assert_array_equal(generate(config, params, jnp.asarray(prompt), 12), expected)
    np.testing.assert_array_equal(generate(config, params, jnp.asarray(prompt), 0), prompt)


@BOTH
def test_no_position_sees_a_later_one(name, tmp_path):
    config, params, _ = _tiny(name, tmp_path)
    # Every position has a token of its own, so that the row of the table stands for the position.
    tokens = jnp.arange(10)[None]

    @jax.jit
    @jax.jacobian
    def influence(embedding):
        hidden = forward(config, params | {"embed_tokens": {"embedding": embedding}}, tokens)
        return jnp.square(hidden[0]).sum(-1)

    seen = jnp.abs(influence(params["embed_tokens"]["embedding"])).max(-1)[:, :10] > 0
    np.testing.assert_array_equal(seen, np.tri(10, dtype=bool))


def test_recomputation_changes_no_gradient():
    params = init_params(CONFIG, jax.random.key(0), std=0.2)
    tokens = _tokens(CONFIG, 2, 16)

    def gradients(remat):
        return jax.jit(jax.grad(lambda p: jnp.square(forward(CONFIG, p, tokens, remat=remat)).sum()))(params)

    for stored, recomputed in zip(jax.tree.leaves(gradients(False)), jax.tree.leaves(gradients(True))):
        scale = float(jnp.abs(stored).max())
        np.testing.assert_allclose(recomputed, stored, atol=1e-5 * scale, rtol=0)


@BOTH
def test_bf16_is_close_to_float32(name, tmp_path):
    config, params, _ = _tiny(name, tmp_path)
    tokens = _tokens(config, 2, 32)
    hidden, exact = (
        jax.jit(lambda p, d=d: forward(config, p, tokens, dtype=d))(params) for d in ("bfloat16", "float32")
    )
    assert hidden.dtype == jnp.bfloat16
    assert jnp.abs(hidden - exact).mean() < 0.03 * jnp.abs(exact).mean()


def test_fresh_parameters():
    params = paths.flatten(init_params(CONFIG, jax.random.key(0), std=0.5))
    assert set(params) == set(paths.flatten(abstract_params(CONFIG)))
    kernel = params["layers/mlp/up_proj/kernel"]
    assert abs(float(kernel.std()) - 0.5) < 0.02
    assert not np.array_equal(kernel[0], kernel[1])
    np.testing.assert_array_equal(params["final_norm/scale"], 1)


def test_parameters_of_another_model_are_refused():
    params = init_params(CONFIG, jax.random.key(0))
    del params["final_norm"]
    with pytest.raises(ValueError, match=r"missing.*final_norm/scale"):
        forward(CONFIG, params, jnp.zeros((1, 4), jnp.int32))


@pytest.mark.skipif(not (SHARED / "models/llama-en16k").exists(), reason="the shared model is not at hand")
def test_a_trained_model_gives_the_logits_of_pytorch():
    config, params, reference = _pair(SHARED / "models/llama-en16k")
    tokens = _tokens(config, 2, 200)
    np.testing.assert_allclose(
        run_logits(config, params, tokens), _reference_logits(reference, tokens), atol=1e-4, rtol=0
    )
