"""Grouped-query softmax attention: one function for training, prefill and decoding."""

import functools
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from lclm.attention import make as make_pattern
from lclm.blocks.norms import Norm
from lclm.cache.base import CachePolicy, Heads, Layer
from lclm.cache.step import Step
from lclm.config import AttentionSpec, NormSpec
from lclm.errors import LclmError
from lclm.ops.branch import choose
from lclm.ops.linear import linear
from lclm.ops.masked import masked_attention, with_sink
from lclm.typing import Array, Float
from pallas_kernels import mask as masks
from pallas_kernels.attention import attention
from pallas_kernels.mask import Mask

INIT = nn.initializers.normal(0.02)


def project(module: nn.Module, name: str, x: Array, out: int, *, bias: bool) -> Array:
    """Own and apply one [out, in] projection called `name`."""
    return Projection(out, bias, parent=module, name=name)(x)


def matrix(module: nn.Module, name: str, shape: tuple[int, int]) -> Any:
    """A weight [out, in] of `module`, or the packed one it was given in its place."""
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, INIT, shape)


class Projection(nn.Module):
    """x W^T + b with W stored [out, in]."""

    features: int
    bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        weight = matrix(self, "weight", (self.features, x.shape[-1]))
        bias = None
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return linear(x, weight, bias)


class Probe(Protocol):
    """What an objective does inside each attention layer, in place of its attention.

    A pytree. Parameters it was given for the layer are `layer.get_variable("params",
    "probe")`; what it sows in the collection "probe" comes back to the objective.
    """

    def __call__(
        self, layer: "Attention", heads: Heads, step: Step, sink: Array | None
    ) -> Float[Array, "B T N H"]:
        """The output of the layer's heads."""
        ...


class Attention(nn.Module):
    """The attention mixer of one layer.

    With a cache the policy decides what is read and what is kept; without one the
    call is dense and parallel, limited by the layer's own window.
    """

    spec: AttentionSpec
    width: int
    norm: NormSpec
    index: int = 0
    policy: CachePolicy | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], step: Step, cache: Any = None
    ) -> tuple[Float[Array, "B T D"], Any]:
        spec = self.spec
        heads = self._heads(x)
        sink = None
        if spec.sink:
            sink = self.param("sink", nn.initializers.zeros, (spec.heads,))
        if step.probe is not None:
            out = step.probe(self, heads, step, sink)
        elif cache is None:
            out = dense_attention(heads, step, spec, sink)
        else:
            layer = Layer(self.index, spec, layer_mask(spec) if spec.static else None)
            with jax.named_scope("cache"):
                out, cache = self.policy.attend(cache, heads, step, layer, sink)
        out = out.astype(x.dtype).reshape(*x.shape[:2], -1)
        return project(self, "o", out, self.width, bias=spec.out_bias), cache

    def _heads(self, x: Array) -> Heads:
        """Project to queries, keys and values before rotation."""
        spec, size = self.spec, self.spec.head_dim
        bias = spec.qkv_bias

        def split(name: str, count: int) -> Array:
            y = project(self, name, x, count * size, bias=bias)
            return y.reshape(*x.shape[:2], count, size)

        q, k = split("q", spec.heads), split("k", spec.kv_heads)
        v = split("v", spec.kv_heads)
        if spec.qk_norm:
            q = Norm(self.norm, name="q_norm")(q)
            k = Norm(self.norm, name="k_norm")(k)
        return Heads(q, k, v)


def dense_attention(
    heads: Heads, step: Step, spec: AttentionSpec, sink: Array | None
) -> Float[Array, "B T N H"]:
    """Every query over all keys of the call that its layer may see.

    A static pattern laid on documents runs in blocks where every row is one document
    from its first token on, and else pair by pair: later documents of a row do not
    start where a block does.
    """
    q, k = step.rotate(heads.q, spec.rope), step.rotate(heads.k, spec.rope)
    values = (q, k, heads.v, sink)
    ids = (step.positions, step.segments)
    if step.segments is None or not spec.static or spec.laid == "rows":
        return _by_blocks(spec, values, ids)
    T = q.shape[1]
    own = ~step.valid | (step.positions == jnp.arange(T, dtype=jnp.int32))
    forms = (
        functools.partial(_by_pairs, spec),
        functools.partial(_by_blocks, spec),
    )
    return choose(forms, jnp.all(own).astype(jnp.int32), values, ids)


def _by_blocks(spec: AttentionSpec, values: Any, ids: Any) -> Array:
    """The layer's mask over the row and, where ids are given, the query's document."""
    q, k, v, sink = values
    _, segments = ids
    out, _ = attention(
        q,
        k,
        v,
        mask=layer_mask(spec),
        scale=spec.scale,
        softcap=spec.softcap,
        sink=sink,
        q_segment_ids=segments,
        kv_segment_ids=segments,
    )
    return out


def _by_pairs(spec: AttentionSpec, values: Any, ids: Any) -> Array:
    """The layer's mask over positions inside each document."""
    q, k, v, sink = values
    positions, segments = ids
    parts = masked_attention(
        q,
        jnp.swapaxes(k, 1, 2),
        jnp.swapaxes(v, 1, 2),
        positions,
        positions,
        mask=layer_mask(spec),
        scale=spec.scale,
        softcap=spec.softcap,
        segments=segments,
    )
    return with_sink(*parts, sink)


def layer_mask(spec: AttentionSpec) -> Mask:
    """What a query of the layer may see; LclmError where a pattern's heads misfit.

    Every pattern of the table is causal, but for S2-Attn that wraps.
    """
    if spec.pattern is not None:
        mask = make_pattern(spec.pattern)
        try:
            mask.layout(spec.heads)
        except ValueError as error:
            raise LclmError(f"attention pattern {spec.pattern!r}: {error}") from None
        return mask
    if spec.window is None:
        return masks.causal()
    near = masks.window(spec.window)
    return masks.causal() & (near | masks.sink(spec.sinks) if spec.sinks else near)
