"""One attention operation for every mask."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.attention.spec import Spec, wide
from pallas_kernels.mask import Mask

__all__ = ["attention", "gradients", "merge"]


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: Mask,
    scale: float | None = None,
    softcap: float | None = None,
    sink: jax.Array | None = None,
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    offset: int = 0,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention of `q` [B, T, N, H] over `k` [B, S, K, H], `v` [B, S, K, E].

    Query head i reads kv head i // (N / K). Query t sits at key position
    `offset + t`. `scale` defaults to H ** -0.5; `softcap` bounds scores by a tanh;
    `sink` [N] is a learned logit that adds exp(sink) to the denominator. Segment ids
    [B, T] and [B, S] hide keys of other segments. Returns the output [B, T, N, E]
    in the type of `v` and the float32 log of the denominator [B, N, T]; a row that
    sees nothing gives 0 and -inf. Differentiable in q, k, v and sink, through both
    results. Raises ValueError on shapes that do not fit together.
    """
    _check(q, k, v, mask, sink, (q_segment_ids, kv_segment_ids))
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    for name, value in (("scale", scale), ("softcap", softcap)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value}: must be positive and finite, or None")
    spec = Spec(mask, scale, softcap, int(offset))
    call = _call(spec, q, k, v, sink is not None, q_segment_ids is not None)
    run = dispatch.select(call, implementation).load()
    return run(spec, q, k, v, sink, q_segment_ids, kv_segment_ids)


def _call(spec: Spec, q, k, v, sink: bool, segments: bool) -> "dispatch.Call":
    kinds = q.dtype, jnp.result_type(k, v)
    facts = *kinds, dispatch.platform(), sink, segments
    return dispatch.Call(spec, q.shape, k.shape, v.shape, *facts)


def gradients(
    saved: Sequence[jax.Array | None],
    cotangents: tuple[jax.Array, jax.Array],
    *,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What some keys add to the gradients of q, k and v of an attention over more.

    `saved` are q, the keys and values in question, segment ids of queries and of those
    keys (or None), and the out and lse that `merge` gave for all keys together;
    `cotangents` are those of that out and lse.
    """
    q, k, v, q_segment_ids, kv_segment_ids, out, lse = saved
    _check(q, k, v, mask, None, (q_segment_ids, kv_segment_ids))
    spec = Spec(mask, float(scale), softcap)
    saved = (q, k, v, None, q_segment_ids, kv_segment_ids, out, lse)
    call = _call(spec, q, k, v, False, q_segment_ids is not None)
    backward = dispatch.select(call, None).load_backward()
    return backward(spec, saved, cotangents)[:3]


_NOTHING = -1e30  # stands for a log-sum-exp of -inf where gradients must stay finite


def merge(
    outs: Sequence[jax.Array], lses: Sequence[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Join attentions of the same queries over disjoint keys.

    `outs` are [B, T, N, H], `lses` [B, N, T]. A part with lse -inf has no weight; a
    row empty in all parts stays 0 and -inf. A learned sink belongs in one part only.
    """
    if not outs or len(outs) != len(lses):
        raise ValueError(
            f"{len(outs)} outs and {len(lses)} lses: needs one lse for each of at "
            "least one out; pass the pairs that attention returned"
        )
    stats = [jnp.maximum(wide(x), _NOTHING) for x in lses]
    out, lse = wide(outs[0]), stats[0]
    for more, other in zip(outs[1:], stats[1:], strict=True):
        total = jnp.logaddexp(lse, other)
        mine, theirs = _rows(jnp.exp(lse - total)), _rows(jnp.exp(other - total))
        out, lse = mine * out + theirs * wide(more), total
    return out.astype(outs[0].dtype), jnp.where(lse > _NOTHING / 2, lse, -jnp.inf)


def _rows(weight: jax.Array) -> jax.Array:
    """[B, N, T] -> [B, T, N, 1]."""
    return jnp.swapaxes(weight, -1, -2)[..., None]


def _check(q, k, v, mask, sink, segment_ids) -> None:
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if not isinstance(mask, Mask):
        raise ValueError(f"mask={mask!r}: must be a Mask; use pallas_kernels.mask")
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(f"{shapes}: all must be [batch, length, heads, width]")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0]:
        raise ValueError(f"{shapes}: batch, keys and kv heads must agree; align them")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"{shapes}: q and k must have one head width; project to it")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"{shapes}: {k.shape[2]} kv heads must divide {q.shape[2]} query heads"
        )
    if sink is not None and sink.shape != (q.shape[2],):
        raise ValueError(
            f"sink {sink.shape}: must be one logit per query head ({q.shape[2]},)"
        )
    if (segment_ids[0] is None) != (segment_ids[1] is None):
        raise ValueError(
            "q_segment_ids and kv_segment_ids: only one was given; pass both or none"
        )
    for name, ids, x in zip(("q", "kv"), segment_ids, (q, k), strict=True):
        if ids is not None and ids.shape != x.shape[:2]:
            raise ValueError(
                f"{name}_segment_ids {ids.shape}: must be {x.shape[:2]}, one id a token"
            )
