"""Causal depthwise convolution over packed, padded and continued rows."""

import jax
import jax.numpy as jnp
from jax import lax

from lclm.ops.precision import wide_dtype
from lclm.typing import Array, Float, Int


def causal_conv(
    x: Float[Array, "B T C"],
    weight: Float[Array, "C 1 W"],
    *,
    bias: Float[Array, " C"] | None,
    positions: Int[Array, "B T"],
    state: Float[Array, "B W-1 C"] | None = None,
) -> tuple[Float[Array, "B T C"], Float[Array, "B W-1 C"] | None]:
    """y_t = bias + sum_k weight[W-1-k] x_{t-k} over the token's own document.

    `positions` are indices in documents, -1 for padding: tap k reads the k-th valid
    token before, and nothing before index 0. `state` holds the last W-1 valid inputs,
    oldest first; the new one comes back where it was given. Products are float32.
    Outputs of padding mean nothing. Inputs only are kept for the backward pass.
    """
    dtype = wide_dtype(x)
    batch, _, channels = x.shape
    taps = weight.shape[-1]
    past = state
    if past is None:
        past = jnp.zeros((batch, taps - 1, channels), dtype)
    y, new = _conv(x, weight[:, 0].T, past, positions)
    if bias is not None:
        y = y + bias.astype(dtype)
    return y.astype(x.dtype), None if state is None else new


def _aligned(positions: Array) -> Array:
    """Whether every row's valid tokens stand together at its left."""
    valid = positions >= 0
    return jnp.all(valid[:, :-1] >= valid[:, 1:])


@jax.custom_vjp
def _conv(x: Array, weight: Array, state: Array, positions: Array):
    """float32 y and the next state; weight [W, C]."""
    if x.shape[1] == 1:
        return _left(x, weight, state, positions)
    return lax.cond(_aligned(positions), _left, _holes, x, weight, state, positions)


def _forward(x: Array, weight: Array, state: Array, positions: Array):
    return _conv(x, weight, state, positions), (x, weight, state, positions)


def _backward(kept, ct):
    x, weight, state, positions = kept

    def pull(form):
        def run(ct):
            parts = (x, weight, state)
            return jax.vjp(lambda *p: form(*p, positions), *parts)[1](ct)

        return run

    grads = lax.cond(_aligned(positions), pull(_left), pull(_holes), ct)
    return *grads, None


_conv.defvjp(_forward, _backward)


def _left(x: Array, weight: Array, state: Array, positions: Array):
    """Rows whose padding is all on the right: taps are plain shifts."""
    dtype = wide_dtype(x)
    taps, tokens = len(weight), x.shape[1]
    weight = weight.astype(dtype)
    row = jnp.concatenate([state.astype(x.dtype), x], 1)
    y = x.astype(dtype) * weight[-1]
    for k in range(1, taps):
        shifted = row[:, taps - 1 - k : taps - 1 - k + tokens].astype(dtype)
        y = y + jnp.where((positions >= k)[..., None], shifted * weight[-1 - k], 0)
    return y, _last(x, state, positions)


def _last(x: Array, state: Array, positions: Array) -> Array:
    """The last W-1 valid inputs of left-aligned rows, zero before their document."""
    size = state.shape[1]
    count = jnp.sum(positions >= 0, 1, dtype=jnp.int32)
    row = jnp.concatenate([state, x.astype(state.dtype)], 1)
    slot = count[:, None] + jnp.arange(size)[None]
    kept = jnp.take_along_axis(row, slot[..., None], 1)
    end = jnp.take_along_axis(positions, jnp.maximum(count - 1, 0)[:, None], 1)
    age = size - 1 - jnp.arange(size)[None]
    fresh = jnp.where((age <= end)[..., None], kept, 0)
    return jnp.where((count > 0)[:, None, None], fresh, state)


def _holes(x: Array, weight: Array, state: Array, positions: Array):
    """Padding anywhere: move valid tokens to the left, and results back."""
    order = jnp.argsort(positions < 0, axis=1, stable=True)
    back = jnp.argsort(order, axis=1)
    moved = jnp.take_along_axis(x, order[..., None], 1)
    at = jnp.take_along_axis(positions, order, 1)
    y, new = _left(moved, weight, state, at)
    return jnp.take_along_axis(y, back[..., None], 1), new
