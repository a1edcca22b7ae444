"""Mamba-2's state-space scan as matrix products over blocks (arXiv 2405.21060).

Letters of the products: b row, r block, i and j tokens of a block, k group of heads,
g head of a group, h channel of a head, p state. A document's first token (position 0)
starts from an empty state; padding (position -1) leaves the state as it is.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lclm.errors import LclmError
from lclm.typing import Array, Float, Int

BLOCK = 64  # tokens whose pairs are formed at once


class Blocks(NamedTuple):
    """What the scan reads, by block; `count` of document starts up to each token.

    x [b r i k g h], delta [b r i k g], b and c [b r i k p], count int32 [b r i],
    before int32 [b r]: the count in front of each block.
    """

    x: Array
    delta: Array
    b: Array
    c: Array
    count: Array
    before: Array


class Decays(NamedTuple):
    """How much of what survives where, between 0 and 1.

    within [b r k g i j]: of token j's input at token i; enter [b r i k g]: of the
    state before the block; leave [b r j k g]: of token j's input behind the block;
    across [b r k g]: of the state from one side of the block to the other.
    """

    within: Array
    enter: Array
    leave: Array
    across: Array


def ssd(
    x: Float[Array, "B T N H"],
    delta: Float[Array, "B T N"],
    a: Float[Array, " N"],
    b: Float[Array, "B T K P"],
    c: Float[Array, "B T K P"],
    *,
    positions: Int[Array, "B T"],
    state: Float[Array, "_ _ _ _"] | None = None,
    chunk: int = 256,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N H P"]]:
    """S = exp(delta a) S + delta x b^T, y = S c, for each head (arXiv 2405.21060, 6).

    `delta` are step sizes >= 0, `a` < 0; heads share b and c by groups. The result and
    the state are float32 (float64 for such x). Differentiable in everything, states
    included; the backward pass keeps one state per `chunk` tokens and recomputes the
    rest. Raises `LclmError` for sizes that do not fit.
    """
    check(x, b, state, chunk)
    rows, time, heads, size = x.shape
    groups, width = b.shape[2:]
    kind = jnp.promote_types(x.dtype, jnp.float32)
    if state is None:
        state = jnp.zeros((rows, heads, size, width), kind)
    state = state.astype(kind)
    delta = jnp.where((positions >= 0)[..., None], delta, 0).astype(kind)
    a = a.astype(kind)
    if time == 1:
        first = positions[:, 0] == 0
        now = (x[:, 0], delta[:, 0], a, b[:, 0], c[:, 0])
        y, state = _token(*now, first, state)
        return y[:, None], state
    spans = _cut(x, delta, b, c, positions, chunk=chunk)
    split = (groups, heads // groups)
    y, state = _scan(spans, a.reshape(split), state.reshape(rows, *split, size, width))
    y = jnp.moveaxis(y, 0, 1).reshape(rows, -1, heads, size)[:, :time]
    return y, state.reshape(rows, heads, size, width)


def check(x: Array, b: Array, state: Array | None, chunk: int) -> None:
    """`LclmError` unless heads, groups, state and chunk fit together."""
    rows, _, heads, size = x.shape
    groups, width = b.shape[2:]
    if chunk < 1:
        raise LclmError(f"Mamba-2 chunk is {chunk}; it must be at least 1 token")
    if heads % groups:
        raise LclmError(
            f"{heads} Mamba-2 heads over {groups} groups: heads must be a multiple of "
            "groups"
        )
    expected = (rows, heads, size, width)
    if state is not None and state.shape != expected:
        raise LclmError(
            f"a Mamba-2 state of shape {state.shape} for a call that needs {expected} "
            "(rows, heads, head size, state size): use the state of this batch"
        )


def _token(x, delta, a, b, c, first, state):
    """One token of every row: x [B N H], delta [B N], b and c [B K P]."""
    each = x.shape[1] // b.shape[1]
    b, c = (jnp.repeat(v.astype(state.dtype), each, 1) for v in (b, c))
    keep = jnp.where(first[:, None], 0, jnp.exp(delta * a))
    put = (delta[..., None] * x)[..., None] * b[:, :, None]
    state = keep[..., None, None] * state + put
    return jnp.sum(state * c[:, :, None], -1), state


def _cut(x, delta, b, c, positions, *, chunk: int) -> Blocks:
    """The call as spans of `chunk` tokens, leading, each of blocks; padded to fit."""
    rows, time = positions.shape
    block = min(BLOCK, chunk, time)
    many = min(-(-chunk // block), -(-time // block))
    groups, each = b.shape[2], x.shape[2] // b.shape[2]

    spare = -time % (block * many)

    def cut(value: Array, *rest: int, mode: str = "constant") -> Array:
        if spare:
            pads = ((0, 0), (0, spare)) + ((0, 0),) * (value.ndim - 2)
            value = jnp.pad(value, pads, mode=mode)
        return jnp.moveaxis(value.reshape(rows, -1, many, block, *rest), 1, 0)

    count = cut(jnp.cumsum(positions == 0, 1, dtype=jnp.int32), mode="edge")
    last = jnp.moveaxis(count[..., -1], 0, 1).reshape(rows, -1)
    before = jnp.pad(last[:, :-1], ((0, 0), (1, 0))).reshape(rows, -1, many)
    return Blocks(
        cut(x, groups, each, x.shape[3]),
        cut(delta, groups, each),
        cut(b, groups, b.shape[3]),
        cut(c, groups, c.shape[3]),
        count,
        jnp.moveaxis(before, 1, 0),
    )


@jax.custom_vjp
def _scan(spans: Blocks, a: Array, state: Array) -> tuple[Array, Array]:
    """Outputs [spans b r i k g h] and the final state [b k g h p]."""
    return _forward(spans, a, state)[0]


def _forward(spans, a, state):
    def step(state, span):
        y, after = _span(span, a, state)
        return after, (y, state)

    final, (y, entered) = _over(step, state, spans)
    return (y, final), (spans, a, entered)


def _backward(saved, cotangents):
    spans, a, entered = saved
    dy, dstate = cotangents

    def step(carry, each):
        dstate, da = carry
        span, state, dy = each
        parts, dstate, more = _span_vjp(span, a, state, dy, dstate)
        return (dstate, da + more), parts

    start = (dstate, jnp.zeros_like(a))
    (dstate, da), parts = _over(step, start, (spans, entered, dy), reverse=True)
    return Blocks(*parts, None, None), da, dstate


_scan.defvjp(_forward, _backward)


def _over(step, carry: Any, items: Any, *, reverse: bool = False) -> tuple[Any, Any]:
    """`lax.scan`, without a loop where there is one item."""
    if jax.tree.leaves(items)[0].shape[0] > 1:
        return lax.scan(step, carry, items, reverse=reverse)
    carry, out = step(carry, jax.tree.map(lambda leaf: leaf[0], items))
    return carry, jax.tree.map(lambda leaf: leaf[None], out)


def _product(form: str, left: Array, right: Array) -> Array:
    return jnp.einsum(form, left, right, precision=lax.Precision.HIGHEST)


def _wide(span: Blocks) -> tuple[Array, Array, Array]:
    """delta x, b and c in the type of delta."""
    kind = span.delta.dtype
    x = span.x.astype(kind) * span.delta[..., None]
    return x, span.b.astype(kind), span.c.astype(kind)


def _decays(span: Blocks, a: Array) -> Decays:
    """Exponents are never positive: what is masked is masked before exp."""
    total = jnp.cumsum(span.delta * a, axis=2)
    count, before = span.count, span.before
    last = count[..., -1]
    lines = jnp.moveaxis(total, 2, -1)
    gap = lines[..., :, None] - lines[..., None, :]
    order = lax.iota(jnp.int32, count.shape[-1])
    seen = count[..., :, None] == count[..., None, :]
    seen = (seen & (order[:, None] >= order))[:, :, None, None]
    end = total[:, :, -1]

    def kept(mask: Array, exponent: Array) -> Array:
        return jnp.exp(jnp.where(mask, exponent, -jnp.inf))

    return Decays(
        kept(seen, gap),
        kept((count == before[..., None])[..., None, None], total),
        kept((count == last[..., None])[..., None, None], end[:, :, None] - total),
        kept((last == before)[..., None, None], end),
    )


def _states(x, b, decays: Decays, state: Array) -> tuple[Array, Array]:
    """States in front of each block [b r k g h p], and behind the last."""
    put = _product("brjkgh,brjkp->brkghp", x * decays.leave[..., None], b)
    found = []
    for r in range(put.shape[1]):
        found.append(state)
        state = decays.across[:, r, ..., None, None] * state + put[:, r]
    return jnp.stack(found, 1), state


def _span(span: Blocks, a: Array, state: Array) -> tuple[Array, Array]:
    """Outputs of one span and the state behind it (architectures.md 3.3)."""
    x, b, c = _wide(span)
    decays = _decays(span, a)
    before, state = _states(x, b, decays, state)
    mix = decays.within * _product("brikp,brjkp->brkij", c, b)[:, :, :, None]
    y = _product("brkgij,brjkgh->brikgh", mix, x)
    entered = _product("brikp,brkghp->brikgh", c, before)
    return y + decays.enter[..., None] * entered, state


def _span_vjp(
    span: Blocks, a: Array, state: Array, dy: Array, dstate: Array
) -> tuple[tuple[Array, ...], Array, Array]:
    """Cotangents of (x, delta, b, c), of the state in front, and of `a`.

    Written for all heads of a group at once from the cotangents of the outputs and of
    the state behind the span (architectures.md 3.3, backward of one block).
    """
    x, b, c = _wide(span)
    decays = _decays(span, a)
    before, final = _states(x, b, decays, state)
    after = jnp.concatenate([before[:, 1:], final[:, None]], 1)
    late = x * decays.leave[..., None]
    early = dy * decays.enter[..., None]

    reads = _product("brikgh,brikp->brkghp", early, c)
    behind = []
    for r in reversed(range(reads.shape[1])):
        behind.append(dstate)
        dstate = decays.across[:, r, ..., None, None] * dstate + reads[:, r]
    behind = jnp.stack(behind[::-1], 1)

    pairs = _product("brikp,brjkp->brkij", c, b)[:, :, :, None]
    slope = decays.within * _product("brikgh,brjkgh->brkgij", dy, x)
    shared = jnp.sum(slope, 3)
    dc = _product("brkij,brjkp->brikp", shared, b)
    dc += _product("brikgh,brkghp->brikp", early, before)
    db = _product("brkij,brikp->brjkp", shared, c)
    db += _product("brjkgh,brkghp->brjkp", late, behind)
    dx = _product("brkgij,brikgh->brjkgh", decays.within * pairs, dy)
    left = decays.leave[..., None] * _product("brjkp,brkghp->brjkgh", b, behind)
    dx += left

    # d total: what a token reads, less what it puts in, and what leaves the block.
    read = jnp.moveaxis(jnp.sum(slope * pairs, -1), -1, 2)
    read += jnp.sum(early * _product("brikp,brkghp->brikgh", c, before), -1)
    dtotal = read - jnp.sum(x * dx, -1)
    dtotal = dtotal.at[:, :, -1].add(jnp.sum(after * behind, (-1, -2)))
    dlog = jnp.flip(jnp.cumsum(jnp.flip(dtotal, 2), axis=2), 2)

    raw = span.x.astype(x.dtype)
    ddelta = a * dlog + jnp.sum(raw * dx, -1)
    parts = (dx * span.delta[..., None], ddelta, db, dc)
    like = (span.x, span.delta, span.b, span.c)
    parts = tuple(p.astype(v.dtype) for p, v in zip(parts, like, strict=True))
    return parts, dstate, jnp.sum(span.delta * dlog, (0, 1, 2))


def gated_norm(
    y: Float[Array, "B T C"],
    gate: Float[Array, "B T C"],
    scale: Float[Array, " C"],
    *,
    groups: int,
    eps: float,
) -> Float[Array, "B T C"]:
    """RMSNorm of y silu(gate) over each of `groups` equal parts, in gate's type.

    Gate first, then norm; statistics are float32 (Mamba-2's norm_before_gate=False).
    """
    wide = jnp.promote_types(y.dtype, jnp.float32)
    y = y.astype(wide) * jax.nn.silu(gate.astype(wide))
    parts = y.reshape(*y.shape[:-1], groups, -1)
    square = jnp.mean(parts * parts, -1, keepdims=True)
    unit = (parts * lax.rsqrt(square + eps)).reshape(y.shape)
    return unit.astype(gate.dtype) * scale.astype(gate.dtype)
