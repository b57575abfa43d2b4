"""Causal attention with the fastest exact implementation on each platform.

Dimensions: B batch, T queries, S keys, N query heads, K key-value heads (query head n reads
key-value head n K / N), H head size.

- GPU: cuDNN's flash attention. It has no soft-cap, supports half precision only, and limits the
  head size.
- TPU: splash attention, JAX's fused Pallas kernel: causal and local masks, soft-cap, grouped heads.
- Otherwise: einsum and softmax in float32. Over long sequences the queries are processed in blocks
  whose logits are recomputed in the backward pass, so that [B, N, T, S] is never materialized.

`jax.nn.dot_product_attention` on XLA computes the same (products with float32 sums, float32
softmax), but has no soft-cap and keeps the float32 logits of all T x S pairs for the backward pass.
tokamax has fused kernels with a soft-cap for recent GPUs too, but it is before its 0.1 and depends
on a profiler among others: not worth a dependency for one family of models.

Attention sinks (arXiv 2309.17453, with gpt-oss's learned logit per head) add exp(sink) to the
softmax's denominator. Splash attention has them. cuDNN's kernel, as XLA calls it, has not, but
returns the log-sum-exp l of the logits: its result is multiplied by sigmoid(l - sink), and its
backward pass is given that product and the log-sum-exp with the sink, which makes it the gradient
of the whole (`_cudnn_with_sinks`).

The kernels are opaque to the partitioner, so under a mesh they run in a shard_map: B over (data,
fsdp), heads over tensor. The fallback is left to the partitioner.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from tokalign_jax.models import remat
from tokalign_jax.parallel import sharding

QUERY_BLOCK = 256
"""Number of queries per block in the blocked fallback."""
MAX_UNBLOCKED_QUERIES = 256
"""Longest sequence for which the fallback is not blocked; beyond it blocks are also faster."""
_LANES = 128
"""Width of a TPU tile: splash attention requires lengths that are multiples of it."""

_Kernel = Callable[..., Array]
"""(q, k, v) or (q, k, v, sinks) -> result."""


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    scale: float,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    mask: Bool[Array, "*B T S"] | None = None,
    sinks: Float[Array, "N"] | None = None,
) -> Float[Array, "B T N H"]:
    """Computes softmax(cap(scale q k^T)) v over the visible keys of each query.

    The softmax is in float32, the result in the dtype of `q`.

    Args:
      q: queries.
      k: keys.
      v: values.
      scale: factor of the logits.
      window: number of latest keys that a query sees, itself included; None for all before it.
      chunk: a query sees the keys in its own chunk of this many positions; None for all.
      softcap: c of cap(x) = c tanh(x / c), applied before the mask; None for no cap.
      mask: the keys that each query sees, shared by all heads; it must include any window and
        chunks. None for causal attention, where T = S.
      sinks: logits of one more key for each head, whose value is zero; None for none.

    Raises:
      ValueError: N is not a multiple of K, a mask is given and a window or chunks too, or T
        differs from S without a mask.
    """
    (length, heads), (keys, groups) = q.shape[1:3], k.shape[1:3]
    if heads % groups:
        raise ValueError(f"{heads} query heads are not a multiple of {groups} key-value heads")
    if mask is not None:
        if window is not None or chunk is not None:
            raise ValueError(
                f"a mask and window={window}, chunk={chunk} given: include these in the mask"
            )
        return _dense_attention(q, k, v, mask, scale, softcap, sinks)
    if length != keys:
        raise ValueError(f"causal attention needs T = S, got {length} and {keys}: pass a mask")
    if chunk is not None and chunk < length:
        options = {"scale": scale, "window": window, "softcap": softcap, "sinks": sinks}
        return _in_chunks(functools.partial(attend, **options), q, k, v, chunk)
    window = None if window is None or window >= length else window
    kernel = _select_kernel(q, scale, window, softcap)
    if kernel is not None:
        return _shard_kernel(kernel, q, k, v, sinks)
    if length <= MAX_UNBLOCKED_QUERIES:
        positions = jnp.arange(length)
        mask = _causal_mask(positions, positions, window)
        y = _dense_attention(q, k, v, mask, scale, softcap, sinks)
    else:
        y = _blocked_attention(q, k, v, scale, window, softcap, QUERY_BLOCK, sinks)
    return checkpoint_name(y, remat.ATTENTION)


def _in_chunks(attend: _Kernel, q: Array, k: Array, v: Array, chunk: int) -> Array:
    """Computes `attend` within chunks of the sequences, as if each were a sequence."""
    batch, length, *head = q.shape

    def split(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, -length % chunk), (0, 0), (0, 0)))
        return x.reshape(-1, chunk, *x.shape[2:])

    return attend(split(q), split(k), split(v)).reshape(batch, -1, *head)[:, :length]


# --- Fused kernels ------------------------------------------------------------------------------


def _select_kernel(
    q: Float[Array, "B T N H"], scale: float, window: int | None, softcap: float | None
) -> _Kernel | None:
    """Returns the device's fused kernel for causal attention, or None if it has no suitable one."""
    device = jax.devices()[0]
    if not has_kernel(q.shape[-1], q.dtype, softcap, device):
        return None
    if device.platform == "tpu":
        return functools.partial(_splash, scale=scale, window=window, softcap=softcap)
    return functools.partial(_cudnn, scale=scale, window=window)


