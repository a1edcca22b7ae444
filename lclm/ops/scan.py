"""Selective scan of Mamba-1 (arXiv 2312.00752, algorithm 2), token after token.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t        y_t = C_t . h_t

A differs by channel and state, so there is no matrix form; a sequential loop over
float32 states [state, channels], channels minor, is the fast one on a CPU. The
backward pass keeps the inputs and one state in every `BLOCK` tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lclm.errors import LclmError
from lclm.ops.handover import unbroken
from lclm.ops.precision import wide_dtype
from lclm.typing import Array, Float, Int
from pallas_kernels.selective_scan import kernel

BLOCK = 64  # tokens between the states that a backward pass starts from


class Tokens(NamedTuple):
    """What one step reads, time leading: [T, B, C], [T, B, N] and [T, B]."""

    x: Array
    dt: Array
    b: Array
    c: Array
    keep: Array


def selective_scan(
    x: Float[Array, "B T C"],
    raw: Float[Array, "B T C"],
    *,
    a: Float[Array, "N C"],
    b: Float[Array, "B T N"],
    c: Float[Array, "B T N"],
    positions: Int[Array, "B T"],
    state: Float[Array, "B N C"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T C"], Float[Array, "B N C"]]:
    """y and the state behind the last token; step sizes are softplus(raw).

    `positions` are indices in documents: the state is forgotten before index 0 and
    padding (-1) leaves it alone (its outputs mean nothing). Sums and states are
    float32. Differentiable in everything but positions, both states included.
    `implementation` is "xla" or a kernel by name (`pallas_kernels.selective_scan`),
    None for the best of this platform; a kernel that cannot run raises LclmError.
    """
    dtype = wide_dtype(x)
    if state is None:
        state = jnp.zeros((len(x), *a.shape), dtype)
    parts = [p.astype(dtype) for p in (x, raw, a, b, c, state)]
    if x.shape[1] == 1:
        return _one(*parts, positions)
    try:
        run = kernel(x.shape, len(a), dtype, implementation)
    except ValueError as error:
        raise LclmError(str(error)) from error
    if run is None:
        return _scan(*parts, positions)
    x, raw, *rest = parts
    keep = (positions != 0).astype(dtype)
    return run(x, _sizes(raw, positions), *rest, keep)


def surviving(
    raw: Float[Array, "B T C"], a: Float[Array, "N C"], positions: Int[Array, "B T"]
) -> Float[Array, "B N C"]:
    """The share of a state before these tokens that is left behind them."""
    total = jnp.sum(_sizes(raw.astype(wide_dtype(raw)), positions), 1)
    left = jnp.exp(total[:, None] * a)
    return jnp.where(unbroken(positions)[:, None, None], left, 0)


def _sizes(raw: Array, positions: Array) -> Array:
    """Step sizes; zero, the identity, for padding."""
    return jnp.where((positions >= 0)[..., None], jax.nn.softplus(raw), 0)


def _tokens(x: Array, raw: Array, b: Array, c: Array, positions: Array) -> Tokens:
    keep = (positions != 0).astype(x.dtype)
    parts = (x, _sizes(raw, positions), b, c, keep)
    return Tokens(*(jnp.swapaxes(p, 0, 1) for p in parts))


def _decay(t: Tokens, a: Array) -> Array:
    """exp(dt A) [B, N, C], zero where a document starts."""
    return jnp.exp(t.dt[:, None] * a) * t.keep[:, None, None]


def _move(h: Array, t: Tokens, a: Array) -> Array:
    return _decay(t, a) * h + (t.dt * t.x)[:, None] * t.b[..., None]


def _read(h: Array, t: Tokens) -> Array:
    return jnp.sum(h * t.c[..., None], 1)


def _one(x, raw, a, b, c, state, positions):
    """One token: the loop body alone."""
    t = Tokens(*(p[0] for p in _tokens(x, raw, b, c, positions)))
    state = _move(state, t, a)
    return _read(state, t)[:, None], state


@jax.custom_vjp
def _scan(x, raw, a, b, c, state, positions):
    def step(h, t):
        h = _move(h, t, a)
        return h, _read(h, t)

    state, y = lax.scan(step, state, _tokens(x, raw, b, c, positions))
    return jnp.swapaxes(y, 0, 1), state


def _blocks(tokens: Tokens) -> Tokens:
    """[T, ...] -> [blocks, BLOCK, ...], filled up with steps that change nothing."""
    count = len(tokens.x)
    extra = -count % min(BLOCK, count)

    def cut(part: Array, fill: int) -> Array:
        pads = [(0, extra)] + [(0, 0)] * (part.ndim - 1)
        part = jnp.pad(part, pads, constant_values=fill) if extra else part
        return part.reshape(-1, min(BLOCK, count), *part.shape[1:])

    return Tokens(*(cut(p, 0) for p in tokens[:4]), cut(tokens.keep, 1))


def _forward(x, raw, a, b, c, state, positions):
    def step(h, t):
        h = _move(h, t, a)
        return h, _read(h, t)

    def block(h, part):
        new, y = lax.scan(step, h, part)
        return new, (h, y)

    tokens = _tokens(x, raw, b, c, positions)
    end, (starts, y) = lax.scan(block, state, _blocks(tokens))
    y = y.reshape(-1, *y.shape[2:])[: x.shape[1]]
    y = checkpoint_name(jnp.swapaxes(y, 0, 1), "scan_out")
    starts = checkpoint_name(starts, "scan_states")
    return (y, end), (x, raw, a, b, c, positions, starts)


def _backward(kept, ct):
    """Reverse scan over blocks whose states are computed again (equations: see step).

    The state before a token is used, never the one behind it divided by its decay.
    """
    x, raw, a, b, c, positions, starts = kept
    dy, dend = ct
    count = x.shape[1]
    tokens = _tokens(x, raw, b, c, positions)
    outs = _blocks(tokens._replace(x=jnp.swapaxes(dy, 0, 1))).x

    def step(carry, at):
        g, da = carry
        t, dy, h = at
        decay = _decay(t, a)
        e = decay * h
        w = t.dt * t.x
        dc = _contract(e + w[:, None] * t.b[..., None], dy)
        g = g + dy[:, None] * t.c[..., None]
        db = _contract(g, w)
        gb = jnp.sum(g * t.b[..., None], 1)
        ge = g * e
        ddt = t.x * gb + jnp.sum(ge * a, 1)
        da = da + jnp.sum(ge * t.dt[:, None], 0)
        return (g * decay, da), (t.dt * gb, ddt, db, dc)

    def block(carry, part):
        start, t, dy = part
        _, before = lax.scan(lambda h, t: (_move(h, t, a), h), start, t)
        return lax.scan(step, carry, (t, dy, before), reverse=True)

    parts = (starts, _blocks(tokens), outs)
    (dstate, da), grads = lax.scan(
        block, (dend, jnp.zeros_like(a)), parts, reverse=True
    )
    dx, ddt, db, dc = (
        jnp.swapaxes(g.reshape(-1, *g.shape[2:])[:count], 0, 1) for g in grads
    )
    valid = (positions >= 0)[..., None]
    draw = jnp.where(valid, ddt * jax.nn.sigmoid(raw), 0)
    return dx, draw, da, db, dc, dstate, None


def _contract(h: Float[Array, "B N C"], v: Float[Array, "B C"]) -> Array:
    """[B, N]: sums over channels, as products because those are vectorised."""
    return lax.dot_general(
        h, v, (((2,), (1,)), ((0,), (0,))), precision=lax.Precision.HIGHEST
    )


_scan.defvjp(_forward, _backward)
