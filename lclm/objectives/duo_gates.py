"""DuoAttention's gates: which kv heads need the whole text (arXiv 2410.10819)."""

import dataclasses
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from lclm.blocks.attention import Attention, dense_attention
from lclm.cache.base import Heads
from lclm.cache.step import Step
from lclm.config import ModelConfig
from lclm.models.trunk import Trunk
from lclm.objectives.base import Share, full_attention
from lclm.typing import Array, Batch, Float, Params


@dataclass(frozen=True)
class DuoGates:
    """Gates alpha [attention layers, kv heads]; the model itself stays as it is.

    Rows run twice: once as they are, once where every layer gives alpha times the
    attention output of the first run and 1 - alpha times attention of its own over
    `sinks` first tokens, `window` last ones and itself, as the cache policy `duo` and
    `streaming` have it. The loss is the mean squared difference of
    the final hidden states at weighted positions (those that predict the answer), plus
    `penalty` times the mean of |alpha|. Settings are the paper's.
    """

    sinks: int = 128
    window: int = 256
    penalty: float = 0.05
    start: float = 1.0

    def check(self, config: ModelConfig, length: int) -> None:
        """Raise LclmError unless attention is full and alike in all its layers."""
        full_attention(config, "duo_gates")

    def init(self, config: ModelConfig, key: Array) -> Params:
        """Every gate at `start`."""
        layers, spec = full_attention(config, "duo_gates")
        return {"alpha": jnp.full((layers, spec.kv_heads), self.start)}

    def weight(self, batch: Batch) -> Float[Array, ""]:
        """Positions that are compared."""
        return jnp.sum(batch["weights"])

    def loss(
        self, trunk: Trunk, params: Params, batch: Batch, share: Share
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Share of the distance to the full model, and of the gates' size."""
        own = params["objective"]
        names = ("tokens", "positions", "segments")
        twice = {n: jnp.concatenate([batch[n], batch[n]]) for n in names}
        probe = DuoProbe(self.sinks, self.window)
        hidden, _ = trunk.probed(params, twice, probe, own)
        full, mixed = jnp.split(hidden.astype(jnp.float32), 2)
        gap = jnp.mean(jnp.square(jax.lax.stop_gradient(full) - mixed), -1)
        distance = jnp.sum(gap * batch["weights"]) / share.weight
        size = jnp.mean(jnp.abs(own["alpha"])) / share.parts
        told = {"distance": distance, "alpha": size}
        return distance + self.penalty * size, told

    def project(self, params: Params) -> Params:
        """Gates between 0 and 1."""
        return {"alpha": jnp.clip(params["alpha"], 0, 1)}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DuoProbe:
    """Attention of rows that come twice, [full; mixed]; no gradient into the full ones.

    The second half of a batch repeats the tokens of the first.
    """

    sinks: int = field(metadata={"static": True})
    window: int = field(metadata={"static": True})

    def __call__(
        self, layer: Attention, heads: Heads, step: Step, sink: Array | None
    ) -> Float[Array, "B T N H"]:
        """Both halves' outputs."""
        spec = layer.spec
        rows = heads.q.shape[0] // 2
        alone = dataclasses.replace(step, probe=None)
        half = jax.tree.map(lambda x: x[:rows], alone)
        near = dataclasses.replace(spec, window=self.window + 1, sinks=self.sinks)
        first, second = (
            Heads(heads.q[at], heads.k[at], heads.v[at])
            for at in (slice(None, rows), slice(rows, None))
        )
        full = jax.lax.stop_gradient(dense_attention(first, half, spec, sink))
        local = dense_attention(second, half, near, sink)
        alpha = layer.get_variable("params", "probe")["alpha"]
        share = jnp.repeat(alpha, spec.heads // spec.kv_heads)[:, None]
        mixed = share * full + (1 - share) * local
        return jnp.concatenate([full, mixed.astype(full.dtype)])
