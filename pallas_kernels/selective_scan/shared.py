"""What the scan's kernels of every platform share."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import dispatch


def refuses(
    x_shape: tuple[int, ...], states: int, dtype: Any, channels: int, of: Sequence[int]
) -> str | None:
    """Why a scan over `x` [B, T, C] with `states` states is refused, or None.

    channels: what C must be a multiple of; of: the numbers of states that are known.
    """
    if x_shape[2] % channels:
        return f"{x_shape[2]} channels are no multiple of {channels}"
    if states not in of:
        return f"{states} states are none of {of}"
    if jnp.dtype(dtype) != jnp.float32:
        return f"dtype {jnp.dtype(dtype)} is not float32"
    return dispatch.outside_shard_map()


def operation(forward: Callable, backward: Callable) -> Callable:
    """A differentiable scan from the runs of its two kernels.

    `forward(interpret, sizes, *arguments, saves=)` gives y, the last state and, with
    `saves`, those before every block; `backward(interpret, sizes, x, dt, a, b, c, keep,
    states, dy, dstate)` the gradients of x, dt, a, b, c and the first state.
    """

    def scan(interpret, sizes, x, dt, a, b, c, state, keep):
        """y [B, T, C] and the state [B, N, C] behind the last token.

        `x`, `dt` >= 0 [B, T, C]; `a` < 0 [N, C]; `b`, `c` [B, T, N]; `keep` [B, T] is 0
        where the state before a token is forgotten, 1 elsewhere. All float32. `sizes`
        are `tuning`'s. Differentiable in all but `keep`; the same inputs give the same
        bits.
        """
        given = x, dt, a, b, c, state, keep
        y, end, _ = forward(interpret, sizes, *given, saves=False)
        return y, end

    def save(interpret, sizes, x, dt, a, b, c, state, keep):
        given = x, dt, a, b, c, state, keep
        y, end, starts = forward(interpret, sizes, *given, saves=True)
        y = checkpoint_name(y, "scan_out")
        starts = checkpoint_name(starts, "scan_states")
        return (y, end), (x, dt, a, b, c, keep, starts)

    def apply(interpret, sizes, saved, cotangents):
        return (*backward(interpret, sizes, *saved, *cotangents), None)

    scan = jax.custom_vjp(scan, nondiff_argnums=(0, 1))
    scan.defvjp(save, apply)
    return scan


def in_parts(
    forward: Callable, backward: Callable, count: Callable
) -> tuple[Callable, Callable]:
    """The runs of `operation` over rows that are cut into parts, each a row of its own.

    For rows too few to fill a chip: `count(sizes, x.shape)` says into how many, 1 for
    none. A state is linear in the one before it, end = through * start + own, so each
    part is run from nothing, then from where the parts before it end; gradients of
    states go the same way back. Twice the work, on `count` times as many programs.
    """

    def run_forward(interpret, sizes, x, dt, a, b, c, state, keep, *, saves):
        parts = count(sizes, x.shape)
        if parts == 1:
            given = x, dt, a, b, c, state, keep
            return forward(interpret, sizes, *given, saves=saves)
        T = x.shape[1]
        given, through = _cut(parts, x, dt, a, b, c, keep)
        *rest, keep = given
        _, own, _ = forward(
            interpret, sizes, *rest, jnp.zeros_like(through), keep, saves=False
        )
        starts, end = _taken_up(parts, own, through, state)
        y, _, saved = forward(interpret, sizes, *rest, starts, keep, saves=saves)
        return _joined(parts, T, y), end, saved

    def run_backward(interpret, sizes, x, dt, a, b, c, keep, starts, dy, dend):
        parts = count(sizes, x.shape)
        if parts == 1:
            given = x, dt, a, b, c, keep, starts, dy, dend
            return backward(interpret, sizes, *given)
        T = x.shape[1]
        given, through = _cut(parts, x, dt, a, b, c, keep)
        given = *given, starts, _rows(parts, dy)
        *_, own = backward(interpret, sizes, *given, jnp.zeros_like(through))
        dends, dstate = _taken_up(parts, own, through, dend, reverse=True)
        dx, ddt, da, db, dc, _ = backward(interpret, sizes, *given, dends)
        dx, ddt, db, dc = (_joined(parts, T, g) for g in (dx, ddt, db, dc))
        return dx, ddt, da, db, dc, dstate

    return run_forward, run_backward


def _rows(parts: int, x, fill=0):
    """[B, T, ...] as [B * parts, T / parts, ...]; tokens behind the last are `fill`."""
    B, T = x.shape[:2]
    pads = ((0, 0), (0, -T % parts), *((0, 0),) * (x.ndim - 2))
    return jnp.pad(x, pads, constant_values=fill).reshape(B * parts, -1, *x.shape[2:])


def _joined(parts: int, tokens: int, x):
    """`_rows` undone."""
    return x.reshape(x.shape[0] // parts, -1, *x.shape[2:])[:, :tokens]


def _cut(parts: int, x, dt, a, b, c, keep):
    """The arguments by parts, and what each leaves of a state before it [., N, C]."""
    x, dt, b, c = (_rows(parts, given) for given in (x, dt, b, c))
    keep = _rows(parts, keep, 1)
    through = jnp.exp(a * dt.sum(1)[:, None]) * keep.min(1)[:, None, None]
    return (x, dt, a, b, c, keep), through


def _taken_up(parts: int, own, through, first, reverse: bool = False):
    """States in front of all parts in turn [B * parts, N, C], and behind the last."""
    shape = -1, parts, *own.shape[1:]
    own, through = (x.reshape(shape).swapaxes(0, 1) for x in (own, through))

    def add(state, part):
        own, through = part
        return through * state + own, state

    last, states = lax.scan(add, first, (own, through), reverse=reverse)
    return states.swapaxes(0, 1).reshape(-1, *own.shape[2:]), last


def walk(count: int, step: Callable, carry, *, together: int):
    """`step(t, carry)` for t = 0, ..., count - 1, `together` of them a loop body."""

    def some(i, carry):
        for t in range(together):
            carry = step(i * together + t, carry)
        return carry

    return lax.fori_loop(0, count // together, some, carry)
