"""Block-wise attention in plain XLA: online softmax over the tiles of a plan.

Two nested loops with traced trip counts walk the visible tiles only, so compile time
and temporaries do not grow with the number of blocks. The query heads of a kv head
are rows of one matrix product; keys and values are never repeated.
"""

import dataclasses
import functools
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import dispatch
from pallas_kernels.attention.plan import Plan, plan
from pallas_kernels.attention.spec import Spec, corner, wide, wide_dtype

HIDDEN = -1e30  # score of a masked pair; its weight is exactly 0
# Scores within this bound need no running maximum: their exponentials, a million of
# them summed, stay far inside float32. |q| |k| bounds a score (Cauchy-Schwarz).
BOUNDED = 60.0
SMALL = 1 << 20  # pairs a head below which a second form is not worth compiling


@functools.cache
def _matrix_units() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AMX)."""
    info = pathlib.Path("/proc/cpuinfo")
    return info.exists() and "amx_bf16" in info.read_text()


def compute_dtype(dtype) -> jnp.dtype:
    """Operand type of the matrix products; float32 where bfloat16 would be slower."""
    if jnp.dtype(dtype) == jnp.float64:
        return jnp.dtype(jnp.float64)
    cpu = dispatch.platform() == "cpu"
    fast = jnp.dtype(dtype) == jnp.bfloat16 and (not cpu or _matrix_units())
    return jnp.dtype(jnp.bfloat16 if fast else jnp.float32)


@dataclasses.dataclass(frozen=True)
class HeadClass:
    """Query heads under one mask and the kv heads they read, equal groups each."""

    spec: Spec
    query: tuple[int, ...]
    kv: tuple[int, ...]


def head_classes(spec: Spec, heads: int, kv_heads: int) -> list[HeadClass]:
    """Split heads by mask; a kv head whose group is divided is read once per part."""
    masks = spec.mask.layout(heads)
    if len(masks) == 1:
        mask = dataclasses.replace(spec, mask=masks[0])
        return [HeadClass(mask, tuple(range(heads)), tuple(range(kv_heads)))]
    group = heads // kv_heads
    members: dict[tuple, dict[int, list[int]]] = {}
    for kv in range(kv_heads):
        parts: dict = {}
        for head in range(kv * group, (kv + 1) * group):
            parts.setdefault(masks[head], []).append(head)
        for mask, part in parts.items():
            members.setdefault((mask, len(part)), {})[kv] = part
    return [
        HeadClass(
            dataclasses.replace(spec, mask=mask),
            tuple(head for part in parts.values() for head in part),
            tuple(parts),
        )
        for (mask, _), parts in members.items()
    ]


def take(x, heads: tuple[int, ...], axis: int = 2):
    """The given heads of `x`, without a copy where they are all of them."""
    if x is None or heads == tuple(range(x.shape[axis])):
        return x
    return jnp.take(x, np.array(heads), axis=axis)


def join(parts: list, classes: list[HeadClass], axis: int):
    """Put the query heads of all classes back in order."""
    if len(parts) == 1:
        return parts[0]
    order = np.argsort([head for c in classes for head in c.query])
    return jnp.take(jnp.concatenate(parts, axis), order, axis=axis)


def forward(spec: Spec, q, k, v, sink, q_segment_ids, kv_segment_ids):
    """Attention output [B, T, N, H] and float32 log-sum-exp [B, N, T]."""
    classes = head_classes(spec, q.shape[2], k.shape[2])
    outs, lses = [], []
    for c in classes:
        out, lse = _forward_class(
            c.spec, take(q, c.query), take(k, c.kv), take(v, c.kv),
            take(sink, c.query, 0), q_segment_ids, kv_segment_ids,
        )  # fmt: skip
        outs.append(out)
        lses.append(lse)
    return join(outs, classes, 2), join(lses, classes, 1)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """A plan bound to one call: loads tiles of queries, keys and masks."""

    spec: Spec
    plan: Plan
    group: int
    keys: int

    @classmethod
    def of(cls, spec: Spec, q, k, packed: bool, tile: int | None = None) -> "Tiling":
        """The tiling of a call whose heads share one mask; `packed`: it has ids."""
        T, S, K = q.shape[1], k.shape[1], k.shape[2]
        group = q.shape[2] // K
        made = plan(spec.mask, T, S, spec.offset, group, K, packed, tile)
        return cls(spec, made, group, S)

    def pad_rows(self, x, axis: int = 1, value=0):
        """Extend the query axis to whole blocks."""
        return _pad(x, axis, self.plan.rows * self.plan.block_q, value)

    def heads(self, x, b, g):
        """Keys or values of head batch `g`: [batch, keys, H]."""
        n = self.plan.batch
        x = lax.dynamic_slice(
            x, corner(b, 0, g * n, 0), (1, x.shape[1], n, x.shape[3])
        )[0].transpose(1, 0, 2)  # fmt: skip
        return _pad(x.astype(compute_dtype(x.dtype)), 1, self.plan.keys, 0)

    def rows(self, x, b, g, r):
        """One block of queries, group heads as rows: [batch, group * block_q, H]."""
        n, block = self.plan.batch, self.plan.block_q
        size = (1, block, n * self.group, x.shape[3])
        x = lax.dynamic_slice(x, corner(b, r * block, g * n * self.group, 0), size)
        x = x.reshape(block, n, self.group, -1).transpose(1, 2, 0, 3)
        return x.reshape(n, self.group * block, -1)

    def put_rows(self, out, x, b, g, r):
        """Write what `rows` reads."""
        n, block = self.plan.batch, self.plan.block_q
        x = x.reshape(n, self.group, block, -1).transpose(2, 0, 1, 3)
        x = x.reshape(1, block, n * self.group, -1).astype(out.dtype)
        start = corner(b, r * block, g * n * self.group, 0)
        return lax.dynamic_update_slice(out, x, start)

    def vector(self, x, b, g, r):
        """One block of a per-row statistic [B, N, T]: [batch, group * block_q]."""
        n, block = self.plan.batch * self.group, self.plan.block_q
        x = lax.dynamic_slice(x, corner(b, g * n, r * block), (1, n, block))
        return x.reshape(self.plan.batch, self.group * block)

    def put_vector(self, out, x, b, g, r):
        """Write what `vector` reads."""
        n, block = self.plan.batch * self.group, self.plan.block_q
        x = x.reshape(1, n, block)
        return lax.dynamic_update_slice(out, x, corner(b, g * n, r * block))

    def loop(self, r, ids, step, carry):
        """Fold `step(carry, view, start, width, seen)` over the tiles of block `r`.

        `view` takes and puts the rows of the tile; `seen` is bool [rows, width], or
        None where every pair is visible. With `ids` (of one row of the batch) tiles
        whose documents are others' are passed over.
        """
        p = self.plan
        if p.wide_counts.any():
            starts, counts = jnp.asarray(p.wide_starts), jnp.asarray(p.wide_counts)
            view = Rows(self.group, p.block_q, p.block_q, 0)
            at = view.positions(r)

            def whole(n, carry):
                n = n if ids is None else ids.wide[r, n]
                start = starts[r, n]
                seen = None if ids is None else ids.same(at, start, p.wide)
                return step(carry, view, start, p.wide, seen)

            count = counts[r] if ids is None else ids.wide_counts[r]
            carry = lax.fori_loop(0, count, whole, carry)
        if p.narrow_counts.any():
            tables = (p.narrow_rows, p.narrow_starts, p.narrow_low, p.narrow_high)
            spans, counts = jnp.asarray(tables), jnp.asarray(p.narrow_counts)

            def masked(n, carry):
                n = n if ids is None else ids.narrow[r, n]
                first, start, low, high = spans[:, r, n]
                view = Rows(self.group, p.block_q, p.sub, first)
                at = view.positions(r)
                j = start + jnp.arange(p.narrow)[None, :]
                seen = self.spec.mask.visible(self.spec.offset + at, j)
                if p.ranged:
                    seen = seen & (j >= low) & (j < high)
                if ids is not None:
                    seen = seen & ids.same(at, start, p.narrow)
                return step(carry, view, start, p.narrow, seen)

            count = counts[r] if ids is None else ids.narrow_counts[r]
            carry = lax.fori_loop(0, count, masked, carry)
        return carry

    def scores(self, q, k, seen):
        """Raw and final scores of one tile, float32 [batch, group * block_q, width]."""
        raw = jnp.einsum("nqh,nkh->nqk", q, k, preferred_element_type=wide_dtype(q))
        final = self.spec.cap(raw)
        return raw, final if seen is None else jnp.where(seen, final, HIDDEN)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Queries `first .. first + size` of a block, for every head of a group.

    Row arrays are [batch, group * block_q, ...].
    """

    group: int
    block_q: int
    size: int
    first: jax.Array | int

    def positions(self, r):
        """Query index of each row of the tile: [group * size, 1]."""
        one = r * self.block_q + self.first + jnp.arange(self.size)
        return jnp.tile(one, self.group)[:, None]

    def take(self, x):
        """The rows of the tile."""
        if self.size == self.block_q:
            return x
        x4 = x.reshape(x.shape[0], self.group, self.block_q, -1)
        x4 = lax.dynamic_slice_in_dim(x4, self.first, self.size, axis=2)
        return x4.reshape(x.shape[0], -1, *x.shape[2:])

    def take_t(self, x):
        """The columns of the tile from a transposed row array."""
        if self.size == self.block_q:
            return x
        x4 = x.reshape(*x.shape[:2], self.group, self.block_q)
        x4 = lax.dynamic_slice_in_dim(x4, self.first, self.size, axis=3)
        return x4.reshape(*x.shape[:2], -1)

    def put(self, x, part):
        """`x` with the rows of the tile replaced."""
        if self.size == self.block_q:
            return part
        shape = (x.shape[0], self.group, -1, *x.shape[2:])
        x4 = lax.dynamic_update_slice_in_dim(
            x.reshape(shape), part.reshape(shape), self.first, axis=2
        )
        return x4.reshape(x.shape)


