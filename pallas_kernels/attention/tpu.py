"""Block-sparse attention on TPU: one operation for every mask (Mosaic TPU).

A step of the grid is one visit of a walk (`blocks.walk`), read from scalar memory, so
hidden blocks cost nothing and only blocks with hidden pairs are masked. The query heads
of a kv head are rows of one tile, head after head. Scores are held transposed, keys
down and queries across: what belongs to a query (maximum, denominator, log-sum-exp) is
then one row of lanes, and sums over keys add registers instead of crossing lanes.
The backward pass is FlashAttention-2's (arXiv 2307.08691, algorithm 2) in two kernels,
each of which adds in a fixed order, so gradients repeat to the bit.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch, tuning
from pallas_kernels.attention import blocks, vjp, xla
from pallas_kernels.attention.spec import Spec

HIDDEN = -1e30  # score of a masked pair; its weight is exactly 0
LOG2E = math.log2(math.e)
ROWS = 1024  # most rows of a tile before the heads of a group are split
MOST_RUNS = (1, 2, 4, 8, 16, 32, 64)  # queries are cut in so many, one kernel each
VMEM = 64 << 20  # bytes that a kernel may take, within every generation's memory
RANGES = 32 << 10  # most words of segment ranges held in scalar memory
WIDTHS = 256  # widest head
# A part of a tile that registers hold: queries and keys. Some parts at a time
# (`tuning`: at_once, at_once_back) hide the latency of the products.
LANES, KEYS = 128, 128
_INTERPRET = jax.make_user_context(False)


@contextmanager
def interpreted(how=True) -> Iterator[None]:
    """Kernels traced inside run on the CPU; `how` may be `pltpu.InterpretParams`."""
    with _INTERPRET(how):
        yield


def refuses(call: dispatch.Call) -> str | None:
    """Why these kernels would not take a call, or None."""
    dtype = jnp.result_type(call.dtype, call.kv_dtype)
    if dtype != jnp.bfloat16:
        return f"dtype {dtype} is not bfloat16 (exact products spill registers)"
    for width in (call.q_shape[3], call.v_shape[3]):
        if width % 16 or not 0 < width <= WIDTHS:
            return f"head width {width} is not a multiple of 16 up to {WIDTHS}"
    if 0 in (*call.q_shape, *call.kv_shape):
        return f"q {call.q_shape} or k {call.kv_shape} is empty"
    spread = dispatch.outside_shard_map()
    if spread is not None:
        return spread
    for c in xla.head_classes(call.spec, call.q_shape[2], call.kv_shape[2]):
        own, _ = _packed(len(c.query), len(c.kv))
        found = _runs(c.spec, call.q_shape[1], call.kv_shape[1], own)
        if isinstance(found, str):
            return found
    return None


def _runs(spec: Spec, T: int, S: int, own: int) -> tuple[range, ...] | str:
    """The fewest equal runs of queries that each have a walk, or why there are none."""
    reason = ""
    for count in MOST_RUNS:
        size = -(-T // (count * ROWS)) * ROWS
        runs = tuple(range(n, min(n + size, T)) for n in range(0, T, size))
        # The last run sees the most under a causal mask: where it fits, so do others.
        for run in runs[::-1]:
            found = blocks.walk(spec.mask, len(run), S, spec.offset + run.start, own)
            if isinstance(found, str):
                reason = found
                break
        else:
            return runs
        if not isinstance(reason, blocks.TooLong):
            return reason
    return reason


def _packed(query_heads: int, kv_heads: int) -> tuple[int, int]:
    """Heads of a group that share a tile, and parts that a group is split in."""
    group = query_heads // kv_heads
    most = ROWS // blocks.LEAST
    own = next(n for n in range(min(group, most), 0, -1) if group % n == 0)
    return own, group // own


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """How the arrays of heads that share a mask lie for the kernels.

    A tile of queries has `rows` = `own` heads x `block_q` queries.
    """

    spec: Spec
    walk: blocks.Walk
    own: int
    parts: int
    queries: int
    keys: int
    dtype: jnp.dtype

    @classmethod
    def of(cls, spec: Spec, q, k, v) -> "Layout":
        """The layout of a call."""
        own, parts = _packed(q.shape[2], k.shape[2])
        T, S = q.shape[1], k.shape[1]
        found = blocks.walk(spec.mask, T, S, spec.offset, own)
        if isinstance(found, str):
            raise ValueError(f"mosaic_tpu: {found}; use implementation='xla'")
        return cls(spec, found, own, parts, T, S, jnp.result_type(q, k, v))

    @property
    def rows(self) -> int:
        """Rows of a tile of queries."""
        return self.own * self.walk.block_q

    @property
    def tiles(self) -> int:
        """Tiles along the queries."""
        return -(-self.queries // self.walk.block_q)

    @property
    def key_blocks(self) -> int:
        """Blocks along the keys."""
        return -(-self.keys // self.walk.block_k)

    def lay_queries(self, x):
        """[B, T, N, H] as [B, N / own, rows of all tiles, H]."""
        x = _pad(x.astype(self.dtype), 1, self.tiles * self.walk.block_q)
        B, _, N, H = x.shape
        x = x.reshape(B, self.tiles, -1, N // self.own, self.own, H)
        return x.transpose(0, 3, 1, 4, 2, 5).reshape(B, N // self.own, -1, H)

    def unlay_queries(self, x):
        """What `lay_queries` was given."""
        x = x.reshape(*x.shape[:2], self.tiles, self.own, -1, x.shape[3])
        x = x.transpose(0, 2, 4, 1, 3, 5)
        B, nq, bq, parts, own, H = x.shape
        return x.reshape(B, nq * bq, parts * own, H)[:, : self.queries]

    def lay_rows(self, x, padding=0.0):
        """A statistic [B, N, T] of each row as [B, N / own, tiles, 1, rows]."""
        x = _pad(x.astype(jnp.float32), 2, self.tiles * self.walk.block_q, padding)
        x = x.reshape(len(x), -1, self.own, self.tiles, self.walk.block_q)
        return x.swapaxes(2, 3).reshape(*x.shape[:2], self.tiles, 1, self.rows)

    def unlay_rows(self, x):
        """What `lay_rows` was given."""
        x = x.reshape(*x.shape[:2], self.tiles, self.own, -1).swapaxes(2, 3)
        B, parts, own, nq, bq = x.shape
        return x.reshape(B, parts * own, nq * bq)[:, :, : self.queries]

    def lay_keys(self, x):
        """[B, S, K, H] as [B, K, keys of all blocks, H]."""
        x = _pad(x.astype(self.dtype), 1, self.key_blocks * self.walk.block_k)
        return x.transpose(0, 2, 1, 3)

    def unlay_keys(self, x):
        """[B, K * parts, keys, H] as [B, S, K, H], the parts of a group added."""
        x = x.reshape(len(x), -1, self.parts, *x.shape[2:]).sum(2)
        return x.transpose(0, 2, 1, 3)[:, : self.keys]


def _pad(x, axis: int, size: int, value=0):
    widths = [(0, size - n if a == axis else 0) for a, n in enumerate(x.shape)]
    return jnp.pad(x, widths, constant_values=value)


class Kernel:
    """One kernel over the visits of a layout, and what of its grid is the same.

    Arrays are added with the block of them that a visit reads.
    """

    def __init__(self, layout: Layout, visits: blocks.Visits, segments):
        self.layout, self.visits = layout, visits
        self.scalars = [jnp.asarray(visits.where), jnp.asarray(visits.what)]
        self.arrays, self.specs = [], []
        walk = layout.walk
        shape = (None, walk.patterns.shape[1], walk.block_q)
        self.add(
            jnp.asarray(walk.patterns), shape,
            lambda b, h, q, k, what: (what >> blocks.SHIFT, 0, 0),
        )  # fmt: skip
        self.segments, self.ranges = segments[0] is not None, False
        if self.segments:
            self._add_ids(*segments)

    def _add_ids(self, own, other):
        layout = self.layout
        own = _pad(own.astype(jnp.int32), 1, layout.tiles * layout.walk.block_q)
        size = layout.key_blocks * layout.walk.block_k
        other = _pad(other.astype(jnp.int32), 1, size)
        own = own.reshape(len(own), layout.tiles, 1, -1)
        other = other.reshape(len(own), layout.key_blocks, 1, -1)
        ends = [f(x, (2, 3)).ravel() for x in (own, other) for f in (jnp.min, jnp.max)]
        self.ranges = sum(x.size for x in ends) <= RANGES
        if self.ranges:
            self.scalars += ends
        self.add(own, (None, None, *own.shape[2:]), lambda b, h, q, k, _: (b, q, 0, 0))
        self.add(
            other, (None, None, *other.shape[2:]), lambda b, h, q, k, _: (b, k, 0, 0)
        )

    def add(self, array, shape, index):
        """An operand and its block `index(b, h, query block, key block, what)`."""
        self.arrays.append(array)
        self.specs.append(self._spec(shape, index))

    def _spec(self, shape, index):
        def place(b, h, n, where, what, *_):
            at = where[n]
            return index(b, h, at & 0xFFFF, at >> 16, what[n])

        return pl.BlockSpec(shape, place)

    def add_queries(self, *arrays):
        """Laid queries, or what has their shape."""
        for x in arrays:
            self.add(x, *self._queries(x.shape))

    def _queries(self, shape):
        block = (None, None, self.layout.rows, shape[3])
        return block, lambda b, h, q, k, _: (b, h, q, 0)

    def _rows(self):
        block = (None, None, None, 1, self.layout.rows)
        return block, lambda b, h, q, k, _: (b, h, q, 0, 0)

    def add_rows(self, *arrays):
        """Laid statistics of rows."""
        for x in arrays:
            self.add(x, *self._rows())

    def add_keys(self, *arrays):
        """Laid keys or values."""
        parts = self.layout.parts
        for x in arrays:
            block = (None, None, self.layout.walk.block_k, x.shape[3])
            self.add(x, block, lambda b, h, q, k, _: (b, lax.div(h, parts), k, 0))

    def add_turned(self, x):
        """Laid keys or values, keys last."""
        parts = self.layout.parts
        block = (None, None, x.shape[2], self.layout.walk.block_k)
        self.add(x, block, lambda b, h, q, k, _: (b, lax.div(h, parts), 0, k))

    def run(self, body, batch, heads, outputs, scratch):
        """Run `body(visit, *refs)` at all visits; outputs are (shape, type, block)."""
        count = len(self.scalars)

        def kernel(*refs):
            skip = count + (3 if self.segments else 1)
            body(Visit(self, refs[:skip]), *refs[skip:])

        call = pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=count,
                grid=(batch, heads, len(self.visits.where)),
                in_specs=self.specs,
                out_specs=[self._spec(*block) for _, _, block in outputs],
                scratch_shapes=[pltpu.VMEM(s, jnp.float32) for s in scratch],
            ),
            out_shape=[jax.ShapeDtypeStruct(s, dtype) for s, dtype, _ in outputs],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"),
                vmem_limit_bytes=VMEM,
            ),
            interpret=_INTERPRET.value,
            name=body.__name__.strip("_"),
        )
        return call(*self.scalars, *self.arrays)


class Visit:
    """One step of the grid, as a kernel's body sees it."""

    def __init__(self, call: Kernel, refs):
        self.call, self.layout = call, call.layout
        n = pl.program_id(2)
        count = len(call.scalars)
        where, self.what = refs[0][n], refs[1][n]
        self.pattern, *self.ids = refs[count:]
        self.seen = self.is_(blocks.SEEN)
        if call.ranges:
            q_low, q_high, k_low, k_high = refs[2:count]
            b = pl.program_id(0)
            at = b * self.layout.tiles + (where & 0xFFFF)
            to = b * self.layout.key_blocks + (where >> 16)
            self.seen &= (q_low[at] <= k_high[to]) & (k_low[to] <= q_high[at])

    def is_(self, bit: int):
        """Whether a bit of the visit is set."""
        return (self.what & bit) != 0

    def fold(self, step, at_once: int):
        """Run `step(queries, keys, hide)` on the parts of the visit that has pairs.

        A part is `LANES` queries and `KEYS` keys, given as slices of the tile; `hide`
        masks its transposed scores.
        """
        masked = self.is_(blocks.MASKED)
        pl.when(self.seen & masked)(lambda: self._parts(step, at_once, True))
        pl.when(self.seen & jnp.logical_not(masked))(
            lambda: self._parts(step, at_once, False)
        )

    def _parts(self, step, at_once: int, masked: bool):
        down = self.layout.walk.block_k // KEYS

        def part(n, carry):
            row = pl.multiple_of(lax.div(n, down) * LANES, LANES)
            key = pl.multiple_of(lax.rem(n, down) * KEYS, KEYS)
            hide = functools.partial(self._hide, masked, row, key)
            step(pl.ds(row, LANES), pl.ds(key, KEYS), hide)
            return carry

        count = self.layout.rows // LANES * down
        # The CPU's compiler takes long over copies that it gains nothing by.
        unroll = 1 if _INTERPRET.value else min(at_once, count)
        lax.fori_loop(0, count, part, 0, unroll=unroll)

    def _hide(self, masked: bool, row, key, scores):
        """`scores` [KEYS, LANES] with hidden pairs at HIDDEN."""
        seen = None
        row = pl.multiple_of(lax.rem(row, self.layout.walk.block_q), LANES)
        at = pl.ds(row, LANES)
        if masked:
            j = key + lax.broadcasted_iota(jnp.int32, scores.shape, 0)
            for n in range(0, self.pattern.shape[0], 2):
                low, high = (self.pattern[pl.ds(m, 1), at] for m in (n, n + 1))
                part = (j >= low) & (j < high)
                seen = part if seen is None else seen | part
        if self.call.segments:
            own, other = self.ids
            other = other[:, pl.ds(key, KEYS)]
            wide = jnp.broadcast_to(other, (LANES, KEYS))
            same = wide.T[:, :1] == own[:, at]
            seen = same if seen is None else seen & same
        return scores if seen is None else jnp.where(seen, scores, HIDDEN)


