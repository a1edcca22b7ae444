"""Causal depthwise convolution over packed, padded and continued rows."""

import jax
import jax.numpy as jnp
from jax import lax

from lclm.ops.holes import any_holes, taken, tokens_first
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


@jax.custom_vjp
def _conv(x: Array, weight: Array, state: Array, positions: Array):
    """float32 y and the next state; weight [W, C]."""
    if x.shape[1] == 1:
        return _left(x, weight, state, positions)
    return lax.cond(any_holes(positions), _holes, _left, x, weight, state, positions)


def _forward(x: Array, weight: Array, state: Array, positions: Array):
    return _conv(x, weight, state, positions), (x, weight, state, positions)


def _backward(kept, ct):
    x, weight, state, positions = kept

    def pull(form):
        def run(ct):
            parts = (x, weight, state)
            return jax.vjp(lambda *p: form(*p, positions), *parts)[1](ct)

        return run

    grads = lax.cond(any_holes(positions), pull(_holes), pull(_left), ct)
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
    order = tokens_first(positions)
    y, new = _left(taken(x, order), weight, state, taken(positions, order))
    return taken(y, jnp.argsort(order, axis=1)), new
