"""Recurrent layers over rows whose tokens are spread over devices, in order.

Code of one device inside `jax.shard_map`: device p of P along `sharding.SEQUENCE` has
the p-th part of every row. A state that is linear in the state before it,

    end = through * start + own,

needs one exchange: every device finds `own` (its end from an empty start) and
`through`, all tell all, and each takes the states up in order. Outside a mesh, or where
rows are whole, every start is empty.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from lclm import sharding
from lclm.typing import Array, Float, Int

Scan = Callable[..., tuple[Array, Array]]


def parts(context: Any) -> int:
    """Devices that share a row, 1 where this code holds whole rows."""
    return 1 if context is None or not sharding.inside() else context.devices


def scan_in_parts(
    run: Scan, start: Array | None, through: Callable[[], Array], context: Any
) -> tuple[Array, Array]:
    """Outputs of a linear scan over this device's part of each row, and its end.

    run: `(outputs, end)` by `state=`, None for an empty one. start: the state to begin
    with where rows are whole. through: what is left behind this part of a state before
    it, of a shape that multiplies one. Where rows are shared the scan runs twice: for
    its end, then from its true start.
    """
    if start is not None or parts(context) == 1:
        return run(state=start)
    _, own = run(state=None)
    return run(state=start_of(own, through()))


def start_of(own: Array, through: Array) -> Array:
    """The state in front of this device's part; `own` and `through` as above."""
    all_own, all_through = (
        lax.all_gather(x, sharding.SEQUENCE) for x in (own, through)
    )

    def add(start: Array, part: tuple[Array, Array]) -> tuple[Array, Array]:
        own, through = part
        return through * start + own, start

    _, starts = lax.scan(add, jnp.zeros_like(own), (all_own, all_through))
    here = sharding.axis_index(*sharding.SEQUENCE)
    return lax.dynamic_index_in_dim(starts, here, keepdims=False)


def unbroken(positions: Int[Array, "B T"]) -> Array:
    """bool [B]: no document starts in this part, so a state before it is not lost."""
    return jnp.all(positions != 0, axis=1)


def tail_before(
    x: Float[Array, "B T C"], count: int, context: Any
) -> Float[Array, "B W C"] | None:
    """The last `count` inputs of the part before, zeros on the first device.

    None where rows are whole. A part has at least `count` tokens (`make_layout`).
    """
    size = parts(context)
    if size == 1:
        return None
    hops = [(p, p + 1) for p in range(size - 1)]
    return lax.ppermute(x[:, x.shape[1] - count :], sharding.SEQUENCE, hops)