def _product(a, b, axes):
    """Matrix product over one axis of each, float32, exact for float32 operands."""
    exact = a.dtype == jnp.float32
    return lax.dot_general(
        a, b, (((axes[0],), (axes[1],)), ((), ())),
        precision=lax.Precision.HIGHEST if exact else None,
        preferred_element_type=jnp.float32,
    )  # fmt: skip


def _scores(spec: Spec, q, k):
    """Transposed scores [block_k, rows] times log2(e), and the slope of the cap."""
    raw = _product(k, q, (1, 1))
    if spec.softcap is None:
        return raw * (spec.scale * LOG2E), None
    bend = jnp.tanh(raw * (spec.scale / spec.softcap))
    return bend * (spec.softcap * LOG2E), 1.0 - jnp.square(bend)


def _cut(spec: Spec, q, k) -> Iterator[tuple[Spec, slice]]:
    """Queries that one kernel takes, and the mask as they see it."""
    own, _ = _packed(q.shape[2], k.shape[2])
    runs = _runs(spec, q.shape[1], k.shape[1], own)
    if isinstance(runs, str):
        raise ValueError(f"mosaic_tpu: {runs}; use implementation='xla'")
    for run in runs:
        offset = spec.offset + run.start
        yield dataclasses.replace(spec, offset=offset), slice(run.start, run.stop)


