"""Attention inside chunks of a document, with the open chunk cached.

A token at position p of its document sees those at chunk * (p // chunk) .. p. The cache
of a row is a ring: slot u holds its last token with p % chunk == u. Tokens of a
document count without gaps, so a call that goes on at position P reads slots below
P % chunk, and no counter is stored.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lclm.ops.branch import choose
from lclm.typing import Array, Float, Int
from pallas_kernels import mask as masks
from pallas_kernels.attention import attention, merge
from pallas_kernels.decode import cached_attention


class Ring(NamedTuple):
    """Rotated keys and values of the last `chunk` tokens; E may differ from H."""

    k: Float[Array, "B N C H"]
    v: Float[Array, "B N C E"]


def chunk_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N E"],
    *,
    positions: Int[Array, "B T"],
    chunk: int,
    scale: float,
    ring: Ring | None = None,
) -> tuple[Float[Array, "B T N E"], Ring | None]:
    """Every token over its own chunk so far, and the ring behind the last one.

    q and k come rotated. Outputs of padding (position -1) are arbitrary.
    """
    if ring is None:
        return _inside(q, k, v, positions, chunk, scale)[0], None
    if q.shape[1] == 1:
        ring = _append(ring, k, v, positions, chunk)
        slots = jnp.arange(chunk)
        at = jnp.where(slots <= positions % chunk, slots, -1)
        own = jnp.where(positions >= 0, positions % chunk, -1)
        out, _ = cached_attention(q, *ring, own, at[:, None], scale=scale)
        return out.astype(v.dtype), ring
    new = _inside(q, k, v, positions, chunk, scale)
    old = _before(q, ring, positions, chunk, scale)
    out, _ = merge((new[0], old[0].astype(v.dtype)), (new[1], old[1]))
    return out, _append(ring, k, v, positions, chunk)


def _inside(q, k, v, positions, chunk, scale):
    """Over the tokens of the call."""
    T = q.shape[1]
    ids = chunk_ids(positions, chunk)
    if T <= chunk:
        return _masked(masks.causal(), True, scale, (q, k, v), ids)
    token = jnp.arange(T)
    valid = positions >= 0
    aligned = jnp.all(~valid | (positions == token))
    inner = valid[:, 1:] & ~valid[:, :-1] & (ids[:, 1:] == _carried(ids)[:, :-1])
    index = jnp.where(aligned, 0, jnp.where(jnp.any(inner), 2, 1))
    forms = tuple(
        functools.partial(_masked, mask, with_ids, scale)
        for mask, with_ids in (
            (masks.causal() & masks.chunk(chunk), False),
            (masks.causal() & masks.window(chunk), True),
            (masks.causal(), True),  # padding inside a chunk: no band holds it
        )
    )
    return choose(forms, index, (q, k, v), ids)


def _carried(ids: Array) -> Array:
    """The last id so far, over padding."""
    return jax.lax.cummax(ids, axis=1)


def _masked(mask: masks.Mask, with_ids: bool, scale: float, values: Any, ids: Array):
    chosen = ids if with_ids else None
    return attention(
        *values, mask=mask, scale=scale, q_segment_ids=chosen, kv_segment_ids=chosen
    )


def chunk_ids(positions: Int[Array, "B T"], chunk: int) -> Int[Array, "B T"]:
    """One number for each chunk of each document of a row, from 1; 0 for padding."""
    opens = (positions >= 0) & (positions % chunk == 0)
    ids = 1 + jnp.cumsum(opens, 1, dtype=jnp.int32)
    return jnp.where(positions >= 0, ids, 0)


def _before(q, ring: Ring, positions, chunk: int, scale: float):
    """Over the chunk that was open when the call began, for the tokens that go on."""
    fill = _open(positions, chunk)
    on = (positions >= 0) & (chunk_ids(positions, chunk) == 1)
    on &= (fill > 0)[:, None]
    slots = jnp.arange(chunk)
    at = jnp.where(slots < fill[:, None], slots, -1)
    own = jnp.where(on, positions % chunk, -1)

    def read(q, ring):
        return cached_attention(q, *ring, own, at[:, None], scale=scale)

    def skip(q, ring):
        shape = jax.eval_shape(read, q, ring)
        out = jnp.zeros(shape[0].shape, shape[0].dtype)
        return out, jnp.full(shape[1].shape, -jnp.inf, shape[1].dtype)

    return jax.lax.cond(jnp.any(on), read, skip, q, ring)


def _open(positions: Int[Array, "B T"], chunk: int) -> Int[Array, " B"]:
    """The tokens of a row's open chunk before its first token of the call."""
    at = jnp.argmax(positions >= 0, 1)[:, None]
    first = jnp.take_along_axis(positions, at, 1)[:, 0]
    return jnp.where(first >= 0, first % chunk, 0)


def _append(ring: Ring, k: Array, v: Array, positions: Array, chunk: int) -> Ring:
    """The ring with the tokens of the call, later ones over earlier ones."""
    B, T = positions.shape
    rows = jnp.arange(B)[:, None]
    slots = jnp.where(positions >= 0, positions % chunk, chunk)
    if T == 1:

        def put(old: Array, new: Array) -> Array:
            return old.at[rows, :, slots].set(new.astype(old.dtype), mode="drop")

    else:
        last = jnp.full((B, chunk), -1, jnp.int32)
        index = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
        last = last.at[rows, slots].max(index, mode="drop")

        def put(old: Array, new: Array) -> Array:
            here = jnp.maximum(last, 0)[:, :, None, None]
            taken = jnp.take_along_axis(new, here, 1).swapaxes(1, 2)
            fresh = (last >= 0)[:, None, :, None]
            return jnp.where(fresh, taken.astype(old.dtype), old)

    return Ring(put(ring.k, k), put(ring.v, v))
