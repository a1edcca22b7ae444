"""Attention under a mask that is evaluated on positions, pair by pair.

For what block plans cannot do: a static pattern over documents or cache slots that do
not start where the key axis does. Work is that of all pairs, memory is bounded; a
decoding step (`step_attention`) works on what it sees.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lclm.ops.precision import wide_dtype
from lclm.typing import Array, Float, Int
from pallas_kernels.decode import cached_attention
from pallas_kernels.mask import Mask

PAIRS = 1 << 24  # scores held at once
BLOCK = 64  # slots a decoding step reads together where the mask has no grid


def masked_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S E"],
    q_pos: Int[Array, "B T"],
    k_pos: Int[Array, "B #K S"] | Int[Array, "B S"],
    *,
    mask: Mask,
    scale: float | None = None,
    softcap: float | None = None,
    segments: Any = None,
) -> tuple[Float[Array, "B T N E"], Float[Array, "B N T"]]:
    """(out, log of the denominator); rows that see nothing give 0 and -inf.

    Query at p sees key at j where 0 <= j <= p, `mask` shows it and, with `segments`
    (ids [B, T] of both, or a pair of those of queries and of keys), both are of one
    document. Slots of a kv head may have positions of their own.
    """
    segments, k_segments = (
        segments if isinstance(segments, tuple) else (segments, segments)
    )
    (B, T, N, H), S = q.shape, k.shape[2]
    k_pos = k_pos if k_pos.ndim == 3 else k_pos[:, None]
    rows = max(1, min(T, PAIRS // (B * N * S)))
    count = -(-T // rows)
    ids = jnp.zeros_like(q_pos) if segments is None else segments
    pad = [(0, 0), (0, count * rows - T)]

    def cut(x: Array, value: int) -> Array:
        x = jnp.pad(x, pad + [(0, 0)] * (x.ndim - 2), constant_values=value)
        return jnp.moveaxis(x.reshape(B, count, rows, *x.shape[2:]), 1, 0)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one(xs: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        part, at, own = xs
        seen = _seen(mask, at[:, :, None], k_pos, N)
        if segments is not None:
            seen = seen & (own[:, :, None] == k_segments[:, None])[:, None]
        return _attend(part, k, v, seen, H**-0.5 if scale is None else scale, softcap)

    xs = (cut(q, 0), cut(q_pos, -1), cut(ids, 0))
    if count == 1:
        return one(jax.tree.map(lambda x: x[0], xs))
    out, lse = lax.map(one, xs)
    out = jnp.moveaxis(out, 0, 1).reshape(B, count * rows, N, -1)[:, :T]
    return out, jnp.moveaxis(lse, 0, 2).reshape(B, N, count * rows)[:, :, :T]


def _seen(mask: Mask, i: Array, k_pos: Array, heads: int) -> Array:
    """Bool [B, 1 or N, T, S] for queries at `i` [B, T, 1], keys at [B, 1 or K, S]."""
    shown, kv_heads = mask.layout(heads), k_pos.shape[1]
    several = heads if len(shown) * kv_heads > 1 else 1
    rows = []
    for head in range(several):
        j = k_pos[:, head * kv_heads // several, None]
        row = shown[head % len(shown)].visible(i, j)
        rows.append(row & (j >= 0) & (j <= i))
    return jnp.stack(rows, 1)


def step_attention(
    q: Float[Array, "B 1 N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S E"],
    q_pos: Int[Array, "B 1"],
    k_pos: Int[Array, "B #K S"],
    *,
    mask: Mask,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Float[Array, "B 1 N E"], Float[Array, "B N 1"]]:
    """`masked_attention` of one query a row that reads the blocks of keys it sees.

    So it does where those keys lie in the slots of their positions, as they do in a
    cache that keeps everything. Else it looks at all slots.
    """
    (B, _, N, _), (K, S) = q.shape, k.shape[1:3]
    options = {"scale": scale, "softcap": softcap}
    slots = _seen_slots(mask, q_pos, N, K, S)
    if slots is None:
        return masked_attention(q, k, v, q_pos, k_pos, mask=mask, **options)
    index = jnp.maximum(slots, 0)

    def take(x: Array, at: Array) -> Array:
        return jnp.take_along_axis(x, at, 2, mode="promise_in_bounds")

    held = take(jnp.broadcast_to(k_pos, (B, K, S)), index)
    held = jnp.where(slots >= 0, held, -1)
    moved = (held != slots) & ((held >= 0) | (slots < q_pos[:, None]))

    def some(k: Array, v: Array) -> tuple[Array, Array]:
        values = (take(x, index[..., None]) for x in (k, v))
        out, lse = cached_attention(q, *values, q_pos, held, **options)
        return out, lse.astype(wide_dtype(q))

    def every(k: Array, v: Array) -> tuple[Array, Array]:
        return masked_attention(q, k, v, q_pos, k_pos, mask=mask, **options)

    return lax.cond(jnp.any(moved), every, some, k, v)


def _seen_slots(
    mask: Mask, q_pos: Array, heads: int, kv_heads: int, S: int
) -> Array | None:
    """Slots [B, K, M] = positions below S that one query a row sees; -1 is none.

    None where the query heads of a kv head differ, or M would not be less than S.
    """
    shown = [mask.at_head(h, heads) for h in range(heads)]
    each = heads // kv_heads
    groups = [set(shown[h : h + each]) for h in range(0, heads, each)]
    if any(len(group) > 1 for group in groups):
        return None
    shown = [group.pop() for group in groups]
    block = math.gcd(*(m.grain for m in shown)) or BLOCK
    seen = [m.seen_blocks(q_pos[:, 0], block, S) for m in shown]
    if any(x is None for x in seen):
        return None
    most = max(x.shape[1] for x in seen)
    if most * block >= S:
        return None
    found = []
    for m, blocks in zip(shown, seen, strict=True):
        pad = [(0, 0), (0, most - blocks.shape[1])]
        blocks = jnp.pad(blocks, pad, constant_values=-1)[..., None]
        at = (blocks * block + jnp.arange(block)).reshape(len(q_pos), -1)
        here = (at >= 0) & (at < S) & m.visible(q_pos, at)
        found.append(jnp.where(here, at, -1))
    return jnp.stack(found, 1)


def _attend(q, k, v, seen, scale, softcap) -> tuple[Array, Array]:
    """Softmax over the pairs of `seen` [B, 1 or N, T, S]."""
    (B, T, N, H), K = q.shape, k.shape[1]
    dtype = wide_dtype(q)
    scores = jnp.einsum(
        "btkgh,bksh->bkgts",
        q.reshape(B, T, K, N // K, H),
        k.astype(q.dtype),
        preferred_element_type=dtype,
    )
    scores = scores.reshape(B, N, T, -1) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(seen, scores, -jnp.inf)
    top = lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0))
    total = weights.sum(-1)
    some = total > 0
    safe = jnp.where(some, total, 1)
    weights = (weights / safe[..., None]).reshape(B, K, N // K, T, -1)
    out = jnp.einsum("bkgts,bkse->btkge", weights, v.astype(dtype))
    lse = jnp.where(some, jnp.where(some, top[..., 0], 0) + jnp.log(safe), -jnp.inf)
    return out.reshape(B, T, N, -1).astype(v.dtype), lse


def with_sink(
    out: Float[Array, "B T N E"],
    lse: Float[Array, "B N T"],
    sink: Float[Array, " N"] | None,
) -> Float[Array, "B T N E"]:
    """`out` where a learned logit per head takes its share of the denominator."""
    if sink is None:
        return out
    share = jax.nn.sigmoid(lse - sink.astype(lse.dtype)[None, :, None])
    return (out * jnp.swapaxes(share, 1, 2)[..., None]).astype(out.dtype)
