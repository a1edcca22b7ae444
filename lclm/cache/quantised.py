"""KIVI: the past in codes of a few bits, the last tokens as they are."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax

from lclm.cache import read, write
from lclm.cache.base import KV, Cache, CachePolicy, HeadGroup, Heads, Layer, empty
from lclm.cache.policies import Full, at_least, fixed_angles, sees_part
from lclm.cache.step import Step
from lclm.errors import LclmError
from lclm.ops import codes
from lclm.typing import Array, Int


@dataclass(frozen=True)
class Quantised(CachePolicy):
    """Keys coded per channel, values per token (KIVI, arXiv 2402.02750).

    Nothing is evicted. The last `residual` tokens stay as they are; `group` older ones
    at a time are packed into `bits` bits: keys with a scale for each channel and
    `group` tokens, values with one for each token and up to `group` channels. KIVI
    packs the same groups, its keys `residual` tokens at a time: it holds 0 to residual
    - 1 keys and `residual` values unpacked, this policy residual to residual + group -
    1 of both.

    A call's own tokens are read as they are. KIVI reads a prompt whole before it packs
    any of it; read in chunks, a prompt sees what lies before the chunk and its residual
    in codes, so losses depend on the chunk. What is stored does not.

    Layers with a window or a pattern of their own keep what they see, as under "full".
    """

    bits: int = 2
    residual: int = 128
    group: int = codes.GROUP

    def __post_init__(self):
        if self.bits not in codes.BITS:
            raise LclmError(f"quantised: bits is {self.bits}; use 2, 4 or 8")
        at_least("quantised: group", self.group, 1)
        at_least("quantised: residual", self.residual, self.group)
        if self.residual % self.group:
            raise LclmError(
                f"quantised: residual {self.residual} is no multiple of group "
                f"{self.group}; use {self.residual // self.group * self.group}"
            )

    def packed(self, tokens: Int[Array, " B"] | int) -> Int[Array, " B"] | int:
        """How many of so many tokens are packed."""
        return jnp.maximum(tokens - self.residual, 0) // self.group * self.group

    def over(self, layer: Layer) -> CachePolicy:
        return Full() if sees_part(layer) else self

    def groups(self, layer: Layer, length: int) -> tuple[HeadGroup, ...]:
        heads = tuple(range(layer.spec.kv_heads))
        old = max(length - self.residual, 0) // self.group * self.group
        recent = min(length, self.residual + self.group)
        return HeadGroup(heads, old), HeadGroup(heads, recent)

    def init(self, layer: Layer, batch: int, length: int, dtype: Any) -> Cache:
        spec = layer.spec
        fixed_angles("quantised", layer)
        old, recent = self.groups(layer, length)
        shape = (batch, spec.kv_heads, old.capacity, spec.head_dim)
        each = codes.channels(spec.head_dim, self.bits, self.group)
        k = codes.zeros(shape, self.bits, (self.group, 1), dtype)
        v = codes.zeros(shape, self.bits, (1, each), dtype)
        pos = jnp.full((batch, 1, old.capacity), -1, jnp.int32)
        held = empty(batch, spec.kv_heads, recent.capacity, spec.head_dim, dtype)
        return Cache((KV(k, v, pos), held))

    def attend(
        self,
        cache: Cache,
        heads: Heads,
        step: Step,
        layer: Layer,
        sink: Array | None = None,
    ) -> tuple[Array, Cache]:
        """Packed tokens, the last ones and the call itself, merged."""
        old, recent = cache.groups
        q = step.rotate(heads.q, layer.spec.rope)
        new = read.new_tokens(heads, step, layer)
        parts = [
            read.over_slots(q, kv.k, kv, step, layer, window=None)
            for kv in (old, recent)
            if kv.k.shape[2]
        ]
        parts.append(read.within_call(q, new, step, layer, window=None))
        out, _ = read.combine(parts, sink)
        return out, self._write(cache, new, step.after(out))

    def lasting(self, layer: Layer) -> tuple[int, ...]:
        return (0,)

    def _write(self, cache: Cache, new: KV, step: Step) -> Cache:
        """Pack the groups that a call's tokens push out of the residual."""
        old, recent = cache.groups
        end = self.packed(step.start + step.count)[:, None]
        if old.k.shape[2]:
            old = self._pack(old, recent, new, end, step)
        recent = write.ring(recent, new, step)
        # A packed token may still lie in the ring: only its packed form is seen.
        pos = jnp.where(recent.pos >= end[:, None], recent.pos, -1)
        return Cache((old, dataclasses.replace(recent, pos=pos)), cache.extra)

    def _pack(self, old: KV, recent: KV, new: KV, end: Array, step: Step) -> KV:
        """Write the tokens from the first unpacked position to `end` as codes."""
        tokens, ring = new.k.shape[2], recent.k.shape[2]
        width = -(-tokens // self.group) * self.group
        first = self.packed(step.start)
        at = first[:, None] + lax.iota(jnp.int32, width)[None]
        index = at % ring
        source = recent
        if tokens > 1:  # a single token is never packed at once
            source = write.joined(recent, new)
            own = jnp.minimum(at - step.start[:, None], tokens - 1)
            index = jnp.where(own < 0, index, ring + own)
        index = jnp.broadcast_to(index[:, None], (*source.k.shape[:2], width))
        taken = write.take(write.per_head(source), index)
        pos = jnp.where(at < end, at, -1)[:, None]
        return write.behind(old, dataclasses.replace(taken, pos=pos), first)
