"""Mixtures of experts: the router, the experts' products, the load balance.

Sources: arXiv 2401.04088 (Mixtral), 2403.19887 (Jamba), 2101.03961 equations 4-6. No
capacity and no dropped token: every pair of a token and a chosen expert is computed.

Pairs are sorted by expert. Where XLA has a grouped product (GPU, TPU) that is used; on
a CPU its expansion multiplies every pair with every expert, so there pairs are laid
out in blocks of one expert each, and a loop as long as there are blocks multiplies
each by its expert's matrix.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lclm.errors import LclmError
from lclm.ops.linear import linear
from lclm.ops.packed import dequantize
from lclm.typing import Array, Bool, Float, Int, Leaf

LARGEST_BLOCK = 128
PROBABILITIES, CHOICE = "probabilities", "choice"

Act = Callable[[Array], Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Experts:
    """Matrices of all experts: gate and up [E, F, D], down [E, D, F]."""

    gate: Leaf
    up: Leaf
    down: Leaf


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Route:
    """Where tokens go: the chosen experts and their weights [T, k], of all [T, E]."""

    weights: Leaf
    choice: Leaf
    probabilities: Leaf


def route(x: Float[Array, "T D"], router: Any, *, top: int, renormalise: bool) -> Route:
    """Softmax over all experts, then the `top` largest; float32 (float64 for float64).

    `renormalise` makes the chosen weights sum to 1 (Mixtral); Jamba keeps them raw.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    probabilities = jax.nn.softmax(linear(x.astype(wide), router), axis=-1)
    weights, choice = lax.top_k(probabilities, top)
    if renormalise:
        weights = weights / weights.sum(-1, keepdims=True)
    return Route(weights, choice, probabilities)


def dense(
    x: Float[Array, "T D"], to: Route, experts: Experts, *, act: Act
) -> Float[Array, "T D"]:
    """The definition: every expert on every token, weighted; tests compare with it."""
    gate = jnp.einsum("TD,EFD->TEF", x, dequantize(experts.gate, x.dtype))
    up = jnp.einsum("TD,EFD->TEF", x, dequantize(experts.up, x.dtype))
    each = jnp.einsum("TEF,EDF->TED", act(gate) * up, dequantize(experts.down, x.dtype))
    chosen = jax.nn.one_hot(to.choice, each.shape[1], dtype=to.weights.dtype)
    mix = jnp.einsum("TkE,Tk->TE", chosen, to.weights).astype(x.dtype)
    return jnp.einsum("TED,TE->TD", each, mix)


def grouped(
    x: Float[Array, "T D"], to: Route, experts: Experts, *, act: Act
) -> Float[Array, "T D"]:
    """The chosen experts alone, by sorted pairs; the same values as `dense`."""
    return lax.platform_dependent(
        x,
        to,
        experts,
        cpu=functools.partial(_by_blocks, act=act),
        default=functools.partial(_by_ragged_dot, act=act),
    )


def _combine(pairs: Array, to: Route) -> Array:
    """Weighted sum of each token's k results [T k, D] in their type."""
    rows, top = to.choice.shape
    weights = to.weights.astype(pairs.dtype)[..., None]
    return (pairs.reshape(rows, top, -1) * weights).sum(1)