def has_kernel(head_dim: int, dtype: DTypeLike, softcap: float | None, device: Any = None) -> bool:
    """Tells if `device` has a fused attention kernel for this head size, dtype and soft-cap.

    Without a device, assumes an NVIDIA GPU of the Hopper generation or later.
    """
    if device is not None and device.platform == "tpu":
        return True
    is_half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    return softcap is None and is_half and head_dim % 8 == 0 and head_dim <= _max_head_dim(device)


def _max_head_dim(device: Any) -> int:
    """Returns the largest head size of cuDNN's flash attention; 0 without an NVIDIA GPU >= 8.0."""
    capability = "9.0" if device is None else str(getattr(device, "compute_capability", ""))
    if not capability.replace(".", "").isdigit() or float(capability) < 8:
        return 0
    return 256 if float(capability) >= 9 else 128


def _cudnn(
    q: Array,
    k: Array,
    v: Array,
    sinks: Array | None = None,
    *,
    scale: float,
    window: int | None,
) -> Array:
    """Flash attention by cuDNN; pads odd lengths at the end, which the causal mask hides.

    JAX refuses gradients of odd lengths, which cuDNN does not support with a bias: it takes its
    placeholder of an absent bias for one (0.10 and 0.11).
    """
    if (length := q.shape[1]) % 2:
        q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
        return _cudnn(q, k, v, sinks, scale=scale, window=window)[:, :length]
    if sinks is not None:
        return _cudnn_with_sinks(q, k, v, sinks.astype(jnp.float32), scale, window)
    left_window = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        is_causal=True,
        local_window_size=left_window,
        implementation="cudnn",
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _cudnn_with_sinks(
    q: Array, k: Array, v: Array, sinks: Float[Array, "N"], scale: float, window: int | None
) -> Array:
    return _cudnn_with_sinks_forward(q, k, v, sinks, scale, window)[0]


def _cudnn_with_sinks_forward(
    q: Array, k: Array, v: Array, sinks: Array, scale: float, window: int | None
) -> tuple[Array, tuple[Array, ...]]:
    # jax.nn.dot_product_attention would round the log-sum-exp to the dtype of the result.
    attend: Any = functools.partial(
        cudnn.dot_product_attention,
        scale=scale,
        mask_type=cudnn.MaskType.CAUSAL,
        sliding_window_length=window,
        return_residual=True,
    )
    # `jax.vjp` for its forward pass alone: it is the primitive that remat policies know, which is
    # hidden in a call otherwise.
    (y, log_sum_exp), _ = jax.vjp(attend, q, k, v)
    return _without_share_of_sink(y, log_sum_exp, sinks), (q, k, v, sinks, y, log_sum_exp)


