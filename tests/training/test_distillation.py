"""Chunked distillation loss against the published formula in float64 and autodiff of full
logits.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.training.toys import LLAMA
from tokalign_jax.config import DistillationConfig
from tokalign_jax.training.distillation import Teacher, Teaching, distillation, objective
from tokalign_jax.training.losses import Head, cross_entropy

B, T, D, TEACHER_D = 3, 7, 16, 10
ROWS, STUDENT_V, TEACHER_V, V = 48, 41, 45, 37
"""Rows in memory, rows of both models, and the tokens that both have: all different."""


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, V, (B, T))
    labels[1, 2:4] = -1
    shapes = (B, T, D), (ROWS, D), (B, T, TEACHER_D), (ROWS, TEACHER_D)
    return *(rng.normal(size=shape).astype(np.float32) for shape in shapes), labels


def cap(size, logits):
    return size * jnp.tanh(logits / size)


def teaching(chunk=5, caps=(None, None), dtype=jnp.float32, **settings):
    student, teacher = (
        Head(size, chunk, dtype, functools.partial(cap, soft) if soft else None)
        for size, soft in zip((STUDENT_V, TEACHER_V), caps)
    )
    return Teaching(student, teacher, V, **settings)


def reference(hidden, head, teacher_hidden, teacher_head, labels, how, caps=(None, None)):
    """The sum of the loss, and its gradients for `hidden` and `head`, in float64."""
    s, w, t, u = (
        torch.tensor(x, dtype=torch.float64) for x in (hidden, head, teacher_hidden, teacher_head)
    )
    s.requires_grad_()
    w.requires_grad_()
    logits, teacher_logits = (
        x if soft is None else soft * torch.tanh(x / soft)
        for x, soft in zip((s @ w.T, t @ u.T), caps)
    )
    log_q, log_p = (
        torch.log_softmax(x[..., :V] / how.temperature, -1) for x in (logits, teacher_logits)
    )
    forward = (log_p.exp() * (log_p - log_q)).sum(-1)
    reverse = (log_q.exp() * (log_q - log_p)).sum(-1)
    counts = torch.tensor(labels >= 0)
    picked = torch.tensor(np.maximum(labels, 0))[..., None]
    nll = -torch.log_softmax(logits[..., :STUDENT_V], -1).gather(-1, picked)[..., 0]
    divergence = how.temperature**2 * ((1 - how.reverse) * forward + how.reverse * reverse)
    total = ((how.weight * divergence + (1 - how.weight) * nll) * counts).sum()
    total.backward()
    return total.item(), s.grad.numpy(), w.grad.numpy()


def measured(data, how):
    """Like `reference`, for three times the loss: the backward pass must scale by the incoming
    gradient.
    """
    hidden, head, teacher_hidden, teacher_head, labels = data

    def loss(hidden, head):
        total, count = distillation(
            hidden, head, teacher_hidden, teacher_head, jnp.asarray(labels), how
        )
        return 3.0 * total, count

    (total, count), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(
        hidden, head
    )
    assert count == B * T - 2
    return total / 3, *(np.asarray(gradient) / 3 for gradient in gradients)


@pytest.mark.parametrize(
    ("caps", "chunk", "settings"),
    [
        ((None, None), 5, dict(reverse=0.0)),
        ((None, None), 1, dict(reverse=1.0)),
        ((None, None), 21, dict(reverse=0.3, temperature=2.5)),
        ((3.0, 5.0), 4, dict(reverse=0.0, temperature=0.7, weight=0.4)),
        ((None, 4.0), 1000, dict(reverse=1.0, temperature=4.0, weight=0.8)),
    ],
)
def test_value_and_gradients_match_float64(data, caps, chunk, settings):
    how = teaching(chunk, caps, **settings)
    expected, hidden_gradient, head_gradient = reference(*data, how, caps)
    total, *gradients = measured(data, how)
    np.testing.assert_allclose(total, expected, rtol=2e-6)
    np.testing.assert_allclose(gradients[0], hidden_gradient, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(gradients[1], head_gradient, rtol=2e-5, atol=2e-5)
    unknown = V if how.weight == 1 else STUDENT_V
    assert not gradients[1][unknown:].any() and gradients[1][:unknown].any(axis=1).all()


def test_loss_without_teacher_weight_is_the_cross_entropy(data):
    hidden, head, *_, labels = data
    total, *gradients = measured(data, teaching(weight=0.0))

    def loss(hidden, head):
        return cross_entropy(hidden, head, jnp.asarray(labels), teaching().student)[0]

    expected, of_hidden_and_head = jax.value_and_grad(loss, (0, 1))(hidden, head)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    for gradient, same in zip(gradients, of_hidden_and_head):
        np.testing.assert_allclose(gradient, same, rtol=1e-5, atol=1e-6)


def test_student_equal_to_its_teacher_has_zero_divergence(data):
    hidden, head, *_, labels = data
    total, *gradients = measured(
        (hidden, head, hidden, head, labels), teaching(reverse=0.5, temperature=2.0)
    )
    assert abs(total) < 1e-4
    for gradient in gradients:
        np.testing.assert_allclose(gradient, 0, atol=1e-5)


def test_gradients_keep_their_size_at_high_temperature(data):
    """In the limit the gradient for the logits is the difference of the centred logits over V
    (Hinton et al., equation 4).
    """
    hidden, head, teacher_hidden, teacher_head, labels = (np.asarray(x, np.float64) for x in data)
    _, gradient, _ = measured(data, teaching(temperature=1000.0))
    logits, teacher_logits = (
        (x @ w[:V].T) for x, w in ((hidden, head), (teacher_hidden, teacher_head))
    )
    difference = (logits - logits.mean(-1, keepdims=True)) - (
        teacher_logits - teacher_logits.mean(-1, keepdims=True)
    )
    expected = (difference / V @ head[:V]) * (labels >= 0)[..., None]
    np.testing.assert_allclose(gradient, expected, rtol=0.02, atol=0.02)


def test_bfloat16_products_keep_float32_logits_and_head_gradient(data):
    """Only the inputs of the products are rounded: on rounded inputs, float64 gives the same value
    to float32.
    """
    *arrays, labels = data
    how = teaching(dtype=jnp.bfloat16, reverse=0.5, temperature=2.0, weight=0.5)
    rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32)) for x in arrays]
    expected, _, head_gradient = reference(*rounded, labels, how)
    total, _, gradient = measured(data, how)
    np.testing.assert_allclose(total, expected, rtol=2e-6)
    assert gradient.dtype == np.float32
    # The logits' gradient is rounded to bfloat16 (8 bits) before its product.
    np.testing.assert_allclose(
        gradient, head_gradient, atol=2**-7 * np.abs(rounded[0]).sum((0, 1)).max()
    )


def test_teacher_weights_are_arguments_of_the_compiled_step():
    """Two teachers of one shape share a compiled program, which keeps neither's weights alive."""
    one, other = (
        objective(stage, Teacher(LLAMA, {"weights": np.full(3, size)}, V, f"teacher {size}"))
        for size, stage in enumerate(
            [DistillationConfig(teacher="here"), DistillationConfig(teacher="there")]
        )
    )
    assert one.make_loss == other.make_loss and hash(one.make_loss) == hash(other.make_loss)
    assert one.facts != other.facts and one.beside is not other.beside
    warm = objective(DistillationConfig(temperature=2.0), Teacher(LLAMA, {}, V, ""))
    assert warm.make_loss != one.make_loss


