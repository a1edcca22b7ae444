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

from lclm import sharding
from lclm.errors import LclmError
from lclm.ops.linear import linear
from lclm.ops.packed import dequantize
from lclm.ops.precision import wide_dtype
from lclm.typing import Array, Bool, Float, Int, Leaf

LARGEST_BLOCK = 128
PROBABILITIES, CHOICE = "probabilities", "choice"
COLLECTION = "router"  # where the module sows them
AXIS = "expert"

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
    logits = linear(x.astype(wide_dtype(x)), router)
    probabilities = jax.nn.softmax(logits, axis=-1)
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
    """The chosen experts alone, by sorted pairs; the same values as `dense`.

    Where devices have a part of the experts each, every one computes its own for all
    tokens, and the results are summed.
    """
    out = lax.platform_dependent(
        x,
        _own(to, experts.gate.shape[0]),
        experts,
        cpu=functools.partial(_by_blocks, act=act),
        default=functools.partial(_by_ragged_dot, act=act),
    )
    return sharding.total(out, AXIS)


def _own(to: Route, count: int) -> Route:
    """The route to this device's `count` experts; others are `count`, of no weight."""
    if count == to.probabilities.shape[-1]:
        return to
    choice = to.choice - sharding.axis_index(AXIS) * count
    here = (choice >= 0) & (choice < count)
    weights = jnp.where(here, to.weights, 0)
    return Route(weights, jnp.where(here, choice, count), to.probabilities)


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
    here = jnp.arange(len(rows)) < sizes.sum()  # pairs of other devices come last
    pairs = jnp.where(here[:, None], product(hidden, experts.down), 0)
    return _combine(pairs[jnp.argsort(order)], to)


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
    """Lay pairs out by expert; the static shape is (blocks at most, rows a block).

    Pairs of expert number `experts` are another device's: laid last, not in use.
    """
    pairs = choice.shape[0]
    rows = _block_rows(pairs, experts)
    most = pairs // rows + min(experts + 1, pairs)
    order = jnp.argsort(choice).astype(jnp.int32)
    sizes = jnp.bincount(choice, length=experts + 1).astype(jnp.int32)
    ends = jnp.cumsum(-(-sizes // rows))
    first = (ends - -(-sizes // rows)) * rows - (jnp.cumsum(sizes) - sizes)
    place = first[choice[order]] + jnp.arange(pairs, dtype=jnp.int32)
    pair = jnp.full(most * rows, pairs, jnp.int32).at[place].set(order)
    owner = jnp.searchsorted(ends, jnp.arange(most), side="right")
    owner = jnp.minimum(owner, experts - 1)
    place = jnp.zeros(pairs, jnp.int32).at[order].set(place)
    return _Blocks(pair, place, owner, ends[experts - 1]), (most, rows)


def _by_blocks(x: Array, to: Route, experts: Experts, *, act: Act) -> Array:
    top = to.choice.shape[1]
    blocks, shape = _blocks(to.choice.reshape(-1), experts.gate.shape[0])
    rows = _scatter(x, blocks, top).reshape(*shape, x.shape[1])
    out = _feed_forward(rows, experts, blocks, act)
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _feed_forward(x: Array, experts: Experts, blocks: _Blocks, act: Act) -> Array:
    """Each block in use [m, D] through its owner; the rest stay zero."""

    def body(i: Array, y: Array) -> Array:
        return y.at[i].set(_one(x[i], _owner(experts, blocks.owner[i]), act))

    return lax.fori_loop(0, blocks.count, body, jnp.zeros_like(x))


def _feed_forward_bwd(act: Act, kept: tuple[Array, Experts, _Blocks], g: Array):
    """Hidden units are computed again block by block, so none are kept."""
    x, experts, blocks = kept

    def body(i: Array, sums: tuple[Array, Experts]) -> tuple[Array, Experts]:
        dx, stacks = sums
        owner = blocks.owner[i]
        _, back = jax.vjp(
            functools.partial(_one, act=act), x[i], _owner(experts, owner)
        )
        rows, parts = back(g[i])
        add = functools.partial(_add_to, owner)
        return dx.at[i].set(rows), jax.tree.map(add, stacks, parts)

    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, wide_dtype(w)), experts)
    dx, sums = lax.fori_loop(0, blocks.count, body, (jnp.zeros_like(x), zeros))
    return dx, jax.tree.map(lambda s, w: s.astype(w.dtype), sums, experts), None


_feed_forward.defvjp(
    lambda x, experts, blocks, act: (
        _feed_forward(x, experts, blocks, act),
        (x, experts, blocks),
    ),
    _feed_forward_bwd,
)


def _one(x: Float[Array, "M D"], expert: Experts, act: Act) -> Float[Array, "M D"]:
    hidden = act(linear(x, expert.gate)) * linear(x, expert.up)
    return linear(hidden, expert.down)


def _owner(experts: Experts, index: Array) -> Experts:
    """The matrices of one expert, packed ones included."""
    return jax.tree.map(
        lambda part: lax.dynamic_index_in_dim(part, index, 0, False), experts
    )


def _add_to(index: Array, total: Array, part: Array) -> Array:
    return total.at[index].add(part.astype(total.dtype))


def aux_loss(
    router: Mapping[str, Any], valid: Bool[Array, "B T"] | None = None
) -> Float[Array, ""]:
    """Load balance of all layers together: E sum_e f_e P_e (arXiv 2101.03961 eq. 4-6).

    `router` is the collection of that name that `Decoder.apply(..., mutable="router")`
    returns, scanned or not. f_e is the share of tokens that chose e (all f sum to
    `top`), P_e the mean probability; tokens that are not `valid` do not count, those of
    all devices do. Even routing gives `top`. Raises `LclmError` where no layer has a
    router.
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
    chosen, mass, rows = sharding.total((chosen, mass, rows), *sharding.TOKENS)
    return experts * ((chosen / rows) * (mass / rows)).sum()


def _routers(tree: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if PROBABILITIES in tree:
        yield tree
        return
    for name in sorted(tree):
        if isinstance(tree[name], Mapping):
            yield from _routers(tree[name])
