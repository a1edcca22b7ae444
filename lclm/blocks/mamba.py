"""Mamba-1 mixer: a gated selective state space behind a short convolution.

Source: arXiv 2312.00752, figure 3 and algorithm 2; with `inner_norms` the form of
Jamba (arXiv 2403.19887).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lclm.blocks.attention import project
from lclm.blocks.norms import Norm
from lclm.cache.base import CachePolicy
from lclm.cache.step import Step
from lclm.config import NormSpec
from lclm.errors import LclmError
from lclm.ops.conv import causal_conv
from lclm.ops.handover import scan_in_parts, tail_before
from lclm.ops.linear import linear
from lclm.ops.precision import wide_dtype
from lclm.ops.scan import selective_scan, surviving
from lclm.specs import MambaSpec
from lclm.typing import Array, Float

# Step sizes begin log-uniform in this range (arXiv 2312.00752, section 3.6).
FIRST_STEPS = (0.001, 0.1)
State = dict[str, Array]


def uniform(bound: float) -> Callable[..., Array]:
    """Initial values between -bound and bound."""

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def first_steps(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Biases whose softplus is log-uniform in `FIRST_STEPS`."""
    low, high = (math.log(s) for s in FIRST_STEPS)
    steps = jnp.exp(jax.random.uniform(key, shape, dtype, low, high))
    return steps + jnp.log(-jnp.expm1(-steps))


def first_decays(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """log(1), log(2), ... for the states of every channel (S4D-real)."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[1] + 1, dtype=dtype)), shape)


def check_state(state: State, fresh: State) -> None:
    """Refuse a state of other rows or another layer than `fresh`, this call's own."""
    for name, leaf in fresh.items():
        if name not in state or state[name].shape != leaf.shape:
            found = state[name].shape if name in state else "missing"
            raise LclmError(
                f"recurrent state {name!r} is {found}; this call of {len(leaf)} rows "
                f"needs {leaf.shape}: start from init_state for as many rows, or take "
                "the state's rows first"
            )


class Conv(nn.Module):
    """Depthwise causal convolution, weights [C, 1, W] as Hugging Face has them."""

    taps: int
    bias: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T C"], step: Step, state: Array | None
    ) -> tuple[Float[Array, "B T C"], Array | None]:
        init = uniform(self.taps**-0.5)
        weight = self.param("weight", init, (x.shape[-1], 1, self.taps))
        bias = self.param("bias", init, (x.shape[-1],)) if self.bias else None
        if state is None:
            state = tail_before(x, self.taps - 1, step.context)
        return causal_conv(x, weight, bias=bias, positions=step.positions, state=state)


class StepSize(nn.Module):
    """The low-rank step size's way up to every channel."""

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "B T R"]) -> Float[Array, "B T C"]:
        bias = self.param("bias", first_steps, (self.features,))
        if self.has_variable("params", "weight"):
            weight = self.get_variable("params", "weight")
        else:
            rank = x.shape[-1]
            weight = self.param("weight", uniform(rank**-0.5), (self.features, rank))
        return linear(x, weight, bias)


class Mamba(nn.Module):
    """The Mamba-1 mixer of one layer; its state has one size at any length."""

    spec: MambaSpec
    width: int
    norm: NormSpec
    index: int = 0
    policy: CachePolicy | None = None

    @staticmethod
    def init_state(spec: MambaSpec, width: int, batch: int, dtype: Any) -> State:
        """Zero states: the last inputs of the convolution, and h [B, N, C]."""
        wide = jnp.promote_types(dtype, jnp.float32)
        return {
            "conv": jnp.zeros((batch, spec.conv - 1, spec.inner), wide),
            "scan": jnp.zeros((batch, spec.state, spec.inner), wide),
        }

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], step: Step, state: State | None = None
    ) -> tuple[Float[Array, "B T D"], State | None]:
        spec = self.spec
        if state is not None:
            check_state(state, self.init_state(spec, self.width, len(x), x.dtype))
        both = project(self, "in", x, 2 * spec.inner, bias=spec.proj_bias)
        u, gate = jnp.split(both, 2, -1)
        conv = Conv(spec.conv, spec.conv_bias, name="conv")
        u, tail = conv(u, step, state["conv"] if state else None)
        u = jax.nn.silu(u)
        raw, b, c = self._select(u)
        a_log = self.param("a_log", first_decays, (spec.inner, spec.state))
        skip = self.param("d", nn.initializers.ones, (spec.inner,))
        a = -jnp.exp(a_log.astype(wide_dtype(u)).T)
        told = dict(a=a, b=b, c=c, positions=step.positions)
        y, h = scan_in_parts(
            functools.partial(selective_scan, u, raw, **told),
            state["scan"] if state else None,
            lambda: surviving(raw, a, step.positions),
            step.context,
        )
        y = (y + skip.astype(y.dtype) * u) * jax.nn.silu(gate.astype(y.dtype))
        out = project(self, "out", y.astype(x.dtype), self.width, bias=spec.proj_bias)
        return out, {"conv": tail, "scan": h} if state else None

    def _select(self, u: Array) -> tuple[Array, Array, Array]:
        """Step sizes before softplus [B, T, C], and B and C [B, T, N]."""
        spec = self.spec
        sizes = spec.rank, spec.state, spec.state
        made = project(self, "x", u, sum(sizes), bias=False)
        parts = jnp.split(made, (spec.rank, spec.rank + spec.state), -1)
        if spec.inner_norms:
            norm = NormSpec(spec.norm_eps)
            parts = [
                Norm(norm, name=f"{name}_norm")(part)
                for name, part in zip(("dt", "b", "c"), parts, strict=True)
            ]
        raw, b, c = parts
        return StepSize(spec.inner, name="dt")(raw), b, c
