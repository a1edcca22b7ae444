"""The dense float32 oracle: one masked softmax over all keys."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention.spec import Spec, wide


def attend(spec: Spec, q, k, v, sink, q_segment_ids, kv_segment_ids):
    """Same arguments and results as `vjp.attend`; memory grows with T * S."""
    B, T, N, _ = q.shape
    S, K = k.shape[1], k.shape[2]
    q, k32, v32 = (wide(x) for x in (q, k, v))
    q = q.reshape(B, T, K, N // K, -1)
    high = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k32, precision=high) * spec.scale
    scores = spec.cap(scores).reshape(B, N, T, S)
    seen = jnp.asarray(np.asarray(spec.mask.array(T, S, N, spec.offset)))[None]
    if q_segment_ids is not None:
        same = q_segment_ids[:, :, None] == kv_segment_ids[:, None, :]
        seen = seen & same[:, None]
    scores = jnp.where(seen, scores, -jnp.inf)
    top = scores.max(-1)
    if sink is not None:
        sink = wide(sink)[None, :, None]
        top = jnp.maximum(top, sink)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
    weights = jnp.where(seen, jnp.exp(scores - top[..., None]), 0.0)
    total = weights.sum(-1)
    if sink is not None:
        total = total + jnp.exp(sink - top)
    some = total > 0
    safe = jnp.where(some, total, 1.0)
    weights = (weights / safe[..., None]).reshape(B, K, N // K, T, S)
    out = jnp.einsum("bkgts,bskh->btkgh", weights, v32, precision=high)
    lse = jnp.where(some, top + jnp.log(safe), -jnp.inf)
    return out.reshape(B, T, N, -1).astype(v.dtype), lse
