"""Complex exponential moving average of Megalodon (arXiv 2404.08801, section 3.1).

Every channel d carries N complex numbers: h_t = q h_{t-1} + p x_t and
y_t = Re(sum_n g_n h_{t,n}) + omega x_t, held here as pairs of reals. The average is
linear and the same at every token, so a block of `BLOCK` tokens is one small matrix
product a channel (a Toeplitz tile), and only the state between blocks is a scan:
memory is O(B T D), never O(B T D N). A document always starts a block of its own:
packed rows and rows with padding are laid out in blocks by one gather.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lclm.ops.branch import choose
from lclm.ops.precision import wide_dtype
from lclm.typing import Array, Bool, Float, Int

BLOCK = 32
SHORT = 32  # calls of up to this many tokens run token by token
SPARE = 2  # packed rows may need this many blocks more than a plain one, and an eighth
HIGHEST = lax.Precision.HIGHEST


class Coefficients(NamedTuple):
    """p, q and g of every channel and order, [N, D]; omega [D]."""

    p: Float[Array, "N D"]
    q_re: Float[Array, "N D"]
    q_im: Float[Array, "N D"]
    g_re: Float[Array, "N D"]
    g_im: Float[Array, "N D"]
    omega: Float[Array, " D"]


def coefficients(
    alpha: Float[Array, "D N 1"],
    delta: Float[Array, "D N 1"],
    theta: Float[Array, "D 1 1"],
    gamma: Float[Array, "D N 2"],
    omega: Float[Array, "D 1"],
) -> Coefficients:
    """Stored parameters to p, q, g, omega, in at least float32 (the released code)."""
    wide = wide_dtype(alpha)
    alpha, delta, theta, gamma, omega = (
        leaf.astype(wide) for leaf in (alpha, delta, theta, gamma, omega)
    )
    order = alpha.shape[1]
    p = jax.nn.sigmoid(alpha[..., 0]).T
    size = 1 - p * jax.nn.sigmoid(delta[..., 0]).T
    turn = 2 * np.pi / order * jnp.arange(1, order + 1, dtype=wide)[:, None]
    angle = jax.nn.sigmoid(theta[:, 0, 0]) * turn
    g = gamma * order**-0.5
    return Coefficients(
        p,
        size * jnp.cos(angle),
        size * jnp.sin(angle),
        g[..., 0].T,
        g[..., 1].T,
        omega[:, 0],
    )


def cema(
    x: Float[Array, "B T D"],
    c: Coefficients,
    state: Float[Array, "B 2 N D"],
    *,
    positions: Int[Array, "B T"],
) -> tuple[Float[Array, "B T D"], Float[Array, "B 2 N D"]]:
    """The average of each document of each row, and the state behind the last token.

    `positions` count inside a document: 0 forgets the state, -1 (padding) holds it and
    gives an arbitrary output. Differentiable in x, c and state.
    """
    wide = jnp.promote_types(x.dtype, c.p.dtype)
    y, state = _cema(x.astype(wide), c, state.astype(wide), positions)
    return y.astype(x.dtype), state


def _cema(x, c, state, positions):
    valid, T = positions >= 0, x.shape[1]
    if T == 1:
        keep = (positions[:, 0] != 0)[:, None, None, None]
        new, y = advance(jnp.where(keep, state, 0), x[:, 0], c)
        return y[:, None], jnp.where(valid[:, :1, None, None], new, state)
    if T <= SHORT:
        return _sequential(T, (x, c, state), (valid, positions == 0))
    block = min(BLOCK, 1 << (T - 1).bit_length())
    count = -(-T // block)
    packed = count + count // 8 + SPARE
    plan = lay_out(positions, block, packed)
    late = plan.resets & (jnp.arange(T) > 0)
    gaps = valid[:, 1:] & ~valid[:, :-1]
    index = jnp.any(late) | jnp.any(gaps)
    index = jnp.where(index & (jnp.max(plan.last) >= packed), 2, index.astype(int))
    forms = (
        functools.partial(_plain, block),
        functools.partial(_packed, block),
        functools.partial(_sequential, block),
    )
    return choose(forms, index, (x, c, state), plan)


class Plan(NamedTuple):
    """Where tokens stand when every document starts a block of its own.

    `slots` [B, T] of tokens (past the end for padding); `sources` [B, blocks * Q],
    the token in each slot (T: none); `starts` [B, blocks], blocks that forget the
    state before them; `last` [B], the block of the last valid token (-1: none), which
    has `fill` tokens.
    """

    valid: Bool[Array, "B T"]
    resets: Bool[Array, "B T"]
    slots: Int[Array, "B T"]
    sources: Int[Array, "B S"]
    starts: Bool[Array, "B C"]
    last: Int[Array, " B"]
    fill: Int[Array, " B"]


def lay_out(positions: Int[Array, "B T"], block: int, blocks: int) -> Plan:
    """Plan the blocks of a call. Rows may need more than `blocks`: see `Plan.last`."""
    B, T = positions.shape
    valid, resets = positions >= 0, positions == 0
    seen = jnp.cumsum(valid, 1, dtype=jnp.int32)
    before = lax.cummax(jnp.where(resets, seen - 1, 0), axis=1)
    rank = seen - 1 - before  # in the token's document, of this call
    opens = valid & (rank % block == 0)
    at = jnp.cumsum(opens, 1, dtype=jnp.int32) - 1
    size = blocks * block
    slots = jnp.where(valid, at * block + rank % block, size)
    rows = jnp.arange(B)[:, None]
    token = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    sources = jnp.full((B, size), T, jnp.int32).at[rows, slots].set(token, mode="drop")
    first = jnp.where(opens & resets, at, blocks)
    starts = jnp.zeros((B, blocks), bool).at[rows, first].set(True, mode="drop")
    some = jnp.any(valid, 1)
    final = jnp.argmax(jnp.where(valid, token, -1), 1)[:, None]
    fill = jnp.take_along_axis(rank, final, 1)[:, 0] % block + 1
    return Plan(
        valid,
        resets,
        slots,
        sources,
        starts,
        jnp.where(some, at[:, -1], -1),
        jnp.where(some, fill, 0),
    )


def _plain(block: int, values: Any, plan: Plan) -> tuple[Array, Array]:
    """One document a row, padded on the right: tokens stand where they are."""
    x, c, state = values
    T = x.shape[1]
    count = -(-T // block)
    x = jnp.where(plan.valid[..., None], x, 0)
    x = jnp.pad(x, ((0, 0), (0, count * block - T), (0, 0)))
    y, state = _tiles(x, c, state, plan.starts[:, :count], (plan.last, plan.fill))
    return y[:, :T], state


def _packed(block: int, values: Any, plan: Plan) -> tuple[Array, Array]:
    """Move tokens to the blocks of their documents and back."""
    x, c, state = values
    T = x.shape[1]
    inside = jnp.minimum(plan.sources, T - 1)
    spread = jnp.take_along_axis(x, inside[..., None], 1)
    spread = jnp.where((plan.sources < T)[..., None], spread, 0)
    y, state = _tiles(spread, c, state, plan.starts, (plan.last, plan.fill))
    slots = jnp.minimum(plan.slots, y.shape[1] - 1)
    return jnp.take_along_axis(y, slots[..., None], 1), state


def _tiles(
    x: Float[Array, "B S D"],
    c: Coefficients,
    state: Float[Array, "B 2 N D"],
    starts: Bool[Array, "B C"],
    end: tuple[Int[Array, " B"], Int[Array, " B"]],
) -> tuple[Float[Array, "B S D"], Float[Array, "B 2 N D"]]:
    """All blocks at once; `end` is the last block of each row and its tokens."""
    B, S, D = x.shape
    C, N = starts.shape[1], c.p.shape[0]
    Q = S // C
    tile, out, into, powers = tables(c, Q)
    blocks = x.reshape(B, C, Q, D).transpose(3, 1, 0, 2).reshape(D, C * B, Q)
    given = _product("dmj,dkj->dmk", blocks, into).reshape(D, C, B, 2, N)
    last, fill = end
    begin, final = _carry(
        given.transpose(1, 0, 2, 3, 4),
        state.transpose(3, 0, 1, 2),
        powers[..., Q],
        (starts.T, last),
    )
    begin = begin.transpose(1, 0, 2, 3, 4).reshape(D, C * B, 2 * N)
    y = _product("dmj,dij->dmi", blocks, tile) + _product("dmk,dki->dmi", begin, out)
    y = y.reshape(D, C, B, Q).transpose(2, 1, 3, 0).reshape(B, S, D)

    # The last block's tokens, moved to its end, enter the state as those of a full one.
    at = (last * Q)[:, None] + jnp.arange(Q) - (Q - fill)[:, None]
    real = jnp.arange(Q) >= (Q - fill)[:, None]
    tail = jnp.take_along_axis(x, jnp.clip(at, 0, S - 1)[..., None], 1)
    tail = jnp.where(real[..., None], tail, 0)
    added = jnp.einsum("bjd,dkj->dbk", tail, into, precision=HIGHEST)
    decay = jnp.take(powers, fill, axis=-1).transpose(0, 1, 3, 2)
    final = _times(decay[0], decay[1], final) + added.reshape(D, B, 2, N)
    return y, final.transpose(1, 2, 3, 0)


def _carry(given, state, decay, where):
    """States [C, D, B, 2, N] that blocks begin with, and that of each row's last."""
    starts, last = where
    re, im = decay[0][:, None], decay[1][:, None]

    def step(carry, block):
        h, final = carry
        index, given, start = block
        h = jnp.where(start[None, :, None, None], 0, h)
        final = jnp.where((last == index)[None, :, None, None], h, final)
        return (_times(re, im, h) + given, final), h

    index = jnp.arange(len(given))
    (_, final), begin = lax.scan(step, (state, state), (index, given, starts))
    return begin, final


