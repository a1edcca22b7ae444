"""Attention over a cache buffer whose slots carry their own positions.

Slots may be in any order. A query at position p sees slot c when
`0 <= k_pos[c] <= p` and, with a window, `p - k_pos[c] < window`.

Keys and values are arrays [B, K, C, H], or what stands for one in a smaller form: it
has `shape`, `ndim` and `dtype` of that array, and `open(start, size, dtype)` gives its
slots [start, start + size). Such a buffer is only ever opened a tile at a time. A
kernel takes one of codes, value = zero + code * scale: `codes` uint8 [B, K, C, H] of
`bits` 8; `scale` and `zero` [B, K, C / t, H / h] for each of its `group` (t, h).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from pallas_kernels import dispatch
from pallas_kernels.attention.spec import wide, wide_dtype
from pallas_kernels.attention.xla import HIDDEN, compute_dtype

_SCORES = 1 << 21  # scores held at once by the block loop
_WHOLE = 2048  # caches up to this size are read whole by one query
_OPENED = 256  # slots of a buffer in a smaller form that are opened at once


@dataclasses.dataclass(frozen=True)
class _Scoring:
    """Scores of queries in the head layout [B, K, G * T, H] against cache slots."""

    q_pos: jax.Array
    window: int | jax.Array | None
    scale: float
    softcap: float | None
    group: int

    def rows(self, q):
        """Queries [B, T, N, H] with the heads of a kv head as rows of one matrix."""
        B, T, _, H = q.shape
        q = (wide(q) * self.scale).reshape(B, T, -1, self.group, H)
        return q.transpose(0, 2, 3, 1, 4).reshape(B, -1, self.group * T, H)

    def seen(self, k_pos):
        """Bool [B, 1 or K, 1, T, c]."""
        own, other = self.q_pos[:, None, :, None], k_pos[:, :, None, :]
        seen = (other >= 0) & (other <= own)
        if self.window is not None:
            seen &= own - other < self.window
        return seen[:, :, None]

    def __call__(self, rows, k, seen):
        """Float32 scores [B, K, rows, c], hidden ones at HIDDEN."""
        B, K = rows.shape[:2]
        scores = jnp.einsum(
            "bkrh,bkch->bkrc", rows, k, preferred_element_type=wide_dtype(rows)
        )
        if self.softcap is not None:
            scores = self.softcap * jnp.tanh(scores / self.softcap)
        shape = (B, K, self.group, -1, scores.shape[-1])
        return jnp.where(seen, scores.reshape(shape), HIDDEN).reshape(scores.shape)


def cached_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_pos: jax.Array,
    k_pos: jax.Array,
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sink: jax.Array | None = None,
    length: jax.Array | int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention of `q` [B, T, N, H] over a cache `k`, `v` [B, K, C, H].

    `q_pos` int32 [B, T] (-1: padding), `k_pos` int32 [B, 1 or K, C] (-1: empty).
    `length`, one or [B], which may be traced, promises that slots from it on are empty,
    so the work follows the fill. `sink` [N] is a learned logit in the denominator.
    Returns the output [B, T, N, H] in the type of `v` and the float32 log of the
    denominator [B, N, T]; rows that see nothing give 0 and -inf. `implementation` is a
    name of `dispatch.DECODE`, None the first that takes the call. Raises ValueError on
    shapes that do not fit together, and if the one that is named refuses.
    """
    _check(q, k, v, q_pos, k_pos)
    _check_options(window, sink, q.shape[2])
    call = dispatch.Decode(q.shape, k, v, dispatch.platform())
    run = dispatch.select(call, implementation).load()
    scoring = _scoring(q, k, q_pos, window, scale, softcap)
    out, lse, _ = run(scoring, q, k, v, k_pos, length=length)
    return (out, lse) if sink is None else with_sink(out, lse, sink)


def in_order(buffers):
    """A tree of arrays, on a TPU laid out in the order of their axes, as kernels read.

    For the buffers that a loop of tokens carries. Left alone, XLA lays a loop's buffers
    token after token, which is shorter to write, and copies each for every kernel.
    """
    if dispatch.platform() != "tpu":
        return buffers
    return jax.tree.map(
        lambda x: with_layout_constraint(x, Layout(tuple(range(x.ndim)))), buffers
    )


