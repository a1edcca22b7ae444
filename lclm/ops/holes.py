"""Padding that stands before tokens: moved behind them, and results moved back."""

import jax.numpy as jnp

from lclm.typing import Array, Bool, Int


def any_holes(positions: Int[Array, "B T"]) -> Bool[Array, ""]:
    """Whether padding (-1) stands before a token of its row."""
    valid = positions >= 0
    return jnp.any(valid[:, 1:] & ~valid[:, :-1])


def tokens_first(positions: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The order that puts padding behind the tokens; its argsort undoes it."""
    return jnp.argsort(positions < 0, axis=1, stable=True)


def taken(x: Array, order: Int[Array, "B T"]) -> Array:
    """x [B, T, ...] in `order`."""
    return jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), 1)