def slice_keys(x, start, width: int):
    """Keys `start .. start + width` of [batch, keys, H]."""
    return lax.dynamic_slice(x, corner(0, start, 0), (x.shape[0], width, x.shape[2]))


def _pad(x, axis: int, size: int, value):
    if x.shape[axis] == size:
        return x
    widths = [(0, size - n if a == axis else 0) for a, n in enumerate(x.shape)]
    return jnp.pad(x, widths, constant_values=value)


class Ids(NamedTuple):
    """Segment ids, padded to whole tiles, and the tiles in which two of them may meet.

    own [B, T], other [B, S]; wide, narrow [B, rows, tiles]: the plan's tiles of each
    block of queries, those to visit first; wide_counts, narrow_counts [B, rows].
    """

    own: jax.Array
    other: jax.Array
    wide: jax.Array
    wide_counts: jax.Array
    narrow: jax.Array
    narrow_counts: jax.Array

    def of(self, b) -> "Ids":
        """Those of one row of the batch."""
        return Ids(*(x[b] for x in self))

    def same(self, at, start, width):
        """Pairs of one segment: bool [rows, width]."""
        other = lax.dynamic_slice(self.other, (start,), (width,))
        return self.own[at] == other[None, :]


def pad_segments(tiling: Tiling, q_segment_ids, kv_segment_ids) -> Ids | None:
    """The ids of a call bound to its plan, or None."""
    if q_segment_ids is None:
        return None
    p = tiling.plan
    own = tiling.pad_rows(q_segment_ids)
    other = _pad(kv_segment_ids, 1, p.keys, 0)
    block = p.block_q * np.arange(p.rows)[:, None]
    zeros = np.zeros_like(p.wide_starts)
    wide = _meeting(p.cell, own, block + zeros, p.block_q, other, p.wide_starts, p.wide)
    narrow = _meeting(
        p.cell, own, block + p.narrow_rows, p.sub, other, p.narrow_starts, p.narrow
    )
    return Ids(
        own, other, *_first(wide, p.wide_counts), *_first(narrow, p.narrow_counts)
    )


