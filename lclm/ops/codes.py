"""Cached numbers as small unsigned codes, with a scale and a zero for each group."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lclm.errors import LclmError
from lclm.typing import Array, Leaf

BITS = (2, 4, 8)
GROUP = 32
TILE = 256  # slots decoded at once by `by_tiles`
_LARGEST = float(jnp.finfo(jnp.float16).max)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Codes:
    """Numbers [..., C, H] as codes: value = zero + code * scale (KIVI, 2402.02750).

    codes: uint8 [..., C, H bits / 8]; byte j holds channels j, j + H bits / 8, and so
    on, the first in the lowest bits. scale, zero: float16 [..., C / t, H / h] for
    groups of t slots by h channels. `dtype` is the type of what it stands for.
    """

    codes: Leaf
    scale: Leaf
    zero: Leaf
    bits: int = field(metadata={"static": True})
    group: tuple[int, int] = field(metadata={"static": True})
    dtype: Any = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what it stands for."""
        return (*self.codes.shape[:-1], self.codes.shape[-1] * 8 // self.bits)

    @property
    def ndim(self) -> int:
        """Axes of what it stands for."""
        return self.codes.ndim

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))

    def astype(self, dtype: Any) -> Array:
        """Everything decoded."""
        per_byte, mask = 8 // self.bits, 2**self.bits - 1
        shift = (self.bits * lax.iota(jnp.uint8, per_byte))[:, None]
        codes = (self.codes[..., None, :] >> shift) & jnp.uint8(mask)
        codes = _grouped(codes.reshape(self.shape).astype(jnp.float32), self.group)
        values = codes * _spread(self.scale) + _spread(self.zero)
        return values.reshape(self.shape).astype(dtype)

    def open(self, start: Array | int, size: int, dtype: Any) -> Array:
        """Slots [start, start + size) decoded; whole groups of slots."""
        slots = self.group[0]

        def cut(x: Array, every: int) -> Array:
            at = jnp.asarray(start, jnp.int32) // every
            return lax.dynamic_slice_in_dim(x, at, size // every, x.ndim - 2)

        tile = Codes(
            cut(self.codes, 1),
            cut(self.scale, slots),
            cut(self.zero, slots),
            self.bits,
            self.group,
            self.dtype,
        )
        return tile.astype(dtype)

    def encode(self, x: Array) -> "Codes":
        """Other numbers in the same form."""
        return encode(x, self.bits, self.group, self.dtype)


def check_bits(policy: str, bits: int) -> None:
    """Refuse a width that has no codes."""
    if bits not in (0, *BITS):
        raise LclmError(f"{policy}: bits is {bits}; use 2, 4 or 8, or 0 for no codes")


def channels(size: int, bits: int, group: int = GROUP) -> int:
    """Channels that share a scale in heads of `size`: `group`, or what divides both."""
    if size * bits % 8:
        raise LclmError(
            f"heads of {size} channels do not fill bytes of {bits} bits; use 8 bits"
        )
    return math.gcd(group, size)


def zeros(
    shape: tuple[int, ...], bits: int, group: tuple[int, int], dtype: Any
) -> Codes:
    """Unwritten codes for numbers of `shape`."""
    *lead, slots, size = shape
    scale = jnp.zeros((*lead, slots // group[0], size // group[1]), jnp.float16)
    codes = jnp.zeros((*lead, slots, size * bits // 8), jnp.uint8)
    return Codes(codes, scale, jnp.zeros_like(scale), bits, group, jnp.dtype(dtype))


def encode(
    x: Array, bits: int, group: tuple[int, int] = (1, GROUP), dtype: Any = None
) -> Codes:
    """Codes of x [..., C, H] in groups of (slots, channels) that divide C and H.

    |decoded - x| <= scale / 2 with the scale as stored: the stored zero is rounded
    down and the scale up. Numbers beyond float16 are cut to its range.
    """
    levels = 2**bits - 1
    wide = _grouped(jnp.clip(x.astype(jnp.float32), -_LARGEST, _LARGEST), group)
    low, high = wide.min((-3, -1)), wide.max((-3, -1))
    zero = _half(low, -jnp.inf)
    scale = _half((high - zero.astype(jnp.float32)) / levels, jnp.inf)
    step = _spread(jnp.where(scale > 0, scale, 1))
    codes = jnp.clip(jnp.round((wide - _spread(zero)) / step), 0, levels)
    codes = codes.reshape(x.shape).astype(jnp.uint8)
    per_byte = 8 // bits
    codes = codes.reshape(*x.shape[:-1], per_byte, -1)
    packed = codes[..., 0, :]
    for i in range(1, per_byte):
        packed = packed | (codes[..., i, :] << (bits * i))
    return Codes(packed, scale, zero, bits, group, jnp.dtype(dtype or x.dtype))


def by_tiles(
    rate: Callable[[Array], Array], x: Array | Codes, *, always: bool = False
) -> Array:
    """`rate` of slots, [B, K, c, H] -> [B, K, ..., c], some at a time if coded.

    `always`: an array is also taken a tile at a time (what `rate` makes is large).
    """
    slots = x.shape[2]
    size = min(TILE, slots)
    if size == slots or not (always or isinstance(x, Codes)):
        return rate(x.astype(jnp.float32) if isinstance(x, Codes) else x)

    def tile(start: Array) -> Array:
        if isinstance(x, Codes):
            return x.open(start, size, jnp.float32)
        return lax.dynamic_slice_in_dim(x, start, size, 2)

    def step(n: Array, out: Array) -> Array:
        start = jnp.minimum(n * size, slots - size)
        return lax.dynamic_update_slice_in_dim(
            out, rate(tile(start)), start, out.ndim - 1
        )

    like = jax.eval_shape(lambda: rate(tile(jnp.int32(0))))
    out = jnp.zeros((*like.shape[:-1], slots), like.dtype)
    return lax.fori_loop(0, -(-slots // size), step, out)


def _grouped(x: Array, group: tuple[int, int]) -> Array:
    """[..., C, H] -> [..., C / t, t, H / h, h]."""
    *lead, slots, size = x.shape
    t, h = group
    return x.reshape(*lead, slots // t, t, size // h, h)


def _spread(x: Array) -> Array:
    """What a group shares, over the axes of `_grouped`."""
    return x.astype(jnp.float32)[..., :, None, :, None]


def _half(x: Array, towards: float) -> Array:
    """float16, rounded down (towards -inf) or up (towards inf)."""
    near = x.astype(jnp.float16)
    back = near.astype(jnp.float32)
    short = back > x if towards < 0 else back < x
    return jnp.where(short, jnp.nextafter(near, jnp.float16(towards)), near)
