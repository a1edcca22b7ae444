"""Drawing the next token: greedy, temperature, top-k, top-p, min-p; no sort of V."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Key

from lclm.errors import LclmError
from lclm.typing import Array, Float, Int

COLDEST = 1e-6  # below this float32 division loses the largest logit
LANES = 256  # sums over long rows run down columns, which vectorises


@dataclass(frozen=True)
class Sampler:
    """How to draw a token; filters apply in field order, as in transformers.

    Logits are divided by `temperature` (0 takes the largest: no randomness, no
    filters). `top_k` keeps the k likeliest; `top_p` those before which less than p of
    the remaining probability lies (arXiv 1904.09751); `min_p` those at least min_p
    times as likely as the first (arXiv 2407.01082). Tokens equal to the last one kept
    are kept too, and the likeliest always stays. Raises LclmError out of range.
    """

    temperature: float | int = 0.0
    top_k: int | None = None
    top_p: float | int | None = None
    min_p: float | int | None = None

    def __post_init__(self):
        def require(name: str, allowed: str, low: float | int, high: float | int):
            value = getattr(self, name)
            number = isinstance(value, float | int) and not isinstance(value, bool)
            if not number or not low <= value <= high or value == math.inf:
                raise LclmError(f"{name} is {value!r}; use {allowed}")

        if self.temperature != 0 or isinstance(self.temperature, bool):
            text = f"0 for greedy, or a number >= {COLDEST}"
            require("temperature", text, COLDEST, math.inf)
        if self.top_k is not None:
            require("top_k", "a whole number >= 1, or None for all", 1, math.inf)
            if not isinstance(self.top_k, int):
                raise LclmError(f"top_k is {self.top_k!r}; use a whole number >= 1")
        if self.top_p is not None:
            text = "a number above 0 and at most 1, or None for all"
            require("top_p", text, math.ulp(0), 1)
        if self.min_p is not None:
            require("min_p", "a number from 0 to 1, or None for all", 0, 1)


def sample(
    logits: Float[Array, "B V"], key: Key[Array, "..."], sampler: Sampler
) -> Int[Array, " B"]:
    """One int32 token per row, drawn by the Gumbel-max trick from the kept tokens.

    `key` is one key, which row b folds its index into, or [B] keys: either way the
    draw of a row depends on its own logits and key alone.
    """
    logits = logits.astype(jnp.float32)
    if sampler.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if key.ndim == 0:
        key = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(logits)))
    return jax.vmap(_draw)(_columns(keep(logits, sampler)), key)


def keep(logits: Float[Array, "B V"], sampler: Sampler) -> Float[Array, "B V"]:
    """Logits over temperature, shifted to a maximum of 0; dropped tokens are -inf."""
    scores = (logits - logits.max(axis=-1, keepdims=True)) / sampler.temperature
    ranked = None
    if sampler.top_k is not None and sampler.top_k < scores.shape[-1]:
        ranked = lax.top_k(scores, sampler.top_k)[0]
        scores = _at_least(scores, ranked[:, -1:])
    if sampler.top_p is not None and sampler.top_p < 1:
        scores = _at_least(scores, _nucleus(scores, ranked, sampler.top_p))
    if sampler.min_p:
        scores = _at_least(scores, math.log(sampler.min_p))
    return scores


def _at_least(scores: Array, cut: Array | float) -> Array:
    return jnp.where(scores >= cut, scores, -jnp.inf)


def _nucleus(
    scores: Float[Array, "B V"], ranked: Float[Array, "B k"] | None, top_p: float
) -> Float[Array, "B 1"]:
    """The smallest score which less than `top_p` of the probability lies above.

    From the `ranked` scores where top-k has sorted them; else by bisection over the 32
    bits of a float, in 32 passes of compare and add, where a sort of 49,152 scores
    takes a CPU sixteen times as long.
    """
    limit = top_p * jnp.exp(scores).sum(axis=-1, keepdims=True)
    if ranked is not None:
        mass = jnp.exp(ranked)
        before = jnp.cumsum(mass, axis=-1) - mass
        inside = (before < limit).at[:, 0].set(True)
        return jnp.where(inside, ranked, jnp.inf).min(axis=-1, keepdims=True)
    columns = _columns(scores)
    mass, order = jnp.exp(columns), _ordered(columns)

    def halve(_, bounds):
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)
        above = jnp.where(order > middle[:, :, None], mass, 0.0)
        enough = above.sum(axis=1).sum(axis=-1, keepdims=True) < limit
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    edge = jnp.zeros_like(limit)
    bounds = _ordered(edge - jnp.inf), _ordered(edge)
    cut = lax.fori_loop(0, 32, halve, bounds)[1]
    return lax.bitcast_convert_type(_flip(cut), jnp.float32)


def _ordered(values: Array) -> Array:
    """Int32 that sort as the float32 they come from."""
    return _flip(lax.bitcast_convert_type(values, jnp.int32))


def _flip(bits: Array) -> Array:
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _columns(scores: Float[Array, "B V"]) -> Float[Array, "B rows lanes"]:
    """Token i at row i // LANES, column i % LANES; the last row is filled with -inf."""
    spare = -scores.shape[-1] % LANES
    padded = jnp.pad(scores, ((0, 0), (0, spare)), constant_values=-jnp.inf)
    return padded.reshape(len(scores), -1, LANES)


def _draw(columns: Float[Array, "rows lanes"], key: Key[Array, ""]) -> Int[Array, ""]:
    """A token by softmax: first its column, then its row, each by Gumbel-max.

    Two draws need rows + lanes random numbers where one needs rows x lanes.
    """
    first, second = jax.random.split(key)
    mass = jnp.log(jnp.exp(columns).sum(axis=0))
    column = jnp.argmax(mass + jax.random.gumbel(first, mass.shape))
    inside = columns[:, column]
    row = jnp.argmax(inside + jax.random.gumbel(second, inside.shape))
    return (row * LANES + column).astype(jnp.int32)
