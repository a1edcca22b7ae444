"""Marks: places in a text that a session goes back to, without a copy of its cache.

A cache that only adds tokens holds all it held at the mark: its positions of then are
enough to forget what came behind. What is overwritten (rings, evicting caches, sums,
recurrent states) is copied, when the mark is made and when it is gone back to: compiled
calls are donated the session's arrays, so a mark never shares one with them.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lclm.blocks.layer import each_cache
from lclm.cache.base import (
    KV,
    Cache,
    CachePolicy,
    Layer,
    layers_of,
    measured_bytes,
)
from lclm.config import ModelConfig
from lclm.errors import LclmError
from lclm.typing import Array


@dataclass(frozen=True)
class Mark:
    """Where a session stood: `Session.mark` makes it, for that session alone."""

    of: "Marks"
    serial: int
    caches: tuple[Any, ...]
    last: Array
    start: np.ndarray
    free: np.ndarray | None
    length: int

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        return measured_bytes((self.caches, self.last))


class Marks:
    """Which marks a session can go back to, by number; none is used twice."""

    def __init__(self):
        self.next, self.open = 0, set()

    def made(self, **held: Any) -> Mark:
        """A new mark that holds these."""
        self.open.add(self.next)
        self.next += 1
        return Mark(self, self.next - 1, **held)

    def drop_behind(self, mark: Mark) -> None:
        """Forget marks younger than `mark`; LclmError where it is not one of these."""
        if mark.of is not self:
            raise LclmError(
                "this mark is of another context, or the context was cut behind it: "
                "roll back the one that made it, or mark again"
            )
        if mark.serial not in self.open:
            raise LclmError(
                "this mark was dropped when the context went back to an older one: "
                "mark again"
            )
        self.open = {n for n in self.open if n <= mark.serial}


def kept(
    config: ModelConfig, policy: CachePolicy, states: tuple[Any, ...]
) -> tuple[Any, ...]:
    """Copies of what later calls overwrite, and positions where they only add."""

    def part(cache: Cache, layer: Layer) -> Cache:
        lasting = policy.over(layer).lasting(layer)
        groups = (
            KV(None, None, kv.pos) if i in lasting else kv
            for i, kv in enumerate(cache.groups)
        )
        extra = {k: v for k, v in cache.extra.items() if k not in lasting}
        return Cache(tuple(groups), extra)

    return jax.tree.map(jnp.copy, each_cache(config, states, part))


def back(
    config: ModelConfig, policy: CachePolicy, states: tuple[Any, ...], mark: Mark
) -> tuple[Any, ...]:
    """The states of a mark; arrays that tokens are only added to stay as wide as now.

    `states` are those of the session that made it, which has not been cut since.
    """

    def whole(held: Cache, layer: Layer) -> Cache:
        now, lasting = states[layer.index], policy.over(layer).lasting(layer)
        groups = (
            KV(own.k, own.v, _widened(kv.pos, own.pos)) if i in lasting else kv
            for i, (kv, own) in enumerate(zip(held.groups, now.groups, strict=True))
        )
        return Cache(tuple(groups), now.extra | held.extra)

    return each_cache(config, jax.tree.map(jnp.copy, mark.caches), whole)


def hindrance(
    config: ModelConfig, policy: CachePolicy, states: tuple[Any, ...]
) -> str | None:
    """Why there is no going back to a place that was not marked, or None.

    There is where every layer holds all tokens and calls only add some.
    """
    if policy.kept is not None or policy.settles:
        return "the cache drops tokens"
    known = {layer.index: layer for layer in layers_of(config)}
    for index, state in enumerate(states):
        if index not in known:
            return f"layer {index} is recurrent"
        lasting = policy.over(known[index]).lasting(known[index])
        if not {*range(len(state.groups)), *state.extra} <= set(lasting):
            return f"layer {index} overwrites what it holds"
    return None


def cut(
    config: ModelConfig, policy: CachePolicy, states: tuple[Any, ...], length: int
) -> tuple[Any, ...]:
    """The states without what was read behind the first `length` tokens.

    Raises LclmError where there is a `hindrance`.
    """
    reason = hindrance(config, policy, states)
    if reason is not None:
        raise LclmError(
            f"{reason}: only a place that was marked can be gone back to; mark it "
            "beforehand, or use 'full' with a model of full attention"
        )

    def part(cache: Cache, _: Layer) -> Cache:
        groups = (
            KV(kv.k, kv.v, jnp.where(kv.pos < length, kv.pos, -1))
            for kv in cache.groups
        )
        return Cache(tuple(groups), cache.extra)

    return each_cache(config, states, part)


def _widened(pos: Array, like: Array) -> Array:
    """Positions [B, heads, slots], empty up to the slots that there are now."""
    more = like.shape[2] - pos.shape[2]
    return jnp.pad(pos, ((0, 0), (0, 0), (0, more)), constant_values=-1)
