"""One residual layer, and the state that all layers of a model carry."""

from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from lclm.blocks import FEED_FORWARDS, MIXERS
from lclm.blocks.norms import Norm, norm_states
from lclm.cache.base import CachePolicy, layers_of
from lclm.cache.step import Step
from lclm.config import AttentionSpec, LayerSpec, ModelConfig
from lclm.typing import Array, Float

# Where a mixer's parameters stand; others under their own type.
NAMES = {"attention": "attn"}


class DecoderLayer(nn.Module):
    """A mixer and a feed-forward in the wiring of their spec (`LayerSpec`).

    `dtype` is the type the halves compute in where the residual stream has another.
    """

    spec: LayerSpec
    width: int
    index: int = 0
    policy: CachePolicy | None = None
    dtype: Any = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], step: Step, state: Any = None
    ) -> tuple[Float[Array, "B T D"], Any]:
        spec = self.spec
        kind = spec.mixer.TYPE
        x = checkpoint_name(x, "layer_input")
        mixer = MIXERS[kind](
            spec.mixer,
            self.width,
            spec.norm,
            self.index,
            self.policy,
            name=NAMES.get(kind, kind),
        )
        if spec.wiring == "twohop":
            y, state = mixer(self._cast(x), step, state)
            return x + self._half(x + y, "norm2", self._feed_forward()), state
        y, state = mixer(self._cast(Norm(spec.norm, name="norm1")(x)), step, state)
        if spec.post_norms:
            y = Norm(spec.norm, name="post_norm1")(y)
        x = x + y.astype(x.dtype)
        if spec.mlp is None:
            return x, state
        y = self._half(x, "norm2", self._feed_forward())
        if spec.post_norms:
            y = Norm(spec.norm, name="post_norm2")(y)
        return x + y.astype(x.dtype), state

    def _feed_forward(self) -> nn.Module:
        kind = self.spec.mlp.TYPE
        return FEED_FORWARDS[kind](self.spec.mlp, name="mlp")

    def _half(self, x: Array, norm: str, part: nn.Module) -> Array:
        return part(self._cast(Norm(self.spec.norm, name=norm)(x)))

    def _cast(self, x: Array) -> Array:
        return x if self.dtype is None else x.astype(self.dtype)


def init_states(
    config: ModelConfig, policy: CachePolicy, batch: int, length: int, dtype: Any
) -> tuple[Any, ...]:
    """What every layer carries for rows of `length` tokens, and the final norm.

    Attention layers get the policy's cache in `dtype`, other mixers their own state
    (recurrent states in float32); a final norm with a state comes last.
    """
    states = []
    known = {layer.index: layer for layer in layers_of(config)}
    for index, layer in enumerate(config.layers):
        if index in known:
            own = policy.over(known[index])
            states.append(own.init(known[index], batch, length, dtype))
        else:
            mixer = MIXERS[layer.mixer.TYPE]
            states.append(mixer.init_state(layer.mixer, config.width, batch, dtype))
    return (*states, *norm_states(config.norm, batch))


def state_bytes(
    config: ModelConfig, policy: CachePolicy, batch: int, length: int, dtype: Any
) -> int:
    """Bytes that `init_states` will allocate, from shapes alone."""
    return sum(state_sizes(config, policy, batch, length, dtype))


def state_sizes(
    config: ModelConfig, policy: CachePolicy, batch: int, length: int, dtype: Any
) -> tuple[int, int]:
    """Bytes of attention caches, and of states that have one size at any length."""
    states = jax.eval_shape(lambda: init_states(config, policy, batch, length, dtype))
    sizes = [
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        for state in states
    ]
    caches = [
        size
        for size, layer in zip(sizes, config.layers, strict=False)
        if isinstance(layer.mixer, AttentionSpec)
    ]
    return sum(caches), sum(sizes) - sum(caches)


def each_cache(config: ModelConfig, states: tuple[Any, ...], change) -> tuple[Any, ...]:
    """`change(cache, layer)` applied to the caches of attention layers."""
    known = {layer.index: layer for layer in layers_of(config)}
    return tuple(
        change(state, known[i]) if i in known else state
        for i, state in enumerate(states)
    )
