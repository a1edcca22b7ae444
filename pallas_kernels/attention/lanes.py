"""Loops side by side on a CPU.

XLA runs the elementwise part of a loop's body on one thread, and independent loops of
one program at the same time. A loop over blocks that do not depend on one another is
therefore cut into as many loops as there are cores to run them.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

MOST = 4  # each lane is compiled on its own


@functools.cache
def lanes() -> int:
    """Loops that are worth having side by side; 1 on an accelerator."""
    if jax.default_backend() != "cpu":
        return 1
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(cores, MOST))


def fold(count: int, body: Callable, start: Callable) -> tuple[list, Any]:
    """`carry, y = body(n, carry)` for n = 0 .. count - 1, lane i taking every i-th n.

    `start()` makes the first carry of a lane. Returns the last carries, one a lane,
    and all y in the order of n, stacked on a first axis.
    """
    number = max(1, min(lanes(), count))
    share = -(-count // number)
    shapes = jax.eval_shape(lambda: body(0, start())[1])

    def run(i: int):
        def step(n, state):
            carry, kept = state
            carry, y = body(n * number + i, carry)
            return carry, jax.tree.map(lambda k, x: put(k, x, n, 0), kept, y)

        kept = jax.tree.map(lambda s: jnp.zeros((share, *s.shape), s.dtype), shapes)
        own = (count - i + number - 1) // number
        return lax.fori_loop(0, own, step, (start(), kept))

    put = lax.dynamic_update_index_in_dim
    carries, kept = zip(*(run(i) for i in range(number)), strict=True)
    join = functools.partial(_interleave, count)
    return list(carries), jax.tree.map(lambda *parts: join(parts), *kept)


def _interleave(count: int, parts: tuple) -> jax.Array:
    """Rows 0 .. count - 1 of lanes that hold every i-th each."""
    if len(parts) == 1:
        return parts[0]
    return jnp.stack(parts, 1).reshape(-1, *parts[0].shape[1:])[:count]