def attention_and_sums(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_pos: jax.Array,
    k_pos: jax.Array,
    beside: jax.Array,
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    length: jax.Array | int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`cached_attention`, and the attention probability that each slot gets from `q`.

    `beside` [B, N, T] is the log of what the queries see outside of the cache (their
    own tokens, a sink; -inf: nothing), which stands in the denominators of the sums
    [B, K, C] alone: over the queries and the query heads of a kv head, as those of
    `column_sums` for the merged lse.
    """
    _check(q, k, v, q_pos, k_pos)
    _check_options(window, None, q.shape[2])
    call = dispatch.Decode(q.shape, k, v, dispatch.platform(), sums=True)
    run = dispatch.select(call, implementation).load()
    scoring = _scoring(q, k, q_pos, window, scale, softcap)
    return run(scoring, q, k, v, k_pos, length=length, beside=beside)


def _scoring(q, k, q_pos, window, scale, softcap) -> _Scoring:
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return _Scoring(q_pos, window, scale, softcap, q.shape[2] // k.shape[1])


def with_sink(out, lse, sink):
    """`out` and `lse` with exp(sink) [N] in the denominators."""
    total = jnp.logaddexp(lse, wide(sink)[None, :, None])
    some = jnp.where(jnp.isfinite(total), total, 0.0)
    weight = jnp.exp(lse - some).swapaxes(1, 2)[..., None]
    return (wide(out) * weight).astype(out.dtype), total


def attend(scoring: _Scoring, q, k, v, k_pos, *, length=None, beside=None):
    """Out and lse of `cached_attention`, and column sums if there is a `beside`."""
    if beside is not None and q.shape[1] == 1 and not _closed(k):
        return _with_sums(scoring, q, k, v, k_pos, beside)
    out, lse = _attend(scoring, q, k, v, k_pos, length)
    if beside is None:
        return out, lse, None
    whole = jnp.logaddexp(lse, beside)
    return out, lse, _column_sums(scoring, q, k, whole, k_pos)


def _with_sums(scoring: _Scoring, q, k, v, k_pos, beside):
    """One query's weights serve its output and its column sums."""
    B, _, N, _ = q.shape
    top, total, acc, weights = _weighed(scoring, scoring.rows(q), k, v, k_pos)
    out, lse = _finish((top, total, acc), (B, 1, N), v.dtype)
    whole = jnp.logaddexp(lse, beside).reshape(top.shape)
    share = jnp.where(jnp.isfinite(whole) & (total > 0), jnp.exp(top - whole), 0.0)
    return out, lse, (weights * share[..., None]).sum(2)


def _attend(scoring: _Scoring, q, k, v, k_pos, length):
    B, T, N, _ = q.shape
    C = k.shape[2]
    if length is not None:
        length = jnp.max(jnp.asarray(length))
    rows = scoring.rows(q)
    if T > 1 or _closed(k):
        block = _block(B * N * T, C, closed=_closed(k))
        state = _blocks(scoring, rows, k, v, k_pos, length, block)
    elif length is None or C <= _WHOLE:
        state = _whole(scoring, rows, k, v, k_pos)
    else:
        state = lax.cond(
            jnp.asarray(length) * 2 > C,
            lambda: _whole(scoring, rows, k, v, k_pos),
            lambda: _blocks(scoring, rows, k, v, k_pos, length, _WHOLE // 2),
        )
    return _finish(state, (B, T, N), v.dtype)


def _finish(state, shape: tuple[int, int, int], dtype):
    """Output and log of the denominator from rows (top, total, accumulated values)."""
    B, T, N = shape
    top, total, acc = (x.reshape(B, N, T, *x.shape[3:]) for x in state)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    out = (acc / total[..., None]).transpose(0, 2, 1, 3).astype(dtype)
    return out, jnp.where(some, top + jnp.log(total), -jnp.inf)


def _closed(x) -> bool:
    """Whether a buffer stands for an array in a smaller form."""
    return hasattr(x, "open")


def _tile(x, start, size: int, dtype):
    """Slots [start, start + size) of a buffer."""
    if _closed(x):
        return x.open(start, size, dtype)
    return lax.dynamic_slice_in_dim(x, start, size, axis=2).astype(dtype)


def _block(rows: int, C: int, *, closed: bool = False) -> int:
    block = _OPENED if closed else 1024
    while block > 128 and block * rows > _SCORES:
        block //= 2
    return min(block, C)


def _weigh(scores):
    """Row maximum, a finite shift and weights that are 0 where hidden."""
    top = scores.max(-1)
    shift = jnp.where(top > HIDDEN / 2, top, 0.0)
    return top, jnp.exp(scores - shift[..., None])


def _two_rows(scoring: _Scoring, rows):
    """Add a row of zeros to a single row."""
    if rows.shape[2] > 1:
        return scoring, rows
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, 1), (0, 0)))
    return dataclasses.replace(scoring, group=2), rows


def _whole(scoring: _Scoring, rows, k, v, k_pos):
    """One product over all slots."""
    return _weighed(scoring, rows, k, v, k_pos)[:3]


def _weighed(scoring: _Scoring, rows, k, v, k_pos):
    """The same, and the weights [B, K, R, C] before they are divided by their sum.

    The operands keep the type of the cache: on a CPU a widened copy of a bfloat16
    cache costs more than the product, except that a product of one row would be done
    element by element; a second row of zeros prevents that.
    """
    R = rows.shape[2]
    scoring, rows = _two_rows(scoring, rows.astype(k.dtype))
    scores = scoring(rows, k, scoring.seen(k_pos))
    top, weights = _weigh(scores)
    acc = jnp.einsum(
        "bkrc,bkch->bkrh", weights.astype(v.dtype), v,
        preferred_element_type=wide_dtype(v),
    )  # fmt: skip
    state = top, weights.sum(-1), acc, weights
    return tuple(x[:, :, :R] for x in state)