def _own(segments, at: slice):
    own, other = segments
    return None if own is None else own[:, at], other


def _forward_class(spec, q, k, v, sink, segments):
    found = [
        _forward(part, q[:, at], k, v, sink, _own(segments, at))
        for part, at in _cut(spec, q, k)
    ]
    if len(found) == 1:
        return found[0]
    outs, lses = zip(*found, strict=True)
    return jnp.concatenate(outs, 1), jnp.concatenate(lses, 2)


def _forward(spec, q, k, v, sink, segments):
    layout = Layout.of(spec, q, k, v)
    call = Kernel(layout, layout.walk.by_rows, segments)
    queries = layout.lay_queries(q)
    B, tiles, _, _ = queries.shape
    rows, width = layout.rows, v.shape[3]
    call.add_queries(queries)
    call.add_keys(layout.lay_keys(k))
    call.add_turned(layout.lay_keys(v).swapaxes(2, 3))
    learned = jnp.full((q.shape[2],), HIDDEN) if sink is None else sink
    learned = jnp.maximum(learned.astype(jnp.float32) * LOG2E, HIDDEN)
    learned = jnp.repeat(learned, layout.walk.block_q).reshape(tiles, 1, rows)
    call.add(learned, (None, 1, rows), lambda b, h, q, k, _: (h, 0, 0))
    out = (B, tiles, queries.shape[2], width)
    lse = (B, tiles, layout.tiles, 1, rows)
    outputs = [
        (out, v.dtype, call._queries(out)), (lse, jnp.float32, call._rows())
    ]  # fmt: skip
    body = functools.partial(_forward_kernel, spec)
    body.__name__ = "attention_forward"
    out, lse = call.run(body, B, tiles, outputs, [(1, rows), (1, rows), (width, rows)])
    return layout.unlay_queries(out), layout.unlay_rows(lse)


