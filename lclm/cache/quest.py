"""Quest (arXiv 2406.10774): keep every token, read the pages a query points to."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from lclm.cache import read, write
from lclm.cache.base import KV, Cache, CachePolicy, Heads, Layer, Needs
from lclm.cache.policies import Full, at_least, sees_part
from lclm.cache.step import Step
from lclm.errors import LclmError
from lclm.ops.codes import Codes, check_bits
from lclm.typing import Array
from pallas_kernels.decode import (
    Selection,
    no_bounds,
    paged_attention,
    refresh_bounds,
)
from pallas_kernels.decode.pages import REDUCTIONS

LEAST = 3  # pages


@dataclass(frozen=True)
class Quest(CachePolicy):
    """A query attends to `budget` tokens in pages of `page`; every token is kept.

    Memory is not reduced: beside all keys and values there is the elementwise greatest
    and least key of each page, another 1 / `page` of the cache. What falls is what a
    decoded token reads: the bounds and max(3, budget / page) pages a kv head.

    The query's own page and the `first` pages are always read; of the others before it
    those whose bound on q.k is largest, after the query heads of a kv head are joined
    by `reduce`: "max" of their bounds, "mean", or the "union" of the pages that each
    would choose (which may be more than the budget). The first `dense` attention layers
    and layers with a window or pattern of their own read all they see.

    prefill="sparse": every query chooses for itself, so losses are those of decoding,
    whatever the chunk. prefill="dense", the form of the released code: calls of several
    tokens read everything and only one-token calls choose; then losses depend on the
    chunk, and a question read in one call sees more than the answer behind it.

    With `bits` layers that choose read every token as it is stored, a call's own too
    (but by a dense prefill), and bounds are float32, of the decoded keys.
    """

    budget: int = 1024
    page: int = 16
    dense: int = 2
    first: int = 0
    reduce: str = "max"
    prefill: str = "sparse"
    bits: int = 0

    def __post_init__(self):
        check_bits("quest", self.bits)
        at_least("quest: budget", self.budget, 1)
        at_least("quest: page", self.page, 1)
        at_least("quest: dense", self.dense, 0, "layers")
        at_least("quest: first", self.first, 0, "pages")
        if self.reduce not in REDUCTIONS:
            names = ", ".join(repr(name) for name in REDUCTIONS)
            raise LclmError(f"quest: reduce is {self.reduce!r}; use one of {names}")
        if self.prefill not in ("sparse", "dense"):
            raise LclmError(
                f"quest: prefill is {self.prefill!r}; use 'sparse' or 'dense'"
            )
        low = self.budget // self.page * self.page
        if self.budget > LEAST * self.page and low != self.budget:
            raise LclmError(
                f"quest: budget {self.budget} is no whole number of pages of "
                f"{self.page}; use {low} or {low + self.page}, or another page"
            )
        if self.first >= self.pages:
            raise LclmError(
                f"quest: first {self.first} fills all {self.pages} pages that budget "
                f"{self.budget} reads; use at most {self.pages - 1} or a larger budget"
            )

    @property
    def pages(self) -> int:
        """Pages a query reads."""
        return max(LEAST, self.budget // self.page)

    @property
    def choice(self) -> Selection:
        """How pages are chosen."""
        return Selection(self.page, self.pages, self.first, self.reduce)

    def capacity(self, layer: Layer, length: int) -> int:
        """Slots for whole pages."""
        return -(-length // self.page) * self.page

    def over(self, layer: Layer) -> CachePolicy:
        whole = layer.rank < self.dense or sees_part(layer)
        return Full(bits=self.bits) if whole else self

    def init(self, layer: Layer, batch: int, length: int, dtype: Any) -> Cache:
        if layer.spec.rope is not None and layer.spec.rope.dynamic:
            raise LclmError(
                f"quest with RoPE type {layer.spec.rope.kind!r}: its angles change "
                "with the length, and bounds of keys with them; use a fixed type such "
                "as yarn or linear"
            )
        (kv,) = super().init(layer, batch, length, dtype).groups
        *lead, slots, size = kv.k.shape
        kind = jnp.float32 if self.bits else dtype
        bounds = no_bounds((*lead, slots // self.page, 2 * size), kind)
        return Cache((kv,), {"bounds": bounds})

    def attend(
        self,
        cache: Cache,
        heads: Heads,
        step: Step,
        layer: Layer,
        sink: Array | None = None,
    ) -> tuple[Array, Cache]:
        """Read the pages that each query chooses, and keep the call's tokens.

        One token reads the slots before it and itself, then is written: a buffer that
        is written first would be copied. Several are written first, for a page that one
        of them ends is open to those behind it.
        """
        one = heads.q.shape[1] == 1
        if self.prefill == "dense" and not one:
            out, _, new = read.absolute(cache, heads, step, layer, sink, Needs())
            return out, self._write(cache, self._coded(cache, new), step.after(out))
        q = step.rotate(heads.q, layer.spec.rope)
        new = self._coded(cache, read.new_tokens(heads, step, layer))
        if one:
            parts = [
                self._paged(cache, q, step, layer, step.start),
                read.within_call(q, _opened(new, q.dtype), step, layer, window=None),
            ]
            out, _ = read.combine(parts, sink)
            return out, self._write(cache, new, step.after(out))
        cache = self._write(cache, new, step)
        part = self._paged(cache, q, step, layer, step.start + step.count)
        return read.combine([part], sink)[0], cache

    def lasting(self, layer: Layer) -> tuple[int | str, ...]:
        return 0, "bounds"

    def _paged(
        self, cache: Cache, q: Array, step: Step, layer: Layer, length: Array
    ) -> tuple[Array, Array]:
        """(out, lse) over the chosen pages of slots before `length` [B]."""
        (kv,) = cache.groups
        return paged_attention(
            q,
            kv.k,
            kv.v,
            cache.extra["bounds"],
            step.positions,
            self.choice,
            scale=layer.spec.scale,
            softcap=layer.spec.softcap,
            length=length,
        )

    def _write(self, cache: Cache, new: KV, step: Step) -> Cache:
        """Every token in the slot of its position, and the bounds of its page."""
        (kv,), end = cache.groups, step.start + step.count
        old = cache.extra["bounds"]
        keys = _opened(new, old.dtype).k
        bounds = refresh_bounds(old, kv.k, keys, step.start, end, page=self.page)
        kv = write.append(kv, new, step.after(bounds))
        return Cache((kv,), {"bounds": bounds})

    def _coded(self, cache: Cache, new: KV) -> KV:
        """A call's tokens as the slots hold them: where those are codes, once."""
        (kv,) = cache.groups
        if not self.bits:
            return new
        return KV(kv.k.encode(new.k), kv.v.encode(new.v), new.pos)


def _opened(new: KV, dtype: Any) -> KV:
    """A call's tokens as numbers."""
    if not isinstance(new.k, Codes):
        return new
    return KV(new.k.astype(dtype), new.v.astype(dtype), new.pos)
