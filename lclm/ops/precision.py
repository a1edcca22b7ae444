"""The precision of sums: float32, or float64 where the operands have it."""

import jax.numpy as jnp

from lclm.typing import Array


def wide_dtype(*values: Array) -> jnp.dtype:
    """The type norms, softmax, losses and recurrences of `values` are computed in."""
    return jnp.result_type(jnp.float32, *(value.dtype for value in values))


def wide(x: Array) -> Array:
    """`x` in at least float32."""
    return x.astype(wide_dtype(x))
