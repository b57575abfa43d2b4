"""Matrix products with float8 operands (arXiv 2209.05433), for training.

Operands of the forward product are e4m3 (4 exponent and 3 mantissa bits), the output gradient of
both backward products is e5m2. Each operand has one scale, chosen anew for each product from its
largest magnitude.

A scale is a power of two. Scaling is then exact in every type, so that a scale that is twice as
large as needed only costs the smallest values, and a result hardly depends on which sequences are
computed together, or on how devices divide them.

The operands of the dots are float8 arrays and the only scaling afterwards is by a scalar: XLA's
GPU compiler turns that into cuBLASLt's float8 kernels, scale included. Other backends widen the
operands.
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tokalign_jax.models import remat as rematerialization

Matmul = Literal["dtype", "float8"]
"""How the projections of the layers are computed: in the dtype of the activations, or in float8."""

FORWARD, GRADIENT = jnp.float8_e4m3fn, jnp.float8_e5m2
"""Types of the operands of the forward product, and of the output gradient."""

MULTIPLE = 16
"""The sizes of a kernel must be multiples of it: cuBLASLt has no float8 kernel for others."""

_MIN_CAPABILITY = 8.9
"""Compute capability from which on NVIDIA GPUs have float8 tensor cores."""
_MAX_EXPONENT = 60
"""Bound of a scale's exponent: products of two scales and their inverses are normal numbers."""


def product(x: Float[Array, "*B in"], kernel: Float[Array, "in out"]) -> Float[Array, "*B out"]:
    """Returns x W in the dtype of `x`, in float8 if W's sizes allow it.

    Gradients have the dtypes of `x` and `kernel`. Scales are saved under every rematerialization
    policy: they are scalars, and each takes a pass over its operand.

    Args:
      x: activations.
      kernel: W, in the dtype of `x`.
    """
    if not fits(kernel.shape):
        return x @ kernel
    scales = (
        checkpoint_name(scale(jax.lax.stop_gradient(operand), FORWARD), rematerialization.SCALES)
        for operand in (x, kernel)
    )
    return _product(x, kernel, *scales)


def fits(shape: tuple[int, ...]) -> bool:
    """Returns whether a kernel [..., in, out] of this shape is multiplied in float8."""
    return all(size % MULTIPLE == 0 for size in shape[-2:])


def scale(x: Float[Array, "..."], dtype: DTypeLike) -> Float[Array, ""]:
    """Returns the largest power of two by which `x` fits the range of a float8 type, in float32.

    1 for zeros. If `x` is not finite, neither is the scaled array in that type.
    """
    largest = jnp.abs(x).max().astype(jnp.float32)
    mantissa, exponent = jnp.frexp(largest)
    top_mantissa, top_exponent = jnp.frexp(jnp.finfo(dtype).max.astype(jnp.float32))
    exponent = top_exponent - exponent - (mantissa > top_mantissa)
    exponent = jnp.clip(exponent, -_MAX_EXPONENT, _MAX_EXPONENT)
    return jnp.where(largest > 0, jnp.ldexp(jnp.float32(1), exponent), 1)


def quantize(x: Float[Array, "..."], scale: Float[Array, ""], dtype: DTypeLike) -> Array:
    """Returns `x` times its scale in a float8 type, rounded to nearest."""
    return (x * scale.astype(x.dtype)).astype(dtype)


@jax.custom_vjp
def _product(
    x: Float[Array, "*B in"],
    kernel: Float[Array, "in out"],
    x_scale: Float[Array, ""],
    kernel_scale: Float[Array, ""],
) -> Float[Array, "*B out"]:
    return _product_forward(x, kernel, x_scale, kernel_scale)[0]


def _product_forward(x: Array, kernel: Array, x_scale: Array, kernel_scale: Array) -> Any:
    operands = quantize(x, x_scale, FORWARD), quantize(kernel, kernel_scale, FORWARD)
    contracted = (x.ndim - 1,), (0,)
    y = _dot(*operands, contracted, x_scale * kernel_scale, x.dtype, jax.lax.Precision.DEFAULT)
    return y, (*operands, x_scale, kernel_scale)


def _product_backward(residuals: tuple[Array, ...], gradient: Float[Array, "*B out"]):
    """Returns the gradients; that of a frozen kernel is unused, so the compiler drops its product.

    The precision makes cuBLASLt sum in float32; by default its sums have fewer bits, which is as
    fast as it gets and good enough for the forward product.
    """
    x, kernel, x_scale, kernel_scale = residuals
    gradient_scale = scale(gradient, GRADIENT)
    quantized = quantize(gradient, gradient_scale, GRADIENT)
    dtype, precision = gradient.dtype, jax.lax.Precision.HIGHEST
    batch, last = tuple(range(x.ndim - 1)), (gradient.ndim - 1,)
    x_gradient = _dot(
        quantized, kernel, (last, (1,)), gradient_scale * kernel_scale, dtype, precision
    )
    kernel_gradient = _dot(x, quantized, (batch, batch), x_scale * gradient_scale, dtype, precision)
    return x_gradient, kernel_gradient, None, None


_product.defvjp(_product_forward, _product_backward)


def _dot(
    a: Array,
    b: Array,
    contracted: tuple[tuple[int, ...], tuple[int, ...]],
    scales: Float[Array, ""],
    dtype: Any,
    precision: jax.lax.Precision,
) -> Array:
    """Contracts two float8 arrays and divides by the product of their scales, exactly."""
    y = jax.lax.dot_general(
        a, b, (contracted, ((), ())), precision=precision, preferred_element_type=dtype
    )
    return y * (1 / scales).astype(dtype)


# --- What a run says ----------------------------------------------------------------------------


def messages(leaves: Mapping[str, Any], device: Any) -> list[str]:
    """Returns what a log should say about a model's products in float8.

    Args:
      leaves: arrays or shapes of the parameters by path.
      device: one of the devices that train.
    """
    projections = {
        path.removesuffix("/kernel"): leaf.shape
        for path, leaf in leaves.items()
        if path.startswith("layers/") and path.endswith("_proj/kernel")
    }
    experts = {name for name, shape in projections.items() if len(shape) > 3}
    others = [
        f"{name} ({shape[-2]} x {shape[-1]})"
        for name, shape in projections.items()
        if name not in experts and not fits(shape)
    ]
    lines = []
    if others:
        lines.append(
            f"not in float8, since their sizes are no multiples of {MULTIPLE}: {', '.join(others)}"
        )
    if experts:
        lines.append("products of experts are not in float8")
    if not has_kernels(device):
        lines.append(
            f"{device.device_kind} has no float8 matrix products that XLA uses: they are emulated,"
            " which is slower than --config.compute.matmul=dtype"
        )
    return lines


def has_kernels(device: Any) -> bool:
    """Returns whether XLA has float8 matrix products for a device: NVIDIA GPUs since 2022."""
    try:
        return device.platform == "gpu" and float(device.compute_capability) >= _MIN_CAPABILITY
    except (AttributeError, ValueError):  # ROCm's capabilities are names.
        return False