def _times(re, im, h):
    """(re + i im) h over pairs [..., 2, N]."""
    a, b = h[..., 0, :], h[..., 1, :]
    return jnp.stack([re * a - im * b, im * a + re * b], -2)


def _product(form: str, a: Array, b: Array) -> Array:
    return jnp.einsum(form, a, b, precision=HIGHEST)


def tables(c: Coefficients, Q: int) -> tuple[Array, Array, Array, Array]:
    """The matrices of a block of Q tokens, and the powers of q.

    tile [D, Q, Q]: output i from input j; out [D, 2N, Q]: output i from the state
    before the block; into [D, 2N, Q]: the state behind it from input j;
    powers [2, D, N, Q + 1].
    """
    p, g_re, g_im = (leaf.T[..., None] for leaf in (c.p, c.g_re, c.g_im))
    re, im = powers_of(c.q_re.T, c.q_im.T, Q)
    lag = jnp.sum(p * (g_re * re - g_im * im)[..., :Q], 1)
    lag = lag.at[:, 0].add(c.omega)
    after_re, after_im = re[..., 1:], im[..., 1:]
    out = [g_re * after_re - g_im * after_im, -(g_re * after_im + g_im * after_re)]
    into = [p * re[..., Q - 1 :: -1], p * im[..., Q - 1 :: -1]]
    powers = jnp.stack([re, im])
    return toeplitz(lag), jnp.concatenate(out, 1), jnp.concatenate(into, 1), powers