def _forward_kernel(spec, visit, q, k, v, sink, out, lse, top, total, acc):
    @pl.when(visit.is_(blocks.FIRST))
    def _():
        top[...] = sink[...]
        total[...] = jnp.where(sink[...] > HIDDEN / 2, 1.0, 0.0)
        acc[...] = jnp.zeros_like(acc)

    def step(rows, keys, hide):
        scores = hide(_scores(spec, q[rows], k[keys])[0])
        old = top[:, rows]
        new = jnp.maximum(old, scores.max(0, keepdims=True))
        shift = jnp.where(new > HIDDEN / 2, new, 0.0)
        fade = jnp.exp2(old - shift)
        weights = jnp.exp2(scores - shift)
        top[:, rows] = new
        total[:, rows] = total[:, rows] * fade + weights.sum(0, keepdims=True)
        part = _product(v[:, keys], weights.astype(v.dtype), (1, 0))
        acc[:, rows] = acc[:, rows] * fade + part

    visit.fold(step, tuning.of("attention_tpu").at_once)

    @pl.when(visit.is_(blocks.LAST))
    def _():
        some = total[...] > 0
        safe = jnp.where(some, total[...], 1.0)
        out[...] = (acc[...] / safe).T.astype(out.dtype)
        stat = top[...] * (1 / LOG2E) + jnp.log(safe)
        lse[...] = jnp.where(some, stat, -jnp.inf)


