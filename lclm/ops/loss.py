"""Next-token loss without the logits: cross-entropy over chunks of tokens."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lclm import sharding
from lclm.errors import LclmError
from lclm.ops.int8 import Int8Weight
from lclm.typing import Array, Float, Int


def token_nll(
    hidden: Float[Array, "B T D"],
    table: Float[Array, "V D"] | Int8Weight,
    targets: Int[Array, "B T"],
    *,
    chunk: int = 256,
    softcap: float | None = None,
) -> Float[Array, "B T"]:
    """Negative log-likelihood of `targets` in nats under softmax(hidden x table^T).

    Only `chunk` x V logits exist at a time, forward and backward (the backward pass
    recomputes them from the saved log-sum-exp, as in arXiv 2411.09009). Products take
    operands as they come and accumulate in float32; the table's gradient is summed in
    float32. A negative target is ignored: loss and gradient 0; one >= V gives NaN.
    `softcap` bounds logits to +-softcap by tanh (arXiv 2408.00118). Raises LclmError
    for a chunk < 1 or a softcap <= 0.
    """
    if chunk < 1:
        raise LclmError(f"loss chunk is {chunk}; it must be at least 1 token")
    if softcap is not None and not softcap > 0:
        raise LclmError(f"softcap is {softcap}; it must be > 0, or None for no cap")
    batch, time, width = hidden.shape
    count = batch * time
    chunk = min(chunk, count)
    spare = -count % chunk
    flat, goals = hidden.reshape(count, width), targets.reshape(count)
    if spare:
        flat = jnp.pad(flat, ((0, spare), (0, 0)))
        goals = jnp.pad(goals, (0, spare), constant_values=-1)
    flat = flat.reshape(-1, chunk, width)
    loss = _nll(flat, table, goals.reshape(-1, chunk), softcap)
    return loss.reshape(-1)[:count].reshape(batch, time)


def shared_token_nll(
    hidden: Float[Array, "B T D"],
    table: Float[Array, "V D"] | Int8Weight,
    targets: Int[Array, "B T"],
    **options: Any,
) -> Float[Array, "B T"]:
    """`token_nll` by devices that have the same tokens: each a share, then summed."""
    devices = sharding.axis_size(*sharding.COPIES)
    if devices == 1:
        return token_nll(hidden, table, targets, **options)
    count, width = targets.size, hidden.shape[-1]
    share = -(-count // devices)
    spare = share * devices - count
    rows = jnp.pad(hidden.reshape(count, width), ((0, spare), (0, 0)))
    goals = jnp.pad(targets.reshape(count), (0, spare), constant_values=-1)
    start = sharding.axis_index(*sharding.COPIES) * share
    rows = lax.dynamic_slice_in_dim(rows, start, share)
    goals = lax.dynamic_slice_in_dim(goals, start, share)
    own = token_nll(rows[None], table, goals[None], **options)[0]
    every = lax.dynamic_update_slice_in_dim(
        jnp.zeros(share * devices, own.dtype), own, start, 0
    )
    every = sharding.total(every, *sharding.COPIES)
    return every[:count].reshape(targets.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _nll(hidden, table, targets, softcap):
    """Losses [n, chunk] of tokens [n, chunk, D]."""
    return _forward(hidden, table, targets, softcap)[0]


def _forward(hidden, table, targets, softcap):
    def step(args):
        rows, goals = args
        logits = _logits(rows, table, softcap)
        lse = jax.nn.logsumexp(logits, axis=-1)
        at = jnp.maximum(goals, 0)[:, None]
        hit = jnp.take_along_axis(logits, at, axis=-1, mode="fill", fill_value=jnp.nan)
        return jnp.where(goals >= 0, lse - hit[:, 0], 0.0), lse

    loss, lse = lax.map(step, (hidden, targets))
    return loss, (hidden, table, targets, lse)


def _backward(softcap, saved, cotangent):
    hidden, table, targets, lse = saved
    operand = jnp.promote_types(hidden.dtype, table.dtype)

    def step(total, args):
        rows, goals, normaliser, weight = args
        logits = _logits(rows, table, softcap)
        weight = jnp.where(goals >= 0, weight, 0.0)[:, None]
        hit = lax.broadcasted_iota(jnp.int32, logits.shape, 1) == goals[:, None]
        slope = weight * (jnp.exp(logits - normaliser[:, None]) - hit)
        if softcap is not None:
            slope = slope * (1 - jnp.square(logits / softcap))
        slope = slope.astype(operand)
        into_rows = _dot(slope, table, 1, 0).astype(hidden.dtype)
        return total + _dot(slope, rows, 0, 0), into_rows

    start = jnp.zeros(table.shape, jnp.float32)
    total, into_hidden = lax.scan(step, start, (hidden, targets, lse, cotangent))
    return into_hidden, total.astype(table.dtype), None


_nll.defvjp(_forward, _backward)


def _logits(rows: Array, table: Array | Int8Weight, softcap: float | None) -> Array:
    if isinstance(table, Int8Weight):
        logits = table.product(rows)
    else:
        logits = _dot(rows, table, 1, 1)
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def _dot(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    """Contract one axis of two matrices, accumulating in float32."""
    operand = jnp.promote_types(left.dtype, right.dtype)
    return lax.dot_general(
        left.astype(operand),
        right.astype(operand),
        (((left_axis,), (right_axis,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