def powers_of(re: Array, im: Array, count: int) -> tuple[Array, Array]:
    """q ** 0 .. q ** count on a new last axis, by doubling: log2(count) roundings."""
    pr = jnp.stack([jnp.ones_like(re), re], -1)
    pi = jnp.stack([jnp.zeros_like(im), im], -1)
    while pr.shape[-1] <= count:
        # All but q^0, times the highest power there is.
        hr, hi, ar, ai = pr[..., -1:], pi[..., -1:], pr[..., 1:], pi[..., 1:]
        pr = jnp.concatenate([pr, hr * ar - hi * ai], -1)
        pi = jnp.concatenate([pi, hr * ai + hi * ar], -1)
    return pr[..., : count + 1], pi[..., : count + 1]


def toeplitz(lag: Float[Array, "D Q"]) -> Float[Array, "D Q Q"]:
    """Lower triangular matrices [i, j] = lag[i - j]."""
    D, Q = lag.shape
    ring = jnp.concatenate([lag[:, :1], jnp.zeros_like(lag), lag[:, :0:-1]], 1)
    rows = jnp.broadcast_to(ring[:, None], (D, Q, 2 * Q)).reshape(D, -1)
    return rows[:, : Q * (2 * Q - 1)].reshape(D, Q, 2 * Q - 1)[:, :, :Q]