def _meeting(cell, own, row, rows, other, start, width):
    """Whether ids of each tile's queries and keys can be equal: bool [B, rows, tiles].

    Their ranges overlap wherever two of them are equal; the range of a tile is that of
    its cells.
    """
    if not width:
        return jnp.zeros((len(own), *start.shape), bool)

    def span(ids, first, size):
        cells = ids.reshape(len(ids), -1, cell)
        at = (first[..., None] + np.arange(0, size, cell)) // cell
        low, high = cells.min(-1)[:, at], cells.max(-1)[:, at]
        return low.min(-1), high.max(-1)

    low, high = span(own, row, rows)
    other_low, other_high = span(other, start, width)
    return (low <= other_high) & (other_low <= high)


def _first(meeting, counts):
    """Tiles in an order that has those to visit first, and how many they are."""
    known = np.arange(meeting.shape[-1]) < counts[:, None]
    visit = meeting & known
    order = jnp.argsort(~visit, axis=-1, stable=True)
    return order.astype(jnp.int32), visit.sum(-1, dtype=jnp.int32)


def _forward_class(spec, q, k, v, sink, q_segment_ids, kv_segment_ids):
    tiling = Tiling.of(spec, q, k, q_segment_ids is not None)
    B, T, N, _ = q.shape
    p, width = tiling.plan, v.shape[3]
    compute = compute_dtype(q.dtype)
    segments = pad_segments(tiling, q_segment_ids, kv_segment_ids)
    q = tiling.pad_rows(q)

    def block(r, carry, b, g, k_heads, v_heads, longest):
        out, lse = carry
        q_rows = wide(tiling.rows(q, b, g, r)) * spec.scale
        ids = None if segments is None else segments.of(b)
        fold = functools.partial(
            _fold, tiling, r, ids, q_rows.astype(compute), k_heads, v_heads
        )
        if p.pairs < SMALL:
            top, total, acc = fold(_online)
        else:
            bound = longest * _longest(q_rows)
            if spec.softcap is not None:
                bound = jnp.minimum(bound, spec.softcap)
            top, total, acc = lax.cond(
                bound <= BOUNDED, lambda: fold(_bounded), lambda: fold(_online)
            )
        if sink is not None:
            top, total, acc = _add_sink(tiling, sink, g, top, total, acc)
        some = total > 0
        total = jnp.where(some, total, 1.0)
        out = tiling.put_rows(out, acc / total[..., None], b, g, r)
        stat = jnp.where(some, top + jnp.log(total), -jnp.inf)
        return out, tiling.put_vector(lse, stat, b, g, r)

    def heads(n, carry):
        b, g = n // (k.shape[2] // p.batch), n % (k.shape[2] // p.batch)
        k_heads, v_heads = tiling.heads(k, b, g), tiling.heads(v, b, g)
        longest = _longest(wide(k_heads))
        body = functools.partial(
            block, b=b, g=g, k_heads=k_heads, v_heads=v_heads, longest=longest
        )
        return lax.fori_loop(0, p.rows, body, carry)

    out = jnp.zeros((B, q.shape[1], N, width), v.dtype)
    lse = jnp.zeros((B, N, q.shape[1]), wide_dtype(q))
    out, lse = lax.fori_loop(0, B * (k.shape[2] // p.batch), heads, (out, lse))
    return out[:, :T], lse[:, :, :T]


def _longest(x):
    """Largest norm of a row."""
    return jnp.sqrt(jnp.square(x).sum(-1).max())


def _fold(tiling: Tiling, r, ids, q_rows, k_heads, v_heads, weigh):
    """Row maximum or 0, denominator and numerator of one block of queries."""
    dtype = wide_dtype(q_rows)

    def step(state, view, start, size, seen):
        top, total, acc = (view.take(x) for x in state)
        k_tile = slice_keys(k_heads, start, size)
        _, scores = tiling.scores(view.take(q_rows), k_tile, seen)
        top, fade, weights = weigh(top, scores)
        part = jnp.einsum(
            "nqk,nkh->nqh", weights.astype(q_rows.dtype),
            slice_keys(v_heads, start, size), preferred_element_type=dtype,
        )  # fmt: skip
        if fade is not None:
            total, acc = total * fade, acc * fade[..., None]
        new = (top, total + weights.sum(-1), acc + part)
        return tuple(view.put(x, y) for x, y in zip(state, new, strict=True))

    shape = q_rows.shape[:2]
    first = 0.0 if weigh is _bounded else HIDDEN
    state = jnp.full(shape, first, dtype), jnp.zeros(shape, dtype)
    acc = jnp.zeros((*shape, v_heads.shape[-1]), dtype)
    return tiling.loop(r, ids, step, (*state, acc))


def _bounded(top, scores):
    """Weights of scores that cannot overflow: no maximum is needed."""
    return top, None, jnp.exp(scores)


def _online(top, scores):
    """Weights below a running maximum, and what earlier sums shrink by."""
    new = jnp.maximum(top, scores.max(-1))
    shift = jnp.where(new > HIDDEN / 2, new, 0.0)
    return new, jnp.exp(top - shift), jnp.exp(scores - shift[..., None])


def _add_sink(tiling: Tiling, sink, g, top, total, acc):
    """Let a learned logit per head take its share of the denominator."""
    n = tiling.plan.batch * tiling.group
    own = lax.dynamic_slice(wide(sink), (g * n,), (n,))
    own = jnp.repeat(own, tiling.plan.block_q).reshape(top.shape)
    new = jnp.maximum(top, own)
    fade = jnp.exp(top - new)
    return new, total * fade + jnp.exp(own - new), acc * fade[..., None]
