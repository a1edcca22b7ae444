"""Grouped-query softmax attention: one function for training, prefill and decoding."""

from typing import Any, Protocol

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from lclm import sharding
from lclm.attention import make as make_pattern
from lclm.attention.context import Pattern, Tokens, attend
from lclm.blocks.norms import Norm
from lclm.cache.base import CachePolicy, Heads, Layer
from lclm.cache.step import Step
from lclm.config import AttentionSpec, NormSpec
from lclm.errors import LclmError
from lclm.ops.linear import linear
from lclm.typing import Array, Float
from pallas_kernels import mask as masks
from pallas_kernels.mask import Mask

INIT = nn.initializers.normal(0.02)


def project(
    module: nn.Module,
    name: str,
    x: Array,
    out: int,
    *,
    bias: bool,
    joins: str | None = None,
) -> Array:
    """Own and apply one [out, in] projection called `name`.

    What it gives can be kept or offloaded between the passes by that name
    (`lclm.models.remat`).
    """
    y = Projection(out, bias, joins, parent=module, name=name)(x)
    return checkpoint_name(y, name)


def matrix(
    module: nn.Module, name: str, shape: tuple[int, ...], init: Any = INIT
) -> Any:
    """A parameter of `module`, or what it was given in its place.

    That may be a packed matrix, or this device's rows or columns of it.
    """
    if module.has_variable("params", name):
        return sharding.gather(module.get_variable("params", name))
    return module.param(name, init, shape)


class Projection(nn.Module):
    """x W^T + b with W stored [out, in].

    joins: the mesh axis that splits the input features; products are summed over it.
    """

    features: int
    bias: bool = False
    joins: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        weight = matrix(self, "weight", (self.features, x.shape[-1]))
        bias = None
        if self.bias:
            bias = matrix(self, "bias", (self.features,), nn.initializers.zeros)
        if self.joins is None:
            return linear(x, weight, bias)
        y = sharding.total(linear(x, weight), self.joins)
        return y if bias is None else y + bias.astype(y.dtype)


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
        bias, joins = spec.out_bias, "tensor"
        return project(self, "o", out, self.width, bias=bias, joins=joins), cache

    def _heads(self, x: Array) -> Heads:
        """Project to queries, keys and values before rotation."""
        spec, size = self.spec, self.spec.head_dim
        bias = spec.qkv_bias

        def split(name: str, count: int) -> Array:
            y = project(self, name, x, count * size, bias=bias)
            return y.reshape(*x.shape[:2], -1, size)  # this device's heads

        q, k = split("q", spec.heads), split("k", spec.kv_heads)
        v = split("v", spec.kv_heads)
        if spec.qk_norm:
            q = Norm(self.norm, name="q_norm")(q)
            k = Norm(self.norm, name="k_norm")(k)
        return Heads(q, k, v)


def dense_attention(
    heads: Heads, step: Step, spec: AttentionSpec, sink: Array | None
) -> Float[Array, "B T N H"]:
    """Every query over all keys of the call that its layer may see."""
    q, k = step.rotate(heads.q, spec.rope), step.rotate(heads.k, spec.rope)
    own = step.segments is not None and spec.static and spec.laid != "rows"
    return attend(
        Pattern(layer_mask(spec), spec.heads, spec.scale, spec.softcap, own),
        q,
        k,
        heads.v,
        Tokens(step.positions, step.segments),
        sink=sink,
        context=step.context,
    )


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
