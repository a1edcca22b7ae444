"""Attention of a few queries over a cache on Hopper; inference only (Mosaic GPU).

The slots of a row are shared by several programs, so that a batch of one fills the GPU:
each takes a run of blocks of 64 slots and leaves its output and log-sum-exp, which XLA
merges. A warpgroup streams blocks, or the pages of a list, into shared memory by TMA;
the other holds the queries of a kv head's group as 64 rows. Decoding waits for the
memory, so rows of padding cost nothing that is short.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch, tuning
from pallas_kernels.attention.gpu import (
    _COLUMN,
    _INTERPRET,
    _PAIRS,
    _ROW,
    HIDDEN,
    LOG2E,
    WIDTHS,
    _full,
    _load,
    product,
)
from pallas_kernels.decode import cached

ROWS = 64  # of a warpgroup: queries times the heads of a group
KEYS = 64  # slots of a block
TILE = 8  # slots that lie together in shared memory; copies start at multiples


def refuses(call: dispatch.Decode) -> str | None:
    """Why this kernel would not take a call, or None."""
    _, T, N, H = call.q_shape
    K, C = call.k.shape[1:3]
    if 0 in (*call.q_shape, K) or C < KEYS:
        return f"q {call.q_shape} is empty, or {C} slots are fewer than {KEYS}"
    if C % TILE:
        return f"{C} slots are no multiple of {TILE}"
    if T * N // K > ROWS:
        return f"{T * N // K} queries times heads of a group are more than {ROWS}"
    if hasattr(call.k, "open") or hasattr(call.v, "open"):
        return "a buffer of codes is no array"
    if call.k.dtype != call.v.dtype or call.k.dtype not in (jnp.bfloat16, jnp.float16):
        return f"dtypes {call.k.dtype}, {call.v.dtype} are not both bfloat16 or float16"
    widths = H, call.v.shape[3]
    if widths[0] != widths[1] or H not in WIDTHS:
        return f"head widths {widths} are not both one of {WIDTHS}"
    if call.page is not None and (KEYS % call.page or call.page % 8):
        return f"pages of {call.page} slots are none of 8, 16, 32 and 64"
    return dispatch.not_hopper() or dispatch.outside_shard_map()


def attend(scoring, q, k, v, k_pos, *, length=None, beside=None):
    """As `pallas_kernels.decode.cached.attend`; column sums are a pass of XLA's."""
    B, C = len(q), k.shape[2]
    limit = jnp.broadcast_to(jnp.asarray(C if length is None else length), (B,))
    limit = jnp.clip(limit, 0, C).astype(jnp.int32)
    out, lse = _run(scoring, q, k, v, k_pos, limit, None)
    if beside is None:
        return out, lse, None
    whole = jnp.logaddexp(lse, beside)
    return out, lse, cached._column_sums(scoring, q, k, whole, k_pos)


