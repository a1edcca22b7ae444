"""Weights kept in the small integers they were shipped in."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt

BLOCK = 32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedWeight:
    """A matrix [out, in] in blocks of 32 inputs: value = code * scale (+ minimum).

    `codes` is int8 [out, in], or uint8 [out, in / 2] with two codes a byte: in each
    block of 16 bytes the low halves are inputs 0..15 and the high halves 16..31 (the
    GGUF layout). `scale` and `minimum` are float16 [out, in / 32] and exact.
    """

    codes: Int[Array, "*out columns"] | UInt[Array, "*out half"]
    scale: Float[Array, "*out blocks"]
    minimum: Float[Array, "*out blocks"] | None = None

    @property
    def bits(self) -> int:
        """Bits a code: 8 or 4."""
        return 4 if self.codes.dtype == jnp.uint8 else 8

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix it stands for."""
        return (*self.scale.shape[:-1], self.scale.shape[-1] * BLOCK)

    @property
    def ndim(self) -> int:
        """Axes of the matrix it stands for."""
        return self.scale.ndim

    @property
    def dtype(self):
        """The type its values are exact in."""
        return jnp.dtype(jnp.float32)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        parts = (self.codes, self.scale, self.minimum)
        return sum(p.size * p.dtype.itemsize for p in parts if p is not None)

    def gather(self, rows: Int[Array, "..."]) -> "PackedWeight":
        """Some rows, still packed."""
        return jax.tree.map(lambda part: jnp.take(part, rows, axis=0), self)

    def take(self, rows: Int[Array, "..."], dtype=jnp.float32) -> Float[Array, "..."]:
        """Some rows, dequantised: an embedding lookup."""
        return self.gather(rows).dequantize(dtype)

    def unpacked_codes(self) -> Array:
        """Codes one a cell, [..., in / 32, 32], int8 or (4 bits) uint8."""
        lead = (*self.scale.shape, -1)
        if self.bits == 8:
            return self.codes.reshape(lead)
        halves = self.codes.reshape(lead)
        return jnp.concatenate([halves & 15, halves >> 4], axis=-1)

    def dequantize(self, dtype=jnp.float32) -> Float[Array, "..."]:
        """The matrix [out, in]; float32 arithmetic, cast once at the end."""
        wide = self.unpacked_codes().astype(jnp.float32)
        wide = wide * self.scale.astype(jnp.float32)[..., None]
        if self.minimum is not None:
            wide = wide + self.minimum.astype(jnp.float32)[..., None]
        return wide.reshape(self.shape).astype(dtype)


def dequantize(weight, dtype=jnp.float32):
    """A dense matrix from a packed one; a dense one is only cast."""
    if hasattr(weight, "dequantize"):
        return weight.dequantize(dtype)
    return jnp.asarray(weight, dtype)


def pack_blocks(
    codes: np.ndarray, scale: np.ndarray, minimum: np.ndarray | None, bits: int
) -> PackedWeight:
    """Build from host arrays: codes [out, blocks, 32], scales float16."""
    if bits == 4:
        low, high = codes[..., :16], codes[..., 16:]
        codes = (low | (high << 4)).astype(np.uint8)
    else:
        codes = codes.astype(np.int8)
    return PackedWeight(
        jnp.asarray(codes.reshape(*codes.shape[:-2], -1)),
        jnp.asarray(scale),
        None if minimum is None else jnp.asarray(minimum),
    )
