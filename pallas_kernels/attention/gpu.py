"""Block-sparse attention on Hopper: one operation for every mask (Mosaic GPU).

A tile is 128 rows, those of a group's heads one head after the other, on two warpgroups
of 64; a third one streams the blocks that the mask's walk names (`blocks.build`) into
shared memory by TMA. Whole blocks come before those with hidden pairs, so two loops
need no branch. The backward pass is FlashAttention-2's (arXiv 2307.08691, algorithm 2)
in two kernels, each of which adds in a fixed order, so gradients repeat to the bit.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch, tuning
from pallas_kernels.attention import blocks, vjp
from pallas_kernels.attention.spec import Spec

HIDDEN = -1e30  # score of a masked pair; its weight is exactly 0
LOG2E = math.log2(math.e)
WIDTHS = (64, 128)
GROUP, GROUPS = 64, 2  # rows of a warpgroup, and warpgroups that compute
ROWS = GROUP * GROUPS
KEYS = 128  # of a block of the forward pass
BACK = 64  # keys, or rows, of a block of the backward passes
MOST_VISITS = 1 << 25  # of a walk, 8 bytes each: constants of the program
_PAIRS = plgpu.Layout.WGMMA
_ROW, _COLUMN = _PAIRS.reduce(1), _PAIRS.reduce(0)
_INTERPRET = jax.make_user_context(False)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Kernels traced inside run on the CPU, races looked for."""
    with _INTERPRET(True):
        yield


def refuses(call: dispatch.Call) -> str | None:
    """Why these kernels would not take a call, or None."""
    dtype = jnp.result_type(call.dtype, call.kv_dtype)
    if dtype not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)):
        return f"dtype {dtype} is not bfloat16 or float16"
    widths = call.q_shape[3], call.v_shape[3]
    if widths[0] != widths[1] or widths[0] not in WIDTHS:
        return f"head widths {widths} are not both one of {WIDTHS}"
    if 0 in (*call.q_shape, *call.kv_shape):
        return f"q {call.q_shape} or k {call.kv_shape} is empty"
    return _refuses_walk(call) or dispatch.not_hopper() or dispatch.outside_shard_map()


def _refuses_walk(call: dispatch.Call) -> str | None:
    (_, T, N, _), (_, S, K, _) = call.q_shape, call.kv_shape[:4]
    block = ROWS // _shared(N // K) * BACK
    if T * S <= MOST_VISITS * block:
        return None
    visits = _pairs(call.spec.mask, T, S, N, call.spec.offset) // (N * block)
    if visits > MOST_VISITS:
        return (
            f"{T} x {S} tokens under this mask are {visits} visits, above {MOST_VISITS}"
        )
    return None


@functools.lru_cache(maxsize=64)
def _pairs(mask, T: int, S: int, heads: int, offset: int) -> int:
    return mask.pairs(T, S, heads, offset)


def _shared(group: int) -> int:
    """Heads of a group that share whole tiles."""
    return max(n for n in (1, 2, 4, 8) if group % n == 0)


# Rows, blocks and visits.


@dataclasses.dataclass(frozen=True, eq=False)
class Order:
    """Visits of every tile: whole blocks [begin, middle), masked ones [middle, end).

    other: the block that comes in; pattern: of its hidden pairs, among `edges`.
    """

    begin: np.ndarray
    middle: np.ndarray
    end: np.ndarray
    other: np.ndarray
    pattern: np.ndarray

    @classmethod
    def of(cls, visits: blocks.Visits, tiles: int, turned: bool) -> "Order":
        """Visits by rows, or with `turned` by columns."""
        tile, other = visits.row, visits.column
        if turned:
            tile, other = other, tile
        seen = (visits.what & blocks.SEEN) != 0
        masked = (visits.what & blocks.MASKED) != 0
        at = np.lexsort((other, masked, tile))
        at = at[seen[at]]
        tile, other, masked = tile[at], other[at], masked[at]
        places = np.arange(tiles)
        begin = np.searchsorted(tile, places)
        end = np.searchsorted(tile, places, side="right")
        whole = np.concatenate([[0], np.cumsum(~masked)])
        middle = begin + whole[end] - whole[begin]
        pattern = visits.what[at] >> blocks.SHIFT
        parts = (begin, middle, end, other, pattern)
        return cls(*(np.append(x, 0).astype(np.int32) for x in parts))

    def arrays(self) -> list[jax.Array]:
        """What a kernel reads from the main memory."""
        return [jnp.asarray(getattr(self, f.name)) for f in dataclasses.fields(self)]


