"""Writing a cache: appending, rings, and keeping chosen slots."""

import jax
import jax.numpy as jnp
from jax import lax

from lclm.cache.base import KV
from lclm.cache.step import Step
from lclm.typing import Array


def append(kv: KV, new: KV, step: Step) -> KV:
    """Slot = position: a call's tokens go behind those already there.

    Padding lands in slots nobody reads (position -1) that later tokens overwrite; a
    row that reads nothing in a one-token call must have a free slot left.
    """
    start = step.start
    return KV(
        _update(kv.k, new.k, start),
        _update(kv.v, new.v, start),
        _update(kv.pos[..., None], new.pos[..., None], start)[..., 0],
    )


def ring(kv: KV, new: KV, step: Step, sinks: int = 0) -> KV:
    """The first `sinks` tokens for good, then the most recent ones in a ring.

    A token at position p >= sinks lives in slot sinks + (p - sinks) mod R.
    """
    if kv.k.shape[2] == 0:
        return kv
    if step.positions.shape[1] == 1:
        return _ring_one(kv, new, step, sinks)
    slots = lax.iota(jnp.int32, kv.k.shape[2])[None]
    size = max(kv.k.shape[2] - sinks, 1)
    start, count = step.start[:, None], step.count[:, None]
    last = start + count - 1
    recent = last - jnp.mod(last - slots, size)
    holds = jnp.where(slots < sinks, slots, recent)
    index = holds - start
    fresh = (index >= 0) & (index < count) & ((slots < sinks) | (holds >= sinks))
    index = jnp.clip(index, 0, new.k.shape[2] - 1)

    def pick(old: Array, values: Array) -> Array:
        gathered = jnp.take_along_axis(values, index[:, None, :, None], 2)
        return jnp.where(fresh[:, None, :, None], gathered.astype(old.dtype), old)

    return KV(
        pick(kv.k, new.k),
        pick(kv.v, new.v),
        pick(kv.pos[..., None], new.pos[..., None])[..., 0],
    )


def _ring_one(kv: KV, new: KV, step: Step, sinks: int) -> KV:
    """One token per row, written in place."""
    size = kv.k.shape[2] - sinks
    at = jnp.maximum(step.positions[:, 0], 0)
    slot = jnp.where(at < sinks, at, sinks + jnp.mod(at - sinks, max(size, 1)))
    keep = step.valid[:, 0] & (slot < kv.k.shape[2])
    slot = jnp.minimum(slot, kv.k.shape[2] - 1)
    return KV(
        _replace(kv.k, new.k, slot, keep),
        _replace(kv.v, new.v, slot, keep),
        _replace(kv.pos[..., None], new.pos[..., None], slot, keep)[..., 0],
    )


def gather(kv: KV, new: KV, index: Array) -> KV:
    """Keep slots `index` [B, K, M] of the old slots followed by the new tokens.

    An index of -1 leaves its slot empty.
    """
    heads = kv.k.shape[1]

    def pick(old: Array, values: Array) -> Array:
        both = jnp.concatenate([old, values.astype(old.dtype)], 2)
        return jnp.take_along_axis(both, jnp.maximum(index, 0)[..., None], 2)

    def spread(pos: Array) -> Array:
        return jnp.broadcast_to(pos, (pos.shape[0], heads, pos.shape[2]))

    pos = jnp.concatenate([spread(kv.pos), spread(new.pos)], 2)
    pos = jnp.take_along_axis(pos, jnp.maximum(index, 0), 2)
    return KV(pick(kv.k, new.k), pick(kv.v, new.v), jnp.where(index >= 0, pos, -1))


def select(scores: Array, pos: Array, budget: int, protect: Array) -> Array:
    """Indices [B, K, budget] of the best slots in slot order, -1 beyond the valid ones.

    Protected slots beat every score, empty ones (pos < 0) are never chosen, ties go to
    the lower slot.
    """
    rank = jnp.where(protect, jnp.inf, scores)
    rank = jnp.where(pos >= 0, rank, -jnp.inf)
    best, index = lax.top_k(rank, min(budget, rank.shape[-1]))
    index = jnp.where(best > -jnp.inf, index, rank.shape[-1])
    index = jnp.sort(index, -1)
    return jnp.where(index < rank.shape[-1], index, -1)


def _update(old: Array, values: Array, start: Array) -> Array:
    """old[b, :, start[b] : start[b] + T] = values[b], in place where donated.

    Padding that would run past the last slot is dropped: the window then starts
    earlier and its first slots keep what they hold.
    """
    width = min(values.shape[2], old.shape[2])
    values = values[:, :, :width].astype(old.dtype)

    def one(row: Array, value: Array, at: Array) -> Array:
        first = jnp.minimum(at, row.shape[1] - width)
        if width > 1:
            held = lax.dynamic_slice_in_dim(row, first, width, 1)
            mine = lax.iota(jnp.int32, width)[None, :, None] >= at - first
            value = jnp.where(mine, jnp.roll(value, at - first, 1), held)
        return lax.dynamic_update_slice(row, value, (0, first, 0))

    if old.shape[0] == 1:
        return one(old[0], values[0], start[0])[None]
    return jax.vmap(one)(old, values, start)


def _replace(old: Array, value: Array, slot: Array, keep: Array) -> Array:
    """old[b, :, slot[b]] = value[b, :, 0] where keep[b]."""
    value = value.astype(old.dtype)

    def one(row: Array, new: Array, at: Array, ok: Array) -> Array:
        here = lax.dynamic_slice_in_dim(row, at, 1, 1)
        return lax.dynamic_update_slice(row, jnp.where(ok, new, here), (0, at, 0))

    if old.shape[0] == 1:
        return one(old[0], value[0], slot[0], keep[0])[None]
    return jax.vmap(one)(old, value, slot, keep)
