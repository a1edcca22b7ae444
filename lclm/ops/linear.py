"""The one matrix product of every projection, with the form each backend is fast in.

Weights are [out, in]: what Hugging Face stores, so nothing is transposed on load, and
what a CPU matrix-vector product reads in order.

On a CPU three things decide speed (jax 0.11.2, 2 cores with AVX-512):
* a product with one row of 16-bit operands falls to a scalar loop, so rows are padded
  to four;
* inside a loop XLA runs fused elementwise reductions on one thread but matrix products
  on all of them, so decoding must stay a product, never multiply-and-sum;
* without AMX tiles 16-bit products run at half the speed of float32 ones, so many rows
  are worth widening the weights for.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from lclm.ops.int8 import Int8Weight
from lclm.ops.lora import LoraWeight
from lclm.ops.packed import PackedWeight
from lclm.ops.precision import wide_dtype
from lclm.typing import Array, Float

WIDEN_ROWS = 96
PAD_ROWS = 4


@functools.cache
def has_amx() -> bool:
    """Whether this machine's CPU has bfloat16 matrix tiles."""
    try:
        with open("/proc/cpuinfo") as file:
            return "amx_bf16" in file.read()
    except OSError:
        return False


def linear(
    x: Float[Array, "... I"],
    weight: Float[Array, "O I"] | PackedWeight | Int8Weight | LoraWeight,
    bias: Float[Array, " O"] | None = None,
) -> Float[Array, "... O"]:
    """x W^T + b in x's type, accumulated in float32."""
    if isinstance(weight, LoraWeight):
        change = linear(linear(x, weight.down), weight.up)
        return linear(x, weight.base, bias) + weight.scale * change
    if isinstance(weight, PackedWeight):
        weight = weight.dequantize(x.dtype)
    if isinstance(weight, Int8Weight):
        y = weight.product(x).astype(x.dtype)
    elif weight.dtype.itemsize >= 4:
        y = _product(x, weight)
    else:
        y = lax.platform_dependent(x, weight, cpu=_narrow_cpu, default=_narrow)
    y = _settled(y)
    if bias is not None:
        y = y + bias.astype(y.dtype)
    return y


@jax.custom_vjp
def _settled(y: Array) -> Array:
    """y; its cotangent is computed whole before a product reads it.

    A CPU would fuse the activation's derivative into the transposing copy that the
    weight's gradient is made from, one scalar at a time, at ten times the cost.
    """
    return y


def _settle(_: None, g: Array) -> tuple[Array]:
    solid = lax.platform_dependent(g, cpu=lax.optimization_barrier, default=lambda g: g)
    return (solid,)


_settled.defvjp(lambda y: (y, None), _settle)


def _product(x: Array, weight: Array) -> Array:
    """One product in the weight's type."""
    axes = (((x.ndim - 1,), (1,)), ((), ()))
    y = lax.dot_general(
        x.astype(weight.dtype), weight, axes, preferred_element_type=wide_dtype(weight)
    )
    return y.astype(x.dtype)


def _narrow(x: Array, weight: Array) -> Array:
    """16-bit weights on an accelerator, which sums in float32 whatever it returns.

    The result is no wider than it must be, as cotangents have its type: with a float32
    one both products of the backward pass would take float32 operands.
    """
    axes = (((x.ndim - 1,), (1,)), ((), ()))
    kept = jnp.promote_types(x.dtype, weight.dtype)
    y = lax.dot_general(
        x.astype(weight.dtype), weight, axes, preferred_element_type=kept
    )
    return y.astype(x.dtype)


def _narrow_cpu(x: Array, weight: Array) -> Array:
    """16-bit weights on a CPU."""
    rows = math.prod(x.shape[:-1])
    if rows < PAD_ROWS:
        flat = jnp.pad(x.reshape(rows, -1), ((0, PAD_ROWS - rows), (0, 0)))
        return _product(flat, weight)[:rows].reshape(*x.shape[:-1], -1)
    if rows >= WIDEN_ROWS and not has_amx():
        wide = weight.astype(jnp.float32) + _zero_after(x)
        return _product(x.astype(jnp.float32), wide).astype(x.dtype)
    return _product(x, weight)


def _zero_after(x: Array) -> Array:
    """0.0, known only once `x` is: weights widened all at once cost memory."""
    one = x[(0,) * x.ndim].astype(jnp.float32)
    return (one != one).astype(jnp.float32)
