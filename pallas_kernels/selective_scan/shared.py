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


def walk(count: int, step: Callable, carry, *, together: int):
    """`step(t, carry)` for t = 0, ..., count - 1, `together` of them a loop body."""

    def some(i, carry):
        for t in range(together):
            carry = step(i * together + t, carry)
        return carry

    return lax.fori_loop(0, count // together, some, carry)
