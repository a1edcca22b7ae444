"""Normalisation in float32."""

import jax.numpy as jnp
from jax import lax

from lclm.ops.precision import wide
from lclm.typing import Array, Float


def rms_norm(
    x: Float[Array, "... D"],
    scale: Float[Array, " D"],
    *,
    eps: float,
    offset: float = 0.0,
) -> Float[Array, "... D"]:
    """x / sqrt(mean(x^2) + eps) * (scale + offset) (arXiv 1910.07467, eq. 4).

    The mean is float32. With offset 0 the result is cast to x's type before it is
    scaled, as Llama does; with an offset (Gemma) it is scaled in float32.
    """
    x32 = wide(x)
    unit = x32 * lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + eps)
    if offset:
        return (unit * (offset + wide(scale))).astype(x.dtype)
    return unit.astype(x.dtype) * scale.astype(x.dtype)
