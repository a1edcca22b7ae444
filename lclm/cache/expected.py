"""Expected attention: what queries still to come will look at (arXiv 2510.00636)."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jax import lax

from lclm.cache.base import KV, Layer, Needs
from lclm.cache.evict import Evicting
from lclm.errors import LclmError
from lclm.ops import rope
from lclm.ops.codes import by_tiles
from lclm.ops.precision import wide
from lclm.typing import Array, Float

Notes = dict[str, Array]
LOWEST = jnp.finfo(jnp.float32).min


@dataclass(frozen=True)
class ExpectedAttention(Evicting):
    """A key's mean attention from queries drawn like those so far, times its value.

    Unrotated queries of a head are taken as normal with the mean and covariance of all
    that were read behind the `sinks` first, turned by the mean rotation of the next
    `ahead` positions. The score is the mean of softmax(k m / sqrt(H) + k C k / 2H) over
    the query heads of a kv head, plus `epsilon`, times the norm of the value
    (equations 4-9). It needs no question: query-agnostic.
    """

    ahead: int = 512
    epsilon: float = 0.0
    needs: ClassVar[Needs] = Needs(queries=True)

    def __post_init__(self):
        super().__post_init__()
        if self.ahead < 1 or self.epsilon < 0:
            raise LclmError(
                f"expectedattention: ahead is {self.ahead} and epsilon {self.epsilon}; "
                "ahead must be at least 1 token and epsilon at least 0"
            )

    def notes(self, layer: Layer, batch: int, dtype) -> Notes:
        """Sums over queries read, and the outlook of the last rating."""
        N, H = layer.spec.heads, layer.spec.head_dim

        def zeros(*shape):
            return jnp.zeros((batch, *shape), jnp.float32)

        return {
            "count": zeros(),
            "sum": zeros(N, H),
            "square": zeros(N, H, H),
            "mean": zeros(N, H),
            "spread": zeros(N, H, H),
            "lse": zeros(N),
        }

    def note(self, cache, new, step, layer, evidence):
        notes = {k: v for k, v in cache.extra.items() if k != "score"}
        counts = step.positions >= self.sinks
        q = jnp.where(counts[..., None, None], wide(evidence.queries), 0.0)
        notes["count"] += jnp.sum(counts, 1)
        notes["sum"] += jnp.sum(q, 1)
        notes["square"] += jnp.einsum("btni,btnj->bnij", q, q)
        fresh = self._score(new, notes, layer, notes["lse"])
        return cache.extra["score"], fresh, notes

    def rate(self, kv, score, notes, layer):
        mean, spread = self._outlook(kv, notes, layer)
        notes = {**notes, "mean": mean, "spread": spread}
        logits = _logits(kv, notes, layer)
        seen = (kv.pos >= 0)[:, :, None]
        logits = jnp.where(seen, logits, LOWEST)
        top = jnp.max(logits, -1, keepdims=True)
        lse = top[..., 0] + jnp.log(jnp.sum(jnp.exp(logits - top) * seen, -1))
        notes["lse"] = lse.reshape(notes["lse"].shape)
        return self._score(kv, notes, layer, notes["lse"]), notes

    def _outlook(self, kv: KV, notes: Notes, layer: Layer) -> tuple[Array, Array]:
        """Mean [B, N, H] and covariance [B, N, H, H] of rotated queries to come."""
        spec = layer.spec
        count = jnp.maximum(notes["count"], 1.0)[:, None, None]
        mean = notes["sum"] / count
        spread = notes["square"] / count[..., None]
        spread -= mean[..., :, None] * mean[..., None, :]
        if spec.rope is None:
            return mean, spread
        last = jnp.max(kv.pos[:, 0], -1, keepdims=True)
        at = last + 1 + lax.iota(jnp.int32, self.ahead)[None]
        tables = rope.angles(jnp.maximum(at, 0), spec.rope, spec.head_dim)
        cos, sin = (jnp.mean(table, 1, keepdims=True) for table in tables)

        def turn(x: Array) -> Array:
            flat = x.reshape(x.shape[0], 1, -1, x.shape[-1])
            return rope.rotate(flat, cos, sin, layout=spec.rope.layout).reshape(x.shape)

        return turn(mean), turn(jnp.swapaxes(turn(spread), -1, -2))

    def _score(self, kv: KV, notes: Notes, layer: Layer, lse: Array) -> Array:
        logits = _logits(kv, notes, layer)
        share = jnp.exp(logits - lse.reshape(*logits.shape[:3], 1))
        size = by_tiles(lambda v: jnp.linalg.norm(wide(v), axis=-1), kv.v)
        return (jnp.mean(share, 2) + self.epsilon) * size


def _logits(kv: KV, notes: Notes, layer: Layer) -> Float[Array, "B K G S"]:
    """Log of the expected exponential of a scaled product, of each query head."""
    spec = layer.spec
    B, K, _, H = kv.k.shape
    scale = H**-0.5 if spec.scale is None else spec.scale
    mean = notes["mean"].reshape(B, K, -1, H)
    spread = notes["spread"].reshape(B, K, -1, H, H)

    def rate(k: Array) -> Array:
        k = wide(k)
        linear = jnp.einsum("bksh,bkgh->bkgs", k, mean)
        turned = jnp.einsum("bksh,bkghj->bkgsj", k, spread)
        square = jnp.einsum("bkgsj,bksj->bkgs", turned, k)
        return scale * linear + 0.5 * scale**2 * square

    return by_tiles(rate, kv.k, always=True)
