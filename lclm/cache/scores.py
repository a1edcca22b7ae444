"""Evicting policies that differ in how they score a token."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jax import lax

from lclm.cache.base import Layer, Needs
from lclm.cache.evict import Evicting
from lclm.errors import LclmError
from lclm.ops.codes import by_tiles
from lclm.ops.precision import wide
from lclm.typing import Array
from pallas_kernels.decode import cached_attention, column_sums

ALL = 1 << 30  # "the last `ALL` queries" are every query of a call


@dataclass(frozen=True)
class H2O(Evicting):
    """Heavy hitters (arXiv 2306.14048): attention received so far, from every query.

    Half the budget is for the last tokens unless `recent` says otherwise. Every query's
    column sums cost a second pass over the keys.
    """

    sinks: int = 0
    needs: ClassVar[Needs] = Needs(last=ALL)

    @property
    def protected_recent(self) -> int:
        return max(1, self.budget // 2) if self.recent is None else self.recent

    def note(self, cache, new, step, layer, evidence):
        return cache.extra["score"] + evidence.mass_old, evidence.mass_new, {}


@dataclass(frozen=True)
class TOVA(Evicting):
    """The last query's attention, averaged over all heads (arXiv 2401.06104).

    All heads of a layer keep the same tokens.
    """

    sinks: int = 0
    recent: int | None = 1
    needs: ClassVar[Needs] = Needs(last=1)

    def note(self, cache, new, step, layer, evidence):
        read = (step.count > 0)[:, None, None]
        old = jnp.where(read, _all_heads(evidence.mass_old), cache.extra["score"])
        return old, _all_heads(evidence.mass_new), {}


def _all_heads(mass: Array) -> Array:
    return jnp.broadcast_to(jnp.mean(mass, 1, keepdims=True), mass.shape)


@dataclass(frozen=True)
class SnapKV(Evicting):
    """What the last `recent` queries look at, pooled (arXiv 2404.14469).

    Their attention to each earlier token is summed over queries and the query heads of
    a kv head, then averaged (pool="avg") or maximised ("max") over `kernel` neighbours
    in the cache. `recent` is 32, at most a quarter of the budget, unless given. A
    decoded token adds its own attention to the scores of the last selection.
    """

    sinks: int = 0
    kernel: int = 5
    pool: str = "avg"
    needs: ClassVar[Needs] = Needs(queries=True, last=1)

    def __post_init__(self):
        super().__post_init__()
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise LclmError(f"snapkv: kernel is {self.kernel}; use an odd number")
        if self.pool not in ("avg", "max"):
            raise LclmError(f"snapkv: pool is {self.pool!r}; use 'avg' or 'max'")

    @property
    def protected_recent(self) -> int:
        return min(32, max(1, self.budget // 4)) if self.recent is None else self.recent

    def notes(self, layer: Layer, batch: int, dtype) -> dict[str, Array]:
        shape = (batch, self.protected_recent, layer.spec.heads, layer.spec.head_dim)
        asked = jnp.full(shape[:2], -1, jnp.int32)
        return {"asks": jnp.zeros(shape, dtype), "asked": asked}

    def note(self, cache, new, step, layer, evidence):
        asks, asked = cache.extra["asks"], cache.extra["asked"]
        q = step.rotate(evidence.queries, layer.spec.rope).astype(asks.dtype)
        at = step.count[:, None] + lax.iota(jnp.int32, asks.shape[1])[None]
        asks = jnp.take_along_axis(
            jnp.concatenate([asks, q], 1), at[:, :, None, None], 1
        )
        asked = jnp.take_along_axis(jnp.concatenate([asked, step.positions], 1), at, 1)
        old = cache.extra["score"] + evidence.mass_old
        return old, evidence.mass_new, {"asks": asks, "asked": asked}

    def rate(self, kv, score, notes, layer):
        asks, asked, spec = notes["asks"], notes["asked"], layer.spec
        shared = {"scale": spec.scale, "softcap": spec.softcap, "window": spec.window}
        _, lse = cached_attention(asks, kv.k, kv.v, asked, kv.pos, **shared)
        mass = column_sums(asks, kv.k, lse, asked, kv.pos, **shared)
        last = jnp.max(asked, 1)[:, None, None]
        mass = jnp.where(kv.pos > last - self.protected_recent, 0.0, mass)
        order = jnp.argsort(kv.pos, -1)
        pooled = self._pooled(jnp.take_along_axis(mass, order, 2))
        return jnp.take_along_axis(pooled, jnp.argsort(order, -1), 2), notes

    def _pooled(self, mass: Array) -> Array:
        size = (1, 1, self.kernel)
        if self.pool == "max":
            return lax.reduce_window(mass, -jnp.inf, lax.max, size, (1, 1, 1), "SAME")
        sums = lax.reduce_window(mass, 0.0, lax.add, size, (1, 1, 1), "SAME")
        return sums / self.kernel


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV with more for early layers and less for late ones (arXiv 2406.02069).

    `beta` of `Evicting`, which every method takes, with the paper's 20.
    """

    beta: int = 20


@dataclass(frozen=True)
class Knorm(Evicting):
    """Keys of small norm stay (arXiv 2406.11430)."""

    def note(self, cache, new, step, layer, evidence):
        return cache.extra["score"], -jnp.linalg.norm(wide(new.k), axis=-1), {}


@dataclass(frozen=True)
class KeyDiff(Evicting):
    """Keys unlike the mean direction of all keys read stay (arXiv 2504.15364)."""

    def notes(self, layer: Layer, batch: int, dtype) -> dict[str, Array]:
        shape = (batch, layer.spec.kv_heads, layer.spec.head_dim)
        return {"sum": jnp.zeros(shape, jnp.float32)}

    def note(self, cache, new, step, layer, evidence):
        unit = _unit(new.k) * step.valid[:, None, :, None]
        total = cache.extra["sum"] + jnp.sum(unit, 2)
        return cache.extra["score"], _unlike(unit, total), {"sum": total}

    def rate(self, kv, score, notes, layer):
        return by_tiles(lambda k: _unlike(_unit(k), notes["sum"]), kv.k), notes


def _unit(k: Array) -> Array:
    k = wide(k)
    return k / jnp.maximum(jnp.linalg.norm(k, axis=-1, keepdims=True), 1e-12)


def _unlike(unit: Array, total: Array) -> Array:
    return -jnp.einsum("bkch,bkh->bkc", unit, _unit(total))
