"""What every layer of one call shares: positions, segments, rotary tables."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lclm import sharding
from lclm.config import AttentionSpec, ModelConfig, RopeSpec
from lclm.ops import rope
from lclm.typing import Array, Float, Int, Leaf


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Step:
    """One call over T tokens of B rows, computed once and read by all layers.

    positions: int32 [B, T], index in the token's own document or row; -1 is padding.
    segments: int32 [B, T], document ids of packed rows, 0 padding; None: one document.
    start: int32 [B], tokens each row has read before this call; None without a cache.
    length: int32 [B], row length dynamic RoPE types resolve with; None: longest seen.
    far: tables of a policy's second query positions, in the order of `tables`.
    policy: parameters a cache policy brought (retaining heads, gates), per layer index.
    probe: what looks into attention layers in their place, in training (`Probe`).
    weigh: this call only gathers evidence (a catalyst): caches keep no token of it.
    context: how devices share the tokens of a row (`lclm.attention.context.Context`).
    """

    positions: Leaf
    segments: Leaf
    start: Leaf
    length: Leaf
    tables: tuple[tuple[Leaf, Leaf], ...]
    far: tuple[tuple[Leaf, Leaf], ...] | None
    policy: Any
    probe: Any = dataclasses.field(default=None, kw_only=True)
    keys: tuple[tuple[RopeSpec, int], ...] = dataclasses.field(
        metadata={"static": True}
    )
    weigh: bool = dataclasses.field(default=False, metadata={"static": True})
    context: Any = dataclasses.field(default=None, metadata={"static": True})

    @property
    def valid(self) -> Array:
        """bool [B, T]: tokens that are not padding."""
        return self.positions >= 0

    @property
    def count(self) -> Int[Array, " B"]:
        """Real tokens of each row in this call."""
        return jnp.sum(self.valid, 1, dtype=jnp.int32)

    def after(self, read: Float[Array, "..."]) -> "Step":
        """The same step, with indices that cannot be known before `read` is.

        A buffer that is read and written in one compiled call is copied whole unless
        the write depends on the reads; this makes it depend on them.
        """
        one = read[(0,) * read.ndim]
        zero = (one != one).astype(jnp.int32)
        return dataclasses.replace(
            self, positions=self.positions + zero, start=self.start + zero
        )

    def earlier(self, by: Int[Array, " B"]) -> "Step":
        """The same tokens `by` positions earlier: where they stand in a cache."""
        positions = jnp.where(self.valid, self.positions - by[:, None], -1)
        tables = tuple(
            rope.angles(jnp.maximum(positions, 0), spec, size, length=self.length)
            for spec, size in self.keys
        )
        return dataclasses.replace(
            self, positions=positions, start=self.start - by, tables=tables
        )

    def rotate(
        self, x: Float[Array, "B T N H"], spec: RopeSpec | None, *, far: bool = False
    ) -> Array:
        """Rotate queries or keys to their own (or the policy's second) positions."""
        if spec is None:
            return x
        tables = self.far if far else self.tables
        cos, sin = tables[self.keys.index((spec, x.shape[-1]))]
        return rope.rotate(x, cos, sin, layout=spec.layout)

    def rotate_to(self, x: Array, positions: Array, spec: RopeSpec | None) -> Array:
        """Rotate [B, S, heads, H] to other positions [B, S] (negative ones to 0)."""
        if spec is None:
            return x
        at = jnp.maximum(positions, 0)
        cos, sin = rope.angles(at, spec, x.shape[-1], length=self.length)
        return rope.rotate(x, cos, sin, layout=spec.layout)


def make_step(
    config: ModelConfig,
    positions: Int[Array, "B T"],
    *,
    segments: Int[Array, "B T"] | None = None,
    start: Int[Array, " B"] | None = None,
    length: Int[Array, " B"] | None = None,
    far: Int[Array, "B T"] | None = None,
    policy: Any = None,
    exact: bool = False,
    weigh: bool = False,
) -> Step:
    """Compute the tables every layer needs, once.

    `far` are a policy's second query positions; `exact` overrides the angle mode.
    """
    specs = [
        layer.mixer
        for layer in config.layers
        if isinstance(layer.mixer, AttentionSpec) and layer.mixer.rope is not None
    ]
    keys = tuple(dict.fromkeys((m.rope, m.head_dim) for m in specs))
    if length is None and any(spec.dynamic for spec, _ in keys):
        length = sharding.largest(jnp.max(positions, 1) + 1, *sharding.SEQUENCE)

    def tables(at: Array) -> tuple[tuple[Array, Array], ...]:
        return tuple(
            rope.angles(
                jnp.maximum(at, 0),
                exact_angles(spec) if exact else spec,
                size,
                length=length,
            )
            for spec, size in keys
        )

    second = None if far is None else tables(far)
    own = tables(positions)
    return Step(positions, segments, start, length, own, second, policy, keys, weigh)


def exact_angles(spec: RopeSpec) -> RopeSpec:
    """The same rotation with angles that stay accurate at millions of positions."""
    return dataclasses.replace(spec, angles="exact")
