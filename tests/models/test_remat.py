"""Rematerialisation: saved bytes and recomputed products of compiled programs against
predictions.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from tests.training.toys import LLAMA, NEOX
from tokalign_jax.models import attention, remat, transformer
from tokalign_jax.models.config import LayerKind
from tokalign_jax.models.lora import LoraSpec
from tokalign_jax.models.rotary import Rope
from tokalign_jax.models.transformer import abstract_params, forward, init_params
from tokalign_jax.utils import paths

TOKENS = 2, 64
SIZES = {"hidden_size": 64, "intermediate_size": 192, "head_dim": 16, "max_positions": 64}
MODELS = {
    "parallel": replace(NEOX, **SIZES),
    "one after the other": replace(NEOX, **SIZES, parallel_residual=False),
    "gated": replace(LLAMA, **SIZES | {"head_dim": 24}),
}
EACH_MODEL = pytest.mark.parametrize("model", MODELS)


def config_of(model: str, layers: int = 4):
    config = MODELS[model]
    return replace(config, num_layers=layers, layer_kinds=config.layer_kinds[:1] * layers)


def step_of(config, policy, trains_layers):
    """The sum of the hidden states as a function of (trainable, frozen, tokens), and the shapes of
    these.
    """
    leaves = paths.flatten(abstract_params(config))
    trainable = {
        path: leaf
        for path, leaf in leaves.items()
        if trains_layers or not path.startswith("layers/")
    }
    frozen = {path: leaf for path, leaf in leaves.items() if path not in trainable}

    def loss(trainable, frozen, tokens):
        return forward(config, paths.unflatten(trainable | frozen), tokens, remat=policy).sum()

    return loss, (trainable, frozen, jax.ShapeDtypeStruct(TOKENS, jnp.int32))


def compiled(config, policy, trains_layers):
    loss, shapes = step_of(config, policy, trains_layers)
    quickly = {"xla_backend_optimization_level": "0"}
    return jax.jit(jax.value_and_grad(loss)).lower(*shapes).compile(compiler_options=quickly)


def bytes_kept(config, policy, trains_layers) -> int:
    """Bytes per token saved by all layers for the backward pass, stacked over the layers."""
    loss, shapes = step_of(config, policy, trains_layers)
    kept = jax.eval_shape(
        lambda trainable, *others: jax.vjp(lambda t: loss(t, *others), trainable)[1], *shapes
    )
    stacked = [x for x in jax.tree.leaves(kept) if x.shape[:3] == (config.num_layers, *TOKENS)]
    return sum(x.size * x.dtype.itemsize for x in stacked) // int(np.prod(TOKENS))


def promised(config, policy) -> int:
    """The einsum fallback, which runs here, has no log-sum-exp to keep."""
    log_sum_exp = 4 * config.num_heads * config.num_layers * (policy != "layer")
    return remat.activation_bytes(config, policy, jnp.float32) - log_sum_exp


@EACH_MODEL
@pytest.mark.parametrize("policy", remat.POLICIES)
def test_layers_save_the_predicted_activations(model, policy):
    config = config_of(model)
    assert bytes_kept(config, policy, trains_layers=True) == promised(config, policy)


@EACH_MODEL
def test_frozen_layers_save_nothing_for_weight_gradients(model):
    """Of the saved activations, only attention's result is an input of a projection."""
    config = config_of(model)
    result = 4 * config.num_heads * config.head_dim * config.num_layers
    assert bytes_kept(config, "dots", trains_layers=False) == promised(config, "dots") - result


def test_compiled_programs_need_no_extra_memory_for_remat():
    """Temporary memory grows with depth by what is kept."""
    few, more = (config_of("gated", layers) for layers in (4, 12))
    small, large = (
        compiled(config, "attention", trains_layers=True).memory_analysis().temp_size_in_bytes
        for config in (few, more)
    )
    expected = promised(more, "attention") - promised(few, "attention")
    assert (large - small) / np.prod(TOKENS) == pytest.approx(expected, rel=0.01)


PRODUCTS = {"parallel": 6, "one after the other": 6, "gated": 7}
"""Projections of a layer."""
AGAIN = {
    ("parallel", "attention"): (1, 1),  # up_proj
    ("parallel", "layer"): (
        4,
        5,
    ),  # q_proj, k_proj, v_proj, up_proj; weights x values for the gradient of o_proj
    ("one after the other", "attention"): (2,),  # up_proj, o_proj
    ("one after the other", "layer"): (6,),  # all but down_proj; weights x values
    ("gated", "attention"): (3,),  # up_proj, gate_proj, o_proj
    ("gated", "layer"): (7,),
}
"""Products that a policy computes again: where layers are frozen, and where they train."""


@pytest.mark.parametrize("policy", remat.POLICIES)
@pytest.mark.parametrize(
    "model, trains_layers", [*((model, False) for model in MODELS), ("parallel", True)]
)
def test_only_the_listed_products_are_recomputed(model, policy, trains_layers):
    """Forwards each once, backwards one for its input and, where it trains, one for its weight.
    Attention has two products forwards, and backwards four and its logits again.
    """
    projections = PRODUCTS[model]
    needed = projections * (3 if trains_layers else 2) + 2 + 5
    again = AGAIN.get((model, policy), (0, 0))[trains_layers]
    assert (
        compiled(config_of(model), policy, trains_layers).as_text().count(" dot(") == needed + again
    )


