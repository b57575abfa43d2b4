"""Causal attention: one function, and the fastest exact way to compute it on each platform.

B batch, T queries, S keys, N query heads, K key-value heads (query head n reads key-value head n K
/ N), H head size.

- GPU: cuDNN's flash attention. It has no soft-cap, takes half precision only, and knows head sizes
  up to a bound.
- TPU: splash attention, jax's own fused kernel: causal and local masks, soft-cap, grouped heads.
- Everywhere else, and for what a kernel cannot do: einsum and softmax in float32. Over long
  sequences it takes the queries block by block and computes each block's logits again in the
  backward pass, so that [B, N, T, S] never exists.

`jax.nn.dot_product_attention` on XLA is the same einsum and softmax (products with float32 sums,
float32 softmax), but it has no soft-cap and keeps float32 logits of all T x S pairs for the
backward pass. tokamax has fused kernels with a soft-cap for recent GPUs too, but needs a profiler
among others and is before its 0.1: not worth a dependency for one family of models.

The kernels are opaque to the partitioner, so under a mesh they run in a shard_map: B over (data,
fsdp), heads over tensor. The rest is left to the partitioner.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
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
"""Queries whose logits exist at once in the blocked fallback."""
LONGEST_WHOLE = 256
"""Up to this many queries the fallback takes them all at once; from there on blocks are faster too,
not only leaner.
"""
_LANES = 128
"""A TPU tile's width: splash attention takes lengths that are multiples of it."""

_Kernel = Callable[[Array, Array, Array], Array]


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    mask: Bool[Array, "*B T S"] | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(cap(scale q k^T)) v over the keys that each query sees, softmax in float32, in the
    type of `q`.

    Args: scale: factor of the logits. window: a query sees this many latest keys, itself included;
      None: all before it. softcap: c of cap(x) = c tanh(x / c), applied before the mask; None: no
      cap. mask: which keys each query sees, the same for all heads; None: causal, T being S. It
      says all, so that `window`
        must be in it.

    Raises:
      ValueError: heads that do not divide; a mask and a window; no mask, and T is not S.
    """
    (length, heads), (keys, groups) = q.shape[1:3], k.shape[1:3]
    if heads % groups:
        raise ValueError(
            f"{heads} query heads cannot share {groups} key-value heads: need a multiple"
        )
    if mask is not None:
        if window is not None:
            raise ValueError(f"a window of {window} beside a mask: put it in the mask")
        return _whole(q, k, v, mask, scale, softcap)
    if length != keys:
        raise ValueError(f"causal attention of {length} queries over {keys} keys: give a mask")
    window = None if window is None or window >= length else window
    kernel = _fused(q, scale, window, softcap)
    if kernel is not None:
        return _over_mesh(kernel, q, k, v)
    if length <= LONGEST_WHOLE:
        positions = jnp.arange(length)
        y = _whole(q, k, v, _visible(positions, positions, window), scale, softcap)
    else:
        y = _blocked(q, k, v, scale, window, softcap, QUERY_BLOCK)
    return checkpoint_name(y, remat.ATTENTION)


# --- Fused kernels ------------------------------------------------------------------------------


def _fused(
    q: Float[Array, "B T N H"], scale: float, window: int | None, softcap: float | None
) -> _Kernel | None:
    """The device's own kernel for causal attention, if it has one for this."""
    device = jax.devices()[0]
    if not has_kernel(q.shape[-1], q.dtype, softcap, device):
        return None
    if device.platform == "tpu":
        return functools.partial(_splash, scale=scale, window=window, softcap=softcap)
    return functools.partial(_cudnn, scale=scale, window=window)


def has_kernel(head_dim: int, dtype: DTypeLike, softcap: float | None, device: Any = None) -> bool:
    """Whether the device has a kernel of its own for heads of this size, which keeps no logits. No
    device: an NVIDIA one since Hopper.
    """
    if device is not None and device.platform == "tpu":
        return True
    half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    return softcap is None and half and head_dim % 8 == 0 and head_dim <= _largest_head(device)


def _largest_head(device: Any) -> int:
    """The largest head size of cuDNN's flash attention on this device: 0 if it is not NVIDIA's or
    too old.
    """
    capability = "9.0" if device is None else str(getattr(device, "compute_capability", ""))
    if not capability.replace(".", "").isdigit() or float(capability) < 8:
        return 0
    return 256 if float(capability) >= 9 else 128


