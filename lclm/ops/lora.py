"""Low-rank adapters: a frozen matrix and the small product trained beside it."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from lclm.ops.packed import dequantize
from lclm.typing import Array, Float, Leaf


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoraWeight:
    """W + scale * up down (arXiv 2106.09685): W [out, in] is used, not changed.

    `base` may be dense, packed or int8; `down` is [r, in], `up` [out, r], `scale`
    alpha / r. `lclm.ops.linear` applies the two parts one after the other, so a
    gradient of the whole matrix is never formed.
    """

    base: Any
    down: Leaf
    up: Leaf
    scale: float = field(default=1.0, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix it stands for."""
        return self.base.shape

    @property
    def ndim(self) -> int:
        """Axes of the matrix it stands for."""
        return self.base.ndim

    @property
    def dtype(self):
        """The type of the frozen matrix."""
        return self.base.dtype

    def dequantize(self, dtype: Any = jnp.float32) -> Float[Array, "... out in"]:
        """The merged matrix [out, in]; float32 arithmetic, cast once at the end."""
        wide = dequantize(self.base, jnp.float32)
        change = jnp.einsum(
            "...or,...ri->...oi",
            self.up.astype(jnp.float32),
            self.down.astype(jnp.float32),
            precision="highest",
        )
        return (wide + self.scale * change).astype(dtype)
