"""Megalodon (arXiv 2404.08801): complex EMA, normalised attention inside chunks."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lclm.attention.chunked import Ring, chunk_attention
from lclm.blocks.norms import TimestepNorm
from lclm.cache.base import CachePolicy
from lclm.cache.step import Step
from lclm.config import LayerNormSpec, NormSpec
from lclm.errors import LclmError
from lclm.ops import rope
from lclm.ops.cema import cema, coefficients
from lclm.ops.linear import linear
from lclm.ops.norm import rms_norm
from lclm.ops.precision import wide, wide_dtype
from lclm.ops.timestep_norm import NormState, none_seen
from lclm.specs import FfnSpec, MegalodonSpec, RopeSpec, TimestepNormSpec
from lclm.typing import Array, Float

ZEROS = nn.initializers.zeros


class MegalodonState(NamedTuple):
    """What a layer carries: constant in the length of the text."""

    norm: NormState
    ema: Float[Array, "B 2 P D"]
    ring: Ring


def _he(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Normal with standard deviation 1 / sqrt(3 fan-in), as released."""
    return jax.random.normal(key, shape, dtype) / np.sqrt(3 * shape[-1])


class Dense(nn.Module):
    """x W^T + b with W [out, in], dense or packed, and Megalodon's initial values."""

    features: int
    bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        if self.has_variable("params", "weight"):
            weight = self.get_variable("params", "weight")
        else:
            weight = self.param("weight", _he, (self.features, x.shape[-1]))
        bias = self.param("bias", ZEROS, (self.features,)) if self.bias else None
        return linear(x, weight, bias)


class Cema(nn.Module):
    """The complex exponential moving average of every channel, in float32."""

    order: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], step: Step, state: Array | None
    ) -> tuple[Float[Array, "B T D"], Array]:
        D, N = x.shape[-1], self.order
        small = nn.initializers.normal(0.2)
        c = coefficients(
            self.param("alpha", small, (D, N, 1)),
            self.param("delta", small, (D, N, 1)),
            self.param("theta", _angles, (D, 1, 1)),
            self.param("gamma", _outputs, (D, N, 2)),
            self.param("omega", _direct, (D, 1)),
        )
        if state is None:
            state = jnp.zeros((len(x), 2, N, D), wide_dtype(x))
        return cema(x, c, state, positions=step.positions)