def _without_share_of_sink(
    y: Float[Array, "B T N H"], log_sum_exp: Float[Array, "B N T"], sinks: Float[Array, "N"]
) -> Float[Array, "B T N H"]:
    """Turns the result of a softmax without the sink to that with it."""
    share = jax.nn.sigmoid(log_sum_exp - sinks[:, None]).swapaxes(1, 2)[..., None]
    return (y.astype(jnp.float32) * share).astype(y.dtype)


def _cudnn_with_sinks_backward(
    scale: float, window: int | None, residuals: tuple[Array, ...], gradient: Array
) -> tuple[Array, ...]:
    """Computes gradients by cuDNN's backward pass.

    It derives the softmax from the log-sum-exp, and the gradient of the softmax's denominator from
    the product of result and gradient, so that both with the sink give the gradients with it.
    """
    q, k, v, sinks, y, log_sum_exp = residuals
    y = _without_share_of_sink(y, log_sum_exp, sinks)
    log_sum_exp = jnp.logaddexp(log_sum_exp, sinks[:, None])
    unused = [jnp.zeros(0, q.dtype)] * 7
    dq, dk, dv, *_ = cudnn._dot_product_attention_bwd_rule(
        scale,
        42,  # The seed of a dropout that is zero.
        0.0,
        (False, False),
        cudnn.MaskType.CAUSAL,
        cudnn.AttentionLayout.BTNH.value,
        window,
        True,
        False,
        (q, k, v, *unused, log_sum_exp, y),
        gradient,
    )
    by_query = (y.astype(jnp.float32) * gradient.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
    to_sinks = -(jnp.exp(sinks[:, None] - log_sum_exp) * by_query).sum((0, 2))
    return dq, dk, dv, to_sinks


_cudnn_with_sinks.defvjp(_cudnn_with_sinks_forward, _cudnn_with_sinks_backward)


def _splash(
    q: Array,
    k: Array,
    v: Array,
    sinks: Array | None = None,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    interpret: bool = False,
) -> Array:
    """Splash attention; pads the sequence end to whole tiles, which the causal mask hides."""
    length, heads = q.shape[1:3]
    padded = length + -length % _LANES
    shape = padded, padded
    if window is None:
        mask = splash_attention_mask.CausalMask(shape)
    else:
        mask = splash_attention_mask.LocalMask(shape, (window - 1, 0), offset=0)
    block = next(size for size in (512, 256, _LANES) if padded % size == 0)
    blocks = splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    kernel: Any = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * heads),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=remat.ATTENTION,
        interpret=interpret,
    )

    def heads_first(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, padded - length), (0, 0), (0, 0))).swapaxes(1, 2)

    y = jax.vmap(functools.partial(kernel, sinks=sinks))(
        heads_first((q.astype(jnp.float32) * scale).astype(q.dtype)), heads_first(k), heads_first(v)
    )
    return y.swapaxes(1, 2)[:, :length]


def _shard_kernel(
    kernel: _Kernel, q: Array, k: Array, v: Array, sinks: Array | None = None
) -> Array:
    """Runs `kernel` per device on its own sequences and heads, under the current mesh if any.

    A dimension that is not divisible by its mesh axis is replicated. If there are too few key-value
    heads to shard, they are repeated, one for each query head.
    """
    mesh = sharding.current()
    with_sinks = () if sinks is None else (sinks,)
    if mesh is None:
        return kernel(q, k, v, *with_sinks)
    batch = sharding.BATCH if len(q) % sharding.sequences_at_once(mesh) == 0 else None
    parts = mesh.shape[sharding.TENSOR]
    heads = sharding.TENSOR if q.shape[2] % parts == 0 else None
    if heads and k.shape[2] % parts:
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    spec = PartitionSpec(batch, None, heads)
    # Pallas and cuDNN calls do not declare how results vary over the mesh: skip that check.
    specs = (spec,) * 3 + (PartitionSpec(heads),) * len(with_sinks)
    return sharding.shard_map(kernel, specs, spec)(q, k, v, *with_sinks)