def test_heads_of_different_rows_are_refused(data):
    hidden, head, teacher_hidden, teacher_head, labels = data
    with pytest.raises(ValueError, match=r"48 rows and the teacher's 40"):
        distillation(
            hidden, head, teacher_hidden, teacher_head[:40], jnp.asarray(labels), teaching()
        )


def test_logits_are_never_materialised_in_full():
    """The compiled value and gradient need far less memory than the [B T, V] logits of one of the
    two in float32, and hardly more for four times the tokens.
    """
    vocabulary, width, chunk = 8192, 8, 128

    def temporaries(tokens):
        state = jax.ShapeDtypeStruct((1, tokens, width), jnp.float32)
        head = jax.ShapeDtypeStruct((vocabulary, width), jnp.float32)
        labels = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
        side = Head(vocabulary, chunk, jnp.float32)
        how = Teaching(side, side, vocabulary, reverse=0.5, temperature=2.0, weight=0.5)
        loss = lambda hidden, head, *others: distillation(hidden, head, *others, how)[0]  # noqa: E731
        compiled = (
            jax.jit(jax.value_and_grad(loss, (0, 1)))
            .lower(state, head, state, head, labels)
            .compile()
        )
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = temporaries(1024), temporaries(4096)
    assert many < 4096 * vocabulary * 4 / 3
    assert many - few < 0.1 * (4096 - 1024) * vocabulary * 4
