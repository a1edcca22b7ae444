"""Group norm over all tokens of a document so far (arXiv 2404.08801, section 3.2).

Means and variances are merged in the delta form, never as sums of squares. A state is
kept in two levels: `open` holds the tokens of the document's last, unfinished 256,
`closed` all before them. At a million tokens, float32 variances then err by 1e-6 of
themselves, where a running merge token by token errs by 5e-5.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lclm.ops.precision import wide_dtype
from lclm.typing import Array, Bool, Float, Int

OPEN = 256  # tokens between two merges into the closed level
SHORT = 32  # calls of up to this many tokens run token by token
MOST = 2**31 - 1


class Moments(NamedTuple):
    """Tokens seen [...], and the mean and variance [..., G] of all their features."""

    count: Int[Array, "..."]
    mean: Float[Array, "... G"]
    var: Float[Array, "... G"]

    def where(self, keep: Bool[Array, "..."], other: "Moments") -> "Moments":
        """These moments where `keep`, else the others."""
        return Moments(
            jnp.where(keep, self.count, other.count),
            jnp.where(keep[..., None], self.mean, other.mean),
            jnp.where(keep[..., None], self.var, other.var),
        )


class NormState(NamedTuple):
    """What a timestep norm carries: every leaf leads with the batch."""

    closed: Moments
    open: Moments


def none_seen(batch: int, groups: int, dtype: Any = jnp.float32) -> NormState:
    """The state before the first token."""

    def moments() -> Moments:
        count = jnp.zeros((batch,), jnp.int32)
        zeros, ones = jnp.zeros((batch, groups), dtype), jnp.ones((batch, groups))
        return Moments(count, zeros, ones.astype(dtype))

    return NormState(moments(), moments())


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of both sets of tokens; where one is empty, the other as it stands."""
    both = a.count + jnp.minimum(b.count, MOST - a.count)
    total = jnp.maximum(both, 1).astype(a.mean.dtype)
    share = (b.count.astype(a.mean.dtype) / total)[..., None]
    apart = b.mean - a.mean
    mean = a.mean + share * apart
    var = a.var + share * ((b.var - a.var) + (1 - share) * apart * apart)
    only = Moments(both, mean, var)
    return a.where(b.count == 0, b.where(a.count == 0, only))


def timestep_norm(
    x: Float[Array, "B T D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"],
    state: NormState,
    *,
    positions: Int[Array, "B T"],
    eps: float,
) -> tuple[Float[Array, "B T D"], NormState]:
    """(x - mean) / sqrt(var + eps) * (scale + 1) + bias, and the state behind.

    Mean and variance are those of each group's features over the tokens of the same
    document up to and with this one. `positions` count inside a document: 0 forgets
    the state, -1 (padding) holds it and gives 0.
    """
    B, T, D = x.shape
    groups = state.open.mean.shape[-1]
    wide = wide_dtype(x)
    grouped = x.astype(wide).reshape(B, T, groups, -1)
    valid, resets = positions >= 0, positions == 0
    mean = jnp.mean(grouped, -1)
    var = jnp.mean(jnp.square(grouped - mean[..., None]), -1)
    tokens = Moments(valid.astype(jnp.int32), mean, var)
    state = jax.tree.map(lambda a: a if a.ndim == 1 else a.astype(wide), state)
    if T <= SHORT:
        so_far, state = _token_by_token(state, tokens, resets)
    else:
        so_far = _running(tokens, resets, merge(state.closed, state.open))
        state = _behind(state, tokens, so_far, resets)
    norm = lax.rsqrt(so_far.var + eps)[..., None]
    y = ((grouped - so_far.mean[..., None]) * norm).reshape(B, T, D)
    y = y * (1 + scale.astype(wide)) + bias.astype(wide)
    return jnp.where(valid[..., None], y, 0).astype(x.dtype), state


def _forget(state: NormState, reset: Bool[Array, " B"]) -> NormState:
    groups, dtype = state.open.mean.shape[-1], state.open.mean.dtype
    fresh = none_seen(len(reset), groups, dtype)
    return NormState(*(f.where(reset, s) for f, s in zip(fresh, state, strict=True)))


