"""Retaining heads: a score of each token from its own projections (2410.01805)."""

import jax
import jax.numpy as jnp

from lclm.typing import Array, Float


def scores(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    w1: Float[Array, "F C"],
    w2: Float[Array, "K F"],
) -> Float[Array, "B T K"]:
    """w2 silu(w1 [q; k; v]) of projections before rotation, in the heads' own type."""
    B, T = q.shape[:2]
    x = jnp.concatenate([p.reshape(B, T, -1) for p in (q, k, v)], -1).astype(w1.dtype)
    return jnp.matmul(jax.nn.silu(jnp.matmul(x, w1.T)), w2.T)