def _cudnn(q: Array, k: Array, v: Array, *, scale: float, window: int | None) -> Array:
    before = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=True, local_window_size=before, implementation="cudnn"
    )


def _splash(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    interpret: bool = False,
) -> Array:
    """Queries and keys are filled up to whole tiles at the end, where causality hides them."""
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

    y = jax.vmap(kernel)(
        heads_first((q.astype(jnp.float32) * scale).astype(q.dtype)), heads_first(k), heads_first(v)
    )
    return y.swapaxes(1, 2)[:, :length]


def _over_mesh(kernel: _Kernel, q: Array, k: Array, v: Array) -> Array:
    """`kernel` on each device's own sequences and heads, under the mesh in context if there is one.

    What does not divide is not split: each device then computes it whole. Where key-value heads are
    too few to be split, they are repeated, one for each query head.
    """
    mesh = sharding.current()
    if mesh is None:
        return kernel(q, k, v)
    batch = sharding.BATCH if len(q) % sharding.sequences_at_once(mesh) == 0 else None
    parts = mesh.shape[sharding.TENSOR]
    heads = sharding.TENSOR if q.shape[2] % parts == 0 else None
    if heads and k.shape[2] % parts:
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    spec = PartitionSpec(batch, None, heads)
    # Pallas and cuDNN calls say nothing of how their results vary over the mesh, so that is not
    # checked.
    return jax.shard_map(kernel, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)(q, k, v)


# --- The fallback -------------------------------------------------------------------------------


def _whole(q: Array, k: Array, v: Array, mask: Array, scale: float, softcap: float | None) -> Array:
    """All queries at once, by what `mask` [*B, T, S] lets them see."""
    batch, length, heads, size = q.shape
    # A product of half-precision arrays with float32 sums, backwards too: `preferred_element_type`
    # alone would make the backward products float32 ones.
    exact = {
        jnp.bfloat16: jax.lax.DotAlgorithmPreset.BF16_BF16_F32,
        jnp.float16: jax.lax.DotAlgorithmPreset.F16_F16_F32,
    }
    grouped = q.reshape(batch, length, k.shape[2], -1, size)
    logits = scale * jnp.einsum(
        "BTKGH,BSKH->BKGTS",
        grouped,
        k,
        precision=exact.get(q.dtype.type),
        preferred_element_type=jnp.float32,
    )
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    logits = jnp.where(mask[..., None, None, :, :], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v).reshape(batch, length, heads, size)


def _blocked(
    q: Array,
    k: Array,
    v: Array,
    scale: float,
    window: int | None,
    softcap: float | None,
    block: int,
) -> Array:
    """Causal, `block` queries at a time over the keys that any of them sees, in O(T block) memory."""
    batch, length, *head = q.shape
    blocks = -(-length // block)
    filled = jnp.pad(q, ((0, 0), (0, blocks * block - length), (0, 0), (0, 0)))
    span = length if window is None else min(length, window - 1 + block)

    @jax.checkpoint
    def one_block(item: tuple[Array, Array]) -> Array:
        start, queries = item
        first = jnp.clip(start + block - span, 0, length - span)
        # Sums over the blocks of what goes back to keys and values are float32 ones.
        near_k, near_v = (
            jax.lax.dynamic_slice_in_dim(x, first, span, axis=1).astype(q.dtype)
            for x in (wide_k, wide_v)
        )
        mask = _visible(start + jnp.arange(block), first + jnp.arange(span), window)
        return _whole(queries, near_k, near_v, mask, scale, softcap)

    wide_k, wide_v = (x.astype(jnp.float32) for x in (k, v))
    queries = filled.reshape(batch, blocks, block, *head).swapaxes(0, 1)
    y = jax.lax.map(one_block, (block * jnp.arange(blocks), queries))
    return y.swapaxes(0, 1).reshape(batch, blocks * block, *head)[:, :length]


def _visible(queries: Array, keys: Array, window: int | None) -> Bool[Array, "T S"]:
    """Which keys are not after a query, nor `window` or more before it; all by position."""
    distance = queries[:, None] - keys
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)
