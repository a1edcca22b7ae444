"""One token written into each row of a buffer."""

import jax
import jax.numpy as jnp
from jax import lax

from lclm.typing import Array


def replace(old: Array, value: Array, slot: Array, keep: Array) -> Array:
    """old[b, :, slot[b]] = value[b, :, 0] where keep[b], in place where donated.

    old [B, K, S, ...], value [B, K, 1, ...], slot int [B] inside the buffer.
    """
    value = value.astype(old.dtype)

    def one(row: Array, new: Array, at: Array, ok: Array) -> Array:
        here = lax.dynamic_slice_in_dim(row, at, 1, 1)
        return lax.dynamic_update_slice_in_dim(row, jnp.where(ok, new, here), at, 1)

    if old.shape[0] == 1:
        return one(old[0], value[0], slot[0], keep[0])[None]
    return jax.vmap(one)(old, value, slot, keep)


def replace_by_head(old: Array, value: Array, slot: Array, keep: Array) -> Array:
    """old[b, k, slot[b, k]] = value[b, k, 0] where keep[b], in place where donated.

    old [B, K, S, ...], value [B, K, 1, ...], slot int [B, K] inside the buffer.
    """
    value = value.astype(old.dtype)

    def one(row: Array, new: Array, at: Array, ok: Array) -> Array:
        # [1, K, S, ...] throughout: XLA writes behind a reshape into a copy.
        for k in range(row.shape[1]):
            start = (0, k, at[k]) + (0,) * (row.ndim - 3)
            here = lax.dynamic_slice(row, start, (1, 1, 1, *row.shape[3:]))
            new_k = jnp.where(ok, new[:, k : k + 1], here)
            row = lax.dynamic_update_slice(row, new_k, start)
        return row

    if old.shape[0] == 1:
        return one(old, value, slot[0], keep[0])
    each = jax.vmap(lambda *parts: one(parts[0][None], parts[1][None], *parts[2:])[0])
    return each(old, value, slot, keep)
