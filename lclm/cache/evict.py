"""Policies that keep `budget` tokens a kv head and choose them by a score."""

import dataclasses
from dataclasses import dataclass, field
from operator import itemgetter
from typing import ClassVar

import jax
import jax.numpy as jnp

from lclm.cache import heads as by_head
from lclm.cache import read, write
from lclm.cache.base import (
    KV,
    Cache,
    CachePolicy,
    Evidence,
    HeadGroup,
    Heads,
    Layer,
    Needs,
)
from lclm.cache.policies import Absolute, Full, at_least, fixed_angles, sees_part
from lclm.cache.step import Step
from lclm.errors import LclmError
from lclm.ops.codes import check_bits
from lclm.ops.slots import replace_by_head
from lclm.typing import Array

STAGES = ("chunk", "end", "kept")
BIG = 1e30


@dataclass(frozen=True)
class Evicting(Absolute):
    """Tokens at their own positions; at most `budget` a kv head, the best scored.

    at="chunk": memory is bounded throughout. Each call reads the slots and itself, then
    keeps the best `budget` of both; a decoded token takes the place of the lowest
    score. Selection falls at the ends of calls, so what survives depends on the chunk.
    at="end", the form of the papers: the prompt is kept whole, cut to `budget` once it
    has been read, and what follows is kept (decode="keep") or evicts (decode="evict").
    Tokens read before the cut are those a score may see: a question inside the prompt
    makes it query-aware, a question asked of a prefilled context does not.

    `sinks` first and `recent` last tokens always stay (`recent` None: a share of the
    budget that the method states). Layers with a pattern or a narrower window of their
    own keep what they see, as under "full".

    `ada` (at="end" only) gives a third of the kv heads that much more of the budget and
    a third that much less, by what each would hold of its layer's best slots.

    `beta` gives early layers more of the budget and late ones less, as PyramidKV does
    (arXiv 2406.02069; 20 there, 0: all alike): with c = budget - sinks - recent, from
    2c - c / beta tokens to c / beta beside those protected; their mean is `budget`.

    A method says what it notes of each call (`note`) and, where a score is no sum of
    such notes, how slots are rated when some have to go (`rate`).
    """

    budget: int = 1024
    sinks: int = 4
    recent: int | None = None
    at: str = "chunk"
    decode: str = "keep"
    ada: float = 0.0
    beta: int = 0
    bits: int = 0
    read: int = field(default=0, compare=False, repr=False)

    per_head: ClassVar[bool] = True
    compacts: ClassVar[bool] = True
    sizing: ClassVar[str] = "budget"

    def __post_init__(self):
        name = type(self).__name__.lower()
        check_bits(name, self.bits)
        at_least(f"{name}: budget", self.budget, 1)
        at_least(f"{name}: sinks", self.sinks, 0)
        at_least(f"{name}: recent", self.protected_recent, 1)
        at_least(f"{name}: beta", self.beta, 0)
        if self.at not in STAGES:
            raise LclmError(f"{name}: at is {self.at!r}; use 'chunk' or 'end'")
        if self.decode not in ("keep", "evict"):
            raise LclmError(f"{name}: decode is {self.decode!r}; use 'keep' or 'evict'")
        least = self.sinks + self.protected_recent
        late = least + min(self._free, self._free // (self.beta or 1))
        smallest = late - round(self.ada * late)
        if not 0 <= self.ada < 1:
            raise LclmError(f"{name}: ada is {self.ada}; use 0 (equal heads) to 1")
        if self.ada and (self.at == "chunk" or self.decode == "evict"):
            raise LclmError(
                f"{name}: ada={self.ada} needs at='end' and decode='keep': heads get "
                "budgets of their own where a prompt is cut"
            )
        if smallest < least:
            raise LclmError(
                f"{name}: budget {smallest} is below the {least} tokens it protects "
                f"(sinks {self.sinks}, recent {self.protected_recent}); raise the "
                "budget or protect fewer"
            )

    @property
    def protected_recent(self) -> int:
        """Last tokens that stay."""
        return max(1, self.budget // 4) if self.recent is None else self.recent

    @property
    def kept(self) -> int | None:
        return None if self.at == "end" else self.budget

    @property
    def settles(self) -> bool:
        return self.at == "end"

    @property
    def ordered(self) -> bool:
        """Whether slots stay in order of position as tokens are decoded."""
        return False

    @property
    def _free(self) -> int:
        """Tokens of the budget that no rule protects."""
        return self.budget - self.sinks - self.protected_recent

    def share(self, layer: Layer, length: int) -> int:
        """Tokens a kv head of one layer keeps, of rows of up to `length`."""
        free, protected = self._free, self.budget - self._free
        if not self.beta or length < 2 * free or layer.layers == 1:
            return self.budget
        most = min(2 * free - free // self.beta, length - protected)
        steps = 2 * (most - free)  # from the first layer to the last
        last = layer.layers - 1
        early = min(layer.rank, last - layer.rank)  # rounded alike from both ends
        fall = steps * early // last
        fall = fall if early == layer.rank else steps - fall
        return most - fall + protected

    def capacity(self, layer: Layer, length: int) -> int:
        if self.at == "end":
            return length
        if self.at == "chunk":
            return min(self.share(layer, length), length)
        return self._behind(self.share(layer, self.read), length)

    def _behind(self, share: int, length: int) -> int:
        """Slots for what was kept of `read` tokens, and all that follows."""
        return min(share, self.read) + max(length - self.read, 0)

    def over(self, layer: Layer) -> CachePolicy:
        return Full(bits=self.bits) if sees_part(layer, self.budget) else self

    def groups(self, layer: Layer, length: int) -> tuple[HeadGroup, ...]:
        if self.at != "kept" or not self.ada:
            return super().groups(layer, length)
        out, first = [], 0  # heads here are places in the order of demand
        for count, share in self._classes(layer, self.read):
            capacity = self._behind(share, length)
            out.append(HeadGroup(tuple(range(first, first + count)), capacity))
            first += count
        return tuple(out)

    def _classes(self, layer: Layer, read: int) -> tuple[tuple[int, int], ...]:
        share = self.share(layer, read)
        return by_head.classes(layer.spec.kv_heads, share, self.ada)

    def init(self, layer: Layer, batch: int, length: int, dtype) -> Cache:
        fixed_angles(type(self).__name__.lower(), layer)
        cache = super().init(layer, batch, length, dtype)
        if self.at == "kept":
            shift = jnp.zeros((batch, len(cache.groups)), jnp.int32)
            order = jnp.zeros((batch, layer.spec.kv_heads), jnp.int32)
            return Cache(cache.groups, {"shift": shift, "order": order})
        (kv,) = cache.groups
        score = jnp.zeros(kv.k.shape[:3], jnp.float32)
        return Cache(cache.groups, {"score": score} | self.notes(layer, batch, dtype))

    def notes(self, layer: Layer, batch: int, dtype) -> dict[str, Array]:
        """What is carried for a row beside a score of each slot, before any token."""
        return {}

    def note(
        self, cache: Cache, new: KV, step: Step, layer: Layer, evidence: Evidence
    ) -> tuple[Array, Array, dict[str, Array]]:
        """Scores of the slots [B, K, C] and of a call's tokens [B, K, T]; row notes."""
        raise NotImplementedError

    def rate(
        self, kv: KV, score: Array, notes: dict[str, Array], layer: Layer
    ) -> tuple[Array, dict[str, Array]]:
        """Scores float32 [B, K, S] of slots when several have to go; row notes."""
        return score, notes

    def attend(
        self,
        cache: Cache,
        heads: Heads,
        step: Step,
        layer: Layer,
        sink: Array | None = None,
    ) -> tuple[Array, Cache]:
        if self.at == "kept":
            return self._keep(cache, heads, step, layer, sink)
        out, evidence, new = self.look(cache, heads, step, layer, sink, self.needs)
        return out, self.update(cache, new, step.after(out), layer, evidence)

    def look(
        self,
        cache: Cache,
        heads: Heads,
        step: Step,
        layer: Layer,
        sink: Array | None,
        needs: Needs,
    ) -> tuple[Array, Evidence, KV]:
        """Attention of a call over one group, and what of the call is to be stored."""
        return read.absolute(cache, heads, step, layer, sink, needs)

    def _keep(
        self,
        cache: Cache,
        heads: Heads,
        step: Step,
        layer: Layer,
        sink: Array | None,
    ) -> tuple[Array, Cache]:
        """Attend to what was kept, by groups of heads, and keep the call."""
        order, shift = cache.extra["order"], cache.extra["shift"]
        parts = [heads]
        if len(cache.groups) > 1:
            counts = [kv.k.shape[1] for kv in cache.groups]
            parts = by_head.grouped(heads, order, counts)
        outs, groups = [], []
        for i, (kv, part) in enumerate(zip(cache.groups, parts, strict=True)):
            size = {"heads": part.q.shape[2], "kv_heads": part.k.shape[2]}
            mine = Layer(layer.index, dataclasses.replace(layer.spec, **size))
            out, _, new = self.look(Cache((kv,)), part, step, mine, sink, Needs())
            behind = step.after(out)
            behind = dataclasses.replace(behind, start=behind.start - shift[:, i])
            groups.append(write.append(kv, write.per_head(new), behind))
            outs.append(out)
        out = outs[0] if len(outs) == 1 else by_head.joined(outs, order)
        return out, Cache(tuple(groups), cache.extra)

    def update(
        self, cache: Cache, new: KV, step: Step, layer: Layer, evidence: Evidence
    ) -> Cache:
        """Write a call's tokens; under at="chunk" only the best of all stay."""
        (kv,) = cache.groups
        new = write.per_head(new)
        old, fresh, notes = self.note(cache, new, step, layer, evidence)
        if self.at == "end":
            score = write.put(old[..., None], fresh[..., None], step.start)[..., 0]
            return Cache((write.append(kv, new, step),), {"score": score, **notes})
        last = step.start + step.count - 1
        if new.k.shape[2] == 1 and not self.ordered:
            slot = jnp.argmin(self._rank(old, kv.pos, last, layer), -1)
            kv = write.place(kv, new, slot, step.valid[:, 0])
            score = replace_by_head(old, fresh, slot, step.valid[:, 0])
            return Cache((kv,), {"score": score, **notes})
        slots, both = kv.k.shape[2], write.joined(kv, new)
        score = jnp.concatenate([old, fresh], 2)
        found = self.rate(both, score, notes, layer)
        # Scores of rows that this call read nothing of stay those of their last one.
        score, notes = jax.tree.map(
            lambda new, old: jnp.where(_rows(step.count > 0, old), new, old),
            found,
            (score, notes),
        )
        kv, score = self._best(both, score, last, slots, layer)
        return Cache((kv,), {"score": score, **notes})

    def lasting(self, layer: Layer) -> tuple[int, ...]:
        if self.at == "chunk":
            return ()
        return tuple(range(len(self.groups(layer, self.read))))

    def settle(self, cache: Cache, layer: Layer, read: int) -> Cache:
        """Cut a prompt that was kept whole to the budget (at="end")."""
        (kv,), notes = cache.groups, dict(cache.extra)
        score, notes = self.rate(kv, notes.pop("score"), notes, layer)
        count = jnp.sum(kv.pos[:, 0] >= 0, -1, dtype=jnp.int32)
        share = min(self.share(layer, read), read)
        if self.decode == "evict":
            kv, score = self._best(kv, score, count - 1, share, layer)
            return Cache((kv,), {"score": score, **notes})
        order = jnp.broadcast_to(
            jnp.arange(kv.k.shape[1], dtype=jnp.int32), kv.k.shape[:2]
        )
        sizes = self._classes(layer, read)
        if len(sizes) > 1:
            rank = self._rank(score, kv.pos, count - 1, layer)
            order = by_head.by_demand(rank, share)
            kv, score = jax.tree.map(
                lambda x: by_head.ordered(x, order, 1), (kv, score)
            )
        groups, first = [], 0
        for heads, slots in sizes:
            here = itemgetter((slice(None), slice(first, first + heads)))
            mine, rated = jax.tree.map(here, (kv, score))
            slots = min(slots, read)
            groups.append(self._best(mine, rated, count - 1, slots, layer)[0])
            first += heads
        held = jnp.array([g.k.shape[2] for g in groups], jnp.int32)
        shift = count[:, None] - jnp.minimum(count[:, None], held)
        return Cache(tuple(groups), {"shift": shift, "order": order})

    def settled(self, read: int) -> "Evicting":
        """The policy behind `settle`, where rows had up to `read` tokens."""
        at = "chunk" if self.decode == "evict" else "kept"
        return dataclasses.replace(self, at=at, read=read)

    def _best(
        self, kv: KV, score: Array, last: Array, slots: int, layer: Layer
    ) -> tuple[KV, Array]:
        """The best `slots` slots in order of position, and their scores."""
        index = write.best(self._rank(score, kv.pos, last, layer), kv.pos, slots)
        score = jnp.take_along_axis(score, jnp.maximum(index, 0), 2)
        return write.take(kv, index), jnp.where(index >= 0, score, 0.0)

    def _rank(self, score: Array, pos: Array, last: Array, layer: Layer) -> Array:
        """Scores with protected slots above all, and empty ones below."""
        last = last[:, None, None]
        protect = (pos < self.sinks) | (pos > last - self.protected_recent)
        if layer.spec.window is not None:
            score = jnp.where(pos > last - layer.spec.window, score, -BIG)
        score = jnp.where(protect, BIG, score)
        return jnp.where(pos >= 0, score, -jnp.inf)


def _rows(flags: Array, like: Array) -> Array:
    """Flags [B] against arrays whose first axis is the row."""
    return flags.reshape(-1, *[1] * (like.ndim - 1))
