"""Next-token loss without the logits: cross-entropy over chunks of tokens."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from lclm import sharding
from lclm.errors import LclmError
from lclm.ops.int8 import Int8Weight
from lclm.typing import Array, Bool, Float, Int


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
    _check(chunk, softcap)
    flat, goals = _pieces(hidden, targets, chunk)
    loss = _nll(flat, table, goals, softcap)
    return loss.reshape(-1)[: targets.size].reshape(targets.shape)


def token_scores(
    hidden: Float[Array, "B T D"],
    table: Float[Array, "V D"] | Int8Weight,
    targets: Int[Array, "B T"],
    *,
    chunk: int = 256,
    softcap: float | None = None,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """`token_nll`, and whether each target is the token that greedy decoding takes.

    Of tokens that are equally likely it takes the first. Raises as `token_nll`.
    """
    _check(chunk, softcap)

    def step(args):
        rows, goals = args
        logits = _logits(rows, table, softcap)
        own = jnp.take_along_axis(logits, goals[:, None], axis=-1, mode="clip")
        nll = jax.nn.logsumexp(logits, axis=-1) - own[:, 0]
        return nll, jnp.argmax(logits, axis=-1) == goals

    found = lax.map(step, _pieces(hidden, targets, chunk))
    nll, greedy = (x.reshape(-1)[: targets.size].reshape(targets.shape) for x in found)
    return nll, greedy


def _pieces(hidden: Array, targets: Array, chunk: int) -> tuple[Array, Array]:
    """Tokens as [n, chunk, D] and their targets [n, chunk], -1 behind the last."""
    count, width = targets.size, hidden.shape[-1]
    chunk = min(chunk, count)
    flat, goals = hidden.reshape(count, width), targets.reshape(count)
    if spare := -count % chunk:
        flat = jnp.pad(flat, ((0, spare), (0, 0)))
        goals = jnp.pad(goals, (0, spare), constant_values=-1)
    return flat.reshape(-1, chunk, width), goals.reshape(-1, chunk)


def weighted_nll(
    hidden: Float[Array, "B T D"],
    table: Float[Array, "V D"] | Int8Weight,
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    chunk: int = 256,
    softcap: float | None = None,
) -> Float[Array, ""]:
    """Sum of weights x `token_nll`, whose gradients are made in the same pass.

    The loss is linear in its cotangent, so gradients for a cotangent of 1 are kept and
    scaled later: logits are computed once, not twice, and none outlive their chunk. The
    table's gradient is only made where it is asked for; weights have none. On a mesh,
    devices that have the same tokens take a share each. Raises as `token_nll`.
    """
    _check(chunk, softcap)
    if isinstance(table, Int8Weight):
        table = table.dequantize(hidden.dtype)
    count, width = targets.size, hidden.shape[-1]
    devices = sharding.axis_size(*sharding.COPIES)
    share = -(-count // devices)
    chunk = min(chunk, share)
    share = -(-share // chunk) * chunk
    spare = share * devices - count
    rows = jnp.pad(hidden.reshape(count, width), ((0, spare), (0, 0)))
    goals = jnp.pad(targets.reshape(count), (0, spare))
    weights = jnp.pad(weights.reshape(count), (0, spare))
    start = sharding.axis_index(*sharding.COPIES) * share
    rows, goals, weights = (
        lax.dynamic_slice_in_dim(x, start, share).reshape(-1, chunk, *x.shape[1:])
        for x in (rows, goals, weights)
    )
    own = _sum(rows, table, goals, lax.stop_gradient(weights), softcap)
    return sharding.total(own, *sharding.COPIES)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _sum(hidden, table, targets, weights, softcap):
    """Weighted sum of the losses of tokens [n, chunk, D]."""
    counted = jnp.where(weights > 0, targets, -1)
    return jnp.sum(_forward(hidden, table, counted, softcap)[0] * weights)


def _sum_forward(hidden, table, targets, weights, softcap):
    """The sum, and its gradients of hidden states and table for a cotangent of 1."""
    wanted = table.perturbed
    hidden, table, targets, weights = (
        x.value for x in (hidden, table, targets, weights)
    )

    def step(sums, args):
        loss, into_table = sums
        rows, goals, weight = args
        logits = _logits(rows, table, softcap)
        top = jnp.max(logits, -1, keepdims=True)
        shares = jnp.exp(logits - top)
        mass = jnp.sum(shares, -1, keepdims=True)
        hit = lax.broadcasted_iota(jnp.int32, logits.shape, 1) == goals[:, None]
        at = goals[:, None]
        own = jnp.take_along_axis(logits, at, axis=-1, mode="fill", fill_value=jnp.nan)
        nll = (top + jnp.log(mass) - own)[:, 0]
        loss += jnp.sum(jnp.where(weight > 0, nll * weight, 0.0))
        slope = weight[:, None] * (shares / mass - hit)
        if softcap is not None:
            slope = slope * (1 - jnp.square(logits / softcap))
        slope = slope.astype(jnp.promote_types(hidden.dtype, table.dtype))
        if wanted:
            into_table += _dot(slope, rows, 0, 0)
        return (loss, into_table), _dot(slope, table, 1, 0).astype(hidden.dtype)

    start = jnp.float32(0.0), jnp.zeros(table.shape if wanted else (), jnp.float32)
    (loss, into_table), into_hidden = lax.scan(step, start, (hidden, targets, weights))
    kept = into_table if wanted else None
    return loss, (into_hidden, kept, jnp.zeros((), table.dtype))


def _sum_backward(softcap, saved, cotangent):
    into_hidden, into_table, like = saved
    if into_table is not None:
        into_table = (cotangent * into_table).astype(like.dtype)
    return (cotangent * into_hidden).astype(into_hidden.dtype), into_table, None, None


_sum.defvjp(_sum_forward, _sum_backward, symbolic_zeros=True)


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


def _check(chunk: int, softcap: float | None) -> None:
    if chunk < 1:
        raise LclmError(f"loss chunk is {chunk}; it must be at least 1 token")
    if softcap is not None and not softcap > 0:
        raise LclmError(f"softcap is {softcap}; it must be > 0, or None for no cap")


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
