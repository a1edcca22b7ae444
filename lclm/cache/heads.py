"""kv heads with budgets of their own, in a few sizes (after AdaKV, arXiv 2407.11550).

Which heads get the large budgets is decided per text; how many there are of each size
is fixed beforehand, so that every size is an array of its own and bytes are really
saved.
"""

import jax.numpy as jnp
from jax import lax

from lclm.cache.base import Heads
from lclm.typing import Array, Float, Int


def classes(heads: int, budget: int, ada: float) -> tuple[tuple[int, int], ...]:
    """(heads, tokens) of each size, largest first; their sum is heads * budget.

    A third of the heads has (1 + ada) * budget, a third (1 - ada) * budget.
    """
    if not ada or heads == 1:
        return ((heads, budget),)
    side = max(1, heads // 3)
    more = round(ada * budget)
    sizes = (side, budget + more), (heads - 2 * side, budget), (side, budget - more)
    return tuple(size for size in sizes if size[0])


def by_demand(rank: Float[Array, "B K S"], slots: int) -> Int[Array, "B K"]:
    """Heads in order of how many of a layer's best K * slots slots are theirs."""
    B, K, S = rank.shape
    least = lax.top_k(rank.reshape(B, -1), min(K * slots, K * S))[0][:, -1]
    wanted = jnp.sum(rank >= least[:, None, None], -1)
    return jnp.argsort(-wanted, -1, stable=True).astype(jnp.int32)


def ordered(x: Array, order: Int[Array, "B K"], axis: int) -> Array:
    """Rows of `x` with the heads on `axis` in `order`."""
    shape = [1] * x.ndim
    shape[0], shape[axis] = order.shape
    return jnp.take_along_axis(x, order.reshape(shape), axis)


def grouped(heads: Heads, order: Int[Array, "B K"], counts: list[int]) -> list[Heads]:
    """Queries, keys and values of kv heads in `order`, `counts` of them at a time."""
    (B, T, N, H), K = heads.q.shape, heads.k.shape[2]
    q = ordered(heads.q.reshape(B, T, K, N // K, H), order, 2)
    k, v = ordered(heads.k, order, 2), ordered(heads.v, order, 2)
    out, at = [], 0
    for count in counts:
        here = slice(at, at + count)
        mine = q[:, :, here].reshape(B, T, -1, H)
        out.append(Heads(mine, k[:, :, here], v[:, :, here]))
        at += count
    return out


def joined(outs: list[Array], order: Int[Array, "B K"]) -> Float[Array, "B T N H"]:
    """Outputs of the groups with their heads back in place."""
    whole = jnp.concatenate(outs, 2)
    B, T, N, H = whole.shape
    whole = whole.reshape(B, T, order.shape[1], -1, H)
    return ordered(whole, jnp.argsort(order, -1), 2).reshape(B, T, N, H)
