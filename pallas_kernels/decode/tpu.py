"""Attention of a few queries over a cache on TPU; inference only (Mosaic TPU).

The queries of a kv head's group are rows of one tile, and the cache goes by in blocks
of slots: a block is read once for all rows, and none behind a row's length is read.
Column sums of the probabilities come from the scores, which stay in vector memory until
the denominators are known, so keys are read once. With a list of pages the kernel
copies those alone from the main memory, a run of pages ahead of the one it works on.

Codes of 8 bits are multiplied as they are, centred: each group of channels has a scale
and a zero a token, so scores are sums over groups of (q . codes) scale + sum(q) zero,
and the groups are rows of one product.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch, tuning
from pallas_kernels.attention.tpu import (
    _INTERPRET,
    HIDDEN,
    LOG2E,
    VMEM,
    WIDTHS,
    _product,
)

SUBLANES, LANES = 8, 128
ROWS = 64  # most rows of a tile: queries times the heads of a group
RUN = 512  # slots of the pages that are copied at once
KEPT = 16 << 20  # most bytes of scores that wait for their denominators
LISTED = 128 << 10  # most pages listed, words of scalar memory
_CENTRE = 128.0
_TILE = {1: 32, 2: 16, 4: 8}  # rows of a tile of the main memory, by bytes


def refuses(call: dispatch.Decode) -> str | None:
    """Why this kernel would not take a call, or None."""
    B, T, N, _ = call.q_shape
    K, C = call.k.shape[1:3]
    if 0 in (*call.q_shape, K, C):
        return f"q {call.q_shape} or the cache {call.k.shape} is empty"
    rows = T * N // K
    if rows > ROWS:
        return f"{rows} queries times heads of a group are more than {ROWS}"
    for x in (call.k, call.v):
        reason = _refuses_buffer(x)
        if reason is not None:
            return reason
    many = rows * max(map(_groups, (call.k, call.v)))
    if many > 2 * ROWS:
        return f"{rows} rows of codes in groups are {many} products, above {2 * ROWS}"
    if call.sums and _padded(rows, SUBLANES) * C * 4 > KEPT:
        return f"the scores of {rows} rows and {C} slots are more than {KEPT} bytes"
    if call.page is not None:
        tile = max(_TILE[_stored(x).dtype.itemsize] for x in (call.k, call.v))
        if call.page % tile or RUN % call.page:
            return f"pages of {call.page} are no multiple of {tile} that divides {RUN}"
        if B * K * _padded(call.count, RUN // call.page) > LISTED:
            return f"{B * K} lists of {call.count} pages are more than {LISTED} words"
    return dispatch.outside_shard_map()


def _refuses_buffer(x) -> str | None:
    width = x.shape[3]
    if width % 16 or not 0 < width <= WIDTHS:
        return f"head width {width} is not a multiple of 16 up to {WIDTHS}"
    if hasattr(x, "open"):
        bits, group = getattr(x, "bits", None), getattr(x, "group", (0, 0))
        if bits != 8 or group[0] != 1 or group[1] % 16:
            return f"codes of {bits} bits in groups of {group} are not (1, 16 n) of 8"
    if jnp.dtype(x.dtype) not in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)):
        return f"dtype {jnp.dtype(x.dtype)} is not float32 or bfloat16"
    if width > LANES and jnp.dtype(x.dtype) == jnp.float32:
        return f"head width {width} of float32 is more than {LANES}"
    return None


def attend(scoring, q, k, v, k_pos, *, length=None, beside=None):
    """Out [B, T, N, H], lse [B, N, T] and column sums [B, K, C] or None.

    As `pallas_kernels.decode.cached.attend`.
    """
    return _Call(scoring, q, k, v, beside).over_slots(k_pos, length)


def attend_pages(scoring, q, k, v, index, places):
    """Out and lse over the pages `index` [B, K, n]; `places` [B, K, n page].

    As `pallas_kernels.decode.pages.attend_pages`.
    """
    return _Call(scoring, q, k, v, None).over_pages(index, places)


def _groups(x) -> int:
    """Groups of channels that have steps of their own."""
    return x.shape[3] // x.group[1] if hasattr(x, "open") else 1


def _part(k, v, rows: int) -> int:
    """Slots whose scores are held at once, a power of 2."""
    groups = max(map(_groups, (k, v)))
    most = tuning.of("decode_tpu").scores // (rows * groups)
    if jnp.float32 in (jnp.dtype(x.dtype) for x in (k, v)):  # exact products are larger
        many = max(LANES, k.shape[3], v.shape[3]) // LANES * min(groups, 2)
        most = min(most, RUN // many) // tuning.of("decode_tpu").exact
    return max(LANES, 1 << most.bit_length() - 1)


def _padded(n: int, to: int) -> int:
    return -(-n // to) * to


def _stored(x) -> jax.Array:
    """The array of a buffer with an element a channel."""
    return x.codes if hasattr(x, "open") else x


def _pad_last(x, size: int, value):
    widths = [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])]
    return jnp.pad(x, widths, constant_values=value)


# Keys or values in a tile, as numbers and as codes.


@dataclasses.dataclass(frozen=True)
class _Numbers:
    """Keys or values as they are."""

    dtype: jnp.dtype

    def arrays(self, x) -> list[jax.Array]:
        """What a block has beside the array itself."""
        return []

    def scores(self, q, k):
        """[rows, keys] of float32 queries [rows, H]."""
        (k,) = k
        return _product(q.astype(self.dtype), k, (1, 1))

    def values(self, weights, v):
        """[rows, H] of float32 weights [rows, keys]."""
        (v,) = v
        return _product(weights.astype(self.dtype), v, (1, 0))


@dataclasses.dataclass(frozen=True)
class _Codes:
    """Keys or values as codes, their steps [2 groups, keys] and of them the centres."""

    dtype: jnp.dtype
    width: int
    group: int

    @property
    def count(self) -> int:
        """Groups of channels."""
        return self.width // self.group

    def arrays(self, x) -> list[jax.Array]:
        """Scales and the values of the middle code, [B, K, 2 groups, C]."""
        scale, zero = (s.astype(jnp.float32) for s in (x.scale, x.zero))
        steps = jnp.concatenate([scale, zero + _CENTRE * scale], -1)
        return [steps.swapaxes(2, 3)]

    def _open(self, codes):
        numbers = codes.astype(jnp.int32).astype(jnp.float32) - _CENTRE
        return numbers.astype(self.dtype)

    def _groups(self, shape):
        own = lax.div(lax.broadcasted_iota(jnp.int32, shape, 1), self.group)
        return [own == i for i in range(self.count)]

    def scores(self, q, k):
        """[rows, keys] of float32 queries [rows, H]."""
        codes, steps = k
        parts = [jnp.where(own, q, 0.0) for own in self._groups(q.shape)]
        many = jnp.concatenate(parts, 0).astype(self.dtype)
        raw = _product(many, self._open(codes), (1, 1))
        rows, total = q.shape[0], 0.0
        for i, part in enumerate(parts):
            total += raw[i * rows : (i + 1) * rows] * steps[i : i + 1]
            at = self.count + i
            total += part.sum(1, keepdims=True) * steps[at : at + 1]
        return total

    def values(self, weights, v):
        """[rows, H] of float32 weights [rows, keys]."""
        codes, steps = v
        parts = [weights * steps[i : i + 1] for i in range(self.count)]
        many = jnp.concatenate(parts, 0).astype(self.dtype)
        raw = _product(many, self._open(codes), (1, 0))
        rows, total = weights.shape[0], 0.0
        for i, own in enumerate(self._groups((rows, self.width))):
            at = self.count + i
            centre = (weights * steps[at : at + 1]).sum(1, keepdims=True)
            part = raw[i * rows : (i + 1) * rows] + centre
            total += jnp.where(own, part, 0.0)
        return total


def _form(x, dtype) -> _Numbers | _Codes:
    if hasattr(x, "open"):
        return _Codes(dtype, x.shape[3], x.group[1])
    return _Numbers(dtype)


# The kernels.


class _Call:
    """A call as the kernels take it, and what its two kernels share."""

    def __init__(self, scoring, q, k, v, beside):
        self.scoring, self.k, self.v = scoring, k, v
        self.shape, self.beside = q.shape, beside
        rows = scoring.rows(q).astype(jnp.float32)
        cap = scoring.softcap
        rows = rows * (LOG2E if cap is None else 1 / cap)
        self.real = rows.shape[2]
        self.rows = _padded(self.real, SUBLANES)
        pads = ((0, 0), (0, 0), (0, self.rows - self.real), (0, 0))
        self.q = jnp.pad(rows, pads)
        self.forms = [_form(x, jnp.dtype(x.dtype)) for x in (k, v)]
        self.part = _part(k, v, self.rows)

    def ends(self):
        """First and last position that rows see, the first less 1: [B, 2, rows, 1]."""
        high = jnp.tile(self.scoring.q_pos, (1, self.scoring.group))
        low = jnp.full_like(high, -1)
        if self.scoring.window is not None:
            low = jnp.maximum(high - self.scoring.window, -1)
        return _pad_last(jnp.stack([low, high], 1), self.rows, -1)[..., None]

    def outputs(self):
        """Shapes, blocks and scratch of the result."""
        B, K, H = *self.q.shape[:2], self.v.shape[3]
        like = jax.ShapeDtypeStruct
        shapes = [
            like((B, K, self.rows, H), jnp.float32),
            like((B, K, self.rows, LANES), jnp.float32),
        ]
        blocks = [
            pl.BlockSpec((None, None, *s.shape[2:]), lambda b, h, n, *_: (b, h, 0, 0))
            for s in shapes
        ]
        sizes = (LANES, LANES, H)
        scratch = [pltpu.VMEM((self.rows, size), jnp.float32) for size in sizes]
        return shapes, blocks, scratch

    def inputs(self):
        """Queries and what they see, with their blocks."""
        whole = (None, None, self.rows, self.q.shape[3])
        return [self.q, self.ends()], [
            pl.BlockSpec(whole, lambda b, h, n, *_: (b, h, 0, 0)),
            pl.BlockSpec((None, 2, self.rows, 1), lambda b, h, n, *_: (b, 0, 0, 0)),
        ]

    def finish(self, out, lse):
        """[B, K, rows, H] and [B, K, rows, LANES] as the caller knows them."""
        B, T, N, _ = self.shape
        out = out[:, :, : self.real].reshape(B, N, T, -1).swapaxes(1, 2)
        return out.astype(self.v.dtype), lse[:, :, : self.real, 0].reshape(B, N, T)

    def run(self, kernel, name, grid, scalars, inputs, outputs, shared="parallel"):
        """The kernel over a grid; inputs and outputs as (arrays, blocks) and so on.

        `shared` is how rows and heads may be spread over cores.
        """
        arrays, in_specs = inputs
        shapes, out_specs, scratch = outputs
        return pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(scalars),
                grid=grid,
                in_specs=in_specs,
                out_specs=out_specs,
                scratch_shapes=scratch,
            ),
            out_shape=shapes,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=(shared, shared, "arbitrary"),
                vmem_limit_bytes=VMEM,
            ),
            interpret=_INTERPRET.value,
            name=name,
        )(*scalars, *arrays)

    # A part of a block.

    def begin(self, state):
        """Nothing seen."""
        top, total, acc = state
        top[...] = jnp.full_like(top, HIDDEN)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    def add(self, state, q, ends, k, v, place, inside=None):
        """Scores [rows, keys] of some slots, which the state takes in.

        `k` and `v` are lists of arrays of a part, `place` [1, keys] its positions;
        slots outside `inside` [1, keys] are no slots.
        """
        top, total, acc = state
        scores = self.forms[0].scores(q, k)
        if self.scoring.softcap is not None:
            scores = jnp.tanh(scores) * (self.scoring.softcap * LOG2E)
        seen = (place > ends[0]) & (place <= ends[1])
        if inside is not None:
            seen &= inside
        scores = jnp.where(seen, scores, HIDDEN)
        old = top[:, :1]
        new = jnp.maximum(old, scores.max(1, keepdims=True))
        shift = jnp.where(new > HIDDEN / 2, new, 0.0)
        fade = jnp.exp2(old - shift)
        weights = jnp.exp2(scores - shift)
        sums = total[:, :1] * fade + weights.sum(1, keepdims=True)
        top[...] = jnp.broadcast_to(new, top.shape)
        total[...] = jnp.broadcast_to(sums, total.shape)
        acc[...] = acc[...] * fade + self.forms[1].values(weights, v)
        return scores

    def end(self, state, out, lse):
        """Write the result of a tile."""
        top, total, acc = state
        some = total[...] > 0
        safe = jnp.where(some, total[...], 1.0)
        out[...] = acc[...] / safe[:, :1]
        final = (top[...] + jnp.log2(safe)) * (1 / LOG2E)
        lse[...] = jnp.where(some, final, -jnp.inf)

    # Runs of slots.

    def over_slots(self, k_pos, length):
        """Attention over the slots before `length`."""
        (B, K, C), Kp = self.k.shape[:3], k_pos.shape[1]
        most = tuning.of("decode_tpu").block
        part = min(self.part, most, _padded(C, LANES))
        block = min(_padded(C, part), max(part, most))
        count = -(-C // block)
        limit = jnp.broadcast_to(jnp.asarray(C if length is None else length), (B,))
        used = jnp.clip((limit + block - 1) // block, 1, count).astype(jnp.int32)
        steps = count if length is None else jnp.max(used)

        def at(*index):
            """A block that lies at `index`, where None is the block of slots."""

            def place(b, h, n, used):
                mine = lax.min(n, used[b] - 1)
                known = {"b": b, "h": h, "n": mine, 0: 0}
                return tuple(known[i] for i in index)

            return place

        arrays, specs = self.inputs()
        arrays.append(k_pos.reshape(B, Kp, 1, C))
        across = ("b", "h" if Kp > 1 else 0, 0, "n")
        specs.append(pl.BlockSpec((None, None, 1, block), at(*across)))
        counts = []
        for form, x in zip(self.forms, (self.k, self.v), strict=True):
            whole, more = _stored(x), form.arrays(x)
            arrays += [whole, *more]
            shape = (None, None, block, whole.shape[3])
            specs.append(pl.BlockSpec(shape, at("b", "h", "n", 0)))
            for y in more:
                shape = (None, None, y.shape[2], block)
                specs.append(pl.BlockSpec(shape, at("b", "h", 0, "n")))
            counts.append(1 + len(more))
        shapes, out_specs, scratch = self.outputs()
        if self.beside is not None:
            arrays.append(self._beside())
            specs.append(
                pl.BlockSpec((None, None, self.rows, 1), lambda b, h, *_: (b, h, 0, 0))
            )
            total = count * block
            shapes.append(jax.ShapeDtypeStruct((B, K, 1, total), jnp.float32))
            out_specs.append(
                pl.BlockSpec((None, None, 1, total), lambda b, h, *_: (b, h, 0, 0))
            )
            scratch.append(pltpu.VMEM((self.rows, total), jnp.float32))
        body = _OverSlots(self, counts, block, part, C)
        name = "attention_decode" if self.beside is None else "attention_decode_sums"
        out, lse, *sums = self.run(
            body, name, (B, K, steps), [used], (arrays, specs),
            (shapes, out_specs, scratch),
        )  # fmt: skip
        sums = sums[0][:, :, 0, :C] if sums else None
        return *self.finish(out, lse), sums

    def _beside(self):
        """Log2 of what rows see elsewhere, [B, K, rows, 1]."""
        x = jnp.maximum(self.beside.astype(jnp.float32) * LOG2E, HIDDEN)
        x = x.reshape(*self.q.shape[:2], self.real)
        return _pad_last(x, self.rows, HIDDEN)[..., None]

    # Pages.

    def over_pages(self, index, places):
        """Attention over listed pages, -1 for none, none behind the first -1."""
        B, K, n = index.shape
        page = places.shape[2] // n
        many = RUN // page
        chunks = -(-n // many)
        index = _pad_last(index, chunks * many, -1)
        places = _pad_last(places, chunks * RUN, -1)
        arrays, specs = self.inputs()

        def across(height):
            return pl.BlockSpec(
                (None, None, height, RUN), lambda b, h, n, *_: (b, h, 0, n)
            )

        arrays.append(places[:, :, None])
        specs.append(across(1))
        small, wholes, counts = [], [], []
        for form, x in zip(self.forms, (self.k, self.v), strict=True):
            more = form.arrays(_listed(x, index, page))
            small += more
            wholes.append(_stored(x))
            counts.append(len(more))
        arrays += small + wholes
        specs += [across(y.shape[2]) for y in small]
        specs += [pl.BlockSpec(memory_space=pl.ANY)] * 2
        shapes, out_specs, scratch = self.outputs()
        scratch += [pltpu.VMEM((2, RUN, x.shape[3]), x.dtype) for x in wholes]
        scratch.append(pltpu.SemaphoreType.DMA((2, 2)))
        body = _OverPages(self, counts, page, (B, K, chunks))
        out, lse = self.run(
            body, "attention_pages", (B, K, chunks), [index.reshape(-1)],
            (arrays, specs), (shapes, out_specs, scratch), "arbitrary",
        )  # fmt: skip
        return self.finish(out, lse)


@dataclasses.dataclass(frozen=True)
class _Steps:
    """The scales and zeros of a buffer of codes."""

    scale: jax.Array
    zero: jax.Array


def _listed(x, index, page: int):
    """Scales and zeros of the slots of listed pages; nothing of numbers."""
    if not hasattr(x, "open"):
        return x

    def pick(y):
        B, K, C, groups = y.shape
        pages = y.reshape(B, K, C // page, page, groups)
        at = jnp.maximum(index, 0)[..., None, None]
        return jnp.take_along_axis(pages, at, 2).reshape(B, K, -1, groups)

    return _Steps(pick(x.scale), pick(x.zero))


@dataclasses.dataclass(frozen=True, eq=False)
class _OverSlots:
    """The kernel over runs of slots; `counts` are the arrays of keys and of values."""

    call: _Call
    counts: list[int]
    block: int
    part: int
    slots: int

    @property
    def __name__(self) -> str:
        return "over_slots"

    def __call__(self, used, q, ends, place, *refs):
        keys, values, rest = _split(refs, *self.counts)
        sums = None
        if self.call.beside is not None:
            beside, out, lse, sums, *state, kept = rest
        else:
            out, lse, *state = rest
        b, n = pl.program_id(0), pl.program_id(2)

        @pl.when(n == 0)
        def _():
            self.call.begin(state)

        @pl.when(n < used[b])
        def _():
            def part(i, carry):
                start = pl.multiple_of(i * self.part, LANES)
                first = n * self.block + start
                scores = self._part(q, ends, place, keys, values, state, start, first)
                if sums is not None:
                    at = pl.multiple_of(first, LANES)
                    kept[:, pl.ds(at, self.part)] = scores
                return carry

            lax.fori_loop(0, self.block // self.part, part, 0)

        @pl.when(n == pl.num_programs(2) - 1)
        def _():
            self.call.end(state, out, lse)
            if sums is not None:
                self._sum(used[b], lse, beside, kept, sums)

    def _part(self, q, ends, place, keys, values, state, start, first):
        """Scores of a part of the block, hidden where there is no slot."""
        at, inside = pl.ds(start, self.part), None
        k = [keys[0][at], *(x[:, at] for x in keys[1:])]
        v = [values[0][at], *(x[:, at] for x in values[1:])]
        if self.slots % self.block:
            left = self.slots - first
            inside = lax.broadcasted_iota(jnp.int32, (1, self.part), 1) < left
            down = lax.broadcasted_iota(jnp.int32, v[0].shape, 0) < left
            v[0] = jnp.where(down, v[0], jnp.zeros_like(v[0]))
            k[1:], v[1:] = ([jnp.where(inside, y, 0.0) for y in x[1:]] for x in (k, v))
        return self.call.add(state, q[...], ends, k, v, place[:, at], inside)

    def _sum(self, used, lse, beside, kept, sums):
        """Column sums of the kept scores, 0 in blocks that were not read."""
        mine = lse[:, :1] * LOG2E
        high = jnp.maximum(jnp.maximum(mine, beside[...]), HIDDEN / 2)
        both = high + jnp.log2(jnp.exp2(mine - high) + jnp.exp2(beside[...] - high))
        both = jnp.where(mine > HIDDEN / 2, both, -HIDDEN)

        def part(i, carry):
            at = pl.ds(pl.multiple_of(i * self.part, LANES), self.part)
            sums[:, at] = jnp.exp2(kept[:, at] - both).sum(0, keepdims=True)
            return carry

        def none(i, carry):
            at = pl.ds(pl.multiple_of(i * self.part, LANES), self.part)
            sums[:, at] = jnp.zeros((1, self.part), jnp.float32)
            return carry

        read = used * (self.block // self.part)
        lax.fori_loop(0, read, part, 0)
        lax.fori_loop(read, sums.shape[1] // self.part, none, 0)


def _split(refs, first: int, second: int):
    return refs[:first], refs[first : first + second], refs[first + second :]


@dataclasses.dataclass(frozen=True, eq=False)
class _OverPages:
    """The kernel over listed pages; `counts` are the steps of keys and of values."""

    call: _Call
    counts: list[int]
    page: int
    grid: tuple[int, int, int]

    @property
    def __name__(self) -> str:
        return "over_pages"

    def __call__(self, index, q, ends, place, *refs):
        key_steps, value_steps, rest = _split(refs, *self.counts)
        *wholes, out, lse, top, total, acc, k, v, arrived = rest
        state, held = (top, total, acc), (k, v)
        _, K, chunks = self.grid
        b, h, n = (pl.program_id(i) for i in range(3))
        step = (b * K + h) * chunks + n
        many, slot = RUN // self.page, lax.rem(step, 2)

        def fetch(step):
            row = lax.div(step, chunks)
            b, h, slot = lax.div(row, K), lax.rem(row, K), lax.rem(step, 2)

            def page(i, carry):
                first = lax.max(index[step * many + i], 0) * self.page
                first = pl.multiple_of(first, self.page)
                to = pl.multiple_of(i * self.page, self.page)
                for j in range(2):
                    pltpu.make_async_copy(
                        wholes[j].at[b, h, pl.ds(first, self.page)],
                        held[j].at[slot, pl.ds(to, self.page)],
                        arrived.at[j, slot],
                    ).start()
                return carry

            lax.fori_loop(0, jnp.where(index[step * many] >= 0, many, 0), page, 0)

        pl.when(step == 0)(lambda: fetch(step))
        last = math.prod(self.grid) - 1
        pl.when(step < last)(lambda: fetch(step + 1))
        pl.when(n == 0)(lambda: self.call.begin(state))

        @pl.when(index[step * many] >= 0)
        def _():
            for j, x in enumerate(held):  # for as many bytes as the copies have
                pltpu.make_async_copy(
                    x.at[slot], x.at[slot], arrived.at[j, slot]
                ).wait()
            size = min(self.call.part, RUN)

            def part(i, carry):
                at = pl.ds(pl.multiple_of(i * size, size), size)
                keys = [k[slot, at], *(x[:, at] for x in key_steps)]
                values = [v[slot, at], *(x[:, at] for x in value_steps)]
                self.call.add(state, q[...], ends, keys, values, place[:, at])
                return carry

            lax.fori_loop(0, RUN // size, part, 0)

        @pl.when(n == chunks - 1)
        def _():
            self.call.end(state, out, lse)