@dataclasses.dataclass(frozen=True, eq=False)
class Tiling:
    """How heads that share a mask lie: `own` heads of a group in tiles of `rows`."""

    spec: Spec
    queries: int
    keys: int
    own: int
    rows: int
    block_k: int

    @classmethod
    def of(cls, spec: Spec, q, k, rows: int, block_k: int) -> "Tiling":
        """The tiling of a call; `own` is the most heads that share whole tiles."""
        own = _shared(q.shape[2] // k.shape[2])
        return cls(spec, q.shape[1], k.shape[1], own, rows, block_k)

    @property
    def tokens(self) -> int:
        """Queries of a tile."""
        return self.rows // self.own

    @property
    def tiles(self) -> int:
        """Tiles along the queries."""
        return -(-self.queries // self.tokens)

    def hidden(self, turned: bool) -> jax.Array:
        """HIDDEN at the hidden pairs of each pattern, 0 elsewhere.

        bfloat16 [patterns, rows, keys], with `turned` keys down.
        """
        edges, keys = self.walk().patterns, np.arange(self.block_k)
        seen = np.zeros((len(edges), edges.shape[2], self.block_k), bool)
        for n in range(0, edges.shape[1], 2):
            low, high = edges[:, n, :, None], edges[:, n + 1, :, None]
            seen |= (keys >= low) & (keys < high)
        seen = np.tile(seen, (1, self.own, 1))
        seen = seen.swapaxes(1, 2) if turned else seen
        return jnp.where(jnp.asarray(seen), 0.0, HIDDEN).astype(jnp.bfloat16)

    @property
    def key_blocks(self) -> int:
        """Blocks along the keys."""
        return -(-self.keys // self.block_k)

    def walk(self) -> blocks.Walk:
        """The blocks that the mask shows."""
        spec = self.spec
        size = self.queries, self.keys, spec.offset
        return _walk(spec.mask, *size, self.tokens, self.block_k)

    def lay(self, x):
        """[B, T, N, H] as [B, N / own, rows of all tiles, H]."""
        x = _pad(x, 1, self.tiles * self.tokens)
        B, _, N, H = x.shape
        x = x.reshape(B, self.tiles, self.tokens, N // self.own, self.own, H)
        return x.transpose(0, 3, 1, 4, 2, 5).reshape(B, N // self.own, -1, H)

    def unlay(self, x):
        """What `lay` was given."""
        B, parts, _, H = x.shape
        x = x.reshape(B, parts, self.tiles, self.own, self.tokens, H)
        x = x.transpose(0, 2, 4, 1, 3, 5).reshape(B, -1, parts * self.own, H)
        return x[:, : self.queries]

    def lay_statistic(self, x, padding: float):
        """[B, N, T] as [B, N / own, rows of all tiles]."""
        x = _pad(x.astype(jnp.float32), 2, self.tiles * self.tokens, padding)
        B, N, _ = x.shape
        x = x.reshape(B, N // self.own, self.own, self.tiles, self.tokens)
        return x.swapaxes(2, 3).reshape(B, N // self.own, -1)

    def unlay_statistic(self, x):
        """What `lay_statistic` was given."""
        B, parts, _ = x.shape
        x = x.reshape(B, parts, self.tiles, self.own, self.tokens).swapaxes(2, 3)
        return x.reshape(B, parts * self.own, -1)[:, :, : self.queries]

    def lay_keys(self, x):
        """[B, S, K, H] with whole blocks of keys."""
        return _pad(x, 1, self.key_blocks * self.block_k)

    def lay_ids(self, own, other) -> list[jax.Array]:
        """Segment ids of rows [B, rows] and of keys [B, S]; nothing without."""
        if own is None:
            return []
        own = _pad(own.astype(jnp.int32), 1, self.tiles * self.tokens)
        shape = (len(own), self.tiles, self.own, self.tokens)
        own = jnp.broadcast_to(own.reshape(len(own), self.tiles, 1, -1), shape)
        other = _pad(other.astype(jnp.int32), 1, self.key_blocks * self.block_k)
        return [own.reshape(len(own), -1), other]


_walk = functools.lru_cache(maxsize=64)(blocks.build)


def _pad(x, axis: int, size: int, value: float = 0):
    widths = [(0, size - n if a == axis else 0) for a, n in enumerate(x.shape)]
    return jnp.pad(x, widths, constant_values=value)


# What the three kernels share.


@dataclasses.dataclass
class Kernel:
    """One kernel: `tile` blocks stay in place, blocks of another kind come in.

    `stay` and `come` are the numbers of matrices of each; the mask is read with keys
    across, or with `turned` keys down. A block is worked on in `parts`, where the
    registers do not hold the scores of all its rows.
    """

    tiling: Tiling
    order: Order
    tiles: int
    stay: int
    come: int
    size: int  # rows of a block that comes in
    stages: int
    turned: bool
    segmented: bool
    dtype: jnp.dtype
    width: int
    parts: int = 1

    def run(self, body: Callable, operands, fetch: Callable, place, outputs, parts):
        """Run `body(visits, *refs)` on every tile.

        `operands` are in the main memory; `place(operands, b, h, t, wg)` are the
        matrices that stay, `fetch(operands, b, h, block)` those that come in. `outputs`
        are their shapes and types; `parts` are rows of the batch and heads.
        """
        interpret = _INTERPRET.value
        arrays = [*self.order.arrays(), self.tiling.hidden(self.turned)]

        def entry(*refs):
            given, out = refs[: len(refs) - len(outputs)], refs[-len(outputs) :]
            order, operands = given[: len(arrays)], given[len(arrays) :]

            def scoped(own, coming, aside, ready, full, done):
                b, h, t = (lax.axis_index(n) for n in ("row", "head", "tile"))
                wg = lax.axis_index("wg")
                visits = Visits(self, order, operands, (b, h, t, wg), aside)
                visits.coming, visits.full, visits.done = coming, full, done

                @pl.when(wg == GROUPS)
                def _():
                    plgpu.set_max_registers(24, action="decrease")
                    visits.stream(lambda block: fetch(operands, b, h, block))

                @pl.when(wg < GROUPS)
                def _():
                    plgpu.set_max_registers(240, action="increase")
                    held = []
                    for n, source in enumerate(place(operands, b, h, t, wg)):
                        plgpu.copy_gmem_to_smem(source, own[n].at[wg], ready[n].at[wg])
                        held.append(own[n].at[wg])
                    for bar in ready:
                        plgpu.barrier_wait(bar.at[wg])
                    body(visits, held, out)

            span = 64 // self.parts  # columns of 16 bits: the least depth of a product
            tiles = (plgpu.TilingTransform((8, span)), plgpu.SwizzleTransform(2 * span))

            def matrix(*shape):
                return plgpu.SMEM(shape, self.dtype, transforms=tiles)

            count = {"num_barriers": self.stages}
            pl.run_scoped(
                scoped,
                [matrix(GROUPS, GROUP, self.width)] * self.stay,
                [matrix(self.stages, self.size, self.width)] * self.come,
                matrix(GROUPS, GROUP, self.size // self.parts) if interpret else None,
                [plgpu.Barrier(num_barriers=GROUPS)] * self.stay,
                [plgpu.Barrier(**count)] * self.come,
                [plgpu.Barrier(num_arrivals=GROUPS, **count)] * self.come,
                collective_axes="wg",
            )

        B, heads = parts
        entry.__name__ = "attention" + body.func.__name__.removesuffix("_body")
        return plgpu.kernel(
            entry,
            out_type=tuple(jax.ShapeDtypeStruct(*x) for x in outputs),
            grid=(heads, self.tiles, B),
            grid_names=("head", "tile", "row"),
            num_threads=GROUPS + 1,
            thread_name="wg",
            interpret=plgpu.InterpretGPUParams(detect_races=True)
            if interpret
            else None,
            compiler_params=plgpu.CompilerParams(approx_math=True),
        )(*arrays, *operands)


class Visits:
    """The blocks that one tile visits, as a kernel's body sees them."""

    def __init__(self, kernel: Kernel, order, operands, place, aside):
        self.kernel, self.operands, self.aside = kernel, operands, aside
        begin, middle, end, self.other, self.pattern, self.hidden = order
        self.b, self.h, t, self.wg = place
        self.begin, self.middle, self.end = begin[t], middle[t], end[t]
        self.first = t * ROWS + self.wg * GROUP
        self.shape = (GROUP, kernel.size // kernel.parts)
        self.coming, self.full, self.done = [], [], []

    def stream(self, fetch: Callable) -> None:
        """Bring all blocks in, each into the place that was used longest ago."""
        stages = self.kernel.stages

        def bring(n, _):
            slot = lax.rem(n - self.begin, stages)
            sources = fetch(self.other[n])
            parts = (sources, self.coming, self.full, self.done)
            for source, place, full, done in zip(*parts, strict=True):

                @pl.when(n - self.begin >= stages)
                def _(done=done):
                    plgpu.barrier_wait(done.at[slot])

                plgpu.copy_gmem_to_smem(source, place.at[slot], full.at[slot])
            return 0

        lax.fori_loop(self.begin, self.end, bring, 0)
        for slot in range(stages):

            @pl.when(slot < self.end - self.begin)
            def _(slot=slot):
                for done in self.done:
                    plgpu.barrier_wait(done.at[slot])

    def fold(self, step: Callable, carry):
        """`step(visit, carry)` at every part of every block."""
        for masked, low, high in (
            (False, self.begin, self.middle),
            (True, self.middle, self.end),
        ):

            def some(n, carry, masked=masked):
                for part in range(self.kernel.parts):
                    carry = step(Visit(self, n, masked, part), carry)
                return carry

            carry = lax.fori_loop(low, high, some, carry)
        return carry

    def rows(self, v):
        """A statistic of the tile's rows, over all pairs."""
        return lax.broadcast_in_dim(v, self.shape, (0,))

    def columns(self, v):
        """A statistic of what came in, over all pairs."""
        return lax.broadcast_in_dim(v, self.shape, (1,))


class Visit:
    """A part of the block that came in as number `n` of the walk."""

    def __init__(self, visits: Visits, n, masked: bool, part: int):
        kernel = visits.kernel
        self.all, self.n, self.masked = visits, n, masked
        self.part, self.size = part, kernel.size // kernel.parts
        self.slot = lax.rem(n - visits.begin, kernel.stages)
        self.start = visits.other[n] * kernel.size + part * self.size

    def get(self, which: int):
        """One of the matrices that came in, once it is whole."""
        if self.part == 0:
            plgpu.barrier_wait(self.all.full[which].at[self.slot])
        block = self.all.coming[which].at[self.slot]
        if self.all.kernel.parts == 1:
            return block
        return block.at[pl.ds(self.part * self.size, self.size)]

    def let(self, which: int) -> None:
        """Its place may be used again, behind the last part."""
        if self.part == self.all.kernel.parts - 1:
            plgpu.barrier_arrive(self.all.done[which].at[self.slot])

    def load(self, ref):
        """A statistic of what came in, from the main memory."""
        return _load(ref.at[..., pl.ds(self.start, self.size)], _COLUMN)

    def bias(self):
        """0 for pairs that are seen, HIDDEN for others; None where all are.

        Taken before the scores: both at once are more than the registers hold.
        """
        visits, bias = self.all, None
        if self.masked:
            rows = pl.ds(visits.wg * GROUP, GROUP)
            came = pl.ds(self.part * self.size, self.size)
            bias = visits.hidden.at[visits.pattern[self.n], rows, came]
            bias = _load(bias, _PAIRS)
        if visits.kernel.segmented:
            own, other = visits.operands[-2:]
            mine, come = (other, own) if visits.kernel.turned else (own, other)
            mine = _load(mine.at[visits.b, pl.ds(visits.first, GROUP)], _ROW)
            come = self.load(come.at[visits.b])
            same = visits.rows(mine) == visits.columns(come)
            hidden = jnp.bfloat16(HIDDEN)
            bias = jnp.where(same, jnp.bfloat16(0) if bias is None else bias, hidden)
        return bias

    def add(self, total, weights, other):
        """`total` [rows, width] plus weights [rows, size] times `other`."""
        weights = weights.astype(self.all.kernel.dtype)
        aside = self.all.aside
        if aside is None:

            def run(acc):
                plgpu.wgmma(acc, weights, other)

            return pl.run_state(run)(plgpu.ACC.init(total))
        # The interpreter takes operands from memory alone, and starts sums at 0.
        aside[self.all.wg] = weights
        plgpu.commit_smem()
        return total + product(aside.at[self.all.wg], other, total.shape)


def _load(ref, layout):
    return plgpu.load(ref, layout=layout, optimized=False)


def product(a, b, shape: tuple[int, int]):
    """Matrix product on the tensor cores, float32."""

    def run(acc):
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))


def _full(shape, value: float, layout):
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _scores(spec: Spec, visit: Visit, a, b):
    """Scores times log2(e), hidden pairs at HIDDEN, and the slope of the cap."""
    bias, slope = visit.bias(), None
    if bias is not None:
        bias = lax.optimization_barrier(bias)  # packed before the scores arrive
    scores = product(a, b.transpose((1, 0)), visit.all.shape)
    if spec.softcap is None:
        scores = scores * (spec.scale * LOG2E)
    else:
        bend = jnp.tanh(scores * (spec.scale / spec.softcap))
        scores, slope = bend * (spec.softcap * LOG2E), 1.0 - bend * bend
    if bias is not None:
        scores = scores + bias.astype(jnp.float32)
    return scores, slope


# Forward.


def _forward_class(spec, q, k, v, sink, segments):
    tiling, dtype = Tiling.of(spec, q, k, ROWS, KEYS), jnp.result_type(q, k, v)
    walk = tiling.walk()
    ids = tiling.lay_ids(*segments)
    B, N, H = q.shape[0], q.shape[2], q.shape[3]
    shared = N // k.shape[2] // tiling.own
    operands = [tiling.lay(q.astype(dtype))]
    operands += [tiling.lay_keys(x.astype(dtype)) for x in (k, v)]
    learned = jnp.full((N,), HIDDEN) if sink is None else sink
    learned = jnp.repeat(learned.astype(jnp.float32) * LOG2E, tiling.tokens)
    operands.append(learned.reshape(-1, ROWS))
    kernel = Kernel(
        tiling, Order.of(walk.by_rows, tiling.tiles, False),
        tiling.tiles,
        stay=1, come=2, size=KEYS, turned=False,
        stages=tuning.of("attention_gpu").stages,
        segmented=bool(ids), dtype=dtype, width=H,
    )  # fmt: skip

    def place(refs, b, h, t, wg):
        return [refs[0].at[b, h, pl.ds(t * ROWS + wg * GROUP, GROUP)]]

    def fetch(refs, b, h, block):
        where = (b, pl.ds(block * KEYS, KEYS), lax.div(h, shared))
        return [x.at[where] for x in refs[1:3]]

    rows = operands[0].shape
    out, lse = kernel.run(
        functools.partial(_forward, spec), [*operands, *ids], fetch, place,
        [(rows, dtype), (rows[:3], jnp.float32)], (B, N // tiling.own),
    )  # fmt: skip
    return tiling.unlay(out).astype(v.dtype), tiling.unlay_statistic(lse)


def _forward(spec, visits, held, outputs):
    (q,), (out, lse) = held, outputs
    width = visits.kernel.width

    def step(visit, carry):
        acc, top, total = carry
        scores, _ = _scores(spec, visit, q, visit.get(0))
        visit.let(0)
        new = jnp.maximum(top, scores.max(axis=1))
        fade = jnp.exp2(top - new)
        weights = jnp.exp2(scores - visits.rows(new))
        total = total * fade + weights.sum(axis=1)
        acc = acc * lax.broadcast_in_dim(fade, acc.shape, (0,))
        acc = visit.add(acc, weights, visit.get(1))
        visit.let(1)
        return acc, new, total

    own = pl.ds(visits.wg * GROUP, GROUP)
    learned = _load(visits.operands[3].at[visits.h, own], _ROW)
    total = jnp.where(learned > HIDDEN / 2, 1.0, 0.0)
    # A maximum above HIDDEN: of a row that sees nothing no weight is above 0.
    top = jnp.maximum(learned, HIDDEN / 2)
    begin = _full((GROUP, width), 0, _PAIRS), top, total
    acc, top, total = visits.fold(step, begin)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    acc = acc * lax.broadcast_in_dim(1.0 / total, acc.shape, (0,))
    rows = pl.ds(visits.first, GROUP)
    q[...] = acc.astype(visits.kernel.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q, out.at[visits.b, visits.h, rows])
    final = (top + jnp.log2(total)) * (1 / LOG2E)
    lse[visits.b, visits.h, rows] = jnp.where(some, final, -jnp.inf)
    plgpu.wait_smem_to_gmem(0)


# Backward.


def _tiles(spec, q, k, v, segments, d_out, lse, delta):
    """Gradients of q, k and v for heads that share a mask (`vjp.gradients`)."""
    dtype = jnp.result_type(q, k, v)
    q, k, v, d_out = (x.astype(dtype) for x in (q, k, v, d_out))
    # Rows that saw nothing, and rows of padding, get weight exp2(-inf) = 0.
    lse = jnp.where(jnp.isfinite(lse), lse, -HIDDEN)
    given = spec, q, k, v, d_out, lse, delta, segments
    d_k, d_v = _keys(*given)
    return _queries(*given).astype(q.dtype), d_k, d_v


def _laid(tiling: Tiling, q, k, v, d_out, lse, delta, segments):
    """q, dO, k, v, lse times log2(e), delta, segment ids, as the kernels take them."""
    queries = [tiling.lay(x) for x in (q, d_out)]
    keys = [tiling.lay_keys(x) for x in (k, v)]
    lse = tiling.lay_statistic(lse * LOG2E, -HIDDEN)
    return [*queries, *keys, lse, tiling.lay_statistic(delta, 0.0)], tiling.lay_ids(
        *segments
    )


def _queries(spec, q, k, *rest):
    """The gradient of q: rows stay, keys and values come in."""
    tiling = Tiling.of(spec, q, k, ROWS, BACK)
    walk = tiling.walk()
    operands, ids = _laid(tiling, q, k, *rest)
    B, N, H = q.shape[0], q.shape[2], q.shape[3]
    shared = N // k.shape[2] // tiling.own
    kernel = Kernel(
        tiling, Order.of(walk.by_rows, tiling.tiles, False),
        tiling.tiles,
        stay=2, come=2, size=BACK, turned=False,
        stages=tuning.of("attention_gpu").back_stages,
        segmented=bool(ids), dtype=q.dtype, width=H,
    )  # fmt: skip

    def place(refs, b, h, t, wg):
        rows = pl.ds(t * ROWS + wg * GROUP, GROUP)
        return [x.at[b, h, rows] for x in refs[:2]]

    def fetch(refs, b, h, block):
        where = (b, pl.ds(block * BACK, BACK), lax.div(h, shared))
        return [x.at[where] for x in refs[2:4]]

    (d_q,) = kernel.run(
        functools.partial(_queries_body, spec), [*operands, *ids], fetch, place,
        [(operands[0].shape, jnp.float32)], (B, N // tiling.own),
    )  # fmt: skip
    return tiling.unlay(d_q)


def _queries_body(spec, visits, held, outputs):
    (q, d_out), (d_q,) = held, outputs
    size, width = visits.kernel.size, visits.kernel.width
    place = (visits.b, visits.h, pl.ds(visits.first, GROUP))
    lse, delta = (_load(x.at[place], _ROW) for x in visits.operands[4:6])

    def step(visit, acc):
        k, v = visit.get(0), visit.get(1)
        scores, slope = _scores(spec, visit, q, k)
        weights = jnp.exp2(scores - visits.rows(lse))
        d_scores = product(d_out, v.transpose((1, 0)), (GROUP, size))
        visit.let(1)
        d_scores = weights * (d_scores - visits.rows(delta))
        if slope is not None:
            d_scores = d_scores * slope
        acc = visit.add(acc, d_scores, k)
        visit.let(0)
        return acc

    acc = visits.fold(step, _full((GROUP, width), 0, _PAIRS))
    d_q[place] = acc * spec.scale


def _keys(spec, q, k, *rest):
    """The gradients of k and v: keys stay, rows of queries come in."""
    tiling = Tiling.of(spec, q, k, BACK, ROWS)
    walk = tiling.walk()
    operands, ids = _laid(tiling, q, k, *rest)
    B, N, H = q.shape[0], q.shape[2], q.shape[3]
    shared = N // k.shape[2] // tiling.own
    kernel = Kernel(
        tiling, Order.of(walk.by_columns, tiling.key_blocks, True),
        tiling.key_blocks,
        stay=2, come=2, size=BACK, turned=True,
        stages=tuning.of("attention_gpu").back_stages,
        segmented=bool(ids), dtype=q.dtype, width=H,
        parts=2 if ids and H == max(WIDTHS) else 1,
    )  # fmt: skip

    def place(refs, b, h, t, wg):
        keys = pl.ds(t * ROWS + wg * GROUP, GROUP)
        return [x.at[b, keys, lax.div(h, shared)] for x in refs[2:4]]

    def fetch(refs, b, h, block):
        return [x.at[b, h, pl.ds(block * BACK, BACK)] for x in refs[:2]]

    parts = N // tiling.own
    shape = (B, parts, tiling.key_blocks * ROWS, H)
    found = kernel.run(
        functools.partial(_keys_body, spec), [*operands, *ids], fetch, place,
        [(shape, jnp.float32)] * 2, (B, parts),
    )  # fmt: skip
    shape = (B, k.shape[2], shared, *shape[2:])
    sums = [x.reshape(shape).sum(2).swapaxes(1, 2) for x in found]
    return [x[:, : k.shape[1]] for x in sums]


def _keys_body(spec, visits, held, outputs):
    (k, v), (d_k, d_v) = held, outputs
    width = visits.kernel.width
    lse, delta = (x.at[visits.b, visits.h] for x in visits.operands[4:6])

    def step(visit, carry):
        sum_k, sum_v = carry
        q, d_out = visit.get(0), visit.get(1)
        scores, slope = _scores(spec, visit, k, q)
        weights = jnp.exp2(scores - visits.columns(visit.load(lse)))
        sum_v = visit.add(sum_v, weights, d_out)
        d_scores = product(v, d_out.transpose((1, 0)), visits.shape)
        visit.let(1)
        d_scores = d_scores - visits.columns(visit.load(delta))
        d_scores = weights * d_scores
        if slope is not None:
            d_scores = d_scores * slope
        sum_k = visit.add(sum_k, d_scores, q)
        visit.let(0)
        return sum_k, sum_v

    none = _full((GROUP, width), 0, _PAIRS)
    sum_k, sum_v = visits.fold(step, (none, none))
    place = (visits.b, visits.h, pl.ds(visits.first, GROUP))
    d_k[place], d_v[place] = sum_k * spec.scale, sum_v


forward = functools.partial(vjp.outputs, _forward_class)
backward = functools.partial(vjp.gradients, _tiles)
attend = vjp.operation(forward, backward)
