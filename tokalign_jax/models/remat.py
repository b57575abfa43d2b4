"""What a layer keeps for its backward pass, and what it computes again there.

B batch, T length, D model, N heads, K key-value heads, H head size, F intermediate, L layers.

A layer's input is always kept. Results of matrix products are dear to compute again; norms,
rotations and activation functions cost next to nothing. So a policy says which products' results
are kept, and all else is computed again:

| policy | kept beside the layer's input | products computed again |
|---|---|---|
| `dots` | results of all projections, and of attention | none |
| `attention` | results of q_proj, k_proj, v_proj, and of attention | those of the feed-forward but the last, and o_proj |
| `layer` | nothing | all but the last |

What the backward pass has no use for is not kept: a product that is only added to the residual
stream, and where a layer is frozen, what only the gradients of its weights would need.
`activation_bytes` has the sizes.

To keep everything that autodiff would use is not offered: it holds three times the memory of `dots`
(float32 intermediates of norms, several copies of the feed-forward's width) and saves no product.
Nor is moving what is kept to host memory: `layer` keeps so little that there is next to nothing to
move.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from tokalign_jax.models.config import ModelConfig

Policy = Literal["dots", "attention", "layer"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
"""From the most memory to the least, and from the least work to the most."""

ATTENTION = "attention"
"""Checkpoint name of what attention takes and gives: results of q_proj, k_proj and v_proj, and the
kernel's.
"""
PROJECTED = "projected"
"""Checkpoint name of the results of all other projections."""

_KEPT = {"dots": (ATTENTION, PROJECTED), "attention": (ATTENTION,), "layer": ()}
_CUDNN = "dot_product_attention_fwd_wrapper"
"""The primitive of cuDNN's attention; its results (the log-sum-exp among them) cannot be named."""


def wrap(body: Callable, policy: Policy, in_loop: bool = True) -> Callable:
    """`body` of a scan over layers, which keeps for the backward pass what `policy` says.

    Args:
      in_loop: the scan is compiled to a loop.

    Raises:
      ValueError: unknown policy.
    """
    if policy not in POLICIES:
        raise ValueError(f"unknown remat policy {policy!r}: one of {', '.join(POLICIES)}")
    kept = _KEPT[policy]

    def keeps(primitive: Any, *_: Any, **params: Any) -> bool:
        return (
            params.get("name") in kept
            if primitive.name == "name"
            else primitive.name == _CUDNN and ATTENTION in kept
        )

    # Inside a loop XLA cannot undo the recomputation, so nothing needs to be held against that.
    return jax.checkpoint(body, prevent_cse=not in_loop, policy=keeps)


def activation_bytes(config: ModelConfig, policy: Policy, dtype: DTypeLike) -> int:
    """Bytes that all layers keep from the forward to the backward pass, per token of what a device
    holds at once.

    Exact for layers that train, with fused attention; the einsum fallback keeps no log-sum-exp (4 N
    bytes a layer), and frozen layers with a parallel residual keep N H elements a layer less there.
    Besides, a device needs room to work on one layer and on one chunk of logits.

    Args:
      dtype: type of the activations.
    """
    size = jnp.dtype(dtype).itemsize
    elements, floats = config.hidden_size, 0
    if policy == "dots":
        if config.experts:
            # The router's and the shared expert's; what the other experts compute is not kept.
            floats += config.experts.count
            elements += 2 * (config.experts.shared_size or 0)
            elements += config.experts.shared_gate
        else:
            elements += (2 if config.gated_mlp else 1) * config.intermediate_size
        normed_after = config.norm_placement != "before"
        # Results that are only added to the residual stream are of no use backwards.
        elements += config.hidden_size * (normed_after or not config.parallel_residual)
        elements += config.hidden_size * normed_after
    layers = config.num_layers * (elements * size + 4 * floats)
    return layers + sum(
        _mixer_bytes(config, kind.mixer, policy, size) for kind in config.layer_kinds
    )


def _mixer_bytes(config: ModelConfig, mixer: str, policy: Policy, size: int) -> int:
    """What one layer's mixer keeps, beside its result, per token."""
    heads = config.num_heads * config.head_dim
    match mixer:
        case "attention" if policy != "layer":
            elements = 2 * heads + 2 * config.num_kv_heads * config.head_dim
            elements += heads if config.attention_gate and policy == "dots" else 0
            return size * elements + 4 * config.num_heads
        case "delta" if policy == "dots" and config.delta:
            delta = config.delta
            keys, values = delta.num_key_heads * delta.key_dim, delta.num_value_heads
            return size * 2 * (keys + values * delta.value_dim + values)
        case "convolution" if policy == "dots":
            return size * 3 * config.hidden_size
    return 0
