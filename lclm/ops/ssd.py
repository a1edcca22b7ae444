"""Mamba-2's state-space scan as matrix products over blocks (arXiv 2405.21060).

Letters of the products: b row, i and j tokens of a block, k group of heads, g head of a
group, h channel of a head, p state. A document's first token (position 0) starts from
an empty state; padding (position -1) leaves the state as it is.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lclm.errors import LclmError
from lclm.ops.handover import unbroken
from lclm.ops.precision import wide_dtype
from lclm.typing import Array, Float, Int

BLOCK = 64  # tokens whose pairs are formed at once


class Block(NamedTuple):
    """What the scan reads; `count` of document starts up to each token of the call.

    x [b i k g h], delta [b i k g], b and c [b i k p], count int32 [b i], before
    int32 [b]: the count in front of the block. Chunks and their blocks lead in a call.
    """

    x: Array
    delta: Array
    b: Array
    c: Array
    count: Array
    before: Array


class Decays(NamedTuple):
    """How much of what survives where, between 0 and 1.

    within [b k g i j]: of token j's input at token i; enter [b i k g]: of the state
    before the block; leave [b j k g]: of token j's input behind the block; across
    [b k g]: of the state from one side of the block to the other.
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
    kind = wide_dtype(x)
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
    chunks = _cut(x, delta, b, c, positions, chunk=chunk)
    split = (groups, heads // groups)
    state = jnp.moveaxis(state.reshape(rows, *split, size, width), -1, 2)
    y, state = _scan(chunks, a.reshape(split), state)
    y = jnp.moveaxis(y, 2, 0).reshape(rows, -1, heads, size)[:, :time]
    return y, jnp.moveaxis(state, 2, -1).reshape(rows, heads, size, width)


def surviving(
    delta: Float[Array, "B T N"], a: Float[Array, " N"], positions: Int[Array, "B T"]
) -> Float[Array, "B N 1 1"]:
    """The share of a state before these tokens that is left behind them."""
    total = jnp.sum(jnp.where((positions >= 0)[..., None], delta, 0), 1)
    left = jnp.where(unbroken(positions)[:, None], jnp.exp(total * a), 0)
    return left[..., None, None]


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


def _cut(x, delta, b, c, positions, *, chunk: int) -> Block:
    """The call as chunks, each of blocks, padded behind to fit."""
    rows, time = positions.shape
    size = min(BLOCK, chunk, time)
    many = min(-(-chunk // size), -(-time // size))
    groups, each = b.shape[2], x.shape[2] // b.shape[2]
    spare = -time % (size * many)

    def cut(value: Array, *rest: int, mode: str = "constant") -> Array:
        if spare:
            pads = ((0, 0), (0, spare)) + ((0, 0),) * (value.ndim - 2)
            value = jnp.pad(value, pads, mode=mode)
        return jnp.moveaxis(value.reshape(rows, -1, many, size, *rest), 0, 2)

    count = cut(jnp.cumsum(positions == 0, 1, dtype=jnp.int32), mode="edge")
    last = count[..., -1].reshape(-1, rows)
    before = jnp.pad(last[:-1], ((1, 0), (0, 0)))
    return Block(
        cut(x, groups, each, x.shape[3]),
        cut(delta, groups, each),
        cut(b, groups, b.shape[3]),
        cut(c, groups, c.shape[3]),
        count,
        before.reshape(-1, many, rows),
    )


@jax.custom_vjp
def _scan(chunks: Block, a: Array, state: Array) -> tuple[Array, Array]:
    """Outputs [chunks blocks b i k g h] and the final state [b k p g h]."""
    return _forward(chunks, a, state)[0]


def _forward(chunks, a, state):
    def block(state, block):
        return _block(block, a, state)

    def chunk(state, blocks):
        after, y = _over(block, state, blocks)
        return after, (y, state)

    final, (y, entered) = _over(chunk, state, chunks)
    y = checkpoint_name(y, "scan_out")
    entered = checkpoint_name(entered, "scan_states")
    return (y, final), (chunks, a, entered)


def _backward(saved, cotangents):
    """Chunks from the last to the first; states inside are formed again."""
    chunks, a, entered = saved
    dy, dstate = cotangents

    def again(state, block):
        return _after(block, _decays(block, a), state), state

    def pull(carry, each):
        block, before, dy = each
        dstate, flow, da = carry
        (dx, dflow, db, dc), dstate = _block_vjp(block, a, before, dy, dstate)
        dlog = jnp.flip(jnp.cumsum(jnp.flip(dflow, 1), axis=1), 1) + flow[:, None]
        ddelta = a * dlog + jnp.sum(block.x * dx, -1)
        da += jnp.sum(block.delta * dlog, (0, 1))
        parts = (dx * block.delta[..., None], ddelta, db, dc)
        parts = tuple(p.astype(v.dtype) for p, v in zip(parts, block, strict=False))
        return (dstate, dlog[:, 0], da), parts

    def chunk(carry, each):
        blocks, state, dy = each
        dstate, da = carry
        final, before = _over(again, state, blocks)
        # <state, its cotangent> behind the chunk; blocks carry it on by differences.
        flow = jnp.sum(final * dstate, (2, 4))
        start = (dstate, flow, da)
        (dstate, _, da), parts = _over(pull, start, (blocks, before, dy), reverse=True)
        return (dstate, da), parts

    start = (dstate, jnp.zeros_like(a))
    (dstate, da), parts = _over(chunk, start, (chunks, entered, dy), reverse=True)
    return Block(*parts, None, None), da, dstate


_scan.defvjp(_forward, _backward)


def _over(step, carry: Any, items: Any, *, reverse: bool = False) -> tuple[Any, Any]:
    """`lax.scan`, without a loop where there is one item."""
    if jax.tree.leaves(items)[0].shape[0] > 1:
        return lax.scan(step, carry, items, reverse=reverse)
    carry, out = step(carry, jax.tree.map(lambda leaf: leaf[0], items))
    return carry, jax.tree.map(lambda leaf: leaf[None], out)


def _product(form: str, left: Array, right: Array) -> Array:
    return jnp.einsum(form, left, right, precision=lax.Precision.HIGHEST)


def _wide(block: Block) -> tuple[Array, Array, Array]:
    """delta x, b and c in the type of delta."""
    kind = block.delta.dtype
    x = block.x.astype(kind) * block.delta[..., None]
    return x, block.b.astype(kind), block.c.astype(kind)


def _decays(block: Block, a: Array) -> Decays:
    """Exponents are never positive: what is masked is masked before exp."""
    count, before = block.count, block.before
    last = count[:, -1]
    order = lax.iota(jnp.int32, count.shape[1])
    seen = count[:, :, None] == count[:, None, :]
    seen = seen & (order[:, None] >= order)
    total = jnp.cumsum(block.delta * a, axis=1)
    # Held back, or a CPU works both out again for every pair and head.
    total, hidden = lax.optimization_barrier((total, _hidden(seen, total.dtype)))
    end = total[:, -1]
    lines = jnp.moveaxis(total, 1, -1)
    gap = lines[..., :, None] - lines[..., None, :]

    def kept(mask: Array, exponent: Array) -> Array:
        return jnp.exp(exponent + _hidden(mask, exponent.dtype)[..., None, None])

    return Decays(
        jnp.exp(gap + hidden[:, None, None]),
        kept(count == before[:, None], total),
        kept(count == last[:, None], end[:, None] - total),
        kept(last == before, end),
    )


def _hidden(mask: Array, dtype: Any) -> Array:
    """What to add to an exponent: nothing, or minus infinity where the mask is off."""
    return jnp.where(mask, 0.0, -jnp.inf).astype(dtype)


def _after(block: Block, decays: Decays, state: Array) -> Array:
    """The state [b k p g h] behind a block."""
    x, b, _ = _wide(block)
    put = _product("bjkp,bjkgh->bkpgh", b, x * decays.leave[..., None])
    return decays.across[:, :, None, :, None] * state + put


def _block(block: Block, a: Array, state: Array) -> tuple[Array, Array]:
    """The state behind a block, and its outputs (architectures.md 3.3)."""
    x, b, c = _wide(block)
    decays = _decays(block, a)
    mix = decays.within * _product("bikp,bjkp->bkij", c, b)[:, :, None]
    y = _product("bkgij,bjkgh->bikgh", mix, x)
    entered = _product("bikp,bkpgh->bikgh", c, state)
    return _after(block, decays, state), y + decays.enter[..., None] * entered


def _block_vjp(
    block: Block, a: Array, state: Array, dy: Array, dstate: Array
) -> tuple[tuple[Array, ...], Array]:
    """Cotangents (delta x, logarithm of decay by token, b, c), and of the state.

    Written for all heads of a group at once from the cotangents of the outputs and of
    the state behind the block (architectures.md 3.3, backward of one block); pairs of
    tokens stand keys first, so that products need no transposed copy of them.
    """
    x, b, c = _wide(block)
    decays = _decays(block, a)
    late = x * decays.leave[..., None]
    early = dy * decays.enter[..., None]

    within = decays.within.swapaxes(-1, -2)
    pairs = _product("bjkp,bikp->bkji", b, c)[:, :, None]
    slope = within * _product("bjkgh,bikgh->bkgji", x, dy)
    shared = jnp.sum(slope, 2)
    dc = _product("bkji,bjkp->bikp", shared, b)
    dc += _product("bikgh,bkpgh->bikp", early, state)
    db = _product("bkji,bikp->bjkp", shared, c)
    db += _product("bjkgh,bkpgh->bjkp", late, dstate)
    dx = _product("bkgji,bikgh->bjkgh", within * pairs, dy)
    left = _product("bjkp,bkpgh->bjkgh", b, dstate)
    dx += decays.leave[..., None] * left

    # What each token changes of the flow <state, its cotangent>: reads less inputs.
    dflow = jnp.moveaxis(jnp.sum(slope * pairs, -2), -1, 1) - jnp.sum(x * dx, -1)
    dflow += jnp.sum(early * _product("bikp,bkpgh->bikgh", c, state), -1)
    reads = _product("bikp,bikgh->bkpgh", c, early)
    dstate = decays.across[:, :, None, :, None] * dstate + reads
    return (dx, dflow, db, dc), dstate


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
    wide = wide_dtype(y)
    y = y.astype(wide) * jax.nn.silu(gate.astype(wide))
    parts = y.reshape(*y.shape[:-1], groups, -1)
    square = jnp.mean(parts * parts, -1, keepdims=True)
    unit = (parts * lax.rsqrt(square + eps)).reshape(y.shape)
    return unit.astype(gate.dtype) * scale.astype(gate.dtype)
