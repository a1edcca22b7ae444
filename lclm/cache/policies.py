"""full, window, streaming and recompute: the policies that look at no scores."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp

from lclm.cache import read, write
from lclm.cache.base import KV, Cache, CachePolicy, Evidence, HeadGroup, Heads, Layer
from lclm.cache.step import Step
from lclm.errors import LclmError
from lclm.ops.codes import check_bits
from lclm.typing import Array, Int
from pallas_kernels import mask as masks


def at_least(name: str, value: int, low: int, unit: str = "tokens") -> None:
    """Refuse an option below its least value."""
    if value < low:
        raise LclmError(f"{name} is {value}; it must be at least {low} {unit}")


def fixed_angles(name: str, layer: Layer) -> None:
    """Refuse a layer whose rotary angles change with the length."""
    rope = layer.spec.rope
    if rope is not None and rope.dynamic:
        raise LclmError(
            f"{name} with RoPE type {rope.kind!r}: its angles change with the length; "
            "use a fixed type such as yarn or linear"
        )


def sees_part(layer: Layer, budget: int | None = None) -> bool:
    """Whether a layer by itself sees a pattern or a window (of at most `budget`)."""
    spec = layer.spec
    if spec.window is None or spec.static:
        return spec.static
    return budget is None or spec.window <= budget


@dataclass(frozen=True)
class Absolute(CachePolicy):
    """Tokens keep their own positions and one head group holds all kv heads.

    Subclasses say how many slots a layer has (`capacity`) and where a call's tokens go
    (`update`); reading is shared.
    """

    def attend(
        self,
        cache: Cache,
        heads: Heads,
        step: Step,
        layer: Layer,
        sink: Array | None = None,
    ) -> tuple[Array, Cache]:
        """Attend over the slots and the call itself, then update (or only weigh)."""
        out, evidence, new = read.absolute(cache, heads, step, layer, sink, self.needs)
        if step.weigh:
            return out, self.weigh(cache, evidence, step)
        return out, self.update(cache, new, step.after(out), layer, evidence)


@dataclass(frozen=True)
class Full(Absolute):
    """Keep everything. `limit` caps a row's tokens; None sizes it to the request.

    A layer with a window of its own keeps only that window, and its sinks.
    """

    limit: int | None = None
    bits: int = 0
    anywhere: ClassVar[bool] = True

    def __post_init__(self):
        check_bits("full", self.bits)
        if self.limit is not None:
            at_least("full: limit", self.limit, 1)

    def capacity(self, layer: Layer, length: int) -> int:
        window = layer.spec.window
        return length if window is None else window - 1

    def groups(self, layer: Layer, length: int) -> tuple[HeadGroup, ...]:
        (recent,) = super().groups(layer, length)
        if not layer.spec.sinks:
            return (recent,)
        return HeadGroup(recent.heads, layer.spec.sinks), recent

    def attend(self, cache, heads, step, layer, sink=None):
        if not layer.spec.sinks:
            return super().attend(cache, heads, step, layer, sink)
        out, after = read.sinks_and_band(cache, heads, step, layer, sink)
        return out, cache if step.weigh else after

    def lasting(self, layer: Layer) -> tuple[int, ...]:
        return () if layer.spec.sinks or layer.spec.window is not None else (0,)

    def update(
        self, cache: Cache, new: KV, step: Step, layer: Layer, evidence: Evidence
    ) -> Cache:
        (kv,) = cache.groups
        if layer.spec.window is None:
            return Cache((write.append(kv, new, step),), cache.extra)
        return Cache((write.ring(kv, new, step),), cache.extra)


@dataclass(frozen=True)
class Window(Absolute):
    """Sliding window: a query sees `window` tokens, itself included."""

    window: int = 1024
    bits: int = 0
    sizing: ClassVar[str] = "window"

    def __post_init__(self):
        check_bits("window", self.bits)
        at_least("window: window", self.window, 1)

    @property
    def kept(self) -> int:
        return self.window - 1

    def capacity(self, layer: Layer, length: int) -> int:
        return self._narrow(layer).spec.window - 1

    def attend(self, cache, heads, step, layer, sink=None):
        return super().attend(cache, heads, step, self._narrow(layer), sink)

    def update(
        self, cache: Cache, new: KV, step: Step, layer: Layer, evidence: Evidence
    ) -> Cache:
        (kv,) = cache.groups
        return Cache((write.ring(kv, new, step),), cache.extra)

    def _narrow(self, layer: Layer) -> Layer:
        spec, window, mask = layer.spec, self.window, layer.mask
        if spec.static:
            mask = None if mask is None else mask & masks.window(window)
        else:
            window = min(window, spec.window or window)
        spec = dataclasses.replace(spec, window=window, sinks=0, pattern=None)
        return Layer(layer.index, spec, mask)


@dataclass(frozen=True)
class Streaming(CachePolicy):
    """StreamingLLM (arXiv 2309.17453): the first tokens, and the most recent ones.

    Keeps sinks + window tokens between calls; a query sees those and itself. Positions
    are those of the cache: a query sits at min(i, sinks + window). Recent keys are
    stored rotated at their true positions, which gives the same distances; only the
    sinks need a second query, rotated at its place in the cache, and the two parts are
    merged by their log-sum-exp. Layers with a pattern or a narrower window of their own
    keep what they see, as under "full".
    """

    sinks: int = 4
    window: int = 1020
    bits: int = 0
    exact_angles: ClassVar[bool] = True
    sizing: ClassVar[str] = "window"

    def __post_init__(self):
        check_bits("streaming", self.bits)
        at_least("streaming: sinks", self.sinks, 0)
        at_least("streaming: window", self.window, 1)

    @property
    def kept(self) -> int:
        return self.sinks + self.window

    def far(self, positions: Int[Array, "B T"]) -> Int[Array, "B T"] | None:
        return jnp.minimum(positions, self.sinks + self.window) if self.sinks else None

    def over(self, layer: Layer) -> CachePolicy:
        return Full(bits=self.bits) if sees_part(layer, self.kept) else self

    def groups(self, layer: Layer, length: int) -> tuple[HeadGroup, ...]:
        heads = tuple(range(layer.spec.kv_heads))
        return HeadGroup(heads, self.sinks), HeadGroup(heads, self.window)

    def attend(
        self,
        cache: Cache,
        heads: Heads,
        step: Step,
        layer: Layer,
        sink: Array | None = None,
    ) -> tuple[Array, Cache]:
        """See the class: recent band and sinks as two calls of one operation."""
        spec = layer.spec
        first, recent = cache.groups
        fixed_angles("streaming", layer)
        band = self.window + 1
        q = step.rotate(heads.q, spec.rope)
        new = read.new_tokens(heads, step, layer)
        parts = [
            read.over_slots(q, recent.k, recent, step, layer, window=band),
            read.within_call(q, new, step, layer, window=band, first=self.sinks),
        ]
        if self.sinks:
            first = write.head(first, new, step)
            q_far = step.rotate(heads.q, spec.rope, far=True)
            parts.append(read.over_all(q_far, first, step, layer))
        out, _ = read.combine(parts, sink)
        recent = write.ring(recent, new, step.after(out), self.sinks)
        return out, Cache((first, recent), cache.extra)


@dataclass(frozen=True)
class Recompute(CachePolicy):
    """Sliding window with re-computation: the last `window` tokens, read afresh.

    The baseline of arXiv 2309.17453: nothing is cached, so a token costs a whole
    window. With `stride` > 1 each pass scores that many tokens, and those see between
    window - stride + 1 and window tokens.
    """

    window: int = 1024
    stride: int = 1
    recompute: ClassVar[bool] = True
    anywhere: ClassVar[bool] = True

    def __post_init__(self):
        at_least("recompute: window", self.window, 1)
        at_least("recompute: stride", self.stride, 1)
        if self.stride > self.window:
            raise LclmError(
                f"recompute: stride {self.stride} exceeds window {self.window}; "
                "use a stride of at most the window"
            )

    @property
    def kept(self) -> int:
        return self.window

    def capacity(self, layer: Layer, length: int) -> int:
        return 0

    def init(self, layer: Layer, batch: int, length: int, dtype: Any) -> Cache:
        return Cache(())
