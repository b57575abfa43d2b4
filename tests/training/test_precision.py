"""Precision of products: `compute.dtype=float32` on every device, and unrounded scale factors."""

import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.toys import LENGTH, LLAMA, NEOX, STAGE, VOCABULARY, toy_params
from tokalign_jax.config import ComputeConfig, DistillationConfig
from tokalign_jax.evaluation import drafting
from tokalign_jax.initialization import calibration
from tokalign_jax.models.config import Experts
from tokalign_jax.models.lora import LoraSpec, add_lora
from tokalign_jax.models.modules import dropout
from tokalign_jax.models.transformer import forward, generate, head_matrix
from tokalign_jax.parallel import sharding
from tokalign_jax.training import distillation, loop
from tokalign_jax.training.losses import Head, token_nll
from tokalign_jax.training.optimizer import make_optimizer, rules_for, schedule_of
from tokalign_jax.training.step import NEXT_TOKEN, init_state, make_train_step
from tokalign_jax.utils import paths

MIXTURE = replace(LLAMA, experts=Experts(count=4, per_token=2, normalized=True))
SPARSE = replace(
    LLAMA,
    attention_sinks=True,
    experts=Experts(4, 2, True, shared_size=24, bias=True, computed="sparse"),
)
TOKENS = jnp.zeros((2, LENGTH), jnp.int32)


def step(model, method, dtype, objective=NEXT_TOKEN):
    """The lowered training step."""
    stage, compute = replace(STAGE, method=method), ComputeConfig(dtype=dtype, loss_chunk=7)
    mesh, lora = sharding.make_mesh(), loop.lora_spec(stage)
    params = toy_params(model)
    trained, frozen = loop.split(
        stage, add_lora(params, lora, jax.random.key(0)) if lora else params
    )
    optimizer = make_optimizer(stage, paths.label_tree(rules_for(method), trained))
    frozen = frozen if objective.beside is None else (frozen, objective.beside)
    program = make_train_step(
        objective.make_loss(model, compute, lora), optimizer, jnp.dtype(dtype), mesh
    )
    batch = jnp.zeros((2, 2, LENGTH + 1), jnp.int32)
    return program.lower(
        init_state(trained, optimizer), frozen, batch, jax.random.key(0), schedule_of(stage)
    )


def taught():
    teacher = distillation.Teacher(NEOX, toy_params(NEOX), VOCABULARY, "")
    return distillation.objective(DistillationConfig(divergence="mixed"), teacher)


def scores(dtype):
    how = Head(VOCABULARY, 5, jnp.dtype(dtype))

    def losses(params):
        return token_nll(
            forward(LLAMA, params, TOKENS, dtype=dtype), head_matrix(params), TOKENS, how
        )

    return jax.jit(losses).lower(toy_params())


def agreement(dtype):
    side = jnp.zeros((2, 3, 16), dtype), jnp.zeros((VOCABULARY, 16), dtype)
    both = [(*side, lambda x: x)] * 2
    return jax.jit(lambda: drafting.agreement(*both, vocabulary=VOCABULARY)).lower()


def frequencies(dtype):
    states, head = jnp.zeros((1, 3, 16), dtype), jnp.zeros((VOCABULARY, 16))
    return calibration.mean_probability.lower(
        states, head, jnp.zeros(VOCABULARY), config=LLAMA, mesh=sharding.make_mesh()
    )


PROGRAMS = {
    "full": functools.partial(step, LLAMA, "full"),
    "mixture, adapters": functools.partial(step, MIXTURE, "lora"),
    "sparse mixture": functools.partial(step, SPARSE, "full"),
    "sparse mixture, adapters": functools.partial(step, SPARSE, "lora"),
    "with biases": functools.partial(step, NEOX, "embedding"),
    "distillation": lambda dtype: step(LLAMA, "full", dtype, taught()),
    "scores": scores,
    "generate": lambda dtype: jax.jit(lambda p: generate(LLAMA, p, TOKENS[:1, :5], 3, dtype)).lower(
        toy_params()
    ),
    "agreement": agreement,
    "frequencies": frequencies,
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_products_use_float32_precision_when_computing_in_float32(name):
    text = PROGRAMS[name]("float32").as_text()
    products = re.findall(r"stablehlo\.dot_general.*", text)
    assert products and all("HIGHEST, HIGHEST" in product for product in products)


@pytest.mark.parametrize("name", ["full", "scores", "distillation"])
def test_products_of_narrow_types_use_default_precision(name):
    assert "HIGHEST" not in PROGRAMS[name]("bfloat16").as_text()


def test_dropout_is_scaled_in_float32():
    x = jax.random.normal(jax.random.key(0), (2, 8, 64), jnp.bfloat16)
    dropped = dropout(x, 0.1, jax.random.split(jax.random.key(1), 2))
    kept = np.asarray(dropped != 0)
    np.testing.assert_array_equal(
        dropped[kept], (x.astype(jnp.float32) * (1 / 0.9)).astype(jnp.bfloat16)[kept]
    )


def equations(jaxpr):
    """All equations of a jaxpr and of its inner jaxprs."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize("model", [LLAMA, MIXTURE], ids=["dense", "mixture"])
def test_scale_factors_are_not_rounded_to_the_compute_type(model):
    """A number that multiplies bfloat16 activations is converted to bfloat16 first: 0.22 is 0.13%
    less there.
    """
    model = replace(model, residual_scale=0.22)
    lora = LoraSpec(rank=3, alpha=1.0, dropout=0.1)
    params = add_lora(toy_params(model), lora, jax.random.key(0))
    program = functools.partial(forward, model, lora=lora, dtype=jnp.bfloat16, unroll=2)
    traced = jax.make_jaxpr(lambda *inputs: program(*inputs, dropout_key=jax.random.key(1)))(
        params, TOKENS
    )
    found = list(equations(traced.jaxpr))
    factors = [
        float(operand.val)
        for equation in found
        if equation.primitive.name == "mul" and equation.outvars[0].aval.dtype == jnp.bfloat16
        for operand in equation.invars
        if hasattr(operand, "val") and not np.shape(operand.val)
    ]
    assert any(equation.primitive.name == "dot_general" for equation in found)
    assert all(np.log2(abs(factor)) % 1 == 0 for factor in factors), factors
