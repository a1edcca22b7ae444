"""Attention under a mask that is evaluated on positions, pair by pair.

For what block plans cannot do: a static pattern over documents or cache slots that do
not start where the key axis does. Work is that of all pairs; memory is bounded.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lclm.ops.precision import wide_dtype
from lclm.typing import Array, Float, Int
from pallas_kernels.mask import Mask

PAIRS = 1 << 24  # scores held at once


def masked_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S E"],
    q_pos: Int[Array, "B T"],
    k_pos: Int[Array, "B S"],
    *,
    mask: Mask,
    scale: float | None = None,
    softcap: float | None = None,
    segments: Any = None,
) -> tuple[Float[Array, "B T N E"], Float[Array, "B N T"]]:
    """(out, log of the denominator); rows that see nothing give 0 and -inf.

    Query at p sees key at j where 0 <= j <= p, `mask` shows it and, with `segments`
    (ids [B, T] of both, or a pair of those of queries and of keys), both are of one
    document.
    """
    segments, k_segments = (
        segments if isinstance(segments, tuple) else (segments, segments)
    )
    (B, T, N, H), S = q.shape, k.shape[2]
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
        i, j = at[:, :, None], k_pos[:, None]
        seen = jnp.stack([m.visible(i, j) for m in mask.layout(N)], 1)
        seen = seen & ((j >= 0) & (j <= i))[:, None]
        if segments is not None:
            seen = seen & (own[:, :, None] == k_segments[:, None])[:, None]
        return _attend(part, k, v, seen, H**-0.5 if scale is None else scale, softcap)

    xs = (cut(q, 0), cut(q_pos, -1), cut(ids, 0))
    if count == 1:
        return one(jax.tree.map(lambda x: x[0], xs))
    out, lse = lax.map(one, xs)
    out = jnp.moveaxis(out, 0, 1).reshape(B, count * rows, N, -1)[:, :T]
    return out, jnp.moveaxis(lse, 0, 2).reshape(B, N, count * rows)[:, :, :T]


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