def _by_ragged_dot(x: Array, to: Route, experts: Experts, *, act: Act) -> Array:
    top, flat = to.choice.shape[1], to.choice.reshape(-1)
    order = jnp.argsort(flat)
    sizes = jnp.bincount(flat, length=experts.gate.shape[0])

    def product(rows: Array, weight: Any) -> Array:
        axes = lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), [0], [0])
        return lax.ragged_dot_general(
            rows, dequantize(weight, rows.dtype), sizes, axes
        ).astype(rows.dtype)

    rows = x[order // top]
    hidden = act(product(rows, experts.gate)) * product(rows, experts.up)
    return _combine(product(hidden, experts.down)[jnp.argsort(order)], to)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Blocks:
    """Pairs in blocks: `pair` of each place (or one past the last: empty), `place` of
    each pair, the expert that owns each block, and how many blocks are in use."""

    pair: Leaf
    place: Leaf
    owner: Leaf
    count: Leaf


def _block_rows(pairs: int, experts: int) -> int:
    """Rows a block: the power of two at or above an expert's even share."""
    share = max(1, -(-pairs // experts))
    return min(LARGEST_BLOCK, 1 << (share - 1).bit_length())


def _blocks(choice: Int[Array, " R"], experts: int) -> tuple[_Blocks, tuple[int, int]]:
    """Lay pairs out by expert; the static shape is (blocks at most, rows a block)."""
    pairs = choice.shape[0]
    rows = _block_rows(pairs, experts)
    most = pairs // rows + min(experts, pairs)
    order = jnp.argsort(choice).astype(jnp.int32)
    sizes = jnp.bincount(choice, length=experts).astype(jnp.int32)
    ends = jnp.cumsum(-(-sizes // rows))
    first = (ends - -(-sizes // rows)) * rows - (jnp.cumsum(sizes) - sizes)
    place = first[choice[order]] + jnp.arange(pairs, dtype=jnp.int32)
    pair = jnp.full(most * rows, pairs, jnp.int32).at[place].set(order)
    owner = jnp.searchsorted(ends, jnp.arange(most), side="right")
    owner = jnp.minimum(owner, experts - 1)
    place = jnp.zeros(pairs, jnp.int32).at[order].set(place)
    return _Blocks(pair, place, owner, ends[-1]), (most, rows)


def _by_blocks(x: Array, to: Route, experts: Experts, *, act: Act) -> Array:
    top = to.choice.shape[1]
    blocks, shape = _blocks(to.choice.reshape(-1), experts.gate.shape[0])
    rows = _scatter(x, blocks, top).reshape(*shape, x.shape[1])
    gate = _block_product(rows, experts.gate, blocks)
    hidden = act(gate) * _block_product(rows, experts.up, blocks)
    out = _block_product(hidden, experts.down, blocks)
    return _combine(_gather(out.reshape(math.prod(shape), -1), blocks), to)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _scatter(x: Array, blocks: _Blocks, top: int) -> Array:
    """Tokens [T, D] to the places of their pairs; empty places are zero."""
    return _rows_or_zero(x, blocks.pair // top)


def _scatter_bwd(top: int, blocks: _Blocks, g: Array) -> tuple[Array, None]:
    pairs = g[blocks.place]
    return pairs.reshape(-1, top, g.shape[1]).sum(1), None


_scatter.defvjp(lambda x, b, top: (_scatter(x, b, top), b), _scatter_bwd)


@jax.custom_vjp
def _gather(out: Array, blocks: _Blocks) -> Array:
    """The rows [R, D] of all pairs from their places: a transposed `_scatter`."""
    return out[blocks.place]


_gather.defvjp(
    lambda out, blocks: (_gather(out, blocks), blocks),
    lambda blocks, g: (_rows_or_zero(g, blocks.pair), None),
)


def _rows_or_zero(x: Array, index: Array) -> Array:
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


@jax.custom_vjp
def _block_product(x: Array, weight: Any, blocks: _Blocks) -> Array:
    """x_b W_e^T for every block b [m, I] in use and its owner e; the rest stay zero."""

    def body(i: Array, y: Array) -> Array:
        return y.at[i].set(linear(x[i], _matrix(weight, blocks.owner[i])))

    shape = (*x.shape[:2], weight.shape[1])
    return lax.fori_loop(0, blocks.count, body, jnp.zeros(shape, x.dtype))


def _block_product_bwd(kept: tuple[Array, Array, _Blocks], g: Array):
    x, weight, blocks = kept
    wide = jnp.promote_types(weight.dtype, jnp.float32)

    def body(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        dx, dw = sums
        owner = blocks.owner[i]
        dx = dx.at[i].set(linear(g[i], _matrix(weight, owner).T))
        one = lax.dot_general(
            g[i], x[i], (((0,), (0,)), ((), ())), preferred_element_type=wide
        )
        return dx, dw.at[owner].add(one)

    start = jnp.zeros_like(x), jnp.zeros(weight.shape, wide)
    dx, dw = lax.fori_loop(0, blocks.count, body, start)
    return dx, dw.astype(weight.dtype), None


_block_product.defvjp(
    lambda x, weight, blocks: (
        _block_product(x, weight, blocks),
        (x, weight, blocks),
    ),
    _block_product_bwd,
)


def _matrix(stack: Any, index: Array) -> Any:
    """One [O, I] matrix of a stack, packed ones included."""
    return jax.tree.map(
        lambda part: lax.dynamic_index_in_dim(part, index, 0, False), stack
    )


def aux_loss(
    router: Mapping[str, Any], valid: Bool[Array, "B T"] | None = None
) -> Float[Array, ""]:
    """Load balance of all layers together: E sum_e f_e P_e (arXiv 2101.03961 eq. 4-6).

    `router` is the collection of that name that `Decoder.apply(..., mutable="router")`
    returns, scanned or not. f_e is the share of tokens that chose e (all f sum to
    `top`), P_e the mean probability; tokens that are not `valid` do not count. Even
    routing gives `top`. Raises `LclmError` where no layer has a router.
    """
    chosen, mass, rows = 0.0, 0.0, 0.0
    for layer in _routers(router):
        probabilities = layer[PROBABILITIES][-1]
        experts = probabilities.shape[-1]
        keep = jnp.ones((), probabilities.dtype)
        if valid is not None:
            keep = valid.astype(probabilities.dtype)
        keep = jnp.broadcast_to(keep, probabilities.shape[:-1])[..., None]
        hits = jax.nn.one_hot(layer[CHOICE][-1], experts, dtype=keep.dtype).sum(-2)
        chosen += (hits * keep).reshape(-1, experts).sum(0)
        mass += (probabilities * keep).reshape(-1, experts).sum(0)
        rows += keep.sum()
    if isinstance(rows, float):
        raise LclmError(
            "no router in this collection: the auxiliary loss needs a model with a "
            'mixture of experts, run by apply(..., mutable=["router"])'
        )
    return experts * ((chosen / rows) * (mass / rows)).sum()


def _routers(tree: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if PROBABILITIES in tree:
        yield tree
        return
    for name in sorted(tree):
        if isinstance(tree[name], Mapping):
            yield from _routers(tree[name])
