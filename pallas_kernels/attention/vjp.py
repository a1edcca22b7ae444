"""Block-wise attention with a gradient of its own.

The backward pass recomputes weights tile by tile from the saved log-sum-exp
(FlashAttention-2, arXiv 2307.08691, algorithm 2). The log-sum-exp is an output with a
cotangent, so partial attentions may be merged and differentiated.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.attention import xla
from pallas_kernels.attention.plan import SMALL_TILE
from pallas_kernels.attention.spec import Spec, corner, wide, wide_dtype


def operation(forward: Callable, backward: Callable) -> Callable:
    """A differentiable `attend(spec, q, k, v, sink, q_segment_ids, kv_segment_ids)`.

    `forward` has its arguments and results; `backward(spec, saved, cotangents)` gives
    the gradients of q, k, v and sink from what was kept.
    """
    run = jax.jit(forward, static_argnums=0)

    def attend(spec: Spec, q, k, v, sink, q_segment_ids, kv_segment_ids):
        """Attention output [B, T, N, H] and float32 log-sum-exp [B, N, T]."""
        return run(spec, q, k, v, sink, q_segment_ids, kv_segment_ids)

    def save(spec: Spec, q, k, v, sink, q_segment_ids, kv_segment_ids):
        out, lse = run(spec, q, k, v, sink, q_segment_ids, kv_segment_ids)
        out = checkpoint_name(out, "attention_out")
        lse = checkpoint_name(lse, "attention_lse")
        return (out, lse), (q, k, v, sink, q_segment_ids, kv_segment_ids, out, lse)

    def apply(spec: Spec, saved, cotangents):
        return *backward(spec, saved, cotangents), None, None

    attend = jax.custom_vjp(attend, nondiff_argnums=(0,))
    attend.defvjp(save, apply)
    return attend


def outputs(tiles: Callable, spec: Spec, q, k, v, sink, q_segment_ids, kv_segment_ids):
    """Attention output and float32 log-sum-exp of heads under any masks.

    `tiles(spec, q, k, v, sink, segments)` gives both for heads that share a mask.
    """
    classes = xla.head_classes(spec, q.shape[2], k.shape[2])
    pairs = [
        tiles(
            c.spec, xla.take(q, c.query), xla.take(k, c.kv), xla.take(v, c.kv),
            xla.take(sink, c.query, 0), (q_segment_ids, kv_segment_ids),
        )
        for c in classes
    ]  # fmt: skip
    outs, lses = zip(*pairs, strict=True)
    return xla.join(list(outs), classes, 2), xla.join(list(lses), classes, 1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def gradients(tiles: Callable, spec: Spec, saved, cotangents):
    """Gradients of q, k, v and sink from what an operation keeps.

    `tiles(spec, q, k, v, segments, d_out, lse, delta)` gives those of q, k and v for
    heads that share a mask; `delta` [B, N, T] is what is taken from every gradient of a
    weight.
    """
    q, k, v, sink, q_segment_ids, kv_segment_ids, out, lse = saved
    d_out, d_lse = cotangents
    delta = jnp.einsum("btnh,btnh->bnt", wide(d_out), wide(out))
    delta = delta - wide(d_lse)
    d_sink = None
    if sink is not None:
        share = jnp.exp(wide(sink)[None, :, None] - lse)
        d_sink = -(share * delta).sum((0, 2)).astype(sink.dtype)
    classes = xla.head_classes(spec, q.shape[2], k.shape[2])
    d_q, d_k, d_v = [], None, None
    for c in classes:
        parts = tiles(
            c.spec, xla.take(q, c.query), xla.take(k, c.kv), xla.take(v, c.kv),
            (q_segment_ids, kv_segment_ids), xla.take(d_out, c.query),
            xla.take(lse, c.query, 1), xla.take(delta, c.query, 1),
        )  # fmt: skip
        d_q.append(parts[0])
        if len(classes) == 1:
            d_k, d_v = parts[1], parts[2]
            continue
        heads = np.array(c.kv)
        d_k = jnp.zeros(k.shape, wide_dtype(k)) if d_k is None else d_k
        d_v = jnp.zeros(v.shape, wide_dtype(v)) if d_v is None else d_v
        d_k = d_k.at[:, :, heads].add(parts[1])
        d_v = d_v.at[:, :, heads].add(parts[2])
    d_q = xla.join(d_q, classes, 2)
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype), d_sink


def _backward_class(spec, q, k, v, segments, d_out, lse, delta):
    tiling = xla.Tiling.of(spec, q, k, segments[0] is not None, SMALL_TILE)
    p, T, K = tiling.plan, q.shape[1], k.shape[2]
    compute = xla.compute_dtype(q.dtype)
    product = functools.partial(jnp.einsum, preferred_element_type=wide_dtype(q))
    segments = xla.pad_segments(tiling, *segments)
    q, d_out = tiling.pad_rows(q), tiling.pad_rows(d_out)
    # Rows that saw nothing, and rows of padding, get weight exp(-inf) = 0.
    lse = jnp.where(jnp.isfinite(lse), lse, -xla.HIDDEN)
    lse = tiling.pad_rows(lse, 2, -xla.HIDDEN)
    delta = tiling.pad_rows(delta, 2)

    def block(r, carry, b, g, k_heads, v_heads):
        d_q, d_k, d_v = carry
        rows = wide(tiling.rows(q, b, g, r)) * spec.scale
        rows, d_rows = rows.astype(compute), tiling.rows(d_out, b, g, r)
        d_rows = d_rows.astype(compute)
        # A product that sums over rows is fast with the small operand transposed.
        rows_t, d_rows_t = rows.swapaxes(1, 2), d_rows.swapaxes(1, 2)
        own_lse = tiling.vector(lse, b, g, r)[..., None]
        own_delta = tiling.vector(delta, b, g, r)[..., None]

        def step(state, view, start, size, seen):
            acc, d_k, d_v = state
            q_tile, d_tile = view.take(rows), view.take(d_rows)
            k_tile = xla.slice_keys(k_heads, start, size)
            v_tile = xla.slice_keys(v_heads, start, size)
            raw, scores = tiling.scores(q_tile, k_tile, seen)
            weights = jnp.exp(scores - view.take(own_lse))
            d_scores = product("nqh,nkh->nqk", d_tile, v_tile) - view.take(own_delta)
            d_scores = weights * d_scores
            if spec.softcap is not None:
                d_scores *= 1.0 - jnp.square(jnp.tanh(raw / spec.softcap))
            d_scores = d_scores.astype(compute)
            part = product("nqk,nkh->nqh", d_scores, k_tile)
            acc = view.put(acc, view.take(acc) + part)
            d_k = _add(
                d_k, product("nhq,nqk->nhk", view.take_t(rows_t), d_scores), start
            )
            weights = weights.astype(compute)
            d_v = _add(
                d_v, product("nhq,nqk->nhk", view.take_t(d_rows_t), weights), start
            )
            return acc, d_k, d_v

        acc = jnp.zeros((*rows.shape[:2], k.shape[3]), wide_dtype(q))
        ids = None if segments is None else segments.of(b)
        acc, d_k, d_v = tiling.loop(r, ids, step, (acc, d_k, d_v))
        return tiling.put_rows(d_q, acc * spec.scale, b, g, r), d_k, d_v

    def heads(n, carry):
        d_q, d_k, d_v = carry
        b, g = n // (K // p.batch), n % (K // p.batch)
        k_heads, v_heads = tiling.heads(k, b, g), tiling.heads(v, b, g)
        body = functools.partial(block, b=b, g=g, k_heads=k_heads, v_heads=v_heads)
        shapes = [x.swapaxes(1, 2).shape for x in (k_heads, v_heads)]
        zeros = [jnp.zeros(shape, wide_dtype(k)) for shape in shapes]
        d_q, *own = lax.fori_loop(0, p.rows, body, (d_q, *zeros))
        return d_q, _put_heads(d_k, own[0], b, g), _put_heads(d_v, own[1], b, g)

    zeros = (jnp.zeros(q.shape, q.dtype), jnp.zeros_like(k), jnp.zeros_like(v))
    count = k.shape[0] * (K // p.batch)
    d_q, d_k, d_v = lax.fori_loop(0, count, heads, zeros)
    return d_q[:, :T], d_k, d_v


def _add(total, part, start):
    old = lax.dynamic_slice(total, corner(0, 0, start), part.shape)
    return lax.dynamic_update_slice(total, old + part, corner(0, 0, start))


def _put_heads(total, part, b, g):
    part = part[:, :, : total.shape[1]].transpose(2, 0, 1)[None].astype(total.dtype)
    return lax.dynamic_update_slice(total, part, corner(b, 0, g * part.shape[2], 0))


backward = functools.partial(gradients, _backward_class)
attend = operation(xla.forward, backward)
