"""Attention of each query over the pages of a cache that its own bounds point to.

A page is `page` consecutive slots, and a token's slot is its position. Each page has
per kv head the elementwise greatest and least of its keys, kept side by side: bounds
[B, K, pages, 2 H]. For a query q they bound every q.k of the page from above by
U = sum_d max(q_d greatest_d, q_d least_d) (arXiv 2406.10774, section 3.3).

Keys may be held in a smaller form (`pallas_kernels.decode.cached`), which is opened
where pages are written; bounds are then those of the opened keys.

A query at position i stands in page i // page. That page and the `first` pages are
always attended; of the others before it, those with the largest U. So what a query
attends depends on its position alone, never on how the text was cut into calls.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import dispatch
from pallas_kernels.attention.spec import wide
from pallas_kernels.decode.cached import (
    _block,
    _blocks,
    _check,
    _check_options,
    _closed,
    _finish,
    _Scoring,
    _scoring,
    attend,
    cached_attention,
    with_sink,
)

REDUCTIONS = ("max", "mean", "union")
_BOUNDS = 1 << 22  # upper bounds of pages held at once


@dataclasses.dataclass(frozen=True)
class Selection:
    """`count` pages of `page` tokens for each query, per kv head.

    The query's own page and the first `first` pages are among them. `reduce` joins the
    query heads of a kv head: the largest bound of a page, their mean, or the union of
    the pages that each would choose alone.
    """

    page: int
    count: int
    first: int = 0
    reduce: str = "max"

    def __post_init__(self):
        if self.page < 1:
            raise ValueError(f"page={self.page}: must be at least 1 token")
        if self.first < 0:
            raise ValueError(f"first={self.first}: must be at least 0 pages")
        if self.count <= self.first:
            raise ValueError(
                f"count={self.count}: must exceed first={self.first}, a query's own "
                "page is one more"
            )
        if self.reduce not in REDUCTIONS:
            raise ValueError(f"reduce={self.reduce!r}: use one of {REDUCTIONS}")


def page_bounds(k: jax.Array, length: jax.Array, page: int) -> jax.Array:
    """Bounds [B, K, C / page, 2 H] of keys [B, K, C, H], of which `length` [B] are set.

    Pages without a key get the least and the greatest finite value, which lose to all.
    """
    return _bounds(k, jnp.zeros_like(length), length, page)


def _bounds(k, start, length, page: int):
    """The same of keys whose first stands in slot `start` [B]."""
    B, K, C, H = k.shape
    slot = start[:, None] + lax.iota(jnp.int32, C)
    held = (slot < length[:, None])[:, None, :, None]
    limits = jnp.finfo(k.dtype)
    greatest, least = (
        pick(jnp.where(held, k, other).reshape(B, K, C // page, page, H), 3)
        for pick, other in ((jnp.max, limits.min), (jnp.min, limits.max))
    )
    return jnp.concatenate([greatest, least], -1)


def refresh_bounds(
    bounds: jax.Array,
    k: jax.Array,
    new: jax.Array,
    start: jax.Array,
    length: jax.Array,
    *,
    page: int,
) -> jax.Array:
    """Bounds once keys `new` [B, K, T, H] stand in slots `start` [B] and behind of `k`.

    `length` [B] slots are set then. The pages touched are taken afresh from what they
    hold, so keys written over or taken back leave no trace. `k` is only read.
    """
    pages, width = bounds.shape[2], new.shape[2]
    touched = min((width + page - 2) // page + 1, pages)

    def one(old, keys, values, at, end):
        first = jnp.clip(at // page, 0, pages - touched)
        mine = _slots(keys, first * page, touched * page, old.dtype)
        slot = first * page + lax.iota(jnp.int32, touched * page)
        written = jnp.take(values, jnp.clip(slot - at, 0, width - 1), 1)
        mine = jnp.where((slot < at)[:, None], mine, written.astype(mine.dtype))
        fresh = _bounds(mine[None], (first * page)[None], end[None], page)[0]
        return lax.dynamic_update_slice_in_dim(old, fresh.astype(old.dtype), first, 1)

    if bounds.shape[0] == 1:
        k = jax.tree.map(lambda x: x[0], k)
        return one(bounds[0], k, new[0], start[0], length[0])[None]
    return jax.vmap(one)(bounds, k, new, start, length)


def _slots(keys, start, count: int, dtype):
    """Slots [start, start + count) of one row's keys [K, C, H]."""
    if _closed(keys):
        return keys.open(start, count, dtype)
    return lax.dynamic_slice_in_dim(keys, start, count, 1)