def _token_by_token(
    state: NormState, tokens: Moments, resets: Bool[Array, "B T"]
) -> tuple[Moments, NormState]:
    def step(state: NormState, token: tuple[Moments, Array]):
        state = _advance(_forget(state, token[1]), token[0])
        return state, merge(state.closed, state.open)

    by_time = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), (tokens, resets))
    state, so_far = lax.scan(step, state, by_time, unroll=resets.shape[1] == 1)
    return jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), so_far), state


def _advance(state: NormState, token: Moments) -> NormState:
    """One token more; the open level is closed once it is full."""
    more = merge(state.open, token)
    full = more.count >= OPEN
    closed = merge(state.closed, more).where(full, state.closed)
    return NormState(closed, none_seen(len(full), *_like(more)).open.where(full, more))


def _like(moments: Moments) -> tuple[int, Any]:
    return moments.mean.shape[-1], moments.mean.dtype


def _running(tokens: Moments, resets: Bool[Array, "B T"], before: Moments) -> Moments:
    """Moments of each token's document up to it: inside blocks, then over blocks.

    Both levels are sequential, over all blocks and then over all block ends at once:
    2 sqrt(T) small steps.
    """
    B, T = resets.shape
    size = 1 << (max(T - 1, 1).bit_length() + 1) // 2
    count = -(-T // size)

    def cut(leaf: Array) -> Array:
        rest = [(0, 0)] * (leaf.ndim - 2)
        leaf = jnp.pad(leaf, ((0, 0), (0, count * size - T), *rest))
        return jnp.moveaxis(leaf.reshape(B, count, size, *leaf.shape[2:]), 2, 0)

    def inside(carry, token):
        seen, fresh = carry
        one, reset = token
        nothing = Moments(*(jnp.zeros_like(leaf) for leaf in seen))
        seen = merge(nothing.where(reset, seen), one)
        fresh = fresh | reset
        return (seen, fresh), (seen, fresh)

    blocks = jax.tree.map(cut, tokens)
    start = jax.tree.map(lambda leaf: jnp.zeros_like(leaf[0]), blocks)
    flags = cut(resets)
    (ends, fresh), (here, cleared) = lax.scan(
        inside, (start, jnp.zeros_like(flags[0])), (blocks, flags)
    )

    def over(seen, block):
        end, reset = block
        return end.where(reset, merge(seen, end)), seen

    by_block = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), (ends, fresh))
    _, past = lax.scan(over, before, by_block)
    past = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1)[None], past)
    past = jax.tree.map(lambda a, b: jnp.broadcast_to(a, b.shape), past, here)
    seen = here.where(cleared, merge(past, here))
    return jax.tree.map(
        lambda leaf: jnp.moveaxis(leaf, 0, 2).reshape(B, -1, *leaf.shape[3:])[:, :T],
        seen,
    )


def _behind(
    state: NormState, tokens: Moments, so_far: Moments, resets: Bool[Array, "B T"]
) -> NormState:
    """The two levels behind the last valid token, the same for any split of a row."""
    B, T = resets.shape
    valid = tokens.count > 0
    index = jnp.arange(T, dtype=jnp.int32)
    state = _forget(state, jnp.any(resets, 1))
    own = index >= jnp.max(jnp.where(resets, index, 0), 1, keepdims=True)
    own &= valid  # tokens of the last document

    # Its last token that filled a 256: all up to it is closed.
    full = own & (so_far.count % OPEN == 0)
    some = jnp.any(full, 1)
    at = jnp.max(jnp.where(full, index, 0), 1)
    filled = jax.tree.map(lambda leaf: leaf[jnp.arange(B), at], so_far)
    closed = filled.where(some, state.closed)

    late = own & ((index > at[:, None]) | ~some[:, None])
    weight = late.astype(tokens.mean.dtype)[..., None]
    count = jnp.sum(late, 1, dtype=jnp.int32)
    share = weight / jnp.maximum(count, 1)[:, None, None].astype(weight.dtype)
    mean = jnp.sum(share * tokens.mean, 1)
    apart = jnp.square(tokens.mean - mean[:, None])
    new = Moments(count, mean, jnp.sum(share * (tokens.var + apart), 1))
    before = none_seen(B, *_like(new)).open.where(some, state.open)
    return NormState(closed, merge(before, new))
