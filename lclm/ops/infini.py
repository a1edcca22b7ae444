"""Infini-attention: local attention and a compressive memory (arXiv 2404.07143).

Segments are counted from each document's first token. A token reads what its document
wrote in all earlier segments, M [H, E] and z [H] per kv head, and adds its own key and
value to an open pair that joins M and z when the next segment starts (equations 3-7).
Work goes by blocks of at most one segment, at any place of the segment grid. A block
then holds tokens of three kinds: of the segment that was open (OLD), of the one after
it (NEXT), and of documents that start in the block (FRESH), which have no memory yet.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lclm.ops.holes import any_holes, taken, tokens_first
from lclm.ops.precision import wide_dtype
from lclm.ops.slots import replace
from lclm.specs import InfiniSpec
from lclm.typing import Array, Bool, Float, Int, Leaf
from pallas_kernels import mask as masks
from pallas_kernels.attention import attention
from pallas_kernels.decode import cached_attention
from pallas_kernels.mask import Mask

EPS = 1e-6
NEXT, FRESH = 1, 2

Turn = Callable[[Array, Array], Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class InfiniState:
    """What one layer carries between calls.

    memory [B, K, H, E], norm [B, K, H]: M and z of the segments before the open one.
    open_memory, open_norm: what the open segment adds. All four at least float32.
    k [B, K, C, H], v [B, K, C, E]: rotated keys and values, position p in slot p mod C.
    """

    memory: Leaf
    norm: Leaf
    open_memory: Leaf
    open_norm: Leaf
    k: Leaf
    v: Leaf


class Pair(NamedTuple):
    """A memory M [B, K, H, E] and its normaliser z [B, K, H]."""

    m: Array
    z: Array

    def add(self, other: "Pair") -> "Pair":
        """The sum of two memories."""
        return Pair(self.m + other.m, self.z + other.z)


class Block(NamedTuple):
    """Where the tokens of a block of L stand.

    old, next: bool [B, L], tokens of the open segment and of the one after it; `lives`
    are those of `old` with a memory; `keeps` are the tokens that are the open segment
    behind the block, where it is not `old`. kind int32 [B]: of the last token.
    """

    old: Array
    lives: Array
    next: Array
    keeps: Array
    kind: Array


def empty_state(
    spec: InfiniSpec, batch: int, dtype: Any, value: int | None = None
) -> InfiniState:
    """Nothing read yet; buffers in `dtype`, sums in at least float32."""
    a = spec.attention
    wide = jnp.promote_types(dtype, jnp.float32)
    lead, value = (batch, a.kv_heads), a.head_dim if value is None else value
    memory, norm = (*lead, a.head_dim, value), (*lead, a.head_dim)
    sums = [jnp.zeros(shape, wide) for shape in (memory, norm, memory, norm)]
    k = jnp.zeros((*lead, spec.segment, a.head_dim), dtype)
    v = jnp.zeros((*lead, spec.segment, value), dtype)
    return InfiniState(*sums, k, v)


def infini_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K E"],
    gate: Float[Array, " N"],
    positions: Int[Array, "B T"],
    *,
    spec: InfiniSpec,
    turn: Turn,
    state: InfiniState | None = None,
    packed: bool = True,
) -> tuple[Float[Array, "B T N E"], InfiniState | None]:
    """Gated sum of memory and local attention (arXiv 2404.07143, equation 10).

    `q` and `k` carry no position; `turn(x, positions)` rotates them for the local
    part. `positions` count from each document's start, -1 is padding, which leaves the
    state alone. `packed=False` promises nothing but makes a fast form available where
    each row is one document from its first token on. Invalid tokens give 0.
    """

    def run(q, k, v, positions):
        return _compact_form(q, k, v, positions, gate, spec, turn, state, packed)

    if q.shape[1] == 1:
        return run(q, k, v, positions)
    holes, order = any_holes(positions), tokens_first(positions)
    out, state = run(*_moved((q, k, v, positions), order, holes))
    return _moved((out,), jnp.argsort(order, 1), holes)[0], state


def _compact_form(q, k, v, positions, gate, spec, turn, state, packed):
    """`infini_attention` of rows whose padding is on the right."""
    segment = spec.segment
    at = jnp.maximum(positions, 0)
    at = at % segment if spec.bounded else at
    turned = turn(q, at), turn(k, at), v
    if state is None:
        buffers = None
        local = _dense_local(*turned, positions, spec, packed)
    else:
        local, buffers = _cached_local(*turned, positions, spec, state)
    recall, pairs = recall_memory(q, k, v, positions, spec=spec, state=state)
    share = jax.nn.sigmoid(gate.astype(recall.dtype))[:, None]
    both = share * recall + (1 - share) * local.astype(recall.dtype)
    if spec.bypass:
        empty = (positions < segment)[:, :, None, None]
        both = jnp.where(empty, local.astype(recall.dtype), both)
    out = jnp.where((positions >= 0)[:, :, None, None], both, 0).astype(v.dtype)
    if state is None:
        return out, None
    pairs = [x.astype(y.dtype) for x, y in zip(pairs, _sums(state), strict=True)]
    return out, InfiniState(*pairs, *buffers)


def _moved(arrays: tuple, order: Array, wanted: Array) -> tuple:
    """Tokens in `order` where that is wanted."""

    def move(arrays: tuple) -> tuple:
        return tuple(taken(x, order) for x in arrays)

    return lax.cond(wanted, move, lambda arrays: arrays, arrays)


# The memory


def recall_memory(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K E"],
    positions: Int[Array, "B T"],
    *,
    spec: InfiniSpec,
    state: InfiniState | None = None,
) -> tuple[Float[Array, "B T N E"], tuple[Array, Array, Array, Array]]:
    """What each query reads from memory, and the sums behind the call.

    Padding must be on the right. The linear rule takes prefix sums over blocks, the
    delta rule a scan with one checkpoint a block.
    """
    (B, T, N, H), (K, E) = q.shape, v.shape[2:]
    wide = wide_dtype(q)
    size = min(spec.segment, T)
    count = -(-T // size)

    def cut(x: Array, value: int = 0) -> Array:
        """[B, T, ...] -> [count, B, size, ...]."""
        widths = [(0, count * size - T if a == 1 else 0) for a in range(x.ndim)]
        x = jnp.pad(x, widths, constant_values=value)
        return jnp.moveaxis(x.reshape(B, count, size, *x.shape[2:]), 1, 0)

    block = _blocks(cut(positions, -1), positions, spec.segment)
    sq = cut(feature(q.astype(wide)).reshape(B, T, K, N // K, H))
    sk = cut(feature(k.astype(wide)))
    values = cut(v.astype(wide))
    zero = Pair(jnp.zeros((B, K, H, E), wide), jnp.zeros((B, K, H), wide))
    carry = (zero, zero)
    if state is not None:
        m, z, open_m, open_z = (x.astype(wide) for x in _sums(state))
        carry = (Pair(m, z), Pair(open_m, open_z))
    run = _one if count == 1 else _linear if spec.rule == "linear" else _delta
    out, carry = run(carry, sq, sk, values, block, spec.rule)
    out = jnp.moveaxis(out, 0, 1).reshape(B, count * size, N, E)[:, :T]
    return out, (*carry[0], *carry[1])


def feature(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """elu(x) + 1, the feature map of linear attention (arXiv 2006.16236)."""
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))


def _sums(state: InfiniState) -> tuple[Array, Array, Array, Array]:
    return state.memory, state.norm, state.open_memory, state.open_norm


def _blocks(
    p: Int[Array, "X B L"], positions: Int[Array, "B T"], segment: int
) -> Block:
    """Kinds of all tokens, block by block."""
    count, B, L = p.shape
    valid = p >= 0
    flat = jnp.moveaxis(p, 0, 1).reshape(B, -1)
    document = jnp.cumsum(flat == 0, 1)
    before = jnp.arange(count) * L - 1
    first = positions[:, :1] - 1
    last = jnp.concatenate([first, flat[:, before[1:]]], 1).T[..., None]
    shown = jnp.concatenate([jnp.zeros_like(first), document[:, before[1:]]], 1)
    shown = shown.T[..., None]
    document = jnp.moveaxis(document.reshape(B, count, L), 1, 0)
    same = valid & (document == shown)
    old = same & (p // segment == last // segment)
    later = same & ~old
    newest = document == document.max(-1, keepdims=True)
    fresh = valid & ~same
    any_fresh, any_later = fresh.any(-1), later.any(-1)
    kind = jnp.where(any_fresh, FRESH, jnp.where(any_later, NEXT, 0))
    keeps = jnp.where(any_fresh[..., None], fresh & newest, later)
    return Block(old, old & (p >= segment), later, keeps, kind)


def _read(
    x: Float[Array, "B L K G H"], pair: Pair, live: Bool[Array, "B L"]
) -> Float[Array, "B L K G E"]:
    """x M / (x z), 0 for tokens without a memory (equation 3)."""
    live = live[:, :, None, None]
    total = jnp.einsum("blkgh,bkh->blkg", x, pair.z)
    total = jnp.where(live, jnp.maximum(total, EPS), 1)[..., None]
    return jnp.where(live[..., None], jnp.einsum("blkgh,bkhe->blkge", x, pair.m), 0) / (
        total
    )


def _written(
    sk: Float[Array, "B L K H"], v: Float[Array, "B L K E"], keeps: Bool[Array, "B L"]
) -> Pair:
    """The sums over some tokens of key (x) value, and of keys (equation 4)."""
    sk = jnp.where(keeps[:, :, None, None], sk, 0)
    return Pair(jnp.einsum("blkh,blke->bkhe", sk, v), sk.sum(1))


def _advance(carry: tuple[Pair, Pair], mine: Pair, kept: Pair, kind: Array):
    """The memory and the open segment behind a block, and the memory of `next`."""
    memory, opened = carry
    total = opened.add(mine)
    full = memory.add(total)

    def pick(old: Array, later: Array, fresh: Array | float) -> Array:
        k = kind.reshape(-1, *[1] * (old.ndim - 1))
        return jnp.where(k == FRESH, fresh, jnp.where(k == NEXT, later, old))

    new = Pair(*(pick(x, y, 0.0) for x, y in zip(memory, full, strict=True)))
    rest = Pair(*(pick(x, y, y) for x, y in zip(total, kept, strict=True)))
    return (new, rest), full


def _answer(sq: Array, memory: Pair, full: Pair, block: Block) -> Array:
    """What queries read."""
    early = _read(sq, memory, block.lives)
    late = _read(sq, full, block.next)
    return jnp.where(block.old[:, :, None, None, None], early, late)


def _step(carry: tuple[Pair, Pair], xs: tuple, rule: str):
    """One block: read, then write (the delta rule writes what memory lacks, eq. 5)."""
    sq, sk, v, block = xs
    memory, _ = carry

    def lacks(pair: Pair, live: Array) -> Array:
        if rule == "linear":
            return v
        return v - _read(sk[:, :, :, None], pair, live)[:, :, :, 0]

    mine = _written(sk, lacks(memory, block.lives), block.old)
    full = memory.add(carry[1]).add(mine)
    kept = _written(sk, lacks(full, block.next), block.keeps)
    carry, _ = _advance(carry, mine, kept, block.kind)
    return carry, _answer(sq, memory, full, block)


def _one(carry, sq, sk, v, block, rule):
    """A single block."""
    first = jax.tree.map(lambda x: x[0], (sq, sk, v, block))
    carry, out = _step(carry, first, rule)
    return out[None], carry


def _delta(carry, sq, sk, v, block, rule):
    """Block after block: each needs the memory that the one before it left."""
    step = jax.checkpoint(functools.partial(_step, rule=rule), prevent_cse=False)
    carry, out = lax.scan(step, carry, (sq, sk, v, block))
    return out, carry


def _linear(carry, sq, sk, v, block, rule):
    """All blocks at once around an exclusive prefix sum of what they write."""
    mine = jax.vmap(_written)(sk, v, block.old)
    kept = jax.vmap(_written)(sk, v, block.keeps)

    def add(carry, xs):
        after, full = _advance(carry, *xs)
        return after, (carry[0], full)

    carry, (memory, full) = lax.scan(add, carry, (mine, kept, block.kind))
    return jax.vmap(_answer)(sq, memory, full, block), carry


# The local part


def _dense_local(q, k, v, positions, spec: InfiniSpec, packed: bool) -> Array:
    """Causal attention inside segments, without a state."""
    segment, T = spec.segment, q.shape[1]
    ids = _runs(positions, segment)
    narrow = masks.causal() & masks.window(min(segment, T))

    def anywhere() -> Array:
        return _attend(q, k, v, spec, narrow, ids=(ids[0], ids[1]))

    if packed:
        return anywhere()
    grid = masks.causal() if T <= segment else masks.causal() & masks.chunk(segment)
    plain = (positions < 0) | (positions == jnp.arange(T)[None])
    return lax.cond(jnp.all(plain), lambda: _attend(q, k, v, spec, grid), anywhere)


def _cached_local(q, k, v, positions, spec: InfiniSpec, state: InfiniState):
    """Causal attention inside segments with the open one's buffer, and the new one."""
    if q.shape[1] == 1:
        return _single_local(q, k, v, positions, spec, state)
    segment = spec.segment
    filled = jnp.maximum(positions[:, :1], 0) % segment
    slot = jnp.arange(segment)[None] - segment + filled
    index = jnp.maximum(slot, 0)[:, None, :, None]

    def behind(old: Array, new: Array) -> Array:
        early = jnp.take_along_axis(old, index, 2).astype(new.dtype)
        return jnp.concatenate([jnp.swapaxes(early, 1, 2), new], 1)

    rows, columns = _runs(positions, segment)
    columns = jnp.concatenate([jnp.where(slot >= 0, 0, -3), columns], 1)
    keys, values = behind(state.k, k), behind(state.v, v)
    out = _attend(
        q, keys, values, spec, masks.causal() & masks.window(segment),
        offset=segment, ids=(rows, columns),
    )  # fmt: skip
    return out, _refill(state, k, v, positions, segment)


