"""Attention over rows whose tokens are spread over devices.

Code of one device inside `jax.shard_map`. A row of T tokens is cut along the mesh axes
`context_ring` (R parts) and, inside each, `context_ulysses` (U parts). Three steps:

1. all-to-all over `context_ulysses`: all tokens of a ring part, a U-th of the heads
   (arXiv 2309.14509); kv heads are repeated as far as U needs;
2. attention over `context_ring`, by one of `STRATEGIES`;
3. the inverse all-to-all.

With R = U = 1 this is attention on one device. Under `tensor` each device has its own
heads and finds their masks and sinks.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lclm import sharding
from lclm.attention.ring import Ring, ring_attention
from lclm.errors import LclmError, unknown
from lclm.ops import branch
from lclm.ops.masked import masked_attention, with_sink
from lclm.typing import Array, Float, Leaf
from pallas_kernels import mask as masks
from pallas_kernels.attention import attention
from pallas_kernels.mask import Mask

RING, ULYSSES = sharding.SEQUENCE
STRATEGIES = ("auto", "ring", "gather", "halo")
# Keys and values of a whole row that a device may hold in a layer, in numbers.
GATHERED = 1 << 28


@dataclass(frozen=True)
class Context:
    """How a row's tokens lie on devices.

    order: "zigzag" cuts a row into 2R pieces, ring part r holds pieces r and
    2R - 1 - r, so causal work is even; "contiguous" holds R pieces in order.
    """

    ring: int = 1
    ulysses: int = 1
    order: str = "contiguous"
    strategy: str = "auto"

    def __post_init__(self):
        if self.strategy not in STRATEGIES:
            raise unknown("context strategy", self.strategy, STRATEGIES)

    @property
    def devices(self) -> int:
        """Devices that share a row."""
        return self.ring * self.ulysses

    @property
    def pieces(self) -> int:
        """Into how many pieces that stay together a row is cut for the ring."""
        return self.ring * (2 if self.order == "zigzag" else 1)

    def starts(self, rank: int, size: int) -> tuple[int, ...]:
        """Where in the row the pieces of `size` tokens of a ring part start."""
        if self.order == "contiguous":
            return (rank * size,)
        return (rank * size, (2 * self.ring - 1 - rank) * size)

    def places(self, length: int) -> np.ndarray:
        """The index in the row of each token, in the order devices hold them."""
        size = length // self.pieces
        starts = [s for r in range(self.ring) for s in self.starts(r, size)]
        return (np.asarray(starts)[:, None] + np.arange(size)).reshape(-1)


ALONE = Context()


@dataclass(frozen=True)
class Pattern:
    """What a layer's queries may see, over all its heads.

    own: the mask is laid on each token's position in its own document, pair by pair;
    otherwise on its index in the row.
    """

    mask: Mask
    heads: int
    scale: float | None = None
    softcap: float | None = None
    own: bool = False


class Tokens(NamedTuple):
    """Positions in the own document and document ids (None: one document), [B, T]."""

    positions: Leaf
    segments: Leaf


def make_context(
    ring: int,
    ulysses: int,
    *,
    length: int,
    windows: list[int | None],
    strategy: str,
    states: bool = False,
) -> Context:
    """The layout of rows of `length` tokens; `windows` are those of attention layers.

    Rows stay in order where every layer has a window that reaches no further than the
    ring part before (None: it sees more) or where some layers hand on `states`; they
    are laid in a zigzag otherwise. Raises LclmError where the length does not split,
    or rows in order do not suit the strategy.
    """
    near = all(w is not None and (w - 1) * ring <= length for w in windows)
    if strategy == "halo" and not near:
        raise LclmError(
            f"context strategy 'halo' on {ring} ring parts of {length} tokens: every "
            f"layer needs a window of at most {length // ring + 1} tokens; take "
            "'auto', or fewer devices in context_ring"
        )
    if states and strategy == "ring":
        raise LclmError(
            "context strategy 'ring' with layers that hand on a state: their rows stay "
            "in order, and the ring wants a zigzag; take 'auto' or 'gather'"
        )
    if states and not near:
        strategy = "gather"
    in_order = states or (near and strategy in ("auto", "halo"))
    contiguous = ring == 1 or in_order
    made = Context(ring, ulysses, "contiguous" if contiguous else "zigzag", strategy)
    parts = math.lcm(made.pieces, made.devices)
    if made.order == "zigzag":
        parts = 2 * ring * (ulysses // math.gcd(2, ulysses))
    if length % parts:
        raise LclmError(
            f"rows of {length} tokens do not split over context_ring={ring} and "
            f"context_ulysses={ulysses}: make length a multiple of {parts}"
        )
    return made


def choose(context: Context, pattern: Pattern, numbers: int) -> str:
    """How a layer attends over the ring; `numbers` in the keys and values of a row.

    | mask                                   | strategy                          |
    |----------------------------------------|-----------------------------------|
    | laid on documents' own positions       | gather                            |
    | rows in order, every layer windowed    | halo                              |
    | rows in order, some layer sees more    | gather                            |
    | numbers <= 2^28, ring <= 8, or asked   | gather                            |
    | others                                 | ring                              |

    Up to about 64k tokens gathered keys are as fast as an all-to-all and faster than a
    ring, at a million they do not fit (MaxText pull requests 4687, 4719, 4893).
    """
    if pattern.own:
        return "gather"
    if context.order == "contiguous" and context.strategy != "gather":
        return "halo"
    if context.strategy != "auto":
        return context.strategy
    return "gather" if numbers <= GATHERED and context.ring <= 8 else "ring"


def attend(
    pattern: Pattern,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K E"],
    tokens: Tokens,
    *,
    sink: Float[Array, " N"] | None = None,
    context: Context | None = None,
) -> Float[Array, "B T N E"]:
    """Attention of this device's queries over the keys of all that share the row.

    Outside a mesh the whole row is here, whatever the context.
    """
    if context is None or not sharding.inside():
        context = ALONE
    scale = q.shape[-1] ** -0.5 if pattern.scale is None else pattern.scale
    pattern = replace(pattern, scale=scale)
    first = sharding.axis_index("tensor") * q.shape[2]
    if context.ulysses > 1:
        q, k, v = _to_heads(q, k, v, context.ulysses)
        first = first + sharding.axis_index(ULYSSES) * q.shape[2]
        tokens = jax.tree.map(lambda x: _gather(x, ULYSSES), tokens)
    if sink is not None and q.shape[2] < len(sink):
        sink = lax.dynamic_slice_in_dim(sink, first, q.shape[2])
    if context.ring == 1:
        out = _alone(pattern, (q, k, v), tokens, first, sink)
    else:
        numbers = k.shape[0] * k.shape[1] * context.ring * k.shape[2]
        kind = choose(context, pattern, numbers * (k.shape[3] + v.shape[3]))
        run = {"ring": _ring, "gather": _gathered, "halo": _halo}[kind]
        out = with_sink(*run(context, pattern, (q, k, v), tokens, first), sink)
    if context.ulysses == 1:
        return out
    return lax.all_to_all(out, ULYSSES, 1, 2, tiled=True)


def _to_heads(q: Array, k: Array, v: Array, parts: int) -> tuple[Array, Array, Array]:
    """Tokens of one part and all heads -> all tokens and a part of the heads."""
    N, K = q.shape[2], k.shape[2]
    times = parts // math.gcd(K, parts)
    if (N // K) % times:
        times = N // K
    if N % parts or (K * times) % parts:
        raise LclmError(
            f"context_ulysses={parts} does not divide {N} query heads on a device: "
            "make it smaller and context_ring larger"
        )
    k, v = (jnp.repeat(x, times, axis=2) if times > 1 else x for x in (k, v))
    return tuple(lax.all_to_all(x, ULYSSES, 2, 1, tiled=True) for x in (q, k, v))


def _gather(x: Array, axis: str) -> Array:
    """The tokens of all devices along a mesh axis."""
    return lax.all_gather(x, axis, axis=1, tiled=True)


def own_masks(pattern: Pattern, count: int) -> tuple[Mask, ...]:
    """The masks of each run of `count` heads; one where all runs are alike."""
    if not pattern.mask.varies or count == pattern.heads:
        return (pattern.mask,)
    each = pattern.mask.layout(pattern.heads)
    if len(each) == 1:
        return each
    runs = [each[i : i + count] for i in range(0, pattern.heads, count)]
    found = [r[0] if len(set(r)) == 1 else masks.per_head(r) for r in runs]
    return tuple(found[:1] if len(set(found)) == 1 else found)


def _for_heads(
    pattern: Pattern, count: int, first: Any, run: Callable[[Mask], Any]
) -> Any:
    """`run` with the mask of this device's heads; no collectives inside."""
    found = own_masks(pattern, count)
    if len(found) == 1:
        return run(found[0])
    return lax.switch(first // count, [functools.partial(run, m) for m in found])


def _alone(pattern, qkv, tokens, first, sink) -> Array:
    """All keys are here.

    A mask laid on documents runs in blocks where every row is one document from its
    first token on, and else pair by pair: later documents of a row do not start where
    a block does.
    """

    def by_blocks(values: Any, fixed: Any) -> Array:
        (qkv, sink), (tokens, first) = values, fixed

        def run(mask: Mask) -> Array:
            return attention(
                *qkv,
                mask=mask,
                scale=pattern.scale,
                softcap=pattern.softcap,
                sink=sink,
                q_segment_ids=tokens.segments,
                kv_segment_ids=tokens.segments,
            )[0]

        return _for_heads(pattern, qkv[0].shape[2], first, run)

    def by_pairs(values: Any, fixed: Any) -> Array:
        (qkv, sink), (tokens, first) = values, fixed
        return with_sink(*_on_positions(pattern, qkv, tokens, tokens, first), sink)

    values, fixed = (qkv, sink), (tokens, first)
    if not pattern.own:
        return by_blocks(values, fixed)
    places = jnp.arange(qkv[0].shape[1], dtype=jnp.int32)
    one = (tokens.positions < 0) | (tokens.positions == places)
    index = jnp.all(one).astype(jnp.int32)
    return branch.choose((by_pairs, by_blocks), index, values, fixed)


def _on_positions(pattern, qkv, tokens, keys, first) -> tuple[Array, Array]:
    """Pair by pair, on positions in the own document."""
    q, k, v = qkv

    def run(mask: Mask) -> tuple[Array, Array]:
        return masked_attention(
            q,
            jnp.swapaxes(k, 1, 2),
            jnp.swapaxes(v, 1, 2),
            tokens.positions,
            keys.positions,
            mask=mask,
            scale=pattern.scale,
            softcap=pattern.softcap,
            segments=(tokens.segments, keys.segments),
        )

    return _for_heads(pattern, q.shape[2], first, run)


def _gathered(context, pattern, qkv, tokens, first) -> tuple[Array, Array]:
    """All keys and values of the row on each device (arXiv 2407.21783, 3.3.2)."""
    q, k, v = qkv
    k, v = _gather(k, RING), _gather(v, RING)
    keys = jax.tree.map(lambda x: _gather(x, RING), tokens)
    if pattern.own:
        return _on_positions(pattern, (q, k, v), tokens, keys, first)
    size = q.shape[1] * context.ring // context.pieces
    every = [s for r in range(context.ring) for s in context.starts(r, size)]
    cases = [
        masks.laid(mask, size, context.starts(r, size), every)
        for r in range(context.ring)
        for mask in own_masks(pattern, q.shape[2])
    ]

    def run(mask: Mask) -> tuple[Array, Array]:
        return attention(
            q,
            k,
            v,
            mask=mask,
            scale=pattern.scale,
            softcap=pattern.softcap,
            q_segment_ids=tokens.segments,
            kv_segment_ids=keys.segments,
        )

    index = _case(pattern, q.shape[2], first)
    return lax.switch(index, [functools.partial(run, m) for m in cases])


def _case(pattern: Pattern, count: int, first: Any) -> Any:
    """The number of this device's ring part and run of heads together."""
    runs = len(own_masks(pattern, count))
    at = first // count if runs > 1 else 0
    return sharding.axis_index(RING) * runs + at


def _ring(context, pattern, qkv, tokens, first) -> tuple[Array, Array]:
    q = qkv[0]
    spec = Ring(
        own_masks(pattern, q.shape[2]),
        q.shape[2],
        pattern.scale,
        pattern.softcap,
        q.shape[1] * context.ring // context.pieces,
        tuple(context.starts(r, 1) for r in range(context.ring)),
    )
    case = jnp.asarray(_case(pattern, q.shape[2], first), jnp.int32)
    return ring_attention(spec, *qkv, tokens.segments, case)


def _halo(context, pattern, qkv, tokens, first) -> tuple[Array, Array]:
    """The window's reach of keys from the ring part before, in one exchange."""
    q, k, v = qkv
    reach = reach_of(pattern.mask) - 1
    ids = tokens.segments
    ids = jnp.zeros(q.shape[:2], jnp.int32) if ids is None else ids
    keys, values, key_ids = k, v, ids
    if reach:
        pairs = [(r, r + 1) for r in range(context.ring - 1)]
        last = tuple(x[:, -reach:] for x in (k, v, ids))
        before = lax.ppermute(last, RING, pairs)
        hidden = jnp.where(lax.axis_index(RING) > 0, before[2], -1)
        keys, values = (
            jnp.concatenate([b, x], 1) for b, x in zip(before, (k, v), strict=False)
        )
        key_ids = jnp.concatenate([hidden, ids], 1)
    return attention(
        q,
        keys,
        values,
        mask=pattern.mask,
        scale=pattern.scale,
        softcap=pattern.softcap,
        q_segment_ids=ids,
        kv_segment_ids=key_ids,
        offset=reach,
    )


def reach_of(mask: Mask) -> int | None:
    """The window of a causal window mask; None for any other mask."""
    match mask:
        case masks.And(masks.Causal(), masks.Window(size)):
            return size
        case masks.Window(size):
            return size
    return None