# --- Fallback -----------------------------------------------------------------------------------


def _dense_attention(
    q: Array,
    k: Array,
    v: Array,
    mask: Array,
    scale: float,
    softcap: float | None,
    sinks: Array | None = None,
) -> Array:
    """Attention with the logits of all queries at once, under a `mask` [*B, T, S]."""
    batch, length, heads, size = q.shape
    # Half-precision products with float32 sums, in the backward pass too: with
    # `preferred_element_type` alone the backward products would be in float32.
    algorithms = {
        jnp.bfloat16: jax.lax.DotAlgorithmPreset.BF16_BF16_F32,
        jnp.float16: jax.lax.DotAlgorithmPreset.F16_F16_F32,
    }
    grouped = q.reshape(batch, length, k.shape[2], -1, size)
    logits = scale * jnp.einsum(
        "BTKGH,BSKH->BKGTS",
        grouped,
        k,
        precision=algorithms.get(q.dtype.type),
        preferred_element_type=jnp.float32,
    )
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    logits = jnp.where(mask[..., None, None, :, :], logits, jnp.finfo(jnp.float32).min)
    weights = _softmax(logits, sinks).astype(v.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v).reshape(batch, length, heads, size)


def _softmax(
    logits: Float[Array, "B K G T S"], sinks: Float[Array, "KG"] | None
) -> Float[Array, "B K G T S"]:
    """Returns the softmax over the keys, with the sinks in its denominator."""
    if sinks is None:
        return jax.nn.softmax(logits, axis=-1)
    sink = sinks.astype(jnp.float32).reshape(logits.shape[1:3])[..., None, None]
    largest = jax.lax.stop_gradient(jnp.maximum(logits.max(-1, keepdims=True), sink))
    weights = jnp.exp(logits - largest)
    return weights / (weights.sum(-1, keepdims=True) + jnp.exp(sink - largest))


def _blocked_attention(
    q: Array,
    k: Array,
    v: Array,
    scale: float,
    window: int | None,
    softcap: float | None,
    block: int,
    sinks: Array | None = None,
) -> Array:
    """Causal attention, `block` queries at a time, in O(T block) memory."""
    batch, length, *head = q.shape
    blocks = -(-length // block)
    padded = jnp.pad(q, ((0, 0), (0, blocks * block - length), (0, 0), (0, 0)))
    span = length if window is None else min(length, window - 1 + block)

    @jax.checkpoint
    def one_block(item: tuple[Array, Array]) -> Array:
        start, queries = item
        first = jnp.clip(start + block - span, 0, length - span)
        # Slices of float32 arrays, so that the gradients of keys and values are summed over blocks
        # in float32.
        block_k, block_v = (
            jax.lax.dynamic_slice_in_dim(x, first, span, axis=1).astype(q.dtype) for x in (k32, v32)
        )
        mask = _causal_mask(start + jnp.arange(block), first + jnp.arange(span), window)
        return _dense_attention(queries, block_k, block_v, mask, scale, softcap, sinks)

    k32, v32 = (x.astype(jnp.float32) for x in (k, v))
    queries = padded.reshape(batch, blocks, block, *head).swapaxes(0, 1)
    y = jax.lax.map(one_block, (block * jnp.arange(blocks), queries))
    return y.swapaxes(0, 1).reshape(batch, blocks * block, *head)[:, :length]


def _causal_mask(queries: Array, keys: Array, window: int | None) -> Bool[Array, "T S"]:
    """Returns the mask of keys at or before a query and fewer than `window` positions before it."""
    distance = queries[:, None] - keys
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)
