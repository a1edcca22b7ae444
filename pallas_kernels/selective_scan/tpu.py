"""Selective scan on a TPU's vector unit, forward and deterministic backward.

    h_t = keep_t exp(dt_t A) h_{t-1} + dt_t x_t B_t        y_t = C_t . h_t

(Mamba-1, arXiv 2312.00752.) A program holds 1,024 channels as one (8, 128) register a
state, so that B_t and C_t are scalars and nothing crosses a lane until the gradients
of B and C. Time is the innermost dimension of the grid: the state stays in scratch
from one block of tokens to the next. The backward pass is given the state in front of
every block, computes the others of the block again and keeps them in VMEM.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tuning
from pallas_kernels.selective_scan import shared

ROWS, LANES = 8, 128
CHANNELS = ROWS * LANES  # of one program
STATES = (8, 16, 32)
_FORGET = 1e30  # a step this long leaves nothing of a state: exp(-1e30 |A|) = 0


def supports(x_shape: tuple[int, ...], states: int, dtype: Any) -> str | None:
    """Why a scan over `x` [B, T, C] with `states` states is refused, or None."""
    return shared.refuses(x_shape, states, dtype, CHANNELS, STATES)


# Arrays as the kernels take them.


def _block(tokens: int, most: int) -> int:
    """Tokens of a block: whole sublanes, and no more than there are."""
    return min(most, -(-tokens // ROWS) * ROWS)


def _by_channels(x: jax.Array, block: int) -> jax.Array:
    """[B, T, C] -> [B, T', C / 128, 128], T' whole blocks."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0)))
    return x.reshape(*x.shape[:2], -1, LANES)


def _by_scalars(x: jax.Array, block: int, fill: float = 0.0) -> jax.Array:
    """[B, T, N] -> [B, blocks, block, N]."""
    pads = ((0, 0), (0, -x.shape[1] % block), (0, 0))
    x = jnp.pad(x, pads, constant_values=fill)
    return x.reshape(x.shape[0], -1, block, x.shape[2])


def _arrays(x, dt, a, b, c, keep, block: int):
    """x, dt and a by channels; b, c and keep by scalars."""
    N = a.shape[0]
    return (
        _by_channels(x, block),
        _by_channels(dt, block),
        a.reshape(N, -1, LANES),
        _by_scalars(b, block),
        _by_scalars(c, block),
        _by_scalars(keep[..., None], block, 1.0).swapaxes(2, 3),
    )


def _specs(block: int, N: int, at):
    """Blocks of the arrays above; `at(j)` is the block of tokens at grid step j."""
    tokens = pl.BlockSpec((1, block, ROWS, LANES), lambda i, k, j: (i, at(j), k, 0))
    decay = pl.BlockSpec((N, ROWS, LANES), lambda i, k, j: (0, k, 0))

    def scalars(*shape):
        return pl.BlockSpec(
            (1, 1, *shape), lambda i, k, j: (i, at(j), 0, 0), memory_space=pltpu.SMEM
        )

    small = scalars(block, N)
    return tokens, decay, small, scalars(1, block)


def _state_spec(N: int):
    return pl.BlockSpec((1, N, ROWS, LANES), lambda i, k, j: (i, 0, k, 0))


_PARAMS = pltpu.CompilerParams(
    dimension_semantics=("parallel", "parallel", "arbitrary")
)


# Forward.


def _run_forward(interpret, sizes, x, dt, a, b, c, state, keep, *, saves: bool):
    (B, T, C), N = x.shape, a.shape[0]
    block = _block(T, sizes.backward if saves else sizes.forward)
    arrays = _arrays(x, dt, a, b, c, keep, block)
    count, rows = arrays[0].shape[1] // block, C // LANES
    tokens, decay, small, flags = _specs(block, N, lambda j: j)
    whole = _state_spec(N)
    like = jax.ShapeDtypeStruct
    out_shape = [
        like(arrays[0].shape, jnp.float32),
        like((B, N, rows, LANES), jnp.float32),
    ]
    out_specs = [tokens, whole]
    if saves:
        out_shape.append(like((B, count, N, rows, LANES), jnp.float32))
        shape = (1, 1, N, ROWS, LANES)
        out_specs.append(pl.BlockSpec(shape, lambda i, k, j: (i, j, 0, k, 0)))
    y, end, *starts = pl.pallas_call(
        functools.partial(_forward, N, block),
        grid=(B, rows // ROWS, count),
        in_specs=[tokens, tokens, decay, small, small, flags, whole],
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=[pltpu.VMEM((N, ROWS, LANES), jnp.float32)],
        compiler_params=_PARAMS,
        interpret=interpret,
        name="selective_scan",
    )(*arrays, state.reshape(B, N, rows, LANES))
    y = y.reshape(B, -1, C)[:, :T]
    return y, end.reshape(B, N, C), starts[0] if saves else None


def _forward(N, block, x, dt, a, b, c, keep, first, y, end, *rest):
    """One block of tokens; `rest` is the place for the entry state, if any, and h."""
    *starts, held = rest
    j = pl.program_id(2)

    @pl.when(j == 0)
    def _():
        held[...] = first[0]

    for place in starts:
        place[0, 0] = held[...]

    def step(t, h):
        size = dt[0, t]
        far = size + (1.0 - keep[0, 0, 0, t]) * _FORGET
        fed, out, new = size * x[0, t], jnp.zeros((ROWS, LANES), jnp.float32), []
        for n in range(N):
            new.append(jnp.exp(far * a[n]) * h[n] + fed * b[0, 0, t, n])
            out += new[n] * c[0, 0, t, n]
        y[0, t] = out
        return tuple(new)

    together = tuning.of("scan_tpu").unrolled
    h = tuple(held[n] for n in range(N))
    h = shared.walk(block, step, h, together=together)
    for n in range(N):
        held[n] = h[n]

    @pl.when(j == pl.num_programs(2) - 1)
    def _():
        end[0] = held[...]


# Backward.


def _run_backward(interpret, sizes, x, dt, a, b, c, keep, starts, dy, dend):
    (B, T, C), N = x.shape, a.shape[0]
    block = _block(T, sizes.backward)
    arrays = _arrays(x, dt, a, b, c, keep, block)
    count, rows = arrays[0].shape[1] // block, C // LANES
    parts = rows // ROWS
    at = lambda j: count - 1 - j  # noqa: E731
    tokens, decay, small, flags = _specs(block, N, at)
    whole = _state_spec(N)
    entry = pl.BlockSpec((1, 1, N, ROWS, LANES), lambda i, k, j: (i, at(j), 0, k, 0))
    sums = pl.BlockSpec((1, 1, block, N), lambda i, k, j: (i, k, at(j), 0))
    like = jax.ShapeDtypeStruct
    by_channels = like(arrays[0].shape, jnp.float32)
    by_state = like((B, N, rows, LANES), jnp.float32)
    by_token = like((B, parts, count * block, N), jnp.float32)
    dx, ddt, da, db, dc, dstate = pl.pallas_call(
        functools.partial(_backward, N, block),
        grid=(B, parts, count),
        in_specs=[tokens, tokens, decay, small, small, flags, entry, tokens, whole],
        out_specs=[tokens, tokens, whole, sums, sums, whole],
        out_shape=[by_channels, by_channels, by_state, by_token, by_token, by_state],
        scratch_shapes=[
            pltpu.VMEM((block, N, ROWS, LANES), jnp.float32),
            pltpu.VMEM((N, ROWS, LANES), jnp.float32),
            pltpu.VMEM((block, N, LANES), jnp.float32),
            pltpu.VMEM((block, N, LANES), jnp.float32),
        ],
        compiler_params=_PARAMS,
        interpret=interpret,
        name="selective_scan_gradients",
    )(*arrays, starts, _by_channels(dy, block), dend.reshape(B, N, rows, LANES))
    dx, ddt = (g.reshape(B, -1, C)[:, :T] for g in (dx, ddt))
    db, dc = (g.sum(1)[:, :T] for g in (db, dc))
    return dx, ddt, da.sum(0).reshape(N, C), db, dc, dstate.reshape(B, N, C)


def _backward(
    N, block, x, dt, a, b, c, keep, start, dy, dend,
    dx, ddt, da, db, dc, dstate, before, held, sums_b, sums_c,
):  # fmt: skip
    """One block, from its last token to its first.

    `before` are the states in front of each token; `held` is the gradient that comes
    from later tokens; `sums_*` wait for one sum over lanes a block.
    """
    j = pl.program_id(2)

    @pl.when(j == 0)
    def _():
        held[...] = dend[0]
        da[...] = jnp.zeros_like(da)

    def step_size(t):
        size = dt[0, t]
        return size, size + (1.0 - keep[0, 0, 0, t]) * _FORGET

    def again(t, h):
        size, far = step_size(t)
        fed, new = size * x[0, t], []
        for n in range(N):
            before[t, n] = h[n]
            new.append(jnp.exp(far * a[n]) * h[n] + fed * b[0, 0, t, n])
        return tuple(new)

    together = tuning.of("scan_tpu").unrolled_back
    first = tuple(start[0, 0, n] for n in range(N))
    shared.walk(block, again, first, together=together)

    def back(i, later):
        t = block - 1 - i
        size, far = step_size(t)
        now, out = x[0, t], dy[0, t]
        fed = size * now
        by_input = jnp.zeros((ROWS, LANES), jnp.float32)
        by_decay = jnp.zeros((ROWS, LANES), jnp.float32)
        earlier = []
        for n in range(N):
            decay = jnp.exp(far * a[n])
            kept = decay * before[t, n]
            g = later[n] + out * c[0, 0, t, n]
            sums_c[t, n] = jnp.sum((kept + fed * b[0, 0, t, n]) * out, 0)
            sums_b[t, n] = jnp.sum(g * fed, 0)
            by_input += g * b[0, 0, t, n]
            turned = g * kept
            by_decay += turned * a[n]
            da[0, n] += turned * size
            earlier.append(g * decay)
        dx[0, t] = size * by_input
        ddt[0, t] = now * by_input + by_decay
        return tuple(earlier)

    g = tuple(held[n] for n in range(N))
    g = shared.walk(block, back, g, together=together)
    for n in range(N):
        held[n] = g[n]
    db[0, 0] = jnp.sum(sums_b[...], -1)
    dc[0, 0] = jnp.sum(sums_c[...], -1)

    @pl.when(j == pl.num_programs(2) - 1)
    def _():
        dstate[0] = held[...]


scan = shared.operation(_run_forward, _run_backward)
