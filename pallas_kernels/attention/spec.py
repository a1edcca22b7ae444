"""The static part of an attention call."""

import dataclasses

import jax.numpy as jnp

from pallas_kernels.mask import Mask


def wide_dtype(*values):
    """Type of scores, sums and the log-sum-exp: float32, or float64 for float64."""
    return jnp.result_type(jnp.float32, *(value.dtype for value in values))


def wide(x):
    """`x` in at least float32."""
    return x.astype(wide_dtype(x))


def corner(*indices):
    """Slice starts of one integer type, which float64 runs would mix."""
    return tuple(jnp.asarray(index, jnp.int32) for index in indices)


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is fixed when the call is traced; `offset` places query 0 among the keys."""

    mask: Mask
    scale: float
    softcap: float | None = None
    offset: int = 0

    def cap(self, scores):
        """Bound scores by `softcap * tanh(scores / softcap)` where a cap is set."""
        if self.softcap is None:
            return scores
        return self.softcap * jnp.tanh(scores / self.softcap)
