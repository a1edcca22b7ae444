"""Ring attention over the mesh axis `context_ring` (arXiv 2310.01889).

Keys, values and document ids go round; each hop's output is merged in float32 by its
log-sum-exp. The gradient is its own ring: from the merged output and log-sum-exp each
hop's part is exact, so nothing of a hop is kept. The pieces a hop compares are known
when it is traced, per device: devices choose among the few unlike cases of a hop, and
all make the same exchanges.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lclm.ops.precision import wide
from lclm.sharding import SEQUENCE
from lclm.typing import Array
from pallas_kernels import mask as masks
from pallas_kernels.attention import attention, gradients, merge
from pallas_kernels.mask import Mask

AXIS = SEQUENCE[0]


@dataclass(frozen=True)
class Ring:
    """What is fixed when a ring is traced.

    masks: of each run of `heads` heads, on places in the row; size: tokens of a piece;
    starts: the pieces of each ring part, in pieces.
    """

    masks: tuple[Mask, ...]
    heads: int
    scale: float
    softcap: float | None
    size: int
    starts: tuple[tuple[int, ...], ...]

    def cases(self, hop: int) -> tuple[list[Mask | None], list[int]]:
        """The unlike masks of a hop, and which each (part, run of heads) takes."""
        found, table = [], []
        for rank, rows in enumerate(self.starts):
            columns = self.starts[(rank - hop) % len(self.starts)]
            for mask in self.masks:
                one = relation(mask, self.heads, self.size, rows, columns)
                if one not in found:
                    found.append(one)
                table.append(found.index(one))
        return found, table


@functools.lru_cache(maxsize=1024)
def relation(
    mask: Mask, heads: int, size: int, rows: tuple[int, ...], columns: tuple[int, ...]
) -> Mask | None:
    """What some pieces see of others, None for nothing, alike where the pairs are."""
    if mask == masks.causal():  # only the order of the pieces matters
        order = sorted({*rows, *columns})
        rows = tuple(order.index(r) for r in rows)
        columns = tuple(order.index(c) for c in columns)
    if rows == columns == tuple(range(len(rows))):
        return mask
    place = [[piece * size for piece in pieces] for pieces in (rows, columns)]
    made = masks.laid(mask, size, *place)
    T, S = len(rows) * size, len(columns) * size
    kinds = made.summary(T, S, size, size, heads=heads)
    if not kinds.any():
        return None
    if len(kinds) == 1 and not (kinds == masks.PARTIAL).any():
        return masks.blocks(size, [(int(i), int(j)) for i, j in np.argwhere(kinds[0])])
    return made


def ring_attention(
    spec: Ring, q: Array, k: Array, v: Array, ids: Array | None, case: Array
) -> tuple[Array, Array]:
    """(out, lse) of this device's queries over all keys; `case` is its (part, run)."""
    return _ring(spec, q, k, v, ids, case)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(spec: Ring, q, k, v, ids, case):
    return _forward(spec, q, k, v, ids, case)


def _pass_on(spec: Ring, tree: Any) -> Any:
    """To the next ring part, from the one before."""
    count = len(spec.starts)
    return lax.ppermute(tree, AXIS, [(r, (r + 1) % count) for r in range(count)])


def _choose(spec: Ring, hop: int, case: Array, run: Callable, nothing: Callable) -> Any:
    """`run(mask)` with this device's mask of the hop, or `nothing()`."""
    found, table = spec.cases(hop)
    forms = [nothing if m is None else functools.partial(run, m) for m in found]
    if len(forms) == 1:
        return forms[0]()
    return lax.switch(jnp.asarray(table, jnp.int32)[case], forms)


def _forward(spec: Ring, q, k, v, ids, case):
    count, total = len(spec.starts), None
    held = (jnp.concatenate([k, v], -1), ids)
    for hop in range(count):
        coming = _pass_on(spec, held) if hop < count - 1 else None
        keys, values = jnp.split(held[0], [k.shape[-1]], -1)

        def run(mask, keys=keys, values=values, own=held[1]):
            return attention(
                q,
                keys,
                wide(values),
                mask=mask,
                scale=spec.scale,
                softcap=spec.softcap,
                q_segment_ids=ids,
                kv_segment_ids=own,
            )

        part = _choose(spec, hop, case, run, lambda: _nothing(q, v))
        total = part if total is None else merge(*zip(total, part, strict=True))
        held = coming
    return total[0].astype(v.dtype), total[1]


def _nothing(q: Array, v: Array) -> tuple[Array, Array]:
    B, T, N, _ = q.shape
    dtype = wide(v[:0]).dtype
    return jnp.zeros((B, T, N, v.shape[-1]), dtype), jnp.full(
        (B, N, T), -jnp.inf, dtype
    )


def _save(spec: Ring, q, k, v, ids, case):
    out, lse = _forward(spec, q, k, v, ids, case)
    out = checkpoint_name(out, "attention_out")
    lse = checkpoint_name(lse, "attention_lse")
    return (out, lse), (q, k, v, ids, case, out, lse)


def _backward(spec: Ring, saved, cotangents):
    q, k, v, ids, case, out, lse = saved
    count = len(spec.starts)
    held = (jnp.concatenate([k, v], -1), ids)
    d_q = jnp.zeros(q.shape, wide(q[:0]).dtype)
    d_k, d_v = jnp.zeros(k.shape, d_q.dtype), jnp.zeros(v.shape, d_q.dtype)
    for hop in range(count):
        coming = _pass_on(spec, held) if hop < count - 1 else None
        keys, values = jnp.split(held[0], [k.shape[-1]], -1)

        def run(mask, keys=keys, values=values, own=held[1]):
            return gradients(
                (q, keys, values, ids, own, out, lse),
                cotangents,
                mask=mask,
                scale=spec.scale,
                softcap=spec.softcap,
            )

        def nothing(keys=keys, values=values):
            return jnp.zeros_like(q), jnp.zeros_like(keys), jnp.zeros_like(values)

        parts = _choose(spec, hop, case, run, nothing)
        d_q, d_k, d_v = (
            a + wide(b) for a, b in zip((d_q, d_k, d_v), parts, strict=True)
        )
        d_k, d_v = _pass_on(spec, (d_k, d_v))
        held = coming
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None, None


_ring.defvjp(_save, _backward)
