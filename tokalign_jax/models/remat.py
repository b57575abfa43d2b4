"""Rematerialization policies: which activations of a layer are saved for the backward pass.

Dimensions: B batch, T length, D model, N heads, K key-value heads, H head size, F intermediate, L
layers.

A layer's input is always saved. Matrix products are expensive to recompute; norms, rotations and
activation functions cost next to nothing. A policy therefore names the products whose results are
saved; everything else is recomputed (scales of float8 operands, which are scalars, are always
saved):

| policy | saved results besides the layer's input | recomputed products |
|---|---|---|
| `dots` | all projections and attention | none |
| `attention` | q_proj, k_proj, v_proj and attention | feed-forward but its last, o_proj |
| `layer` | nothing | all but the last |

Results that the backward pass does not use are not saved: products that are only added to the
residual stream and, in frozen layers, inputs of weight gradients. `activation_bytes` computes the
sizes.

Two policies are left out. Saving everything that autodiff would use takes three times the memory of
`dots` (float32 intermediates of norms, several copies of the feed-forward's width) and saves no
product. Offloading to host memory has little to gain, since `layer` already saves next to nothing.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from tokalign_jax.models.config import ModelConfig

Policy = Literal["dots", "attention", "layer"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
"""In order of decreasing memory and increasing recomputation."""

ATTENTION = "attention"
"""Checkpoint name of the results of q_proj, k_proj, v_proj and of the attention kernel."""
PROJECTIONS = "projections"
"""Checkpoint name of the results of all other projections."""
SCALES = "scales"
"""Checkpoint name of scalars that would take a pass over an array to recompute (`float8`)."""

_SAVED_NAMES = {
    "dots": (ATTENTION, PROJECTIONS, SCALES),
    "attention": (ATTENTION, SCALES),
    "layer": (SCALES,),
}
_CUDNN = "dot_product_attention_fwd_wrapper"
"""The primitive of cuDNN's attention: its results (such as the log-sum-exp) cannot be named."""


def wrap(body: Callable, policy: Policy, in_loop: bool = True) -> Callable:
    """Wraps the body of a scan over layers in `jax.checkpoint` under `policy`.

    Args:
      body: computes one layer.
      policy: one of `POLICIES`.
      in_loop: the scan is compiled to a loop.

    Raises:
      ValueError: unknown policy.
    """
    if policy not in POLICIES:
        raise ValueError(f"unknown remat policy {policy!r}: one of {', '.join(POLICIES)}")
    names = _SAVED_NAMES[policy]

    def is_saved(primitive: Any, *_: Any, **params: Any) -> bool:
        return (
            params.get("name") in names
            if primitive.name == "name"
            else primitive.name == _CUDNN and ATTENTION in names
        )

    # Within a loop, common subexpression elimination cannot undo the recomputation.
    return jax.checkpoint(body, prevent_cse=not in_loop, policy=is_saved)


def activation_bytes(config: ModelConfig, policy: Policy, dtype: DTypeLike) -> int:
    """Returns the bytes that all layers save for the backward pass, per token on a device.

    Exact for layers that train, with fused attention; the einsum fallback saves no log-sum-exp (4 N
    bytes per layer less), and frozen layers with a parallel residual save N H elements per layer
    less. A device also needs memory to process one layer and one chunk of logits.

    Args:
      config: the model.
      policy: the rematerialization policy.
      dtype: dtype of the activations.
    """
    size = jnp.dtype(dtype).itemsize
    elements = config.hidden_size
    if policy == "dots":
        norm_after = config.norm_placement != "before"
        # Results that are only added to the residual stream are not saved.
        elements += config.hidden_size * (norm_after or not config.parallel_residual)
        elements += config.hidden_size * norm_after
    return config.num_layers * elements * size + sum(
        _mixer_bytes(config, kind.mixer, policy, size)
        + (_feed_forward_bytes(config, kind.feed_forward, size) if policy == "dots" else 0)
        for kind in config.layer_kinds
    )


def _feed_forward_bytes(config: ModelConfig, feed_forward: str, size: int) -> int:
    """Returns the bytes per token that one layer's feed-forward saves besides its result."""
    if feed_forward == "mlp" and config.experts:
        # The router's and the shared expert's; results of the other experts are not saved.
        shared = 2 * (config.experts.shared_size or 0) + config.experts.shared_gate
        return size * shared + 4 * config.experts.count
    width = config.dense_size if feed_forward == "dense_mlp" else config.intermediate_size
    return size * (2 if config.gated_mlp else 1) * (width or 0)


def _mixer_bytes(config: ModelConfig, mixer: str, policy: Policy, size: int) -> int:
    """Returns the bytes per token that one layer's mixer saves besides its result."""
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