def _blocks(scoring: _Scoring, rows, k, v, k_pos, length, block: int):
    """Online softmax over blocks of slots, as many as `length` asks for."""
    C = k.shape[2]
    limit = C if length is None else jnp.minimum(jnp.asarray(length, jnp.int32), C)
    # One row keeps the cache's type (see `_whole`), many are worth widening.
    many = rows.shape[2] > 16 or _closed(k)
    compute = compute_dtype(k.dtype) if many else k.dtype
    R = rows.shape[2]
    scoring, rows = _two_rows(scoring, rows.astype(compute))
    dtype = wide_dtype(rows)

    def step(n, state):
        top, total, acc = state
        start = jnp.minimum(n * block, C - block)
        at = start + jnp.arange(block)
        places = lax.dynamic_slice_in_dim(k_pos, start, block, axis=2)
        fresh = (at >= n * block) & (at < limit)
        k_tile, v_tile = (_tile(x, start, block, compute) for x in (k, v))
        scores = scoring(rows, k_tile, scoring.seen(places) & fresh)
        new = jnp.maximum(top, scores.max(-1))
        shift = jnp.where(new > HIDDEN / 2, new, 0.0)
        fade = jnp.exp(top - shift)
        weights = jnp.exp(scores - shift[..., None])
        acc = acc * fade[..., None] + jnp.einsum(
            "bkrc,bkch->bkrh", weights.astype(compute), v_tile,
            preferred_element_type=dtype,
        )  # fmt: skip
        return new, total * fade + weights.sum(-1), acc

    # Tied to the queries: constants of all layers would be written at the start and
    # held until their loops run.
    one = rows[0, 0, 0, 0]
    zero = (one != one).astype(dtype)
    shape = rows.shape[:3]
    state = (
        jnp.full(shape, HIDDEN, dtype) + zero,
        jnp.zeros(shape, dtype) + zero,
        jnp.zeros((*shape, v.shape[3]), dtype) + zero,
    )
    state = lax.fori_loop(0, (limit + block - 1) // block, step, state)
    return tuple(x[:, :, :R] for x in state)


def column_sums(
    q: jax.Array,
    k: jax.Array,
    lse: jax.Array,
    q_pos: jax.Array,
    k_pos: jax.Array,
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Attention probability that each key gets from the queries `q` [B, W, N, H].

    `lse` [B, N, W] is what attention returned for these queries over all their keys,
    so `k` [B, K, C, H] may be any part of them. Sums over the W queries and over the
    query heads of each kv head: float32 [B, K, C] (SnapKV, arXiv 2404.14469; H2O,
    arXiv 2306.14048). Positions and errors as in `cached_attention`.
    """
    _check(q, k, k, q_pos, k_pos)
    _check_options(window, None, q.shape[2])
    scoring = _scoring(q, k, q_pos, window, scale, softcap)
    return _column_sums(scoring, q, k, lse, k_pos)


def _column_sums(scoring: _Scoring, q, k, lse, k_pos):
    B, W, N, _ = q.shape
    K, C = k.shape[1], k.shape[2]
    compute = compute_dtype(k.dtype)
    rows = scoring.rows(q).astype(compute)
    lse = jnp.where(jnp.isfinite(lse), lse, -HIDDEN).reshape(B, K, -1, 1)
    block = _block(B * N * W, C, closed=_closed(k))

    def step(n, sums):
        start = jnp.minimum(n * block, C - block)
        tile = _tile(k, start, block, compute)
        places = lax.dynamic_slice_in_dim(k_pos, start, block, axis=2)
        part = jnp.exp(scoring(rows, tile, scoring.seen(places)) - lse).sum(2)
        return lax.dynamic_update_slice_in_dim(sums, part, start, axis=2)

    return lax.fori_loop(0, -(-C // block), step, jnp.zeros((B, K, C), wide_dtype(q)))


def _check(q, k, v, q_pos, k_pos) -> None:
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(
            f"{shapes}: q must be [B, T, N, H], the cache [B, K, C, H]; add the axes"
        )
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3]:
        raise ValueError(f"{shapes}: batch, kv heads and slots must agree; align them")
    if q.shape[3] != k.shape[3] or q.shape[2] % k.shape[1]:
        raise ValueError(
            f"{shapes}: q and k must have one head width, and kv heads must divide "
            "query heads; q is [B, T, N, H], the cache [B, K, C, H]"
        )
    if q_pos.shape != q.shape[:2]:
        raise ValueError(f"q_pos {q_pos.shape}: must be {q.shape[:2]}, one a query")
    B, K, C = k.shape[:3]
    if k_pos.shape not in ((B, 1, C), (B, K, C)):
        raise ValueError(
            f"k_pos {k_pos.shape}: must be {(B, 1, C)} or {(B, K, C)}, one a slot"
        )


def _check_options(window, sink, heads: int) -> None:
    if isinstance(window, int) and window < 1:
        raise ValueError(
            f"window={window}: must be an integer >= 1; a window counts the query "
            "itself, and None is no window"
        )
    if sink is not None and sink.shape != (heads,):
        raise ValueError(
            f"sink {sink.shape}: must be one logit per query head ({heads},)"
        )
