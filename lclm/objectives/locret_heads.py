"""Locret's retaining heads: which tokens answers will look at (arXiv 2410.01805)."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from lclm.blocks.attention import Attention, dense_attention
from lclm.cache.base import Heads
from lclm.cache.step import Step
from lclm.config import ModelConfig
from lclm.errors import unknown
from lclm.models.trunk import Trunk
from lclm.objectives.base import Share, full_attention
from lclm.ops.retaining import scores
from lclm.typing import Array, Batch, Bool, Float, Int, Leaf, Params

ASKS = ("answers", "predictors")
QUERIES = 128  # queries whose logits are held at once


@dataclass(frozen=True)
class LocretHeads:
    """An MLP a layer: concat(q, k, v) before rotation -> `hidden` -> a score a kv head.

    Its target is the largest scaled logit that the token's key receives from a query
    of an answer, over the kv head's query heads; the frozen model gives it in the same
    pass. Smooth-L1 to the target over prompt tokens, plus `smooth` times the squared
    difference of neighbours' scores. Answers are tokens with weight as targets; prompt
    tokens are those before an answer of their document. Settings are the paper's, but
    for asks="predictors": the query that predicts an answer's first token counts too.
    It is the prompt's last, no token of the answer; without it nothing learns to keep
    how an answer begins, which is much of a short one.
    """

    hidden: int = 1024
    smooth: float = 0.0025
    asks: str = "answers"

    def __post_init__(self):
        if self.asks not in ASKS:
            raise unknown("queries of locret_heads", self.asks, ASKS)

    def check(self, config: ModelConfig, length: int) -> None:
        """Raise LclmError unless attention is full and alike in all its layers."""
        full_attention(config, "locret_heads")

    def init(self, config: ModelConfig, key: Array) -> Params:
        """`w1` [layers, hidden, (N + 2K) H] and `w2` [layers, K, hidden]."""
        layers, spec = full_attention(config, "locret_heads")
        width = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
        one, two = jax.random.split(key)

        def draw(key: Array, rows: int, columns: int) -> Array:
            bound = columns**-0.5
            shape = (layers, rows, columns)
            return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

        return {
            "w1": draw(one, self.hidden, width),
            "w2": draw(two, spec.kv_heads, self.hidden),
        }

    def weight(self, batch: Batch) -> Float[Array, ""]:
        """Prompt tokens."""
        return jnp.sum(roles(batch)[1].astype(jnp.float32))

    def loss(
        self, trunk: Trunk, params: Params, batch: Batch, share: Share
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Share of the distance to the targets, and of the scores' roughness."""
        layers, _ = full_attention(trunk.config, "locret_heads")
        probe = LocretProbe(asking(batch, self.asks), roles(batch)[1])
        _, sums = trunk.probed(params, batch, probe, params["objective"])
        fit = sums["fit"] / (layers * share.weight)
        rough = sums["rough"] / share.weight
        return fit + self.smooth * rough, {"fit": fit, "rough": rough}

    def project(self, params: Params) -> Params:
        """Free parameters."""
        return params


def roles(batch: Batch) -> tuple[Bool[Array, "B T"], Bool[Array, "B T"]]:
    """Which inputs are tokens of an answer, and which prompt of one."""
    segments, T = batch["segments"], batch["tokens"].shape[1]
    weighted = jnp.pad(batch["weights"][:, :-1] > 0, ((0, 0), (1, 0)))
    same = jnp.pad(segments[:, 1:] == segments[:, :-1], ((0, 0), (1, 0)))
    answer = weighted & same
    index = jnp.arange(T, dtype=jnp.int32)
    coming = lax.cummin(jnp.where(answer, index, T), axis=1, reverse=True)
    place = jnp.minimum(coming, T - 1)
    own = jnp.take_along_axis(segments, place, 1) == segments
    return answer, own & (coming < T) & (segments > 0) & ~answer


def asking(batch: Batch, asks: str) -> Bool[Array, "B T"]:
    """Whose queries make the targets: answers, or those that predict them as well."""
    answer = roles(batch)[0]
    return answer if asks == "answers" else answer | (batch["weights"] > 0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LocretProbe:
    """Full attention that also sows how far a layer's scores are from their targets."""

    answer: Leaf
    prompt: Leaf

    def __call__(
        self, layer: Attention, heads: Heads, step: Step, sink: Array | None
    ) -> Float[Array, "B T N H"]:
        """The layer's own output."""
        spec, alone = layer.spec, dataclasses.replace(step, probe=None)
        heads = jax.tree.map(lax.stop_gradient, heads)
        own = layer.get_variable("params", "probe")
        found = scores(heads.q, heads.k, heads.v, own["w1"], own["w2"])
        q, k = step.rotate(heads.q, spec.rope), step.rotate(heads.k, spec.rope)
        scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
        want = lax.stop_gradient(received(q, k, self.answer, step.segments, scale))
        gap = jnp.where(self.prompt[..., None], found - want, 0.0)
        size = jnp.abs(gap)
        fit = jnp.where(size < 1, 0.5 * gap**2, size - 0.5)
        both = self.prompt[:, 1:] & self.prompt[:, :-1]
        both &= step.segments[:, 1:] == step.segments[:, :-1]
        steps = jnp.square(found[:, 1:] - found[:, :-1]) * both[..., None]
        layer.sow("probe", "fit", jnp.sum(jnp.mean(fit, -1)))
        layer.sow("probe", "rough", jnp.sum(jnp.mean(steps, -1)))
        return dense_attention(heads, alone, spec, sink)


def received(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    answer: Bool[Array, "B T"],
    segments: Int[Array, "B T"],
    scale: float,
) -> Float[Array, "B T K"]:
    """Largest scaled logit each key gets from later answer tokens of its document.

    Keys that get none have the lowest float32.
    """
    (B, T, N, H), K = q.shape, k.shape[2]
    count = -(-T // QUERIES)
    lowest = jnp.finfo(jnp.float32).min

    def cut(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, count * QUERIES - T)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, count, QUERIES, *x.shape[2:]), 1, 0)

    def one(best: Array, xs: tuple[Array, ...]) -> tuple[Array, None]:
        rows, asks, ids, at = xs

        def look(best: Array) -> Array:
            grouped = rows.reshape(B, QUERIES, K, N // K, H)
            logits = jnp.einsum(
                "btkgh,bskh->bskgt", grouped, k, preferred_element_type=jnp.float32
            )
            seen = asks[:, None] & (ids[:, None] == segments[:, :, None])
            seen &= jnp.arange(T)[:, None] <= at
            logits = jnp.where(seen[:, :, None, None], logits * scale, lowest)
            return jnp.maximum(best, logits.max((-1, -2)))

        return lax.cond(jnp.any(asks), look, lambda best: best, best), None

    at = jnp.arange(count * QUERIES).reshape(count, QUERIES)
    start = jnp.full((B, T, K), lowest)
    best, _ = lax.scan(one, start, (cut(q), cut(answer), cut(segments), at))
    return best