def test_no_policy_changes_a_gradient():
    config, spec = config_of("gated"), LoraSpec(rank=4, alpha=8.0, dropout=0.3)
    random = np.random.default_rng(0)
    shapes = abstract_params(config, spec)
    params = jax.tree.map(lambda leaf: 0.2 * random.standard_normal(leaf.shape, np.float32), shapes)
    tokens = random.integers(config.vocab_size, size=(2, 32), dtype=np.int32)

    def gradients(policy):
        def loss(params):
            options = {"lora": spec, "dropout_key": jax.random.key(2), "remat": policy}
            return jnp.square(forward(config, params, tokens, **options)).sum()

        return jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(params))

    first, *others = map(gradients, remat.POLICIES)
    for other in others:
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(other)):
            np.testing.assert_allclose(b, a, atol=1e-5 * np.abs(a).max(), rtol=0)


def test_unrolled_layers_recompute_nothing_and_give_the_same():
    """Also where layers differ."""
    kinds = (
        LayerKind(Rope(24, 100.0, None), window=5),
        LayerKind(None),
        LayerKind(Rope(24, 1e4, None)),
    )
    config = replace(config_of("gated", layers=3), layer_kinds=kinds)
    spec = LoraSpec(rank=4, alpha=8.0, dropout=0.3)
    random = np.random.default_rng(0)
    shapes = abstract_params(config, spec)
    params = jax.tree.map(lambda leaf: 0.2 * random.standard_normal(leaf.shape, np.float32), shapes)
    tokens = random.integers(config.vocab_size, size=TOKENS, dtype=np.int32)

    def program(unroll):
        def loss(params):
            options = {"lora": spec, "dropout_key": jax.random.key(2), "unroll": unroll}
            return jnp.square(forward(config, params, tokens, **options)).sum()

        return jax.jit(jax.grad(loss)).lower(params).compile()

    looped, flat = map(program, (1, 100))
    for a, b in zip(jax.tree.leaves(looped(params)), jax.tree.leaves(flat(params))):
        np.testing.assert_allclose(b, a, atol=1e-5 * np.abs(a).max(), rtol=0)
    products = config.num_layers * looped.as_text().count(" dot(")
    # Fewer, since adapters' first products, of which there is one for all that read the same, are
    # computed again in a loop only.
    assert 0.85 * products < flat.as_text().count(" dot(") <= products


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("policy, runs", [("dots", 1), ("attention", 1), ("layer", 2)])
def test_cudnn_attention_is_recomputed_only_where_nothing_is_saved(
    monkeypatch, policy, runs, sinks
):
    """Traced as for a GPU that need not be here."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91500)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)

    def layer(x, w):
        q = (x @ w).reshape(2, 16, 4, 8)
        heads = (q, q, q, w[0, :4]) if sinks else (q, q, q)
        return attention._cudnn(*heads, scale=0.3, window=None).reshape(x.shape) @ w, None

    def loss(x, weights):
        return jax.lax.scan(remat.wrap(layer, policy), x, weights)[0].astype(jnp.float32).sum()

    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in [(2, 16, 32), (3, 32, 32)]]
    text = str(jax.make_jaxpr(jax.value_and_grad(loss, (0, 1)))(*shapes))
    assert text.count("dot_product_attention_fwd_wrapper") == runs
    assert text.count("dot_product_attention_bwd_wrapper") == 1


def test_unknown_remat_policy_is_refused():
    with pytest.raises(ValueError, match="'everything': one of dots, attention, layer"):
        remat.wrap(lambda x: x, "everything")


@pytest.mark.parametrize(
    "layers, at_once",
    [(16, 16), (36, 36), (40, 40), (48, 48), (61, 31), (64, 32), (80, 40), (126, 42)],
)
def test_deep_models_are_scanned_in_few_even_groups_on_gpus(layers, at_once, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert transformer._layers_per_iteration(0, layers, "dots") == at_once
    assert transformer._layers_per_iteration(0, layers, "layer") == 1
    assert transformer._layers_per_iteration(5, layers, "dots") == 5


def test_unroll_that_does_not_divide_the_layers_gives_the_same():
    config = config_of("gated", layers=5)
    params = init_params(config, jax.random.key(0), std=0.3)
    text = jnp.arange(40)[None] % config.vocab_size
    looped, at_once = (forward(config, params, text, unroll=unroll) for unroll in (3, 5))
    np.testing.assert_allclose(looped, at_once, atol=1e-5)


@pytest.mark.parametrize("unroll", [1, 4])
def test_states_inside_are_those_of_the_first_layers(unroll):
    config = config_of("gated")
    params = init_params(config, jax.random.key(0), std=0.2)
    tokens = jax.random.randint(jax.random.key(1), TOKENS, 0, config.vocab_size)
    model = transformer.bind(config, params)
    final, _, inner = model(tokens, None, jnp.float32, "layer", unroll, after={1, 3})
    assert len(inner) == 2
    np.testing.assert_allclose(final, forward(config, params, tokens), atol=1e-5)
    for number, state in zip((1, 3), inner):
        expected = forward(*transformer.first_layers(config, params, number), tokens)
        np.testing.assert_allclose(model.outer.final_norm(state), expected, atol=1e-5)
