"""Gated feed-forward."""

import flax.linen as nn
import jax

from lclm.blocks.attention import project
from lclm.config import MlpSpec
from lclm.ops.precision import wide
from lclm.typing import Array, Float


def activate(x: Array, name: str) -> Array:
    """The gate's non-linearity, computed in float32."""
    x32 = wide(x)
    if name == "silu":
        y = jax.nn.silu(x32)
    else:
        y = jax.nn.gelu(x32, approximate=name == "gelu_tanh")
    return y.astype(x.dtype)


class Mlp(nn.Module):
    """down(act(gate(x)) * up(x)) (arXiv 2002.05202, SwiGLU / GEGLU)."""

    spec: MlpSpec

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        spec = self.spec
        gate = project(self, "gate", x, spec.width, bias=spec.bias)
        up = project(self, "up", x, spec.width, bias=spec.bias)
        hidden = activate(gate, spec.activation) * up
        bias, joins = spec.bias, "tensor"
        return project(self, "down", hidden, x.shape[-1], bias=bias, joins=joins)