def attend_pages(scoring, q, k, v, index, places):
    """As `pallas_kernels.decode.pages.attend_pages`."""
    page = places.shape[2] // index.shape[2]
    many = -index.shape[2] % (KEYS // page)
    index = jnp.pad(index, ((0, 0), (0, 0), (0, many)), constant_values=-1)
    pads = ((0, 0), (0, 0), (0, many * page))
    places = jnp.pad(places, pads, constant_values=-1)
    limit = jnp.full(len(q), places.shape[2], jnp.int32)
    return _run(scoring, q, k, v, places, limit, index)


def _rows(scoring, q, dtype):
    """Queries [B, K, ROWS, H]; [B, 2, ROWS] the last positions not seen and seen."""
    rows = scoring.rows(q)
    cap = scoring.softcap
    rows = (rows * (LOG2E if cap is None else 1 / cap)).astype(dtype)
    more = ROWS - rows.shape[2]
    high = jnp.tile(scoring.q_pos, (1, scoring.group))
    low = jnp.full_like(high, -1)
    if scoring.window is not None:
        low = jnp.maximum(high - scoring.window, -1)
    ends = jnp.stack([low, high], 1)
    ends = jnp.pad(ends, ((0, 0), (0, 0), (0, more)), constant_values=-1)
    return jnp.pad(rows, ((0, 0), (0, 0), (0, more), (0, 0))), ends


def _run(scoring, q, k, v, places, limit, index):
    """Attention over slots before `limit` [B] of `places` [B, 1 or K, C]."""
    B, T, N, H = q.shape
    K, slots = k.shape[1], places.shape[2]
    rows, ends = _rows(scoring, q, k.dtype)
    most, sizes = -(-slots // KEYS), tuning.of("decode_gpu")
    splits = max(1, min(-(-most // sizes.least), -(-sizes.programs // (B * K))))
    kept = -(-(T * N // K) // 8) * 8
    arrays = [rows, ends, (limit + KEYS - 1) // KEYS, places.reshape(-1)]
    arrays += [k, v] if index is None else [k, v, index.reshape(-1)]
    shape = (B, K, splits)
    body = _Kernel(scoring.softcap, shape, slots, places.shape[1] > 1, index, kept)
    like = jax.ShapeDtypeStruct
    parts, lse = body.run(
        [like((*shape, kept, H), jnp.float32), like((*shape, ROWS), jnp.float32)],
        arrays, k.dtype, H,
    )  # fmt: skip
    lse = lse[..., :kept]
    top = jnp.max(lse, 2, keepdims=True)
    weights = jnp.exp(lse - jnp.where(jnp.isfinite(top), top, 0.0))
    total = weights.sum(2)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    out = (parts * weights[..., None]).sum(2) / total[..., None]
    lse = jnp.where(some, top[:, :, 0] + jnp.log(total), -jnp.inf)
    out, lse = (x[:, :, : T * N // K] for x in (out, lse))
    out = out.reshape(B, N, T, H).swapaxes(1, 2).astype(v.dtype)
    return out, lse.reshape(B, N, T)


class _Kernel:
    """One program for each split of each kv head of each row."""

    def __init__(self, softcap, shape, slots, per_head, index, kept):
        self.softcap, self.shape, self.slots = softcap, shape, slots
        self.per_head, self.kept = per_head, kept
        self.listed = None if index is None else index.shape[2]
        # Copies of a block of keys, each of so many slots.
        self.copies = 1 if index is None else self.listed * KEYS // slots
        self.page = KEYS // self.copies
        self.stages = tuning.of("decode_gpu").stages

    def run(self, outputs, arrays, dtype, width):
        """Partial outputs and their log-sum-exps."""
        interpret = _INTERPRET.value
        B, K, splits = self.shape

        def attention_decode(*refs):
            refs, out = refs[: len(arrays)], refs[len(arrays) :]

            def scoped(q, k, v, place, result, aside, ready, full, done):
                b, h, s = (lax.axis_index(n) for n in ("row", "head", "split"))
                wg = lax.axis_index("wg")
                total = refs[2][b]
                share = lax.div(total + (splits - 1), splits)
                begin = lax.min(s * share, total)
                end = lax.min(begin + share, total)

                @pl.when(wg == 1)
                def _():
                    self.stream(refs, (k, v, place), (full, done), (b, h, begin, end))

                @pl.when(wg == 0)
                def _():
                    plgpu.copy_gmem_to_smem(refs[0].at[b, h], q, ready)
                    plgpu.barrier_wait(ready)
                    low, high = (_load(refs[1].at[b, n], _ROW) for n in range(2))
                    held = q, k, v, place, aside
                    self.fold(
                        held, (low, high), (full, done), (begin, end), width,
                        result, [x.at[b, h, s] for x in out],
                    )  # fmt: skip

            def tiles(size):
                return (plgpu.TilingTransform((8, size)), plgpu.SwizzleTransform(128))

            def matrix(*shape):
                return plgpu.SMEM(shape, dtype, transforms=tiles(64))

            pl.run_scoped(
                scoped,
                matrix(ROWS, width),
                matrix(self.stages, KEYS, width),
                matrix(self.stages, KEYS, width),
                plgpu.SMEM((self.stages, KEYS), jnp.int32),
                plgpu.SMEM((ROWS, width), jnp.float32, transforms=tiles(32)),
                matrix(ROWS, KEYS) if interpret else None,
                plgpu.Barrier(),
                plgpu.Barrier(
                    num_arrivals=2 * self.copies + 1, num_barriers=self.stages
                ),
                plgpu.Barrier(num_barriers=self.stages),
                collective_axes="wg",
            )

        if self.listed is not None:
            attention_decode.__name__ = "attention_pages"
        return plgpu.kernel(
            attention_decode,
            out_type=tuple(outputs),
            grid=(splits, K, B),
            grid_names=("split", "head", "row"),
            num_threads=2,
            thread_name="wg",
            interpret=plgpu.InterpretGPUParams(detect_races=True)
            if interpret
            else None,
            compiler_params=plgpu.CompilerParams(approx_math=True),
        )(*arrays)

    def first(self, n):
        """The first slot of block n: the last block ends where the slots do."""
        return pl.multiple_of(lax.min(n * KEYS, self.slots - KEYS), TILE)

    def stream(self, refs, held, barriers, place):
        """Bring all blocks in, each into the place that was used longest ago."""
        (b, h, begin, end), (full, done) = place, barriers
        K = self.shape[1]
        row = b * K + h if self.per_head else b

        def bring(n, _):
            slot = lax.rem(n - begin, self.stages)

            @pl.when(n - begin >= self.stages)
            def _():
                plgpu.barrier_wait(done.at[slot])

            start = self.first(n)
            for i in range(self.copies):
                at, to = start, pl.ds(i * self.page, self.page)
                if self.listed is not None:
                    entry = (b * K + h) * self.listed + n * self.copies + i
                    at = lax.max(refs[6][entry], 0) * self.page
                for source, dest in zip(refs[4:6], held[:2], strict=True):
                    plgpu.copy_gmem_to_smem(
                        source.at[b, h, pl.ds(at, self.page)],
                        dest.at[slot, to], full.at[slot],
                    )  # fmt: skip
            places = refs[3].at[pl.ds(row * self.slots + start, KEYS)]
            plgpu.copy_gmem_to_smem(places, held[2].at[slot], full.at[slot])
            return 0

        lax.fori_loop(begin, end, bring, 0)
        for slot in range(self.stages):

            @pl.when(slot < end - begin)
            def _(slot=slot):
                plgpu.barrier_wait(done.at[slot])

    def fold(self, held, ends, barriers, run, width, result, out):
        """Softmax over blocks [begin, end), and the result of these."""
        (q, k, v, place, aside), (full, done), (begin, end) = held, barriers, run
        shape = (ROWS, KEYS)
        low, high = (lax.broadcast_in_dim(x, shape, (0,)) for x in ends)

        def step(n, carry):
            acc, top, total = carry
            slot = lax.rem(n - begin, self.stages)
            plgpu.barrier_wait(full.at[slot])
            at = _load(place.at[slot], _COLUMN)
            if self.slots % KEYS:
                number = plgpu.broadcasted_iota(jnp.int32, (KEYS,), 0, layout=_COLUMN)
                at = jnp.where(number + self.first(n) >= n * KEYS, at, -1)
            at = lax.broadcast_in_dim(at, shape, (1,))
            seen = (at > low) & (at <= high)
            scores = product(q, k.at[slot].transpose((1, 0)), shape)
            if self.softcap is not None:
                scores = jnp.tanh(scores) * (self.softcap * LOG2E)
            scores = jnp.where(seen, scores, HIDDEN)
            new = jnp.maximum(top, scores.max(axis=1))
            fade = jnp.exp2(top - new)
            weights = jnp.exp2(scores - lax.broadcast_in_dim(new, shape, (0,)))
            total = total * fade + weights.sum(axis=1)
            acc = acc * lax.broadcast_in_dim(fade, acc.shape, (0,))
            acc = _add(acc, weights.astype(v.dtype), v.at[slot], aside)
            plgpu.barrier_arrive(done.at[slot])
            return acc, new, total

        # A maximum above HIDDEN: of a row that sees nothing no weight is above 0.
        state = (
            _full((ROWS, width), 0, _PAIRS),
            _full((ROWS,), HIDDEN / 2, _ROW),
            _full((ROWS,), 0, _ROW),
        )
        acc, top, total = lax.fori_loop(begin, end, step, state)
        some = total > 0
        total = jnp.where(some, total, 1.0)
        result[...] = acc * lax.broadcast_in_dim(1.0 / total, acc.shape, (0,))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(result.at[pl.ds(0, self.kept)], out[0])
        final = (top + jnp.log2(total)) * (1 / LOG2E)
        out[1][...] = jnp.where(some, final, -jnp.inf)
        plgpu.wait_smem_to_gmem(0)


def _add(total, weights, v, aside):
    """`total` plus the product of weights [rows, keys] and v [keys, H]."""
    if aside is None:

        def run(acc):
            plgpu.wgmma(acc, weights, v)

        return pl.run_state(run)(plgpu.ACC.init(total))
    # The interpreter takes operands from memory alone, and starts sums at 0.
    aside[...] = weights
    plgpu.commit_smem()
    return total + product(aside, v, total.shape)
