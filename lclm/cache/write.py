"""Writing a cache: appending, rings, and keeping chosen slots.

Slots held as codes take a call's tokens as codes: each part is written in the same way.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from lclm.cache.base import KV
from lclm.cache.step import Step
from lclm.ops.codes import Codes
from lclm.ops.slots import replace, replace_by_head
from lclm.typing import Array, Leaf


def append(kv: KV, new: KV, step: Step) -> KV:
    """Slot = position: a call's tokens go behind those already there.

    Padding lands in slots nobody reads (position -1) that later tokens overwrite.
    """
    return behind(kv, new, step.start)


def behind(kv: KV, new: KV, start: Array) -> KV:
    """`new` in the slots from start [B] on, which fall on groups of coded slots."""
    slots = kv.k.shape[2]

    def write(old: Array, values: Array) -> Array:
        every = slots // old.shape[2] if slots else 1
        return put(old, values, start // every if every > 1 else start)

    return _each(write, kv, new)


def head(kv: KV, new: KV, step: Step) -> KV:
    """Keep the tokens at positions 0..C-1, each in the slot of its position."""
    if step.positions.shape[1] == 1:
        slot = step.positions[:, 0]
        return _replace_all(kv, new, slot, step.valid[:, 0] & (slot < kv.k.shape[2]))
    return _refresh(kv, new, lax.iota(jnp.int32, kv.k.shape[2])[None], step)


def ring(kv: KV, new: KV, step: Step, first: int = 0) -> KV:
    """The most recent tokens from position `first` on: p in slot (p - first) mod R."""
    size = kv.k.shape[2]
    if size == 0:
        return kv
    if step.positions.shape[1] == 1:
        at = step.positions[:, 0] - first
        return _replace_all(kv, new, jnp.mod(at, size), step.valid[:, 0] & (at >= 0))
    last = (step.start + step.count - 1 - first)[:, None]
    holds = last - jnp.mod(last - lax.iota(jnp.int32, size)[None], size)
    return _refresh(kv, new, jnp.where(holds >= 0, holds + first, -1), step)


def sinks_and_ring(kv: KV, new: KV, step: Step, sinks: int) -> KV:
    """One token a row: p in slot p up to the last slot, then round behind the sinks."""
    at = step.positions[:, 0]
    slot = jnp.where(at < sinks, at, sinks + jnp.mod(at - sinks, kv.k.shape[2] - sinks))
    return _replace_all(kv, new, slot, step.valid[:, 0])


def _refresh(kv: KV, new: KV, holds: Array, step: Step) -> KV:
    """Fill each slot with the token at position `holds` [B, C] if the call read it."""
    index = holds - step.start[:, None]
    fresh = (holds >= 0) & (index >= 0) & (index < step.count[:, None])
    index = jnp.clip(index, 0, new.k.shape[2] - 1)

    def pick(old: Array, values: Array) -> Array:
        gathered = jnp.take_along_axis(values, index[:, None, :, None], 2)
        return jnp.where(fresh[:, None, :, None], gathered.astype(old.dtype), old)

    return _each(pick, kv, new)


def _replace_all(kv: KV, new: KV, slot: Array, keep: Array) -> KV:
    """One token per row, written in place where `keep`."""
    slot = jnp.clip(slot, 0, kv.k.shape[2] - 1)
    return _each(lambda old, value: replace(old, value, slot, keep), kv, new)


def _each(write: Callable[[Array, Array], Array], kv: KV, new: KV) -> KV:
    """Apply one write to keys, values and positions."""
    pos = write(kv.pos[..., None], new.pos[..., None])[..., 0]
    return KV(_values(write, kv.k, new.k), _values(write, kv.v, new.v), pos)


def _values(write: Callable[[Array, Array], Array], old: Leaf, new: Leaf) -> Leaf:
    """Apply a write to every part of keys or values."""
    if isinstance(old, Codes) and not isinstance(new, Codes):
        new = old.encode(new)
    return jax.tree.map(write, old, new)


def per_head(kv: KV) -> KV:
    """The same slots with a position for every head."""
    pos = jnp.broadcast_to(kv.pos, kv.k.shape[:3])
    return KV(kv.k, kv.v, pos)


def place(kv: KV, new: KV, slot: Array, keep: Array) -> KV:
    """One token a row, in slot [B, K] of each head where `keep` [B]."""
    return _each(
        lambda old, value: replace_by_head(old, value, slot, keep), kv, per_head(new)
    )


def joined(kv: KV, new: KV) -> KV:
    """The slots, and behind them a call's tokens."""
    return _each(
        lambda old, value: jnp.concatenate([old, value.astype(old.dtype)], 2), kv, new
    )


def take(kv: KV, index: Array) -> KV:
    """Slots `index` [B, K, M]; an index of -1 leaves its slot empty."""

    def pick(values: Array) -> Array:
        return jnp.take_along_axis(values, jnp.maximum(index, 0)[..., None], 2)

    pos = pick(kv.pos[..., None])[..., 0]
    k, v = jax.tree.map(pick, (kv.k, kv.v))
    return KV(k, v, jnp.where(index >= 0, pos, -1))


def best(rank: Array, pos: Array, count: int) -> Array:
    """Indices [B, K, count] of the highest ranks in order of position, -1 beyond them.

    Empty slots (pos < 0) are never chosen; ties go to the lower slot.
    """
    rank = jnp.where(pos >= 0, rank, -jnp.inf)
    top, index = lax.top_k(rank, count)
    none = jnp.iinfo(jnp.int32).max
    place = jnp.where(top > -jnp.inf, jnp.take_along_axis(pos, index, 2), none)
    place, index = lax.sort((place, index), num_keys=1)
    return jnp.where(place < none, index, -1)


def put(old: Array, values: Array, start: Array) -> Array:
    """old[b, :, start[b] : start[b] + T] = values[b], in place where donated.

    Padding that would run past the last slot is dropped: the window then starts
    earlier and its first slots keep what they hold.
    """
    width = min(values.shape[2], old.shape[2])
    values = values[:, :, :width].astype(old.dtype)

    def one(row: Array, value: Array, at: Array) -> Array:
        first = jnp.minimum(at, row.shape[1] - width)
        held = lax.dynamic_slice_in_dim(row, first, width, 1)
        mine = lax.iota(jnp.int32, width)[None, :, None] >= at - first
        if width > 1:
            value = jnp.roll(value, at - first, 1)
        value = jnp.where(mine, value, held)
        return lax.dynamic_update_slice_in_dim(row, value, first, 1)

    if old.shape[0] == 1:
        return one(old[0], values[0], start[0])[None]
    return jax.vmap(one)(old, values, start)
