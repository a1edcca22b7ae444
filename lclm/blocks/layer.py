"""One residual layer: norm, mix, add; norm, feed forward, add."""

from typing import Any

import flax.linen as nn

from lclm.blocks.attention import Attention, Scale
from lclm.blocks.mlp import Mlp
from lclm.cache.base import CachePolicy
from lclm.cache.step import Step
from lclm.config import LayerSpec
from lclm.typing import Array, Float


class DecoderLayer(nn.Module):
    """Pre-norm residual layer; Gemma-3 also normalises what each half returns."""

    spec: LayerSpec
    width: int
    index: int = 0
    policy: CachePolicy | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], step: Step, cache: Any = None
    ) -> tuple[Float[Array, "B T D"], Any]:
        spec, eps, offset = self.spec, self.spec.norm.eps, self.spec.norm.offset
        mixer = Attention(
            spec.mixer,
            self.width,
            eps,
            offset,
            self.index,
            self.policy,
            name="attn",
        )
        y, cache = mixer(Scale(eps, offset, name="norm1")(x), step, cache)
        if spec.post_norms:
            y = Scale(eps, offset, name="post_norm1")(y)
        x = x + y
        y = Mlp(spec.mlp, name="mlp")(Scale(eps, offset, name="norm2")(x))
        if spec.post_norms:
            y = Scale(eps, offset, name="post_norm2")(y)
        return x + y, cache
