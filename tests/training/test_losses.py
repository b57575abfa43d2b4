"""Chunked cross-entropy against float64 NumPy and autodiff of full logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokalign_jax.training import losses
from tokalign_jax.training.losses import Head, cross_entropy, token_nll, token_nll_and_likeliest

B, T, D, V = 3, 7, 16, 37


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, V, (B, T))
    labels[1, 2:4] = -1
    return (
        rng.normal(size=(B, T, D)).astype(np.float32),
        rng.normal(size=(V, D)).astype(np.float32),
        labels,
    )


def reference(hidden, head, labels, cap=np.inf):
    """Summed loss, its gradients and the loss by token, in float64, logits whole and soft-capped."""
    hidden, head = hidden.astype(np.float64), head.astype(np.float64)
    logits, slope = hidden @ head.T, 1.0
    if cap < np.inf:
        logits = cap * np.tanh(logits / cap)
        slope = 1 - (logits / cap) ** 2
    top = logits.max(-1, keepdims=True)
    log_total = top + np.log(np.exp(logits - top).sum(-1, keepdims=True))
    counts = (labels >= 0)[..., None]
    nll = ((log_total - np.take_along_axis(logits, np.maximum(labels, 0)[..., None], -1)) * counts)[
        ..., 0
    ]
    delta = (np.exp(logits - log_total) - np.eye(V)[labels]) * counts * slope
    return nll.sum(), delta @ head, np.einsum("btv,btd->vd", delta, hidden), nll


@pytest.mark.parametrize("gpu", [False, True], ids=["zeros", "first"])
@pytest.mark.parametrize("chunk", [1, 4, 5, 7, 21, 1000])
def test_value_and_gradients_match_numpy(data, chunk, gpu, monkeypatch):
    hidden, head, labels = data
    if gpu:  # where sums start with the first chunk
        monkeypatch.setattr(losses, "over_chunks", losses._from_the_first)

    def loss(hidden, head):
        total, count = cross_entropy(hidden, head, jnp.asarray(labels), Head(V, chunk, jnp.float32))
        return (
            3.0 * total,
            count,
        )  # the factor: the backward pass must scale by what comes from above

    (total, count), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(
        hidden, head
    )
    expected, hidden_gradient, head_gradient, nll = reference(hidden, head, labels)
    assert count == B * T - 2
    np.testing.assert_allclose(total, 3 * expected, rtol=1e-6)
    np.testing.assert_allclose(gradients[0], 3 * hidden_gradient, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradients[1], 3 * head_gradient, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        token_nll(hidden, head, jnp.asarray(labels), Head(V, chunk, jnp.float32)),
        nll,
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_likeliest_token_has_the_largest_logit(data, chunk):
    hidden, head, labels = data
    padded = np.concatenate(
        [head, np.zeros((3, D), np.float32)]
    )  # rows that only fill the matrix up
    hidden[0, 0] = -10 * head.sum(axis=0)  # all logits may be negative: the filling must not win
    how = Head(V, chunk, jnp.float32)
    nll, likeliest = token_nll_and_likeliest(hidden, padded, jnp.asarray(labels), how)
    np.testing.assert_array_equal(likeliest, (hidden @ head.T).argmax(-1))
    np.testing.assert_array_equal(nll, token_nll(hidden, padded, jnp.asarray(labels), how))


def test_value_is_the_same_with_and_without_gradients(data):
    hidden, head, labels = data

    def loss(hidden):
        return cross_entropy(hidden, head, jnp.asarray(labels), Head(V, 4, jnp.float32))[0]

    np.testing.assert_allclose(loss(hidden), jax.value_and_grad(loss)(hidden)[0], rtol=1e-6)


def test_bfloat16_products_keep_float32_logits_and_head_gradient(data):
    """Only the inputs of the products are rounded: on rounded inputs, float64 gives the same value
    to float32.
    """
    hidden, head, labels = data
    rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32)) for x in (hidden, head)]
    expected, _, head_gradient, _ = reference(*rounded, labels)

    def loss(head):
        return cross_entropy(hidden, head, jnp.asarray(labels), Head(V, 5, jnp.bfloat16))[0]

    total, gradient = jax.value_and_grad(loss)(head)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert gradient.dtype == jnp.float32
    # The logits' gradient is rounded to bfloat16 (8 bits) before its product.
    np.testing.assert_allclose(
        gradient, head_gradient, atol=2**-8 * np.abs(rounded[0]).sum((0, 1)).max()
    )


@pytest.mark.parametrize(
    "cap, scale, worst",
    [(5.0, 1, 5), (np.inf, 4, 50), (30.0, 4, 30)],
    ids=["capped", "far apart", "both"],
)
def test_adjusted_logits_and_unlikely_labels(data, cap, scale, worst):
    """The soft-cap's slope is in the gradients of label and others; with logits far apart some
    labels lose more than 50 nats.
    """
    hidden, head, labels = data
    hidden = scale * hidden
    expected, hidden_gradient, head_gradient, nll = reference(hidden, head, labels, cap)
    assert worst < nll.max() < losses.MOST
    adjust = None if cap == np.inf else lambda x: cap * jnp.tanh(x / cap)

    def loss(hidden, head):
        return cross_entropy(hidden, head, jnp.asarray(labels), Head(V, 5, jnp.float32, adjust))[0]

    total, gradients = jax.value_and_grad(loss, (0, 1))(hidden, head)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    np.testing.assert_allclose(gradients[0], hidden_gradient, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(gradients[1], head_gradient, rtol=1e-5, atol=2e-5 * scale)


def test_confident_token_in_bfloat16_has_an_exact_gradient():
    """The gradient of the label's row and state, 1e-3 of either, is below the bfloat16 rounding of
    the terms that cancel.
    """
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(1, 1, D)).astype(jnp.bfloat16)
    head = np.stack([np.zeros(D), hidden[0, 0].astype(np.float64)]).astype(jnp.bfloat16)
    head[1] = (head[1].astype(np.float32) * 7 / (hidden.astype(np.float32) ** 2).sum()).astype(
        jnp.bfloat16
    )
    wide = [np.asarray(x, np.float64) for x in (hidden, head)]
    probability = 1 / (1 + np.exp(-wide[0][0, 0] @ wide[1][1]))
    assert 1e-4 < 1 - probability < 2e-3

    def loss(*given):
        return cross_entropy(*given, jnp.array([[1]]), Head(2, 1, jnp.bfloat16))[0]

    gradients = jax.grad(loss, (0, 1))(hidden.astype(np.float32), head.astype(np.float32))
    np.testing.assert_allclose(gradients[0][0, 0], (probability - 1) * wide[1][1], rtol=2**-8)
    np.testing.assert_allclose(gradients[1][1], (probability - 1) * wide[0][0, 0], rtol=1e-3)


def test_logits_are_clipped_above_the_labels():
    """A loss or gradient of NaN would lose the whole step."""
    hidden, head = np.full((1, 1, 1), 100, np.float32), np.array([[10.0], [1.0], [2.0]], np.float32)

    def loss(*given):
        return cross_entropy(*given, jnp.array([[1]]), Head(3, 1, jnp.float32))[0]

    total, gradients = jax.value_and_grad(loss, (0, 1))(hidden, head)
    np.testing.assert_allclose(
        total, losses.MOST + np.log(2), rtol=1e-6
    )  # both others lie farther above
    np.testing.assert_allclose(gradients[1][:, 0], [50, -100, 50], rtol=1e-5)
    np.testing.assert_allclose(gradients[0][0, 0, 0], 10 / 2 + 2 / 2 - 1, rtol=1e-5)
    assert float(
        token_nll(hidden, head, jnp.array([[1]]), Head(3, 1, jnp.float32))[0, 0]
    ) == pytest.approx(900)


def test_logits_are_never_materialised_in_full():
    """The compiled value and gradient need far less memory than the [B T, V] logits in float32."""
    tokens, vocabulary, width = 2048, 8192, 8
    hidden = jax.ShapeDtypeStruct((1, tokens, width), jnp.float32)
    head = jax.ShapeDtypeStruct((vocabulary, width), jnp.float32)
    labels = jax.ShapeDtypeStruct((1, tokens), jnp.int32)

    def loss(hidden, head, labels):
        return cross_entropy(hidden, head, labels, Head(V, 128, jnp.float32))[0]

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(hidden, head, labels).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < tokens * vocabulary * 4 / 3


def test_maximum_and_sum_agree_in_one_pass_and_two():
    """Also where masked rows of the head are none, the first, the last or all but one."""
    logits = np.random.default_rng(0).normal(scale=20, size=(5, 1000)).astype(np.float32)
    logits[1, :300] = logits[2, 300:] = logits[3, 1:] = losses.LEAST
    largest = logits.max(-1)
    expected = np.exp(logits.astype(np.float64) - largest[:, None]).sum(-1)
    for way in (losses._in_one_pass, losses._in_two_passes):
        found = jax.jit(way)(logits)
        np.testing.assert_array_equal(found[0], largest)
        np.testing.assert_allclose(found[1], expected, rtol=1e-5)


@pytest.mark.parametrize("cap", [np.inf, 3.0], ids=["plain", "soft-capped"])
@pytest.mark.parametrize("chunk", [4, 1000])
def test_weighted_loss_and_gradients_match_numpy(data, chunk, cap):
    hidden, head, labels = data
    weights = np.random.default_rng(1).normal(size=labels.shape).astype(np.float32)
    adjust = None if cap == np.inf else lambda x: cap * jnp.tanh(x / cap)
    how = Head(V, chunk, jnp.float32, adjust)

    def total(hidden, head):
        return losses.weighted_cross_entropy(hidden, head, labels, jnp.asarray(weights), how)

    value, gradients = jax.value_and_grad(total, argnums=(0, 1))(
        jnp.asarray(hidden), jnp.asarray(head)
    )
    # The reference weighs nothing: it is asked for one token at a time.
    expected, of_hidden, of_head = 0.0, np.zeros(hidden.shape), np.zeros(head.shape)
    for b, t in np.argwhere(labels >= 0):
        only = np.full_like(labels, -1)
        only[b, t] = labels[b, t]
        nll, one, other, _ = reference(hidden, head, only, cap)
        expected += weights[b, t] * nll
        of_hidden += weights[b, t] * one
        of_head += weights[b, t] * other
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradients[0], of_hidden, atol=2e-5)
    np.testing.assert_allclose(gradients[1], of_head, atol=2e-5)
