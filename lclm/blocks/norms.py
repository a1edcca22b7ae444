"""Norms as modules, by the spec that describes them."""

from typing import Any

import flax.linen as nn

from lclm.config import NormSpec
from lclm.ops.norm import rms_norm
from lclm.specs import TimestepNormSpec
from lclm.typing import Array, Float


class Norm(nn.Module):
    """RMSNorm over the last axis."""

    spec: NormSpec

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        eps, offset = self.spec.eps, self.spec.offset
        init = nn.initializers.zeros if offset else nn.initializers.ones
        scale = self.param("scale", init, (x.shape[-1],))
        return rms_norm(x, scale, eps=eps, offset=offset)


def norm_states(spec: NormSpec | TimestepNormSpec, batch: int) -> tuple[Any, ...]:
    """What a final norm carries between calls: one state, or none."""
    return ()