def _refill(state: InfiniState, k, v, positions, segment: int) -> tuple[Array, Array]:
    """Each slot takes the last token of the call that belongs there, if any."""
    B, T = positions.shape
    slot = jnp.where(positions >= 0, positions % segment, segment)
    latest = jnp.full((B, segment), -1, jnp.int32)
    tokens = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    latest = latest.at[jnp.arange(B)[:, None], slot].max(tokens, mode="drop")
    latest = latest[:, None, :, None]

    def pick(old: Array, new: Array) -> Array:
        new = jnp.take_along_axis(jnp.swapaxes(new, 1, 2), jnp.maximum(latest, 0), 2)
        return jnp.where(latest >= 0, new.astype(old.dtype), old)

    return pick(state.k, k), pick(state.v, v)


def _single_local(q, k, v, positions, spec: InfiniSpec, state: InfiniState):
    """One token a row: written to its slot first, then read with the others."""
    at = jnp.where(positions >= 0, positions % spec.segment, -1)[:, 0]
    slot, own = jnp.maximum(at, 0), at >= 0
    buffers = tuple(
        replace(old, new.swapaxes(1, 2), slot, own)
        for old, new in ((state.k, k), (state.v, v))
    )
    slots = jnp.arange(spec.segment, dtype=jnp.int32)[None]
    out, _ = cached_attention(
        q,
        *buffers,
        at[:, None],
        jnp.where(slots <= at[:, None], slots, -1)[:, None],
        scale=spec.attention.scale,
        softcap=spec.attention.softcap,
    )
    return out, buffers


def _runs(positions: Int[Array, "B T"], segment: int) -> tuple[Array, Array]:
    """Ids of queries and keys that agree inside a segment; 0 continues an open one."""
    valid = positions >= 0
    run = jnp.cumsum(valid & (positions % segment == 0), 1, dtype=jnp.int32)
    return jnp.where(valid, run, -1), jnp.where(valid, run, -2)


def _attend(q, k, v, spec: InfiniSpec, mask: Mask, *, offset: int = 0, ids=None):
    """Softmax attention with the options of the layer."""
    rows, columns = ids or (None, None)
    out, _ = attention(
        q,
        k,
        v,
        mask=mask,
        scale=spec.attention.scale,
        softcap=spec.attention.softcap,
        q_segment_ids=rows,
        kv_segment_ids=columns,
        offset=offset,
    )
    return out
