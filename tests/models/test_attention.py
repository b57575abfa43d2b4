"""Attention against a plain float64 reference: each implementation, values and gradients."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokalign_jax.config import MeshConfig
from tokalign_jax.models import attention
from tokalign_jax.parallel import sharding


def arrays(batch=2, length=20, heads=4, groups=2, size=8, dtype=jnp.float32):
    """Queries, keys, values and what comes back to the output."""
    random = np.random.default_rng(0)
    shapes = [(batch, length, n, size) for n in (heads, groups, groups, heads)]
    return [jnp.asarray(2 * random.standard_normal(shape), dtype) for shape in shapes]


def reference(q, k, v, upstream, *, scale, window=None, chunk=None, softcap=None, sinks=None):
    """The output, and the gradients of sum(output * upstream), by loops over sequences and heads in
    float64.
    """
    q, k, v, upstream = (np.asarray(x, np.float64) for x in (q, k, v, upstream))
    y, gradients = np.zeros_like(q), [np.zeros_like(x) for x in (q, k, v)]
    to_sinks = np.zeros(q.shape[2])
    shared = q.shape[2] // k.shape[2]
    for b, n in np.ndindex(q.shape[0], q.shape[2]):
        near = b, slice(None), n // shared
        for t in range(q.shape[1]):
            first = 0 if window is None else max(0, t - window + 1)
            first = first if chunk is None else max(first, t // chunk * chunk)
            seen = range(first, t + 1)
            raw = np.array([scale * q[b, t, n] @ k[near][s] for s in seen])
            capped = raw if softcap is None else softcap * np.tanh(raw / softcap)
            slope = 1 if softcap is None else 1 - np.tanh(raw / softcap) ** 2
            weights = np.exp(capped)
            sink = 0 if sinks is None else np.exp(np.float64(sinks[n]))
            sink_weight = sink / (weights.sum() + sink)
            weights /= weights.sum() + sink
            y[b, t, n] = weights @ v[near][seen]
            to_weights = v[near][seen] @ upstream[b, t, n]
            to_raw = slope * weights * (to_weights - weights @ to_weights)
            gradients[0][b, t, n] += scale * to_raw @ k[near][seen]
            gradients[1][near][seen] += scale * np.outer(to_raw, q[b, t, n])
            gradients[2][near][seen] += np.outer(weights, upstream[b, t, n])
            to_sinks[n] -= sink_weight * (weights @ to_weights)
    return y, *gradients, *([] if sinks is None else [to_sinks])


def value_and_gradients(attend, *inputs):
    """`inputs` are queries, keys, values, what comes back to the output, and possibly sinks."""

    @jax.jit
    def both(q, k, v, upstream, *sinks):
        y, pull = jax.vjp(attend, q, k, v, *sinks)
        return y, *pull(upstream)

    return both(*inputs)


def check(got, expected, tolerance):
    for name, a, b in zip(("output", "q", "k", "v", "sinks"), got, expected):
        np.testing.assert_allclose(
            np.asarray(a, np.float64), b, atol=tolerance * np.abs(b).max(), err_msg=name
        )


OPTIONS = {
    "causal": {},
    "window of one": {"window": 1},
    "window past the start": {"window": 100},
    "window and softcap": {"window": 7, "softcap": 3.0},
}


def whole(q, k, v, scale, window, softcap, sinks=None):
    positions = jnp.arange(q.shape[1])
    return attention._dense_attention(
        q, k, v, attention._causal_mask(positions, positions, window), scale, softcap, sinks
    )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("block", [None, 8], ids=["whole", "blocks"])
def test_fallback_equals_the_reference(options, block):
    options = {"window": None, "softcap": None, "scale": 0.3} | options
    q, k, v, upstream = arrays()
    fallback = attention._blocked_attention if block else whole
    extra = {"block": block} if block else {}
    got = value_and_gradients(lambda *x: fallback(*x, **options, **extra), q, k, v, upstream)
    check(got, reference(q, k, v, upstream, **options), 2e-6)


SINKS = jnp.array([-1.0, 0.5, 3.0, 9.0])
"""From next to nothing to nearly all of the softmax."""


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("block", [None, 8], ids=["whole", "blocks"])
def test_sinks_take_their_share_of_the_softmax(options, block):
    options = {"window": None, "softcap": None, "scale": 0.3} | options
    inputs = arrays()
    fallback = attention._blocked_attention if block else whole
    extra = {"block": block} if block else {}
    attend = lambda *x: fallback(*x[:3], **options, **extra, sinks=x[3])  # noqa: E731
    expected = reference(*inputs, **options, sinks=SINKS)
    check(value_and_gradients(attend, *inputs, SINKS), expected, 2e-6)


@pytest.mark.parametrize("chunk", [6, 10, 20, 30])
@pytest.mark.parametrize("options", [{}, {"window": 4, "sinks": SINKS}], ids=["all", "window"])
def test_queries_see_their_own_chunk(chunk, options):
    """Also a last one that the text does not fill, and one that is as long as the text."""
    inputs = arrays()
    attend = lambda *x: attention.attend(*x, scale=0.3, chunk=chunk, **options)  # noqa: E731
    expected = reference(*inputs, scale=0.3, chunk=chunk, **options)
    check(value_and_gradients(attend, *inputs), expected[:4], 2e-6)


def test_sinks_are_the_same_under_a_mask():
    q, k, v, _ = arrays()
    positions = jnp.arange(20)
    mask = attention._causal_mask(positions, positions, 7)
    np.testing.assert_allclose(
        attention.attend(q, k, v, scale=0.3, mask=mask, sinks=SINKS),
        attention.attend(q, k, v, scale=0.3, window=7, sinks=SINKS),
        atol=1e-6,
    )


def test_a_sink_far_below_all_logits_changes_nothing():
    q, k, v, _ = arrays()
    np.testing.assert_allclose(
        attention.attend(q, k, v, scale=0.3, sinks=jnp.full(4, -1e4)),
        attention.attend(q, k, v, scale=0.3),
        atol=1e-6,
    )


@pytest.mark.parametrize("groups", [1, 4])
def test_query_heads_share_key_value_heads_in_order(groups):
    q, k, v, upstream = arrays(groups=groups)
    got = value_and_gradients(lambda *x: attention.attend(*x, scale=0.3), q, k, v, upstream)
    check(got, reference(q, k, v, upstream, scale=0.3), 2e-6)


@pytest.mark.parametrize("fallback", ["whole", "blocked"])
def test_half_precision_error_is_bounded_by_rounding(fallback):
    """Sums and softmax are float32: the error stays that of rounding inputs and outputs, however
    many blocks there are.
    """
    q, k, v, upstream = arrays(batch=1, length=256, dtype=jnp.bfloat16)
    if fallback == "whole":
        attend = lambda *x: whole(*x, 0.3, None, None)  # noqa: E731
    else:
        attend = lambda *x: attention._blocked_attention(*x, 0.3, None, None, 8)  # noqa: E731
    got = value_and_gradients(attend, q, k, v, upstream)
    assert all(x.dtype == jnp.bfloat16 for x in got)
    check(got, reference(q, k, v, upstream, scale=0.3), 1e-2)


def test_attend_processes_long_sequences_in_blocks():
    q, k, v, upstream = arrays(
        length=attention.MAX_UNBLOCKED_QUERIES + 30, batch=1, heads=2, groups=1
    )
    got = value_and_gradients(
        lambda *x: attention.attend(*x, scale=0.3, window=40), q, k, v, upstream
    )
    check(got, value_and_gradients(lambda *x: whole(*x, 0.3, 40, None), q, k, v, upstream), 2e-6)


def test_memory_of_long_sequences_grows_with_their_length_not_its_square():
    def temporary(length):
        q, k, v, _ = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays(1, length, 2, 2, 16))
        loss = lambda *x: attention.attend(*x, scale=0.3).sum()  # noqa: E731
        return (
            jax.jit(jax.grad(loss, (0, 1, 2)))
            .lower(q, k, v)
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
        )

    assert temporary(4096) < 2.5 * temporary(2048)


def test_mask_is_true_for_visible_keys():
    """A cache filled up to 6 of 12 keys, three queries at its end: as the last three of causal
    attention over six.
    """
    q, k, v, _ = arrays(length=12)
    visible = jnp.arange(12) <= 3 + jnp.arange(3)[:, None]
    got = attention.attend(q[:, 3:6], k, v, scale=0.3, mask=visible)
    expected = attention.attend(q[:, :6], k[:, :6], v[:, :6], scale=0.3)[:, 3:]
    np.testing.assert_allclose(got, expected, atol=1e-6)
    by_sequence = jnp.stack([visible, jnp.zeros_like(visible).at[:, 0].set(True)])
    got = attention.attend(q[:, 3:6], k, v, scale=0.3, mask=by_sequence)
    np.testing.assert_allclose(got[0], expected[0], atol=1e-6)
    np.testing.assert_allclose(got[1], np.repeat(v[1, :1], 2, axis=1).repeat(3, axis=0), atol=1e-6)


def test_invalid_arguments_are_refused():
    q, k, v, _ = arrays()
    with pytest.raises(ValueError, match="4 query heads are not a multiple of 3"):
        attention.attend(q, *arrays(groups=3)[1:3], scale=1.0)
    with pytest.raises(ValueError, match="include these in the mask"):
        attention.attend(q, k, v, scale=1.0, window=3, mask=jnp.ones((20, 20), bool))
    with pytest.raises(ValueError, match="got 19 and 20"):
        attention.attend(q[:, 1:], k, v, scale=1.0)


# --- Kernels ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"window": 50, "softcap": 3.0}], ids=["causal", "window and softcap"]
)
def test_splash_attention_equals_the_fallback(options):
    """Interpreted; 200 positions are no multiple of a tile."""
    options = {"window": None, "softcap": None, "scale": 0.3} | options
    inputs = arrays(batch=1, length=200)
    got = value_and_gradients(lambda *x: attention._splash(*x, **options, interpret=True), *inputs)
    check(
        got,
        [np.asarray(x) for x in value_and_gradients(lambda *x: whole(*x, **options), *inputs)],
        1e-5,
    )


@pytest.mark.parametrize("window", [None, 50])
def test_splash_attention_has_sinks(window):
    *inputs, upstream = arrays(batch=2, length=200)
    options = {"window": window, "softcap": None, "scale": 0.3}
    attend = lambda *x: attention._splash(*x, **options, interpret=True)  # noqa: E731
    expected = lambda *x: whole(*x[:3], **options, sinks=x[3])  # noqa: E731
    check(
        value_and_gradients(attend, *inputs, upstream, SINKS),
        [np.asarray(x) for x in value_and_gradients(expected, *inputs, upstream, SINKS)],
        1e-5,
    )


@pytest.mark.parametrize("window", [None, 7])
def test_cudnn_attention_with_sinks_is_exact_by_what_its_kernels_compute(monkeypatch, window):
    """Kernels as cuDNN defines them: the forward pass returns the log-sum-exp; the backward pass
    derives the softmax from that, and its row sums from the product of result and gradient.
    """
    visible = attention._causal_mask(jnp.arange(20), jnp.arange(20), window)

    def logits(q, k, scale):
        k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
        return jnp.where(visible, scale * jnp.einsum("BTNH,BSNH->BNTS", q, k), -jnp.inf)

    def forward(q, k, v, *, scale, mask_type, sliding_window_length, return_residual):
        assert (mask_type.name, sliding_window_length, return_residual) == ("CAUSAL", window, True)
        y = whole(q, k, v, scale, window, None)
        return y, jax.nn.logsumexp(logits(q, k, scale), axis=-1)

    def backward(scale, seed, rate, biases, mask, layout, length, training, returned, kept, dy):
        assert (rate, biases, mask.name, length, returned) == (
            *(0.0, (False, False), "CAUSAL", window, False),
        )
        q, k, v, *unused, log_sum_exp, y = kept
        assert [x.shape for x in unused] == [(0,)] * 7
        weights = jnp.exp(logits(q, k, scale) - log_sum_exp[..., None])
        shared = q.shape[2] // k.shape[2]
        to_weights = jnp.einsum("BTNH,BSNH->BNTS", dy, jnp.repeat(v, shared, axis=2))
        to_logits = weights * (to_weights - (y * dy).sum(-1).swapaxes(1, 2)[..., None])
        dq = scale * jnp.einsum("BNTS,BSNH->BTNH", to_logits, jnp.repeat(k, shared, axis=2))
        dk = scale * jnp.einsum("BNTS,BTNH->BSNH", to_logits, q)
        dv = jnp.einsum("BNTS,BTNH->BSNH", weights, dy)
        dk, dv = (x.reshape(*k.shape[:3], shared, -1).sum(3) for x in (dk, dv))
        return dq, dk, dv, *[None] * 7

    monkeypatch.setattr(attention.cudnn, "dot_product_attention", forward)
    monkeypatch.setattr(attention.cudnn, "_dot_product_attention_bwd_rule", backward)
    inputs = arrays()
    got = value_and_gradients(
        lambda *x: attention._cudnn(*x, scale=0.3, window=window), *inputs, SINKS
    )
    check(got, reference(*inputs, scale=0.3, window=window, sinks=SINKS), 2e-6)


@pytest.mark.parametrize("window", [None, 7])
def test_cudnn_attention_pads_odd_lengths(monkeypatch, window):
    def kernel(q, k, v, *, scale, is_causal, local_window_size, implementation):
        assert q.shape[1] == k.shape[1] == 22 and is_causal and implementation == "cudnn"
        assert local_window_size == (None if window is None else (window - 1, 0))
        return whole(q, k, v, scale, window, None)

    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    inputs = arrays(length=21)
    got = value_and_gradients(lambda *x: attention._cudnn(*x, scale=0.3, window=window), *inputs)
    check(got, reference(*inputs, scale=0.3, window=window), 2e-6)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(
    "length, heads, groups, size", [(2048, 8, 8, 256), (600, 4, 1, 64), (256, 4, 4, 80)]
)
def test_splash_attention_lowers_for_a_tpu(length, heads, groups, size, sinks):
    shapes = [
        jax.ShapeDtypeStruct((1, length, n, size), jnp.bfloat16) for n in (heads, groups, groups)
    ]
    shapes += [jax.ShapeDtypeStruct((heads,), jnp.float32)] if sinks else []
    attend = lambda *x: attention._splash(*x, scale=0.1, window=300, softcap=30.0)  # noqa: E731
    loss = jax.jit(
        jax.value_and_grad(
            lambda *x: attend(*x).astype(jnp.float32).sum(), tuple(range(len(shapes)))
        )
    )
    text = loss.trace(*shapes).lower(lowering_platforms=("tpu",)).as_text()
    assert (
        text.count("tpu_custom_call") == 3
    )  # forwards, and backwards for queries and for keys and values


class Device:
    def __init__(self, platform, capability):
        self.platform, self.compute_capability = platform, capability


@pytest.mark.parametrize(
    "device, dtype, size, softcap, expected",
    [
        (Device("gpu", "9.0"), jnp.bfloat16, 256, None, "_cudnn"),
        (Device("gpu", "8.0"), jnp.bfloat16, 128, None, "_cudnn"),
        (Device("gpu", "8.0"), jnp.bfloat16, 256, None, None),
        (Device("gpu", "7.5"), jnp.float16, 64, None, None),
        (Device("gpu", "gfx942"), jnp.bfloat16, 64, None, None),
        (Device("gpu", "9.0"), jnp.float32, 64, None, None),
        (Device("gpu", "9.0"), jnp.bfloat16, 60, None, None),
        (Device("gpu", "9.0"), jnp.bfloat16, 64, 30.0, None),
        (Device("tpu", None), jnp.float32, 64, 30.0, "_splash"),
        (Device("cpu", None), jnp.bfloat16, 64, None, None),
    ],
)
def test_kernel_is_chosen_by_device(monkeypatch, device, dtype, size, softcap, expected):
    monkeypatch.setattr(jax, "devices", lambda: [device])
    kernel = attention._select_kernel(
        jax.ShapeDtypeStruct((2, 20, 4, size), dtype), 0.1, None, softcap
    )
    assert (kernel and kernel.func.__name__) == expected


# --- Several devices ----------------------------------------------------------------------------

MESHES = [(8, 1, 1), (2, 2, 2), (1, 2, 4), (1, 1, 8)]
"""(data, fsdp, tensor). The last but one splits more than the key-value heads, the last more than
all heads.
"""


def test_eight_devices_give_what_one_gives():
    """The fallback, and a kernel that sees only its own sequences and heads, in a process with eight
    devices.
    """
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "JAX_NUM_CPU_DEVICES": "8",
    }
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("equal") == 3 * len(MESHES) + 1


def check_fallback(shape):
    inputs = arrays(batch=8)
    attend = lambda *x: attention.attend(*x, scale=0.3, window=7, softcap=3.0)  # noqa: E731
    split = lambda *x: attend(*map(sharding.by_sequence, x))  # noqa: E731
    with jax.set_mesh(sharding.make_mesh(MeshConfig(*shape))):
        got = value_and_gradients(split, *inputs)
    check(got, reference(*inputs, scale=0.3, window=7, softcap=3.0), 2e-6)
    print("fallback equal on", shape)


def check_kernel(shape, batch=8, heads=4, groups=2, part=None):
    inputs = arrays(batch=batch, heads=heads, groups=groups)
    seen = set()

    def kernel(q, k, v):
        seen.add((len(q), q.shape[2], k.shape[2]))
        return whole(q, k, v, 0.3, None, None)

    with jax.set_mesh(sharding.make_mesh(MeshConfig(*shape))):
        got = value_and_gradients(lambda *x: attention._shard_kernel(kernel, *x), *inputs)
    check(got, reference(*inputs, scale=0.3), 2e-6)
    heads_of_one = {1: (4, 2), 2: (2, 1), 4: (1, 1), 8: (4, 2)}[shape[2]]
    assert seen == {part or (batch // (shape[0] * shape[1]), *heads_of_one)}
    print("kernel equal on", shape)


def check_sinks(shape):
    inputs = arrays(batch=8)
    kernel = lambda q, k, v, sinks: whole(q, k, v, 0.3, None, None, sinks)  # noqa: E731
    with jax.set_mesh(sharding.make_mesh(MeshConfig(*shape))):
        got = value_and_gradients(lambda *x: attention._shard_kernel(kernel, *x), *inputs, SINKS)
    check(got, reference(*inputs, scale=0.3, sinks=SINKS), 2e-6)
    print("sinks equal on", shape)


if __name__ == "__main__":
    attention.MAX_UNBLOCKED_QUERIES = attention.QUERY_BLOCK = 8
    for mesh_shape in MESHES:
        check_fallback(mesh_shape)
        check_kernel(mesh_shape)
        check_sinks(mesh_shape)
    check_kernel(
        (2, 2, 2), batch=3, heads=3, groups=3, part=(3, 3, 3)
    )  # what does not divide is not split