def _sequential(block: int, values: Any, plan: Any) -> tuple[Array, Array]:
    """Token by token, for rows of very many documents; blocks are run again backward.

    The states of one block at a time are held: memory is O(B T D).
    """
    x, c, state = values
    B, T, D = x.shape
    count = -(-T // block)
    short = count * block - T

    def cut(leaf):
        leaf = jnp.pad(leaf, ((0, 0), (0, short), *[(0, 0)] * (leaf.ndim - 2)))
        return jnp.moveaxis(leaf.reshape(B, count, block, *leaf.shape[2:]), 0, 2)

    @jax.checkpoint
    def run(state, tokens):
        return lax.scan(lambda h, token: _token(h, token, c), state, tokens)

    state, y = lax.scan(run, state, (cut(x), cut(plan[0]), cut(plan[1])))
    return jnp.moveaxis(y, 2, 0).reshape(B, -1, D)[:, :T], state


def _token(h, token, c: Coefficients):
    x, valid, reset = token
    new, y = advance(jnp.where(reset[:, None, None, None], 0, h), x, c)
    return jnp.where(valid[:, None, None, None], new, h), y


def advance(
    h: Float[Array, "B 2 N D"], x: Float[Array, "B D"], c: Coefficients
) -> tuple[Float[Array, "B 2 N D"], Float[Array, "B D"]]:
    """One token: the new state and the output."""
    a, b = h[:, 0], h[:, 1]
    re = c.q_re * a - c.q_im * b + c.p * x[:, None]
    im = c.q_re * b + c.q_im * a
    y = jnp.sum(c.g_re * re - c.g_im * im, 1) + c.omega * x
    return jnp.stack([re, im], 1), y


def cema_fft(
    x: Float[Array, "B T D"], c: Coefficients, state: Float[Array, "B 2 N D"]
) -> Float[Array, "B T D"]:
    """The same outputs by one long convolution: no documents, no padding."""
    T = x.shape[1]
    size = 1 << (2 * T - 1).bit_length()
    step = 1 << (T.bit_length() + 1) // 2
    q_re, q_im, p = c.q_re.T, c.q_im.T, c.p.T
    fine_re, fine_im = powers_of(q_re, q_im, step)
    far_re, far_im = powers_of(fine_re[..., -1], fine_im[..., -1], -(-T // step))

    def response(re: Array, im: Array) -> Array:
        """Re(sum_n (re + i im) q^t) for t < T."""
        a, b = re[..., None] * far_re, im[..., None] * far_im
        left_re, left_im = a - b, re[..., None] * far_im + im[..., None] * far_re
        lag = _product("dna,dnt->dat", left_re, fine_re[..., :-1])
        lag = lag - _product("dna,dnt->dat", left_im, fine_im[..., :-1])
        return lag.reshape(len(re), -1)[:, :T]

    g_re, g_im = c.g_re.T, c.g_im.T
    kernel = response(p * g_re, p * g_im).at[:, 0].add(c.omega)
    spectrum = jnp.fft.rfft(x.swapaxes(1, 2), size) * jnp.fft.rfft(kernel, size)
    y = jnp.fft.irfft(spectrum, size)[..., :T]
    h = state.swapaxes(2, 3)
    s_re, s_im = h[:, 0] * q_re - h[:, 1] * q_im, h[:, 0] * q_im + h[:, 1] * q_re
    carried = jax.vmap(lambda a, b: response(g_re * a - g_im * b, g_re * b + g_im * a))
    return (y + carried(s_re, s_im)).swapaxes(1, 2)
