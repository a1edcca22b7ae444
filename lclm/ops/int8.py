"""Matrices held as int8 rows, multiplied as integers on a CPU.

A CPU core multiplies int8 about four times as fast as bfloat16 and reads half the
bytes, so this is the fast form of decoding there. Weights lose precision once, when
they are rounded (about 1% of a weight at random, well below what a 4-bit file already
lost); activations keep 15 bits, as two int8 digits that ride in one product.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lclm.errors import unknown
from lclm.typing import Array, Float, Int, Params

DIGIT = 128  # base of the two digits of an activation
LARGEST = 127
FORMS = ("int8",)
MATRICES = ("weight", "table")
STACKS = "experts"  # their matrices are stacked: [experts, out, in]
EXACT = "router"  # small, and a wrong choice costs more than a wrong digit


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8Weight:
    """A matrix [out, in] as int8 codes and one float32 scale a row."""

    codes: Int[Array, "*lead out in"]
    scale: Float[Array, "*lead out"]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix it stands for."""
        return self.codes.shape

    @property
    def ndim(self) -> int:
        """Axes of the matrix it stands for."""
        return self.codes.ndim

    @property
    def dtype(self):
        """The type its values are exact in."""
        return jnp.dtype(jnp.float32)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.codes.nbytes + self.scale.nbytes

    def take(self, rows: Int[Array, "..."], dtype=jnp.float32) -> Float[Array, "..."]:
        """Some rows, dequantised: an embedding lookup."""
        return Int8Weight(self.codes[rows], self.scale[rows]).dequantize(dtype)

    def dequantize(self, dtype=jnp.float32) -> Float[Array, "..."]:
        """The matrix [out, in]; float32 arithmetic, cast once at the end."""
        return (self.codes.astype(jnp.float32) * self.scale[..., None]).astype(dtype)

    def product(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        """float32 x W^T, differentiable in x."""
        return _product(x, self.codes) * self.scale


def quantize(weight: np.ndarray | Array) -> Int8Weight:
    """Round each row to 127 steps either side of zero of its largest value."""
    wide = np.asarray(weight, np.float32)
    scale = np.abs(wide).max(-1) / LARGEST
    steps = wide / np.where(scale > 0, scale, 1)[..., None]
    return Int8Weight(jnp.asarray(np.rint(steps).astype(np.int8)), jnp.asarray(scale))


def quantize_params(params: Params, form: str) -> Params:
    """Every matrix of a parameter tree in the form `form`; the rest as it is.

    Works leaf by leaf and empties `params` on the way, so both copies never exist.
    Raises LclmError for a form other than "int8".
    """
    if form not in FORMS:
        raise unknown("weight form", form, FORMS)
    out = {}
    for name in list(params):
        leaf = params.pop(name)
        if name == EXACT:
            out[name] = leaf
        elif name == STACKS:
            out[name] = {k: quantize(leaf.pop(k)) for k in list(leaf)}
        elif isinstance(leaf, dict):
            out[name] = quantize_params(leaf, form)
        elif name in MATRICES and leaf.ndim == 2:
            out[name] = quantize(leaf)
        else:
            out[name] = leaf
    return out


@jax.custom_vjp
def _product(x: Array, codes: Array) -> Array:
    return lax.platform_dependent(x, codes, cpu=_by_digits, default=_by_floats)


def _product_back(kept: tuple[Array, Array], g: Array) -> tuple[Array, None]:
    """Rounding of digits passed straight through."""
    x, codes = kept
    return jnp.matmul(g, codes.astype(g.dtype)).astype(x.dtype), None


_product.defvjp(lambda x, codes: (_product(x, codes), (x, codes)), _product_back)


def _by_digits(x: Array, codes: Array) -> Array:
    """Integers all through: x as high and low digits, twice the rows in one product."""
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    unit = jnp.max(jnp.abs(rows), -1, keepdims=True) / (DIGIT * (LARGEST - 0.5))
    steps = rows / jnp.where(unit > 0, unit, 1.0)
    high = jnp.round(steps / DIGIT)
    digits = jnp.concatenate([high, jnp.round(steps - DIGIT * high)]).astype(jnp.int8)
    sums = lax.dot_general(
        digits, codes, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
    ).astype(jnp.float32)
    high, low = jnp.split(sums, 2)
    return ((high * DIGIT + low) * unit).reshape(*x.shape[:-1], -1)


def _by_floats(x: Array, codes: Array) -> Array:
    """Codes cast as they are read, where products of activations' type are fast."""
    axes = (((x.ndim - 1,), (1,)), ((), ()))
    return lax.dot_general(
        x, codes.astype(x.dtype), axes, preferred_element_type=jnp.float32
    )