def backward_class(spec, q, k, v, segments, d_out, lse, delta):
    """Gradients of q, k and v of heads that share a mask; see `vjp.gradients`."""
    cuts = list(_cut(spec, q, k))
    found = []
    for part, at in cuts:
        rows = d_out[:, at], lse[:, :, at], delta[:, :, at]
        own = _own(segments, at)
        found.append(_backward(part, q[:, at], k, v, own, *rows, whole=len(cuts) == 1))
    if len(found) == 1:
        return found[0]
    d_q, d_k, d_v = zip(*found, strict=True)
    d_k, d_v = (functools.reduce(jnp.add, parts) for parts in (d_k, d_v))
    return jnp.concatenate(d_q, 1), d_k.astype(k.dtype), d_v.astype(v.dtype)


def _backward(spec, q, k, v, segments, d_out, lse, delta, *, whole: bool):
    """Those of some queries; d_k and d_v float32 unless these are the `whole`."""
    layout = Layout.of(spec, q, k, v)
    queries, d_rows = layout.lay_queries(q), layout.lay_queries(d_out)
    keys, values = layout.lay_keys(k), layout.lay_keys(v)
    # Rows that saw nothing, and rows of padding, get weight exp2(-inf) = 0.
    lse = jnp.where(jnp.isfinite(lse), lse * LOG2E, -HIDDEN)
    rows = layout.lay_rows(lse, -HIDDEN), layout.lay_rows(delta)
    B, tiles = queries.shape[:2]

    def run(body, visits, outputs, scratch):
        call = Kernel(layout, visits, segments)
        call.add_queries(queries, d_rows)
        call.add_keys(keys, values)
        call.add_rows(*rows)
        whole = functools.partial(body, spec)
        whole.__name__ = f"attention{body.__name__}"
        return call.run(whole, B, tiles, outputs(call), scratch)

    width = q.shape[3]
    (d_q,) = run(
        _d_q, layout.walk.by_rows,
        lambda call: [(queries.shape, q.dtype, call._queries(queries.shape))],
        [(width, layout.rows)],
    )  # fmt: skip

    def key_outputs(call):
        size = layout.walk.block_k
        final = whole and layout.parts == 1
        dtypes = [x.dtype if final else jnp.float32 for x in (k, v)]
        return [
            (
                (B, tiles, *x.shape[2:]), dtype,
                ((None, None, size, x.shape[3]), lambda b, h, q, k, _: (b, h, k, 0)),
            )
            for x, dtype in zip((keys, values), dtypes, strict=True)
        ]  # fmt: skip

    scratch = [(layout.walk.block_k, n) for n in (width, v.shape[3])]
    d_k, d_v = run(_d_kv, layout.walk.by_columns, key_outputs, scratch)
    d_k, d_v = layout.unlay_keys(d_k), layout.unlay_keys(d_v)
    if whole:
        d_k, d_v = d_k.astype(k.dtype), d_v.astype(v.dtype)
    return layout.unlay_queries(d_q), d_k, d_v


