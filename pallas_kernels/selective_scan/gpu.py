"""Selective scan on a Hopper GPU, forward and deterministic backward.

    h_t = keep_t exp(dt_t A) h_{t-1} + dt_t x_t B_t        y_t = C_t . h_t

(Mamba-1, arXiv 2312.00752.) A warpgroup holds the states of 64 channels in registers,
[64, N] in the layout of a wgmma accumulator, where four lanes share a channel: C_t . h
is a sum over those, and no barrier stands between two tokens. Tokens stream through
shared memory in blocks. The backward pass is given the state in front of every block,
computes the others of the block again into shared memory, and leaves its part of the
gradients of B and C for XLA to add, in one order. Where rows and channels are too few
to fill the chip, rows are cut into parts that run beside one another, twice.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch, tuning
from pallas_kernels.selective_scan import shared

CHANNELS = 64  # of one warpgroup
STATES = (8, 16, 32, 64)
_FORGET = 1e30  # a step this long leaves nothing of a state
_TINY = 1e-37  # stands for a step of 0 where its sign must be kept
_LOG2 = math.log2(math.e)
_BY_STATE = plgpu.Layout.WGMMA
_CHANNEL, _STATE = _BY_STATE.reduce(1), _BY_STATE.reduce(0)


def supports(x_shape: tuple[int, ...], states: int, dtype: Any) -> str | None:
    """Why a scan over `x` [B, T, C] with `states` states is refused, or None."""
    reason = shared.refuses(x_shape, states, dtype, CHANNELS, STATES)
    return reason or dispatch.not_hopper()


# What both passes share.


def _block(states: int, most: int) -> int:
    """Tokens of a block: their states fit into shared memory."""
    return min(most, 512 // states)


def _arrays(x, dt, a, b, c, keep, block: int):
    """Whole blocks of tokens; steps are below 0 where a state is forgotten.

    `a` is [C, N], of exp2.
    """
    dt = jnp.where(keep[..., None] == 0, -jnp.maximum(dt, _TINY), dt)
    pads = ((0, 0), (0, -x.shape[1] % block), (0, 0))
    x, dt, b, c = (jnp.pad(p, pads) for p in (x, dt, b, c))
    return x, dt, a.T * _LOG2, b, c


def _row(ref, t, layout):
    """Token t of a block in shared memory."""
    return plgpu.load(ref.at[0, t], layout=layout, optimized=False)


def _tile(ref):
    """[64, N] of the main memory."""
    return plgpu.load(ref, layout=_BY_STATE, optimized=False)


class _Token:
    """What moves a state from one token to the next, [64] and [64, N]."""

    def __init__(self, xs, sizes, bs, a, t):
        self.shape = a.shape
        signed = _row(sizes, t, _CHANNEL)
        self.size, self.x = jnp.abs(signed), _row(xs, t, _CHANNEL)
        far = jnp.where(signed < 0, _FORGET, self.size)
        self.decay = jnp.exp2(self.channels(far) * a)
        self.fed = self.channels(self.size * self.x)
        self.b = self.states(_row(bs, t, _STATE))

    def channels(self, v):
        return lax.broadcast_in_dim(v, self.shape, (0,))

    def states(self, v):
        return lax.broadcast_in_dim(v, self.shape, (1,))

    def move(self, h):
        return self.decay * h + self.fed * self.b


def _kernel(body, interpret, B: int, C: int, out_type, scratch_types):
    """A warpgroup for every 64 channels of every row."""

    def run(*refs):
        body(*refs)

    run.__name__ = "selective_scan" + body.func.__name__
    return plgpu.kernel(
        run,
        out_type=out_type,
        scratch_types=scratch_types,
        grid=(B, C // CHANNELS),
        grid_names=("row", "part"),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
        # Safe: a thread reads in shared memory what itself, or a copy, has written.
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True
        ),
    )


def _walk(count: int, step, carry):
    return shared.walk(count, step, carry, together=tuning.of("scan_gpu").unrolled)


def _place():
    """Row, part, and the channels of this warpgroup."""
    row, part = lax.axis_index("row"), lax.axis_index("part")
    return row, part, pl.ds(part * CHANNELS, CHANNELS)


def _specs(row, part, block: int, N: int, at):
    """Blocks of channels and of states of one row; `at(j)` is the block at step j."""
    channels = plgpu.BlockSpec((1, block, CHANNELS), lambda j: (row, at(j), part))
    states = plgpu.BlockSpec((1, block, N), lambda j: (row, at(j), 0))
    return channels, states


# Forward.


def _run_forward(interpret, sizes, x, dt, a, b, c, state, keep, *, saves: bool):
    (B, T, C), N = x.shape, a.shape[0]
    block = _block(N, sizes.block)
    arrays = _arrays(x, dt, a, b, c, keep, block)
    count = arrays[0].shape[1] // block
    like = jax.ShapeDtypeStruct
    shapes = [arrays[0].shape, (B, C, N)] + [(B, count, C, N)] * saves
    y, end, *starts = _kernel(
        functools.partial(_forward, block, saves),
        interpret, B, C,
        tuple(like(shape, jnp.float32) for shape in shapes),
        [plgpu.SMEM((2, block, CHANNELS), jnp.float32)],
    )(*arrays, state.swapaxes(1, 2))  # fmt: skip
    return y[:, :T], end.swapaxes(1, 2), starts[0] if saves else None


def _forward(block, saves, x, dt, a, b, c, first, y, end, *rest):
    *starts, out = rest
    row, part, own = _place()
    decay, N = _tile(a.at[own]), a.shape[1]

    def some(at, xs, sizes, bs, cs, h):
        (j,) = at
        slot = lax.rem(j, 2)
        if saves:
            starts[0][row, j, own] = h
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)

        def step(t, h):
            token = _Token(xs, sizes, bs, decay, t)
            h = token.move(h)
            out[slot, t] = jnp.sum(h * token.states(_row(cs, t, _STATE)), 1)
            return h

        h = _walk(block, step, h)
        plgpu.commit_smem()
        place = y.at[row, pl.ds(j * block, block), own]
        plgpu.copy_smem_to_gmem(out.at[slot], place)
        return h

    channels, states = _specs(row, part, block, N, lambda j: j)
    end[row, own] = plgpu.emit_pipeline(
        some,
        grid=(x.shape[1] // block,),
        in_specs=[channels, channels, states, states],
        max_concurrent_steps=2,
        init_carry=_tile(first.at[row, own]),
    )(x, dt, b, c)
    plgpu.wait_smem_to_gmem(0)


# Backward.


def _run_backward(interpret, sizes, x, dt, a, b, c, keep, starts, dy, dend):
    (B, T, C), N = x.shape, a.shape[0]
    block, parts = _block(N, sizes.block), C // CHANNELS
    arrays = _arrays(x, dt, a, b, c, keep, block)
    tokens = arrays[0].shape[1]
    dy = jnp.pad(dy, ((0, 0), (0, tokens - T), (0, 0)))
    like = jax.ShapeDtypeStruct
    sums = (B, parts, tokens, N)
    shapes = (arrays[0].shape,) * 2 + (sums,) * 2 + ((B, C, N),) * 2
    smem = functools.partial(plgpu.SMEM, dtype=jnp.float32)
    dx, ddt, db, dc, da, dstate = _kernel(
        functools.partial(_backward, block),
        interpret, B, C,
        tuple(like(shape, jnp.float32) for shape in shapes),
        [
            smem((block, CHANNELS, N)),
            *[smem((block, CHANNELS))] * 2,
            *[smem((block, N))] * 2,
        ],
    )(*arrays, dy, starts, dend.swapaxes(1, 2))  # fmt: skip
    da = da.sum(0).T
    dx, ddt = dx[:, :T], ddt[:, :T]
    db, dc = db.sum(1)[:, :T], dc.sum(1)[:, :T]
    return dx, ddt, da, db, dc, dstate.swapaxes(1, 2)


def _backward(
    block, x, dt, a, b, c, dy, starts, dend,
    dx, ddt, db, dc, da, dstate, before, out_x, out_dt, out_b, out_c,
):  # fmt: skip
    """Blocks from the last to the first; `before` are the states before each token."""
    row, part, own = _place()
    decay, N = _tile(a.at[own]), a.shape[1]
    count = x.shape[1] // block

    def some(at, xs, sizes, bs, cs, dys, carry):
        j = count - 1 - at[0]

        def again(t, h):
            before[t] = h
            return _Token(xs, sizes, bs, decay, t).move(h)

        _walk(block, again, _tile(starts.at[row, j, own]))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def back(i, carry):
            g, da = carry
            t = block - 1 - i
            token = _Token(xs, sizes, bs, decay, t)
            out = token.channels(_row(dys, t, _CHANNEL))
            kept = token.decay * plgpu.load(before.at[t], layout=_BY_STATE)
            g = g + out * token.states(_row(cs, t, _STATE))
            out_c[t] = jnp.sum((kept + token.fed * token.b) * out, 0)
            out_b[t] = jnp.sum(g * token.fed, 0)
            by_input = jnp.sum(g * token.b, 1)
            turned = g * kept
            by_decay = jnp.sum(turned * decay, 1) * (1 / _LOG2)
            out_x[t] = token.size * by_input
            out_dt[t] = token.x * by_input + by_decay
            return g * token.decay, da + turned * token.channels(token.size)

        carry = _walk(block, back, carry)
        plgpu.commit_smem()
        tokens = pl.ds(j * block, block)
        for done, place in ((out_x, dx), (out_dt, ddt)):
            plgpu.copy_smem_to_gmem(done, place.at[row, tokens, own])
        for done, place in ((out_b, db), (out_c, dc)):
            plgpu.copy_smem_to_gmem(done, place.at[row, part, tokens])
        return carry

    channels, states = _specs(row, part, block, N, lambda j: count - 1 - j)
    later = _tile(dend.at[row, own])
    none = plgpu.layout_cast(jnp.zeros((CHANNELS, N), jnp.float32), _BY_STATE)
    dstate[row, own], da[row, own] = plgpu.emit_pipeline(
        some,
        grid=(count,),
        in_specs=[channels, channels, states, states, channels],
        max_concurrent_steps=2,
        init_carry=(later, none),
    )(x, dt, b, c, dy)
    plgpu.wait_smem_to_gmem(0)


def _parts(sizes, shape: tuple[int, int, int]) -> int:
    """Parts of a row that take the least time, where parts are run twice.

    Up to `sizes.programs` warpgroups run beside one another as fast as one alone.
    """
    B, T, C = shape
    programs, best = B * C // CHANNELS, 1
    least = max(1.0, programs / sizes.programs)
    for parts in (2, 4, 8, 16, 32, 64):
        took = 2 / parts * max(1.0, programs * parts / sizes.programs)
        if T // parts >= sizes.least and took < 0.8 * least:
            best, least = parts, took
    return best


scan = shared.operation(*shared.in_parts(_run_forward, _run_backward, _parts))
