"""Norms as modules, by the spec that describes them."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from lclm.cache.step import Step
from lclm.errors import LclmError
from lclm.ops.norm import rms_norm
from lclm.ops.precision import wide
from lclm.ops.timestep_norm import NormState, none_seen, timestep_norm
from lclm.specs import LayerNormSpec, NormSpec, TimestepNormSpec
from lclm.typing import Array, Float


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last axis."""

    spec: NormSpec | LayerNormSpec

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        if isinstance(self.spec, LayerNormSpec):
            return self._layer_norm(x)
        eps, offset = self.spec.eps, self.spec.offset
        init = nn.initializers.zeros if offset else nn.initializers.ones
        scale = self.param("scale", init, (x.shape[-1],))
        return rms_norm(x, scale, eps=eps, offset=offset)

    def _layer_norm(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.zeros, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        x32 = wide(x)
        apart = x32 - jnp.mean(x32, -1, keepdims=True)
        unit = apart * lax.rsqrt(jnp.mean(apart**2, -1, keepdims=True) + self.spec.eps)
        return (unit * (1 + wide(scale)) + wide(bias)).astype(x.dtype)


class TimestepNorm(nn.Module):
    """Cumulative group norm over a document, with the state of the text before.

    Without a step x is one document; state None starts from nothing and gives None.
    """

    spec: TimestepNormSpec

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        step: Step | None = None,
        state: NormState | None = None,
    ) -> tuple[Float[Array, "B T D"], NormState | None]:
        B, T, D = x.shape
        groups = self.spec.groups
        if D % groups:
            raise LclmError(
                f"a timestep norm of {groups} groups over {D} features leaves a rest: "
                "use a number of groups that divides the width"
            )
        scale = self.param("scale", nn.initializers.zeros, (D,))
        bias = self.param("bias", nn.initializers.zeros, (D,))
        if step is None:
            positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
        else:
            positions = step.positions
        before = none_seen(B, groups, wide(x).dtype) if state is None else state
        y, after = timestep_norm(
            x, scale, bias, before, positions=positions, eps=self.spec.eps
        )
        return y, None if state is None else after


def final_norm(spec: NormSpec | LayerNormSpec | TimestepNormSpec) -> nn.Module:
    """The norm in front of the output matrix, unattached."""
    if isinstance(spec, TimestepNormSpec):
        return TimestepNorm(spec, name="final_norm")
    return Norm(spec, name="final_norm")


def apply_final_norm(
    spec: NormSpec | LayerNormSpec | TimestepNormSpec,
    x: Float[Array, "B T D"],
    step: Step,
    states: tuple[Any, ...] | None,
) -> tuple[Float[Array, "B T D"], tuple[Any, ...] | None]:
    """The final norm inside a model; its state, where it has one, is the last."""
    norm = final_norm(spec)
    if isinstance(norm, Norm):
        return norm(x), states
    x, state = norm(x, step, None if states is None else states[-1])
    return x, None if states is None else (*states[:-1], state)


def norm_states(
    spec: NormSpec | LayerNormSpec | TimestepNormSpec, batch: int
) -> tuple[Any, ...]:
    """What a final norm carries between calls: one state, or none."""
    if isinstance(spec, TimestepNormSpec):
        return (none_seen(batch, spec.groups),)
    return ()