def no_bounds(shape: tuple[int, ...], dtype) -> jax.Array:
    """Bounds [B, K, pages, 2 H] of pages without a key: they lose to all."""
    limits = jnp.finfo(dtype)
    sides = jnp.arange(shape[-1]) < shape[-1] // 2
    side = jnp.where(sides, limits.min, limits.max).astype(dtype)
    return jnp.broadcast_to(side, shape)


def upper_bounds(q: jax.Array, bounds: jax.Array) -> jax.Array:
    """U of every page for queries `q` [B, T, N, H]: float32 [B, T, K, N / K, pages].

    max(a, b) is linear in (greatest, least) once the sign of q is known, so this is
    one product of [max(q, 0), min(q, 0)] with the bounds.
    """
    B, T, N, H = q.shape
    K = bounds.shape[1]
    q = wide(q).reshape(B, T, K, N // K, H)
    sides = jnp.concatenate([jnp.maximum(q, 0), jnp.minimum(q, 0)], -1)
    return jnp.einsum("btkgh,bkph->btkgp", sides, wide(bounds))


def select_pages(
    q: jax.Array, bounds: jax.Array, q_pos: jax.Array, choice: Selection
) -> jax.Array:
    """Pages int32 [B, T, K, n] that queries at `q_pos` [B, T] attend; -1 past the last.

    n is `choice.count`, times the query heads of a kv head for their union; at most
    all pages.
    """
    return _select(q, bounds, q_pos, choice, _best)


def _most(choice: Selection, group: int, pages: int) -> int:
    """Pages that are listed for a query."""
    return min(choice.count * (group if choice.reduce == "union" else 1), pages)


def _select(q, bounds, q_pos, choice: Selection, choose):
    score = upper_bounds(q, bounds)
    pages, group = score.shape[-1], score.shape[3]
    number = lax.iota(jnp.int32, pages)
    own = (q_pos // choice.page)[:, :, None, None, None]
    forced = (number == own) | (number < choice.first)
    if choice.reduce == "mean":
        score = score.mean(3, keepdims=True)
    elif choice.reduce == "max":
        score = score.max(3, keepdims=True)
    score = jnp.where(forced, jnp.inf, score)
    score = jnp.where(number <= own, score, -jnp.inf)
    best = choose(score, min(choice.count, pages))
    if choice.reduce != "union":
        return best[:, :, :, 0]
    some = _members(best, pages).any(3)
    return choose(jnp.where(some, 0.0, -jnp.inf), _most(choice, group, pages))


def _best(score, count: int):
    top, index = lax.top_k(score, count)
    return jnp.where(top > -jnp.inf, index, -1)


def _members(index, pages: int):
    """Bool [..., pages]: which numbers are among `index` [..., n]."""
    rows = index.reshape(-1, index.shape[-1])
    at = jnp.where(rows < 0, pages, rows)
    found = jnp.zeros((len(rows), pages), bool)
    found = found.at[jnp.arange(len(rows))[:, None], at].set(True, mode="drop")
    return found.reshape(*index.shape[:-1], pages)


@dataclasses.dataclass(frozen=True)
class _Chosen(_Scoring):
    """Scores with slots hidden outside the pages `chosen`, bool [B, K, T, pages]."""

    chosen: jax.Array
    page: int

    def seen(self, k_pos):
        """Bool [B, K, 1, T, c] of a run of slots that begins with a page."""
        first, width = k_pos[0, 0, 0] // self.page, k_pos.shape[2] // self.page
        mine = lax.dynamic_slice_in_dim(self.chosen, first, width, 3)
        return super().seen(k_pos) & jnp.repeat(mine, self.page, 3)[:, :, None]


def paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bounds: jax.Array,
    q_pos: jax.Array,
    choice: Selection,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink: jax.Array | None = None,
    length: jax.Array | int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention of `q` [B, T, N, H] over the pages each query chooses.

    The cache `k`, `v` [B, K, C, H] holds position p in slot p, and `bounds` are those
    of its pages; slots from `length`, int or [B], on are empty (a query's own key may
    be among them: bounds are asked of the pages before its own). One query a row reads
    the bounds and its pages, nothing else; several read the cache in blocks, which is
    XLA's form whatever `implementation` says. Other arguments, the result and errors as
    in `cached_attention`.
    """
    _check_pages(q, k, v, bounds, q_pos, choice)
    _check_options(None, sink, q.shape[2])
    options = {"scale": scale, "softcap": softcap, "sink": sink}
    C = k.shape[2]
    length = jnp.broadcast_to(jnp.asarray(C if length is None else length), len(q))
    if choice.count * choice.page >= C:
        places = _before(length, lax.iota(jnp.int32, C)[None, None])
        used = jnp.max(length)
        options["implementation"] = implementation
        return cached_attention(q, k, v, q_pos, places, length=used, **options)
    if q.shape[1] == 1:
        group = q.shape[2] // k.shape[1]
        count = _most(choice, group, bounds.shape[2])
        shape = q.shape, k, v, dispatch.platform()
        call = dispatch.Decode(*shape, page=choice.page, count=count)
        found = dispatch.select(call, implementation)
        index = _select(q, bounds, q_pos, choice, found.load_best())[:, 0]
        run = found.load_pages()
        places = _before(length, _places(index, choice.page))
        scoring = _scoring(q, k, q_pos, None, scale, softcap)
        out, lse = run(scoring, q, k, v, index, places)
        return (out, lse) if sink is None else with_sink(out, lse, sink)
    return _by_blocks(q, k, v, bounds, q_pos, choice, length, options)


def _before(length, places):
    """Positions [B, ...], -1 from each row's `length` on."""
    return jnp.where(places < length[:, None, None], places, -1)


def _places(index, page: int):
    """Positions [B, K, n page] of the pages `index` [B, K, n], -1 for none."""
    places = index[..., None] * page + lax.iota(jnp.int32, page)
    places = jnp.where(index[..., None] < 0, -1, places)
    return places.reshape(*index.shape[:2], -1)


def attend_pages(scoring: _Scoring, q, k, v, index, places):
    """Out and lse over the pages `index` [B, K, n], valid ones first, -1 for none.

    `places` [B, K, n page] are the positions of their slots, -1 where one is empty.
    """
    k, v = _gather(k, v, index, places.shape[2] // index.shape[2])
    return attend(scoring, q, k, v, places)[:2]


def _gather(k, v, index, page: int):
    """The slots of the pages `index` [B, K, n]."""
    B, K, C, _ = k.shape
    at = jnp.maximum(index, 0)[..., None, None]

    def pick(x):
        pages = x.reshape(B, K, C // page, page, x.shape[3])
        return jnp.take_along_axis(pages, at, 2).reshape(B, K, -1, x.shape[3])

    return jax.tree.map(pick, (k, v))


def _by_blocks(q, k, v, bounds, q_pos, choice: Selection, length, options):
    """Every query's own pages as a mask over blocks of slots."""
    B, T, N, H = q.shape
    K, C, pages = k.shape[1], k.shape[2], bounds.shape[2]

    def chosen(part):
        rows, at = part
        return _members(select_pages(rows[:, None], bounds, at[:, None], choice), pages)

    def choose():
        some = lax.map(
            chosen,
            (jnp.moveaxis(q, 1, 0), q_pos.T),
            batch_size=max(1, min(T, _BOUNDS // (B * N * pages))),
        )
        return some[:, :, 0].transpose(1, 2, 0, 3)

    short = jnp.max(q_pos) < choice.count * choice.page
    mine = lax.cond(short, lambda: jnp.ones((B, K, T, pages), bool), choose)
    scale = H**-0.5 if options["scale"] is None else options["scale"]
    last = jnp.minimum(q_pos, length[:, None] - 1)
    scoring = _Chosen(last, None, scale, options["softcap"], N // K, mine, choice.page)
    block = _block(B * N * T, C, closed=_closed(k))
    block = max(1, block // choice.page) * choice.page
    places = lax.iota(jnp.int32, C)[None, None]
    rows = scoring.rows(q)
    state = _blocks(scoring, rows, k, v, places, jnp.max(length), block)
    out, lse = _finish(state, (B, T, N), v.dtype)
    sink = options["sink"]
    return (out, lse) if sink is None else with_sink(out, lse, sink)


def _check_pages(q, k, v, bounds, q_pos, choice: Selection) -> None:
    B, K, C, H = k.shape if k.ndim == 4 else (0, 0, 0, 0)
    _check(q, k, v, q_pos, jnp.zeros((B, 1, C), jnp.int8))
    if C % choice.page:
        raise ValueError(
            f"a cache of {C} slots does not divide into pages of {choice.page}; round "
            f"it up to {-(-C // choice.page) * choice.page}"
        )
    want = (B, K, C // choice.page, 2 * H)
    if bounds.shape != want:
        raise ValueError(f"bounds {bounds.shape}: must be {want}, one row a page")
