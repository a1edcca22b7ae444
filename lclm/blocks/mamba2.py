"""Mamba-2 (arXiv 2405.21060): one function for training, prefill and decoding."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lclm.blocks.attention import project
from lclm.cache.base import CachePolicy
from lclm.cache.step import Step
from lclm.config import NormSpec
from lclm.ops.conv import causal_conv
from lclm.ops.handover import scan_in_parts, tail_before
from lclm.ops.precision import wide_dtype
from lclm.ops.ssd import gated_norm, ssd, surviving
from lclm.specs import Mamba2Spec
from lclm.typing import Array, Float

STEP_RANGE = (1e-3, 1e-1)  # step sizes at the start of training
DECAY_RANGE = (1.0, 16.0)  # -a at the start of training

State = dict[str, Array]


class Mamba2(nn.Module):
    """The Mamba-2 mixer of one layer.

    `in` gives gate | x | B | C | step size; a short convolution and silu act on
    x | B | C; the scan's output is gated, normalised by group and projected. `norm`,
    `index` and `policy` are there because every mixer has them.
    """

    spec: Mamba2Spec
    width: int
    norm: NormSpec | None = None
    index: int = 0
    policy: CachePolicy | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], step: Step, state: State | None = None
    ) -> tuple[Float[Array, "B T D"], State | None]:
        spec = self.spec
        sizes = (spec.inner, conv_channels(spec), spec.heads)
        mixed = project(self, "in", x, sum(sizes), bias=spec.proj_bias)
        gate, mixed, delta = jnp.split(mixed, (sizes[0], sum(sizes[:2])), -1)
        mixed, conv = Conv(spec, name="conv")(mixed, step, state)
        y, scanned = self._scan(mixed, delta, step, state)
        y = GatedNorm(spec, name="norm")(y, gate)
        y = project(self, "out", y, self.width, bias=spec.proj_bias)
        return y, None if state is None else {"conv": conv, "ssm": scanned}

    def _scan(
        self, mixed: Array, delta: Array, step: Step, state: State | None
    ) -> tuple[Array, Array]:
        """The state-space part: outputs [B, T, inner] and the state behind them."""
        spec, shape = self.spec, mixed.shape[:2]
        wide = wide_dtype(mixed)
        a_log = self.param("a_log", init_decay, (spec.heads,)).astype(wide)
        shift = self.param("dt_bias", init_step, (spec.heads,)).astype(wide)
        skip = self.param("d", nn.initializers.ones, (spec.heads,)).astype(wide)
        inner, part = spec.inner, spec.groups * spec.state
        x, b, c = jnp.split(jax.nn.silu(mixed), (inner, inner + part), -1)
        x = x.reshape(*shape, spec.heads, spec.head_dim)
        b, c = (v.reshape(*shape, spec.groups, spec.state) for v in (b, c))
        delta = jax.nn.softplus(delta.astype(wide) + shift)
        delta, a = jnp.clip(delta, *spec.step_limit), -jnp.exp(a_log)
        told = dict(positions=step.positions, chunk=spec.chunk)
        y, after = scan_in_parts(
            functools.partial(ssd, x, delta, a, b, c, **told),
            None if state is None else state["ssm"],
            lambda: surviving(delta, a, step.positions),
            step.context,
        )
        return (y + skip[:, None] * x).reshape(*shape, inner), after

    @staticmethod
    def init_state(spec: Mamba2Spec, width: int, batch: int, dtype: Any) -> State:
        """Empty states: the last conv - 1 inputs, and one matrix per head; float32."""
        wide = jnp.promote_types(dtype, jnp.float32)
        matrices = (batch, spec.heads, spec.head_dim, spec.state)
        return {
            "conv": jnp.zeros((batch, spec.conv - 1, conv_channels(spec)), wide),
            "ssm": jnp.zeros(matrices, wide),
        }


class Conv(nn.Module):
    """The depthwise convolution over x | B | C."""

    spec: Mamba2Spec

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T C"], step: Step, state: State | None
    ) -> tuple[Float[Array, "B T C"], Array | None]:
        spec = self.spec
        weight = self.param("weight", init_conv, (x.shape[-1], 1, spec.conv))
        bias = None
        if spec.conv_bias:
            bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        if state is None:
            past = tail_before(x, spec.conv - 1, step.context)
        else:
            past = state["conv"]
        return causal_conv(x, weight, bias=bias, positions=step.positions, state=past)


class GatedNorm(nn.Module):
    """The norm by group of the scan's gated output."""

    spec: Mamba2Spec

    @nn.compact
    def __call__(
        self, y: Float[Array, "B T C"], gate: Float[Array, "B T C"]
    ) -> Float[Array, "B T C"]:
        spec = self.spec
        scale = self.param("scale", nn.initializers.ones, (spec.inner,))
        return gated_norm(y, gate, scale, groups=spec.groups, eps=spec.norm_eps)


def conv_channels(spec: Mamba2Spec) -> int:
    """Channels that pass the convolution: x, B and C."""
    return spec.inner + 2 * spec.groups * spec.state


def init_conv(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """U(-1/sqrt(taps), 1/sqrt(taps)), PyTorch's default for a depthwise convolution."""
    bound = shape[-1] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def init_decay(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """ln U(1, 16): the logarithm of -a."""
    return jnp.log(jax.random.uniform(key, shape, dtype, *DECAY_RANGE))


def init_step(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """The inverse softplus of step sizes spread evenly in logarithm."""
    low, high = (math.log(v) for v in STEP_RANGE)
    step = jnp.exp(jax.random.uniform(key, shape, dtype, low, high))
    return step + jnp.log(-jnp.expm1(-step))