def _weigh(spec, hide, q, d_out, k, v, lse, delta):
    """Weights of a part and the gradient of its scores, both [KEYS, LANES]."""
    scores, slope = _scores(spec, q, k)
    weights = jnp.exp2(hide(scores) - lse)
    d_scores = weights * (_product(v, d_out, (1, 1)) - delta)
    if slope is not None:
        d_scores = d_scores * slope
    return weights.astype(q.dtype), d_scores.astype(q.dtype)


def _d_q(spec, visit, q, d_out, k, v, lse, delta, d_q, acc):
    @pl.when(visit.is_(blocks.FIRST))
    def _():
        acc[...] = jnp.zeros_like(acc)

    def step(rows, keys, hide):
        own = q[rows], d_out[rows], k[keys], v[keys], lse[:, rows], delta[:, rows]
        _, d_scores = _weigh(spec, hide, *own)
        acc[:, rows] += _product(k[keys], d_scores, (0, 0))

    visit.fold(step, tuning.of("attention_tpu").at_once_back)

    @pl.when(visit.is_(blocks.LAST))
    def _():
        d_q[...] = (acc[...] * spec.scale).T.astype(d_q.dtype)


def _d_kv(spec, visit, q, d_out, k, v, lse, delta, d_k, d_v, acc_k, acc_v):
    @pl.when(visit.is_(blocks.FIRST))
    def _():
        acc_k[...] = jnp.zeros_like(acc_k)
        acc_v[...] = jnp.zeros_like(acc_v)

    def step(rows, keys, hide):
        own = q[rows], d_out[rows], k[keys], v[keys], lse[:, rows], delta[:, rows]
        weights, d_scores = _weigh(spec, hide, *own)
        acc_v[keys] += _product(weights, d_out[rows], (1, 0))
        acc_k[keys] += _product(d_scores, q[rows], (1, 0))

    visit.fold(step, tuning.of("attention_tpu").at_once_back)

    @pl.when(visit.is_(blocks.LAST))
    def _():
        d_k[...] = (acc_k[...] * spec.scale).astype(d_k.dtype)
        d_v[...] = acc_v[...].astype(d_v.dtype)


forward = functools.partial(vjp.outputs, _forward_class)
backward = functools.partial(vjp.gradients, backward_class)
attend = vjp.operation(forward, backward)