def _angles(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """logit(exp(-j ln D / D)), j = 1 .. D, in random order."""
    width = shape[0]
    power = jnp.arange(1, width + 1, dtype=dtype) * (np.log(max(width, 2)) / width)
    logit = -power - jnp.log1p(-jnp.exp(-power))
    return jax.random.permutation(key, logit).reshape(shape)


def _outputs(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    real = jax.random.normal(key, shape[:-1], dtype)
    return jnp.stack([real, jnp.zeros_like(real)], -1)


def _direct(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    return 0.25 * jax.random.truncated_normal(key, -4.0, 4.0, shape, dtype)


class Megalodon(nn.Module):
    """The mixer, its timestep norm included: add its output to x ("twohop" wiring)."""

    spec: MegalodonSpec
    width: int
    norm: NormSpec | LayerNormSpec | None = None
    index: int = 0
    policy: CachePolicy | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], step: Step, state: MegalodonState | None = None
    ) -> tuple[Float[Array, "B T D"], MegalodonState | None]:
        spec = self.spec
        _check(state, x)
        norm, ema, ring = (None, None, None) if state is None else state
        norms = TimestepNormSpec(spec.norm_groups, spec.eps)
        normed, norm = TimestepNorm(norms, name="norm")(x, step, norm)
        with jax.named_scope("cema"):
            mixed, ema = Cema(spec.order, name="cema")(normed, step, ema)
        scale = self.param("rms_scale", ZEROS, (self.width,))
        mixed = rms_norm(mixed, scale, eps=spec.eps, offset=1.0)

        q, k = self._queries_and_keys(mixed, step)
        v = self._gated("v", normed).reshape(*x.shape[:2], spec.heads, -1)
        with jax.named_scope("chunk_attention"):
            out, ring = chunk_attention(
                q, k, v, positions=step.positions, chunk=spec.chunk, scale=1.0,
                ring=ring,
            )  # fmt: skip
        out = out.astype(x.dtype).reshape(*x.shape[:2], -1) * self._gated("r", mixed)
        y = Dense(self.width, name="h1")(mixed)
        y = y + Dense(self.width, bias=False, name="h2")(out)
        return y, None if state is None else MegalodonState(norm, ema, ring)

    def _gated(self, name: str, x: Array) -> Array:
        y = wide(Dense(self.spec.value, name=name)(x))
        return nn.silu(y).astype(x.dtype)

    def _queries_and_keys(self, mixed: Array, step: Step) -> tuple[Array, Array]:
        """Rotated; both sides of one normalised projection, each with its affine."""
        spec = self.spec
        size = spec.z // spec.heads
        gamma = self.param("gamma", ZEROS, (2, spec.z))
        beta = self.param("beta", ZEROS, (2, spec.z))
        z = wide(Dense(spec.z, name="z")(mixed))
        z = z.reshape(*z.shape[:2], spec.heads, size)
        z = z * lax.rsqrt(jnp.mean(z * z, -1, keepdims=True) + spec.eps)
        gamma = ((1 + wide(gamma)) / np.sqrt(size)).reshape(2, spec.heads, size)
        beta = wide(beta).reshape(2, spec.heads, size)
        turn = RopeSpec(theta=spec.theta, context=spec.chunk, layout="interleaved")
        at = jnp.maximum(step.positions, 0) % spec.chunk
        cos, sin = rope.angles(at, turn, size)
        q, k = (
            rope.rotate(z * g + b, cos, sin, layout="interleaved").astype(mixed.dtype)
            for g, b in zip(gamma, beta, strict=True)
        )
        return q, k

    @staticmethod
    def init_state(
        spec: MegalodonSpec, width: int, batch: int, dtype: Any
    ) -> MegalodonState:
        """The state before the first token; the ring of keys and values in `dtype`."""
        heads, c = spec.heads, spec.chunk
        ring = Ring(
            jnp.zeros((batch, heads, c, spec.z // heads), dtype),
            jnp.zeros((batch, heads, c, spec.value // heads), dtype),
        )
        ema = jnp.zeros((batch, 2, spec.order, width), jnp.float32)
        return MegalodonState(none_seen(batch, spec.norm_groups), ema, ring)


def _check(state: MegalodonState | None, x: Array) -> None:
    if state is not None and len(state.ema) != len(x):
        raise LclmError(
            f"a Megalodon state of {len(state.ema)} rows for an input of {len(x)}: "
            "make it with init_state for this batch, or gather its rows"
        )


class Ffn(nn.Module):
    """fc2(silu(fc1(x)) [* fc3(x)]) [* alpha]."""

    spec: FfnSpec

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        spec = self.spec
        hidden = nn.silu(wide(Dense(spec.width, bias=False, name="fc1")(x)))
        hidden = hidden.astype(x.dtype)
        if spec.gated:
            hidden = hidden * Dense(spec.width, bias=False, name="fc3")(x)
        y = Dense(x.shape[-1], bias=False, name="fc2")(hidden)
        if spec.rescale:
            init = nn.initializers.constant(0.1 * 0.5 ** _depth(self.path))
            y = y * self.param("alpha", init, (x.shape[-1],)).astype(y.dtype)
        return y


def _depth(path: tuple[str, ...]) -> int:
    """The layer that a module stands in, by its path; 0 outside a stack."""
    found = [p for p in path if p.startswith("layers_")]
    return int(found[0].removeprefix("layers_")) if found else 0
