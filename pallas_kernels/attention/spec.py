"""The static part of an attention call."""

import dataclasses

import jax.numpy as jnp

from pallas_kernels.mask import Mask


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
